"""Mistakes are answered by a ValueError that names what is wrong, with which value, what is allowed and what to do."""

import json
import re
import shutil
import struct

import pytest
import torch
from deepseek_repo.configuration_deepseek import DeepseekConfig
from deepseek_repo.modeling_deepseek import DeepseekForCausalLM
from hypothesis import given, settings, strategies as st
from tiny import FAMILIES, make_config, make_model, make_tokens

YARN = FAMILIES["v3"]["rope_scaling"]
LLAMA3 = {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
LONG = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
# family, fields, and what the message must hold: the field, the value, the allowed or the remedy
WRONG = [
    ("v3", {"hidden_size": 0}, ["hidden_size", "0", "at least 1"]),
    ("v3", {"vocab_size": -5}, ["vocab_size", "-5", "at least 1"]),
    ("v3", {"num_hidden_layers": 2.0}, ["num_hidden_layers", "2.0", "whole number"]),
    ("v3", {"num_attention_heads": "4"}, ["num_attention_heads", "'4'", "whole number"]),
    ("v3", {"intermediate_size": True}, ["intermediate_size", "True", "whole number"]),
    ("v3", {"max_position_embeddings": 2**31}, ["max_position_embeddings", str(2**31)]),
    ("v3", {"kv_lora_rank": 0}, ["kv_lora_rank", "0", "at least 1"]),
    ("v3", {"q_lora_rank": 0}, ["q_lora_rank", "0", "at least 1"]),
    ("v3", {"qk_nope_head_dim": None}, ["qk_nope_head_dim", "None", "whole number"]),
    ("v3", {"qk_rope_head_dim": 7}, ["qk_rope_head_dim", "7", "even"]),
    ("v3", {"v_head_dim": -1}, ["v_head_dim", "-1", "at least 1"]),
    ("llama", {"num_key_value_heads": 3}, ["num_key_value_heads", "3", "num_attention_heads", "4", "divi"]),
    ("llama", {"head_dim": 5}, ["head_dim", "5", "even"]),
    ("llama", {"mlp_bias": True}, ["mlp_bias", "false"]),
    ("v3", {"n_group": 3}, ["n_group", "3", "n_routed_experts", "8", "divi"]),
    ("v3", {"topk_group": 5}, ["topk_group", "5", "4"]),
    ("v3", {"n_group": 8, "topk_group": 8}, ["n_group", "8", "noaux_tc", "at most 4"]),
    ("v3", {"num_experts_per_tok": 5}, ["num_experts_per_tok", "5", "at most 4"]),
    ("v2_lite", {"num_experts_per_tok": 9}, ["num_experts_per_tok", "9", "at most 8"]),
    ("v3", {"scoring_func": "relu"}, ["scoring_func", "'relu'", "'softmax'", "'sigmoid'"]),
    ("v3", {"topk_method": "best"}, ["topk_method", "'best'", "'greedy'", "'group_limited_greedy'", "'noaux_tc'"]),
    ("v3", {"topk_method": None}, ["topk_method", "None", "'noaux_tc'"]),
    ("v3", {"topk_method": ["greedy"]}, ["topk_method", "['greedy']"]),
    ("v3", {"attention_kind": "mha"}, ["attention_kind", "'mha'", "'gqa'", "'mla'"]),
    ("v3", {"mlp_layer_types": ["dense"]}, ["mlp_layer_types", "['dense']", "3 layers"]),
    ("v3", {"mlp_layer_types": ["dense", "moe", "dense"]}, ["mlp_layer_types", "'moe'", "'dense'", "'sparse'"]),
    ("llama", {"mlp_layer_types": ["dense", "sparse", "dense"]}, ["mlp_layer_types", "n_routed_experts"]),
    ("v3", {"first_k_dense_replace": -1}, ["first_k_dense_replace", "-1", "at least 0"]),
    ("v3", {"moe_layer_freq": 0}, ["moe_layer_freq", "0", "at least 1"]),
    ("v3", {"num_nextn_predict_layers": -1}, ["num_nextn_predict_layers", "-1", "at least 0"]),
    ("v3", {"n_shared_experts": 1.5}, ["n_shared_experts", "1.5", "whole number"]),
    ("v3", {"aux_loss_alpha": -0.1}, ["aux_loss_alpha", "-0.1", "must be a number"]),
    ("v3", {"aux_loss_alpha": float("nan")}, ["aux_loss_alpha", "nan"]),
    ("v3", {"mtp_loss_weight": "0.3"}, ["mtp_loss_weight", "'0.3'", "number"]),
    ("v3", {"rms_norm_eps": None}, ["rms_norm_eps", "None", "number"]),
    ("v3", {"attention_dropout": 1.5}, ["attention_dropout", "1.5"]),
    ("v3", {"model_type": "mixtral"}, ["model_type", "'mixtral'", "'deepseek_v3'"]),
    ("v3", {"rope_scaling": "yarn"}, ["rope_scaling", "'yarn'", "factor"]),
    ("v3", {"rope_scaling": {**YARN, "type": "ntk"}}, ["rope_scaling", "'ntk'", "'yarn'"]),
    ("v3", {"rope_scaling": {**YARN, "factor": 0.5}}, ["factor", "0.5", "must be a number", "1"]),
    ("v3", {"rope_scaling": {**YARN, "factor": None}}, ["factor", "None"]),
    ("v3", {"rope_scaling": {"type": "yarn"}}, ["factor", "None"]),
    (
        "v3",
        {"rope_scaling": {**YARN, "original_max_position_embeddings": 0}},
        ["original_max_position", "0", "from 1"],
    ),
    ("v3", {"rope_scaling": {"type": "llama3"}}, ["rope_scaling.factor", "None", "number"]),
    ("v3", {"rope_scaling": {"type": "llama3", "factor": 8}}, ["rope_scaling.low_freq_factor", "None", "llama3"]),
    ("v3", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1}}, ["low_freq_factor", "1", "high_freq_factor"]),
    ("v3", {"rope_scaling": {"type": "longrope"}}, ["rope_scaling.short_factor", "None", "list of 4 numbers"]),
    ("v3", {"rope_scaling": LONG | {"long_factor": [1.0]}}, ["rope_scaling.long_factor", "[1.0]", "list of 4"]),
    ("v3", {"rope_scaling": LONG | {"long_factor": [1, 1, 1, 0]}}, ["rope_scaling.long_factor", "0"]),
    ("v3", {"rope_scaling": {"type": "dynamic", "factor": 2}, "qk_rope_head_dim": 2}, ["'dynamic'", "2", "4 or more"]),
    ("v3", {"rope_theta": 0}, ["rope_theta", "0", "must be a number"]),
    ("v3", {"rope_theta": "10000"}, ["rope_theta", "'10000'"]),
    ("v3", {"hidden_act": "gelu_typo"}, ["hidden_act", "'gelu_typo'"]),
    ("v3", {"routed_scaling_factor": "2.5"}, ["routed_scaling_factor", "'2.5'"]),
    ("v3", {"norm_topk_prob": "yes"}, ["norm_topk_prob", "'yes'"]),
    ("v3", {"initializer_range": -1.0}, ["initializer_range", "-1.0"]),
]
COUNTS = ["hidden_size", "num_hidden_layers", "kv_lora_rank", "n_routed_experts", "num_experts_per_tok", "n_group"]
COUNTS += ["vocab_size", "moe_intermediate_size", "num_nextn_predict_layers", "first_k_dense_replace"]


