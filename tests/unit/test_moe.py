"""Routers on scores chosen by hand, and stacked experts against one expert at a time."""

import pytest
import torch
from checks import assert_close
from deepseek_repo.moe_deepseek import DeepseekExperts, DeepseekMoE, DeepseekRouter
from tiny import make_config, randomise

# Eight experts in four groups of two.
SCORES = [0.30, 0.01, 0.20, 0.19, 0.05, 0.04, 0.11, 0.10]
NO_BIAS = [0.0] * 8


def route(method: str, top_k: int, topk_group: int = 2, bias=NO_BIAS, scores=SCORES, **overrides):
    """-> {chosen expert: weight} of a token whose sigmoid scores are `scores`"""
    config = make_config(
        "v3", topk_method=method, num_experts_per_tok=top_k, topk_group=topk_group, hidden_size=8, **overrides
    )
    router = DeepseekRouter(config, layer_idx=0)
    with torch.no_grad():
        router.weight.copy_(torch.eye(8))
        if method == "noaux_tc":
            router.e_score_correction_bias.copy_(torch.tensor(bias))
    logits, weights, indices = router(torch.tensor([scores]).logit())
    assert logits.dtype == weights.dtype == torch.float32
    return {int(i): w.item() for i, w in zip(indices[0], weights[0], strict=True)}


@pytest.mark.parametrize(
    ("method", "top_k", "topk_group", "bias", "chosen"),
    [
        ("greedy", 3, 2, NO_BIAS, {0, 2, 3}),
        # best single expert of a group: groups 0 (0.30) and 1 (0.20)
        ("group_limited_greedy", 3, 2, NO_BIAS, {0, 2, 3}),
        ("group_limited_greedy", 2, 1, NO_BIAS, {0, 1}),
        # sum of the two best: group 1 (0.39) before group 0 (0.31), group 3 (0.21), group 2 (0.09)
        ("noaux_tc", 2, 1, NO_BIAS, {2, 3}),
        ("noaux_tc", 3, 2, NO_BIAS, {0, 2, 3}),
        # a bias brings group 2 forward: 0.05 + 0.5 and 0.04 + 0.5
        ("noaux_tc", 2, 1, [0, 0, 0, 0, 0.5, 0.5, 0, 0], {4, 5}),
        # all biased scores negative: an excluded group, if filled with 0, would win
        ("noaux_tc", 2, 1, [-2.0] * 8, {2, 3}),
        ("noaux_tc", 4, 2, [-2.0] * 8, {0, 1, 2, 3}),
    ],
)
def test_choice(method, top_k, topk_group, bias, chosen):
    assert set(route(method, top_k, topk_group, bias)) == chosen


def test_bias_changes_the_choice_but_not_the_weights():
    weights = route("noaux_tc", 2, 1, [0, 0, 0, 0, 0.5, 0.5, 0, 0], norm_topk_prob=False, routed_scaling_factor=1.0)
    assert weights == pytest.approx({4: 0.05, 5: 0.04}, abs=1e-6)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_weights_are_normalised_first_and_scaled_then(norm, scale):
    weights = route("greedy", 2, norm_topk_prob=norm, routed_scaling_factor=scale)
    total = 0.50 if norm else 1.0
    assert weights == pytest.approx({0: 0.30 / total * scale, 2: 0.20 / total * scale}, abs=1e-6)


def test_softmax_scores():
    logits = torch.tensor(SCORES).log()
    scores = route("greedy", 1, scores=torch.sigmoid(logits).tolist(), scoring_func="softmax", norm_topk_prob=False)
    assert scores == pytest.approx({0: 0.30 / sum(SCORES) * 2.5}, abs=1e-6)


