"""Everything that is claimed for GPUs, run on one, within a given time and without a network.

    python -m benchmarks.gpu                                    # eight minutes on the first GPU; or: make gpu
    python -m benchmarks.gpu --parts smoke                      # one part
    python -m benchmarks.gpu --device cpu --size tiny           # the program itself, without a GPU

From a plain checkout with PyTorch 2.11 and transformers 5.17 or later; flash-attn, PEFT, Triton and `kernels` are used
where they are installed. Parts, and in a part the most telling checks, come first; each gets its share of the time:

    smoke     families, kernels, caches, experts, drafts, LoRA and FP8 against float32 on the CPU
    speed     V2-Lite in full size and layers of V3's width beside transformers' own classes
    sparse    NSA and DSA beside dense attention, 8,192 to 131,072 tokens

Writes gpu.json as results come, and docs/gpu.md's tables from it. Exit code 1 if a check failed.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import torch

from benchmarks.common import RESULTS, ROOT
from common.machine import describe_machine

from . import report as page, smoke, sparse, speed
from .models import Setup
from .runner import SHARES, Report, deadlines, gpu_is_broken, run_part, supervise

PARTS = {"smoke": smoke, "speed": speed, "sparse": sparse}


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all parts (default 8)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default cuda)")
    parser.add_argument(
        "--parts",
        type=lambda text: text.split(","),
        default=list(SHARES),
        metavar="PART,...",
        help=f"of {','.join(SHARES)} (default: all)",
    )
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: for a CPU (default full)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for gpu.json and gpu.md (default: benchmarks/results and docs; without a GPU runs/gpu)",
    )
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of a child: when the time is up
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"--parts: no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --size tiny tries the program without one")
    output = arguments.output or (RESULTS if arguments.device == "cuda" else ROOT / "runs" / "gpu")
    path = output / "gpu.json"
    if arguments.until is not None:
        run(arguments, path)
        return 0
    start = time.time()
    if path.exists():
        shutil.move(path, path.with_suffix(".before.json"))
    end = start + 60 * arguments.minutes
    supervise([sys.executable, "-m", "benchmarks.gpu", *argv, "--until", str(end)], path, end)
    found = Report(path)
    target = (arguments.output or (ROOT / "docs" if arguments.device == "cuda" else output)) / "gpu.md"
    page.write(ROOT / "docs" / "gpu.md", target, found.head, found.checks)
    print(f"{path}\n{target}")
    return int(any(record["status"] == "failed" for record in found.checks.values()))


def run(arguments: argparse.Namespace, path: Path):
    """A child's work: the checks that the file at `path` does not know."""
    setup = Setup(arguments.device, arguments.size == "full")
    if setup.device == "cuda":
        torch.cuda.init()
    settings = {"device": setup.device, "size": arguments.size, "minutes": arguments.minutes}
    report = Report(path, {"machine": describe_machine(), "settings": settings})
    start = report.head.setdefault("start", time.time())
    ends = deadlines([part for part in PARTS if part in arguments.parts], start, arguments.until)
    for part, end in ends.items():
        run_part(part, PARTS[part].checks(setup), report, end, is_broken=gpu_is_broken)
    report.write()


if __name__ == "__main__":
    sys.exit(main())
