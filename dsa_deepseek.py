"""DeepSeek Sparse Attention (DSA; DeepSeek-V3.2-Exp report, arXiv:2512.02556): MLA with a lightning indexer.

From top to bottom: the layer, the definition as slow loops (`dsa_reference`), the indexer with its running top-k, and
attention in absorbed form to what it selects, with the indexer's training loss. No function forms a tensor of
heads x queries x keys: queries and keys go in chunks.

Shape letters: B batch, S queries, C queries of a chunk, T keys, n keys that a query reads, H heads, D width.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from .attention_deepseek import GAPS, INT8_CACHE, STATIC_CACHE, AttentionInput, View
from .cache_deepseek import IndexedLayer
from .compat_deepseek import is_exporting
from .dsa_kernels_deepseek import attend_chosen_latents, index_scores as triton_index_scores
from .kernels_deepseek import kernels_run_on
from .layers_deepseek import apply_rotary
from .linear_deepseek import project
from .mla_deepseek import DeepseekMLA
from .selection_deepseek import gather_tokens, rank_places, ranked_places
from .spans_deepseek import VisibleTokens, find_visible_tokens

_INDEX_BYTES = 16 * 2**20  # products of the indexer held at once
_LATENT_BYTES = 64 * 2**20  # latents gathered at once


class DeepseekDSA(DeepseekMLA):
    """MLA in which an indexer selects `index_topk` tokens for each query, and only they are attended to, in absorbed form.

    While there are no more tokens than that, it runs as dense MLA, and the indexer's keys are only cached.
    """

    title = "sparse attention (DSA)"
    supports = frozenset({STATIC_CACHE, INT8_CACHE, GAPS})
    float32 = ("indexer.weights_proj", "indexer.k_norm")
    unquantised = ("indexer.weights_proj",)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        o_proj = self.o_proj
        del self.o_proj
        self.indexer = LightningIndexer(config)
        self.o_proj = o_proj  # behind the indexer, as optimizer states that were saved count them

    @classmethod
    def view(cls, config, tokens: AttentionInput) -> View:
        """What is visible, where there is more than the indexer selects or it learns; else as in MLA."""
        past, has_cache = int(tokens.past_length), tokens.past_key_values is not None
        if is_exporting() and not statically_known_true(past + tokens.length <= config.index_topk):
            # a graph has one of the two ways, and ONNX drops the condition
            raise ValueError(
                f"an exported graph does not select tokens: {cls.title} can be exported for at most `index_topk` = "
                f"{config.index_topk} of them. Give the length no more than that, as the maximum of its `torch.export.Dim`."
            )
        if past + tokens.length <= config.index_topk and not tokens.learns:
            return super().view(config, tokens)
        visible = find_visible_tokens(tokens.attention_mask, tokens.position_ids, past, has_cache)
        return View(visible, has_past=past > 0)

    @classmethod
    def mask_for_generation(cls, config, attention_mask, past_key_values, **kwargs):
        """As it is: its form depends on how many tokens there are."""
        return attention_mask

    @classmethod
    def make_cache_layer(cls, config) -> IndexedLayer:
        """Latents, rotated keys and the indexer's keys."""
        return IndexedLayer()

    def learns(self) -> bool:
        """Whether the indexer gives a loss in training: not where it is frozen, as under LoRA."""
        return self.config.index_loss_weight > 0 and any(p.requires_grad for p in self.indexer.parameters())

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: VisibleTokens | torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        has_past: bool = False,
        token_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """As in MLA; `VisibleTokens` ask for attention to selected tokens, which has no probabilities, and in training
        gives the indexer's loss, over the tokens of `token_mask`, bool [B, S] (None: all).

        Raises:
            ValueError: attention maps are asked for, or `kv_b_proj` has no matrix, where tokens are selected.
        """
        if not isinstance(attention_mask, tuple):
            results = super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, has_past, **kwargs
            )
            if past_key_values is not None:  # for the time when there are more tokens
                key = self.indexer.make_key(hidden_states.detach(), position_embeddings)
                layer: Any = past_key_values.layers[self.layer_idx]
                layer.update_indexer(key)
            return results
        if kwargs.get("output_attentions", self.config.output_attentions):
            raise ValueError(
                f"`output_attentions` is set, and there are no attention maps where `index_topk` tokens are selected. "
                f"Leave it out, or give at most {self.config.index_topk} tokens to a model with "
                "attn_implementation='eager'."
            )
        query_input = self.query_latent(hidden_states)
        q_nope, q_rope, latent, k_rope = self._project(hidden_states, query_input, position_embeddings)
        latent, k_rope, cache_layer = self._cache(latent, k_rope, past_key_values, has_past)
        weight = self._kv_b_weight(latent, cache_layer)
        if weight is None:
            raise ValueError(
                "Attention to selected tokens (`index_topk`) needs the matrix of `kv_b_proj`, which has a bias, hooks "
                "or an adapter that is no matrix (LoRA with lora_bias, `adapter_names` in one batch). Leave "
                "`kv_b_proj` out of the adapter's targets, or run one adapter at a time."
            )
        # detached: the index loss teaches the indexer and nothing else
        index_states = self.indexer(hidden_states.detach(), query_input.detach(), position_embeddings)
        index_key = index_states.key  # [B, S, index_head_dim]
        if cache_layer is not None:
            index_key = cache_layer.update_indexer(index_key)  # [B, T, index_head_dim]
        output, index_loss = selected_latent_attention(
            q_nope * self.scaling,
            q_rope * self.scaling,
            latent[:, 0],
            k_rope[:, 0],
            self._up_projections(weight),
            self.indexer,
            index_states,
            index_key,
            VisibleTokens(*attention_mask),  # of tracers that cut a model in layers it comes as a plain tuple
            attend_all=self.config.index_warmup,
            learns=self.training and self.learns(),
            token_mask=token_mask,
            mesh=getattr(getattr(self.kv_b_proj, "weight", None), "device_mesh", None),
        )
        return self._output(output, hidden_states), None, index_loss


