"""What the selected blocks are for: finding what no window reaches. The same passkeys, the same steps."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.recall import NUM_VALUES, hide_passkeys, recall_vocab_size

TEXT_VOCAB, LENGTH, PASSKEYS, PASSKEY_TOKENS, WINDOW, LAYERS = 20, 96, 4, 4, 8, 2
REACH = LAYERS * (WINDOW - 1)  # no passkey is nearer to the questions
STEPS = 150
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.1,
    "max_position_embeddings": 128,
    "vocab_size": recall_vocab_size(TEXT_VOCAB),
}
NSA_SIZES = {
    "nsa_compress_block_size": 8,
    "nsa_compress_stride": 4,
    "nsa_select_block_size": 8,
    "nsa_num_select_blocks": 5,  # of which two are free: 40 of 96 tokens
    "nsa_window_size": WINDOW,
}


def make_batch(seed: int, rows: int):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(TEXT_VOCAB, (rows, LENGTH), generator=generator)
    return hide_passkeys(text, TEXT_VOCAB, PASSKEYS, PASSKEY_TOKENS, REACH, generator)


def accuracy_after(steps: int, config, **inputs) -> float:
    from deepseek_repo.modeling_deepseek import DeepseekForCausalLM

    torch.manual_seed(0)
    model = DeepseekForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 6e-3 * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)
        batch = make_batch(1 + step, rows=16)
        logits = model(batch.input_ids, logits_to_keep=batch.asked_at, **inputs).logits
        F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    batch = make_batch(0, rows=256)
    with torch.no_grad():
        logits = model.eval()(batch.input_ids, logits_to_keep=batch.asked_at, use_cache=False, **inputs).logits
    return (logits.argmax(dim=-1) == batch.answers).float().mean().item()


@pytest.mark.slow
def test_nsa_finds_what_a_window_cannot_reach():
    from deepseek_repo.configuration_deepseek import DeepseekConfig

    nsa = accuracy_after(STEPS, DeepseekConfig(model_type="deepseek_nsa", **SIZES, **NSA_SIZES))
    age = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    mask = ((age >= 0) & (age < WINDOW))[None, None]
    window = accuracy_after(STEPS, DeepseekConfig(model_type="llama", **SIZES), attention_mask=mask)
    assert nsa > 0.9
    assert window < 2 / NUM_VALUES
