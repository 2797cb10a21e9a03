"""Every LoRA target reaches what it names in every family; adapters learn, save, load and merge."""

import pytest
import torch
from peft import PeftModel
from tiny import make_tokens
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from finetune.callbacks import RouterBiasCallback, find_routed_model
from finetune.lora import GROUPS, adapted_groups, add_lora, describe_adapters, lora_config

# Modules (for "routed" stacked parameters) of each group in the tiny models: 3 layers, of which in MoE models 2 are
# sparse; GQA has 4 projections, MLA with query compression 5.
EXPECTED = {
    "llama": {"attention": 12, "dense": 9},
    "deepseek": {"attention": 12, "shared": 6, "dense": 3, "routed": 4},
    "v2_lite": {"attention": 12, "shared": 6, "dense": 3, "routed": 4},
    "v3": {"attention": 15, "shared": 6, "dense": 3, "routed": 4},
}
CASES = [(family, target) for family, groups in EXPECTED.items() for target in (*groups, "all")]


@pytest.fixture
def load(checkpoint):
    """A function family -> model in training mode, loaded from a folder as users do."""

    def _load(family, **overrides):
        folder = checkpoint(family, **overrides)
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).train()

    return _load


def _step(model, learning_rate=0.05):
    """One training step -> names of the trainable parameters, and of those that got a gradient."""
    tokens = make_tokens(2, 24)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model(input_ids=tokens, labels=tokens).loss.backward()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    optimizer.step()
    optimizer.zero_grad()
    return trainable, reached


def _disturb(model):
    """Give lora_B, which begins at zero, values: now every part of an adapter has an effect."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def _logits(model):
    return model.eval()(input_ids=make_tokens(2, 24)).logits


@pytest.mark.parametrize(("family", "target"), CASES)
def test_targets_reach_what_they_name(load, family, target):
    model = add_lora(load(family, mtp_loss_weight=0.0), [target], rank=4)
    expected = EXPECTED[family] if target == "all" else {target: EXPECTED[family][target]}
    groups = adapted_groups(model)
    assert {row.group: row.adapted for row in groups} == expected
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trainable)
    assert not [name for name in trainable if ".gate.lora" in name or "layers.3." in name]  # router, MTP
    assert sum(row.trainable for row in groups) == sum(p.numel() for p in trainable.values())


@pytest.mark.parametrize(("family", "target"), CASES)
def test_gradients_reach_every_adapter(load, family, target):
    model = add_lora(load(family, mtp_loss_weight=0.0), [target], rank=4)
    _disturb(model)  # with lora_B at zero, lora_A has no gradient yet
    trainable, reached = _step(model)
    assert trainable == reached


@pytest.mark.parametrize("family", EXPECTED)
def test_adapter_saved_and_loaded_gives_equal_logits(load, family, tmp_path):
    model = add_lora(load(family, mtp_loss_weight=0.0), rank=4)
    base_logits = _logits(model)
    _disturb(model)
    _step(model)
    logits = _logits(model)
    assert (logits - base_logits).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    reloaded = PeftModel.from_pretrained(load(family), tmp_path / "adapter")
    assert torch.equal(_logits(reloaded), logits)
    with reloaded.disable_adapter():
        assert torch.equal(_logits(reloaded), base_logits)


@pytest.mark.parametrize("family", EXPECTED)
def test_merged_model_gives_the_same_logits_also_from_its_files(load, family, tmp_path):
    model = add_lora(load(family, mtp_loss_weight=0.0), rank=4)
    _disturb(model)
    logits = _logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(_logits(merged), logits, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    torch.testing.assert_close(_logits(reloaded), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", EXPECTED)
def test_cached_generation_uses_the_adapters(load, family):
    """MLA's decoding reads the weight of kv_b_proj itself, so LoRA there must be part of what it reads."""
    model = add_lora(load(family, mtp_loss_weight=0.0), rank=4)
    _disturb(model)
    model.eval()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    prompt = make_tokens(1, 6)
    cached = model.generate(input_ids=prompt, use_cache=True, **options)
    assert torch.equal(cached, model.generate(input_ids=prompt, use_cache=False, **options))


