"""Tokens a second, waiting and memory of the server with 1 to 100 clients, of whom each asks with sampling fields.

    python -m benchmarks.serving                              # the default, and --no-continuous-batching
    python -m benchmarks.serving --before OTHER/CHECKOUT      # also the server of another checkout, of an older commit

All clients start at once, each with a chat of its own, and stream an answer, which may end before its longest: tokens are
counted as the server tells them. The servers, each a process of its own, take turns, so that a machine that drifts slows all
alike; its load average is in the results. Writes runs/benchmarks/serving.json.
"""

import argparse
import asyncio
import itertools
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import openai

from benchmarks.common import write_results
from benchmarks.places import ROOT
from common.command import run_command
from common.machine import describe_machine

FIELDS = {"temperature": 0.8, "top_p": 0.95, "extra_body": {"top_k": 200}, "stop": ["\u0000"]}


@contextmanager
def server(folder: Path, options: list[str], model: str):
    """`serve.py` of a checkout -> (process id, address) once it answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "serve.py", "--model", model, "--dtype", "float32", "--quiet", "--port", str(port)]
    process = subprocess.Popen([*command, *options], cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        if not any("/chat/completions" in line for line in process.stdout):
            raise RuntimeError(f"serve.py of {folder} ended with {process.wait()}")
        yield process.pid, f"http://localhost:{port}/v1"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def peak_mib(pid: int) -> float | None:
    """Most memory that a process has had since the last reset, in MiB; None where /proc does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        peak = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets the peak
        return round(peak, 1)
    except OSError:
        return None


async def crowd(address: str, clients: int, tokens: int) -> dict:
    """All clients at once -> tokens a second together, and seconds to the first token."""

    async def one(client: openai.AsyncOpenAI, i: int) -> tuple[float, int]:
        start, first, count = time.perf_counter(), None, 0
        stream = await client.chat.completions.create(
            model="deepseek",
            messages=[{"role": "user", "content": f"Tell me a story about the number {i}."}],
            max_tokens=tokens,
            stream=True,
            stream_options={"include_usage": True},
            **FIELDS,
        )
        async for chunk in stream:
            if first is None and chunk.choices and chunk.choices[0].delta.content:
                first = time.perf_counter() - start
            if chunk.usage:
                count = chunk.usage.completion_tokens
        return first if first is not None else time.perf_counter() - start, count

    start = time.perf_counter()
    async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=3600) as client:
        answers = await asyncio.gather(*(one(client, i) for i in range(clients)))
    seconds = time.perf_counter() - start
    firsts = sorted(first for first, _ in answers)
    return {
        "tokens": sum(count for _, count in answers),
        "tokens_a_second": round(sum(count for _, count in answers) / seconds, 1),
        "median_seconds_to_first_token": round(statistics.median(firsts), 2),
        "longest_seconds_to_first_token": round(firsts[-1], 2),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT), help="folder of the checkpoint (default: this repository)")
    parser.add_argument("--before", type=Path, help="another checkout, whose server is measured with its own default")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 100], help="(default 1 8 32 100)")
    parser.add_argument("--tokens", type=int, default=24, help="longest answer, in tokens (default 24)")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median is told (default 3)")
    parser.add_argument("--name", default="serving", help="name of the result file")
    args = parser.parse_args()
    ways = {"one after the other": (ROOT, ["--no-continuous-batching"]), "default": (ROOT, [])}
    if args.before:
        ways = {"before": (args.before.resolve(), [])} | ways
    results = {
        "machine": describe_machine() | {"cores": os.cpu_count()},
        "fields": FIELDS,
        "tokens": args.tokens,
    }
    runs: dict = {way: {clients: [] for clients in args.clients} for way in ways}
    with ExitStack() as stack:
        servers = {way: stack.enter_context(server(*how, args.model)) for way, how in ways.items()}
        for _, address in servers.values():
            asyncio.run(crowd(address, 1, 4))  # what is made at the first request
        for clients, _, (way, (pid, address)) in itertools.product(args.clients, range(args.repeats), servers.items()):
            peak_mib(pid)
            run = asyncio.run(crowd(address, clients, args.tokens))
            run |= {"peak_mib": peak_mib(pid), "load_average": round(os.getloadavg()[0], 1)}
            runs[way][clients].append(run)
            print(f"{way:20} {clients:4} clients  {run}", flush=True)
    for way, by_clients in runs.items():
        results[way] = {}
        for clients, several in by_clients.items():
            middle = sorted(several, key=lambda run: run["tokens_a_second"])[len(several) // 2]
            results[way][clients] = middle | {"all_tokens_a_second": [run["tokens_a_second"] for run in several]}
    write_results(args.name, results)


if __name__ == "__main__":
    run_command(main)
