"""Mixture of experts with shared experts, the routers of DeepSeekMoE, V2 and V3, and what keeps them balanced.

Papers: DeepSeekMoE (arXiv:2401.06066), DeepSeek-V2 (arXiv:2405.04434), DeepSeek-V3 (arXiv:2412.19437),
auxiliary-loss-free balancing (arXiv:2408.15664).

Shape letters: B batch, S tokens of a row, N = B * S tokens, D hidden size, E routed experts, G groups of experts,
P experts per token, F inner width of an expert.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers.utils.generic import maybe_autocast

from .layers_deepseek import DeepseekMLP
from .linear_deepseek import FEW_ROWS, compiles_few_rows, linear

# ---------------------------------------------------------------------------------------------------------------
# Routing: scores -> selection -> weights
#
# A selection gets scores [N, E], the router, and the tokens' ids int64 [N], for choices that go by the token itself; the
# ids are None where a model is given embeddings, and in prediction modules. It returns indices int64 [N, P].
# ---------------------------------------------------------------------------------------------------------------


def _select_greedy(scores: torch.Tensor, router: "DeepseekRouter", token_ids: torch.Tensor | None) -> torch.Tensor:
    """The P best experts: DeepSeekMoE, V2-Lite. [N, E] -> [N, P]"""
    return scores.topk(router.top_k, dim=-1, sorted=False).indices


def _select_group_limited(
    scores: torch.Tensor, router: "DeepseekRouter", token_ids: torch.Tensor | None
) -> torch.Tensor:
    """The P best experts of the best groups, a group being as good as its best expert: V2. [N, E] -> [N, P]"""
    return _select_in_best_groups(scores, lambda grouped: grouped.amax(dim=-1), router)


def _select_bias_corrected(
    scores: torch.Tensor, router: "DeepseekRouter", token_ids: torch.Tensor | None
) -> torch.Tensor:
    """As V2's, but on scores plus the correction bias, a group being as good as its two best: V3. [N, E] -> [N, P]"""
    biased = scores + router.e_score_correction_bias  # [N, E]
    return _select_in_best_groups(biased, lambda grouped: grouped.topk(2, dim=-1).values.sum(dim=-1), router)


def _select_in_best_groups(scores: torch.Tensor, rate: Callable, router: "DeepseekRouter") -> torch.Tensor:
    """`rate` makes group scores [N, G] from expert scores [N, G, E/G]."""
    if router.topk_group < router.n_group:
        grouped = scores.unflatten(-1, (router.n_group, -1))  # [N, G, E/G]
        best_groups = rate(grouped).topk(router.topk_group, dim=-1, sorted=False).indices  # [N, topk_group]
        # a tensor of False, since scatter with a number cannot be traced
        none = torch.zeros_like(best_groups, dtype=torch.bool)
        excluded = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best_groups, none)  # [N, G]
        # -inf, not 0: biased scores can be negative, and a 0 would then beat an expert of a chosen group
        scores = grouped.masked_fill(excluded[..., None], float("-inf")).flatten(-2)  # [N, E]
    return scores.topk(router.top_k, dim=-1, sorted=False).indices  # [N, P]


SELECTIONS = {
    "greedy": _select_greedy,
    "group_limited_greedy": _select_group_limited,
    "noaux_tc": _select_bias_corrected,
}


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    """A function with a name, since routers are pickled with it. [N, E] -> [N, E]"""
    return logits.softmax(dim=-1)


SCORES = {"softmax": _softmax, "sigmoid": torch.sigmoid}


