"""Number problems, files of examples, rendering with assistant-only labels."""

import json
import re

import pytest
import torch
from tiny_chat import add_tokenizer
from transformers import AutoTokenizer

from finetune import data

CHAT = {"messages": [{"role": "user", "content": "1 + 1 = ?"}, {"role": "assistant", "content": "2"}]}


@pytest.fixture
def tokenizer(tmp_path):
    return AutoTokenizer.from_pretrained(add_tokenizer(tmp_path / "tokenizer"))


# ---------------------------------------------------------------- number problems


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
    assert data.number_problems(50, 20, seed=3) == data.number_problems(50, 20, seed=3)
    assert data.number_problems(50, 20, seed=3) != data.number_problems(50, 20, seed=4)


@pytest.mark.parametrize("seed", range(3))
def test_held_out_problems_are_not_in_training_in_any_wording_or_language(seed):
    train, held_out = data.number_problems(6000, 600, seed)
    assert not {_problem_of(example) for example in train} & {_problem_of(example) for example in held_out}


def test_answers_are_right():
    for example in data.number_problems(600, 1)[0]:
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
    train, _ = data.number_problems(24 * len(data.KINDS), 1)
    groups = [(example["kind"], example["language"]) for example in train]
    assert {groups.count(group) for group in groups} == {12}
    assert len(set(groups)) == 2 * len(data.KINDS)


def test_every_problem_is_written_once_and_every_example_is_valid():
    for problems in data.all_problems().values():
        assert len(problems) == len(set(problems))
    for example in data.number_problems(300, 30)[0]:
        data.check_example(example)


@pytest.mark.parametrize("arguments", [(0, 1), (1, 0)])
def test_sizes_below_one_are_refused(arguments):
    with pytest.raises(ValueError, match="must be at least 1"):
        data.number_problems(*arguments)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="division"):
        data.number_problems(1, 1, kinds=["division"])


# ---------------------------------------------------------------- files


def test_files_round_trip(tmp_path):
    train, _ = data.number_problems(20, 1)
    data.write_examples(train, tmp_path / "a.jsonl")
    assert data.read_examples(tmp_path / "a.jsonl") == train
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "needs a non-empty list `messages`, found list"),
        ('{"text": "x"}', r"found \['text'\]"),
        ('{"messages": []}', "non-empty list"),
        ('{"messages": ["x"]}', "role of message 0 is None"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "role of message 0 is 'tool'"),
        ('{"messages": [{"role": "user", "content": 3}]}', "content of message 0 is 3"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "last message is by 'user'"),
        ('{"messages": [{"role": "assistant", "content": " "}]}', "nothing to learn"),
        (b'{"messages": "\xff"}', "codec can't decode"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(json.dumps(CHAT).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(ValueError, match=message) as error:
        data.read_examples(path)
    assert "bad.jsonl, line 3:" in str(error.value)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no examples"):
        data.read_examples(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        data.read_examples(tmp_path / "absent.jsonl")


def test_split_keeps_equal_questions_together():
    examples, _ = data.number_problems(500, 1)
    train, held_out = data.split_examples(examples, 0.2)
    assert len(train) + len(held_out) == 500
    assert 50 < len(held_out) < 150
    questions = [{example["messages"][0]["content"] for example in part} for part in (train, held_out)]
    assert not questions[0] & questions[1]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_split_refuses_fractions_outside_0_1(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        data.split_examples([CHAT], fraction)


def test_split_refuses_an_empty_side():
    with pytest.raises(ValueError, match="give more examples"):
        data.split_examples([CHAT], 0.5)


def test_command_line_writes_both_files(tmp_path, capsys):
    output = tmp_path / "numbers"
    arguments = ["--output", str(output), "--train-examples", "12", "--held-out-examples", "4"]
    arguments += ["--kinds", "add", "count"]
    assert data.main(arguments) == 0
    assert [len(data.read_examples(output / name)) for name in ("train.jsonl", "held_out.jsonl")] == [12, 4]
    assert {example["kind"] for example in data.read_examples(output / "train.jsonl")} == {"add", "count"}
    assert data.main([*arguments, "--train-examples", "0"]) == 2
    assert "must be at least 1" in capsys.readouterr().err


# ---------------------------------------------------------------- tensors


def test_labels_are_the_assistants_words_and_end_tokens(tokenizer):
    turns = [("user", "What is 3 plus 4?"), ("assistant", "7"), ("user", "3加4等于多少？"), ("assistant", "七")]
    row = data.render({"messages": [{"role": role, "content": text} for role, text in turns]}, tokenizer)
    targets = [label for label in row["labels"] if label != data.IGNORED_LABEL]
    assert tokenizer.decode(targets) == f"7{tokenizer.eos_token}七{tokenizer.eos_token}"
    assert all(
        label in (token, data.IGNORED_LABEL) for token, label in zip(row["input_ids"], row["labels"], strict=True)
    )
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1


def test_templates_without_markers_are_refused(tokenizer):
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="endgeneration"):
        data.render(CHAT, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        data.render(CHAT, tokenizer)


def test_long_examples_are_left_out(tokenizer):
    long = {"messages": [{"role": "user", "content": "9 " * 50}, {"role": "assistant", "content": "9"}]}
    assert data.render_all([CHAT, long], tokenizer, max_tokens=20) == [data.render(CHAT, tokenizer)]
    with pytest.raises(ValueError, match="raise --max-tokens"):
        data.render_all([long], tokenizer, max_tokens=20)


def test_collate_pads_on_the_right():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = data.collate(rows, pad_token_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
