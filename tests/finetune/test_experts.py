"""Routing statistics and ESFT: scores, choice, and that nothing but the chosen experts ever changes."""

import json

import pytest
import torch
from tiny import make_tokens
from transformers import AutoModelForCausalLM

from finetune import experts
from finetune.data import IGNORED_LABEL

MOE = ("deepseek", "v2_lite", "v3")


@pytest.fixture
def load(checkpoint):
    """A function family -> model in training mode, loaded from a folder as users do, without losses of its own."""

    def _load(family="v3", **overrides):
        overrides = {"aux_loss_alpha": 0.0, "mtp_loss_weight": 0.0, **overrides}
        return AutoModelForCausalLM.from_pretrained(checkpoint(family, **overrides), trust_remote_code=True).train()

    return _load


def _rows(count=5):
    rows = []
    for i in range(count):
        ids = make_tokens(1, 6 + i, seed=i)[0].tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED_LABEL, *ids[1:]]})
    return rows


def _choice(model, every=3):
    """Two experts of each sparse layer of the model itself, other ones in each layer."""
    return {layer: [layer % 8, (layer + every) % 8] for layer in (1, 2)}


def _train(model, steps=3, weight_decay=0.1, checkpointing=False):
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=weight_decay
    )
    for seed in range(steps):
        tokens = make_tokens(4, 24, seed=seed)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("family", MOE)
