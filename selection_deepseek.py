"""What sparse attention shares once it has scores: an order without ties, top-k by it, and the gathering of what is chosen.

Shape letters: B batch, S queries, T keys, n keys that a query reads, D width of a head; for grouped heads N = B * K streams,
K key/value heads, G query heads that share one.
"""

import torch
import torch.nn.functional as F

_LOWEST_RANK = -0x7F800000 << 32  # of the lowest finite score; -inf ranks below


def rank_places(scores: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Scores of the places first, first + 1, ... as numbers that sort like them, and where they are equal by the place.

    `topk` chooses among equal scores as its shapes have it, so that a text alone and in a batch, whole and in chunks
    would be read differently. Index scores are sums of ReLUs and often equal, at 0. Here the later place is greater. The
    upper half of a rank is the score's bits, in an order of whole numbers; the lower half is the place.

    Args:
        scores: [..., n], float32 or, under autocast, of 16 bits; -inf stands for a place that may not be chosen, NaN counts as +inf.

    Returns:
        int64 [..., n], all different. `topk` sorts them as fast as the scores.
    """
    infinity = float("inf")
    scores = scores.float().nan_to_num(nan=infinity, posinf=infinity, neginf=-infinity) + 0.0  # -0 becomes 0
    bits = scores.view(torch.int32)
    bits = bits.bitwise_xor_((bits >> 31) & 0x7FFFFFFF)  # of negative numbers the order is the reverse
    places = torch.arange(first, first + scores.shape[-1], device=scores.device)
    return bits.long().bitwise_left_shift_(32).bitwise_or_(places)


def ranked_places(ranks: torch.Tensor) -> torch.Tensor:
    """The places of `rank_places`, int64; -1 where the score was -inf."""
    return (ranks & 0xFFFFFFFF).masked_fill_(ranks < _LOWEST_RANK, -1)


def best_blocks(importance: torch.Tensor, num_select: int) -> torch.Tensor:
    """The selection blocks of the highest importance; of equally important ones the later.

    Blocks of equal text are equally important, but what is computed differs by rounding, as shapes have it. So numbers
    are compared in bfloat16.

    Args:
        importance: float32 [..., blocks], -inf for blocks that may not be selected.

    Returns:
        int64 [..., num_select] in no order; -1 fills up where fewer blocks exist.
    """
    num_best = min(num_select, importance.shape[-1])
    ranks = rank_places(importance.bfloat16().float())
    blocks = ranked_places(ranks.topk(num_best, dim=-1, sorted=False).values)
    return F.pad(blocks, (0, num_select - num_best), value=-1)


def gather_tokens(states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """states [B, T, D], slots int64 [B, C, n], -1 for none (which gives slot 0) -> [B, C, n, D]"""
    batch, length, _ = states.shape
    rows = slots.clamp(min=0) + length * torch.arange(batch, device=slots.device)[:, None, None]
    return states.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, slots.shape)


def split_streams(states: torch.Tensor, num_key_value_heads: int) -> torch.Tensor:
    """[B, H, S, D] -> [N, S, G, D], the query heads by the key/value head that they share"""
    return states.unflatten(1, (num_key_value_heads, -1)).transpose(2, 3).flatten(0, 1)


def join_streams(states: torch.Tensor, batch: int) -> torch.Tensor:
    """[N, S, G, D] -> [B, H, S, D], the inverse of `split_streams`"""
    return states.unflatten(0, (batch, -1)).transpose(2, 3).flatten(1, 2)