@pytest.mark.parametrize(("family", "fields", "words"), WRONG, ids=lambda value: str(value)[:50])
def test_wrong_fields(family, fields, words):
    with pytest.raises(ValueError) as caught:
        make_config(family, **fields)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "rope", [LLAMA3, LONG, {"type": "dynamic", "factor": 2}, {"type": "linear", "factor": 2}], ids=str
)
def test_other_ropes_work(rope):
    assert make_model("v3", rope_scaling=rope)(make_tokens(1, 4)).logits.isfinite().all()


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(COUNTS),
    value=st.one_of(
        st.integers(max_value=-1),
        st.floats(),
        st.booleans(),
        st.text(max_size=5),
        st.lists(st.integers(), max_size=2),
        st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    ),
)
def test_sizes_of_a_wrong_type(name, value):
    if name == "n_routed_experts" and not value:
        return  # a false value is how files write "no experts"
    if name == "num_nextn_predict_layers" and not value:
        return
    with pytest.raises(ValueError, match=f"`{name}` is {re.escape(repr(value))}"):
        make_config("v3", **{name: value})


@pytest.mark.parametrize("family", ["llama", "v3"])
@pytest.mark.parametrize("token", [128, 10**6, -1])
def test_token_ids_out_of_range(family, token):
    tokens = make_tokens(1, 4)
    tokens[0, 2] = token
    with pytest.raises(ValueError) as caught:
        make_model(family)(tokens)
    for word in ("input_ids", str(token), "vocab_size", "128", "resize_token_embeddings"):
        assert word in str(caught.value)