def test_mtp_modules_are_adapted_only_on_request(load):
    model = add_lora(load("v3"), rank=4, include_mtp=True)
    assert {row.group: row.adapted for row in adapted_groups(model)} == {
        "attention": 20,
        "shared": 9,
        "dense": 3,
        "routed": 6,
    }
    _disturb(model)
    trainable, reached = _step(model)
    assert trainable == reached
    assert any("layers.3." in name for name in trainable)


def test_other_heads_are_adapted_too(checkpoint):
    folder = checkpoint("v3")
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    config = lora_config(model, ["attention", "routed"])
    assert config.target_parameters[0] == "layers.1.mlp.experts.gate_up_proj"


def test_table_names_every_group(load):
    table = describe_adapters(add_lora(load("v3"), rank=4))
    assert [line.split()[0] for line in table.splitlines()] == ["group", *GROUPS, "total"]


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("llama", {"targets": ["routed"]}, "has nothing of that kind; it has attention, dense"),
        ("llama", {"targets": ["attention", "shared"]}, r"\['shared'\]"),
        ("v3", {"targets": ["router"]}, "choose from attention, shared, dense, routed, all"),
        ("v3", {"targets": []}, "no entry"),
        ("v3", {"rank": 0}, "rank is 0"),
        ("v3", {"dropout": 0.1}, "leave out 'routed'"),
        ("v3", {"dropout": 1.0}, r"must be in \[0, 1\)"),
    ],
)
def test_mistakes_are_explained(load, family, arguments, message):
    with pytest.raises(ValueError, match=message):
        lora_config(load(family), **arguments)


def test_dropout_works_without_routed_experts(load):
    add_lora(load("v3"), ["attention", "shared", "dense"], dropout=0.1)


def test_foreign_models_are_refused():
    model = torch.nn.Linear(2, 2)
    model.config = type("Config", (), {"num_hidden_layers": 1})()
    with pytest.raises(ValueError, match="Linear has no layers with the names of a DeepSeek model"):
        lora_config(model)


def test_groups_that_peft_missed_are_an_error(load, monkeypatch):
    monkeypatch.setattr("finetune.lora.adapted_groups", lambda model: [])
    with pytest.raises(ValueError, match="another PEFT version"):
        add_lora(load("v3"))


# ---------------------------------------------------------------- router bias


class _Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        tokens = make_tokens(1, 16, seed=index)[0]
        return {"input_ids": tokens, "labels": tokens}


def _train(model, callback, folder):
    arguments = TrainingArguments(
        folder,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
    )
    trainer = Trainer(model, arguments, train_dataset=_Rows(), callbacks=[callback])
    trainer.train()
    return [record["expert_load"] for record in trainer.state.log_history if "loss" in record]


def _biases(model):
    return {name: t.clone() for name, t in model.named_buffers() if name.endswith("e_score_correction_bias")}


def test_callback_moves_the_bias_once_a_step(load, tmp_path):
    model = load("v3")
    before = _biases(model)
    loads = _train(model, RouterBiasCallback(update_rate=0.5), tmp_path)
    assert len(loads) == 2
    assert all(load >= 1 for load in loads)
    for name, bias in _biases(model).items():
        steps = ((bias - before[name]) / 0.5).abs()
        assert steps.max() <= 2.0 + 1e-4  # two optimizer steps, though four micro-batches
        assert steps.max() > 0


def test_callback_under_peft_reads_the_load_without_changing_the_bias(load, tmp_path):
    model = add_lora(load("v3"), ["attention"])
    before = _biases(model)
    assert len(_train(model, RouterBiasCallback(update_rate=0.0), tmp_path)) == 2
    assert all(torch.equal(bias, before[name]) for name, bias in _biases(model).items())
    with pytest.warns(UserWarning, match="not saved with the adapter"):
        RouterBiasCallback().on_train_begin(None, None, None, model=model)


def test_callback_finds_the_model_in_wrappers_and_explains_mistakes(load):
    model = load("v3")
    assert find_routed_model(torch.nn.Sequential(add_lora(model, ["attention"]))) is model
    with pytest.raises(ValueError, match="no DeepSeek model"):
        find_routed_model(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="update_rate is 2"):
        RouterBiasCallback(2.0)
