"""Writes the tables of docs/compression.md from the figures of `python -m benchmarks.compress`.

python docs/draw_compression.py
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "benchmarks" / "results" / "compress.json"
PAGE = ROOT / "docs" / "compression.md"
_BEGIN, _END = "<!-- table {name}: docs/draw_compression.py -->", "<!-- end -->"
ONE_DOMAIN = "en_python_docs"
EXPERTS = 16


def bits(entry: dict) -> str:
    return f"{entry['en']:.3f} / {entry['zh']:.3f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def scores_table(results: dict) -> str:
    """Bits per byte by experts kept, a row a score and calibration text."""
    columns = [(groups, keep) for groups, part in results["scores"].items() for keep in part["pruned"]]
    header = ["English / Chinese"] + [f"{100 * int(keep) / EXPERTS:g} %, {groups}" for groups, keep in columns]
    whole = [bits(results["scores"][groups]["whole"]) for groups, _ in columns]
    rows = [["100 %", *whole]]
    parts = [results["scores"][groups]["pruned"][keep] for groups, keep in columns]
    names = [name for name in parts[0] if not name.startswith("random")]
    rows += [
        [name, *(bits(part[name]) if name in part else "" for part in parts)]
        for name in sorted(names, key=lambda name: ONE_DOMAIN in name)
    ]
    draws = [[entry for name, entry in part.items() if name.startswith("random")] for part in parts]
    ranges = [_ranges(some) if len(some) == len(draws[0]) else "" for some in draws]
    return table(header, [*rows, [f"random, {len(draws[0])} draws", *ranges]])


def _ranges(entries: list[dict]) -> str:
    values = {language: [entry[language] for entry in entries] for language in ("en", "zh")}
    return " / ".join(f"{min(found):.3f}-{max(found):.3f}" for found in values.values())


def recovery_table(results: dict) -> str:
    """Bits per byte before and after a recovery."""
    rows = []
    for entry in results["recovery"]:
        how = f"{entry['steps']} steps, {'distilled' if entry['teacher'] else 'on the text alone'}"
        rows.append(
            [f"{100 * entry['kept'] / EXPERTS:g} %", entry["choice"], bits(entry["before"]), how, bits(entry["after"])]
        )
    return table(["experts kept", "chosen by", "before", "trained for", "after"], rows)


def plane_table(results: dict) -> str:
    """Bytes and bits per byte of pruned and quantised checkpoints."""
    rows = []
    for entry in results["plane"]:
        state = "whole" if entry["kept"] == EXPERTS else "recovered" if entry["recovered"] else "pruned"
        kept = f"{100 * entry['kept'] / EXPERTS:g} %"
        rows.append([kept, state, entry["format"], f"{entry['bytes'] / 1e6:.1f}", bits(entry)])
    return table(["experts kept", "", "format", "weights, MB", "English / Chinese"], rows)


TABLES = {"scores": scores_table, "recovery": recovery_table, "plane": plane_table}


def _missing(name: str) -> str:
    return f"Not measured yet: `python -m benchmarks.compress --only {name}`."


def page(text: str, results: dict) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: it has no place for one of them.
    """
    for name, make in TABLES.items():
        begin = _BEGIN.format(name=name)
        text, found = re.subn(
            f"{re.escape(begin)}\n.*?{re.escape(_END)}",
            lambda _, b=begin, n=name, m=make: f"{b}\n{m(results) if results.get(n) else _missing(n)}\n{_END}",
            text,
            flags=re.DOTALL,
        )
        if found != 1:
            raise ValueError(f"{PAGE} has {found} places `{begin}` ... `{_END}`; it must have one")
    return text


def main() -> int:
    """Run the command line; returns the exit code."""
    results = json.loads(FIGURES.read_text(encoding="utf-8"))["results"]
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