class DeepseekRouter(nn.Module):
    """Chooses P of E experts for each token and weighs them.

        s = score(x W^T)            softmax (MoE, V2) or sigmoid (V3); float32 throughout: rounding changes the choice
        chosen = select(s)          see SELECTIONS; the bias of noaux_tc takes part in the choice only
        w = s[chosen]               divided by their sum if norm_topk_prob
        w = w * routed_scaling_factor

    The hub code of V2 scales only where it does not normalise; no published config sets both, and V3 does both.
    DeepSeek's code fills excluded groups with 0 in V2, which is the same as -inf where scores are positive.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.top_k = config.num_experts_per_tok
        self.n_group = config.n_group
        self.topk_group = config.topk_group
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.score = SCORES[config.scoring_func]
        self.select = SELECTIONS[config.topk_method]
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.topk_method == "noaux_tc":
            # A buffer, so that no optimizer touches it; float32, since its steps (0.001) vanish in bfloat16.
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))
        else:
            self.e_score_correction_bias: Any = None
        # Tokens that each expert got in training since the last bias update. Not a buffer: DistributedDataParallel
        # would overwrite the counts of every process with those of the first.
        self.expert_load: torch.Tensor | None = None  # float32 [E]
        self.counted_in_copies = False

    def _replicate_for_data_parallel(self):
        """`nn.DataParallel` runs copies, which are gone after the pass, and the loads that they counted with them."""
        self.counted_in_copies |= self.training
        return super()._replicate_for_data_parallel()

    def _apply(self, fn, recurse=True):
        """Lets the bias follow the model to another device, but not to another dtype."""
        exact = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if exact is not None and not exact.is_meta:
            self.e_score_correction_bias = exact.to(self.e_score_correction_bias.device)
        return self

    def forward(
        self, hidden_states: torch.Tensor, token_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[N, D], ids int64 [N] -> logits float32 [N, E], weights float32 [N, P], indices int64 [N, P]"""
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            logits = linear(hidden_states.float(), self.weight.float())  # [N, E]
        scores = self.score(logits)
        indices = self.select(scores.detach(), self, token_ids)  # [N, P]
        weights = scores.gather(-1, indices)  # [N, P]
        if self.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, weights * self.routed_scaling_factor, indices

    def count_load(self, load: torch.Tensor):
        """Adds one batch's tokens per expert, float32 [E], to `expert_load`."""
        self.expert_load = load if self.expert_load is None else self.expert_load + load


# ---------------------------------------------------------------------------------------------------------------
# Experts
# ---------------------------------------------------------------------------------------------------------------


