"""LoRA on attention, LoRA on everything, ESFT and full fine-tuning side by side, on bilingual number problems.

    python -m benchmarks.finetune                     # the checkpoint in this folder; writes results/finetune.json and .png
    python -m benchmarks.finetune --steps 20 --train-examples 400 --held-out-examples 40   # to see that it runs

Each method runs by `finetune.sft` in a process of its own, on the same examples in the same order. Held-out problems
are other problems than those of training. Memory is what training adds to the process (on GPUs: to the device) at its
peak, over the loaded model; seconds a step are the median.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from transformers import TrainerCallback

from benchmarks.common import RESULTS, ROOT, describe_machine, write_results
from benchmarks.decode import resident_kib
from finetune.config import SFTOptions, make_options
from finetune.data import write_jsonl
from finetune.models import trainable_parameters
from finetune.problems import KINDS, number_problems

METHODS = {
    "LoRA, attention": {"method": "lora", "targets": ["attention"], "learning_rate": 3e-3},
    "LoRA, all": {"method": "lora", "targets": ["all"], "learning_rate": 3e-3},
    "ESFT": {"method": "esft", "esft_score": "token", "learning_rate": 1e-3},
    "full": {"method": "full", "learning_rate": 1e-3},
}


class Meter(TrainerCallback):
    """Time of each step, and the memory that training adds at its peak."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """The model is loaded, nothing is trained yet."""
        self.trainable = trainable_parameters(model)
        self.on_gpu = torch.cuda.is_available()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            self.before = resident_kib("VmRSS") / 1024

    def on_step_begin(self, args, state, control, **kwargs):
        """Starts the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stops it, and looks at the memory after the first steps (before generation adds its own)."""
        self.seconds.append(time.perf_counter() - self.started)
        if state.global_step == min(5, state.max_steps):
            peak = torch.cuda.max_memory_allocated() / 2**20 if self.on_gpu else resident_kib("VmHWM") / 1024
            self.added_mib = round(peak - self.before)


def run_one(name: str, folder: Path, arguments: argparse.Namespace) -> dict:
    """Train by one method, in this process."""
    from finetune import sft

    values = {
        "model": arguments.model,
        "data": [str(folder / "train.jsonl")],
        "eval_data": [str(folder / "held_out.jsonl")],
        "task_data": [str(folder / "held_out.jsonl")],
        "output": str(folder / name.replace(", ", "-").replace(" ", "-")),
        **{"steps": arguments.steps, "batch_size": arguments.batch_size, "max_tokens": 128, "seed": arguments.seed},
        **{"eval_steps": max(5, arguments.steps // 5), "preview": False, "track": ["none"], "dtype": "float32"},
        **METHODS[name],
    }
    meter = Meter()
    _, _, report = sft.run(make_options(SFTOptions, values), callbacks=(meter,))
    curve = [
        (entry["step"], entry["eval_loss"], entry["eval_accuracy"]) for entry in report.log if "eval_loss" in entry
    ]
    return {
        "options": {key: value for key, value in METHODS[name].items() if key != "method"},
        "trainable_parameters": meter.trainable,
        "loss_before": round(report.before["loss"], 4),
        "loss_after": round(report.after["loss"], 4),
        "accuracy_before": round(report.before["accuracy"], 4),
        "accuracy_after": round(report.after["accuracy"], 4),
        "seconds_a_step": round(statistics.median(meter.seconds), 4),
        "training_adds_mib": meter.added_mib,
        "curve": [[step, round(loss, 4), round(accuracy, 4)] for step, loss, accuracy in curve],
    }


def draw(methods: dict[str, dict], path: Path):
    """Held-out loss and accuracy against steps."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, column, title in zip(
        axes, (1, 2), ("held-out loss, nats a token", "share of exact answers"), strict=True
    ):
        for name, result in methods.items():
            axis.plot(
                [point[0] for point in result["curve"]], [point[column] for point in result["curve"]], label=name
            )
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub name (default: this repository)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all four")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of each (default 400)")
    parser.add_argument("--batch-size", type=int, default=32, help="examples of a step (default 32)")
    parser.add_argument("--train-examples", type=int, default=12_000, help="default 12000")
    parser.add_argument("--held-out-examples", type=int, default=400, help="default 400")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of problems (default all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of data, order and adapters (default 0)")
    parser.add_argument("--name", default="finetune", help="of the result files (default finetune)")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "FOLDER"), help=argparse.SUPPRESS)  # a child's work
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    if arguments.one:
        name, folder = arguments.one
        result = run_one(name, Path(folder), arguments)
        (Path(folder) / f"{name}.json").write_text(json.dumps(result))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        train, held_out = number_problems(
            arguments.train_examples, arguments.held_out_examples, arguments.seed, arguments.kinds
        )
        write_jsonl(train, Path(folder) / "train.jsonl")
        write_jsonl(held_out, Path(folder) / "held_out.jsonl")
        methods = {}
        for name in arguments.methods:
            shared = [f"--{key}={getattr(arguments, key)}" for key in ("model", "steps", "seed")]
            command = [sys.executable, "-m", "benchmarks.finetune", "--one", name, folder, *shared]
            subprocess.run([*command, f"--batch-size={arguments.batch_size}"], check=True, cwd=ROOT)
            methods[name] = json.loads((Path(folder) / f"{name}.json").read_text())
            print(name, {key: value for key, value in methods[name].items() if key != "curve"})
    settings = {key: value for key, value in vars(arguments).items() if key not in ("one", "methods", "name", "model")}
    write_results(arguments.name, {"machine": describe_machine(), "settings": settings, "methods": methods})
    draw(methods, RESULTS / f"{arguments.name}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
