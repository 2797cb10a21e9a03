"""V3.2 models: equal to the native class and to dense attention, cached, padded, packed, trained."""

import copy
import json

import pytest
import tiny
import torch
from checks import assert_close
from deepseek_repo import dsa_deepseek as dsa
from transformers import AutoModelForCausalLM, DynamicCache

try:
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as native_module
except ImportError:
    native_module = None


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(dsa, "_INDEX_BYTES", 2**14)
    monkeypatch.setattr(dsa, "_LATENT_BYTES", 2**15)


@pytest.fixture(scope="module")
def model():
    return tiny.make_model("v32")


@pytest.fixture(scope="module")
def native(model, tmp_path_factory):
    if native_module is None:
        pytest.skip("this transformers has no V3.2 of its own")
    folder = tmp_path_factory.mktemp("v32")
    model.save_pretrained(folder)
    native, report = native_module.DeepseekV32ForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert all(".3." in key for key in report["unexpected_keys"])  # the multi-token-prediction module
    return native.eval()


def run_in_chunks(model, tokens, chunks, mask=None):
    cache, logits, start = DynamicCache(config=model.config), [], 0
    for size in chunks:
        part = {} if mask is None else {"attention_mask": mask[:, : start + size]}
        logits.append(model(tokens[:, start : start + size], past_key_values=cache, **part).logits)
        start += size
    return torch.cat(logits, dim=1), cache


class TestNative:
    @torch.no_grad()
    def test_same_outputs_and_sets(self, model, native, monkeypatch):
        ours, theirs = [], []
        select, forward = dsa.LightningIndexer.select, native_module.DeepseekV32Indexer.forward

        def spy_ours(self, *args):
            ours.append(select(self, *args))
            return ours[-1]

        def spy_theirs(self, *args, **kwargs):
            theirs.append(forward(self, *args, **kwargs))
            return theirs[-1]

        monkeypatch.setattr(dsa.LightningIndexer, "select", spy_ours)
        monkeypatch.setattr(native_module.DeepseekV32Indexer, "forward", spy_theirs)
        monkeypatch.setattr(dsa, "_LATENT_BYTES", 2**40)  # one chunk
        tokens = tiny.make_tokens(2, 80)
        assert_close(model(tokens).logits, native(tokens).logits, "logits", atol=2e-5)
        assert len(ours) == len(theirs) == 3
        for layer, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            for t in range(15, 80):  # earlier queries see no more than 16 tokens
                for row in range(2):
                    assert set(mine[row, t].tolist()) == set(other[row, t].tolist()), f"layer {layer}, token {t}"

    @torch.no_grad()
    def test_cached_and_padded(self, model, native):
        tokens = tiny.make_tokens(2, 60)
        mask = torch.ones_like(tokens)
        mask[1, :23] = 0
        logits, _ = run_in_chunks(model, tokens, [40, *[1] * 20], mask)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = native(tokens, attention_mask=mask, position_ids=positions).logits
        assert_close(logits[0], expected[0], "whole row", atol=2e-5)
        assert_close(logits[1, 23:], expected[1, 23:], "padded row", atol=2e-5)

    def test_same_gradients(self, model, native):
        """Of all but the indexer, which the native class does not train."""
        tokens = tiny.make_tokens(1, 60)
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        native.zero_grad()
        native(tokens, labels=tokens).loss.backward()
        theirs = dict(native.named_parameters())
        compared = 0
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and name in theirs and theirs[name].grad is not None:
                scale = theirs[name].grad.abs().max().item()
                assert_close(parameter.grad, theirs[name].grad, name, atol=1e-3 * scale, rtol=0)
                compared += 1
        assert compared > 30
        model.zero_grad()

    def test_files_of_the_native_class(self, native, tmp_path):
        native.save_pretrained(tmp_path)
        model = tiny.make_model("v32").from_pretrained(tmp_path)
        assert model.config.index_topk == 16
        assert model.config.num_nextn_predict_layers == 0
        tokens = tiny.make_tokens(1, 60)
        assert_close(model(tokens).logits, native(tokens).logits, atol=2e-5)


