"""pretrain.config: models of a family and size, which load, train and have the size that was said."""

import json

import pytest
import torch
from tiny_chat import VOCAB_SIZE, add_tokenizer

from common.loading import load_config, new_model
from pretrain import config


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return add_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make(tokenizer, output, *options):
    return config.main(["--tokenizer", str(tokenizer), "--output", str(output), *map(str, options)])


@pytest.mark.parametrize("family", config.MODEL_TYPES)
def test_every_family_has_about_the_size_and_learns(tokenizer, tmp_path, capsys, family):
    assert make(tokenizer, tmp_path, "--family", family, "--parameters", "1M", "--context", 512) == 0
    loaded = load_config(tmp_path)
    model = new_model(loaded, dtype=torch.float32).train()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"{parameters:,} parameters" in capsys.readouterr().out
    assert parameters == pytest.approx(1e6, rel=0.3)
    assert loaded.vocab_size == VOCAB_SIZE
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)
    tokens = torch.randint(3, VOCAB_SIZE, (2, 200))
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert torch.isfinite(loss)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == config.MODEL_TYPES[family]
    assert written["architectures"][0].endswith("ForCausalLM")


def test_the_proportions_are_those_of_the_checkpoint_in_the_root():
    from checks import ROOT

    root = json.loads((ROOT / "config.json").read_text())
    fields, parameters = config.fit("v3", 14.5e6, config.read_tokenizer(ROOT), 4096)
    assert {name: value for name, value in fields.items() if root.get(name) != value} == {}
    assert parameters == pytest.approx(14.5e6, rel=0.01)


@pytest.mark.parametrize("family", config.MODEL_TYPES)
@pytest.mark.parametrize("size", [3e6, 7e8, 2e10])
def test_large_sizes_are_met(family, size):
    vocabulary = {
        "vocab_size": 8192 if size < 1e9 else 128_000,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    if size == 3e6:
        vocabulary["vocab_size"] = 1000
    assert config.fit(family, size, vocabulary, 4096)[1] == pytest.approx(size, rel=0.12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parameters", "1K"], "give more, or train a smaller tokenizer"),
        (["--parameters", "900T"], "give fewer"),
        (["--parameters", "much"], "no quantity"),
        (["--parameters", "1M", "--context", "0"], "--context is 0"),
        (["--parameters", "1M", "--gpu", "abacus"], "h100"),
        (["--parameters", "1M", "--mfu", "2"], "--mfu"),
    ],
)
def test_mistakes_write_nothing(tokenizer, tmp_path, capsys, options, message):
    assert make(tokenizer, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_tokenizer_and_an_existing_config(tokenizer, tmp_path, capsys):
    assert make(tmp_path, tmp_path / "out", "--parameters", "1M") == 2
    assert "tokenization.train_bpe" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("mine")
    assert make(tokenizer, tmp_path, "--parameters", "1M") == 2
    assert (tmp_path / "config.json").read_text() == "mine"
