"""Where benchmarks write, and where the figures lie that the documents speak of (`benchmarks.publish` puts them there)."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "runs" / "benchmarks"
PUBLISHED = Path(__file__).resolve().parent / "results"