class TestDense:
    @torch.no_grad()
    def test_all_tokens_selected(self, model):
        """With index_topk of at least the length the model is the V3 model without the indexer."""
        tokens = tiny.make_tokens(2, 60)
        dense = tiny.make_model("v3")
        weights = {name: tensor for name, tensor in model.state_dict().items() if "indexer" not in name}
        dense.load_state_dict(weights)
        expected = dense(tokens).logits
        for topk in (60, 61, 1000):
            assert_close(tiny_with(model, index_topk=topk)(tokens).logits, expected, f"topk {topk}", atol=1e-5)
        assert (model(tokens).logits - expected).abs().max() > 0.01, "selection selects nothing"

    @torch.no_grad()
    def test_gathering_everything(self, model, monkeypatch):
        """The sparse path itself, made to select all there is, equals the dense one."""
        tokens = tiny.make_tokens(2, 60)
        everything = tiny_with(model, index_topk=60)
        expected = everything(tokens).logits
        everything.config.index_topk = 8  # what the model asks before it takes the sparse path
        assert_close(everything(tokens).logits, expected, atol=1e-5)

    @torch.no_grad()
    def test_short_prompt_then_long_text(self, model):
        """Decoding passes from dense to sparse at the 17th token."""
        tokens = tiny.make_tokens(2, 60)
        logits, _ = run_in_chunks(model, tokens, [10, *[1] * 50])
        assert_close(logits, model(tokens).logits, atol=2e-5)


def tiny_with(model, **overrides):
    """The same weights under another configuration."""
    other = tiny.make_model("v32", **overrides)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("chunks", [[80], [1] * 80, [30, 1, 40, 9], [5, 11, 1, 63]])
@torch.no_grad()
def test_left_padded_rows_equal_rows_alone(model, chunks):
    tokens = tiny.make_tokens(4, 80)
    padding = [0, 7, 30, 61]
    mask = (torch.arange(80) >= torch.tensor(padding)[:, None]).long()
    logits, _ = run_in_chunks(model, tokens, chunks, mask)
    for row, pad in enumerate(padding):
        alone = model(tokens[row : row + 1, pad:]).logits[0]
        assert_close(logits[row, pad:], alone, f"row {row}", atol=3e-5)


@pytest.mark.parametrize("index_warmup", [False, True])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("latent_bytes", [2**26, 2**12], ids=["one chunk", "chunks"])
def test_padding_does_not_teach_the_indexer(monkeypatch, latent_bytes, left, index_warmup):
    """Padding behind the tokens could see them: it must count as little as padding before them, which sees nothing."""
    monkeypatch.setattr(dsa, "_LATENT_BYTES", latent_bytes)
    model = tiny.make_model("v32", num_nextn_predict_layers=0, index_warmup=index_warmup).train()
    indexers = [parameter for name, parameter in model.named_parameters() if "indexer" in name]
    tokens, padding = tiny.make_tokens(1, 24), torch.full((1, 30), 2)
    padded = torch.cat((padding, tokens) if left else (tokens, padding), dim=1)
    expected = model(tokens).index_loss
    actual = model(padded, attention_mask=(padded != 2).long()).index_loss
    assert_close(actual, expected, "index loss", atol=1e-6)
    wanted, given = (torch.autograd.grad(loss, indexers) for loss in (expected, actual))
    for one, other in zip(given, wanted, strict=True):
        assert_close(one, other, "gradient", atol=1e-6)


@torch.no_grad()
def test_packed_documents_equal_separate_ones(model):
    lengths = [[37, 5, 1, 37], [60, 20]]
    tokens = tiny.make_tokens(2, 80)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    packed = model(tokens, position_ids=positions, use_cache=False).logits
    for row, documents in enumerate(lengths):
        for document, logits in zip(tokens[row].split(documents), packed[row].split(documents), strict=True):
            assert_close(logits, model(document[None]).logits[0], f"document of {len(document)}", atol=3e-5)


@torch.no_grad()
def test_nothing_flows_back_in_time(model):
    tokens = tiny.make_tokens(1, 60)
    before = model(tokens).logits
    tokens[0, 40] = 7 if tokens[0, 40] != 7 else 8
    after = model(tokens).logits
    assert_close(after[:, :40], before[:, :40], atol=1e-6)
    assert not torch.equal(after[:, 40:], before[:, 40:])


ARGUMENTS = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}


