"""Grouped-query attention: DeepSeek-LLM (arXiv:2401.02954) and DeepSeekMoE (arXiv:2401.06066).

Shape letters: B batch, S new tokens, T all tokens in view (past and new), H query heads, K key/value heads, D head width.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_deepseek import (
    COMPILED_STEP,
    GAPS,
    INT8_CACHE,
    LIBRARY_CACHE,
    PAGED_CACHE,
    STATIC_CACHE,
    AttentionInput,
    DeepseekAttention,
    View,
    eager_attention_forward,
    make_causal_mask,
)
from .compat_deepseek import create_masks_for_generate, update_paged_cache
from .layers_deepseek import apply_rotary
from .linear_deepseek import project


class DeepseekGQA(DeepseekAttention):
    """Grouped-query attention with half-split RoPE."""

    title = "grouped-query attention"
    supports = frozenset({STATIC_CACHE, INT8_CACHE, PAGED_CACHE, LIBRARY_CACHE, COMPILED_STEP, GAPS})
    adapters = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=bias)

    @classmethod
    def view(cls, config, tokens: AttentionInput) -> View:
        """The mask of the attention interface, over the past too: there is one form for everything."""
        return View(make_causal_mask(config, tokens, tokens.past_key_values), has_past=True)

    @classmethod
    def mask_for_generation(cls, config, attention_mask, past_key_values, **kwargs):
        """transformers' own."""
        return create_masks_for_generate(
            config=config, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """hidden_states [B, S, hidden_size] -> the same shape, probabilities [B, H, S, T] where the kernel has them, and
        no index loss"""
        heads = (*hidden_states.shape[:2], -1, self.head_dim)
        query = project(self.q_proj, hidden_states).view(heads).transpose(1, 2)  # [B, H, S, D]
        key = project(self.k_proj, hidden_states).view(heads).transpose(1, 2)  # [B, K, S, D]
        value = project(self.v_proj, hidden_states).view(heads).transpose(1, 2)  # [B, K, S, D]
        query, key = (apply_rotary(states, *position_embeddings, layout="half") for states in (query, key))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # [B, K, T, D]
        key, value = update_paged_cache(key, value, self.layer_idx, kwargs)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, probs = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = output.reshape(*hidden_states.shape[:2], -1)  # vLLM's comes as [B * S, H * D]
        return project(self.o_proj, output), probs, None
