"""MinHash signatures, by datasketch or, faster, by rensa.

A signature holds for each of P hash functions the least hash over the n-grams of a text. Two texts agree in one entry
with the probability of their Jaccard similarity s. With b bands of r entries (P = b r) they share a whole band, and so
become a candidate pair, with probability 1 - (1 - s^r)^b (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4).
"""

from collections.abc import Callable

import numpy as np
from datasketch import MinHash

from common.command import no_command

BACKENDS = ("datasketch", "rensa")

SignatureFunction = Callable[[np.ndarray], np.ndarray]


def candidate_probability(similarity: float, bands: int, rows: int) -> float:
    """Probability that two texts with this Jaccard similarity share a band."""
    return 1 - (1 - similarity**rows) ** bands


def make_signer(backend: str, length: int, seed: int) -> SignatureFunction:
    """A function from n-gram hashes, [T] uint64, T >= 1, to a signature, [length] uint32.

    The two backends use different hash functions: signatures of one never meet those of the other.

    Raises:
        ValueError: the backend is unknown, or is rensa and not installed.
    """
    if backend == "datasketch":
        return _datasketch_signer(length, seed)
    if backend == "rensa":
        return _rensa_signer(length, seed)
    raise ValueError(f"--backend is {backend!r}; choose one of {', '.join(BACKENDS)}")


def _datasketch_signer(length: int, seed: int) -> SignatureFunction:
    blank = MinHash(length, seed=seed, hashfunc=int)

    def sign(hashes: np.ndarray) -> np.ndarray:
        minhash = blank.copy()
        minhash.update_batch((hashes >> np.uint64(32)).tolist())  # its hash functions take 32 bits
        return minhash.hashvalues.astype(np.uint32)

    return sign


def _rensa_signer(length: int, seed: int) -> SignatureFunction:
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise ValueError("--backend rensa needs `pip install rensa`; or choose datasketch") from error

    def sign(hashes: np.ndarray) -> np.ndarray:
        offsets = np.array([0, len(hashes)], dtype=np.uint64)
        rows = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, length, seed).to_rows()
        return np.array(rows[0], dtype=np.uint32)

    return sign


if __name__ == "__main__":
    no_command("clean a corpus by python -m corpus.deduplicate")
