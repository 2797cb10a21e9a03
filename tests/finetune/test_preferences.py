"""DPO and GRPO: from files to an adapter, and the reward that rises."""

import shutil

import pytest
import torch
from tiny_chat import VOCAB_SIZE, StopAt, add_tokenizer

from finetune import dpo, grpo
from finetune.config import DPOOptions, GRPOOptions, make_options
from finetune.data import write_jsonl
from finetune.models import load_model, load_result
from finetune.problems import number_problems
from finetune.trainers import last_checkpoint


@pytest.fixture
def base(checkpoint):
    return add_tokenizer(checkpoint("v3", vocab_size=VOCAB_SIZE))


def _values(base, tmp_path, **more):
    return {
        "model": str(base),
        "data": [str(tmp_path / "data.jsonl")],
        "output": str(tmp_path / "run"),
        **{"track": ["none"], "preview": False, "cpu": True, "max_tokens": 128, "log_steps": 1, "eval_fraction": 0.2},
        **more,
    }


@pytest.mark.compatibility("TRL's `DPOTrainer`: LoRA, full", family="v3")
@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_dpo_prefers_what_is_chosen(base, tmp_path, method):
    examples = [
        {"prompt": example["messages"][0]["content"], "chosen": "1", "rejected": "2"}
        for example in number_problems(40, 1)[0]
    ]
    write_jsonl(examples, tmp_path / "data.jsonl")
    rate = 1e-2 if method == "lora" else 1e-3
    values = _values(base, tmp_path, steps=6, batch_size=8, learning_rate=rate, eval_steps=3, method=method)
    _, _, report = dpo.run(make_options(DPOOptions, values))
    assert report.before["loss"] == pytest.approx(0.6931, abs=1e-3)  # policy and reference are the same at first
    assert report.after["loss"] < 0.5
    assert report.after["rewards/accuracies"] == 1.0
    if method == "lora":
        load_result(load_model(str(base))[0], tmp_path / "run" / "final")


def test_dpo_wants_preferences(base, tmp_path):
    write_jsonl(number_problems(10, 1)[0], tmp_path / "data.jsonl")
    with pytest.raises(ValueError, match=r"finetune\.sft` learns from those"):
        dpo.run(make_options(DPOOptions, _values(base, tmp_path)))


@pytest.mark.compatibility("TRL's `GRPOTrainer`", family="v3")
def test_grpo_runs_and_reports_rewards(base, tmp_path):
    write_jsonl(number_problems(12, 1, kinds=["count"])[0], tmp_path / "data.jsonl")
    values = _values(
        base,
        tmp_path,
        steps=2,
        batch_size=8,
        generations=4,
        answer_tokens=4,
        eval_steps=2,
        rewards=["numeric", "format"],
    )
    _, _, report = grpo.run(make_options(GRPOOptions, values))
    logged = [entry for entry in report.log if "reward" in entry]
    assert len(logged) == 2
    assert all(0.0 <= entry["rewards/numeric/mean"] <= 1.0 for entry in logged)
    assert "reward" in report.after
    load_result(load_model(str(base))[0], tmp_path / "run" / "final")


@pytest.mark.parametrize("method", ["dpo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_a_resumed_run_ends_exactly_as_an_uninterrupted_one(base, tmp_path, method):
    """Of GRPO that includes the sampled answers."""
    train, _ = number_problems(24, 1, kinds=["count"])
    preferences = [{"prompt": e["messages"][0]["content"], "chosen": "1", "rejected": "2"} for e in train]
    write_jsonl(preferences if method == "dpo" else train, tmp_path / "data.jsonl")
    values = _values(base, tmp_path, steps=6, batch_size=8, eval_steps=2, learning_rate=1e-2, answer_tokens=4)
    command, schema = (dpo, DPOOptions) if method == "dpo" else (grpo, GRPOOptions)
    values |= {} if method == "dpo" else {"generations": 4, "rewards": ["numeric"]}

    def train_to(folder: str, callbacks=(), **more):
        return command.run(make_options(schema, values | {"output": str(tmp_path / folder)} | more), callbacks)

    whole, _, report = train_to("whole")
    with pytest.raises(KeyboardInterrupt):
        train_to("killed", (StopAt(5),))
    assert last_checkpoint(tmp_path / "killed").name == "checkpoint-4"
    shutil.rmtree(tmp_path / "killed" / "checkpoint-2")
    resumed, _, resumed_report = train_to("killed", resume=True)

    key = "loss" if method == "dpo" else "reward"
    assert [e[key] for e in resumed_report.log if key in e] == [e[key] for e in report.log if key in e]
    expected, actual = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
