"""compress.quantise: FP8 blocks are those of a slow loop, and are read back as exactly what they mean."""

import errno
import json

import pytest
import tiny
import torch
from deepseek_repo.modeling_deepseek import DeepseekForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compress import quantise, rewrite


def slow_blocks(matrix: torch.Tensor):
    """-> stored numbers, scales and what they mean, block by block"""
    rows, columns = matrix.shape
    scales = torch.zeros(-(-rows // 128), -(-columns // 128))
    stored, meaning = torch.zeros(rows, columns).to(torch.float8_e4m3fn), torch.zeros(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scales[i, j] = matrix[block].abs().max() / 448
            stored[block] = (matrix[block] / scales[i, j]).to(torch.float8_e4m3fn)
            meaning[block] = stored[block].float() * scales[i, j]
    return stored, scales, meaning


@pytest.mark.parametrize("shape", [(128, 128), (1, 300), (300, 129), (257, 3)])
def test_blocks_equal_a_slow_loop(shape):
    matrix = torch.randn(shape) * torch.logspace(-3, 3, shape[1])
    stored, scales, _ = slow_blocks(matrix)
    found, found_scales = quantise.quantise_blocks(matrix)
    assert torch.equal(found.float(), stored.float())
    assert torch.equal(found_scales, scales)


def test_zeros_and_numbers_that_are_not_finite():
    found, scales = quantise.quantise_blocks(torch.zeros(130, 5))
    assert (found.float() == 0).all()
    assert (scales == 1).all()
    found, scales = quantise.quantise_blocks(torch.full((4, 4), 1e-44))
    assert (found.float() * scales[0, 0] < 1e-2).all()
    with pytest.raises(ValueError, match="not finite"):
        quantise.quantise_blocks(torch.tensor([[1.0, float("nan")]]))


@pytest.fixture(params=[name for name in tiny.FAMILIES if name != "nsa"])
def family(request):
    return request.param


def test_reads_back_as_what_it_means(family, checkpoint, tmp_path):
    folder = checkpoint(family, hidden_size=160, intermediate_size=144)
    assert quantise.main(["--model", str(folder), "--output", str(tmp_path / "fp8")]) == 0
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "fp8" / "model.safetensors")
    meaning = {}
    for name, tensor in before.items():
        kept = (
            any(part in name for part in ("embed", "lm_head", "mlp.gate.", "eh_proj", "weights_proj"))
            or tensor.ndim == 1
        )
        assert (after[name].dtype == torch.float8_e4m3fn) is not kept, name
        meaning[name] = tensor if kept else slow_blocks(tensor)[2]
        assert kept or torch.equal(after[f"{name}_scale_inv"], slow_blocks(tensor)[1])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", trust_remote_code=True, dtype=torch.float32)
    model.save_pretrained(tmp_path / "read")
    read = load_file(tmp_path / "read" / "model.safetensors")
    assert read.keys() == meaning.keys()
    assert all(torch.equal(read[name], meaning[name]) for name in meaning)
    original = DeepseekForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = tiny.make_tokens(1, 30)
    with torch.no_grad():
        difference = model.eval()(tokens).logits - original(tokens).logits
    # random routers choose other experts for some tokens; measured 0.02 to 0.10
    assert 0 < difference.abs().mean() < 0.2


def test_config_says_what_is_not_converted(checkpoint, tmp_path):
    assert quantise.main(["--model", str(checkpoint("v3")), "--output", str(tmp_path / "fp8")]) == 0
    found = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert found["weight_block_size"] == [128, 128]
    assert found["modules_to_not_convert"] == [
        "lm_head",
        "model.layers.1.mlp.gate",
        "model.layers.2.mlp.gate",
        "model.layers.3.eh_proj",
        "model.layers.3.mlp.gate",
    ]


def test_refusals(checkpoint, tmp_path, capsys):
    folder = checkpoint("v3")
    arguments = ["--model", str(folder), "--output", str(tmp_path / "fp8")]
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    save_file(tensors | {name: tensors[name] / 0}, folder / "model.safetensors", metadata={"format": "pt"})
    assert quantise.main(arguments) == 2
    assert f"{name} in" in capsys.readouterr().err
    assert not (tmp_path / "fp8").exists()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert quantise.main(arguments) == 0  # goes on with what was begun
    assert quantise.main(["--model", str(tmp_path / "fp8"), "--output", str(tmp_path / "again")]) == 2
    assert "quantised already, by 'fp8'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stop", "told"),
    [(KeyboardInterrupt(), "Interrupted"), (OSError(errno.ENOSPC, "No space left on device"), "disk is full")],
)
def test_interrupted_and_resumed(stop, told, checkpoint, tmp_path, monkeypatch, capsys):
    folder = checkpoint("v3")
    DeepseekForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    assert quantise.main(["--model", str(folder), "--output", str(tmp_path / "whole")]) == 0
    write, written = rewrite._write_shard, []

    def stop_once(path, tensors):
        if len(written) == 2:
            written.append(None)
            raise stop
        written.append(path.name)
        write(path, tensors)

    monkeypatch.setattr(rewrite, "_write_shard", stop_once)
    arguments = ["--model", str(folder), "--output", str(tmp_path / "fp8")]
    assert quantise.main(arguments) == 2
    message = capsys.readouterr().err
    assert told in message
    assert "the same command goes on" in message
    assert quantise.main(arguments) == 0
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert sorted(name for name in written if name) == shards
    for name in (*shards, "model.safetensors.index.json"):
        assert (tmp_path / "fp8" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