def test_routing_is_the_mean_over_real_tokens(load, family):
    model, rows = load(family), _rows()
    measured = experts.measure_routing(model, rows, pad_token_id=2, batch_size=3)  # padded batches
    assert model.training
    seen = {}

    def note(router, _inputs, outputs):
        seen.setdefault(router.layer_idx, []).append(outputs[1:])

    handles = [m.register_forward_hook(note) for m in model.modules() if hasattr(m, "expert_load")]
    model.eval()
    for row in rows:  # one by one, without padding
        model(input_ids=torch.tensor([row["input_ids"]]))
    for handle in handles:
        handle.remove()
    assert sorted(measured) == [1, 2] == sorted(seen)
    for layer, outputs in seen.items():
        weights, indices = (torch.cat(parts) for parts in zip(*outputs, strict=True))  # [N, P]
        gate, token = torch.zeros(8), torch.zeros(8)
        for row_weights, row_indices in zip(weights, indices, strict=True):
            for weight, index in zip(row_weights, row_indices, strict=True):
                gate[index] += weight / row_weights.sum() / len(weights)
                token[index] += 1 / indices.numel()
        torch.testing.assert_close(measured[layer].gate.float(), gate, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(measured[layer].token.float(), token, atol=1e-5, rtol=1e-4)
        assert float(measured[layer].gate.sum()) == pytest.approx(1.0)
        assert measured[layer].imbalance == pytest.approx(float(token.max() / token.mean()), rel=1e-4)


def test_dense_models_have_no_routing(load):
    assert experts.measure_routing(load("llama"), _rows(), 2) == {}
    with pytest.raises(ValueError, match="has none; use lora or full"):
        experts.choose_experts({}, "gate", 0.1)


@pytest.mark.parametrize(
    ("threshold", "chosen"),
    [(0.05, [3]), (0.4, [3]), (0.41, [1, 3]), (0.7, [1, 3]), (0.71, [0, 1, 3]), (1.0, [0, 1, 2, 3])],
)
def test_the_smallest_set_of_best_experts_reaches_the_threshold(threshold, chosen):
    gate = torch.tensor([0.2, 0.3, 0.1, 0.4], dtype=torch.float64)
    routing = {1: experts.Routing(gate, gate.flip(0))}
    assert experts.choose_experts(routing, "gate", threshold) == {1: chosen}
    assert experts.choose_experts(routing, "token", 0.4) == {1: [0]}
    assert "70.0%" in experts.describe_choice({1: [1, 3]}, routing, "gate")


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_chosen_experts_change_even_under_weight_decay(load, family, checkpointing):
    model = load(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chosen = _choice(model)
    experts.train_only_experts(model, chosen)
    optimizer = _train(model, checkpointing=checkpointing)
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert trained == 4 * 3 * 24 * 32  # chosen experts, their matrices and shapes
    assert sum(s["exp_avg"].numel() for s in optimizer.state.values()) == trained  # memory only for the chosen
    experts.finish_expert_training(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        changed = (
            (tensor != before[name]).flatten(1).any(dim=1) if tensor.ndim == 3 else (tensor != before[name]).any()
        )
        if tensor.ndim == 3 and ".layers.3." not in name:
            layer = int(name.split(".")[2])
            assert changed.nonzero().flatten().tolist() == sorted(chosen[layer]), name
        else:
            assert not changed.any(), name


def test_it_learns_as_masked_gradients_would(load):
    """The slices' gradients are the full gradient's rows: the same steps as plain training of the whole stack."""
    slices, whole = load(), load()
    chosen = _choice(slices)
    experts.train_only_experts(slices, chosen)
    _train(slices, weight_decay=0.0)
    experts.finish_expert_training(slices)

    whole.requires_grad_(False)
    modules = {layer: whole.model.layers[layer].mlp.experts for layer in chosen}
    for layer, module in modules.items():
        for name in experts.STACKS:
            parameter = getattr(module, name).requires_grad_(True)
            mask = torch.zeros(8, 1, 1)
            mask[chosen[layer]] = 1
            parameter.register_hook(lambda gradient, mask=mask: gradient * mask)
    _train(whole, weight_decay=0.0)
    for layer, module in modules.items():
        for name in experts.STACKS:
            own = getattr(slices.model.layers[layer].mlp.experts, name)
            torch.testing.assert_close(own, getattr(module, name), atol=1e-6, rtol=1e-5)


def test_a_moved_model_still_trains_and_keeps_what_it_learned(load):
    model, moved = load(), load()
    for each in (model, moved):
        experts.train_only_experts(each, _choice(each))
    moved.to(torch.float64).to(torch.float32)  # copies every parameter, as a move to another device does
    for each in (model, moved):
        _train(each)
    moved.to(torch.float64).to(torch.float32)
    state = experts.esft_state(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in experts.esft_state(moved).items())
    for each in (model, moved):
        experts.finish_expert_training(each)
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in moved.state_dict().items())


@pytest.mark.parametrize("chosen", [{0: [0]}, {1: [8]}, {1: [-1]}])
def test_experts_that_are_not_there_are_refused(load, chosen):
    with pytest.raises(ValueError, match="chosen experts of layer"):
        experts.train_only_experts(load(), chosen)


# ---------------------------------------------------------------- files


def test_saved_experts_come_back_and_have_official_names(load, tmp_path):
    model = load()
    chosen = _choice(model)
    experts.train_only_experts(model, chosen)
    _train(model)
    experts.save_esft(model, tmp_path / "esft", "base")
    config = json.loads((tmp_path / "esft" / experts.ESFT_CONFIG).read_text())
    assert config["experts"] == {str(layer): ids for layer, ids in chosen.items()}
    tensors = experts.read_esft(tmp_path / "esft")
    assert len(tensors) == 4 * 3
    assert tensors["model.layers.1.mlp.experts.4.up_proj.weight"].shape == (24, 32)

    plain = load()
    experts.load_esft(plain, tmp_path / "esft")
    tokens = make_tokens(2, 12)
    expected = model.eval()(input_ids=tokens).logits
    assert torch.equal(plain.eval()(input_ids=tokens).logits, expected)
    resumed = load()
    experts.train_only_experts(resumed, chosen)
    experts.load_esft(resumed, tmp_path / "esft")
    assert torch.equal(resumed.eval()(input_ids=tokens).logits, expected)


def test_experts_of_another_model_and_damaged_files_are_refused(load, tmp_path):
    model = load()
    experts.train_only_experts(model, {2: [7]})
    experts.save_esft(model, tmp_path / "esft", "base")
    with pytest.raises(ValueError, match="there is no such expert"):
        experts.load_esft(load(n_routed_experts=4, n_group=1, topk_group=1), tmp_path / "esft")
    with pytest.raises(ValueError, match=r"is \[(24, 32|32, 24)\], the model's is \[(16, 32|32, 16)\]"):
        experts.load_esft(load(moe_intermediate_size=16), tmp_path / "esft")
    file = tmp_path / "esft" / experts.ESFT_WEIGHTS
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged"):
        experts.load_esft(load(), tmp_path / "esft")
    with pytest.raises(FileNotFoundError, match="method esft wrote"):
        experts.load_esft(load(), tmp_path)
