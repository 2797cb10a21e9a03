"""transformers' continuous batching: many texts of different lengths share a forward pass and a paged cache."""

import pytest
import torch
from deepseek_repo.compat_deepseek import HAS_PAGED_CACHE
from tiny import MAIN_FAMILIES, make_model, make_tokens
from transformers import GenerationConfig

if HAS_PAGED_CACHE:
    from transformers import ContinuousBatchingConfig

needs_paged_cache = pytest.mark.skipif(not HAS_PAGED_CACHE, reason="came with transformers 5.19")

LENGTHS = (5, 1, 23, 11)
NEW_TOKENS = 12


def generate_batch(model, prompts, max_batch_tokens=16):
    """Greedy continuations in a batch so small that long prompts are read in parts while others are written on."""
    paging = ContinuousBatchingConfig(page_size=4, num_blocks=64, max_batch_tokens=max_batch_tokens)
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1)
    outputs = model.generate_batch(prompts, settings, paging, progress_bar=False)
    assert len(outputs) == len(prompts)
    assert not any(output.error for output in outputs.values()), [output.error for output in outputs.values()]
    return [output.generated_tokens for output in outputs.values()]


def generate_alone(model, prompt):
    tokens = torch.tensor([prompt])
    output = model.generate(tokens, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=2)
    return output[0, len(prompt) :].tolist()


CASES = [("llama", "sdpa"), ("v3", "sdpa"), ("v3", "eager")]
CASES += [
    pytest.param(family, attention, marks=pytest.mark.slow)
    for family in MAIN_FAMILIES
    for attention in ("sdpa", "eager")
    if (family, attention) not in CASES
]


@pytest.mark.compatibility("continuous batching")
@pytest.mark.parametrize(("family", "attention"), CASES)
def test_batched_texts_are_those_written_alone(family, attention, refused):
    model = make_model(family, attention=attention)
    if not HAS_PAGED_CACHE:
        with refused(ValueError, match=r"it came with 5\.19"):
            model.init_continuous_batching()
        return
    prompts = [make_tokens(1, length, seed=length)[0].tolist() for length in LENGTHS]
    expected = [generate_alone(model, prompt) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) == len(LENGTHS), "the texts are the same, nothing is compared"
    assert generate_batch(model, prompts) == expected


@needs_paged_cache
def test_latents_of_odd_width_and_lora():
    """The paged cache halves a latent, and a kv_b_proj with LoRA has no matrix of its own."""
    from finetune.lora import add_lora

    model = make_model("v3", kv_lora_rank=15)
    add_lora(model, targets=["attention"], rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    prompts = [make_tokens(1, length, seed=length)[0].tolist() for length in LENGTHS]
    assert generate_batch(model, prompts) == [generate_alone(model, prompt) for prompt in prompts]


@needs_paged_cache
def test_the_paged_cache_holds_latents():
    model = make_model("v3")
    manager = model.init_continuous_batching(continuous_batching_config=ContinuousBatchingConfig(num_blocks=8))
    cache = manager._create_batch_processor().cache
    config = model.config
    numbers = cache.bytes_per_sector * cache.num_sectors / cache.dtype.itemsize
    tokens = cache.num_blocks * manager.continuous_batching_config.page_size
    assert numbers / tokens == (config.kv_lora_rank + config.qk_rope_head_dim) * config.num_hidden_layers
    assert config.head_dim == config.qk_rope_head_dim, "the model's own config has changed"


@pytest.mark.compatibility("continuous batching")
@needs_paged_cache
@pytest.mark.parametrize("family", ["v32", "nsa"])
def test_sparse_attention_is_refused(family, refused):
    with refused(ValueError, match="paged cache"):
        make_model(family).init_continuous_batching()


@needs_paged_cache
def test_kernels_without_masks_are_refused():
    model = make_model("v3")
    with pytest.raises(ValueError, match="auto_switch_to_flash=False"):
        model(make_tokens(1, 4), cache=object(), attention_mask=None, use_cache=False)
