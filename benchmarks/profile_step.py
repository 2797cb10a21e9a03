"""Where the time of a training step goes: full training and LoRA, float32, CPU, by kind of operation.

    python -m benchmarks.profile_step

The model is that of `benchmarks.decode`, the adapters those of `benchmarks.lora_step` on all targets. Times are PyTorch's
profiler's, of each operation without those that it calls, of the median of the steps. Writes
runs/benchmarks/profile_step.json.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers.utils import logging

from benchmarks.common import save_checkpoint, write_results
from benchmarks.decode import CONFIG, LOADERS
from benchmarks.lora_step import make_step
from common.command import run_command
from common.machine import describe_machine

# The beginning of an operation's name -> what it is; what is in no line is "other".
KINDS = {
    "aten::mm": "matrix products",
    "aten::bmm": "matrix products",
    "aten::addmm": "matrix products",
    "aten::_scaled_dot_product": "attention kernel",
    "aten::_log_softmax": "cross entropy",
    "aten::nll_loss": "cross entropy",
    "aten::cat": "joining and copying",
    "aten::copy_": "joining and copying",
    "aten::fill_": "joining and copying",
    "aten::_foreach": "optimizer",
    "aten::lerp": "optimizer",
    "aten::addcdiv": "optimizer",
}


def full_step(folder: str, rows: int, length: int):
    """A function that trains all weights by one step, without an optimizer."""
    model = LOADERS["ours"](folder).train()
    tokens = torch.randint(3, CONFIG["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0))

    def step():
        model.zero_grad()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    return step


def by_kind(step, repeats: int) -> dict[str, float]:
    """Milliseconds of a step by kind of operation, the greatest first; of the step whose sum is the median."""
    step()  # allocates
    turns = []
    for _ in range(repeats):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
        spent: dict[str, float] = {}
        for event in profiler.key_averages():
            kind = next((kind for start, kind in KINDS.items() if event.key.startswith(start)), "other")
            spent[kind] = spent.get(kind, 0.0) + event.self_cpu_time_total / 1e3
        turns.append(spent)
    middle = sorted(turns, key=lambda spent: sum(spent.values()))[repeats // 2]
    return {kind: round(value, 1) for kind, value in sorted(middle.items(), key=lambda pair: -pair[1])}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_step", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4, help="rows of a step (default 4)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (default 512)")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps (default 5)")
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results: dict = {"machine": describe_machine(), "settings": {"rows": arguments.rows, "length": arguments.length}}
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), CONFIG)
        steps = {"full": full_step(folder, arguments.rows, arguments.length)}
        steps["LoRA"] = make_step(folder, "all", "ours", arguments.rows, arguments.length)[1]
        for name, step in steps.items():
            results[name] = by_kind(step, arguments.repeats)
            whole = sum(results[name].values())
            print(name, ", ".join(f"{kind} {value / whole:.1%}" for kind, value in results[name].items()))
    write_results("profile_step", results)
    return 0


if __name__ == "__main__":
    run_command(main)
