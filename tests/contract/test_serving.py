"""What vLLM's (0.33) and SGLang's transformers backends ask of a custom model, and transformers' parallel plans."""

import ast
import inspect
import json
import re
import textwrap

import pytest
import torch
from checks import ROOT, assert_close
from deepseek_repo.modeling_deepseek import DeepseekForCausalLM, DeepseekModel
from tiny import FAMILIES, MAIN_FAMILIES, MOE_FAMILIES, make_model, make_tokens
from transformers import AttentionInterface, DeepseekV2Config, DeepseekV3Config
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@pytest.fixture
def recording():
    """An attention function under a new name, as an engine registers its own -> the calls that it got.

    Like vLLM's it knows no batch: what it returns is [S, H * Dv]."""
    calls = []

    def attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        calls.append({"module": module, "query": query, "key": key, "value": value, "scaling": scaling, **kwargs})
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return output[0].transpose(0, 1).flatten(1), None

    AttentionInterface.register("engine", attend)
    AttentionMaskInterface.register("engine", lambda *args, **kwargs: None)
    yield calls
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        registry._global_mapping.pop("engine", None)


@pytest.mark.compatibility("attention function of an engine")
@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_custom_attention_function_is_called(family, recording):
    model, tokens = make_model(family, attention="engine"), make_tokens(1, 9)
    expected = make_model(family)(tokens, use_cache=False).logits
    marker = object()
    outputs = model(tokens, use_cache=False, engine_state=marker)
    assert_close(outputs.logits, expected)
    assert [call["module"].layer_idx for call in recording] == list(range(model.config.num_hidden_layers))
    for call in recording:
        assert call["engine_state"] is marker, "an extra keyword is lost on the way to the attention function"
        assert call["query"].shape[:3] == (1, 4, 9)
        assert call["key"].shape[1] in (4, model.config.num_key_value_heads)
        assert call["module"].is_causal
        assert call["scaling"] == pytest.approx(call["module"].scaling)


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_base_model_passes_keywords_too(family, recording):
    model = make_model(family, attention="engine").model
    model(make_tokens(1, 5), use_cache=False, engine_state=7)
    assert [call["engine_state"] for call in recording] == [7] * 3


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_positions_reach_the_attention_function(family, recording):
    """Flash attention finds the documents of a packed row in them."""
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    make_model(family, attention="engine")(make_tokens(1, 5), position_ids=positions, use_cache=False)
    assert all(torch.equal(call["position_ids"], positions) for call in recording)


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_attention_call_is_found_in_the_source(family):
    """vLLM 0.33 reads `forward`: exactly one call of what ALL_ATTENTION_FUNCTIONS gave, its scale an attribute."""
    for layer in make_model(family).model.layers:
        forward = ast.parse(textwrap.dedent(inspect.getsource(type(layer.self_attn).forward)))
        lookups = [
            node.targets[0].id
            for node in ast.walk(forward)
            if isinstance(node, ast.Assign) and "ALL_ATTENTION_FUNCTIONS.get_interface(" in ast.unparse(node.value)
        ]
        calls = [
            node
            for node in ast.walk(forward)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in lookups
        ]
        assert len(calls) == 1
        scaling = next(keyword.value for keyword in calls[0].keywords if keyword.arg == "scaling")
        assert isinstance(scaling, ast.Attribute)
        assert ast.unparse(scaling.value) == "self"
        assert isinstance(getattr(layer.self_attn, scaling.attr), float)
        assert isinstance(layer.self_attn.layer_idx, int)
        assert layer.self_attn.config is not None


