"""tools/plan.py against the models themselves, PyTorch's operation counter, real caches, and what DeepSeek published."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from deepseek_repo.modeling_deepseek import DeepseekForCausalLM
from rich.console import Console
from tiny import FAMILIES, make_config, make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from common import economics
from tools import plan as tool

OFFICIAL = {path.stem: path for path in sorted((Path(__file__).parents[1] / "configs").glob("*.json"))}
NATIVE = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "deepseek_v32": (DeepseekV32Config, DeepseekV32ForCausalLM),
}
# What a parameter's name says of its component; the first that fits counts.
COMPONENTS = {
    "embedding": ("embed_tokens.",),
    "output head": ("lm_head.",),
    "indexer": (".indexer.",),
    "attention": (".self_attn.",),
    "shared experts": (".shared_experts.",),
    "routed experts": (".experts.",),
    "router": (".mlp.gate.weight",),
    "dense MLPs": (".mlp.",),
    "norms": ("norm.",),
}


def on_meta(config) -> torch.nn.Module:
    with torch.device("meta"):
        return DeepseekForCausalLM(config)


def official(name: str):
    config = tool.load_config(OFFICIAL[name])
    config.quantization_config = None
    return config


def component_of(name: str, layers: int) -> str:
    parts = name.split(".")
    if parts[1] == "layers" and int(parts[2]) >= layers:
        return "prediction modules"
    return next(component for component, marks in COMPONENTS.items() if any(mark in name for mark in marks))


def assert_counts(config):
    counted = {}
    for name, parameter in on_meta(config).named_parameters():
        component = component_of(name, config.num_hidden_layers)
        counted[component] = counted.get(component, 0) + parameter.numel()
    planned = {name: part.total for name, part in tool.model_parts(config).items()}
    if config.num_nextn_predict_layers:
        planned["prediction modules"] = tool.mtp_part(config).total
    if config.tie_word_embeddings:
        assert planned.pop("output head") == 0
    assert planned == counted


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_component_of_a_tiny_model(family, bias):
    assert_counts(make_config(family, attention_bias=bias, tie_word_embeddings=bias))


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_component_of_an_official_model(name):
    assert_counts(official(name))


def test_v32_as_published():
    assert_counts(tool.resolve_config({"model_type": "deepseek_v32"}))


@pytest.mark.parametrize("name", [name for name in OFFICIAL if name != "deepseek_moe_16b"] + ["v32"])
def test_transformers_own_classes_have_as_many(name):
    fields = {"model_type": "deepseek_v32"} if name == "v32" else json.loads(OFFICIAL[name].read_text())
    config_class, model_class = NATIVE[fields["model_type"]]
    fields.pop("quantization_config", None)
    with torch.device("meta"):
        native = model_class(config_class(**fields))
    counted = sum(parameter.numel() for parameter in native.parameters())
    planned = sum(tool.model_parts(tool.resolve_config(fields)).values(), tool.Part()).total
    assert planned == counted


def test_active_parameters_are_those_that_get_a_gradient():
    """One token through a model in which each expert is a parameter of its own: what it uses gets a gradient."""
    config = make_config("v3_mtp0", aux_loss_alpha=0.0)
    model = make_model("v3_mtp0", aux_loss_alpha=0.0)
    model(torch.tensor([[5]])).logits.sum().backward()
    used = 0
    for name, parameter in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")) and parameter.ndim == 3:  # [experts, ., .]
            used += int(parameter.grad.flatten(1).any(dim=1).sum()) * parameter[0].numel()
        else:
            used += parameter.numel()
    assert sum(tool.model_parts(config).values(), tool.Part()).active == used


# Stated by DeepSeek, in 1e9: the READMEs and abstracts of the five reports. For V2-Lite the 2.4 leave the embedding out.
PUBLISHED = {
    "deepseek_llm_67b": (67, 67),
    "deepseek_moe_16b": (16.4, 2.8),
    "deepseek_v2_lite": (15.7, 2.4),
    "deepseek_v2_5": (236, 21),
    "deepseek_v3": (671, 37),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    parameters = tool.make_plan(official(name))["parameters"]
    total, active = PUBLISHED[name]
    assert parameters["total"] / 1e9 == pytest.approx(total, rel=0.02)
    key = "active_without_embedding" if name == "deepseek_v2_lite" else "active"
    assert parameters[key] / 1e9 == pytest.approx(active, rel=0.025 if name == "deepseek_v2_lite" else 0.02)


# ---------------------------------------------------------------- operations


# PyTorch counts the matrix product with addition, but not where it is done in place.
IN_PLACE = {
    torch.ops.aten.baddbmm_: lambda _, a, b, *args, **kwargs: 2 * a[0] * a[1] * a[2] * b[2]
}  # [B, M, K], [B, K, N]


def counted_flops(run) -> int:
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "deepseek", "v2_lite", "v2", "v3", "v3_mtp0"])
def test_forward_operations(family):
    """Eager attention computes what the mask hides, so each of S queries sees S keys; rotation angles are left out."""
    config, length = make_config(family), 24
    model = make_model(family, attention="eager").requires_grad_(False)
    inputs = torch.randint(3, 128, (1, length))
    angles = counted_flops(lambda: model.model.rotary_emb(torch.zeros(1, length, 1), torch.arange(length)[None]))
    counted = counted_flops(lambda: model(inputs, use_cache=False)) - angles
    linear = sum(tool.model_parts(config).values(), tool.Part()).macs
    per_query = economics.attention_macs(config, np.full(length, length), decoding=False)
    assert counted == 2 * (length * linear + config.num_hidden_layers * per_query.sum())


@pytest.mark.parametrize("past", [10, 40])
@pytest.mark.parametrize("family", ["llama", "v2_lite", "v3", "v32"])
def test_decoding_operations(family, past):
    """One token over a cache; of V3.2 with fewer tokens than it selects, and with more."""
    config, model = make_config(family), make_model(family, attention="eager").requires_grad_(False)
    cache = model(torch.randint(3, 128, (1, past)), use_cache=True).past_key_values
    angles = counted_flops(lambda: model.model.rotary_emb(torch.zeros(1, 1, 1), torch.tensor([[past]])))
    counted = counted_flops(lambda: model(torch.tensor([[7]]), past_key_values=cache)) - angles
    assert counted == tool.decode_flops(config, past + 1)


def test_decoding_operations_of_native_sparse_attention():
    """Over a whole number of compression blocks, since a block is compressed when it is complete."""
    config, model = make_config("nsa"), make_model("nsa").requires_grad_(False)
    past, steps = 160, 8
    cache = model(torch.randint(3, 128, (1, past)), use_cache=True).past_key_values
    counted = planned = 0
    for i in range(steps):
        angles = counted_flops(lambda i=i: model.model.rotary_emb(torch.zeros(1, 1, 1), torch.tensor([[past + i]])))
        counted += counted_flops(lambda: model(torch.tensor([[7]]), past_key_values=cache)) - angles
        planned += tool.decode_flops(config, past + i + 1)
    assert planned == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("family", ["llama", "v2", "v3"])
def test_training_is_three_forward_passes(family):
    model = make_model(family, attention="eager", aux_loss_alpha=0.0).train()
    length = 24
    tokens = torch.randint(3, 128, (1, length))
    counted = counted_flops(lambda: model(tokens, labels=tokens, use_cache=False).loss.backward())
    config = make_config(family)
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    linear = sum(tool.model_parts(config).values(), tool.mtp_part(config)).macs
    per_query = economics.attention_macs(config, np.full(length, length), decoding=False)
    assert counted == pytest.approx(3 * 2 * (length * linear + layers * per_query.sum()), rel=0.01)


def test_a_causal_row_sees_half_of_itself():
    config = official("deepseek_llm_7b")
    row = 4096
    causal = tool.row_flops(config, row) - 2 * sum(tool.model_parts(config).values(), tool.Part()).macs
    assert causal == 2 * 30 * 2 * 4096 * (row + 1) / 2


def test_sparse_attention_grows_slowly():
    dense, sparse = ({"model_type": kind} for kind in ("deepseek_v3", "deepseek_v32"))
    dense, sparse = tool.resolve_config(dense), tool.resolve_config(sparse)
    short, long = 2048, 131072
    assert tool.decode_flops(sparse, short) > tool.decode_flops(dense, short)  # the indexer's projections
    # of 128 heads x 1088 multiply-adds for each key, 64 x 129 are left
    grown = [tool.decode_flops(config, long) - tool.decode_flops(config, long // 2) for config in (sparse, dense)]
    assert grown[0] / grown[1] == pytest.approx(64 * 129 / (128 * 1088))


# ---------------------------------------------------------------- cache


def tensors_of(cache):
    for layer in cache.layers:
        yield from (layer.keys, layer.values)
        if getattr(layer, "indexer_keys", None) is not None:
            yield layer.indexer_keys


@pytest.mark.parametrize("family", ["llama", "deepseek", "v2_lite", "v3", "v32"])
def test_cache_is_what_the_model_keeps(family):
    length = 40
    cache = make_model(family)(torch.randint(3, 128, (1, length)), use_cache=True).past_key_values
    held = sum(tensor.numel() for tensor in tensors_of(cache))
    assert tool.cache_bytes(make_config(family), length, bits=8) == held


def test_cache_of_native_sparse_attention():
    config, length = make_config("nsa"), 128
    cache = make_model("nsa")(torch.randint(3, 128, (1, length)), use_cache=True).past_key_values
    selected = sum(tensor.numel() for layer in cache.layers for tensor in (layer.keys, layer.values))
    compressed = sum(tensor.shape[-1] * 2 * 31 for layer in cache.layers for tensor in layer.compressed)
    planned = {name: count * length for name, count in tool.cache_values(config).items()}
    assert planned["keys and values"] == selected
    # 31 entries are complete, the 32nd wants four more tokens
    assert planned["compressed keys and values"] * 31 / 32 == compressed
    assert planned["per sequence"] / length == 3 * 2 * 2 * 8 * (12 - 1 + 8 - 1)


def test_published_caches():
    """V3's 70.272 kB; the 93.3 % that V2 saves on 67B, which are of 6 bits a number as V2 was deployed, and bfloat16."""
    v2, v3, dense = (official(name) for name in ("deepseek_v2_5", "deepseek_v3", "deepseek_llm_67b"))
    assert tool.cache_bytes_per_token(v3) == 70272
    saved = 1 - tool.cache_bytes_per_token(v2, bits=6) / tool.cache_bytes_per_token(dense)
    assert saved == pytest.approx(0.933, abs=0.0005)
    assert 1 - tool.cache_bytes_per_token(v2) / tool.cache_bytes_per_token(dense) == pytest.approx(0.822, abs=0.0005)


