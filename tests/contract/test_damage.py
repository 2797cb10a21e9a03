"""Every field and every tensor of a tiny checkpoint damaged in turn: a model that works comes out, or an error with its
name. What cannot be told from a model that somebody may want (another `rms_norm_eps`) must work."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checks import assert_close
from deepseek_repo import loading_deepseek
from deepseek_repo.modeling_deepseek import DeepseekForCausalLM, DeepseekForSequenceClassification, DeepseekModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, make_model, make_tokens

VALUES = ["x", "3", -1, 0, 1, 1.5, None, True, [], {}, [1], 10**12, 1e30]
# Of the damages every seventh or each, and the families: by default some of everything, all of it as a slow test.
EXTENT = [(7, family) for family in ("deepseek", "v32", "nsa")]
EXTENT += [pytest.param(1, family, marks=pytest.mark.slow) for family in FAMILIES]
DAMAGES = ("dropped", "shorter", "longer", "one dimension more", "whole numbers", "flags", "float16")


@pytest.fixture
def folder(family, tmp_path) -> Path:
    make_model(family).save_pretrained(tmp_path / family)
    return tmp_path / family


def runs(model):
    """A model that can be used: finite logits, a token more."""
    tokens = make_tokens(1, 5)
    tokens = tokens % min(128, model.config.vocab_size)
    assert model(tokens).logits.isfinite().all()
    model.generate(tokens, max_new_tokens=2, do_sample=False, pad_token_id=0)


def damage(tensor: torch.Tensor, how: str) -> torch.Tensor | None:
    """The tensor as another tool or an edit by hand might have left it."""
    return {
        "dropped": lambda: None,
        "shorter": lambda: tensor[:-1].clone(),
        "longer": lambda: torch.cat((tensor, tensor[:1])),
        "one dimension more": lambda: tensor[None].clone(),
        "whole numbers": lambda: tensor.float().round().to(torch.int32),
        "flags": lambda: tensor.float() > 0,
        "float16": lambda: tensor.to(torch.float16),
    }[how]()


def write(folder: Path, tensors: dict[str, torch.Tensor], **changed):
    tensors = {name: tensor for name, tensor in (tensors | changed).items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("share", "family"), EXTENT)
def test_each_field_of_the_config(share, family, folder):
    path, faults = folder / "config.json", []
    config = json.loads(path.read_text())
    for i, field in enumerate(sorted(config.keys() - {"transformers_version"})):
        for value in VALUES[i % share :: share]:
            path.write_text(json.dumps({**config, field: value}))
            try:
                runs(DeepseekForCausalLM.from_pretrained(folder))
            except (ValueError, OSError) as error:
                # What other fields or the files no longer fit is named as such.
                if (
                    f"`{field}" not in str(error)
                    and "config.json" not in str(error)
                    and "is null; set it" not in str(error)
                ):
                    faults.append((field, value, str(error)[:150]))
            except Exception as error:
                faults.append((field, value, repr(error)[:150]))
    assert not faults, "\n".join(map(str, faults))


@pytest.mark.parametrize(("share", "family"), EXTENT)
@torch.no_grad()
def test_each_tensor(share, family, folder):
    tensors, tokens, faults = load_file(folder / "model.safetensors"), make_tokens(1, 12), []
    expected = make_model(family)(tokens).logits
    for i, (name, tensor) in enumerate(tensors.items()):
        if ".eh_proj." in name or (tensor.ndim == 2 and ".experts." in name and ".3." not in name):
            continue  # without it there is no prediction module; one expert stands for all
        for how in DAMAGES[i % share :: share]:
            write(folder, tensors, **{name: damage(tensor, how)})
            try:
                logits = DeepseekForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
            except ValueError as error:
                if name not in str(error) or "download" not in str(error).lower() or how == "float16":
                    faults.append((name, how, str(error)[:150]))
            except Exception as error:
                faults.append((name, how, repr(error)[:150]))
            else:
                if how != "float16" or (logits - expected).abs().max() > 0.5:
                    faults.append((name, how, "taken"))
    assert not faults, "\n".join(map(str, faults))


@pytest.mark.parametrize("family", ["v3"])
def test_an_entry_of_the_index_is_lost(family, tmp_path):
    make_model(family).save_pretrained(tmp_path, max_shard_size="40KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name in list(index["weight_map"])[::7]:
        if ".eh_proj." in name:
            continue
        rest = {key: file for key, file in index["weight_map"].items() if key != name}
        path.write_text(json.dumps({**index, "weight_map": rest}))
        with pytest.raises(ValueError, match=rf"no tensor {name}.*download"):
            DeepseekForCausalLM.from_pretrained(tmp_path)


def test_what_may_be_missing(tmp_path):
    """Heads that are still to be trained, the head of a base model, and an indexer that a model is given."""
    make_model("v3", num_nextn_predict_layers=0).save_pretrained(tmp_path / "v3")
    assert DeepseekForCausalLM.from_pretrained(tmp_path / "v3", index_topk=4).config.has_indexer
    base = DeepseekModel.from_pretrained(tmp_path / "v3")
    base.save_pretrained(tmp_path / "base")
    tokens = make_tokens(1, 5)
    loaded = DeepseekForCausalLM.from_pretrained(tmp_path / "base")
    assert_close(loaded.model(tokens).last_hidden_state, base(tokens).last_hidden_state, "states")
    DeepseekForSequenceClassification.from_pretrained(tmp_path / "v3")
    make_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    DeepseekForCausalLM.from_pretrained(tmp_path / "tied")


# FP8


@pytest.fixture
def fp8(tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint with blocks of 16 x 16, and its tensors."""
    make_model("v3").save_pretrained(tmp_path)
    tensors = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        tensors[name] = tensor
        if name.endswith("_proj.weight") and "eh_proj" not in name:
            rows, columns = tensor.shape
            tensors[name] = tensor.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(-(-rows // 16), -(-columns // 16))
    write(tmp_path, tensors)
    path = tmp_path / "config.json"
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    return tmp_path, tensors


def test_each_scale(fp8):
    folder, tensors = fp8
    runs(DeepseekForCausalLM.from_pretrained(folder))
    scales, faults = [name for name in tensors if name.endswith("_scale_inv")], []
    assert len(scales) > 20
    for scale in scales[::9]:
        weight = scale.removesuffix("_scale_inv")
        changes = [{scale: damage(tensors[scale], how)} for how in DAMAGES[:-1]]
        changes += [{weight: None}, {weight: tensors[weight].to(torch.bfloat16)}]
        for change in changes:
            write(folder, tensors, **change)
            try:
                DeepseekForCausalLM.from_pretrained(folder)
            except ValueError as error:
                if weight not in str(error) or "download" not in str(error):
                    faults.append((scale, str(error)[:150]))
            except Exception as error:
                faults.append((scale, repr(error)[:150]))
            else:
                faults.append((scale, "taken"))
    assert not faults, "\n".join(map(str, faults))


def test_fp8_of_which_the_config_says_nothing(fp8):
    folder, _ = fp8
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"proj\.weight in .* is FP8.*no `quantization_config`"):
        DeepseekForCausalLM.from_pretrained(folder)


# Generation


@pytest.mark.parametrize("share", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["v3"])
def test_each_field_of_the_generation_config(share, family, folder):
    path, faults = folder / "generation_config.json", []
    tables = loading_deepseek
    fields = [*tables._COUNTS, *tables._NUMBERS, *tables._FLAGS, *tables._TOKENS, *tables._SOME_TOKENS]
    fields += [*tables._TOKEN_LISTS, "bad_words_ids", "sequence_bias", "watermarking_config", "compile_config"]
    fields += [
        "cache_config",
        "exponential_decay_length_penalty",
        "num_assistant_tokens_schedule",
        "assistant_lookbehind",
    ]
    fields += ["target_lookbehind", "encoder_repetition_penalty", "transformers_version", "a_later_field"]
    for i, field in enumerate([*fields, "stop_strings", "early_stopping", "cache_implementation"]):
        for value in ["x", -1, 0, 1.5, True, [], {}, ["x"], [[]], 10**12][i % share :: share]:
            path.write_text(json.dumps({"max_new_tokens": 2, field: value}))
            try:
                model = DeepseekForCausalLM.from_pretrained(folder)
                if field not in ("stop_strings", "token_healing", "max_length", "max_new_tokens"):  # want a tokenizer
                    model.generate(make_tokens(1, 5), max_new_tokens=2)
            except (ValueError, OSError) as error:
                if field not in str(error):
                    faults.append((field, value, str(error)[:150]))
            except Exception as error:
                faults.append((field, value, repr(error)[:150]))
    assert not faults, "\n".join(map(str, faults))


@pytest.mark.parametrize("family", ["v3"])
@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"eos_token_id": 1', "<html>"])
def test_a_generation_config_that_is_none(family, folder, text):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"generation_config\.json is no.*Download it again"):
        DeepseekForCausalLM.from_pretrained(folder)


