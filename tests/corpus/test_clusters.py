"""Exact copies, buckets and clusters against brute force."""

import itertools

import numpy as np
import pytest

from corpus.clusters import UnionFind, band_keys, buckets, first_equal, jaccard, join_similar


def test_first_equal():
    rows = np.array([[1, 2], [3, 4], [1, 2], [2, 1], [3, 4], [1, 2]], dtype=np.uint64)
    assert first_equal(rows).tolist() == [0, 1, 0, 3, 1, 0]
    assert first_equal(rows[:0]).tolist() == []


def test_buckets_are_the_groups_of_equal_rows():
    rows = np.random.default_rng(0).integers(0, 3, (40, 2), dtype=np.uint32)
    expected: dict[tuple, list[int]] = {}
    for number, row in enumerate(rows.tolist()):
        expected.setdefault(tuple(row), []).append(number)
    found = [group.tolist() for group in buckets(band_keys(rows))]
    assert found == [group for group in expected.values() if len(group) > 1]


def test_jaccard():
    one, other = np.array([1, 2, 3, 4]), np.array([3, 4, 5])
    assert jaccard(one, other) == len({3, 4}) / len({1, 2, 3, 4, 5})


@pytest.mark.parametrize("seed", range(8))
def test_clusters_are_the_components_of_similar_pairs_whatever_the_order(seed):
    random = np.random.default_rng(seed)
    shingles = [np.unique(random.integers(0, 14, 9)) for _ in range(24)]
    groups = [random.choice(24, 8, replace=False) for _ in range(6)]
    # Brute force: every pair that meets in a bucket is compared, then components spread until nothing changes.
    label = list(range(24))
    edges = {
        (a, b)
        for group in groups
        for a, b in itertools.combinations(sorted(group.tolist()), 2)
        if jaccard(shingles[a], shingles[b]) >= 0.5
    }
    for _ in range(24):
        for a, b in edges:
            label[a] = label[b] = min(label[a], label[b])
    for shuffled in (groups, [random.permutation(group) for group in groups[::-1]]):
        sets, compared, rejected = join_similar(shuffled, 24, shingles.__getitem__, 0.5)
        assert [sets.find(number) for number in range(24)] == label
        assert rejected <= compared
    assert len(set(label)) < 24, "the example must have clusters"


def test_many_copies_cost_one_comparison_each():
    shingles = np.arange(5)
    _, compared, _ = join_similar([np.arange(500)] * 3, 500, lambda _: shingles, 0.8)
    assert compared == 499


def test_union_find_names_a_set_by_its_least_member():
    sets = UnionFind(6)
    sets.union(5, 4)
    sets.union(4, 2)
    assert [sets.find(number) for number in range(6)] == [0, 1, 2, 3, 2, 2]
