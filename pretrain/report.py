"""Writes one page about a training run, `report.html`, with its figures inside: it can be sent as it is.

    python -m pretrain.report runs/base

`pretrain.train` does the same at its end; called on a run that is still going, the page shows it up to now.
"""

import argparse
import base64
import json
from html import escape
from pathlib import Path

from common.command import Parser, one_line_errors, run_command
from pretrain.plot import draw_all, read_log

CAPTIONS = {
    "loss": "Training loss",
    "bits_per_byte": "Held-out text, by language",
    "index_loss": "Indexer: loss",
    "index_recall": "Indexer: share of the true top-k that it selects, by layer",
    "expert_load": "Expert load: the fullest expert over the mean, by layer",
    "router_bias": "Router bias: least to greatest expert, by layer",
    "learning_rate": "Learning rate",
    "throughput": "Speed: training tokens a second, without evaluations and checkpoints",
    "mfu": "Model FLOPs utilisation (MFU): the model's arithmetic as a share of what the devices could do at their peak",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; } th, td { text-align: left; padding: 2px 14px 2px 0; vertical-align: top; }
td { font-variant-numeric: tabular-nums; } .figures { display: flex; flex-wrap: wrap; gap: 1em; }
figure { margin: 0; flex: 1 1 480px; } img { width: 100%; } summary { cursor: pointer; font-weight: 600; margin-top: 1em; }
"""


def write_report(run: Path, figures_dir: Path | None = None) -> Path:
    """Draw the figures of a run and write `report.html` into its folder.

    Args:
        run: folder with `log.jsonl` and `run.json`.
        figures_dir: folder for the PNG files; by default `figures` in the run's folder.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    for name in ("log.jsonl", "run.json"):
        if not (run / name).is_file():
            raise FileNotFoundError(f"{run / name} does not exist; name the --run-dir of a run of pretrain.train")
    records = read_log(run / "log.jsonl")
    description = json.loads((run / "run.json").read_text(encoding="utf-8"))
    figures = draw_all(records, figures_dir or run / "figures")
    page = "".join(
        (
            f"<!doctype html><meta charset='utf-8'><title>{escape(run.name)}</title><style>{STYLE}</style>",
            f"<h1>Training run {escape(run.name)}</h1>",
            _table(results(records, description)),
            "<div class='figures'>",
            *(_figure(path) for path in figures),
            "</div>",
            _samples(records),
            _details("Options", description["options"]),
            _details("Model config", description["config"]),
        )
    )
    partial = run / "report.html.partial"
    partial.write_text(page, encoding="utf-8")
    return partial.rename(run / "report.html")


def results(records: list[dict], description: dict) -> dict[str, str]:
    """The figures that a reader looks for first: sizes of the model, and where the run stands."""
    facts = {
        "parameters": f"{description['parameters']:,}, of which a token meets {description['active_parameters']:,}",
        "arithmetic": f"{description['training_flops_per_token'] / 1e6:,.3f} million FLOPs a token of training",
        "devices": f"{description['processes']} x {description['device']}, precision {description['precision']}, peak "
        f"{description['peak_flops_per_device'] / 1e12:.3g} TFLOPS each",
        "versions": ", ".join(f"{name} {version}" for name, version in description["versions"].items()),
    }
    steps = [record for record in records if "loss" in record]
    if steps:
        last = steps[-1]
        facts["trained"] = f"{last['step']:,} steps, {last['tokens']:,} tokens"
        facts["last training loss"] = f"{last['loss']:.4f} (next token {last['lm_loss']:.4f} nats)"
        speeds = sorted(record["tokens_per_second"] for record in steps)
        facts["speed (median)"] = f"{speeds[len(speeds) // 2]:,} tokens a second on all devices together"
        used = sorted(record["mfu"] for record in steps)[len(steps) // 2]
        facts["MFU (median)"] = f"{100 * used:.1f} % of the devices' peak is the model's arithmetic"
        for layer, load in last["expert_load"].items():
            facts[f"expert load, layer {layer}"] = f"the fullest expert has {load:.2f} times the mean"
    evaluated = [record for record in records if "bits_per_byte" in record]
    for language, bits in evaluated[-1]["bits_per_byte"].items() if evaluated else ():
        facts[f"held-out text, {language}"] = f"{bits:.4f} bits per byte"
    return facts


def _samples(records: list[dict]) -> str:
    """What the model went on with at the evaluations, the last one open."""
    parts = []
    for record in reversed([record for record in records if record.get("samples")]):
        rows = {
            language: f"{sample['begins']} \u2192 {sample['goes_on']}"
            for language, sample in record["samples"].items()
        }
        if not parts:
            parts.append(
                f"<h2>Samples after {record['step']:,} steps: held-out text \u2192 the model</h2>{_table(rows)}"
            )
        else:
            parts.append(_details(f"Samples after {record['step']:,} steps", rows))
    return "".join(parts)


def _table(rows: dict) -> str:
    return (
        "<table>"
        + "".join(f"<tr><th>{escape(str(name))}<td>{escape(str(value))}" for name, value in rows.items())
        + "</table>"
    )


def _details(title: str, rows: dict) -> str:
    return f"<details><summary>{title}</summary>{_table(rows)}</details>"


def _figure(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    caption = CAPTIONS[path.stem]
    return (
        f"<figure><img alt='{caption}' src='data:image/png;base64,{data}'><figcaption>{caption}</figcaption></figure>"
    )


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = Parser(prog="python -m pretrain.report", description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="--run-dir of pretrain.train")
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    print(write_report(args.run))
    print("next: python -m pretrain.evaluate MODEL --data DATA, with the model that --export-dir wrote")
    return 0


if __name__ == "__main__":
    run_command(main)
