"""Compares checkpoints: size, speed, bits per byte by file, and how far each is from the first, on one page.

    python -m compress.compare path/to/original runs/pruned runs/fp8 --texts en.jsonl zh.jsonl --output runs/comparison

Texts are files as for compress.prune; take none that calibration has seen. Bits per byte = sum of -ln p / ln 2 / UTF-8
bytes of what is predicted. KL is that from the first model's distribution of the next token to the other's, in nats a token,
for models with the same tokenizer. The first model and one other are in memory at a time. Writes compare.html and compare.json.

Shapes: S tokens of a row, V vocabulary.
"""

import argparse
import hashlib
import html
import json
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from common.command import Parser, check_early, one_line_errors, run_command
from common.extras import extra


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m compress.compare", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "models", nargs="+", help="checkpoints, folders or names on the Hub; the first is the reference"
    )
    parser.add_argument("--texts", nargs="+", type=Path, required=True, help="held-out text, a file a language")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of all texts (%(default)s)")
    parser.add_argument("--context-tokens", type=int, default=512, help="longest row, in tokens (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(%(default)s)")
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    parser.add_argument(
        "--tasks", nargs="+", type=Path, default=[], help="results of tools.evaluate, one a checkpoint"
    )
    return parser


check_early(__name__, lambda: build_parser().parse_args())

with extra("train"):
    import torch
    from matplotlib import pyplot as plt
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from transformers import DynamicCache, PreTrainedModel

    from common.costs import Part
    from common.economics import model_parts
    from common.hub import local_folder
    from common.loading import load_model, load_tokenizer
    from common.remote_code import read_config, write_json
    from common.rewrite import refuse_existing, resolve_config
    from compress.calibration import Calibration, check_tokenizer, read_calibration
    from compress.report import image, png, table
    from compress.rewrite import Source
    from pretrain.evaluate import bits_per_byte

_DECODED, _CONTEXT = 16, 64  # tokens that are timed, after so many


@dataclass
class Figures:
    """What is known of one checkpoint.

    Attributes:
        disk_bytes: of the weights.
        parameters, active: all, and those that a token uses; without prediction modules.
        ms_a_token: median time of decoding one token, one row.
        bits: bits per byte by file.
        kl, agreement: to the first checkpoint, by file: nats a token, and the share of places with the same first choice;
            None for another tokenizer.
    """

    name: str
    disk_bytes: int
    parameters: float
    active: float
    ms_a_token: float
    bits: dict[str, float]
    kl: dict[str, float] | None
    agreement: dict[str, float] | None


class Checkpoint:
    """A folder, its tokenizer, its sample of the texts and, while it is used, its model.

    Raises:
        ValueError, OSError: it cannot be loaded, or the tokenizer is another model's.
    """

    def __init__(self, name: str, texts: list[Path], tokens: int, context_tokens: int):
        self.name, self.folder = name, local_folder(name)
        self.config = resolve_config(read_config(self.folder))
        self.source = Source(self.folder)
        self.tokenizer = load_tokenizer(self.folder)
        check_tokenizer(self.tokenizer, self.config)
        self.tokenizer.model_max_length = sys.maxsize  # texts are cut after they are encoded
        self.sample: Calibration = read_calibration(texts, self.tokenizer, tokens, context_tokens)
        vocabulary = json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        self.vocabulary = hashlib.sha256(vocabulary.encode()).hexdigest()

    def load(self, dtype: torch.dtype, device: str) -> PreTrainedModel:
        return load_model(self.folder, dtype=dtype).to(device).eval()


