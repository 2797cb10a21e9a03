"""What a run ends with: a page with curves, expert load and samples before and after (one file, no network), and the
result's model card."""

import base64
import html
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import yaml
from matplotlib import pyplot as plt

from common.card import model_name
from common.command import no_command
from finetune.experts import Routing

_CURVES = (  # title, keys of the trainer's log with their labels
    ("loss", {"loss": "training, mean since the last point", "eval_loss": "held out"}),
    ("accuracy of generated answers", {"eval_accuracy": "task"}),
    ("reward", {"reward": "training", "eval_reward": "held out"}),
    ("preference accuracy", {"rewards/accuracies": "training", "eval_rewards/accuracies": "held out"}),
    ("busiest expert / mean, worst layer", {"expert_load": "training"}),
    ("learning rate", {"learning_rate": "training"}),
)


_CARD_OPTIONS = {  # of each method, what its card tells
    "lora": ("method", "targets", "rank", "alpha"),
    "esft": ("method", "esft_score"),
    "full": ("method",),
}


_ADAPTER_NEEDS = """
The adapter is for the base model in the code of `DeepseekForCausalLM`, which the base's `auto_map` names and
`trust_remote_code=True` lets run. `AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)`
does both steps if `base_model_name_or_path` in adapter_config.json names the base. Without `trust_remote_code`, or with a base
whose `auto_map` names other code, transformers takes a class whose weights have other names and shapes, and loading ends in
size mismatches.
"""


@dataclass
class Report:
    """Everything the page shows; `training.json` holds the same."""

    options: dict
    trained: str  # table of what was trained
    seconds: float = 0.0
    before: dict = field(default_factory=dict)  # metric -> value
    after: dict = field(default_factory=dict)
    log: list[dict] = field(default_factory=list)  # the trainer's log_history
    routing_before: dict[int, Routing] = field(default_factory=dict)
    routing_after: dict[int, Routing] = field(default_factory=dict)
    samples: list[dict] = field(default_factory=list)  # question, reference, before, after


def write_report(report: Report, folder: Path) -> None:
    """Write `training.json`, `curves.png` and `report.html` into `folder`."""
    record = asdict(report)
    for name in ("routing_before", "routing_after"):
        record[name] = {layer: routing.token.tolist() for layer, routing in getattr(report, name).items()}
    _write(folder / "training.json", json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    curves = draw_curves(report.log)
    (folder / "curves.png").write_bytes(curves)
    load = draw_load(report.routing_before, report.routing_after)
    _write(folder / "report.html", _page(report, curves, load))


def draw_curves(log: list[dict]) -> bytes:
    """The curves of a trainer's log as a PNG; kinds without points are left out."""
    shown = [
        (title, {label: points for key, label in keys.items() if (points := _points(log, key))})
        for title, keys in _CURVES
    ]
    shown = [(title, lines) for title, lines in shown if lines]
    columns = min(2, max(1, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    size = (6 * columns, 3 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, (title, lines) in zip(axes.flat, shown, strict=False):
        for label, points in lines.items():
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, label=label, marker="." if len(points) < 30 else None)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend()
    return _png(figure)


def draw_load(before: dict[int, Routing], after: dict[int, Routing]) -> bytes | None:
    """Each layer's share of tokens by expert, before and after, as a PNG; None for models without routed experts."""
    if not before:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.4 * len(before) + 2), sharey=True, layout="constrained")
    highest = max(float(routing.token.max()) for routings in (before, after) for routing in routings.values())
    images = []
    for axis, title, routings in zip(axes, ("before", "after"), (before, after), strict=True):
        shares = [routing.token.tolist() for routing in routings.values()]
        images.append(axis.imshow(shares, aspect="auto", vmin=0, vmax=highest))
        axis.set_title(f"share of a layer's tokens, {title}")
        axis.set_xlabel("expert")
        axis.set_yticks(range(len(routings)), [f"layer {layer}" for layer in routings])
    figure.colorbar(images[0], ax=axes)
    return _png(figure)


def _points(log: list[dict], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], float(entry[key])) for entry in log if key in entry]


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def _page(report: Report, curves: bytes, load: bytes | None) -> str:
    def image(png: bytes) -> str:
        return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}">'

    def table(header: list[str], rows: list[list]) -> str:
        cells = "".join(f"<th>{html.escape(name)}</th>" for name in header)
        lines = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
        )
        return f"<table><tr>{cells}</tr>{lines}</table>"

    samples = [[sample[key] for key in ("question", "reference", "before", "after")] for sample in report.samples]
    style = "body{font:15px sans-serif;max-width:1100px;margin:2em auto}td,th{border:1px solid #ccc;padding:.3em .6em;"
    style += "text-align:left;white-space:pre-wrap}table{border-collapse:collapse}img{max-width:100%}"
    parts = [
        f"<h1>Fine-tuning of {html.escape(_model_name(report))}</h1><p>{report.seconds:.0f} seconds</p>",
        "<h2>Before and after</h2>" + table(["held out", "before", "after"], _metrics(report)),
        "<h2>Curves</h2>" + image(curves),
        f"<h2>What was trained</h2><pre>{html.escape(report.trained)}</pre>",
    ]
    if load is not None:
        parts.append("<h2>Expert load on held-out data</h2>" + image(load))
    if samples:
        parts.append("<h2>Samples</h2>" + table(["question", "reference", "before", "after"], samples))
    parts.append("<h2>Options</h2>" + table(["option", "value"], [[k, _value(v)] for k, v in report.options.items()]))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Fine-tuning report</title><style>{style}</style>'
        + "".join(parts)
        + "</html>\n"
    )


