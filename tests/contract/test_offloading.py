"""Models whose weights lie elsewhere: accelerate's device maps, on the CPU, with weights in memory or on disk."""

import pytest
import torch
from checks import assert_close
from deepseek_repo.modeling_deepseek import DeepseekForCausalLM
from tiny import FAMILIES, MAIN_FAMILIES, make_config, make_model, make_tokens

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(params=MAIN_FAMILIES)
def family(request):
    return request.param


@torch.no_grad()
def run(model) -> list[torch.Tensor]:
    """A full forward, and one over a cache: prompt, single token (absorbed), long chunk (blockwise)."""
    tokens = make_tokens(2, 24)
    logits = [model(tokens, use_cache=False).logits]
    cache = None
    for part in (tokens[:, :12], tokens[:, 12:13], tokens[:, 13:]):
        outputs = model(part, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    return logits


def compare(family, model):
    for actual, expected in zip(run(model), run(make_model(family)), strict=True):
        assert_close(actual, expected)


def test_device_map_of_one_device(family, tmp_path):
    make_model(family).save_pretrained(tmp_path)
    compare(family, DeepseekForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}))


@pytest.mark.compatibility("`device_map` with disk")
def test_device_map_with_disk(family, tmp_path):
    make_model(family).save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    layers = len(make_model(family).model.layers)
    device_map |= {f"model.layers.{i}": "cpu" if i == 0 else "disk" for i in range(layers)}
    model = DeepseekForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert model.model.layers[1].self_attn.o_proj.weight.is_meta
    compare(family, model)


@pytest.mark.compatibility("`cpu_offload`")
def test_cpu_offload(family):
    model = make_model(family)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[1].self_attn.o_proj.weight.is_meta
    compare(family, model)


@pytest.mark.compatibility("`disk_offload`")
def test_disk_offload(family, tmp_path):
    model = make_model(family)
    accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    compare(family, model)


@pytest.mark.compatibility("accelerate's `load_checkpoint_in_model`")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", ["5GB", pytest.param("20KB", marks=pytest.mark.slow)])
@torch.no_grad()
def test_load_checkpoint_in_model(family, shard, tmp_path):
    expected, tokens = make_model(family, seed=1), make_tokens(2, 24)
    expected.save_pretrained(tmp_path, max_shard_size=shard)
    model = make_model(family)
    accelerate.load_checkpoint_in_model(model, tmp_path)
    assert_close(model(tokens).logits, expected(tokens).logits)


@pytest.mark.compatibility("accelerate's `load_checkpoint_and_dispatch`")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", ["cpu", "disk"])
@torch.no_grad()
def test_load_checkpoint_and_dispatch(family, place, tmp_path):
    """It knows parameters by their names in the files, which routed experts have as modules of their own. Without
    `offload_buffers` accelerate leaves out the buffers of what lies on disk, whatever the model: the routers' biases."""
    expected, tokens = make_model(family, seed=1), make_tokens(2, 24)
    expected.save_pretrained(tmp_path / "model")
    experts = {"separate_experts": True} if make_config(family).mlp_layer_types.count("sparse") else {}
    with accelerate.init_empty_weights():
        model = DeepseekForCausalLM(make_config(family, **experts)).eval()
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{i}": place if i else "cpu" for i in range(len(model.model.layers))}
    model = accelerate.load_checkpoint_and_dispatch(
        model, tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload", offload_buffers=True
    )
    assert_close(model(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize("family", ["deepseek", "v3"])
def test_load_checkpoint_and_dispatch_leaves_no_stacked_experts_empty(family, tmp_path):
    make_model(family).save_pretrained(tmp_path)
    with accelerate.init_empty_weights():
        model = DeepseekForCausalLM(make_config(family))
    with pytest.raises(NotImplementedError, match="meta tensor; no data"):
        accelerate.load_checkpoint_and_dispatch(model, tmp_path, device_map={"": "cpu"})


@pytest.mark.parametrize("family", ["deepseek", "v3"])
def test_load_checkpoint_in_model_leaves_no_stacked_experts_empty(family, tmp_path):
    make_model(family).save_pretrained(tmp_path)
    with accelerate.init_empty_weights():
        model = DeepseekForCausalLM(make_config(family))
    accelerate.load_checkpoint_in_model(model, tmp_path, device_map={"": "cpu"})
    with pytest.raises(ValueError, match=r"experts have no weights: .*separate_experts=True"):
        model(make_tokens(1, 5))


@pytest.mark.compatibility("`generate`, offloaded")
def test_generate_offloaded(family, tmp_path):
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    expected = make_model(family).generate(make_tokens(2, 9), **settings)
    model = make_model(family)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(model.generate(make_tokens(2, 9), **settings), expected)


def test_automatic_device_map_keeps_layers_whole(family):
    model = make_model(family)
    sizes = accelerate.utils.compute_module_sizes(model)
    device_map = accelerate.infer_auto_device_map(
        model, max_memory={"cpu": sizes[""] // 2, "disk": 10**9}, no_split_module_classes=model._no_split_modules
    )
    assert {"cpu", "disk"} <= set(device_map.values())
    assert not [name for name in device_map if name.startswith("model.layers.") and name.count(".") > 2]
