"""What a checkpoint becomes where the user does not say: its precision, and its prediction modules."""

import json

import pytest
import torch
from deepseek_repo import loading_deepseek
from deepseek_repo.modeling_deepseek import DeepseekForCausalLM
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize("options", [{}, {"dtype": "auto"}])
@pytest.mark.parametrize("native_bfloat16", [True, False])
def test_bfloat16_only_where_the_cpu_has_it(checkpoint, monkeypatch, native_bfloat16, options):
    folder = checkpoint("v3")
    DeepseekForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    monkeypatch.setattr(loading_deepseek, "_cpu_has_bfloat16", lambda: native_bfloat16)
    messages = []
    monkeypatch.setattr(loading_deepseek.logger, "warning_once", messages.append)

    loaded = DeepseekForCausalLM.from_pretrained(folder, **options)
    asked = DeepseekForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if torch.accelerator.is_available() or native_bfloat16:
        assert loaded.dtype == torch.bfloat16
        assert not messages
    else:
        assert loaded.dtype == torch.float32
        assert "float32" in messages[0]
    assert asked.dtype == torch.bfloat16


def test_without_prediction_weights_there_are_no_modules(checkpoint, recwarn, caplog):
    folder = checkpoint("v3")
    whole = DeepseekForCausalLM.from_pretrained(folder)
    num_layers = whole.config.num_hidden_layers
    assert len(whole.model.layers) == num_layers + 1
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if f"layers.{num_layers}." not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    model, report = DeepseekForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert model.config.num_nextn_predict_layers == 0
    assert len(model.model.layers) == num_layers
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_copies_of_embedding_and_head_in_prediction_modules_are_ignored(checkpoint):
    folder = checkpoint("v3")
    tensors = load_file(folder / "model.safetensors")
    module = next(name for name in tensors if name.endswith("eh_proj.weight")).removesuffix("eh_proj.weight")
    tensors[f"{module}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{module}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _, report = DeepseekForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_fewer_prediction_modules_than_the_files_hold(checkpoint):
    folder = checkpoint("v3")
    model, report = DeepseekForCausalLM.from_pretrained(folder, num_nextn_predict_layers=0, output_loading_info=True)
    assert len(model.model.layers) == model.config.num_hidden_layers
    assert not report["unexpected_keys"]