def write_card(report: Report, folder: Path) -> None:
    """Write the README.md of the result in `folder`: what it is, how it did, how to load it.

    Paths of this machine stay out of it; a base model that is a local folder gets its name on publishing (`tools/publish.py`).
    """
    options, name = report.options, _model_name(report)
    method = options["method"]
    front: dict[str, Any] = {
        "library_name": "transformers" if method == "full" else "peft",
        "pipeline_tag": "text-generation",
    }
    front |= {"tags": ["deepseek", "custom_code", *([] if method == "full" else [method])]}
    front |= {"base_model": name} if "/" in name else {}
    what = {"lora": "LoRA adapter for", "esft": "Experts (ESFT) for", "full": "Fine-tuned from"}[method]
    how = ", ".join(f"{key} {_value(options[key])}" for key in _CARD_OPTIONS[method])
    rows = "\n".join(f"| {' | '.join(row)} |" for row in _metrics(report))
    base = name if "/" in name else "path/to/base"
    if method == "full":
        code = ["from transformers import AutoModelForCausalLM", ""]
        code.append('model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)')
    elif method == "lora":
        code = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM", ""]
        code.append(f'model = AutoModelForCausalLM.from_pretrained("{base}", trust_remote_code=True)')
        code.append('model = PeftModel.from_pretrained(model, "path/to/this/folder")')
    else:  # the base in this repository's code, since the result does not fit what else may load by that name
        code = ["from common.loading import load_model  # of the code's repository"]
        code += ["from finetune.models import load_result", "", f'model = load_model("{base}")']
        code.append('model = load_result(model, "path/to/this/folder")  # checks that it fits')
    data = ", ".join(Path(source).name for source in options["data"])
    text = f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {Path(options['output']).resolve().name}\n\n"
    text += f"{what} {name}, trained on {data} ({how}).\n\n"
    text += f"| held out | before | after |\n|---|---|---|\n{rows}\n\n"
    text += "```python\n" + "\n".join(code) + "\n```\n"
    text += _ADAPTER_NEEDS if method == "lora" else ""
    _write(folder / "README.md", text)


def _model_name(report: Report) -> str:
    """The Hub's name, also of a folder in its cache, or else a folder's own name, which has no slash."""
    model = str(report.options.get("model"))
    return model_name(Path(model)) if Path(model).is_dir() else model


def _metrics(report: Report) -> list[list[str]]:
    """Rows name, before, after."""
    return [
        [
            name.replace("_", " "),
            *(f"{side[name]:.4g}" if name in side else "" for side in (report.before, report.after)),
        ]
        for name in dict.fromkeys([*report.before, *report.after])
    ]


def _value(value) -> str:
    """An option's value as one writes it on the command line."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return {None: "none", True: "on", False: "off"}[value] if value is None or isinstance(value, bool) else f"{value}"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    no_command("fine-tune by python -m finetune.sft, .dpo or .grpo")
