"""Supervised fine-tuning from files to a result: losses, packing, resuming, saving, reports, errors."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from checks import ROOT
from datasets import Dataset
from tiny_chat import VOCAB_SIZE, StopAt, add_tokenizer
from torch.nn import Linear, ModuleDict
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from finetune import evaluate, run, sft, trainers
from finetune.config import SFTOptions, make_options
from finetune.data import IGNORED_LABEL, read_examples, render_all, write_jsonl
from finetune.evaluate import answer_all, greedy_answers, main as evaluate_main, score
from finetune.experts import ESFT_CONFIG
from finetune.lora import add_lora
from finetune.models import load_model, load_result, quantisation_config
from finetune.problems import number_problems


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def chat_checkpoint(checkpoint):
    return lambda family="v3", **more: add_tokenizer(checkpoint(family, vocab_size=VOCAB_SIZE, **more))


@pytest.fixture
def files(tmp_path):
    train, held_out = number_problems(48, 12, kinds=["count"])
    write_jsonl(train, tmp_path / "train.jsonl")
    write_jsonl(held_out, tmp_path / "held_out.jsonl")
    return tmp_path


def _options(model, files, output="run", **more):
    values = {
        "model": str(model),
        "data": [str(files / "train.jsonl")],
        "eval_data": [str(files / "held_out.jsonl")],
        "output": str(files / output),
        **{"steps": 4, "batch_size": 4, "learning_rate": 1e-2, "eval_steps": 2, "log_steps": 1, "max_tokens": 128},
        **{"track": ["none"], "preview": False, "cpu": True, "seed": 3},
        **more,
    }
    return make_options(SFTOptions, values)


def _trained(report):
    return [entry["loss"] for entry in report.log if "loss" in entry]


def _eval_loss(model, tokenizer, files):
    rows = render_all(read_examples([files / "held_out.jsonl"]), tokenizer, 128)
    total, count = 0.0, 0
    for row in rows:
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits
        targets = labels[:, 1:]
        total += torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), targets, ignore_index=IGNORED_LABEL, reduction="sum"
        ).item()
        count += int((targets != IGNORED_LABEL).sum())
    return total / count


# ---------------------------------------------------------------- whole runs


@pytest.mark.compatibility("TRL's `SFTTrainer`: LoRA, ESFT, full")
@pytest.mark.parametrize(
    ("family", "method"), [("v3", "lora"), slow("llama", "lora"), slow("v3", "esft"), slow("v3", "full")]
)
def test_a_run_leaves_a_result_that_loads_and_a_report(chat_checkpoint, files, family, method):
    base = chat_checkpoint(family)
    task_data = [str(files / "held_out.jsonl")]
    more = {"track": ["tensorboard"], "task_data": task_data, "learning_rate": 1e-2, "esft_threshold": 0.3}
    _, tokenizer, report = sft.run(_options(base, files, method=method, **(more if family == "v3" else {})))
    output = files / "run"
    assert report.after["loss"] < report.before["loss"]
    assert report.before["perplexity"] == pytest.approx(math.exp(report.before["loss"]), rel=1e-6)

    if method == "full":
        model = AutoModelForCausalLM.from_pretrained(output / "final", trust_remote_code=True)
    else:
        model = load_result(load_model(str(base))[0], output / "final")
    assert _eval_loss(model, tokenizer, files) == pytest.approx(report.after["loss"], rel=1e-4)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]

    record = json.loads((output / "training.json").read_text())
    assert record["after"] == report.after
    page = (output / "report.html").read_text()
    assert "Before and after" in page
    assert page.count("data:image/png;base64,") == (1 if family == "llama" else 2)  # curves, expert load
    assert page.count("<td>count") == 0
    assert len(record["samples"]) == 5
    assert all({"question", "reference", "before", "after"} == set(sample) for sample in record["samples"])
    if family == "v3":
        assert "accuracy" in report.after
        assert list((output / "logs").glob("events.*"))
        assert list(record["routing_before"]) == ["1", "2"]
        assert sum(record["routing_after"]["1"]) == pytest.approx(1.0)
        assert all(entry["expert_load"] >= 1 for entry in report.log if "loss" in entry)
    if method == "esft":
        assert (output / "final" / ESFT_CONFIG).is_file()

    card = (output / "final" / "README.md").read_text()
    assert f"library_name: {'transformers' if method == 'full' else 'peft'}" in card
    assert f"| loss | {report.before['loss']:.4g} | {report.after['loss']:.4g} |" in card
    assert str(files) not in card  # no path of this machine
    if method == "lora":
        assert "finetune" not in card
        assert 'PeftModel.from_pretrained(model, "path/to/this/folder")' in card
        assert "AutoPeftModelForCausalLM" in card
    assert not (output / "README.md").exists()


@pytest.mark.slow
def test_full_training_leaves_the_router_alone_unless_asked(chat_checkpoint, files):
    base = chat_checkpoint()
    plain, _ = load_model(str(base))
    for output, more in (
        ("frozen", {}),
        ("trained", {"train_router": True, "router_bias_rate": 0.5, "balance_loss": 0.1}),
    ):
        model, _, report = sft.run(_options(base, files, output, method="full", eval_steps=4, **more))
        before, after = plain.state_dict(), model.state_dict()
        for part in (".gate.weight", ".e_score_correction_bias"):
            names = [name for name in before if name.endswith(part) and "layers.3." not in name]
            assert len(names) == 2
            assert all(torch.equal(before[name], after[name]) == (output == "frozen") for name in names), part
        assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
        assert any("aux_loss" in entry for entry in report.log) == (output == "trained")


def test_command_line(chat_checkpoint, files, capsys):
    config = {
        "model": str(chat_checkpoint()),
        "data": str(files / "train.jsonl"),
        "eval_data": str(files / "held_out.jsonl"),
    }
    config |= {"steps": 2, "eval_steps": 2, "track": "none", "cpu": True, "targets": "attention", "max_tokens": 128}
    (files / "sft.yaml").write_text(yaml.safe_dump(config))
    assert sft.main(["--config", str(files / "sft.yaml"), "--output", str(files / "run"), "--rank", "2"]) == 0
    printed = capsys.readouterr().out
    assert "the loss counts the" in printed  # the preview
    assert "attention" in printed
    assert "48 examples to train on, 12 held out" in printed
    adapter = str(files / "run" / "final")
    assert f"next: python chat.py --model {config['model']} --adapter {adapter}" in printed
    record = json.loads((files / "run" / "training.json").read_text())
    steps = [entry["step"] for entry in record["log"] if "loss" in entry]
    assert steps == [1, 2]  # a short run is logged at every step
    data = str(files / "held_out.jsonl")
    assert evaluate_main(["--model", config["model"], "--adapter", adapter, "--data", data]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 12


# ---------------------------------------------------------------- losses


def _trainer(model, tokenizer, rows, folder, batch_size=8, packing=False, max_length=96, **more):
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        packing=packing,
        max_length=max_length,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        **more,
    )
    data = Dataset.from_list(rows)
    return trainers.DeepseekSFTTrainer(
        model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )


def _gradients(trainer):
    """Gradients of one step over all of the training data."""
    model = trainer.model.train()
    batches = list(trainer.get_train_dataloader())
    count = sum((batch["labels"][:, 1:] != IGNORED_LABEL).sum() for batch in batches)
    trainer.current_gradient_accumulation_steps = len(batches)
    loss = sum(trainer.compute_loss(model, batch, num_items_in_batch=count) for batch in batches)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("family", "mtp"), [("llama", 0.0), ("v2_lite", 0.0), ("v3", 0.0), ("v3", 0.3), ("nsa", 0.0)])
def test_packed_loss_and_gradients_equal_unpacked(chat_checkpoint, tmp_path, family, mtp):
    """Samples in one row do not see each other, in attention, in the loss and in multi-token prediction."""
    base, results = chat_checkpoint(family, max_position_embeddings=512), []
    for packing in (False, True):
        model, tokenizer = load_model(str(base), "float32", mtp_loss=mtp)
        rows = render_all(number_problems(16, 1)[0], tokenizer, 96)
        trainer = _trainer(model, tokenizer, rows, tmp_path / "out", packing=packing)
        if packing:
            assert len(trainer.train_dataset) < len(rows) / 2
        results.append(_gradients(trainer))
    (loss, gradients), (packed_loss, packed) = results
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == packed.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            packed[name], gradient, atol=1e-4 * float(gradient.abs().max()) + 1e-8, rtol=1e-3, msg=name
        )


def test_own_losses_are_added_with_their_weights(chat_checkpoint, tmp_path):
    losses = {}
    base = chat_checkpoint()
    for name, weights in (("plain", {}), ("mtp", {"mtp_loss": 0.5}), ("balance", {"balance_loss": 0.5})):
        model, tokenizer = load_model(str(base), "float32", **weights)
        rows = render_all(number_problems(6, 1)[0], tokenizer, 96)
        trainer = _trainer(model, tokenizer, rows, tmp_path / "out")
        assert trainers.has_own_losses(model) == bool(weights)
        batch = next(iter(trainer.get_train_dataloader()))
        losses[name] = trainer.compute_loss(model.train(), batch).item()
        output = type(model).forward(model, **batch)  # TRL before 1.16 can have replaced the model's own
        assert losses[name] == pytest.approx(output.loss.item(), rel=1e-5)
        extra = {"plain": 0.0, "mtp": output.mtp_loss, "balance": output.aux_loss}[name]
        assert losses[name] == pytest.approx(output.lm_loss.item() + 0.5 * float(extra), rel=1e-5)
    assert losses["plain"] < min(losses["mtp"], losses["balance"])


@pytest.mark.slow
@pytest.mark.parametrize("own", [{}, {"mtp_loss": 0.3}])
def test_accumulated_step_equals_one_large_batch(chat_checkpoint, files, own):
    """Although answers differ in length: the mean is over the tokens of the step."""
    base, results = chat_checkpoint(), []
    for batch_size, accumulation_steps in ((8, 1), (2, 4)):
        options = {"batch_size": batch_size, "accumulation_steps": accumulation_steps, "steps": 2, **own}
        _, _, report = sft.run(_options(base, files, f"run{batch_size}", **options))
        results.append(_trained(report))
    assert results[0] == pytest.approx(results[1], rel=1e-4)


@pytest.mark.slow
def test_a_short_run_is_evaluated_seldom_and_resumes_as_any_other(chat_checkpoint, files):
    base = chat_checkpoint()
    whole, _, report = sft.run(_options(base, files, "whole", steps=6, eval_steps=None))
    assert [entry["step"] for entry in report.log if "eval_loss" in entry] == [0, 6]
    assert "evaluated at the end on 12 of 12 held-out examples" in report.trained
    with pytest.raises(KeyboardInterrupt):
        sft.run(_options(base, files, "killed", steps=6, eval_steps=None), callbacks=(StopAt(5),))
    resumed, _, _ = sft.run(_options(base, files, "killed", steps=6, eval_steps=None, resume=True))
    for mine, its in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.slow
def test_an_evaluation_has_as_many_examples_as_asked_for(chat_checkpoint, files):
    options = _options(chat_checkpoint(), files, steps=10, eval_steps=None, eval_examples=5)
    _, _, report = sft.run(options)
    assert [entry["step"] for entry in report.log if "eval_loss" in entry] == list(range(11))
    assert "evaluated 10 times on 5 of 12 held-out examples" in report.trained


# ---------------------------------------------------------------- stopping and resuming


@pytest.mark.parametrize("method", ["lora", slow("esft")])
def test_a_resumed_run_ends_exactly_as_an_uninterrupted_one(chat_checkpoint, files, method):
    base = chat_checkpoint()
    more = {"method": method, "steps": 6, "dropout": 0.1, "targets": ["attention", "shared"]}
    whole, _, report = sft.run(_options(base, files, "whole", **more))
    with pytest.raises(KeyboardInterrupt):
        sft.run(_options(base, files, "killed", **more), callbacks=(StopAt(5),))
    assert trainers.last_checkpoint(files / "killed").name == "checkpoint-4"
    shutil.rmtree(files / "killed" / "checkpoint-2")
    resumed, _, resumed_report = sft.run(_options(base, files, "killed", resume=True, **more))
    assert _trained(resumed_report) == _trained(report)
    expected, actual = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_resuming_another_run_is_refused(chat_checkpoint, files):
    base = chat_checkpoint()
    with pytest.raises(FileNotFoundError, match="holds no run"):
        sft.run(_options(base, files, resume=True))
    sft.run(_options(base, files, steps=2))
    with pytest.raises(ValueError, match="rank is 4 and the run began with 16"):
        sft.run(_options(base, files, steps=2, resume=True, rank=4))
    with pytest.raises(FileExistsError, match="is not empty"):
        sft.run(_options(base, files))
    with pytest.raises(ValueError, match="is finished"):
        sft.run(_options(base, files, steps=2, resume=True))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "esft"])
def test_a_run_stopped_after_its_last_step_takes_no_further_one(chat_checkpoint, files, method):
    base = chat_checkpoint()
    whole, _, report = sft.run(_options(base, files, method=method))
    expected = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    shutil.rmtree(files / "run" / "final")
    resumed, _, resumed_report = sft.run(_options(base, files, method=method, resume=True))
    assert resumed_report.after == report.after
    assert _trained(resumed_report) == _trained(report)
    actual = resumed.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert (files / "run" / "final").is_dir()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), slow(KeyboardInterrupt())])
def test_a_save_that_fails_leaves_the_last_checkpoint_whole(chat_checkpoint, files, monkeypatch, capsys, error):
    base, saved = chat_checkpoint(), []

    def failing(self, output_dir):
        saved.append(output_dir)
        if len(saved) == 2:  # the adapter of this checkpoint is already there, the optimizer is not
            raise error
        return original(self, output_dir)

    original = trainers.DeepseekSFTTrainer._save_optimizer_and_scheduler
    monkeypatch.setattr(trainers.DeepseekSFTTrainer, "_save_optimizer_and_scheduler", failing)
    options = _options(base, files)
    arguments = ["--model", options.model, "--data", *options.data, "--eval-data", *options.eval_data]
    arguments += ["--output", options.output, "--steps", "4", "--eval-steps", "2", "--max-tokens", "128", "--cpu"]
    arguments += ["--track", "none", "--no-preview", "--batch-size", "4"]
    assert sft.main(arguments) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    message = capsys.readouterr().err
    assert "--resume" in message
    if isinstance(error, OSError):
        assert "checkpoint 4 could not be written" in message
        assert "No space left" in message
        assert "checkpoint-2 is whole" in message
    output = files / "run"
    assert [path.name for path in output.glob("*checkpoint*")] == ["checkpoint-2"]
    load_result(load_model(str(base))[0], output / "checkpoint-2")
    assert sft.main([*arguments, "--resume"]) == 0
    assert (output / "final").is_dir()


@pytest.mark.slow
def test_early_stopping_and_the_best_checkpoint(chat_checkpoint, files):
    base = chat_checkpoint()
    options = _options(base, files, steps=20, eval_steps=1, learning_rate=3.0, early_stopping=2, keep_checkpoints=1)
    model, tokenizer, report = sft.run(options)  # a rate that ruins the model
    steps = [entry["step"] for entry in report.log if "eval_loss" in entry]
    assert steps[-1] < 20
    assert (
        report.after["step"]
        == min(
            (entry for entry in report.log if "eval_loss" in entry and entry["step"]),
            key=lambda entry: entry["eval_loss"],
        )["step"]
    )
    assert _eval_loss(model, tokenizer, files) == pytest.approx(report.after["loss"], rel=1e-4)


# ---------------------------------------------------------------- evaluation


def test_what_is_thought_is_no_part_of_the_answer(chat_checkpoint, monkeypatch):
    limits = []

    def answer(model, tokenizer, questions, max_new_tokens):
        limits.append(max_new_tokens)
        return ["one and one</think> 2"]

    monkeypatch.setattr(evaluate, "greedy_answers", answer)
    model, tokenizer = load_model(str(chat_checkpoint()), dtype="float32")
    thought = {"role": "assistant", "content": "2", "reasoning_content": "hm"}
    example = {"messages": [{"role": "user", "content": "1 + 1"}, thought]}
    assert answer_all(model.eval(), tokenizer, [example], 50)[0].is_right
    assert limits == [50]  # thinking may take longer than in the reference


def test_answers_are_the_same_for_any_batch_size_and_compared_as_asked(chat_checkpoint):
    model, tokenizer = load_model(str(chat_checkpoint()), dtype="float32")
    model.eval()
    examples, _ = number_problems(10, 1)
    answers = answer_all(model, tokenizer, examples, batch_size=10)
    single = answer_all(model, tokenizer, examples, batch_size=1)
    assert [answer.example for answer in answers] == examples
    assert [answer.num_targets for answer in answers] == [answer.num_targets for answer in single]
    assert [answer.nll for answer in answers] == pytest.approx([answer.nll for answer in single], rel=1e-4)

    # Make the model's own answers the references: now all are exact.
    texts = greedy_answers(model, tokenizer, [{"messages": example["messages"][:1]} for example in examples], 1)
    for example, text in zip(examples, texts, strict=True):
        example["messages"][-1]["content"] = text or "x"
    for answer, text in zip(answer_all(model, tokenizer, examples), texts, strict=True):
        assert answer.is_right == (answer.text == (text or "x"))
    assert score(answers).examples == 10
    with pytest.raises(ValueError, match="no answers"):
        score([])


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"eval_data": ["absent.jsonl"]}, "absent.jsonl does not exist"),
        ({"max_tokens": 3}, "raise max_tokens"),
        ({"dropout": 0.5}, "leave out 'routed'"),
        ({"method": "esft", "model": "llama"}, "has none; use lora or full"),
        ({"targets": ["shared"], "model": "llama"}, "has nothing of that kind"),
        ({"save_steps": 3}, "must be a multiple"),
        ({"model": "no-such-model"}, "no-such-model"),
        ({"data": ["preferences.jsonl"]}, "finetune.dpo"),
    ],
)
def test_mistakes_are_explained_before_anything_is_written(chat_checkpoint, files, more, message, monkeypatch):
    monkeypatch.chdir(files)
    write_jsonl([{"prompt": "a", "chosen": "b", "rejected": "c"}], files / "preferences.jsonl")
    family = more.pop("model", "v3")
    base = family if family.startswith("no-") else chat_checkpoint(family)
    with pytest.raises((ValueError, OSError), match=message):
        sft.run(_options(base, files, **more))
    assert not (files / "run").exists()


def test_a_larger_tokenizer_than_vocabulary_is_an_error(checkpoint):
    folder = add_tokenizer(checkpoint("v3", vocab_size=VOCAB_SIZE - 8))
    with pytest.raises(ValueError, match=r"`vocab_size` is .*resize_token_embeddings"):
        load_model(str(folder))


def test_a_quantiser_that_is_not_installed_is_explained(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
    for quantise, name in (("int8", "torchao"), ("nf4", "bitsandbytes")):
        with pytest.raises(ValueError, match=f"pip install {name}"):
            quantisation_config(quantise)


@pytest.mark.compatibility("QLoRA (torchao, bitsandbytes)", family="v3")
@pytest.mark.slow
@pytest.mark.parametrize(("quantise", "library"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_qlora_trains_adapters_on_quantised_weights(chat_checkpoint, files, quantise, library):
    pytest.importorskip(library)
    base = chat_checkpoint("v3", hidden_size=64)
    model, _, report = sft.run(_options(base, files, quantise=quantise, steps=6, dtype="float32"))
    assert report.after["loss"] < report.before["loss"]
    held = {"int8": "Int8Tensor", "nf4": "Params4bit"}[quantise]
    adapted = [
        module.base_layer for module in model.modules() if isinstance(getattr(module, "lora_A", None), ModuleDict)
    ]
    linear = [layer for layer in adapted if isinstance(layer, Linear)]
    assert len(linear) == 24  # five of MLA in each of three layers, two shared experts, one dense layer
    assert {type(layer.weight).__name__ for layer in linear} == {held}
    again = load_result(load_model(str(base), "float32", quantise)[0], files / "run" / "final")
    tokenizer = AutoTokenizer.from_pretrained(files / "run" / "final")
    assert _eval_loss(again, tokenizer, files) == pytest.approx(report.after["loss"], rel=1e-3)


@pytest.mark.slow
def test_an_evaluation_does_not_take_the_gradients_of_nf4_weights(chat_checkpoint):
    pytest.importorskip("bitsandbytes")
    model, _ = load_model(str(chat_checkpoint("v3", hidden_size=64)), "float32", "nf4")
    model = add_lora(model, ["attention"])
    ids = torch.arange(3, 19)[None]

    def gradients():
        model.train().zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    after = gradients()
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[name], gradient, rtol=1e-5) for name, gradient in before.items())


@pytest.mark.slow
def test_the_example_script_trains_and_merges(chat_checkpoint, files):
    base = chat_checkpoint()
    environment = {**os.environ, "PYTHON": sys.executable, "OUTPUT": str(files / "own"), "STEPS": "2"}
    command = ["bash", str(ROOT / "examples" / "finetune_own_data.sh"), str(files / "train.jsonl"), str(base)]
    subprocess.run(command, env=environment, check=True, timeout=240)
    merged = AutoModelForCausalLM.from_pretrained(files / "own" / "merged", trust_remote_code=True)
    adapted = load_result(load_model(str(base))[0], files / "own" / "final")
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_result_that_is_not_the_last_step_says_so():
    said = run._describe_kept({"step": 24}, 75, "eval_loss", 2)
    assert said == "the result is step 24 of 75, the best by eval_loss on 2 held-out examples, few to choose by"
    assert "few" not in run._describe_kept({"step": 24}, 75, "eval_loss", 200)
    assert run._describe_kept({"step": 75}, 75, "eval_loss", 200) == run._describe_kept({}, 75, "eval_loss", 0) == ""


def test_integers_of_llm_compressor_are_refused_with_the_remedy(checkpoint):
    folder = checkpoint("v3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(
            {**config, "quantization_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}}
        )
    )
    with pytest.raises(ValueError, match=r"compressed-tensors, whose weights cannot be trained.* compress\.quantise"):
        load_model(str(folder))
