"""transformers' offloaded caches: the same tokens where they work, a clear error where they do not."""

import contextlib

import pytest
import torch
from tiny import MLA_FAMILIES, make_model, make_tokens
from transformers import DynamicCache

SETTINGS = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2, "eos_token_id": None, "disable_compile": True}


class FakeStream(contextlib.nullcontext):
    """Stands for a CUDA stream, so that the offloading code runs without such a device: copies are then in order anyway."""

    def __init__(self, *arguments, **kwargs):
        super().__init__()

    def wait_stream(self, stream):
        pass


@pytest.fixture
def seeming_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_stream", FakeStream)
    monkeypatch.setattr(torch, "Stream", FakeStream)


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("family", ["llama", *MLA_FAMILIES])
def test_same_tokens(family, implementation, seeming_cuda):
    model, tokens = make_model(family), make_tokens(2, 20)
    expected = model.generate(tokens, **SETTINGS)
    outputs = model.generate(tokens, cache_implementation=implementation, return_dict_in_generate=True, **SETTINGS)
    assert outputs.past_key_values.offloading
    assert torch.equal(outputs.sequences, expected)


@pytest.mark.parametrize("family", ["v32", "nsa"])
def test_sparse_attention_is_refused(family, seeming_cuda):
    model, tokens = make_model(family), make_tokens(1, 8)
    with pytest.raises(ValueError, match="sparse attention"):
        model.generate(tokens, cache_implementation="offloaded", **SETTINGS)
    with pytest.raises(ValueError, match="Sparse attention"):
        model(tokens, past_key_values=DynamicCache(config=model.config, offloading=True))


def test_without_a_device(seeming_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # but streams: PyTorch built for CUDA makes none
    model, tokens = make_model("v3"), make_tokens(1, 8)
    with pytest.raises(ValueError, match="no CUDA device"):
        model.generate(tokens, cache_implementation="offloaded", **SETTINGS)
    with pytest.raises(ValueError, match="no CUDA device"):
        model(tokens, past_key_values=DynamicCache(config=model.config, offloading=True))
