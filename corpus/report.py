"""The report of a deduplication as a page and a plot."""

import difflib
import re
from html import escape
from pathlib import Path

import numpy as np

from common.command import no_command
from corpus.signatures import candidate_probability

NUM_PAIRS = 8
EXCERPT = 600  # characters of each text of a pair
_COLOURS = {
    "kept": "#4c78a8",
    "exact": "#e45756",
    "near": "#f58518",
    "quality": "#b8b8b8",
    "contaminated": "#72519c",
    "paragraphs": "#eeca3b",
}
_STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .25em .7em; border-bottom: 1px solid #ddd }
th { text-align: left } td.n { text-align: right; font-variant-numeric: tabular-nums } img { max-width: 100% }
.pair { table-layout: fixed; width: 100% } .pair td { vertical-align: top; white-space: pre-wrap; word-wrap: break-word }
mark { background: #ffdf80 }
"""


def plot(figures: dict, similarities: np.ndarray, target: Path) -> None:
    """Draw what became of each source's bytes, and the similarity of near duplicates beside the bands' chance to find
    them.

    Args:
        figures: as in figures.json.
        similarities: Jaccard similarity of each near duplicate to its keeper, [near duplicates].
        target: image file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sources = figures["sources"]
    names = [name if len(name) <= 44 else name[:43] + "…" for name in sources]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(13, 2 + 0.28 * max(len(names), 8)), width_ratios=[3, 2], layout="constrained"
    )
    start = np.zeros(len(names))
    for stage, colour in _COLOURS.items():
        if stage == "kept":
            width = np.array([entry["bytes_out"] for entry in sources.values()]) / 1e6
        else:
            width = np.array([entry["removed_bytes"][stage] for entry in sources.values()]) / 1e6
        left.barh(range(len(names)), width, left=start, color=colour, label=stage)
        start += width
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("MB of text")
    left.set_title("what became of each source")
    left.legend(fontsize=8)

    options = figures["options"]
    x = np.linspace(0, 1, 201)
    right.plot(
        x,
        candidate_probability(x, options["bands"], options["rows"]),
        color="black",
        label=f"chance to be found, {options['bands']} bands of {options['rows']}",
    )
    right.axvline(options["threshold"], color="grey", linestyle=":", label=f"threshold {options['threshold']}")
    right.set_xlabel("Jaccard similarity")
    right.set_ylabel("probability")
    right.set_ylim(0, 1.05)
    counts = right.twinx()
    counts.hist(similarities, bins=np.linspace(0, 1, 51), color=_COLOURS["near"], alpha=0.7)
    counts.set_ylim(bottom=0, top=None if len(similarities) else 1)
    counts.yaxis.get_major_locator().set_params(integer=True)
    counts.set_ylabel("near duplicates removed")
    right.legend(loc="upper left", fontsize=8)
    right.set_title(f"{len(similarities)} near duplicates, similarity to their keeper")
    figure.savefig(target, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def write_html(figures: dict, pairs: list[dict], target: Path) -> None:
    """Write the page.

    Args:
        figures: as in figures.json.
        pairs: `{"jaccard": float, "kept": (id, text), "removed": (id, text)}`.
        target: file to write; `report.png` is expected beside it.
    """
    total, options, tests = figures["total"], figures["options"], figures["test_sets"]
    stages = list(total["removed"]) if total else []
    parts = [
        f"<!doctype html><meta charset='utf-8'><title>Deduplication</title><style>{_STYLE}</style>",
        "<h1>Deduplication</h1>",
        f"<p>{_count(total, 'documents')} documents, {_count(total, 'bytes')} bytes. "
        f"{figures['clusters']['count']:,} clusters of copies, the largest of {figures['clusters']['largest']:,} "
        f"documents. {figures['candidates']['compared']:,} pairs were compared in full, of which "
        f"{figures['candidates']['below_threshold']:,} were below the threshold.</p>",
        "<img src='report.png' alt='bytes by source and similarity of near duplicates'>",
        "<h2>By source</h2>",
        _table(
            ["source", "documents in", "out", "bytes in", "out", *stages, "paragraphs removed"],
            [
                [
                    name,
                    *(entry[key] for key in ("documents_in", "documents_out", "bytes_in", "bytes_out")),
                    *entry["removed"].values(),
                    entry["paragraphs_removed"],
                ]
                for name, entry in [*figures["sources"].items(), *([("all", total)] if total else [])]
            ],
        ),
        "<h2>Within and across sources</h2>",
        _table(
            ["copies in", "of documents in", "documents"],
            [[entry["removed"], entry["kept"], entry["documents"]] for entry in figures["between_sources"]],
        ),
        "<h2>Sizes of clusters</h2>",
        _table(["documents", "clusters"], [[int(size), n] for size, n in figures["clusters"]["sizes"].items()]),
        "<h2>Quality rules</h2>",
        _table(["rule", "documents"], [[rule, n] for rule, n in figures["rules"].items()]),
        "<h2>Test sets</h2>",
        f"<p>{escape(', '.join(tests['files'])) or 'none'}: {tests['strings']:,} strings, of which {tests['too_short']:,} "
        f"have fewer than {options['test_ngram']} tokens and protect nothing.</p>",
        "<h2>Damaged lines</h2>",
        _table(
            ["file", "line", "problem"],
            [[entry["file"], entry["line"], entry["problem"]] for entry in figures["problems"]],
        ),
        "<h2>Sample pairs</h2><p>The least and the most similar; each excerpt starts shortly before the first "
        "difference.</p>",
    ]
    for pair in pairs:
        (kept, one), (removed, other) = pair["kept"], pair["removed"]
        differences = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        start = max(0, next(differences, min(len(one), len(other))) - 100)
        left, right = _marked(one[start : start + EXCERPT], other[start : start + EXCERPT])
        parts.append(
            f"<table class='pair'><tr><th>kept: {escape(kept)}</th><th>removed: {escape(removed)}, "
            f"Jaccard {pair['jaccard']:.3f}</th></tr><tr><td>{left}</td><td>{right}</td></tr></table>"
        )
    parts.append("<h2>Options</h2>")
    parts.append(_table(["option", "value"], [[name, str(value)] for name, value in options.items()]))
    target.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _count(total: dict, unit: str) -> str:
    return f"{total.get(f'{unit}_in', 0):,} → {total.get(f'{unit}_out', 0):,}"


def _table(head: list[str], rows: list[list]) -> str:
    if not rows:
        return "<p>none</p>"
    cells = [
        "".join(
            f"<td class='n'>{value:,}</td>" if isinstance(value, int) else f"<td>{escape(value)}</td>" for value in row
        )
        for row in rows
    ]
    header = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<table><tr>{header}</tr>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _marked(one: str, other: str) -> tuple[str, str]:
    """Both texts as HTML with what differs marked."""
    pieces = [re.findall(r"[a-zA-Z0-9]+|.", text, flags=re.DOTALL) for text in (one, other)]
    sides: tuple[list[str], list[str]] = ([], [])
    for kind, *bounds in difflib.SequenceMatcher(None, *pieces, autojunk=False).get_opcodes():
        for side, source, start, end in zip(sides, pieces, bounds[::2], bounds[1::2], strict=True):
            html = escape("".join(source[start:end]))
            side.append(html if kind == "equal" or not html else f"<mark>{html}</mark>")
    return "".join(sides[0]), "".join(sides[1])


if __name__ == "__main__":
    no_command("clean a corpus by python -m corpus.deduplicate")
