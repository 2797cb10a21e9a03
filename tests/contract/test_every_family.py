"""What holds for every row of the table in tiny.py: shapes, caches, padding, kernels, saving, heads."""

import copy
import json

import pytest
import torch
from checks import assert_close, assert_gradients_close, gradients
from deepseek_repo import mla_deepseek
from deepseek_repo.modeling_deepseek import DeepseekForCausalLM
from tiny import FAMILIES, MAIN_FAMILIES, MLA_FAMILIES, MOE_FAMILIES, make_model, make_tokens
from transformers import (
    DeepseekV3ForSequenceClassification,
    DeepseekV3ForTokenClassification,
    DynamicCache,
    LlamaForQuestionAnswering,
    StaticCache,
)

ABSORBED_LIMIT = 7  # max_absorbed_tokens of tiny.py's MLA


@pytest.fixture(params=MAIN_FAMILIES)
def family(request):
    return request.param


@pytest.fixture(autouse=True)
def _no_grad(request):
    with torch.set_grad_enabled("train" in request.function.__name__):
        yield


# Forward


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_and_dtypes(name):
    model = make_model(name)
    outputs = model(make_tokens(2, 9))
    assert outputs.logits.shape == (2, 9, 128)
    assert outputs.logits.dtype == torch.float32
    assert outputs.past_key_values.get_seq_length() == 9
    assert outputs.loss is outputs.aux_loss is outputs.mtp_loss is None
    states = model.model(make_tokens(2, 9)).last_hidden_state
    assert_close(model.lm_head(states), outputs.logits, "lm_head of the last states")


@pytest.mark.compatibility("`logits_to_keep`")
@pytest.mark.parametrize("kept", [1, 4, torch.tensor([0, 5, 7])], ids=["1", "4", "indices"])
def test_logits_to_keep(family, kept):
    model, tokens = make_model(family), make_tokens(2, 9)
    expected = model(tokens).logits[:, -kept:] if isinstance(kept, int) else model(tokens).logits[:, kept]
    assert_close(model(tokens, logits_to_keep=kept).logits, expected)


@pytest.mark.compatibility("`inputs_embeds`")
def test_inputs_embeds(family):
    model, tokens = make_model(family), make_tokens(2, 9)
    embeds = model.get_input_embeddings()(tokens)
    assert_close(model(inputs_embeds=embeds).logits, model(tokens).logits)


def test_tuple_outputs(family):
    model, tokens = make_model(family), make_tokens(1, 6)
    loss, logits, *_ = model(tokens, labels=tokens, return_dict=False)
    assert_close(loss, model(tokens, labels=tokens).loss)
    assert_close(logits, model(tokens).logits)


@pytest.mark.compatibility("eager and SDPA attention")
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_sdpa_agrees_with_eager(family, padded):
    compare_with_eager(family, "sdpa", padded)


@pytest.mark.compatibility("FlexAttention")
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize(
    "family", [name if name == "v3" else pytest.param(name, marks=pytest.mark.slow) for name in MAIN_FAMILIES]
)
def test_flex_attention_agrees_with_eager(family, padded):
    """Slow, since it compiles a kernel for each family."""
    try:
        compare_with_eager(family, "flex_attention", padded)
    except ValueError as error:
        if "non power of 2 embedding dimension" not in str(error):
            raise
        pytest.skip("this PyTorch's FlexAttention wants widths that are powers of two")


def compare_with_eager(family, attention, padded):
    tokens, mask = make_tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0 if padded else 1
    expected = make_model(family, attention="eager")(tokens, attention_mask=mask).logits
    actual = make_model(family, attention=attention)(tokens, attention_mask=mask).logits
    assert_close(actual[mask.bool()], expected[mask.bool()], attention)


