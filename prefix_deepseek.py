"""A long shared prompt, run once and kept: in memory, or in a safetensors file that later processes read.

    prefix = model.make_prefix(tokenizer(manual, return_tensors="pt").input_ids)
    prefix.save("manual.safetensors")

    prefix = model.load_prefix("manual.safetensors")
    questions = tokenizer(questions, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    model.generate(**prefix.extend(questions), max_new_tokens=50)

What is kept is the cache as it lies in memory, so that going on from the file and going on from the cache that was
saved give the same bits.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import DynamicCache

_FORMAT = "deepseek prefix 1"
_SAMPLES = 16  # numbers of each weight that the fingerprint looks at
_NO_PART = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache")


class Prefix:
    """Tokens and what the cache holds of them; see above."""

    def __init__(
        self, input_ids: torch.LongTensor, layers: list[dict[str, torch.Tensor]], make_layer: Callable, made_by: dict
    ):
        """
        Args:
            input_ids: [1, tokens].
            layers: for each layer, the tensors of its cache by name.
            make_layer: index of a layer -> an empty cache layer that takes its tensors.
            made_by: what `describe_model` says of the model, and the kind of cache under "cache".
        """
        self.input_ids = input_ids
        self.layers = layers
        self.make_layer = make_layer
        self.made_by = made_by

    def extend(self, inputs: torch.Tensor | Mapping) -> dict:
        """Arguments for `generate`: the prefix, and behind it in each row what `inputs` holds.

        Args:
            inputs: ids [B, S], or a mapping with `input_ids` and perhaps `attention_mask` (pad on the left; the padding
                then stands between prefix and tokens, which native sparse attention does not take).

        Returns:
            input_ids and attention_mask [B, prefix + S], and past_key_values, a cache of B rows; the prefix itself stays
            as it is and may be extended any number of times.
        """
        given = inputs if isinstance(inputs, Mapping) else {"input_ids": inputs}
        ids = given["input_ids"]
        if ids.ndim != 2 or not ids.shape[1]:
            raise ValueError(
                f"`input_ids` has shape {tuple(ids.shape)}: it must be [rows, tokens], one token at least."
            )
        mask = given.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        prefix = self.input_ids.to(ids.device).expand(len(ids), -1)
        return {
            "input_ids": torch.cat((prefix, ids), dim=1),
            "attention_mask": torch.cat((torch.ones_like(prefix), mask.to(ids.dtype)), dim=1),
            "past_key_values": self.make_cache(len(ids)),
        }

    def make_cache(self, batch_size: int = 1) -> DynamicCache:
        """A cache with `batch_size` copies of the prefix."""
        cache = DynamicCache()
        cache.layer_class_to_replicate = None
        cache.layers = [self.make_layer(i) for i in range(len(self.layers))]
        layers: list[Any] = cache.layers
        for layer, tensors in zip(layers, self.layers, strict=True):
            layer.put_tensors({name: tensor.repeat_interleave(batch_size, dim=0) for name, tensor in tensors.items()})
        return cache

    def save(self, path: str | os.PathLike):
        """Writes a safetensors file, whole or not at all."""
        tensors = {
            f"layers.{i}.{name}": tensor.contiguous()
            for i, layer in enumerate(self.layers)
            for name, tensor in layer.items()
        }
        tensors["input_ids"] = self.input_ids.contiguous()
        part = Path(f"{os.fspath(path)}.part")
        save_file(tensors, part, metadata={"format": _FORMAT, "tensors": _list(tensors), **self.made_by})
        os.replace(part, path)


def read_prefix(path: str | os.PathLike, made_by: dict, make_layer: Callable, device) -> Prefix:
    """The prefix in a file.

    Raises:
        ValueError: no prefix lies there, or it was made by another model, config, dtype or kind of cache.
    """
    if not os.path.isfile(path):
        raise ValueError(f"There is no file {os.fspath(path)!r}. Make it by model.make_prefix(input_ids).save(path).")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            _check(path, metadata, made_by)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            _check_whole(path, metadata.get("tensors"), tensors)
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)!r} is damaged or no safetensors file ({error}). Make it again.") from error
    input_ids = tensors.pop("input_ids")
    layers: list[dict[str, torch.Tensor]] = [{} for _ in {name.split(".")[1] for name in tensors}]
    for name, tensor in tensors.items():
        _, index, state = name.split(".", 2)
        layers[int(index)][state] = tensor
    return Prefix(input_ids, layers, make_layer, made_by)


def _list(tensors: dict[str, torch.Tensor]) -> str:
    """Name, dtype and shape of each tensor."""
    return json.dumps({name: [str(x.dtype), *x.shape] for name, x in sorted(tensors.items())})


def _check_whole(path, listed: str | None, tensors: dict[str, torch.Tensor]):
    """Compares the tensors of a file with those that were saved, which it lists."""
    remedy = "Make it again by model.make_prefix(input_ids).save(path)."
    if listed is None:
        raise ValueError(
            f"The prefix in {os.fspath(path)!r} does not say which tensors it has; an older version or another tool wrote "
            f"it. {remedy}"
        )
    saved, found = json.loads(listed), json.loads(_list(tensors))
    for name in sorted(saved.keys() | found.keys()):
        if saved.get(name) != found.get(name):
            raise ValueError(
                f"{os.fspath(path)!r} is damaged: it has {found.get(name, 'no tensor')} for {name}, and was saved with "
                f"{saved.get(name, 'none')}. {remedy}"
            )


def _check(path, metadata: dict[str, str], made_by: dict[str, str]):
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{os.fspath(path)!r} is no prefix. Make one by model.make_prefix(input_ids).save(path).")
    names = {"dtype": "in another dtype", "cache": "with another kind of cache", "config": "with another config"}
    for field, how in (*names.items(), ("weights", "by a model with other weights")):
        if metadata.get(field) != made_by[field]:
            detail = "" if field in ("config", "weights") else f" ({metadata.get(field)}, here {made_by[field]})"
            raise ValueError(
                f"The prefix in {os.fspath(path)!r} was made {how}{detail}, so its cache means nothing here. Load what "
                "made it, or make the prefix again."
            )


def describe_model(model) -> dict[str, str]:
    """What a cache depends on: the dtype, the config, and a fingerprint of the weights (of some numbers of each)."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NO_PART}
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        # one of torchao's holds numbers and scales
        parts = [getattr(tensor, part) for part in getattr(tensor, "tensor_data_names", ())] or [tensor]
        for part in parts:
            if not part.is_meta and part.numel():
                sample = part.detach().flatten()[:: max(1, part.numel() // _SAMPLES)]
                weights.update(str(sample.double().tolist()).encode())
    return {
        "dtype": str(model.dtype),
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "weights": weights.hexdigest(),
    }
