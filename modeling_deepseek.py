"""DeepSeek language models: dense GQA (DeepSeek-LLM), DeepSeekMoE, and MLA with MoE (V2, V3, R1, V3.2).

Read from top to bottom: what a forward pass returns, the decoder layer, the multi-token-prediction module, the model, its
heads. Each part of a layer has its own file:

    attention    ATTENTION_KINDS[config.attention_kinds[i]]: attention_deepseek.py says what a kind is
    MLP          config.mlp_layer_types[i]: DeepseekMLP (layers_deepseek.py) or DeepseekMoE (moe_deepseek.py, with the routers)
    kernels      transformers' attention interface (`attn_implementation`) and, for the experts of moe_deepseek.py,
                 its @use_experts_implementation (`experts_implementation`)

Papers: DeepSeek-LLM (arXiv:2401.02954), DeepSeekMoE (arXiv:2401.06066), DeepSeek-V2 (arXiv:2405.04434),
DeepSeek-V3 (arXiv:2412.19437).

Shape letters: B batch, S new tokens, T all tokens in view (past and new), H query heads, E experts.
"""

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_deepseek import AttentionInput, DeepseekAttention, View
from .cache_deepseek import GrowingLayer, check_lengths, use_growing_layers
from .compat_deepseek import cache_field, model_output, takes_cache_by_either_name
from .configuration_deepseek import DeepseekConfig
from .drafts_deepseek import Speculation  # noqa: F401
from .dsa_deepseek import DeepseekDSA
from .dsa_kernels_deepseek import index_scores  # noqa: F401
from .generation_deepseek import DeepseekGenerationMixin
from .gqa_deepseek import DeepseekGQA
from .kernels_deepseek import kernels_run_on  # noqa: F401
from .layers_deepseek import DeepseekMLP, DeepseekRMSNorm, DeepseekRotaryEmbedding, Residual
from .linear_deepseek import project
from .loading_deepseek import (
    CheckpointFiles,
    check_checkpoint,
    default_dtype,
    explain_loading_error,
    find_weights,
    ignored_mtp_keys,
    pop_block_fp8,
    read_config,
    register_expert_conversion,
    settle_experts,
)
from .losses_deepseek import (
    LayerNotes,
    LayerOutput,
    further_targets,
    places_with_further,
    share_of_step,
    sum_losses,
)
from .mla_deepseek import DeepseekMLA
from .moe_deepseek import DeepseekExperts, DeepseekMoE, DeepseekRouter, update_router_bias
from .nsa_deepseek import BlockCompressor, DeepseekNSA
from .nsa_kernels_deepseek import compressed_attention  # noqa: F401
from .prefix_deepseek import Prefix  # noqa: F401
from .selection_deepseek import rank_places  # noqa: F401
from .spans_deepseek import check_token_mask, restarts

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

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    aux_loss: torch.Tensor | None = None
    index_loss: torch.Tensor | None = None


