"""Runs a long text once and keeps what the model made of it, for chats that begin with that text.

    python -m tools.prefix --model . --text manual.txt --output manual.safetensors
    python chat.py --model . --prefix manual.safetensors

The text becomes the system message of the chats. The file holds the text and the KV cache of its tokens, as they lie in
memory; it belongs to this model, its dtype and this repository's chat template. Names of control tokens in the text are
text. See docs/generation.md for the same in Python.
"""

import argparse
import sys
from pathlib import Path

from common.command import Parser, check_early, one_line_errors, run_command
from common.extras import extra
from common.names import check_model_name
from common.outputs import refuse_existing


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = Parser(prog="python -m tools.prefix", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder or Hub name of the model")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text that the chats begin with")
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write; must not exist")
    parser.add_argument("--chunk-size", type=int, default=1024, help="tokens read at a time (default 1024)")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let code that comes with the checkpoint run; this repository's own needs no such permission",
    )
    parser.add_argument("--dtype", default="auto", help="of the weights, as float32 (default: the checkpoint's)")
    parser.add_argument("--device", help="for instance cpu, cuda or auto (default: cpu)")
    return parser


def check(args: argparse.Namespace) -> str:
    """Refuse a command line that would fail later -> the text.

    Raises:
        ValueError, OSError: what is wrong, and the remedy.
    """
    check_model_name(args.model)
    if args.chunk_size < 1:
        raise ValueError(f"--chunk-size is {args.chunk_size}; it must be at least 1")
    refuse_existing("--output", [args.output])
    if not args.output.absolute().parent.is_dir():
        raise FileNotFoundError(f"--output {args.output}: there is no folder {args.output.parent}")
    try:
        text = args.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text {args.text} is no UTF-8 text ({error})") from error
    if not text.strip():
        raise ValueError(f"--text {args.text} is empty; name a file with the text that chats begin with")
    return text


check_early(__name__, lambda: check(build_parser().parse_args()))

with extra("serve"):
    from transformers.utils import logging

    from common.loading import load
    from serving.conversation import Chat


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    text = check(args)
    print(f"loading {args.model} ...", file=sys.stderr)
    model, tokenizer = load(args.model, None, args.trust_remote_code, args.dtype, args.device)
    tokens = Chat(model, tokenizer, system=text).save_prefix(args.output, args.chunk_size)
    print(f"{args.output}: {tokens:,} tokens, {args.output.stat().st_size:,} bytes")
    print(f"next: python chat.py --model {args.model} --prefix {args.output}")
    return 0


if __name__ == "__main__":
    run_command(main)
