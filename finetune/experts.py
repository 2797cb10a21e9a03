"""What routed experts do with a task's data, and ESFT: training only the experts that matter for it.

Expert-specialised fine-tuning (arXiv:2407.01906). On a sample of the task's data each layer's experts are scored by

    gate    g_i = 1/N sum_t w_it / sum_j w_jt           mean share of the gate's weight
    token   r_i = 1/N sum_t 1[expert i chosen for t] / P  share of the tokens' choices

both of which sum to 1 in a layer. A layer's chosen experts are the smallest set of best ones whose scores sum to the
threshold; they are trained whole, everything else stays as it is.

The experts of a layer lie in two stacked parameters, so "only some are trained" needs care: a masked gradient would
still take memory and optimizer state for all, and weight decay would still move all. Here each chosen expert is a
parameter of its own that shares its memory with its place in the frozen stack. The optimizer knows only those, and what
it does to them is done to the stack; the forward is unchanged and copies nothing.

Letters: N tokens, E experts, P experts a token.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize

from common.command import no_command
from finetune.data import collate

STACKS = ("gate_up_proj", "down_proj")
ESFT_WEIGHTS, ESFT_CONFIG = "esft_experts.safetensors", "expert_cfg.json"


# ---------------------------------------------------------------- what experts do


@dataclass(frozen=True)
class Routing:
    """One layer's routing over a sample: both float64 [E], both sum to 1."""

    gate: torch.Tensor
    token: torch.Tensor

    @property
    def imbalance(self) -> float:
        """The busiest expert's tokens over the mean; 1 is perfect balance."""
        return float(self.token.max() * len(self.token))


@torch.no_grad()
def measure_routing(
    model: nn.Module, rows: Sequence[dict[str, list[int]]], pad_token_id: int, batch_size: int = 8
) -> dict[int, Routing]:
    """Run rendered examples through the model and record where its routers send the tokens.

    Returns:
        Layer number -> routing; empty for a model without routed experts. Multi-token-prediction modules do not run.
    """
    routers: dict[Any, Any] = {module.layer_idx: module for module in model.modules() if "expert_load" in vars(module)}
    gate_sums: dict[int, torch.Tensor] = {}
    token_sums: dict[int, torch.Tensor] = {}
    real: torch.Tensor | None = None

    def note(layer: int, num_experts: int):
        def hook(_module, _inputs, outputs):
            _, weights, indices = outputs  # [N, P] each
            weights, indices = weights[real].double(), indices[real]
            for sums, values in (
                (gate_sums, weights / weights.sum(dim=-1, keepdim=True)),
                (token_sums, torch.full_like(weights, 1 / weights.shape[-1])),
            ):
                counted = torch.zeros(num_experts, dtype=torch.float64, device=weights.device)
                counted.index_add_(0, indices.flatten(), values.flatten())
                sums[layer] = sums.get(layer, 0) + counted.cpu()

        return hook

    handles = [router.register_forward_hook(note(layer, router.weight.shape[0])) for layer, router in routers.items()]
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        for first in range(0, len(rows) if routers else 0, batch_size):
            batch = collate(rows[first : first + batch_size], pad_token_id)
            batch = {key: value.to(device) for key, value in batch.items() if key != "labels"}
            real = batch["attention_mask"].flatten().bool()
            model(**batch, use_cache=False, logits_to_keep=1)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return {
        layer: Routing(gate_sums[layer] / gate_sums[layer].sum(), token_sums[layer] / token_sums[layer].sum())
        for layer in sorted(gate_sums)
    }


# ---------------------------------------------------------------- choosing


def choose_experts(routing: dict[int, Routing], score: str, threshold: float) -> dict[int, list[int]]:
    """The smallest set of best experts in each layer whose scores sum to `threshold` at least; numbers ascend.

    Raises:
        ValueError: the model has no routed experts.
    """
    if not routing:
        raise ValueError("method esft trains routed experts, and this model has none; use lora or full")
    chosen = {}
    for layer, statistics in routing.items():
        scores, order = getattr(statistics, score).sort(descending=True)
        count = int((scores.cumsum(0) < threshold - 1e-9).sum()) + 1
        chosen[layer] = sorted(order[:count].tolist())
    return chosen


def describe_choice(chosen: dict[int, list[int]], routing: dict[int, Routing], score: str) -> str:
    """A table of the chosen experts and of how concentrated each layer's routing is, to print."""
    lines = [f"{'layer':>5}  {'chosen':>6}  {'their share':>11}  {'busiest / mean':>14}  experts"]
    for layer, experts in chosen.items():
        share = float(getattr(routing[layer], score)[experts].sum())
        numbers = " ".join(map(str, experts))
        lines.append(f"{layer:>5}  {len(experts):>6}  {share:>11.1%}  {routing[layer].imbalance:>14.2f}  {numbers}")
    return "\n".join(lines)


# ---------------------------------------------------------------- training only those


class _SliceGradients(torch.autograd.Function):
    """The stack as it is; its gradient goes to the chosen experts' parameters, slice by slice, and nowhere else."""

    @staticmethod
    def forward(ctx, experts: tuple[int, ...], stack: torch.Tensor, *slices: torch.Tensor) -> torch.Tensor:
        ctx.experts = experts
        return stack.view_as(stack)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):  # pyrefly: ignore[bad-override]  # as PyTorch documents it
        return None, None, *(gradient[expert].clone() for expert in ctx.experts)


