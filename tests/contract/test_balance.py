"""Balancing without an auxiliary loss: the bias update by hand, over processes, and the bias's precision."""

import json

import pytest
import torch
from checks import ROOT, assert_close, run_python
from deepseek_repo.modeling_deepseek import DeepseekForCausalLM
from deepseek_repo.moe_deepseek import update_router_bias
from tiny import MOE_FAMILIES, make_model, make_tokens


def gates(model) -> dict:
    return {i: layer.mlp.gate for i, layer in enumerate(model.model.layers) if layer.is_sparse}


def biases(model) -> dict:
    return {i: gate.e_score_correction_bias.clone() for i, gate in gates(model).items()}


def test_update_by_hand():
    """Algorithm 1 of arXiv:2408.15664: b_i += u * sign(mean load - load_i)."""
    model = make_model("v3")
    gate, before = model.model.layers[1].mlp.gate, biases(model)
    gate.expert_load = torch.tensor([3.0, 5.0, 4.0, 4.0, 0.0, 8.0, 4.0, 4.0])
    loads = update_router_bias(model, 0.01)
    expected = before[1] + torch.tensor([0.01, -0.01, 0, 0, 0.01, -0.01, 0, 0])
    assert_close(gate.e_score_correction_bias, expected, atol=1e-7)
    assert loads.keys() == {1}
    assert loads[1].tolist() == [3, 5, 4, 4, 0, 8, 4, 4]
    assert gate.expert_load is None
    assert torch.equal(model.model.layers[2].mlp.gate.e_score_correction_bias, before[2])


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_loads_of_training_steps(family):
    """Two steps add up, evaluation adds nothing, reading starts anew."""
    model, tokens, chosen, handles = make_model(family).train(), make_tokens(2, 20), {}, []
    for i, gate in gates(model).items():
        chosen[i] = torch.zeros(8)
        ahead = max(0, i + 1 - model.config.num_hidden_layers)  # what a prediction module reads is not there for all

        def count(_, args, output, i=i, read=20 - ahead):
            chosen[i] += output[2].view(2, 20, -1)[:, :read].flatten().bincount(minlength=8)

        handles.append(gate.register_forward_hook(count))
    for seed in (0, 1):
        model(make_tokens(2, 20, seed=seed), labels=tokens).loss.backward()
    for handle in handles:
        handle.remove()
    model.eval()(tokens)
    loads = model.update_router_bias(0.0)
    assert loads.keys() == chosen.keys()
    for i, load in loads.items():
        assert load.tolist() == chosen[i].tolist()
    assert model.update_router_bias(0.0) == {}


def test_rate_zero_changes_nothing():
    model = make_model("v3").train()
    before = biases(model)
    model(make_tokens(2, 20))
    model.update_router_bias(0.0)
    for i, bias in biases(model).items():
        assert torch.equal(bias, before[i])


def test_padding_does_not_count():
    model, tokens, mask = make_model("v3").train(), make_tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, 5:] = 0
    model(tokens, attention_mask=mask)
    for load in model.update_router_bias().values():
        assert load.sum() == 25 * 3


def test_bias_updates_even_the_load():
    """A router that prefers one expert is brought to balance by the bias alone."""
    model, tokens = make_model("v3").train(), make_tokens(8, 40)
    with torch.no_grad():
        for gate in gates(model).values():
            gate.e_score_correction_bias.zero_()
            gate.e_score_correction_bias[0] = 1.0
        first = last = None
        for _ in range(100):
            model(tokens)
            loads = torch.stack([load for i, load in model.update_router_bias(0.02).items() if i < 3])
            imbalance = (loads.amax(dim=1) / loads.mean(dim=1)).max().item()
            first, last = imbalance if first is None else first, imbalance
    assert first > 2.5, first
    assert last < 1.5, last


def test_no_optimiser_touches_the_bias():
    model = make_model("v3")
    assert not [name for name, _ in model.named_parameters() if "e_score_correction_bias" in name]
    assert len([name for name in model.state_dict() if "e_score_correction_bias" in name]) == 3
    assert not any("expert_load" in name for name in model.state_dict())


def test_wrapped_models_are_updated():
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = make_model("v3").train()
    before = biases(model)
    model(make_tokens(2, 20))
    assert update_router_bias(Wrapper(model), 0.01).keys() == {1, 2}
    assert any((bias - before[i]).abs().max() > 0.005 for i, bias in biases(model).items())


