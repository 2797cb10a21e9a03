"""Trains a byte-level BPE tokenizer with DeepSeek's pre-tokenizer chain and writes files that AutoTokenizer loads.

    python -m tokenization.train_bpe corpus/en.jsonl.gz corpus/zh.jsonl.gz --vocab-size 8192 --output runs/tokenizer

Written: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`. The vocabulary is laid out like DeepSeek-V3's:
bos 0, eos 1, pad 2, the 256 bytes, the merges, and at the very end V3's added tokens. All 256 bytes are in the alphabet,
so any text, of any script, encodes and decodes without loss. The result depends only on the input texts and the options.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.command import Parser, one_line_errors, run_command
from common.extras import extra
from common.outputs import refuse_existing

with extra("train"):
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import BpeTrainer
    from tqdm import tqdm

    from tokenization.chains import CHAINS, build_chain
    from tokenization.documents import check_fraction, check_paths, is_held_out, read_documents

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"

# V3's tokens above its base vocabulary, in V3's order. Only <|EOT|> is "special" there: the others survive
# `decode(skip_special_tokens=True)`, which is how callers find the answer and the tool calls in generated text.
ADDED_TOKENS = (
    "<think>",
    "</think>",
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<|EOT|>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)
SPECIAL_ADDED_TOKENS = frozenset({"<|EOT|>"})

# bos, eos, pad and 256 bytes come before the first merge; the added tokens after the last.
MIN_VOCAB_SIZE = 3 + 256 + len(ADDED_TOKENS)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

# The same file that stands beside the checkpoint in the root.
CHAT_TEMPLATE = (Path(__file__).resolve().parents[1] / "chat_template.jinja").read_text(encoding="utf-8")


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    chain: str = "v3",
    max_token_length: int = 16,
    show_progress: bool = True,
) -> Tokenizer:
    """Train a tokenizer on an iterable of texts.

    Args:
        documents: the texts; consumed once.
        vocab_size: size of the whole vocabulary, specials and added tokens included; at least `MIN_VOCAB_SIZE`.
        chain: pre-tokenizer chain, "v3" or "llm".
        max_token_length: longest learned token in bytes (a Chinese character takes three). V3's chain keeps a Chinese
            run in one piece, so without a limit a small corpus turns whole phrases into tokens.
        show_progress: show the trainer's progress bars on stderr.

    Returns:
        A tokenizer whose `encode` puts one bos in front and whose ids are 0..vocab_size-1.

    Raises:
        ValueError: an option is out of range, or the texts hold too few distinct pairs to fill the vocabulary.
    """
    _check_options(vocab_size, max_token_length)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = build_chain(chain)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(ADDED_TOKENS),
        max_token_length=max_token_length,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False, special=text in SPECIAL_ADDED_TOKENS) for text in ADDED_TOKENS]
    )
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the texts only fill {tokenizer.get_vocab_size()} of --vocab-size {vocab_size} entries; "
            "give more text, a smaller --vocab-size or a larger --max-token-length"
        )
    # BOS sits in the post-processor because transformers 5 ignores `add_bos_token` for a byte-level tokenizer.json.
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def _check_options(vocab_size: int, max_token_length: int) -> None:
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"--vocab-size is {vocab_size}; it must be at least {MIN_VOCAB_SIZE} to hold 256 bytes and the special tokens"
        )
    if max_token_length < 1:
        raise ValueError(f"--max-token-length is {max_token_length}; it must be at least 1 byte")


def save_tokenizer(tokenizer: Tokenizer, output: Path, model_max_length: int) -> None:
    """Write the three files AutoTokenizer needs into `output`, which is created if missing."""
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output / "tokenizer.json"))
    tokenizer_config = {
        # Not LlamaTokenizerFast, which transformers 5 would replace with a warning for a byte-level file.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(tokenizer_config, ensure_ascii=False, indent=2) + "\n"
    (output / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (output / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def training_documents(paths: list[Path], text_field: str, held_out_fraction: float) -> Iterator[str]:
    """Yield every document of every file that is not held out, with one progress bar over the files."""
    for path in tqdm(paths, desc="reading", unit="file"):
        for text in read_documents(path, text_field):
            if not is_held_out(text, held_out_fraction):
                yield text


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = Parser(prog="python -m tokenization.train_bpe", description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help=".jsonl or .txt files, optionally .gz")
    parser.add_argument("--output", type=Path, required=True, help="folder for the tokenizer files; must hold none")
    parser.add_argument(
        "--vocab-size", type=int, default=8192, help="tokens in all, added ones included (default 8192)"
    )
    parser.add_argument("--max-token-length", type=int, default=16, help="longest token, in bytes (default 16)")
    parser.add_argument("--chain", choices=CHAINS, default="v3", help="pre-tokenizer chain (default v3)")
    parser.add_argument(
        "--text-field", default="text", help="key of the text in .jsonl files, column in .parquet (default text)"
    )
    parser.add_argument("--model-max-length", type=int, default=4096, help="context length, in tokens (default 4096)")
    parser.add_argument(
        "--held-out-fraction",
        type=float,
        default=0.0,
        help="skip the documents that pretrain.data holds out with the same value, in [0, 1) (default 0)",
    )
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    _check_options(args.vocab_size, args.max_token_length)
    refuse_existing("--output", (args.output / name for name in TOKENIZER_FILES))
    check_fraction(args.held_out_fraction)
    check_paths(args.files)
    documents = training_documents(args.files, args.text_field, args.held_out_fraction)
    tokenizer = train_tokenizer(documents, args.vocab_size, args.chain, args.max_token_length)
    save_tokenizer(tokenizer, args.output, args.model_max_length)
    print(f"{tokenizer.get_vocab_size()} tokens written to {args.output}")
    print(f"next: python -m pretrain.data --tokenizer {args.output} --files LANGUAGE FILE ... --output DATA")
    return 0


if __name__ == "__main__":
    run_command(main)
