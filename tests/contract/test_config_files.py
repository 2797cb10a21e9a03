"""The published config.json files: they load unchanged and come out again with every field as it was."""

import copy
import json
from pathlib import Path

import pytest
import torch
from checks import ROOT
from deepseek_repo import configuration_deepseek
from deepseek_repo.configuration_deepseek import DeepseekConfig
from deepseek_repo.modeling_deepseek import DeepseekForCausalLM
from hypothesis import given, settings, strategies as st
from tiny import FAMILIES, make_config, make_model
from transformers import AutoConfig, DeepseekV2Config, DeepseekV3Config, LlamaConfig, Trainer, TrainingArguments

FILES = {path.stem: path for path in sorted((Path(__file__).parents[1] / "configs").glob("*.json"))}
NATIVE = {"llama": LlamaConfig, "deepseek_v2": DeepseekV2Config, "deepseek_v3": DeepseekV3Config}
# Parameters of the model itself, prediction modules not counted; from the papers and from the sizes by hand.
PARAMETERS = {
    "deepseek_llm_7b": 6.91e9,
    "deepseek_llm_67b": 67.4e9,
    "deepseek_moe_16b": 16.38e9,
    "deepseek_v2_lite": 15.71e9,
    "deepseek_v2_5": 235.7e9,
    "deepseek_v3": 671.0e9,
}


@pytest.fixture(params=FILES)
def path(request) -> Path:
    return FILES[request.param]


def load(path: Path, folder: Path) -> DeepseekConfig:
    (folder / "config.json").write_text(path.read_text())
    return DeepseekConfig.from_pretrained(folder)


def test_every_file_is_listed():
    assert FILES.keys() == PARAMETERS.keys()


def test_every_field_survives(path, tmp_path):
    published = json.loads(path.read_text())
    load(path, tmp_path).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    for key, value in published.items():
        if key == "transformers_version" or (key == "rope_theta" and published["rope_scaling"] and value == 10000):
            continue  # the theta that every reader takes by itself, see test_trainer_resumes
        assert key in saved, f"{key} is lost"
        assert saved[key] == value, f"{key} was {value!r}, is {saved[key]!r}"


