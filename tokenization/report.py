"""Compares tokenizers on text: characters a token and bytes a token, by language and by source.

    python -m tokenization.report --tokenizers ours=. path/to/deepseek-v3 --files en corpus/en_*.jsonl.gz \\
        --files zh corpus/zh_*.jsonl.gz --held-out-fraction 0.01 --output runs/tokenizer-report

Written to the output folder: `report.md` (a table), `report.json`, `report.png`. Bos is not counted, and a name of a
control token in the text counts as one token, as the tokenizer reads it. With `--held-out-fraction` only documents are
read that `tokenization.train_bpe` and `pretrain.data` hold out at the same value, so a tokenizer is not measured on
its own text.
"""

import argparse
import json
from pathlib import Path

from common.command import Parser, one_line_errors, run_command
from common.extras import extra
from common.outputs import refuse_existing

with extra("train"):
    from tokenizers import Tokenizer
    from tqdm import tqdm

    from tokenization.documents import check_fraction, check_paths, is_held_out, read_documents


def load_tokenizers(arguments: list[str]) -> dict[str, Tokenizer]:
    """Load tokenizer.json files by name.

    Args:
        arguments: `PATH` or `NAME=PATH`, where the path is the file or its folder, and the folder's name the default name.

    Raises:
        ValueError: two names are the same, or a file cannot be read.
        FileNotFoundError: there is no such file.
    """
    tokenizers = {}
    for argument in arguments:
        name, _, path = argument.rpartition("=")
        file = Path(path, "tokenizer.json") if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; pass folders that hold a tokenizer.json, or such files")
        name = name or file.absolute().parent.name
        if name in tokenizers:
            raise ValueError(f"two tokenizers are named {name!r}; give one another name by NAME=PATH")
        try:
            tokenizers[name] = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{file} is no tokenizer.json ({error})") from error
    return tokenizers


def measure(
    tokenizers: dict[str, Tokenizer],
    files: dict[str, list[Path]],
    held_out_fraction: float = 0.0,
    max_bytes: int | None = None,
    text_field: str = "text",
) -> dict:
    """Count documents, characters, bytes and tokens of every source.

    Args:
        tokenizers: by name.
        files: sources by language; the name of a source is its file's, without suffixes.
        held_out_fraction: read held-out documents only; 0 reads all.
        max_bytes: stop reading a source after the document that passes this many UTF-8 bytes; None reads all.
        text_field: key of the text in .jsonl files.

    Returns:
        `{"tokenizers": {name: vocabulary size}, "sources": {language: {source: counts}}, "languages": {language: counts}}`
        where counts hold `documents`, `characters`, `bytes` and `tokens` by tokenizer.

    Raises:
        ValueError: a language has no text to measure on, or two of its files have one name.
    """
    sources: dict[str, dict[str, dict]] = {}
    for language, paths in files.items():
        sources[language] = {}
        for path in tqdm(paths, desc=f"counting {language}", unit="file"):
            name = path.name.split(".")[0]
            if name in sources[language]:
                raise ValueError(f"two files of language {language!r} are named {name!r}; rename one")
            counts = {"documents": 0, "characters": 0, "bytes": 0, "tokens": dict.fromkeys(tokenizers, 0)}
            for text in read_documents(path, text_field):
                if held_out_fraction and not is_held_out(text, held_out_fraction):
                    continue
                counts["documents"] += 1
                counts["characters"] += len(text)
                counts["bytes"] += len(text.encode("utf-8"))
                for tokenizer_name, tokenizer in tokenizers.items():
                    counts["tokens"][tokenizer_name] += len(tokenizer.encode(text, add_special_tokens=False).ids)
                if max_bytes is not None and counts["bytes"] >= max_bytes:
                    break
            if counts["bytes"]:  # a small source may have nothing held out
                sources[language][name] = counts
        if not sources[language]:
            raise ValueError(
                f"language {language!r} has no text to measure on; raise --held-out-fraction or add files"
            )
    return {
        "tokenizers": {name: tokenizer.get_vocab_size() for name, tokenizer in tokenizers.items()},
        "held_out_fraction": held_out_fraction,
        "sources": sources,
        "languages": {language: total(list(counts.values())) for language, counts in sources.items()},
    }


