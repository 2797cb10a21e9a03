"""A selection of experts by the tokens' ids: each way to run the model hands them to the routers.

No family here routes by ids, so greedy selection is replaced by a table.
"""

import pytest
import torch
from checks import assert_close
from deepseek_repo import moe_deepseek
from tiny import make_model, make_tokens

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}


def by_table(scores: torch.Tensor, router, token_ids: torch.Tensor | None) -> torch.Tensor:
    if token_ids is None:
        raise ValueError("experts are chosen by token ids; give `input_ids`")
    places = torch.arange(router.top_k, device=scores.device)
    return (token_ids[:, None] * 7 + places) % scores.shape[-1]  # [N, P], distinct in a row


@pytest.fixture(params=["deepseek", "v2_lite"])
def model(request, monkeypatch):
    monkeypatch.setitem(moe_deepseek.SELECTIONS, "greedy", by_table)
    return make_model(request.param)


@torch.no_grad()
def test_the_table_decides(model):
    tokens = make_tokens(2, 20)
    chosen = []
    gate = next(layer.mlp.gate for layer in model.model.layers if layer.is_sparse)
    gate.register_forward_hook(lambda _, __, output: chosen.append(output[2]))
    model(tokens)
    assert torch.equal(chosen[0], by_table(torch.zeros(40, gate.weight.shape[0]), gate, tokens.flatten()))
    other = tokens.clone()
    other[:, 7] = (other[:, 7] + 1) % model.config.vocab_size
    model(other)
    assert chosen[1].shape == chosen[0].shape
    assert not torch.equal(chosen[1], chosen[0])


@torch.no_grad()
def test_chunks_padding_and_generation_agree_with_the_whole_row(model):
    tokens = make_tokens(1, 24)
    expected = model(tokens).logits
    cache, parts = None, []
    for part in tokens.split(5, dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    assert_close(torch.cat(parts, dim=1), expected)

    whole = model.generate(tokens, **GREEDY)
    assert torch.equal(whole, model.generate(tokens, use_cache=False, **GREEDY))
    padded = torch.cat([torch.full((1, 4), 2), tokens], dim=1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(tokens)], dim=1)
    assert torch.equal(model.generate(padded, attention_mask=mask, **GREEDY)[:, 4:], whole)
    assert torch.equal(model.generate(tokens, prefill_chunk_size=7, **GREEDY), whole)


def test_training_with_and_without_checkpointing(model):
    tokens = make_tokens(2, 16)
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient)


def test_embeddings_alone_have_no_ids(model):
    embeds = model.get_input_embeddings()(make_tokens(1, 8))
    with pytest.raises(ValueError, match="give `input_ids`"):
        model(inputs_embeds=embeds)
