"""Native sparse attention: its functions against the slow definition, its invariants, its limits, its module."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close
from deepseek_repo import nsa_deepseek as nsa
from deepseek_repo.nsa_deepseek import BlockCompressor, NSASizes
from deepseek_repo.spans_deepseek import Span, find_documents

SIZES = {
    "overlapping": NSASizes(block=8, stride=4, select_block=16, num_select=4, num_init=1, num_local=2, window=12),
    "no overlap": NSASizes(block=8, stride=8, select_block=8, num_select=5, num_init=1, num_local=2, window=8),
    "fourfold overlap": NSASizes(block=8, stride=2, select_block=8, num_select=3, num_init=0, num_local=1, window=2),
    "two init": NSASizes(block=4, stride=2, select_block=12, num_select=4, num_init=2, num_local=1, window=31),
}
SCALING = 0.5


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Chunks so small that tests with few tokens go through several, and end within one."""
    monkeypatch.setattr(nsa, "_MAX_TILE", 7)
    monkeypatch.setattr(nsa, "_ROWS_A_BLOCK", 7)


def make_streams(length: int, sizes: NSASizes, streams: int = 2, heads: int = 3, width: int = 8, value_width: int = 6):
    """Queries and the three branches' keys and values; scores spread widely, so that selection selects."""
    query = 2 * torch.randn(streams, length, heads, width)
    entries = sizes.num_compressed(length)
    pairs = [(torch.randn(streams, n, width), torch.randn(streams, n, value_width)) for n in (entries, length, length)]
    return query, *pairs


def run_branches(query, compressed, selected, windowed, sizes, first=0):
    """The fast functions on the queries from position `first` on -> three outputs and the blocks."""
    query = query[:, first:]
    from_compressed, blocks = nsa.compressed_attention(query, *compressed, SCALING, first, sizes)
    from_selected = nsa.selected_attention(query, *selected, blocks, SCALING, first, sizes.select_block)
    return from_compressed, from_selected, nsa.window_attention(query, *windowed, SCALING, sizes.window), blocks


