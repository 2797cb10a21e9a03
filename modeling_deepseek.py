"""DeepSeek language models: dense GQA (DeepSeek-LLM), DeepSeekMoE, and MLA with MoE (V2, V3, R1, V3.2).

Read from top to bottom: GQA, MLA, the decoder layer, the multi-token-prediction module, the model, its heads.

    attention    ATTENTION_CLASSES[config.attention_kind]: "gqa", "mla", or "nsa" (nsa_deepseek.py)
    MLP          config.mlp_layer_types[i]: DeepseekMLP or DeepseekMoE (moe_deepseek.py, where the routers are)
    kernels      transformers' attention interface (`attn_implementation`) and, for the experts of moe_deepseek.py,
                 its @use_experts_implementation (`experts_implementation`)

Papers: DeepSeek-LLM (arXiv:2401.02954), DeepSeekMoE (arXiv:2401.06066), DeepSeek-V2 (arXiv:2405.04434),
DeepSeek-V3 (arXiv:2412.19437).

Shape letters: B batch, S new tokens, T all tokens in view (past and new), H query heads, K key/value heads, D head
width; for MLA Dn / Dr / Dv the widths of a head without and with position and of its value, C the latent width.
"""

import copy
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .cache_deepseek import (
    PAGED_CACHE_SIZES,
    GrowingLayer,
    IndexedLayer,
    LatentLayer,
    NSACacheLayer,
    size_paged_cache,
    use_growing_layers,
)
from .compat_deepseek import (
    HAS_PAGED_CACHE,
    cache_field,
    create_causal_mask,
    create_masks_for_generate,
    model_output,
    takes_cache_by_either_name,
    update_paged_cache,
)
from .configuration_deepseek import DeepseekConfig
from .dsa_deepseek import LightningIndexer, VisibleTokens, find_visible_tokens, selected_latent_attention
from .dsa_kernels_deepseek import index_scores  # noqa: F401  older loaders copy only what this file names
from .generation_deepseek import DeepseekGenerationMixin
from .layers_deepseek import DeepseekMLP, DeepseekRMSNorm, DeepseekRotaryEmbedding, apply_rotary, yarn_softmax_factor
from .loading_deepseek import (
    HUB_ARGUMENTS,
    CheckpointFiles,
    check_generation_config,
    default_dtype,
    dequantised_state_dict,
    explain_loading_error,
    hardware_has_fp8,
    ignored_mtp_keys,
    is_quantised,
    keep_unscaled_layers,
    one_tensor_at_a_time,
    pop_block_fp8,
    register_expert_conversion,
)
from .moe_deepseek import DeepseekExperts, DeepseekMoE, DeepseekRouter, update_router_bias
from .nsa_deepseek import BlockCompressor, DeepseekNSA, find_documents
from .nsa_kernels_deepseek import kernels_run_on  # noqa: F401  as above
from .prefix_deepseek import Prefix  # noqa: F401 (older loaders copy only what this file names)

logger = logging.get_logger(__name__)

_BLOCK_BYTES = 64 * 2**20  # scores held at once while a long past is expanded block by block
_PART_PRODUCTS = 2**19  # multiplications of a query with its keys that are worth a thread


# ---------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------


