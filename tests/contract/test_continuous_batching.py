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


def pages_of(model, run) -> dict:
    """The sizes of the paged cache that `run` makes for the model."""
    sizes, init = {}, model.init_continuous_batching

    def watched(*args, **kwargs):
        manager = init(*args, **kwargs)
        create = manager._create_batch_processor

        def create_and_look():
            processor = create()
            paging = manager.continuous_batching_config
            sizes.update(pages=processor.cache.num_blocks, page=paging.page_size, batch=paging.max_batch_tokens)
            return processor

        manager._create_batch_processor = create_and_look
        return manager

    model.init_continuous_batching = watched
    run(model)
    return sizes


@needs_paged_cache
@pytest.mark.parametrize("family", ["llama", "v3"])
def test_the_paged_cache_is_sized_by_the_requests(family):
    """Four texts of 300 + 12 tokens take two pages of 256 each, a quarter more to begin while the cache fills up."""
    model = make_model(family, max_position_embeddings=512)
    prompts = [make_tokens(1, length, seed=length)[0].tolist() for length in (*LENGTHS[:3], 300)]
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1)
    written = []
    sizes = pages_of(model, lambda model: written.extend(model.generate_batch(prompts, settings).values()))
    assert sizes["page"] == 256
    assert 8 <= sizes["pages"] <= 12
    assert sizes["batch"] == 1024
    assert [output.generated_tokens for output in written] == [generate_alone(model, prompt) for prompt in prompts]


@needs_paged_cache
def test_more_texts_than_are_written_at_once():
    model, written = make_model("v3"), []
    prompts = [make_tokens(1, 3 + seed % 5, seed=seed)[0].tolist() for seed in range(40)]
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1)
    sizes = pages_of(model, lambda model: written.extend(model.generate_batch(prompts, settings).values()))
    assert sizes["pages"] <= 42
    for prompt, output in zip(prompts, written, strict=True):
        tokens = model.generate(
            torch.tensor([prompt]), max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=2
        )
        assert output.generated_tokens == tokens[0, len(prompt) :].tolist()


@needs_paged_cache
def test_the_paged_cache_for_requests_that_are_yet_to_come():
    """On a CPU four texts of the model's context; what the user says stays, whichever of the sizes it is."""
    model = make_model("v3", max_position_embeddings=1024)
    create = lambda **said: pages_of(  # noqa: E731
        model,
        lambda model: model.init_continuous_batching(
            continuous_batching_config=ContinuousBatchingConfig(**said)
        )._create_batch_processor(),
    )
    assert create()["pages"] in (21, 22)
    assert create(max_requests_per_batch=1)["pages"] in (6, 7)
    assert create(num_blocks=9)["pages"] == 9
    assert create(max_batch_tokens=64)["batch"] == 64


@needs_paged_cache
def test_a_paged_cache_that_does_not_fit_is_sized_by_memory():
    """A context that no machine has room for."""
    model, failed = make_model("v3", max_position_embeddings=2**31 - 1), []
    manager_class = type(model.init_continuous_batching())
    create = manager_class._create_batch_processor

    def create_small(self):
        failed.append(self.continuous_batching_config.num_blocks)
        if failed[-1] is not None:
            return create(self)
        self.continuous_batching_config.num_blocks = 7
        return create(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager_class, "_create_batch_processor", create_small)
        manager = model.init_continuous_batching()
        assert manager._create_batch_processor().cache.num_blocks == 7
    assert failed[0] > 2**25
    assert failed[1] is None


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
