"""Loads models and tokenizers for all commands: a checkpoint of the family, folder or Hub name, in this repository's code.

A checkpoint says in config.json which code it wants: transformers' own class by its `model_type`, or files that lie
beside it by its `auto_map`. Neither is followed: whatever the family's checkpoint, the model is the one defined in the
root of this repository, and no code of the checkpoint runs. Weights and folders stay as they are; what such a model
saves has this code beside it and opens everywhere.

With `trust_remote_code` the Auto classes decide instead, and may run the checkpoint's code.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import cached_file

from common.extras import extra
from common.hub import check_hub
from common.names import check_model_name, folder_below
from common.remote_code import AUTO_MAP
from configuration_deepseek import FAMILY_DEFAULTS

ROOT = Path(__file__).resolve().parent.parent
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


@cache
def model_class() -> type[PreTrainedModel]:
    """This repository's causal language model, as the Auto classes would import it, so that it saves its code too."""
    found = get_class_from_dynamic_module(AUTO_MAP["AutoModelForCausalLM"], str(ROOT))
    found.register_for_auto_class("AutoModelForCausalLM")
    found.config_class.register_for_auto_class()
    return found


def load_config(name: str | Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a folder or Hub name.

    Raises:
        ValueError: the model is of another family, or a field is wrong.
        OSError: there is no such model.
    """
    check_model_name(name, "model")
    check_hub(name)
    try:
        if trust_remote_code:
            return AutoConfig.from_pretrained(name, trust_remote_code=True)
        fields, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:  # a name that no repository can have is a ValueError
        raise OSError(f"model {str(name)!r} cannot be loaded: {error}") from error
    model_type = fields.get("model_type")
    if model_type not in FAMILY_DEFAULTS:
        raise ValueError(
            f"{name} has the model_type {model_type!r}, and this repository's code is for {', '.join(FAMILY_DEFAULTS)}; "
            "--trust-remote-code loads it by transformers' Auto classes, which may run code that comes with it"
        )
    config = model_class().config_class.from_pretrained(name)
    config.auto_map = dict(AUTO_MAP)  # the checkpoint's own may name classes that only its own code has
    return config


def load_model(
    name: str | Path, trust_remote_code: bool = False, config: PreTrainedConfig | None = None, **options
) -> PreTrainedModel:
    """The model of a folder or Hub name with its weights.

    Args:
        config: from `load_config`; its fields may be changed.
        options: as for `from_pretrained`.

    Raises:
        ValueError, OSError: as `load_config`, or weights are missing or damaged.
    """
    config = config or load_config(name, trust_remote_code)
    if trust_remote_code:
        return AutoModelForCausalLM.from_pretrained(name, config=config, trust_remote_code=True, **options)
    return model_class().from_pretrained(name, config=config, **options)


def new_model(config: PreTrainedConfig, trust_remote_code: bool = False, **options) -> PreTrainedModel:
    """A model with random weights; `config` comes from `load_config` with the same permission."""
    if trust_remote_code:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=True, **options)
    return model_class()._from_config(config, **options)


def load_tokenizer(name: str | Path, trust_remote_code: bool = False, **options) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub name; its code runs only with permission.

    Raises:
        ValueError, OSError: there is none, or it cannot do without its code.
    """
    if not trust_remote_code:
        # Without the config at hand, AutoTokenizer may ask AutoConfig for it, which refuses to pass over `auto_map`.
        options.setdefault("config", load_config(name))
    return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **options)


