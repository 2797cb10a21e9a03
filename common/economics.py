"""What a model of this family costs, from its configuration alone: parameters, operations, cache, memory, GPU hours.

Letters: D hidden size, V vocabulary, T tokens in view. One multiply-add is two operations (FLOPs).
"""

import math
import re

import numpy as np

from common.costs import GQACosts, Part, attention_costs, matrix, vector
from common.hardware import DEFAULT_ROW, GPU, GPUS, MEASURED
from common.remote_code import quant_method
from configuration_deepseek import DeepseekConfig

# ---------------------------------------------------------------- parameters


def layer_parts(config: DeepseekConfig, kind: str, layer: int = 0) -> dict[str, Part]:
    """One decoder layer whose MLP is "dense" or "sparse"."""
    hidden = config.hidden_size
    parts = {**attention_costs(config, layer).parts(), "norms": vector(2 * hidden)}
    if kind == "dense":
        return parts | {"dense MLPs": matrix(3 * hidden * config.intermediate_size)}
    expert = 3 * hidden * config.moe_intermediate_size
    visited = expert * config.num_experts_per_tok
    parts["router"] = matrix(hidden * config.n_routed_experts)
    parts["routed experts"] = Part(expert * config.n_routed_experts, visited, visited)
    if config.n_shared_experts:
        parts["shared experts"] = matrix(expert * config.n_shared_experts)
    return parts


def model_parts(config: DeepseekConfig) -> dict[str, Part]:
    """All components of the model itself, the multi-token-prediction modules left out.

    Counted is what `sum(p.numel() for p in model.parameters())` counts: V3's router bias is a buffer and is not.
    """
    table = config.vocab_size * config.hidden_size
    parts = {"embedding": Part(table, table, 0)}
    for layer, kind in enumerate(config.mlp_layer_types):
        for name, part in layer_parts(config, kind, layer).items():
            parts[name] = parts.get(name, Part()) + part
    parts["norms"] += vector(config.hidden_size)
    # tied, the head multiplies with the embedding's matrix
    parts["output head"] = Part(0, 0, table) if config.tie_word_embeddings else matrix(table)
    return parts


def mtp_part(config: DeepseekConfig) -> Part:
    """All multi-token-prediction modules together. Embedding and head are the model's; the head is run again."""
    layer = sum(layer_parts(config, config.mtp_layer_type).values(), Part())
    layer += matrix(2 * config.hidden_size**2) + vector(3 * config.hidden_size)
    layer += Part(macs=config.vocab_size * config.hidden_size)
    return layer * config.num_nextn_predict_layers


# ---------------------------------------------------------------- operations


def attention_macs(config: DeepseekConfig, keys: np.ndarray, decoding: bool) -> np.ndarray:
    """Multiply-adds of one layer between queries and what they attend to, the mean over the layers; as `GQACosts.macs`."""
    costs = _all_attention(config)
    return sum(cost.macs(keys, decoding) for cost in costs) / max(1, len(costs))


def _all_attention(config: DeepseekConfig) -> list[GQACosts]:
    """The costs of each layer's attention, the prediction modules' left out."""
    return [attention_costs(config, layer) for layer in range(config.num_hidden_layers)]


def decode_flops(config: DeepseekConfig, context: int) -> float:
    """Operations of one new token that sees `context` tokens, itself included."""
    linear = sum(model_parts(config).values(), Part()).macs
    linear -= sum(cost.idle_macs(context) for cost in _all_attention(config))
    return 2 * (linear + config.num_hidden_layers * float(attention_macs(config, np.array([context]), True)[0]))


def row_flops(config: DeepseekConfig, row: int) -> float:
    """Operations of the forward pass for a token of a row of `row` tokens, the mean over the row."""
    linear = sum(model_parts(config).values(), Part()).macs
    return 2 * (linear + config.num_hidden_layers * _row_attention(config, row))


def _row_attention(config: DeepseekConfig, row: int) -> float:
    return float(attention_macs(config, np.arange(1, row + 1), False).mean())


def training_flops(config: DeepseekConfig, row: int) -> float:
    """Operations of forward and backward pass for a token: three forward passes.

    As DeepSeek counts them: attention causal, prediction modules (`mtp_flops`) and recomputation left out.
    """
    return 3 * row_flops(config, row)


