"""How fast a corpus is cleaned on one core, in how much memory, and which planted copies are found.

    python -m benchmarks.corpus path/to/corpus/*.jsonl.gz --test-sets path/to/gsm8k_test.jsonl

Speed: the whole command (start of Python, reading, quality rules, decontamination, both kinds of duplicates, writing,
report) in a process pinned to one core, the backends taking turns. MB are 10^6 UTF-8 bytes of text. CPU seconds are what
the process itself used; wall seconds grow with whatever else the machine does.
Recall: documents of the corpus and copies of them with some words or characters replaced, cleaned together at a threshold
near 0, so that a pair counts if it is a candidate. True similarities come from sets of tokens, not of hashes.
Writes runs/benchmarks/corpus.json and corpus.png.
"""

import argparse
import itertools
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from matplotlib import pyplot

from benchmarks.common import RESULTS, ROOT, write_results
from common.command import run_command
from common.machine import describe_machine
from corpus.deduplicate import Options
from corpus.signatures import BACKENDS, candidate_probability
from tokenization.documents import read_documents

COPIES = 600
EDITED_SHARES = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1)
BINS = np.linspace(0.3, 1.0, 15)


def clean(files: list[Path], output: Path, *options: str) -> dict:
    """Run the command in a process on one core; wall seconds, CPU seconds and peak memory."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    core = min(os.sched_getaffinity(0))
    subprocess.run(
        [sys.executable, "-m", "corpus.deduplicate", *map(str, files), "--output", str(output), *options],
        cwd=ROOT,
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, "peak_mb": after.ru_maxrss / 1e3}


def measure_speed(files: list[Path], test_sets: list[str], repeats: int) -> dict:
    """Median MB a CPU second and a wall second of each backend."""
    runs: dict[str, list[dict]] = {backend: [] for backend in BACKENDS}
    for number in range(repeats):
        for backend in BACKENDS:
            with tempfile.TemporaryDirectory() as folder:
                options = ["--backend", backend, *(["--test-sets", *test_sets] if test_sets else [])]
                run = clean(files, Path(folder) / "out", *options)
                figures = json.loads((Path(folder) / "out/report/figures.json").read_text(encoding="utf-8"))
            megabytes = figures["total"]["bytes_in"] / 1e6
            runs[backend].append(run)
            print(f"{number} {backend}: {megabytes / run['cpu_s']:.2f} MB/CPU s, {megabytes / run['wall_s']:.2f} MB/s")
    peak = max(run["peak_mb"] for of_backend in runs.values() for run in of_backend)
    summary: dict = {
        "megabytes": round(megabytes, 2),
        "documents": figures["total"]["documents_in"],
        "peak_memory_mb": round(peak),
    }
    for backend, of_backend in runs.items():
        summary[backend] = {
            "megabytes_per_cpu_second": [round(megabytes / run["cpu_s"], 2) for run in of_backend],
            "megabytes_per_wall_second": [round(megabytes / run["wall_s"], 2) for run in of_backend],
            "median_megabytes_per_cpu_second": round(
                megabytes / statistics.median(run["cpu_s"] for run in of_backend), 2
            ),
        }
    return summary


def tokens_of(text: str) -> list[str]:
    """The tokens that `corpus.text` is said to make, by a regular expression (Han characters and words)."""
    return re.findall(r"[\u3005-\u3007\u3400-\u9fff]|[^\W\u3005-\u3007\u3400-\u9fff]+", text.lower())


def edited(text: str, share: float, generator: random.Random) -> str:
    """The text with a share of its tokens replaced by a token that it does not hold."""
    pieces = re.split(r"([\u4e00-\u9fff]|[a-zA-Z]+)", text)
    for place in range(1, len(pieces), 2):
        if generator.random() < share:
            pieces[place] = "龘" if "\u4e00" <= pieces[place] <= "\u9fff" else "zyzzyva"
    return "".join(pieces)


def true_similarity(one: str, other: str, n: int) -> float:
    """Jaccard similarity of the sets of n-grams, as tuples of strings."""
    first, second = (
        {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)} for tokens in map(tokens_of, (one, other))
    )
    return len(first & second) / len(first | second)


def measure_recall(files: list[Path]) -> dict:
    """Share of the planted copies that become candidates, by true similarity, for each backend."""
    generator = random.Random(0)
    texts = [text for path in files for text in read_documents(path) if 1000 <= len(text) <= 8000]
    originals = generator.sample(texts, COPIES)
    copies = [edited(text, generator.choice(EDITED_SHARES), generator) for text in originals]
    default = Options()
    similarities = np.array([true_similarity(a, b, default.ngram) for a, b in zip(originals, copies, strict=True)])
    recall: dict = {"copies": COPIES, "bands": default.bands, "rows": default.rows}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, lines in (("originals", originals), ("copies", copies)):
            content = "".join(json.dumps({"text": text}) + "\n" for text in lines)
            (folder / f"{kind}.jsonl").write_text(content, encoding="utf-8")
        for backend in BACKENDS:
            output = folder / backend
            files = [folder / "originals.jsonl", folder / "copies.jsonl"]
            clean(files, output, "--backend", backend, "--threshold", "1e-9", "--no-quality")
            rows = map(json.loads, (output / "report/removed.jsonl").read_bytes().splitlines())
            found = {
                int(row["id"].split(":")[1])
                for row in rows
                if row["keeper"] == row["id"].replace("copies", "originals")
            }
            is_found = np.array([number in found for number in range(1, COPIES + 1)])
            recall[backend] = [
                {
                    "similarity": round(float(similarities[here].mean()), 3),
                    "copies": int(here.sum()),
                    "found": int(is_found[here].sum()),
                    "expected": round(
                        float(candidate_probability(similarities[here], default.bands, default.rows).sum()), 1
                    ),
                }
                for low, high in itertools.pairwise(BINS)
                if (here := (similarities > low) & (similarities <= high)).any()
            ]
    return recall


def draw(recall: dict) -> None:
    """Found shares with four standard deviations of the binomial against the theory."""
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    x = np.linspace(0.2, 1, 200)
    axes.plot(x, candidate_probability(x, recall["bands"], recall["rows"]), color="black", label="1 - (1 - s^8)^14")
    for backend, colour, shift in (("datasketch", "#4c78a8", -0.004), ("rensa", "#f58518", 0.004)):
        bins = recall[backend]
        share = np.array([entry["found"] / entry["copies"] for entry in bins])
        expected = np.array([entry["expected"] / entry["copies"] for entry in bins])
        error = 4 * np.sqrt(expected * (1 - expected) / [entry["copies"] for entry in bins])
        x = np.array([entry["similarity"] for entry in bins]) + shift
        axes.errorbar(x, share, error, fmt="o", markersize=4, elinewidth=0.8, color=colour, label=backend)
    axes.axvline(0.8, color="grey", linestyle=":", label="default threshold")
    axes.set_xlabel("true Jaccard similarity of a planted copy")
    axes.set_ylabel("share found")
    axes.set_ylim(-0.15, 1.15)
    axes.legend()
    figure.savefig(RESULTS / "corpus.png", dpi=110)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="corpus files")
    parser.add_argument("--test-sets", nargs="*", default=[], help="test sets to decontaminate against")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each backend (default 3)")
    args = parser.parse_args()
    files = [path.resolve() for path in args.files]
    recall = measure_recall(files)
    speed = measure_speed(files, [str(Path(path).resolve()) for path in args.test_sets], args.repeats)
    write_results("corpus", {"machine": describe_machine(), "speed": speed, "recall": recall})
    draw(recall)


if __name__ == "__main__":
    run_command(main)
