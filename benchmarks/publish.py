"""Puts figures that benchmarks measured here in the place of the committed ones, of which the documents speak.

    python -m benchmarks.publish decode sparse

A benchmark writes to runs/benchmarks and leaves benchmarks/results as it is.
"""

import argparse
import shutil
import sys

from benchmarks.places import PUBLISHED, RESULTS
from common.command import run_command


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.publish", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="+", help="of benchmarks, as their files in runs/benchmarks are called")
    names = parser.parse_args(argv).names
    missing = [name for name in names if not (RESULTS / f"{name}.json").is_file()]
    if missing:
        print(f"error: {RESULTS / missing[0]}.json does not exist; run its benchmark first", file=sys.stderr)
        return 2
    for name in names:
        for file in (RESULTS / f"{name}.json", RESULTS / f"{name}.png"):
            if file.is_file():
                shutil.copyfile(file, PUBLISHED / file.name)
                print(f"{PUBLISHED / file.name} is now what was measured here")
    return 0


if __name__ == "__main__":
    run_command(main)
