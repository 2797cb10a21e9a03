"""Which tokens a query may see: documents of a packed row, padding, and a cache's past.

Attention that needs documents in one piece (NSA, which counts blocks from a document's first token) takes them as `Span`s;
attention that only must not see others' tokens (DSA) takes `VisibleTokens`. Neither forms a mask of queries x keys.

Shape letters: B batch, S queries, C queries of a chunk, T slots of past and new tokens, n of these slots.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Span(NamedTuple):
    """A document: the slots start .. stop - 1 of a row."""

    row: int
    start: int
    stop: int


def check_token_mask(attention_mask: torch.Tensor, total: int, kind: str = "") -> None:
    """
    Args:
        total: T, the tokens of the cache and the new ones.
        kind: of attention, for the message, such as "with NSA ".

    Raises:
        ValueError: the mask is not one of tokens and padding, [B, T], or leaves tokens out, such as those of the cache.
    """
    if attention_mask.ndim != 2 or attention_mask.shape[1] < total:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}; {kind}it must be [batch, tokens], here {total} tokens "
            "(the cache's counted), 1 for tokens and 0 for padding."
        )


def find_documents(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor, past_length: int, has_cache: bool
) -> list[Span] | None:
    """Where a batch's documents lie, in order; None if every row is one document from its first slot to its last.

    Args:
        attention_mask: [B, past_length + S], 1 for tokens and 0 for padding. None: no padding; then, without a cache,
            a document begins wherever the positions do not go on by one.
        position_ids: int64 [B or 1, S].
        past_length: tokens in the cache.

    Raises:
        ValueError: the mask has another shape, or padding between the tokens of a row.
    """
    length = past_length + position_ids.shape[1]
    if attention_mask is None:
        if has_cache or bool((position_ids.diff(dim=1) == 1).all()):
            return None
        spans = []
        for row, positions in enumerate(position_ids):
            begins = [0, *((positions.diff() != 1).nonzero().flatten() + 1).tolist(), length]
            spans += [Span(row, *bounds) for bounds in pairwise(begins)]
        return spans

    check_token_mask(attention_mask, length, "with NSA ")
    mask = attention_mask[:, :length].bool()
    if bool(mask.all()):
        return None
    counts = mask.sum(dim=1).tolist()
    starts = mask.int().argmax(dim=1).tolist()
    stops = (length - mask.flip(1).int().argmax(dim=1)).tolist()
    spans = [Span(row, starts[row], stops[row]) for row in range(len(counts)) if counts[row]]
    for span in spans:
        if span.stop - span.start != counts[span.row]:
            raise ValueError(
                f"`attention_mask` has padding between the tokens of row {span.row}; NSA counts blocks from a row's "
                "first token, so padding may only stand before or behind all of them. Pad on the left to generate."
            )
    return spans


def split_documents(states: torch.Tensor, spans: list[Span]) -> list[torch.Tensor]:
    """[B, heads, L, D] -> the documents, [1, heads, length, D] each. By one split, whose gradient is one cat."""
    batch, _, length, _ = states.shape
    tokens = states.transpose(1, 2).flatten(0, 1)  # [B * L, heads, D]
    pieces = tokens.split(_alternating_lengths(spans, batch, length))
    return [piece.transpose(0, 1)[None] for piece in pieces[1::2]]


def join_documents(outputs: list[torch.Tensor], spans: list[Span], like: torch.Tensor) -> torch.Tensor:
    """The inverse of `split_documents`, of the shape [B, heads, L, D] of `like`; zeros where there is no document."""
    batch, heads, length, width = like.shape
    pieces = [like.new_zeros(gap, heads, width) for gap in _alternating_lengths(spans, batch, length)[0::2]]
    for i, output in enumerate(outputs):
        pieces.insert(2 * i + 1, output[0].transpose(0, 1))  # [length, heads, D]
    return torch.cat(pieces).view(batch, length, heads, width).transpose(1, 2)


def _alternating_lengths(spans: list[Span], batch: int, length: int) -> list[int]:
    """gap, document, gap, ..., document, gap: in slots of the flattened batch."""
    bounds = [0, *(row * length + slot for row, *ends in spans for slot in ends), batch * length]
    return [stop - start for start, stop in pairwise(bounds)]


class VisibleTokens(NamedTuple):
    """Which of T slots S new queries, in the last S slots, may see: their document's tokens up to themselves."""

    total: int  # T
    tokens: torch.Tensor | None  # bool [B, T], false for padding; None if there is none
    first: torch.Tensor | None  # int64 [B or 1, S], where each query's document begins; None if at slot 0

    def mask(self, queries: slice, keys: slice, length: int, device) -> torch.Tensor:
        """bool [B or 1, C, n] for some of the S = `length` queries and some of the slots."""
        slots = torch.arange(self.total - length, self.total, device=device)[queries, None]  # [C, 1]
        keys_slots = torch.arange(self.total, device=device)[keys]  # [n]
        mask = (keys_slots <= slots)[None]
        if self.first is not None:
            mask = mask & (keys_slots >= self.first[:, queries, None])
        return mask if self.tokens is None else mask & self.tokens[:, None, keys]


def find_visible_tokens(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor, past_length: int, has_cache: bool
) -> VisibleTokens:
    """As `find_documents`, for attention that needs no contiguous documents.

    Raises:
        ValueError: the mask is not one of tokens and padding.
    """
    length = position_ids.shape[1]
    total = past_length + length
    if attention_mask is not None:
        check_token_mask(attention_mask, total, "with an indexer ")
        return VisibleTokens(total, attention_mask[:, :total].bool(), None)
    if has_cache:
        return VisibleTokens(total, None, None)
    begins = F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True)  # [B or 1, S]
    slots = torch.arange(length, device=position_ids.device)
    return VisibleTokens(total, None, (slots * begins).cummax(dim=1).values)


def restarts(position_ids: torch.Tensor | None) -> bool:
    """Whether positions [B or 1, S] do not go on by one somewhere: several documents in a row. Compilers cannot look."""
    if position_ids is None or position_ids.shape[-1] == 1 or torch.compiler.is_compiling():
        return False
    return bool((position_ids.diff(dim=-1) != 1).any())
