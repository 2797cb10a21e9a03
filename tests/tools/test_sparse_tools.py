"""tools/upcycle_nsa.py and tools/add_indexer.py: a dense checkpoint becomes a sparse one that starts where it was."""

import json
import shutil

import pytest
import tiny
import torch
from checks import assert_close
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from common import rewrite
from tools import add_indexer, upcycle_nsa

# A query selects 4 blocks of 16: a text of up to 64 tokens is selected whole.
NSA_SIZES = ["--compress-block-size", "8", "--compress-stride", "4", "--select-block-size", "16"]
NSA_SIZES += ["--num-select-blocks", "4", "--window-size", "12"]
WHOLE = 64
INDEX_SIZES = ["--index-topk", "32", "--index-n-heads", "4", "--index-head-dim", "12"]


@pytest.fixture
def source(tmp_path):
    """A function family -> folder with a tiny dense checkpoint and a tokenizer file, in several shards if asked."""

    def save(family: str, max_shard_size: str = "1GB", **overrides):
        folder = tmp_path / f"dense_{family}"
        tiny.make_model(family, **overrides).save_pretrained(folder, max_shard_size=max_shard_size)
        for code in folder.glob("*.py"):
            code.unlink()
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
        return folder

    return save


def load(folder, **kwargs):
    """The model in a folder, with the keys that did not fit, which must be none."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **kwargs
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[problem], f"{problem}: {sorted(info[problem])[:5]}"
    assert type(model).__name__ == "DeepseekForCausalLM"
    return model.eval()


def load_dense(folder):
    """The source model; it has no code of its own, so it is loaded by the class."""
    from deepseek_repo.modeling_deepseek import DeepseekForCausalLM

    return DeepseekForCausalLM.from_pretrained(folder).eval()


def tensors(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


@torch.no_grad()
def force_selected_branch(model):
    for layer in model.model.layers:
        layer.self_attn.branch_gate.bias.copy_(torch.tensor([-1e4, 1e4, -1e4]).repeat(4))


def log_probs(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.log_softmax(dim=-1)


@pytest.mark.parametrize("family", ["llama", "deepseek"])
class TestUpcycle:
    def test_equals_dense_where_all_is_selected(self, source, tmp_path, family):
        folder, output = source(family), tmp_path / "sparse"
        assert upcycle_nsa.main([str(folder), str(output), *NSA_SIZES]) == 0
        dense, model = load_dense(folder), load(output)
        assert model.config.attention_kind == "nsa"
        ids = tiny.make_tokens(2, WHOLE)
        expected = log_probs(dense, ids)

        near = log_probs(model, ids)
        divergence = (expected.exp() * (expected - near)).sum(dim=-1).mean().item()
        uniform = (expected.exp() * (expected + torch.tensor(128.0).log())).sum(dim=-1).mean().item()
        # measured 1.1e-4 (llama) and 4.3e-4 (deepseek) nats, and 0.5 to a model that knows nothing
        assert divergence < 0.005 * uniform, f"KL(dense || new) {divergence:.3g}, KL(dense || uniform) {uniform:.3g}"

        force_selected_branch(model)
        assert_close(log_probs(model, ids), expected, "with only the selected branch", atol=1e-4, rtol=0)
        longer = tiny.make_tokens(2, 2 * WHOLE)
        difference = (log_probs(model, longer) - log_probs(dense, longer)).abs()
        assert difference[:, :WHOLE].max() < 1e-4 < difference[:, WHOLE:].max()

    def test_generates_as_dense(self, source, tmp_path, family):
        folder, output = source(family), tmp_path / "sparse"
        assert upcycle_nsa.main([str(folder), str(output), *NSA_SIZES]) == 0
        dense, model = load_dense(folder), load(output)
        force_selected_branch(model)
        ids = tiny.make_tokens(1, 20)
        arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
        assert torch.equal(model.generate(ids, **arguments), dense.generate(ids, **arguments))

    def test_all_branches_learn(self, source, tmp_path, family):
        output = tmp_path / "sparse"
        assert upcycle_nsa.main([str(source(family)), str(output), *NSA_SIZES]) == 0
        model = load(output).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        ids = tiny.make_tokens(2, 2 * WHOLE)
        # the compressors' last layer is 0, so what lies before it has a gradient from the second step on
        for inner in (False, True):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            for name, parameter in model.model.layers.named_parameters():
                if "self_attn" not in name:
                    continue
                expected = inner or not name.endswith(("up_proj.weight", "position"))
                assert (parameter.grad.abs().max() > 0) == expected, f"gradient of {name}"
            optimizer.step()

    def test_everything_else_is_unchanged(self, source, tmp_path, family):
        folder, output = source(family, max_shard_size="30KB"), tmp_path / "sparse"
        assert len(list(folder.glob("*.safetensors"))) > 2
        assert upcycle_nsa.main([str(folder), str(output), *NSA_SIZES]) == 0
        load(output)
        before, after = tensors(folder), tensors(output)
        for name, tensor in before.items():
            head, _, projection = name.rpartition("self_attn.")
            if projection in ("k_proj.weight", "v_proj.weight"):
                names = [f"{head}self_attn.{branch}_{projection}" for branch in ("compress", "select", "window")]
                assert name not in after
            else:
                names = [name]
            assert all(torch.equal(after[new], tensor) for new in names), name
        index = json.loads((output / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == after.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
        assert (output / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
        config = json.loads((output / "config.json").read_text())
        assert config["model_type"] == "deepseek_nsa"
        assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_deepseek.DeepseekForCausalLM"


def test_defaults_of_the_old_type_are_kept():
    """What a config.json leaves out means something else under the new type."""
    from deepseek_repo.configuration_deepseek import DeepseekConfig

    sizes = {"nsa_window_size": 256}
    old, new = {"model_type": "deepseek"}, upcycle_nsa.nsa_config({"model_type": "deepseek"}, sizes)
    old, new = DeepseekConfig(**old).to_dict(), DeepseekConfig(**new).to_dict()
    for name in ("model_type", "architectures"):
        del old[name], new[name]
    assert {name: value for name, value in new.items() if not name.startswith("nsa_")} == old
    assert new["nsa_window_size"] == 256


@pytest.mark.parametrize("family", ["v3", "v3_mtp0"])
class TestAddIndexer:
    def test_equals_dense_where_all_is_selected(self, source, tmp_path, family):
        folder, output = source(family, max_shard_size="40KB"), tmp_path / "sparse"
        assert add_indexer.main([str(folder), str(output), *INDEX_SIZES]) == 0
        dense, model = load_dense(folder), load(output)
        assert model.config.checkpoint_model_type == "deepseek_v32"
        before, after = tensors(folder), tensors(output)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        layers = 3 + model.config.num_nextn_predict_layers
        assert len(after.keys() - before.keys()) == 5 * layers

        ids = tiny.make_tokens(2, 32)
        assert_close(log_probs(model, ids), log_probs(dense, ids), "all tokens selected", atol=1e-5, rtol=0)
        longer = tiny.make_tokens(2, 96)
        assert (log_probs(model, longer) - log_probs(dense, longer)).abs()[:, 32:].max() > 1e-3

    def test_indexer_learns_in_warm_up(self, source, tmp_path, family):
        output = tmp_path / "sparse"
        assert add_indexer.main([str(source(family)), str(output), *INDEX_SIZES]) == 0
        model = load(output, index_warmup=True, index_loss_weight=1.0).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".indexer." in name)
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(learning, lr=5e-3)
        ids, losses = tiny.make_tokens(2, 64), []
        for _ in range(30):
            outputs = model(ids, labels=ids)
            losses.append(outputs.index_loss.item())
            optimizer.zero_grad()
            outputs.loss.backward()
            assert all(parameter.grad is not None for parameter in learning)
            optimizer.step()
        assert losses[-1] < 0.8 * losses[0], losses


def test_indexer_depends_on_seed_and_not_on_shards(source, tmp_path):
    folder = source("v3")
    sharded = tmp_path / "sharded"
    load_dense(folder).save_pretrained(sharded, max_shard_size="40KB")
    results = []
    for name, origin, seed in (("a", folder, 0), ("b", sharded, 0), ("c", folder, 1)):
        assert add_indexer.main([str(origin), str(tmp_path / name), *INDEX_SIZES, "--seed", str(seed)]) == 0
        results.append(tensors(tmp_path / name)["model.layers.1.self_attn.indexer.wk.weight"])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_bfloat16_stays_bfloat16(source, tmp_path):
    folder = source("llama")
    path = folder / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    assert upcycle_nsa.main([str(folder), str(tmp_path / "sparse"), *NSA_SIZES]) == 0
    assert {tensor.dtype for tensor in tensors(tmp_path / "sparse").values()} == {torch.bfloat16}
    load(tmp_path / "sparse")


def test_native_llama_with_tied_embeddings(tmp_path):
    torch.manual_seed(0)
    fields = {name: value for name, value in tiny.FAMILIES["llama"].items() if name != "model_type"}
    dense = LlamaForCausalLM(LlamaConfig(**fields, head_dim=10, tie_word_embeddings=True)).eval()
    tiny.randomise(dense)
    dense.save_pretrained(tmp_path / "dense")
    assert upcycle_nsa.main([str(tmp_path / "dense"), str(tmp_path / "sparse"), *NSA_SIZES]) == 0
    model = load(tmp_path / "sparse")
    force_selected_branch(model)
    ids = tiny.make_tokens(2, WHOLE)
    assert_close(log_probs(model, ids), log_probs(dense, ids), "tied embeddings", atol=1e-4, rtol=0)


def test_fp8_stays_fp8(source, tmp_path):
    folder = source("v3")
    path = folder / "model.safetensors"
    stored = load_file(path)
    for name in [name for name in stored if name.endswith(("q_a_proj.weight", "o_proj.weight"))]:
        stored[name] = stored[name].to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = torch.full((1, 1), 0.9)
    save_file(stored, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    assert add_indexer.main([str(folder), str(tmp_path / "sparse"), *INDEX_SIZES]) == 0
    after = tensors(tmp_path / "sparse")
    for name, tensor in stored.items():
        assert after[name].dtype == tensor.dtype, name
    assert after["model.layers.1.self_attn.indexer.wq_b.weight"].dtype == torch.bfloat16
    ids = tiny.make_tokens(2, 32)
    dense, model = load_dense(folder), load(tmp_path / "sparse", dtype=torch.float32)
    assert_close(log_probs(model, ids), log_probs(dense, ids), "from FP8", atol=1e-5, rtol=0)


def test_attention_biases_and_base_model(source, tmp_path):
    folder = tmp_path / "base"
    tiny.make_model("llama", head="Model", attention_bias=True).save_pretrained(folder)
    assert upcycle_nsa.main([str(folder), str(tmp_path / "sparse"), *NSA_SIZES]) == 0
    before, after = tensors(folder), tensors(tmp_path / "sparse")
    for branch in ("compress", "select", "window"):
        stored = after[f"layers.1.self_attn.{branch}_k_proj.bias"]
        assert torch.equal(stored, before["layers.1.self_attn.k_proj.bias"])


@pytest.mark.parametrize(
    ("tool", "family", "changes", "message"),
    [
        (upcycle_nsa, "v3", {}, "`model_type` is 'deepseek_v3'; it must be 'llama' or 'deepseek'"),
        (upcycle_nsa, "v2_lite", {}, "`model_type` is 'deepseek_v2'"),
        (upcycle_nsa, "nsa", {}, "`model_type` is 'deepseek_nsa'"),
        (upcycle_nsa, "llama", {"model_type": "qwen2"}, "`model_type` is 'qwen2'"),
        (upcycle_nsa, "llama", {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}, "`kv_lora_rank` is 8"),
        (upcycle_nsa, "llama", {"attention_dropout": 0.1}, "`attention_dropout` is 0.1"),
        (upcycle_nsa, "llama", {"num_hidden_layers": 4}, "lack layers.3.self_attn.k_proj.weight and 3 more"),
        (add_indexer, "llama", {}, "`model_type` is 'llama'; it must be 'deepseek_v3'"),
        (add_indexer, "v32", {}, "`model_type` is 'deepseek_v32'"),
        (add_indexer, "v3", {"q_lora_rank": None}, "`q_lora_rank` is null"),
        (add_indexer, "v3", {"qk_rope_head_dim": 256}, "`index_head_dim` is 128, less than `qk_rope_head_dim`"),
    ],
)  # fmt: skip
def test_refuses(source, tmp_path, capsys, tool, family, changes, message):
    folder = source(family)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    assert tool.main([str(folder), str(tmp_path / "sparse")]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize(("tool", "family"), [(upcycle_nsa, "llama"), (add_indexer, "v3")])
def test_writes_all_or_nothing(source, tmp_path, capsys, monkeypatch, tool, family):
    folder, output = source(family), tmp_path / "sparse"
    output.mkdir()
    assert tool.main([str(folder), str(output)]) == 2
    assert "exists already; name a new folder" in capsys.readouterr().err
    assert not any(output.iterdir())
    output.rmdir()

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(rewrite, "write_json", fail)
        assert tool.main([str(folder), str(output)]) == 2
    assert "disk full" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]

    shutil.copy(folder / "model.safetensors", folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert tool.main([str(folder), str(output)]) == 2
    assert "has no safetensors weights" in capsys.readouterr().err
