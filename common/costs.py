"""What each kind of attention costs: parameters, multiply-adds, numbers in the cache, numbers read and kept.

One class a kind, `attention_costs` for a layer; planner (tools/plan.py) and pretraining (pretrain/cost.py) ask these and never
the name of a kind.

Letters: H query heads, K key/value heads, T tokens in view; for MLA Dn / Dr / Dv the widths of a head and C the latent's.
"""

from typing import NamedTuple

import numpy as np


class Part(NamedTuple):
    """A component of the model, counted."""

    total: float = 0  # parameters
    active: float = 0  # of these, what one token uses
    macs: float = 0  # multiply-adds for one token, attention to other tokens left out

    def __add__(self, other: "Part") -> "Part":  # type: ignore[override]
        return Part(*(mine + its for mine, its in zip(self, other, strict=True)))

    def __mul__(self, times: float) -> "Part":  # type: ignore[override]
        return Part(*(value * times for value in self))


def matrix(numel: float) -> Part:
    """Weights that each token is multiplied with once."""
    return Part(numel, numel, numel)


def vector(numel: float) -> Part:
    """Norms and biases, whose operations are not counted."""
    return Part(numel, numel, 0)


class GQACosts:
    """Grouped-query attention; the costs of one layer."""

    branches = 1  # each with keys and values of its own

    def __init__(self, config):
        self.config = config

    def parts(self) -> dict[str, Part]:
        """Parameters by component."""
        config = self.config
        hidden, head, heads = config.hidden_size, config.head_dim, config.num_attention_heads
        widths = heads * head + self.branches * 2 * config.num_key_value_heads * head
        part = matrix(hidden * widths) + matrix(heads * head * hidden)
        if config.attention_bias:
            part += vector(widths + hidden)
        return {"attention": part}

    def macs(self, keys: np.ndarray, decoding: bool) -> np.ndarray:
        """Multiply-adds between queries and what they attend to, one number a query.

        Args:
            keys: for each query the tokens that it may see, itself included.
            decoding: new tokens over a cached past, where MLA works on latents; else tokens among themselves.
        """
        return 2.0 * self.config.num_attention_heads * self.config.head_dim * keys

    def idle_macs(self, context: int) -> float:
        """Of the multiply-adds in `parts`, those that a token over a cache of `context` tokens, itself counted, saves."""
        return 0.0

    def training_flops(self, row_tokens: int) -> tuple[float, float]:
        """Forward FLOPs for a token, the mean over a row: scores and weighted sums of the attention; scores of an indexer."""
        return self._flops_of_a_key() * mean_keys(row_tokens, row_tokens), 0.0

    def _flops_of_a_key(self) -> float:
        return 2 * self.config.num_attention_heads * 2 * self.config.head_dim

    def cache_values(self) -> dict[str, float]:
        """Numbers that the cache keeps: for each token by kind, and `per sequence` whatever its length."""
        return {"keys and values": 2 * self.config.num_key_value_heads * self.config.head_dim}

    def values_read(self, context: int) -> float:
        """Numbers of the cache that one new token reads."""
        return context * sum(self.cache_values().values())

    def saved(self) -> tuple[float, float]:
        """What a layer keeps of a token for its backward pass besides MLP and layer norms: numbers that are normalised, and
        others (queries, keys, values, outputs)."""
        query = self.config.num_attention_heads * self.config.head_dim
        pairs = self.branches * 2 * self.config.num_key_value_heads * self.config.head_dim
        return 0.0, (1 + self.branches) * query + pairs


