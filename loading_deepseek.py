"""Between DeepSeek's checkpoint files and the modules in memory: names, layouts, precision, damage.

The files keep one weight an expert, `mlp.experts.{i}.{gate,up,down}_proj.weight`; in memory the experts of a layer are
two stacked parameters. transformers converts both ways while it loads and saves, tensor by tensor.
"""

import json
import os
import re
import struct
from contextlib import contextmanager

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

logger = logging.get_logger(__name__)


def register_expert_conversion(model_type: str):
    """Tells transformers how the per-expert weights of a file become stacked parameters; saving runs it backwards.

    Without this, custom code loads experts as random numbers with no more than a warning.
    """
    conversion = [
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]
    # This module may be executed more than once in a process, once for each copy of the code.
    register_checkpoint_conversion_mapping(model_type, conversion, overwrite=True)


def ignored_mtp_keys(config) -> set[str]:
    """Patterns of keys that a checkpoint may have and the model does without.

    Published multi-token-prediction modules carry copies of the embedding and the output head, which the model shares;
    and a model may be built with fewer modules than the checkpoint has.
    """
    first_absent = config.num_hidden_layers + config.num_nextn_predict_layers
    absent = "|".join(str(first_absent + k) for k in range(16))
    return {r"layers\.\d+\.(embed_tokens|shared_head\.head)\.weight", rf"layers\.({absent})\."}


def check_checkpoint(path, config, hub_kwargs: dict):
    """Reads the headers of the weight files before anything is built.

    Sets `config.num_nextn_predict_layers` to 0 if the files hold no such modules.

    Raises:
        ValueError: a shard is missing, truncated or no safetensors file.
    """
    keys = _checkpoint_keys(path, hub_kwargs)
    first_mtp = f"layers.{config.num_hidden_layers}."
    if keys is not None and config.num_nextn_predict_layers and not any(first_mtp in key for key in keys):
        logger.info(f"{path} has no multi-token-prediction weights; the model is built without them.")
        config.num_nextn_predict_layers = 0


def _checkpoint_keys(path, hub_kwargs: dict) -> set[str] | None:
    """Names of all tensors of a safetensors checkpoint; None where there is none to look at (other formats)."""
    if hub_kwargs.get("state_dict") is not None or hub_kwargs.get("gguf_file") or path is None:
        return None
    wanted = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder", "proxies")
    where = {name: hub_kwargs[name] for name in wanted if hub_kwargs.get(name) is not None}
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    variant = hub_kwargs.get("variant")

    def find(name: str) -> str | None:
        name = name if variant is None else name.replace(".safetensors", f".{variant}.safetensors")
        return cached_file(path, name, **where, **quiet)

    index = find(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        single = find(SAFE_WEIGHTS_NAME)
        return None if single is None else set(_read_header(single))
    with open(index, encoding="utf-8") as file:
        try:
            weight_map = json.load(file)["weight_map"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{index} is not a safetensors index; download the file again.") from error
    if os.path.isdir(path):  # on the Hub, shards are fetched later
        for name in sorted(set(weight_map.values())):
            shard = os.path.join(os.path.dirname(index), name)
            if not os.path.isfile(shard):
                raise ValueError(f"{index} names the shard {name}, which is not there; download it again.")
            absent = [key for key, file in weight_map.items() if file == name and key not in _read_header(shard)]
            if absent:
                raise ValueError(f"{shard} lacks {absent[0]}, which the index says it holds; download it again.")
    return set(weight_map)


def _read_header(path: str) -> dict:
    """The names of a safetensors file and where their data lie; checks that the file is as long as it says."""
    size = os.path.getsize(path)
    remedy = "The file is damaged or was not downloaded whole; download it again."
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise ValueError(f"{path} is no safetensors file ({size} bytes). {remedy}")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} has an unreadable safetensors header. {remedy}") from error
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < expected:
        raise ValueError(f"{path} has {size} bytes, its header promises {expected}. {remedy}")
    return header


def default_dtype(config, kwargs: dict):
    """What `dtype` means where the user does not say: the checkpoint's own, but float32 where bfloat16 is emulated."""
    on_cpu = kwargs.get("device_map") in (None, "cpu") and not torch.accelerator.is_available()
    stored = getattr(config, "dtype", None)
    if on_cpu and stored in (torch.bfloat16, "bfloat16") and not _cpu_has_bfloat16():
        logger.warning_once(
            "This CPU has no bfloat16 arithmetic (it would be hundreds of times slower), so the model is loaded in "
            "float32. Pass dtype='bfloat16' to keep the checkpoint's precision."
        )
        return torch.float32
    return "auto"


def _cpu_has_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def explain_loading_error(path):
    """Turns transformers' report of tensors of a wrong shape into an error that says what does not fit."""
    try:
        yield
    except RuntimeError as error:
        mismatch = re.search(r"([\w.]+weight)\W.*(?:size mismatch|MISMATCH)", str(error))
        if mismatch is None:
            raise
        raise ValueError(
            f"The weights in {path} do not have the shapes that its config.json asks for (first: {mismatch[1]}). Use "
            "the config.json that belongs to the weights; for a changed vocabulary, load and then call "
            "model.resize_token_embeddings."
        ) from error
