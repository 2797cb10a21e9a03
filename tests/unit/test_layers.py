"""RMSNorm, rotary embeddings and YaRN's factors, by hand."""

import math

import pytest
import torch
from checks import assert_close
from deepseek_repo.layers_deepseek import DeepseekMLP, DeepseekRMSNorm, apply_rotary, yarn_softmax_factor
from slow_reference import SlowModel
from tiny import make_config, make_model


def test_rms_norm_by_hand():
    norm = DeepseekRMSNorm(2, eps=0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 10.0]))
    root = math.sqrt((3**2 + 4**2) / 2)
    assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([3 / root, 40 / root]), atol=1e-6)


def test_rms_norm_computes_in_float32():
    x = torch.full((4,), 300.0, dtype=torch.float16)  # its square is beyond float16
    normed = DeepseekRMSNorm(4).half()(x)
    assert normed.dtype == torch.float16
    assert_close(normed.float(), torch.ones(4), atol=1e-3)


def test_rms_norm_uses_its_eps():
    assert_close(DeepseekRMSNorm(2, eps=9.0)(torch.full((2,), 4.0)), torch.full((2,), 4 / 5), atol=1e-6)


def test_mlp_by_hand():
    mlp, x = DeepseekMLP(make_config("llama"), 7), torch.randn(3, 32)
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    assert_close(mlp(x), (gate * torch.sigmoid(gate) * up) @ mlp.down_proj.weight.T)


@pytest.mark.parametrize(
    ("layout", "expected"),
    # (1, 2, 3, 4) with angles of 90 and 180 degrees. Pairs (1, 3), (2, 4), or (1, 2), (3, 4); first members come first.
    [("half", [-3.0, -2.0, 1.0, -4.0]), ("interleaved", [-2.0, -3.0, 1.0, -4.0])],
)
def test_rotation_by_hand(layout, expected):
    angles = torch.tensor([[[math.pi / 2, math.pi]]])
    rotated = apply_rotary(torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), angles.cos(), angles.sin(), layout)
    assert_close(rotated[0, 0, 0], torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_scores_depend_on_distance_only(layout):
    rotary = make_model("v3").model.rotary_emb
    query, key = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    scores = []
    for start in (0, 3, 100):
        q, k = (
            apply_rotary(states, *rotary(states, torch.tensor([[position]])), layout)
            for states, position in ((query, start + 5), (key, start))
        )
        scores.append((q * k).sum())
    assert_close(torch.stack(scores), scores[0].expand(3))


def test_rotation_keeps_the_dtype_and_computes_in_float32():
    rotary = make_model("v3").to(torch.bfloat16).model.rotary_emb
    states = torch.randn(1, 2, 1, 8).bfloat16()
    cos, sin = rotary(states, torch.tensor([[200]]))
    assert cos.dtype == sin.dtype == torch.float32
    assert apply_rotary(states, cos, sin, "half").dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "deepseek", "v2_lite", "v3"])
def test_frequencies(family):
    rotary, config = make_model(family).model.rotary_emb, make_config(family)
    expected = torch.tensor(SlowModel(make_model(family)).frequencies(config.head_dim))
    assert_close(rotary.inv_freq, expected, atol=1e-7)
    assert rotary.attention_scaling == pytest.approx(1.0)


def test_frequencies_survive_bfloat16():
    """A model in bfloat16 must not turn by rounded frequencies."""
    reference = make_model("v3").model.rotary_emb
    low = make_model("v3").to(torch.bfloat16).model.rotary_emb
    positions, states = torch.tensor([[0, 17, 255]]), torch.zeros(1)
    for actual, expected in zip(low(states, positions), reference(states, positions), strict=True):
        assert_close(actual, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        # V2-Lite and V3 as published; numbers from the formula (0.1 mscale ln 40 + 1)^2
        ({"rope_type": "yarn", "factor": 40, "mscale_all_dim": 0.707}, 1.5896),
        ({"rope_type": "yarn", "factor": 40, "mscale_all_dim": 1.0}, 1.8739),
        ({"rope_type": "yarn", "factor": 40}, 1.0),
        ({"rope_type": "yarn", "factor": 1, "mscale_all_dim": 1.0}, 1.0),
        ({"rope_type": "default"}, 1.0),
    ],
)
def test_yarn_softmax_factor(rope, expected):
    assert yarn_softmax_factor(rope) == pytest.approx(expected, abs=1e-4)


def test_yarn_with_two_different_mscales():
    """The factor on cosines is the quotient of both: 1 in every published model, so tested with unequal ones."""
    rope = {**make_config("v3").rope_parameters, "mscale": 1.0, "mscale_all_dim": 0.5}
    rotary = make_model("v3", rope_scaling=rope).model.rotary_emb
    expected = (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    assert rotary.attention_scaling == pytest.approx(expected)
    cos, sin = rotary(torch.zeros(1), torch.tensor([[9]]))
    assert_close(cos**2 + sin**2, torch.full_like(cos, expected**2), atol=1e-5)