@pytest.mark.parametrize("family", ["deepseek", "v2", "v3"])
def test_router_chooses_in_float32(family):
    """Rounded to bfloat16, many of these scores would tie."""
    router = DeepseekRouter(make_config(family), layer_idx=0)
    randomise(router)
    router = router.to(torch.bfloat16)
    router.weight.data *= 1e-2  # scores close together
    states = torch.randn(500, 32).bfloat16()
    _, weights, indices = router(states)
    exact = DeepseekRouter(make_config(family), layer_idx=0)
    exact.load_state_dict({key: value.float() for key, value in router.state_dict().items()})
    _, expected_weights, expected = exact.double()(states.double())
    assert torch.equal(indices.sort().values, expected.sort().values)
    assert weights.dtype == torch.float32
    assert_close(weights.sort().values, expected_weights.sort().values.float(), atol=1e-6)


@pytest.mark.parametrize("family", ["deepseek", "v2", "v3"])
def test_router_under_autocast(family):
    router, states = DeepseekRouter(make_config(family), layer_idx=0), torch.randn(100, 32)
    randomise(router)
    expected = router(states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = router(states)
    for mine, reference in zip(actual, expected, strict=True):
        assert torch.equal(mine, reference)


def make_experts() -> DeepseekExperts:
    config = make_config("v3")
    config._experts_implementation = "eager"
    experts = DeepseekExperts(config)
    randomise(experts)
    return experts


def one_at_a_time(experts, states, indices, weights):
    output = torch.zeros_like(states)
    for token in range(len(states)):
        for expert, weight in zip(indices[token].tolist(), weights[token], strict=True):
            if expert == experts.num_experts:
                continue
            gate, up = (experts.gate_up_proj[expert] @ states[token]).chunk(2)
            output[token] += weight * experts.down_proj[expert] @ (gate * torch.sigmoid(gate) * up)
    return output


@pytest.mark.parametrize("case", ["random", "one expert gets all", "one token", "absent slots", "all absent"])
def test_experts(case):
    experts, states = make_experts(), torch.randn(1 if case == "one token" else 20, 32)
    indices = torch.rand(len(states), 8).argsort(dim=1)[:, :3]
    if case == "one expert gets all":
        indices = torch.full((20, 1), 5)
    if case == "absent slots":  # expert parallelism marks what others compute with the number of experts
        indices[torch.rand(indices.shape) > 0.5] = 8
    if case == "all absent":
        indices[:] = 8
    weights = torch.rand(indices.shape)
    with torch.no_grad():
        assert_close(experts(states, indices, weights), one_at_a_time(experts, states, indices, weights))


def test_absent_experts_of_an_empty_batch():
    experts = make_experts()
    output = experts(torch.zeros(0, 32), torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3))
    assert output.shape == (0, 32)


def test_shared_experts_are_always_added():
    block = DeepseekMoE(make_config("v3"), layer_idx=1).eval()
    randomise(block)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        whole, *_ = block(x)
        _, weights, indices = block.gate(x.flatten(0, 1))
        routed = block.experts(x.flatten(0, 1), indices, weights).view_as(x)
    assert_close(whole - routed, block.shared_experts(x))
    assert routed.abs().max() > 0.01


@pytest.mark.parametrize("family", ["deepseek", "v3"])
def test_loads_are_counted_without_padding(family):
    block = DeepseekMoE(make_config(family), layer_idx=1).train()
    randomise(block)
    x, mask = torch.randn(2, 5, 32), torch.ones(2, 5, dtype=torch.bool)
    mask[1, 2:] = False
    _, _, padded = block(x, mask)
    _, _, whole = block(x)
    _, _, indices = block.gate(x.flatten(0, 1))
    assert padded.tolist() == indices[mask.flatten()].flatten().bincount(minlength=8).tolist()
    assert whole.tolist() == indices.flatten().bincount(minlength=8).tolist()
    block.gate.count_load(padded)
    block.gate.count_load(whole)
    assert torch.equal(block.gate.expert_load, padded + whole)


def test_evaluation_counts_nothing():
    block = DeepseekMoE(make_config("v3"), layer_idx=1).eval()
    _, balance_loss, load = block(torch.randn(1, 5, 32))
    assert balance_loss is load is block.gate.expert_load is None
