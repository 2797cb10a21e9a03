"""DSA's Triton kernels: against the PyTorch functions, the slow definition, and in a model."""

import pytest
import tiny
import torch
from checks import assert_close
from deepseek_repo import dsa_deepseek as dsa, dsa_kernels_deepseek as kernels
from deepseek_repo.dsa_deepseek import IndexStates, LightningIndexer
from deepseek_repo.spans_deepseek import VisibleTokens


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Tiles so small that a test with few tokens goes through several, and ends within one."""
    monkeypatch.setattr(kernels, "_INDEX_QUERIES", 4)
    monkeypatch.setattr(kernels, "_INDEX_KEYS", 16)


@pytest.mark.parametrize(("queries", "keys"), [(1, 40), (7, 17), (9, 3)])
@pytest.mark.parametrize("heads", [1, 5, 64])
def test_index_scores(device, queries, keys, heads):
    query, weights = torch.randn(2, queries, heads, 12, device=device), torch.randn(2, queries, heads, device=device)
    key = torch.randn(2, keys + 5, 12, device=device)[:, :keys]  # as in a cache with room behind
    assert_close(kernels.index_scores(query, weights, key), dsa.index_scores(query, weights, key))


@pytest.mark.parametrize("padded", [False, True])
def test_selection_equals_the_definition(device, padded, use_kernels):
    indexer = LightningIndexer(tiny.make_config("v32", index_topk=4))
    states = IndexStates(torch.randn(2, 20, 3, 12), torch.randn(2, 20, 3), torch.randn(2, 20, 12))
    tokens = torch.arange(20) >= torch.tensor([[0], [13]]) if padded else None
    visible = VisibleTokens(20, tokens, None)
    mask = visible.mask(slice(0, 20), slice(0, 20), 20, "cpu").expand(2, -1, -1)
    on_device = IndexStates(*(x.to(device) for x in states))
    use_kernels()
    chosen = indexer.select(
        on_device,
        on_device.key,
        VisibleTokens(20, None if tokens is None else tokens.to(device), None),
        slice(0, 20),
    )
    for row in range(2):
        expected = dsa.dsa_reference(states.query[row], states.weights[row], states.key[row], mask[row], 4)
        for t, slots in enumerate(expected):
            assert {slot for slot in chosen[row, t].tolist() if slot >= 0} == slots, f"row {row}, token {t}"


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("heads", [2, 20])
@pytest.mark.parametrize("precision", ["single", "half"])
def test_chosen_latents(device, half, queries, heads, precision):
    dtype, tolerance = half if precision == "half" else (torch.float32, 1e-4)

    def random(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    q_nope, q_rope = random(2, heads, queries, 6), random(2, heads, queries, 8)
    latent, k_rope = random(2, 45, 24)[:, :40], random(2, 40, 8)
    up_projections = 0.3 * random(heads, 6, 24), 0.3 * random(heads, 5, 24)
    chosen = torch.stack([torch.randperm(40)[:21] for _ in range(2 * queries)]).view(2, queries, 21).to(device)
    chosen[1, 0, [0, 4, 20]] = -1  # none, wherever it stands
    output = kernels.attend_chosen_latents(q_nope, q_rope, latent, k_rope, up_projections, chosen)
    exact = (x.float() for x in (q_nope, q_rope, dsa.gather_tokens(latent, chosen), dsa.gather_tokens(k_rope, chosen)))
    expected, _ = dsa.attend_latents(*exact, tuple(x.float() for x in up_projections), chosen >= 0)
    assert output.dtype == dtype
    assert_close(output, expected, atol=tolerance, rtol=tolerance)


def test_nothing_chosen(device):
    """A query before its row's first token: zero, not NaN."""
    chosen = torch.full((1, 1, 4), -1, device=device)
    q_nope, q_rope = torch.randn(1, 2, 1, 6, device=device), torch.randn(1, 2, 1, 8, device=device)
    latent, k_rope = torch.randn(1, 9, 24, device=device), torch.randn(1, 9, 8, device=device)
    ups = torch.randn(2, 6, 24, device=device), torch.randn(2, 5, 24, device=device)
    assert not kernels.attend_chosen_latents(q_nope, q_rope, latent, k_rope, ups, chosen).any()


@torch.no_grad()
def test_model(device, use_kernels):
    """Prefill with left padding, then decoding: a model that calls the kernels against itself without them."""
    model = tiny.make_model("v32", index_topk=8, num_hidden_layers=1).to(device)
    tokens = tiny.make_tokens(2, 30).to(device)
    mask = torch.ones_like(tokens)
    mask[1, :11] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    logits = model(tokens, attention_mask=mask, use_cache=False).logits
    generated = model.generate(tokens, **arguments)
    use_kernels()
    assert_close(model(tokens, attention_mask=mask, use_cache=False).logits[mask.bool()], logits[mask.bool()])
    assert torch.equal(model.generate(tokens, **arguments), generated)
