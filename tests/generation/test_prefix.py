"""Prefixes: the same bits from memory and from disk, the tokens of a plain call, and clear refusals."""

import pytest
import torch
from checks import run_python
from tiny import make_model, make_tokens
from transformers import DynamicCache

FAMILIES = ("llama", "v2_lite", "v3", "v32", "nsa")
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
RECORD = {"return_dict_in_generate": True, "output_logits": True}


def logits(outputs) -> torch.Tensor:
    return torch.stack(outputs.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_bit_equal(family, tmp_path):
    model, ids, more = make_model(family), make_tokens(1, 40), make_tokens(3, 5, seed=1)
    prefix = model.make_prefix(ids, chunk_size=16, progress=False)
    expected = model.generate(**prefix.extend(more), **RECORD, **GREEDY)
    prefix.save(tmp_path / "prefix.safetensors")
    loaded = model.load_prefix(tmp_path / "prefix.safetensors")
    for _ in range(2):  # and it is not used up
        actual = model.generate(**loaded.extend(more), **RECORD, **GREEDY)
        assert torch.equal(logits(actual), logits(expected))
    assert torch.equal(loaded.input_ids, ids)
    assert not list(tmp_path.glob("*.part"))
    whole = torch.cat((ids.expand(3, -1), more), dim=1)
    assert torch.equal(expected.sequences, model.generate(whole, **GREEDY))


@pytest.mark.parametrize("family", FAMILIES)
def test_same_bits_as_the_cache_itself(family):
    model, ids, more = make_model(family), make_tokens(1, 40), make_tokens(1, 5, seed=1)
    cache = model.prefill(ids, chunk_size=16, progress=False)
    whole = torch.cat((ids, more), dim=1)
    expected = model.generate(whole, past_key_values=cache, **RECORD, **GREEDY)
    actual = model.generate(**model.make_prefix(ids, chunk_size=16, progress=False).extend(more), **RECORD, **GREEDY)
    assert torch.equal(logits(actual), logits(expected))


@pytest.mark.parametrize("family", ["llama", "v3", "v32"])
def test_questions_of_different_lengths(family):
    model, ids, more = make_model(family), make_tokens(1, 40), make_tokens(2, 9, seed=1)
    mask = torch.ones_like(more)
    mask[1, :4] = 0
    inputs = {"input_ids": more.masked_fill(mask == 0, 2), "attention_mask": mask}
    actual = model.generate(**model.make_prefix(ids, progress=False).extend(inputs), **GREEDY)
    for row, first in ((0, 0), (1, 4)):
        alone = model.generate(torch.cat((ids, more[row : row + 1, first:]), dim=1), **GREEDY)
        assert torch.equal(actual[row, 40 + first :], alone[0, 40:])


def test_with_drafts():
    model, ids, more = make_model("v3"), make_tokens(1, 40), make_tokens(2, 5, seed=1)
    prefix = model.make_prefix(ids, progress=False)
    whole = torch.cat((ids.expand(2, -1), more), dim=1)
    assert torch.equal(model.generate(**prefix.extend(more), mtp_tokens=2, **GREEDY), model.generate(whole, **GREEDY))


def test_int8(tmp_path):
    model, ids, more = make_model("v3"), make_tokens(1, 40), make_tokens(2, 5, seed=1)
    prefix = model.make_prefix(ids, int8=True, progress=False)
    prefix.save(tmp_path / "prefix.safetensors")
    loaded = model.load_prefix(tmp_path / "prefix.safetensors", int8=True)
    expected = model.generate(**prefix.extend(more), **RECORD, **GREEDY)
    assert torch.equal(logits(model.generate(**loaded.extend(more), **RECORD, **GREEDY)), logits(expected))
    with pytest.raises(ValueError, match="LatentLayer"):
        model.load_prefix(tmp_path / "prefix.safetensors")


@pytest.mark.slow
def test_another_process_and_remote_code(checkpoint, tmp_path):
    folder, path = checkpoint("v3"), tmp_path / "prefix.safetensors"
    code = f"""
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
ids = torch.arange(3, 33)[None]
"""
    make = f"model.make_prefix(ids, progress=False).save({str(path)!r})"
    use = f"""
prefix = model.load_prefix({str(path)!r})
settings = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
more = torch.arange(40, 44)[None]
assert torch.equal(model.generate(**prefix.extend(more), **settings),
                   model.generate(torch.cat((ids, more), dim=1), **settings))
print("same")
"""
    run_python(code + make)
    assert "same" in run_python(code + use)


class TestRefusals:
    @pytest.fixture
    def path(self, tmp_path):
        make_model("v3").make_prefix(make_tokens(1, 20), progress=False).save(tmp_path / "prefix.safetensors")
        return tmp_path / "prefix.safetensors"

    def test_other_weights(self, path):
        with pytest.raises(ValueError, match="other weights"):
            make_model("v3", seed=1).load_prefix(path)

    def test_other_config(self, path):
        with pytest.raises(ValueError, match="another config"):
            make_model("v3", routed_scaling_factor=1.0).load_prefix(path)

    def test_other_dtype(self, path):
        with pytest.raises(ValueError, match=r"float32.*float64"):
            make_model("v3").double().load_prefix(path)

    def test_one_weight_of_the_last_layer_differs(self, path):
        model = make_model("v3")
        with torch.no_grad():
            model.model.layers[2].self_attn.o_proj.weight.mul_(1.001)
        with pytest.raises(ValueError, match="other weights"):
            model.load_prefix(path)

    def test_no_file(self, tmp_path):
        with pytest.raises(ValueError, match="make_prefix"):
            make_model("v3").load_prefix(tmp_path / "none.safetensors")

    @pytest.mark.parametrize("size", [0, 40, 3000])
    def test_cut_file(self, path, size):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match="damaged"):
            make_model("v3").load_prefix(path)

    def test_weights_are_no_prefix(self, path):
        make_model("v3").save_pretrained(path.parent / "model")
        with pytest.raises(ValueError, match="no prefix"):
            make_model("v3").load_prefix(path.parent / "model" / "model.safetensors")

    @pytest.mark.parametrize("shape", [(2, 5), (1, 0)])
    def test_prefix_is_one_row(self, shape):
        with pytest.raises(ValueError, match="one row"):
            make_model("v3").make_prefix(torch.full(shape, 5))

    def test_nothing_new(self):
        prefix = make_model("v3").make_prefix(make_tokens(1, 5), progress=False)
        with pytest.raises(ValueError, match="one token"):
            prefix.extend(torch.zeros(1, 0, dtype=torch.long))