def as_sets(blocks: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Block indices [..., n] -> bool [..., num_blocks]; fails on repetitions."""
    chosen = F.one_hot(blocks + 1, num_blocks + 1).sum(dim=-2)[..., 1:]
    assert chosen.max() <= 1, "a block is selected twice"
    return chosen.bool()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("length", [1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 90])
def test_branches_equal_the_definition(sizes, length):
    query, *pairs = make_streams(length, sizes)
    *outputs, blocks = run_branches(query, *pairs, sizes)
    for stream in range(len(query)):
        *expected, chosen = nsa.nsa_reference(
            query[stream], *((k[stream], v[stream]) for k, v in pairs), SCALING, sizes
        )
        assert torch.equal(as_sets(blocks[stream], sizes.num_blocks(length)), chosen)
        for name, output, reference in zip(("compressed", "selected", "window"), outputs, expected, strict=True):
            assert_close(output[stream], reference, name)


def test_selection_selects():
    """The tests above would pass without selection if there were no more blocks than are read."""
    sizes = SIZES["overlapping"]
    query, *pairs = make_streams(90, sizes)
    *_, blocks = run_branches(query, *pairs, sizes)
    chosen = as_sets(blocks, sizes.num_blocks(90))
    assert chosen[:, -1].sum(dim=-1).eq(4).all()
    free = chosen[:, 80:, 1:4]  # neither first nor local for these queries: some are chosen, some are not
    assert free.any()
    assert not free.all()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("first", [1, 5, 23, 39])
def test_later_queries_alone_equal_all(sizes, first):
    query, *pairs = make_streams(40, sizes)
    everything = run_branches(query, *pairs, sizes)
    later = run_branches(query, *pairs, sizes, first)
    for name, part, whole in zip(("compressed", "selected", "window"), later, everything, strict=False):
        assert_close(part, whole[:, first:], name)
    assert torch.equal(later[3].sort().values, everything[3][:, first:].sort().values)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_gradients_equal_the_definition(sizes):
    query, *pairs = make_streams(50, sizes, streams=1)
    leaves = [query, *(states for pair in pairs for states in pair)]
    for leaf in leaves:
        leaf.requires_grad_()
    weights = [torch.randn(50, 3, 6) for _ in range(3)]

    def gradients(outputs):
        loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        return torch.autograd.grad(loss, leaves)

    *outputs, _ = run_branches(query, *pairs, sizes)
    *expected, _ = nsa.nsa_reference(query[0], *((k[0], v[0]) for k, v in pairs), SCALING, sizes)
    names = [
        "query",
        *(f"{branch} {kind}" for branch in ("compressed", "selected", "window") for kind in ("key", "value")),
    ]
    for name, actual, reference in zip(names, gradients([o[0] for o in outputs]), gradients(expected), strict=True):
        assert reference.abs().max() > 0.1, name
        assert_close(actual, reference, f"gradient of {name}")


def test_block_scores_are_overlaps():
    """Eq. 9 in its spatial meaning: probability times tokens shared by entry and block, over the stride."""
    for sizes in SIZES.values():
        length = 5 * sizes.select_block
        entries, num_blocks = sizes.num_compressed(length), sizes.num_blocks(length)
        mass = torch.rand(1, 1, entries)
        starts = torch.arange(entries) * sizes.stride
        blocks = torch.arange(num_blocks)[:, None] * sizes.select_block
        overlap = (
            torch.minimum(starts + sizes.block, blocks + sizes.select_block) - torch.maximum(starts, blocks)
        ).clamp(0)
        expected = (overlap / sizes.stride * mass[0, 0]).sum(dim=-1)  # [blocks]
        free = sizes._replace(num_init=0, num_local=1, num_select=3)
        chosen = nsa.choose_blocks(mass, torch.tensor([[length - 1]]), num_blocks, free)
        best = {num_blocks - 1, *expected[:-1].topk(2).indices.tolist()}
        assert set(chosen.flatten().tolist()) == best


def test_paper_weights_of_entries_on_blocks():
    """With 32, 16, 64 the entries 4j-1 .. 4j+3 count 1, 2, 2, 2, 1 times on block j."""
    sizes = NSASizes(num_select=3, num_init=0, num_local=1)
    length = 6 * 64
    for entry, counted in ((7, {1, 2}), (8, {2}), (10, {2}), (11, {2, 3})):
        mass = torch.zeros(1, 1, sizes.num_compressed(length))
        mass[..., entry] = 1
        chosen = nsa.choose_blocks(mass, torch.tensor([[length - 1]]), 6, sizes._replace(num_select=len(counted) + 1))
        assert set(chosen.flatten().tolist()) == counted | {5}, entry


def test_dense_limits():
    """Where a branch reads everything it is causal attention: all blocks selected, the window as long as the text,
    blocks of one token."""
    length = 40
    query, *_ = make_streams(length, SIZES["overlapping"])
    key, value = torch.randn(2, length, 8), torch.randn(2, length, 6)
    expected = F.scaled_dot_product_attention(
        query.transpose(1, 2), key[:, None].expand(-1, 3, -1, -1), value[:, None].expand(-1, 3, -1, -1),
        is_causal=True, scale=SCALING,
    ).transpose(1, 2)  # fmt: skip
    everything = NSASizes(1, 1, 4, num_select=10, num_init=1, num_local=1, window=length)
    compressed, selected, windowed, _ = run_branches(query, (key, value), (key, value), (key, value), everything)
    assert_close(compressed, expected, "compressed")
    assert_close(selected, expected, "selected")
    assert_close(windowed, expected, "window")


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("position", [1, 8, 17, 30, 32, 47])
def test_nothing_flows_back_in_time(sizes, position):
    """Another token at `position` changes no earlier output and no earlier choice."""
    length = 48
    query, *pairs = make_streams(length, sizes)
    before = run_branches(query, *pairs, sizes)
    token = torch.arange(length) == position
    starts = torch.arange(sizes.num_compressed(length)) * sizes.stride
    entries = (starts <= position) & (position < starts + sizes.block)
    changed = [
        tuple(states + 5 * places[:, None] for states in pair)
        for pair, places in zip(pairs, (entries, token, token), strict=True)
    ]
    *after, blocks = run_branches(query + 5 * token[:, None, None], *changed, sizes)
    for name, old, new in zip(("compressed", "selected", "window"), before, after, strict=False):
        assert_close(new[:, :position], old[:, :position], name, atol=1e-6, rtol=1e-6)  # rounding may differ
        assert not torch.equal(new[:, position:], old[:, position:]) or position < sizes.block
    assert torch.equal(*(x[:, :position].sort().values for x in (blocks, before[3])))


def test_memory_is_far_below_quadratic(monkeypatch):
    """No single tensor comes near one of queries x keys."""
    monkeypatch.undo()  # the real chunks
    sizes = NSASizes()
    query, *pairs = make_streams(2048, sizes, streams=1, heads=2, width=8, value_width=8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run_branches(query, *pairs, sizes)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 2048 * 2048 * 4 / 8, f"{largest} bytes at once"


class TestBlockCompressor:
    def test_equals_loop(self):
        sizes = SIZES["overlapping"]
        phi = BlockCompressor(6, sizes)
        torch.nn.init.normal_(phi.position)
        states = torch.randn(2, 3, 37, 6)
        entries = phi(states)
        assert entries.shape == (2, 3, sizes.num_compressed(37), 6)
        for i in range(entries.shape[2]):
            block = states[:, :, i * 4 : i * 4 + 8]
            inputs = (block + phi.position).reshape(2, 3, 48)
            expected = block.mean(dim=2) + phi.down_proj(F.silu(phi.up_proj(inputs)))
            assert_close(entries[:, :, i], expected, f"entry {i}")

    def test_order_in_a_block_matters(self):
        phi = BlockCompressor(6, SIZES["no overlap"])
        torch.nn.init.normal_(phi.position)
        states = torch.randn(1, 8, 6)
        assert not torch.allclose(phi(states), phi(states.flip(1)))


class TestFindDocuments:
    POSITIONS = torch.arange(6)[None]

    def test_whole_rows(self):
        assert find_documents(None, self.POSITIONS, 0, has_cache=False) is None
        assert find_documents(torch.ones(2, 6), self.POSITIONS, 0, has_cache=False) is None

    def test_padding(self):
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]])
        assert find_documents(mask, self.POSITIONS, 0, has_cache=False) == [Span(0, 2, 6), Span(1, 0, 5)]

    def test_packed(self):
        positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
        expected = [Span(0, 0, 3), Span(0, 3, 5), Span(0, 5, 6), Span(1, 0, 6)]
        assert find_documents(None, positions, 0, has_cache=False) == expected

    def test_padding_between_tokens(self):
        with pytest.raises(ValueError, match="between the tokens of row 1"):
            find_documents(torch.tensor([[1] * 6, [1, 1, 0, 1, 1, 1]]), self.POSITIONS, 0, has_cache=False)

    def test_mask_of_queries_and_keys(self):
        with pytest.raises(ValueError, match=r"shape \(1, 1, 6, 6\)"):
            find_documents(torch.ones(1, 1, 6, 6), self.POSITIONS, 0, has_cache=False)
