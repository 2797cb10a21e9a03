"""Costs: FLOPs against torch's own counter, and the dense twin of a mixture."""

import json

import pytest
import torch
from tiny import make_model, make_tokens
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from common.costs import attention_costs
from pretrain import cost, dense_twin


@pytest.mark.parametrize("family", ["llama", "deepseek", "v2_lite", "v3", "v3_mtp2"])
def test_training_flops_are_what_torch_counts(family):
    length = 40
    model = make_model(family, attention="eager", initializer_range=0.02).train()
    tokens = make_tokens(1, length)
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).loss.backward()
    # eager attention multiplies every query with every key, the hidden ones too
    config, layers = model.config, len(model.model.layers)
    value_width = config.v_head_dim if config.has_latent else config.head_dim
    all_keys = 2 * config.num_attention_heads * (config.qk_head_dim + value_width) * length
    expected = cost.training_flops_per_token(model, length)
    expected += 3 * layers * (all_keys - attention_costs(config).training_flops(length)[0])
    assert counter.get_total_flops() / length == pytest.approx(expected, rel=1e-9)


def test_causal_attention_reads_half_the_row():
    config = make_model("llama").config
    per_key = 2 * 4 * (8 + 8)
    assert attention_costs(config).training_flops(7) == pytest.approx((per_key * (1 + 2 + 3 + 4 + 5 + 6 + 7) / 7, 0))


def test_sparse_attention_reads_what_it_selects():
    v32, nsa = make_model("v32").config, make_model("nsa").config
    seen = [min(t, 16) for t in range(1, 101)]
    indexer = 2 * 16 * 12 * sum(range(1, 101)) / 100
    assert attention_costs(v32).training_flops(100) == pytest.approx((2 * 4 * (14 + 4) * sum(seen) / 100, indexer))
    keys = sum(t / 4 + min(t, 4 * 16) + min(t, 12) for t in range(1, 101)) / 100
    assert attention_costs(nsa).training_flops(100) == pytest.approx((2 * 4 * (8 + 8) * keys, 0))


@pytest.mark.parametrize("mtp", [True, False])
def test_dense_twin_has_the_active_parameters(checkpoint, tmp_path, mtp):
    source = checkpoint("v3")
    options = [] if mtp else ["--no-mtp"]
    assert dense_twin.main([str(source), str(tmp_path / "twin"), *options]) == 0
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    inactive = 3 * 32 * 24 * (8 - 3)  # of a sparse layer: 5 of its 8 experts
    wanted = sum(p.numel() for p in model.model.layers[:3].parameters()) - 2 * inactive
    config = json.loads((tmp_path / "twin" / "config.json").read_text())
    twin = dense_twin.empty_model(tmp_path / "twin")
    assert not [name for name, _ in twin.named_parameters() if "experts" in name or "mlp.gate." in name]
    assert len(twin.model.layers) == 3 + mtp
    found = sum(p.numel() for p in twin.model.layers[:3].parameters())
    assert abs(found - wanted) <= 3 * 32 * 3 / 2
    kept = {"hidden_size", "num_attention_heads", "kv_lora_rank", "vocab_size", "model_type", "auto_map"}
    assert {name: config[name] for name in kept} == {
        name: json.loads((source / "config.json").read_text())[name] for name in kept
    }


def test_twin_of_a_dense_model_is_refused(checkpoint, tmp_path, capsys):
    assert dense_twin.main([str(checkpoint("llama")), str(tmp_path / "twin")]) == 2
    assert "the model is dense already; name a mixture" in capsys.readouterr().err
    assert not (tmp_path / "twin").exists()


def test_peak_is_a_rate_that_a_matrix_product_reaches():
    peak = cost.measure_peak_flops(torch.device("cpu"), torch.float32, seconds=0.05)
    assert 1e8 < peak < 1e14
