"""compress.quantise to int8 and int4: what the files mean is what is read back, and AWQ scales nothing that is not undone.

What calls llm-compressor runs in its environment: python -m pytest tests/compress/test_integers.py
"""

import importlib.util
import json

import pytest
import tiny
import torch
from checks import ROOT, assert_close
from deepseek_repo.modeling_deepseek import DeepseekForCausalLM
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_chat import VOCAB_SIZE, add_tokenizer
from transformers import AutoModelForCausalLM

from compress import integers, quantise
from finetune.problems import number_problems

needs_llm_compressor = pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is None, reason="needs llm-compressor's environment"
)
# The first layer is dense in those with experts; v32's indexer and the router read what AWQ scales too. It selects 16 tokens,
# fewer than most rows of the calibration text and all that are read back have.
FAMILIES = ["v3", "v2_lite", "deepseek", "v32", "llama"]
WIDTHS = {"hidden_size": 128, "intermediate_size": 96, "vocab_size": VOCAB_SIZE}
MOE_WIDTHS = {"moe_intermediate_size": 64}
MLA_WIDTHS = {"q_lora_rank": 64, "kv_lora_rank": 64, "v_head_dim": 32}


def test_what_is_quantised():
    yes = ["self_attn.q_b_proj", "self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.experts.11.down_proj"]
    no = ["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj", "mlp.gate", "eh_proj"]
    no += ["self_attn.indexer.wq_b", "self_attn.select_k_proj"]
    assert all(integers.is_quantised(f"model.layers.1.{name}", 3) for name in [*yes, "mlp.shared_experts.gate_proj"])
    assert not any(integers.is_quantised(f"model.layers.1.{name}", 3) for name in no)
    assert not integers.is_quantised("lm_head", 3)
    assert not integers.is_quantised("model.layers.3.mlp.experts.0.up_proj", 3)  # a prediction module


def test_group_size():
    assert integers.group_size({"a": 256, "b": 1536}) == 128
    assert integers.group_size({"a": 256, "b": 192}) == 64
    assert integers.group_size({"a": 96}) == 32
    with pytest.raises(ValueError, match=r"b is 80 wide, no multiple of 32.*int8 or fp8"):
        integers.group_size({"a": 128, "b": 80})


@pytest.fixture
def files(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(example) + "\n" for example in number_problems(60, 1)[0]))
    return path


def test_refusals(checkpoint, files, tmp_path, capsys, monkeypatch):
    folder = add_tokenizer(checkpoint("v3", vocab_size=VOCAB_SIZE))
    arguments = ["--model", str(folder), "--output", str(tmp_path / "out")]
    assert quantise.main([*arguments, "--format", "int4"]) == 2
    assert "--calibration is missing" in capsys.readouterr().err
    assert quantise.main([*arguments, "--calibration", str(files)]) == 2
    assert "FP8 needs neither" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "llmcompressor", None)
    assert quantise.main([*arguments, "--format", "int8", "--calibration", str(files)]) == 2
    assert "requirements-llm-compressor.txt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
    assert quantise.main([*arguments, "--format", "int8", "--calibration", str(files)]) == 2
    assert "tokenizer of another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stop", "told"),
    [(KeyboardInterrupt(), "Interrupted"), (SafetensorError("I/O error: (os error 28)"), "disk is full")],
)
def test_interrupted_and_begun_anew(stop, told, checkpoint, files, tmp_path, monkeypatch, capsys):
    folder = add_tokenizer(checkpoint("v3", vocab_size=VOCAB_SIZE))

    def write(source, output, *arguments):
        assert not list(output.iterdir())  # nothing of the run that was stopped
        (output / "model-00001-of-00002.safetensors").write_text("half of it")
        raise stop

    monkeypatch.setattr(quantise, "write_integers", write)
    arguments = ["--model", str(folder), "--output", str(tmp_path / "out"), "--format", "int4"]
    for _ in range(2):
        assert quantise.main([*arguments, "--calibration", str(files)]) == 2
        message = capsys.readouterr().err
        assert told in message
        assert "begins anew" in message
        assert not (tmp_path / "out").exists()


def sized_checkpoint(checkpoint, family: str):
    fields = tiny.FAMILIES[family]
    widths = WIDTHS | (MOE_WIDTHS if "n_routed_experts" in fields else {})
    if "kv_lora_rank" in fields:
        widths |= {name: size for name, size in MLA_WIDTHS.items() if fields.get(name) is not None}
    return add_tokenizer(checkpoint(family, **widths))


