"""What people put around a model: states loaded back, compilers, mixed precision, wrappers, pickles, cut labels."""

import copy
import functools
import io
import json
import pickle
import re
import shutil

import accelerate
import peft
import pytest
import torch
from checks import ROOT, assert_close
from deepseek_repo.attention_deepseek import eager_attention_forward
from deepseek_repo.compat_deepseek import StaticIndexedLayer
from safetensors.torch import load_file
from tiny import FAMILIES, make_model, make_tokens
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

MOE = tuple(name for name in FAMILIES if make_model(name).config.mlp_layer_types.count("sparse"))
MTP = ("v3", "v3_mtp2", "v32")


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


# States


def saved(model, folder) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.compatibility("`load_state_dict` of saved files")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_the_state_of_the_files_is_loaded(family, strict, assign, tmp_path):
    """As a Trainer does with the best checkpoint, or the one that it resumes from."""
    model, state = make_model(family), saved(make_model(family, seed=1), tmp_path)
    expected = make_model(family, seed=1)
    tokens = make_tokens(2, 12)
    assert not torch.equal(model(tokens).logits, expected(tokens).logits)
    report = model.load_state_dict(state, strict=strict, assign=assign)
    assert not report.missing_keys
    assert not report.unexpected_keys
    assert torch.equal(model(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize("family", MOE)
def test_parts_of_a_state(family, tmp_path):
    """Two shards, each with some of the experts of a layer, make a whole; one alone says what is missing."""
    model, state = make_model(family), saved(make_model(family, seed=1), tmp_path)
    first = {name: weight for i, (name, weight) in enumerate(state.items()) if i % 2}
    absent = {name for name in state if name not in first}
    with pytest.raises(RuntimeError, match=r"mlp\.experts\.\d+\."):
        copy.deepcopy(model).load_state_dict(first, strict=True)
    assert set(model.load_state_dict(first, strict=False).missing_keys) == absent
    model.load_state_dict({name: state[name] for name in absent}, strict=False)
    tokens = make_tokens(2, 12)
    assert torch.equal(model(tokens).logits, make_model(family, seed=1)(tokens).logits)


def test_an_expert_of_another_shape_is_named(tmp_path):
    model, state = make_model("v3"), saved(make_model("v3"), tmp_path)
    name = next(name for name in state if ".experts.3.down_proj" in name)
    with pytest.raises(RuntimeError, match=r"experts\.3\.down_proj\.weight has shape \(5, 5\)"):
        model.load_state_dict(state | {name: torch.zeros(5, 5)})


@pytest.mark.compatibility("`load_checkpoint_in_model` with a `device_map`")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_accelerate_loads_into_a_live_model_by_the_names_of_the_files(family, tmp_path, caplog, refused):
    """A `device_map` makes it go by module names, which stacked experts do not have: it says so in a warning, and fails
    with `strict=True`. Experts that are modules are found."""
    expected, tokens, where = make_model(family, seed=1), make_tokens(2, 12), {"device_map": {"": "cpu"}}
    expected.save_pretrained(tmp_path)
    if family in MOE:
        model = make_model(family)
        with refused(AttributeError, match="'DeepseekExperts' object has no attribute '0'"):
            accelerate.load_checkpoint_in_model(model, tmp_path, strict=True, **where)
        accelerate.load_checkpoint_in_model(model, tmp_path, **where)
        assert re.search(r"were not used when initializing .*mlp\.experts\.\d+\.", caplog.text)
    separate = {"separate_experts": True} if family in MOE else {}
    model = make_model(family, **separate)
    accelerate.load_checkpoint_in_model(model, tmp_path, strict=True, **where)
    assert_close(model(tokens).logits, expected(tokens).logits, "logits")


@pytest.mark.compatibility("truncated test models")
@pytest.mark.parametrize("family", MTP)
def test_plain_weights_are_not_saved_as_fp8(family, tmp_path):
    """A small model made from a published config, which says FP8, has no scales: other engines would look for them."""
    model, tokens = make_model(family), make_tokens(2, 12)
    model.config.quantization_config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(type(model).from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


@pytest.mark.compatibility("truncated test models")
@pytest.mark.parametrize("family", MTP)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_truncated_model_takes_no_layer_for_a_prediction_module(family, num_layers, tmp_path):
    whole, tokens = make_model(family), make_tokens(2, 12)
    whole.save_pretrained(tmp_path)
    model = type(whole).from_pretrained(tmp_path, num_hidden_layers=num_layers)
    assert model.config.num_nextn_predict_layers == 0
    assert len(model.model.layers) == num_layers
    states = model(tokens, output_hidden_states=True).hidden_states[:num_layers]
    for actual, expected in zip(states, whole(tokens, output_hidden_states=True).hidden_states, strict=False):
        assert_close(actual, expected, "states")
    outputs = model.train()(tokens, labels=tokens)
    assert outputs.mtp_loss is None


@pytest.mark.parametrize("family", ["v3", "v3_mtp2"])
def test_one_file_goes_before_older_shards(family, tmp_path):
    """As for transformers: a folder into which a model was saved again has both."""
    model, tokens = make_model(family, seed=1), make_tokens(2, 12)
    make_model(family).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "single")
    for file in (tmp_path / "shards").glob("*.safetensors*"):
        shutil.copy(file, tmp_path / "single")
    loaded = type(model).from_pretrained(tmp_path / "single")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    for file in (tmp_path / "single").glob("model-0*"):
        file.unlink()  # what the index names need not be there
    assert type(model).from_pretrained(tmp_path / "single").config.num_nextn_predict_layers


@pytest.mark.compatibility("`pickle`, `torch.save`, copies")
def test_models_are_pickled(family):
    model, tokens = make_model(family), make_tokens(2, 12)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert torch.equal(other(tokens).logits, model(tokens).logits)


def test_a_router_trained_beside_lora_is_corrected_once():
    model = make_model("v3", num_nextn_predict_layers=0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"], modules_to_save=["mlp.gate"]))
    tokens = make_tokens(2, 12)
    wrapped.train()(input_ids=tokens, labels=tokens)
    routers = [m for name, m in wrapped.named_modules() if name.endswith("mlp.gate.modules_to_save.default")]
    assert routers
    before = [(router.expert_load.clone(), router.e_score_correction_bias.clone()) for router in routers]
    model.update_router_bias(0.5)
    for router, (load, bias) in zip(routers, before, strict=True):
        assert_close(router.e_score_correction_bias, bias + 0.5 * (load.mean() - load).sign(), "bias")


# Compilers


def native_llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128)).eval().requires_grad_(False)


@functools.cache
def native_is_compiled() -> bool:
    """PyTorch 2.6 cannot compile what transformers 5 puts around every model's forward pass."""
    try:
        torch.compile(native_llama(), backend="eager")(make_tokens(1, 8))
    except NameError:
        return False
    finally:
        torch.compiler.reset()
    return True


@pytest.mark.compatibility("`torch.compile`")
@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
@pytest.mark.parametrize("padded", [None, False, True], ids=["no mask", "all tokens", "left padding"])
def test_a_compiled_prompt_does_not_see_the_future(family, cache, padded):
    model, tokens, mask = make_model(family), make_tokens(2, 24), None
    if not native_is_compiled():
        pytest.skip("this PyTorch cannot compile transformers' own Llama")
    if cache == "static" and (model.config.attention_kind == "nsa" or not StaticIndexedLayer):
        pytest.skip("refused by name")
    if padded is not None:
        mask = torch.ones_like(tokens)
        mask[1, :5] = int(not padded)
    compiled = torch.compile(model, backend="eager")
    kwargs = {"attention_mask": mask}
    made = {None: lambda: None, "dynamic": DynamicCache, "static": StaticCache}[cache]
    if cache is not None:
        size = {"max_cache_len": 24} if cache == "static" else {}
        kwargs["past_key_values"] = made(config=model.config, **size)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, use_cache=False).logits
        actual = compiled(tokens, use_cache=cache is not None, **kwargs).logits
    real = slice(None) if mask is None else mask.bool()
    assert_close(actual[real], expected[real], "logits")


