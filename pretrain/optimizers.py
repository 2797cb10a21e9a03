"""AdamW, or Muon for the hidden matrices and AdamW for the rest.

Muon (Keller Jordan; at scale: arXiv:2502.16982) steps along the orthogonalised momentum of a matrix. Its step is scaled to
the size of AdamW's (`match_rms_adamw`), so one learning rate and one weight decay serve both optimizers.

Shapes: E experts of a layer, F inner width of an expert, D hidden size.
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, EPS, _adjust_lr, _zeropower_via_newtonschulz

from common.command import no_command

OPTIMIZERS = ("adamw", "muon")
ADAMW_BETAS = (0.9, 0.95)  # DeepSeek-V3 report, section 4.2


class Muon(torch.optim.AdamW):
    """Muon for groups with `rows`, AdamW for the others: one optimizer, since accelerate saves one a model under FSDP2.

    Muon's step is that of torch.optim.Muon, which refuses stacks of matrices. A stack's matrices are orthogonalised one by
    one, in one batched run of torch's own Newton-Schulz iteration: a parameter with `rows` R and last axis C is a stack of
    numel / (R C) matrices [R, C]. Under FSDP2 a shard of whole matrices is worked on where it is; a split matrix is gathered
    for its step.

    Args:
        groups: `{"params": [...], "rows": R}` for Muon, `rows` None for AdamW; `weight_decay` and `lr` as in AdamW.
        lr: learning rate of both.
        momentum: of Muon's running mean of gradients, with Nesterov's look-ahead.
    """

    def __init__(self, groups: list[dict], lr: float, momentum: float = 0.95):
        super().__init__(groups, lr=lr, betas=ADAMW_BETAS, fused=True)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure=None):
        """One step on every parameter that has a gradient; returns the closure's loss, if there is one."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["rows"] is None]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            for parameter in group["params"] if group["rows"] is not None else ():
                if parameter.grad is not None:
                    self._step(parameter, group)
        return loss

    def _step(self, parameter: torch.Tensor, group: dict):
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # AdamW's load_state_dict looks for it in every state
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        state["step"] += 1
        buffer = state["momentum_buffer"]
        buffer.lerp_(parameter.grad, 1 - self.momentum)
        update = parameter.grad.lerp(buffer, self.momentum)
        shape = (group["rows"], parameter.shape[-1])  # of one matrix
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


def build_optimizer(model: nn.Module, name: str, rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer of all trainable parameters of a model: "adamw" or "muon".

    Muon takes the weights of linear layers, the output head's excepted, and of stacked experts: matrices that map hidden
    states to hidden states. Embeddings, head, routers, norms and biases are AdamW's; of those, matrices are decayed.

    Raises:
        ValueError: nothing is trainable.
    """
    trainable = {parameter: None for parameter in model.parameters() if parameter.requires_grad}  # an ordered set
    if not trainable:
        raise ValueError("the model has no trainable parameter; unfreeze what is to be trained")
    rows = {p: count for p, count in hidden_matrices(model).items() if p in trainable} if name == "muon" else {}
    others = [parameter for parameter in trainable if parameter not in rows]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": weight_decay, "rows": None},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0, "rows": None},
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=ADAMW_BETAS, fused=True)
    for count in dict.fromkeys(rows.values()):
        matrices = [parameter for parameter in rows if rows[parameter] == count]
        groups.append({"params": matrices, "weight_decay": weight_decay, "rows": count})
    return Muon([group for group in groups if group["params"]], rate)


def hidden_matrices(model: nn.Module) -> dict[nn.Parameter, int]:
    """The parameters that Muon takes, with the rows of one of their matrices."""
    head = model.get_output_embeddings()
    matrices = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            matrices[module.weight] = len(module.weight)
        elif hasattr(module, "gate_up_proj"):  # stacked experts: gate and up [E, 2F, D] are two matrices of an expert
            matrices[module.gate_up_proj] = module.gate_up_proj.shape[1] // 2
            matrices[module.down_proj] = module.down_proj.shape[1]
    return matrices


if __name__ == "__main__":
    no_command("train by python -m pretrain.train")
