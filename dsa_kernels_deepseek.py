"""Triton kernels for DeepSeek Sparse Attention (DSA, arXiv:2512.02556): `dsa_deepseek.py` without gradients on a GPU.

The indexer's scores, summed over its heads while the products are in registers, and absorbed MLA over the selected
latents, read in place of being gathered. For prefill and decoding; training keeps the PyTorch functions.

Shape letters: B batch, C queries of a chunk, T keys, n keys that a query reads, H heads, D width.

Proven in Triton's interpreter (tests/kernels), on a CPU: results equal those of `dsa_deepseek.py`. Compiled by Triton
for compute capabilities 8.0 and 9.0. Run and timed on no GPU; tile sizes are guesses.
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

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs comes without Triton
    triton = tl = None

_INDEX_QUERIES = 16  # queries that one program scores against its keys
_INDEX_KEYS = 64  # keys of a tile
_LATENT_KEYS = {2: 32, 4: 16}  # latents of a tile, by the bytes of a number: they are wide
_LATENT_HEADS = 16  # heads of a program: a row of the sum is as wide as a latent


@kernel
def _index_scores(
    query, weights, key, scores, num_queries, num_keys, key_row, key_token,
    NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program: QUERIES queries of a row, one after another with all their heads, against KEYS keys."""
    batch = tl.program_id(2).to(tl.int64)
    tokens = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    k = load_tile(key + batch * key_row, tokens, tokens < num_keys, key_token, WIDTH, PADDED)
    head = tl.arange(0, HEADS)
    first = tl.program_id(1) * QUERIES
    for place in range(first, tl.minimum(first + QUERIES, num_queries)):
        rows = (batch * num_queries + place) * NUM_HEADS + head
        q = load_tile(query, rows, head < NUM_HEADS, WIDTH, WIDTH, PADDED)
        weight = tl.load(weights + rows, mask=head < NUM_HEADS, other=0.0)
        result = tl.sum(tl.maximum(product(q, tl.trans(k)), 0.0) * weight[:, None], 0)  # [KEYS]
        tl.store(scores + (batch * num_queries + place) * num_keys + tokens, result, mask=tokens < num_keys)


@on_its_gpu
def index_scores(query: torch.Tensor, weights: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """query [B, C, H, D], weights float32 [B, C, H], key [B, T, D] -> float32 [B, C, T]; no gradient"""
    query, weights, key = query.contiguous(), weights.contiguous(), dense_rows(key)
    batch, length, heads, width = query.shape
    num_keys = key.shape[1]
    scores = torch.empty(batch, length, num_keys, dtype=torch.float32, device=query.device)
    _index_scores[triton.cdiv(num_keys, _INDEX_KEYS), triton.cdiv(length, _INDEX_QUERIES), batch](
        *(query, weights, key, scores, length, num_keys, *key.stride()[:2], heads, width, padded_width(key)),
        *(power_of_two(heads, least=16), _INDEX_QUERIES, _INDEX_KEYS),
    )
    return scores


@kernel
def _selected_latents(
    q_latent, q_rope, latent, k_rope, chosen, output,
    num_queries, num_chosen, latent_row, latent_token, rope_row, rope_token,
    NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROPE: tl.constexpr,
    ROPE_PADDED: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program: HEADS heads of a query over the latents chosen for it, which are keys and values."""
    batch, place = tl.program_id(2).to(tl.int64), tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    exists, number = head < NUM_HEADS, batch * num_queries + place  # of the query
    rows = number * NUM_HEADS + head
    content = load_tile(q_latent, rows, exists, WIDTH, WIDTH, PADDED)
    rope = load_tile(q_rope, rows, exists, ROPE, ROPE, ROPE_PADDED)
    maximum = tl.full([HEADS], -1.0e30, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    mixed = tl.zeros([HEADS, PADDED], tl.float32)
    for tile in range(0, num_chosen, KEYS):
        places = tile + tl.arange(0, KEYS)
        slots = tl.load(chosen + number * num_chosen + places, mask=places < num_chosen, other=-1)
        k = load_tile(latent + batch * latent_row, slots, slots >= 0, latent_token, WIDTH, PADDED)
        turned = load_tile(k_rope + batch * rope_row, slots, slots >= 0, rope_token, ROPE, ROPE_PADDED)
        scores = product(content, tl.trans(k)) + product(rope, tl.trans(turned))
        scores = tl.where((slots >= 0)[None, :], scores, float("-inf"))
        maximum, total, mixed = take_in(scores, k, maximum, total, mixed)
    mixed, _ = finish(maximum, total, mixed)
    store_tile(output, rows, exists, mixed, WIDTH, PADDED)


@on_its_gpu
def attend_chosen_latents(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    up_projections: tuple[torch.Tensor, torch.Tensor],
    chosen: torch.Tensor,
) -> torch.Tensor:
    """Absorbed MLA of some queries over the latents chosen for each; no gradient.

    Args:
        q_nope: [B, H, C, Dn] and q_rope: [B, H, C, Dr], already scaled.
        latent, k_rope: [B, T, width], of all tokens.
        up_projections: W_UK [H, Dn, width of the latent] and W_UV [H, Dv, width].
        chosen: int64 [B, C, n], slots; -1 stands for none.

    Returns:
        [B, C, H, Dv], zero for a query that chose nothing.
    """
    w_uk, w_uv = up_projections
    q_latent = (q_nope @ w_uk).transpose(1, 2).contiguous()  # [B, C, H, width]
    q_rope, chosen = q_rope.transpose(1, 2).contiguous(), chosen.contiguous()
    latent, k_rope = dense_rows(latent), dense_rows(k_rope)
    batch, length, heads, width = q_latent.shape
    mixed = torch.empty_like(q_latent)
    _selected_latents[length, triton.cdiv(heads, _LATENT_HEADS), batch](
        *(q_latent, q_rope, latent, k_rope, chosen, mixed, length, chosen.shape[-1]),
        *(*latent.stride()[:2], *k_rope.stride()[:2], heads, width, padded_width(latent)),
        *(q_rope.shape[-1], padded_width(k_rope), _LATENT_HEADS, _LATENT_KEYS[latent.element_size()]),
    )
    return (mixed.transpose(1, 2) @ w_uv.transpose(1, 2)).transpose(1, 2)