@model_output
class DeepseekCausalLMOutput(ModelOutput):
    """
    loss: with `labels`: `lm_loss`, and in training also mtp_loss_weight * mtp_loss + aux_loss_alpha * aux_loss +
        index_loss_weight * index_loss.
    logits: [B, S or `logits_to_keep`, vocab_size].
    lm_loss: cross entropy of the next token, nats a token.
    mtp_loss: mean over the multi-token-prediction modules of their cross entropies; in training only.
        Both are divided by their targets, or by `num_items_in_batch` (the targets of the whole optimizer step) where a
        trainer gives it.
    aux_loss: sum of the layers' balance losses, without the factor; in training only. A mean over the rows.
    index_loss: sum of the layers' indexer losses, without the factor; in training with `index_topk` only. A mean over the
        tokens. With `num_items_in_batch`, `loss` has this and `aux_loss` times the part that the micro-batch's targets are
        of those of the step, so neither grows with gradient accumulation.
    The rest as in `DeepseekModelOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    lm_loss: torch.Tensor | None = None
    mtp_loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    index_loss: torch.Tensor | None = None


# ---------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------

ATTENTION_KINDS = {"gqa": DeepseekGQA, "mla": DeepseekMLA, "dsa": DeepseekDSA, "nsa": DeepseekNSA}


def kinds_of(config) -> dict[str, type[DeepseekAttention]]:
    """The kinds of attention among the layers that a config describes, each once, by their names."""
    return {name: ATTENTION_KINDS[name] for name in dict.fromkeys(config.attention_kinds)}


class DeepseekDecoderLayer(GradientCheckpointingLayer):
    """h + attention(norm(h)), then h + mlp(norm(h)); the MLP is dense or a mixture of experts."""

    _checkpoints = False

    def __init__(self, config, layer_idx: int):
        super().__init__()
        is_mtp = layer_idx >= config.num_hidden_layers
        self.is_sparse = (config.mtp_layer_type if is_mtp else config.mlp_layer_types[layer_idx]) == "sparse"
        self.residual = Residual()
        self.self_attn = ATTENTION_KINDS[config.attention_kinds[layer_idx]](config, layer_idx)
        self.mlp = DeepseekMoE(config, layer_idx) if self.is_sparse else DeepseekMLP(config, config.intermediate_size)
        self.input_layernorm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @property
    def gradient_checkpointing(self) -> bool:
        """Only while there are gradients: transformers takes the cache from a checkpointed layer, and without one `generate`
        in training mode would read each new token alone."""
        return self._checkpoints and torch.is_grad_enabled()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool):
        self._checkpoints = value

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> LayerOutput:
        """hidden_states [B, S, hidden_size]; token_mask bool [B, S], which tokens are real; token_ids int64 [B, S], where the
        model was given ids; the rest goes to the attention"""
        if token_mask is not None and self.self_attn.learns():
            kwargs["token_mask"] = token_mask
        attended, _, index_loss = self.self_attn(self.input_layernorm(self.residual.read(hidden_states)), **kwargs)
        stream = self.residual.write(hidden_states, attended)
        normed = self.post_attention_layernorm(self.residual.read(stream))
        if not self.is_sparse:
            return LayerOutput(self.residual.write(stream, self.mlp(normed)), index_loss=index_loss)
        output, balance_loss, load = self.mlp(normed, token_mask, token_ids)
        return LayerOutput(self.residual.write(stream, output), balance_loss, load, index_loss)


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

    def forward(  # pyrefly: ignore[bad-override]  # a layer with one more input
        self, hidden_states: torch.Tensor, next_embeds: torch.Tensor, **kwargs
    ) -> LayerOutput:
        """hidden_states h^(k-1) and next_embeds, each [B, S, hidden_size] -> h^k and the rest of a decoder layer's"""
        joined = torch.cat((self.enorm(next_embeds), self.hnorm(hidden_states)), dim=-1)  # [B, S, 2 * hidden_size]
        return super().forward(project(self.eh_proj, joined), **kwargs)


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
        "attentions": OutputRecorder(target_class=None, index=1, class_name="self_attn"),  # pyrefly: ignore[bad-argument-type]  # by name
        "router_logits": OutputRecorder(DeepseekRouter, index=0),
    }

    def __init__(self, config, *args, **kwargs):
        config.validate()  # it may have been edited since it was made
        super().__init__(config, *args, **kwargs)
        kinds = kinds_of(config).values()
        in_float32 = [name for kind in kinds for name in kind.float32]
        if getattr(config, "topk_method", None) == "noaux_tc":
            in_float32.append("e_score_correction_bias")
        # The first list keeps quantisers away as well.
        self._keep_in_fp32_modules = [rf".*{re.escape(name)}" for kind in kinds for name in kind.unquantised] or None
        self._keep_in_fp32_modules_strict = in_float32 or None
        self._keys_to_ignore_on_load_unexpected = ignored_mtp_keys(config)
        if config.separate_experts:
            config.model_type = f"{DeepseekConfig.model_type}_separate"  # for which no rule stacks experts
            self._can_compile_fullgraph = False  # which experts run depends on the data

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Like transformers' method, and also: checks the files first, loads without the multi-token-prediction
        weights that a checkpoint lacks, dequantises block-scaled FP8 (but keeps it on GPUs that have such
        arithmetic), picks float32 on CPUs that have no bfloat16 arithmetic, and reads pickled weights only if
        `use_safetensors` is False.

        Raises:
            ValueError: a shard is missing, truncated or no safetensors file; the message names the file.
        """
        if config is None:
            config, kwargs = read_config(cls.config_class, pretrained_model_name_or_path, kwargs)
        if pretrained_model_name_or_path is None or kwargs.get("gguf_file"):
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        config, kwargs = copy.deepcopy(config), dict(kwargs)
        settle_experts(config, kwargs)
        files = CheckpointFiles(pretrained_model_name_or_path, kwargs)
        check_checkpoint(cls, files, config, kwargs)
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True  # other files are pickles
        if kwargs.get("dtype", kwargs.get("torch_dtype")) in (None, "auto"):
            kwargs["dtype"] = default_dtype(config, kwargs.get("device_map"))
        weights = find_weights(files, config, kwargs.get("device_map"))
        with explain_loading_error(pretrained_model_name_or_path), weights.reading():
            arguments: dict[str, Any] = {**weights.arguments, **kwargs, "config": config}
            path = arguments.pop("pretrained_model_name_or_path")
            loaded = super().from_pretrained(path, *model_args, **arguments)
        weights.finish(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def save_pretrained(self, *args, **kwargs):
        """As in transformers, under the model's own class: with a class that a library substitutes (as FSDP2 does),
        transformers would copy the library's files as model code and name that class in config.json."""
        if not any(parameter.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) for parameter in self.parameters()):
            pop_block_fp8(self.config)  # of a published config.json, for weights that are plain
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
        """`moe_deepseek.update_router_bias` on this model: call it after each optimizer step."""
        return update_router_bias(self, update_rate)


