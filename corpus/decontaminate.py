"""Finds documents that share an n-gram with a test set, so that test results of a trained model mean something."""

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.command import no_command
from corpus.text import ngrams, normalise, tokenise

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".tsv", ".parquet", ".txt")
_BITMAP_BITS = 24


class Contaminants:
    """The n-grams of test sets, as hashes.

    Every string in a test set counts, whatever its field; each is cut by itself, so no n-gram spans two of them. A string
    of fewer than n tokens has no n-gram and protects nothing: `num_strings` and `num_short` say how many there are.

    Args:
        paths: test sets; `.json` is an array or one object a line, `.tsv` one test a line, `.txt` one test.
        n: tokens in an n-gram.

    Raises:
        ValueError: a file cannot be read as what its name says; the message names it.
    """

    def __init__(self, paths: list[Path], n: int):
        self.n = n
        self.num_strings = self.num_short = 0
        self._names: list[str] = []
        hashes, owners = [], []
        for path in paths:
            for number, record in enumerate(_records(path), start=1):
                self._names.append(f"{path.name}:{number}")
                for text in _strings(record):
                    found = ngrams(tokenise(normalise(text)).hashes, n)
                    self.num_strings += 1
                    self.num_short += not len(found)
                    hashes.append(found)
                    owners.append(np.full(len(found), len(self._names) - 1))
        every = np.concatenate([*hashes, np.empty(0, np.uint64)])
        self._hashes, first = np.unique(every, return_index=True)  # sorted
        self._owners = np.concatenate([*owners, np.empty(0, np.int64)])[first]
        # Nearly every n-gram of a document is in no test; one look at a bitmap rules those out.
        self._bitmap = np.zeros(1 << _BITMAP_BITS, dtype=bool)
        self._bitmap[self._hashes >> np.uint64(64 - _BITMAP_BITS)] = True

    def find(self, hashes: np.ndarray) -> str:
        """`FILE:NUMBER` of the test whose n-gram comes first in a document, or "".

        Args:
            hashes: hashes of the document's tokens, [T], uint64.
        """
        if not len(self._hashes):
            return ""
        found = ngrams(hashes, self.n)
        found = found[self._bitmap[found >> np.uint64(64 - _BITMAP_BITS)]]
        places = np.searchsorted(self._hashes, found).clip(max=len(self._hashes) - 1)
        owners = self._owners[places[self._hashes[places] == found]]
        return self._names[owners[0]] if len(owners) else ""


def _records(path: Path) -> Iterator[object]:
    try:
        if path.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile

            with ParquetFile(path) as file:
                for batch in file.iter_batches():
                    yield from batch.to_pylist()
            return
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            if path.suffix == ".tsv":
                yield from csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            elif path.suffix == ".txt":
                yield file.read()
            elif path.suffix == ".json":
                yield from _json_records(file.read())
            else:
                yield from (json.loads(line) for line in file if line.strip())
    except ValueError as error:
        raise ValueError(f"test set {path} cannot be read ({error}); repair or rename it") from error


def _json_records(content: str) -> list:
    try:
        whole = json.loads(content)
    except json.JSONDecodeError:
        return [json.loads(line) for line in content.split("\n") if line.strip()]
    return whole if isinstance(whole, list) else [whole]


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _strings(child)


if __name__ == "__main__":
    no_command("clean a corpus by python -m corpus.deduplicate")