class NSACosts(GQACosts):
    """Native sparse attention: three branches of grouped-query attention."""

    branches = 3

    def parts(self) -> dict[str, Part]:
        """As above, with compressors and gates."""
        config, heads, head = self.config, self.config.num_attention_heads, self.config.head_dim
        block = config.nsa_compress_block_size
        compressor = block * head * 2 * head + 2 * head * head  # its two matrices
        # run once for `stride` tokens and each key/value head, for keys and for values
        runs = config.num_key_value_heads / config.nsa_compress_stride
        part = super().parts()["attention"]
        part += Part(compressor, compressor, compressor * runs) * 2 + vector(2 * block * head)
        part += matrix(config.hidden_size * heads * 3) + vector(heads * 3)
        return {"attention": part}

    def keys_of_branches(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Compressed entries, selected tokens (at most) and tokens of the window that queries with `keys` tokens attend to."""
        config = self.config
        compressed = np.maximum(0, (keys - config.nsa_compress_block_size) // config.nsa_compress_stride + 1)
        selected = np.minimum(keys, config.nsa_num_select_blocks * config.nsa_select_block_size)
        return compressed, selected, np.minimum(keys, config.nsa_window_size)

    def macs(self, keys: np.ndarray, decoding: bool) -> np.ndarray:
        """As above."""
        return super().macs(sum(self.keys_of_branches(keys)), decoding)

    def training_flops(self, row_tokens: int) -> tuple[float, float]:
        """As above."""
        config = self.config
        keys = mean_keys(row_tokens, row_tokens) / config.nsa_compress_stride
        keys += mean_keys(config.nsa_window_size, row_tokens)
        keys += mean_keys(config.nsa_num_select_blocks * config.nsa_select_block_size, row_tokens)
        return self._flops_of_a_key() * keys, 0.0

    def cache_values(self) -> dict[str, float]:
        """As above; the last tokens are those that the next query needs."""
        config = self.config
        pair = super().cache_values()["keys and values"]
        return {
            "keys and values": pair,
            "compressed keys and values": pair / config.nsa_compress_stride,
            "per sequence": pair * (config.nsa_window_size - 1 + config.nsa_compress_block_size - 1),
        }

    def values_read(self, context: int) -> float:
        """As above."""
        entries = sum(int(count[0]) for count in self.keys_of_branches(np.array([context])))
        return super().cache_values()["keys and values"] * entries


class MLACosts(GQACosts):
    """Multi-head latent attention."""

    def parts(self) -> dict[str, Part]:
        """As above."""
        config = self.config
        hidden, heads, latent, rank = (
            config.hidden_size,
            config.num_attention_heads,
            config.kv_lora_rank,
            config.q_lora_rank,
        )
        query_width = heads * config.qk_head_dim
        part = matrix(hidden * query_width) if rank is None else matrix(rank * (hidden + query_width)) + vector(rank)
        part += matrix(hidden * (latent + config.qk_rope_head_dim)) + vector(latent)
        # kv_b_proj; the absorbed form multiplies queries and outputs with its two halves, which is the same number
        part += matrix(latent * heads * (config.qk_nope_head_dim + config.v_head_dim))
        part += matrix(heads * config.v_head_dim * hidden)
        if config.attention_bias:
            part += vector((rank or 0) + latent + config.qk_rope_head_dim + hidden)
        return {"attention": part}

    def macs(self, keys: np.ndarray, decoding: bool) -> np.ndarray:
        """As above: absorbed in decoding, else expanded."""
        config = self.config
        width = config.qk_head_dim + config.v_head_dim
        if decoding:
            width = 2 * config.kv_lora_rank + config.qk_rope_head_dim
        return 1.0 * config.num_attention_heads * width * keys

    def _flops_of_a_key(self) -> float:
        return 2 * self.config.num_attention_heads * (self.config.qk_head_dim + self.config.v_head_dim)

    def cache_values(self) -> dict[str, float]:
        """As above."""
        return {"latents": self.config.kv_lora_rank, "rotated keys": self.config.qk_rope_head_dim}

    def saved(self) -> tuple[float, float]:
        """As above: the latents' norms; queries and keys, values and outputs."""
        config = self.config
        query, value = config.num_attention_heads * config.qk_head_dim, config.num_attention_heads * config.v_head_dim
        return config.kv_lora_rank + (config.q_lora_rank or 0), 2 * query + 2 * value


class DSACosts(MLACosts):
    """MLA whose indexer selects `index_topk` tokens, once there are more."""

    def parts(self) -> dict[str, Part]:
        """As above, with the indexer."""
        config, width, heads = self.config, self.config.index_head_dim, self.config.index_n_heads
        indexer = matrix(config.q_lora_rank * heads * width + config.hidden_size * (width + heads)) + vector(2 * width)
        return super().parts() | {"indexer": indexer}

    def macs(self, keys: np.ndarray, decoding: bool) -> np.ndarray:
        """As above; selected latents are read in absorbed form, also among new tokens."""
        config = self.config
        if keys.max() <= config.index_topk:  # the indexer has nothing to choose
            return super().macs(keys, decoding)
        scored = np.where(keys > config.index_topk, keys, 0)
        index = config.index_n_heads * (config.index_head_dim + 1.0) * scored  # products, and their weighted sum
        return index + super().macs(np.minimum(keys, config.index_topk), decoding=True)

    def idle_macs(self, context: int) -> float:
        """As above: of the indexer, only the key is made."""
        config = self.config
        if context > config.index_topk:
            return 0.0
        return config.index_n_heads * (config.q_lora_rank * config.index_head_dim + config.hidden_size)

    def training_flops(self, row_tokens: int) -> tuple[float, float]:
        """As above."""
        config = self.config
        indexer = 2 * config.index_n_heads * config.index_head_dim * mean_keys(row_tokens, row_tokens)
        read = row_tokens if config.index_warmup else config.index_topk
        return self._flops_of_a_key() * mean_keys(read, row_tokens), indexer

    def cache_values(self) -> dict[str, float]:
        """As above, with the indexer's keys."""
        return super().cache_values() | {"indexer keys": self.config.index_head_dim}

    def values_read(self, context: int) -> float:
        """As above; the indexer's keys are of no use as long as all tokens are read."""
        config = self.config
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        if context <= config.index_topk:
            return latent * context
        return config.index_head_dim * context + latent * config.index_topk


ATTENTION_COSTS = {"gqa": GQACosts, "mla": MLACosts, "dsa": DSACosts, "nsa": NSACosts}


def attention_costs(config, layer: int = 0) -> GQACosts:
    """The costs of one layer's attention; prediction modules count on behind the layers."""
    return ATTENTION_COSTS[config.attention_kinds[layer]](config)


def mean_keys(limit: float, row_tokens: int) -> float:
    """Keys that a query reads, the mean over a row: all up to itself, but no more than `limit`."""
    limit = int(min(limit, row_tokens))
    return limit - limit * (limit - 1) / 2 / row_tokens
