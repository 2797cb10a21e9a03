"""The tokenizer trainer: lossless, deterministic, laid out like DeepSeek-V3's."""

import gzip
import json

import pytest
from hypothesis import given, settings, strategies as st
from transformers import AutoTokenizer

from tokenization.chains import build_chain
from tokenization.documents import is_held_out, read_documents
from tokenization.train_bpe import ADDED_TOKENS, BOS, EOS, MIN_VOCAB_SIZE, PAD, main, train_tokenizer

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


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60))
@pytest.mark.parametrize("chain", ["v3", "llm"])
def test_any_text_survives(chain, text):
    tokenizer = TOKENIZERS[chain]
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


def test_token_length_is_limited():
    limited = train_tokenizer(TEXTS, MIN_VOCAB_SIZE + 20, max_token_length=2, show_progress=False)
    assert _longest(limited) == 2
    assert _longest(TOKENIZERS["v3"]) > 2


def _longest(tokenizer) -> int:
    """Bytes of the longest learned token: in the byte-level alphabet a character is a byte."""
    learned = set(tokenizer.get_vocab()) - {BOS, EOS, PAD, *ADDED_TOKENS}
    return max(len(token) for token in learned)


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "again"},
]


def test_chat_is_v3s_plain_format(tokenizer):
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        f"{BOS}Be brief.\n\nBe kind.<｜User｜>你好<｜Assistant｜>Hello.{EOS}<｜User｜>again<｜Assistant｜>"
    )


def test_chat_and_text_begin_with_exactly_one_bos(tokenizer):
    assert tokenizer("a")["input_ids"].count(0) == 1
    ids = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    assert ids[0] == 0
    assert ids.count(0) == 1


def test_assistant_mask_covers_the_answer_and_its_eos(tokenizer):
    encoded = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    chosen = [i for i, keep in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if keep]
    assert tokenizer.decode(chosen) == f"Hello.{EOS}"


def test_unknown_role_is_refused(tokenizer):
    with pytest.raises(Exception, match="use system, user or assistant"):
        tokenizer.apply_chat_template([{"role": "robot", "content": ""}], tokenize=False)


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
