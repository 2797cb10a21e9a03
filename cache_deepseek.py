"""Cache layers: one that grows without copying the past at every token, one in int8, and those of sparse attention.

transformers' `DynamicLayer` concatenates: each new token copies the whole cache once, which at long context costs as
much as attention itself. `GrowingLayer` keeps spare room behind the tokens and grows by half when full, so that a
token is copied at most about three times in its life, whatever the length. `NSACacheLayer` adds what NSA needs besides
keys and values.

Shape letters: B batch, K key/value heads, S new tokens, T all tokens, D width of a head.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from .compat_deepseek import StaticIndexedLayer

_LEAST_ROOM = 256  # tokens of spare room in a new buffer
_UNDO_TOKENS = 512  # tokens by which a layer that keeps only the last ones can be cropped without notice
PAGED_CACHE_SIZES = ("num_blocks", "max_batch_tokens", "max_requests_per_batch")  # what `size_paged_cache` sets
_CPU_TEXTS, _OPEN_CPU_TEXTS = 32, 4  # written at once on a CPU: of known requests; long ones of those yet to come
_CPU_BATCH_TOKENS = 1024  # of a forward pass there; the mask holds this number times the tokens of the cache
_SPARE_PAGES = 1.25  # of what the texts need, since transformers begins no text over a cache that is nearly full


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` whose `keys` and `values` are the filled parts of larger buffers.

    The other methods (crop, reorder, repeat, select) put other tensors in their places, and `_append` then finds either
    a view of the buffer, which it extends, or another tensor, which it copies into a new buffer. They act on all of
    `token_states`, the attributes that hold one entry a token, [B, K, T, D] each.
    """

    keys: Any  # tensors, once tokens have come
    values: Any
    token_states: tuple[str, ...] = ("keys", "values")
    keeps_more = False  # than keys and values

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._buffers: dict[str, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [B, K, S, D] keys and values; returns all of them, [B, K, T, D], as views of the buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self._append_all(
            ("keys", "values"), (self.keys, self.values), (key_states, value_states)
        )
        return self.keys, self.values

    def _append_all(self, names: tuple[str, ...], past: tuple, new: tuple) -> tuple[torch.Tensor, ...]:
        append = self._append
        if torch.is_grad_enabled() and any(states.requires_grad for states in new):
            # Writing into a buffer that the graph has already read would break its backward pass.
            append = _concatenate
        return tuple(append(*arguments) for arguments in zip(names, past, new, strict=True))

    def _append(self, name: str, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        past_length = past.shape[-2] if past.numel() else 0
        length = past_length + new.shape[-2]
        buffer: Any = self._buffers.get(name)
        extends = buffer is not None and past.data_ptr() == buffer.data_ptr() and past.shape[0] == buffer.shape[0]
        # what was made under `torch.inference_mode` cannot be written to outside
        extends = extends and (torch.is_inference_mode_enabled() or not buffer.is_inference())
        if not extends or length > buffer.shape[-2]:
            batch, heads, _, width = new.shape
            capacity = length + max(_LEAST_ROOM, length // 2)
            buffer = new.new_empty(batch, heads, capacity, width)
            if past_length:
                buffer[:, :, :past_length] = past
            self._buffers[name] = buffer
        buffer[:, :, past_length:length] = new
        return buffer[:, :, :length]

    def crop(self, tokens_to_remove: int) -> Any:
        """Takes back the last `-tokens_to_remove` tokens -> how many those were.

        Before transformers 5.17 a number from 0 on is the length to keep, as it was for every cache then.
        """
        length = self.get_seq_length()
        super().crop(tokens_to_remove)  # keys and values
        removed = length - self.get_seq_length()
        if removed:
            self._change_extras(lambda states: states[:, :, :-removed])
        return removed

    def reorder_cache(self, beam_idx: torch.LongTensor):
        """Row b becomes what row beam_idx[b] was."""
        super().reorder_cache(beam_idx)
        self._change_extras(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int):
        """Each row becomes `repeats` rows."""
        super().batch_repeat_interleave(repeats)
        self._change_extras(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor):
        """Only the rows `indices` stay."""
        super().batch_select_indices(indices)
        self._change_extras(lambda states: states[indices])

    def static_twin(self, max_cache_len: int) -> CacheLayerMixin:
        """An empty static layer with room for `max_cache_len` tokens that stores the same tensors."""
        return StaticLayer(max_cache_len)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the layer holds, by name."""
        return {name: getattr(self, name) for name in self.token_states if getattr(self, name) is not None}

    def put_tensors(self, tensors: dict[str, torch.Tensor]):
        """Fills an empty layer with what `tensors` of another gave."""
        self.lazy_initialization(tensors["keys"], tensors["values"])
        for name, states in tensors.items():
            setattr(self, name, states)

    def _change_extras(self, change: Callable[[torch.Tensor], torch.Tensor]):
        for name in self.token_states[2:]:
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))

    def reset(self) -> None:
        """Forgets all tokens and frees the memory."""
        for name in self.token_states:
            setattr(self, name, None)
        self._buffers.clear()
        self.is_initialized = False  # before what some releases do to initialised layers: zero them at their length
        super().reset()


def _concatenate(name: str, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return torch.cat((past, new), dim=-2) if past.numel() else new


class LatentLayer(GrowingLayer):
    """A `GrowingLayer` for MLA: `keys` and `values` (latent and rotated key) are parts of one buffer, so that attention
    reads both in one product."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [B, K, S, Dk] keys and [B, K, S, Dv] values; returns all of them as views of `entries`."""
        if torch.is_grad_enabled() and key_states.requires_grad:
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, new = self.entries, torch.cat((key_states, value_states), dim=-1)
        if past is None:  # a new text, or other tensors were put in their places
            past = torch.cat((self.keys, self.values), dim=-1) if self.keys.numel() else new[:, :, :0]
        entries = self._append("entries", past, new)
        self.keys, self.values = entries.split((key_states.shape[-1], value_states.shape[-1]), dim=-1)
        return self.keys, self.values

    def static_twin(self, max_cache_len: int) -> CacheLayerMixin:
        """As in `GrowingLayer`."""
        return StaticLatentLayer(max_cache_len)

    @property
    def entries(self) -> torch.Tensor | None:
        """[B, K, T, Dk + Dv], what is held, keys first; None where they do not lie side by side."""
        buffer = self._buffers.get("entries")
        if buffer is None or self.keys.data_ptr() != buffer.data_ptr() or len(self.keys) != len(buffer):
            return None
        return buffer[:, :, : self.keys.shape[2]]


class StaticLatentLayer(StaticLayer):
    """A `StaticLayer` for MLA whose `keys` and `values` are parts of one buffer, `entries`, as in `LatentLayer`."""

    keys: Any
    values: Any

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes the buffer for states of these shapes."""
        super().lazy_initialization(key_states, value_states)
        self.entries = torch.cat((self.keys, self.values), dim=-1)  # [B, K, max_cache_len, Dk + Dv]
        self.keys, self.values = self.entries.split((self.k_head_dim, self.v_head_dim), dim=-1)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.entries)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts [B, K, S, Dk] keys and [B, K, S, Dv] values behind the others; returns all slots as views of `entries`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[-2]
        slots = torch.arange(count, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(count)
        self.entries[:, :, slots] = torch.cat((key_states, value_states), dim=-1)
        keys, values = self.entries.split((self.k_head_dim, self.v_head_dim), dim=-1)
        return keys, values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row b becomes what row beam_idx[b] was, in place."""
        if self.is_initialized:
            self.entries.copy_(self.entries.index_select(0, beam_idx.to(self.device)))


class IndexedLayer(LatentLayer):
    """A `LatentLayer` that also holds the keys of a lightning indexer; its methods are those of transformers'
    `DynamicIndexedLayer`, so that either may be used."""

    token_states: tuple[str, ...] = ("keys", "values", "indexer_keys")
    keeps_more = True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.indexer_keys: torch.Tensor | None = None  # [B, 1, T, D]

    def static_twin(self, max_cache_len: int) -> CacheLayerMixin:
        """As in `GrowingLayer`.

        Raises:
            ValueError: this release of transformers has no such layer.
        """
        if StaticIndexedLayer is None:
            raise ValueError(
                "This release of transformers has no static cache for an indexer's keys; it came with 5.11. Leave "
                "`cache_implementation` out, or upgrade transformers."
            )
        return StaticIndexedLayer(max_cache_len)

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Appends [B, S, D] keys; returns all of them, [B, T, D]."""
        new = indexer_key_states[:, None]
        past = new[:, :, :0] if self.indexer_keys is None else self.indexer_keys
        (self.indexer_keys,) = self._append_all(("indexer_keys",), (past,), (new,))
        return self.indexer_keys[:, 0]


class Int8Layer(IndexedLayer):
    """A layer that keeps `keys` and `values` as int8, with a float32 scale for each token and head.

    For MLA that is one scale for a token's latent and one for its key with position; an indexer's keys stay as they
    are. `update` returns all tokens in their own dtype, so one layer at a time is there in full.
    """

    token_states: tuple[str, ...] = ("keys", "values", "key_scales", "value_scales", "indexer_keys")

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.key_scales: torch.Tensor | None = None  # [B, K, T, 1]
        self.value_scales: torch.Tensor | None = None  # [B, K, T, 1]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [B, K, S, D] keys and values; returns all of them, [B, K, T, D], as they are kept."""
        (key_codes, key_scales), (value_codes, value_scales) = _quantise(key_states), _quantise(value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_codes, value_codes)
        new = (key_codes, value_codes, key_scales, value_scales)
        names = self.token_states[:4]
        past = [getattr(self, name) for name in names]
        past = [states[:, :, :0] if old is None else old for old, states in zip(past, new, strict=True)]
        self.keys, self.values, self.key_scales, self.value_scales = self._append_all(names, tuple(past), new)
        dtype = key_states.dtype
        return (self.keys * self.key_scales).to(dtype), (self.values * self.value_scales).to(dtype)


def _quantise(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., D] -> int8 [..., D], float32 [..., 1]; their product is `states` to within half a step of 1/127 of the largest"""
    states = states.detach().float()
    scales = states.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (states / scales).round_().to(torch.int8), scales


class NSACacheLayer(GrowingLayer):
    """What native sparse attention keeps of T tokens.

        keys, values        of the selected branch, all tokens
        compressed          keys and values of the compressed entries, all that are complete, [B, K, entries, D] each;
                            row b's entries are counted from its own first token, so rows may have fewer than there is
                            room for.
        raw                 keys and values that the next entries are made of, the last tokens only, [B, K, t, D] each
        windowed            keys and values of the window branch, the last tokens only, [B, K, t, D] each

    Keys of the selected and the window branch are rotated, those of the compressed branch are not.

    "The last tokens" are those that a next query needs and `_UNDO_TOKENS` more, so that tokens can be taken back
    (`crop`), as speculative decoding does; after `activate_past_recording` all tokens are kept until the next `crop`.
    """

    keeps_more = True

    def __init__(self, window: int, block: int, **kwargs):
        super().__init__(**kwargs)
        self.needed_windowed = window - 1
        self.needed_raw = block - 1
        self.record_past = False
        self._forget()

    def _forget(self):
        self.compressed: tuple[torch.Tensor, ...] = ()
        self.raw: tuple[torch.Tensor, ...] = ()
        self.windowed: tuple[torch.Tensor, ...] = ()

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args,
        windowed: tuple[torch.Tensor, torch.Tensor],
        raw: tuple[torch.Tensor, torch.Tensor],
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends the states of S tokens, [B, K, S, D] each; returns the selected branch's keys and values, [B, K, T, D]."""
        if self.compressed:
            names = ("raw.keys", "raw.values", "windowed.keys", "windowed.values")
            states = self._append_all(names, self.raw + self.windowed, raw + windowed)
            self.raw, self.windowed = states[:2], states[2:]
        else:  # a first prompt, however long, need not be copied: `trim` follows
            self.compressed = tuple(states[:, :, :0] for states in raw)
            self.raw, self.windowed = raw, windowed
        return super().update(key_states, value_states)

    def static_twin(self, max_cache_len: int) -> CacheLayerMixin:
        """
        Raises:
            ValueError: there is none.
        """
        raise ValueError(
            "`past_key_values` is made of `StaticLayer`s, which have no room for what NSA caches. Pass an empty "
            "`DynamicCache()` without offloading, or none."
        )

    def put_compressed(self, rows: slice, first: int, keys: torch.Tensor, values: torch.Tensor):
        """Puts entries [rows, K, n, D] at places first, first + 1, ... of the rows."""
        stop = first + keys.shape[2]
        missing = stop - self.compressed[0].shape[2]
        if missing > 0:
            # zeros, for what other rows do not use yet is multiplied by a probability of zero
            room = tuple(
                states.new_zeros(*self.keys.shape[:2], missing, states.shape[-1]) for states in (keys, values)
            )
            self.compressed = self._append_all(("compressed.keys", "compressed.values"), self.compressed, room)
        frozen = self.compressed[0].is_inference() and not torch.is_inference_mode_enabled()
        if frozen or (torch.is_grad_enabled() and keys.requires_grad):
            self.compressed = tuple(states.clone() for states in self.compressed)
        for states, new in zip(self.compressed, (keys, values), strict=True):
            states[rows, :, first:stop] = new

    def recent(self, group: tuple[torch.Tensor, ...], rows: slice, start: int, stop: int) -> tuple[torch.Tensor, ...]:
        """The slots start .. stop - 1 of some rows of `raw` or `windowed`."""
        oldest = self.get_seq_length() - group[0].shape[2]
        return tuple(states[rows, :, start - oldest : stop - oldest] for states in group)

    def trim(self):
        """Drops old tokens of `raw` and `windowed` once there are twice as many as needed."""
        if not self.record_past:
            self.raw = _last_tokens(self.raw, self.needed_raw + _UNDO_TOKENS)
            self.windowed = _last_tokens(self.windowed, self.needed_windowed + _UNDO_TOKENS)

    def activate_past_recording(self):
        """Keeps all tokens until the next `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> int:
        """As in `GrowingLayer`.

        Raises:
            ValueError: the tokens that the next query would need have been let go.
        """
        removed = super().crop(tokens_to_remove)
        if removed and self.compressed:
            self.raw, self.windowed = (tuple(x[:, :, :-removed] for x in group) for group in (self.raw, self.windowed))
            for group, needed in ((self.raw, self.needed_raw), (self.windowed, self.needed_windowed)):
                if group[0].shape[2] < min(needed, self.get_seq_length()):
                    raise ValueError(
                        f"`crop` takes back {removed} tokens, more than the {_UNDO_TOKENS} that an NSA cache is sure to "
                        "keep. Call `activate_past_recording()` on the cache before the tokens come, or start anew."
                    )
        if self.record_past:
            self.record_past = False
            self.trim()
            self.record_past = True
        return removed

    def reset(self):
        """Forgets all tokens and frees the memory."""
        super().reset()
        self._forget()

    def reorder_cache(self, beam_idx: torch.LongTensor):
        """Row b becomes what row beam_idx[b] was."""
        super().reorder_cache(beam_idx)
        self._change_batch(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int):
        """Each row becomes `repeats` rows."""
        super().batch_repeat_interleave(repeats)
        self._change_batch(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor):
        """Only the rows `indices` stay."""
        super().batch_select_indices(indices)
        self._change_batch(lambda states: states[indices])

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the layer holds, by name."""
        groups = {name: getattr(self, name) for name in ("compressed", "raw", "windowed")}
        return super().tensors() | {f"{name}.{i}": x for name, group in groups.items() for i, x in enumerate(group)}

    def put_tensors(self, tensors: dict[str, torch.Tensor]):
        """Fills an empty layer with what `tensors` of another gave."""
        super().put_tensors({name: tensors[name] for name in self.token_states})
        for name in ("compressed", "raw", "windowed"):
            setattr(self, name, tuple(tensors[f"{name}.{i}"] for i in range(2)))

    def _change_batch(self, change: Callable[[torch.Tensor], torch.Tensor]):
        self.compressed, self.raw, self.windowed = (
            tuple(change(states) for states in group) for group in (self.compressed, self.raw, self.windowed)
        )


def _last_tokens(group: tuple[torch.Tensor, ...], kept: int) -> tuple[torch.Tensor, ...]:
    """The last `kept` tokens of tensors [B, K, t, D] as copies, once t is twice that; so each is copied once or twice."""
    if not group or group[0].shape[2] <= 2 * kept:
        return group
    return tuple(states[:, :, -kept:].clone() for states in group)


def check_offloading(what: str):
    """
    Raises:
        ValueError: there is no device for `what` to move layers from and to.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            f"{what} moves layers between a GPU's memory and the CPU's, but there is no CUDA device. Leave it out; "
            "`past_key_values=model.int8_cache()` saves memory on a CPU."
        )


def use_growing_layers(cache: Cache | None, make_layer: Callable[[int], GrowingLayer], num_layers: int) -> None:
    """Replaces a cache's empty `DynamicLayer`s and `StaticLayer`s by the model's own layers; other layers (quantised)
    stay.

    `generate` and users make plain caches; the model's forward calls this on them.

    Args:
        make_layer: index of a layer -> an empty cache layer for it.
        num_layers: of the model.

    Raises:
        ValueError: the cache is an offloading one, and there is no CUDA device or no layer that could be offloaded; or a
            static one, and a layer has no static form.
    """
    if cache is None:
        return
    if getattr(cache, "offloading", False):
        # It moves whole layers between devices at each step, so that nothing is gained by growing in place.
        check_offloading("An offloaded cache")
        if any(make_layer(i).keeps_more for i in range(num_layers)):
            raise ValueError(
                "Sparse attention keeps more than keys and values, which transformers' offloaded cache does not move. "
                "Leave `cache_implementation` out."
            )
        return
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:  # layers that it would make one by one
        cache.layers.extend(make_layer(i) for i in range(len(cache.layers), num_layers))
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[i] = make_layer(i)
        elif type(layer) is StaticLayer and not layer.is_initialized:
            cache.layers[i] = make_layer(i).static_twin(layer.max_cache_len)


def check_lengths(cache: Cache, indices: Iterable[int]):
    """
    Args:
        indices: of the cache's layers that the model fills.

    Raises:
        ValueError: they hold different numbers of tokens, as after a pass that was interrupted.
    """
    if torch.compiler.is_compiling():
        return
    lengths = [cache.layers[i].get_seq_length() for i in indices if i < len(cache.layers)]
    if len({length for length in lengths if isinstance(length, int)}) > 1:  # those of static layers are tensors
        raise ValueError(
            f"The layers of `past_key_values` hold {min(lengths)} to {max(lengths)} tokens: a pass over it was "
            "interrupted. Begin with a new cache."
        )


def take_back(layer: Any, count: int):
    """Takes back the last `count` tokens of a layer, static ones too."""
    if not count or not layer.is_initialized:
        return
    lengths = [getattr(layer, name, None) for name in ("cumulative_length", "indexer_cumulative_length")]
    if isinstance(lengths[0], torch.Tensor):  # a static layer; what lies behind its length is never seen
        for length in lengths:
            if length is not None:
                length.sub_(count)
    else:
        layer.crop(-count)


def move_tokens(layer: CacheLayerMixin, start: int, count: int, targets: list[int]):
    """Copies the `count` tokens from slot `start` on to the slots from targets[b] on, in each row b of a layer."""
    for name in getattr(layer, "token_states", IndexedLayer.token_states):
        states = getattr(layer, name, None)  # [B, K, T, D], an indexer's keys in transformers' layers [B, T, D]
        if states is None:
            continue
        slots = torch.tensor(targets, device=states.device)[:, None] + torch.arange(count, device=states.device)
        slots = slots.view(len(targets), *[1] * (states.ndim - 3), count, 1)
        moved = states.narrow(-2, start, count).clone()
        states.scatter_(-2, slots.expand_as(moved), moved)


def size_paged_cache(paging, said, hints, context_tokens: int, on_cpu: bool):
    """Sizes a paged cache by what the texts need, where transformers would take a share of the free memory.

    Args:
        paging: transformers' `ContinuousBatchingConfig` of a manager, changed in place.
        said: the one that the user gave, or None: what is set there stays.
        hints: number and longest lengths of the requests, or None where they are yet to come. On accelerators the cache
            then keeps transformers' share: their memory is there for it.
        context_tokens: of the model, the longest text where no length is known.
    """
    if paging.num_blocks is not None or getattr(said, "max_memory_percent", None) is not None:
        return
    known = hints is not None and hints.num_requests > 0
    if not known and not on_cpu:
        return
    texts = hints.num_requests if known else _OPEN_CPU_TEXTS
    if getattr(said, "max_requests_per_batch", None) is not None:
        texts = min(texts, said.max_requests_per_batch) if known else said.max_requests_per_batch
    elif on_cpu:
        texts = min(texts, _CPU_TEXTS)
    texts = min(texts, paging.max_requests_per_batch)
    if known:
        paging.max_requests_per_batch = texts
    tokens = context_tokens
    if known and hints.max_generated_length:
        tokens = hints.max_prompt_length + hints.max_generated_length
    elif known:
        tokens = max(context_tokens, hints.max_prompt_length + 1)
    pages_of_a_text = -(-tokens // paging.page_size)
    paging.num_blocks = math.ceil(texts * pages_of_a_text * _SPARE_PAGES) + 1
    if on_cpu and paging.max_batch_tokens is None:
        paging.max_batch_tokens = max(texts, min(_CPU_BATCH_TOKENS, texts * tokens))
