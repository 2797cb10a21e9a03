"""The comparison of tokenizers: counts are right, and only held-out text is read."""

import json

import pytest
import tiny_chat
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from tokenization.documents import is_held_out
from tokenization.report import main

TEXTS = {"en": [f"one two three {i}" for i in range(40)], "zh": [f"一二三 {i}" for i in range(40)]}


@pytest.fixture
def files(tmp_path):
    """Corpus files, a tokenizer with one token a word, and the tiny one."""
    words = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (tmp_path / "words").mkdir()
    words.save(str(tmp_path / "words" / "tokenizer.json"))
    tiny_chat.add_tokenizer(tmp_path)
    for language, texts in TEXTS.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{language}_a.jsonl").write_text(lines)
        (tmp_path / f"{language}_b.jsonl").write_text(lines[: lines.index("\n") + 1])
    return tmp_path


def run(folder, *options: str) -> int:
    arguments = ["--tokenizers", f"tiny={folder}", str(folder / "words"), "--output", str(folder / "report")]
    for language in TEXTS:
        arguments += ["--files", language, str(folder / f"{language}_a.jsonl"), str(folder / f"{language}_b.jsonl")]
    return main([*arguments, *options])


def test_counts_are_right(files):
    assert run(files) == 0
    report = json.loads((files / "report" / "report.json").read_text())
    texts = TEXTS["en"]
    assert report["sources"]["en"]["en_a"]["tokens"]["words"] == 4 * len(texts)
    assert report["languages"]["en"]["tokens"]["words"] == 4 * (len(texts) + 1)
    assert report["languages"]["zh"]["bytes"] == sum(len(text.encode()) for text in [*TEXTS["zh"], TEXTS["zh"][0]])
    assert report["languages"]["zh"]["characters"] == sum(len(text) for text in [*TEXTS["zh"], TEXTS["zh"][0]])
    tiny = tiny_chat._tokenizer()
    expected = sum(len(tiny.encode(text).ids) - 1 for text in texts)  # without bos
    assert report["sources"]["en"]["en_a"]["tokens"]["tiny"] == expected
    row = next(line for line in (files / "report" / "report.md").read_text().splitlines() if line.startswith("| zh_b"))
    assert (
        row
        == f"| zh_b | 11 | {5 / _tiny_tokens('一二三 0'):.2f} / {11 / _tiny_tokens('一二三 0'):.2f} | 2.50 / 5.50 |"
    )
    assert (files / "report" / "report.png").stat().st_size > 5000


def _tiny_tokens(text: str) -> int:
    return len(tiny_chat._tokenizer().encode(text, add_special_tokens=False).ids)


def test_only_held_out_documents_are_read(files):
    assert run(files, "--held-out-fraction", "0.3") == 0
    report = json.loads((files / "report" / "report.json").read_text())
    chosen = [text for text in TEXTS["en"] if is_held_out(text, 0.3)]
    assert report["sources"]["en"]["en_a"]["documents"] == len(chosen) > 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--tokenizers", "missing"], "missing does not exist; pass folders"),
        (["--tokenizers", "{}", "{}"], "two tokenizers are named"),
        (["--tokenizers", "{}/en_a.jsonl"], "is no tokenizer.json"),
        (["--held-out-fraction", "0.000001"], "language 'en' has no text to measure on"),
        (["--held-out-fraction", "1"], "it must be in [0, 1)"),
    ],
)
def test_errors_name_the_remedy(files, capsys, options, error):
    assert run(files, *(option.format(files) for option in options)) == 2
    assert error in capsys.readouterr().err
    assert not (files / "report").exists()