@torch.no_grad()
def judge(checkpoint: Checkpoint, model: PreTrainedModel, first: Checkpoint, first_model: PreTrainedModel) -> Figures:
    """Runs a model over its sample, beside the first one where they read the same tokens."""
    sample, same = checkpoint.sample, checkpoint.vocabulary == first.vocabulary
    files = range(len(sample.names))
    nll, num_bytes, places = ([0.0] * len(files) for _ in range(3))
    divergence, agreed = [0.0] * len(files), [0.0] * len(files)
    for row in sample.rows:
        ids, number = sample.ids[row], int(sample.source[row.start])
        inputs = ids[None].to(model.device)
        log_p = model(inputs, use_cache=False).logits[0, :-1].float().log_softmax(dim=-1)  # [S - 1, V]
        nll[number] -= log_p.gather(1, inputs[0, 1:, None]).sum().item()
        # decoded whole, so that a character of several tokens counts once
        num_bytes[number] += len(checkpoint.tokenizer.decode(ids[1:], skip_special_tokens=True).encode())
        places[number] += len(ids) - 1
        if same:
            reference = first_model(inputs, use_cache=False).logits[0, :-1].float().log_softmax(dim=-1)
            width = min(reference.shape[1], log_p.shape[1])
            log_p, reference = log_p[:, :width], reference[:, :width]
            divergence[number] += (reference.exp() * (reference - log_p)).sum().item()
            agreed[number] += (reference.argmax(dim=-1) == log_p.argmax(dim=-1)).sum().item()
    parts = sum(model_parts(checkpoint.config).values(), Part())

    def by_file(values: list[float]) -> dict[str, float]:
        return {sample.names[i]: values[i] / places[i] for i in files}

    return Figures(
        name=checkpoint.name,
        disk_bytes=checkpoint.source.total_bytes(),
        parameters=parts.total,
        active=parts.active,
        ms_a_token=decode_milliseconds(model),
        bits={sample.names[i]: bits_per_byte(nll[i], max(1, num_bytes[i])) for i in files},
        kl=by_file(divergence) if same else None,
        agreement=by_file(agreed) if same else None,
    )


@torch.no_grad()
def decode_milliseconds(model: PreTrainedModel) -> float:
    """Median time of a token, one row after `_CONTEXT` tokens."""
    cache = DynamicCache(config=model.config)
    ids = torch.arange(_CONTEXT, device=model.device)[None] % model.config.vocab_size
    model(ids, past_key_values=cache)
    seconds = []
    for _ in range(_DECODED):
        start = time.perf_counter()
        model(ids[:, :1], past_key_values=cache).logits.cpu()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def compare(
    names: list[str], texts: list[Path], tokens: int, context_tokens: int, dtype, device: str
) -> list[Figures]:
    """Figures of each checkpoint.

    Raises:
        ValueError, OSError: one cannot be loaded, or a text file cannot be read.
    """
    checkpoints = [Checkpoint(name, texts, tokens, context_tokens) for name in names]
    first = checkpoints[0]
    first_model = first.load(dtype, device)
    figures = []
    for checkpoint in checkpoints:
        model = first_model if checkpoint is first else checkpoint.load(dtype, device)
        figures.append(judge(checkpoint, model, first, first_model))
    return figures


def page(figures: list[Figures], scores: dict) -> str:
    """The page as one file.

    Args:
        scores: by name of a checkpoint, figures of tasks that tools.evaluate has written.
    """
    files = list(figures[0].bits)
    header = ["checkpoint", "GB", "parameters without prediction modules, M", "active, M", "ms a token"]
    header += (
        [f"bits per byte, {f}" for f in files] + [f"KL, {f}" for f in files] + [f"same choice, {f}" for f in files]
    )
    rows = []
    for place, x in enumerate(figures, start=1):
        numbers = [
            f"{x.disk_bytes / 1e9:.4g}",
            f"{x.parameters / 1e6:.1f}",
            f"{x.active / 1e6:.1f}",
            f"{x.ms_a_token:.2f}",
        ]
        numbers += [f"{x.bits[f]:.4f}" for f in files]
        for values, form in ((x.kl, ".4f"), (x.agreement, ".1%")):
            numbers += [format(values[f], form) if values else "other tokens" for f in files]
        rows.append([f"{place} {x.name}", *numbers])
    style = "body{font:15px sans-serif;max-width:1200px;margin:2em auto;padding:0 1em}td,th{border:1px solid #ccc;padding:.3em .6em}"
    style += "table{border-collapse:collapse;display:block;overflow-x:auto}img{max-width:100%}"
    parts = ["<h1>Checkpoints compared</h1>", table(header, rows), image(png(draw(figures, files)))]
    if scores:
        parts.append(f"<h2>Tasks</h2><pre>{html.escape(json.dumps(scores, indent=1, ensure_ascii=False))}</pre>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Checkpoints compared</title><style>{style}</style>'
        + "".join(parts)
        + "</html>\n"
    )


