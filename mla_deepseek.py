"""Multi-head latent attention (MLA): DeepSeek-V2 (arXiv:2405.04434) and V3 (arXiv:2412.19437).

From top to bottom: the layer with its forms (expanded, absorbed, blockwise, paged), the matrix that the absorbed form needs,
and a one-token kernel for CPUs.

Shape letters: B batch, S new tokens, T all tokens in view (past and new), H heads; Dn / Dr / Dv the widths of a head without
and with position and of its value, C the latent width.
"""

import copy
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
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
    apply_mask,
    eager_attention_forward,
    make_causal_mask,
    plain_mask_config,
    softmax,
    wider,
)
from .cache_deepseek import LatentLayer, StaticLatentLayer
from .compat_deepseek import create_masks_for_generate
from .layers_deepseek import DeepseekRMSNorm, apply_rotary, yarn_softmax_factor
from .linear_deepseek import count_threads, project

_BLOCK_BYTES = 64 * 2**20  # scores held at once while a long past is expanded block by block
_PLAIN = {torch.float64, torch.float32, torch.float16, torch.bfloat16}  # dtypes of weights that are not quantised
_INDICES = {torch.int64, torch.bool}  # dtypes of what is no weight
_PART_PRODUCTS = 2**19  # multiplications of a query with its keys that are worth a thread


