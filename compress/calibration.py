"""Calibration tokens: a sample of texts and conversations, cut into rows that do not see each other.

Files are .txt, .jsonl or .parquet, the first two perhaps gzipped, with texts or any of the chat formats of `finetune/data.py`.
Each file gives the same number of tokens, drawn from all over it, so that what an expert is used for can be told by file.

Letters: N tokens of all rows one after the other.
"""

import gzip
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from common.command import no_command
from common.extras import extra

with extra("train"):
    from finetune.data import detect_format, normalise, token_ids
    from tokenization.documents import SUFFIXES, check_paths, read_records

_CHARACTERS_A_TOKEN = 8  # more than any language has: a piece of so many is a row's worth of tokens
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_HAN_SHARE = 0.3  # of a text's characters; Chinese technical documentation has half


@dataclass(frozen=True)
class Calibration:
    """Rows of tokens and the files they are from.

    Attributes:
        ids: int64 [N].
        rows: where each row lies in `ids`.
        source: int64 [N], the number of the token's file.
        names: the files.
        languages: of each file, "Chinese" or "not Chinese": more is not told apart.
    """

    ids: torch.Tensor
    rows: list[slice]
    source: torch.Tensor
    names: list[str]
    languages: list[str]


def read_calibration(
    paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase, tokens: int, context_tokens: int, seed: int = 0
) -> Calibration:
    """
    Args:
        tokens: how many to draw from all files together; a file that has fewer than its part gives what it has.
        context_tokens: longest row.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is of another kind, a record is malformed, or a file has no text.
    """
    check_paths(list(paths))
    check_counts(tokens, context_tokens)
    rows, sources, languages = [], [], []
    for number, path in enumerate(paths):
        examples = list(_pieces(path, context_tokens * _CHARACTERS_A_TOKEN))
        random.Random(seed).shuffle(examples)
        budget, han, characters = tokens // len(paths), 0, 0
        for example in examples:
            if budget <= 0:
                break
            row = token_ids(example, tokenizer)[: min(context_tokens, budget)]
            text = _words(example)
            han, characters = han + len(_HAN.findall(text)), characters + len(text)
            if len(row) >= 2:
                rows.append(torch.tensor(row))
                sources.append(torch.full((len(row),), number))
                budget -= len(row)
        if not any(int(source[0]) == number for source in sources):
            raise ValueError(f"calibration file {path} gives no tokens; give it text, or leave it out.")
        languages.append("Chinese" if han >= _HAN_SHARE * characters else "not Chinese")
    ends = torch.tensor([len(row) for row in rows]).cumsum(0).tolist()
    spans = [slice(end - len(row), end) for end, row in zip(ends, rows, strict=True)]
    return Calibration(torch.cat(rows), spans, torch.cat(sources), _short_names(paths), languages)


def check_counts(tokens: int, context_tokens: int):
    """ValueError for numbers that leave no row to read."""
    if tokens < 1 or context_tokens < 2:
        raise ValueError(
            f"--tokens is {tokens} and --context-tokens {context_tokens}; there must be at least 1 and 2 of them."
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config):
    """
    Raises:
        ValueError: the tokenizer has more tokens than the model, or other ids for begin and end of a text.
    """
    remedy = "This is the tokenizer of another model: put the model's own into its folder."
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, `vocab_size` in config.json is {config.vocab_size}. {remedy}"
        )
    for name in ("bos_token_id", "eos_token_id"):
        own, given = getattr(config, name), getattr(tokenizer, name)
        allowed = own if isinstance(own, list) else [own]
        if given is not None and own is not None and given not in allowed:
            raise ValueError(f"`{name}` is {own} in config.json and {given} in the tokenizer. {remedy}")


def _pieces(path: Path, characters: int) -> Iterator[dict]:
    """The examples of a file as `finetune.data` normalises them; texts in pieces of at most so many characters."""
    for where, record in _records(path):
        try:
            example = normalise(record, detect_format(record))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if "chosen" in example:
            raise ValueError(f"{where} is a preference pair; calibration reads texts and conversations.")
        if "text" not in example:
            yield example
            continue
        text = example["text"]
        for start in range(0, len(text), characters):
            yield {"text": text[start : start + characters]}


def _words(example: dict) -> str:
    """What an example says, without its form."""
    parts = [example.get(name) or "" for name in ("text", "prompt", "completion")]
    parts += [str(message.get("content") or "") for message in example.get("messages", ())]
    return "".join(parts)


def _records(path: Path) -> Iterator[tuple[str, object]]:
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        for record in read_records(path):
            if record.problem:
                raise ValueError(f"{path}, line {record.line}: {record.problem}")
            yield f"{path}, line {record.line}", {"text": record.text}
        return
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path}, line {number}", json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is no JSON: {error}") from error


def _short_names(paths: Sequence[Path]) -> list[str]:
    """File names without their kind; whole paths where two would be alike."""
    names = [path.name for path in paths]
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        names = [name.removesuffix(suffix) for name in names]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


if __name__ == "__main__":
    no_command("read calibration text by python -m compress.prune or compress.quantise")
