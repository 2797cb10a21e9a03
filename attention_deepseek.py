"""What a kind of attention is: everything that the model, its caches and its generation ask about it.

Each kind is a subclass of `DeepseekAttention` in a file of its own: gqa_deepseek.py, mla_deepseek.py, dsa_deepseek.py,
nsa_deepseek.py. `config.attention_kinds` names one for each layer. Nothing outside these files asks for a kind by its name:

    module               `forward`
    what queries may see `view`, made once a forward for all layers of the kind
    cache                `make_cache_layer`
    facts                `supports`, looked up by `require`
    other software       `adapters` (modules that LoRA may name), `paged_view`; the styles of tensor parallelism stand where
                         transformers looks for them, in the configuration

Below it stand plain attention and the arithmetic of masks, which several kinds use.

Shape letters: B batch, S new tokens, T all tokens in view (past and new), H query heads, K key/value heads, D head width.
"""

import copy
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from .cache_deepseek import GrowingLayer
from .compat_deepseek import create_causal_mask

# Capabilities of a kind of attention. They depend on the code, not on the machine.
STATIC_CACHE = "a static cache"  # buffers of a fixed length, as compiled decoding wants them
INT8_CACHE = "an int8 cache"
PAGED_CACHE = "a paged cache"  # transformers' continuous batching: pages of keys and values, and nothing else
LIBRARY_CACHE = "transformers' offloaded and quantised caches"  # they, too, hold keys and values and nothing else
COMPILED_STEP = "compiled decoding"  # what a step does follows from shapes alone
GAPS = "hidden slots between tokens"  # as drafts leave them in a batch


class AttentionInput(NamedTuple):
    """What is known about the tokens of one forward pass, before any layer runs."""

    embeds: torch.Tensor  # [B, S, hidden_size]; masks follow its shape, dtype and device
    attention_mask: torch.Tensor | None  # as the user gave it
    position_ids: torch.Tensor  # [B or 1, S]
    past_key_values: Cache | None
    past_length: int | torch.Tensor  # tokens in the cache; a tensor for static caches
    learns: bool = False  # some layer's indexer is being trained

    @property
    def length(self) -> int:
        """S, the number of new tokens."""
        return self.embeds.shape[1]

    @property
    def is_first(self) -> bool:
        """Whether it is known that no token came before. A compiled step over a static cache cannot look at its length."""
        if self.past_key_values is None:
            return True
        return not torch.compiler.is_compiling() and int(self.past_length) == 0

    @property
    def sees_all(self) -> bool:
        """Whether it is known without a mask that nothing is hidden: one new token, no padding, no slots to come."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False  # what is recorded must hold for other values too
        if self.length > 1 or isinstance(self.past_length, torch.Tensor):
            return False
        return self.attention_mask is None or (self.attention_mask.ndim == 2 and bool(self.attention_mask.all()))


class View(NamedTuple):
    """What the queries of one kind of attention may see."""

    mask: object  # in the form that the kind's `forward` takes
    has_past: bool  # the cache holds tokens from before, which are to be attended to


class DeepseekAttention(nn.Module):
    """One attention layer; a subclass is one kind of attention.

    Attributes:
        title: what the kind is called in messages.
        supports: the facts above that hold for it.
        adapters: names of the projections that LoRA adapts where it is told "attention".
        float32: names of submodules whose weights are float32 in a loaded model, whatever its dtype.
        unquantised: of these, Linear layers that quantisers must leave alone.
    """

    title: str
    supports: frozenset[str] = frozenset()
    adapters: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    unquantised: tuple[str, ...] = ()
    num_key_value_groups: (
        int  # query heads that share a key/value head, once keys and values are as attention takes them
    )

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True

    @classmethod
    def view(cls, config, tokens: AttentionInput) -> View:
        """What the tokens may see, for all layers of this kind."""
        raise NotImplementedError

    @classmethod
    def mask_for_generation(cls, config, attention_mask: torch.Tensor | None, past_key_values: Cache | None, **kwargs):
        """What `generate` prepares outside a compiled step and hands to `forward` as `attention_mask`: the mask itself,
        unless the kind can do with one that is made ahead. `kwargs` are those of `create_causal_mask`."""
        return attention_mask

    @classmethod
    def paged_view(cls, config):
        """The config by which transformers lays out pages for continuous batching."""
        return config

    @classmethod
    def make_cache_layer(cls, config) -> GrowingLayer:
        """An empty cache layer with room for what a layer of this kind keeps of a token."""
        return GrowingLayer()

    def learns(self) -> bool:
        """Whether `forward` gives a loss of its own in training."""
        return False


def require(kinds: Iterable[type[DeepseekAttention]], fact: str, what: str, remedy: str) -> None:
    """
    Args:
        kinds: of a model's layers.
        fact: one of the facts above.
        what: what the user asked for, at the beginning of the message.
        remedy: sentences for its end.

    Raises:
        ValueError: a layer's attention does not support it.
    """
    for kind in kinds:
        if fact not in kind.supports:
            raise ValueError(f"{what}, but {kind.title} does not go with {fact}. {remedy}")


def eager_attention_forward(
    module: DeepseekAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention, for reference and for attention maps.

    Args:
        query: [B, H, S, D]; key: [B, K, T, D]; value: [B, K, T, Dv].
        attention_mask: float [B, 1, S, T], added to the scores; None where nothing is hidden.

    Returns:
        output [B, S, H, Dv] and probabilities [B, H, S, T].
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)  # [B, H, T, D]
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)  # [B, H, T, Dv]
    scores = apply_mask(query @ key.transpose(-1, -2) * scaling, attention_mask)  # [B, H, S, T]
    probs = softmax(scores).to(query.dtype)
    probs = F.dropout(probs, p=dropout, training=module.training)
    return (probs @ value).transpose(1, 2).contiguous(), probs  # [B, S, H, Dv]


def apply_mask(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The scores, with masked ones set to the dtype's smallest number, so that a row without visible keys stays
    finite.

    Args:
        mask: bool (false is hidden) or float (added); None hides nothing.
    """
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    # in float16 a negative score and the smallest number would be -inf
    return scores.to(wider(scores.dtype)) + mask


def softmax(scores: torch.Tensor) -> torch.Tensor:
    """Over the last dimension, in float32; in float64 if the scores are, whose smallest number is -inf in float32."""
    return scores.softmax(dim=-1, dtype=wider(scores.dtype))


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which attention accumulates: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def plain_mask_config(config):
    """A config for which transformers makes masks as bool tensors [B, 1, S, T], whatever the kernel."""
    config = copy.copy(config)
    config._attn_implementation_internal = "sdpa"
    return config


def make_causal_mask(config, tokens: AttentionInput, past_key_values: Cache | None):
    """transformers' causal mask for the tokens, in the form of the config's attention implementation."""
    return create_causal_mask(
        config=config,
        attention_mask=tokens.attention_mask,
        past_key_values=past_key_values,
        inputs_embeds=tokens.embeds,
        position_ids=tokens.position_ids,
    )
