"""The tokenizer trainer: lossless, deterministic, laid out like DeepSeek-V3's."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tokenization.chains import build_chain
from tokenization.documents import is_held_out, read_documents
from tokenization.train_bpe import ADDED_TOKENS, BOS, EOS, MIN_VOCAB_SIZE, PAD, main, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    f"In chapter {i} the reader of numbers wrote: the sum of {i} and {i + 1} is {2 * i + 1}.\n\n"
    f"第{i}章说，读者写下了数字{i}，然后又写下了下一个数字。\n"
    for i in range(200)
]
VOCAB_SIZE = 320


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the command line writes for `TEXTS`."""
    folder = tmp_path_factory.mktemp("bpe")
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)
    with gzip.open(folder / "texts.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    arguments = [str(folder / "texts.jsonl.gz"), "--vocab-size", str(VOCAB_SIZE), "--output", str(folder)]
    assert main(arguments) == 0
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_ids_are_laid_out_as_in_v3(tokenizer):
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.convert_tokens_to_ids([BOS, EOS, PAD]) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    added_ids = tokenizer.convert_tokens_to_ids(list(ADDED_TOKENS))
    assert added_ids == list(range(VOCAB_SIZE - len(ADDED_TOKENS), VOCAB_SIZE))


def test_only_special_tokens_are_skipped_in_decoding(tokenizer):
    ids = tokenizer(f"<｜User｜>1<think>2</think>{EOS}<|EOT|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<｜User｜>1<think>2</think>"


# What is hard: line breaks and spaces of many kinds, combining marks, joined emoji, digits, control tokens.
MIXED = [
    "\n",
    "\r",
    " ",
    "\t",
    "\u3000",
    "\u00a0",
    "\x00",
    "é",
    "e\u0301",
    "👩‍👩‍👧",
    "９",
    "1",
    "。",
    "字",
    "か",
    "<think>",
    "</s>",
    EOS,
]
SHIPPED = Tokenizer.from_file(str(ROOT / "tokenizer.json"))


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
@pytest.mark.parametrize("chain", ["v3", "llm"])
def test_any_text_survives(chain, text):
    _check_round_trip(TOKENIZERS[chain], text)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet=st.characters(codec="utf-8"), max_size=200)
    | st.lists(st.sampled_from(MIXED), max_size=40).map("".join)
)
def test_any_text_survives_the_shipped_tokenizer(text):
    _check_round_trip(SHIPPED, text)


def test_every_character_survives():
    """All of Unicode but the surrogates, in pieces of 4096."""
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(characters), 4096):
        _check_round_trip(SHIPPED, "".join(characters[start : start + 4096]))


def _check_round_trip(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert ids[0] == 0
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text


TOKENIZERS = {chain: train_tokenizer(TEXTS, VOCAB_SIZE, chain, show_progress=False) for chain in ("v3", "llm")}


@pytest.mark.parametrize(
    ("chain", "text", "pieces"),
    [
        ("v3", "1234567", ["123", "456", "7"]),
        ("llm", "1234567", list("1234567")),
        ("v3", "a.\n\nb", ["a", ".\n\n", "b"]),
        ("llm", "a.\n\nb", ["a", ".", "\n", "\n", "b"]),
        ("v3", "foo_bar", ["foo", "_bar"]),
        ("v3", "我有3只猫", ["我有", "3", "只猫"]),
        ("v3", "Hello, world", ["Hello", ",", " world"]),
    ],
)
def test_chain_splits(chain, text, pieces):
    spans = [span for _, span in build_chain(chain).pre_tokenize_str(text)]
    assert [text[start:end] for start, end in spans] == pieces


def test_training_is_deterministic():
    assert train_tokenizer(TEXTS, VOCAB_SIZE, show_progress=False).to_str() == TOKENIZERS["v3"].to_str()


def test_training_does_not_depend_on_the_process(folder):
    """String hashing differs from process to process; the files may not."""
    command = [sys.executable, "-m", "tokenization.train_bpe", str(folder / "texts.jsonl.gz")]
    command += ["--vocab-size", str(VOCAB_SIZE), "--output", str(folder / "again")]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_chinese_run_is_one_piece_but_no_token():
    phrase = "道可道非常道名可名非常名"
    texts = [phrase * 3] * 50
    assert next(text for text, _ in build_chain("v3").pre_tokenize_str("甲" * 5000 + "a")) == "çĶ²" * 5000
    longest = {
        limit: _longest(train_tokenizer(texts, MIN_VOCAB_SIZE + size, max_token_length=limit, show_progress=False))
        for limit, size in ((6, 12), (16, 18), (1000, 22))
    }
    assert 3 <= longest[6] <= 6
    assert longest[6] < longest[16] <= 16
    assert longest[1000] >= len(phrase.encode())


def test_token_length_is_limited():
    limited = train_tokenizer(TEXTS, MIN_VOCAB_SIZE + 20, max_token_length=2, show_progress=False)
    assert _longest(limited) == 2
    assert _longest(TOKENIZERS["v3"]) > 2


def _longest(tokenizer) -> int:
    """Bytes of the longest learned token: in the byte-level alphabet a character is a byte."""
    learned = set(tokenizer.get_vocab()) - {BOS, EOS, PAD, *ADDED_TOKENS}
    return max(len(token) for token in learned)


def test_held_out_documents_are_chosen_by_text_alone():
    chosen = [text for text in TEXTS if is_held_out(text, 0.2)]
    assert 20 <= len(chosen) <= 60
    assert not any(is_held_out(text, 0.0) for text in TEXTS)
    assert set(chosen) <= {text for text in TEXTS if is_held_out(text, 0.4)}


def test_errors_name_field_value_and_remedy(tmp_path):
    with pytest.raises(ValueError, match=f"--vocab-size is 10; it must be at least {MIN_VOCAB_SIZE}"):
        train_tokenizer(TEXTS, 10)
    with pytest.raises(ValueError, match="give more text"):
        train_tokenizer(["abc"], 5000, show_progress=False)
    with pytest.raises(ValueError, match="choose one of v3, llm"):
        build_chain("v2")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"body": "y"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl:2 has no text in field 'text' .*--text-field"):
        list(read_documents(tmp_path / "a.jsonl"))
    assert main([str(tmp_path / "missing.txt"), "--output", str(tmp_path)]) == 2
