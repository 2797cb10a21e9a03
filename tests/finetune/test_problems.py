"""Number problems: right, in equal shares, and held out as problems."""

import re

import pytest

from finetune import data, problems


def _problem_of(example):
    """What is asked, without wording, language and (where it does not matter) order."""
    kind, question = example["kind"], example["messages"][0]["content"]
    if kind == "count":
        return kind, re.sub(r"[\w\s?？:：]", "", question)
    digits = re.findall(r"\d", question)
    if question.startswith("Take"):  # "Take 2 away from 5."
        digits.reverse()
    return kind, tuple(digits if kind in ("last", "subtract") else sorted(digits))


def test_same_seed_same_examples():
    assert problems.number_problems(50, 20, seed=3) == problems.number_problems(50, 20, seed=3)
    assert problems.number_problems(50, 20, seed=3) != problems.number_problems(50, 20, seed=4)


@pytest.mark.parametrize("seed", range(3))
def test_held_out_problems_are_not_in_training_in_any_wording_or_language(seed):
    train, held_out = problems.number_problems(6000, 600, seed)
    assert not {_problem_of(example) for example in train} & {_problem_of(example) for example in held_out}


def test_answers_are_right():
    for example in problems.number_problems(600, 1)[0]:
        kind, asked = _problem_of(example)
        expected = {
            "largest": lambda asked: max(asked),
            "smallest": lambda asked: min(asked),
            "last": lambda asked: asked[-1],
            "count": lambda asked: len(asked),
            "add": lambda asked: int(asked[0]) + int(asked[1]),
            "subtract": lambda asked: int(asked[0]) - int(asked[1]),
        }[kind](asked)
        assert example["messages"][-1]["content"] == str(expected), example


def test_equal_shares_of_kinds_and_languages():
    train, _ = problems.number_problems(24 * len(problems.KINDS), 1)
    groups = [(example["kind"], example["language"]) for example in train]
    assert {groups.count(group) for group in groups} == {12}
    assert len(set(groups)) == 2 * len(problems.KINDS)


def test_every_problem_is_written_once_and_every_example_is_valid():
    for made in problems.all_problems().values():
        assert len(made) == len(set(made))
    for example in problems.number_problems(300, 30)[0]:
        assert data.normalise(example, "messages") == example


@pytest.mark.parametrize("arguments", [(0, 1), (1, 0)])
def test_sizes_below_one_are_refused(arguments):
    with pytest.raises(ValueError, match="must be at least 1"):
        problems.number_problems(*arguments)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="division"):
        problems.number_problems(1, 1, kinds=["division"])


def test_command_line_writes_both_files(tmp_path, capsys):
    output = tmp_path / "numbers"
    arguments = ["--output", str(output), "--train-examples", "12", "--held-out-examples", "4"]
    arguments += ["--kinds", "add", "count"]
    assert problems.main(arguments) == 0
    assert [len(data.read_examples([output / name])) for name in ("train.jsonl", "held_out.jsonl")] == [12, 4]
    assert {example["kind"] for example in data.read_examples([output / "train.jsonl"])} == {"add", "count"}
    assert problems.main([*arguments, "--train-examples", "0"]) == 2
    assert "must be at least 1" in capsys.readouterr().err
