"""What a model of this family costs: parameters, cache, operations, training memory, decoding floor, GPU hours, money.

    python -m tools.plan path/to/DeepSeek-V3
    python -m tools.plan config.json --tokens 14.8T --hours 119K 5K --gpu h800 --price 2
    python -m tools.plan config.json --tokens 2T@4096 100B@32768 --gpu h100 --mfu 0.35 --json

The config is a config.json (or the folder with one) of any family that this repository loads, or one of the smaller
files that DeepSeek's own inference demos read. Nothing is loaded and nothing is run; every figure follows from the
shapes, except the efficiency of training (`--mfu`), which nobody can derive: by default it is the one that DeepSeek-V3's
published GPU hours imply. docs/economics.md holds the checks against what DeepSeek published.

Letters: D hidden size, H query heads, K key/value heads, T tokens in view, V vocabulary; for MLA Dn / Dr / Dv the widths
of a head and C the latent's; for experts E routed, P visited by a token, F their inner width. One multiply-add is two
operations (FLOPs).
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

from common.command import check_early, run_command
from common.extras import extra


class GPU(NamedTuple):
    """Peak rates as NVIDIA gives them, without sparsity."""

    bf16_flops: float  # operations a second
    memory: float  # bytes
    bandwidth: float  # bytes a second


GPUS = {
    "h800": GPU(989.4e12, 80e9, 3.35e12),
    "h100": GPU(989.4e12, 80e9, 3.35e12),
    "h200": GPU(989.4e12, 141e9, 4.8e12),
    "h20": GPU(148e12, 96e9, 4.0e12),
    "b200": GPU(2250e12, 180e9, 8.0e12),
    "a100": GPU(312e12, 80e9, 2.039e12),
    "a800": GPU(312e12, 80e9, 2.039e12),
    "l40s": GPU(362e12, 48e9, 0.864e12),
    "rtx4090": GPU(165.2e12, 24e9, 1.008e12),
}
# Trainings whose GPU hours were published: H800 hours for 1e12 tokens in rows of 4096, and the model they belong to.
# V2 report (arXiv:2405.04434) section 3.2.3 for V2 and 67B, V3 report (arXiv:2412.19437) table 1.
_V2_SIZES = {
    **{"model_type": "deepseek_v2", "num_hidden_layers": 60, "hidden_size": 5120, "intermediate_size": 12288},
    **{"num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "n_routed_experts": 160},
    **{"moe_intermediate_size": 1536},
}
_67B_SIZES = {
    **{"model_type": "llama", "num_hidden_layers": 95, "hidden_size": 8192, "intermediate_size": 22016},
    **{"num_attention_heads": 64, "num_key_value_heads": 8},
}
MEASURED = {
    "v3": ({"model_type": "deepseek_v3"}, 180.0e3),
    "v2": (_V2_SIZES, 172.8e3),
    "67b": (_67B_SIZES, 300.6e3),
}
DEFAULT_ROW = 4096  # tokens of a training row, as in the pretraining of all published models


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.plan", description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path, help="config.json or a folder with one")
    parser.add_argument(
        "--gpu", choices=GPUS, default="h800", metavar="NAME", help=f"of {', '.join(GPUS)} (%(default)s)"
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--tokens", nargs="+", default=[], metavar="N[@ROW]", help="stages: tokens, and tokens a row (4096)"
    )
    training.add_argument("--hours", nargs="+", default=[], metavar="H", help="GPU hours of stages that are known")
    training.add_argument(
        "--mfu", default="v3", help=f"share of the bfloat16 peak, or that of {', '.join(MEASURED)} (%(default)s)"
    )
    training.add_argument("--price", type=float, default=2.0, help="dollars a GPU hour (%(default)s)")
    training.add_argument("--gpus", type=int, default=8, help="GPUs that share the training states (%(default)s)")
    training.add_argument("--zero", type=int, choices=range(4), default=3, help="ZeRO stage; 3 is FSDP (%(default)s)")
    training.add_argument("--micro-batch", type=int, default=1, help="rows at once on a GPU (%(default)s)")
    training.add_argument("--row", type=int, default=DEFAULT_ROW, help="tokens a row, for the memory (%(default)s)")
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument(
        "--context", type=int, nargs="+", default=[4096, 32768, 131072], help="lengths to plan for, in tokens"
    )
    decoding.add_argument("--batch", type=int, default=1, help="sequences at once (%(default)s)")
    decoding.add_argument("--weight-bits", type=float, help="of a weight (8 for FP8 checkpoints, else 16)")
    decoding.add_argument("--cache-bits", type=float, default=16, help="of a number in the cache (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


check_early(__name__, lambda: build_parser().parse_args())

with extra("tools"):
    import numpy as np
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from common.costs import GQACosts, Part, attention_costs, matrix, vector
    from configuration_deepseek import FAMILY_DEFAULTS, DeepseekConfig
    from tools.convert import resolve_config


# The names that DeepSeek's inference demos use for the fields of config.json.
_DEMO_FIELDS = {
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "route_scale": "routed_scaling_factor",
    "score_func": "scoring_func",
}
_DEMO_ONLY = ("dtype", "scale_fmt", "mscale")


# ---------------------------------------------------------------- config


def load_config(path: Path) -> DeepseekConfig:
    """The config in a file or in a folder's config.json.

    Raises:
        ValueError: there is no such file, it is no JSON object, or it describes no model of this family.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} does not exist; name a config.json or the folder that holds one.")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); download it again.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds a {type(fields).__name__}; a config is an object with a `model_type`.")
    if "model_type" not in fields and "dim" in fields:
        fields = _from_demo(fields)
    if "model_type" not in fields:
        raise ValueError(f"{file} has no `model_type`; allowed are {', '.join(FAMILY_DEFAULTS)}.")
    return resolve_config(fields)


