"""What the tools that rewrite a checkpoint share: they read the old folder tensor by tensor and write a new one.

The new folder appears whole or not at all: it is written beside its place under another name and then renamed. Memory
holds one shard at a time. The rest of a checkpoint (common/checkpoint_files.py: tokenizer, generation settings,
licence) is copied unchanged; the model code is added, as `tools/add_remote_code.py` does, and a card is written.
"""

import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from common.card import write_card
from common.checkpoint_files import LICENCE, TOKENIZER, belonging
from common.remote_code import AUTO_MAP, code_files, write_json
from configuration_deepseek import DeepseekConfig
from loading_deepseek import CheckpointFiles

# A tensor's name and value -> the tensors to store in its place, including itself if it is kept.
Change = Callable[[str, torch.Tensor], Iterable[tuple[str, torch.Tensor]]]


def resolve_config(config: dict) -> DeepseekConfig:
    """The fields of a config.json with defaults filled in; ValueError for values that no model can have."""
    return DeepseekConfig(**{name: value for name, value in config.items() if name != "auto_map"})


def refuse_existing(output: Path):
    """ValueError if `output` exists."""
    if os.path.lexists(output):
        raise ValueError(f"OUTPUT is {output}, which exists already; name a new folder or remove that one.")


def tensor_files(source: Path, required: Iterable[str]) -> dict[str, str]:
    """Tensor name -> the safetensors file in `source` that holds it.

    Args:
        required: names, without a leading "model.", that must be there.

    Raises:
        ValueError: there are no safetensors files, one is damaged, or a required tensor is missing.
    """
    shard_of = CheckpointFiles(source, {}).shard_of
    if not shard_of:
        raise ValueError(f"{source} has no safetensors weights; save the model with transformers' `save_pretrained`.")
    present = {name.removeprefix("model.") for name in shard_of}
    missing = sorted(set(required) - present)
    if missing:
        raise ValueError(
            f"The weights in {source} lack {missing[0]}"
            + (f" and {len(missing) - 1} more" if missing[1:] else "")
            + ", "
            "which its config.json asks for; use the config.json that belongs to the weights."
        )
    return shard_of


def new_matrix(name: str, shape: tuple[int, int], std: float, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """A normally distributed matrix that depends on its name and the seed, not on the order of the tensors."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return (torch.randn(shape, generator=generator) * std).to(dtype)


def dtype_beside(tensor: torch.Tensor) -> torch.dtype:
    """The dtype of a new weight: its neighbour's, but bfloat16 beside FP8, which needs scales."""
    return torch.bfloat16 if tensor.dtype.itemsize == 1 else tensor.dtype


def write_checkpoint(
    source: Path,
    output: Path,
    config: dict,
    shard_of: dict[str, str],
    change: Change,
    what: str,
    name: str | None = None,
):
    """Writes the folder `output`: `source` with other weights, another config.json and this repository's code.

    Args:
        config: the new config.json; `auto_map` is set here.
        shard_of: from `tensor_files`. Shards keep their names; what replaces a tensor stays in its shard.
        what: a sentence for the card on how the model came to be.
        name: of the model in the card (default: the folder's).

    Raises:
        ValueError: `output` exists.
    """
    refuse_existing(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.parent / f".{output.name}.{os.getpid()}.part"
    staging.mkdir()
    try:
        _write_weights(source, staging, shard_of, change)
        add_all_but_weights(staging, source, config, what, name or output.name)
        refuse_existing(output)
        os.rename(staging, output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def add_all_but_weights(folder: Path, source: Path, config: dict, what: str, name: str):
    """Makes a checkpoint of a folder with weights: tokenizer and licence of `source`, this repository's code, config.json and
    a card. The arguments are those of `write_checkpoint`."""
    for path in belonging(source, ("generation_config.json", "tokenizer_config.json", *TOKENIZER, *LICENCE)):
        (folder / path).parent.mkdir(exist_ok=True)
        shutil.copy2(source / path, folder / path)
    for file in code_files():
        shutil.copy2(file, folder / file.name)
    write_json(folder / "config.json", {**config, "auto_map": AUTO_MAP})
    write_card(folder, what, source, name)


def _write_weights(source: Path, folder: Path, shard_of: dict[str, str], change: Change):
    new_shard_of, total_size = {}, 0
    shards = sorted(set(shard_of.values()))
    files = "1 file" if len(shards) == 1 else f"{len(shards)} files"
    with tqdm(total=len(shard_of), unit="tensor", desc=f"writing {files}") as progress:
        for shard in shards:
            tensors = {}
            with safe_open(source / shard, framework="pt") as file:
                metadata = file.metadata()
                for name in (key for key, where in shard_of.items() if where == shard):
                    tensors.update(change(name, file.get_tensor(name)))
                    progress.update()
            save_file(tensors, folder / shard, metadata=metadata or {"format": "pt"})
            shutil.copymode(source / shard, folder / shard)  # safetensors makes files that only their owner reads
            new_shard_of |= dict.fromkeys(tensors, shard)
            total_size += sum(tensor.nbytes for tensor in tensors.values())
    if set(new_shard_of.values()) != {SAFE_WEIGHTS_NAME}:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(new_shard_of.items()))}
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)