def eager_attention_forward(
    module: nn.Module,
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
    scores = _masked(query @ key.transpose(-1, -2) * scaling, attention_mask)  # [B, H, S, T]
    probs = _softmax(scores).to(query.dtype)
    probs = F.dropout(probs, p=dropout, training=module.training)
    return (probs @ value).transpose(1, 2).contiguous(), probs  # [B, S, H, Dv]


def _masked(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Hides what a mask hides: bool (false is hidden) or float (added). A row that hides all stays finite."""
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    # in float16 a negative score and the smallest number would be -inf
    return scores.to(_wider(scores.dtype)) + mask


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    """Over the last dimension, in float32 or, where scores are float64, in that: its smallest number is -inf in float32."""
    return scores.softmax(dim=-1, dtype=_wider(scores.dtype))


def _wider(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for itself: what attention is summed in."""
    return torch.promote_types(dtype, torch.float32)


class DeepseekAttention(nn.Module):
    """Grouped-query attention with half-split RoPE: DeepSeek-LLM and DeepSeekMoE."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=bias)

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
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)  # [B, H, S, D]
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)  # [B, K, S, D]
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)  # [B, K, S, D]
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
        return self.o_proj(output), probs, None


class DeepseekMLA(nn.Module):
    """Multi-head latent attention, DeepSeek-V2 eq. 9-19 and V3 eq. 1-11.

        c_t = norm(W_DKV h_t)                       latent [C], cached
        k^R_t = RoPE(W_KR h_t)                      key part with position, shared by the heads [Dr], cached
        k^C_t, v_t = W_UK c_t, W_UV c_t             each head's key part without position [Dn], and its value [Dv]
        q^C_t, q^R_t                                likewise, from h_t or from a query latent of width q_lora_rank
        scores = (q^C k^C + q^R k^R) * scaling

    The cache holds C + Dr numbers a token, in the cache's `keys` (latent) and `values` (rotated key). Three forms of
    the same attention, tested equal:

        expanded   keys and values of the heads from the latents, then the attention interface. For new tokens that
                   have no past in a cache (training, a first prompt).
        absorbed   q^C W_UK against the latents, probabilities against the latents, then W_UV: the past is read once
                   and never expanded. For few new tokens over a cached past.
        blockwise  the past expanded one block at a time, joined by online softmax, so memory stays bounded.
                   For many new tokens over a cached past (prefill in chunks).

    Absorbed costs 2 (2C + Dr) operations for each head, query and key; expanding costs 2 (Dn + Dr + Dv) and, once
    for each key, 2 C (Dn + Dv). Absorbed is cheaper as long as S <= `max_absorbed_tokens`.

    With `index_topk` (V3.2) an indexer selects that many tokens for each query, and only they are attended to, in
    absorbed form; as long as there are no more tokens than that, all the above applies.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.q_lora_rank = config.q_lora_rank
        self.kv_lora_rank = config.kv_lora_rank
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.v_head_dim = config.v_head_dim
        self.qk_head_dim = config.qk_head_dim
        self.num_key_value_groups = 1  # after expansion each query head has its own key and value
        self.scaling = self.qk_head_dim**-0.5 * yarn_softmax_factor(config.rope_parameters)
        self.attention_dropout = config.attention_dropout
        self.rope_layout = "interleaved" if config.rope_interleave else "half"
        self.is_causal = True
        expanded_width = self.qk_nope_head_dim + self.v_head_dim
        saved = 2 * self.kv_lora_rank - expanded_width  # by expansion, for each query and key
        self.max_absorbed_tokens = self.kv_lora_rank * expanded_width // saved if saved > 0 else float("inf")

        heads, bias = config.num_attention_heads, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, heads * self.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = DeepseekRMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * self.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, self.kv_lora_rank + self.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = DeepseekRMSNorm(self.kv_lora_rank)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, heads * expanded_width, bias=False)
        self.indexer = LightningIndexer(config) if config.has_indexer else None
        self.o_proj = nn.Linear(heads * self.v_head_dim, config.hidden_size, bias=bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        has_past: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states: [B, S, hidden_size].
            position_embeddings: cos, sin, each float32 [B, S, Dr/2].
            attention_mask: what the attention interface takes, for S new tokens; with a past, a mask [B, 1, S, T],
                bool (false is hidden) or float (added), or None where nothing is hidden.
                `VisibleTokens` ask for attention to selected tokens.
            has_past: whether the cache holds tokens from before.

        Returns:
            [B, S, hidden_size], probabilities [B, H, S, T] where they exist, and in training the indexer's loss.
        """
        query_input = hidden_states  # [B, S, hidden_size or q_lora_rank]
        if self.q_lora_rank is not None:
            query_input = self.q_a_layernorm(self.q_a_proj(hidden_states))
        q_nope, q_rope = self._queries(query_input)
        latent, k_rope = self._latents(hidden_states)
        with_position = torch.cat((q_rope, k_rope), dim=1)  # [B, H + 1, S, Dr]
        with_position = apply_rotary(with_position, *position_embeddings, layout=self.rope_layout)
        q_rope, k_rope = with_position[:, :-1], with_position[:, -1:]  # [B, H, S, Dr], [B, 1, S, Dr]
        all_latent, all_k_rope, cache_layer = latent, k_rope, None
        if past_key_values is not None:
            all_latent, all_k_rope = past_key_values.update(
                latent, k_rope, self.layer_idx
            )  # [B, 1, T, C], [B, 1, T, Dr]
            cache_layer = past_key_values.layers[self.layer_idx]
            if not has_past and hasattr(cache_layer, "kv_b_weight"):
                del cache_layer.kv_b_weight  # see _kv_b_weight: a new text begins
        if self.indexer is not None:
            # detached: the index loss teaches the indexer and nothing else
            index_states = self.indexer(hidden_states.detach(), query_input.detach(), position_embeddings)
            index_key = index_states.key  # [B, S, index_head_dim]
            if past_key_values is not None:
                index_key = cache_layer.update_indexer(index_key)  # [B, T, index_head_dim]

        index_loss = None
        if "cache" in kwargs:
            output, probs = self._paged(q_nope, q_rope, latent, k_rope, attention_mask, **kwargs)
        elif isinstance(attention_mask, VisibleTokens):
            if kwargs.get("output_attentions", self.config.output_attentions):
                raise ValueError(
                    f"`output_attentions` is set, and there are no attention maps where `index_topk` tokens are selected. "
                    f"Leave it out, or give at most {self.config.index_topk} tokens to a model with "
                    "attn_implementation='eager'."
                )
            weight = self._kv_b_weight(latent, cache_layer)
            if weight is None:
                raise ValueError(
                    "Attention to selected tokens (`index_topk`) needs the matrix of `kv_b_proj`, which has a bias, hooks "
                    "or an adapter that is no matrix (LoRA with lora_bias, `adapter_names` in one batch). Leave "
                    "`kv_b_proj` out of the adapter's targets, or run one adapter at a time."
                )
            index = self.indexer, index_states, index_key
            output, index_loss = self._selected(q_nope, q_rope, all_latent, all_k_rope, attention_mask, weight, *index)
            probs = None
        elif not has_past:
            query, key, value = self._expanded(q_nope, q_rope, latent, k_rope)
            # vLLM refuses attention in whose `forward`, as it is written, it does not find this call.
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
            if value.shape[-1] > self.v_head_dim:
                output = output[..., : self.v_head_dim]
        elif hidden_states.shape[1] <= self.max_absorbed_tokens or kwargs.get("output_attentions"):
            weight, entries = self._kv_b_weight(latent, cache_layer), getattr(cache_layer, "entries", None)
            wants_probs = kwargs.get("output_attentions") or torch.is_grad_enabled()
            if weight is None:
                key, value = self._expand(all_latent, all_k_rope)  # [B, H, T, .]
                query = torch.cat((q_nope, q_rope), dim=-1)  # [B, H, S, Dn + Dr]
                output, probs = eager_attention_forward(self, query, key, value, attention_mask, self.scaling)
            else:
                output, probs = self._absorbed(
                    q_nope, q_rope, all_latent, all_k_rope, attention_mask, weight, entries, wants_probs
                )
        else:
            output, probs = self._blockwise(q_nope, q_rope, all_latent, all_k_rope, attention_mask)
        output = output.reshape(*hidden_states.shape[:2], -1)  # vLLM's comes as [B * S, H * Dv]
        return self.o_proj(output), probs, index_loss

    def _queries(self, query_input) -> tuple[torch.Tensor, torch.Tensor]:
        """-> q_nope [B, H, S, Dn], q_rope [B, H, S, Dr], not yet rotated"""
        query = self.q_proj(query_input) if self.q_lora_rank is None else self.q_b_proj(query_input)
        query = query.view(*query_input.shape[:2], -1, self.qk_head_dim).transpose(1, 2)  # [B, H, S, Dn + Dr]
        return query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)

    def _latents(self, hidden_states) -> tuple[torch.Tensor, torch.Tensor]:
        """-> latent [B, 1, S, C], k_rope [B, 1, S, Dr], not yet rotated; the head axis is there for the cache layers"""
        compressed = self.kv_a_proj_with_mqa(hidden_states)[:, None]  # [B, 1, S, C + Dr]
        latent, k_rope = compressed.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        return self.kv_a_layernorm(latent), k_rope

    def _expand(self, latent: torch.Tensor, k_rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, 1, S, C], [B, 1, S, Dr] -> keys [B, H, S, Dn + Dr], values [B, H, S, Dv]"""
        batch, _, length, _ = latent.shape
        expanded = self.kv_b_proj(latent[:, 0]).view(batch, length, -1, self.qk_nope_head_dim + self.v_head_dim)
        k_nope, value = expanded.transpose(1, 2).split(
            [self.qk_nope_head_dim, self.v_head_dim], dim=-1
        )  # [B, H, S, .]
        key = torch.cat((k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1)), dim=-1)
        return key, value

    def _expanded(self, q_nope, q_rope, latent, k_rope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys [B, H, S, Dn + Dr] and values [B, H, S, Dv, or as wide as keys] of S tokens for the kernels"""
        query = torch.cat((q_nope, q_rope), dim=-1)  # [B, H, S, Dn + Dr]
        key, value = self._expand(latent, k_rope)
        implementation = self.config._attn_implementation
        # These kernels want values as wide as keys. (Of sdpa, only the CPU's: it would fall back to one that holds
        # all S x S scores.)
        pad = "flash" in implementation or (implementation == "sdpa" and query.device.type == "cpu")
        if pad and self.v_head_dim < self.qk_head_dim:
            value = F.pad(value, (0, self.qk_head_dim - self.v_head_dim))  # [B, H, S, Dn + Dr]
        return query, key, value

    def _absorbed(self, q_nope, q_rope, latent, k_rope, attention_mask, kv_b_weight, entries=None, wants_probs=True):
        """Attention over latents [B, 1, T, C] and keys [B, 1, T, Dr] as they lie in the cache -> [B, S, H, Dv], probs

        entries: [B, 1, T, C + Dr], both side by side, where the cache holds them so.
        """
        batch, heads, length, _ = q_nope.shape
        w_uk, w_uv = self._up_projections(kv_b_weight)  # [H, Dn, C], [H, Dv, C]
        # All heads read the same keys, so they are rows of one matrix product and the past is read once.
        query = torch.cat((_per_head(q_nope, w_uk), q_rope), dim=-1).flatten(1, 2) * self.scaling  # [B, H * S, C + Dr]
        probs = None
        one_mask = attention_mask is None or length == 1  # for all rows of a query
        if entries is not None and one_mask and query.device.type == "cpu" and not wants_probs:
            mixed = attend_side_by_side(query, entries[:, 0], attention_mask, self.kv_lora_rank)  # [B, H * S, C]
        else:
            if entries is not None:
                scores = query @ entries[:, 0].transpose(1, 2)  # [B, H * S, T]
            else:
                q_latent, q_rope = query.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
                scores = q_latent @ latent[:, 0].transpose(1, 2)  # [B, H * S, T]
                scores.baddbmm_(q_rope, k_rope[:, 0].transpose(1, 2))  # in place: no copy of the scores
            scores = _masked(scores.view(batch, heads, length, -1), attention_mask)  # [B, H, S, T]
            probs = _softmax(scores).to(latent.dtype)
            mixed = probs.flatten(1, 2) @ latent[:, 0]  # [B, H * S, C]
        mixed = mixed.view(batch, heads, length, -1)  # [B, H, S, C]
        return _per_head(mixed, w_uv.transpose(1, 2)).transpose(1, 2), probs  # [B, S, H, Dv]

    def _blockwise(self, q_nope, q_rope, latent, k_rope, attention_mask):
        """As `_absorbed`, by expanding one block of keys at a time -> [B, S, H, Dv], None"""
        query = torch.cat((q_nope, q_rope), dim=-1) * self.scaling  # [B, H, S, Dn + Dr]
        batch, heads, length, _ = query.shape
        block = max(128, _BLOCK_BYTES // (4 * batch * heads * length))
        # Online softmax: the running maximum, sum and output of what has been seen, float32 at least.
        dtype = _wider(query.dtype)
        maximum = query.new_full((batch, heads, length, 1), float("-inf"), dtype=dtype)
        total = torch.zeros_like(maximum)
        output = query.new_zeros(batch, heads, length, self.v_head_dim, dtype=dtype)
        for start in range(0, latent.shape[2], block):
            keys = slice(start, start + block)
            key, value = self._expand(latent[:, :, keys], k_rope[:, :, keys])
            mask = None if attention_mask is None else attention_mask[..., keys]
            scores = _masked((query @ key.transpose(-1, -2)).to(dtype), mask)  # [B, H, S, block]
            new_maximum = torch.maximum(maximum, scores.amax(dim=-1, keepdim=True))
            probs = (scores - new_maximum).exp()
            decay = (maximum - new_maximum).exp()  # [B, H, S, 1]
            total = total * decay + probs.sum(dim=-1, keepdim=True)
            output = output * decay + (probs.to(value.dtype) @ value).to(dtype)
            maximum = new_maximum
        return (output / total).to(q_nope.dtype).transpose(1, 2), None  # [B, S, H, Dv]

    def _paged(self, q_nope, q_rope, latent, k_rope, attention_mask, cache, **kwargs):
        """Attention of S new tokens of many texts, each to its own past in transformers' paged cache, which lies
        behind the attention interface and has pages of equal keys and values: they get half a latent each.
        -> [B, S, H, Dv], probabilities or None"""
        if attention_mask is None:
            raise ValueError(
                f"`attn_implementation` is {self.config._attn_implementation!r}, which makes no masks, but continuous "
                "batching of latents needs one: load with attn_implementation='sdpa' and set "
                "`auto_switch_to_flash=False` in the ContinuousBatchingConfig."
            )
        width = self.kv_lora_rank + self.qk_rope_head_dim
        entry = F.pad(torch.cat((latent, k_rope), dim=-1), (0, width % 2))  # [1, 1, S, C + Dr], even
        halves = cache.update(*entry.chunk(2, dim=-1), self.layer_idx, kwargs)
        entries = torch.cat(halves, dim=-1)  # [1, 1, T, C + Dr]; T counts the tokens of all texts
        latent, k_rope = entries[..., :width].split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        weight = self._kv_b_weight(latent, cache_layer=None)
        if q_nope.shape[2] <= self.max_absorbed_tokens and weight is not None:
            return self._absorbed(q_nope, q_rope, latent, k_rope, attention_mask, weight)
        return self._blockwise(q_nope, q_rope, latent, k_rope, attention_mask)

    def _selected(self, q_nope, q_rope, latent, k_rope, visible, kv_b_weight, indexer, index_states, index_key):
        """Attention to selected latents [B, 1, T, C] and keys [B, 1, T, Dr] -> [B, S, H, Dv], index loss or None"""
        return selected_latent_attention(
            q_nope * self.scaling,
            q_rope * self.scaling,
            latent[:, 0],
            k_rope[:, 0],
            self._up_projections(kv_b_weight),
            indexer,
            index_states,
            index_key,
            visible,
            attend_all=self.config.index_warmup,
            learns=self.training and self.config.index_loss_weight > 0 and indexer.learns(),
            mesh=getattr(self.kv_b_proj.weight, "device_mesh", None),
        )

    def _up_projections(self, kv_b_weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[H * (Dn + Dv), C] -> W_UK [H, Dn, C], W_UV [H, Dv, C]"""
        by_head = kv_b_weight.unflatten(0, (-1, self.qk_nope_head_dim + self.v_head_dim))  # [H, Dn + Dv, C]
        return by_head.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)

    def _kv_b_weight(self, latent: torch.Tensor, cache_layer) -> torch.Tensor | None:
        """The matrix that kv_b_proj applies to every row, [H * (Dn + Dv), C]; None where there is no such matrix or it
        cannot be known, and attention must run the module itself.

        With LoRA, quantised or offloaded it is what the module makes of the identity. That costs more than a decoded
        token should, so it is kept with the cache, for as long as the text whose latents lie there.
        """
        if any(module._forward_hooks or module._forward_pre_hooks for module in self.kv_b_proj.modules()):
            return None  # they may do anything, such as choosing an adapter for each row
        if type(self.kv_b_proj) is nn.Linear and self.kv_b_proj.bias is None and not self.kv_b_proj.weight.is_meta:
            weight = self.kv_b_proj.weight
            if hasattr(weight, "to_local"):
                return weight.to_local()  # tensor parallel: this process's heads
            if type(weight) is nn.Parameter:  # and not one of torchao's
                return weight
        if torch.is_grad_enabled() or cache_layer is None:
            return self._probe_kv_b(latent)
        if not hasattr(cache_layer, "kv_b_weight"):
            if torch.compiler.is_compiling():
                return None  # probing looks at numbers
            cache_layer.kv_b_weight = self._probe_kv_b(latent)
        return cache_layer.kv_b_weight

    def _probe_kv_b(self, latent: torch.Tensor) -> torch.Tensor | None:
        """What kv_b_proj makes of the identity, [H * (Dn + Dv), C], if it maps other rows, zero among them, alike.

        A bias, in the module or in an adapter on it, or anything else that is not linear, shows there.
        """
        width = self.kv_lora_rank
        identity = torch.eye(width, dtype=latent.dtype, device=latent.device)
        signs = 1 - 2 * (torch.arange(width, device=latent.device) % 3 == 0).to(latent.dtype)
        rows = torch.stack((torch.zeros_like(signs), 3 * signs))  # [2, C]
        image, others = self.kv_b_proj(torch.cat((identity, rows))).split((width, 2))
        if self.training:
            # Dropout in an adapter makes rows differ, so a bias is told by being there; it may be zero yet, but learns.
            has_bias = any(getattr(module, "bias", None) is not None for module in self.kv_b_proj.modules())
            return None if has_bias else image.T
        differences = (others - rows @ image).detach().abs().amax(dim=1)  # [2]
        # quantised modules may compute in bfloat16, whatever they are given; zero is exact in every dtype
        rounding = 4 * torch.finfo(torch.bfloat16).eps * (rows.abs() @ image.detach().abs()).max()
        return image.T if differences[0] == 0 and differences[1] <= rounding else None


def _per_head(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """states [B, H, S, X], a matrix for each head [H, X, Y], read once for all rows -> [B, H, S, Y]"""
    batch, _, length, _ = states.shape
    product = states.transpose(0, 1).flatten(1, 2) @ weight  # [H, B * S, Y]
    return product.view(-1, batch, length, weight.shape[-1]).transpose(0, 1)


@torch.compiler.assume_constant_result
def _count_threads() -> int:
    return torch.get_num_threads()


def attend_side_by_side(
    query: torch.Tensor, entries: torch.Tensor, mask: torch.Tensor | None, value_width: int
) -> torch.Tensor:
    """Attention on a CPU to keys that begin with their values; each is read once, and no scores are kept.

    Where there is work for them, each thread gets a part of the keys (the kernel by itself would give one thread all of
    them); the parts' outputs are joined by their logarithms of sums of exponentials.

    Args:
        query: [B, R, W], scaled; R rows of whatever heads and tokens.
        entries: [B, T, W].
        mask: [B, 1, 1, T] for all rows, bool (false is hidden) or float (added); None where nothing is hidden.

    Returns:
        [B, R, value_width]
    """
    query = query.to(entries.dtype)  # under autocast they differ
    batch, num_keys, width = entries.shape
    parts = min(_count_threads(), num_keys, max(1, query[0].numel() * num_keys // _PART_PRODUCTS))
    even = num_keys - num_keys % parts
    if mask is not None and mask.dtype == torch.bool:
        # not -inf: a part may hide all its keys
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    outputs, sums = [], []
    for start, stop, number in ((0, even, parts), (even, num_keys, 1)):
        if start == stop:
            continue
        keys = entries[:, start:stop].view(batch, number, -1, width)  # [B, parts, T / parts, W]
        output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[:, None].expand(-1, number, -1, -1),
            keys,
            keys,
            attn_mask=None if mask is None else mask[..., start:stop].reshape(-1, number, 1, keys.shape[2]),
            scale=1.0,
        )
        outputs.append(output)  # [B, parts, R, W]
        sums.append(log_sum)  # [B, parts, R]
    if parts == 1:
        return output[:, 0, :, :value_width].to(query.dtype)
    shares = torch.cat(sums, dim=1).softmax(dim=1)[..., None]
    return (torch.cat(outputs, dim=1) * shares).sum(dim=1)[..., :value_width].to(query.dtype)


ATTENTION_CLASSES = {"gqa": DeepseekAttention, "mla": DeepseekMLA, "nsa": DeepseekNSA}


# ---------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------


class DeepseekDecoderLayer(GradientCheckpointingLayer):
    """h + attention(norm(h)), then h + mlp(norm(h)); the MLP is dense or a mixture of experts."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        is_mtp = layer_idx >= config.num_hidden_layers
        self.is_sparse = (config.mtp_layer_type if is_mtp else config.mlp_layer_types[layer_idx]) == "sparse"
        self.self_attn = ATTENTION_CLASSES[config.attention_kind](config, layer_idx)
        self.mlp = DeepseekMoE(config, layer_idx) if self.is_sparse else DeepseekMLP(config, config.intermediate_size)
        self.input_layernorm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """hidden_states [B, S, hidden_size], token_mask bool [B, S] -> the new states, what DeepseekMoE returns besides
        (balance loss and tokens per expert), and what attention does (the indexer's loss)"""
        attended, _, index_loss = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        if not self.is_sparse:
            return hidden_states + self.mlp(normed), None, None, index_loss
        output, balance_loss, load = self.mlp(normed, token_mask)
        return hidden_states + output, balance_loss, load, index_loss


class DeepseekSharedHead(nn.Module):
    """The norm before the output head of a multi-token-prediction module; the head itself is the model's."""

    def __init__(self, config):
        super().__init__()
        self.norm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, S, hidden_size] -> the same shape"""
        return self.norm(hidden_states)


class DeepseekMTPLayer(DeepseekDecoderLayer):
    """Multi-token-prediction module k, DeepSeek-V3 eq. 21-23: predicts token t + k + 1 from state t and token t + k.

        h'_t = W [norm(embedding of token t + k); norm(h^(k-1)_t)],   h^k = decoder_layer(h')

    In that order, which is the checkpoint's and not the paper's. h^0 is the model's output after its last norm.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.enorm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = DeepseekSharedHead(config)

    def forward(
        self, hidden_states: torch.Tensor, next_embeds: torch.Tensor, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """hidden_states h^(k-1) and next_embeds, each [B, S, hidden_size] -> h^k and the rest of a decoder layer's"""
        joined = torch.cat((self.enorm(next_embeds), self.hnorm(hidden_states)), dim=-1)  # [B, S, 2 * hidden_size]
        return super().forward(self.eh_proj(joined), **kwargs)


# ---------------------------------------------------------------------------------------------------------------
# Outputs
# ---------------------------------------------------------------------------------------------------------------


@model_output
class DeepseekModelOutput(ModelOutput):
    """
    last_hidden_state: [B, S, hidden_size], after the last norm.
    past_key_values: the cache, if one was used.
    hidden_states: with `output_hidden_states`, the embeddings and every layer's output.
    attentions: with `output_attentions` and eager attention, probabilities [B, H, S, T] of every layer.
    router_logits: with `output_router_logits`, float32 [B * S, E] of every sparse layer.
    aux_loss: in training with `aux_loss_alpha`, the sum of the layers' balance losses, without that factor.
    index_loss: in training with `index_topk`, the sum of the layers' indexer losses, without `index_loss_weight`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    aux_loss: torch.FloatTensor | None = None
    index_loss: torch.FloatTensor | None = None


@model_output
class DeepseekCausalLMOutput(ModelOutput):
    """
    loss: with `labels`: `lm_loss`, and in training also mtp_loss_weight * mtp_loss + aux_loss_alpha * aux_loss +
        index_loss_weight * index_loss.
    logits: [B, S or `logits_to_keep`, vocab_size].
    lm_loss: cross entropy of the next token, nats a token.
    mtp_loss: mean over the multi-token-prediction modules of their cross entropies; in training only.
        Both are divided by their targets, or by `num_items_in_batch` (the targets of the whole optimiser step) where a
        trainer gives it.
    aux_loss: sum of the layers' balance losses, without the factor; in training only. A mean over the rows.
    index_loss: sum of the layers' indexer losses, without the factor; in training with `index_topk` only. A mean over the
        tokens. With `num_items_in_batch`, `loss` has this and `aux_loss` times the part that the micro-batch's targets are
        of those of the step, so neither grows with gradient accumulation.
    The rest as in `DeepseekModelOutput`.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    lm_loss: torch.FloatTensor | None = None
    mtp_loss: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    index_loss: torch.FloatTensor | None = None


# ---------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------


class DeepseekPreTrainedModel(PreTrainedModel):
    """Loading, initialisation and what transformers and serving engines ask of a model class."""

    config_class = DeepseekConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # The shared head runs outside its layer, so FSDP2, which shards by these classes, must gather it by itself.
    _no_split_modules = ["DeepseekDecoderLayer", "DeepseekMTPLayer", "DeepseekSharedHead"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": DeepseekDecoderLayer,
        "attentions": OutputRecorder(target_class=None, index=1, class_name="self_attn"),
        "router_logits": OutputRecorder(DeepseekRouter, index=0),
    }

    def __init__(self, config, *args, **kwargs):
        config.validate()  # it may have been edited since it was made
        super().__init__(config, *args, **kwargs)
        if config.has_indexer:
            self._keep_in_fp32_modules = [r".*indexer\.weights_proj"]  # quantisers leave these alone
            self._keep_in_fp32_modules_strict = ["indexer.weights_proj", "indexer.k_norm"]
        if getattr(config, "topk_method", None) == "noaux_tc":
            self._keep_in_fp32_modules_strict = [*(self._keep_in_fp32_modules_strict or ()), "e_score_correction_bias"]
        self._keys_to_ignore_on_load_unexpected = ignored_mtp_keys(config)
        if config.separate_experts:
            config.model_type = f"{self.config_class.model_type}_separate"  # for which no rule stacks experts
            self._can_compile_fullgraph = False  # which experts run depends on the data

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """As in transformers; besides, checks the files first, does without multi-token-prediction weights that a
        checkpoint lacks, dequantises block-scaled FP8 (but keeps it on GPUs that have such arithmetic), picks float32 on
        CPUs that have no bfloat16 arithmetic, and reads pickled weights only if `use_safetensors` is False.

        Raises:
            ValueError: a shard is missing, truncated or no safetensors file; the message names the file.
        """
        if config is None:
            # Reading the config uses up what says where it is, which the weights need too; dtypes are theirs alone.
            where = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            own = ("dtype", "torch_dtype", "quantization_config")
            precision = {name: kwargs.pop(name) for name in own if name in kwargs}
            config, unused = cls.config_class.from_pretrained(
                pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs
            )
            kwargs = unused | where | precision
        if pretrained_model_name_or_path is None or kwargs.get("gguf_file"):
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        config = copy.deepcopy(config)
        if config.separate_experts is None:
            config.separate_experts = is_quantised(config, kwargs.get("quantization_config"))
        if config.separate_experts and (kwargs.get("tp_plan") or kwargs.get("distributed_config")):
            raise ValueError(
                "`separate_experts` (which quantised weights imply) does not go with tensor or expert parallelism, whose "
                "plans are for stacked experts. Use `device_map`, or pass separate_experts=False."
            )
        files = CheckpointFiles(pretrained_model_name_or_path, kwargs)
        if cls.can_generate() and (generation_config := files.find("generation_config.json")) is not None:
            check_generation_config(generation_config, config.vocab_size)
        if files.shard_of:
            present = files.count_mtp_modules(config.num_hidden_layers)
            config.num_nextn_predict_layers = min(config.num_nextn_predict_layers, present)
            cls._check_tensors(files, config, kwargs)
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True  # other files are pickles
        if kwargs.get("dtype", kwargs.get("torch_dtype")) in (None, "auto"):
            kwargs["dtype"] = default_dtype(config, kwargs.get("device_map"))
        source, reading = {"pretrained_model_name_or_path": pretrained_model_name_or_path}, nullcontext()
        quantization, block_size = getattr(config, "quantization_config", None), pop_block_fp8(config)
        keeps_fp8 = block_size is not None and hardware_has_fp8(kwargs.get("device_map"))
        if keeps_fp8:
            config.quantization_config = dict(quantization)
            keep_unscaled_layers(config, files)
        elif block_size:
            state_dict = dequantised_state_dict(files, block_size)
            source = {"pretrained_model_name_or_path": None, "state_dict": state_dict}
            reading = one_tensor_at_a_time()
        with explain_loading_error(pretrained_model_name_or_path), reading:
            loaded = super().from_pretrained(*model_args, config=config, **source, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if keeps_fp8:
            model.config.quantization_config.modules_to_not_convert = quantization.get("modules_to_not_convert")
        elif block_size:
            # Loaded from tensors, so what else transformers finds by the path is still to be done.
            model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
            if model.can_generate() and files.find("generation_config.json") is not None:
                model.generation_config = GenerationConfig.from_pretrained(
                    pretrained_model_name_or_path, **files.where
                )
        return loaded

    @classmethod
    def _check_tensors(cls, files: CheckpointFiles, config: DeepseekConfig, kwargs: dict):
        """Refuses files that are not those of the model that the config describes, `kwargs` those of `from_pretrained`."""
        if is_quantised(config, kwargs.get("quantization_config")) or kwargs.get("key_mapping"):
            return  # names and shapes are the library's
        files.check_scales(pop_block_fp8(copy.deepcopy(config)))
        if kwargs.get("state_dict") is not None:
            return
        config = copy.deepcopy(config)
        config.quantization_config = None
        with torch.device("meta"):
            model = cls(config)
        files.check(
            model,
            shapes=not kwargs.get("ignore_mismatched_sizes"),
            whole=not kwargs.get("output_loading_info"),  # who asks for the report wants to see for himself
        )

    def save_pretrained(self, *args, **kwargs):
        """As in transformers, under the model's own class: a class that a library puts in its place (as FSDP2 does) would
        have the library's files copied as model code, and be named in config.json."""
        given = type(self)
        own = next(cls for cls in given.__mro__ if cls.__module__.split(".")[0] not in ("torch", "accelerate"))
        if own is not given:
            self.__class__ = own
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            if own is not given:
                self.__class__ = given

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Where the user does not say: our own loop on CPUs, where it is faster, and transformers' choice elsewhere."""
        if requested_experts is None and not torch.accelerator.is_available():
            return "eager"
        return super().get_correct_experts_implementation(requested_experts)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DeepseekRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, DeepseekExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, BlockCompressor):
            init.normal_(module.position, mean=0.0, std=std)

    def update_router_bias(self, update_rate: float = 1e-3) -> dict[int, torch.Tensor]:
        """`moe_deepseek.update_router_bias` on this model: call it after each optimiser step."""
        return update_router_bias(self, update_rate)


class DeepseekModel(DeepseekPreTrainedModel):
    """Embedding, decoder layers and last norm. `layers` also holds the multi-token-prediction modules, behind the
    `num_hidden_layers` of the model itself, as the checkpoints number them; the forward runs them only on request."""

    def __init__(self, config):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        num_layers = config.num_hidden_layers
        self.layers = nn.ModuleList([DeepseekDecoderLayer(config, i) for i in range(num_layers)])
        self.layers.extend([DeepseekMTPLayer(config, num_layers + k) for k in range(config.num_nextn_predict_layers)])
        self.norm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DeepseekRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self._plain_mask_config = _plain_mask_config(config)
        self.post_init()

    @takes_cache_by_either_name
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> DeepseekModelOutput:
        """
        Args:
            input_ids: int64 [B, S].
            attention_mask: [B, T], 1 for tokens and 0 for padding, or a mask [B, 1, S, T] in the form of the
                attention implementation. None: all are tokens; if `position_ids` start again within a row, they
                separate documents that do not see each other, and no cache is made.
            position_ids: int64 [B, S]; by default counted on from the cache.
            past_key_values: a cache from an earlier call, extended in place.
            inputs_embeds: [B, S, hidden_size], instead of `input_ids`.

        Raises:
            ValueError: both or none of input_ids and inputs_embeds are given, (on a CPU) a token id is outside the
                vocabulary, or several documents in a row come with a cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids)
        if attention_mask is None and _restarts(position_ids):
            if past_key_values is not None:
                raise ValueError(
                    "`position_ids` start again within a row: these are documents that do not see each other, and a cache "
                    "would be one text. Leave `past_key_values` out; to say that it is one text, give `attention_mask`."
                )
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            use_growing_layers(past_key_values, self.make_cache_layer)

        mask, has_past, position_ids, token_mask = self.create_causal_mask(
            inputs_embeds, attention_mask, position_ids, past_key_values
        )
        shared = self._shared_by_layers(inputs_embeds, mask, has_past, position_ids, token_mask)
        hidden_states, losses = inputs_embeds, self._layer_losses()
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = losses.take(
                layer, layer(hidden_states, past_key_values=past_key_values, **shared, **kwargs)
            )
        return DeepseekModelOutput(
            last_hidden_state=self.norm(hidden_states),
            **cache_field(past_key_values),
            aux_loss=_total(losses.balance),
            index_loss=_total(losses.index),
        )

    def predict_further(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs,
    ) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor | None]:
        """Runs the multi-token-prediction modules over whole rows, without a cache.

        Module k sees token t + k at place t. The last k places of a row have no such token; they get the row's first
        ones, which no earlier place attends to, and what they predict means nothing.

        Args:
            hidden_states: the model's `last_hidden_state` for the other arguments, which are as in `forward`.

        Returns:
            One [B, S, hidden_size] a module, before its output norm; in training also the sums of the modules' balance
            losses and of their indexers' losses.
        """
        inputs_embeds = self._embed(input_ids) if inputs_embeds is None else inputs_embeds
        visible = self.create_causal_mask(inputs_embeds, attention_mask, position_ids, past_key_values=None)
        shared = self._shared_by_layers(inputs_embeds, *visible)
        states, losses = [], self._layer_losses()
        for k, layer in enumerate(self.layers[self.config.num_hidden_layers :], start=1):
            # positional, since reentrant gradient checkpointing tracks only such arguments
            hidden_states = losses.take(
                layer, layer(hidden_states, inputs_embeds.roll(-k, dims=1), **shared, **kwargs)
            )
            states.append(hidden_states)
        return states, _total(losses.balance), _total(losses.index)

    def run_mtp_module(
        self,
        index: int,
        hidden_states: torch.Tensor,
        next_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor,
        past_key_values: Cache,
    ) -> torch.Tensor:
        """Runs one multi-token-prediction module, counted from 0, over a cache of its own, as generation does.

        Args:
            hidden_states: [B, S, hidden_size], of the model (after its norm) or of the module before.
            next_embeds: [B, S, hidden_size], embeddings of the tokens index + 1 places on.
            attention_mask, position_ids: as in `forward`, of the places of `hidden_states`.
            past_key_values: a cache that has this module's layer under the indices 0 and num_hidden_layers + index.

        Returns:
            [B, S, hidden_size], before the module's output norm.
        """
        layer = self.layers[self.config.num_hidden_layers + index]
        visible = self.create_causal_mask(next_embeds, attention_mask, position_ids, past_key_values)
        shared = self._shared_by_layers(next_embeds, *visible)
        return layer(hidden_states, next_embeds, past_key_values=past_key_values, **shared)[0]

    def create_causal_mask(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        past_key_values: Cache | None,
    ) -> tuple[object, bool, torch.LongTensor, torch.BoolTensor | None]:
        """What is seen from where. Tracers by torch.fx (llm-compressor) take a function of this name as one step.

        Returns:
            the mask in the form of the attention classes, whether there is a past to attend to, positions [B or 1, S],
            and in training which tokens are real, bool [B, S] (None: all).
        """
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + past_length
        token_mask = None
        if self.training and attention_mask is not None and attention_mask.shape == inputs_embeds.shape[:2]:
            token_mask = attention_mask.bool()
        mask, has_past = self._mask(attention_mask, inputs_embeds, position_ids, past_key_values, past_length)
        return mask, has_past, position_ids, token_mask

    def _shared_by_layers(self, inputs_embeds, mask, has_past, position_ids, token_mask) -> dict:
        """What every layer gets alike"""
        return {
            "attention_mask": mask,
            "has_past": has_past,
            "position_ids": position_ids,
            "position_embeddings": self.rotary_emb(inputs_embeds, position_ids),
            "token_mask": token_mask,
        }

    def make_cache_layer(self) -> GrowingLayer:
        """An empty cache layer of the kind this model's attention wants."""
        if self.config.attention_kind == "nsa":
            return NSACacheLayer(window=self.config.nsa_window_size, block=self.config.nsa_compress_block_size)
        if self.config.attention_kind == "gqa":
            return GrowingLayer()
        return IndexedLayer() if self.config.has_indexer else LatentLayer()

    def _layer_losses(self) -> "_LayerLosses":
        return _LayerLosses(counts=self.training, learns=self._indexer_learns())

    def _indexer_learns(self) -> bool:
        """Whether some layer's indexer is being trained, frozen ones beside it or not."""
        wanted = self.training and self.config.has_indexer and self.config.index_loss_weight > 0
        return wanted and any(layer.self_attn.indexer.learns() for layer in self.layers)

    def _embed(self, input_ids: torch.LongTensor) -> torch.Tensor:
        try:
            return self.embed_tokens(input_ids)  # [B, S, hidden_size]
        except IndexError as error:
            raise ValueError(
                f"`input_ids` holds ids from {int(input_ids.min())} to {int(input_ids.max())}, but `vocab_size` is "
                f"{self.embed_tokens.num_embeddings}: allowed are 0 to {self.embed_tokens.num_embeddings - 1}. Use "
                "the checkpoint's own tokenizer, or call model.resize_token_embeddings(len(tokenizer))."
            ) from error

    def _mask(self, attention_mask, inputs_embeds, position_ids, past_key_values, past_length):
        """-> the mask the attention classes take, and whether there is a past to attend to.

        GQA has one form for everything. MLA attends to new tokens through the attention interface as long as there
        is no past (then the mask is as if there were no cache), and by matrix products of its own after that (then
        the mask is a plain tensor, whatever the kernel). NSA takes the documents' bounds instead of a mask,
        and MLA with an indexer what is visible, if there is more than it selects or the indexer learns.
        """
        if self.config.attention_kind == "nsa":
            has_cache = past_key_values is not None
            return find_documents(attention_mask, position_ids, int(past_length), has_cache), int(past_length) > 0
        topk = getattr(self.config, "index_topk", None)
        if topk is not None and (int(past_length) + inputs_embeds.shape[1] > topk or self._indexer_learns()):
            has_cache = past_key_values is not None
            return find_visible_tokens(attention_mask, position_ids, int(past_length), has_cache), int(past_length) > 0
        arguments = {"inputs_embeds": inputs_embeds, "position_ids": position_ids}
        if self.config.attention_kind == "gqa":
            return create_causal_mask(
                config=self.config, attention_mask=attention_mask, past_key_values=past_key_values, **arguments
            ), True
        length = inputs_embeds.shape[1]
        if past_key_values is None:
            return create_causal_mask(
                config=self.config, attention_mask=attention_mask, past_key_values=None, **arguments
            ), False
        # A compiled step over a static cache cannot look at the length; it always has a past, or is masked as if.
        if not torch.compiler.is_compiling() and int(past_length) == 0:
            if attention_mask is not None:
                attention_mask = attention_mask[..., :length]  # a static cache's mask covers its empty slots too
            return create_causal_mask(
                config=self.config, attention_mask=attention_mask, past_key_values=None, **arguments
            ), False
        mask = create_causal_mask(
            config=self._plain_mask_config,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **arguments,
        )
        if mask is None and length > 1:
            # transformers leaves "causal, nothing else hidden" to the kernel; here no mask means that all is seen. It
            # does so only where the new tokens are all there are: in a compiled first prompt.
            mask = torch.ones(length, length, dtype=torch.bool, device=inputs_embeds.device).tril()[None, None]
        return mask, True


def _restarts(position_ids: torch.Tensor | None) -> bool:
    """Whether positions [B or 1, S] do not go on by one somewhere: several documents in a row. Compilers cannot look."""
    if position_ids is None or position_ids.shape[-1] == 1 or torch.compiler.is_compiling():
        return False
    return bool((position_ids.diff(dim=-1) != 1).any())


class _LayerLosses:
    """Keeps what the layers of one pass add to the loss, and notes each router's load.

    What a layer returns is known from the settings. To look whether it is None would mislead tracers, to whom every result
    of a layer is a stand-in.

    Args:
        counts: the layers are in training mode, and those with experts return their load and, with `aux_loss_alpha`, a
            balance loss.
        learns: layers whose indexer is being trained return its loss.
    """

    def __init__(self, counts: bool, learns: bool):
        self.counts, self.learns = counts, learns
        self.balance: list[torch.Tensor] = []
        self.index: list[torch.Tensor] = []

    def take(self, layer: DeepseekDecoderLayer, results: tuple) -> torch.Tensor:
        """Keeps what `layer` returned besides its states, which are handed back."""
        hidden_states, balance_loss, load, index_loss = results
        if self.counts and layer.is_sparse:
            layer.mlp.count_load(load)
            self.balance += [balance_loss] if layer.mlp.aux_loss_alpha else []
        self.index += [index_loss] if self.learns and layer.self_attn.indexer.learns() else []
        return hidden_states


def _total(losses: list[torch.Tensor]) -> torch.Tensor | None:
    return sum(loss.to(losses[0].device) for loss in losses) if losses else None


def _share_of_step(targets: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | float:
    """The part that these targets are of those of an optimiser step, over micro-batches and processes; 1 for a whole step.

    Losses that are means over their micro-batch count by it, so that accumulated ones are the mean over the step.
    """
    if num_items_in_batch is None:
        return 1.0
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(targets.device)
    return (targets != -100).sum() / num_items_in_batch


def _plain_mask_config(config):
    """A config for which transformers makes masks as bool tensors [B, 1, S, T]."""
    config = copy.copy(config)
    config._attn_implementation_internal = "sdpa"
    return config


class DeepseekForCausalLM(DeepseekPreTrainedModel, DeepseekGenerationMixin):
    """The language model: `DeepseekModel` and an output head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config):
        super().__init__(config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache_by_either_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> DeepseekCausalLMOutput:
        """
        Args:
            labels: int64 [B, S], the input ids (not shifted), -100 where no loss is wanted.
            logits_to_keep: number of last positions, or indices of positions, to compute logits for; 0 for all.
            The rest as in `DeepseekModel`.
        """
        if use_cache is None and self.training:
            use_cache = False  # nobody reads it
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, positions])  # [B, S or kept, vocab_size]

        loss = lm_loss = mtp_loss = None
        aux_loss, index_loss = outputs.aux_loss, outputs.index_loss
        if labels is not None:
            loss = lm_loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
            predicts_further = self.config.num_nextn_predict_layers and self.config.mtp_loss_weight
            if self.training and predicts_further and past_key_values is None:
                states, mtp_aux_loss, mtp_index_loss = self.model.predict_further(
                    outputs.last_hidden_state, input_ids, attention_mask, position_ids, inputs_embeds
                )
                places = outputs.last_hidden_state.shape[:2]
                if labels.shape != places:  # cut to the places of `logits_to_keep`
                    whole = labels.new_full(places, -100)
                    whole[:, positions] = labels
                    labels = whole
                mtp_loss = self._mtp_loss(states, labels, position_ids, **kwargs)
                loss = loss + self.config.mtp_loss_weight * mtp_loss
                aux_loss = _total([part for part in (aux_loss, mtp_aux_loss) if part is not None])
                index_loss = _total([part for part in (index_loss, mtp_index_loss) if part is not None])
            targets = kwargs.get("shift_labels", labels[..., 1:]).to(loss.device)
            share = _share_of_step(targets, kwargs.get("num_items_in_batch"))
            if aux_loss is not None:
                loss = loss + self.config.aux_loss_alpha * share * aux_loss.to(loss.device)
            if index_loss is not None:
                loss = loss + self.config.index_loss_weight * share * index_loss.to(loss.device)
        return DeepseekCausalLMOutput(
            loss=loss,
            logits=logits,
            **cache_field(outputs.cache),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            lm_loss=lm_loss,
            mtp_loss=mtp_loss,
            aux_loss=aux_loss,
            index_loss=index_loss,
        )

    def _mtp_loss(self, mtp_hidden_states, labels, position_ids, **kwargs) -> torch.Tensor:
        """Mean over the modules of their cross entropies, DeepSeek-V3 eq. 24-25 without the factor lambda."""
        losses = []
        for k, hidden_states in enumerate(mtp_hidden_states, start=1):
            if k + 1 >= labels.shape[1]:  # a row too short for this module to have anything to predict
                losses.append(0.0 * hidden_states.sum())
                continue
            layer = self.model.layers[self.config.num_hidden_layers + k - 1]
            targets = F.pad(labels[:, k + 1 :], (0, k + 1), value=-100)  # [B, S]: place t predicts token t + k + 1
            if position_ids is not None:
                # in a packed row, where the token is of another document there is nothing to predict
                ahead = F.pad(position_ids[:, k + 1 :], (0, k + 1), value=-1)
                targets = targets.masked_fill(ahead != position_ids + k + 1, -100)
            logits = self.lm_head(layer.shared_head(hidden_states))  # [B, S, vocab_size]
            # the mean over the targets unless a trainer gives their number, and 0 where none is left
            count = kwargs.get("num_items_in_batch")
            count = (targets != -100).sum().clamp(min=1) if count is None else count
            settings = kwargs | {"shift_labels": targets, "num_items_in_batch": count}
            losses.append(
                self.loss_function(logits=logits, labels=None, vocab_size=self.config.vocab_size, **settings)
            )
        return torch.stack(losses).mean()

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values=None, cache=None, **kwargs):
        """Masks that `generate` prepares outside a compiled step, as `DeepseekModel._mask` wants them."""
        past_key_values = cache if past_key_values is None else past_key_values
        if config.attention_kind == "nsa" or config.has_indexer:
            return attention_mask
        if config.attention_kind == "mla":
            if int(past_key_values.get_seq_length()) == 0:
                return attention_mask
            config = _plain_mask_config(config)
        return create_masks_for_generate(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )

    def init_continuous_batching(self, generation_config=None, continuous_batching_config=None, **kwargs):
        """As in transformers; its paged cache then holds MLA's latents, kv_lora_rank + qk_rope_head_dim numbers a token.

        Where the config says nothing, `generate_batch` sizes the cache by its requests, and a manager on a CPU by a few
        texts of the model's context; what does not fit into memory, and managers on accelerators, get transformers' share
        of what is free.

        Raises:
            ValueError: the attention is sparse (NSA, or MLA with an indexer), which needs more than keys and values; or
                this release of transformers has no such cache.
        """
        config = self.config
        if not HAS_PAGED_CACHE:
            raise ValueError(
                "This release of transformers has no continuous batching that the model can use; it came with 5.19. "
                "Use `generate`, serve without --continuous-batching, or upgrade transformers."
            )
        if config.attention_kind == "nsa" or config.has_indexer:
            raise ValueError(
                "transformers' paged cache has room for keys and values only, but sparse attention "
                f"(`model_type` {config.checkpoint_model_type!r}) keeps more; use `generate`, or serve without "
                "--continuous-batching."
            )
        manager = super().init_continuous_batching(generation_config, continuous_batching_config, **kwargs)
        if "_create_batch_processor" in vars(manager):  # one that was kept
            return manager
        paging = manager.continuous_batching_config
        by_memory = {name: getattr(paging, name) for name in PAGED_CACHE_SIZES}
        size_paged_cache(
            paging,
            continuous_batching_config,
            kwargs.get("workload_hints"),
            config.max_position_embeddings,
            self.device.type == "cpu",
        )
        create = manager._create_batch_processor

        def create_sized():
            manager.model = _PagedView(self) if config.attention_kind == "mla" else self
            try:
                return create()
            except MemoryError:
                if by_memory["num_blocks"] is not None:
                    raise
                vars(paging).update(by_memory)
                return create()
            finally:
                manager.model = self

        manager._create_batch_processor = create_sized
        return manager


class _PagedView:
    """An MLA model as its paged cache is to see it: with one key/value head, key and value half a latent each."""

    def __init__(self, model: DeepseekForCausalLM):
        self._model = model
        self.config = copy.copy(model.config)
        self.config.num_key_value_heads = 1
        self.config.head_dim = (model.config.kv_lora_rank + model.config.qk_rope_head_dim + 1) // 2

    def __getattr__(self, name: str):
        return getattr(self._model, name)


class DeepseekForSequenceClassification(GenericForSequenceClassification, DeepseekPreTrainedModel):
    """A linear score on the last token that is not padding."""

    def __init__(self, config):
        # Not the generic one: it makes its base model by AutoModel, which does not know custom code.
        DeepseekPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = DeepseekModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class DeepseekForTokenClassification(GenericForTokenClassification, DeepseekPreTrainedModel):
    """A linear score on every token."""

    def __init__(self, config):
        DeepseekPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = DeepseekModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", 0.1))
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()


class DeepseekForQuestionAnswering(GenericForQuestionAnswering, DeepseekPreTrainedModel):
    """Two linear scores on every token: that an answer out of the text begins there, and that it ends there.

    The model's weights keep their names, `model.*`, so that every checkpoint loads; transformers' LlamaForQuestionAnswering
    calls them `transformer.*` and reads what is saved here with `key_mapping={"^model": "transformer"}`.
    """

    def __init__(self, config):
        DeepseekPreTrainedModel.__init__(self, config)
        self.model = DeepseekModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


register_expert_conversion(DeepseekConfig.model_type)

__all__ = [
    "DeepseekForCausalLM",
    "DeepseekForQuestionAnswering",
    "DeepseekForSequenceClassification",
    "DeepseekForTokenClassification",
    "DeepseekModel",
    "DeepseekPreTrainedModel",
]
