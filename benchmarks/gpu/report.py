"""Makes docs/gpu.md's tables out of what the checks found."""

from collections import Counter
from pathlib import Path

BEGIN, END = "<!-- tables: written by `python -m benchmarks.gpu` -->", "<!-- end of tables -->"
TITLES = {"smoke": "Does it work", "speed": "How fast", "sparse": "Sparse attention beside dense"}


def tables(head: dict, checks: dict[str, dict]) -> str:
    """Markdown: the machine, how many checks passed, a table for each group, and why others did not pass."""
    machine = ", ".join(f"{key} {value}" for key, value in head["machine"].items())
    counts = Counter(record["status"] for record in checks.values())
    lines = [f"Machine: {machine}.", "", ", ".join(f"{count} {status}" for status, count in counts.items()) + ".", ""]
    for part, title in TITLES.items():
        groups: dict[str, dict[str, dict]] = {}
        for name, record in checks.items():
            its_part, group, case = name.split("/", maxsplit=2)
            if its_part == part:
                groups.setdefault(group, {})[case] = record
        lines += [f"## {title}", ""] if groups else []
        for group, cases in groups.items():
            lines += [*_table(group, cases), ""]
    others = {name: record for name, record in checks.items() if record["status"] != "passed"}
    if others:
        lines += ["## What did not pass", ""]
        lines += [f"- {name}: {record['status']}: {record.get('reason', '')}" for name, record in others.items()]
    return "\n".join(lines).strip() + "\n"


def _table(group: str, cases: dict[str, dict]) -> list[str]:
    columns = list(dict.fromkeys(key for record in cases.values() for key in record.get("result", ())))
    rows = [[group, "", *columns], ["---"] * (len(columns) + 2)]
    for case, record in cases.items():
        result = record.get("result", {})
        rows.append([case, record["status"], *(_shown(result.get(column, "")) for column in columns)])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _shown(value) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def write(page: Path, target: Path, head: dict, checks: dict[str, dict]):
    """The text of `page` with the tables in their place, as `target`.

    Raises:
        ValueError: the page has no place for them.
    """
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page} must hold the lines {BEGIN!r} and {END!r} once each; the tables come between.")
    before, _, rest = text.partition(BEGIN)
    target.write_text(f"{before}{BEGIN}\n\n{tables(head, checks)}\n{END}{rest.partition(END)[2]}")
