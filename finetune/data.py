"""Chat examples for fine-tuning: number problems made here, a user's own files, and their way into tensors.

    python -m finetune.data --output runs/numbers --train-examples 4000 --held-out-examples 400

An example is a dict with `messages`, a list of {"role", "content"} that ends with the assistant's answer, and any other
keys; a file holds one example a line (.jsonl). The number problems add `language` and `kind`, for scores by group.

Held-out problems differ from training problems as problems, not only in wording: 3 + 5 is in one set only, in whatever
words, order or language.

Shapes: B examples, S tokens of the longest one.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100  # the label that every transformers loss skips
ROLES = ("system", "user", "assistant")
LANGUAGES = ("en", "zh")


# ---------------------------------------------------------------- number problems


@dataclass(frozen=True)
class Problem:
    """A question without its wording; two problems are the same if these fields are."""

    kind: str
    values: tuple[int | str, ...]
    answer: str


# Every number in a question is a digit of its own: tokenizers merge some longer numbers into one token and not others,
# and a small model would have to learn each of those by heart.
WORDINGS = {
    "largest": {
        "en": ("Which is largest: {0}?", "Find the largest number: {0}."),
        "zh": ("哪个最大：{0}？", "找出最大的数：{0}。"),
    },
    "smallest": {
        "en": ("Which is smallest: {0}?", "Find the smallest number: {0}."),
        "zh": ("哪个最小：{0}？", "找出最小的数：{0}。"),
    },
    "last": {
        "en": ("Which is last: {0}?", "Name the last number: {0}."),
        "zh": ("哪个在最后：{0}？", "说出最后一个数：{0}。"),
    },
    "count": {
        "en": ("How many marks are there? {0}", "Count the marks: {0}"),
        "zh": ("一共有几个符号？{0}", "请数一数符号：{0}"),
    },
    "add": {
        "en": ("What is {0} plus {1}?", "{0} + {1} = ?", "Add {0} and {1}."),
        "zh": ("{0}加{1}等于多少？", "{0} + {1} 等于几？", "请计算{0}加{1}。"),
    },
    "subtract": {
        "en": ("What is {0} minus {1}?", "{0} - {1} = ?", "Take {1} away from {0}."),
        "zh": ("{0}减{1}等于多少？", "{0} - {1} 等于几？", "请计算{0}减{1}。"),
    },
}
KINDS = tuple(WORDINGS)
_LIST_KINDS = ("largest", "smallest", "last")  # asked about a list of digits
_UNORDERED = ("largest", "smallest", "add")  # the same problem in any order
_SEPARATORS = {"en": ", ", "zh": "、"}
_MARKS = "*#+=@&%~"


def all_problems() -> dict[str, list[Problem]]:
    """Every problem of every kind, in a fixed order; where the order does not matter, values ascend."""
    digits = range(10)
    sets = [values for size in (2, 3, 4) for values in itertools.combinations(digits, size)]
    lists = [values for size in (2, 3) for values in itertools.permutations(digits, size)]
    marks = [(" ".join(mark * n),) for mark in _MARKS for n in range(1, 10)]
    pairs = list(itertools.combinations_with_replacement(digits, 2))
    return {
        "largest": [Problem("largest", values, str(max(values))) for values in sets],
        "smallest": [Problem("smallest", values, str(min(values))) for values in sets],
        "last": [Problem("last", values, str(values[-1])) for values in lists],
        "count": [Problem("count", values, str(len(values[0].split()))) for values in marks],
        "add": [Problem("add", (a, b), str(a + b)) for a, b in pairs if a + b < 10],
        "subtract": [Problem("subtract", (b, a), str(b - a)) for a, b in pairs],
    }


def number_problems(
    train_examples: int, held_out_examples: int, seed: int = 0, kinds: Sequence[str] = KINDS
) -> tuple[list[dict], list[dict]]:
    """Make examples in equal shares of kinds and languages.

    Of the problems of each kind one in five is held out, whatever the numbers of examples; a problem may occur several
    times in its set, mostly in other words.

    Args:
        train_examples, held_out_examples: sizes of the two sets.
        seed: decides the split, the choice and the wording.
        kinds: names from `KINDS`.

    Returns:
        Training examples and held-out examples.

    Raises:
        ValueError: a size is below 1 or a kind is unknown.
    """
    for name, size in (("train_examples", train_examples), ("held_out_examples", held_out_examples)):
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds has {unknown or 'no entry'}; choose from {', '.join(KINDS)}")
    rng = random.Random(seed)
    train, held_out = {}, {}
    for kind, problems in all_problems().items():
        rng.shuffle(problems)
        cut = max(1, len(problems) // 5)
        held_out[kind], train[kind] = problems[:cut], problems[cut:]
    return _sample(train, train_examples, kinds, rng), _sample(held_out, held_out_examples, kinds, rng)


def _sample(problems: dict[str, list[Problem]], size: int, kinds: Sequence[str], rng: random.Random) -> list[dict]:
    examples = []
    for i in range(size):
        kind, language = kinds[i // len(LANGUAGES) % len(kinds)], LANGUAGES[i % len(LANGUAGES)]
        examples.append(_ask(rng.choice(problems[kind]), language, rng))
    rng.shuffle(examples)
    return examples


def _ask(problem: Problem, language: str, rng: random.Random) -> dict:
    values = list(problem.values)
    if problem.kind in _UNORDERED:
        rng.shuffle(values)
    if problem.kind in _LIST_KINDS:
        values = [_SEPARATORS[language].join(map(str, values))]
    question = rng.choice(WORDINGS[problem.kind][language]).format(*values)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": problem.answer}]
    return {"messages": messages, "language": language, "kind": problem.kind}


# ---------------------------------------------------------------- files


def write_examples(examples: Iterable[dict], path: Path) -> None:
    """Write one example a line; the file is complete or absent."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
    os.replace(partial, path)


