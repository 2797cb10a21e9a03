"""Every LoRA target reaches what it names in every family; adapters learn, save, load and merge."""

import re

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from tiny import make_tokens
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from finetune.callbacks import RouterBiasCallback, find_routed_model
from finetune.lora import GROUPS, adapted_groups, add_lora, describe_adapters, load_adapter, lora_config
from finetune.models import describe_trainable

# Modules (for "routed" stacked parameters) of each group in the tiny models: 3 layers, of which in MoE models 2 are
# sparse; GQA has 4 projections, MLA with query compression 5.
EXPECTED = {
    "llama": {"attention": 12, "dense": 9},
    "deepseek": {"attention": 12, "shared": 6, "dense": 3, "routed": 4},
    "v2_lite": {"attention": 12, "shared": 6, "dense": 3, "routed": 4},
    "v3": {"attention": 15, "shared": 6, "dense": 3, "routed": 4},
}
_NSA = ["q_proj", *(f"{branch}_{kind}_proj" for branch in ("compress", "select", "window") for kind in "kv"), "o_proj"]
_MLA = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
ATTENTION = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "deepseek": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "v2_lite": ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    "v2": _MLA,
    "v3": _MLA,
    "v32": _MLA,
    "nsa": _NSA,
}
# What no target reaches, with the reason in finetune/lora.py: each is named here, so that nothing is left out silently.
_MTP_LAYER = 3
NEVER = {
    "llama": set(),
    "v32": {f"indexer.{name}" for name in ("wq_b", "wk", "weights_proj")},
    "nsa": {"branch_gate", *(f"compress_{of}.{part}_proj" for of in ("key", "value") for part in ("up", "down"))},
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


def _disturb(model, seed=1):
    """Give lora_B, which begins at zero, values: now every part of an adapter has an effect."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def _logits(model):
    return model.eval()(input_ids=make_tokens(2, 24)).logits


def _expected_names(family, group):
    """Names of the weights that a target means, written out by hand."""
    layers = range(3)
    if group == "attention":
        return {f"model.layers.{i}.self_attn.{name}.weight" for i in layers for name in ATTENTION[family]}
    dense = layers if family == "llama" else range(1)
    sparse = [i for i in layers if i not in dense]
    parts = ("gate_proj", "up_proj", "down_proj")
    if group == "dense":
        return {f"model.layers.{i}.mlp.{part}.weight" for i in dense for part in parts}
    if group == "shared":
        return {f"model.layers.{i}.mlp.shared_experts.{part}.weight" for i in sparse for part in parts}
    return {f"model.layers.{i}.mlp.experts.{part}" for i in sparse for part in ("gate_up_proj", "down_proj")}


def _adapted_weights(model):
    """Names, in the plain model, of the weights that have an adapter."""
    names = set()
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            parameter = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            names.add(f"{name.replace('.base_layer', '')}.{parameter}")
    return names


@pytest.mark.parametrize("family", ATTENTION)
def test_every_linear_and_expert_weight_has_its_target_or_is_named_as_left_out(load, family):
    groups = ["attention", "dense"] if family == "llama" else list(GROUPS)
    plain = load(family, mtp_loss_weight=0.0)
    matrices = {f"{name}.weight" for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    matrices |= {name for name, parameter in plain.named_parameters() if parameter.ndim == 3}  # stacked experts
    in_layers = {name for name in matrices if re.match(rf"model\.layers\.[0-{_MTP_LAYER - 1}]\.", name)}
    outside = matrices - in_layers
    assert {name for name in outside if f"layers.{_MTP_LAYER}." not in name} == {"lm_head.weight"}

    reached = set()
    for group in groups:
        model = add_lora(load(family, mtp_loss_weight=0.0), [group], rank=2)
        names = _adapted_weights(model)
        assert names == _expected_names(family, group), group
        trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        assert all(".lora_" in name for name in trainable)
        (row,) = adapted_groups(model)
        assert (row.group, row.adapted, row.trainable) == (group, len(names), sum(trainable.values()))
        assert not names & reached
        reached |= names
    assert _adapted_weights(add_lora(plain, ["all"], rank=2)) == reached
    left_out = {re.sub(r"^model\.layers\.\d+\.self_attn\.|\.weight$", "", name) for name in in_layers - reached}
    assert left_out == NEVER.get(family, set())


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


@pytest.mark.parametrize("option", ["rslora", "dora"])
def test_variants_train_and_come_back_the_same(load, option, tmp_path):
    targets = ["attention", "shared", "dense"] if option == "dora" else ["all"]
    model = add_lora(load("v3", mtp_loss_weight=0.0), targets, rank=4, **{option: True})
    scale = {layer.scaling["default"] for layer in model.modules() if isinstance(layer, LoraLayer)}
    assert scale == {16.0 / 2 if option == "rslora" else 16.0 / 4}
    _disturb(model)
    trainable, reached = _step(model)
    assert trainable == reached
    assert any("magnitude" in name for name in trainable) == (option == "dora")
    logits = _logits(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    torch.testing.assert_close(_logits(load_adapter(load("v3"), tmp_path / "adapter")), logits)


def test_two_adapters_side_by_side_are_switched(load, tmp_path):
    expected = {}
    for name, seed in (("first", 1), ("second", 2)):
        model = add_lora(load("v3"), rank=4)
        _disturb(model, seed)
        expected[name] = _logits(model)
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
    model = load("v3")
    plain = _logits(model)
    model = load_adapter(load_adapter(model, tmp_path / "first", "first"), tmp_path / "second", "second")
    torch.testing.assert_close(_logits(model), expected["second"])
    model.set_adapter("first")
    torch.testing.assert_close(_logits(model), expected["first"])
    with model.disable_adapter():
        torch.testing.assert_close(_logits(model), plain)


def test_an_adapter_for_another_model_is_refused(load, tmp_path):
    add_lora(load("v3"), rank=4).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    for family, overrides, message in (
        (
            "v3",
            {"hidden_size": 48},
            r"made for another model .*checkpoint_v3\): .* is \[32, 4\], this model has \[48, 4\]",
        ),
        ("v3", {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}, "has no such part"),
        (
            "v3",
            {"num_hidden_layers": 4, "num_nextn_predict_layers": 0, "first_k_dense_replace": 0},
            "made for another model",
        ),
        ("llama", {}, "made for another model"),
    ):
        with pytest.raises(ValueError, match=message):
            load_adapter(load(family, **overrides), tmp_path / "adapter")


def test_damaged_and_absent_adapters_are_refused(load, tmp_path):
    folder = tmp_path / "adapter"
    with pytest.raises(FileNotFoundError, match="name a folder that a LoRA run"):
        load_adapter(load("v3"), folder)
    add_lora(load("v3"), rank=4).save_pretrained(folder, save_embedding_layers=False)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        load_adapter(load("v3"), folder)


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


def test_parameters_that_zero_3_cut_up_are_counted_whole(load):
    """DeepSpeed leaves an empty tensor and the size that it had."""
    model = add_lora(load("v3"), rank=4)
    before = describe_adapters(model), describe_trainable(model)
    for parameter in model.parameters():
        parameter.ds_numel, parameter.data = parameter.numel(), torch.empty(0)
    assert (describe_adapters(model), describe_trainable(model)) == before


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("llama", {"targets": ["routed"]}, "has nothing of that kind; it has attention, dense"),
        ("llama", {"targets": ["attention", "shared"]}, r"\['shared'\]"),
        ("v3", {"targets": ["router"]}, "choose from attention, shared, dense, routed, all"),
        ("v3", {"targets": []}, "no entry"),
        ("v3", {"rank": 0}, "rank is 0"),
        ("v3", {"dropout": 0.1}, "leave out 'routed'"),
        ("v3", {"dora": True}, "leave out 'routed'"),
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


def test_callback_refuses_copies_of_the_model(load, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="it sees 2 GPUs, which would be trained on by"):
        _train(load("v3"), RouterBiasCallback(update_rate=0.5), tmp_path)


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
        RouterBiasCallback().on_train_begin(TrainingArguments(tmp_path, use_cpu=True), None, None, model=model)


def test_callback_finds_the_model_in_wrappers_and_explains_mistakes(load):
    model = load("v3")
    assert find_routed_model(torch.nn.Sequential(add_lora(model, ["attention"]))) is model
    with pytest.raises(ValueError, match="no DeepSeek model"):
        find_routed_model(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="update_rate is 2"):
        RouterBiasCallback(2.0)
