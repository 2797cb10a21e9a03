"""Quality rules and test sets on English and Chinese texts."""

import json

import numpy as np
import pytest

from corpus.decontaminate import Contaminants
from corpus.quality import RULES, broken_rule
from corpus.text import normalise, tokenise

ENGLISH = """It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of
a wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth
is so well fixed in the minds of the surrounding families, that he is considered the rightful property of some one or
other of their daughters."""
CHINESE = """却说那女娲氏炼石补天之时，于大荒山无稽崖炼成高十二丈、见方二十四丈大的顽石三万六千五百零一块。那娲皇只用了三万六千五百块，
单单剩下一块未用，弃在青埂峰下。谁知此石自经锻炼之后，灵性已通，自去自来，可大可小。因见众石俱得补天，独自己无才不得入选，
遂自怨自愧，日夜悲哀。一日正当嗟悼之际，俄见一僧一道远远而来，生得骨格不凡，丰神迥异。"""


def rule(text: str) -> str:
    return broken_rule(text, tokenise(normalise(text)))


def numbered(template: str, count: int) -> str:
    return "".join(template.format(chr(ord("a") + i % 26) * (1 + i // 26)) for i in range(count))


BROKEN = {
    "words": "The cat sat on the mat and that was that.",
    "word_length": " ".join(["a", "bc", "de", "to"] * 5) + " " + numbered("{} of ", 60),
    "letters": " ".join(str(1000 + i * 37) for i in range(200)) + " the end of that",
    "stop_words": numbered("Dieses Wort{} steht hier. ", 40),
    "characters": "天地玄黄，宇宙洪荒。",
    "punctuation": "".join(f"——{character}！！？" for character in CHINESE.replace("，", "").replace("。", "")),
    "symbols": ENGLISH.replace(" ", " # "),
    "bullets": "- " + ENGLISH.replace("\n", "\n- "),
    "ellipses": ENGLISH.replace("\n", "...\n"),
    "repeated_lines": ENGLISH + "\n" + "\n".join([CHINESE[:20] + "and so on, said the king"] * 12),
    "top_ngram": ENGLISH.replace("of", "of buy it now buy it now buy it now"),
    "repeated_ngrams": ENGLISH + " " + ENGLISH[:180],
}


@pytest.mark.parametrize("text", [ENGLISH, CHINESE, CHINESE.replace("\n", ""), ENGLISH + "\n" + CHINESE])
def test_good_text_passes(text):
    assert rule(text) == ""


def test_every_rule_has_an_example():
    assert set(BROKEN) == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_bad_text_breaks_its_rule(name):
    assert rule(BROKEN[name]) == name


def test_repetition_counts_in_chinese_too():
    assert rule(CHINESE * 2) == "repeated_ngrams"
    assert rule(CHINESE + "点击查看更多" * 30) in ("top_ngram", "repeated_ngrams")
    assert rule("\n".join(line for line in CHINESE.split("\n") for _ in range(2))) == "repeated_lines"


def test_empty_text_breaks_a_rule():
    assert rule("") == "words"


def test_documents_with_a_shared_ngram_are_found(tmp_path):
    question = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    chinese = "小明有十二个苹果他给了小红三个还剩几个"
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"q": "short"}) + "\n" + json.dumps({"inner": [{"q": question}]}) + "\n", encoding="utf-8"
    )
    (tmp_path / "b.tsv").write_text(f"{chinese}\t9\n", encoding="utf-8")
    (tmp_path / "c.json").write_text(json.dumps([{"q": "x"}, {"q": question.replace("one", "uno")}]))
    tests = Contaminants([tmp_path / name for name in ("a.jsonl", "b.tsv", "c.json")], 13)
    assert (tests.num_strings, tests.num_short) == (6, 3)

    def find(text):
        return tests.find(tokenise(normalise(text)).hashes)

    assert find(f"Zero, {question.upper()}!") == "a.jsonl:2"
    assert find("Before: " + " ".join(question.split()[1:])) == "a.jsonl:2"  # also in c.json: the first one is named
    assert find("uno " + " ".join(question.split()[1:13])) == "c.json:2"
    assert find(" ".join(question.split()[:12])) == ""
    assert find("题：" + "，".join(chinese[:13]) + "。") == "b.tsv:1"
    assert find(chinese[:12]) == ""
    assert find("") == ""
    assert Contaminants([], 13).find(np.arange(50, dtype=np.uint64)) == ""


def test_only_a_newline_ends_a_line_of_a_test_set(tmp_path):
    lines = [
        json.dumps({"q": f"a\u2028b\x85{i}"}, ensure_ascii=False) for i in range(2)
    ]  # str.splitlines would cut here
    (tmp_path / "a.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert Contaminants([tmp_path / "a.json"], 1).num_strings == 2


def test_unreadable_test_set_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"a\.jsonl cannot be read"):
        Contaminants([tmp_path / "a.jsonl"], 13)
