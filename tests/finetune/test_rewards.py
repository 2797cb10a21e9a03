"""Rewards that a program verifies."""

from decimal import Decimal

import pytest

from finetune.rewards import REWARDS, final_number, same_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", "7"),
        ("3 + 4 = 7.", "7"),
        ("#### 1,234", "1234"),
        ("it is -2.50 degrees", "-2.5"),
        ("\u22125", "-5"),
        (r"\boxed{12} and not 13", "12"),
        (r"\boxed{\text{about } 15} no", "15"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        ("<think>9 or 8</think> 7", "7"),
        ("共有12个", "12"),
        ("$1,234,567.89", "1234567.89"),
    ],
)
def test_the_last_number_or_the_boxed_one_counts(text, number):
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "no number", "<think>7</think>", "v2 x3"])
def test_texts_without_a_number(text):
    assert final_number(text) is None
    assert not same_number(text, text)


def test_numeric_reward_takes_text_and_messages():
    completions = ["7", [{"role": "assistant", "content": "it is 7.0"}], "8", "none"]
    assert REWARDS["numeric"](completions=completions, answer=["7"] * 4, prompts=["?"] * 4) == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a</think>b", 1.0),
        ("<think>\na\n</think>\n\nb", 1.0),
        ("a</think>b", 1.0),  # the template may have opened it
        ("<think></think>b", 0.0),
        ("<think>a</think>", 0.0),
        ("<think>a</think>b</think>c", 0.0),
        ("<think><think>a</think>b", 0.0),
        ("b", 0.0),
    ],
)
def test_format_reward(text, reward):
    assert REWARDS["format"](completions=[text]) == [reward]
