"""An NSA model as users run it: caches of all kinds, padding, packing, generate, files."""

import copy
import json

import pytest
import tiny
import torch
from checks import assert_close
from deepseek_repo import nsa_deepseek as nsa
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(nsa, "_MAX_TILE", 16)
    monkeypatch.setattr(nsa, "_ROWS_A_BLOCK", 7)


@pytest.fixture(scope="module")
def model():
    model = tiny.make_model("nsa")
    for layer in model.model.layers:  # scores spread widely, so that selection selects
        layer.self_attn.q_proj.weight.data *= 3
    return model


def run_in_chunks(model, tokens, chunks, **kwargs):
    """Logits of all tokens, given to the model a few at a time, and the cache."""
    cache, logits, start = DynamicCache(config=model.config), [], 0
    mask = kwargs.pop("attention_mask", None)
    for size in chunks:
        part = {} if mask is None else {"attention_mask": mask[:, : start + size]}
        output = model(tokens[:, start : start + size], past_key_values=cache, **part, **kwargs)
        logits.append(output.logits)
        start += size
    assert start == tokens.shape[1]
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize(
    "chunks", [[1] * 100, [60] + [1] * 40, [7, 1, 30, 2, 9, 50, 1], [100], [3, 97], [90, 5, 5], [33, 33, 34]]
)
@torch.no_grad()
def test_cached_equals_uncached(model, chunks):
    tokens = tiny.make_tokens(2, 100)
    logits, _ = run_in_chunks(model, tokens, chunks)
    assert_close(logits, model(tokens, use_cache=False).logits, "logits", atol=1e-5)


@pytest.mark.parametrize("chunks", [[100], [60] + [1] * 40, [10, 40, 8, 1, 41], [4, 4, 92]])
@torch.no_grad()
def test_left_padded_rows_equal_rows_alone(model, chunks):
    """Blocks are counted from a row's first token: no padding is a multiple of the block sizes here."""
    tokens = tiny.make_tokens(4, 100)
    padding = [0, 7, 30, 61]
    mask = (torch.arange(100) >= torch.tensor(padding)[:, None]).long()
    logits, _ = run_in_chunks(model, tokens, chunks, attention_mask=mask)
    uncached = model(tokens, attention_mask=mask, use_cache=False).logits
    for row, pad in enumerate(padding):
        alone = model(tokens[row : row + 1, pad:]).logits[0]
        assert_close(logits[row, pad:], alone, f"row {row}, cached", atol=1e-5)
        assert_close(uncached[row, pad:], alone, f"row {row}, uncached", atol=1e-5)


@torch.no_grad()
def test_right_padding_changes_nothing(model):
    tokens = tiny.make_tokens(2, 60)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, 41:] = 0
    logits = model(tokens, attention_mask=mask).logits
    assert_close(logits[1, :41], model(tokens[1:, :41]).logits[0], atol=1e-5)
    assert_close(logits[0], model(tokens[:1]).logits[0], atol=1e-5)


@torch.no_grad()
def test_packed_documents_equal_separate_ones(model):
    lengths = [[37, 5, 1, 57], [60, 40]]
    tokens = tiny.make_tokens(2, 100)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    packed = model(tokens, position_ids=positions, use_cache=False).logits
    for row, documents in enumerate(lengths):
        for document, logits in zip(tokens[row].split(documents), packed[row].split(documents), strict=True):
            assert_close(logits, model(document[None]).logits[0], f"document of {len(document)}", atol=1e-5)


def test_packed_gradients_equal_separate_ones():
    model = tiny.make_model("nsa", aux_loss_alpha=0.0).train()
    tokens = tiny.make_tokens(1, 80)
    positions = torch.cat([torch.arange(50), torch.arange(30)])[None]
    labels = tokens.clone()
    labels[0, 50] = -100
    model(tokens, position_ids=positions, labels=labels, use_cache=False).loss.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    losses = [model(part, labels=part).loss * (part.shape[1] - 1) for part in (tokens[:, :50], tokens[:, 50:])]
    (sum(losses) / 78).backward()
    for name, parameter in model.named_parameters():
        assert_close(packed[name], parameter.grad, name, atol=1e-6)


def test_gradients_reach_every_parameter():
    model = tiny.make_model("nsa").train()
    tokens = tiny.make_tokens(2, 60)
    model(tokens, labels=tokens).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [name for name in missing if "experts" not in name], missing


def test_gradients_equal_finite_differences():
    """Of the whole model, along one random direction; the choice of blocks is constant nearby."""
    model = tiny.make_model("nsa", aux_loss_alpha=0.0, n_routed_experts=None)
    tokens = tiny.make_tokens(1, 70)
    model(tokens, labels=tokens).loss.backward()
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    expected = sum((p.grad * direction[name]).sum() for name, p in model.named_parameters())
    losses = []
    for step in (1e-3, -1e-3):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter += step * direction[name]
            losses.append(moved(tokens, labels=tokens).loss.double())
    assert_close((losses[0] - losses[1]) / 2e-3, expected.double(), atol=0.02, rtol=0.02)


