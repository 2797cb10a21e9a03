"""Native Sparse Attention (NSA, arXiv:2502.11089) on grouped heads: three branches that each read a part of the past.

From top to bottom: the sizes, the definition as slow loops (`nsa_reference`), the three branches as fast functions,
the two ways to run them (`attend_sequence` for many queries, `attend_gathered` for a few new ones over a cache), and the
layer, `DeepseekNSA`. No function forms a tensor of queries x keys: queries go in chunks.

Shape letters: B batch, S queries, T keys, H query heads, K key/value heads, G = H / K query heads that share a
key/value head, D width of a head. The functions work on N = B * K independent streams, each of G query heads over one
key/value head. Of the paper's letters, l is `block`, d `stride`, l' `select_block`, n `num_select`, w `window`.

A position counts a document's own tokens from 0: left padding has none, and each packed document starts again.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .attention_deepseek import AttentionInput, DeepseekAttention, View
from .cache_deepseek import NSACacheLayer
from .compat_deepseek import is_exporting
from .kernels_deepseek import kernels_run_on
from .layers_deepseek import apply_rotary
from .linear_deepseek import project
from .nsa_kernels_deepseek import (
    attend_gathered as triton_attend_gathered,
    compressed_attention as triton_compressed_attention,
    selected_attention as triton_selected_attention,
    window_attention as triton_window_attention,
)
from .selection_deepseek import best_blocks, join_streams, split_streams
from .spans_deepseek import Span, find_documents, join_documents, split_documents

_SCORE_BYTES = 8 * 2**20  # scores of a tile of queries, of a few times a CPU's second-level cache
_MAX_TILE = 512  # queries of a tile
_ROWS_A_BLOCK = 128  # queries that read a selected block in one turn, on average ...
_MAX_ROWS = 256  # ... and at most
_TILES_A_WINDOW = 4  # tiles of queries in a window, at least
_CHUNK_BYTES = 16 * 2**20  # output between which the branches are summed, where no gradient needs all of them
_MAX_GATHERED = 8  # up to this many queries over a cache, each gathers its own keys


# ---------------------------------------------------------------------------------------------------------------
# Definition
# ---------------------------------------------------------------------------------------------------------------


class NSASizes(NamedTuple):
    """The sizes of NSA, in tokens or in blocks; the paper's values as defaults."""

    block: int = 32  # l, tokens that one compressed entry stands for
    stride: int = 16  # d, tokens from one entry to the next
    select_block: int = 64  # l', tokens of a block that is selected as a whole
    num_select: int = 16  # n, selected blocks a query, the fixed ones counted
    num_init: int = 1  # first blocks, always selected
    num_local: int = 2  # last blocks, the query's own counted, always selected
    window: int = 512  # w, last tokens, the query's own counted

    @classmethod
    def from_config(cls, config) -> "NSASizes":
        """The sizes in the `nsa_` fields of a config."""
        return cls(
            config.nsa_compress_block_size,
            config.nsa_compress_stride,
            config.nsa_select_block_size,
            config.nsa_num_select_blocks,
            config.nsa_num_init_blocks,
            config.nsa_num_local_blocks,
            config.nsa_window_size,
        )

    def num_compressed(self, length: int) -> int:
        """Compressed entries of `length` tokens: only whole blocks have one."""
        return max(0, (length - self.block) // self.stride + 1)

    def num_blocks(self, length: int) -> int:
        """Selection blocks that `length` tokens touch, the unfinished last one counted."""
        return -(-length // self.select_block)


def nsa_reference(
    query: torch.Tensor,
    compressed: tuple[torch.Tensor, torch.Tensor],
    selected: tuple[torch.Tensor, torch.Tensor],
    windowed: tuple[torch.Tensor, torch.Tensor],
    scaling: float,
    sizes: NSASizes,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three branches for one stream, query by query as the paper's eq. 7-12 say; slow, the oracle of the tests.

    Three readings of the paper are fixed here. Importance is compared in bfloat16, and of equally important blocks the
    later one is selected (see `best_blocks`). Eq. 9 counts blocks and compressed entries from 1; read with a count
    from 0 it would be shifted by a whole block. Eq. 8 lacks the scale of the softmax; with it, p_cmp are the
    probabilities of the compressed branch.

    Args:
        query: [T, G, D].
        compressed: keys and values of the compressed entries, [num_compressed(T), D] each.
        selected, windowed: keys and values of the other branches, [T, D] each.
        scaling: factor on the scores.
        sizes: block and window sizes.

    Returns:
        outputs of the compressed, selected and window branch, [T, G, D] each, and the selected blocks, bool
        [T, num_blocks(T)].
    """

    def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        probs = (q @ keys.T * scaling).softmax(dim=-1)  # [G, keys]
        return probs @ values, probs

    length, num_blocks = query.shape[0], sizes.num_blocks(query.shape[0])
    units_a_select, units_a_block = sizes.select_block // sizes.stride, sizes.block // sizes.stride
    outputs, chosen = [[], [], []], torch.zeros(length, num_blocks, dtype=torch.bool)
    for t in range(length):
        visible = [i for i in range(len(compressed[0])) if i * sizes.stride + sizes.block - 1 <= t]
        output, p_cmp = attend(query[t], compressed[0][visible], compressed[1][visible])
        outputs[0].append(output)  # zeros where nothing is visible

        own = t // sizes.select_block
        rank: dict[int, tuple] = {}
        for j in range(1, own + 2):  # the paper's j
            entries = [units_a_select * j - m - n for m in range(units_a_select) for n in range(units_a_block)]
            importance = sum((p_cmp[:, i - 1].sum() for i in entries if 1 <= i <= len(visible)), torch.zeros(()))
            fixed = j - 1 < sizes.num_init or j - 1 > own - sizes.num_local
            rank[j - 1] = (not fixed, -importance.bfloat16().item(), -j)
        blocks = sorted(rank, key=lambda block: rank[block])[: sizes.num_select]
        chosen[t, blocks] = True
        keys = [
            s for j in sorted(blocks) for s in range(j * sizes.select_block, (j + 1) * sizes.select_block) if s <= t
        ]
        outputs[1].append(attend(query[t], selected[0][keys], selected[1][keys])[0])

        recent = range(max(0, t - sizes.window + 1), t + 1)
        outputs[2].append(attend(query[t], windowed[0][recent], windowed[1][recent])[0])
    from_compressed, from_selected, from_window = (torch.stack(branch) for branch in outputs)
    return from_compressed, from_selected, from_window, chosen


def _hide_entries(scores: torch.Tensor, positions: torch.Tensor, num_seen: int, sizes: NSASizes):
    """Hides, in place, the compressed entries that end after a query's position.

    Args:
        scores: [..., C, G, n].
        positions: int64 [..., C].
        num_seen: entries that every query sees, so that they need no mask.
    """
    later = torch.arange(num_seen, scores.shape[-1], device=scores.device)
    hidden = later * sizes.stride + sizes.block - 1 > positions[..., None]  # [..., C, n - num_seen]
    scores[..., num_seen:].masked_fill_(hidden[..., None, :], float("-inf"))


# ---------------------------------------------------------------------------------------------------------------
# Attention to ranges of keys, for the compressed and the window branch
# ---------------------------------------------------------------------------------------------------------------


class _Entries(NamedTuple):
    """Queries see the compressed entries that end at or before them."""

    first_position: int  # of the first query
    sizes: NSASizes

    def blind(self) -> int:
        """How many of the first queries see nothing."""
        return max(0, self.sizes.block - 1 - self.first_position)

    def keys(self, queries: slice) -> slice:
        """What the last of the queries sees, and with it some others."""
        return slice(0, self.sizes.num_compressed(self.first_position + queries.stop))

    def hide(self, scores: torch.Tensor, queries: slice):
        """Hides from scores [C, G, n] of these queries, in place, the keys that only later ones see."""
        positions = torch.arange(queries.start, queries.stop, device=scores.device) + self.first_position
        seen_by_all = self.sizes.num_compressed(self.first_position + queries.start + 1)
        _hide_entries(scores, positions, seen_by_all, self.sizes)


class _Window(NamedTuple):
    """Queries see the last `window` tokens, themselves counted."""

    past: int  # keys before the first query
    window: int

    def blind(self) -> int:
        return 0

    def keys(self, queries: slice) -> slice:
        return slice(max(0, self.past + queries.start - self.window + 1), self.past + queries.stop)

    def hide(self, scores: torch.Tensor, queries: slice):
        count, first = len(scores), self.keys(queries).start
        offset = torch.arange(count, device=scores.device)
        scores[..., -count:].masked_fill_((offset > offset[:, None])[:, None], float("-inf"))
        # what is too old for the last query is among the first keys
        oldest = self.past + queries.start + offset - self.window + 1  # [C]
        scores[..., :count].masked_fill_(
            (first + offset < oldest[:, None])[:, None, : scores.shape[-1]], float("-inf")
        )


def without_autocast(backward):
    """Decorates a backward pass that chooses its dtypes itself, should it be called inside `torch.autocast`."""

    @functools.wraps(backward)
    def wrapper(ctx, *gradients):
        with torch.autocast(gradients[0].device.type, enabled=False):
            return backward(ctx, *gradients)

    return wrapper


class _TiledAttention(torch.autograd.Function):
    """Attention in which a tile of queries sees one range of keys; the backward computes the probabilities again.

    Args of `forward`:
        query: [N, S, G, D]; key, value: [N, T, D].
        scaling: factor on the scores.
        view: `_Entries` or `_Window`.
        max_tile: queries of a tile, at most.
        visit: called with stream, slice of queries and probabilities float32 [C, G, n] of each tile, or None.

    Returns [N, S, G, D], zero for queries that see nothing.
    """

    @staticmethod
    def forward(ctx, query, key, value, scaling, view, max_tile, visit):
        ctx.save_for_backward(query, key, value)
        ctx.arguments = scaling, view, max_tile
        output = query.new_empty(*query.shape[:3], value.shape[-1])
        output[:, : view.blind()] = 0
        value = value.float()
        for stream, queries, keys, probs in _TiledAttention.tiles(query, key, *ctx.arguments):
            output[stream, queries] = (probs.flatten(0, 1) @ value[stream, keys]).unflatten(0, probs.shape[:2])
            if visit:
                visit(stream, queries, probs)
        return output

    @staticmethod
    @without_autocast
    def backward(ctx, grad_output):  # pyrefly: ignore[bad-override]  # as PyTorch documents it
        query, key, value = ctx.saved_tensors
        scaling = ctx.arguments[0]
        grad_query = torch.zeros_like(query)
        grad_key, grad_value = (torch.zeros_like(states, dtype=torch.float32) for states in (key, value))
        float_key, float_value = key.float(), value.float()
        for stream, queries, keys, probs in _TiledAttention.tiles(query, key, *ctx.arguments):
            probs = probs.flatten(0, 1)  # [C * G, n]
            grad = grad_output[stream, queries].flatten(0, 1).float()  # [C * G, D]
            grad_value[stream, keys].addmm_(probs.T, grad)
            grad_probs = grad @ float_value[stream, keys].T  # [C * G, n]
            mean_grad = torch.linalg.vecdot(probs, grad_probs)[:, None]  # [C * G, 1]
            grad_scores = grad_probs.sub_(mean_grad).mul_(probs).mul_(scaling)
            grad_rows = grad_scores @ float_key[stream, keys]  # [C * G, D]
            grad_query[stream, queries] = grad_rows.unflatten(0, (-1, query.shape[2])).to(query.dtype)
            grad_key[stream, keys].addmm_(grad_scores.T, query[stream, queries].flatten(0, 1).float())
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None, None

    @staticmethod
    def tiles(query, key, scaling, view, max_tile):
        """Yields tiles of queries: stream, slices of the queries and of the keys, and probabilities float32 [C, G, n],
        which the next tile overwrites."""
        streams, length, heads, _ = query.shape
        last = view.keys(slice(max(0, length - max_tile), length))  # no tile sees more keys than the last
        most_keys = max(1, last.stop - last.start)
        tile = min(max_tile, max(1, _SCORE_BYTES // (4 * heads * most_keys)))
        # Memory used again stays in the processor's cache; fresh memory of this size would be mapped anew each time.
        memory = query.new_empty(2, tile * heads * most_keys, dtype=torch.float32)
        scaled_key = key.float() * scaling
        for stream in range(streams):
            for start in range(view.blind(), length, tile):
                queries = slice(start, min(start + tile, length))
                keys = view.keys(queries)
                rows = query[stream, queries].flatten(0, 1).float()  # [C * G, D]
                shape = len(rows), keys.stop - keys.start
                scores, probs = (numbers[: shape[0] * shape[1]].view(shape) for numbers in memory)
                torch.mm(rows, scaled_key[stream, keys].T, out=scores)
                view.hide(scores.unflatten(0, (-1, heads)), queries)
                yield stream, queries, keys, torch.softmax(scores, dim=-1, out=probs).unflatten(0, (-1, heads))


def window_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int
) -> torch.Tensor:
    """Attention of each query to the last `window` tokens, itself counted.

    Args:
        query: [N, S, G, D].
        key, value: [N, T, D] with T >= S; the last key belongs to the last query. At least the window - 1 keys before
            the first query must be there, if so many exist.

    Returns:
        [N, S, G, D].
    """
    view = _Window(key.shape[1] - query.shape[1], window)
    # the keys of a tile are the window and the tile itself, so a tile is to be small against the window
    return _TiledAttention.apply(query, key, value, scaling, view, max(16, window // _TILES_A_WINDOW), None)


# ---------------------------------------------------------------------------------------------------------------
# Compressed branch, and the choice of blocks from its probabilities
# ---------------------------------------------------------------------------------------------------------------


class BlockCompressor(nn.Module):
    """phi of eq. 7: one entry for each `stride` tokens, from a whole block of them.

        phi(x_1 .. x_l) = mean(x) + W_2 silu(W_1 [x_1 + e_1; ...; x_l + e_l])

    The paper says "MLP with intra-block position encoding" and no more. Here one MLP serves all heads, and it is added
    to the mean, so that a converted model can begin at mean pooling (W_2 = 0); a fresh one learns better from a random W_2.
    """

    def __init__(self, head_dim: int, sizes: NSASizes):
        super().__init__()
        self.block, self.stride = sizes.block, sizes.stride
        self.position = nn.Parameter(torch.zeros(sizes.block, head_dim))  # e
        self.up_proj = nn.Linear(sizes.block * head_dim, 2 * head_dim, bias=False)
        self.down_proj = nn.Linear(2 * head_dim, head_dim, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., T, D], T of at least one block -> [..., num_compressed(T), D]"""
        blocks = states.unfold(-2, self.block, self.stride).transpose(-1, -2)  # [..., n, l, D], a view
        inputs = (blocks + self.position).flatten(-2)  # [..., n, l * D]
        return blocks.mean(dim=-2) + self.down_proj(F.silu(self.up_proj(inputs)))


def choose_blocks(mass: torch.Tensor, positions: torch.Tensor, num_blocks: int, sizes: NSASizes) -> torch.Tensor:
    """The selection blocks that each query reads, eq. 9-11.

    An entry's probability lies on the block / stride units of `stride` tokens that it covers; a selection block gets
    what lies on its units. With sizes 32, 16, 64 these are the entries 4j-1 .. 4j+3 with weights 1, 2, 2, 2, 1.

    Args:
        mass: float32 [..., C, n], compressed probabilities summed over the heads of a group.
        positions: int64 [..., C].
        num_blocks: blocks up to the one of the last position.

    Returns:
        int64 [..., C, num_select] in no order; -1 fills up where fewer blocks exist.
    """
    units_a_block, units_a_select = sizes.block // sizes.stride, sizes.select_block // sizes.stride
    num_units = num_blocks * units_a_select
    padded = F.pad(mass, (units_a_block - 1, num_units - mass.shape[-1]))
    on_units: Any = sum(padded[..., i : i + num_units] for i in range(units_a_block))  # [..., C, units]
    importance = on_units.unflatten(-1, (num_blocks, units_a_select)).sum(dim=-1)  # [..., C, blocks]

    own = (positions // sizes.select_block)[..., None]  # [..., C, 1]
    block = torch.arange(num_blocks, device=mass.device)
    importance[..., : sizes.num_init] = float("inf")
    importance.masked_fill_(block > own - sizes.num_local, float("inf"))
    importance.masked_fill_(block > own, float("-inf"))
    return best_blocks(importance, sizes.num_select)


def compressed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, first_position: int, sizes: NSASizes
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to compressed entries, and the blocks that its probabilities select. Gradients flow through the output.

    Args:
        query: [N, S, G, D], at positions first_position, first_position + 1, ...
        key, value: [N, n, D], the entries of first_position + S tokens.

    Returns:
        [N, S, G, D], zero where no entry is visible, and int64 [N, S, num_select], -1 where there are fewer blocks.
    """
    blocks = torch.full((*query.shape[:2], sizes.num_select), -1, device=query.device)
    # Before the end of the first compressed block a query reads the block it is in, which is block 0.
    blocks[..., 0] = 0

    def choose(stream: int, queries: slice, probs: torch.Tensor):
        positions = torch.arange(queries.start, queries.stop, device=query.device) + first_position  # [C]
        num_blocks = sizes.num_blocks(first_position + queries.stop)
        blocks[stream, queries] = choose_blocks(probs.sum(dim=1), positions, num_blocks, sizes)

    view = _Entries(first_position, sizes)
    output = _TiledAttention.apply(query, key, value, scaling, view, _MAX_TILE, choose)
    return output, blocks


# ---------------------------------------------------------------------------------------------------------------
# Selected branch
# ---------------------------------------------------------------------------------------------------------------


class _SelectedAttention(torch.autograd.Function):
    """`selected_attention`, block by block: all queries that chose a block are rows of one matrix product.

    A block is then read once for many queries, where going query by query would copy num_select * select_block keys
    and values for each. The results for a query meet by online softmax; the backward uses its log-sum-exp.
    """

    @staticmethod
    def forward(ctx, query, key, value, blocks, scaling, first_position, select_block):
        ctx.arguments = scaling, first_position, select_block
        output = query.new_zeros(*query.shape[:3], value.shape[-1], dtype=torch.float32)
        maximum = query.new_full((*query.shape[:3], 1), float("-inf"), dtype=torch.float32)
        total = torch.zeros_like(maximum)
        value = value.float()
        memory = output.new_empty(_MAX_ROWS, *output.shape[2:])
        for stream, tokens, rows, _, scores in _SelectedAttention.block_scores(query, key, blocks, *ctx.arguments):
            old_maximum = maximum[stream].index_select(0, rows)  # [R, G, 1]
            new_maximum = torch.maximum(old_maximum, scores.amax(dim=-1, keepdim=True))
            probs = scores.sub_(new_maximum).exp_()  # [R, G, tokens], without the division
            decay = (old_maximum - new_maximum).exp_()
            new_total = total[stream].index_select(0, rows).mul_(decay).add_(probs.sum(dim=-1, keepdim=True))
            new_output = torch.index_select(output[stream], 0, rows, out=memory[: len(rows)]).mul_(decay)  # [R, G, D]
            new_output.flatten(0, 1).addmm_(probs.flatten(0, 1), value[stream, tokens])
            maximum[stream].index_copy_(0, rows, new_maximum)
            total[stream].index_copy_(0, rows, new_total)
            output[stream].index_copy_(0, rows, new_output)
        output = output.div_(total).to(query.dtype)
        ctx.save_for_backward(query, key, value, blocks, output, maximum.add_(total.log_()))
        return output

    @staticmethod
    @without_autocast
    def backward(ctx, grad_output):  # pyrefly: ignore[bad-override]  # as PyTorch documents it
        query, key, value, blocks, output, log_sum_exp = ctx.saved_tensors
        grad_query, grad_key, grad_value = (torch.zeros_like(x, dtype=torch.float32) for x in (query, key, value))
        mean_grad = (grad_output.float() * output.float()).sum(dim=-1, keepdim=True)  # [N, S, G, 1]
        scaling = ctx.arguments[0]
        float_key, float_value = key.float(), value.float()
        memory = grad_output.new_empty(_MAX_ROWS, *grad_output.shape[2:])
        for stream, tokens, rows, queries, scores in _SelectedAttention.block_scores(
            query, key, blocks, *ctx.arguments
        ):
            probs = scores.sub_(log_sum_exp[stream].index_select(0, rows)).exp_()  # [R, G, tokens]
            grad = torch.index_select(grad_output[stream], 0, rows, out=memory[: len(rows)]).float()  # [R, G, D]
            grad_scores = grad @ float_value[stream, tokens].T
            grad_scores.sub_(mean_grad[stream].index_select(0, rows)).mul_(probs).mul_(scaling)  # [R, G, tokens]
            grad_query[stream].index_add_(0, rows, grad_scores @ float_key[stream, tokens])
            grad_key[stream, tokens].addmm_(grad_scores.flatten(0, 1).T, queries.flatten(0, 1))
            grad_value[stream, tokens].addmm_(probs.flatten(0, 1).T, grad.flatten(0, 1))
        grads = grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)
        return *grads, None, None, None, None

    @staticmethod
    def block_scores(query, key, blocks, scaling, first_position, select_block):
        """For each block and some of the queries that chose it, yields the stream, the block's tokens (a slice), the
        queries' numbers (int64 [R], ascending), the queries and their scores, float32 [R, G, D] and [R, G, tokens],
        -inf for tokens after a query. The next turn overwrites the last two."""
        streams, length, num_select = blocks.shape
        heads, width = query.shape[2:]
        chunk = max(1, _ROWS_A_BLOCK * -(-key.shape[1] // select_block) // num_select)
        row_memory = query.new_empty(_MAX_ROWS, heads, width)
        score_memory = query.new_empty(_MAX_ROWS * heads * select_block, dtype=torch.float32)
        scaled_key = key.float() * scaling
        for stream in range(streams):
            for start in range(0, length, chunk):
                choices = blocks[stream, start : start + chunk].flatten()  # [C * num_select]
                counts = torch.bincount(choices + 1).tolist()  # of -1, 0, 1, ...
                chosen_by = (choices.argsort(stable=True) // num_select + start).split(counts)
                for block, all_rows in enumerate(chosen_by[1:]):
                    tokens = slice(block * select_block, min((block + 1) * select_block, key.shape[1]))
                    keys = scaled_key[stream, tokens].T  # [D, tokens]
                    for rows in all_rows.split(_MAX_ROWS) if len(all_rows) else ():
                        queries = torch.index_select(query[stream], 0, rows, out=row_memory[: len(rows)]).float()
                        scores = score_memory[: len(rows) * heads * keys.shape[1]].view(-1, keys.shape[1])
                        torch.mm(queries.flatten(0, 1), keys, out=scores)
                        scores = scores.unflatten(0, (-1, heads))  # [R, G, tokens]
                        if tokens.stop > first_position + int(rows[0]):
                            token = torch.arange(tokens.start, tokens.stop, device=key.device)
                            hidden = token > first_position + rows[:, None]  # [R, tokens]
                            scores.masked_fill_(hidden[:, None], float("-inf"))
                        yield stream, tokens, rows, queries, scores


def selected_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: torch.Tensor,
    scaling: float,
    first_position: int,
    select_block: int,
) -> torch.Tensor:
    """Attention of each query to the tokens, up to its own, of the blocks chosen for it.

    Args:
        query: [N, S, G, D], at positions first_position, first_position + 1, ...
        key, value: [N, first_position + S, D].
        blocks: int64 [N, S, num_select], without repetition; -1 stands for none. Each query's own block is among them.

    Returns:
        [N, S, G, D].
    """
    return _SelectedAttention.apply(query, key, value, blocks, scaling, first_position, select_block)


# ---------------------------------------------------------------------------------------------------------------
# All branches
# ---------------------------------------------------------------------------------------------------------------


# The branches, on a GPU by kernels. Same arguments, same results.
_PYTORCH: tuple[Callable[..., Any], ...] = compressed_attention, selected_attention, window_attention
_TRITON: tuple[Callable[..., Any], ...] = (
    triton_compressed_attention,
    triton_selected_attention,
    triton_window_attention,
)


class NSAStates(NamedTuple):
    """What queries attend to, keys and values."""

    compressed: tuple[torch.Tensor, torch.Tensor]  # [B, K, entries, D], keys without rotation
    selected: tuple[torch.Tensor, torch.Tensor]  # [B, K, T, D], keys rotated by their positions
    windowed: tuple[torch.Tensor, torch.Tensor]  # so too, the last ones, [B, K, at least min(T, S + window - 1), D]


def attend_sequence(
    query: torch.Tensor,
    rotated_query: torch.Tensor,
    states: NSAStates,
    gates: torch.Tensor,
    scaling: float,
    sizes: NSASizes,
) -> torch.Tensor:
    """NSA for sequences of one length, eq. 5: the sum over the branches of gate * attention.

    Args:
        query: [B, H, S, D], the last S of T tokens, for the compressed branch.
        rotated_query: the same rotated by their positions, for the other two.
        states: all with T tokens from position 0 on.
        gates: [B, H, S, 3], in the order of `NSAStates`.

    Returns:
        [B, H, S, D].
    """
    batch, _, length, _ = query.shape
    num_key_value_heads = states.selected[0].shape[1]
    compressed, selected, windowed = ([x.flatten(0, 1) for x in pair] for pair in states)  # [N, ., D]
    past, past_in_window = selected[0].shape[1] - length, windowed[0].shape[1] - length
    # On a CPU without a gradient nothing needs the branches as a whole, and small pieces use the same memory again.
    whole = torch.is_grad_enabled() or query.device.type != "cpu"
    chunk = length if whole else max(1, _CHUNK_BYTES // (query[:, :, 0].numel() * 4))
    attend_compressed, attend_selected, attend_window = _TRITON if kernels_run_on(query) else _PYTORCH
    outputs = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        plain, rotated, gate = (
            split_streams(x[:, :, start:stop], num_key_value_heads) for x in (query, rotated_query, gates)
        )  # [N, C, G, D] twice, [N, C, G, 3]
        first, entries = past + start, sizes.num_compressed(past + stop)
        from_compressed, blocks = attend_compressed(
            plain, *(x[:, :entries] for x in compressed), scaling, first, sizes
        )
        from_selected = attend_selected(
            rotated, *(x[:, : past + stop] for x in selected), blocks, scaling, first, sizes.select_block
        )
        from_window = attend_window(rotated, *(x[:, : past_in_window + stop] for x in windowed), scaling, sizes.window)
        output: Any = sum(
            branch * weight
            for branch, weight in zip(
                (from_compressed, from_selected, from_window), gate.split(1, dim=-1), strict=True
            )
        )
        outputs.append(join_streams(output, batch))  # [B, H, C, D]
    return torch.cat(outputs, dim=2)


def attend_gathered(
    query: torch.Tensor,
    rotated_query: torch.Tensor,
    states: NSAStates,
    starts: torch.Tensor | None,
    gates: torch.Tensor,
    scaling: float,
    sizes: NSASizes,
) -> torch.Tensor:
    """As `attend_sequence`, for few queries and rows that begin at different slots: each query gathers its own keys.

    Args:
        query, rotated_query: [B, H, S, D], the last S of the T slots.
        states: `selected` of T slots; `compressed` as each row's own blocks count, with room behind them.
        starts: int64 [B], the slot of each row's first token; None if all begin at slot 0. Queries before the first
            token get some finite output.
        gates: [B, H, S, 3].

    Returns:
        [B, H, S, D].
    """
    if kernels_run_on(query):
        return triton_attend_gathered(query, rotated_query, states, starts, gates, scaling, sizes)
    batch, _, length, _ = query.shape
    num_key_value_heads, num_slots = states.selected[0].shape[1:3]
    plain, rotated = (
        split_streams(x, num_key_value_heads).float() * scaling for x in (query, rotated_query)
    )  # [N, S, G, D] each
    compressed, selected, windowed = ([x.flatten(0, 1) for x in pair] for pair in states)  # [N, ., D]
    streams = torch.arange(len(rotated), device=query.device)
    slots = torch.arange(num_slots - length, num_slots, device=query.device)  # [S], of the queries
    start = streams.new_zeros(1) if starts is None else starts.repeat_interleave(num_key_value_heads)  # [1 or N]
    positions = (slots - start[:, None]).clamp(min=0)  # [1 or N, S]

    key, value = (states[:, : sizes.num_compressed(num_slots)] for states in compressed)
    if key.shape[1]:
        scores = (plain.flatten(1, 2) @ key.float().transpose(1, 2)).unflatten(1, plain.shape[1:3])  # [N, S, G, n]
        seen_by_all = sizes.num_compressed(num_slots - length + 1) if starts is None else 0
        if seen_by_all < key.shape[1]:
            _hide_entries(scores, positions, seen_by_all, sizes)
        probs = scores.softmax(dim=-1)
        if not seen_by_all:
            probs = probs.masked_fill((positions < sizes.block - 1)[..., None, None], 0.0)
        from_compressed = (probs.flatten(1, 2) @ value.float()).unflatten(1, probs.shape[1:3])  # [N, S, G, D]
        mass = probs.sum(dim=2)  # [N, S, n]
    else:
        from_compressed, mass = 0.0, rotated.new_zeros(len(rotated), length, 0)
    blocks = choose_blocks(mass, positions, sizes.num_blocks(num_slots), sizes)  # [N, S, num_select]

    in_block = torch.arange(sizes.select_block, device=query.device)
    tokens = (blocks[..., None] * sizes.select_block + in_block).flatten(-2)  # [N, S, t], positions
    seen = (tokens >= 0) & (tokens <= positions[..., None])
    chosen = (tokens if starts is None else tokens + start[:, None, None]).clamp(0, num_slots - 1)  # [N, S, t], slots
    key, value = (states[streams[:, None, None], chosen] for states in selected)  # [N, S, t, D]
    from_selected = _attend(rotated, key, value, seen)

    recent = torch.arange(max(0, num_slots - length - sizes.window + 1), num_slots, device=query.device)  # [t], slots
    key, value = (states[:, None, -len(recent) :] for states in windowed)  # [N, 1, t, D]
    seen = None  # one query sees all of them
    if length > 1 or starts is not None:
        age = slots[:, None] - recent  # [S, t]
        seen = (age >= 0) & (age < sizes.window) & (recent >= start[:, None, None])  # [1 or N, S, t]
        seen = seen | (age == 0)  # a query before the first token has itself, so that no row is empty
    from_window = _attend(rotated, key, value, seen)

    gates = split_streams(gates, num_key_value_heads).float()  # [N, S, G, 3]
    branches = zip((from_compressed, from_selected, from_window), gates.split(1, dim=-1), strict=True)
    output: Any = sum(branch * gate for branch, gate in branches)
    return join_streams(output.to(query.dtype), batch)


def _attend(query, key, value, seen) -> torch.Tensor:
    """query float32 [N, S, G, D], scaled; key, value [N, S or 1, t, D]; seen bool [1 or N, S, t] or None for all
    -> float32 [N, S, G, D]"""
    scores = query @ key.float().transpose(-1, -2)  # [N, S, G, t]
    if seen is not None:
        scores = scores.masked_fill(~seen[:, :, None], float("-inf"))
    return scores.softmax(dim=-1) @ value.float()


# ---------------------------------------------------------------------------------------------------------------
# Module
# ---------------------------------------------------------------------------------------------------------------


class DeepseekNSA(DeepseekAttention):
    """Native sparse attention on grouped-query attention: a gated sum of three branches, eq. 5.

        o_t = sum_c sigmoid(W_g h_t)_c * attention(q_t, keys_c, values_c),   c in compressed, selected, window

    Each branch has its own keys and values. The compressed branch reads one entry for each `stride` tokens; the
    selected branch the blocks of tokens to which the compressed probabilities of its group of heads point; the window
    branch the last tokens. Memory grows linearly with the sequence; so does the work of the last two branches, while
    the compressed one still reads T / stride entries a query, 1 / 16 of dense attention with the paper's sizes.

    The paper leaves open, and here is chosen: phi (`BlockCompressor`, one for keys and one for values, for all heads); the
    compressed branch is without rotary positions, so that it compares contents alike at any distance, while queries and
    keys of the other two are rotated; gates are one linear map of the layer's input, for each head and branch, and begin
    at 1/2.

    The choice of blocks has no gradient; it is learned because the compressed branch shares its scores.

    It supports none of the facts of `attention_deepseek.py`: its own cache layer keeps more than keys and values, and
    blocks are counted from a row's first token, without hidden slots in between.
    """

    title = "native sparse attention (NSA)"
    adapters = (
        *("q_proj", "o_proj", "compress_k_proj", "compress_v_proj"),
        *("select_k_proj", "select_v_proj", "window_k_proj", "window_v_proj"),
    )

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.sizes = NSASizes.from_config(config)
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        key_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=bias)
        self.compress_k_proj = nn.Linear(hidden, key_width, bias=bias)
        self.compress_v_proj = nn.Linear(hidden, key_width, bias=bias)
        self.select_k_proj = nn.Linear(hidden, key_width, bias=bias)
        self.select_v_proj = nn.Linear(hidden, key_width, bias=bias)
        self.window_k_proj = nn.Linear(hidden, key_width, bias=bias)
        self.window_v_proj = nn.Linear(hidden, key_width, bias=bias)
        self.compress_key = BlockCompressor(self.head_dim, self.sizes)
        self.compress_value = BlockCompressor(self.head_dim, self.sizes)
        self.branch_gate = nn.Linear(hidden, heads * 3, bias=True)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=bias)

    @classmethod
    def view(cls, config, tokens: AttentionInput) -> View:
        """The documents instead of a mask."""
        if is_exporting():
            raise ValueError(
                f"{cls.title} cannot be exported: what it computes depends on where documents begin, which a graph cannot look at."
            )
        past, has_cache = int(tokens.past_length), tokens.past_key_values is not None
        return View(find_documents(tokens.attention_mask, tokens.position_ids, past, has_cache), has_past=past > 0)

    @classmethod
    def make_cache_layer(cls, config) -> NSACacheLayer:
        """Keys and values of the three branches."""
        sizes = NSASizes.from_config(config)
        return NSACacheLayer(window=sizes.window, block=sizes.block)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: list[Span] | None = None,
        past_key_values=None,
        **kwargs,
    ) -> tuple[torch.Tensor, None, None]:
        """
        Args:
            hidden_states: [B, S, hidden_size].
            position_embeddings: cos, sin, each float32 [B, S, D/2].
            attention_mask: the documents, as `find_documents` gives them.

        Returns:
            [B, S, hidden_size]; there are no attention maps and no index loss.

        Raises:
            ValueError: the cache's layer is not an `NSACacheLayer`, or attention maps are asked for.
        """
        if kwargs.get("output_attentions", self.config.output_attentions):
            raise ValueError(
                "`output_attentions` is set, and NSA has no attention maps: three branches, of which one sees compressed "
                "blocks, are joined by gates. Leave it out."
            )

        def heads(projection: nn.Linear) -> torch.Tensor:
            states = project(projection, hidden_states).unflatten(-1, (-1, self.head_dim))  # [B, S, H or K, D]
            return states.transpose(1, 2)

        def rotate(states: torch.Tensor) -> torch.Tensor:
            return apply_rotary(states, *position_embeddings, layout="half")

        query = heads(self.q_proj)  # [B, H, S, D]
        gates = self.branch_gate(hidden_states).sigmoid().unflatten(-1, (-1, 3)).transpose(1, 2)  # [B, H, S, 3]
        raw = heads(self.compress_k_proj), heads(self.compress_v_proj)
        selected = rotate(heads(self.select_k_proj)), heads(self.select_v_proj)
        windowed = rotate(heads(self.window_k_proj)), heads(self.window_v_proj)
        tokens = query, rotate(query), gates, raw, selected, windowed
        if past_key_values is None:
            output = self._attend_new(*tokens, attention_mask)
        else:
            output = self._attend_cached(*tokens, attention_mask, past_key_values)
        return project(self.o_proj, output.transpose(1, 2).flatten(2)), None, None

    def _compress(self, key: torch.Tensor, value: torch.Tensor):
        """Keys and values of tokens, [B, K, T, D] each -> compressed ones, [B, K, num_compressed(T), D] each"""
        if not self.sizes.num_compressed(key.shape[2]):
            return key[:, :, :0], value[:, :, :0]
        return self.compress_key(key), self.compress_value(value)

    @torch.compiler.disable  # sizes of documents and tiles come from the data: a graph for each would take minutes
    def _attend_new(self, query, rotated_query, gates, raw, selected, windowed, spans) -> torch.Tensor:
        """Attention of tokens among themselves -> [B, H, S, D]"""
        if spans is None:
            states = NSAStates(self._compress(*raw), selected, windowed)
            return attend_sequence(query, rotated_query, states, gates, self.scaling, self.sizes)
        tokens = query, rotated_query, gates, *raw, *selected, *windowed
        outputs = [
            self._attend_new(*document[:3], document[3:5], document[5:7], document[7:], None)
            for document in zip(*(split_documents(states, spans) for states in tokens), strict=True)
        ]
        return join_documents(outputs, spans, like=query)

    @torch.compiler.disable
    def _attend_cached(
        self, query, rotated_query, gates, raw, selected, windowed, spans, past_key_values
    ) -> torch.Tensor:
        """Attention of new tokens to the cache and themselves, after they are put into it -> [B, H, S, D]"""
        sizes, length = self.sizes, query.shape[2]
        past = past_key_values.get_seq_length(self.layer_idx)
        total = past + length
        past_key_values.update(*selected, self.layer_idx, windowed=windowed, raw=raw)
        layer = past_key_values.layers[self.layer_idx]
        if not hasattr(layer, "put_compressed"):
            raise ValueError(
                f"Layer {self.layer_idx} of `past_key_values` is a {type(layer).__name__}, which has no room for what "
                "NSA caches. Pass an empty `DynamicCache()` without offloading, or none."
            )
        if spans is None:
            parts = [(slice(None), 0, total)]
        else:
            spans = [span for span in spans if span.stop > past]
            parts = [(slice(row, row + 1), start, stop) for row, start, stop in spans]

        for rows, start, stop in parts:  # compress the blocks that are now complete
            first, last = sizes.num_compressed(past - start), sizes.num_compressed(stop - start)
            if last > first:
                begin, end = start + first * sizes.stride, start + (last - 1) * sizes.stride + sizes.block
                layer.put_compressed(rows, first, *self._compress(*layer.recent(layer.raw, rows, begin, end)))

        if past and length <= _MAX_GATHERED:
            states = NSAStates(layer.compressed, (layer.keys, layer.values), layer.windowed)
            starts = None
            if spans is not None:
                starts = torch.full((len(query),), total, device=query.device)
                starts[[span.row for span in spans]] = starts.new_tensor([span.start for span in spans])
            output = attend_gathered(query, rotated_query, states, starts, gates, self.scaling, sizes)
        else:
            outputs, places = [], []
            for rows, start, stop in parts:
                new = slice(max(start - past, 0), stop - past)
                oldest = max(start, past + new.start - sizes.window + 1)
                states = NSAStates(
                    tuple(x[rows, :, : sizes.num_compressed(stop - start)] for x in layer.compressed),
                    tuple(x[rows, :, start:stop] for x in (layer.keys, layer.values)),
                    layer.recent(layer.windowed, rows, oldest, stop),
                )
                plain, rotated, gate = (x[rows, :, new] for x in (query, rotated_query, gates))
                outputs.append(attend_sequence(plain, rotated, states, gate, self.scaling, sizes))
                places.append(Span(rows.start, new.start, new.stop))
            output = outputs[0] if spans is None else join_documents(outputs, places, like=query)
        layer.trim()
        return output
