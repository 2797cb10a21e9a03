"""Writes a checkpoint anew, shard by shard, of any size: what stays is copied byte by byte, and an interrupted run goes on.

Next to OUTPUT lies `OUTPUT.part` until the work is done. It holds `job.json`, which says what is being made of what; whatever
the work keeps for resuming; and the new folder, in which each shard appears when it is whole. At the end that folder takes
the name OUTPUT.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from common.command import no_command
from common.remote_code import write_json
from common.rewrite import add_all_but_weights, refuse_existing
from loading_deepseek import CheckpointFiles

_COPIED_AT_ONCE = 2**24  # bytes
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16}
_BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # all others have 8


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written.

    Attributes:
        name, dtype, shape: as in a safetensors header.
        data: makes its bytes, in pieces.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Callable[[], Iterable[bytes | memoryview]]

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * _BITS.get(self.dtype, 8) // 8


class Source:
    """The tensors of a checkpoint folder as they lie in its files.

    Raises:
        ValueError: there are no safetensors files, or one is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        files = CheckpointFiles(folder, {})
        if not files.shard_of:
            raise ValueError(
                f"{folder} has no safetensors weights; save the model with transformers' `save_pretrained`."
            )
        self.shard_of, self._headers = files.shard_of, files.headers
        self._starts = {shard: _start_of_data(folder / shard) for shard in set(self.shard_of.values())}

    def shards(self) -> list[str]:
        return sorted(set(self.shard_of.values()))

    def names_in(self, shard: str) -> list[str]:
        """The tensors of a shard, in the order of their bytes."""
        names = [name for name, where in self.shard_of.items() if where == shard]
        return sorted(names, key=lambda name: self._headers[name]["data_offsets"])

    def tensor(self, name: str, new_name: str | None = None, rows: list[int] | None = None) -> Tensor:
        """A tensor of the files, under another name if one is given, and of its first axis the `rows` only."""
        header = self._headers[name]
        shape, (start, end) = tuple(header["shape"]), header["data_offsets"]
        path, start = self.folder / self.shard_of[name], self._starts[self.shard_of[name]] + start
        ranges = [(start, end - header["data_offsets"][0])]
        if rows is not None:
            length = ranges[0][1] // shape[0]
            shape, ranges = (len(rows), *shape[1:]), [(start + row * length, length) for row in rows]
        return Tensor(new_name or name, header["dtype"], shape, lambda: _read_ranges(path, ranges))

    def header(self, name: str) -> dict:
        """dtype and shape of a tensor."""
        return self._headers[name]

    def total_bytes(self) -> int:
        return sum(header["data_offsets"][1] - header["data_offsets"][0] for header in self._headers.values())


class Job:
    """Work on a new folder that can be taken up again.

    Args:
        output: the folder to be made.
        what: what is made of what; work that was begun on anything else is not gone on with.

    Attributes:
        scratch: a folder for what the work keeps until it is done.
        folder: the new folder in the making.

    Raises:
        ValueError: `output` exists, or unfinished work of another kind lies there.
    """

    def __init__(self, output: Path, what: dict):
        refuse_existing(output)
        self.output = output
        self.scratch = output.parent / f"{output.name}.part"
        self.folder = self.scratch / "folder"
        record = self.scratch / "job.json"
        what = json.loads(json.dumps(what))
        self.goes_on = record.is_file()
        if self.goes_on and (found := json.loads(record.read_text(encoding="utf-8"))) != what:
            changed = sorted(name for name in what.keys() | found.keys() if what.get(name) != found.get(name))
            raise ValueError(
                f"{self.scratch} is unfinished work with other values of {', '.join(changed)}. Use the former ones to go on "
                "with it, or remove it, or name another OUTPUT."
            )
        if self.scratch.exists() and not self.goes_on and any(self.scratch.iterdir()):
            raise ValueError(f"{self.scratch} is in the way and not this program's; remove it or name another OUTPUT.")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(record, what)

    def write_shards(self, source: Source, change: Callable[[str], Iterable[Tensor]], title: str):
        """Writes each shard of `source` with what `change` makes of its tensors; those that are there are passed over."""
        new_shard_of, total_size = {}, 0
        with tqdm(total=len(source.shard_of), unit="tensor", desc=title) as progress:
            for shard in source.shards():
                names = source.names_in(shard)
                tensors = [tensor for name in names for tensor in change(name)]
                new_shard_of |= {tensor.name: shard for tensor in tensors}
                total_size += sum(tensor.nbytes for tensor in tensors)
                if tensors and not (self.folder / shard).exists():
                    _write_shard(self.folder / shard, tensors)
                    shutil.copymode(source.folder / shard, self.folder / shard)
                progress.update(len(names))
        if set(new_shard_of.values()) != {SAFE_WEIGHTS_NAME}:
            index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(new_shard_of.items()))}
            write_json(self.folder / SAFE_WEIGHTS_INDEX_NAME, index)

    def finish(self, source: Path, config: dict, what: str):
        """Adds all but the weights, `what` being a sentence for the card, and gives the folder its name."""
        add_all_but_weights(self.folder, source, config, what, self.output.name)
        refuse_existing(self.output)
        os.rename(self.folder, self.output)
        shutil.rmtree(self.scratch)


def digest(*parts) -> str:
    """A short hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def check_space(folder: Path, needed: int):
    """
    Raises:
        ValueError: there are fewer than `needed` bytes where `folder` is to be.
    """
    place = next(parent for parent in folder.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(
            f"{folder} will need {needed / 1e9:.2f} GB and {place} has {free / 1e9:.2f} GB; make room or name another OUTPUT."
        )


@contextmanager
def explain_interruption(scratch: Path, goes_on: bool = True):
    """Says of a full disk, and of Ctrl-C, what the same command does next.

    Args:
        goes_on: whether it goes on with what is done, or begins anew.

    Raises:
        ValueError: in place of either.
    """
    kept = f"What is done is kept in {scratch}: the same command goes on with it."
    kept = kept if goes_on else f"The same command begins anew; {scratch} may be removed."
    try:
        yield
    except Exception as error:
        if error_number(error) not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(f"The disk is full ({error}). Make room. {kept}") from error
    except KeyboardInterrupt as error:
        raise ValueError(f"Interrupted. {kept}") from error


def error_number(error: Exception) -> int | None:
    """The system's number of an error; safetensors passes it on as text: "... (os error 28)"."""
    found = re.search(r"os error (\d+)", str(error))
    return getattr(error, "errno", None) or (int(found[1]) if found else None)


def _start_of_data(path: Path) -> int:
    with open(path, "rb") as file:
        return 8 + struct.unpack("<Q", file.read(8))[0]


def _read_ranges(path: Path, ranges: list[tuple[int, int]]) -> Iterator[bytes]:
    with open(path, "rb") as file:
        for start, length in ranges:
            file.seek(start)
            while length:
                piece = file.read(min(length, _COPIED_AT_ONCE))
                if not piece:
                    raise ValueError(f"{path} ends before its header says; download it again.")
                length -= len(piece)
                yield piece


def _write_shard(path: Path, tensors: list[Tensor]):
    """A safetensors file, whole or not at all."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for tensor in tensors:
                before = file.tell()
                for piece in tensor.data():
                    file.write(piece)
                assert file.tell() - before == tensor.nbytes, tensor.name
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    os.replace(part, path)


if __name__ == "__main__":
    no_command("prune a checkpoint by python -m compress.prune")
