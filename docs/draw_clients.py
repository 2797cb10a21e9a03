"""Writes the table of clients in docs/serving.md from what their tests find.

    python docs/draw_clients.py

Runs tests/test_serve_clients.py, in which the real clients use the server. A cell is **yes** if its test passes, **fails** if
it does not; where a client is not installed the cell says so. An empty cell: the client has nothing of the kind, or no test.
"""

import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "serving.md"
BEGIN, END = "<!-- clients -->\n", "<!-- /clients -->"
PACKAGES = {"transformers chat": "transformers"}


def run_tests(report: Path) -> None:
    """Run the tests, and write what they find as JUnit XML."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "slow", "tests/test_serve_clients.py"]
    subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, check=False)


def found(report: Path) -> dict[tuple[str, str], str]:
    """(client, feature) -> the cell."""
    cells = {}
    for case in ElementTree.parse(report).iter("testcase"):
        if match := re.fullmatch(r"test_a_client\[(.+) \| (.+)\]", case.get("name", "")):
            outcomes = {child.tag for child in case}
            mark = "**fails**" if outcomes & {"failure", "error"} else "not run" if "skipped" in outcomes else "yes"
            cells[match[1], match[2]] = mark
    return cells


def table(cells: dict[tuple[str, str], str]) -> str:
    """The cells in Markdown, a row a client with its version, a column a feature."""
    features = list(dict.fromkeys(feature for _, feature in cells))
    rows = [["", *features], ["---"] * (len(features) + 1)]
    for client in dict.fromkeys(client for client, _ in cells):
        rows.append([named(client), *(cells.get((client, feature), "") for feature in features)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def named(client: str) -> str:
    """The client with its version, where it is a package."""
    try:
        return f"{client} `{version(PACKAGES.get(client, client))}`"
    except PackageNotFoundError:
        return client


def main() -> int:
    """Run the command line."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        run_tests(report)
        cells = found(report)
    if not cells:
        print("error: no test of a client ran", file=sys.stderr)
        return 1
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table(cells)}{END}{rest.split(END)[1]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