def dsa_reference(
    query: torch.Tensor, weights: torch.Tensor, key: torch.Tensor, visible: torch.Tensor, topk: int
) -> list[set[int]]:
    """The tokens that each query of one row selects, loop by loop as eq. 1-2 of the V3.2-Exp report say; for tests.

        I_ts = sum_j w_tj ReLU(q_tj . k_s),   S_t = the topk visible tokens s with the largest I_ts

    The report does not say which of equal tokens is chosen; here it is the latest.

    Args:
        query: [S, H, D]; weights: [S, H]; key: [T, D], of the indexer.
        visible: bool [S, T].
    """
    chosen = []
    for t in range(len(query)):
        scores = {
            s: sum(
                weights[t, j].item() * max(0.0, torch.dot(query[t, j], key[s]).item()) for j in range(query.shape[1])
            )
            for s in range(len(key))
            if visible[t, s]
        }
        chosen.append(set(sorted(scores, key=lambda s: (scores[s], s), reverse=True)[:topk]))
    return chosen


class IndexStates(NamedTuple):
    """The indexer's queries, head weights and keys of S tokens."""

    query: torch.Tensor  # [B, S, H, D]
    weights: torch.Tensor  # float32 [B, S, H], scaled
    key: torch.Tensor  # [B, S, D], one for all heads; these are cached


