"""corpus.split: documents of about a length; all words stay, in order."""

import json

import pytest

from corpus import split


@pytest.mark.parametrize("separator", ["\n\n", "\n", "\n \n\n"])
def test_all_words_stay_in_order(separator):
    text = separator.join(f"paragraph {i} has some words" for i in range(50))
    documents = list(split.split(text, 200))
    assert " ".join(documents).split() == text.split()
    assert all(200 <= len(document) < 300 for document in documents[:-1])
    assert len(documents) > 4


def test_command_line(tmp_path, capsys):
    (tmp_path / "书.txt").write_text("一二三四五。\n\n六七八九十。\n" * 30, encoding="utf-8")
    arguments = [str(tmp_path / "书.txt"), "--output", str(tmp_path / "out.jsonl"), "--characters", "40"]
    assert split.main(arguments) == 0
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 5
    assert "六七八" in json.loads(lines[0])["text"]
    assert "next: python -m tokenization.train_bpe" in capsys.readouterr().out
    assert split.main(arguments) == 2
    assert "exists" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.partial"))