@use_experts_implementation
class DeepseekExperts(nn.Module):
    """E gated MLPs as two stacked parameters; gate and up projection are one matrix.

    On disk they are `experts.{i}.{gate,up,down}_proj.weight`; `loading_deepseek.py` holds the conversion. The forward
    below is the "eager" implementation; transformers' experts interface puts "grouped_mm" and others in its place.
    """

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Understands the names of the files, one weight an expert, as well as those in memory.

        Trainers give `load_state_dict` what lies in a checkpoint. A part of the experts (one shard of several) changes
        those, and the others count as missing.
        """
        by_parameter = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
        for name, parts in by_parameter.items():
            keys = [[f"{prefix}{i}.{part}.weight" for part in parts] for i in range(self.num_experts)]
            absent = [key for row in keys for key in row if key not in state_dict]
            if len(absent) == self.num_experts * len(parts):
                continue  # stacked already, or not there at all
            parameter = getattr(self, name)
            shape = (parameter.shape[1] // len(parts), parameter.shape[2])
            given = {key: state_dict.pop(key) for row in keys for key in row if key in state_dict}
            wrong = [key for key, weight in given.items() if weight.shape != shape]
            if wrong:
                error_msgs.append(f"{wrong[0]} has shape {tuple(given[wrong[0]].shape)}; the model's is {shape}.")
                continue
            missing_keys += absent
            if absent:
                own = dict(
                    zip([key for row in keys for key in row], self._by_expert(parameter, len(parts)), strict=True)
                )
                given = own | given
            stacked = [torch.cat([given[key] for key in row]) for row in keys]  # E of [2F, D] or [D, F]
            state_dict[prefix + name] = torch.stack(stacked)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @staticmethod
    def _by_expert(parameter: torch.Tensor, parts: int) -> list[torch.Tensor]:
        """[E, parts * F, D] -> E * parts of [F, D], expert by expert"""
        return [part for expert in parameter.detach() for part in expert.chunk(parts)]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """One pass over the experts that got tokens: tokens sorted by expert, one matrix product each.

        Args:
            hidden_states: [N, D].
            top_k_index: int64 [N, P]; the number E marks a slot that another process computes.
            top_k_weights: [N, P].

        Returns:
            [N, D], the weighted sum over each token's experts.
        """
        if torch.jit.is_tracing():  # as for compilers; a trace of the loop would keep the experts of its example
            return ALL_EXPERTS_FUNCTIONS["batched_mm"](self, hidden_states, top_k_index, top_k_weights)
        if torch.compiler.is_compiling():  # the loop below depends on the data, which cannot be one graph
            # ONNX has no grouped product; of a batched one with few rows Inductor makes loops that copy no weights
            batched = torch.onnx.is_in_onnx_export() or compiles_few_rows(hidden_states)
            name = "batched_mm" if batched else "grouped_mm"
            return ALL_EXPERTS_FUNCTIONS[name](self, hidden_states, top_k_index, top_k_weights)
        num_tokens, top_k = top_k_index.shape
        # Once, not at each use: under LoRA each access to a parameter builds base + update for all experts.
        gate_up_proj, down_proj = self.gate_up_proj, self.down_proj  # [E, 2F, D], [E, D, F]
        if num_tokens <= FEW_ROWS:
            return self._run_few(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)
        # At once, too: in training each indexing makes a gradient as large as all experts.
        gate_up_proj, down_proj = gate_up_proj.unbind(), down_proj.unbind()  # E of [2F, D], [D, F]

        def run(expert: int, rows: torch.Tensor) -> torch.Tensor:  # [n, D] -> [n, D]
            gate, up = linear(rows, gate_up_proj[expert]).chunk(2, dim=-1)  # [n, F] each
            return linear(self.act_fn(gate) * up, down_proj[expert])

        order = top_k_index.flatten().argsort(stable=True)  # [N * P]; slots of other processes come last
        counts = top_k_index.flatten().bincount(minlength=self.num_experts).tolist()[: self.num_experts]
        order = order[: sum(counts)]
        token = order // top_k
        inputs = hidden_states[token].split(counts)  # E of [n, D]
        weights = top_k_weights.flatten()[order, None].split(counts)  # E of [n, 1]
        output = torch.zeros_like(hidden_states)
        for expert, rows_of in enumerate(token.split(counts)):
            if counts[expert]:
                output.index_add_(0, rows_of, run(expert, inputs[expert]) * weights[expert])
        return output

    def _run_few(self, hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj) -> torch.Tensor:
        """The same for decoding, where the number of operations decides the speed: two for each expert."""
        top_k, chosen = top_k_index.shape[1], top_k_index.flatten().tolist()
        if len(hidden_states) == 1 and max(chosen) < self.num_experts:
            return self._run_one(hidden_states, chosen, top_k_weights, gate_up_proj, down_proj)
        slots = sorted((e, slot) for slot, e in enumerate(chosen) if e < self.num_experts)
        if not slots:
            return torch.zeros_like(hidden_states)
        counts = Counter(expert for expert, _ in slots)  # tokens of each expert, in the order of `slots`
        order = torch.tensor([slot for _, slot in slots], device=hidden_states.device)
        token = order // top_k
        inputs = hidden_states[token].split(tuple(counts.values()))  # [n, D] each
        inner = torch.cat([linear(rows, gate_up_proj[e]) for rows, e in zip(inputs, counts, strict=True)])
        gate, up = inner.chunk(2, dim=-1)  # [slots, F] each
        # The weights come before the projection, which is linear.
        inner = (self.act_fn(gate) * up * top_k_weights.flatten()[order, None]).split(tuple(counts.values()))
        outputs = torch.cat([linear(rows, down_proj[e]) for rows, e in zip(inner, counts, strict=True)])
        # under autocast the products have another dtype
        return torch.zeros_like(hidden_states).index_add_(0, token, outputs.to(hidden_states.dtype))

    def _run_one(self, hidden_states, chosen: list[int], top_k_weights, gate_up_proj, down_proj) -> torch.Tensor:
        """The same for one token, all of whose experts are here: nothing to sort."""
        inner = torch.cat([linear(hidden_states, gate_up_proj[e]) for e in chosen])  # [P, 2F]
        gate, up = inner.chunk(2, dim=-1)  # [P, F] each
        inner = (self.act_fn(gate) * up * top_k_weights.T).split(1)  # P of [1, F]
        outputs = torch.cat([linear(row, down_proj[e]) for row, e in zip(inner, chosen, strict=True)])  # [P, D]
        return outputs.sum(dim=0, keepdim=True).to(hidden_states.dtype)


class DeepseekSeparateExperts(nn.ModuleList):
    """E gated MLPs as a module each: what libraries that quantise Linear layers, or prune or trace them, expect.

    The names are those of the files, so nothing is converted. Experts without tokens take no part in a forward.
    """

    def __init__(self, config):
        super().__init__(DeepseekMLP(config, config.moe_intermediate_size) for _ in range(config.n_routed_experts))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As `DeepseekExperts.forward`."""
        order = top_k_index.flatten().argsort(stable=True)  # [N * P]
        counts = top_k_index.flatten().bincount(minlength=len(self)).tolist()
        token = order // top_k_index.shape[1]
        inputs = hidden_states[token].split(counts)  # E of [n, D]
        # as rows of a batch: compressed-tensors takes one scale for all rows of a matrix, and one for each row of a batch
        outputs = [expert(rows[None])[0] for expert, rows in zip(self, inputs, strict=True) if len(rows)]
        weighted = torch.cat(outputs) * top_k_weights.flatten()[order, None]
        return torch.zeros_like(hidden_states).index_add_(0, token, weighted.to(hidden_states.dtype))