def test_loads_counted_in_copies_are_not_lost_without_a_word():
    """nn.DataParallel copies each module for each pass; in evaluation nothing is counted, so nothing is lost."""
    model = make_model("v3")
    for gate in gates(model).values():
        gate._replicate_for_data_parallel()
    assert model.update_router_bias() == {}
    for gate in gates(model.train()).values():
        gate._replicate_for_data_parallel().count_load(torch.ones(8))
    with pytest.raises(ValueError, match=r"trained by nn\.DataParallel.*CUDA_VISIBLE_DEVICES=0"):
        model.update_router_bias()


# Precision


@pytest.mark.parametrize("cast", ["to", "bfloat16", "half", "from_pretrained", "constructed"])
def test_bias_stays_float32(cast, tmp_path):
    model = make_model("v3")
    exact = biases(model)
    if cast == "to":
        model = model.to(torch.bfloat16)
    elif cast in ("bfloat16", "half"):
        model = getattr(model, cast)()
    elif cast == "from_pretrained":
        model.save_pretrained(tmp_path)
        model = DeepseekForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    else:
        weights = model.state_dict()
        model = DeepseekForCausalLM._from_config(model.config, dtype=torch.bfloat16)
        model.load_state_dict(weights)
    assert model.model.layers[0].self_attn.o_proj.weight.dtype in (torch.bfloat16, torch.float16)
    for i, bias in biases(model).items():
        assert bias.dtype == torch.float32
        assert torch.equal(bias, exact[i])


def test_small_steps_do_not_vanish_in_bfloat16(tmp_path):
    """0.001 added to 1 is nothing in bfloat16; after saving and loading it is still there."""
    model = make_model("v3")
    for gate in gates(model).values():
        gate.e_score_correction_bias.fill_(1.0)
    model.save_pretrained(tmp_path)
    model = DeepseekForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    for step in range(3):
        model(make_tokens(2, 20, seed=step))
        model.update_router_bias(1e-3)
    updated = biases(model)
    assert all((bias - 1.0).abs().max() > 5e-4 for i, bias in updated.items() if i < 3)
    model.save_pretrained(tmp_path / "again")
    again = DeepseekForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    for i, bias in biases(again).items():
        assert torch.equal(bias, updated[i])


# Processes

WORKER = """
import sys
sys.path.insert(0, {tests!r})
import conftest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import make_model, make_tokens

def steps(model, tokens):
    from deepseek_repo.moe_deepseek import update_router_bias
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    history = []
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append({{i: load.tolist() for i, load in update_router_bias(model, 0.01).items()}})
    inner = getattr(model, "module", model)
    bias = {{i: layer.mlp.gate.e_score_correction_bias.tolist() for i, layer in enumerate(inner.model.layers) if layer.is_sparse}}
    return {{"loads": history, "bias": bias, "weight": inner.lm_head.weight.sum().item()}}

def work(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{{folder}}/rendezvous", rank=rank, world_size=world)
    model = make_model("v3", aux_loss_alpha=0.0).train()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    torch.save(steps(wrapped, make_tokens(4, 16)[2 * rank : 2 * rank + 2]), f"{{folder}}/rank{{rank}}.pt")
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.start_processes(work, args=(2, {folder!r}), nprocs=2, start_method="fork")
    torch.save(steps(make_model("v3", aux_loss_alpha=0.0).train(), make_tokens(4, 16)), {folder!r} + "/single.pt")
"""


@pytest.mark.compatibility("`update_router_bias` in several processes", family="v3")
def test_two_processes_agree_with_one(tmp_path):
    """DistributedDataParallel over two halves of a batch: loads are sums, and all make the same update."""
    run_python(WORKER.format(tests=str(ROOT / "tests"), folder=str(tmp_path)))
    single, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("single", "rank0", "rank1"))
    assert json.dumps(first) == json.dumps(second)
    assert first["loads"][0] == single["loads"][0]
    for step in first["loads"]:
        for layer, load in step.items():  # layer 3 is a prediction module, which reads one token less
            assert sum(load) == 4 * (15 if int(layer) == 3 else 16) * 3
    assert first["bias"] == single["bias"]
    assert first["weight"] == pytest.approx(single["weight"], abs=1e-4)