@torch.no_grad()
def test_gradient_checkpointing_runs():
    model = tiny.make_model("nsa").train()
    model.gradient_checkpointing_enable()
    with torch.enable_grad():
        tokens = tiny.make_tokens(1, 60)
        model(tokens, labels=tokens).loss.backward()
    assert model.model.embed_tokens.weight.grad.any()


def greedy_without_cache(model, tokens, count):
    for _ in range(count):
        tokens = torch.cat((tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return tokens


class TestGenerate:
    @torch.no_grad()
    def test_greedy_equals_no_cache(self, model):
        tokens = tiny.make_tokens(2, 50)
        generated = model.generate(tokens, max_new_tokens=40, do_sample=False, eos_token_id=None)
        assert torch.equal(generated, greedy_without_cache(model, tokens, 40))

    @torch.no_grad()
    def test_left_padded_batch(self, model):
        tokens = tiny.make_tokens(3, 50)
        padding = [0, 13, 38]
        mask = (torch.arange(50) >= torch.tensor(padding)[:, None]).long()
        generated = model.generate(
            tokens, attention_mask=mask, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=2
        )
        for row, pad in enumerate(padding):
            alone = greedy_without_cache(model, tokens[row : row + 1, pad:], 40)
            assert torch.equal(generated[row, pad:], alone[0]), f"row {row}"

    @torch.no_grad()
    def test_beams_equal_no_cache(self, model):
        tokens = tiny.make_tokens(2, 30)
        mask = torch.ones_like(tokens)
        mask[1, :9] = 0
        arguments = {"num_beams": 3, "max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
        cached = model.generate(tokens, attention_mask=mask, **arguments)
        assert torch.equal(cached, model.generate(tokens, attention_mask=mask, use_cache=False, **arguments))

    @torch.no_grad()
    def test_prefill_in_chunks(self, model):
        tokens = tiny.make_tokens(1, 64)
        arguments = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
        chunked = model.generate(tokens, prefill_chunk_size=24, **arguments)
        assert torch.equal(chunked, model.generate(tokens, **arguments))

    @torch.no_grad()
    def test_assisted_equals_plain(self, model):
        """The assistant's guesses are taken back again and again."""
        assistant = tiny.make_model("nsa", seed=1)
        tokens = tiny.make_tokens(1, 50)
        arguments = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
        assisted = model.generate(tokens, assistant_model=assistant, **arguments)
        assert torch.equal(assisted, model.generate(tokens, **arguments))


class TestCache:
    @pytest.mark.parametrize("removed", [1, 5, 23, 79])
    @torch.no_grad()
    def test_crop_equals_never_seen(self, model, removed):
        tokens = tiny.make_tokens(2, 100)
        mask = torch.ones(2, 140, dtype=torch.long)
        mask[1, :11] = 0
        _, cache = run_in_chunks(model, tokens, [100], attention_mask=mask)
        cache.crop(-removed)
        kept = 100 - removed
        assert cache.get_seq_length() == kept
        more = tiny.make_tokens(2, 40, seed=1)
        logits = [
            model(more[:, i : i + 1], past_key_values=cache, attention_mask=mask[:, : kept + i + 1]).logits
            for i in range(40)
        ]
        whole = torch.cat((tokens[:, :kept], more), dim=1)
        expected = model(whole, attention_mask=mask[:, : kept + 40]).logits[:, kept:]
        assert_close(torch.cat(logits, dim=1)[0], expected[0], "row 0", atol=1e-5)
        seen = max(0, 11 - kept)  # row 1 has padding here
        assert_close(torch.cat(logits, dim=1)[1, seen:], expected[1, seen:], "row 1", atol=1e-5)

    @torch.no_grad()
    def test_only_the_last_tokens_are_kept_of_two_branches(self, model, monkeypatch):
        from deepseek_repo import cache_deepseek

        monkeypatch.setattr(cache_deepseek, "_UNDO_TOKENS", 8)
        tokens = tiny.make_tokens(1, 100)
        logits, cache = run_in_chunks(model, tokens, [60] + [1] * 40)
        assert_close(logits, model(tokens).logits, "logits", atol=1e-5)
        layer = cache.layers[0]
        assert layer.keys.shape[2] == 100
        assert layer.compressed[0].shape[2] == 24
        assert layer.windowed[0].shape[2] <= 2 * (11 + 8)
        assert layer.raw[0].shape[2] <= 2 * (7 + 8)
        cache.crop(-8)
        with pytest.raises(ValueError, match="activate_past_recording"):
            cache.crop(-60)

    @torch.no_grad()
    def test_recording_keeps_all(self, model, monkeypatch):
        from deepseek_repo import cache_deepseek

        monkeypatch.setattr(cache_deepseek, "_UNDO_TOKENS", 8)
        tokens = tiny.make_tokens(1, 100)
        _, cache = run_in_chunks(model, tokens[:, :40], [40])
        if not hasattr(cache, "activate_past_recording"):
            pytest.skip("releases before 5.17 do not record")
        cache.activate_past_recording()
        model(tokens[:, 40:], past_key_values=cache)
        cache.crop(-55)
        logits = model(tokens[:, 45:], past_key_values=cache).logits
        assert_close(logits, model(tokens).logits[:, 45:], atol=1e-5)

    @torch.no_grad()
    def test_rows_are_selected_and_repeated(self, model):
        tokens = tiny.make_tokens(3, 61)
        cache = model(tokens[:, :60], use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        rows = [2, 2, 0, 0]
        logits = model(tokens[rows, 60:], past_key_values=cache).logits
        assert_close(logits, model(tokens[rows]).logits[:, 60:], atol=1e-5)
        cache.reset()
        assert_close(model(tokens, past_key_values=cache).logits, model(tokens).logits, atol=1e-5)

    @torch.no_grad()
    def test_copies_go_separate_ways(self, model):
        tokens = tiny.make_tokens(1, 62)
        cache = model(tokens[:, :60], use_cache=True).past_key_values
        other = copy.deepcopy(cache)
        model(tokens[:, 60:] + 1, past_key_values=other)
        logits = model(tokens[:, 60:], past_key_values=cache).logits
        assert_close(logits, model(tokens).logits[:, 60:], atol=1e-5)

    def test_gradients_through_a_cache(self, model):
        """Two calls with a cache give the gradients of one without."""
        model.zero_grad()
        tokens = tiny.make_tokens(1, 60)
        cache = DynamicCache(config=model.config)
        first = model(tokens[:, :40], past_key_values=cache).logits
        second = model(tokens[:, 40:], past_key_values=cache).logits
        torch.cat((first, second), dim=1).square().sum().backward()
        cached = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model(tokens).logits.square().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                scale = parameter.grad.abs().max().item()
                assert_close(cached[name], parameter.grad, name, atol=1e-4 * scale)
        model.zero_grad()

    def test_wrong_kind(self, model):
        tokens = tiny.make_tokens(1, 8)
        with pytest.raises(ValueError, match="StaticLayer"):
            model(tokens, past_key_values=StaticCache(config=model.config, max_cache_len=16))
        dense = tiny.make_model("llama")
        with pytest.raises(ValueError, match="GrowingLayer"):
            model(tokens, past_key_values=dense(tokens, use_cache=True).past_key_values)


class TestFiles:
    def test_round_trip(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert written["model_type"] == "deepseek_nsa"
        assert written["architectures"] == ["DeepseekForCausalLM"]
        assert "attention_kind" not in written
        assert written["nsa_compress_block_size"] == 8
        again = type(model).from_pretrained(tmp_path)
        assert again.config.attention_kind == "nsa"
        tokens = tiny.make_tokens(1, 60)
        assert torch.equal(model(tokens).logits, again(tokens).logits)

    def test_remote_code(self, checkpoint):
        folder = checkpoint("nsa")
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        tokens = tiny.make_tokens(1, 60)
        assert_close(model(tokens).logits, tiny.make_model("nsa")(tokens).logits)


class TestConfig:
    def test_kind_on_another_family(self):
        config = tiny.make_config("llama", attention_kind="nsa")
        assert config.checkpoint_model_type == "deepseek_nsa"
        assert config.nsa_window_size == 512
        assert config.to_dict()["model_type"] == "deepseek_nsa"

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("nsa_compress_stride", 3, "does not divide `nsa_compress_block_size`"),
            ("nsa_select_block_size", 18, "does not divide `nsa_select_block_size`"),
            ("nsa_select_block_size", 4, "more than `nsa_select_block_size`"),
            ("nsa_num_select_blocks", 2, "less than the 3 blocks"),
            ("nsa_window_size", 0, "`nsa_window_size` is 0"),
            ("nsa_num_local_blocks", 0, "`nsa_num_local_blocks` is 0"),
            ("num_key_value_heads", 3, "does not divide `num_attention_heads`"),
            ("attention_dropout", 0.1, "sparse attention has no dropout"),
            ("kv_lora_rank", 16, "`kv_lora_rank` is set"),
        ],
    )
    def test_bad_sizes(self, field, value, message):
        with pytest.raises(ValueError, match=message):
            tiny.make_config("nsa", **{field: value})
