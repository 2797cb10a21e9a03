"""Converts a checkpoint to GGUF, with llama.cpp's own converter.

    python -m tools.to_gguf . runs/deepseek.gguf --llama-cpp path/to/llama.cpp
    python -m tools.to_gguf . runs/deepseek.gguf --llama-cpp path/to/llama.cpp --outtype q8_0

`path/to/llama.cpp` is a clone of https://github.com/ggml-org/llama.cpp, or `vendor/llama.cpp` in the source package of
llama-cpp-python. What follows the known options goes to its convert_hf_to_gguf.py as it is.

A checkpoint with a published tokenizer needs no more than that script. It refuses other vocabularies: it recognises how
a tokenizer cuts text by the hash of a text encoded with it, from a list. Here that name comes from the tokenizer.json
instead, where it has one of DeepSeek's two chains to the letter. Nothing else of the converter is changed, but for V3.2:
there it asks transformers whether the tokenizer puts bos first, which transformers 5 denies where tokenizer.json does it.
"""

import argparse
import json
import runpy
import sys
from pathlib import Path

from common.command import one_line_errors, run_command
from common.outputs import refuse_existing
from tokenization.chains import build_chain

SCRIPT = "convert_hf_to_gguf.py"
NAMES = {"v3": "deepseek-v3", "llm": "deepseek-llm"}  # llama.cpp's names of the chains


def pre_tokenizer_name(folder: Path) -> str | None:
    """llama.cpp's name of the pre-tokenizer in `folder`, None if it is not one of DeepSeek's."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))["pre_tokenizer"]
    for chain, name in NAMES.items():
        if found == json.loads(build_chain(chain).__getstate__()):
            return name
    return None


def convert(folder: Path, output: Path, llama_cpp: Path, options: list[str]):
    """Runs the converter in this process, once: it changes `sys.path` and what it imports.

    Raises:
        ValueError: `llama_cpp` holds no converter, or an old one that cannot be told what it asks.
    """
    refuse_existing("OUTPUT", [output])
    script = llama_cpp / SCRIPT
    if not script.is_file() or not (llama_cpp / "conversion" / "deepseek.py").is_file():
        raise ValueError(
            f"--llama-cpp is {llama_cpp}, which has no {SCRIPT} with a folder `conversion` beside it; name a clone of "
            "https://github.com/ggml-org/llama.cpp, not older than August 2026."
        )
    sys.path[:0] = [str(llama_cpp / "gguf-py"), str(llama_cpp)]
    from conversion.base import TextModel
    from conversion.deepseek import DeepseekV32Model

    name = pre_tokenizer_name(folder)
    if name is not None:
        TextModel.get_vocab_base_pre = lambda model, tokenizer: name
        DeepseekV32Model.set_vocab = TextModel.set_vocab  # takes bos from tokenizer.json
    sys.argv = [str(script), str(folder), "--outfile", str(output), *options]
    runpy.run_path(str(script), run_name="__main__")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.to_gguf", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="checkpoint with its tokenizer")
    parser.add_argument("output", type=Path, help="GGUF file to write")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="clone of llama.cpp")
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    arguments, options = build_parser().parse_known_args(argv)
    convert(arguments.folder, arguments.output, arguments.llama_cpp, options)
    print(f"next: llama-cli --model {arguments.output}, of the same llama.cpp")
    return 0


if __name__ == "__main__":
    run_command(main)
