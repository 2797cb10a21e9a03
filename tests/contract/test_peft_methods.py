"""Every method of the installed PEFT, with weights as training leaves them: right, or refused by a message."""

import copy
import dataclasses

import peft
import pytest
import torch
from checks import assert_close
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny import FAMILIES, make_model, make_tokens
from transformers import LlamaConfig, LlamaForCausalLM

CONFIGS = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
# What fits widths of 16 and 40; methods that are not here take their defaults.
SIZES = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 50},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "IA3": {"feedforward_modules": []},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "POLY": {"r": 2, "n_tasks": 3},
    "PSOFT": {"r": 4},
    "RANDLORA": {"r": 4, "randlora_alpha": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "VBLORA": {"num_vectors": 8, "vector_length": 8, "topk": 2},
    "WAVEFT": {"n_frequency": 50},
}
ARGUMENTS = {"POLY": {"task_ids": torch.tensor([0, 2])}}  # of a forward pass
ELSEWHERE = ("ADAPTION_PROMPT", "SHADOW", "TRAINABLE_TOKENS")  # whole blocks, embeddings: no Linear module
LINEAR = [
    kind
    for kind, config in CONFIGS.items()
    if "target_modules" in {field.name for field in dataclasses.fields(config)} and kind not in ELSEWHERE
]
PROMPTS = {
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [3, 4, 5, 6], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 2},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
}


