"""`attend_side_by_side`, one-token attention on CPUs that reads keys and values once, against softmax attention."""

import pytest
import torch
from deepseek_repo import mla_deepseek
from tiny import MLA_FAMILIES, make_model, make_tokens
from transformers import StaticCache


def plain_attention(query, entries, mask, value_width):
    """In float64, with all scores at once."""
    scores = query.double() @ entries.double().transpose(1, 2)  # [B, R, T]
    if mask is not None:
        scores = scores.masked_fill(~mask[:, 0], float("-inf"))
    return scores.softmax(dim=-1) @ entries[..., :value_width].double()


@pytest.mark.parametrize("num_keys", [1, 2, 7, 64, 1031])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("worth_a_thread", [1, 2**16])
def test_equals_plain_attention(monkeypatch, num_keys, threads, worth_a_thread):
    monkeypatch.setattr(mla_deepseek, "count_threads", lambda: threads)
    monkeypatch.setattr(mla_deepseek, "_PART_PRODUCTS", worth_a_thread)
    query = torch.randn(2, 6, 20) / 4
    entries = torch.randn(2, 1500, 20)[:, :num_keys]  # rows further apart than they are long, as in a cache
    one_row = torch.rand(2, 1, 1, num_keys) < 0.5
    one_row[..., num_keys // 2] = True  # a query sees something
    few = torch.zeros_like(one_row)
    few[..., -1] = True  # most parts are hidden as a whole
    for mask in (None, one_row, few):
        expected = plain_attention(query, entries, mask, 12)
        masks = [mask]
        if mask is not None:
            masks.append(torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min))
        for form in masks:
            actual = mla_deepseek.attend_side_by_side(query, entries, form, 12)
            assert torch.allclose(actual.double(), expected, atol=1e-5)


@pytest.mark.parametrize("family", MLA_FAMILIES)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_decoding_uses_it_and_stays_the_same(family, kind, monkeypatch):
    model, calls = make_model(family), []
    tokens, mask = make_tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0

    def counted(*arguments):
        calls.append(arguments)
        return function(*arguments)

    function = mla_deepseek.attend_side_by_side
    monkeypatch.setattr(mla_deepseek, "attend_side_by_side", counted)
    for attention_mask in (None, mask):
        positions = torch.arange(12)[None] if attention_mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            whole = model(tokens, attention_mask=attention_mask, position_ids=positions).logits
            cache = StaticCache(config=model.config, max_cache_len=16) if kind == "static" else None
            for start, stop in ((0, 9), (9, 10), (10, 11), (11, 12)):
                part_mask = None if attention_mask is None else attention_mask[:, :stop]
                outputs = model(
                    tokens[:, start:stop],
                    attention_mask=part_mask,
                    position_ids=positions[:, start:stop],
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = outputs.past_key_values
                visible = slice(3, None) if start == 0 and attention_mask is not None else slice(None)
                assert torch.allclose(outputs.logits[:, visible], whole[:, start:stop][:, visible], atol=1e-4)
    assert len(calls) == 2 * 3 * model.config.num_hidden_layers
