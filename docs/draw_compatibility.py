"""Writes docs/compatibility.md from what the tests marked `compatibility` found: `make compatibility`.

    python -m pytest -m compatibility --compatibility=FILE.json      # once on each release of transformers
    python docs/draw_compatibility.py FILE.json ...

A cell is what its tests did: all passed, all passed and some of them show that a use is refused with a message, or left
out since the release of transformers lacks what they need. A failed test is a cell that says so.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = {
    "llama": "LLM",
    "deepseek": "MoE",
    "v2_lite": "V2-Lite",
    "deepseek_v2": "V2",
    "deepseek_v3": "V3",
    "deepseek_v32": "V3.2",
    "deepseek_nsa": "NSA",
}
INTRODUCTION = """# Compatibility

Each cell is made by tests that can fail, and this page is written from their results: `make compatibility` runs the tests
marked `compatibility` and then `docs/draw_compatibility.py`. **yes**: the tests of this cell pass. **refused**: they pass, and
show that this is refused with the message in the note. **partly**: some ways work, those in the note are refused. An empty
cell: no test of this run is about it, mostly since the family has nothing of the kind. Slow tests (compilers, tensor and
expert parallelism, trainers in several processes) run on the first table's release only.

"""


class Notes:
    """Numbers texts in the order of their first use."""

    def __init__(self):
        self.texts: list[str] = []

    def number(self, text: str) -> str:
        text = " ".join(text.split())
        if text not in self.texts:
            self.texts.append(text)
        return f"<sup>{self.texts.index(text) + 1}</sup>"

    def __str__(self) -> str:
        return "".join(f"{number}. {text}\n" for number, text in enumerate(self.texts, 1))


def merged(cells: list[dict]) -> dict:
    """The cells of several families as one."""
    total = {name: sum(cell[name] for cell in cells) for name in ("passed", "failed", "skipped")}
    for name in ("refused", "left_out"):
        total[name] = list(dict.fromkeys(text for cell in cells for text in cell[name]))
    total["refusals"] = sum(sum(cell["refused"].values()) for cell in cells)
    return total


def shown(cell: dict, notes: Notes) -> str:
    """One cell in Markdown."""
    marks = "".join(notes.number(text) for text in (*cell["refused"], *cell["left_out"]))
    if cell["failed"]:
        return f"**{cell['failed']} of {cell['failed'] + cell['passed']} fail**{marks}"
    if not cell["passed"]:
        return f"–{marks}"
    if cell["refusals"] == cell["passed"]:
        return f"refused{marks}"
    return ("partly" if cell["refused"] else "yes") + marks


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n\n"


def release(number: str) -> tuple[int, ...]:
    return tuple(int(part) for part in number.split(".")[:3])


def page(results: list[dict], pinned: str) -> str:
    """The whole page; `results` as `pytest --compatibility` writes them, `pinned` the release of the first table."""
    results = sorted(results, key=lambda result: release(result["versions"]["transformers"]))
    (newest,) = (result for result in results if result["versions"]["transformers"] == pinned)
    versions = newest["versions"]
    text = INTRODUCTION + "## What people do, by family\n\n"
    text += f"transformers {versions['transformers']}, torch {versions['torch']}, Python {versions['python']}.\n\n"
    notes, rows = Notes(), []
    for name, cells in newest["rows"].items():
        found = [shown(merged([cells[family]]), notes) if family in cells else "" for family in FAMILIES]
        rows.append([name, *found])
    text += table(["", *FAMILIES.values()], rows) + str(notes)

    if len(results) == 1:
        return text
    text += "\n## The same on other releases of transformers\n\nAll families of a row together.\n\n"
    notes, rows = Notes(), []
    for name in newest["rows"]:
        cells = [result["rows"].get(name) for result in results]
        if sum(cell is not None for cell in cells) > 1:
            rows.append([name, *(shown(merged(list(cell.values())), notes) if cell else "" for cell in cells)])
    text += table(["", *(result["versions"]["transformers"] for result in results)], rows) + str(notes)
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "results", type=Path, nargs="+", help="what `pytest --compatibility` wrote, one file a release"
    )
    parser.add_argument("--pinned", required=True, help="release whose table has a column for each family")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "compatibility.md")
    options = parser.parse_args(arguments)
    options.output.write_text(page([json.loads(path.read_text()) for path in options.results], options.pinned))
    return 0


if __name__ == "__main__":
    sys.exit(main())
