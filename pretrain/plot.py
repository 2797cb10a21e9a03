"""Draws the curves of a training log as PNG files.

    python -m pretrain.plot runs/base/log.jsonl --output docs/images

Files: `loss.png`, `bits_per_byte.png`, `learning_rate.png`, `throughput.png`, `mfu.png`; for models with routers also
`expert_load.png` and `router_bias.png`, for models with an indexer `index_loss.png` and `index_recall.png`.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display on training machines
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from common.command import Parser, one_line_errors, run_command
from common.outputs import refuse_existing

_FEW = 30  # points of a line that are shown one by one


def read_log(path: Path) -> list[dict]:
    """The records of a JSON-lines log in file order; a last line that a full disk or a kill cut is left out and said.

    Raises:
        ValueError: another line is damaged.
    """
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path} line {number} is not JSON ({error}); take that line out") from error
            print(f"note: the last line of {path} is cut; it is left out", file=sys.stderr)
    return records


def draw_all(records: list[dict], output: Path) -> list[Path]:
    """Draw every figure the records have data for into `output`; returns the written files."""
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (draw, has_data) in DRAWINGS.items():
        chosen = [record for record in records if has_data(record)]
        if not chosen:
            continue
        figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
        draw(axes, chosen)
        finish(axes)
        figure.savefig(output / f"{name}.png", dpi=100)
        plt.close(figure)
        written.append(output / f"{name}.png")
    return written


def finish(axes: Axes) -> None:
    """What all figures have in common."""
    for line in axes.lines:
        if len(line.get_xdata()) < _FEW:
            line.set_marker(".")  # a line through one point shows nothing
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")


def _tokens(records: list[dict]) -> list[int]:
    return [record["tokens"] for record in records]


def draw_loss(axes: Axes, records: list[dict]) -> None:
    """Cross-entropy of the next token, and of the one after it where the model has a prediction module for it."""
    for key, label in (("lm_loss", "next token"), ("mtp_loss", "second next token (MTP)"), ("loss", "total")):
        chosen = [record for record in records if record.get(key) is not None]
        if chosen:
            axes.plot(_tokens(chosen), [record[key] for record in chosen], label=label, linewidth=1)
    axes.set_ylabel("training loss (nats per token)")


def draw_bits_per_byte(axes: Axes, records: list[dict]) -> None:
    """Held-out bits per byte by language."""
    for language in records[0]["bits_per_byte"]:
        values = [record["bits_per_byte"][language] for record in records]
        axes.plot(_tokens(records), values, marker=".", label=f"{language}: {values[-1]:.3f} at the end")
    axes.set_ylabel("held-out bits per byte")


def draw_expert_load(axes: Axes, records: list[dict]) -> None:
    """Tokens of the fullest expert divided by the mean over experts, by layer; 1 is perfect balance."""
    for layer in records[0]["expert_load"]:
        values = [record["expert_load"][layer] for record in records]
        axes.plot(_tokens(records), values, label=f"layer {layer}", linewidth=1)
    axes.set_ylabel("expert load, max / mean of a batch")


def draw_router_bias(axes: Axes, records: list[dict]) -> None:
    """Range of the routers' selection biases over the experts of a layer."""
    for layer in records[0]["router_bias"]:
        low, high = zip(*(record["router_bias"][layer] for record in records), strict=True)
        (line,) = axes.plot(_tokens(records), high, linewidth=1, label=f"layer {layer}")
        axes.plot(_tokens(records), low, linewidth=1, linestyle="--", color=line.get_color())
    axes.set_ylabel("router bias: greatest expert, least dashed")


def draw_index_loss(axes: Axes, records: list[dict]) -> None:
    """The indexers' loss, summed over the layers."""
    axes.plot(_tokens(records), [record["index_loss"] for record in records], linewidth=1)
    axes.set_ylabel("KL(attention || index scores) (nats, all layers)")


def draw_index_recall(axes: Axes, records: list[dict]) -> None:
    """Of the tokens that dense attention weighs most, the share that the indexer selects, by layer."""
    for layer in records[0]["index_recall"]:
        values = [record["index_recall"][layer] for record in records]
        axes.plot(_tokens(records), values, marker=".", label=f"layer {layer}")
    axes.set_ylabel("indexer's recall of the true top-k")


def draw_learning_rate(axes: Axes, records: list[dict]) -> None:
    """Learning rate of the last step before each record."""
    axes.plot(_tokens(records), [record["learning_rate"] for record in records], linewidth=1)
    axes.set_ylabel("learning rate")


def draw_throughput(axes: Axes, records: list[dict]) -> None:
    """Training tokens a second over all processes, evaluation and checkpoints left out."""
    axes.plot(_tokens(records), [record["tokens_per_second"] for record in records], linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens a second, all devices")


def draw_mfu(axes: Axes, records: list[dict]) -> None:
    """Model FLOPs utilisation: what the model needs over what the devices could do."""
    axes.plot(_tokens(records), [100 * record["mfu"] for record in records], linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("MFU, % of the devices' peak")


# What each figure shows, and the records that have it.
DRAWINGS = {
    "loss": (draw_loss, lambda r: "loss" in r),
    "bits_per_byte": (draw_bits_per_byte, lambda r: "bits_per_byte" in r),
    "expert_load": (draw_expert_load, lambda r: r.get("expert_load")),
    "router_bias": (draw_router_bias, lambda r: r.get("router_bias")),
    "index_loss": (draw_index_loss, lambda r: r.get("index_loss") is not None),
    "index_recall": (draw_index_recall, lambda r: r.get("index_recall")),
    "learning_rate": (draw_learning_rate, lambda r: "learning_rate" in r),
    "throughput": (draw_throughput, lambda r: "tokens_per_second" in r),
    "mfu": (draw_mfu, lambda r: "mfu" in r),
}


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = Parser(prog="python -m pretrain.plot", description=__doc__.partition("\n")[0])
    parser.add_argument("log", type=Path, help="log.jsonl of a training run")
    parser.add_argument("--output", type=Path, required=True, help="folder for the PNG files")
    parser.add_argument("--overwrite", action="store_true", help="replace figures that lie there")
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    if not args.log.is_file():
        print(f"error: log {args.log} does not exist; pass log.jsonl of a run of pretrain.train", file=sys.stderr)
        return 2
    if not args.overwrite:
        names = (f"{name}.png" for name in DRAWINGS)
        refuse_existing("--output", (args.output / name for name in names), "name another folder, or add --overwrite")
    for path in draw_all(read_log(args.log), args.output):
        print(path)
    print("next: python -m pretrain.report RUN puts them on one page with the figures and samples")
    return 0


if __name__ == "__main__":
    run_command(main)
