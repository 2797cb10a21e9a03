"""Texts as hashes: normal form, tokens, n-grams.

Chinese is written without spaces, so a tokenizer that splits at spaces and punctuation sees whole clauses as words and
one edited character changes most n-grams. Here a character of a script without spaces is a token; elsewhere a run of
letters and digits is one.

All work is done by numpy passes over code points, without Python loops over characters. Shapes: C characters, T tokens.
"""

import hashlib
import sys
import unicodedata
from dataclasses import dataclass
from functools import cache

import numpy as np

from common.command import no_command

OTHER, LETTER, DIGIT, SINGLE = range(4)  # classes of code points; SINGLE is a token of its own

# Han (with 々〇), kana, bopomofo, and the Southeast Asian scripts that put no spaces between words.
SCRIPTS_WITHOUT_SPACES = [
    (0x3005, 0x3007),
    (0x3041, 0x30FF),
    (0x3105, 0x312F),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
    (0x0E01, 0x0E4E),
    (0x0E81, 0x0ECD),
    (0x1000, 0x103F),
    (0x1780, 0x17D3),
]

_STEP = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_STEP_INVERSE = pow(_STEP, -1, 1 << 64)


@dataclass(frozen=True)
class Tokens:
    """A text cut into tokens.

    Attributes:
        text: the normal form that was cut.
        classes: class of each character, [C], uint8.
        starts: first character of each token, [T].
        ends: one past its last character, [T].
        hashes: 64-bit hash of each token, [T], uint64; a function of its characters alone.
    """

    text: str
    classes: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    hashes: np.ndarray

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def is_single(self) -> np.ndarray:
        """Which tokens are characters of a script without spaces, [T], bool."""
        return self.classes[self.starts] == SINGLE


def normalise(text: str) -> str:
    """NFKC, lower case, each run of white space one space: texts equal in this form count as the same text."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def fingerprint(normal: str) -> bytes:
    """16-byte hash of a text in normal form."""
    return hashlib.blake2b(normal.encode("utf-8"), digest_size=16).digest()


def tokenise(normal: str) -> Tokens:
    """Cut a text in normal form into tokens; what is neither letter nor digit separates and is dropped."""
    points = np.frombuffer(normal.encode("utf-32-le"), dtype=np.uint32)  # [C]
    classes = _class_table()[points]
    in_run = (classes == LETTER) | (classes == DIGIT)
    single = classes == SINGLE
    opens, closes = in_run.copy(), in_run.copy()
    opens[1:] &= ~in_run[:-1]
    closes[:-1] &= ~in_run[1:]
    starts, ends = np.flatnonzero(opens | single), np.flatnonzero(closes | single) + 1
    return Tokens(normal, classes, starts, ends, hash_slices(_mix(points.astype(np.uint64)), starts, ends))


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """Hash of each run of n tokens, in order and with repetitions, [T - n + 1] (empty if T < n), uint64."""
    starts = np.arange(max(0, len(hashes) - n + 1))
    return hash_slices(hashes, starts, starts + n)


def hash_slices(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Hash of values[start:end] for each pair: a polynomial in `_STEP` modulo 2^64 by prefix sums, then mixed."""
    powers, inverses = _powers(1 << max(10, len(values).bit_length()))
    sums = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum(values * powers[: len(values)], out=sums[1:])
    return _mix((sums[ends] - sums[starts]) * inverses[starts])


def _mix(values: np.ndarray) -> np.ndarray:
    """Scatter 64-bit integers (the finaliser of splitmix64, with the step added so that 0 moves too)."""
    values = values + np.uint64(_STEP)
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


@cache
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """`_STEP ** i` and its inverse for i < count, [count] each, uint64."""
    exponents = np.full(count, _STEP, dtype=np.uint64), np.full(count, _STEP_INVERSE, dtype=np.uint64)
    for factors in exponents:
        factors[0] = 1
        np.cumprod(factors, out=factors)
    return exponents


@cache
def _class_table() -> np.ndarray:
    """Class of every code point, [sys.maxunicode + 1], uint8."""
    table = np.zeros(sys.maxunicode + 1, dtype=np.uint8)
    letters_or_marks = {"L": LETTER, "M": LETTER, "N": DIGIT}
    for point in range(sys.maxunicode + 1):
        table[point] = letters_or_marks.get(unicodedata.category(chr(point))[0], OTHER)
    table[ord("_")] = LETTER  # identifiers are words
    for first, last in SCRIPTS_WITHOUT_SPACES:
        block = table[first : last + 1]
        block[block != OTHER] = SINGLE
    return table


if __name__ == "__main__":
    no_command("clean a corpus by python -m corpus.deduplicate")