def total(counts: list[dict]) -> dict:
    """The sum of several counts."""
    return {
        **{key: sum(count[key] for count in counts) for key in ("documents", "characters", "bytes")},
        "tokens": {name: sum(count["tokens"][name] for count in counts) for name in counts[0]["tokens"]},
    }


def table(report: dict) -> str:
    """Markdown: a row for each language and source, for each tokenizer characters a token and bytes a token."""
    names = list(report["tokenizers"])
    lines = [
        "| text | bytes | " + " | ".join(f"{name} ({report['tokenizers'][name]:,})" for name in names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for language, sources in report["sources"].items():
        rows = [(f"**{language}**", report["languages"][language]), *sources.items()]
        for label, counts in rows:
            cells = [
                f"{counts['characters'] / tokens:.2f} / {counts['bytes'] / tokens:.2f}"
                for tokens in (counts["tokens"][name] for name in names)
            ]
            lines.append(f"| {label} | {counts['bytes']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(report: dict, path: Path) -> None:
    """Bars of characters a token, a panel for each language, a group of bars for each source."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    languages, names = report["sources"], list(report["tokenizers"])
    widths = [len(sources) + 1 for sources in languages.values()]
    figure, axes = plt.subplots(
        1,
        len(languages),
        figsize=(2 + 0.9 * sum(widths), 4.2),
        width_ratios=widths,
        squeeze=False,
        layout="constrained",
    )
    for axis, (language, sources) in zip(axes[0], languages.items(), strict=True):
        groups = {f"all {language}": report["languages"][language], **sources}
        for i, name in enumerate(names):
            heights = [counts["characters"] / counts["tokens"][name] for counts in groups.values()]
            places = [group + (i - (len(names) - 1) / 2) * 0.8 / len(names) for group in range(len(groups))]
            axis.bar(places, heights, width=0.8 / len(names), label=f"{name} ({report['tokenizers'][name]:,})")
        axis.set_xticks(range(len(groups)), groups, rotation=35, ha="right")
        axis.set_ylabel("characters a token")
        axis.grid(axis="y", alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = Parser(prog="python -m tokenization.report", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--tokenizers", nargs="+", required=True, metavar="[NAME=]PATH", help="folders with tokenizer.json, or files"
    )
    parser.add_argument(
        "--files",
        nargs="+",
        action="append",
        required=True,
        metavar=("LANGUAGE", "FILE"),
        help="a language name and its .jsonl/.txt (.gz) files; repeat for each language",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for report.md, report.json, report.png")
    parser.add_argument(
        "--held-out-fraction", type=float, default=0.0, help="read held-out documents only, in [0, 1) (default 0: all)"
    )
    parser.add_argument("--max-bytes", type=int, help="stop reading a file after this many UTF-8 bytes (default: all)")
    parser.add_argument("--text-field", default="text", help="key of the text in .jsonl files (default text)")
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    check_fraction(args.held_out_fraction)
    refuse_existing("--output", (args.output / f"report.{suffix}" for suffix in ("md", "json", "png")))
    files = {group[0]: [Path(name) for name in group[1:]] for group in args.files}
    if len(files) < len(args.files) or not all(files.values()):
        raise ValueError("--files wants a language name and at least one file, each language once")
    check_paths([path for paths in files.values() for path in paths])
    tokenizers = load_tokenizers(args.tokenizers)
    report = measure(tokenizers, files, args.held_out_fraction, args.max_bytes, args.text_field)
    args.output.mkdir(parents=True, exist_ok=True)
    text = table(report)
    (args.output / "report.md").write_text(text, encoding="utf-8")
    (args.output / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draw(report, args.output / "report.png")
    print(text)
    print(f"figure: {args.output / 'report.png'}")
    print("next: python -m pretrain.data --tokenizer FOLDER --files LANGUAGE FILE ... --output DATA")
    return 0


if __name__ == "__main__":
    run_command(main)
