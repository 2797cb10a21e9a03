"""Reads text documents from files and decides which of them are held out.

Both the tokenizer trainer and the pretraining data builder read through this file, so that neither ever sees a
held-out document. No torch, no model code.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")


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


def read_documents(path: Path, text_field: str = "text") -> Iterator[str]:
    """Yield the documents of one file in file order.

    Args:
        path: `.jsonl` holds one JSON object a line, `.txt` is one document; either may be gzipped.
        text_field: the JSON key that holds the text; ignored for `.txt`.

    Raises:
        ValueError: a line is not JSON or has no text under `text_field`; the message names file and line.
    """
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        if ".txt" in path.suffixes:
            yield file.read()
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _text_of(line, text_field, f"{path.name}:{number}")


def _text_of(line: str, text_field: str, place: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error}); each line of a .jsonl file must be one object") from error
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{place} has no text in field {text_field!r} (found {keys}); name the field by --text-field")
    return text


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
