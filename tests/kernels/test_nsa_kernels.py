"""NSA's Triton kernels: against the PyTorch functions, the slow definition, and in a model."""

import copy

import pytest
import tiny
import torch
from checks import assert_close, assert_gradients_close, gradients
from deepseek_repo import nsa_deepseek as nsa, nsa_kernels_deepseek as kernels
from deepseek_repo.nsa_deepseek import NSASizes, NSAStates
from slow_reference import attend_causally

SIZES = {
    "overlapping": NSASizes(block=8, stride=4, select_block=16, num_select=2, num_init=1, num_local=1, window=12),
    "no overlap": NSASizes(block=8, stride=8, select_block=8, num_select=3, num_init=1, num_local=1, window=8),
    "fourfold overlap": NSASizes(block=8, stride=2, select_block=8, num_select=2, num_init=0, num_local=1, window=2),
    "two init": NSASizes(block=4, stride=2, select_block=6, num_select=4, num_init=2, num_local=1, window=31),
    "blocks of two tiles": NSASizes(
        block=4, stride=4, select_block=20, num_select=2, num_init=0, num_local=1, window=5
    ),
}
BRANCHES = ("compressed", "selected", "window")
SCALING = 0.5


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Tiles so small that a test with few tokens goes through several, and ends within one."""
    monkeypatch.setattr(kernels, "_TILE", 16)
    monkeypatch.setattr(kernels, "_SEGMENT", 7)
    monkeypatch.setattr(kernels, "_SCORE_BYTES", 2 * 4 * 5 * 13)


def make_streams(length: int, sizes: NSASizes, device: str, streams: int = 2, heads: int = 3, dtype=torch.float32):
    """Queries and the three branches' keys and values; scores spread widely, so that selection selects."""
    query = 2 * torch.randn(streams, length, heads, 8)
    entries = sizes.num_compressed(length)
    pairs = [(torch.randn(streams, n, 8), torch.randn(streams, n, 6)) for n in (entries, length, length)]
    query, *pairs = (query, *pairs)
    return query.to(device, dtype), *(tuple(x.to(device, dtype) for x in pair) for pair in pairs)


def run_branches(functions, query, compressed, selected, windowed, sizes, first=0, blocks=None):
    """A module's functions on queries from position `first` on -> three outputs and the blocks; `blocks`: read these"""
    from_compressed, chosen = functions.compressed_attention(query, *compressed, SCALING, first, sizes)
    blocks = chosen if blocks is None else blocks
    from_selected = functions.selected_attention(query, *selected, blocks, SCALING, first, sizes.select_block)
    from_window = functions.window_attention(query, *windowed, SCALING, sizes.window)
    return from_compressed, from_selected, from_window, chosen


def compare_with_pytorch(query, pairs, sizes, first=0):
    """Outputs, blocks and gradients of the kernels against the PyTorch functions, on the same device."""
    leaves = [query, *(states for pair in pairs for states in pair)]
    for leaf in leaves:
        leaf.requires_grad_()
    weights = torch.randn(3, *query.shape[:3], 6, device=query.device)
    results = []
    for functions in (kernels, nsa):
        *outputs, blocks = run_branches(functions, query, *pairs, sizes, first)
        loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        results.append((outputs, blocks.sort().values, torch.autograd.grad(loss, leaves)))
    (outputs, blocks, grads), (expected, expected_blocks, expected_grads) = results
    assert torch.equal(blocks, expected_blocks)
    for name, output, reference in zip(BRANCHES, outputs, expected, strict=True):
        assert_close(output, reference, name)
    names = ["query", *(f"{branch} {kind}" for branch in BRANCHES for kind in ("key", "value"))]
    for name, actual, reference in zip(names, grads, expected_grads, strict=True):
        assert_close(actual, reference, f"gradient of {name}")
    return outputs, blocks


@pytest.mark.parametrize("length", [1, 7, 8, 17, 45])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_equal_the_definition_and_pytorch(device, sizes, length):
    query, *pairs = make_streams(length, sizes, device, streams=1)
    outputs, blocks = compare_with_pytorch(query, pairs, sizes)
    streams = [(key[0].cpu(), value[0].cpu()) for key, value in pairs]
    *expected, chosen = nsa.nsa_reference(query[0].cpu(), *streams, SCALING, sizes)
    for name, output, reference in zip(BRANCHES, outputs, expected, strict=True):
        assert_close(output[0].cpu(), reference, name)
    for t, row in enumerate(blocks[0].tolist()):
        assert {block for block in row if block >= 0} == set(chosen[t].nonzero().flatten().tolist())
    if length == 45:
        assert not chosen[-1].all(), "selection selects nothing"


@pytest.mark.parametrize("heads", [1, 2, 5, 8, 16])
def test_group_sizes(device, heads):
    """Groups that are no power of two, and less than the 16 rows of a tensor core; two key/value heads of two rows."""
    query, *pairs = make_streams(21, SIZES["overlapping"], device, streams=4, heads=heads)
    compare_with_pytorch(query, pairs, SIZES["overlapping"])


