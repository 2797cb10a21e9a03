"""Config and weight files that are damaged or made to do harm: a clear error, no hang, nothing read from elsewhere."""

import json
import math
import re
import shutil
import struct

import pytest
import torch
from checks import ROOT
from deepseek_repo import configuration_deepseek
from deepseek_repo.configuration_deepseek import DeepseekConfig
from deepseek_repo.modeling_deepseek import DeepseekForCausalLM
from hypothesis import assume, given, settings, strategies as st
from tiny import FAMILIES, make_model
from transformers import AutoConfig, AutoModelForCausalLM

FIELDS = set().union(*FAMILIES.values(), *configuration_deepseek.FAMILY_DEFAULTS.values())
FIELDS |= {"hidden_act", "rms_norm_eps", "attention_dropout", "use_cache", "tie_word_embeddings", "rope_theta"}
FIELDS |= {
    "rope_parameters",
    "mlp_layer_types",
    "attention_kind",
    "architectures",
    "dtype",
    "torch_dtype",
    "num_labels",
}
FIELDS |= {"id2label", "layer_types", "quantization_config", "mtp_loss_weight", "index_warmup", "initializer_range"}

_leaves = st.sampled_from([None, True, -1, 0, 0.5, 3, 2**31 - 1, 2**31, 10**30, 1e308, "", "x", "yarn", "\ud800"])
_leaves |= st.floats() | st.integers()
_values = st.recursive(
    _leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
_ropes = st.dictionaries(
    st.sampled_from(["type", "rope_type", "factor", "beta_fast", "mscale", "original_max_position_embeddings"]),
    st.sampled_from(["yarn", "linear", "dynamic"]) | _values,
)


# ---------------------------------------------------------------- config.json


@pytest.fixture(scope="module")
def checkpoint_with_code(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model("v3").save_pretrained(folder)
    for module in ROOT.glob("*_deepseek.py"):
        shutil.copy(module, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = json.loads((ROOT / "config.json").read_text())["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refusal(**fields) -> str | None:
    """The message with which a config is refused, None if it is taken and can be written; other errors pass."""
    try:
        config = DeepseekConfig(**fields)
    except ValueError as error:
        return str(error)
    config.to_json_string()
    return None


@given(family=st.sampled_from(sorted(FAMILIES)), field=st.sampled_from(sorted(FIELDS)), value=_values)
@settings(max_examples=300, deadline=None)
def test_any_value_of_any_field_works_or_is_named(family, field, value):
    message = refusal(**{**FAMILIES[family], field: value})
    # Where the value itself is possible, what no longer fits is another field.
    assert message is None or any(f"`{name}" in message for name in FIELDS | {"rope_scaling"}), message


_extremes = [True, -1, 0, 1, 2, 3, 7, 0.5, 100, 2**16, 2**24, 2**31 - 1, 10**12, 10**30, math.nan, math.inf, 1e308]
_extremes += [1e-320, "", "x", "3", [], [1], [None], {}, {"a": 1}]


@given(
    family=st.sampled_from(["v3", "v32", "nsa", "llama"]),
    field=st.sampled_from(sorted(FIELDS)),
    value=st.sampled_from(_extremes),
)
@settings(max_examples=150, deadline=None)
def test_a_config_that_is_taken_makes_a_model_that_works(family, field, value):
    """Small models run, train and generate; large ones have at least a size. One layer, for the sake of speed."""
    fields = {**FAMILIES[family], "num_hidden_layers": 1, "first_k_dense_replace": 0, field: value}
    try:
        config = DeepseekConfig(**fields)
    except ValueError:
        return  # named, as the test above says
    assume(config.num_hidden_layers + config.num_nextn_predict_layers < 20)
    assume((getattr(config, "n_routed_experts", None) or 0) <= 512)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in DeepseekForCausalLM(config).parameters())
    assert size > 0
    if size > 500_000 or config.vocab_size < 7:
        return
    model, ids = DeepseekForCausalLM(config), torch.tensor([[3, 4, 5, 6]])
    model.train()(input_ids=ids, labels=ids).loss.backward()
    model.eval().generate(ids, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("pad_token_id", 128, "`vocab_size` is 128"),
        ("pad_token_id", -1, "or null"),
        ("pad_token_id", True, "or null"),
        ("eos_token_id", [1, "x"], "a list of such"),
        ("bos_token_id", 0.5, "or null"),
        ("bos_token_id", 10**30, "or null"),
        ("rope_theta", 1, "from 2"),
        ("aux_loss_alpha", 10**30, "1e+12"),
        ("hidden_size", 2**31 - 1, "at most 16777216"),
    ],
)
def test_values_that_failed_deep_inside_are_refused(field, value, named):
    with pytest.raises(ValueError, match=f"`{field}` is .*{re.escape(named)}"):
        DeepseekConfig(**{**FAMILIES["v3"], field: value})


def test_rows_shorter_than_the_chain_of_prediction_modules_train():
    model, ids = make_model("v3", num_nextn_predict_layers=4).train(), torch.tensor([[3, 4, 5]])
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    assert output.mtp_loss.isfinite()
    assert output.mtp_loss > 0  # the first module has something to predict


def test_heads_of_no_width_and_blocks_without_end_are_refused():
    with pytest.raises(ValueError, match="`head_dim` is 0"):
        DeepseekConfig(**{**FAMILIES["llama"], "num_attention_heads": 100})
    with pytest.raises(ValueError, match="`nsa_num_select_blocks` is 2147483647"):
        DeepseekConfig(**{**FAMILIES["nsa"], "nsa_num_select_blocks": 2**31 - 1})


@pytest.mark.parametrize("text", [10**12, -1, None, "2", 0.5, [3], True, math.nan])
@pytest.mark.parametrize("field", ["num_hidden_layers", "vocab_size", "n_routed_experts"])
def test_the_auto_classes_refuse_them_too(checkpoint_with_code, field, text):
    path = checkpoint_with_code / "config.json"
    config = json.loads(path.read_text())
    if text is None and field == "n_routed_experts":
        return  # null: no experts
    path.write_text(json.dumps({**config, field: text}))
    try:
        with pytest.raises(ValueError, match=f"`{field}`"):
            AutoModelForCausalLM.from_pretrained(checkpoint_with_code, trust_remote_code=True)
    finally:
        path.write_text(json.dumps(config))


@given(rope=_ropes)
@settings(max_examples=100, deadline=None)
def test_any_rope_scaling_works_or_is_named(rope):
    message = refusal(**{**FAMILIES["v3"], "rope_scaling": rope})
    assert message is None or "`rope_" in message, message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 2**31 - 1),
        ("num_nextn_predict_layers", 2**31 - 1),
        ("num_labels", 2**31 - 1),
        ("num_labels", None),
        ("architectures", 3),
        ("torch_dtype", "x"),
        ("dtype", [1]),
        ("id2label", {"a": "b"}),
        ("layer_types", ["evil"] * 3),
        ("layer_types", ["full_attention"]),
        ("quantization_config", 7),
    ],
)
def test_what_would_fill_the_memory_or_fail_later_is_refused(field, value):
    with pytest.raises(ValueError, match=f"`{field}`"):
        DeepseekConfig(**{**FAMILIES["v3"], field: value})


