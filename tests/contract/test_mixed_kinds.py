"""Layers of different kinds of attention in one model: each has its own mask, cache layer and facts.

No family here mixes kinds, so the configuration is made to name another one for every second layer.
"""

import pytest
import torch
from checks import assert_close
from deepseek_repo.attention_deepseek import DeepseekAttention
from deepseek_repo.compat_deepseek import HAS_PAGED_CACHE
from deepseek_repo.configuration_deepseek import DeepseekConfig
from deepseek_repo.modeling_deepseek import DeepseekForCausalLM
from tiny import make_model, make_tokens
from transformers import DynamicCache

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
MIXED = {"nsa": "gqa", "v32": "mla"}  # a family -> the kind of its odd layers


@pytest.fixture(params=MIXED)
def model(request, monkeypatch):
    family, own = request.param, DeepseekConfig.attention_kinds.fget

    def attention_kinds(config) -> list[str]:
        kinds = own(config)
        kinds[1::2] = [MIXED[family]] * len(kinds[1::2])
        return kinds

    monkeypatch.setattr(DeepseekConfig, "attention_kinds", property(attention_kinds))
    model = make_model(family, num_hidden_layers=4)
    kinds = [type(layer.self_attn) for layer in model.model.layers]
    assert len(set(kinds)) == 2
    assert kinds[0] is kinds[2] is not kinds[1]
    return model


@pytest.mark.parametrize("chunk", [1, 7, 20])
@torch.no_grad()
def test_cached_chunks_equal_the_full_forward(model, chunk):
    tokens = make_tokens(2, 40)
    expected = model(tokens, use_cache=False).logits
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        parts = [model(part, past_key_values=cache).logits for part in tokens.split(chunk, dim=1)]
        assert_close(torch.cat(parts, dim=1), expected)
        assert len({type(layer) for layer in cache.layers}) == 2


def test_generation_with_padding_equals_each_row_alone(model):
    tokens, mask = make_tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    tokens[0, :6], mask[0, :6] = 2, 0
    actual = model.generate(tokens, attention_mask=mask, **GREEDY)
    for row, first in ((0, 6), (1, 0)):
        alone = model.generate(tokens[row : row + 1, first:], use_cache=False, **GREEDY)
        assert torch.equal(actual[row, first:], alone[0])


def test_drafts_and_prefixes(model, tmp_path):
    tokens = make_tokens(2, 24)
    assert torch.equal(model.generate(tokens, **GREEDY), model.generate(tokens, mtp_tokens=0, **GREEDY))
    if model.config.num_nextn_predict_layers:
        assert torch.equal(model.generate(tokens, mtp_tokens=2, **GREEDY), model.generate(tokens, **GREEDY))
    prefix = model.make_prefix(tokens[:1, :20], chunk_size=8, progress=False)
    prefix.save(tmp_path / "prefix.safetensors")
    again = model.load_prefix(tmp_path / "prefix.safetensors")
    actual = model.generate(**again.extend(tokens[:1, 20:]), **GREEDY)
    assert torch.equal(actual, model.generate(tokens[:1], **GREEDY))


def test_what_one_kind_lacks_the_model_lacks(model):
    layers = [layer.self_attn for layer in model.model.layers]
    assert all(isinstance(layer, DeepseekAttention) for layer in layers)
    if HAS_PAGED_CACHE:
        with pytest.raises(ValueError, match=r"sparse attention .* does not go with a paged cache"):
            model.init_continuous_batching()
    with pytest.raises(
        ValueError, match=r"sparse attention .* does not go with transformers' offloaded and quantised"
    ):
        model.generate(make_tokens(1, 9), cache_implementation="quantized", **GREEDY)


def test_training_and_saving(model, tmp_path):
    tokens = make_tokens(2, 40)
    loss = model.train()(tokens, labels=tokens).loss
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "self_attn.o_proj" in name)
    model.eval().save_pretrained(tmp_path)
    again = DeepseekForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert_close(again(tokens).logits, model(tokens).logits)
