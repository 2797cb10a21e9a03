"""Optimizers: Muon on stacks is torch's Muon on each matrix, and every parameter has one optimizer."""

import pytest
import torch
from tiny import make_model

from pretrain.optimizers import Muon, build_optimizer


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("rows", [8, 12, 24])
def test_a_stack_is_stepped_matrix_by_matrix_as_torch_does(rows):
    stack = torch.nn.Parameter(torch.randn(4, 24, 16))
    start = stack.detach().clone()
    matrices = [torch.nn.Parameter(matrix.clone()) for matrix in start.view(-1, rows, 16)]
    ours = Muon([{"params": [stack], "rows": rows, "weight_decay": 0.1}], lr=0.02)
    torchs = torch.optim.Muon(
        matrices, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        stack.grad = torch.randn_like(stack)
        for matrix, gradient in zip(matrices, stack.grad.view(-1, rows, 16), strict=True):
            matrix.grad = gradient.clone()
        ours.step()
        torchs.step()
    expected = torch.stack([matrix.detach() for matrix in matrices]).view_as(stack)
    # Newton-Schulz runs in bfloat16, whose rounding differs with the order of sums; wrong rows are off by 0.36
    assert _relative_error(stack.detach() - start, expected - start) < 0.05


def test_an_expert_without_tokens_is_only_decayed():
    stack = torch.nn.Parameter(torch.randn(3, 8, 6))
    start = stack.detach().clone()
    stack.grad = torch.randn_like(stack)
    stack.grad[1] = 0
    Muon([{"params": [stack], "rows": 4, "weight_decay": 0.1}], lr=0.02).step()
    torch.testing.assert_close(stack.detach()[1], start[1] * (1 - 0.02 * 0.1))
    assert (stack.detach()[[0, 2]] - start[[0, 2]]).abs().amin() > 0


@pytest.mark.parametrize("family", ["llama", "v3", "v32", "nsa"])
def test_muon_takes_the_hidden_matrices_and_adamw_the_rest(family):
    model = make_model(family)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, "muon", 1e-3, 0.1).param_groups
    taken = [names[p] for group in groups if group["rows"] for p in group["params"]]
    rest = [names[p] for group in groups if not group["rows"] for p in group["params"]]
    assert sorted(taken + rest) == sorted(names.values())
    assert not [name for name in taken if "norm" in name or name.endswith(("bias", "mlp.gate.weight"))]
    vectors = ("embed_tokens.weight", "lm_head.weight", "norm.weight", "bias", "mlp.gate.weight", ".position")
    assert all(name.endswith(vectors) or "norm" in name for name in rest)
    rows = {names[p]: group["rows"] for group in groups for p in group["params"]}
    assert rows["model.layers.0.mlp.down_proj.weight"] == 32
    if family != "llama":
        assert rows["model.layers.1.mlp.experts.gate_up_proj"] == 24
        assert rows["model.layers.1.mlp.experts.down_proj"] == 32
    decay = {names[p]: group["weight_decay"] for group in groups for p in group["params"]}
    assert decay["model.embed_tokens.weight"] == 0.1
    assert decay["model.norm.weight"] == 0.0


def test_adamw_takes_everything_and_decays_matrices_only():
    model = make_model("v3")
    decayed, plain = build_optimizer(model, "adamw", 1e-3, 0.1).param_groups
    assert {parameter.ndim for parameter in plain["params"]} == {1}
    assert min(parameter.ndim for parameter in decayed["params"]) == 2
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_frozen_parameters_have_no_optimizer():
    model = make_model("v3").requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(model, "muon", 1e-3, 0.1)
    model.model.layers[1].mlp.experts.requires_grad_(True)
    groups = build_optimizer(model, "muon", 1e-3, 0.1).param_groups
    assert [(group["rows"], len(group["params"])) for group in groups] == [(24, 1), (32, 1)]
