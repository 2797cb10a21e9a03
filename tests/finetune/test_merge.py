"""The streaming merge gives the logits of the model with its adapter, under DeepSeek's names."""

import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_tokens
from transformers import AutoModelForCausalLM

from finetune import experts, merge
from finetune.lora import add_lora, load_adapter

CASES = [(family, {}) for family in ("llama", "deepseek", "v2_lite", "v3", "v32", "nsa")]
CASES += [("v3", {"rslora": True}), ("v3", {"dora": True, "targets": ["attention", "shared", "dense"]})]
CASES += [("v3", {"include_mtp": True})]


def _load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@torch.no_grad()
def _logits(model):
    return model(input_ids=make_tokens(2, 24)).logits


def _adapter(base, folder, **options):
    """A trained-looking adapter in `folder` -> the model with it."""
    model = add_lora(_load(base), options.pop("targets", ["all"]), rank=4, **options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def _main(base, adapter, output):
    return merge.main(["--model", str(base), "--adapter", str(adapter), "--output", str(output)])


@pytest.mark.parametrize(("family", "options"), CASES)
def test_merged_logits_and_names(checkpoint, tmp_path, family, options):
    base = checkpoint(family)
    model = _adapter(base, tmp_path / "adapter", **options)
    assert _main(base, tmp_path / "adapter", tmp_path / "merged") == 0
    merged = _load(tmp_path / "merged")
    difference = (_logits(merged) - _logits(_load(base))).abs().max()
    assert difference > 1e-2
    torch.testing.assert_close(_logits(merged), _logits(model), atol=1e-5, rtol=1e-5)
    with (
        safe_open(base / "model.safetensors", "pt") as old,
        safe_open(tmp_path / "merged/model.safetensors", "pt") as new,
    ):
        assert set(old.keys()) == set(new.keys())
    # PEFT's own merge, in memory, is the same model too
    in_memory = model.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, in_memory[name], atol=1e-6, rtol=1e-5, msg=name)


def test_shards_stay_shards(checkpoint, tmp_path):
    base = checkpoint("v3")
    model = _load(base)
    model.save_pretrained(base, max_shard_size="20KB")
    (base / "model.safetensors").unlink(missing_ok=True)
    adapted = _adapter(base, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # nothing for the user to read but what merging says
        assert _main(base, tmp_path / "adapter", tmp_path / "merged") == 0
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 3
    torch.testing.assert_close(_logits(_load(tmp_path / "merged")), _logits(adapted), atol=1e-5, rtol=1e-5)


def test_esft_result(checkpoint, tmp_path):
    base = checkpoint("v3")
    model = _load(base)
    experts.train_only_experts(model, {1: [3, 5], 2: [0]})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.5
    experts.save_esft(model, tmp_path / "esft", str(base))
    assert _main(base, tmp_path / "esft", tmp_path / "merged") == 0
    assert torch.equal(_logits(_load(tmp_path / "merged")), _logits(model))


def test_fp8_base_becomes_bfloat16(checkpoint, tmp_path):
    base = checkpoint("v3")
    tensors = load_file(base / "model.safetensors")
    quantised = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            rows, columns = -(-tensor.shape[0] // 16), -(-tensor.shape[1] // 16)
            scale = torch.rand(rows, columns) + 0.5
            spread = scale.repeat_interleave(16, 0)[: tensor.shape[0]].repeat_interleave(16, 1)[:, : tensor.shape[1]]
            quantised[name] = (tensor / spread).to(torch.float8_e4m3fn)
            quantised[name + "_scale_inv"] = scale
        else:
            quantised[name] = tensor
    save_file(quantised, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (base / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True, dtype="float32").eval()
    adapted = add_lora(model, rank=4)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert _main(base, tmp_path / "adapter", tmp_path / "merged") == 0
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert not [name for name in merged if name.endswith("_scale_inv")]
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    expected = adapted.merge_and_unload().state_dict()["model.layers.1.mlp.experts.down_proj"][3]
    assert merged[name].dtype == torch.bfloat16
    torch.testing.assert_close(merged[name], expected.bfloat16())


def test_mistakes_leave_nothing_behind(checkpoint, tmp_path, capsys):
    base, adapter, output = checkpoint("v3"), tmp_path / "adapter", tmp_path / "merged"
    assert _main(base, adapter, output) == 2
    assert "name a folder that a LoRA run" in capsys.readouterr().err
    _adapter(base, adapter)
    assert _main(base, adapter.parent, output) == 2  # the folder above it
    assert f"{adapter} has one" in capsys.readouterr().err
    assert _main(checkpoint("llama"), adapter, output) == 2
    assert "made for another model" in capsys.readouterr().err
    assert _main(tmp_path, adapter, output) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert not output.exists()
    output.mkdir()
    assert _main(base, adapter, output) == 2
    assert "exists already" in capsys.readouterr().err


def test_merged_adapter_is_what_loads(checkpoint, tmp_path):
    """The same adapter by PEFT's own loading and by ours."""
    base = checkpoint("v3")
    _adapter(base, tmp_path / "adapter")
    ours = load_adapter(_load(base), tmp_path / "adapter")
    peft = PeftModel.from_pretrained(_load(base), tmp_path / "adapter")
    assert torch.equal(_logits(ours.eval()), _logits(peft.eval()))
