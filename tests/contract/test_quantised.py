"""Experts as a module each, and weights that libraries quantise: torchao and bitsandbytes, on every family.

The libraries want widths that are multiples of 32 or 64, so the models here are wider than in tiny.py.
"""

import pytest
import torch
from checks import assert_close
from deepseek_repo.modeling_deepseek import DeepseekForCausalLM
from safetensors import safe_open
from tiny import FAMILIES, MOE_FAMILIES, make_model, make_tokens

_ALL = ("llama", "deepseek", "v2_lite", "v2", "v3", "v32", "nsa")
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}


def wide_model(family: str):
    widths = {"hidden_size": 64, "intermediate_size": 128}
    if "n_routed_experts" in FAMILIES[family]:
        widths["moe_intermediate_size"] = 64
    if "kv_lora_rank" in FAMILIES[family]:
        widths |= {"kv_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64}
        widths |= {"q_lora_rank": 64} if FAMILIES[family]["q_lora_rank"] else {}
    else:
        widths["head_dim"] = 64
    if family == "v32":
        widths |= {"index_head_dim": 64, "index_n_heads": 32}
    return make_model(family, **widths)


def quantisation(kind: str):
    """A transformers configuration, and the largest relative error of the logits it may make on random weights."""
    if kind.startswith("torchao"):
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
        from transformers import TorchAoConfig

        if kind == "torchao int8":
            return TorchAoConfig(Int8WeightOnlyConfig()), 0.15
        return TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(32))), 0.8
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    skipped = ["lm_head", r".*branch_gate", r".*compress_(key|value)"]
    if kind == "bitsandbytes int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped), 0.3
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=skipped,
    ), 0.8


def plain_linears(model) -> set[str]:
    """Last names of Linear layers whose weights are still float."""
    return {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module.weight) is torch.nn.Parameter
    }


@pytest.mark.compatibility("quantised while loading (torchao, bitsandbytes)")
@pytest.mark.parametrize("kind", ["torchao int8", "torchao int4", "bitsandbytes int8", "bitsandbytes nf4"])
@pytest.mark.parametrize("family", _ALL)
def test_quantised_while_loading(family, kind, tmp_path):
    config, tolerance = quantisation(kind)
    model, tokens = wide_model(family), make_tokens(2, 20)
    model.save_pretrained(tmp_path / "float")
    quantised = DeepseekForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=config, dtype=torch.float32
    )
    assert plain_linears(quantised) <= {"lm_head", "weights_proj", "branch_gate", "up_proj", "down_proj"}
    experts = [module for name, module in quantised.named_modules() if name.endswith("mlp.experts.0.up_proj")]
    assert len(experts) == model.config.mlp_layer_types.count("sparse") + (
        model.config.num_nextn_predict_layers if model.config.mtp_layer_type == "sparse" else 0
    )
    assert all(type(module.weight) is not torch.nn.Parameter for module in experts)

    # On a CPU bitsandbytes packs 4-bit weights anew at their first use and would save them so: saved before.
    quantised.save_pretrained(tmp_path / "quantised")
    with torch.no_grad():
        expected, actual = model(tokens).logits, quantised(tokens).logits
        difference = (actual - expected).norm() / expected.norm()
        assert 0 < difference < tolerance
    generated = quantised.generate(tokens, **GREEDY)
    if kind != "bitsandbytes int8":  # it rounds activations too, and the absorbed form has others
        assert torch.equal(generated, quantised.generate(tokens, use_cache=False, **GREEDY))

    again = DeepseekForCausalLM.from_pretrained(tmp_path / "quantised", dtype=torch.float32)
    assert again.config.checkpoint_model_type == model.config.checkpoint_model_type
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, actual)


@pytest.mark.parametrize("family", [*MOE_FAMILIES, "v32", "nsa"])
def test_separate_experts(family, tmp_path):
    model, tokens = make_model(family), make_tokens(2, 12)
    model.save_pretrained(tmp_path / "stacked")
    separate = DeepseekForCausalLM.from_pretrained(tmp_path / "stacked", separate_experts=True)
    assert any(name.endswith("mlp.experts.3.down_proj") for name, _ in separate.named_modules())
    for one in (model, separate):
        one.zero_grad()
        one(tokens, labels=tokens).loss.backward()
    assert_close(separate(tokens).logits, model(tokens).logits)
    assert_close(separate(tokens[:1, :1]).logits, model(tokens[:1, :1]).logits)
    layer = model.config.num_hidden_layers - 1
    stacked, split = model.model.layers[layer].mlp.experts, separate.model.layers[layer].mlp.experts
    for i, expert in enumerate(split):
        if expert.down_proj.weight.grad is not None:
            assert_close(expert.down_proj.weight.grad, stacked.down_proj.grad[i], atol=1e-3)
    # files and config.json are those of a model with stacked experts
    separate.save_pretrained(tmp_path / "separate")
    names = []
    for folder in ("stacked", "separate"):
        with safe_open(tmp_path / folder / "model.safetensors", framework="pt") as file:
            names.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no dict)
    assert names[0].keys() == names[1].keys()
    assert all(torch.equal(names[0][name], names[1][name]) for name in names[0])
    again = DeepseekForCausalLM.from_pretrained(tmp_path / "separate")
    written, original = again.config.to_dict(), model.config.to_dict()
    assert written | {"_name_or_path": "", "dtype": None} == original | {"_name_or_path": "", "dtype": None}
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_separate_experts_do_not_go_with_tensor_parallelism(tmp_path):
    make_model("v3").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="separate_experts"):
        DeepseekForCausalLM.from_pretrained(tmp_path, separate_experts=True, tp_plan="auto")


def test_prefix_of_a_quantised_model(tmp_path):
    config, _ = quantisation("torchao int8")
    wide_model("v3").save_pretrained(tmp_path / "float")
    model = DeepseekForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config, dtype=torch.float32)
    tokens = make_tokens(1, 24)
    prefix = model.make_prefix(tokens[:, :16], progress=False)
    prefix.save(tmp_path / "prefix.safetensors")
    loaded = model.load_prefix(tmp_path / "prefix.safetensors")
    expected = model.generate(tokens, **GREEDY)
    assert torch.equal(model.generate(**loaded.extend(tokens[:, 16:]), **GREEDY), expected)


def test_drafts_of_a_quantised_model(tmp_path):
    config, _ = quantisation("torchao int8")
    wide_model("v3").save_pretrained(tmp_path)
    model = DeepseekForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    tokens = make_tokens(2, 16)
    assert torch.equal(model.generate(tokens, mtp_tokens=2, **GREEDY), model.generate(tokens, **GREEDY))
