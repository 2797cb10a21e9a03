"""What idle OpenMP threads cost where other programs want the cores too: turning between parallel regions, and sleeping.

    python -m benchmarks.idle_threads

Processes that differ in `OMP_WAIT_POLICY` decode greedily with the checkpoint of this folder, a short text at a time, in
random order, alone on the machine and beside busy processes. Tells tokens a second and processor time a token. Writes
runs/benchmarks/idle_threads.json.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import time

from benchmarks.common import write_results
from benchmarks.places import ROOT
from common.command import run_command
from common.machine import describe_machine

BUSY = "import torch; torch.set_num_threads(1)\nwhile True: torch.randn(500, 500) @ torch.randn(500, 500)"
WAYS = {
    "turning (libgomp's default)": {},
    "sleeping (OMP_WAIT_POLICY=PASSIVE)": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread (OMP_NUM_THREADS=1)": {"OMP_NUM_THREADS": "1"},
}


def work() -> None:
    """Decode as many tokens as each line of stdin says -> tokens a second, and milliseconds of all processors a token."""
    import torch

    from common.loading import load

    model, _ = load(None, None, False)
    prompt = torch.arange(5, 13)[None]

    def decode(tokens: int) -> tuple[float, float]:
        wall, processors = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return tokens / (time.perf_counter() - wall), (time.process_time() - processors) / tokens * 1e3

    decode(4)
    print("ready", flush=True)
    for line in sys.stdin:
        print(*decode(int(line)), flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=12, help="turns of each (default 12)")
    parser.add_argument("--tokens", type=int, default=20, help="of each turn (default 20)")
    parser.add_argument("--beside", type=int, default=4, help="busy processes, the second time (default 4)")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-m", "benchmarks.idle_threads", "--work"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    workers = {way: subprocess.Popen(command, env=inherited | more, **pipes) for way, more in WAYS.items()}
    for worker in workers.values():
        worker.stdout.readline()
    results: dict = {"machine": describe_machine() | {"cores": os.cpu_count()}}
    for busy in (0, args.beside):
        others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
        try:
            results[f"beside {busy} busy processes"] = measure(workers, args.repeats, args.tokens)
        finally:
            for other in others:
                other.kill()
    for worker in workers.values():
        worker.stdin.close()
    write_results("idle_threads", results)


def measure(workers: dict[str, subprocess.Popen], repeats: int, tokens: int) -> dict:
    """Tokens a second and processor time of each worker, which take turns in random order."""
    runs: dict[str, list] = {way: [] for way in workers}
    for _ in range(repeats):
        for way in random.sample(list(workers), len(workers)):
            workers[way].stdin.write(f"{tokens}\n")
            workers[way].stdin.flush()
            runs[way].append([float(number) for number in workers[way].stdout.readline().split()])
    results = {"load_average": round(os.getloadavg()[0], 1)}
    for way, pairs in runs.items():
        speeds, costs = zip(*pairs, strict=True)
        results[way] = {
            "median_tokens_a_second": round(statistics.median(speeds), 1),
            "slowest_and_fastest": [round(min(speeds), 1), round(max(speeds), 1)],
            "median_processor_ms_a_token": round(statistics.median(costs), 1),
        }
        print(f"{way:36} {results[way]}")
    return results


if __name__ == "__main__":
    run_command(main)
