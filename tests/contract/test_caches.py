"""Every `cache_implementation` on every family: `generate` gives what the model without a cache gives, or says what to do."""

import pytest
import torch
from checks import assert_close
from deepseek_repo.compat_deepseek import CACHE_NAME, StaticIndexedLayer
from tiny import MAIN_FAMILIES, make_model, make_tokens
from transformers import CompileConfig, DynamicCache, StaticCache, cache_utils

SETTINGS = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
FAMILIES = (*MAIN_FAMILIES, "v32", "nsa")
# What a family does with it: works, or the words of the error.
NEEDS_CUDA = "is no CUDA device. Leave it out"
SPARSE = "sparse attention .* keeps more than keys and values. Leave it out, or say 'dynamic'"
EXPECTED = {
    "dynamic": {},
    "hybrid": {},  # transformers takes it for the default
    "static": {"nsa": SPARSE},
    "offloaded": {"v32": SPARSE, "nsa": SPARSE, "others": NEEDS_CUDA},
    "offloaded_static": {"v32": SPARSE, "nsa": SPARSE, "others": NEEDS_CUDA},
    "quantized": {"v32": SPARSE, "nsa": SPARSE},
}

needs_static_indexer = pytest.mark.skipif(StaticIndexedLayer is None, reason="came with transformers 5.11")


def plain_greedy(model, prompt: torch.Tensor) -> torch.Tensor:
    return model.generate(prompt, use_cache=False, **SETTINGS)


@pytest.mark.compatibility("every `cache_implementation`")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", EXPECTED)
def test_it_works_or_says_what_to_do(name, family, monkeypatch, refused):
    model, prompt = make_model(family), make_tokens(2, 24)
    refusal = EXPECTED[name].get(family, EXPECTED[name].get("others"))
    settings = {**SETTINGS, "cache_implementation": name}
    if refusal:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(model.model, "forward", lambda **_: pytest.fail("work was done"))
        with refused(ValueError, match=rf"`cache_implementation` is {name!r}.*{refusal}"):
            model.generate(prompt, **settings)
    elif name == "quantized":
        if not hasattr(cache_utils, "Fp8QuantizedLayer"):
            pytest.skip("this transformers quantises with other packages only")
        actual = model.generate(prompt, cache_config={"backend": "fp8"}, **settings)
        # the prompt itself is read without loss
        assert torch.equal(actual[:, :25], plain_greedy(model, prompt)[:, :25])
        assert actual.shape == (2, 34)
    elif name == "static" and family == "v32" and StaticIndexedLayer is None:
        with refused(ValueError, match=r"no static cache for an indexer's keys; it came with 5\.11"):
            model.generate(prompt, disable_compile=True, **settings)
    else:
        assert torch.equal(model.generate(prompt, disable_compile=True, **settings), plain_greedy(model, prompt))


@needs_static_indexer
@pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 7}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("length", [10, 40], ids=["from few tokens on", "from many"])
def test_selection_from_a_static_cache(settings, length):
    """Sixteen tokens are selected: with a prompt of 10 there is something to choose from the seventh token on."""
    model, prompt, mask = make_model("v32"), make_tokens(3, length), torch.ones(3, length, dtype=torch.long)
    prompt[1, :4], mask[1, :4] = 2, 0
    settings = {**SETTINGS, **settings, "attention_mask": mask}
    expected = model.generate(prompt, use_cache=False, **{**settings, "prefill_chunk_size": None})
    for _ in range(2):
        assert torch.equal(model.generate(prompt, cache_implementation="static", **settings), expected)


@needs_static_indexer
def test_a_static_cache_of_ones_own_is_used_again():
    model, tokens = make_model("v32"), make_tokens(2, 40)
    cache = StaticCache(config=model.config, max_cache_len=48)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        for _ in range(2):
            parts = [model(part, past_key_values=cache).logits for part in tokens.split([9, 11, 1, 18, 1], dim=1)]
            assert_close(torch.cat(parts, dim=1), expected)
            cache.reset()


def test_an_indexer_that_may_choose_is_not_compiled():
    for family, compiled in (("v3", True), ("v32", False)):
        model = make_model(family)
        config = model.generation_config
        config.compile_config = CompileConfig()
        kwargs = {CACHE_NAME: StaticCache(config=model.config, max_cache_len=8)}
        assert model._valid_auto_compile_criteria(kwargs, config) == compiled


def test_nsa_says_what_is_wrong_with_a_cache_of_ones_own():
    model, prompt = make_model("nsa"), make_tokens(1, 24)
    with pytest.raises(ValueError, match=r"StaticLayer`s, which have no room for what NSA caches. Pass an empty"):
        model(prompt, past_key_values=StaticCache(config=model.config, max_cache_len=48))
    model(prompt, past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("held", [20, 27])
@pytest.mark.parametrize(
    "settings", [{}, {"prefill_chunk_size": 4}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}]
)
def test_a_cache_that_holds_all_of_the_prompt_is_refused(family, held, settings):
    """The prompt, or its end, would be read once more behind itself."""
    model, tokens = make_model(family), make_tokens(1, 30)
    cache = model.prefill(tokens[:, :held], progress=False)
    with pytest.raises(ValueError, match=f"holds {held} tokens.* at least one must be new"):
        model.generate(tokens[:, :20], past_key_values=cache, max_new_tokens=2, **settings)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1])
def test_a_cache_of_an_interrupted_pass_is_refused(family, layer):
    """Later layers lack a token: one more would see another text there."""
    model, tokens = make_model(family), make_tokens(1, 20)
    cache = model.prefill(tokens[:, :12], progress=False)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[layer].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens[:, 12:13], past_key_values=cache)
    hook.remove()
    with pytest.raises(ValueError, match=r"hold 12 to 13 tokens.*interrupted"):
        model(tokens[:, 13:14], past_key_values=cache)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("held", [0, 12, 18, 19])
def test_a_mask_of_the_new_tokens_only_is_refused(family, held):
    """It would be taken for a mask of the first ones, and the rest for padding."""
    model, tokens = make_model(family), make_tokens(2, 20)
    cache = model.prefill(tokens[:, :held], progress=False) if held else None
    mask = torch.ones(2, 20 - held if held else 15, dtype=torch.long)
    with pytest.raises(ValueError, match=r"`attention_mask` has shape.* 20 tokens"):
        model(tokens[:, held:], attention_mask=mask, past_key_values=cache)