def meaning(folder) -> dict[str, torch.Tensor]:
    """The numbers that the files stand for, unpacked one by one."""
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("weight_packed"):
            rows, columns = tensors[name.replace("_packed", "_shape")].tolist()
            shifts = 4 * torch.arange(8)  # the first number in the lowest bits, each plus 8
            numbers = ((tensor[..., None].long() >> shifts) & 15).flatten(1)[:, :columns] - 8
            scale = tensors[name.replace("_packed", "_scale")].float()
            scale = scale.repeat_interleave(columns // scale.shape[1], dim=1)
            assert numbers.shape == (rows, columns)
            found[name.removesuffix("_packed")] = numbers * scale
        elif tensor.dtype == torch.int8:
            found[name] = tensor.float() * tensors[f"{name}_scale"].float()
        elif not name.endswith(("weight_scale", "weight_shape")):
            found[name] = tensor
    return found


def round_inputs(module, inputs):
    """What int8 files say of activations: each token's numbers in 255 steps of its largest."""
    (x,) = inputs
    scale = x.abs().amax(dim=-1, keepdim=True) / 127.5
    return ((x / scale).round().clamp(-128, 127) * scale,)


@needs_llm_compressor
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", quantise.METHODS)
@pytest.mark.parametrize("form", ["int4", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_reads_back_as_what_it_means(family, form, method, checkpoint, files, tmp_path):
    """Same logits and greedy tokens as plain weights that hold the files' meaning."""
    folder, output = sized_checkpoint(checkpoint, family), tmp_path / "out"
    options = ["--format", form, "--method", method, "--calibration", str(files), "--tokens", "1000"]
    assert quantise.main(["--model", str(folder), "--output", str(output), *options]) == 0
    original, found = load_file(folder / "model.safetensors"), meaning(output)
    assert found.keys() == original.keys()
    stored = load_file(output / "model.safetensors")
    num_layers = tiny.FAMILIES[family]["num_hidden_layers"]
    for name in original:
        quantised = integers.is_quantised(name.removesuffix(".weight"), num_layers)
        assert (name not in stored or stored[name].dtype == torch.int8) == quantised, name
        if not quantised and method == "gptq":
            assert torch.equal(found[name], original[name]), name

    read = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True, dtype=torch.float32).eval()
    plain = DeepseekForCausalLM.from_pretrained(folder, dtype=torch.float32, separate_experts=True).eval()
    plain.load_state_dict(found, strict=True)
    if form == "int8":
        for name, module in plain.named_modules():
            if integers.is_quantised(name, num_layers):
                module.register_forward_pre_hook(round_inputs)
    tokens = tiny.make_tokens(2, 80, vocab_size=VOCAB_SIZE)  # more than v32 selects
    assert_close(read(tokens).logits, plain(tokens).logits, "logits", atol=1e-4 if form == "int4" else 1e-2)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(read.generate(tokens, **settings), plain.generate(tokens, **settings))


@needs_llm_compressor
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", FAMILIES)
def test_awq_undoes_what_it_scales(family, checkpoint, files, tmp_path):
    """A norm that is scaled and each module that reads it are together what they were: routers exactly, others but for
    the rounding of int8."""
    folder, output = sized_checkpoint(checkpoint, family), tmp_path / "out"
    options = ["--format", "int8", "--method", "awq", "--calibration", str(files), "--tokens", "1000"]
    assert quantise.main(["--model", str(folder), "--output", str(output), *options]) == 0
    before, after = load_file(folder / "model.safetensors"), meaning(output)
    scaled = [name for name in before if name.endswith("norm.weight") and not torch.equal(before[name], after[name])]
    assert scaled
    readers = {
        "post_attention_layernorm": [
            "mlp.gate",
            "mlp.gate_proj",
            "mlp.experts.1.gate_proj",
            "mlp.shared_experts.gate_proj",
        ],
        "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.kv_a_proj_with_mqa"],
        "self_attn.q_a_layernorm": ["self_attn.q_b_proj", "self_attn.indexer.wq_b"],
    }
    checked = 0
    for norm in scaled:
        layer, _, part = norm.removesuffix(".weight").removeprefix("model.layers.").partition(".")
        for reader in readers[part]:
            name = f"model.layers.{layer}.{reader}.weight"
            if name in before:
                exact = name not in quantised_names(output)
                product = [tensors[name].float() * tensors[norm].float() for tensors in (before, after)]
                largest = product[0].abs().max().item()
                assert_close(product[1], product[0], name, atol=(1e-5 if exact else 2e-2) * largest, rtol=0)
                checked += 1
    assert checked >= len(scaled)


def quantised_names(folder) -> set[str]:
    return {name.removesuffix("_scale") for name in load_file(folder / "model.safetensors") if name.endswith("_scale")}


@needs_llm_compressor
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_checkpoint_of_this_repository(tmp_path):
    """Its distribution stays near what it was: measured 0.007 (gptq) and 0.009 (awq) nats for int4, 0.0006 for int8."""
    original = AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True, dtype=torch.float32).eval()
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "docs" / "checkpoint.md").read_text())
    ids = tiny.make_tokens(1, 200, vocab_size=8192)
    for form, most in (("int4", 0.05), ("int8", 0.005)):
        output = tmp_path / form
        options = ["--format", form, "--calibration", str(text), "--tokens", "2048"]
        assert quantise.main(["--model", str(ROOT), "--output", str(output), *options]) == 0
        found = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True, dtype=torch.float32).eval()
        with torch.no_grad():
            p, q = (model(ids).logits.log_softmax(dim=-1) for model in (original, found))
        assert 0 < (p.exp() * (p - q)).sum(dim=-1).mean() < most