def test_saving_twice_changes_nothing(path, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    load(path, tmp_path).save_pretrained(first)
    DeepseekConfig.from_pretrained(first).save_pretrained(second)
    assert (second / "config.json").read_text() == (first / "config.json").read_text()


@pytest.mark.parametrize(
    "path", [path for name, path in FILES.items() if name != "deepseek_moe_16b"], ids=lambda path: path.stem
)
def test_native_class_reads_what_we_save(path, tmp_path):
    published = json.loads(path.read_text())
    original = NATIVE[published["model_type"]].from_pretrained(tmp_path_with(tmp_path / "original", path))
    load(path, tmp_path).save_pretrained(tmp_path / "saved")
    through_us = NATIVE[published["model_type"]].from_pretrained(tmp_path / "saved").to_dict()
    for key, value in original.to_dict().items():
        if key not in ("_name_or_path", "transformers_version"):
            assert through_us[key] == value, key
    assert type(AutoConfig.from_pretrained(tmp_path / "saved")) is NATIVE[published["model_type"]]


def test_number_of_parameters(path, tmp_path):
    config = load(path, tmp_path)
    config.num_nextn_predict_layers = 0
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = DeepseekForCausalLM(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(PARAMETERS[path.stem], rel=2e-3)


def test_meaning_of_the_v3_file(tmp_path):
    config = load(FILES["deepseek_v3"], tmp_path)
    assert config.attention_kind == "mla"
    assert config.mlp_layer_types == ["dense"] * 3 + ["sparse"] * 58
    assert (config.scoring_func, config.topk_method, config.n_group, config.topk_group) == (
        "sigmoid",
        "noaux_tc",
        8,
        4,
    )
    assert config.qk_head_dim == 192
    assert config.rope_interleave
    assert config.num_nextn_predict_layers == 1
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.rope_parameters["original_max_position_embeddings"] == 4096


def test_meaning_of_the_dense_and_the_first_moe_file(tmp_path):
    dense = load(FILES["deepseek_llm_67b"], tmp_path)
    assert dense.attention_kind == "gqa"
    assert set(dense.mlp_layer_types) == {"dense"}
    assert (dense.num_key_value_heads, dense.head_dim, dense.num_nextn_predict_layers) == (8, 128, 0)
    moe = load(FILES["deepseek_moe_16b"], tmp_path)
    assert moe.attention_kind == "gqa"
    assert moe.mlp_layer_types == ["dense"] + ["sparse"] * 27
    assert (moe.scoring_func, moe.topk_method, moe.routed_scaling_factor) == ("softmax", "greedy", 1.0)
    assert not hasattr(moe, "rope_interleave")


@pytest.mark.compatibility("files in DeepSeek's own format")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_names_the_published_class(family, tmp_path):
    make_model(family).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    model_type = FAMILIES[family]["model_type"]
    prefix = {"llama": "Llama", "deepseek": "Deepseek", "deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3"}
    prefix |= {"deepseek_v32": "DeepseekV32", "deepseek_nsa": "Deepseek"}  # NSA has no published class
    assert saved["model_type"] == model_type
    assert saved["architectures"] == [f"{prefix[model_type]}ForCausalLM"]
    assert not saved.keys() & {"attention_kind", "checkpoint_model_type", "mlp_layer_types_", "rope_parameters"}


def test_example_config_of_the_repository(tmp_path):
    config = load(ROOT / "config.json", tmp_path)
    model = DeepseekForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) < 50e6, "not small"
    assert config.auto_map.keys() >= {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


def test_misspelt_greedy_of_the_first_v2_files(tmp_path):
    published = {**json.loads(FILES["deepseek_v2_lite"].read_text()), "topk_method": "gready"}
    (tmp_path / "odd.json").write_text(json.dumps(published))
    assert load(tmp_path / "odd.json", tmp_path).topk_method == "greedy"


@pytest.mark.parametrize("family", FAMILIES)
def test_values_given_in_code_survive(family, tmp_path):
    """Every field of the signature, changed from its default, comes back from the file."""
    changed = {
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.01,
        "attention_bias": True,
        **({} if family in ("nsa", "v32") else {"attention_dropout": 0.1}),
        **({"index_loss_weight": 0.5, "index_warmup": True} if family == "v32" else {}),
        "use_cache": False,
        "tie_word_embeddings": True,
        "mtp_loss_weight": 0.1,
        **({} if family == "llama" else {"aux_loss_alpha": 0.5}),
        "rope_theta": 5000.0,
        "num_labels": 4,
    }
    make_config(family, **changed).save_pretrained(tmp_path)
    loaded = DeepseekConfig.from_pretrained(tmp_path)
    for key, value in changed.items():
        actual = loaded.rope_parameters["rope_theta"] if key == "rope_theta" else getattr(loaded, key)
        assert actual == value, key


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ["type", "rope_type"])
def test_both_spellings_of_rope(field, name):
    rope = {name: "yarn", "factor": 4, "original_max_position_embeddings": 64, "mscale_all_dim": 1.0}
    config = make_config("v3", **{"rope_scaling": None, field: rope})
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert config.to_dict()["rope_scaling"]["type"] == "yarn"


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 12),
    first=st.integers(0, 14),
    every=st.integers(1, 4),
    groups=st.sampled_from([1, 2, 4, 8]),
    per_group=st.integers(2, 5),
    heads=st.integers(1, 9),
    rope=st.integers(1, 20),
)
def test_round_trip_of_any_valid_config(layers, first, every, groups, per_group, heads, rope):
    given_fields = {
        "num_hidden_layers": layers,
        "first_k_dense_replace": first,
        "moe_layer_freq": every,
        "n_group": groups,
        "topk_group": groups,
        "n_routed_experts": groups * per_group,
        "num_experts_per_tok": per_group,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "qk_rope_head_dim": 2 * rope,
    }
    config = make_config("v3", **given_fields)
    kinds = ["sparse" if i >= first and i % every == 0 else "dense" for i in range(layers)]
    assert config.mlp_layer_types == kinds
    again = DeepseekConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert again.mlp_layer_types == kinds


