r"""Rewards that a program can verify, for GRPO and for scoring answers.

    numeric   1 if the answer's number is the reference's: the one in the last \boxed{...}, else the last number
    format    1 if the answer is <think>reasoning</think> and then something else

The signatures are TRL's: lists over completions, and each column of the data as a keyword.
"""

import re
from decimal import Decimal, InvalidOperation

from common.command import no_command

_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
# 1,234.5 and 1234.5, also with a sign and among Chinese characters; not the 2 of "x2"
_NUMBER = re.compile(r"(?<![A-Za-z0-9_.])[-+\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


def final_number(text: str) -> Decimal | None:
    r"""The number a text ends up with: in its last \boxed{...} if it has one, else its last number; None without one.

    What is inside <think>...</think> does not count.
    """
    text = text.rpartition("</think>")[2]
    boxed = _BOXED.findall(text)
    numbers = _NUMBER.findall(boxed[-1] if boxed else text)
    if not numbers:
        return None
    try:
        return Decimal(numbers[-1].replace(",", "").replace("\u2212", "-"))
    except InvalidOperation:
        return None


def same_number(text: str, reference: str) -> bool:
    """Whether two texts end up with the same number."""
    number = final_number(text)
    return number is not None and number == final_number(reference)


def numeric(completions: list, answer: list[str], **_columns) -> list[float]:
    """1 for a completion with the reference's number, else 0."""
    return [float(same_number(_content(text), reference)) for text, reference in zip(completions, answer, strict=True)]


def format(completions: list, **_columns) -> list[float]:
    """1 for <think>reasoning</think> followed by an answer, each of them once and not empty, else 0."""
    rewards = []
    for completion in completions:
        text = _content(completion)
        reasoning, _, answer = text.partition("</think>")
        reasoning = reasoning.strip().removeprefix("<think>").strip()  # the template may have opened it
        tags = [tag for tag in ("<think>", "</think>") if tag in reasoning or tag in answer]
        rewards.append(float("</think>" in text and bool(reasoning) and bool(answer.strip()) and not tags))
    return rewards


REWARDS = {"numeric": numeric, "format": format}


def _content(completion) -> str:
    """The text of a completion, which is a list of messages where the prompt is one."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


if __name__ == "__main__":
    no_command("fine-tune by python -m finetune.sft, .dpo or .grpo")