class ChosenExperts(nn.Module):
    """Parametrisation of a stack [E, ...]: the chosen experts are parameters that share the stack's memory."""

    def __init__(self, stack: nn.Parameter, experts: Sequence[int]):
        super().__init__()
        self.experts = tuple(experts)
        self.slices = nn.ParameterList(nn.Parameter(stack.data[expert]) for expert in experts)

    def forward(self, stack: torch.Tensor) -> torch.Tensor:
        self.tie(stack)
        return _SliceGradients.apply(self.experts, stack, *self.slices)

    @torch.no_grad()
    def tie(self, stack: torch.Tensor):
        """Make the parameters share the stack's memory again where a move to another device or dtype has copied them."""
        for expert, own in zip(self.experts, self.slices, strict=True):
            place = stack.data[expert]
            if own.data_ptr() != place.data_ptr():
                place.copy_(own.data)
                own.data = place


def train_only_experts(model: nn.Module, chosen: dict[int, list[int]]) -> None:
    """Freeze `model` except for the chosen experts.

    Raises:
        ValueError: a layer or an expert is not there.
    """
    stacks = _expert_modules(model)
    for layer, experts in chosen.items():
        if layer not in stacks or not all(0 <= expert < stacks[layer].num_experts for expert in experts):
            count = stacks[layer].num_experts if layer in stacks else 0
            raise ValueError(f"chosen experts of layer {layer} are {experts}, but that layer has {count} experts")
    model.requires_grad_(False)
    for layer, experts in chosen.items():
        for name in STACKS:
            stack = getattr(stacks[layer], name)
            parametrize.register_parametrization(stacks[layer], name, ChosenExperts(stack, experts), unsafe=True)
            stack.requires_grad_(False)


def finish_expert_training(model: nn.Module) -> None:
    """Remove the parametrisations: the stacks hold the trained experts, and the model is a plain one again."""
    for experts in _expert_modules(model).values():
        for name in STACKS:
            if parametrize.is_parametrized(experts, name):
                stack = experts.parametrizations[name].original
                experts.parametrizations[name][0].tie(stack)
                parametrize.remove_parametrizations(experts, name, leave_parametrized=False)
                stack.requires_grad_(True)


def _expert_modules(model: nn.Module) -> dict[int, Any]:
    """Layer number -> its stacked experts, a module of the model's own code."""
    modules: Iterable[Any] = model.modules()
    return {
        module.gate.layer_idx: module.experts
        for module in modules
        if hasattr(module, "experts") and hasattr(getattr(module, "gate", None), "layer_idx")
    }


# ---------------------------------------------------------------- files


def esft_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The chosen experts' weights under the checkpoint's names, `model.layers.3.mlp.experts.7.up_proj.weight`."""
    state = {}
    for layer, experts in _expert_modules(model).items():
        if not parametrize.is_parametrized(experts, STACKS[0]):
            continue
        for name in STACKS:
            chosen = experts.parametrizations[name][0]
            for expert, own in zip(chosen.experts, chosen.slices, strict=True):
                prefix = f"model.layers.{layer}.mlp.experts.{expert}"
                parts = own.data.chunk(2) if name == "gate_up_proj" else (own.data,)
                names = ("gate_proj", "up_proj") if name == "gate_up_proj" else ("down_proj",)
                state |= {f"{prefix}.{part}.weight": p.contiguous() for part, p in zip(names, parts, strict=True)}
    return state


def save_esft(model: nn.Module, folder: Path, base: str) -> None:
    """Write the chosen experts and which they are (in the form of DeepSeek's `expert_cfg.json`) into `folder`."""
    state = esft_state(model)
    chosen = {}
    for key in state:
        layer, expert = key.split(".")[2], int(key.split(".")[5])
        if expert not in chosen.setdefault(layer, []):
            chosen[layer].append(expert)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / ESFT_WEIGHTS, metadata={"format": "pt"})
    config = {"experts": chosen, "shared_experts": False, "non_expert_modules": False, "base_model": base}
    (folder / ESFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_esft(folder: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved ESFT result, by the checkpoint's names.

    Raises:
        FileNotFoundError, ValueError: there is none, or the file is damaged.
    """
    path = Path(folder) / ESFT_WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name a folder that a run with method esft wrote")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); save or download it again") from error


@torch.no_grad()
def load_esft(model: nn.Module, folder: str | Path) -> None:
    """Put the experts of a saved ESFT result into `model`, plain or under `train_only_experts`, in place.

    Raises:
        FileNotFoundError, ValueError: as `read_esft`, or the experts do not fit the model.
    """
    modules = _expert_modules(model)
    for key, tensor in read_esft(folder).items():
        _, _, layer, _, _, expert, part, _ = key.split(".")
        place = _place(modules.get(int(layer)), int(expert), part)
        if place is None or place.shape != tensor.shape:
            found = "there is no such expert" if place is None else f"the model's is {list(place.shape)}"
            raise ValueError(f"the experts in {folder} are for another model: {key} is {list(tensor.shape)}, {found}")
        place.copy_(tensor)


def _place(experts: Any, expert: int, part: str) -> torch.Tensor | None:
    """The part of a stack that holds one weight of the checkpoint."""
    if experts is None or expert >= experts.num_experts:
        return None
    name = "down_proj" if part == "down_proj" else "gate_up_proj"
    if parametrize.is_parametrized(experts, name):
        stack = experts.parametrizations[name].original
        experts.parametrizations[name][0].tie(stack)
    else:
        stack = getattr(experts, name)
    matrix = stack.data[expert]
    return matrix if name == "down_proj" else matrix.chunk(2)[part == "up_proj"]


if __name__ == "__main__":
    no_command("ESFT is python -m finetune.sft --method esft")
