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
from pathlib import Path

from common.command import Parser, check_early, one_line_errors, run_command
from common.extras import extra
from common.hardware import DEFAULT_ROW, GPU, GPUS, MEASURED


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = Parser(prog="python -m tools.plan", description=__doc__.partition("\n")[0])
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
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from common.costs import Part
    from common.economics import (
        cache_bytes,
        cache_bytes_per_token,
        cache_values,
        decode_flops,
        decoding_floor,
        default_weight_bits,
        model_parts,
        mtp_flops,
        mtp_part,
        parse_quantity,
        quantity,
        resolve_mfu,
        row_flops,
        training_flops,
        training_hours,
        training_memory,
    )
    from common.rewrite import resolve_config
    from configuration_deepseek import FAMILY_DEFAULTS, DeepseekConfig


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


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
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
    if args.json:
        print(json.dumps(plan, indent=2))
    else:
        render(plan, Console())
        print("next: python -m pretrain.config makes the config.json of a model of your own size, from a tokenizer")
    return 0


if __name__ == "__main__":
    run_command(main)