# ---------------------------------------------------------------- decoding and memory


def test_decoding_floor_by_hand():
    config = official("deepseek_llm_7b")
    floor = tool.decoding_floor(config, tool.GPUS["h200"], 1000, 1, weight_bits=16, cache_bits=16)
    weights = 2 * (6910365696 - 102400 * 4096)
    assert floor["gpus"] == 1
    assert floor["ms_per_step"] == pytest.approx((weights + 491520 * 1000) / 4.8e12 * 1e3)
    spread = tool.decoding_floor(official("deepseek_v3"), tool.GPUS["h200"], 1000, 1, weight_bits=16, cache_bits=16)
    assert spread["gpus"] == 10  # 1.342 TB in 141 GB each


def test_many_sequences_read_all_experts():
    config, gpu = official("deepseek_v3"), tool.GPUS["h200"]
    parts = tool.model_parts(config)
    everything = sum(parts.values(), tool.Part()).total - parts["embedding"].total
    one, many = (tool.decoding_floor(config, gpu, 100, batch, 8, 16)["weight_bytes_read"] for batch in (1, 10000))
    assert one == pytest.approx(tool.make_plan(config)["parameters"]["active_without_embedding"])
    assert many == pytest.approx(everything)


def test_sparse_attention_reads_less():
    dense, sparse = (tool.resolve_config({"model_type": kind}) for kind in ("deepseek_v3", "deepseek_v32"))
    assert economics.cache_bytes_read(sparse, 2000) == economics.cache_bytes_read(dense, 2000)
    assert economics.cache_bytes_read(sparse, 131072) == 2 * 61 * (128 * 131072 + 576 * 2048)
    nsa = tool.resolve_config({"model_type": "deepseek_nsa"})
    entries = (65536 - 32) // 16 + 1 + 16 * 64 + 512
    assert economics.cache_bytes_read(nsa, 65536) == 2 * 30 * 2 * 4 * 128 * entries


