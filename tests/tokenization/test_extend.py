"""Extending a tokenizer and its model: merges as in training, old ids and rows kept, a checkpoint that loads."""

import json

import pytest
import tiny_chat
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenization.extend import extend_checkpoint, extend_rows, extend_tokenizer, learn_merges, main
from tokenization.train_bpe import ADDED_TOKENS, MIN_VOCAB_SIZE, train_tokenizer

TEXTS = [f"The defendant shall indemnify the plaintiff {i}. 被告应当赔偿原告{i}元。\n" for i in range(300)]
NEW_TOKENS = 40


def test_merges_are_those_that_training_goes_on_with():
    """The library's own trainer, stopped early and continued here, learns what it learns in one go."""
    whole = json.loads(train_tokenizer(TEXTS, MIN_VOCAB_SIZE + 120, show_progress=False).to_str())["model"]["merges"]
    early = train_tokenizer(TEXTS, MIN_VOCAB_SIZE + 50, show_progress=False)
    learned = learn_merges(early, TEXTS, 70)
    assert [list(pair) for pair in learned] == whole[50:]
    extended, _ = extend_tokenizer(early, learned)
    reference = train_tokenizer(TEXTS, MIN_VOCAB_SIZE + 120, show_progress=False)
    assert [extended.encode(text).tokens for text in TEXTS] == [reference.encode(text).tokens for text in TEXTS]


def test_old_ids_stay_and_replaced_ids_spell_the_new_token():
    old = tiny_chat._tokenizer()
    size = old.get_vocab_size()
    new, replaced = extend_tokenizer(old, learn_merges(old, TEXTS, NEW_TOKENS), ["<｜search▁begin｜>"])
    new_vocabulary = new.get_vocab()
    assert {name: new_vocabulary[name] for name in old.get_vocab()} == old.get_vocab()
    assert list(replaced) == list(range(size, size + NEW_TOKENS + 1))
    for new_id, ids in replaced.items():
        assert len(ids) > 1
        assert max(ids) < size
        assert new.decode([new_id]) == old.decode(ids)
    text = f"{TEXTS[7]}<｜User｜><think>𝄞é\x00<｜search▁begin｜>"
    ids = new.encode(text).ids
    assert len(ids) < len(old.encode(text).ids)
    assert ids[-1] == size + NEW_TOKENS
    assert new.decode(ids[1:], skip_special_tokens=False) == text
    assert [new.token_to_id(name) for name in ADDED_TOKENS] == [old.token_to_id(name) for name in ADDED_TOKENS]


def test_rows_are_means():
    matrix = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 8.0]])
    rows = extend_rows(matrix, {2: [0, 1], 3: [1, 1, 2]}, 5)
    torch.testing.assert_close(rows[:2], matrix[:2])
    torch.testing.assert_close(rows[2:4], torch.tensor([[1.0, 2.0], [8 / 3, 14 / 3]]))
    torch.testing.assert_close(rows[4], matrix.mean(dim=0))
    assert extend_rows(matrix.bfloat16(), {3: [0]}, 4).dtype == torch.bfloat16


# family, tied, rows of the old model beyond its tokenizer, rows of the new model
CASES = [("v3", False, 0, 376), ("v3", True, 0, 376), ("v3_mtp2", False, 100, 436), ("llama", True, 10, 376)]


@pytest.mark.parametrize(("family", "tied", "spare", "expected_rows"), CASES)
def test_extended_checkpoint_loads_and_computes_the_same(checkpoint, tmp_path, family, tied, spare, expected_rows):
    old_size = tiny_chat.VOCAB_SIZE
    source = checkpoint(family, vocab_size=old_size + spare, tie_word_embeddings=tied)
    tiny_chat.add_tokenizer(source)
    (tmp_path / "law.txt").write_text("".join(TEXTS))
    output = tmp_path / "out"
    arguments = ["--model", source, "--text", tmp_path / "law.txt", "--output", output, "--new-tokens", NEW_TOKENS]
    assert main(list(map(str, arguments))) == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []

    old = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    new, report = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True, output_loading_info=True)
    assert not any(report.values()), report
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert len(tokenizer) == old_size + NEW_TOKENS
    assert new.config.vocab_size == expected_rows
    _, replaced = extend_tokenizer(
        Tokenizer.from_file(str(source / "tokenizer.json")),
        learn_merges(Tokenizer.from_file(str(source / "tokenizer.json")), TEXTS, NEW_TOKENS),
    )
    for get in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(old, get)().weight, getattr(new, get)().weight
        assert len(after) == expected_rows
        assert torch.equal(after[:old_size], before[:old_size])
        for new_id, ids in replaced.items():
            torch.testing.assert_close(after[new_id], before[ids].mean(dim=0))
    assert (new.lm_head.weight is new.model.embed_tokens.weight) == tied

    ids = torch.tensor([tokenizer(TEXTS[3])["input_ids"]])
    assert int(ids.max()) >= old_size
    old_ids = torch.tensor([AutoTokenizer.from_pretrained(source)(TEXTS[3])["input_ids"]])
    assert ids.shape[1] < old_ids.shape[1]
    with torch.no_grad():
        torch.testing.assert_close(new(old_ids).logits[..., :old_size], old(old_ids).logits[..., :old_size])
    new.train()
    result = new(ids, labels=ids)  # multi-token prediction shares both matrices
    result.loss.backward()
    assert torch.isfinite(result.loss)
    assert new.get_input_embeddings().weight.grad[old_size:].abs().sum() > 0
    new.eval().generate(ids[:, :4], max_new_tokens=3, do_sample=False)


def test_published_copies_in_prediction_modules_grow_too(checkpoint, tmp_path):
    """Published files hold the embedding and the head once more in each prediction module."""
    from safetensors.torch import load_file, save_file

    source = checkpoint("v3", vocab_size=tiny_chat.VOCAB_SIZE)
    tiny_chat.add_tokenizer(source)
    tensors = load_file(source / "model.safetensors")
    names = ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")
    for name, original in zip(names, ("model.embed_tokens.weight", "lm_head.weight"), strict=True):
        tensors[name] = tensors[original].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    old = Tokenizer.from_file(str(source / "tokenizer.json"))
    new, replaced = extend_tokenizer(old, learn_merges(old, TEXTS, 5))
    assert extend_checkpoint(source, tmp_path / "out", new, replaced, multiple_of=64) == 384
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written[names[0]], written["model.embed_tokens.weight"])
    assert torch.equal(written[names[1]], written["lm_head.weight"])
    assert len(written["lm_head.weight"]) == 384


def test_errors_come_before_work(checkpoint, tmp_path, capsys):
    old = tiny_chat._tokenizer()
    with pytest.raises(ValueError, match=r"only \d+ pairs that occur twice, --new-tokens is 40"):
        learn_merges(old, ["abab"], 40)
    with pytest.raises(ValueError, match="'<think>' is empty or exists already"):
        extend_tokenizer(old, [], ["<think>"])
    source = checkpoint("v3", vocab_size=100)
    tiny_chat.add_tokenizer(source)
    new, replaced = extend_tokenizer(old, learn_merges(old, TEXTS, 5))
    with pytest.raises(ValueError, match="`vocab_size` 100; use the tokenizer that belongs to the model"):
        extend_checkpoint(source, tmp_path / "out", new, replaced)
    (tmp_path / "law.txt").write_text("x")
    arguments = ["--model", str(source), "--text", str(tmp_path / "law.txt"), "--output", str(tmp_path)]
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