@pytest.mark.parametrize("first", [1, 23, 39])
def test_later_queries_alone(device, first):
    """A chunk, or at 39 one query, over what came before it."""
    query, *pairs = make_streams(40, SIZES["overlapping"], device)
    compare_with_pytorch(query[:, first:].contiguous(), pairs, SIZES["overlapping"], first)


def test_dense_limits(device):
    """Where a branch reads everything it is causal attention: all blocks selected, the window as long as the text,
    blocks of one token."""
    sizes = NSASizes(1, 1, 4, num_select=8, num_init=1, num_local=1, window=30)
    query, pair, *_ = make_streams(30, sizes, device)
    *outputs, _ = run_branches(kernels, query, pair, pair, pair, sizes)
    key, value = (states.cpu() for states in pair)
    for stream in range(2):
        for head in range(3):
            expected = attend_causally(query[stream, :, head].cpu(), key[stream], value[stream], SCALING)
            for name, output in zip(BRANCHES, outputs, strict=True):
                assert_close(output[stream, :, head].cpu(), expected, name)


def test_half_precision(device, half):
    """On the same rounded inputs and blocks as the PyTorch functions in float32."""
    sizes, (dtype, tolerance) = SIZES["overlapping"], half
    query, *pairs = make_streams(33, sizes, device, dtype=dtype)
    exact = [query.float(), *(tuple(states.float() for states in pair) for pair in pairs)]
    *expected, blocks = run_branches(nsa, *exact, sizes)
    *outputs, _ = run_branches(kernels, query, *pairs, sizes, blocks=blocks)
    for name, output, reference in zip(BRANCHES, outputs, expected, strict=True):
        assert output.dtype == dtype
        assert_close(output, reference, name, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("starts", [None, [0, 7, 30, 38]], ids=["whole", "left padding"])
def test_gathered(device, length, starts):
    """New queries over a cache with room behind it, from which nothing is copied."""
    sizes, slots, heads = SIZES["overlapping"], 40, 2

    def cached(size: int, width: int) -> torch.Tensor:
        return torch.randn(4, heads, size + 9, width, device=device)[:, :, :size]

    entries = torch.randn(2, 4, heads, 13, 8, device=device)
    states = NSAStates(
        (entries[0], entries[1, ..., :6]),
        (cached(slots, 8), cached(slots, 6)),
        (cached(length + 13, 8), cached(length + 13, 6)),
    )
    query, rotated = 2 * torch.randn(2, 4, heads * 3, length, 8, device=device)
    gates = torch.rand(4, heads * 3, length, 3, device=device)
    begin = None if starts is None else torch.tensor(starts, device=device)
    arguments = query, rotated, states, begin, gates, SCALING, sizes
    output, expected = kernels.attend_gathered(*arguments), nsa.attend_gathered(*arguments)
    for row, start in enumerate(starts or [0] * 4):
        real = slice(max(0, start - (slots - length)), None)  # queries that are tokens
        assert_close(output[row, :, real], expected[row, :, real], f"row {row}")
    assert output.isfinite().all()


class TestModel:
    """A model whose layers call the kernels against one whose layers call the PyTorch functions."""

    @pytest.fixture
    def models(self, device):
        model = tiny.make_model("nsa", num_hidden_layers=1)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.data *= 3
        return model.to(device), copy.deepcopy(model).to(device)

    @pytest.mark.parametrize("batch", ["whole", "packed", "left padding"])
    def test_logits_and_gradients(self, device, models, use_kernels, batch):
        tokens = tiny.make_tokens(2, 36).to(device)
        slots = torch.arange(36, device=device).expand(2, -1)
        arguments = {
            "whole": {},
            "packed": {"position_ids": torch.where(slots < 17, slots, slots - 17)},
            "left padding": {"attention_mask": (slots >= torch.tensor([[0], [13]], device=device)).long()},
        }[batch]
        real = arguments.get("attention_mask", torch.ones_like(slots))[..., None]  # [2, 36, 1]
        weight = real * torch.randn(2, 36, 1, device=device)
        results = []
        for model in models:  # first the PyTorch functions
            logits = model(tokens, use_cache=False, **arguments).logits * real
            (logits * weight).sum().backward()
            results.append((logits, gradients(model)))
            use_kernels()
        (expected, expected_gradients), (logits, model_gradients) = results
        assert_close(logits, expected, "logits")
        assert_gradients_close(model_gradients, expected_gradients)

    @torch.no_grad()
    def test_generate(self, device, models, use_kernels):
        tokens = tiny.make_tokens(2, 30).to(device)
        mask = torch.ones_like(tokens)
        mask[1, :11] = 0
        arguments = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
        expected = models[0].generate(tokens, **arguments)
        use_kernels()
        assert torch.equal(models[1].generate(tokens, **arguments), expected)
