"""A cache layer that grows without copying the past at every token.

transformers' `DynamicLayer` concatenates: each new token copies the whole cache once, which at long context costs as
much as attention itself. `GrowingLayer` keeps spare room behind the tokens and grows by half when full, so that a
token is copied at most about three times in its life, whatever the length.
"""

import torch
from transformers.cache_utils import Cache, DynamicLayer

_LEAST_ROOM = 256  # tokens of spare room in a new buffer


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` whose `keys` and `values` are the filled parts of larger buffers.

    Everything else (crop, reorder, repeat, select, reset) is inherited: those methods put other tensors into `keys`
    and `values`, and `_append` then finds either a view of the buffer, which it extends, or another tensor, which it
    copies into a new buffer.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._buffers: dict[str, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [B, K, S, D] keys and values; returns all of them, [B, K, T, D], as views of the buffers."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            # Writing into a buffer that the graph has already read would break its backward pass.
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        past_length = past.shape[-2] if past.numel() else 0
        length = past_length + new.shape[-2]
        buffer = self._buffers.get(name)
        extends = buffer is not None and past.data_ptr() == buffer.data_ptr() and past.shape[0] == buffer.shape[0]
        if not extends or length > buffer.shape[-2]:
            batch, heads, _, width = new.shape
            capacity = length + max(_LEAST_ROOM, length // 2)
            buffer = new.new_empty(batch, heads, capacity, width)
            if past_length:
                buffer[:, :, :past_length] = past
            self._buffers[name] = buffer
        buffer[:, :, past_length:length] = new
        return buffer[:, :, :length]

    def reset(self) -> None:
        """Forgets all tokens and gives the memory back."""
        super().reset()
        self._buffers.clear()


def use_growing_layers(cache: Cache | None) -> None:
    """Lets the still empty `DynamicLayer`s of a cache grow in place; other layers (static, quantised) stay.

    `generate` and users make plain `DynamicCache`s; this is called on them by the model's forward.
    """
    if cache is None or getattr(cache, "offloading", False):
        return  # offloading moves whole layers between devices at each step, so nothing is gained
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[i] = GrowingLayer()