def read_examples(path: Path) -> list[dict]:
    """Read a .jsonl file of chat examples; empty lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no chat example; the message names file, line and remedy.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist; pass a .jsonl file of chat examples")
    examples = []
    with open(path, "rb") as file:  # bytes, so that a wrong encoding is reported with its line
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    example = json.loads(line)
                    check_example(example)
                except ValueError as error:  # JSON and encoding errors are ValueErrors too
                    raise ValueError(f"{path}, line {number}: {error}") from error
                examples.append(example)
    if not examples:
        raise ValueError(
            f'{path} has no examples; each line is {{"messages": [{{"role": ..., "content": ...}}, ...]}}'
        )
    return examples


def check_example(example: object) -> None:
    """Raise ValueError unless `example` is a chat that ends with the assistant's answer."""
    messages = example.get("messages") if isinstance(example, dict) else None
    if not isinstance(messages, list) or not messages:
        found = sorted(example) if isinstance(example, dict) else type(example).__name__
        raise ValueError(f"needs a non-empty list `messages`, found {found}")
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise ValueError(f"role of message {i} is {role!r}; use one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"content of message {i} is {message.get('content')!r}; it must be a string")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message is by {messages[-1]['role']!r}; it must be the assistant's answer")
    if not messages[-1]["content"].strip():
        raise ValueError("the assistant's last answer is empty; there is nothing to learn from it")


def split_examples(examples: list[dict], held_out_fraction: float) -> tuple[list[dict], list[dict]]:
    """Hold out about a fraction of the examples, by a hash of all but the last answer.

    Examples that ask the same are on the same side, and an example stays on its side when the file grows.

    Raises:
        ValueError: the fraction is outside (0, 1), or one side would be empty.
    """
    if not 0.0 < held_out_fraction < 1.0:
        raise ValueError(f"held-out fraction is {held_out_fraction}; it must be between 0 and 1, for example 0.1")
    train, held_out = [], []
    for example in examples:
        asked = json.dumps(example["messages"][:-1], sort_keys=True).encode()
        is_held_out = int.from_bytes(hashlib.blake2b(asked, digest_size=8).digest(), "big") < held_out_fraction * 2**64
        (held_out if is_held_out else train).append(example)
    if not train or not held_out:
        raise ValueError(
            f"of {len(examples)} examples a held-out fraction of {held_out_fraction} leaves {len(train)} to train on and "
            f"{len(held_out)} held out; give more examples, another fraction or a held-out file"
        )
    return train, held_out


# ---------------------------------------------------------------- tensors


def render(example: dict, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Turn a chat into `input_ids` and `labels`; only what the assistant wrote, its end token included, has labels.

    Raises:
        ValueError: the tokenizer has no chat template, or one that does not mark the assistant's words.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise ValueError("the tokenizer has no chat template; add a chat_template.jinja to its folder")
    if not re.search(r"\{%-?\s*generation\b", template):
        raise ValueError(
            "the chat template has no {% generation %} ... {% endgeneration %} around the assistant's words, so the loss "
            "cannot be limited to them; add the two markers to chat_template.jinja"
        )
    rendered = tokenizer.apply_chat_template(
        example["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = rendered["input_ids"], rendered["assistant_masks"]
    return {
        "input_ids": ids,
        "labels": [token if wrote else IGNORED_LABEL for token, wrote in zip(ids, mask, strict=True)],
    }


def render_all(
    examples: Iterable[dict], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[dict[str, list[int]]]:
    """Render examples and leave out those longer than `max_tokens`: a cut answer would teach to stop in the middle.

    Raises:
        ValueError: nothing is left, or as in `render`.
    """
    rendered = [render(example, tokenizer) for example in examples]
    kept = [row for row in rendered if len(row["input_ids"]) <= max_tokens]
    if not kept:
        shortest = min((len(row["input_ids"]) for row in rendered), default=0)
        raise ValueError(
            f"no example has at most {max_tokens} tokens (the shortest has {shortest}); raise --max-tokens"
        )
    return kept


def collate(rows: list[dict[str, list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad rendered examples on the right -> input_ids, attention_mask, labels, each int64 [B, S]."""
    length = max(len(row["input_ids"]) for row in rows)

    def pad(values: list[int], filling: int) -> list[int]:
        return values + [filling] * (length - len(values))

    return {
        "input_ids": torch.tensor([pad(row["input_ids"], pad_token_id) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor([pad(row["labels"], IGNORED_LABEL) for row in rows]),
    }


# ---------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune.data", description="Write train.jsonl and held_out.jsonl with number problems."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--train-examples", type=int, default=4000, help="examples to train on (default 4000)")
    parser.add_argument("--held-out-examples", type=int, default=400, help="examples to test with (default 400)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="kinds of problems (default all)")
    parser.add_argument("--seed", type=int, default=0, help="decides split, choice and wording (default 0)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        train, held_out = number_problems(args.train_examples, args.held_out_examples, args.seed, args.kinds)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    write_examples(train, args.output / "train.jsonl")
    write_examples(held_out, args.output / "held_out.jsonl")
    print(f"{len(train)} training and {len(held_out)} held-out examples written to {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