@pytest.mark.parametrize(
    "text",
    ["[]", "null", "3", '"x"', "[" * 100_000, '{"vocab_size": 1' + "0" * 5000 + "}", "{", "\x00"],
    ids=lambda text: text[:20],
)
def test_files_that_are_no_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises((ValueError, OSError), match=r"config\.json"):
        DeepseekConfig.from_pretrained(tmp_path)


def test_an_unknown_model_type(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt9"}')
    with pytest.raises(ValueError, match=r"`model_type` is 'gpt9'.*deepseek_v3"):
        DeepseekConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [[0, 0], [128], ["a", 1], [True, 128], 128, None])
def test_wrong_block_sizes(tmp_path, size):
    make_model("v3").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": size}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="weight_block_size"):
        DeepseekForCausalLM.from_pretrained(tmp_path)


# ---------------------------------------------------------------- weights


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint in several files, and beside its folder a copy of the first of them."""
    folder = tmp_path / "checkpoint"
    make_model("v3").save_pretrained(folder, max_shard_size="40KB")
    shutil.copy(sorted(folder.glob("*.safetensors"))[0], tmp_path / "outside.safetensors")
    return folder


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "ABSOLUTE", "", ".", "..", "a/../b", "a\0b"]
)
def test_an_index_points_at_nothing_outside_its_folder(sharded, name):
    if name == "ABSOLUTE":
        name = str(sharded.parent / "outside.safetensors")
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = min(index["weight_map"].values())
    index["weight_map"] = {key: name if file == first else file for key, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json names the shard .* download it again"):
        DeepseekForCausalLM.from_pretrained(sharded)


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [-4, 8]},
        {"data_offsets": [8, 0]},
        {"data_offsets": [0, 10**30]},
        {"data_offsets": [0, float("inf")]},
        {"shape": [10**12, 10**12]},
        {"shape": "a"},
        {"shape": [1]},
        {"dtype": "X9"},
        {"dtype": 3},
    ],
    ids=str,
)
def test_headers_that_lie(tmp_path, change):
    make_model("v3").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["lm_head.weight"] |= change
    written = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + data[8 + length :])
    with pytest.raises(ValueError, match=r"model\.safetensors .*download it again"):
        DeepseekForCausalLM.from_pretrained(tmp_path)


def test_a_header_nested_without_end(tmp_path):
    make_model("v3").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000 + b"0" * 99)
    with pytest.raises(ValueError, match="download it again"):
        DeepseekForCausalLM.from_pretrained(tmp_path)


def test_pickles_are_read_only_if_asked(tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for more in ({}, {"use_safetensors": None}, {"use_safetensors": True}):
        with pytest.raises(OSError, match="use_safetensors=False"):
            DeepseekForCausalLM.from_pretrained(tmp_path, **more)
    loaded = DeepseekForCausalLM.from_pretrained(tmp_path, use_safetensors=False)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_pickles_are_not_read_through_the_auto_classes(checkpoint):
    folder = checkpoint("v3")
    torch.save(make_model("v3").state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="use_safetensors=False"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_code_is_not_run_without_permission(checkpoint):
    folder = checkpoint("v3")
    marker = folder / "ran"
    for file in folder.glob("*_deepseek.py"):
        file.write_text(f"open({str(marker)!r}, 'w').close()\n" + file.read_text())
    assert "deepseek_repo" not in type(AutoConfig.from_pretrained(folder, trust_remote_code=False)).__module__
    assert not marker.exists()
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists()
    assert (ROOT / "configuration_deepseek.py").read_text().startswith('"""'), "the repository itself was changed"
