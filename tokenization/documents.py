"""Reads text documents from files and decides which of them are held out.

The corpus tools, the tokenizer trainer and the pretraining data builder all read through this file: a document means
the same to all of them, and neither trainer ever sees a held-out one. No torch, no model code.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.command import no_command

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt", ".txt.gz")


def check_paths(paths: list[Path]) -> None:
    """Refuse missing files and unknown formats before any work starts.

    Raises:
        FileNotFoundError: a path is not a file.
        ValueError: a file name ends in none of `SUFFIXES`.
    """
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"input file {path} does not exist; pass existing {', '.join(SUFFIXES)} files")
        if not path.name.endswith(SUFFIXES):
            raise ValueError(
                f"input file {path.name!r} must end in one of {', '.join(SUFFIXES)}; convert or rename it"
            )


@dataclass(frozen=True, slots=True)
class Record:
    """One document of a file, or the reason why there is none.

    Attributes:
        line: line of a `.jsonl` file or row of a `.parquet` file, from 1; 1 for `.txt`.
        text: the document; empty if `problem` is set.
        fields: all fields of the record, the text too; only the text for `.txt`.
        raw: the line as it stands in the file, without its end; empty for `.parquet`.
        problem: what is wrong and what to do about it, or None.
    """

    line: int
    text: str
    fields: dict
    raw: bytes
    problem: str | None = None


def read_records(path: Path, text_field: str = "text") -> Iterator[Record]:
    """Yield the records of one file in file order, damaged ones as records with a `problem`.

    A damaged line costs that line; a damaged gzip stream costs what follows in its file. Blank lines are no records.

    Args:
        path: `.jsonl` holds one JSON object a line, `.parquet` one document a row, `.txt` is one document; the text
            formats may be gzipped.
        text_field: the key or column that holds the text; ignored for `.txt`.
    """
    if path.suffix == ".parquet":
        yield from _parquet_records(path, text_field)
        return
    line = 0
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            if ".txt" in path.suffixes:
                yield _text_record(file.read())
                return
            for line, raw in enumerate(file, start=1):
                raw = raw.rstrip(b"\r\n")
                if raw.strip():
                    yield _json_record(raw, text_field, line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        problem = f"cannot be decompressed from here on ({error}); the rest of the file is lost: fetch it again"
        yield Record(line + 1, "", {}, b"", problem)


def _text_record(raw: bytes) -> Record:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Record(1, "", {}, raw, f"is not UTF-8 ({error}); convert it")
    return Record(1, text, {"text": text}, raw)


def _json_record(raw: bytes, text_field: str, line: int) -> Record:
    try:
        fields = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return Record(line, "", {}, raw, f"is not JSON ({error}); each line of a .jsonl file must be one object")
    return _checked(fields, text_field, line, raw)


def _checked(fields: object, text_field: str, line: int, raw: bytes) -> Record:
    text = fields.get(text_field) if isinstance(fields, dict) else None
    if not isinstance(text, str):
        keys = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        problem = f"has no text in field {text_field!r} (found {keys}); name the field by --text-field"
        return Record(line, "", {}, raw, problem)
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return Record(line, "", {}, raw, f"has text that is not Unicode ({error}); remove the lone surrogate")
    return Record(line, text, fields, raw)


def _parquet_records(path: Path, text_field: str) -> Iterator[Record]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    line = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    line += 1
                    yield _checked(fields, text_field, line, b"")
    except (ArrowException, OSError) as error:
        problem = f"cannot be read from here on ({error}); the rest of the file is lost: fetch it again"
        yield Record(line + 1, "", {}, b"", problem)


def read_documents(path: Path, text_field: str = "text") -> Iterator[str]:
    """Yield the texts of one file in file order; arguments as for `read_records`.

    Raises:
        ValueError: a record is damaged or has no text under `text_field`; the message names file and line.
    """
    for record in read_records(path, text_field):
        if record.problem:
            raise ValueError(f"{path.name}:{record.line} {record.problem}")
        yield record.text


def is_held_out(text: str, fraction: float) -> bool:
    """Whether this document belongs to the held-out set.

    The choice is a hash of the text alone: it does not depend on file names, file order or a random seed, so a document
    is held out everywhere or nowhere, and exact duplicates never fall on both sides.

    Args:
        text: the whole document.
        fraction: expected share of held-out documents, in [0, 1).
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def check_fraction(fraction: float) -> None:
    """Raise ValueError unless `fraction` is in [0, 1)."""
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"--held-out-fraction is {fraction}; it must be in [0, 1), for example 0.01")


if __name__ == "__main__":
    no_command("train a tokenizer by python -m tokenization.train_bpe")
