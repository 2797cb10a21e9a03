"""AdamW, or Muon for the hidden matrices and AdamW for the rest.

Muon (Keller Jordan; at scale: arXiv:2502.16982) steps along the orthogonalised momentum of a matrix. Its step is scaled to
the size of AdamW's (`match_rms_adamw`), so one learning rate and one weight decay serve both optimizers.

Shapes: E experts of a layer, F inner width of an expert, D hidden size.
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, EPS, _adjust_lr, _zeropower_via_newtonschulz

OPTIMIZERS = ("adamw", "muon")
ADAMW_BETAS = (0.9, 0.95)  # DeepSeek-V3 report, section 4.2


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon for matrices and for stacks of matrices, which that class refuses.

    A stack's matrices are orthogonalised one by one, by one batched run of torch's own Newton-Schulz iteration. What a
    parameter holds is said by its group's `rows`: the rows of one of its matrices, so that a parameter of rows R and
    last axis C is a stack of numel / (R C) matrices [R, C]. State is kept by parameter, like any optimizer's.

    Under FSDP2 a shard of whole matrices is worked on where it is; a split matrix is gathered for its own step.

    Args:
        groups: `{"params": [...], "rows": R or None}`; None takes the rows of two-dimensional parameters.
        lr: learning rate, on AdamW's scale.
        weight_decay: decoupled, as AdamW's.
        momentum: of the gradient's running mean, with Nesterov's look-ahead.
    """

    def __init__(self, groups: list[dict], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "rows": None})

    @torch.no_grad()
    def step(self, closure=None):
        """One step on every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)
        return loss

    def _step(self, parameter: torch.Tensor, group: dict):
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        buffer = state["momentum_buffer"]
        buffer.lerp_(parameter.grad, 1 - group["momentum"])
        update = parameter.grad.lerp(buffer, group["momentum"])
        shape = (group["rows"] or parameter.shape[-2], parameter.shape[-1])  # of one matrix
        rate = _adjust_lr(group["lr"], "match_rms_adamw", torch.Size(shape))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(orthogonalise(update, shape), alpha=-rate)


def orthogonalise(update: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The nearest orthogonal matrix, roughly, to each matrix of the given shape in `update`; shaped as `update`."""
    if isinstance(update, DTensor):
        mesh, placements = update.device_mesh, update.placements
        whole_matrices = update.ndim == 3 and all(place == Shard(0) or place.is_replicate() for place in placements)
        if whole_matrices:
            local = orthogonalise(update.to_local(), shape)
            return DTensor.from_local(
                local, mesh, placements, run_check=False, shape=update.shape, stride=update.stride()
            )
        full = orthogonalise(update.full_tensor(), shape)
        replicated = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return replicated.redistribute(placements=placements)
    if not update.numel():  # more processes than experts
        return update
    coefficients, steps = (DEFAULT_A, DEFAULT_B, DEFAULT_C), 5
    iterate = torch.vmap(lambda matrix: _zeropower_via_newtonschulz(matrix, coefficients, steps, EPS))
    return iterate(update.reshape(-1, *shape)).reshape(update.shape).to(update.dtype)


def build_optimizers(model: nn.Module, name: str, rate: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """The optimizers of all trainable parameters of a model: AdamW, with "muon" behind a `Muon`.

    Muon takes the weights of linear layers, the output head's excepted, and of stacked experts: matrices that map hidden
    states to hidden states. Embeddings, head, routers, norms and biases are AdamW's; of those, matrices are decayed.

    Raises:
        ValueError: nothing is trainable.
    """
    trainable = {parameter: None for parameter in model.parameters() if parameter.requires_grad}  # an ordered set
    if not trainable:
        raise ValueError("the model has no trainable parameter; unfreeze what is to be trained")
    muon = {p: rows for p, rows in hidden_matrices(model).items() if p in trainable} if name == "muon" else {}
    others = [parameter for parameter in trainable if parameter not in muon]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers = []
    if muon:
        by_rows = {rows: [p for p in muon if muon[p] == rows] for rows in dict.fromkeys(muon.values())}
        optimizers.append(
            Muon([{"params": params, "rows": rows} for rows, params in by_rows.items()], rate, weight_decay)
        )
    if others:
        optimizers.append(torch.optim.AdamW(groups, lr=rate, betas=ADAMW_BETAS, fused=True))
    return optimizers


def hidden_matrices(model: nn.Module) -> dict[nn.Parameter, int | None]:
    """The parameters that Muon takes, and for stacks the rows of one of their matrices."""
    head = model.get_output_embeddings()
    matrices = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            matrices[module.weight] = None
        elif hasattr(module, "gate_up_proj"):  # stacked experts: gate and up [E, 2F, D] are two matrices of an expert
            matrices[module.gate_up_proj] = module.gate_up_proj.shape[1] // 2
            matrices[module.down_proj] = module.down_proj.shape[1]
    return matrices
