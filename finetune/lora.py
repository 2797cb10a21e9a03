"""LoRA (arXiv:2106.09685) on DeepSeek models: named groups of targets instead of module names, and a check that all of
them are adapted.

    attention   every projection of GQA, MLA or NSA
    shared      the shared experts' MLP
    dense       the MLP of layers without experts
    routed      the routed experts; their stacked parameters get one pair of factors for each expert
    all         those of the four that the model has

The router is never adapted: a changed router sends tokens to experts that were not trained for them. The same holds for
what chooses in sparse attention: DSA's indexer, NSA's compressors and branch gate. The multi-token-prediction modules,
`layers[num_hidden_layers:]`, are left out unless asked for, since plain generation does not use them; their `eh_proj`,
the embedding and the output head are never adapted.

PEFT matches names and says nothing when a name matches no module; `add_lora` counts what was really adapted.
"""

import copy
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from common.command import no_command
from common.loading import peft_without_noise
from common.names import folder_below

# Names inside a decoder layer; those of the attention say its layers. The routed experts are parameters, not modules, and
# need PEFT's `target_parameters`.
_MLPS = {
    "shared": r"mlp\.shared_experts\.(?:gate_proj|up_proj|down_proj)",
    "dense": r"mlp\.(?:gate_proj|up_proj|down_proj)",
}
_PARAMETERS = {"routed": r"mlp\.experts\.(?:gate_up_proj|down_proj)"}
GROUPS = ("attention", *_MLPS, *_PARAMETERS)
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
    rslora: bool = False,
    dora: bool = False,
) -> LoraConfig:
    """Make the PEFT configuration that adapts the named groups of `model`.

    Args:
        model: a DeepSeek model, plain (not yet wrapped by PEFT).
        targets: names from `TARGETS`.
        rank: width of the adapters; of the routed experts, each gets this rank.
        alpha: the update is scaled by alpha / rank.
        dropout: on the adapters' inputs, in [0, 1); must be 0 for the routed experts.
        include_mtp: adapt the multi-token-prediction modules too.
        rslora: scale by alpha / sqrt(rank) instead (arXiv:2312.03732).
        dora: learn each output's length apart from its direction (arXiv:2402.09353); not for the routed experts.

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
    if dora and "routed" in groups:
        raise ValueError(
            "dora is on, but PEFT has it for modules only, not for the routed experts; leave out 'routed'"
        )
    module_patterns = [pattern for group, pattern in _modules(model).items() if group in groups]
    parameters = _names(model, ["routed"], include_mtp) if "routed" in groups else []
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=alpha,  # pyrefly: ignore[bad-argument-type]  # PEFT says int and takes floats
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=dora,
        # A pattern, not a list of names: suffixes such as "gate_proj" would hit dense and shared MLPs alike.
        target_modules=_layer_pattern(model, include_mtp) + f"(?:{'|'.join(module_patterns)})"
        if module_patterns
        else [],
        # Each with its layer's number, so that the multi-token-prediction modules stay out.
        target_parameters=[name[name.index("layers.") :] for name in parameters] or None,
    )


def add_lora(
    model: nn.Module, targets: Sequence[str] = ("all",), include_mtp: bool = False, **options: Any
) -> PeftModel:
    """Wrap `model` with new LoRA adapters, and check that each named group is adapted completely.

    Args:
        options: `rank`, `alpha`, `dropout`, `rslora` and `dora`, as for `lora_config`.

    Raises:
        ValueError: as `lora_config`, or a group's modules were not all adapted.
    """
    config = lora_config(model, targets, include_mtp=include_mtp, **options)
    with peft_without_noise():
        peft_model = get_peft_model(model, config)
    check_adapters(peft_model, targets, include_mtp)
    return peft_model


def check_adapters(peft_model: PeftModel, targets: Sequence[str] = ("all",), include_mtp: bool = False) -> None:
    """Raise ValueError unless every module of the named groups, and nothing else, is adapted."""
    model = peft_model.get_base_model()
    expected = {
        group: len(_names(model, [group], include_mtp)) for group in _resolve_targets(model, targets, include_mtp)
    }
    found = {row.group: row.adapted for row in adapted_groups(peft_model)}
    if found != expected:
        raise ValueError(
            f"PEFT adapted {found}, but the targets {list(targets)} mean {expected}; try another PEFT version"
        )


def whole_size(parameter: nn.Parameter) -> int:
    """Elements of a whole parameter, the same in all processes; DeepSpeed's ZeRO-3 leaves an empty tensor of one here."""
    return getattr(parameter, "ds_numel", parameter.numel())


def adapted_groups(peft_model: nn.Module) -> list[AdaptedGroup]:
    """Count adapters by group, going by the adapters' own names, whatever made them.

    Adapters outside the four groups, for instance on the router, are reported as "other".
    """
    modules = _modules(peft_model)
    adapted: dict[str, set[str]] = {}
    trainable: dict[str, int] = {}
    for name, parameter in peft_model.named_parameters():
        owner, *adapter = re.split(r"\.lora_(?:A|B|magnitude_vector)\.", name)
        if not adapter:
            continue
        group = _group_of_adapter(owner, modules)
        adapted.setdefault(group, set()).add(owner)
        trainable[group] = trainable.get(group, 0) + whole_size(parameter)
    return [
        AdaptedGroup(group, len(adapted[group]), trainable[group]) for group in (*GROUPS, "other") if group in adapted
    ]