class DeepseekMoE(nn.Module):
    """h + sum_i w_i expert_i(h) over the routed choice + shared(h); the residual is added by the decoder layer."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.gate = DeepseekRouter(config, layer_idx)
        self.experts = DeepseekSeparateExperts(config) if config.separate_experts else DeepseekExperts(config)
        self.shared_experts = (
            DeepseekMLP(config, config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )
        self.score = SCORES[config.scoring_func]
        self.aux_loss_alpha = config.aux_loss_alpha

    def count_load(self, load: torch.Tensor):
        """Notes tokens per expert, float32 [E], at the router: at the active one of wrappers that have several."""
        gate: Any = self.gate
        if not hasattr(gate, "count_load"):  # a wrapper that passes no attributes on
            gate = next(module for module in gate.modules() if hasattr(module, "count_load"))
        gate.count_load(load)

    def _check_loaded(self, hidden_states: torch.Tensor):
        """
        Raises:
            ValueError: the stacked experts have no numbers, since what loaded the model goes by the names in the files.
        """
        weight = self.experts._parameters.get("gate_up_proj")
        if weight is None or not weight.is_meta or hidden_states.is_meta or hasattr(self.experts, "_hf_hook"):
            return
        raise ValueError(
            "The routed experts have no weights: accelerate's `load_checkpoint_in_model` looks for one tensor an expert, as "
            "the files have it, and in memory experts are stacked. Load by `from_pretrained(..., device_map=...)`, or make "
            "the model from a config with `separate_experts=True`."
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states: [B, S, D].
            token_mask: bool [B, S], true for real tokens; None where all are. Only balancing looks at it.
            token_ids: int64 [B, S], for selections that go by them; None where there are none.

        Returns:
            [B, S, D]; in training also the layer's balance loss (float32 scalar, None if `aux_loss_alpha` is 0) and
            its tokens per expert (float32 [E]). They are returned, not kept, so that a layer under gradient
            checkpointing, which runs twice, is counted once.
        """
        self._check_loaded(hidden_states)
        shape = hidden_states.shape
        tokens = hidden_states.reshape(-1, shape[-1])  # [N, D]
        logits, weights, indices = self.gate(tokens, None if token_ids is None else token_ids.reshape(-1))  # ids [N]
        output = self.experts(tokens, indices, weights.to(tokens.dtype)).view(shape)  # [B, S, D]
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden_states)
        if not self.training:
            return output, None, None

        chosen = F.one_hot(indices, logits.shape[-1]).sum(dim=1).float().view(*shape[:2], -1)  # [B, S, E]
        if token_mask is not None:
            chosen = chosen * token_mask[..., None]
        balance_loss = None
        if self.aux_loss_alpha:
            scores = self.score(logits).view(*shape[:2], -1)  # [B, S, E]
            balance_loss = sequence_balance_loss(scores, chosen, token_mask)
        return output, balance_loss, chosen.sum(dim=(0, 1))