class TestGenerate:
    @torch.no_grad()
    def test_greedy_equals_no_cache(self, model):
        tokens = tiny.make_tokens(2, 30)
        mask = torch.ones_like(tokens)
        mask[1, :11] = 0
        cached = model.generate(tokens, attention_mask=mask, **ARGUMENTS)
        assert torch.equal(cached, model.generate(tokens, attention_mask=mask, use_cache=False, **ARGUMENTS))

    @torch.no_grad()
    def test_beams_equal_no_cache(self, model):
        tokens = tiny.make_tokens(2, 30)
        cached = model.generate(tokens, num_beams=3, **ARGUMENTS)
        assert torch.equal(cached, model.generate(tokens, num_beams=3, use_cache=False, **ARGUMENTS))

    @torch.no_grad()
    def test_assisted_equals_plain(self, model):
        tokens = tiny.make_tokens(1, 30)
        assisted = model.generate(tokens, assistant_model=tiny.make_model("v32", seed=1), **ARGUMENTS)
        assert torch.equal(assisted, model.generate(tokens, **ARGUMENTS))


class TestCache:
    @torch.no_grad()
    def test_crop_select_repeat_reset(self, model):
        tokens = tiny.make_tokens(3, 61)
        cache = model(tokens[:, :60], use_cache=True).past_key_values
        cache.crop(-13)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        rows = [2, 2, 0, 0]
        logits = model(tokens[rows, 47:], past_key_values=cache).logits
        assert_close(logits, model(tokens[rows]).logits[:, 47:], atol=2e-5)
        cache.reset()
        assert_close(model(tokens, past_key_values=cache).logits, model(tokens).logits, atol=2e-5)