def test_flags():
    assert DeepseekModel._supports_attention_backend
    assert DeepseekModel.is_backend_compatible()
    assert DeepseekForCausalLM.is_backend_compatible()
    auto_map = json.loads((ROOT / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_deepseek.DeepseekModel"
    assert auto_map["AutoModelForCausalLM"] == "modeling_deepseek.DeepseekForCausalLM"


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_experts_can_be_replaced(family):
    model = make_model(family)
    blocks = [layer.mlp for layer in model.model.layers if layer.is_sparse]
    assert blocks
    for block in blocks:
        parameters = list(block.experts.parameters())
        assert parameters
        assert all(parameter.ndim == 3 for parameter in parameters)
        assert not list(block.experts.children()) or all(
            not list(child.parameters()) for child in block.experts.children()
        )
        names = list(inspect.signature(type(block.experts).forward).parameters)
        assert names[-3:] == ["hidden_states", "top_k_index", "top_k_weights"] or "kwargs" in names
        original = inspect.unwrap(type(block.experts).forward)
        assert list(inspect.signature(original).parameters)[1:] == ["hidden_states", "top_k_index", "top_k_weights"]


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_replaced_experts_are_used(family):
    """An engine puts its fused kernel where `experts` is."""
    model, tokens = make_model(family), make_tokens(1, 9)

    class Zero(torch.nn.Module):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            assert top_k_index.shape == top_k_weights.shape == (9, model.config.num_experts_per_tok)
            return torch.zeros_like(hidden_states)

    block, seen = model.model.layers[1].mlp, []
    block.experts = Zero()
    block.register_forward_hook(lambda module, args, output: seen.append((args[0], output[0])))
    model(tokens)
    assert_close(seen[0][1], block.shared_experts(seen[0][0]))


# Plans


@pytest.mark.parametrize("plan", ["base_model_tp_plan", "base_model_ep_plan"])
def test_plan_names_exist(plan):
    if plan == "base_model_ep_plan" and "ep_dispatch_experts" not in ALL_PARALLEL_STYLES:
        pytest.skip("expert parallelism as the plan has it came with transformers 5.20")
    names = set()
    for family in FAMILIES:
        model = make_model(family).model
        names |= {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    config = make_model("v3").config
    for pattern, style in getattr(config, plan).items():
        expression = re.escape(pattern).replace(r"\*", r"\d+")
        assert any(re.fullmatch(expression, name) for name in names), f"{pattern} matches nothing"
        assert style in ALL_PARALLEL_STYLES, f"{style} is no style of this transformers"


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_every_big_matrix_is_in_the_plan(family):
    """What is not split over devices is small: norms, latent projections, routers."""
    model = make_model(family)
    patterns = [re.escape(p).replace(r"\*", r"\d+") for p in model.config.base_model_tp_plan]
    whole = r"norm|layernorm|embed_tokens|q_a_proj|mlp\.gate\.weight|e_score|eh_proj"
    for name, _ in model.model.named_parameters():
        planned = any(re.fullmatch(p, name) or re.fullmatch(p, name.removesuffix(".weight")) for p in patterns)
        assert planned != bool(re.search(whole, name)), f"{name}: in the plan {planned}"


@pytest.mark.parametrize("native", [DeepseekV2Config, DeepseekV3Config])
def test_plan_agrees_with_native(native):
    """Among others kv_a_proj_with_mqa: its rotated key goes to all heads, so its gradient must be summed."""
    ours = make_model("v3").config.base_model_tp_plan
    assert native.base_model_tp_plan.items() <= ours.items()


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_pipeline_plan(family):
    model = make_model(family)
    plan = model.config.base_model_pp_plan
    assert list(plan) == ["embed_tokens", "layers", "norm"]
    assert plan.keys() <= dict(model.model.named_children()).keys()
    assert plan["embed_tokens"][1] == ["inputs_embeds"]
    assert plan["layers"][1] == plan["norm"][0] == ["hidden_states"]
    for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values"):
        assert name in inspect.signature(inspect.unwrap(DeepseekModel.forward)).parameters


@pytest.mark.parametrize("name", ["tp_plan", "pp_plan"])
def test_model_plans_hold_the_head(name):
    assert "lm_head" in getattr(DeepseekForCausalLM, f"_{name}")


@pytest.mark.parametrize(
    "head", ["ForCausalLM", "ForQuestionAnswering", "ForSequenceClassification", "ForTokenClassification", "Model"]
)
def test_layers_that_must_not_be_split(head):
    model = make_model("v3", head=head)
    present = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= present
    layers = {name for name in present if name.endswith(("DecoderLayer", "MTPLayer"))}
    assert layers | {"DeepseekSharedHead"} == set(model._no_split_modules)


def test_masks_are_one_step_for_tracers():
    """llm-compressor's tracer leaves calls of `create_causal_mask` alone, if they stand in the source of `forward` itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(DeepseekModel.forward))))
    called = {
        node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert "create_causal_mask" in called
    assert "get_seq_length" not in called