class TestPrefill:
    @pytest.mark.parametrize("family", FAMILIES)
    @torch.no_grad()
    def test_padded_rows(self, family):
        model, ids, mask = make_model(family), make_tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
        mask[1, :11] = 0
        ids = ids.masked_fill(mask == 0, 2)
        cache = model.prefill(ids[:, :29], mask[:, :29], chunk_size=8, progress=False)
        assert cache.get_seq_length() == 29
        actual = model.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
        assert torch.equal(actual, model.generate(ids, attention_mask=mask, **GREEDY))

    @torch.no_grad()
    def test_goes_on_where_the_cache_ends(self):
        model, ids = make_model("v3"), make_tokens(1, 30)
        cache = model.prefill(ids[:, :17], progress=False)
        rows = []
        model.model.register_forward_hook(
            lambda _, args, kwargs, __: rows.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        assert model.prefill(ids, past_key_values=cache, chunk_size=5, progress=False) is cache
        assert rows == [5, 5, 3]

    def test_progress_bar(self, capsys):
        make_model("v3").prefill(make_tokens(1, 30), chunk_size=10)
        assert "30/30" in capsys.readouterr().err

    def test_layers_see_no_more_than_a_chunk(self):
        model, lengths = make_model("v3"), []
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda _, args, output: lengths.append(args[0].shape[1]))
        model.prefill(make_tokens(1, 240), chunk_size=16, progress=False)
        model.generate(make_tokens(1, 40), prefill_chunk_size=16, mtp_tokens=2, **GREEDY)
        assert max(lengths) == 16

    def test_refusals(self):
        model = make_model("v3")
        with pytest.raises(ValueError, match="chunk_size"):
            model.prefill(make_tokens(1, 5), chunk_size=0)
        cache = model.prefill(make_tokens(1, 9), progress=False)
        with pytest.raises(ValueError, match="past_key_values"):
            model.prefill(make_tokens(1, 5), past_key_values=cache)


class TestInt8:
    @pytest.mark.parametrize("family", ["llama", "v2_lite", "v3", "v32"])
    @torch.no_grad()
    def test_near_to_the_full_cache(self, family):
        model, ids = make_model(family), make_tokens(2, 40)
        full, small = DynamicCache(config=model.config), model.int8_cache()
        for start in range(0, 40, 4):
            part = ids[:, start : start + 4]
            expected = model(part, past_key_values=full).logits
            actual = model(part, past_key_values=small).logits
        difference = (actual - expected).abs().mean() / expected.std()
        assert 0 < difference < 0.05
        layer = small.layers[0]
        assert layer.keys.dtype == layer.values.dtype == torch.int8
        kept = sum(x.numel() * x.element_size() for x in layer.tensors().values() if x is not layer.indexer_keys)
        whole = 4 * (full.layers[0].keys.numel() + full.layers[0].values.numel())
        assert kept == whole / 4 + 8 * layer.keys.shape[:3].numel()

    @pytest.mark.parametrize("settings", [{}, {"mtp_tokens": 3}, {"num_beams": 3}, {"prefill_chunk_size": 8}], ids=str)
    def test_generates(self, settings):
        """Scores of rows that are moved, reordered and taken back stay with them."""
        model, ids, mask = make_model("v3"), make_tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
        mask[1, :7] = 0
        rows = settings.get("num_beams", 1)
        arguments = {**GREEDY, **settings}
        actual = model.generate(ids, attention_mask=mask, past_key_values=model.int8_cache(), **arguments)
        without = {**arguments, "mtp_tokens": 0}
        if rows == 1:
            expected = model.generate(ids, attention_mask=mask, past_key_values=model.int8_cache(), **without)
            assert (actual == expected).float().mean() > 0.9  # how a prompt is cut decides what is rounded before use
        assert actual.shape == (2, 32)

    def test_not_for_nsa(self):
        with pytest.raises(ValueError, match="native sparse attention"):
            make_model("nsa").int8_cache()