def saved_for_backward(model, tokens) -> int:
    """Bytes that autograd keeps, parameters left out, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # the storage itself, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, labels=tokens, use_cache=False)
    return sum(storage.nbytes() for storage in storages.values())


SIZES = {"hidden_size": 128, "intermediate_size": 344, "moe_intermediate_size": 64, "num_attention_heads": 4}
MLA_SIZES = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}


@pytest.mark.parametrize("family", ["llama", "deepseek", "v2_lite", "v3", "v3_mtp0"])
def test_activations_are_what_autograd_keeps(family):
    """Float32 here, since the formula takes the width; the CPU's kernel pads MLA's values to the width of its keys."""
    sizes = {name: value for name, value in SIZES.items() if name != "moe_intermediate_size" or family != "llama"}
    sizes |= MLA_SIZES if family.startswith("v") else {}
    model, config = make_model(family, **sizes).train(), make_config(family, **sizes)
    length = 256
    kept = saved_for_backward(model, torch.randint(3, 128, (2, length))) / (2 * length)
    kinds = [*config.mlp_layer_types, *[config.mtp_layer_type] * config.num_nextn_predict_layers]
    planned = sum(economics.saved_bytes_per_token(config, kind, width=4) for kind in kinds)
    planned += economics.saved_bytes_outside_layers(config, width=4)
    if family.startswith("v"):  # values and outputs as wide as keys, and a copy of the outputs without the padding
        padding = 2 * (config.qk_head_dim - config.v_head_dim) + config.v_head_dim
        planned += len(kinds) * 4 * config.num_attention_heads * padding
    assert planned == pytest.approx(kept, rel=0.05)


def test_sharding():
    config = official("deepseek_v2_lite")
    alone = tool.training_memory(config, gpus=1, zero=3, micro_batch=1, row=4096, checkpointing=True)
    assert alone["parameters"] + alone["gradients"] + alone["optimizer"] == 16 * 15706484224
    by_stage = [tool.training_memory(config, 8, zero, 1, 4096, True) for zero in range(4)]
    for stage, name in ((1, "optimizer"), (2, "gradients"), (3, "parameters")):
        assert [memory[name] * 8 == alone[name] for memory in by_stage] == [zero >= stage for zero in range(4)]
    kept = tool.training_memory(config, 8, 3, 1, 4096, checkpointing=False)
    assert kept["activations"] > 10 * by_stage[3]["activations"]
    assert kept["total"] == sum(value for name, value in kept.items() if name != "total")


# ---------------------------------------------------------------- hours


def test_operations_that_deepseek_published():
    """Table 2 of arXiv:2505.09343: 155 and 250 GFLOP for a token."""
    assert tool.training_flops(official("deepseek_v2_5"), 4096) / 1e9 == pytest.approx(155, rel=0.02)
    assert tool.training_flops(official("deepseek_v3"), 4096) / 1e9 == pytest.approx(250, rel=0.02)


def test_hours_from_the_published_rate():
    """Table 4 there: 385 TFLOP/s a GPU in V3's training, 38.94 % of the peak. Its hours follow, and so does 67B's total."""
    rate = 0.3894
    v3, dense = official("deepseek_v3"), official("deepseek_llm_67b")
    assert tool.training_hours(v3, tool.GPUS["h800"], 14.8e12, 4096, rate) == pytest.approx(2664e3, rel=0.02)
    assert tool.training_hours(dense, tool.GPUS["h800"], 1e12, 4096, rate) == pytest.approx(300.6e3, rel=0.02)
    assert tool.resolve_mfu("v3") == pytest.approx(rate, rel=0.02)


def test_the_cost_of_v3():
    """2.788 M hours and $5.576 M with the published hours of the last stages; pretraining's are the rate's own."""
    plan = tool.make_plan(official("deepseek_v3"), stages=[(14.8e12, 4096)], known_hours=[119e3, 5e3])
    hours = [stage["gpu_hours"] for stage in plan["training"]["stages"]]
    assert hours == pytest.approx([2664e3, 119e3, 5e3])
    assert plan["training"]["gpu_hours"] == pytest.approx(2.788e6)
    assert plan["training"]["cost"] == pytest.approx(5.576e6)


def test_the_cost_of_v3_with_its_extension_from_operations():
    """1000 steps of 1920 rows of 32K and 1000 of 480 rows of 128K, at pretraining's rate."""
    stages = [(14.8e12, 4096), (1000 * 1920 * 32768, 32768), (1000 * 480 * 131072, 131072)]
    training = tool.make_plan(official("deepseek_v3"), stages=stages, known_hours=[5e3])["training"]
    assert training["gpu_hours"] == pytest.approx(2.788e6, rel=0.02)