# Precisions


@pytest.mark.compatibility("`autocast` in bfloat16 and float16")
@pytest.mark.parametrize("length", [9, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(family, dtype, length):
    """Mixed precision over float32 weights: training with all losses, evaluation and generation run, near float32's."""
    model, tokens = make_model(family), make_tokens(2, length)
    expected = model(tokens, labels=tokens).loss
    with torch.autocast("cpu", dtype=dtype):
        assert_close(model(tokens, labels=tokens).loss.float(), expected, "loss", atol=0.15)
        model.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=2)
        loss = model.train()(tokens, labels=tokens).loss
        loss.backward(retain_graph=True)  # inside, as some trainers do, and outside
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@torch.no_grad()
def test_padded_rows_in_every_precision(family, dtype, attention, left):
    """Whole, and over a cache in every form of attention: many tokens, few, one."""
    model, tokens = make_model(family, attention=attention).to(dtype), make_tokens(2, 40)
    mask = torch.ones_like(tokens)
    hidden = slice(0, 13) if left else slice(27, 40)
    mask[1, hidden] = 0
    alone = model(tokens[1:, mask[1].bool()], use_cache=False).logits[0]
    parts = {"whole": model(tokens, attention_mask=mask, use_cache=False).logits[1]}
    if left:
        cache, chunks, start = DynamicCache(config=model.config), [], 0
        for stop in (20, 21, 25, 40):
            part = model(tokens[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
            chunks.append(part.logits[1])
            start = stop
        parts["cached"] = torch.cat(chunks)
    for how, logits in parts.items():
        assert torch.isfinite(logits[mask[1].bool()]).all(), how
        if dtype == torch.float64:  # the others round differently in a batch, and so choose other experts
            assert_close(logits[mask[1].bool()], alone, how, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_query_that_sees_nothing_stays_finite(dtype):
    """Padding, whose scores are far below zero: with the number that hides a key they must not be -inf."""
    model = make_model("v3").to(dtype)
    states = torch.ones(1, 4, 3, 8, dtype=dtype)
    mask = torch.full((1, 1, 3, 3), torch.finfo(dtype).min, dtype=dtype)
    output, probs = eager_attention_forward(
        model.model.layers[0].self_attn, states, -states, states, mask, scaling=9.0
    )
    assert_close(probs, torch.full_like(probs, 1 / 3), "probabilities", atol=1e-2, rtol=0)
    assert torch.isfinite(output).all()


# Losses


@pytest.mark.compatibility("prediction loss without targets")
@pytest.mark.parametrize("family", MTP)
def test_a_prediction_loss_without_targets_is_zero(family):
    model, tokens = make_model(family).train(), make_tokens(2, 12)
    labels = torch.full_like(tokens, -100)
    labels[:, 1] = tokens[:, 1]
    outputs = model(tokens, labels=labels)
    assert outputs.mtp_loss == 0
    outputs.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.compatibility("labels cut to `logits_to_keep`")
@pytest.mark.parametrize("family", MTP)
@pytest.mark.parametrize("kept", [7, torch.tensor([3, 4, 5, 8, 9, 11])], ids=["number", "places"])
def test_labels_cut_to_the_kept_logits(family, kept):
    model, tokens = make_model(family).train(), make_tokens(2, 12)
    places = slice(-kept, None) if isinstance(kept, int) else kept
    whole = torch.full_like(tokens, -100)
    whole[:, places] = tokens[:, places]
    actual = model(tokens, labels=tokens[:, places], logits_to_keep=kept)
    assert_close(actual.mtp_loss, model(tokens, labels=whole).mtp_loss, "prediction loss")


# Adapters

ADAPTERS = {
    "lora": peft.LoraConfig(target_modules=["kv_b_proj"], init_lora_weights=False),
    "lora_bias": peft.LoraConfig(target_modules=["kv_b_proj"], init_lora_weights=False, lora_bias=True),
    "rslora": peft.LoraConfig(target_modules=["kv_b_proj"], init_lora_weights=False, use_rslora=True),
    "dora": peft.LoraConfig(target_modules=["kv_b_proj"], init_lora_weights=False, use_dora=True),
    "ia3": peft.IA3Config(target_modules=["kv_b_proj"], feedforward_modules=[], init_ia3_weights=False),
    "ia3 input": peft.IA3Config(
        target_modules=["kv_b_proj"], feedforward_modules=["kv_b_proj"], init_ia3_weights=False
    ),
    "oft": peft.OFTConfig(target_modules=["kv_b_proj"], oft_block_size=4, init_weights=False),
    "loha": peft.LoHaConfig(target_modules=["kv_b_proj"], init_weights=False),
    "lokr": peft.LoKrConfig(target_modules=["kv_b_proj"], init_weights=False),
    "vera": peft.VeraConfig(target_modules=["kv_b_proj"], init_weights=False),
    "beft": peft.BeftConfig(target_modules=["kv_b_proj"]),
    "pvera": peft.PveraConfig(target_modules=["kv_b_proj"]),
    "whole": peft.LoraConfig(target_modules=["o_proj"], modules_to_save=["kv_b_proj"]),
}
NO_MATRIX = ("lora_bias", "beft", "bias", "hook")


def adapted(family: str, adapter: str):
    """A model of which kv_b_proj does something else than its weight says."""
    model = make_model(family)
    if adapter in ADAPTERS:
        model = peft.get_peft_model(model, copy.deepcopy(ADAPTERS[adapter])).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "kv_b_proj" in name and parameter.requires_grad:
                    parameter += 0.3 * torch.randn_like(parameter)
    for layer in model.get_submodule("base_model.model.model.layers" if adapter in ADAPTERS else "model.layers"):
        projection = layer.self_attn.kv_b_proj
        if adapter == "bias":
            projection.bias = torch.nn.Parameter(torch.randn(projection.out_features))
        elif adapter == "hook":
            projection.register_forward_hook(lambda module, inputs, output: output * 1.5 + 0.1)
    return model


def assert_cached_equals_uncached(model, tokens, **kwargs):
    """A prompt, one token, several (few enough for the absorbed form), many, and one again."""
    expected, cache, parts = model(tokens, use_cache=False, **kwargs).logits, None, []
    for part in tokens.split([9, 1, 4, 15, 1], dim=1):
        outputs = model(part, past_key_values=cache, use_cache=True, **kwargs)
        cache = outputs.past_key_values
        parts.append(outputs.logits)
    assert_close(torch.cat(parts, dim=1), expected, "logits", atol=1e-3)


def write_in_place(model):
    """As a training step does."""
    for name, parameter in model.named_parameters():
        if "kv_b_proj" in name and parameter.requires_grad:
            parameter.mul_(-0.5)


def replace_weights(model):
    """As loading another adapter does."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if hasattr(module, "active_adapters") or parameter.requires_grad:
                setattr(module, name, torch.nn.Parameter(parameter * 0.5, requires_grad=parameter.requires_grad))


CHANGES = {
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "written in place": write_in_place,
    "replaced": replace_weights,
    "merged": lambda model: model.merge_adapter(),
}


@pytest.mark.parametrize("family", ["v2_lite", "v3", "v32"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("adapter", sorted(ADAPTERS.keys() - set(NO_MATRIX) - {"whole"}))
@torch.no_grad()
def test_a_change_of_kv_b_proj_counts_from_the_next_token_on(family, change, adapter):
    """The matrix that is kept with a cache is that of the module as it is now."""
    model, tokens = adapted(family, adapter), make_tokens(2, 12)
    cache = model(tokens[:, :10], use_cache=True).past_key_values
    model(tokens[:, 10:11], past_key_values=cache)
    fresh, old = copy.deepcopy(cache), copy.deepcopy(cache)
    for layer in fresh.layers:
        vars(layer).pop("kv_b_weight", None)
    before = model(tokens[:, 11:], past_key_values=old).logits
    CHANGES[change](model)
    after = model(tokens[:, 11:], past_key_values=cache).logits
    assert_close(after, model(tokens[:, 11:], past_key_values=fresh).logits, "logits", atol=1e-5)
    assert change == "merged" or (after - before).abs().max() > 1e-3


@pytest.mark.compatibility("any PEFT adapter on `kv_b_proj`")
@pytest.mark.parametrize("family", ["v2_lite", "v3"])
@pytest.mark.parametrize("adapter", [*ADAPTERS, "bias", "hook"])
@torch.no_grad()
def test_any_adapter_on_kv_b_proj_is_right_with_a_cache(family, adapter):
    model, tokens = adapted(family, adapter), make_tokens(2, 30)
    plain = make_model(family)(tokens).logits
    assert (model(tokens).logits - plain).abs().max() > 0.01, "the adapter does nothing"
    assert_cached_equals_uncached(model, tokens)
    attention = next(module for module in model.modules() if hasattr(module, "kv_b_proj"))
    assert (attention._kv_b_weight(torch.zeros(1), None) is None) == (adapter in NO_MATRIX)
    if adapter in ADAPTERS and adapter != "whole":
        with model.disable_adapter():
            assert_close(model(tokens).logits, plain, "disabled")
            assert_cached_equals_uncached(model, tokens)
        if adapter not in NO_MATRIX:  # PEFT cannot merge it into a layer without a bias
            assert_cached_equals_uncached(model.merge_and_unload(), tokens)


@pytest.mark.compatibility("an adapter for each row")
@pytest.mark.parametrize("family", ["v2_lite", "v3"])
@torch.no_grad()
def test_an_adapter_for_each_row(family):
    model = peft.get_peft_model(make_model(family), ADAPTERS["lora"], adapter_name="a").eval()
    model.add_adapter("b", ADAPTERS["lora"])
    tokens = make_tokens(3, 30)
    names = ["a", "__base__", "b"]
    assert_cached_equals_uncached(model, tokens, adapter_names=names)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    together = model.generate(input_ids=tokens, adapter_names=names, **settings)
    for row, name in enumerate(names):
        alone = model.generate(input_ids=tokens[row : row + 1], adapter_names=[name], **settings)
        assert torch.equal(together[row], alone[0])


@pytest.mark.compatibility("any PEFT adapter on `kv_b_proj`", family="v32")
@pytest.mark.parametrize("adapter", [*ADAPTERS, "bias", "hook"])
@torch.no_grad()
def test_adapters_with_selected_tokens_are_right_or_refused(adapter, refused):
    """With an indexer there is no other form than the absorbed one."""
    model, tokens = adapted("v32", adapter), make_tokens(2, 30)
    if adapter in NO_MATRIX:
        with refused(ValueError, match=r"needs the matrix of `kv_b_proj`.*Leave `kv_b_proj` out"):
            model(tokens)
    else:
        assert_cached_equals_uncached(model, tokens)
        if adapter in ADAPTERS and adapter != "whole":
            expected = model(tokens).logits
            assert_close(model.merge_and_unload()(tokens).logits, expected, "merged", atol=1e-3)


@pytest.mark.parametrize("family", ["v2_lite", "v3"])
@pytest.mark.parametrize("adapter", ["lora_bias", "beft", "bias"])
def test_a_bias_on_kv_b_proj_is_right_with_a_cache_in_training(family, adapter):
    assert_cached_equals_uncached(adapted(family, adapter).train(), make_tokens(2, 30))


@pytest.mark.parametrize("adapter", ["lora_bias", "bias"])
@pytest.mark.parametrize("scale", [0.0, 1.0], ids=["zero yet", "learned"])
def test_a_bias_on_kv_b_proj_is_refused_with_selected_tokens_in_training(adapter, scale):
    """From the first step, when it is zero and values cannot tell that it is there: it would get wrong gradients."""
    model, tokens = adapted("v32", adapter).train(), make_tokens(2, 30)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "kv_b_proj" in name and name.endswith("bias"):
                parameter *= scale
    with pytest.raises(ValueError, match="needs the matrix of `kv_b_proj`"):
        model(tokens, labels=tokens)


@pytest.mark.parametrize("family", ["v2_lite", "v3", "v32"])
def test_an_adapter_that_does_not_run_adds_no_bias(family):
    """In training too, where a bias on kv_b_proj is refused with selected tokens though it is zero yet."""
    tokens = make_tokens(2, 30)
    plain, alone = (make_model(family).train() for _ in range(2))
    alone = peft.get_peft_model(alone, ADAPTERS["lora"], adapter_name="a")
    model = peft.get_peft_model(make_model(family), ADAPTERS["lora"], adapter_name="a").train()
    model.load_state_dict(alone.state_dict())
    model.add_adapter("b", ADAPTERS["lora_bias"])
    expected = alone(input_ids=tokens, labels=tokens)

    actual = model(input_ids=tokens, labels=tokens)
    assert_close(actual.lm_loss, expected.lm_loss, "inactive")
    actual.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if ".a." in name and "kv_b_proj" in name}
    assert gradients
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    with model.disable_adapter():
        assert_close(model(input_ids=tokens, labels=tokens).lm_loss, plain(tokens, labels=tokens).lm_loss, "disabled")
    model.merge_adapter(["a"])
    assert_close(model(input_ids=tokens, labels=tokens).lm_loss, expected.lm_loss, "merged")
    model.unmerge_adapter()

    if family == "v32":
        for active in ("b", ["a", "b"]):
            model.base_model.set_adapter(active)
            with pytest.raises(ValueError, match="needs the matrix of `kv_b_proj`"):
                model(input_ids=tokens, labels=tokens)
        model.set_adapter("a")
    model.delete_adapter("b")
    assert_close(model(input_ids=tokens, labels=tokens).lm_loss, expected.lm_loss, "deleted")


@pytest.mark.parametrize(
    "config",
    [peft.LilyConfig(target_modules=["kv_b_proj"]), peft.PveraConfig(target_modules=["kv_b_proj"])],
    ids=["chooses by all rows of a pass", "draws numbers"],
)
def test_an_adapter_that_is_no_matrix_in_training_is_refused_with_selected_tokens(config):
    model, tokens = peft.get_peft_model(make_model("v32"), config).train(), make_tokens(2, 30)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    with pytest.raises(ValueError, match="needs the matrix of `kv_b_proj`"):
        model(input_ids=tokens, labels=tokens)


# Gradient accumulation


@pytest.mark.compatibility("gradient accumulation")
@pytest.mark.parametrize("family", ["deepseek", "v2", "v3", "v32"])
@pytest.mark.parametrize("unequal", [False, True])
def test_accumulated_losses_are_those_of_one_batch(family, unequal):
    """Trainers give the targets of the whole step; what is no mean over targets must not count once a micro-batch."""
    model, tokens = make_model(family).train(), make_tokens(8, 24)
    labels = tokens.clone()
    if unequal:
        labels[:3, 10:] = -100
    items = (labels[:, 1:] != -100).sum()
    parts = [
        model(row[None], labels=target[None], num_items_in_batch=items)
        for row, target in zip(tokens, labels, strict=True)
    ]
    whole = model(tokens, labels=labels)
    assert_close(sum(part.lm_loss for part in parts), whole.lm_loss, "cross entropy")
    config, shares = model.config, (labels[:, 1:] != -100).sum(dim=1) / items
    expected = sum(part.lm_loss + config.mtp_loss_weight * (part.mtp_loss or 0) for part in parts)
    for name, weight in (
        ("aux_loss", config.aux_loss_alpha),
        ("index_loss", getattr(config, "index_loss_weight", 0.0)),
    ):
        if getattr(whole, name) is None:
            continue
        mean = sum(share * getattr(part, name) for share, part in zip(shares, parts, strict=True))
        if not unequal:
            assert_close(mean, getattr(whole, name), name, atol=1e-4)
        expected = expected + weight * mean
    assert_close(sum(part.loss for part in parts), expected, "loss")


# Packed rows


@pytest.mark.compatibility("packed documents")
@pytest.mark.parametrize("use_cache", [None, True, False])
@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(family, use_cache, training):
    """In evaluation as in training, where a cache would be made by default."""
    model, lengths = make_model(family).train(training), (5, 20, 9)
    tokens = make_tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    outputs = model(tokens, position_ids=positions, labels=tokens, use_cache=use_cache)
    expected = torch.cat([model(part, use_cache=False).logits for part in tokens.split(lengths, dim=1)], dim=1)
    assert_close(outputs.logits, expected, "logits")
    assert outputs.cache is None


@pytest.mark.compatibility("packed documents with a cache")
@torch.no_grad()
def test_packed_documents_take_no_cache(family, refused):
    model, tokens = make_model(family), make_tokens(1, 8)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with refused(ValueError, match="documents that do not see each other"):
        model(tokens, position_ids=positions, past_key_values=DynamicCache(config=model.config))


def names_to_adapt(family: str) -> tuple[set[str], set[str]]:
    """The last names of all Linear modules, and the last two of all matrices and stacks of them."""
    model = make_model(family)
    modules = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    parameters = {
        name.split(".", 3)[-1] for name, p in model.named_parameters() if ".layers." in name and p.ndim in (2, 3)
    }
    return modules, {name for name in parameters if "compress" not in name}


@pytest.mark.compatibility("LoRA on every module and parameter")
@pytest.mark.parametrize("family", FAMILIES)
def test_each_module_and_parameter_may_have_lora(family):
    """One training step gives each adapter a gradient, whatever PEFT is told to wrap."""
    tokens = make_tokens(2, 40)
    modules, parameters = names_to_adapt(family)
    targets = [{"target_modules": [name]} for name in sorted(modules)]
    targets += [{"target_modules": [], "target_parameters": [name]} for name in sorted(parameters)]
    assert len(targets) > 8
    for target in targets:
        model = peft.get_peft_model(make_model(family), peft.LoraConfig(r=2, init_lora_weights=False, **target))
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        adapters = [(name, p) for name, p in model.named_parameters() if "lora_" in name]
        assert adapters, target
        for name, parameter in adapters:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
        model.get_base_model().update_router_bias()
        model.eval().generate(input_ids=tokens[:, :5], max_new_tokens=2, pad_token_id=2)


# Caches and graphs


@pytest.mark.compatibility("cache of `inference_mode` continued")
@pytest.mark.parametrize(
    "make", [lambda config: DynamicCache(config=config), lambda config: None], ids=["own", "made"]
)
def test_a_cache_of_inference_mode_is_continued_outside(family, make):
    model, tokens = make_model(family), make_tokens(2, 40)
    with torch.no_grad():
        expected = model(tokens).logits
    with torch.inference_mode():
        cache = model(tokens[:, :30], past_key_values=make(model.config), use_cache=True).cache
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in (tokens[:, 30:31], tokens[:, 31:])]
    assert_close(torch.cat(parts, dim=1), expected[:, 30:], "logits")


@pytest.mark.compatibility("`generate` in training with gradient checkpointing")
@pytest.mark.parametrize("reentrant", [True, False])
def test_generation_in_training_mode_with_gradient_checkpointing(family, reentrant):
    """As in evaluation, from a cache, which transformers' own layers lose there."""
    model, tokens = make_model(family), make_tokens(2, 20)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    expected = model.generate(tokens, **settings)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert torch.equal(model.generate(tokens, **settings), expected)
    assert model.is_gradient_checkpointing
    assert model(tokens, use_cache=True).cache is None
    passes = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    model(tokens, labels=tokens).loss.backward()
    assert len(passes) == 2, "the layer is not computed again for the gradients"
    with pytest.raises(ValueError, match="`past_key_values` is given in training with gradient checkpointing"):
        model(tokens, past_key_values=DynamicCache(config=model.config))


def native_is_traced() -> bool:
    """Whether this release makes its masks so that they can be traced; 5.6 does not."""
    model = native_llama()
    try:
        torch.jit.trace(lambda x: model(x, use_cache=False).logits, (make_tokens(2, 12),), check_trace=False)
    except IndexError:
        return False
    return True


@pytest.mark.compatibility("`torch.jit.trace`")
@pytest.mark.parametrize("family", ["llama", "deepseek", "v2_lite", "v2", "v3"])
@torch.no_grad()
def test_traced_models_route_what_they_are_given(family):
    """torch.jit.trace, as OpenVINO and Neuron use it: experts are those of the input, not of the example."""
    if not native_is_traced():
        pytest.skip("this transformers' own Llama cannot be traced")
    model = make_model(family).requires_grad_(False)
    traced = torch.jit.trace(lambda x: model(x, use_cache=False).logits, (make_tokens(2, 12),), check_trace=False)
    for tokens in (make_tokens(2, 12, seed=1), make_tokens(2, 12, seed=2)):
        assert_close(traced(tokens), model(tokens).logits, "logits")


@pytest.mark.compatibility("`torch.export`, dynamic length")
@pytest.mark.parametrize("family", ["llama", "deepseek", "v2_lite", "v2", "v3"])
@torch.no_grad()
def test_exported_models(family):
    """torch.export, with a dynamic length."""
    model = make_model(family)
    length = torch.export.Dim("length", min=2, max=200)
    exported = torch.export.export(
        model, (make_tokens(2, 12),), {"use_cache": False}, dynamic_shapes=[{1: length}, None], strict=False
    ).module()
    for tokens in (make_tokens(2, 12, seed=1), make_tokens(2, 40, seed=2)):
        assert_close(exported(tokens, use_cache=False).logits, model(tokens).logits, "logits")


@pytest.mark.compatibility("`torch.export`, dynamic length")
@pytest.mark.parametrize("family", ["v32", "nsa"])
@torch.no_grad()
def test_an_export_of_sparse_attention_is_refused(family, refused):
    """Its example is shorter than what an indexer selects, so the graph would be that of dense attention."""
    model, length = make_model(family), torch.export.Dim("length", min=2, max=200)
    with refused(ValueError, match="exported"):
        torch.export.export(
            model, (make_tokens(2, 12),), {"use_cache": False}, dynamic_shapes=[{1: length}, None], strict=False
        )


@torch.no_grad()
def test_an_export_of_as_many_tokens_as_are_selected():
    model = make_model("v32")
    length = torch.export.Dim("length", min=2, max=model.config.index_topk)
    exported = torch.export.export(
        model, (make_tokens(2, 12),), {"use_cache": False}, dynamic_shapes=[{1: length}, None], strict=False
    ).module()
    tokens = make_tokens(2, model.config.index_topk, seed=1)
    assert_close(exported(tokens, use_cache=False).logits, model(tokens).logits, "logits")


class OnlyLogits(torch.nn.Module):
    """What ONNX takes: tensors in, one tensor out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, use_cache=False).logits


@pytest.mark.slow
@pytest.mark.compatibility("`torch.onnx.export`, dynamic length")
@pytest.mark.parametrize("family", ["llama", "deepseek", "v2_lite", "v2", "v3"])
@torch.no_grad()
def test_onnx_models_run_in_onnxruntime(family, tmp_path):
    """With other tokens and lengths than the example's: experts are those of the input."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, length = make_model(family), torch.export.Dim("length", min=2, max=200)
    shapes = ({1: length},)
    program = torch.onnx.export(OnlyLogits(model).eval(), (make_tokens(2, 12),), dynamo=True, dynamic_shapes=shapes)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (name,) = (argument.name for argument in session.get_inputs())
    for seed, number in enumerate((12, 7, 150), 1):
        tokens = make_tokens(2, number, seed=seed)
        (logits,) = session.run(None, {name: tokens.numpy()})
        assert_close(torch.from_numpy(logits), model(tokens).logits, "logits")


def test_a_class_that_a_library_puts_in_its_place_is_not_saved(tmp_path, monkeypatch):
    """As FSDP2 does: its class's file is torch's, and has no model code."""
    model = make_model("v3")
    monkeypatch.setattr(type(model), "_auto_class", "AutoModelForCausalLM")  # as of models that AutoModel loads
    module = "torch.distributed.fsdp._fully_shard._fully_shard"
    model.__class__ = type("FSDPDeepseekForCausalLM", (type(model),), {"__module__": module})
    model.save_pretrained(tmp_path)
    assert type(model).__name__ == "FSDPDeepseekForCausalLM"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["auto_map"]["AutoModelForCausalLM"].endswith("modeling_deepseek.DeepseekForCausalLM")
    assert {file.name for file in tmp_path.glob("*.py")} == {file.name for file in ROOT.glob("*_deepseek.py")}


@pytest.mark.compatibility("layers traced by `torch.fx`")
@torch.no_grad()
def test_what_a_layer_returns_besides_its_states_is_not_looked_at(family, monkeypatch):
    """To torch.fx, by which llm-compressor cuts a model in layers, each result of a layer is a stand-in that is not None."""
    model, tokens = make_model(family), make_tokens(2, 20)
    expected = model(tokens)
    for layer in model.model.layers:
        forward = layer.forward
        monkeypatch.setattr(
            layer, "forward", lambda *args, of=forward, **kwargs: (of(*args, **kwargs)[0], *[object()] * 3)
        )
    outputs = model(tokens)
    assert torch.equal(outputs.logits, expected.logits)
    assert outputs.aux_loss is None
    assert outputs.index_loss is None


@pytest.mark.compatibility("layers traced by `torch.fx`")
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_named_tuples_reach_layers_as_plain_ones(family, padded, monkeypatch):
    """Between the layers that it cuts out, llm-compressor keeps lists, tuples and dictionaries, of the plain kind."""
    model, tokens, mask = make_model(family), make_tokens(2, 40), torch.ones(2, 40, dtype=torch.long)  # v32 selects 16
    mask[1, :5] = not padded
    inputs = {"attention_mask": mask, "use_cache": False}  # as it calls models
    expected = model(tokens, **inputs).logits

    def plain(value):
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        kind = next((kind for kind in (tuple, list) if isinstance(value, kind)), None)
        return value if kind is None else kind(map(plain, value))

    for layer in model.model.layers:
        monkeypatch.setattr(
            layer, "forward", lambda *args, of=layer.forward, **kwargs: of(*plain(args), **plain(kwargs))
        )
    assert torch.equal(model(tokens, **inputs).logits, expected)


# What transformers' own model tests ask


@pytest.mark.compatibility("attention maps")
@pytest.mark.parametrize("how", ["argument", "config"])
@pytest.mark.parametrize("length", [10, 40])
@torch.no_grad()
def test_there_are_attention_maps_or_an_error(family, length, how, refused):
    """Never an empty tuple without a word. V3.2 has maps as long as all tokens are attended to, 16 here."""
    model, tokens = make_model(family, attention="eager"), make_tokens(2, length)
    arguments = {"output_attentions": True} if how == "argument" else {}
    if how == "config":
        model.config.output_attentions = True
    if family == "nsa" or (family == "v32" and length > 16):
        with refused(ValueError, match=r"`output_attentions` is set, and .* no attention maps"):
            model(tokens, **arguments)
        return
    maps = model(tokens, **arguments).attentions
    assert [probs.shape for probs in maps] == [(2, 4, length, length)] * model.config.num_hidden_layers
    for probs in maps:
        assert_close(probs.sum(dim=-1), torch.ones(2, 4, length))


@pytest.mark.compatibility("4D attention masks")
@torch.no_grad()
def test_a_mask_of_four_dimensions(family, refused):
    model, tokens = make_model(family), make_tokens(2, 20)
    causal = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    if family in ("v32", "nsa"):
        with refused(ValueError, match=r"`attention_mask` has shape .* it must be \[batch, tokens\]"):
            model(tokens, attention_mask=causal)
    else:
        assert_close(model(tokens, attention_mask=causal).logits, model(tokens).logits)


@pytest.mark.compatibility("`generate`, right-padded batch")
def test_right_padded_prompts(family, refused):
    """Each row goes on from its last token, as transformers' own classes do, which advise against it."""
    model, tokens, mask = make_model(family), make_tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, 14:] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    if family == "nsa":
        with refused(ValueError, match="Pad on the left to generate"):
            model.generate(tokens, attention_mask=mask, **settings)
        return
    cached = model.generate(tokens, attention_mask=mask, **settings)
    assert torch.equal(cached, model.generate(tokens, attention_mask=mask, use_cache=False, **settings))
    assert torch.equal(cached[:1], model.generate(tokens[:1], **settings))


def test_modules_kept_in_float32_exist(family):
    model = make_model(family)
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    for pattern in (*model._keep_in_fp32_modules, *model._keep_in_fp32_modules_strict):
        assert any(re.search(pattern, name) for name in names), f"{pattern} names nothing in {family}"