def tmp_path_with(folder: Path, path: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(path.read_text())
    return folder


@pytest.mark.parametrize("model_type", ["deepseek", "deepseek_v2", "deepseek_v3"])
def test_a_family_of_mixtures_without_experts_stays_dense(model_type, tmp_path):
    DeepseekConfig(model_type=model_type, num_hidden_layers=5, n_routed_experts=None).save_pretrained(tmp_path)
    reloaded = DeepseekConfig.from_pretrained(tmp_path)
    assert reloaded.n_routed_experts is None
    assert set(reloaded.mlp_layer_types) == {"dense"}


# Edited after it was made


EDITS = {
    "fewer layers": {"num_hidden_layers": 2},
    "more layers": {"num_hidden_layers": 5},
    "all sparse": {"first_k_dense_replace": 0},
    "one dense": {"first_k_dense_replace": 1, "num_hidden_layers": 2},
    "every second": {"moe_layer_freq": 2, "num_hidden_layers": 4},
    "no experts": {"n_routed_experts": None},
    "more heads": {"num_attention_heads": 8},
    "wider rotation": {"qk_rope_head_dim": 12},
    "no query latent": {"q_lora_rank": None},
    "null group": {"n_group": None, "topk_group": None},
    "an indexer": {"index_topk": 4},
    "rope": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "theta": {"rope_theta": 500.0},
}


@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("how", ["attributes", "from_pretrained"])
def test_an_edited_config_is_obeyed_and_saved(edits, how, tmp_path):
    expected = DeepseekConfig(**{**FAMILIES["v3"], **({"num_key_value_heads": None} | edits)})
    config = make_config("v3")
    if how == "attributes":
        for name, value in edits.items():
            setattr(config, name, value)
    else:
        config.save_pretrained(tmp_path / "whole")
        config, unused = DeepseekConfig.from_pretrained(tmp_path / "whole", return_unused_kwargs=True, **edits)
        assert not unused
    model = DeepseekForCausalLM(config)
    shapes = {name: weight.shape for name, weight in DeepseekForCausalLM(expected).state_dict().items()}
    assert {name: weight.shape for name, weight in model.state_dict().items()} == shapes
    model.save_pretrained(tmp_path / "edited")
    again, info = DeepseekForCausalLM.from_pretrained(tmp_path / "edited", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.config.mlp_layer_types == expected.mlp_layer_types == config.mlp_layer_types
    fields = expected.to_dict()
    assert {name: value for name, value in again.config.to_dict().items() if name in fields} | {
        "dtype": None,
        "architectures": None,
        "_name_or_path": "",
    } == fields | {"dtype": None, "architectures": None, "_name_or_path": ""}


def test_v3_cut_down_as_test_models_are(tmp_path):
    config = load(FILES["deepseek_v3"], tmp_path)
    for name in ("quantization_config", "auto_map"):
        if hasattr(config, name):
            delattr(config, name)
    config.update({name: FAMILIES["v3"][name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")})
    config.update({"vocab_size": 64, "intermediate_size": 16, "moe_intermediate_size": 8, "n_routed_experts": 16})
    config.update({"kv_lora_rank": 16, "q_lora_rank": 8, "first_k_dense_replace": 1})
    config.num_nextn_predict_layers = 0
    assert (config.mlp_layer_types, config.num_key_value_heads) == (["dense", "sparse", "sparse"], 4)
    DeepseekForCausalLM(config).save_pretrained(tmp_path / "cut")
    assert NATIVE["deepseek_v3"].from_pretrained(tmp_path / "cut").num_key_value_heads == 4
    assert DeepseekConfig.from_pretrained(tmp_path / "cut").mlp_layer_types == config.mlp_layer_types


def test_layers_that_were_given_stay(tmp_path):
    config = make_config("v3", mlp_layer_types=["sparse", "dense", "sparse"])
    config.first_k_dense_replace = 3
    config.save_pretrained(tmp_path)
    assert DeepseekConfig.from_pretrained(tmp_path).mlp_layer_types == ["sparse", "dense", "sparse"]
    config.mlp_layer_types = None
    assert config.mlp_layer_types == ["dense"] * 3


def test_layer_types_of_a_file_do_not_outlive_an_edit(tmp_path):
    config = make_config("v3", layer_types=["full_attention"] * 3)
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path)
    assert DeepseekConfig.from_pretrained(tmp_path).num_hidden_layers == 2


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"num_hidden_layers": -1}, "`num_hidden_layers` is -1"),
        ({"num_hidden_layers": "2"}, "`num_hidden_layers` is '2'"),
        ({"n_group": 3}, "`n_group` is 3, which does not divide"),
        ({"qk_rope_head_dim": 7}, "`qk_rope_head_dim` is 7"),
        ({"mlp_layer_types": ["dense"]}, "for 3 layers"),
        ({"layer_types": ["full_attention"]}, "`layer_types` has 1 entries for 3 layers"),
        ({"hidden_act": "x"}, "`hidden_act` is 'x'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling.factor"),
        ({"attention_dropout": 2}, "`attention_dropout` is 2"),
    ],
    ids=str,
)
def test_an_impossible_edit_is_refused(edit, words, tmp_path):
    config = make_config("v3")
    config.save_pretrained(tmp_path / "whole")
    for name, value in edit.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=words):
        DeepseekForCausalLM(config)
    with pytest.raises(ValueError, match=words):
        config.save_pretrained(tmp_path / "edited")
    assert not (tmp_path / "edited").exists()
    if "layer_types" not in edit:  # no field of ours
        with pytest.raises(ValueError, match=words):
            DeepseekConfig.from_pretrained(tmp_path / "whole", **edit)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_comparison(family):
    config = make_config(family)
    other = copy.deepcopy(config)
    assert other == config
    other.hidden_size += 2
    assert other != config
    assert DeepseekConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


