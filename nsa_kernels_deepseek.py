"""Triton kernels for Native Sparse Attention (NSA, arXiv:2502.11089): the branches of `nsa_deepseek.py` on a GPU.

Same functions, arguments and results as there; nothing of queries x keys is stored. From top to bottom: attention to a
band of keys, which serves the compressed and the window branch; scores of selection blocks, a second pass over the
compressed keys; the selected branch; the functions to call.

    compressed   forward keeps each row's log-sum-exp; with it the second pass turns scores into probabilities and sums
                 them over the heads of a group and over a selection block while they are in registers
    selected     one program for a query and a key/value head: its group of query heads times its selected blocks
                 (section 3.4 of the paper); keys' gradients block by block, over the queries that chose the block
    window       as the compressed one, with entries of one token and a lower bound

Shape letters: N = batch * key/value heads, streams; S queries; T keys; G query heads of a stream; D width of a head.
Rows are the S * G query heads of a stream, so that no group size wastes a part of a tile.

Proven in Triton's interpreter (tests/kernels), on a CPU: results and gradients equal those of `nsa_deepseek.py`.
Compiled by Triton for compute capabilities 8.0 and 9.0. Run and timed on no GPU; tile sizes are guesses.
"""

from __future__ import annotations  # kernels' annotations name `tl`, which is None without Triton

import torch

from .kernels_deepseek import (
    dense_rows,
    finish,
    kernel,
    load_tile,
    on_its_gpu,
    padded_width,
    power_of_two,
    product,
    store_tile,
    take_in,
)
from .selection_deepseek import best_blocks, join_streams, split_streams

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs comes without Triton
    triton = tl = None

_SCORE_BYTES = 256 * 2**20  # scores of selection blocks held at once
_TILE = 64  # rows, and keys, of a tile
_SEGMENT = 1024  # queries over which one program sums a selected block's gradient; the first block has all queries
_UNBOUNDED = 2**30  # a window longer than any sequence


@kernel
def _score_gradients(query, key, value, grad, log_sum_exp, mean_grad, seen, scaling):
    """-> probabilities and gradients of the scores, float32 [rows, keys] each"""
    scores = product(query, tl.trans(key)) * scaling
    probs = tl.where(seen, tl.exp(scores - log_sum_exp[:, None]), 0.0)
    return probs, probs * (product(grad, tl.trans(value)) - mean_grad[:, None]) * scaling


# ---------------------------------------------------------------------------------------------------------------
# Attention to a band of keys
# ---------------------------------------------------------------------------------------------------------------


