"""The bar a language model must pass: an interpolated n-gram model with modified Kneser-Ney smoothing, in bits per byte.

    python -m benchmarks.ngram --data runs/data --order 5 --units token character --tokenizer .

Trained on exactly the training shards of `pretrain.data`, all languages together, and evaluated on its held-out documents
as `pretrain.evaluate` does: each token after a document's bos counts, its eos included, over the documents' UTF-8 bytes.
Unlike the model's windows, a context reaches back over the whole document.

Smoothing: Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1998), section 3, with
three discounts for each order. With a(g) the count of an n-gram g, which below the highest order is the number of
different symbols in front of it, c the context of a symbol w and c' the context without its first symbol:

    p(w | c) = (a(c w) - D[a(c w)]) / sum_v a(c v)  +  gamma(c) p(w | c'),      p(w | nothing) = 1 / symbols

where gamma(c) is what the discounts took; a context that was never seen is left out. In front of a document stand as many
bos as a context is long. bos is never predicted.

Units: `token` as the shards have them; `character`, where rare characters are spelled in bytes; `byte`.

Counting is by sorting: n-grams of each order are numbered, and one of order n is the pair (number of its first n - 1
symbols, last symbol), one int64 whatever n.
"""

import argparse
import itertools
import json
import math
import resource
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.common import write_results
from common.command import one_line_errors, run_command
from common.machine import describe_machine
from pretrain.data import INDEX_NAME, TOKEN_DTYPE
from pretrain.evaluate import bits_per_byte, check_same_tokenizer

UNITS = ("token", "character", "byte")
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)  # where a text is so small that some count from 1 to 4 does not occur
MIN_CHARACTER_COUNT = 2  # characters that occur less often in training are spelled in bytes


# ---------------------------------------------------------------- the model


