"""Cuts long texts into documents at their empty lines: a .txt is one document, and a document is never held out in
part.

    python -m corpus.split book.txt more.txt --output runs/documents.jsonl

All commands that read text (`tokenization.train_bpe`, `corpus.deduplicate`, `pretrain.data`) take the result. Where a text
has no empty lines, line ends cut it. Nothing is lost but the white space between documents.
"""

import argparse
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from common.command import Parser, one_line_errors, run_command
from common.outputs import refuse_existing
from tokenization.documents import check_paths, read_documents


def split(text: str, least_characters: int) -> Iterator[str]:
    """Documents of at least `characters` characters each (the last one may be shorter), cut between paragraphs."""
    separator = "\n\n" if re.search(r"\n\s*\n", text) else "\n"
    paragraphs = re.split(r"\n\s*\n" if separator == "\n\n" else "\n", text)
    pending: list[str] = []
    length = 0
    for paragraph in paragraphs:
        if paragraph.strip():
            pending.append(paragraph)
            length += len(paragraph)
        if length >= least_characters:
            yield separator.join(pending)
            pending, length = [], 0
    if pending:
        yield separator.join(pending)


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = Parser(prog="python -m corpus.split", description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help=".txt or .jsonl files, optionally .gz")
    parser.add_argument("--output", type=Path, required=True, help=".jsonl file to write; must not exist")
    parser.add_argument("--characters", type=int, default=2000, help="least length of a document (default 2000)")
    parser.add_argument("--text-field", default="text", help="key of the text in .jsonl files (default text)")
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    count = 0
    if args.characters < 1 or args.output.suffix != ".jsonl":
        raise ValueError(f"--output is {args.output}, --characters {args.characters}; give a .jsonl and at least 1")
    check_paths(args.files)
    refuse_existing("--output", [args.output])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    partial = args.output.with_name(f"{args.output.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for path in args.files:
            for text in read_documents(path, args.text_field):
                for document in split(text, args.characters):
                    file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
                    count += 1
    os.replace(partial, args.output)
    print(f"{count:,} documents in {args.output}")
    print(f"next: python -m tokenization.train_bpe {args.output} --vocab-size 4096 --output TOKENIZER")
    return 0


if __name__ == "__main__":
    run_command(main)