class DeepseekMLA(DeepseekAttention):
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
    """

    title = "multi-head latent attention"
    supports = frozenset({STATIC_CACHE, INT8_CACHE, PAGED_CACHE, LIBRARY_CACHE, COMPILED_STEP, GAPS})
    adapters = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
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
        self.o_proj = nn.Linear(heads * self.v_head_dim, config.hidden_size, bias=bias)

    @classmethod
    def view(cls, config, tokens: AttentionInput) -> View:
        """The first pass uses the attention interface, with the mask of a model without a cache. Later passes use our
        own matrix products, with the mask as a plain tensor, whatever the kernel."""
        if tokens.is_first:
            if tokens.attention_mask is not None and tokens.past_key_values is not None:
                # a static cache's mask covers its empty slots too
                tokens = tokens._replace(attention_mask=tokens.attention_mask[..., : tokens.length])
            return View(make_causal_mask(config, tokens, None), has_past=False)
        if tokens.sees_all:
            return View(None, has_past=True)
        mask = make_causal_mask(plain_mask_config(config), tokens, tokens.past_key_values)
        if mask is None and tokens.length > 1:
            # For a purely causal mask transformers gives None and relies on the kernel; here None means that
            # everything is visible. It does so only where the new tokens are all there are: in a compiled first prompt.
            square = torch.ones(tokens.length, tokens.length, dtype=torch.bool, device=tokens.embeds.device)
            mask = square.tril()[None, None]
        return View(mask, has_past=True)

    @classmethod
    def mask_for_generation(cls, config, attention_mask, past_key_values, **kwargs):
        """The plain mask over a past; a first prompt makes its own."""
        if int(past_key_values.get_seq_length()) == 0:
            return attention_mask
        return create_masks_for_generate(
            config=plain_mask_config(config), attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )

    @classmethod
    def paged_view(cls, config):
        """One key/value head, with a key and a value of half a latent each: pages have equal keys and values."""
        config = copy.copy(config)
        config.num_key_value_heads = 1
        config.head_dim = (config.kv_lora_rank + config.qk_rope_head_dim + 1) // 2
        return config

    @classmethod
    def make_cache_layer(cls, config) -> LatentLayer:
        """Latents and rotated keys side by side."""
        return LatentLayer()

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
            has_past: whether the cache holds tokens from before.

        Returns:
            [B, S, hidden_size], probabilities [B, H, S, T] where they exist, and no index loss.
        """
        tokens = self._project(hidden_states, self.query_latent(hidden_states), position_embeddings)
        if "cache" in kwargs:
            output, probs = self._paged(*tokens, attention_mask, **kwargs)
            return self._output(output, hidden_states), probs, None
        q_nope, q_rope, latent, k_rope = tokens
        all_latent, all_k_rope, cache_layer = self._cache(latent, k_rope, past_key_values, has_past)
        if not has_past:
            query, key, value = self._expanded(q_nope, q_rope, latent, k_rope)
            # vLLM searches the source of `forward` for this call and refuses attention without it.
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
        else:
            weight, entries = self._kv_b_weight(latent, cache_layer), getattr(cache_layer, "entries", None)
            wants_probs = kwargs.get("output_attentions") or torch.is_grad_enabled()
            if hidden_states.shape[1] > self.max_absorbed_tokens and not kwargs.get("output_attentions"):
                output, probs = self._blockwise(q_nope, q_rope, all_latent, all_k_rope, attention_mask)
            elif weight is None:
                key, value = self._expand(all_latent, all_k_rope)  # [B, H, T, .]
                query = torch.cat((q_nope, q_rope), dim=-1)  # [B, H, S, Dn + Dr]
                output, probs = eager_attention_forward(self, query, key, value, attention_mask, self.scaling)
            else:
                output, probs = self._absorbed(
                    q_nope, q_rope, all_latent, all_k_rope, attention_mask, weight, entries, wants_probs
                )
        return self._output(output, hidden_states), probs, None

    def query_latent(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What queries are made of: the states [B, S, hidden_size], or query latents [B, S, q_lora_rank]"""
        if self.q_lora_rank is None:
            return hidden_states
        return self.q_a_layernorm(project(self.q_a_proj, hidden_states))

    def _project(self, hidden_states, query_input, position_embeddings) -> tuple[torch.Tensor, ...]:
        """-> q_nope [B, H, S, Dn], q_rope [B, H, S, Dr], latent [B, 1, S, C], k_rope [B, 1, S, Dr]; the latter have a head
        axis for the cache layers"""
        query = project(self.q_proj if self.q_lora_rank is None else self.q_b_proj, query_input)
        query = query.view(*query_input.shape[:2], -1, self.qk_head_dim).transpose(1, 2)  # [B, H, S, Dn + Dr]
        q_nope, q_rope = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        compressed = project(self.kv_a_proj_with_mqa, hidden_states)[:, None]  # [B, 1, S, C + Dr]
        latent, k_rope = compressed.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        with_position = torch.cat((q_rope, k_rope), dim=1)  # [B, H + 1, S, Dr]
        with_position = apply_rotary(with_position, *position_embeddings, layout=self.rope_layout)
        return q_nope, with_position[:, :-1], self.kv_a_layernorm(latent), with_position[:, -1:]

    def _cache(self, latent, k_rope, past_key_values, has_past):
        """-> latents [B, 1, T, C] and keys [B, 1, T, Dr] of all tokens, and the cache's layer; without a cache the new ones
        and None

        Raises:
            ValueError: the cache holds something else than latents.
        """
        if past_key_values is None:
            return latent, k_rope, None
        layer = past_key_values.layers[self.layer_idx] if has_past else None
        # A static layer of ours holds nothing else; were its `keys` read, a compiled step would have them beside the buffer
        # that they lie in, and PyTorch fails with two such inputs once their length is not the one compiled for.
        held = None if isinstance(layer, StaticLatentLayer) else getattr(layer, "keys", None)
        if held is not None and held.ndim == 4 and (held.shape[1], held.shape[3]) != (1, self.kv_lora_rank):
            raise ValueError(
                f"`past_key_values` holds keys of shape {tuple(held.shape)}, but {self.title} caches latents, which are "
                f"[batch, 1, tokens, {self.kv_lora_rank}]. PEFT's prefix tuning and cartridges make keys and values of heads: "
                "use prompt tuning or LoRA. Otherwise pass a cache that this model has filled, or an empty one."
            )
        latent, k_rope = past_key_values.update(latent, k_rope, self.layer_idx)
        cache_layer = past_key_values.layers[self.layer_idx]
        if not has_past and hasattr(cache_layer, "kv_b_weight"):
            del cache_layer.kv_b_weight  # see _kv_b_weight: a new text begins
        return latent, k_rope, cache_layer

    def _output(self, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, S, H, Dv], from vLLM [B * S, H * Dv] -> [B, S, hidden_size]"""
        return project(self.o_proj, output.reshape(*hidden_states.shape[:2], -1))

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
            scores = apply_mask(scores.view(batch, heads, length, -1), attention_mask)  # [B, H, S, T]
            probs = softmax(scores).to(latent.dtype)
            mixed = probs.flatten(1, 2) @ latent[:, 0]  # [B, H * S, C]
        mixed = mixed.view(batch, heads, length, -1)  # [B, H, S, C]
        return _per_head(mixed, w_uv.transpose(1, 2)).transpose(1, 2), probs  # [B, S, H, Dv]

    def _blockwise(self, q_nope, q_rope, latent, k_rope, attention_mask):
        """As `_absorbed`, by expanding one block of keys at a time -> [B, S, H, Dv], None"""
        query = torch.cat((q_nope, q_rope), dim=-1) * self.scaling  # [B, H, S, Dn + Dr]
        batch, heads, length, _ = query.shape
        block = max(128, _BLOCK_BYTES // (4 * batch * heads * length))
        # Online softmax: the running maximum, sum and output of what has been seen, float32 at least.
        dtype = wider(query.dtype)
        maximum = query.new_full((batch, heads, length, 1), float("-inf"), dtype=dtype)
        total = torch.zeros_like(maximum)
        output = query.new_zeros(batch, heads, length, self.v_head_dim, dtype=dtype)
        for start in range(0, latent.shape[2], block):
            keys = slice(start, start + block)
            key, value = self._expand(latent[:, :, keys], k_rope[:, :, keys])
            mask = None if attention_mask is None else attention_mask[..., keys]
            scores = apply_mask((query @ key.transpose(-1, -2)).to(dtype), mask)  # [B, H, S, block]
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
        if weight is None and not self._is_hooked():
            self._check_tokens_are_independent(latent)
        if q_nope.shape[2] <= self.max_absorbed_tokens and weight is not None:
            return self._absorbed(q_nope, q_rope, latent, k_rope, attention_mask, weight)
        return self._blockwise(q_nope, q_rope, latent, k_rope, attention_mask)

    def _up_projections(self, kv_b_weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[H * (Dn + Dv), C] -> W_UK [H, Dn, C], W_UV [H, Dv, C]"""
        by_head = kv_b_weight.unflatten(0, (-1, self.qk_nope_head_dim + self.v_head_dim))  # [H, Dn + Dv, C]
        w_uk, w_uv = by_head.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        return w_uk, w_uv

    def _kv_b_weight(self, latent: torch.Tensor, cache_layer) -> torch.Tensor | None:
        """The matrix that kv_b_proj applies to every row, [H * (Dn + Dv), C]; None where there is no such matrix or it
        cannot be known, and attention must run the module itself.

        With LoRA, quantisation or offloading, it is the module's output for the identity. This costs more than a
        decoded token should, so the matrix is kept with the cache.
        """
        if self._is_hooked():
            return None
        if type(self.kv_b_proj) is nn.Linear and self.kv_b_proj.bias is None and not self.kv_b_proj.weight.is_meta:
            weight = self.kv_b_proj.weight
            if hasattr(weight, "to_local"):
                return weight.to_local()  # tensor parallel: this process's heads
            if type(weight) is nn.Parameter:  # and not one of torchao's
                return weight
        if cache_layer is None:
            return self._probe_kv_b(latent)
        if torch.compiler.is_compiling():
            return None  # probing looks at numbers
        if torch.is_grad_enabled():
            return self._probe_for_cache(latent)
        kept = getattr(cache_layer, "kv_b_weight", None)
        if kept is None or not kept.holds_for(self.kv_b_proj):
            kept = cache_layer.kv_b_weight = _KeptMatrix(self.kv_b_proj, self._probe_for_cache(latent))
        return kept.matrix

    def _is_hooked(self) -> bool:
        """Whether kv_b_proj has hooks, which may do anything, such as choosing an adapter for each row."""
        return any(module._forward_hooks or module._forward_pre_hooks for module in self.kv_b_proj.modules())

    def _probe_for_cache(self, latent: torch.Tensor) -> torch.Tensor | None:
        """As `_probe_kv_b`; where there is no matrix, tokens must at least not depend on each other."""
        weight = self._probe_kv_b(latent)
        if weight is None:
            self._check_tokens_are_independent(latent)
        return weight

    def _probe_kv_b(self, latent: torch.Tensor) -> torch.Tensor | None:
        """The output of kv_b_proj for the identity, [H * (Dn + Dv), C], if kv_b_proj applies the same matrix to other
        rows, the zero row included.

        A bias, in the module or in an adapter on it, or anything else that is not linear, shows there, dropout aside.
        """
        if self.training and _has_bias(self.kv_b_proj):
            return None  # it may be zero yet, but learns
        identity, row = self._probes(latent)
        image = self.kv_b_proj(identity)
        with torch.no_grad(), _without_dropout(self.kv_b_proj) as had_dropout:
            plain = self.kv_b_proj(identity) if had_dropout else image.detach()  # [C, H * (Dn + Dv)]
            # in passes of their own, since an adapter may choose by all rows of a pass what it does to each
            error = (self.kv_b_proj(row) - row @ plain).abs().max()
            rounding = _relative_error(self.kv_b_proj, latent) * (row.T * plain).norm(dim=0).max()
            is_matrix = error <= rounding and not self.kv_b_proj(torch.zeros_like(row)).any()
        return image.T if is_matrix else None

    @torch.no_grad()
    def _check_tokens_are_independent(self, latent: torch.Tensor):
        """
        Raises:
            ValueError: what kv_b_proj makes of a token depends on the tokens beside it, so that it cannot be cached.
        """
        identity, row = self._probes(latent)
        with _without_dropout(self.kv_b_proj):
            alone, again = self.kv_b_proj(row), self.kv_b_proj(row)
            beside = self.kv_b_proj(torch.cat((row, identity)))[:1]
        rounding = _relative_error(self.kv_b_proj, latent) * alone.norm()
        if (again - alone).norm() <= rounding < (beside - alone).norm():
            raise ValueError(
                "`kv_b_proj` makes something else of a token when other tokens are in the same pass, as PEFT's Lily does, "
                "so attention over a cache cannot give what the whole text would. Pass use_cache=False, or leave "
                "`kv_b_proj` out of the adapter's targets."
            )

    def _probes(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of the identity [C, C], and another row [1, C] in which all of them take part"""
        signs = 1 - 2 * (torch.arange(self.kv_lora_rank, device=latent.device) % 3 == 0).to(latent.dtype)
        return torch.eye(self.kv_lora_rank, dtype=latent.dtype, device=latent.device), 3 * signs[None]


class _KeptMatrix:
    """What kv_b_proj multiplies by, [H * (Dn + Dv), C] or None, known as long as nothing in it changes: its weights, and which
    of PEFT's adapters are active. A copy or a pickle of the cache that holds it is without."""

    def __init__(self, module: nn.Module, matrix: torch.Tensor | None):
        self.matrix = matrix
        self._tensors, self._facts = self._look_at(module)

    def holds_for(self, module: nn.Module) -> bool:
        """Whether nothing has changed."""
        tensors, facts = self._look_at(module)
        return facts == self._facts and all(new is old for new, old in zip(tensors, self._tensors, strict=True))

    @staticmethod
    def _look_at(module: nn.Module) -> tuple[list[torch.Tensor], list]:
        tensors = [*module.parameters(), *module.buffers()]
        writes = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
        layers: Iterable[Any] = (layer for layer in module.modules() if hasattr(layer, "active_adapters"))
        adapters = [
            (tuple(layer.active_adapters), layer.disable_adapters, dict(getattr(layer, "scaling", {})))
            for layer in layers
        ]
        return tensors, [writes, adapters]

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self):
        return type(None), ()


@contextmanager
def _without_dropout(module: nn.Module) -> Generator[bool, None, None]:
    """A context in which no `nn.Dropout` of `module` drops anything; gives whether one would."""
    active = [m for m in module.modules() if isinstance(m, nn.Dropout) and m.training and m.p]
    for dropout in active:
        dropout.training = False
    try:
        yield bool(active)
    finally:
        for dropout in active:
            dropout.training = True


def _relative_error(module: nn.Module, rows: torch.Tensor) -> float:
    """How far two ways to multiply `rows` [..., C] with what `module` holds may differ, in parts of the result."""
    device, dtypes = rows.device.type, {rows.dtype}
    for part in (*module.parameters(), *module.buffers()):
        # quantised modules may compute in bfloat16, whatever they are given
        plain = type(part) in (torch.Tensor, nn.Parameter) and part.dtype in _PLAIN
        dtypes.add(part.dtype if plain or part.dtype in _INDICES else torch.bfloat16)
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    backend = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)  # PyTorch 2.9 and later
    if (precision or torch.get_float32_matmul_precision()) not in ("none", "ieee", "highest"):
        dtypes.add(torch.bfloat16)  # or TF32, which is finer
    coarsest = max(dtypes - _INDICES, key=lambda dtype: torch.finfo(dtype).eps)
    # numbers are rounded to that dtype, their sums in float32 at least
    return 4 * torch.finfo(coarsest).eps + 8 * rows.shape[-1] ** 0.5 * torch.finfo(wider(coarsest)).eps


def _has_bias(module: nn.Module) -> bool:
    """Whether what `module` runs has a bias. Of PEFT's adapters only the active ones run."""
    idle: set[nn.Module] = set()
    layers: Iterable[Any] = module.modules()
    for layer in layers:
        if not hasattr(layer, "active_adapters"):
            continue
        active = () if layer.disable_adapters else layer.active_adapters
        for by_adapter in (child for child in layer.children() if isinstance(child, nn.ModuleDict)):
            idle |= {m for name, adapter in by_adapter.items() if name not in active for m in adapter.modules()}
    return any(getattr(m, "bias", None) is not None for m in module.modules() if m not in idle)


def _per_head(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """states [B, H, S, X], a matrix for each head [H, X, Y], read once for all rows -> [B, H, S, Y]"""
    batch, _, length, _ = states.shape
    product = states.transpose(0, 1).flatten(1, 2) @ weight  # [H, B * S, Y]
    return product.view(-1, batch, length, weight.shape[-1]).transpose(0, 1)


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
    parts = min(count_threads(), num_keys, max(1, query[0].numel() * num_keys // _PART_PRODUCTS))
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
        return outputs[0][:, 0, :, :value_width].to(query.dtype)
    shares = torch.cat(sums, dim=1).softmax(dim=1)[..., None]
    return (torch.cat(outputs, dim=1) * shares).sum(dim=1)[..., :value_width].to(query.dtype)