class DeepseekModel(DeepseekPreTrainedModel):
    """Embedding, decoder layers and last norm. `layers` also holds the multi-token-prediction modules, after the
    model's own `num_hidden_layers` layers, as checkpoints number them; the forward runs them only on request."""

    def __init__(self, config):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        num_layers = config.num_hidden_layers
        self.layers = nn.ModuleList([DeepseekDecoderLayer(config, i) for i in range(num_layers)])
        self.layers.extend([DeepseekMTPLayer(config, num_layers + k) for k in range(config.num_nextn_predict_layers)])
        self.layer_kinds = config.attention_kinds  # the names, as the layers were built
        self.attention_kinds = kinds_of(config)
        self.norm = DeepseekRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DeepseekRotaryEmbedding.from_config(config)
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache_by_either_name
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
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
            ValueError: both or none of input_ids and inputs_embeds are given, they hold no tokens, (on a CPU) a token id
                is outside the vocabulary, `attention_mask` leaves tokens out, an interrupted pass has filled some layers
                of the cache only, or a cache comes with several documents in a row or gradient checkpointing.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids)
        if inputs_embeds.shape[1] == 0:
            raise ValueError("The input has no tokens; give at least one, such as the beginning-of-sentence token.")
        if attention_mask is None and restarts(position_ids):
            if past_key_values is not None:
                raise ValueError(
                    "`position_ids` start again within a row: these are documents that do not see each other, and a cache "
                    "would be one text. Leave `past_key_values` out; to say that it is one text, give `attention_mask`."
                )
            use_cache = False
        checkpoints = self.training and self.gradient_checkpointing and torch.is_grad_enabled()
        if checkpoints and past_key_values is not None:
            raise ValueError(
                "`past_key_values` is given in training with gradient checkpointing, which computes layers twice and would "
                "fill it twice. Leave it out, or call model.gradient_checkpointing_disable()."
            )
        if use_cache and not checkpoints and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            use_growing_layers(past_key_values, self.make_cache_layer, self.config.num_hidden_layers)
            layers: Iterable[Any] = self.layers[: self.config.num_hidden_layers]
            check_lengths(past_key_values, [layer.self_attn.layer_idx for layer in layers])

        visible = self.create_causal_mask(inputs_embeds, attention_mask, position_ids, past_key_values)
        arguments = self.layer_arguments(inputs_embeds, visible, input_ids)
        hidden_states, notes = inputs_embeds, LayerNotes(self.training)
        for layer, kind in zip(self.layers[: self.config.num_hidden_layers], self.layer_kinds, strict=False):
            output = layer(hidden_states, past_key_values=past_key_values, **arguments[kind], **kwargs)
            hidden_states = notes.take(layer, output)
        return DeepseekModelOutput(
            last_hidden_state=self.norm(hidden_states),
            **cache_field(past_key_values),
            aux_loss=notes.aux_loss,
            index_loss=notes.index_loss,
        )

    def predict_further(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor | None]:
        """Runs the multi-token-prediction modules over whole rows, without a cache.

        Module k sees token t + k at place t. The last k places of a row have no such token; they get the row's first
        ones, which no earlier place attends to; what they predict means nothing, and they count in no loss.

        Args:
            hidden_states: the model's `last_hidden_state` for the other arguments, which are as in `forward`.

        Returns:
            One [B, S, hidden_size] a module, before its output norm; in training also the sums of the modules' balance
            losses and of their indexers' losses.
        """
        inputs_embeds = self._embed(input_ids) if inputs_embeds is None else inputs_embeds
        visible = self.create_causal_mask(inputs_embeds, attention_mask, position_ids, past_key_values=None)
        arguments = self.layer_arguments(inputs_embeds, visible)
        states, notes, first = [], LayerNotes(self.training), self.config.num_hidden_layers
        for k, (layer, kind) in enumerate(zip(self.layers[first:], self.layer_kinds[first:], strict=True), start=1):
            # positional, since reentrant gradient checkpointing tracks only such arguments
            settings = arguments[kind] | {"token_mask": places_with_further(k, inputs_embeds, *visible[1:])}
            output = layer(hidden_states, inputs_embeds.roll(-k, dims=1), **settings, **kwargs)
            hidden_states = notes.take(layer, output)
            states.append(hidden_states)
        return states, notes.aux_loss, notes.index_loss

    def run_mtp_module(
        self,
        index: int,
        hidden_states: torch.Tensor,
        next_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
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
        index += self.config.num_hidden_layers
        visible = self.create_causal_mask(next_embeds, attention_mask, position_ids, past_key_values)
        arguments = self.layer_arguments(next_embeds, visible)
        output = self.layers[index](
            hidden_states, next_embeds, past_key_values=past_key_values, **arguments[self.layer_kinds[index]]
        )
        return output[0]

    def layer_arguments(
        self, inputs_embeds: torch.Tensor, visible: tuple, token_ids: torch.Tensor | None = None
    ) -> dict[str, dict]:
        """What a layer is given besides its input and the cache, for each kind of attention in `layer_kinds`.

        Args:
            inputs_embeds: only dtype and device matter.
            visible: what `create_causal_mask` returned.
            token_ids: int64 [B, S], for routers that go by them.
        """
        views, position_ids, token_mask = visible
        shared = {
            "position_ids": position_ids,
            "position_embeddings": self.rotary_emb(inputs_embeds, position_ids),
            "token_mask": token_mask,
            "token_ids": token_ids,
        }
        arguments = {}
        for kind in self.attention_kinds:
            mask, has_past = views[kind]  # by unpacking: to tracers it is a plain tuple
            arguments[kind] = {"attention_mask": mask, "has_past": has_past, **shared}
        return arguments

    def create_causal_mask(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> tuple[dict[str, View], torch.Tensor, torch.Tensor | None]:
        """What each query may see. Tracers by torch.fx (llm-compressor) take a function of this name as one step.

        Returns:
            for each kind of attention among the layers what its queries may see, positions [B or 1, S], and in training
            which tokens are real, bool [B, S] (None: all).
        """
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + past_length
        recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # what must hold for other lengths too
        if attention_mask is not None and attention_mask.ndim == 2 and isinstance(past_length, int) and not recorded:
            check_token_mask(attention_mask, past_length + inputs_embeds.shape[1])
        token_mask = None
        if self.training and attention_mask is not None and attention_mask.shape == inputs_embeds.shape[:2]:
            token_mask = attention_mask.bool()
        layers: Iterable[Any] = self.layers
        learns = self.training and any(layer.self_attn.learns() for layer in layers)
        tokens = AttentionInput(inputs_embeds, attention_mask, position_ids, past_key_values, past_length, learns)
        views = {name: kind.view(self.config, tokens) for name, kind in self.attention_kinds.items()}
        return views, position_ids, token_mask

    def make_cache_layer(self, index: int) -> GrowingLayer:
        """An empty cache layer of the kind that layer `index` wants; the indices of prediction modules follow those
        of the layers."""
        return self.attention_kinds[self.layer_kinds[index]].make_cache_layer(self.config)

    def _embed(self, input_ids: Any) -> torch.Tensor:
        try:
            return self.embed_tokens(input_ids)  # [B, S, hidden_size]
        except IndexError as error:
            raise ValueError(
                f"`input_ids` holds ids from {int(input_ids.min())} to {int(input_ids.max())}, but `vocab_size` is "
                f"{self.embed_tokens.num_embeddings}: allowed are 0 to {self.embed_tokens.num_embeddings - 1}. Use "
                "the checkpoint's own tokenizer, or call model.resize_token_embeddings(len(tokenizer))."
            ) from error


class DeepseekForCausalLM(DeepseekPreTrainedModel, DeepseekGenerationMixin):
    """The language model: `DeepseekModel` and an output head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan: Any = {"lm_head": (["hidden_states"], ["logits"])}

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
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
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
        logits = project(self.lm_head, outputs.last_hidden_state[:, positions])  # [B, S or kept, vocab_size]

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
                aux_loss = sum_losses((aux_loss, mtp_aux_loss))
                index_loss = sum_losses((index_loss, mtp_index_loss))
            targets = kwargs.get("shift_labels", labels[..., 1:]).to(loss.device)
            share = share_of_step(targets, kwargs.get("num_items_in_batch"))
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
            targets = further_targets(labels, position_ids, k)
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
        """The mask that `generate` makes outside a compiled step, in the form that `forward` takes."""
        past_key_values = cache if past_key_values is None else past_key_values
        kind, *others = kinds_of(config).values()
        if others:
            return attention_mask  # each makes its own
        return kind.mask_for_generation(
            config, attention_mask, inputs_embeds=inputs_embeds, past_key_values=past_key_values, **kwargs
        )


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
