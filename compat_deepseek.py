"""The contact with transformers that differs from release to release.

Everything that has another name, or is missing, in one of the supported releases passes through this module, so that
the others read as if there were one transformers. What a release can do is asked of the release, not of its number.

    CACHE_NAME    how the release calls the cache in calls and outputs: "past_key_values" until 5.23, "cache" since 5.24

Inside this repository the cache is `past_key_values` everywhere; users may say either name on any release.
"""

import functools
import inspect
from dataclasses import dataclass

import torch
from transformers import cache_utils, generation
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    create_causal_mask as _create_causal_mask,
    create_masks_for_generate as _create_masks_for_generate,
)

CACHE_NAME = "cache" if "cache" in inspect.signature(_create_causal_mask).parameters else "past_key_values"
CACHE_NAMES = ("past_key_values", "cache")

# The static cache layer with room for an indexer's keys; None in releases without one (until 5.10).
StaticIndexedLayer = getattr(cache_utils, "StaticIndexedLayer", None)

# PyTorch 2.6 cannot tell an export from a compilation.
is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)

_PAGING = inspect.signature(getattr(generation, "ContinuousBatchingConfig", object)).parameters
HAS_PAGED_CACHE = "page_size" in _PAGING  # continuous batching over pages of one layer, since 5.19


def _rename_cache(kwargs: dict, name: str) -> None:
    """Gives the cache among keyword arguments one name; a paged cache, which is no `Cache`, stays under `cache`.

    Raises:
        ValueError: both names are given.
    """
    given = [n for n in CACHE_NAMES if kwargs.get(n) is None or isinstance(kwargs[n], Cache) or n == "past_key_values"]
    values = {n: kwargs.pop(n) for n in given if n in kwargs}
    caches = [value for value in values.values() if value is not None]
    if len(caches) == 2 and caches[0] is not caches[1]:
        raise ValueError(
            "`cache` and `past_key_values` are two names of one argument, and both are given. Leave one out."
        )
    if values:
        kwargs[name] = caches[0] if caches else None


def takes_cache_by_either_name(forward):
    """Decorates a method whose parameter is `past_key_values`: callers may say `cache` as well."""

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        if "cache" in kwargs:
            _rename_cache(kwargs, "past_key_values")
        return forward(self, *args, **kwargs)

    return wrapper


def gives_cache_by_its_name(generate):
    """Decorates a method of transformers': callers may say either name, the release gets its own."""

    @functools.wraps(generate)
    def wrapper(self, *args, **kwargs):
        _rename_cache(kwargs, CACHE_NAME)
        return generate(self, *args, **kwargs)

    return wrapper


def model_output(cls):
    """Makes a dataclass of an output whose field `past_key_values` gets the name that the release has for it.

    The other name reads the same value: transformers has it where the field is `cache`, and it is added where not.
    """
    if CACHE_NAME == "cache":
        if "past_key_values" in cls.__annotations__:
            names = {"past_key_values": CACHE_NAME}
            cls.__annotations__ = {names.get(name, name): kind for name, kind in cls.__annotations__.items()}
            del cls.past_key_values
            cls.cache = None
    elif not hasattr(cls, "cache"):
        cls.cache = property(lambda self: self.past_key_values)
    return dataclass(cls)


def cache_field(cache: Cache | None) -> dict:
    """The keyword argument that puts a cache into an output."""
    return {CACHE_NAME: cache}


def create_causal_mask(*, past_key_values: Cache | None, **kwargs):
    """transformers' `create_causal_mask`; shapes as there."""
    kwargs[CACHE_NAME] = past_key_values
    return _create_causal_mask(**kwargs)


def create_masks_for_generate(*, past_key_values: Cache | None, **kwargs):
    """transformers' `create_masks_for_generate`; shapes as there."""
    kwargs[CACHE_NAME] = past_key_values
    return _create_masks_for_generate(**kwargs)


def update_paged_cache(
    key: torch.Tensor, value: torch.Tensor, layer_idx: int, kwargs: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """Puts keys and values [1, K, S, D] of many texts into a paged cache, where the release leaves that to the layer.

    Until 5.23 the attention interface does it, from the keyword argument `cache`.

    Returns:
        Keys and values to attend to, [1, K, T, D].
    """
    if CACHE_NAME == "cache" and kwargs.get("cache") is not None:
        paged = kwargs.pop("cache")
        key, value = paged.update(key, value, layer_idx, kwargs=kwargs)
    return key, value
