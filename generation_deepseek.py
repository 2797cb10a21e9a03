"""Generation beyond transformers' own: drafts by the model's multi-token-prediction modules (drafts_deepseek.py), prompts
in chunks with a progress bar, prefixes that are kept on disk, an int8 cache, continuous batching over a paged cache.

Shape letters: B batch.
"""

import functools
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.utils import logging

from .attention_deepseek import COMPILED_STEP, INT8_CACHE, LIBRARY_CACHE, PAGED_CACHE, STATIC_CACHE, require
from .cache_deepseek import PAGED_CACHE_SIZES, Int8Layer, check_offloading, size_paged_cache
from .compat_deepseek import CACHE_NAME, HAS_PAGED_CACHE, gives_cache_by_its_name
from .drafts_deepseek import GRAMMAR_LIBRARIES, STATEFUL_PROCESSORS, Speculation, check_new_tokens, count_cached
from .prefix_deepseek import Prefix, describe_model, read_prefix

_CHUNK = 1024  # tokens of a chunk of `prefill`


_Generation: Any = GenerationMixin  # whose annotations want `self` to be a whole model


class DeepseekGenerationMixin(_Generation):
    """transformers' generation, and `mtp_tokens`: how many tokens the multi-token-prediction modules draft a round.

    It may stand in a call of `generate`, in a `GenerationConfig` and in generation_config.json. `use_mtp=True`,
    transformers' own switch, drafts as many as there are modules.
    """

    generate = gives_cache_by_its_name(GenerationMixin.generate)

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs):
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        mtp_tokens = model_kwargs.pop("mtp_tokens", getattr(config, "mtp_tokens", None))
        if getattr(config, "use_mtp", None) and not mtp_tokens:
            mtp_tokens = self.config.num_nextn_predict_layers or 1
        config.use_mtp = None  # transformers' own loop is for one row and one fixed layer number
        config.mtp_tokens = None if config.is_assistant else mtp_tokens
        return config, model_kwargs

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` reads its signature
    def prepare_inputs_for_generation(self, *args, **kwargs):
        if kwargs.get("next_sequence_length", 0) is None:  # all of `input_ids`, in a first pass
            ids, mask, past = args[0], kwargs.get("attention_mask"), count_cached(kwargs.get(CACHE_NAME))
            embeds = kwargs.get("inputs_embeds") if kwargs.get("is_first_iteration") else None
            if past and embeds is None and mask is not None and mask.ndim == 2 and mask.shape[1] == ids.shape[1]:
                # assisted decoding would run the whole text again, behind what the cache holds of it
                kwargs["next_sequence_length"] = ids.shape[1] - past
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if CACHE_NAME in inputs:
            # by its older name, by which PEFT's virtual tokens look for it: else they would come before each new token
            inputs["past_key_values"] = inputs.pop(CACHE_NAME)
        return inputs

    def _prepare_cache_for_generation(self, generation_config: GenerationConfig, *args, **kwargs):
        name = generation_config.cache_implementation
        if name not in (None, "dynamic", "dynamic_full"):  # the last one is what older releases say for assistants
            self._check_cache_implementation(name)
        return super()._prepare_cache_for_generation(generation_config, *args, **kwargs)

    def _check_cache_implementation(self, name: str):
        """
        Raises:
            ValueError: there is no such cache for this model, or on this machine.
        """
        kinds = self.model.attention_kinds.values()
        remedies = ["Leave it out", "say 'dynamic'"]
        if all(STATIC_CACHE in kind.supports for kind in kinds):
            remedies.append("say 'static'")
        if all(INT8_CACHE in kind.supports for kind in kinds):
            remedies.append("pass `past_key_values=model.int8_cache()` to save memory")
        require(
            kinds,
            LIBRARY_CACHE if "offloaded" in name or name == "quantized" else STATIC_CACHE,
            f"`cache_implementation` is {name!r}",
            f"It keeps more than keys and values. {', or '.join(remedies)}.",
        )
        if "offloaded" in name:
            check_offloading(f"`cache_implementation` is {name!r}, which")

    def _valid_auto_compile_criteria(self, model_kwargs: dict, generation_config: GenerationConfig) -> bool:
        """As in transformers, where shapes alone say what a step does; and on CPUs too for those who give a
        `compile_config`, which transformers ignores there."""
        compiles = all(COMPILED_STEP in kind.supports for kind in self.model.attention_kinds.values())
        if generation_config.compile_config is not None:
            generation_config.compile_config._compile_all_devices = True
        return compiles and super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
        mtp_tokens = generation_config.mtp_tokens
        if mtp_tokens is None:
            return
        if not isinstance(mtp_tokens, int) or isinstance(mtp_tokens, bool) or mtp_tokens < 0:
            raise ValueError(f"`mtp_tokens` is {mtp_tokens!r}: allowed are 0 (no drafts), 1, 2, ...")
        if not mtp_tokens:
            return
        if not self.config.num_nextn_predict_layers:
            raise ValueError(
                f"`mtp_tokens` is {mtp_tokens}, but this model has no multi-token-prediction module "
                "(`num_nextn_predict_layers` is 0, or its weights are not in the checkpoint). Leave `mtp_tokens` out, "
                "or draft by `prompt_lookup_num_tokens` or an `assistant_model`."
            )
        if generation_mode not in ("greedy_search", "sample"):
            raise ValueError(
                f"`mtp_tokens` goes with greedy search and sampling, not with {str(generation_mode.value)!r}. Leave "
                "`mtp_tokens` out, or `num_beams`, `assistant_model` and `prompt_lookup_num_tokens`."
            )
        for name, allowed in (
            ("output_attentions", (None, False)),
            ("output_hidden_states", (None, False)),
            ("guidance_scale", (None, 1)),
            ("use_cache", (None, True)),
        ):
            value = getattr(generation_config, name, None)
            if value not in allowed:
                raise ValueError(f"`{name}`={value!r} does not go with `mtp_tokens`. Leave one of them out.")

    def _sample(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer=None,
        **model_kwargs,
    ):
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        if not generation_config.mtp_tokens:
            return super()._sample(*arguments, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)
        rows = len(input_ids)
        if synced_gpus:
            raise ValueError(
                "`mtp_tokens` does not go with `synced_gpus` (FSDP, ZeRO-3): each process would run its own number of "
                "forwards. Gather the weights first, or leave `mtp_tokens` out."
            )
        if streamer is not None and rows > 1:
            raise ValueError(
                f"A `streamer` with `mtp_tokens` takes one row, the batch has {rows}: they advance unevenly."
            )
        if rows > 1 and generation_config._pad_token_tensor is None and len(stopping_criteria) > 1:
            raise ValueError("`pad_token_id` is not set, and rows may end at different lengths. Set `pad_token_id`.")
        if getattr(model_kwargs[CACHE_NAME], "offloading", False):
            raise ValueError(
                "`mtp_tokens` does not go with an offloaded cache: tokens taken back could still be on their way between "
                "the devices. Leave `cache_implementation` or `mtp_tokens` out, or use `model.int8_cache()`."
            )
        return Speculation(self, *arguments, model_kwargs).run(streamer)

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        """As in transformers, but a cache that holds all of the prompt is refused: it would be read again behind itself."""
        check_new_tokens(input_ids.shape[1], generation_config, model_kwargs)
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _assisted_decoding(self, input_ids: torch.LongTensor, logits_processor: LogitsProcessorList, *args, **kwargs):
        """As in transformers, which calls processors for rejected drafts as well."""
        generation_config = args[1] if len(args) > 1 else kwargs.get("generation_config")
        past, count = check_new_tokens(input_ids.shape[1], generation_config, kwargs)
        if past:
            if kwargs.get("inputs_embeds") is not None or past + count != input_ids.shape[1]:
                raise ValueError(
                    f"`past_key_values` holds {past} tokens, and `input_ids` are the {input_ids.shape[1]} behind them. "
                    "`prompt_lookup_num_tokens` and `assistant_model` need all tokens so far as ids: pass them."
                )
            if kwargs.get("attention_mask") is None:
                kwargs["attention_mask"] = torch.ones_like(input_ids)
        for one in logits_processor:
            if isinstance(one, STATEFUL_PROCESSORS) or type(one).__module__.split(".")[0] in GRAMMAR_LIBRARIES:
                raise ValueError(
                    f"The logits processor {type(one).__name__} must see each token of the text once, which "
                    "`prompt_lookup_num_tokens` and `assistant_model` do not go with. Leave them out, or draft by "
                    "`mtp_tokens`."
                )
        return super()._assisted_decoding(input_ids, logits_processor, *args, **kwargs)

    @torch.no_grad()
    def prefill(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        chunk_size: int = _CHUNK,
        progress: bool = True,
    ) -> Cache:
        """Runs a long prompt in chunks, with a progress bar; no logits are computed.

        Args:
            input_ids: [B, tokens]; of a cache that holds some of them already, too.
            attention_mask: [B, tokens], 1 for tokens and 0 for padding.
            past_key_values: the cache to fill; by default a new one.
            chunk_size: tokens of a chunk. What a chunk adds to the memory at its peak grows with it.

        Returns:
            The cache of all tokens. To generate from it, give `generate` all tokens so far and at least one new one.
        """
        if chunk_size < 1:
            raise ValueError(f"`chunk_size` is {chunk_size}: allowed are 1, 2, ...")
        cache = DynamicCache(config=self.config) if past_key_values is None else past_key_values
        length, past = input_ids.shape[1], count_cached(cache)
        if past > length:
            raise ValueError(f"`past_key_values` holds {past} tokens, `input_ids` {length}: it must hold all of them.")
        positions = torch.arange(length, device=input_ids.device)[None]
        if attention_mask is not None:
            positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        with logging.tqdm(total=length - past, unit="token", desc="prefill", disable=not progress) as bar:
            for start in range(past, length, chunk_size):
                stop = min(start + chunk_size, length)
                self.model(
                    input_ids=input_ids[:, start:stop],
                    attention_mask=None if attention_mask is None else attention_mask[:, :stop],
                    position_ids=positions[:, start:stop],
                    past_key_values=cache,
                    use_cache=True,
                )
                bar.update(stop - start)
        return cache

    def int8_cache(self) -> Cache:
        """An empty cache that keeps latents (or keys and values) as int8, for `past_key_values`; see `Int8Layer`.

        Raises:
            ValueError: the model's attention has no such cache (native sparse attention).
        """
        require(
            self.model.attention_kinds.values(), INT8_CACHE, "An int8 cache is asked for", "Use the default cache."
        )
        cache = DynamicCache(config=self.config)
        cache.layers = [Int8Layer() for _ in range(self.config.num_hidden_layers)]
        return cache

    def make_prefix(self, input_ids: torch.LongTensor, int8: bool = False, **kwargs) -> Prefix:
        """Runs a shared prompt [1, tokens] once, for `Prefix.extend` and `Prefix.save`.

        Args:
            int8: keep it in an int8 cache.
            kwargs: `chunk_size` and `progress` of `prefill`.
        """
        if input_ids.ndim != 2 or len(input_ids) != 1 or not input_ids.shape[1]:
            raise ValueError(
                f"`input_ids` has shape {tuple(input_ids.shape)}: a prefix is one row without padding, [1, tokens]."
            )
        cache = self.prefill(input_ids, past_key_values=self.int8_cache() if int8 else None, **kwargs)
        held: list[Any] = cache.layers
        layers = [layer.tensors() for layer in held]
        return Prefix(input_ids, layers, *self._prefix_kind(int8))

    def load_prefix(self, path, int8: bool = False) -> Prefix:
        """The prefix that `Prefix.save` wrote; `int8` as it was made.

        Raises:
            ValueError: no prefix lies there, or it was made by another model, config, dtype or kind of cache.
        """
        make_layer, made_by = self._prefix_kind(int8)
        return read_prefix(path, made_by, make_layer, self.device)

    def _prefix_kind(self, int8: bool):
        """What makes the empty cache layer of an index, and what a prefix is made by"""

        def make_layer(index: int):
            return Int8Layer() if int8 else self.model.make_cache_layer(index)

        names = dict.fromkeys(type(make_layer(i)).__name__ for i in range(self.config.num_hidden_layers))
        return make_layer, describe_model(self) | {"cache": ", ".join(names)}

    def init_continuous_batching(self, generation_config=None, continuous_batching_config=None, **kwargs):
        """As in transformers; its paged cache then holds MLA's latents, kv_lora_rank + qk_rope_head_dim numbers a token.

        Where the config says nothing, `generate_batch` sizes the cache by its requests, and a manager on a CPU by a few
        texts of the model's context; what does not fit into memory, and managers on accelerators, get transformers' share
        of what is free.

        Raises:
            ValueError: the attention is sparse (NSA, or MLA with an indexer), which needs more than keys and values; or
                this release of transformers has no such cache.
        """
        if not HAS_PAGED_CACHE:
            raise ValueError(
                "This release of transformers has no continuous batching that the model can use; it came with 5.19. "
                "Use `generate`, or upgrade transformers."
            )
        require(
            self.model.attention_kinds.values(),
            PAGED_CACHE,
            f"Continuous batching is asked for (`model_type` {self.config.checkpoint_model_type!r})",
            "transformers' has room for keys and values only. Use `generate`.",
        )
        (kind,) = self.model.attention_kinds.values()  # pages are alike, so layers must be
        manager = super().init_continuous_batching(generation_config, continuous_batching_config, **kwargs)
        if "_create_batch_processor" in vars(manager):  # one that was kept
            return manager
        paging = manager.continuous_batching_config
        by_memory = {name: getattr(paging, name) for name in PAGED_CACHE_SIZES}
        size_paged_cache(
            paging,
            continuous_batching_config,
            kwargs.get("workload_hints"),
            self.config.max_position_embeddings,
            self.device.type == "cpu",
        )
        create = manager._create_batch_processor

        def create_sized():
            manager.model = _PagedView(self, kind.paged_view(self.config))
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
    """The model as transformers' paged cache sees it, with another config."""

    def __init__(self, model, config):
        self._model = model
        self.config = config

    def __getattr__(self, name: str):
        return getattr(self._model, name)
