"""The models against slow_reference.py: the papers' formulas in float64, and variants that native classes lack."""

import pytest
import torch
from checks import assert_close
from slow_reference import SlowModel
from tiny import FAMILIES, make_model, make_tokens

# Routers and layouts that no native class has, or that no published model combines so.
VARIANTS = {
    "v2_lite, weights normalised": ("v2_lite", {"norm_topk_prob": True}),
    "v2, normalised and scaled": ("v2", {"norm_topk_prob": True}),
    "v2, bias-corrected softmax": ("v2", {"topk_method": "noaux_tc"}),
    "v2_lite, greedy sigmoid": ("v2_lite", {"scoring_func": "sigmoid"}),
    "v2, grouped sigmoid": ("v2", {"scoring_func": "sigmoid", "norm_topk_prob": True}),
    "v3, not normalised": ("v3", {"norm_topk_prob": False}),
    "v3, one group": ("v3", {"n_group": 1, "topk_group": 1}),
    "v3, all groups": ("v3", {"topk_group": 4}),
    "v3, one group of four": ("v3", {"topk_group": 1, "num_experts_per_tok": 2}),
    "v3, one expert": ("v3", {"num_experts_per_tok": 1}),
    "v3, no shared experts": ("v3", {"n_shared_experts": 0}),
    "v3, no query latent": ("v3", {"q_lora_rank": None}),
    "v3, no YaRN": ("v3", {"rope_scaling": None}),
    "v3, attention biases": ("v3", {"attention_bias": True}),
    "v3, values wider than keys": ("v3", {"v_head_dim": 20}),
    "v3, every second layer sparse": ("v3", {"moe_layer_freq": 2, "first_k_dense_replace": 0}),
    "deepseek, grouped-query": ("deepseek", {"num_key_value_heads": 2}),
    "deepseek, one key head": ("deepseek", {"num_key_value_heads": 1}),
    "deepseek, wide heads": ("deepseek", {"head_dim": 10}),
    "deepseek, scaled": ("deepseek", {"routed_scaling_factor": 2.0}),
    "llama, attention biases": ("llama", {"attention_bias": True}),
}


@pytest.mark.compatibility("logits equal the papers' formulas")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("v3_mtp2", "nsa")])
def test_family(family, attention):
    compare(make_model(family, attention=attention))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(variant):
    family, overrides = VARIANTS[variant]
    compare(make_model(family, **overrides))


@pytest.mark.parametrize("family", ["llama", "v2_lite", "v3"])
def test_long_positions(family):
    compare(make_model(family), torch.tensor([0, 1, 2, 5, 30, 63, 64, 65, 100, 255]))


@pytest.mark.parametrize("bias", [False, True])
def test_nsa(bias):
    """Longer than what is selected; scores spread widely, so that no choice hangs on rounding."""
    model = make_model("nsa", num_hidden_layers=2, attention_bias=bias, initializer_range=0.2)
    for parameter in (p for name, p in model.named_parameters() if "position" in name or "bias" in name):
        torch.nn.init.normal_(parameter)
    compare(model, torch.arange(90))


def compare(model, positions: torch.Tensor | None = None):
    ids = make_tokens(1, 10 if positions is None else len(positions))
    arguments = {} if positions is None else {"position_ids": positions[None], "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        actual = model(ids, use_cache=False, **arguments).logits[0]
    assert_close(actual, SlowModel(model).logits(ids[0], positions), "logits")