def draw(figures: list[Figures], files: list[str]) -> Figure:
    """Bits per byte over size, a panel a text. Checkpoints have numbers there, since names would run into each other."""
    figure, axes = plt.subplots(
        len(files), sharex=True, squeeze=False, figsize=(9, 1 + 3 * len(files)), layout="constrained"
    )
    names = [f"{place} {Path(x.name).resolve().name}" for place, x in enumerate(figures, start=1)]
    figure.legend([Line2D([], []) for _ in names], names, handlelength=0, handletextpad=0, loc="outside right upper")
    points = {file: [(x.disk_bytes / 1e9, x.bits[file]) for x in figures] for file in files}
    for axis, file in zip(axes[:, 0], files, strict=True):
        axis.plot(*zip(*points[file], strict=True), "o")
        axis.plot(*zip(*best_front(points[file]), strict=True), color="C0", linewidth=1)
        axis.set_ylabel(f"bits per byte, {file}")
        axis.margins(0.1, 0.2)
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("weights on disk, GB")
    figure.canvas.draw()  # now it is known where points lie on the page
    for axis, file in zip(axes[:, 0], files, strict=True):
        for point, numbers in _side_by_side(axis.transData.transform(points[file])).items():
            label = ", ".join(str(number + 1) for number in numbers)
            axis.annotate(label, points[file][point], xytext=(4, 4), textcoords="offset points")
    return figure


def _side_by_side(
    places: Iterable[tuple[float, float]], width: float = 50, height: float = 18
) -> dict[int, list[int]]:
    """Points so near each other, in pixels, that they share a label: the number of the first -> those of all."""
    places, groups = list(places), {}
    for number, (x, y) in enumerate(places):
        near = (n for n in groups if abs(places[n][0] - x) < width and abs(places[n][1] - y) < height)
        groups.setdefault(next(near, number), []).append(number)
    return groups


def best_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those points that no other is both smaller and better than, by size."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def run(arguments: argparse.Namespace):
    """
    Raises:
        ValueError, OSError: something cannot be compared; the message says why.
    """
    refuse_existing(arguments.output)
    if arguments.tasks and len(arguments.tasks) != len(arguments.models):
        raise ValueError(
            f"--tasks has {len(arguments.tasks)} files for {len(arguments.models)} checkpoints; give one each."
        )
    scores = {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name, file in zip(arguments.models, arguments.tasks, strict=False)
    }
    figures = compare(
        arguments.models,
        arguments.texts,
        arguments.tokens,
        arguments.context_tokens,
        getattr(torch, arguments.dtype),
        arguments.device,
    )
    arguments.output.mkdir(parents=True)
    write_json(arguments.output / "compare.json", {"checkpoints": [asdict(x) for x in figures], "tasks": scores})
    (arguments.output / "compare.html").write_text(page(figures, scores), encoding="utf-8")
    for x in figures:
        bits = ", ".join(f"{file} {value:.4f}" for file, value in x.bits.items())
        print(f"{x.name}: {x.disk_bytes / 1e9:.4g} GB, {x.ms_a_token:.2f} ms a token, bits per byte {bits}")
    print(f"wrote {arguments.output / 'compare.html'}")
    print(
        f"next: python chat.py --model {arguments.models[-1]}, or python -m tools.publish {arguments.models[-1]} --dry-run"
    )


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    run(arguments)
    return 0


if __name__ == "__main__":
    run_command(main)
