"""LoRA on attention, on experts and on everything, ESFT and full fine-tuning side by side, on bilingual number problems.

    python -m benchmarks.finetune                     # the checkpoint in this folder; writes runs/benchmarks/finetune.json and .png
    python -m benchmarks.finetune --only cost         # seconds and memory alone, where the machine has nothing else to do
    python -m benchmarks.finetune --methods "LoRA, all" --train-data gsm8k_train.jsonl --held-out-data gsm8k_test.jsonl \\
        --answer-kind number --max-tokens 512 --answer-tokens 200 --name finetune_gsm8k     # on data of your own

Each method runs by `finetune.sft` in a process of its own, on the same examples in the same order. Held-out problems
are other problems than those of training. Quality and cost are measured in runs of their own: the cost of a step is
that of `--cost-steps` steps without evaluation in between, memory what training adds to the process (on GPUs: to the
device) at its peak, over the loaded model; seconds a step are the median. What the result file has from earlier runs with
the same settings stays in it.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from transformers import TrainerCallback

from benchmarks.common import RESULTS, ROOT, write_results
from benchmarks.decode import resident_kib
from common.command import run_command
from common.machine import describe_machine
from finetune.config import SFTOptions, make_options
from finetune.data import read_examples, write_jsonl
from finetune.models import trainable_parameters
from finetune.problems import number_problems

METHODS = {
    "LoRA, attention": {"method": "lora", "targets": ["attention"], "learning_rate": 3e-3},
    "LoRA, experts": {"method": "lora", "targets": ["shared", "routed"], "learning_rate": 3e-3},
    "LoRA, all": {"method": "lora", "targets": ["all"], "learning_rate": 3e-3},
    "ESFT": {"method": "esft", "esft_score": "token", "learning_rate": 1e-3},
    "full": {"method": "full", "learning_rate": 1e-3},
}
_PARTS = ("quality", "cost")


class Meter(TrainerCallback):
    """Time of each step, and the memory that training adds at its peak."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Notes what will be trained."""
        self.trainable = trainable_parameters(model)

    def on_step_begin(self, args, state, control, **kwargs):
        """Starts the clock; before the first step, the model is loaded and nothing is trained yet."""
        if not self.seconds:
            self.on_gpu = torch.cuda.is_available()
            if self.on_gpu:
                torch.cuda.reset_peak_memory_stats()
                self.before = torch.cuda.memory_allocated() / 2**20
            else:
                Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
                self.before = resident_kib("VmRSS") / 1024
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stops it, and looks at the memory."""
        self.seconds.append(time.perf_counter() - self.started)
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.on_gpu else resident_kib("VmHWM") / 1024
        self.added_mib = round(peak - self.before)


def run_one(name: str, part: str, folder: Path, arguments: argparse.Namespace) -> dict:
    """Train by one method, in this process, for one of `_PARTS`."""
    from finetune import sft

    quality = part == "quality"
    held_out = str(folder / ("held_out.jsonl" if quality else "few.jsonl"))
    steps = arguments.steps if quality else arguments.cost_steps
    values = {
        "model": arguments.model,
        "data": [str(folder / "train.jsonl")],
        "eval_data": [held_out],
        "task_data": [held_out] if quality else [],
        "output": str(folder / f"{part}-{name.replace(', ', '-')}"),
        "steps": steps,
        "eval_steps": -(-steps // arguments.evaluations) if quality else steps,
        **{"batch_size": arguments.batch_size, "max_tokens": arguments.max_tokens, "seed": arguments.seed},
        **{"answer_kind": arguments.answer_kind, "answer_tokens": arguments.answer_tokens},
        **{"preview": False, "track": ["none"], "dtype": "float32"},
        **METHODS[name],
    }
    meter = Meter()
    _, _, report = sft.run(make_options(SFTOptions, values), callbacks=(meter,))
    if not quality:
        return {
            "seconds_a_step": round(statistics.median(meter.seconds), 4),
            "training_adds_mib": meter.added_mib,
        }
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
    axes[0].set_yscale("log")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_data(folder: Path, arguments: argparse.Namespace):
    """Training and held-out examples, and a few held-out ones for runs that measure cost."""
    if arguments.train_data:
        train, held_out = (read_examples([path]) for path in (arguments.train_data, arguments.held_out_data))
        rng = random.Random(arguments.seed)
        train = rng.sample(train, min(len(train), arguments.train_examples))
        held_out = rng.sample(held_out, min(len(held_out), arguments.held_out_examples))
    else:
        train, held_out = number_problems(arguments.train_examples, arguments.held_out_examples, arguments.seed)
    write_jsonl(train, folder / "train.jsonl")
    write_jsonl(held_out, folder / "held_out.jsonl")
    write_jsonl(held_out[:1], folder / "few.jsonl")


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub name (default: this repository)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all five")
    parser.add_argument("--only", choices=_PARTS, help="measure one part")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of each (default 400)")
    parser.add_argument("--cost-steps", type=int, default=20, help="steps that are timed (default 20)")
    parser.add_argument("--evaluations", type=int, default=5, help="of each run (default 5)")
    parser.add_argument("--batch-size", type=int, default=32, help="examples of a step (default 32)")
    parser.add_argument("--max-tokens", type=int, default=128, help="longer examples are left out (default 128)")
    parser.add_argument("--answer-tokens", type=int, default=64, help="longest generated answer (default 64)")
    parser.add_argument("--answer-kind", choices=("exact", "number"), default="exact", help="default exact")
    parser.add_argument("--train-data", help="a data file instead of number problems")
    parser.add_argument("--held-out-data", help="its held-out examples")
    parser.add_argument("--train-examples", type=int, default=12_000, help="at most (default 12000)")
    parser.add_argument("--held-out-examples", type=int, default=400, help="at most (default 400)")
    parser.add_argument("--seed", type=int, default=0, help="of data, order and adapters (default 0)")
    parser.add_argument("--name", default="finetune", help="of the result files (default finetune)")
    parser.add_argument(
        "--one", nargs=3, metavar=("METHOD", "PART", "FOLDER"), help=argparse.SUPPRESS
    )  # a child's work
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if bool(arguments.train_data) != bool(arguments.held_out_data):
        parser.error("--train-data and --held-out-data go together")
    if arguments.one:
        name, part, folder = arguments.one
        result = run_one(name, part, Path(folder), arguments)
        (Path(folder) / f"{part}-{name}.json").write_text(json.dumps(result))
        return 0
    parts = [arguments.only] if arguments.only else _PARTS
    path = RESULTS / f"{arguments.name}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), arguments)
        for part in parts:
            done = results.get(part, {})
            kept = done["methods"] if done.get("settings") == settings(arguments, part) else {}
            results[part] = {"machine": describe_machine(), "settings": settings(arguments, part), "methods": kept}
            for name in arguments.methods:
                command = [sys.executable, "-m", "benchmarks.finetune", *(sys.argv[1:] if argv is None else argv)]
                subprocess.run([*command, "--one", name, part, folder], check=True, cwd=ROOT)
                measured = json.loads((Path(folder) / f"{part}-{name}.json").read_text())
                kept[name] = measured
                write_results(arguments.name, results)
                print(name, {key: value for key, value in measured.items() if key != "curve"}, flush=True)
    if "quality" in parts:
        draw(results["quality"]["methods"], RESULTS / f"{arguments.name}.png")
    return 0


def settings(arguments: argparse.Namespace, part: str) -> dict:
    """What a result depends on; of paths only the file's name."""
    left_out = {"one", "only", "methods", "name", "model", "cost_steps" if part == "quality" else "steps"}
    if part == "cost":
        left_out |= {"evaluations", "answer_kind", "answer_tokens", "held_out_examples", "held_out_data"}
    values = {key: value for key, value in vars(arguments).items() if key not in left_out and value is not None}
    return {key: Path(value).name if key.endswith("_data") else value for key, value in values.items()}


if __name__ == "__main__":
    run_command(main)
