"""`generate` with every cache and strategy gives what the model without a cache gives."""

import pytest
import torch
from checks import assert_close
from tiny import FAMILIES, MAIN_FAMILIES, make_model, make_tokens
from transformers import CompileConfig, StaticCache

SETTINGS = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}


@pytest.fixture(params=MAIN_FAMILIES)
def family(request):
    return request.param


def plain_greedy(model, prompt: torch.Tensor, count: int = 16) -> torch.Tensor:
    """The definition: run everything again for each token."""
    ids = prompt
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(dim=-1)), dim=1)
    return ids


@pytest.mark.compatibility("`generate`, greedy")
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_with_and_without_cache(name):
    model, prompt = make_model(name), make_tokens(2, 12)
    expected = plain_greedy(model, prompt)
    assert torch.equal(model.generate(prompt, **SETTINGS), expected)
    assert torch.equal(model.generate(prompt, use_cache=False, **SETTINGS), expected)


@pytest.mark.compatibility("chunked prefill, assisted decoding")
@pytest.mark.parametrize(
    "settings",
    [
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 5},
        {"prefill_chunk_size": 9},
        {"prefill_chunk_size": 9, "cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 3, "eos_token_id": -1},  # some versions want a number here
    ],
    ids=lambda settings: ",".join(f"{key}={value}" for key, value in settings.items() if key != "disable_compile"),
)
def test_greedy_strategies(family, settings):
    model, prompt = make_model(family), make_tokens(1, 30)
    prompt[:, 15:] = prompt[:, :15]  # something to look up
    expected = plain_greedy(model, prompt)
    actual = model.generate(prompt, **{**SETTINGS, **settings})
    # transformers 5.6 gives one token more than it was asked for when drafts were accepted at the end
    assert torch.equal(actual[:, : expected.shape[1]], expected)


def test_static_cache_in_batches(family):
    model, prompt = make_model(family), make_tokens(3, 12)
    actual = model.generate(prompt, cache_implementation="static", disable_compile=True, **SETTINGS)
    assert torch.equal(actual, plain_greedy(model, prompt))


@pytest.mark.compatibility("`generate`, left-padded batch")
@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static", "disable_compile": True}])
def test_left_padded_batch(family, settings):
    model, prompt, mask = make_model(family), make_tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    prompt[1, :9], mask[1, :9] = 2, 0
    actual = model.generate(prompt, attention_mask=mask, **SETTINGS, **settings)
    assert torch.equal(actual[:1], plain_greedy(model, prompt[:1]))
    assert torch.equal(actual[1:, 9:], plain_greedy(model, prompt[1:, 9:]))


@pytest.mark.compatibility("`generate`, beams")
@pytest.mark.parametrize("prefill_chunk_size", [None, 9])
def test_beam_search(family, prefill_chunk_size):
    model, prompt = make_model(family), make_tokens(2, 20)
    settings = {**SETTINGS, "num_beams": 3, "num_return_sequences": 2}
    expected = model.generate(prompt, use_cache=False, **settings)
    assert torch.equal(model.generate(prompt, prefill_chunk_size=prefill_chunk_size, **settings), expected)
    assert not torch.equal(expected[::2, :36], plain_greedy(model, prompt)), "beams never left the greedy path"


@pytest.mark.compatibility("`generate`, sampling")
def test_sampling_uses_the_same_logits(family):
    model, prompt = make_model(family), make_tokens(2, 12)
    settings = {**SETTINGS, "do_sample": True, "top_k": 0}
    torch.manual_seed(0)
    expected = model.generate(prompt, use_cache=False, **settings)
    torch.manual_seed(0)
    assert torch.equal(model.generate(prompt, **settings), expected)
    assert not torch.equal(expected, plain_greedy(model, prompt))


@pytest.mark.compatibility("`generate` from a cache")
def test_going_on_from_a_cache(family):
    """A chat: the next turn (longer than MLA's absorbed limit) is generated from the cache of the last."""
    model, prompt, turn = make_model(family), make_tokens(1, 12), make_tokens(1, 11, seed=1)
    first = model.generate(prompt, return_dict_in_generate=True, **SETTINGS)
    longer = torch.cat((first.sequences, turn), dim=1)
    actual = model.generate(longer, past_key_values=first.past_key_values, **SETTINGS)
    assert torch.equal(actual, plain_greedy(model, longer))


@pytest.mark.compatibility("`generate` from embeddings")
def test_generate_from_embeddings(family):
    model, prompt = make_model(family), make_tokens(2, 12)
    embeds = model.get_input_embeddings()(prompt)
    assert torch.equal(model.generate(inputs_embeds=embeds, **SETTINGS), plain_greedy(model, prompt)[:, 12:])


def test_generate_in_training_mode(family):
    """Samples drawn between training steps (as in reinforcement learning) do not differ."""
    model, prompt = make_model(family).train(), make_tokens(2, 12)
    actual = model.generate(prompt, **SETTINGS)
    assert torch.equal(actual, plain_greedy(model.eval(), prompt))


@pytest.mark.slow
def test_a_compile_config_compiles_the_step_on_cpus_too(family):
    """Which transformers leaves out there without it."""
    model, prompt, graphs = make_model(family), make_tokens(2, 12), []
    expected = plain_greedy(model, prompt)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    assert torch.equal(model.generate(prompt, cache_implementation="static", **SETTINGS), expected)
    assert not graphs
    config = CompileConfig(backend=backend, mode="default")
    actual = model.generate(prompt, cache_implementation="static", compile_config=config, **SETTINGS)
    assert graphs
    assert torch.equal(actual, expected)


@pytest.mark.compatibility("`generate`, compiled by Inductor on a CPU")
@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
def test_compiled_on_a_cpu(family, rows):
    """Products of few rows are other ones there. The second length makes the compiler take lengths as variables."""
    model = make_model(family)
    torch.compiler.reset()
    options = {"cache_implementation": "static", "compile_config": CompileConfig(fullgraph=True), **SETTINGS}
    for length in (12, 19, 33):
        prompt = make_tokens(rows, length)
        assert torch.equal(model.generate(prompt, **options), plain_greedy(model, prompt))


@pytest.mark.compatibility("`generate`, compiled, static cache")
@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_compiled_static_decode(family, padded):
    """`generate` compiles the step over a static cache where there is an accelerator; the same step by hand."""
    model, tokens, mask = make_model(family), make_tokens(2, 20), torch.ones(2, 40, dtype=torch.long)
    model.set_experts_implementation("grouped_mm")  # the loop of "eager" cannot be one graph
    mask[1, :5] = 0 if padded else 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    torch.compiler.reset()
    step = torch.compile(model, fullgraph=True, dynamic=False)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask[:, :20], position_ids=positions[:, :20], use_cache=False).logits
        cache = StaticCache(config=model.config, max_cache_len=40)
        logits = [
            model(
                tokens[:, :15], attention_mask=mask[:, :15], position_ids=positions[:, :15], past_key_values=cache
            ).logits
        ]
        for t in range(15, 20):
            # As `generate` does: the mask is made outside the compiled step, with the step's full width.
            inputs = model.prepare_inputs_for_generation(
                tokens[:, : t + 1],
                next_sequence_length=1,
                past_key_values=cache,
                attention_mask=mask[:, : t + 1],
                position_ids=positions[:, : t + 1],
                use_cache=True,
            )
            logits.append(step(**inputs).logits)
    actual = torch.cat(logits, dim=1)
    real = mask[:, :20].bool()
    assert_close(actual[real], expected[real])