def mtp_flops(config: DeepseekConfig, row: int) -> float:
    """What the multi-token-prediction modules add to `training_flops`."""
    attention = config.num_nextn_predict_layers * _row_attention(config, row)
    return 3 * 2 * (mtp_part(config).macs + attention)


# ---------------------------------------------------------------- cache and decoding


def cache_values(config: DeepseekConfig) -> dict[str, float]:
    """Numbers that the cache keeps, over all layers: for each token by kind, and `per sequence` whatever its length."""
    values: dict[str, float] = {}
    for cost in _all_attention(config):
        for name, count in cost.cache_values().items():
            values[name] = values.get(name, 0) + count
    return values


def cache_bytes_per_token(config: DeepseekConfig, bits: float = 16) -> float:
    """What each token adds to the cache, in bytes, numbers being `bits` wide."""
    return sum(count for name, count in cache_values(config).items() if name != "per sequence") * bits / 8


def cache_bytes(config: DeepseekConfig, context: int, bits: float = 16) -> float:
    """The cache of one sequence of `context` tokens."""
    fixed = cache_values(config).get("per sequence", 0) * bits / 8
    return context * cache_bytes_per_token(config, bits) + fixed


def cache_bytes_read(config: DeepseekConfig, context: int, bits: float = 16) -> float:
    """What of that cache one new token must read."""
    return sum(cost.values_read(context) for cost in _all_attention(config)) * bits / 8


def default_weight_bits(config: DeepseekConfig) -> int:
    """8 for a checkpoint that is stored in FP8, else 16."""
    return 8 if quant_method(config) == "fp8" else 16


def decoding_floor(
    config: DeepseekConfig, gpu: GPU, context: int, batch: int, weight_bits: float, cache_bits: float
) -> dict:
    """The least time of a decoding step: what it must read over the memory bandwidth, on the fewest GPUs that hold it.

    `batch` sequences of `context` tokens. Each token chooses its experts alone and evenly, so that a step reads
    E (1 - (1 - P / E)^batch) experts of a layer. Communication, kernels and arithmetic come on top.
    """
    parts = model_parts(config)
    everything = sum(parts.values(), Part())
    read = everything.active - parts["embedding"].active  # of the embedding a token reads one row
    if config.tie_word_embeddings:
        read += parts["embedding"].active
    if "routed experts" in parts:
        share = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
        read += parts["routed experts"].total * share - parts["routed experts"].active
    weights = read * weight_bits / 8
    cache = batch * cache_bytes_read(config, context, cache_bits)
    held = everything.total * weight_bits / 8 + batch * cache_bytes(config, context, cache_bits)
    gpus = math.ceil(held / gpu.memory)
    seconds = (weights + cache) / (gpu.bandwidth * gpus)
    return {
        "context": context,
        "batch": batch,
        "gpus": gpus,
        "weight_bytes_read": weights,
        "cache_bytes_read": cache,
        "bytes_held": held,
        "ms_per_step": seconds * 1e3,
        "tokens_per_second": batch / seconds,
    }


# ---------------------------------------------------------------- training memory


def saved_bytes_per_token(config: DeepseekConfig, kind: str, width: int = 2, layer: int = 0) -> float:
    """What one decoder layer keeps of a token for its backward pass, numbers being `width` bytes wide.

    With an attention kernel that keeps no scores. Counted are the inputs of matrix products, what attention and SwiGLU
    keep, norms (which work in float32) and the router's float32 scores.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    mlp = 4  # gate, up, act(gate) and their product
    values = 0.0  # of `width` bytes
    norms = 2 * hidden  # numbers that are normalised
    normalised, kept = attention_costs(config, layer).saved()
    norms, values = norms + normalised, values + kept
    total = 4 * heads  # of each query the logarithm of its softmax's sum, float32
    if kind == "dense":
        values += mlp * config.intermediate_size
    else:
        inner = config.moe_intermediate_size
        # of each visited expert besides: its input, its output, and that times its weight
        values += config.num_experts_per_tok * (3 * hidden + mlp * inner) + config.n_shared_experts * mlp * inner
        total += 4 * 4 * config.n_routed_experts + (4 * hidden if width < 4 else 0)
    return total + width * values + norms * (4 + 2 * width)


def saved_bytes_outside_layers(config: DeepseekConfig, width: int = 2) -> float:
    """As `saved_bytes_per_token`, of the last norm, the losses' float32 log-probabilities and what prediction modules add."""
    hidden, modules = config.hidden_size, config.num_nextn_predict_layers
    norms = (1 + 3 * modules) * hidden
    return 4 * config.vocab_size * (1 + modules) + norms * (4 + 2 * width) + modules * width * 2 * hidden


