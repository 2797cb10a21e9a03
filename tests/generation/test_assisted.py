"""transformers' own assisted generation on every family: prompt lookup and draft models."""

import pytest
import torch
from tiny import make_model, make_tokens
from transformers import LogitsProcessor, LogitsProcessorList

FAMILIES = ("llama", "deepseek", "v2_lite", "v2", "v3", "v32", "nsa")
# no token is taken for padding: transformers hands no mask on to the draft model
GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 1, "eos_token_id": 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_lookup(family):
    model, prompt = make_model(family), make_tokens(1, 30)
    plain = model.generate(prompt, **GREEDY)
    prompt = torch.cat((plain, prompt[:, -4:]), dim=1)  # some of what is looked up is right, some is not
    expected = model.generate(prompt, **GREEDY)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=4, **GREEDY), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("noise", [0.0, 0.03], ids=["perfect", "imperfect"])
def test_draft_model(family, noise):
    model, assistant, prompt = make_model(family), make_model(family), make_tokens(1, 12)
    with torch.no_grad():
        assistant.lm_head.weight.add_(noise * torch.randn_like(assistant.lm_head.weight))
    # random models are never confident, and would stop drafting after one token
    assistant.generation_config.update(assistant_confidence_threshold=0.0, num_assistant_tokens_schedule="constant")
    assistant.generation_config.num_assistant_tokens = 4
    forwards = []
    model.model.register_forward_hook(lambda *_: forwards.append(1))
    actual = model.generate(prompt, assistant_model=assistant, **GREEDY)
    assert len(forwards) < (8 if not noise else 20), "hardly a draft was accepted"
    assert torch.equal(actual, model.generate(prompt, **GREEDY))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("held", [1, 18, 29])
@pytest.mark.parametrize("drafts", ["prompt lookup", "draft model"])
def test_going_on_from_a_cache(family, held, drafts):
    """Only what the cache does not hold is read."""
    model, prompt = make_model(family), make_tokens(1, 30)
    settings = {"prompt_lookup_num_tokens": 4} if drafts == "prompt lookup" else {"assistant_model": make_model("v3")}
    plain, expected = model.generate(prompt, **GREEDY), model.generate(prompt, **settings, **GREEDY)
    assert torch.equal(expected[:, : plain.shape[1]], plain)  # transformers 5.6 may write a token more
    for mask in ({}, {"attention_mask": torch.ones_like(prompt)}):
        cache = model.prefill(prompt[:, :held], progress=False)
        assert torch.equal(model.generate(prompt, past_key_values=cache, **mask, **settings, **GREEDY), expected)
        assert cache.get_seq_length() == expected.shape[1] - 1


def test_going_on_from_a_cache_needs_all_ids():
    model, prompt = make_model("v3"), make_tokens(1, 30)
    cache, mask = model.prefill(prompt[:, :20], progress=False), torch.ones_like(prompt)
    with pytest.raises(ValueError, match=r"holds 20 tokens.*10 behind them.*pass them"):
        model.generate(
            prompt[:, 20:], attention_mask=mask, past_key_values=cache, prompt_lookup_num_tokens=2, **GREEDY
        )


def test_draft_model_of_another_family():
    model, assistant, prompt = make_model("v3"), make_model("llama"), make_tokens(1, 12)
    actual = model.generate(prompt, assistant_model=assistant, **GREEDY)
    assert torch.equal(actual, model.generate(prompt, **GREEDY))


def test_draft_model_that_has_mtp_tokens_set():
    model, assistant, prompt = make_model("v3"), make_model("v3"), make_tokens(1, 12)
    assistant.generation_config.mtp_tokens = 2
    actual = model.generate(prompt, assistant_model=assistant, **GREEDY)
    assert torch.equal(actual, model.generate(prompt, **GREEDY))


@pytest.mark.parametrize("module", ["xgrammar.contrib.hf", "outlines.processors.structured", "llguidance.hf"])
def test_grammars_are_refused_before_the_prompt_is_read(module):
    grammar = type("Grammar", (LogitsProcessor,), {"__module__": module})()
    model, prompt = make_model("v3"), make_tokens(1, 12)
    model.model.forward = None  # not called
    for settings in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": make_model("v3")}):
        with pytest.raises(ValueError, match=r"Grammar must see each token .* once.*mtp_tokens"):
            model.generate(prompt, logits_processor=LogitsProcessorList([grammar]), **settings, **GREEDY)