def _from_demo(fields: dict) -> dict:
    """A demo's config under the names of config.json; the demos have no prediction modules and write 0 for null."""
    sigmoid = fields.get("score_func") == "sigmoid"
    kind = "deepseek_v32" if "index_topk" in fields else "deepseek_v3" if sigmoid else "deepseek_v2"
    renamed = {_DEMO_FIELDS.get(name, name): value for name, value in fields.items() if name not in _DEMO_ONLY}
    renamed["q_lora_rank"] = renamed.get("q_lora_rank") or None
    if fields.get("dtype") == "fp8":
        renamed["quantization_config"] = {"quant_method": "fp8"}
    return {
        "model_type": kind,
        "num_key_value_heads": renamed["num_attention_heads"],
        "num_nextn_predict_layers": 0,
        **renamed,
    }


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
    return 8 if (getattr(config, "quantization_config", None) or {}).get("quant_method") == "fp8" else 16


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


def parse_stage(text: str) -> tuple[float, int]:
    """ "62.9B@32768" -> tokens and row length; without "@" rows of 4096."""
    tokens, _, row = text.partition("@")
    if row and not (row.isdigit() and int(row)):
        raise ValueError(f"--tokens {text!r} has a row length of {row!r}; write whole tokens, as in 100B@32768.")
    return parse_quantity(tokens), int(row or DEFAULT_ROW)


# ---------------------------------------------------------------- the plan


