"""What every benchmark needs: the machine's description, paired timing, models with the same weights."""

import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from benchmarks.places import RESULTS, ROOT


def interleave(functions: dict[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each call, the functions taking turns, so that a machine that drifts slows all alike. A call ends when
    the GPU, if one is in use, is done with it."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    seconds = {name: [] for name in functions}
    for i in range(warmup + repeats):
        for name, function in functions.items():
            wait()
            start = time.perf_counter()
            function()
            wait()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summarise(seconds: dict[str, list[float]], baseline: str) -> dict:
    """Median and least milliseconds of each, and the median over turns of baseline / each."""
    summary = {}
    for name, values in seconds.items():
        ratios = [base / value for base, value in zip(seconds[baseline], values, strict=True)]
        summary[name] = {
            "median_ms": round(statistics.median(values) * 1e3, 3),
            "min_ms": round(min(values) * 1e3, 3),
            f"times_faster_than_{baseline}": round(statistics.median(ratios), 2),
        }
    return summary


def measure_bandwidth(megabytes: int = 512) -> float:
    """Bytes a second of reading a float32 tensor once, the best of ten."""
    tensor = torch.ones(megabytes * 2**20 // 4)
    return tensor.numel() * 4 / min(interleave({"read": tensor.sum}, repeats=10)["read"])


def write_results(name: str, results: dict):
    """Writes runs/benchmarks/NAME.json whole or not at all; `benchmarks.publish` puts it among the committed results."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    part = RESULTS / f"{name}.json.part"
    part.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(part, RESULTS / f"{name}.json")
    print(f"written to {RESULTS / name}.json; among the committed results by `python -m benchmarks.publish {name}`")


def save_checkpoint(folder: Path, config: dict):
    """A checkpoint with random float32 weights, the model code beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ROOT.glob("*_deepseek.py"):
        shutil.copy(file, folder)
    auto_map = json.loads((ROOT / "config.json").read_text())["auto_map"]
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    torch.manual_seed(0)
    loaded = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_config(loaded, trust_remote_code=True, dtype=torch.float32)
    model.save_pretrained(folder)
