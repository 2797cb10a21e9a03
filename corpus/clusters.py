"""Which documents are copies of which: equal fingerprints, then MinHash bands, true Jaccard and union-find.

Documents are numbers in input order. A cluster is a connected component of the pairs that share a band and are similar
enough, which does not depend on the order; the keeper is its first document, which does.

Shapes: N documents, P signature entries.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from common.command import no_command
from corpus.text import hash_slices


class UnionFind:
    """Disjoint sets of the numbers below `count`; each is known by its least member."""

    def __init__(self, count: int):
        self.parents = np.arange(count)

    def find(self, member: int) -> int:
        """The least member of the set of `member`."""
        root = member
        while self.parents[root] != root:
            root = int(self.parents[root])
        while self.parents[member] != root:
            self.parents[member], member = root, int(self.parents[member])
        return root

    def union(self, one: int, other: int) -> None:
        """Make the sets of two members one."""
        first, second = sorted((self.find(one), self.find(other)))
        self.parents[second] = first


def first_equal(fingerprints: np.ndarray) -> np.ndarray:
    """For each row the first row equal to it.

    Args:
        fingerprints: [N, 2] uint64.

    Returns:
        Row numbers, [N]; a row's own number if nothing equal precedes it.
    """
    _, first, inverse = np.unique(fingerprints, axis=0, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


def band_keys(signatures: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each row, [N, rows of a band] -> [N], equal for equal rows."""
    count, width = signatures.shape
    starts = np.arange(count) * width
    return hash_slices(signatures.astype(np.uint64).reshape(-1), starts, starts + width)


def buckets(keys: np.ndarray) -> Iterator[np.ndarray]:
    """The groups of at least two positions with equal keys, positions ascending, in order of the first position."""
    order = np.argsort(keys, kind="stable")
    edges = np.flatnonzero(np.diff(keys[order])) + 1
    groups = [group for group in np.split(order, edges) if len(group) > 1]
    return iter(sorted(groups, key=lambda group: group[0]))


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """|A and B| / |A or B| of two sets given as arrays without repetitions."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


def join_similar(
    groups: list[np.ndarray], count: int, shingles_of: Callable[[int], np.ndarray], threshold: float
) -> tuple[UnionFind, int, int]:
    """Unite the documents of each bucket that are truly similar.

    A pair already in one set is not compared again, which changes no set. So a bucket of k copies of one text costs k
    comparisons; only a bucket of k unlike texts costs k^2 / 2.

    Args:
        groups: buckets of all bands, arrays of document numbers.
        count: N.
        shingles_of: n-gram hashes of a document without repetitions.
        threshold: least Jaccard similarity of a pair that is united.

    Returns:
        The sets, the number of compared pairs and how many of them were below the threshold.
    """
    sets = UnionFind(count)
    compared = 0
    rejected: set[tuple[int, int]] = set()

    def connect(others: list[int], member: int) -> bool:
        """Whether a set of the bucket and a member are one set, after comparing them if need be."""
        nonlocal compared
        if sets.find(others[0]) == sets.find(member):
            return True
        for other in others:
            pair = (min(other, member), max(other, member))
            if pair not in rejected:
                compared += 1
                if jaccard(shingles_of(other), shingles_of(member)) >= threshold:
                    sets.union(other, member)
                    return True
                rejected.add(pair)
        return False

    for group in groups:
        seen: list[list[int]] = []  # members of the bucket so far, one list for each set
        for member in map(int, group):
            joined = [others for others in seen if connect(others, member)]
            seen = [others for others in seen if others not in joined] if len(joined) > 1 else seen
            if len(joined) == 1:
                joined[0].append(member)
            else:
                seen.append([*itertools.chain.from_iterable(joined), member])
    return sets, compared, len(rejected)


if __name__ == "__main__":
    no_command("clean a corpus by python -m corpus.deduplicate")
