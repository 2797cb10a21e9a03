"""Number problems in English and Chinese, made here: chat examples for the demo, the tests and the comparisons.

    python -m finetune.problems --output runs/numbers --train-examples 4000 --held-out-examples 400

An example is {"messages": [question, answer], "language", "kind"}; the last two are for scores by group.

Held-out problems differ from training problems as problems, not only in wording: 3 + 5 is in one set only, in whatever
words, order or language.
"""

import argparse
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.command import Parser, one_line_errors, run_command
from common.extras import extra
from common.outputs import refuse_existing

LANGUAGES = ("en", "zh")


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


# ---------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = Parser(
        prog="python -m finetune.problems", description="Write train.jsonl and held_out.jsonl with number problems."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--train-examples", type=int, default=4000, help="examples to train on (default 4000)")
    parser.add_argument("--held-out-examples", type=int, default=400, help="examples to test with (default 400)")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help=f"of {', '.join(KINDS)} (default all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides split, choice and wording (default 0)")
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    train, held_out = number_problems(args.train_examples, args.held_out_examples, args.seed, args.kinds)
    refuse_existing("--output", (args.output / name for name in ("train.jsonl", "held_out.jsonl")))
    with extra("train"):
        from finetune.data import write_jsonl

    args.output.mkdir(parents=True, exist_ok=True)
    write_jsonl(train, args.output / "train.jsonl")
    write_jsonl(held_out, args.output / "held_out.jsonl")
    print(f"{len(train)} training and {len(held_out)} held-out examples written to {args.output}")
    print(f"next: python -m finetune.sft --model . --data {args.output / 'train.jsonl'} --output RUN")
    return 0


if __name__ == "__main__":
    run_command(main)