def load(
    model: str | None, adapter: str | None, trust_remote_code: bool, dtype: str = "auto", device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer for use, and put a PEFT adapter on it if there is one.

    Args:
        model: folder or Hub name; None means the adapter's base model, or else this repository.
        adapter: folder or Hub name of a PEFT adapter.
        trust_remote_code: whether code of the checkpoint may run. This repository's own code always may.
        dtype, device: as `dtype` and `device_map` in `from_pretrained`.

    Raises:
        ValueError, OSError: something is missing, damaged or does not fit, weights among it, which would else be random
            numbers, or weights are no numbers (NaN); weights are read from safetensors only.
    """
    check_device(device)
    if adapter is not None:
        check_model_name(adapter, "adapter")
        if Path(adapter).is_dir() and not (Path(adapter) / "adapter_config.json").is_file():
            below = folder_below(adapter, "adapter_config.json")
            hint = f"; {below} has one" if below else ""
            raise ValueError(f"{adapter} has no adapter_config.json of an adapter{hint}")
        check_hub(adapter, "adapter_config.json")
        with extra("serve"):
            from peft import PeftConfig, PeftModel

        try:
            model = model or PeftConfig.from_pretrained(adapter).base_model_name_or_path
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{adapter} has no adapter_config.json of an adapter: {error}") from error
    model = model or str(ROOT)
    tokenizer = load_tokenizer(model, trust_remote_code)
    options = {"dtype": dtype, "device_map": device, "use_safetensors": True, "output_loading_info": True}
    loaded, found = load_model(model, trust_remote_code, **options)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{model} lacks {_listed(missing)}; without them the model would have random numbers there. Get the whole "
            "checkpoint"
        )
    if adapter is not None:
        cached_file(adapter, "adapter_model.safetensors")  # an OSError if there is none: PEFT would read a pickle then
        try:
            with peft_without_noise():
                loaded = PeftModel.from_pretrained(loaded, adapter)
        except Exception as error:  # PEFT's are of many types
            raise ValueError(f"{adapter} is damaged, or no adapter for {model}: {error}") from error
    if damaged := _not_numbers(loaded):
        raise ValueError(f"{adapter or model} has weights that are no numbers (NaN or infinite): {_listed(damaged)}")
    return loaded, tokenizer


@contextmanager
def peft_without_noise() -> Iterator[None]:
    """Around what puts an adapter on a model: PEFT 0.21 asks transformers by a deprecated name, which no user can mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def check_device(device: str | None) -> None:
    """Pass what `device_map` can be: nothing, one of its strategies, or a device of this machine.

    Raises:
        ValueError: there is no such device, or torch was built without it.
    """
    if device in (None, *DEVICE_MAPS):
        return
    found = torch.accelerator.current_accelerator()
    here = (
        ["cpu"] if found is None else ["cpu", *(f"{found.type}:{i}" for i in range(torch.accelerator.device_count()))]
    )
    try:
        wanted = torch.device(device)
    except RuntimeError:  # no name of a device
        wanted = None
    name = device if wanted is None or wanted.index is not None or wanted.type == "cpu" else f"{device}:0"
    if name not in here:
        raise ValueError(
            f"--device is {device!r}, and torch {torch.__version__} finds {', '.join(here)} here; "
            f"name one of these, or {', '.join(DEVICE_MAPS)}"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _not_numbers(model: PreTrainedModel) -> list[str]:
    """Names of weights with numbers that are none. Of quantised ones, whose classes do not tell, none is named."""
    return [
        name
        for name, weight in model.named_parameters()
        if type(weight.data) is torch.Tensor
        and not weight.is_meta
        and weight.is_floating_point()
        and not _is_finite(weight.data)
    ]


def _is_finite(weight: torch.Tensor) -> bool:
    # A float8 has no comparison of its own; part by part, since the copy is larger.
    parts = weight.flatten().split(2**24)
    return all(bool((part if part.element_size() > 1 else part.float()).isfinite().all()) for part in parts)


def foreign_code(folder: Path) -> list[str]:
    """Names of a folder's Python files that are no copies of this repository's, and of repositories its `auto_map` names."""
    own = {file.name: file.read_bytes() for file in ROOT.glob("*.py")}
    foreign = [file.name for file in sorted(folder.glob("*.py")) if own.get(file.name) != file.read_bytes()]
    for name in ("config.json", "tokenizer_config.json"):
        try:
            auto_map = json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map") or {}
        except (OSError, ValueError, AttributeError):
            continue  # nothing that could run is named here
        references = json.dumps(auto_map).split('"')  # the values are texts, or of tokenizers lists of them
        foreign += sorted({text.partition("--")[0] for text in references if "--" in text})
    return foreign
