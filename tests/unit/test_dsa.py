"""The lightning indexer and attention to what it selects, against loops and dense attention."""

import pytest
import tiny
import torch
from checks import assert_close
from deepseek_repo import dsa_deepseek as dsa
from deepseek_repo.dsa_deepseek import IndexStates, LightningIndexer
from deepseek_repo.spans_deepseek import VisibleTokens, find_visible_tokens


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Chunks so small that tests with few tokens go through several."""
    monkeypatch.setattr(dsa, "_INDEX_BYTES", 4 * 2 * 7 * 16 * 9)
    monkeypatch.setattr(dsa, "_LATENT_BYTES", 4 * 2 * 16 * 24 * 7)


def make_states(length: int, total: int, heads: int = 16, width: int = 12):
    states = IndexStates(
        torch.randn(2, length, heads, width), torch.randn(2, length, heads), torch.randn(2, length, width)
    )
    return states, torch.randn(2, total, width)


def whole_mask(visible: VisibleTokens, length: int) -> torch.Tensor:
    mask = visible.mask(slice(0, length), slice(0, visible.total), length, "cpu")
    return mask.expand(2, -1, -1)


VISIBLE = {
    "causal": VisibleTokens(50, None, None),
    "padded": VisibleTokens(50, torch.arange(50) >= torch.tensor([[0], [37]]), None),
    "packed": VisibleTokens(50, None, torch.tensor([[0] * 9 + [9] * 41, [0] * 45 + [45] * 5])),
}


@pytest.mark.parametrize("visible", VISIBLE.values(), ids=VISIBLE.keys())
@pytest.mark.parametrize("topk", [1, 8, 49, 64])
def test_selection_equals_the_definition(visible, topk):
    indexer = LightningIndexer(tiny.make_config("v32", index_topk=topk))
    states, key = make_states(50, 50)
    mask = whole_mask(visible, 50)
    chosen = torch.cat(
        [
            torch.nn.functional.pad(part, (0, topk - part.shape[-1]), value=-1)
            for part in (
                indexer.select(states, key, visible, slice(start, min(start + 7, 50))) for start in range(0, 50, 7)
            )
        ],
        dim=1,
    )
    for row in range(2):
        expected = dsa.dsa_reference(states.query[row], states.weights[row], key[row], mask[row], topk)
        for t, tokens in enumerate(expected):
            selected = [token for token in chosen[row, t].tolist() if token >= 0]
            assert len(selected) == len(set(selected))
            assert set(selected) == tokens, f"row {row}, token {t}"


def test_indexer_equals_the_formula():
    """Half-split rotation of the first numbers, LayerNorm with bias, scaled weights."""
    config = tiny.make_config("v32")
    indexer = LightningIndexer(config)
    tiny.randomise(indexer)
    hidden, latent = torch.randn(1, 5, 32), torch.randn(1, 5, 20)
    angles = torch.rand(1, 5, 4)
    states = indexer(hidden, latent, (angles.cos(), angles.sin()))
    key = indexer.wk(hidden[0])
    key = (key - key.mean(-1, keepdim=True)) / (key.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    key = key * indexer.k_norm.weight + indexer.k_norm.bias
    for t in range(5):
        for i in range(4):
            a, b = key[t, i].clone(), key[t, i + 4].clone()
            key[t, i] = a * angles[0, t, i].cos() - b * angles[0, t, i].sin()
            key[t, i + 4] = b * angles[0, t, i].cos() + a * angles[0, t, i].sin()
    assert_close(states.key[0], key, "key")
    assert_close(states.weights, hidden @ indexer.weights_proj.weight.T / (16 * 12) ** 0.5, "weights")
    assert_close(states.query[..., 8:], (latent @ indexer.wq_b.weight.T).view(1, 5, 16, 12)[..., 8:], "query")
    scores = dsa.index_scores(*states)
    expected = (torch.einsum("bthd,bsd->bths", states.query, states.key).relu() * states.weights[..., None]).sum(2)
    assert_close(scores, expected, "scores")


def test_scores_of_gathered_keys():
    states, key = make_states(9, 30)
    slots = torch.randint(0, 30, (2, 9, 5))
    everything = dsa.index_scores(states.query, states.weights, key)
    gathered = dsa.index_scores(states.query, states.weights, dsa.gather_tokens(key, slots))
    assert_close(gathered, everything.gather(-1, slots))


class TestVisibleTokens:
    def test_padding(self):
        mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
        visible = find_visible_tokens(mask, torch.arange(2, 4)[None], 2, has_cache=True)
        expected = [[[0, 0, 1, 0], [0, 0, 1, 1]], [[1, 1, 1, 0], [1, 1, 1, 1]]]
        assert torch.equal(whole_mask(visible, 2), torch.tensor(expected).bool())

    def test_packed(self):
        visible = find_visible_tokens(None, torch.tensor([[0, 1, 0, 1]]), 0, has_cache=False)
        expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
        assert torch.equal(whole_mask(visible, 4)[0], torch.tensor(expected).bool())

    def test_mask_of_queries_and_keys(self):
        with pytest.raises(ValueError, match=r"shape \(1, 1, 4, 4\)"):
            find_visible_tokens(torch.ones(1, 1, 4, 4), torch.arange(4)[None], 0, has_cache=False)


def test_index_loss_is_the_divergence():
    probs = torch.rand(2, 5, 3, 7).softmax(-1)
    scores = torch.randn(2, 5, 7, requires_grad=True)
    seen = torch.ones(2, 5, 7, dtype=torch.bool)
    seen[0, 0] = False  # padding
    loss = dsa.index_loss(probs, scores, seen)
    target, guess = probs.mean(2), scores.softmax(-1)
    expected = (target * (target / guess).log()).sum(-1)
    expected = expected.sum() - expected[0, 0]
    assert_close(loss, expected)
    loss.backward()
    assert_close(scores.grad[1], (guess - target)[1])
    assert not scores.grad[0, 0].any()