@kernel
def _band(position, begin, BLOCK: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr):
    """A query at `position` sees the keys start .. stop - 1: those whose BLOCK tokens, one key each STRIDE, have ended,
    of these the last WINDOW, and none before `begin`."""
    stop = tl.where(position >= BLOCK - 1, (position - (BLOCK - 1)) // STRIDE + 1, 0)
    return tl.maximum(stop - WINDOW, begin), stop


@kernel
def _band_forward(
    query, key, value, first, begin, output, log_sum_exp,
    num_rows, num_keys, key_stream, key_token, value_stream, value_token, scaling,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    KEY_WIDTH: tl.constexpr, KEY_PADDED: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program: ROWS rows of a stream over all keys that they see."""
    stream = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = rows < num_rows
    start, stop = _band(
        tl.load(first + stream) + rows // GROUP, tl.load(begin + stream), BLOCK, STRIDE, WINDOW
    )  # [rows] each
    q = load_tile(query + stream * num_rows * KEY_WIDTH, rows, exists, KEY_WIDTH, KEY_WIDTH, KEY_PADDED)
    maximum = tl.full([ROWS], -1.0e30, tl.float32)  # finite: a row may see nothing of a tile
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    for tile in range(tl.min(start, 0), tl.minimum(tl.max(stop, 0), num_keys), KEYS):
        tokens = tile + tl.arange(0, KEYS)
        k = load_tile(key + stream * key_stream, tokens, tokens < num_keys, key_token, KEY_WIDTH, KEY_PADDED)
        v = load_tile(value + stream * value_stream, tokens, tokens < num_keys, value_token, VALUE_WIDTH, VALUE_PADDED)
        seen = (tokens[None, :] >= start[:, None]) & (tokens[None, :] < stop[:, None])
        scores = tl.where(seen, product(q, tl.trans(k)) * scaling, float("-inf"))
        maximum, total, mixed = take_in(scores, v, maximum, total, mixed)
    mixed, result = finish(maximum, total, mixed)
    store_tile(output + stream * num_rows * VALUE_WIDTH, rows, exists, mixed, VALUE_WIDTH, VALUE_PADDED)
    tl.store(log_sum_exp + stream * num_rows + rows, result, mask=exists)


@kernel
def _band_backward_query(
    query, key, value, first, begin, grad_output, log_sum_exp, mean_grad, grad_query,
    num_rows, num_keys, key_stream, key_token, value_stream, value_token, scaling,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    KEY_WIDTH: tl.constexpr, KEY_PADDED: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """As `_band_forward`: the gradient of ROWS rows."""
    stream = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = rows < num_rows
    start, stop = _band(tl.load(first + stream) + rows // GROUP, tl.load(begin + stream), BLOCK, STRIDE, WINDOW)
    q = load_tile(query + stream * num_rows * KEY_WIDTH, rows, exists, KEY_WIDTH, KEY_WIDTH, KEY_PADDED)
    grad = load_tile(
        grad_output + stream * num_rows * VALUE_WIDTH, rows, exists, VALUE_WIDTH, VALUE_WIDTH, VALUE_PADDED
    )
    row_lse = tl.load(log_sum_exp + stream * num_rows + rows, mask=exists, other=float("inf"))
    row_mean = tl.load(mean_grad + stream * num_rows + rows, mask=exists, other=0.0)
    result = tl.zeros([ROWS, KEY_PADDED], tl.float32)
    for tile in range(tl.min(start, 0), tl.minimum(tl.max(stop, 0), num_keys), KEYS):
        tokens = tile + tl.arange(0, KEYS)
        k = load_tile(key + stream * key_stream, tokens, tokens < num_keys, key_token, KEY_WIDTH, KEY_PADDED)
        v = load_tile(value + stream * value_stream, tokens, tokens < num_keys, value_token, VALUE_WIDTH, VALUE_PADDED)
        seen = (tokens[None, :] >= start[:, None]) & (tokens[None, :] < stop[:, None])
        _, grad_scores = _score_gradients(q, k, v, grad, row_lse, row_mean, seen, scaling)
        result += product(grad_scores.to(k.dtype), k)
    store_tile(grad_query + stream * num_rows * KEY_WIDTH, rows, exists, result, KEY_WIDTH, KEY_PADDED)


@kernel
def _band_backward_key(
    query, key, value, first, begin, grad_output, log_sum_exp, mean_grad, grad_key, grad_value,
    num_rows, num_keys, key_stream, key_token, value_stream, value_token, scaling,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    KEY_WIDTH: tl.constexpr, KEY_PADDED: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program: KEYS keys and values of a stream over all rows that see one of them."""
    stream = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0) * KEYS
    tokens = tile + tl.arange(0, KEYS)
    k = load_tile(key + stream * key_stream, tokens, tokens < num_keys, key_token, KEY_WIDTH, KEY_PADDED)
    v = load_tile(value + stream * value_stream, tokens, tokens < num_keys, value_token, VALUE_WIDTH, VALUE_PADDED)
    first_position, lowest = tl.load(first + stream), tl.load(begin + stream)
    # the first position that sees the first of these keys, and the first one that no longer sees the last of them
    seen_from = tile * STRIDE + BLOCK - 1 - first_position
    seen_until = (tile.to(tl.int64) + KEYS - 1 + WINDOW) * STRIDE + BLOCK - 1 - first_position
    first_row = tl.maximum(seen_from, 0) * GROUP
    last_row = tl.minimum(seen_until * GROUP, num_rows).to(tl.int32)
    grad_k = tl.zeros([KEYS, KEY_PADDED], tl.float32)
    grad_v = tl.zeros([KEYS, VALUE_PADDED], tl.float32)
    for row in range(first_row, last_row, ROWS):
        rows = row + tl.arange(0, ROWS)
        exists = rows < num_rows
        q = load_tile(query + stream * num_rows * KEY_WIDTH, rows, exists, KEY_WIDTH, KEY_WIDTH, KEY_PADDED)
        grad = load_tile(
            grad_output + stream * num_rows * VALUE_WIDTH, rows, exists, VALUE_WIDTH, VALUE_WIDTH, VALUE_PADDED
        )
        row_lse = tl.load(log_sum_exp + stream * num_rows + rows, mask=exists, other=float("inf"))
        row_mean = tl.load(mean_grad + stream * num_rows + rows, mask=exists, other=0.0)
        start, stop = _band(first_position + rows // GROUP, lowest, BLOCK, STRIDE, WINDOW)
        seen = (tokens[None, :] >= start[:, None]) & (tokens[None, :] < stop[:, None]) & exists[:, None]
        probs, grad_scores = _score_gradients(q, k, v, grad, row_lse, row_mean, seen, scaling)
        grad_v += product(tl.trans(probs.to(grad.dtype)), grad)
        grad_k += product(tl.trans(grad_scores.to(q.dtype)), q)
    store_tile(grad_key + stream * num_keys * KEY_WIDTH, tokens, tokens < num_keys, grad_k, KEY_WIDTH, KEY_PADDED)
    store_tile(
        grad_value + stream * num_keys * VALUE_WIDTH, tokens, tokens < num_keys, grad_v, VALUE_WIDTH, VALUE_PADDED
    )


class _BandAttention(torch.autograd.Function):
    """query [N, S, G, D], key and value [N, T, D], first and begin int32 [N] -> [N, S, G, D], log-sum-exp [N, S, G]"""

    @staticmethod
    def forward(ctx, query, key, value, first, begin, scaling, band):
        query, key, value = query.contiguous(), dense_rows(key), dense_rows(value)
        streams, length, group, _ = query.shape
        output = query.new_empty(streams, length, group, value.shape[-1])
        log_sum_exp = query.new_empty(streams, length, group, dtype=torch.float32)
        ctx.band, ctx.scaling = band, scaling
        arguments = _band_arguments(query, key, value, scaling, band)
        _band_forward[triton.cdiv(length * group, arguments[-1]), streams](
            query, key, value, first, begin, output, log_sum_exp, *arguments
        )
        ctx.save_for_backward(query, key, value, first, begin, output, log_sum_exp)
        ctx.mark_non_differentiable(log_sum_exp)
        return output, log_sum_exp

    @staticmethod
    def backward(ctx, grad_output, _):
        query, key, value, first, begin, output, log_sum_exp = ctx.saved_tensors
        streams, length, group, _ = query.shape
        grad_output, mean_grad = grad_output.contiguous(), _mean_gradient(grad_output, output)
        grad_query, grad_key, grad_value = (
            torch.empty(states.shape, dtype=states.dtype, device=states.device) for states in (query, key, value)
        )
        arguments = _band_arguments(query, key, value, ctx.scaling, ctx.band)
        inputs = query, key, value, first, begin, grad_output, log_sum_exp, mean_grad
        tile = arguments[-1]
        _band_backward_query[triton.cdiv(length * group, tile), streams](*inputs, grad_query, *arguments)
        if key.shape[1]:
            _band_backward_key[triton.cdiv(key.shape[1], tile), streams](*inputs, grad_key, grad_value, *arguments)
        return grad_query, grad_key, grad_value, None, None, None, None


def _band_arguments(query, key, value, scaling, band):
    """What the three kernels have in common behind their tensors, in their order."""
    num_rows, tile = query.shape[1] * query.shape[2], _tile_size(key, value)
    strides = *key.stride()[:2], *value.stride()[:2]
    return num_rows, key.shape[1], *strides, scaling, query.shape[2], *band, *_widths(key, value), tile, tile


def _widths(key, value) -> tuple[int, int, int, int]:
    """Width and padded width of keys and of values"""
    return tuple(size for states in (key, value) for size in (states.shape[-1], padded_width(states)))


def _tile_size(*states) -> int:
    """Rows, and keys, of a tile: half as many for wide float32 heads, whose tiles would overfill shared memory."""
    width = max(padded_width(x) * x.element_size() for x in states)
    return _TILE if width <= 512 else max(16, _TILE // 2)


def _mean_gradient(grad_output, output):
    """The gradient's mean over a row's probabilities, which the softmax's gradient subtracts: float32 [N, S, G]"""
    return (grad_output.float() * output.float()).sum(dim=-1)


# ---------------------------------------------------------------------------------------------------------------
# Scores of selection blocks
# ---------------------------------------------------------------------------------------------------------------


@kernel
def _block_scores(
    query, key, log_sum_exp, first, scores,
    num_queries, first_query, part_length, num_keys, num_blocks, key_stream, key_token, scaling,
    GROUP: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, SELECT_BLOCK: tl.constexpr,
    NUM_INIT: tl.constexpr, NUM_LOCAL: tl.constexpr, KEY_WIDTH: tl.constexpr, KEY_PADDED: tl.constexpr,
    QUERIES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A program: eq. 9-10 for QUERIES queries and BLOCKS selection blocks of a stream.

    A selection block takes, of the entries that touch it, each one's probability times the strides they share:
    one product of queries with every SELECT_BLOCK / STRIDE-th key for each of these entries.
    """
    PER_SELECT: tl.constexpr = SELECT_BLOCK // STRIDE
    PER_BLOCK: tl.constexpr = BLOCK // STRIDE
    stream = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, QUERIES * HEADS)
    places = tl.program_id(0) * QUERIES + rows // HEADS  # in the part of the queries
    head = rows % HEADS
    exists = (places < part_length) & (head < GROUP)
    rows = (first_query + places) * GROUP + head
    position = tl.maximum(tl.load(first + stream) + first_query + places, 0)
    num_rows = num_queries * GROUP
    q = load_tile(query + stream * num_rows * KEY_WIDTH, rows, exists, KEY_WIDTH, KEY_WIDTH, KEY_PADDED)
    row_lse = tl.load(log_sum_exp + stream * num_rows + rows, mask=exists, other=float("inf"))

    blocks = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    mass = tl.zeros([QUERIES * HEADS, BLOCKS], tl.float32)
    for offset in range(1 - PER_BLOCK, PER_SELECT):
        entries = blocks * PER_SELECT + offset
        shared = tl.minimum(tl.minimum(offset + PER_BLOCK, PER_SELECT - offset), tl.minimum(PER_BLOCK, PER_SELECT))
        there = (entries >= 0) & (entries < num_keys)
        k = load_tile(key + stream * key_stream, entries, there, key_token, KEY_WIDTH, KEY_PADDED)
        seen = there[None, :] & (entries[None, :] * STRIDE + BLOCK - 1 <= position[:, None])
        probs = tl.exp(product(q, tl.trans(k)) * scaling - row_lse[:, None])
        mass += tl.where(seen, probs, 0.0) * shared
    importance = tl.sum(tl.reshape(mass, [QUERIES, HEADS, BLOCKS]), 1)  # over the heads of the group

    places = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    own = tl.maximum(tl.load(first + stream) + first_query + places, 0) // SELECT_BLOCK
    fixed = (blocks < NUM_INIT)[None, :] | (blocks[None, :] > own[:, None] - NUM_LOCAL)
    importance = tl.where(fixed, float("inf"), importance)
    importance = tl.where(blocks[None, :] > own[:, None], float("-inf"), importance)
    offsets = (stream * part_length + places)[:, None] * num_blocks + blocks[None, :]
    tl.store(scores + offsets, importance, mask=(places < part_length)[:, None] & (blocks < num_blocks)[None, :])


def _choose_blocks(query, key, log_sum_exp, first, scaling, num_blocks, sizes) -> torch.Tensor:
    """The `num_select` best blocks of each query, int64 [N, S, num_select], -1 for none; in parts of the queries."""
    query, key = query.contiguous(), dense_rows(key)
    streams, length, group, width = query.shape
    heads, tile = power_of_two(group, least=1), _tile_size(query)
    queries = max(1, tile // heads)
    part = max(1, _SCORE_BYTES // (4 * streams * num_blocks))
    chosen = torch.empty(streams, length, sizes.num_select, dtype=torch.int64, device=query.device)
    for start in range(0, length, part):
        size = min(part, length - start)
        scores = torch.empty(streams, size, num_blocks, dtype=torch.float32, device=query.device)
        grid = (triton.cdiv(size, queries), triton.cdiv(num_blocks, tile), streams)
        _block_scores[grid](
            *(query, key, log_sum_exp, first, scores, length, start, size, key.shape[1], num_blocks),
            *(*key.stride()[:2], scaling, group, heads, sizes.block, sizes.stride, sizes.select_block),
            *(sizes.num_init, sizes.num_local, width, padded_width(query), queries, tile),
        )
        chosen[:, start : start + size] = best_blocks(scores, sizes.num_select)
    return chosen


# ---------------------------------------------------------------------------------------------------------------
# Selected branch
# ---------------------------------------------------------------------------------------------------------------


@kernel
def _selected_forward(
    query, key, value, blocks, first, begin, output, log_sum_exp,
    num_queries, num_select, key_stream, key_token, value_stream, value_token, scaling,
    GROUP: tl.constexpr, SELECT_BLOCK: tl.constexpr,
    KEY_WIDTH: tl.constexpr, KEY_PADDED: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program: the group of heads of a query over the blocks chosen for it."""
    stream, place = tl.program_id(1).to(tl.int64), tl.program_id(0)
    head = tl.arange(0, HEADS)
    exists, rows = head < GROUP, (stream * num_queries + place) * GROUP + head
    position, lowest = tl.maximum(tl.load(first + stream) + place, 0), tl.load(begin + stream)
    q = load_tile(query, rows, exists, KEY_WIDTH, KEY_WIDTH, KEY_PADDED)
    maximum = tl.full([HEADS], -1.0e30, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    mixed = tl.zeros([HEADS, VALUE_PADDED], tl.float32)
    for i in range(num_select):
        block = tl.load(blocks + (stream * num_queries + place) * num_select + i)
        if block >= 0:
            for tile in range(0, SELECT_BLOCK, KEYS):
                inside = tile + tl.arange(0, KEYS)
                token = block * SELECT_BLOCK + inside
                seen = (inside < SELECT_BLOCK) & (token <= position)
                k = load_tile(key + stream * key_stream, lowest + token, seen, key_token, KEY_WIDTH, KEY_PADDED)
                v = load_tile(
                    value + stream * value_stream, lowest + token, seen, value_token, VALUE_WIDTH, VALUE_PADDED
                )
                scores = tl.where(seen[None, :], product(q, tl.trans(k)) * scaling, float("-inf"))
                maximum, total, mixed = take_in(scores, v, maximum, total, mixed)
    mixed, result = finish(maximum, total, mixed)
    store_tile(output, rows, exists, mixed, VALUE_WIDTH, VALUE_PADDED)
    tl.store(log_sum_exp + rows, result, mask=exists)


@kernel
def _selected_backward_query(
    query, key, value, blocks, first, begin, grad_output, log_sum_exp, mean_grad, grad_query,
    num_queries, num_select, key_stream, key_token, value_stream, value_token, scaling,
    GROUP: tl.constexpr, SELECT_BLOCK: tl.constexpr,
    KEY_WIDTH: tl.constexpr, KEY_PADDED: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """As `_selected_forward`: the gradient of the group of heads."""
    stream, place = tl.program_id(1).to(tl.int64), tl.program_id(0)
    head = tl.arange(0, HEADS)
    exists, rows = head < GROUP, (stream * num_queries + place) * GROUP + head
    position, lowest = tl.maximum(tl.load(first + stream) + place, 0), tl.load(begin + stream)
    q = load_tile(query, rows, exists, KEY_WIDTH, KEY_WIDTH, KEY_PADDED)
    grad = load_tile(grad_output, rows, exists, VALUE_WIDTH, VALUE_WIDTH, VALUE_PADDED)
    row_lse = tl.load(log_sum_exp + rows, mask=exists, other=float("inf"))
    row_mean = tl.load(mean_grad + rows, mask=exists, other=0.0)
    result = tl.zeros([HEADS, KEY_PADDED], tl.float32)
    for i in range(num_select):
        block = tl.load(blocks + (stream * num_queries + place) * num_select + i)
        if block >= 0:
            for tile in range(0, SELECT_BLOCK, KEYS):
                inside = tile + tl.arange(0, KEYS)
                token = block * SELECT_BLOCK + inside
                seen = (inside < SELECT_BLOCK) & (token <= position)
                k = load_tile(key + stream * key_stream, lowest + token, seen, key_token, KEY_WIDTH, KEY_PADDED)
                v = load_tile(
                    value + stream * value_stream, lowest + token, seen, value_token, VALUE_WIDTH, VALUE_PADDED
                )
                _, grad_scores = _score_gradients(q, k, v, grad, row_lse, row_mean, seen[None, :], scaling)
                result += product(grad_scores.to(k.dtype), k)
    store_tile(grad_query, rows, exists, result, KEY_WIDTH, KEY_PADDED)


@kernel
def _selected_backward_key(
    query, key, value, first, begin, grad_output, log_sum_exp, mean_grad, grad_key, grad_value,
    chosen_by, segment_block, segment_begin, segment_end,
    num_queries, num_blocks, num_keys, key_stream, key_token, value_stream, value_token, scaling,
    GROUP: tl.constexpr, SELECT_BLOCK: tl.constexpr,
    KEY_WIDTH: tl.constexpr, KEY_PADDED: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program: KEYS keys and values of a block, over a segment of the queries that chose it."""
    segment = tl.program_id(0)
    pair, last_pair = tl.load(segment_begin + segment), tl.load(segment_end + segment)
    if pair < last_pair:
        number = tl.load(segment_block + segment)
        stream, block = number // num_blocks, number % num_blocks
        first_position, lowest = tl.load(first + stream), tl.load(begin + stream)
        inside = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
        token = block * SELECT_BLOCK + inside
        there = (inside < SELECT_BLOCK) & (lowest + token < num_keys)
        k = load_tile(key + stream * key_stream, lowest + token, there, key_token, KEY_WIDTH, KEY_PADDED)
        v = load_tile(value + stream * value_stream, lowest + token, there, value_token, VALUE_WIDTH, VALUE_PADDED)
        grad_k = tl.zeros([KEYS, KEY_PADDED], tl.float32)
        grad_v = tl.zeros([KEYS, VALUE_PADDED], tl.float32)
        num_rows = (last_pair - pair).to(tl.int32) * GROUP
        for row in range(0, num_rows, ROWS):
            rows = row + tl.arange(0, ROWS)
            exists = rows < num_rows
            place = tl.load(chosen_by + pair + rows // GROUP, mask=exists, other=0)  # the query in its stream
            rows = (stream * num_queries + place) * GROUP + rows % GROUP
            q = load_tile(query, rows, exists, KEY_WIDTH, KEY_WIDTH, KEY_PADDED)
            grad = load_tile(grad_output, rows, exists, VALUE_WIDTH, VALUE_WIDTH, VALUE_PADDED)
            row_lse = tl.load(log_sum_exp + rows, mask=exists, other=float("inf"))
            row_mean = tl.load(mean_grad + rows, mask=exists, other=0.0)
            position = tl.maximum(first_position + place, 0)
            seen = there[None, :] & (token[None, :] <= position[:, None]) & exists[:, None]
            probs, grad_scores = _score_gradients(q, k, v, grad, row_lse, row_mean, seen, scaling)
            grad_v += product(tl.trans(probs.to(grad.dtype)), grad)
            grad_k += product(tl.trans(grad_scores.to(q.dtype)), q)
        rows = (stream * num_keys + lowest + token).to(tl.int64)[:, None]
        columns = tl.arange(0, KEY_PADDED)[None, :]
        tl.atomic_add(grad_key + rows * KEY_WIDTH + columns, grad_k, mask=there[:, None] & (columns < KEY_WIDTH))
        columns = tl.arange(0, VALUE_PADDED)[None, :]
        tl.atomic_add(grad_value + rows * VALUE_WIDTH + columns, grad_v, mask=there[:, None] & (columns < VALUE_WIDTH))


class _SelectedAttention(torch.autograd.Function):
    """query [N, S, G, D], key and value [N, T, D], blocks int64 [N, S, n], first and begin int32 [N] -> [N, S, G, D]"""

    @staticmethod
    def forward(ctx, query, key, value, blocks, first, begin, scaling, select_block):
        query, key, value, blocks = query.contiguous(), dense_rows(key), dense_rows(value), blocks.contiguous()
        streams, length, group, _ = query.shape
        output = query.new_empty(streams, length, group, value.shape[-1])
        log_sum_exp = query.new_empty(streams, length, group, dtype=torch.float32)
        ctx.scaling, ctx.select_block = scaling, select_block
        _selected_forward[length, streams](
            *(query, key, value, blocks, first, begin, output, log_sum_exp, length, blocks.shape[-1]),
            *_selected_arguments(query, key, value, scaling, select_block, power_of_two(group, least=16)),
        )
        ctx.save_for_backward(query, key, value, blocks, first, begin, output, log_sum_exp)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value, blocks, first, begin, output, log_sum_exp = ctx.saved_tensors
        streams, length, group, _ = query.shape
        grad_output, mean_grad = grad_output.contiguous(), _mean_gradient(grad_output, output)
        grad_query = torch.empty_like(query)
        # float32, as several programs add to them
        grad_key, grad_value = (
            torch.zeros(states.shape, dtype=torch.float32, device=states.device) for states in (key, value)
        )
        arguments = query, key, value, ctx.scaling, ctx.select_block
        _selected_backward_query[length, streams](
            *(query, key, value, blocks, first, begin, grad_output, log_sum_exp, mean_grad, grad_query),
            *(length, blocks.shape[-1], *_selected_arguments(*arguments, power_of_two(group, least=16))),
        )
        num_blocks = triton.cdiv(key.shape[1], ctx.select_block)
        chosen_by, *segments = _queries_of_blocks(blocks, num_blocks)
        arguments = _selected_arguments(*arguments, _tile_size(key, value))
        _selected_backward_key[len(segments[0]), triton.cdiv(ctx.select_block, arguments[-1])](
            *(query, key, value, first, begin, grad_output, log_sum_exp, mean_grad, grad_key, grad_value),
            *(chosen_by, *segments, length, num_blocks, key.shape[1], *arguments),
        )
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None, None, None


def _selected_arguments(query, key, value, scaling, select_block, rows):
    """What the three kernels have in common behind their sizes, in their order."""
    strides = *key.stride()[:2], *value.stride()[:2]
    keys = min(_tile_size(key, value), power_of_two(select_block, least=16))
    return *strides, scaling, query.shape[2], select_block, *_widths(key, value), rows, keys


def _queries_of_blocks(blocks: torch.Tensor, num_blocks: int) -> tuple[torch.Tensor, ...]:
    """The queries that chose each block, in segments of at most `_SEGMENT`; no number waits for the GPU.

    Args:
        blocks: int64 [N, S, n], -1 for none.

    Returns:
        queries, int64 [N * S * n], ordered by stream and block, and for each segment the number of its block (stream *
        num_blocks + block), its first query and the one behind its last. Segments at the end are empty.
    """
    streams, length, num_select = blocks.shape
    total = streams * num_blocks
    stream = torch.arange(streams, device=blocks.device)[:, None, None]
    numbers, order = torch.where(blocks >= 0, stream * num_blocks + blocks, total).flatten().sort(stable=True)
    bounds = torch.searchsorted(numbers, torch.arange(total + 1, device=blocks.device))  # of each block's queries
    num_segments = (bounds.diff() + _SEGMENT - 1) // _SEGMENT  # [total]
    segment_bounds = torch.nn.functional.pad(num_segments.cumsum(0), (1, 0))
    segments = torch.arange(total + blocks.numel() // _SEGMENT, device=blocks.device)  # at least as many as there are
    number = torch.searchsorted(segment_bounds, segments, right=True) - 1
    exists = number < total
    number = number.clamp(max=total - 1)
    begin = bounds[number] + (segments - segment_bounds[number]) * _SEGMENT
    end = torch.where(exists, (begin + _SEGMENT).minimum(bounds[number + 1]), begin)
    return order // num_select % length, number, begin, end


# ---------------------------------------------------------------------------------------------------------------
# The functions to call
# ---------------------------------------------------------------------------------------------------------------


@on_its_gpu
def compressed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, first_position: int, sizes
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to compressed entries, and the blocks that its probabilities select.

    Args:
        query: [N, S, G, D], at positions first_position, first_position + 1, ...
        key, value: [N, n, D], the entries of first_position + S tokens.
        sizes: an `NSASizes`.

    Returns:
        [N, S, G, D], zero where no entry is visible, and int64 [N, S, num_select], -1 where there are fewer blocks.
    """
    first = torch.full((len(query),), first_position, dtype=torch.int32, device=query.device)
    num_blocks = sizes.num_blocks(first_position + query.shape[1])
    return _attend_compressed(query, key, value, first, scaling, num_blocks, sizes)


def _attend_compressed(query, key, value, first, scaling, num_blocks, sizes):
    """As `compressed_attention`; first int32 [N], a negative position counts as 0"""
    begin, band = torch.zeros_like(first), (sizes.block, sizes.stride, _UNBOUNDED)
    output, log_sum_exp = _BandAttention.apply(query, key, value, first, begin, scaling, band)
    with torch.no_grad():
        blocks = _choose_blocks(query, key, log_sum_exp, first, scaling, num_blocks, sizes)
    return output, blocks


@on_its_gpu
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
    first = torch.full((len(query),), first_position, dtype=torch.int32, device=query.device)
    return _SelectedAttention.apply(query, key, value, blocks, first, torch.zeros_like(first), scaling, select_block)


@on_its_gpu
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
    return _attend_window(query, key, value, query.new_zeros(len(query), dtype=torch.int32), scaling, window)


def _attend_window(query, key, value, begin, scaling, window):
    """As `window_attention`; begin int32 [N], each stream's first key"""
    first = torch.full_like(begin, key.shape[1] - query.shape[1])
    return _BandAttention.apply(query, key, value, first, begin, scaling, (1, 1, window))[0]


@on_its_gpu
def attend_gathered(
    query: torch.Tensor,
    rotated_query: torch.Tensor,
    states,
    starts: torch.Tensor | None,
    gates: torch.Tensor,
    scaling: float,
    sizes,
) -> torch.Tensor:
    """NSA of a few new queries over a cache whose rows begin at different slots; nothing is gathered here.

    Args:
        query: [B, H, S, D], the last S of the T slots, for the compressed branch.
        rotated_query: the same rotated by their positions, for the other two.
        states: an `NSAStates`; `selected` of T slots, `compressed` as each row's own blocks count, with room behind.
        starts: int64 [B], the slot of each row's first token; None if all begin at slot 0. Queries before the first
            token get some finite output.
        gates: [B, H, S, 3].

    Returns:
        [B, H, S, D].
    """
    batch, _, length, _ = query.shape
    num_key_value_heads, num_slots = states.selected[0].shape[1:3]
    plain, rotated, gates = (split_streams(x, num_key_value_heads) for x in (query, rotated_query, gates))
    compressed, selected, windowed = ([x.flatten(0, 1) for x in pair] for pair in states)  # [N, ., D]
    begin = plain.new_zeros(len(plain), dtype=torch.int32)  # [N], each stream's first slot
    if starts is not None:
        begin += starts.repeat_interleave(num_key_value_heads).int()
    first = num_slots - length - begin  # the first query's position

    entries = [x[:, : sizes.num_compressed(num_slots)] for x in compressed]
    num_blocks = sizes.num_blocks(num_slots)
    from_compressed, blocks = _attend_compressed(plain, *entries, first, scaling, num_blocks, sizes)
    from_selected = _SelectedAttention.apply(rotated, *selected, blocks, first, begin, scaling, sizes.select_block)
    oldest = num_slots - windowed[0].shape[1]  # the slot of the first key that the window branch has
    from_window = _attend_window(rotated, *windowed, (begin - oldest).clamp(min=0), scaling, sizes.window)

    branches = zip((from_compressed, from_selected, from_window), gates.split(1, dim=-1), strict=True)
    return join_streams(sum(branch * gate for branch, gate in branches), batch)
