"""The page that shows what pruning did: scores by layer, what went, what it was used for.

python -m compress.report runs/pruned      # draws runs/pruned/pruning.html again, from its pruning.json
"""

import argparse
import base64
import html
import io
import json
from pathlib import Path

from common.command import Parser, check_early, one_line_errors, run_command
from common.extras import extra


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m compress.report", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="what compress.prune has written")
    return parser


check_early(__name__, lambda: build_parser().parse_args())

with extra("train"):
    import matplotlib

    matplotlib.use("Agg")  # no display needed

    import torch
    from matplotlib import pyplot as plt

    from compress.scores import FIELDS, score

_TOKENS, _WEIGHT = FIELDS.index("tokens"), FIELDS.index("weight")
_SHOWN = 12  # experts a layer in the table of what went


def write_report(record: dict, folder: Path):
    """Writes pruning.html, one file without scripts or network, from the contents of pruning.json."""
    (folder / "pruning.html").write_text(page(record), encoding="utf-8")


def page(record: dict) -> str:
    layers = {int(index): layer for index, layer in record["layers"].items()}
    sums = {index: torch.tensor(layer["sums"], dtype=torch.float64) for index, layer in layers.items()}
    files = record["files"]
    kept = {index: layer["kept"] for index, layer in layers.items()}
    total = next(iter(sums.values())).shape[1]
    groups = {"all": list(range(len(files)))}
    groups |= {f["language"]: [i for i, g in enumerate(files) if g["language"] == f["language"]] for f in files}
    groups |= {f["name"]: [i] for i, f in enumerate(files)} if len(files) > 1 else {}
    parts = [
        f"<h1>{len(next(iter(kept.values())))} of {total} experts stay</h1>",
        f"<p>Score: {html.escape(record['score'])}. Loss of the original on the calibration text: {record['loss']:.3f} nats a "
        f"token (counting tokens: {record['unigram_loss']:.3f}).</p>",
        "<h2>Calibration text</h2>" + table(["file", "language", "tokens"], [list(f.values()) for f in files]),
        "<h2>Scores</h2><p>Each layer's experts by score, the largest being 1; a cross has gone.</p>",
        image(_draw_scores(record["score"], sums, kept)),
        "<h2>Routing weight that is lost</h2><p>The part of the routing weights that went to experts that are gone, by text. "
        "The router gives it to others now.</p>",
        table(
            ["layer", *groups], [[i, *(f"{_lost(sums[i], kept[i], g):.1%}" for g in groups.values())] for i in sums]
        ),
        image(_draw_lost(sums, kept, groups)),
        "<h2>What the experts that went were used for</h2><p>Of each expert's tokens, the part by file, as if all files were "
        f"of one length. At most {_SHOWN} a layer, the busiest first.</p>",
        table(
            ["layer", "expert", "share of the layer's tokens", *(f["name"] for f in files)], _uses(sums, kept, total)
        ),
    ]
    style = "body{font:15px sans-serif;max-width:1100px;margin:2em auto}td,th{border:1px solid #ccc;padding:.3em .6em;"
    style += "text-align:left}table{border-collapse:collapse;display:block;overflow-x:auto}img{max-width:100%}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Pruned experts</title><style>{style}</style>'
        + "".join(parts)
        + "</html>\n"
    )


def _lost(sums: torch.Tensor, kept: list[int], files: list[int]) -> float:
    weight = sums[files].sum(dim=0)[:, _WEIGHT]
    return float(1 - weight[kept].sum() / weight.sum().clamp(min=1e-30))


def _uses(sums: dict[int, torch.Tensor], kept: dict[int, list[int]], total: int) -> list[list]:
    rows = []
    for index, value in sums.items():
        tokens = value[..., _TOKENS]  # [S, E]
        rates = tokens / tokens.sum(dim=1, keepdim=True).clamp(min=1)  # as if files were of one length
        shares = rates / rates.sum(dim=0, keepdim=True).clamp(min=1e-30)
        gone = sorted(set(range(total)) - set(kept[index]), key=lambda e: -float(rates[:, e].sum()))
        of_all = tokens.sum(dim=0) / tokens.sum().clamp(min=1)
        rows += [[index, e, f"{of_all[e]:.1%}", *(f"{x:.0%}" for x in shares[:, e])] for e in gone[:_SHOWN]]
    return rows


def _draw_scores(name: str, sums: dict[int, torch.Tensor], kept: dict[int, list[int]]) -> bytes:
    scores = torch.stack([score(value, name) for value in sums.values()])  # [layers, E]
    scores = scores / scores.amax(dim=1, keepdim=True).clamp(min=1e-30)
    figure, axis = plt.subplots(figsize=(11, 0.35 * len(scores) + 1.6), layout="constrained")
    shown = axis.imshow(scores.tolist(), aspect="auto", vmin=0, vmax=1)
    for row, index in enumerate(sums):
        gone = sorted(set(range(scores.shape[1])) - set(kept[index]))
        axis.plot(gone, [row] * len(gone), "x", color="red", markersize=4)
    axis.set_yticks(range(len(sums)), [f"layer {index}" for index in sums])
    axis.set_xlabel("expert")
    figure.colorbar(shown, ax=axis)
    return png(figure)


def _draw_lost(sums: dict[int, torch.Tensor], kept: dict[int, list[int]], groups: dict[str, list[int]]) -> bytes:
    figure, axis = plt.subplots(figsize=(9, 3.5), layout="constrained")
    for name, files in groups.items():
        lost = [100 * _lost(sums[index], kept[index], files) for index in sums]
        axis.plot(list(sums), lost, marker=".", label=name, linewidth=2.5 if name == "all" else 1)
    axis.set_xlabel("layer")
    axis.set_ylabel("routing weight lost, %")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", ncols=2)
    return png(figure)


def table(header: list[str], rows: list[list]) -> str:
    """HTML of a table."""
    cells = "".join(f"<th>{html.escape(str(name))}</th>" for name in header)
    lines = ("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{''.join(lines)}</table>"


def image(data: bytes) -> str:
    """A PNG as HTML."""
    return f'<img src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def png(figure) -> bytes:
    """The figure as a PNG; closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    folder = build_parser().parse_args(argv).folder
    file = folder / "pruning.json"
    if not file.is_file():
        raise ValueError(f"{file} does not exist; name a folder that compress.prune has written")
    write_report(json.loads(file.read_text(encoding="utf-8")), folder)
    print(f"wrote {folder / 'pruning.html'}")
    print(f"next: python -m compress.compare ORIGINAL {folder} --texts FILE ... --output COMPARISON")
    return 0


if __name__ == "__main__":
    run_command(main)