def make_plan(
    config: DeepseekConfig,
    gpu: str = "h800",
    stages: list[tuple[float, int]] = (),
    known_hours: list[float] = (),
    mfu: str | float = "v3",
    price: float = 2.0,
    contexts: list[int] = (4096, 32768, 131072),
    batch: int = 1,
    weight_bits: float | None = None,
    cache_bits: float = 16,
    gpus: int = 8,
    zero: int = 3,
    micro_batch: int = 1,
    row: int = DEFAULT_ROW,
) -> dict:
    """All figures as one JSON-able dict; arguments as the command line's options."""
    parts, mtp = model_parts(config), mtp_part(config)
    everything = sum(parts.values(), Part())
    device, weight_bits = GPUS[gpu], weight_bits or default_weight_bits(config)
    plan = {
        "model_type": config.checkpoint_model_type,
        "attention": config.attention_kind,
        "gpu": {"name": gpu, **device._asdict()},
        "parameters": {
            "total": int(everything.total),
            "active": int(everything.active),
            "active_without_embedding": int(everything.active - parts["embedding"].active),
            "components": {name: {"total": int(p.total), "active": int(p.active)} for name, p in parts.items()},
            "prediction_modules": {"total": int(mtp.total), "active": int(mtp.active)},
            "total_with_prediction_modules": int(everything.total + mtp.total),
        },
        "cache": {
            "bits": cache_bits,
            "bytes_per_token": cache_bytes_per_token(config, cache_bits),
            "parts": {name: count * cache_bits / 8 for name, count in cache_values(config).items()},
        },
        "contexts": [
            {
                "context": context,
                "decode_flops": decode_flops(config, context),
                "prefill_flops_per_token": row_flops(config, context),
                "training_flops_per_token": training_flops(config, context),
                "prediction_modules_flops_per_token": mtp_flops(config, context),
                "cache_bytes": cache_bytes(config, context, cache_bits),
                "decoding_floor": decoding_floor(config, device, context, batch, weight_bits, cache_bits),
            }
            for context in contexts
        ],
        "weight_bits": weight_bits,
        "training_memory": {
            **{"gpus": gpus, "zero": zero, "micro_batch": micro_batch, "row": row},
            "with_checkpointing": training_memory(config, gpus, zero, micro_batch, row, True),
            "without_checkpointing": training_memory(config, gpus, zero, micro_batch, row, False),
        },
    }
    if stages or known_hours:
        plan["training"] = _training_cost(config, device, stages, known_hours, mfu, price)
    return plan


def _training_cost(config, device: GPU, stages, known_hours, mfu, price: float) -> dict:
    share = resolve_mfu(mfu)
    rows = [
        {
            "tokens": tokens,
            "row": row,
            "flops": training_flops(config, row) * tokens,
            "gpu_hours": training_hours(config, device, tokens, row, share),
        }
        for tokens, row in stages
    ] + [{"tokens": None, "row": None, "flops": None, "gpu_hours": hours} for hours in known_hours]
    hours = sum(row["gpu_hours"] for row in rows)
    for row in rows:
        row["cost"] = row["gpu_hours"] * price
    return {
        "mfu": share,
        "mfu_from": mfu if mfu in MEASURED else "given",
        "price_per_gpu_hour": price,
        "stages": rows,
        "gpu_hours": hours,
        "cost": hours * price,
    }


# ---------------------------------------------------------------- tables