@dataclass(frozen=True)
class Order:
    """What the model knows of the n-grams of one length n.

    Attributes:
        keys: sorted int64 [G], number of the n-gram's first n - 1 symbols * symbols + its last one. Its place is the
            n-gram's number.
        counts: int64 [G], a(g); 0 for those that end in bos, which are contexts only.
        discounts: [4], what is taken from a count of 0, 1, 2 and of 3 or more.
        totals: [contexts], the sum of the counts behind each (n - 1)-gram.
        backoff: [contexts], gamma; 1 where nothing follows.
    """

    keys: np.ndarray
    counts: np.ndarray
    discounts: np.ndarray
    totals: np.ndarray
    backoff: np.ndarray

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The numbers of n-grams, -1 for those never seen (and where the key is negative)."""
        places = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[places] == keys, places, -1)


def discounts_of(counts: np.ndarray) -> np.ndarray:
    """The discounts of counts 0, 1, 2 and 3 or more, from how many n-grams occur once, twice, three and four times."""
    once, twice, thrice, four = (int((counts == count).sum()) for count in (1, 2, 3, 4))
    if not (once and twice and thrice and four):
        return np.array([0.0, *FALLBACK_DISCOUNTS])
    share = once / (once + 2 * twice)
    found = [1 - 2 * share * twice / once, 2 - 3 * share * thrice / twice, 3 - 4 * share * four / thrice]
    # on small texts the formulas can leave the range in which a discounted count is one
    return np.array([0.0, *np.clip(found, 0.0, [1.0, 2.0, 3.0])])


class KneserNey:
    """An n-gram model of symbols 0 .. `num_symbols` - 1, of which `bos` opens each document and nothing else.

    Args:
        stream: documents one after the other, each beginning with bos, [N] integers.
        order: n, symbols of the longest n-gram.
        num_symbols: size of the alphabet, bos included.
        bos: the symbol that opens a document.

    Raises:
        ValueError: the order is below 1, or the stream is empty, has foreign symbols or does not begin with bos.
    """

    def __init__(self, stream: np.ndarray, order: int, num_symbols: int, bos: int):
        if order < 1:
            raise ValueError(f"order is {order}; it must be at least 1")
        self.order, self.num_symbols, self.bos = order, num_symbols, bos
        symbols = self._pad(stream)
        wanted = symbols != bos
        numbers = np.zeros(len(symbols), dtype=np.int32)  # of the (n - 1)-grams that end at each place, none for n = 1
        types_of, counts_of = [], []
        for n in tqdm(range(1, order + 1), desc="counting", unit="order", leave=False):
            types, first, longer = _number(self._keys(numbers, symbols))
            if n > 1:  # each kind of n-gram is one more symbol in front of its last n - 1
                counts_of.append(np.bincount(numbers[first[wanted[first]]], minlength=len(types_of[-1])))
            types_of.append(types)
            numbers = longer
        counts_of.append(np.bincount(numbers[wanted], minlength=len(types_of[-1])))
        self.orders: list[Order] = []
        for types, counts in zip(types_of, counts_of, strict=True):
            num_contexts = len(self.orders[-1].keys) if self.orders else 1
            self.orders.append(self._smooth(types, counts, num_contexts))

    def _pad(self, stream: np.ndarray) -> np.ndarray:
        """The stream with each bos repeated, so that the first symbol of a document has a whole context, int32."""
        stream = np.asarray(stream, dtype=np.int32)
        if not len(stream) or stream[0] != self.bos or stream.min() < 0 or stream.max() >= self.num_symbols:
            raise ValueError(
                f"the stream must begin with bos ({self.bos}) and hold symbols from 0 to {self.num_symbols - 1}; "
                f"it has {len(stream)} symbols, the first being {stream[:1].tolist()}"
            )
        return np.repeat(stream, np.where(stream == self.bos, max(1, self.order - 1), 1))

    def _keys(self, numbers: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        """Keys of the n-grams that end at each place, from the numbers of the (n - 1)-grams, -1 for unknown ones.

        Before the first place stand more bos; (n - 1)-grams of bos alone have the first place's number.
        """
        keys = np.concatenate((numbers[:1], numbers[:-1])).astype(np.int64)
        unknown = keys < 0
        keys *= self.num_symbols
        keys += symbols
        keys[unknown] = -1
        return keys

    def _smooth(self, types: np.ndarray, counts: np.ndarray, num_contexts: int) -> Order:
        discounts = discounts_of(counts)
        contexts = types // self.num_symbols
        totals = np.bincount(contexts, weights=counts, minlength=num_contexts)
        taken = np.bincount(contexts, weights=discounts[np.minimum(counts, 3)], minlength=num_contexts)
        backoff = np.divide(taken, totals, out=np.ones(num_contexts), where=totals > 0)
        return Order(types, counts, discounts, totals, backoff)

    def probabilities(self, stream: np.ndarray) -> np.ndarray:
        """p of each symbol that is no bos given all before it in its document, float64 [those symbols]."""
        symbols = self._pad(stream)
        wanted = np.flatnonzero(symbols != self.bos)
        result = np.full(len(wanted), 1 / (self.num_symbols - 1))
        numbers = np.zeros(len(symbols), dtype=np.int32)
        for table in self.orders:
            keys = self._keys(numbers, symbols)
            contexts = numbers[wanted - 1]
            numbers = table.find(keys)
            counts = np.where(numbers[wanted] < 0, 0, table.counts[numbers[wanted]])
            totals = np.where(contexts < 0, 0, table.totals[contexts])
            backoff = np.where(contexts < 0, 1, table.backoff[contexts])
            seen = (counts - table.discounts[np.minimum(counts, 3)]) / np.maximum(totals, 1)
            result = seen + backoff * result
        return result


def _number(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64 [N] -> the different ones in order, the place where each occurs first, and the number of each of the N, int32.

    np.unique does the same in twice the memory.
    """
    order = keys.argsort(kind="stable")
    keys = keys[order]
    new = np.concatenate(([True], keys[1:] != keys[:-1]))
    numbers = np.empty(len(keys), dtype=np.int32)
    numbers[order] = np.cumsum(new, dtype=np.int32) - 1
    return keys[new], order[new], numbers


# ---------------------------------------------------------------- text as symbols


class TokenAlphabet:
    """The shards' own tokens."""

    def __init__(self, index: dict, documents: Iterator[np.ndarray], tokenizer: PreTrainedTokenizerBase | None):
        self.num_symbols, self.bos = index["vocab_size"], index["bos_token_id"]

    def encode(self, tokens: np.ndarray) -> np.ndarray:
        """A document of tokens -> its symbols."""
        return tokens


class TextAlphabet:
    """Bytes 0-255, bos 256, eos 257 and, above, the characters that are frequent enough to be one symbol."""

    bos, eos, first_character = 256, 257, 258

    def __init__(
        self, index: dict, documents: Iterator[np.ndarray], tokenizer: PreTrainedTokenizerBase, frequent: bool
    ):
        self.tokenizer = tokenizer
        self.symbol: dict[str, int] = {}
        if frequent:
            seen = Counter()
            for document in documents:
                seen.update(self._text(document))
            kept = sorted(character for character, count in seen.items() if count >= MIN_CHARACTER_COUNT)
            self.symbol = {character: self.first_character + i for i, character in enumerate(kept)}
        self.num_symbols = self.first_character + len(self.symbol)

    def _text(self, tokens: np.ndarray) -> str:
        return self.tokenizer.decode(tokens[1:-1].tolist(), clean_up_tokenization_spaces=False)

    def encode(self, tokens: np.ndarray) -> np.ndarray:
        """A document of tokens, bos and eos around it -> its symbols."""
        text = self._text(tokens)
        if not self.symbol:
            body = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
        else:
            body = [
                symbol
                for character in text
                for symbol in ([self.symbol[character]] if character in self.symbol else character.encode("utf-8"))
            ]
        return np.concatenate(([self.bos], body, [self.eos])).astype(np.uint32)


