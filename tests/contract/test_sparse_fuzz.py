"""Sparse attention of random small models: what is chosen does not depend on caches, chunks, batches and padding."""

import random

import pytest
import torch
from checks import assert_close
from deepseek_repo import dsa_deepseek as dsa, nsa_deepseek as nsa
from deepseek_repo.selection_deepseek import rank_places, ranked_places
from tiny import make_model, make_tokens
from transformers import DynamicCache


def draw_fields(family: str, draw: random.Random) -> dict:
    """Few index heads, so that many index scores are 0; for NSA sizes of which some blocks have no whole entry."""
    common = {
        "num_hidden_layers": draw.choice([1, 2]),
        "num_attention_heads": draw.choice([2, 4]),
        "num_nextn_predict_layers": 0,
        "rope_scaling": None,
    }
    if family == "v32":
        return common | {
            "index_topk": draw.choice([1, 3, 8, 16, 21]),
            "index_n_heads": draw.choice([1, 2, 3, 4]),
            "index_head_dim": draw.choice([8, 12]),
        }
    stride = draw.choice([1, 2, 4])
    block = stride * draw.choice([1, 2])
    return common | {
        "num_key_value_heads": draw.choice([1, 2]),
        "nsa_compress_stride": stride,
        "nsa_compress_block_size": block,
        "nsa_select_block_size": block * draw.choice([1, 2]),
        "nsa_num_init_blocks": draw.choice([0, 1]),
        "nsa_num_local_blocks": draw.choice([1, 2]),
        "nsa_num_select_blocks": draw.choice([3, 4]),
        "nsa_window_size": draw.choice([1, 3, 8]),
    }


def run_in_chunks(model, tokens, mask, draw: random.Random) -> torch.Tensor:
    """Over a cache, in chunks of random sizes; one token at a time is as likely as many."""
    cache, logits, start = DynamicCache(config=model.config), [], 0
    while start < tokens.shape[1]:
        stop = min(start + draw.choice([1, 1, 2, 5, 9, 30]), tokens.shape[1])
        part = None if mask is None else mask[:, :stop]
        logits.append(model(tokens[:, start:stop], attention_mask=part, past_key_values=cache, use_cache=True).logits)
        start = stop
    return torch.cat(logits, dim=1)


def pad(rows: list[torch.Tensor], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of rows in one batch."""
    width = max(map(len, rows))
    batch = [(torch.full((width - len(row),), 2), row) for row in rows]
    ids = torch.stack([torch.cat(parts if left else parts[::-1]) for parts in batch])
    masks = [(torch.zeros_like(padding), torch.ones_like(row)) for padding, row in batch]
    return ids, torch.stack([torch.cat(parts if left else parts[::-1]) for parts in masks])


@torch.no_grad()
def check(family: str, seed: int, monkeypatch):
    draw = random.Random(seed)
    for module, name in ((dsa, "_INDEX_BYTES"), (dsa, "_LATENT_BYTES"), (nsa, "_SCORE_BYTES")):
        monkeypatch.setattr(module, name, draw.choice([2**14, 2**24]))
    fields = draw_fields(family, draw)
    model = make_model(family, seed=seed, **fields)
    lengths = [draw.randrange(1, 70) for _ in range(3)]
    vocabulary = draw.choice([5, 128])  # with 2 different tokens text repeats itself
    rows = [make_tokens(1, length, vocabulary, seed=seed + row)[0] for row, length in enumerate(lengths)]
    expected = [model(row[None], use_cache=False).logits[0] for row in rows]
    where = f"seed {seed}, {fields}, lengths {lengths}"
    for row, logits in zip(rows, expected, strict=True):
        assert_close(run_in_chunks(model, row[None], None, draw)[0], logits, f"in chunks, {where}", atol=1e-3)
    for left in (True, False):
        ids, mask = pad(rows, left)
        padded = {"padded": model(ids, attention_mask=mask, use_cache=False).logits}
        if left:
            padded["padded, in chunks"] = run_in_chunks(model, ids, mask, draw)
        for how, logits in padded.items():
            for row, (real, alone) in enumerate(zip(mask.bool(), expected, strict=True)):
                assert_close(logits[row, real], alone, f"row {row}, left {left}, {how}, {where}", atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", ["v32", "nsa"])
def test_a_few_random_models(family, seed, monkeypatch):
    check(family, seed, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("family", ["v32", "nsa"])
def test_many_random_models(family, part, monkeypatch):
    for seed in range(100 * part + 10, 100 * part + 110):
        check(family, seed, monkeypatch)


@pytest.mark.parametrize("first", [0, 1000, 2**31])
def test_ranks_sort_by_score_and_then_by_place(first):
    infinity = float("inf")
    scores = torch.tensor([0.0, -0.0, -1e-45, 1e-45, -3.0, 3.0, 3.0, infinity, -3.4e38, -infinity, -infinity, 0.0])
    order = rank_places(scores, first).sort(descending=True).values
    expected = sorted(range(9), key=lambda i: (scores[i].item(), i), reverse=True)
    expected.insert(expected.index(1), 11)  # of the zeros, whatever their sign, the last place is the best
    assert ranked_places(order).tolist() == [first + i for i in expected] + [-1, -1]


def test_scores_that_are_no_number_are_not_lost():
    """What makes them shows in the output, as it would without selection."""
    scores = torch.tensor([1.0, float("nan"), -float("nan"), 2.0])
    assert ranked_places(rank_places(scores).topk(2).values).sort().values.tolist() == [1, 2]