@pytest.mark.compatibility("hidden states and attention maps")
def test_recorded_outputs(family):
    model, tokens = make_model(family, attention="eager"), make_tokens(2, 9)
    outputs = model(tokens, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    layers = model.config.num_hidden_layers
    assert len(outputs.hidden_states) == layers + 1
    assert_close(outputs.hidden_states[0], model.model.embed_tokens(tokens))
    assert_close(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    assert [tuple(probs.shape) for probs in outputs.attentions] == [(2, 4, 9, 9)] * layers
    for probs in outputs.attentions:
        assert_close(probs.sum(dim=-1), torch.ones(2, 4, 9), "sums of probabilities")
        assert probs.triu(1).abs().max() == 0, "a token sees a later one"
    sparse = model.config.mlp_layer_types.count("sparse")
    assert len(outputs.router_logits or ()) == sparse
    assert all(logits.shape == (18, 8) for logits in outputs.router_logits or ())


@pytest.mark.parametrize("chunk", [1, ABSORBED_LIMIT, ABSORBED_LIMIT + 3])
def test_attentions_over_a_cached_past(family, chunk):
    model, tokens = make_model(family, attention="eager"), make_tokens(1, 9 + chunk)
    expected = model(tokens, output_attentions=True, use_cache=False).attentions
    cache = model(tokens[:, :9]).past_key_values
    actual = model(tokens[:, 9:], past_key_values=cache, output_attentions=True).attentions
    assert len(actual) == len(expected)
    for new, whole in zip(actual, expected, strict=True):
        assert_close(new, whole[:, :, 9:], "probabilities")


# Caches


@pytest.mark.compatibility("growing cache")
@pytest.mark.parametrize("chunk", [1, 3, ABSORBED_LIMIT, ABSORBED_LIMIT + 1, 20])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cached_chunks_equal_the_full_forward(family, chunk, attention):
    model, tokens = make_model(family, attention=attention), make_tokens(2, 31)
    expected = model(tokens, use_cache=False).logits
    cache, logits = DynamicCache(config=model.config), []
    for part in tokens.split(chunk, dim=1):
        logits.append(model(part, past_key_values=cache).logits)
    assert cache.get_seq_length() == 31
    assert_close(torch.cat(logits, dim=1), expected)


@pytest.mark.parametrize("family", MLA_FAMILIES)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_several_blocks(family, padded, monkeypatch):
    """Blocks have 128 keys at least; with padding of 140 tokens the whole first block of a row is hidden."""
    monkeypatch.setattr(mla_deepseek, "_BLOCK_BYTES", 1)
    model, tokens, mask = make_model(family), make_tokens(2, 290), torch.ones(2, 290, dtype=torch.long)
    mask[1, :140] = 0 if padded else 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    calls = spy(monkeypatch, "_blockwise")
    cache = model(tokens[:, :270], attention_mask=mask[:, :270], position_ids=positions[:, :270]).past_key_values
    actual = model(tokens[:, 270:], attention_mask=mask, position_ids=positions[:, 270:], past_key_values=cache).logits
    assert len(calls) == model.config.num_hidden_layers
    assert_close(actual, expected[:, 270:])


@pytest.mark.parametrize("family", MLA_FAMILIES)
@pytest.mark.parametrize(("length", "form"), [(ABSORBED_LIMIT, "_absorbed"), (ABSORBED_LIMIT + 1, "_blockwise")])
def test_cheapest_form_is_chosen(family, length, form, monkeypatch):
    model = make_model(family)
    assert model.model.layers[0].self_attn.max_absorbed_tokens == ABSORBED_LIMIT
    cache = model(make_tokens(1, 5)).past_key_values
    calls = spy(monkeypatch, form)
    model(make_tokens(1, length), past_key_values=cache)
    assert len(calls) == model.config.num_hidden_layers


@pytest.mark.parametrize("family", MLA_FAMILIES)
@pytest.mark.parametrize("float_mask", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_three_forms_of_mla(family, float_mask, dtype, monkeypatch):
    """One attention module, the same 200 tokens: expanded, absorbed, and in blocks of 128 keys."""
    monkeypatch.setattr(mla_deepseek, "_BLOCK_BYTES", 1)
    model = make_model(family, attention="eager").to(dtype)
    attention = model.model.layers[0].self_attn
    states = torch.randn(2, 200, model.config.hidden_size, dtype=dtype)
    embeddings = model.model.rotary_emb(states, torch.arange(200)[None])
    visible = torch.ones(200, 200, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    visible[1, :, :, 5:9] = torch.eye(200, dtype=torch.bool)[:, 5:9]  # hidden from all but themselves
    added = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    expected, probs, _ = attention(states, embeddings, added)
    for form, limit in (("_absorbed", 200), ("_blockwise", 199)):
        attention.max_absorbed_tokens = limit
        calls = spy(monkeypatch, form)
        mask, cache = added if float_mask else visible, DynamicCache(config=model.config)
        actual, actual_probs, _ = attention(states, embeddings, mask, past_key_values=cache, has_past=True)
        assert calls == [0]
        tolerance = 1e-6 if dtype == torch.float64 else 1e-4  # blockwise sums in float32 always
        assert_close(actual, expected, form, atol=tolerance)
        if form == "_absorbed":
            assert_close(actual_probs, probs, "probabilities", atol=tolerance)


@pytest.mark.compatibility("static cache")
@pytest.mark.parametrize("chunk", [1, ABSORBED_LIMIT + 1])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_static_cache(family, chunk, attention):
    model, tokens = make_model(family, attention=attention), make_tokens(2, 30)
    expected = model(tokens, use_cache=False).logits
    cache, logits = StaticCache(config=model.config, max_cache_len=40), []
    for part in (tokens[:, :14], *tokens[:, 14:].split(chunk, dim=1)):
        logits.append(model(part, past_key_values=cache).logits)
    assert int(cache.get_seq_length()) == 30
    assert_close(torch.cat(logits, dim=1), expected)


@pytest.mark.parametrize(
    ("make_cache", "whole_mask"),
    [(DynamicCache, False), (StaticCache, False), (StaticCache, True)],
    ids=["dynamic", "static", "static, mask over all of the cache"],
)
def test_padded_cached_decode(family, make_cache, whole_mask):
    """Left-padded rows over a cache, as `generate` runs them: prompt, single tokens, then a long chunk."""
    model, tokens, mask = make_model(family), make_tokens(2, 30), torch.ones(2, 36, dtype=torch.long)
    mask[1, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    alone = model(tokens[1:, 5:], use_cache=False).logits
    cache = make_cache(config=model.config, **({} if make_cache is DynamicCache else {"max_cache_len": 36}))
    logits = []
    for start, end in ((0, 15), (15, 16), (16, 17), (17, 30)):
        logits.append(
            model(
                tokens[:, start:end],
                attention_mask=mask if whole_mask else mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
            ).logits
        )
    assert_close(torch.cat(logits, dim=1)[1:, 5:], alone)


@pytest.mark.compatibility("cutting a cache back")
def test_crop_and_go_on(family):
    model, tokens = make_model(family), make_tokens(1, 20)
    cache = model(tokens).past_key_values
    for removed in (3, 12):  # again and again, as assisted generation does
        cache.crop(-removed)
        length = cache.get_seq_length()
        other = make_tokens(1, removed, seed=removed)
        expected = model(torch.cat((tokens[:, :length], other), dim=1), use_cache=False).logits[:, length:]
        assert_close(model(other, past_key_values=cache).logits, expected)


@pytest.mark.compatibility("training through a cached past")
@pytest.mark.parametrize("chunk", [1, ABSORBED_LIMIT, ABSORBED_LIMIT + 1])
def test_training_through_a_cached_past(family, chunk):
    """Gradients of the last tokens' loss, also those that reach the past through the cache."""
    tokens, results = make_tokens(2, 10 + chunk), []
    for cached in (False, True):
        model = make_model(family)
        if cached:
            cache = model(tokens[:, :10], use_cache=True).past_key_values
            logits = model(tokens[:, 10:], past_key_values=cache).logits
        else:
            logits = model(tokens, use_cache=False).logits[:, 10:]
        logits.square().mean().backward()
        results.append((logits, gradients(model)))
    assert_close(results[1][0], results[0][0])
    assert_gradients_close(results[1][1], results[0][1])


def test_copied_cache_is_independent(family):
    """A prompt's cache, copied for each of its continuations."""
    model, prompt = make_model(family), make_tokens(1, 10)
    cache = model(prompt).past_key_values
    for seed in (1, 2):
        other = make_tokens(1, 6, seed=seed)
        expected = model(torch.cat((prompt, other), dim=1), use_cache=False).logits[:, 10:]
        mine = copy.deepcopy(cache)
        actual = [model(token, past_key_values=mine).logits for token in other.split(1, dim=1)]
        assert_close(torch.cat(actual, dim=1), expected)
    assert cache.get_seq_length() == 10


def test_cached_numbers_for_each_token(family):
    model = make_model(family)
    cache, config = model(make_tokens(2, 11)).past_key_values, model.config
    expected = (
        config.kv_lora_rank + config.qk_rope_head_dim
        if config.has_latent
        else 2 * config.num_key_value_heads * config.head_dim
    )
    assert len(cache.layers) == config.num_hidden_layers
    for layer in cache.layers:
        assert (layer.keys.numel() + layer.values.numel()) == 2 * 11 * expected


@pytest.mark.parametrize("family", MLA_FAMILIES)
def test_kv_b_proj_of_another_class(family):
    """With LoRA or quantised weights the absorbed form cannot read the matrix; it asks the module."""

    class Scaled(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear, self.scale = linear, 1.5

        def forward(self, x):
            return self.scale * self.linear(x)

    model, tokens = make_model(family), make_tokens(2, 14)
    before = model(tokens, use_cache=False).logits
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = Scaled(layer.self_attn.kv_b_proj)
    static = StaticCache(config=model.config, max_cache_len=16)
    for scale in (1.5, 0.5):  # the module may change between two texts, as in training
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj.scale = scale
        expected = model(tokens, use_cache=False).logits
        assert (expected - before).abs().max() > 0.01
        static.reset()
        for cache in (DynamicCache(config=model.config), static):
            parts = [model(part, past_key_values=cache).logits for part in tokens.split([9, 1, 4], dim=1)]
            assert_close(torch.cat(parts, dim=1), expected)


# Rows


@pytest.mark.compatibility("left-padded batches")
def test_left_padding(family):
    model, tokens, mask = make_model(family), make_tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
    tokens[1, :4], mask[1, :4] = 2, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(tokens, attention_mask=mask, position_ids=positions).logits
    assert_close(padded[:1], model(tokens[:1]).logits, "the full row")
    assert_close(padded[1:, 4:], model(tokens[1:, 4:]).logits, "the padded row")


def test_batch_equals_single_rows(family):
    model, tokens = make_model(family), make_tokens(5, 12)
    single = torch.cat([model(row[None]).logits for row in tokens])
    assert_close(model(tokens).logits, single)


def test_later_tokens_do_not_matter(family):
    model, tokens = make_model(family), make_tokens(1, 12)
    changed = tokens.clone()
    changed[:, 7:] = make_tokens(1, 5, seed=1)
    before, after = model(tokens).logits, model(changed).logits
    assert_close(after[:, :7], before[:, :7])
    assert (after[:, 7:] - before[:, 7:]).abs().max() > 0.1


# Copies and precision


@pytest.mark.compatibility("save and load")
@pytest.mark.parametrize("name", FAMILIES)
def test_save_and_load_is_bit_equal(name, tmp_path):
    model = make_model(name)
    model.save_pretrained(tmp_path)
    loaded, report = DeepseekForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected, actual = model.state_dict(), loaded.state_dict()
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key
    assert torch.equal(loaded(make_tokens(1, 8)).logits, model(make_tokens(1, 8)).logits)
    assert loaded.config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(tmp_path)}


@pytest.mark.compatibility("shards")
@pytest.mark.parametrize("name", FAMILIES)
def test_saved_shards(name, tmp_path):
    """A checkpoint in many files, as the published ones."""
    model = make_model(name)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = DeepseekForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(make_tokens(1, 8)).logits, model(make_tokens(1, 8)).logits)


@pytest.mark.compatibility("`copy.deepcopy`")
def test_deepcopy(family):
    model, tokens = make_model(family), make_tokens(1, 8)
    expected = model(tokens).logits
    twin = copy.deepcopy(model)
    twin.get_input_embeddings().weight.zero_()
    assert torch.equal(model(tokens).logits, expected)
    assert not torch.equal(twin(tokens).logits, expected)


@pytest.mark.compatibility("tied embeddings")
def test_tied_embeddings(family, tmp_path):
    model, tokens = make_model(family, tie_word_embeddings=True), make_tokens(1, 8)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = DeepseekForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.compatibility("resized embeddings")
@pytest.mark.parametrize("size", [140, 100])
def test_resized_embeddings(family, size, tmp_path):
    model, tokens = make_model(family), make_tokens(1, 8, vocab_size=100)
    expected = model(tokens).logits
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == size
    logits = model(tokens).logits
    assert logits.shape[-1] == size
    assert_close(logits[..., :100], expected[..., :100])
    model(tokens, labels=tokens)
    model.save_pretrained(tmp_path)
    assert torch.equal(DeepseekForCausalLM.from_pretrained(tmp_path)(tokens).logits, logits)


@pytest.mark.compatibility("bfloat16 weights")
def test_bfloat16(family):
    """bfloat16 has 8 bits: single logits differ, and a token may get another expert. The whole must stay close."""
    tokens = make_tokens(2, 20)
    expected = make_model(family)(tokens).logits
    model = make_model(family).to(torch.bfloat16)
    logits = model(tokens).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    cosine = torch.nn.functional.cosine_similarity(logits.float(), expected, dim=-1)
    assert cosine.median() > 0.995, f"median cosine {cosine.median():.4f}, least {cosine.min():.4f}"


@pytest.mark.compatibility("bfloat16 weights")
@pytest.mark.parametrize("chunk", [1, ABSORBED_LIMIT + 1])
def test_bfloat16_cached_decode(family, chunk):
    model, tokens = make_model(family).to(torch.bfloat16), make_tokens(2, 30)
    expected = model(tokens, use_cache=False).logits
    cache = model(tokens[:, :14]).past_key_values
    logits = torch.cat([model(part, past_key_values=cache).logits for part in tokens[:, 14:].split(chunk, 1)], dim=1)
    assert logits.dtype == torch.bfloat16
    cosine = torch.nn.functional.cosine_similarity(logits.float(), expected[:, 14:].float(), dim=-1)
    assert cosine.median() > 0.995, f"median cosine {cosine.median():.4f}, least {cosine.min():.4f}"


@pytest.mark.compatibility("`batched_mm`, `grouped_mm` experts")
@pytest.mark.parametrize("family", MOE_FAMILIES)
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_expert_implementations_agree(family, implementation):
    model, tokens = make_model(family), make_tokens(2, 20)
    model.set_experts_implementation("eager")
    expected = model(tokens).logits
    model.set_experts_implementation(implementation)
    assert_close(model(tokens).logits, expected, implementation)


# Heads


@pytest.mark.parametrize(
    ("head", "native"),
    [
        ("ForSequenceClassification", DeepseekV3ForSequenceClassification),
        ("ForTokenClassification", DeepseekV3ForTokenClassification),
    ],
)
def test_classification_equals_native(head, native, tmp_path):
    ours = make_model("v3", head=head, num_labels=3)
    ours.save_pretrained(tmp_path)
    reference = native.from_pretrained(tmp_path).eval()
    tokens, mask = make_tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    tokens[1, 9:], mask[1, 9:] = 2, 0
    actual, expected = (model(tokens, attention_mask=mask).logits for model in (ours, reference))
    assert actual.shape == ((2, 3) if head == "ForSequenceClassification" else (2, 12, 3))
    rows = slice(None) if head == "ForSequenceClassification" else mask.bool()
    assert_close(actual[rows], expected[rows])


@pytest.mark.compatibility("sequence and token classification")
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
def test_classification_trains(family, head):
    model, tokens = make_model(family, head=head, num_labels=3).train(), make_tokens(6, 10)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    labels = labels if head == "ForSequenceClassification" else labels[:, None].expand(6, 10).contiguous()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(20):
        loss = model(tokens, labels=labels).loss
        loss.backward()
        unused = {name for name, p in model.named_parameters() if p.grad is None}
        assert all("layers.3." in name for name in unused), unused  # multi-token prediction is for language models
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], losses


def test_question_answering_equals_native(tmp_path):
    ours = make_model("llama", head="ForQuestionAnswering")
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForQuestionAnswering"]
    reference, report = LlamaForQuestionAnswering.from_pretrained(
        tmp_path, key_mapping={"^model": "transformer"}, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens, mask = make_tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    tokens[1, 9:], mask[1, 9:] = 2, 0
    places = {"start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([3, 4])}
    actual, expected = (model(tokens, attention_mask=mask, **places) for model in (ours, reference.eval()))
    assert_close(actual.loss, expected.loss, "loss")
    for name in ("start_logits", "end_logits"):
        assert actual[name].shape == (2, 12)
        assert_close(actual[name][mask.bool()], expected[name][mask.bool()], name)


@pytest.mark.compatibility("question answering")
def test_question_answering_trains(family):
    model, tokens = make_model(family, head="ForQuestionAnswering").train(), make_tokens(6, 10)
    starts = torch.tensor([0, 1, 2, 3, 4, 5])
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(20):
        loss = model(tokens, start_positions=starts, end_positions=starts + 2).loss
        loss.backward()
        unused = {name for name, p in model.named_parameters() if p.grad is None}
        assert all("layers.3." in name for name in unused), unused  # multi-token prediction is for language models
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], losses


def spy(monkeypatch, method: str) -> list:
    """Counts the calls of a method of DeepseekMLA."""
    calls, original = [], getattr(mla_deepseek.DeepseekMLA, method)

    def counted(self, *args, **kwargs):
        calls.append(self.layer_idx)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(mla_deepseek.DeepseekMLA, method, counted)
    return calls