def describe_adapters(peft_model: nn.Module) -> str:
    """A table of the adapted modules and parameters, to print."""
    rows = adapted_groups(peft_model)
    total = sum(row.trainable for row in rows)
    everything = sum(map(whole_size, peft_model.parameters()))
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
    config: Any = model.config
    num_layers = config.num_hidden_layers
    if include_mtp:
        num_layers += getattr(config, "num_nextn_predict_layers", 0)
    numbers = "|".join(str(i) for i in range(num_layers))
    return rf"(?:.*\.)?layers\.(?:{numbers})\."


def _names(model: nn.Module, groups: Sequence[str], include_mtp: bool) -> list[str]:
    """Names of the modules (or parameters) of groups, in the model's order, with or without adapters on them."""
    layer, patterns = _layer_pattern(model, include_mtp), _modules(model) | _PARAMETERS
    found: dict[str, list[str]] = {group: [] for group in groups}
    for name, _ in (*model.named_modules(), *model.named_parameters()):
        # PEFT keeps what it wraps as `base_layer`
        plain = re.sub(r"\.base_layer\b", "", name)
        for group in groups:
            if re.fullmatch(layer + patterns[group], plain) and plain not in found[group]:
                found[group].append(plain)
    return [name for names in found.values() for name in names]


def _modules(model: nn.Module) -> dict[str, str]:
    """For each group of modules the pattern of its names inside a decoder layer."""
    modules: Iterable[Any] = model.modules()
    names = sorted({name for module in modules for name in getattr(module, "adapters", ())})
    return {"attention": rf"self_attn\.(?:{'|'.join(names)})"} | _MLPS


def _group_of_adapter(owner: str, modules: dict[str, str]) -> str:
    # PEFT wraps the experts once for each parameter, so that one wrapper is `experts` and the other `experts.base_layer`.
    if re.search(r"\.mlp\.experts(?:\.base_layer)*$", owner):
        return "routed"
    return next((group for group, name in modules.items() if re.search(rf"layers\.\d+\.{name}$", owner)), "other")


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default", trainable: bool = False) -> PeftModel:
    """Load a saved adapter onto `model` (a second one beside the first if it is a PeftModel), and check that it fits.

    Switch with `model.set_adapter(name)`, and off with `with model.disable_adapter():`.

    Raises:
        FileNotFoundError: there is no adapter in `folder`.
        ValueError: the adapter was made for another model: other layers, other shapes, parts that are not there.
    """
    check_fits(model, AdapterFiles(folder))
    if isinstance(model, PeftModel):
        model.load_adapter(folder, adapter_name=name, is_trainable=trainable)
        model.set_adapter(name)
        return model
    with peft_without_noise():
        return PeftModel.from_pretrained(model, folder, adapter_name=name, is_trainable=trainable)


class AdapterFiles:
    """A saved adapter's configuration and the shapes of its tensors.

    Raises:
        FileNotFoundError, ValueError: there is none, or its file is damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.path = self.folder / "adapter_model.safetensors"
        for path in (self.folder / "adapter_config.json", self.path):
            if not path.is_file():
                below = folder_below(folder, path.name)
                remedy = (
                    f"{below} has one" if below else "name a folder that a LoRA run or PEFT's save_pretrained wrote"
                )
                raise FileNotFoundError(f"{path} does not exist; {remedy}")
        self.config = PeftConfig.from_pretrained(str(folder))
        self.base = self.config.base_model_name_or_path
        try:
            with safe_open(self.path, framework="pt") as file:
                self.shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{self.path} is damaged ({error}); save or download the adapter again") from error


def check_fits(model: nn.Module, files: AdapterFiles) -> PeftModel:
    """Compare an adapter's tensors with those that `model` would save with its configuration.

    Returns:
        A model without memory, of the same configuration as `model`, with the adapter's modules.

    Raises:
        ValueError: the adapter was made for another model, or its file lacks tensors.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    made_for = f"the adapter in {files.folder} was made for another model ({files.base})"
    with torch.device("meta"):
        try:
            with peft_without_noise():
                warnings.filterwarnings("ignore", message=".*was renamed from")  # the empty model has no name
                empty = get_peft_model(type(base)(copy.deepcopy(base.config)), copy.deepcopy(files.config))
        except ValueError as error:  # PEFT found no module of the names
            raise ValueError(f"{made_for}: {error}") from error
    state = get_peft_model_state_dict(empty, save_embedding_layers=False)
    expected = {key: tuple(tensor.shape) for key, tensor in state.items()}
    for key, shape in files.shapes.items():
        if expected.get(key) != shape:
            found = f"has {list(expected[key])}" if key in expected else "has no such part"
            raise ValueError(f"{made_for}: {key} is {list(shape)}, this model {found}; load the model it was made for")
    if missing := sorted(set(expected) - set(files.shapes)):
        raise ValueError(f"the adapter in {files.folder} is for a smaller model or damaged: it lacks {missing[0]}")
    return empty


if __name__ == "__main__":
    no_command("adapt by python -m finetune.sft, merge by python -m finetune.merge")
