"""Where the time of a decoded token goes: plain `generate` with this repository's checkpoint, float32, one row, CPU.

    python -m benchmarks.profile_decode
    python -m benchmarks.profile_decode --against OTHER_CHECKOUT      # and how much faster than its code this one is

A prompt of 512 tokens, then 64 more, no option given; "compiled" is the same model with a static cache and a
`compile_config`. A token's time is that of the 64 without the first, which is the prompt's; the time of each kind of module is
without that of the modules in it, taken in turns of their own, since taking it costs time. What `generate` does outside the
model is the rest. Writes runs/benchmarks/profile_decode.json.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, CompileConfig
from transformers.utils import logging

from benchmarks.common import ROOT, interleave, write_results
from common.command import run_command
from common.machine import describe_machine

PROMPT, NEW = 512, 64
SETTINGS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}
KINDS = {
    "DeepseekForCausalLM": "output head, output",
    "DeepseekModel": "embedding, mask, rotation angles",
    "DeepseekDecoderLayer": "residual sums",
    "DeepseekMLA": "attention with its projections",
    "DeepseekRMSNorm": "norms",
    "DeepseekMLP": "dense and shared MLPs",
    "DeepseekMoE": "sum of shared and routed",
    "DeepseekRouter": "router",
    "DeepseekExperts": "routed experts",
}


def load(folder: Path) -> torch.nn.Module:
    """The checkpoint of a checkout by its own code."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def compiled() -> dict:
    """Settings of `generate` that compile the step."""
    return {"cache_implementation": "static", "compile_config": CompileConfig()}


def token_seconds(
    ways: dict[str, Callable],
    repeats: int,
    texts: int = 1,
    prompt: int = PROMPT,
    new: int = NEW,
    vocabulary: int = 8192,
) -> dict[str, list[float]]:
    """Seconds of a decoded token in each turn, of several ways to call `generate`, which take turns.

    Args:
        ways: what is called as `generate` is.
        texts, prompt, new: rows, tokens before, tokens written, of which the first is not counted.
        vocabulary: ids that a random prompt may have.
    """
    tokens = torch.randint(3, vocabulary, (texts, prompt), generator=torch.Generator().manual_seed(0))
    turns = {}
    for name, generate in ways.items():
        for count in (1, new):
            turns[name, count] = partial(generate, tokens, max_new_tokens=count, **SETTINGS)
            turns[name, count]()  # compiles where something is compiled
    seconds = interleave(turns, repeats)
    return {
        name: [(whole - first) / (new - 1) for whole, first in zip(seconds[name, new], seconds[name, 1], strict=True)]
        for name in ways
    }


def module_seconds(model: torch.nn.Module, repeats: int) -> dict[str, float]:
    """Median seconds of a decoded token in each kind of module, those inside it not counted; "generate" is the rest."""
    spent, open_calls = defaultdict(float), []

    def begin(module, inputs):
        open_calls.append([time.perf_counter(), 0.0])

    def end(module, inputs, output):
        start, inside = open_calls.pop()
        whole = time.perf_counter() - start
        spent[KINDS[type(module).__name__]] += whole - inside
        if open_calls:
            open_calls[-1][1] += whole

    watched = [module for module in model.modules() if type(module).__name__ in KINDS]
    handles = [
        handle for m in watched for handle in (m.register_forward_pre_hook(begin), m.register_forward_hook(end))
    ]
    tokens = torch.randint(3, 8192, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    turns = defaultdict(list)
    for _ in range(repeats):
        by_count = {}
        for count in (1, NEW):
            spent.clear()
            start = time.perf_counter()
            model.generate(tokens, max_new_tokens=count, **SETTINGS)
            whole = time.perf_counter() - start
            by_count[count] = dict(spent) | {"generate": whole - sum(spent.values())}
        for kind, value in by_count[NEW].items():
            turns[kind].append((value - by_count[1].get(kind, 0.0)) / (NEW - 1))
    for handle in handles:
        handle.remove()
    return {kind: statistics.median(values) for kind, values in turns.items()}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile_decode", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout, to compare with")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each (default 15)")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (default 2)")
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    models = {"this": load(ROOT)} | ({"before": load(arguments.against)} if arguments.against else {})
    ways = {name: model.generate for name, model in models.items()}
    ways["compiled"] = partial(models["this"].generate, **compiled())
    start = time.perf_counter()
    token_seconds({"compiled": ways["compiled"]}, 1)
    compiling = time.perf_counter() - start
    seconds = token_seconds(ways, arguments.repeats)
    results = {"machine": describe_machine(), "settings": {"prompt": PROMPT, "new_tokens": NEW, "rows": 1}}
    for name, values in seconds.items():
        median, least = statistics.median(values), min(values)
        results[name] = {"median_ms": round(median * 1e3, 3), "min_ms": round(least * 1e3, 3)}
        ratios = [eager / own for eager, own in zip(seconds["this"], values, strict=True)]
        results[name]["times_as_fast_as_this"] = round(statistics.median(ratios), 3)
    results["compiled"]["seconds_to_compile"] = round(compiling, 1)
    for name, model in models.items():
        parts = module_seconds(model, arguments.repeats)
        results[name]["ms_in"] = {kind: round(value * 1e3, 3) for kind, value in parts.items()}
    print(json.dumps(results, indent=2))
    write_results("profile_decode", results)
    return 0


if __name__ == "__main__":
    run_command(main)
