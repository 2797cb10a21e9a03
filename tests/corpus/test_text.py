"""Tokens, n-grams and signatures, against sets of Python tuples and the theory of MinHash."""

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from corpus.clusters import band_keys, buckets, jaccard
from corpus.signatures import BACKENDS, candidate_probability, make_signer
from corpus.text import fingerprint, ngrams, normalise, tokenise


def words(text: str) -> list[str]:
    tokens = tokenise(normalise(text))
    return [tokens.text[start:end] for start, end in zip(tokens.starts, tokens.ends, strict=True)]


def test_a_chinese_character_is_a_token_and_so_is_a_word():
    assert words("Hello, World_2! 你好，世界。GPT-4很强") == [
        *["hello", "world_2", "你", "好", "世", "界", "gpt", "4", "很", "强"]
    ]
    assert words("ｆｕｌｌ　ｗｉｄｔｈ カタカナ naïve café") == ["full", "width", *"カタカナ", "naïve", "café"]
    assert words("한국어 텍스트") == ["한국어", "텍스트"]
    assert words("、。!? \n") == words("") == []


def test_normal_form_forgets_case_width_and_white_space():
    same = ["Ａ  fine\n\nDAY", "a fine day", " A\tFine　day\n"]
    assert len({fingerprint(normalise(text)) for text in same}) == 1
    assert fingerprint(normalise("a fine day")) != fingerprint(normalise("afine day"))


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60), st.integers(1, 4))
def test_hashes_of_ngrams_stand_for_the_ngrams(one, other, n):
    def tuples(text):
        tokens = words(text)
        return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]

    every = tuples(one) + tuples(other)
    hashes = [int(h) for text in (one, other) for h in ngrams(tokenise(normalise(text)).hashes, n)]
    assert len(every) == len(hashes)
    assert len(set(zip(every, hashes, strict=True))) == len(set(every)) == len(set(hashes))


def test_order_and_place_of_tokens():
    def hashed(text):
        return ngrams(tokenise(text).hashes, 2)

    assert hashed("b a") != hashed("a b")
    assert hashed("x y a b")[2] == hashed("a b")[0]  # wherever it stands


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("similarity", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_pairs_are_found_at_the_theoretical_rate(backend, similarity):
    """Pairs with an exact Jaccard similarity share a band as often as 1 - (1 - s^r)^b says."""
    if backend == "rensa":
        pytest.importorskip("rensa")
    pairs, size, bands, rows = 400, 300, 14, 8
    common = round(2 * size * similarity / (1 + similarity))
    random = np.random.default_rng(int(similarity * 100))
    sign = make_signer(backend, bands * rows, seed=3)
    found, exact = 0, common / (2 * size - common)
    for _ in range(pairs):
        hashes = random.integers(0, 1 << 63, 2 * size - common, dtype=np.uint64)
        one, other = hashes[:size], hashes[size - common :]
        assert jaccard(one, other) == exact
        signatures = np.stack([sign(one), sign(other)])
        found += any(
            len(list(buckets(band_keys(signatures[:, band * rows : (band + 1) * rows])))) for band in range(bands)
        )
    expected = candidate_probability(exact, bands, rows)
    # Four standard deviations of a binomial: chance alone fails one test in 16,000, and the seeds are fixed.
    assert abs(found - pairs * expected) <= 4 * math.sqrt(pairs * expected * (1 - expected)) + 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_signatures_depend_on_the_set_and_the_seed_alone(backend):
    if backend == "rensa":
        pytest.importorskip("rensa")
    hashes = np.random.default_rng(0).integers(0, 1 << 63, 50, dtype=np.uint64)
    sign = make_signer(backend, 16, 1)
    assert sign(hashes).dtype == np.uint32
    assert np.array_equal(sign(hashes), make_signer(backend, 16, 1)(np.concatenate([hashes[::-1], hashes[:9]])))
    assert not np.array_equal(sign(hashes), make_signer(backend, 16, 2)(hashes))


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="--backend is 'spark'; choose one of datasketch, rensa"):
        make_signer("spark", 8, 1)