# ---------------------------------------------------------------------------------------------------------------
# Balance
# ---------------------------------------------------------------------------------------------------------------


def sequence_balance_loss(
    scores: torch.Tensor, chosen: torch.Tensor, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Sequence-wise balance loss, DeepSeek-V3 eq. 17-20 without the factor alpha; 1 at perfect balance.

        L = sum_i f_i P_i,   f_i = E / (P T) * sum_t 1[expert i chosen for t],   P_i = 1/T * sum_t s_it / sum_j s_jt

    averaged over the rows of the batch. f counts the experts that were really used, as DeepSeek's code does; the
    formula of the paper counts the top P of the unbiased scores.

    Args:
        scores: [B, S, E], positive.
        chosen: [B, S, E], 1 where a token visits an expert, all 0 for padding.
        token_mask: bool [B, S], true for real tokens; padding is left out, and so is a row that is all padding.
    """
    shares = scores / scores.sum(dim=-1, keepdim=True)  # [B, S, E]
    lengths = shares.new_full((len(shares), 1), shares.shape[1])  # [B, 1]
    if token_mask is not None:
        shares = shares * token_mask[..., None]
        lengths = token_mask.sum(dim=1, keepdim=True).clamp(min=1)
    top_k = chosen.sum(dim=-1).amax().clamp(min=1)  # 0 where all is padding
    fractions = chosen.sum(dim=1) * (chosen.shape[-1] / (top_k * lengths))  # [B, E]
    per_row = (fractions * shares.sum(dim=1) / lengths).sum(dim=-1)  # [B]
    return per_row.mean() if token_mask is None else per_row.sum() / token_mask.any(dim=1).sum().clamp(min=1)


@torch.no_grad()
def update_router_bias(model: nn.Module, update_rate: float = 1e-3) -> dict[int, torch.Tensor]:
    """Auxiliary-loss-free balancing (arXiv:2408.15664, algorithm 1): b_i += update_rate * sign(mean load - load_i).

    Call it after each optimizer step. Loads are summed over the processes of the default group first, so every
    process makes the same update.

    Args:
        model: a DeepSeek model, plain or wrapped (DistributedDataParallel, PEFT, ...).
        update_rate: step of the bias, 0.001 in V3; 0 only reads the loads.

    Returns:
        For each sparse layer its number of tokens per expert since the last call, float32 [E]. Routers without a
        bias are reported too, not changed. Empty if nothing was trained.

    Raises:
        ValueError: the model was trained by `nn.DataParallel` on several devices, which loses the loads.
    """
    # by its own attributes: wrappers (PEFT's `modules_to_save`) pass on those of the router inside
    routers: list[Any] = [module for module in model.modules() if "expert_load" in vars(module)]
    if any(router.counted_in_copies for router in routers):
        raise ValueError(
            "the model was trained by nn.DataParallel, whose copies counted the tokens of the experts and are gone. Start a "
            "process for each GPU (accelerate launch or torchrun, DistributedDataParallel), or show it one GPU "
            "(CUDA_VISIBLE_DEVICES=0)."
        )
    distributed = dist.is_available() and dist.is_initialized()
    loads = {}
    for router in routers:
        load = router.expert_load
        if distributed:
            load = torch.zeros(router.weight.shape[0], device=router.weight.device) if load is None else load
            dist.all_reduce(load)
        if load is None or (distributed and not load.any()):
            continue
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias += update_rate * (load.mean() - load).sign()
        loads[router.layer_idx] = load
        router.expert_load = None
    return loads