class LightningIndexer(nn.Module):
    """Scores every past token for every query at a small part of attention's cost, V3.2-Exp eq. 1.

        I_ts = sum_j w_tj ReLU(q_tj . k_s)
        q_t = W_QB (query latent),   k_s = LayerNorm(W_K h_s),   w_t = W_W h_t / sqrt(heads * width)

    RoPE turns the first qk_rope_head_dim numbers of q and k, in the "half" layout, unlike the attention it serves.
    DeepSeek's code also applies a Hadamard transform to q and k, which changes no product, and rounds both to FP8,
    which is left out. LayerNorm and head weights are float32 in a loaded model, scores always.
    """

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.index_n_heads
        self.head_dim = config.index_head_dim
        self.rope_dim = config.qk_rope_head_dim
        self.topk = config.index_topk
        self.wq_b = nn.Linear(config.q_lora_rank, self.num_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        query_latent: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> IndexStates:
        """hidden_states [B, S, hidden_size], query_latent [B, S, q_lora_rank], cos and sin [B, S, Dr/2]"""
        query = project(self.wq_b, query_latent).unflatten(-1, (self.num_heads, self.head_dim))  # [B, S, H, D]
        query = query.transpose(1, 2)  # [B, H, S, D]
        query = self._rotate(query, position_embeddings).transpose(1, 2)  # [B, S, H, D]
        weights = self.weights_proj(hidden_states.to(self.weights_proj.weight.dtype)).float()  # [B, S, H]
        weights = weights * (self.num_heads * self.head_dim) ** -0.5
        return IndexStates(query, weights, self.make_key(hidden_states, position_embeddings))

    def make_key(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """hidden_states [B, S, hidden_size] -> keys [B, S, D], one for all heads"""
        projected = project(self.wk, hidden_states)
        key = self.k_norm(projected.to(self.k_norm.weight.dtype)).to(projected.dtype)  # [B, S, D]
        return self._rotate(key[:, None], position_embeddings)[:, 0]

    def _rotate(self, states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[B, heads, S, D] -> the same shape, its first `rope_dim` numbers turned"""
        rotated = apply_rotary(states[..., : self.rope_dim], *position_embeddings, layout="half")
        return torch.cat((rotated, states[..., self.rope_dim :]), dim=-1)

    @torch.no_grad()
    def select(self, states: IndexStates, key: torch.Tensor, visible: VisibleTokens, queries: slice) -> torch.Tensor:
        """The `topk` visible tokens with the best scores, of equal ones the latest, by a running top-k over blocks of keys.

        Args:
            states: of all S queries; `queries` are those to answer for.
            key: [B, T, D].

        Returns:
            int64 [B, C, at most topk], in no order; -1 stands for none.
        """
        length = states.query.shape[1]
        end = visible.total - length + queries.stop  # what comes later, none of these queries sees
        query, weights = states.query[:, queries], states.weights[:, queries]
        best = torch.empty(*query.shape[:2], 0, dtype=torch.int64, device=key.device)  # ranks
        score = triton_index_scores if kernels_run_on(key) else index_scores
        block = max(self.topk, _INDEX_BYTES // (4 * query[..., 0].numel()))
        for start in range(0, end, block):
            keys = slice(start, min(start + block, end))
            scores = score(query, weights, key[:, keys])  # [B, C, n]
            scores.masked_fill_(~visible.mask(queries, keys, length, key.device), float("-inf"))
            ranks = torch.cat((best, rank_places(scores, keys.start)), dim=-1)
            best = ranks.topk(min(self.topk, ranks.shape[-1]), dim=-1, sorted=False).values
        return ranked_places(best)


def index_scores(query: torch.Tensor, weights: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """query [B, C, H, D], weights [B, C, H], key [B, n, D] or, for each query its own, [B, C, n, D] -> float32 [B, C, n]"""
    products = _products(query.float(), key.float()).relu_()  # [B, C, H, n]
    return (weights[:, :, None] @ products)[:, :, 0]


def _products(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """query [B, C, H, D]; key [B, n, D] or, for each query its own, [B, C, n, D] -> [B, C, H, n]"""
    if key.ndim == 4:
        return query @ key.transpose(-1, -2)
    return (query.flatten(1, 2) @ key.transpose(1, 2)).unflatten(1, query.shape[1:3])


def attend_latents(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    up_projections: tuple[torch.Tensor, torch.Tensor],
    seen: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Absorbed MLA of a few queries: the latents themselves are keys and values.

    Args:
        q_nope: [B, H, C, Dn] and q_rope: [B, H, C, Dr], already scaled.
        latent, k_rope: [B, n, width], or for each query its own, [B, C, n, width].
        up_projections: W_UK [H, Dn, width of the latent] and W_UV [H, Dv, width].
        seen: bool [B or 1, C, n].

    Returns:
        [B, C, H, Dv] and probabilities float32 [B, C, H, n].
    """
    w_uk, w_uv = up_projections
    q_latent = (q_nope @ w_uk).transpose(1, 2)  # [B, C, H, width]
    scores = _products(q_latent, latent) + _products(q_rope.transpose(1, 2), k_rope)  # [B, C, H, n]
    # finite, so that a query that sees nothing (padding) stays finite
    scores = scores.float().masked_fill(~seen[:, :, None], torch.finfo(torch.float32).min)
    probs = scores.softmax(dim=-1)
    mixed = _products(probs.to(latent.dtype), latent.transpose(-1, -2))  # [B, C, H, width]
    return (mixed.transpose(1, 2) @ w_uv.transpose(1, 2)).transpose(1, 2), probs


class SumGradient(torch.autograd.Function):
    """The identity, whose gradient is summed over the processes of a group, each of which has some of the heads."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, group) -> torch.Tensor:
        ctx.group = group
        return states.view_as(states)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):  # pyrefly: ignore[bad-override]  # as PyTorch documents it
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


def index_loss(probs: torch.Tensor, scores: torch.Tensor, seen: torch.Tensor, mesh=None) -> torch.Tensor:
    """KL(attention summed over heads and normalised || softmax of index scores), summed over the queries.

    Args:
        probs: [B, C, H, n], constants here.
        scores: [B, C, n].
        seen: bool [B or 1, C, n]; a query that sees nothing (padding) adds nothing.
        mesh: the processes among which the heads are divided.
    """
    target = probs.detach().mean(dim=2)  # [B, C, n]
    if mesh is not None:
        torch.distributed.all_reduce(target.div_(mesh.size()), group=mesh.get_group())
    log_index = scores.float().masked_fill(~seen, torch.finfo(torch.float32).min).log_softmax(dim=-1)
    divergence = F.kl_div(log_index, target, reduction="none").sum(dim=-1)  # [B, C]
    return (divergence * seen.any(dim=-1)).sum()


def selected_latent_attention(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    up_projections: tuple[torch.Tensor, torch.Tensor],
    indexer: LightningIndexer,
    states: IndexStates,
    index_key: torch.Tensor,
    visible: VisibleTokens,
    attend_all: bool = False,
    learns: bool = False,
    token_mask: torch.Tensor | None = None,
    mesh=None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """MLA over the tokens that the indexer selects, V3.2-Exp eq. 2, in chunks of queries.

    Args:
        q_nope: [B, H, S, Dn] and q_rope: [B, H, S, Dr], already scaled.
        latent: [B, T, width]; k_rope: [B, T, Dr]; index_key: [B, T, D], of all tokens.
        states: the indexer's for the S queries.
        attend_all: attend to all visible tokens, the indexer only learns (dense warm-up).
        learns: compute the index loss, over the tokens attended to.
        token_mask: bool [B, S], which queries count in it; padding behind the tokens sees them. None: all.
        mesh: with tensor parallelism, the DeviceMesh of the processes that have the other heads.

    Returns:
        [B, S, H, Dv], and the index loss: its mean over the queries that count and see something.
    """
    batch, heads, length, _ = q_nope.shape
    if mesh is not None and torch.is_grad_enabled():
        # The gradient of k_rope is summed where kv_a_proj_with_mqa made it.
        latent = SumGradient.apply(latent, mesh.get_group())
    if attend_all:
        query_bytes = 4 * batch * visible.total * (heads + indexer.num_heads)
    else:
        query_bytes = 4 * batch * indexer.topk * (latent.shape[-1] + k_rope.shape[-1])
    chunk = max(1, _LATENT_BYTES // query_bytes)
    outputs, losses = [], []
    num_queries: Any = 0
    for start in range(0, length, chunk):
        queries = slice(start, min(start + chunk, length))
        end = visible.total - length + queries.stop
        chosen = None
        if attend_all or end <= indexer.topk:  # all that is visible
            seen = visible.mask(queries, slice(end), length, latent.device)
        else:
            chosen = indexer.select(states, index_key, visible, queries)
            seen = chosen >= 0
        taught = seen if token_mask is None else seen & token_mask[:, queries, None]  # [B or 1, C, n]
        arguments = (
            *(q_nope[:, :, queries], q_rope[:, :, queries], latent[:, :end], k_rope[:, :end], up_projections),
            *(states.query[:, queries], states.weights[:, queries], index_key[:, :end]),
            *(seen, taught, chosen, learns, mesh),
        )
        # in training the backward gathers again: storing the gathered latents would take S * topk of them
        run = partial(checkpoint, _attend_chosen, use_reentrant=False) if torch.is_grad_enabled() else _attend_chosen
        output, loss = run(*arguments)
        outputs.append(output)
        losses.append(loss)
        num_queries = num_queries + taught.any(dim=-1).expand(batch, -1).sum()
    return torch.cat(outputs, dim=1), torch.stack(losses).sum() / num_queries.clamp(min=1) if learns else None


def _attend_chosen(
    q_nope,
    q_rope,
    latent,
    k_rope,
    up_projections,
    index_query,
    index_weights,
    index_key,
    seen,
    taught,
    chosen,
    learns,
    mesh,
):
    """One chunk of `selected_latent_attention` -> [B, C, H, Dv], summed index loss; chosen None: all tokens; taught: what
    queries have seen that count in the loss"""
    if chosen is not None and not learns and not torch.is_grad_enabled() and kernels_run_on(latent):
        return attend_chosen_latents(q_nope, q_rope, latent, k_rope, up_projections, chosen), None
    if chosen is not None:
        latent, k_rope = gather_tokens(latent, chosen), gather_tokens(k_rope, chosen)
    output, probs = attend_latents(q_nope, q_rope, latent, k_rope, up_projections, seen)
    if not learns:
        return output, None
    index_key = index_key if chosen is None else gather_tokens(index_key, chosen)
    return output, index_loss(probs, index_scores(index_query, index_weights, index_key), taught, mesh)
