"""What a forward pass adds to the loss: what layers return besides their states, targets further ahead, shares of a step.

The losses themselves stand where their terms are made: `sequence_balance_loss` in moe_deepseek.py, `index_loss` in
dsa_deepseek.py; cross entropy is transformers' `loss_function`.

Shape letters: B batch, S tokens, E experts.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class LayerOutput(NamedTuple):
    """What a decoder layer returns. Flat, since reentrant gradient checkpointing tracks no tensors further inside."""

    hidden_states: torch.Tensor  # [B, S, hidden_size]
    balance_loss: torch.Tensor | None = None  # in training, of layers with experts and `aux_loss_alpha`
    load: torch.Tensor | None = None  # float32 [E], in training, tokens per expert
    index_loss: torch.Tensor | None = None  # in training, of an indexer that learns


class LayerNotes:
    """Sums what the layers of one pass add to the loss, and counts each router's load.

    What a layer returns is known from the settings. Testing for None would mislead tracers, which replace every
    result of a layer by a proxy.

    Args:
        training: the layers are in training mode, and those with experts return their load and, with `aux_loss_alpha`, a
            balance loss.
    """

    def __init__(self, training: bool):
        self.training = training
        self._balance: list[torch.Tensor | None] = []
        self._index: list[torch.Tensor | None] = []

    def take(self, layer: Any, output: LayerOutput) -> torch.Tensor:
        """Records what `layer` returned beside its states, and returns the states."""
        hidden_states, balance_loss, load, index_loss = output
        if self.training and layer.is_sparse:
            layer.mlp.count_load(load)
            self._balance += [balance_loss] if layer.mlp.aux_loss_alpha else []
        self._index += [index_loss] if self.training and layer.self_attn.learns() else []
        return hidden_states

    @property
    def aux_loss(self) -> torch.Tensor | None:
        """The sum of the layers' balance losses, without `aux_loss_alpha`; None if there are none."""
        return sum_losses(self._balance)

    @property
    def index_loss(self) -> torch.Tensor | None:
        """The sum of the layers' indexer losses, without `index_loss_weight`; None if there are none."""
        return sum_losses(self._index)


def sum_losses(losses: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    """Their sum on the device of the first, without those that are None; None if nothing is left."""
    total = None
    for loss in losses:
        if loss is not None:
            total = loss if total is None else total + loss.to(total.device)
    return total


def further_targets(labels: torch.Tensor, position_ids: torch.Tensor | None, k: int) -> torch.Tensor:
    """What multi-token-prediction module k, counted from 1, is to predict at each place: token t + k + 1 at place t.

    Args:
        labels: int64 [B, S], not shifted.
        position_ids: int64 [B or 1, S] or None. Where the token ahead is of another document of a packed row, there is
            nothing to predict.

    Returns:
        int64 [B, S], -100 where there is nothing to predict.
    """
    targets = F.pad(labels[:, k + 1 :], (0, k + 1), value=-100)
    return targets if position_ids is None else targets.masked_fill(~_has_ahead(position_ids, k + 1), -100)


def places_with_further(
    k: int, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, token_mask: torch.Tensor | None
) -> torch.Tensor:
    """At which places t there is a token t + k of the same document, which multi-token-prediction module k reads there.

    Args:
        inputs_embeds: [B, S, hidden_size]; only its shape matters.
        position_ids: int64 [B or 1, S], which go up by one within a document.
        token_mask: bool [B, S], which tokens are real; None: all.

    Returns:
        bool [B, S]
    """
    found = _has_ahead(position_ids, k)  # [B or 1, S]
    if token_mask is not None:
        found = found & token_mask & token_mask.roll(-k, dims=1)
    return found.expand(len(inputs_embeds), -1)


def _has_ahead(position_ids: torch.Tensor, count: int) -> torch.Tensor:
    """Whether the token `count` places on is there and of the same document. [B or 1, S] -> bool, the same shape"""
    length = position_ids.shape[1]
    inside = torch.arange(length, device=position_ids.device) < length - count  # [S]
    return inside & (position_ids.roll(-count, dims=1) == position_ids + count)


def share_of_step(targets: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | float:
    """These targets as a share of those of the optimizer step, over micro-batches and processes; 1 for a whole step.

    Losses that are means over their micro-batch count by it, so that accumulated ones are the mean over the step.
    """
    if num_items_in_batch is None:
        return 1.0
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(targets.device)
    return (targets != -100).sum() / num_items_in_batch