def trained(model, config, noise: float):
    """The model with an adapter whose weights are no longer those that it begins with."""
    model = peft.get_peft_model(model, copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += noise * torch.randn_like(parameter)
    return model


def adapted(family: str, method: str, noise: float):
    if method == "ADAMSS":
        pytest.importorskip("sklearn", reason="PEFT's AdaMSS needs scikit-learn, which lm_eval brings")
    config = CONFIGS[method](task_type="CAUSAL_LM", target_modules=["kv_b_proj"], **SIZES.get(method, {}))
    return trained(make_model(family), config, noise)


def cached(model, tokens, **arguments) -> torch.Tensor:
    """The logits of a prompt, one token, several (few enough for the absorbed form), many, and one again."""
    cache, parts = None, []
    for part in tokens.split([9, 1, 4, 15, 1], dim=1):
        outputs = model(input_ids=part, past_key_values=cache, use_cache=True, **arguments)
        cache = outputs.past_key_values
        parts.append(outputs.logits)
    return torch.cat(parts, dim=1)


@pytest.mark.compatibility("any PEFT adapter on `kv_b_proj`")
@pytest.mark.parametrize("family", ["v2_lite", "v3"])
@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize("noise", [0.01, 0.1])
@torch.no_grad()
def test_an_adapter_is_right_with_a_cache(family, method, noise, refused):
    """A small effect as well, of which a bound as wide as bfloat16's rounding would take any as linear."""
    model, tokens, arguments = adapted(family, method, noise), make_tokens(2, 30), ARGUMENTS.get(method, {})
    if method == "LILY":  # its mean over the tokens of a pass has the future in it
        with refused(
            ValueError, match=r"`kv_b_proj` makes something else of a token when other tokens.*use_cache=False"
        ):
            cached(model, tokens)
        return
    expected = model(input_ids=tokens, use_cache=False, **arguments).logits
    assert_close(cached(model, tokens, **arguments), expected, "logits", atol=2e-5, rtol=2e-5)


@pytest.mark.compatibility("any PEFT adapter on `kv_b_proj`", family="v32")
@pytest.mark.parametrize("method", LINEAR)
@torch.no_grad()
def test_an_adapter_with_selected_tokens_is_right_or_refused(method, refused):
    """Where attention has the absorbed form only, it gives what a kv_b_proj with the adapter's matrix does."""
    model, plain = adapted("v32", method, 0.1), make_model("v32")
    tokens, arguments = make_tokens(2, 30), ARGUMENTS.get(method, {})
    if method in ("BEFT", "LILY", "POLY"):  # a bias, a mean over tokens, a choice for each row
        with refused(ValueError, match="needs the matrix of `kv_b_proj`|makes something else of a token"):
            model(input_ids=tokens, **arguments)
        return
    with torch.no_grad():
        for layer, other in zip(plain.model.layers, model.get_base_model().model.layers, strict=True):
            weight = layer.self_attn.kv_b_proj.weight
            weight.copy_(other.self_attn.kv_b_proj(torch.eye(weight.shape[1])).T)
    expected = plain(tokens).logits
    assert_close(model(input_ids=tokens).logits, expected, "logits", atol=2e-5, rtol=2e-5)
    assert_close(cached(model, tokens), expected, "cached", atol=1e-4, rtol=1e-4)


class SmallGate(torch.nn.Module):
    """A module that is nearly linear: a gate, which sees the row, moves it by less than bfloat16 rounds."""

    def __init__(self, linear: torch.nn.Linear, seen: float, dropout: float):
        super().__init__()
        self.linear, self.seen, self.dropout = linear, seen, torch.nn.Dropout(dropout)
        self.eval()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.linear(self.dropout(rows)) * (1 + 0.01 * (self.seen * rows.mean(dim=-1, keepdim=True)).sigmoid())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_module_that_is_nearly_linear_is_no_matrix(dropout):
    model, tokens = make_model("v3"), make_tokens(2, 30)
    selecting = make_model("v32")
    for layer in (*model.model.layers, *selecting.model.layers):
        layer.self_attn.kv_b_proj = SmallGate(layer.self_attn.kv_b_proj, 1.0, dropout)
    with torch.no_grad():
        assert_close(cached(model, tokens), model(tokens, use_cache=False).logits, "logits", atol=2e-5, rtol=2e-5)
    with pytest.raises(ValueError, match="needs the matrix of `kv_b_proj`"):
        selecting.train()(tokens, labels=tokens)


def test_dropout_alone_leaves_a_matrix():
    """With the gate shut the module is linear, and what training drops is dropped in the matrix."""
    model, tokens = make_model("v32"), make_tokens(2, 30)
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = SmallGate(layer.self_attn.kv_b_proj, 0.0, 0.1)
    model.train()(tokens, labels=tokens).loss.backward()
    gates = [layer.self_attn.kv_b_proj for layer in model.model.layers]
    assert all(gate.linear.weight.grad.abs().sum() > 0 for gate in gates)
    assert all(gate.dropout.training for gate in gates)


@torch.no_grad()
def test_lower_precision_is_no_reason_to_refuse():
    """An adapter in bfloat16, and one under autocast, are matrices as far as their rounding lets one see."""
    tokens = make_tokens(2, 30)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        adapted("v32", "LORA", 0.1).to(dtype)(input_ids=tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adapted("v32", "LORA", 0.1)(input_ids=tokens)


@torch.no_grad()
def test_lily_is_not_causal_in_any_model():
    """Why it is refused with a cache: it gives a prefix something else when there is more text, in Llama too."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128, initializer_range=0.2))
    model, tokens = trained(model, peft.LilyConfig(target_modules=["v_proj"]), 0.1), make_tokens(1, 30)
    whole, prefix = (model(input_ids=tokens[:, :length], use_cache=False).logits for length in (30, 20))
    assert (whole[:, :20] - prefix).abs().max() > 1e-3


@pytest.mark.compatibility("PEFT's virtual tokens and prefixes")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", PROMPTS)
def test_virtual_tokens(family, method, refused):
    """Each trains, and generates what its own logits say; keys and values from elsewhere are refused by other caches."""
    model, tokens, arguments = make_model(family), make_tokens(2, 30), {}
    mask = torch.ones_like(tokens)
    model = trained(model, CONFIGS[method](task_type="CAUSAL_LM", **PROMPTS[method]), 0.3)
    if method == "MULTITASK_PROMPT_TUNING":
        arguments["task_ids"] = torch.tensor([0, 1])
    if method in ("PREFIX_TUNING", "CARTRIDGE") and model.config.attention_kind != "gqa":
        with refused(ValueError, match=r"`past_key_values` (holds keys of shape .* prompt tuning|is a DynamicLayer)"):
            model(input_ids=tokens, attention_mask=mask)
        return
    model.train()(input_ids=tokens, attention_mask=mask, labels=tokens, **arguments).loss.backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, name
    model.eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    generated = model.generate(input_ids=tokens, attention_mask=mask, **settings, **arguments)[:, -6:]
    text = torch.cat((tokens, generated), dim=1)
    with torch.no_grad():
        logits = model(input_ids=text, attention_mask=torch.ones_like(text), **arguments).logits
    assert torch.equal(generated, logits[:, -7:-1].argmax(dim=-1))


@pytest.mark.compatibility("PEFT's SHADOW")
@pytest.mark.parametrize("family", FAMILIES)
def test_shadow(family, refused):
    """It wraps every block of `layers`; those of prediction modules, which take no part in a pass, must be left out."""
    model, tokens = make_model(family), make_tokens(2, 30)
    num_layers = model.config.num_hidden_layers
    if len(model.model.layers) > num_layers:
        whole = trained(make_model(family), peft.ShadowConfig(task_type="CAUSAL_LM"), 0.1)
        with pytest.raises(AttributeError, match="'ShadowCarrier' object has no attribute"):
            whole(input_ids=tokens)
    blocks = rf".*\.layers\.[0-{num_layers - 1}]$"
    model = trained(model, peft.ShadowConfig(task_type="CAUSAL_LM", target_modules=blocks), 0.1)
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
        assert_close(cached(model, tokens), expected, "logits")
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    last = f"layers.{num_layers - 1}.shadow_update"  # whose state nobody reads
    names = [name for name, _ in model.named_parameters() if ".layers." in name and "shadow_" in name]
    names = [name for name in names if "shadow_backbone" not in name and last not in name]
    assert names
    for name in names:
        assert model.get_parameter(name).grad.abs().sum() > 0, name