def test_ids_and_embeddings_at_once():
    model, tokens = make_model("v3"), make_tokens(1, 4)
    for inputs in ({"input_ids": tokens, "inputs_embeds": model.get_input_embeddings()(tokens)}, {}):
        with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
            model(**inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_tokens(family):
    model = make_model(family)
    with pytest.raises(ValueError, match="has no tokens"):
        model(torch.empty(2, 0, dtype=torch.long))


def test_unknown_attention_implementation():
    with pytest.raises(ValueError, match="fastest"):
        DeepseekForCausalLM._from_config(make_config("v3"), attn_implementation="fastest")


# Damaged files


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint in one file and the same in several."""
    folder = tmp_path_factory.mktemp("whole")
    model = make_model("v3")
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "sharded", max_shard_size="60KB")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    def copy(kind: str):
        return shutil.copytree(whole / kind, tmp_path / kind)

    return copy


def refuses(folder, *words: str):
    with pytest.raises(ValueError) as caught:
        DeepseekForCausalLM.from_pretrained(folder)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("cut", ["empty", "in the length", "in the header", "after the header", "half", "last byte"])
@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_truncated_file(copied, kind, cut):
    folder = copied(kind)
    path = sorted(folder.glob("*.safetensors"))[0]
    data = path.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    cuts = {
        "empty": 0,
        "in the length": 5,
        "in the header": header // 2,
        "after the header": header,
        "half": len(data) // 2,
        "last byte": len(data) - 1,
    }
    path.write_bytes(data[: cuts[cut]])
    refuses(folder, path.name, "download it again")


@pytest.mark.parametrize(
    "start", [b"<!DOCTYPE html><html>Access denied</html>", b"version https://git-lfs.github.com"]
)
def test_a_web_page_instead_of_a_file(copied, start):
    folder = copied("single")
    (folder / "model.safetensors").write_bytes(start + b" " * 200)
    refuses(folder, "model.safetensors", "download it again")


@pytest.mark.parametrize("header", [b"{broken", b"[1, 2]", b'{"a": 3}', b'{"a": {"dtype": "F32"}}', b"\xff\xfe{}"])
def test_corrupt_header(copied, header):
    folder = copied("single")
    header = header.ljust(64)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"0" * 999)
    refuses(folder, "model.safetensors", "download it again")


def test_missing_shard(copied):
    folder = copied("sharded")
    path = sorted(folder.glob("*.safetensors"))[1]
    path.unlink()
    refuses(folder, path.name, "download it again")


def test_shards_swapped(copied):
    folder = copied("sharded")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    refuses(folder, first.name, "download it again")


@pytest.mark.parametrize("index", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "null"])
def test_garbage_index(copied, index):
    folder = copied("sharded")
    (folder / "model.safetensors.index.json").write_text(index)
    refuses(folder, "model.safetensors.index.json", "download")


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 36},
        {"vocab_size": 200},
        {"kv_lora_rank": 18},
        {"moe_intermediate_size": 20},
        {"n_routed_experts": 12},
        {"intermediate_size": 44},
        {"num_attention_heads": 2},
    ],
    ids=str,
)
def test_weights_that_do_not_fit_the_config(copied, fields):
    folder = copied("single")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    refuses(folder, "config.json", "shape")


def test_no_weights_at_all(copied):
    folder = copied("single")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=re.escape(str(folder))):
        DeepseekForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{"])
def test_broken_config_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises((OSError, ValueError), match="config"):
        DeepseekConfig.from_pretrained(tmp_path)


def test_wrong_field_in_a_file(copied):
    folder = copied("single")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "topk_method": "best"}))
    refuses(folder, "topk_method", "'best'")


def test_unknown_fields_are_kept(copied, tmp_path):
    """Later files may hold fields that this code does not know; they survive."""
    folder = copied("single")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "later_field": [1, 2]}))
    model = DeepseekForCausalLM.from_pretrained(folder)
    assert model.config.later_field == [1, 2]
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["later_field"] == [1, 2]


def test_missing_weight_is_reported(copied):
    """A checkpoint that lacks a tensor loads with a report, as in transformers; nothing claims that it is whole."""
    from safetensors.torch import load_file, save_file

    folder = copied("single")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _, report = DeepseekForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert report["missing_keys"] == {"model.layers.1.self_attn.o_proj.weight"}


def test_attention_biases_and_tokens_stay_finite_when_everything_is_padding():
    """A row of padding only (an empty text in a batch) gives numbers, not NaN."""
    for family in ("llama", "v3"):
        tokens, mask = make_tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
        mask[1] = 0
        for attention in ("eager", "sdpa"):
            logits = make_model(family, attention=attention)(tokens, attention_mask=mask).logits
            assert logits.isfinite().all(), (family, attention)