# Prefixes


@pytest.mark.parametrize("family", ["llama", "v3", "v32", "nsa"])
@pytest.mark.parametrize("int8", [False, True])
def test_each_tensor_of_a_prefix(family, int8, tmp_path):
    if family == "nsa" and int8:
        pytest.skip("there is no such cache")
    model, path = make_model(family), tmp_path / "prefix.safetensors"
    model.make_prefix(make_tokens(1, 20), int8=int8, progress=False).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for name, tensor in tensors.items():
        for how in ("dropped", "shorter", "one dimension more", "float16", "renamed"):
            changed = dict(tensors)
            changed[name] = None if how == "renamed" else damage(tensor, how)
            changed |= {f"{name}.old": tensor} if how == "renamed" else {}
            save_file({key: x for key, x in changed.items() if x is not None}, path, metadata=metadata)
            with pytest.raises(ValueError, match=rf"damaged: it has .* for {name}\b.*Make it again"):
                model.load_prefix(path, int8=int8)
    save_file(tensors, path, metadata={key: value for key, value in metadata.items() if key != "tensors"})
    with pytest.raises(ValueError, match="does not say which tensors"):
        model.load_prefix(path, int8=int8)


# Truncation


@pytest.mark.parametrize("family", ["v3"])
def test_each_file_cut_in_half(family, tmp_path):
    make_model(family).save_pretrained(tmp_path / "whole", max_shard_size="60KB")
    (tmp_path / "whole" / "generation_config.json").write_text('{"eos_token_id": [1, 3], "do_sample": false}')
    files = [file for file in (tmp_path / "whole").iterdir() if file.suffix in (".json", ".safetensors")]
    assert len(files) > 4
    for file in files:
        folder = shutil.copytree(tmp_path / "whole", tmp_path / f"without {file.name}")
        data = file.read_bytes()
        (folder / file.name).write_bytes(data[: len(data) // 2])
        with pytest.raises((ValueError, OSError), match=file.name.replace(".", r"\.")):
            DeepseekForCausalLM.from_pretrained(folder)
