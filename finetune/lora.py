"""LoRA (arXiv:2106.09685) on DeepSeek models: named groups of targets instead of module names, and proof that they were hit.

    attention   every projection of GQA or MLA
    shared      the shared experts' MLP
    dense       the MLP of layers without experts
    routed      the routed experts; their stacked parameters get one pair of factors for each expert
    all         those of the four that the model has

The router is never adapted: a changed router sends tokens to experts that were not trained for them. The
multi-token-prediction modules, `layers[num_hidden_layers:]`, are left out unless asked for, since plain generation does
not use them.

PEFT matches names and says nothing when a name matches no module; `add_lora` counts what was really adapted.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn

# Names inside a decoder layer. The routed experts are parameters, not modules, and need PEFT's `target_parameters`.
_MODULES = {
    "attention": r"self_attn\.(?:q_proj|k_proj|v_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)",
    "shared": r"mlp\.shared_experts\.(?:gate_proj|up_proj|down_proj)",
    "dense": r"mlp\.(?:gate_proj|up_proj|down_proj)",
}
_PARAMETERS = {"routed": r"mlp\.experts\.(?:gate_up_proj|down_proj)"}
GROUPS = (*_MODULES, *_PARAMETERS)
TARGETS = (*GROUPS, "all")


@dataclass(frozen=True)
class AdaptedGroup:
    """What LoRA adds to one group of a model."""

    group: str
    adapted: int  # modules, or for "routed" stacked parameters
    trainable: int  # numbers in their adapters


def lora_config(
    model: nn.Module,
    targets: Sequence[str] = ("all",),
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    include_mtp: bool = False,
) -> LoraConfig:
    """Make the PEFT configuration that adapts the named groups of `model`.

    Args:
        model: a DeepSeek model, plain (not yet wrapped by PEFT).
        targets: names from `TARGETS`.
        rank: width of the adapters; of the routed experts, each gets this rank.
        alpha: the update is scaled by alpha / rank.
        dropout: on the adapters' inputs, in [0, 1); must be 0 for the routed experts.
        include_mtp: adapt the multi-token-prediction modules too.

    Raises:
        ValueError: an argument is out of range, or the model has nothing that a named group could adapt.
    """
    groups = _resolve_targets(model, targets, include_mtp)
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}; it must be in [0, 1)")
    if dropout and "routed" in groups:
        # The experts' update is added to their weights, so there is no input of the adapter to drop.
        raise ValueError(
            f"dropout is {dropout}, but the routed experts' adapters have none; set it to 0 or leave out 'routed'"
        )
    module_patterns = [_MODULES[group] for group in groups if group in _MODULES]
    parameters = _names(model, ["routed"], include_mtp) if "routed" in groups else []
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        # A pattern, not a list of names: suffixes such as "gate_proj" would hit dense and shared MLPs alike.
        target_modules=_layer_pattern(model, include_mtp) + f"(?:{'|'.join(module_patterns)})"
        if module_patterns
        else [],
        # Each with its layer's number, so that the multi-token-prediction modules stay out.
        target_parameters=[name[name.index("layers.") :] for name in parameters] or None,
    )


def add_lora(
    model: nn.Module,
    targets: Sequence[str] = ("all",),
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    include_mtp: bool = False,
) -> PeftModel:
    """Wrap `model` with new LoRA adapters, and check that each named group got all of its own. Arguments as `lora_config`.

    Raises:
        ValueError: as `lora_config`, or a group's modules were not all adapted.
    """
    config = lora_config(model, targets, rank, alpha, dropout, include_mtp)
    expected = {
        group: len(_names(model, [group], include_mtp)) for group in _resolve_targets(model, targets, include_mtp)
    }
    peft_model = get_peft_model(model, config)
    found = {row.group: row.adapted for row in adapted_groups(peft_model)}
    if found != expected:
        raise ValueError(
            f"PEFT adapted {found}, but the targets {list(targets)} mean {expected}; try another PEFT version"
        )
    return peft_model


def adapted_groups(peft_model: nn.Module) -> list[AdaptedGroup]:
    """Count adapters by group, from the adapters' own names, so whatever made them.

    Adapters outside the four groups, for instance on the router, are reported as "other".
    """
    adapted: dict[str, set[str]] = {}
    trainable: dict[str, int] = {}
    for name, parameter in peft_model.named_parameters():
        if ".lora_A." not in name and ".lora_B." not in name:
            continue
        owner = re.split(r"\.lora_[AB]\.", name)[0]
        group = _group_of_adapter(owner)
        adapted.setdefault(group, set()).add(owner)
        trainable[group] = trainable.get(group, 0) + parameter.numel()
    return [
        AdaptedGroup(group, len(adapted[group]), trainable[group]) for group in (*GROUPS, "other") if group in adapted
    ]


def describe_adapters(peft_model: nn.Module) -> str:
    """A table of what is adapted, for people."""
    rows = adapted_groups(peft_model)
    total = sum(row.trainable for row in rows)
    everything = sum(parameter.numel() for parameter in peft_model.parameters())
    lines = [f"{'group':<10} {'adapted':>8} {'trainable':>12}"]
    lines += [f"{row.group:<10} {row.adapted:>8} {row.trainable:>12,}" for row in rows]
    lines += [f"{'total':<10} {sum(row.adapted for row in rows):>8} {total:>12,}  ({total / everything:.1%} of all)"]
    return "\n".join(lines)


def _resolve_targets(model: nn.Module, targets: Sequence[str], include_mtp: bool) -> list[str]:
    """Target names -> groups, in the order of `GROUPS`; every one of them is in the model."""
    unknown = [target for target in targets if target not in TARGETS]
    if unknown or not targets:
        raise ValueError(f"targets has {unknown or 'no entry'}; choose from {', '.join(TARGETS)}")
    present = [group for group in GROUPS if _names(model, [group], include_mtp)]
    if not present:
        raise ValueError(f"{type(model).__name__} has no layers with the names of a DeepSeek model; use PEFT directly")
    absent = [target for target in targets if target not in (*present, "all")]
    if absent:
        raise ValueError(f"targets has {absent}, but the model has nothing of that kind; it has {', '.join(present)}")
    return [group for group in present if group in targets or "all" in targets]


def _layer_pattern(model: nn.Module, include_mtp: bool) -> str:
    config = model.config
    num_layers = config.num_hidden_layers
    if include_mtp:
        num_layers += getattr(config, "num_nextn_predict_layers", 0)
    numbers = "|".join(str(i) for i in range(num_layers))
    return rf"(?:.*\.)?layers\.(?:{numbers})\."


def _names(model: nn.Module, groups: Sequence[str], include_mtp: bool) -> list[str]:
    """Names of the modules (or parameters) of groups, in the model's order."""
    layer = _layer_pattern(model, include_mtp)
    names = []
    for group in groups:
        if group in _MODULES:
            names += [name for name, _ in model.named_modules() if re.fullmatch(layer + _MODULES[group], name)]
        else:
            names += [name for name, _ in model.named_parameters() if re.fullmatch(layer + _PARAMETERS[group], name)]
    return names


def _group_of_adapter(owner: str) -> str:
    # PEFT wraps the experts once for each parameter, so that one wrapper is `experts` and the other `experts.base_layer`.
    if re.search(r"\.mlp\.experts(?:\.base_layer)*$", owner):
        return "routed"
    return next((group for group in _MODULES if re.search(rf"layers\.\d+\.{_MODULES[group]}$", owner)), "other")