def quantity(value: float, unit: str = "") -> str:
    """1234567 -> "1.23M"; at least three digits, powers of a thousand."""
    for power, letter in ((12, "T"), (9, "G" if unit else "B"), (6, "M"), (3, "k" if unit else "K")):
        if abs(value) >= 10**power:
            scaled = value / 10**power
            return f"{scaled:,.{max(0, 2 - int(math.log10(scaled)))}f}{' ' if unit else ''}{letter}{unit}"
    return f"{value:.4g}{' ' if unit else ''}{unit}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def render(plan: dict, console: Console) -> None:
    """Prints the plan as tables."""
    parameters = plan["parameters"]
    table = _table(f"Parameters ({plan['model_type']}, {plan['attention']})", "", "total", "active for a token")
    for name, part in parameters["components"].items():
        table.add_row(name, quantity(part["total"]), quantity(part["active"]))
    table.add_section()
    table.add_row("model", quantity(parameters["total"]), quantity(parameters["active"]), style="bold")
    mtp = parameters["prediction_modules"]
    if mtp["total"]:
        table.add_row("prediction modules, besides", quantity(mtp["total"]), quantity(mtp["active"]))
    console.print(table)

    cache = plan["cache"]
    table = _table(f"Cache, numbers of {cache['bits']:g} bits", "", "bytes")
    for name, value in cache["parts"].items():
        table.add_row(name if name == "per sequence" else f"{name}, a token", f"{value:,.0f}")
    table.add_section()
    table.add_row("a token", f"{cache['bytes_per_token']:,.0f}", style="bold")
    console.print(table)

    columns = ("context, tokens", "decode", "prefill", "training", "training, prediction modules", "cache a sequence")
    table = _table("Operations for a token (prefill and training: mean over a row that long)", *columns)
    for at in plan["contexts"]:
        names = ("decode_flops", "prefill_flops_per_token", "training_flops_per_token")
        values = [quantity(at[name], "FLOP") for name in (*names, "prediction_modules_flops_per_token")]
        table.add_row(f"{at['context']:,}", *values, quantity(at["cache_bytes"], "B"))
    console.print(table)

    gpu = plan["gpu"]["name"].upper()
    title = f"Decoding floor by bandwidth, {gpu}, weights of {plan['weight_bits']:g} bits"
    table = _table(title, "context, tokens", "batch", "GPUs", "weights read", "cache read", "ms a step", "tokens/s")
    for at in plan["contexts"]:
        floor = at["decoding_floor"]
        read = [quantity(floor[name], "B") for name in ("weight_bytes_read", "cache_bytes_read")]
        counts = [f"{floor[name]:,}" for name in ("context", "batch", "gpus")]
        table.add_row(*counts, *read, f"{floor['ms_per_step']:.3g}", f"{floor['tokens_per_second']:,.0f}")
    console.print(table)

    memory = plan["training_memory"]
    title = (
        f"Training memory on each of {memory['gpus']} GPUs: bfloat16, AdamW, ZeRO-{memory['zero']}, "
        f"{memory['micro_batch']} x {memory['row']} tokens"
    )
    table = _table(title, "", "with checkpointing", "without")
    for name, value in memory["with_checkpointing"].items():
        if name == "total":
            table.add_section()
        without = memory["without_checkpointing"][name]
        style = "bold" if name == "total" else None
        table.add_row(name, quantity(value, "B"), quantity(without, "B"), style=style)
    console.print(table)

    if "training" in plan:
        training = plan["training"]
        source = f", from {training['mfu_from'].upper()}'s published hours" if training["mfu_from"] in MEASURED else ""
        title = f"Training on {gpu} at {training['mfu']:.1%} of its bfloat16 peak{source}"
        table = _table(title, "stage", "operations", "GPU hours", f"at ${training['price_per_gpu_hour']:g}")
        for row in training["stages"]:
            name, operations = "hours as given", "-"
            if row["tokens"]:
                name, operations = f"{quantity(row['tokens'])} tokens, rows of {row['row']:,}", f"{row['flops']:.3g}"
            table.add_row(name, operations, f"{row['gpu_hours']:,.0f}", f"${row['cost']:,.0f}")
        table.add_section()
        table.add_row("all", "", f"{training['gpu_hours']:,.0f}", f"${training['cost']:,.0f}", style="bold")
        console.print(table)


# ---------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        values = {name: getattr(args, name) for name in ("gpus", "micro_batch", "row", "batch", "cache_bits", "price")}
        values |= {"context": min(args.context), "weight_bits": 1 if args.weight_bits is None else args.weight_bits}
        for name, value in values.items():
            if not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be greater than 0.")
        plan = make_plan(
            load_config(args.config),
            gpu=args.gpu,
            stages=[parse_stage(text) for text in args.tokens],
            known_hours=[parse_quantity(text) for text in args.hours],
            mfu=args.mfu,
            price=args.price,
            contexts=args.context,
            batch=args.batch,
            weight_bits=args.weight_bits,
            cache_bits=args.cache_bits,
            gpus=args.gpus,
            zero=args.zero,
            micro_batch=args.micro_batch,
            row=args.row,
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(plan, indent=2))
    else:
        render(plan, Console())
        print("next: python -m pretrain.config makes the config.json of a model of your own size, from a tokenizer")
    return 0


if __name__ == "__main__":
    run_command(main)