def make_alphabet(unit: str, index: dict, documents: Iterator[np.ndarray], tokenizer):
    """The alphabet of a unit; characters are counted in the training `documents`."""
    if unit == "token":
        return TokenAlphabet(index, documents, tokenizer)
    return TextAlphabet(index, documents, tokenizer, frequent=unit == "character")


def read_documents(folder: Path, index: dict, languages: list[str], split: str) -> Iterator[np.ndarray]:
    """The documents of a split of a dataset by `pretrain.data`, token by token, bos and eos included."""
    for language in languages:
        for shard in index["languages"][language][split]["shards"]:
            tokens = np.fromfile(folder / shard["file"], dtype=TOKEN_DTYPE)
            if len(tokens) != shard["tokens"]:
                raise ValueError(
                    f"shard {shard['file']} holds {len(tokens)} tokens, its index says {shard['tokens']}; "
                    "the file is damaged: run pretrain.data again"
                )
            yield from np.split(tokens, np.flatnonzero(tokens == index["bos_token_id"])[1:])


# ---------------------------------------------------------------- measuring


def measure(folder: Path, unit: str, order: int, tokenizer: PreTrainedTokenizerBase | None) -> dict:
    """Train on all languages of a dataset, evaluate on each.

    Args:
        folder: written by `pretrain.data`.
        unit: one of UNITS; all but "token" need the tokenizer.
        order: n.
    """
    start = time.perf_counter()
    index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    languages = sorted(index["languages"])
    alphabet = make_alphabet(unit, index, read_documents(folder, index, languages, "train"), tokenizer)

    def stream(languages: list[str], split: str) -> np.ndarray:
        documents = read_documents(folder, index, languages, split)
        total = sum(index["languages"][language][split]["documents"] for language in languages)
        bar = tqdm(documents, desc=f"reading {split}", total=total, unit="document", leave=False)
        return np.concatenate([alphabet.encode(document) for document in bar])

    train = stream(languages, "train")
    model = KneserNey(train, order, alphabet.num_symbols, alphabet.bos)
    result = {
        "unit": unit,
        "order": order,
        "alphabet": alphabet.num_symbols,
        "training_symbols": len(train),
        "ngrams": [len(table.keys) for table in model.orders],
        "discounts": [[round(float(value), 4) for value in table.discounts[1:]] for table in model.orders],
        "held_out": {},
    }
    for language in languages:
        size = index["languages"][language]["held_out"]
        if not size["tokens"]:
            continue
        probabilities = model.probabilities(stream([language], "held_out"))
        result["held_out"][language] = {
            "bits_per_byte": bits_per_byte(-float(np.log(probabilities).sum()), size["bytes"]),
            "perplexity": math.exp(-float(np.log(probabilities).mean())),
            "symbols": len(probabilities),
            "bytes": size["bytes"],
        }
    result["seconds"] = round(time.perf_counter() - start, 1)
    result["peak_memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return result


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ngram", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder written by pretrain.data")
    parser.add_argument("--order", type=int, nargs="+", default=[5], help="lengths of the longest n-gram (default 5)")
    parser.add_argument("--units", nargs="+", choices=UNITS, default=["token"], help="symbols (default token)")
    parser.add_argument("--tokenizer", type=Path, help="folder with the data's tokenizer.json, for other units")
    parser.add_argument("--name", default="ngram", help="of the file in benchmarks/results (default ngram)")
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    tokenizer = None
    if not (args.data / INDEX_NAME).is_file():
        raise ValueError(f"{args.data / INDEX_NAME} does not exist; write a dataset with `python -m pretrain.data`")
    if min(args.order) < 1:
        raise ValueError(f"--order is {min(args.order)}; it must be at least 1")
    if set(args.units) != {"token"}:
        if args.tokenizer is None:
            raise ValueError("--units other than token need --tokenizer, to turn tokens back into text")
        check_same_tokenizer(args.tokenizer, args.data)
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    results = []
    for unit, order in itertools.product(args.units, args.order):
        results.append(measure(args.data, unit, order, tokenizer))
        write_results(args.name, {"machine": describe_machine(), "runs": results})
    languages = list(results[0]["held_out"])
    table = Table("unit", "order", *(f"{name}, bits per byte" for name in languages), "seconds", "peak GiB")
    for run in results:
        bits = (f"{run['held_out'][name]['bits_per_byte']:.4f}" for name in languages)
        table.add_row(run["unit"], str(run["order"]), *bits, str(run["seconds"]), str(run["peak_memory_gib"]))
    Console().print(table)
    return 0


if __name__ == "__main__":
    run_command(main)