class TestTraining:
    @pytest.mark.parametrize("warmup", [False, True])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_index_loss_trains_only_the_indexer(self, warmup, checkpointing):
        model = tiny.make_model("v32", index_warmup=warmup, aux_loss_alpha=0.0, mtp_loss_weight=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        tokens = tiny.make_tokens(2, 40)
        output = model(tokens, labels=tokens)
        assert output.index_loss > 0
        assert_close(output.loss, output.lm_loss + output.index_loss)
        output.index_loss.backward(retain_graph=True)
        grads = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        expected = {name for name, _ in model.named_parameters() if "indexer" in name and "layers.3" not in name}
        assert grads == expected
        model.zero_grad()
        output.lm_loss.backward()
        assert not any(
            p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "indexer" in name
        )

    def test_warmup_loss_equals_dense_divergence(self):
        """Against attention maps of the dense model and scores of the whole row."""
        model = tiny.make_model("v32", index_warmup=True, num_hidden_layers=1, num_nextn_predict_layers=0).train()
        tokens = tiny.make_tokens(1, 30)
        loss = model(tokens, labels=tokens).index_loss
        dense = tiny.make_model(
            "v32", attention="eager", index_topk=64, num_hidden_layers=1, num_nextn_predict_layers=0
        )
        states = watch_indexer(dense)
        probs = dense(tokens, output_attentions=True).attentions[0]  # [1, H, S, S]
        target = probs.mean(1)
        hidden = torch.ones(30, 30, dtype=torch.bool).triu(1)
        guess = dsa.index_scores(*states[0]).masked_fill(hidden, float("-inf")).softmax(-1)
        expected = torch.where(hidden, 0, target * (target / guess).log()).sum(-1).mean()
        assert_close(loss, expected)

    def test_warmup_attends_to_all(self):
        tokens = tiny.make_tokens(2, 40)
        warm = tiny.make_model("v32", index_warmup=True)
        dense = tiny.make_model("v32", index_topk=64)
        assert_close(warm(tokens).logits, dense(tokens).logits, atol=2e-5)

    def test_frozen_indexer_has_no_loss(self):
        model = tiny.make_model("v32").train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("indexer" not in name)
        assert model(tiny.make_tokens(1, 40), labels=tiny.make_tokens(1, 40)).index_loss is None

    @pytest.mark.parametrize("warmup", [False, True])
    def test_recall_rises(self, warmup):
        """The indexer learns to find what attention looks at, the rest of the model frozen."""
        model = tiny.make_model(
            "v32", index_topk=8, num_hidden_layers=1, num_nextn_predict_layers=0, index_warmup=warmup
        )
        model.model.layers[0].self_attn.q_b_proj.weight.data *= 3
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("indexer" in name)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        before = recall(model)
        model.train()
        for step in range(60):
            tokens = tiny.make_tokens(4, 48, seed=step)
            model(tokens, labels=tokens).index_loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        after = recall(model.eval())
        assert after > before + 0.1, f"recall {before:.3f} -> {after:.3f}"


def watch_indexer(dense) -> list[dsa.IndexStates]:
    """Gets what the first layer's indexer makes of the tokens of each forward pass, where nothing is to be selected."""
    states = []

    def keep(attention, arguments, kwargs):
        latent = attention.query_latent(*arguments)
        states.append(attention.indexer(*arguments, latent, kwargs["position_embeddings"]))

    dense.model.layers[0].self_attn.register_forward_pre_hook(keep, with_kwargs=True)
    return states


@torch.no_grad()
def recall(model) -> float:
    """Share of attention's own top-k tokens that the indexer selects."""
    tokens = tiny.make_tokens(4, 48, seed=1000)
    dense = tiny_with(model, index_topk=64, num_hidden_layers=1, num_nextn_predict_layers=0)
    dense.set_attn_implementation("eager")
    states = watch_indexer(dense)
    probs = dense(tokens, output_attentions=True).attentions[0].mean(1)  # [B, S, S]
    scores = dsa.index_scores(*states[0]).masked_fill(torch.ones(48, 48, dtype=torch.bool).triu(1), float("-inf"))
    true, guessed = (x[:, 16:].topk(8, dim=-1).indices for x in (probs, scores))
    return (true[..., None] == guessed[..., None, :]).any(-1).float().mean().item()


class TestFiles:
    def test_official_names(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert written["model_type"] == "deepseek_v32"
        assert written["architectures"] == ["DeepseekV32ForCausalLM"]
        assert (written["index_topk"], written["index_n_heads"], written["index_head_dim"]) == (16, 16, 12)
        names = {name for name in model.state_dict() if "layers.0.self_attn.indexer" in name}
        prefix = "model.layers.0.self_attn.indexer."
        assert names == {
            prefix + x for x in ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight")
        }

    def test_remote_code(self, checkpoint):
        model = AutoModelForCausalLM.from_pretrained(checkpoint("v32"), trust_remote_code=True)
        tokens = tiny.make_tokens(1, 40)
        assert_close(model(tokens).logits, tiny.make_model("v32")(tokens).logits)


class TestConfig:
    def test_index_topk_makes_any_mla_model_one(self):
        config = tiny.make_config("v3", index_topk=8)
        assert (config.checkpoint_model_type, config.index_n_heads) == ("deepseek_v32", 64)

    def test_others_have_none_of_it(self):
        written = tiny.make_config("v3").to_dict()
        assert not [name for name in written if name.startswith("index_")]

    @pytest.mark.parametrize(
        ("family", "fields", "message"),
        [
            ("v32", {"index_topk": 0}, "`index_topk` is 0"),
            ("v32", {"index_topk": None}, "`index_topk` is None"),
            ("v32", {"index_head_dim": 6}, "less than `qk_rope_head_dim`"),
            ("v32", {"q_lora_rank": None}, "`q_lora_rank` is null"),
            ("llama", {"index_topk": 8}, "`kv_lora_rank` is null"),
            ("v32", {"attention_dropout": 0.1}, "sparse attention has no dropout"),
            ("v32", {"index_loss_weight": -1.0}, "`index_loss_weight`"),
        ],
    )
    def test_bad_fields(self, family, fields, message):
        with pytest.raises(ValueError, match=message):
            tiny.make_config(family, **fields)


def test_copies_of_a_cache_go_separate_ways(model):
    tokens = tiny.make_tokens(1, 42)
    with torch.no_grad():
        cache = model(tokens[:, :40], use_cache=True).past_key_values
        other = copy.deepcopy(cache)
        model(tokens[:, 40:] + 1, past_key_values=other)
        logits = model(tokens[:, 40:], past_key_values=cache).logits
        assert_close(logits, model(tokens).logits[:, 40:], atol=2e-5)
