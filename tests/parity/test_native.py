"""The same checkpoint folder, read by us and by transformers' own classes: logits, gradients, both directions."""

import itertools
import math

import pytest
import torch
from checks import assert_close, assert_gradients_close, gradients
from deepseek_repo.modeling_deepseek import DeepseekForCausalLM
from tiny import make_model, make_tokens
from transformers import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM, LlamaForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention

NATIVE = {
    "llama": LlamaForCausalLM,
    "v2_lite": DeepseekV2ForCausalLM,
    "v2": DeepseekV2ForCausalLM,
    "v3": DeepseekV3ForCausalLM,
    "v3_mtp0": DeepseekV3ForCausalLM,
}


def native_v2_is_whole() -> bool:
    """Releases until 5.16 leave YaRN's factor out of the softmax scale of V2, and cannot run groups of experts."""
    ours = make_model("v2_lite")
    config = DeepseekV2ForCausalLM.config_class.from_dict(ours.config.to_dict())
    native_attention = DeepseekV2Attention(config, layer_idx=0)
    return math.isclose(native_attention.scaling, ours.model.layers[0].self_attn.scaling)


if not native_v2_is_whole():
    NATIVE = {name: model_class for name, model_class in NATIVE.items() if model_class is not DeepseekV2ForCausalLM}


@pytest.fixture(params=NATIVE)
def family(request):
    return request.param


def load(model_class, folder, **kwargs):
    """A model of which no weight was left to chance."""
    model, report = model_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


@pytest.mark.compatibility("transformers' own class reads our files")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_native_reads_what_we_save(family, attention, tmp_path):
    ours = make_model(family, attention=attention)
    ours.save_pretrained(tmp_path)
    native = load(NATIVE[family], tmp_path, attn_implementation=attention)
    tokens = make_tokens(2, 40)
    assert_close(ours(tokens).logits, native(tokens).logits, "logits")


@pytest.mark.compatibility("files of transformers' own class")
def test_we_read_what_native_saves(family, tmp_path):
    make_model(family).save_pretrained(tmp_path / "ours")
    native = load(NATIVE[family], tmp_path / "ours")
    native.save_pretrained(tmp_path / "native")
    ours = load(DeepseekForCausalLM, tmp_path / "native")
    tokens = make_tokens(2, 40)
    assert_close(ours(tokens).logits, native(tokens).logits, "logits")


def test_positions_beyond_the_original_context(family, tmp_path):
    ours = make_model(family)
    ours.save_pretrained(tmp_path)
    native = load(NATIVE[family], tmp_path)
    tokens = make_tokens(1, 12)
    # Gaps of many sizes, so that a wrong frequency of any pair shows; the original context is 64.
    positions = torch.tensor([[0, 1, 2, 5, 30, 63, 64, 65, 100, 170, 240, 255]])
    expected = native(tokens, position_ids=positions, use_cache=False, attention_mask=torch.ones_like(tokens)).logits
    actual = ours(tokens, position_ids=positions, use_cache=False, attention_mask=torch.ones_like(tokens)).logits
    assert_close(actual, expected, "logits")
    contiguous = ours(tokens, use_cache=False).logits
    assert (actual - contiguous).abs().max() > 0.01, "positions have no effect; the comparison is empty"


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padded_rows(family, padding, tmp_path):
    ours = make_model(family)
    ours.save_pretrained(tmp_path)
    native = load(NATIVE[family], tmp_path)
    tokens, mask = make_tokens(2, 16), torch.ones(2, 16, dtype=torch.long)
    hidden = slice(0, 5) if padding == "left" else slice(11, 16)
    mask[1, hidden], tokens[1, hidden] = 0, 2
    expected, actual = native(tokens, attention_mask=mask).logits, ours(tokens, attention_mask=mask).logits
    assert_close(actual[mask.bool()], expected[mask.bool()], "logits of real tokens")


@pytest.mark.compatibility("gradients equal transformers' own class")
@pytest.mark.parametrize(
    ("family", "experts"),
    [
        ("llama", "eager"),
        *itertools.product(
            [name for name in ("v2_lite", "v2", "v3_mtp0") if name in NATIVE], ["eager", "grouped_mm", "batched_mm"]
        ),
    ],
    indirect=["family"],
)
def test_gradients(family, experts, tmp_path):
    ours = make_model(family, aux_loss_alpha=0.0, attention="eager")
    ours.save_pretrained(tmp_path)
    ours.set_experts_implementation(experts)
    native = load(NATIVE[family], tmp_path, attn_implementation="eager")
    native.set_experts_implementation("eager")
    tokens = make_tokens(2, 40)
    for model in (ours, native):
        model.train()
    expected, actual = native(tokens, labels=tokens).loss, ours(tokens, labels=tokens).loss
    assert_close(actual, expected, "loss", atol=1e-5)
    expected.backward()
    actual.backward()
    assert_gradients_close(gradients(ours), gradients(native))


@pytest.mark.compatibility("decoding equals transformers' own class")
def test_cached_decode_equals_native(family, tmp_path):
    """A long prompt and single tokens after it: our absorbed form against native's expansion of the whole cache."""
    ours = make_model(family)
    ours.save_pretrained(tmp_path)
    native = load(NATIVE[family], tmp_path)
    tokens = make_tokens(2, 24)
    with torch.no_grad():
        caches = [model(tokens[:, :20], use_cache=True).past_key_values for model in (ours, native)]
        for t in range(20, 24):
            actual, expected = (
                model(tokens[:, t : t + 1], past_key_values=cache).logits
                for model, cache in zip((ours, native), caches, strict=True)
            )
            assert_close(actual, expected, f"logits at {t}")