def training_memory(
    config: DeepseekConfig, gpus: int, zero: int, micro_batch: int, row: int, checkpointing: bool
) -> dict[str, float]:
    """Bytes on one GPU while a model is trained in bfloat16 with AdamW, prediction modules included.

    Parameters and gradients take 2 bytes each, the optimizer 12 (float32 master copy and two moments), as in ZeRO
    (arXiv:1910.02054); with FSDP and float32 parameters the sum is the same 16. Of `gpus` GPUs each holds one part of the
    optimizer's states (`zero` 1), of the gradients too (2), of the parameters too (3, FSDP's full shard); then two
    layers, the one that runs and the next, are gathered whole. Buffers of the framework come on top.
    """
    total = sum(model_parts(config).values(), mtp_part(config)).total
    share = [1 / gpus if zero >= stage else 1 for stage in (3, 2, 1)]
    kinds = [*config.mlp_layer_types, *[config.mtp_layer_type] * config.num_nextn_predict_layers]
    tokens, width = micro_batch * row, 2
    saved = [saved_bytes_per_token(config, kind, width, layer) for layer, kind in enumerate(kinds)]
    activations = len(kinds) * width * config.hidden_size + max(saved) if checkpointing else sum(saved)
    largest = max(sum(layer_parts(config, kind, layer).values(), Part()).total for layer, kind in enumerate(kinds))
    memory = {
        "parameters": 2 * total * share[0],
        "gradients": 2 * total * share[1],
        "optimizer": 12 * total * share[2],
        "gathered layers": 2 * 2 * largest if zero == 3 and gpus > 1 else 0.0,
        "activations": tokens * activations,
        # and the gradient of one set of logits, float32
        "logits and loss": tokens * (saved_bytes_outside_layers(config, width) + 4.0 * config.vocab_size),
    }
    return memory | {"total": sum(memory.values())}


# ---------------------------------------------------------------- hours


def resolve_mfu(mfu: str | float) -> float:
    """A share of the peak in (0, 1], from a number or from the name of a published training.

    Raises:
        ValueError: it is neither.
    """
    if mfu in MEASURED:
        fields, hours = MEASURED[mfu]
        operations = training_flops(DeepseekConfig(**fields), DEFAULT_ROW) * 1e12
        return operations / (hours * 3600 * GPUS["h800"].bf16_flops)
    try:
        value = float(mfu)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise ValueError(f"--mfu is {mfu!r}; give a share of the peak in (0, 1] or one of {', '.join(MEASURED)}.")
    return value


def training_hours(config: DeepseekConfig, gpu: GPU, tokens: float, row: int, mfu: float) -> float:
    """GPU hours to train on `tokens` tokens in rows of `row`, at `mfu` of the bfloat16 peak."""
    return training_flops(config, row) * tokens / (gpu.bf16_flops * mfu) / 3600


# ---------------------------------------------------------------- quantities


def parse_quantity(text: str) -> float:
    """ "14.8T" -> 14.8e12; K, M, B and T are powers of a thousand.

    Raises:
        ValueError: it is no positive quantity.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([KMBT]?)", text.strip(), flags=re.IGNORECASE)
    value = float(match[1]) * 1000.0 ** " KMBT".index(match[2].upper() or " ") if match else 0
    if not value:
        raise ValueError(f"{text!r} is no quantity; write a positive number such as 5000, 119K, 62.9B or 14.8T.")
    return value


def quantity(value: float, unit: str = "") -> str:
    """1234567 -> "1.23M"; at least three digits, powers of a thousand."""
    for power, letter in ((12, "T"), (9, "G" if unit else "B"), (6, "M"), (3, "k" if unit else "K")):
        if abs(value) >= 10**power:
            scaled = value / 10**power
            return f"{scaled:,.{max(0, 2 - int(math.log10(scaled)))}f}{' ' if unit else ''}{letter}{unit}"
    return f"{value:.4g}{' ' if unit else ''}{unit}"