@pytest.mark.parametrize(
    ("name", "model"), [("v2", "deepseek_v2_5"), ("67b", "deepseek_llm_67b"), ("v3", "deepseek_v3")]
)
def test_measured_trainings_give_back_their_hours(name, model):
    """The sizes written in the tool are those of the official file."""
    mfu = tool.resolve_mfu(name)
    hours = tool.training_hours(official(model), tool.GPUS["h800"], 1e12, 4096, mfu)
    assert hours == pytest.approx(tool.MEASURED[name][1])


# ---------------------------------------------------------------- command line


@pytest.mark.parametrize("name", OFFICIAL)
def test_tables_and_json(name, tmp_path, capsys):
    (tmp_path / "config.json").write_text(OFFICIAL[name].read_text())
    options = ["--tokens", "2T", "62.9B@32768", "--hours", "5K", "--gpu", "h200"]
    assert tool.main([str(tmp_path), *options]) == 0
    assert "GPU hours" in capsys.readouterr().out
    assert tool.main([str(OFFICIAL[name]), *options, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["gpu"]["name"] == "h200"
    assert [stage["row"] for stage in plan["training"]["stages"]] == [4096, 32768, None]
    assert plan["weight_bits"] == (8 if name == "deepseek_v3" else 16)


def test_tables_show_the_figures():
    console = Console(record=True, width=140, file=open("/dev/null", "w"))  # noqa: SIM115
    tool.render(tool.make_plan(official("deepseek_v3"), stages=[(14.8e12, 4096)]), console)
    text = console.export_text()
    for figure in ("671B", "37.6B", "70,272", "250 GFLOP", "2,664,000", "$5,328,000"):
        assert figure in text


def test_the_demos_configs(tmp_path):
    """The files of DeepSeek's inference demos: other names, 0 for null, no prediction modules."""
    demo = {
        **{"vocab_size": 129280, "dim": 7168, "inter_dim": 18432, "moe_inter_dim": 2048, "n_layers": 61},
        **{"n_dense_layers": 3, "n_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1},
        **{"n_activated_experts": 8, "n_expert_groups": 8, "n_limited_groups": 4, "route_scale": 2.5},
        **{"score_func": "sigmoid", "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128},
        **{"qk_rope_head_dim": 64, "v_head_dim": 128, "dtype": "fp8"},
    }
    (tmp_path / "v3.json").write_text(json.dumps(demo))
    config = tool.load_config(tmp_path / "v3.json")
    expected = tool.model_parts(official("deepseek_v3"))
    assert tool.model_parts(config) == expected
    assert tool.default_weight_bits(config) == 8
    (tmp_path / "v32.json").write_text(
        json.dumps(demo | {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048})
    )
    assert "indexer" in tool.model_parts(tool.load_config(tmp_path / "v32.json"))
    lite = demo | {"q_lora_rank": 0, "score_func": "softmax"}
    (tmp_path / "lite.json").write_text(json.dumps(lite))
    assert tool.load_config(tmp_path / "lite.json").q_lora_rank is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mfu", "0"], "--mfu is '0'"),
        (["--mfu", "best"], "one of v3, v2, 67b"),
        (["--tokens", "lots"], "'lots' is no quantity"),
        (["--tokens", "1T@long"], "row length of 'long'"),
        (["--hours", "-5"], "'-5' is no quantity"),
        (["--gpus", "0"], "--gpus is 0"),
        (["--context", "4096", "-1"], "--context is -1"),
        (["--weight-bits", "0"], "--weight-bits is 0"),
        (["--price", "nan"], "--price is nan"),
    ],
)
def test_bad_options(options, message, capsys):
    options = options if "--mfu" not in options else [*options, "--tokens", "1T"]
    assert tool.main([str(OFFICIAL["deepseek_v3"]), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        ("{}", "no `model_type`"),
        ('{"model_type": "gpt2"}', "gpt2"),
        ('{"model_type": "deepseek_v3", "n_group": 7}', "`n_group` is 7"),
    ],
)
def test_bad_files(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert tool.main([str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
