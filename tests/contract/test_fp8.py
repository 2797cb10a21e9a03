"""Block-scaled FP8 checkpoints load as what their numbers mean, in any dtype, and never lie in memory twice."""

import json

import pytest
import torch
from checks import assert_close, run_python
from deepseek_repo import loading_deepseek
from deepseek_repo.modeling_deepseek import DeepseekForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, FineGrainedFP8Config

try:
    from transformers.integrations import finegrained_fp8
except ImportError:  # it wants Triton in releases before 5.10
    finegrained_fp8 = None

BLOCK = 128
LARGEST_E4M3 = 448.0
KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "eh_proj")  # not quantised in the published files


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[rows, columns] -> fp8, scale_inv [ceil(rows/128), ceil(columns/128)] and what the two mean, block by block."""
    rows, columns = weight.shape
    scales = torch.zeros(-(-rows // BLOCK), -(-columns // BLOCK))
    fp8 = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
    meaning = torch.zeros(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scales[i, j] = weight[block].abs().max() / LARGEST_E4M3
            fp8[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
            meaning[block] = fp8[block].float() * scales[i, j]
    return fp8, scales, meaning


@pytest.fixture
def fp8_checkpoint(checkpoint):
    """A V3 folder in FP8, and the float32 tensors that it stands for. No side is a multiple of 128, some exceed it."""

    def make(**overrides):
        folder = checkpoint("v3", hidden_size=160, kv_lora_rank=144, initializer_range=0.1, **overrides)
        stored, meaning = {}, {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            stored[name] = meaning[name] = tensor
            if tensor.ndim == 2 and not any(part in name for part in KEPT):
                stored[name], stored[f"{name}_scale_inv"], meaning[name] = quantise(tensor)
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        }
        (folder / "config.json").write_text(json.dumps(config))
        assert any(tensor.dtype == torch.float8_e4m3fn for tensor in stored.values())
        return folder, meaning

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_what_the_numbers_mean(fp8_checkpoint, tmp_path, dtype):
    folder, meaning = fp8_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == meaning.keys()
    for name, tensor in meaning.items():
        assert torch.equal(saved[name], tensor.to(saved[name].dtype)), name
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_keeps_path_and_generation_config(fp8_checkpoint):
    folder, _ = fp8_checkpoint()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, "max_new_tokens": 3}))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert model.name_or_path == str(folder)
    assert (model.generation_config.eos_token_id, model.generation_config.max_new_tokens) == (5, 3)


def test_base_model_and_offloading(fp8_checkpoint, tmp_path):
    folder, _ = fp8_checkpoint()
    ids = torch.arange(2, 14)[None]
    whole = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    placed = AutoModel.from_pretrained(
        folder,
        trust_remote_code=True,
        dtype=torch.float32,
        device_map={"embed_tokens": "cpu", "norm": "cpu", "rotary_emb": "cpu", "layers": "disk"},
        offload_folder=tmp_path / "offload",
    ).eval()
    with torch.no_grad():
        assert_close(placed(ids).last_hidden_state, whole(ids).last_hidden_state, "offloaded FP8 model")


def test_scale_without_weight_is_an_error(fp8_checkpoint):
    folder, _ = fp8_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.o_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"o_proj\.weight_scale_inv but no .*download it again"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_unknown_block_size_is_an_error(fp8_checkpoint):
    folder, _ = fp8_checkpoint()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = None
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"weight_block_size.*\[128, 128\]"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize(
    ("device_map", "capability", "kernels", "kept"),
    [
        ("cuda", (9, 0), True, True),
        ("auto", (8, 9), True, True),
        ({"": 0}, (9, 0), True, True),
        ("cuda", (8, 6), True, False),
        ("cuda", (9, 0), False, False),
        ("cuda", None, True, False),
        (None, (9, 0), True, False),
        ("cpu", (9, 0), True, False),
        ({"model": 0, "lm_head": "cpu"}, (9, 0), True, False),
    ],
)
def test_kept_where_the_hardware_has_it(monkeypatch, device_map, capability, kernels, kept):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(loading_deepseek, "is_kernels_available", lambda: kernels)
    assert loading_deepseek.hardware_has_fp8(device_map) is kept


@pytest.mark.skipif(
    not hasattr(finegrained_fp8, "fp8_linear"),
    reason="in this transformers the kernel of FP8 layers is Triton's and cannot be replaced",
)
def test_kept_in_transformers_own_layers(fp8_checkpoint, tmp_path, monkeypatch):
    """As on a GPU with FP8, but the kernel is a float32 product with what the numbers mean."""

    def product(x, weight, scale_inv, block_size, *arguments, **kwargs):
        meant = weight.float()
        for axis in (0, 1):
            scale_inv = scale_inv.repeat_interleave(block_size[axis], dim=axis)
        return x @ (meant * scale_inv[: weight.shape[0], : weight.shape[1]]).T

    folder, _ = fp8_checkpoint(moe_intermediate_size=2 * BLOCK)  # gate and up must not share a block
    original = load_file(folder / "model.safetensors")
    expected = DeepseekForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    monkeypatch.setattr(loading_deepseek, "hardware_has_fp8", lambda device_map: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(finegrained_fp8, "fp8_linear", product)
    # "eager": PyTorch built for CUDA would take the seeming GPU for one, and then experts have a kernel of their own
    model = DeepseekForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    monkeypatch.undo()
    monkeypatch.setattr(finegrained_fp8, "fp8_linear", product)

    kept = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float8_e4m3fn}
    assert {"model.layers.0.self_attn.kv_b_proj.weight", "model.layers.1.mlp.experts.gate_up_proj"} <= kept
    assert not any(part in name for part in KEPT for name in kept)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert_close(model(ids).logits, expected(ids).logits, "logits")
        for one in (model, expected):
            one.generation_config.pad_token_id = 2
        settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        assert torch.equal(model.generate(ids, **settings), expected.generate(ids, **settings))

    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == original.keys()
    for name, tensor in original.items():
        assert saved[name].dtype == tensor.dtype, name
        assert torch.equal(saved[name].float(), tensor.float()), name
    written = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert (written["quant_method"], written["weight_block_size"]) == ("fp8", [BLOCK, BLOCK])


@pytest.mark.slow
def test_no_second_copy_in_memory(fp8_checkpoint):
    """Loading 12 layers, 390 MB in float32, stays well below the twice their size that a second copy would make (Linux).

    Measured: 1.1 to 1.5 times. transformers' reading threads may hold the whole file, a quarter of the size in FP8,
    before the first layer is made, and two layers, a sixth, may be in the making.
    """
    folder, meaning = fp8_checkpoint(n_routed_experts=64, moe_intermediate_size=256, num_hidden_layers=12)
    size = sum(tensor.numel() * 4 for tensor in meaning.values())
    assert size > 3.5e8
    printed = run_python(
        f"""
import torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained({str(folder)!r}, trust_remote_code=True)
with torch.device("meta"):
    AutoModelForCausalLM.from_config(config, trust_remote_code=True)  # so that imports do not count
def kib(field):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
Path("/proc/self/clear_refs").write_text("5")
before = kib("RssAnon")  # without the mapped pages of the file
import threading, time
peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, kib("RssAnon"))
        time.sleep(0.005)
watcher = threading.Thread(target=watch)
watcher.start()
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True, dtype=torch.float32)
done = True
watcher.join()
print((peak - before) * 1024)
"""
    )
    assert int(printed.split()[-1]) < 1.7 * size, f"peak {int(printed.split()[-1]) / size:.2f} times the model"


@pytest.mark.skipif(finegrained_fp8 is None, reason="this transformers wants Triton for its FP8 configuration")
def test_a_quantization_config_given_to_the_class_itself(fp8_checkpoint):
    """As through AutoModel, which reads the config by itself."""
    folder, _ = fp8_checkpoint()
    config = DeepseekForCausalLM.config_class.from_pretrained(folder)
    given = FineGrainedFP8Config(dequantize=True)
    expected = DeepseekForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, quantization_config=given
    )
    actual = DeepseekForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=given)
    for name, weight in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], weight), name
