"""A LoRA training step against the same adapters on transformers' own DeepseekV3 class, same weights, float32, CPU.

    python -m benchmarks.lora_step

The model is that of `benchmarks.decode`. For the native class, PEFT must be told weights instead of modules to reach
shared experts and dense layers at all (docs/design.md, section 1); that the trainable parameters are as many is checked.
A step is forward, backward and AdamW; both take turns in one process. Memory is what three steps add to a process of
their own at its peak. Writes runs/benchmarks/lora_step.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn
from transformers.utils import logging

from benchmarks.common import interleave, save_checkpoint, summarise, write_results
from benchmarks.decode import CONFIG, LOADERS, resident_kib
from common.command import run_command
from common.machine import describe_machine
from finetune.lora import lora_config
from finetune.models import trainable_parameters

TARGETS = {"attention": ["attention"], "attention and routed": ["attention", "routed"], "all": ["all"]}
_PLAIN_MLPS = ("mlp.shared_experts", "layers.0.mlp")  # shared experts, and the one dense layer


def adapt(model: nn.Module, which: str, implementation: str) -> nn.Module:
    """Put adapters of rank 16 on the targets."""
    torch.manual_seed(0)
    if implementation == "ours":
        config = lora_config(model, TARGETS[which], rank=16)
    else:
        groups = [group for group in TARGETS[which] if group != "all"] or ["attention", "routed"]
        config = lora_config(model, groups, rank=16)
        if which == "all":
            parts = [f"{owner}.{part}_proj.weight" for owner in _PLAIN_MLPS for part in ("gate", "up", "down")]
            config.target_parameters = [*config.target_parameters, *parts]
    return get_peft_model(model, config)


def make_step(folder: str, which: str, implementation: str, rows: int, length: int) -> tuple[nn.Module, Callable]:
    """A model with adapters, and a function that trains it by one step."""
    model = adapt(LOADERS[implementation](folder), which, implementation).train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    tokens = torch.randint(3, CONFIG["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0))

    def step():
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def peak_memory(folder: str, which: str, implementation: str, arguments: argparse.Namespace) -> int:
    """MiB that three steps add, in a process of their own (Linux)."""
    command = [sys.executable, "-m", "benchmarks.lora_step", "--measure", folder, which, implementation]
    command += ["--rows", str(arguments.rows), "--length", str(arguments.length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: str, which: str, implementation: str, arguments: argparse.Namespace) -> int:
    """The child's part of `peak_memory`."""
    _, step = make_step(folder, which, implementation, arguments.rows, arguments.length)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident_kib("VmRSS")
    for _ in range(3):
        step()
    return (resident_kib("VmHWM") - before) // 1024


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lora_step", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4, help="rows of a step (default 4)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (default 512)")
    parser.add_argument("--repeats", type=int, default=7, help="measured steps of each (default 7)")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # a child's work
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if arguments.measure:
        print(measure(*arguments.measure, arguments))
        return 0
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), CONFIG)
        for which in TARGETS:
            made = {name: make_step(folder, which, name, arguments.rows, arguments.length) for name in LOADERS}
            trainable = {name: trainable_parameters(model) for name, (model, _) in made.items()}
            if len(set(trainable.values())) != 1:
                raise RuntimeError(f"adapted parameters differ, so nothing is compared: {trainable}")
            seconds = interleave({name: step for name, (_, step) in made.items()}, arguments.repeats, warmup=3)
            del made
            results[which] = {
                "trainable_parameters": trainable["ours"],
                "step": summarise(seconds, "native"),
                "step_adds_mib": {name: peak_memory(folder, which, name, arguments) for name in LOADERS},
            }
            print(which, results[which])
    settings = {"rows": arguments.rows, "length": arguments.length, "rank": 16, "config": CONFIG}
    write_results("lora_step", {"machine": describe_machine(), "settings": settings, "targets": results})
    return 0


if __name__ == "__main__":
    run_command(main)