# Fields of other families


def test_a_config_has_the_fields_of_its_family_only(path, tmp_path):
    published = json.loads(path.read_text())
    native = NATIVE.get(published["model_type"])
    has = published.keys() | (native.from_dict(published).to_dict().keys() if native else set())
    names = [*configuration_deepseek._MLA_FIELDS, *configuration_deepseek._MOE_FIELDS]
    names += [*configuration_deepseek._INDEXER_FIELDS, *configuration_deepseek._NSA_SIZES]
    # what a published file leaves out and its own code has by default
    defaulted = {"rope_interleave", "topk_method", "scoring_func", "moe_layer_freq", "aux_loss_alpha"}
    defaulted |= {"n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor"}
    config = load(path, tmp_path)
    for name in names:
        if name not in defaulted:
            assert hasattr(config, name) == (name in has), name
        elif published["model_type"] == "llama":
            assert not hasattr(config, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_engines_ask_for(family):
    config = make_config(family)
    assert hasattr(config, "index_topk") == hasattr(config, "index_warmup") == (family == "v32") == config.has_indexer
    assert hasattr(config, "kv_lora_rank") == hasattr(config, "q_lora_rank") == config.has_latent
    assert hasattr(config, "n_routed_experts") == hasattr(config, "num_experts_per_tok") == (family != "llama")
    assert hasattr(config, "nsa_window_size") == (family == "nsa")


# Readers of what is saved


@pytest.mark.compatibility("`Trainer`, resumed")
@pytest.mark.parametrize("family", FAMILIES)
def test_trainer_resumes(family, tmp_path):
    """It reads the checkpoint's config.json as a plain PreTrainedConfig."""
    model, row = make_model(family), {"input_ids": [3, 4, 5, 6, 7, 8], "labels": [3, 4, 5, 6, 7, 8]}
    settings = {"output_dir": str(tmp_path), "save_steps": 1, "per_device_train_batch_size": 1, "report_to": []}
    for steps, resume in ((1, None), (2, True)):
        arguments = TrainingArguments(**settings, max_steps=steps, use_cpu=True, disable_tqdm=True)
        trainer = Trainer(model=model, args=arguments, train_dataset=[row] * 4)
        trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("theta", [10000.0, 5000.0])
@pytest.mark.parametrize("scaling", [None, FAMILIES["v3"]["rope_scaling"], {"type": "linear", "factor": 2.0}])
def test_all_readers_find_the_same_rope(scaling, theta, tmp_path):
    config = make_config("v3", rope_scaling=scaling, rope_theta=theta)
    config.save_pretrained(tmp_path)
    for reader in (DeepseekConfig, DeepseekV3Config):
        rope = reader.from_pretrained(tmp_path).rope_parameters
        assert {name: rope[name] for name in config.rope_parameters} == config.rope_parameters
