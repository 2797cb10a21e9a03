"""Fine-tuning from a folder to an adapter, its evaluation, and its command line."""

import json

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from tiny_chat import VOCAB_SIZE, add_tokenizer

from finetune import sft
from finetune.data import number_problems, render_all, write_examples
from finetune.lora import add_lora


@pytest.fixture
def chat_checkpoint(checkpoint):
    return lambda family="v3": add_tokenizer(checkpoint(family, vocab_size=VOCAB_SIZE))


@pytest.fixture
def files(tmp_path):
    train, held_out = number_problems(48, 12, kinds=["count"])
    write_examples(train, tmp_path / "train.jsonl")
    write_examples(held_out, tmp_path / "held_out.jsonl")
    return tmp_path


def _arguments(model, files, *more):
    output = ["--output", str(files / "out" / "adapter")]
    return ["--model", str(model), "--data", str(files / "train.jsonl"), *output, *more]


def _losses(model, tokenizer, settings, examples=16):
    train, _ = number_problems(examples, 1)
    rows = render_all(train, tokenizer, 128)
    reports = sft.train(Accelerator(), model, rows, sft.pad_token(tokenizer), settings)
    return [report.loss for report in reports]


# ---------------------------------------------------------------- training


def test_loading_turns_off_losses_that_lora_has_no_use_for(chat_checkpoint):
    model, _ = sft.load_model(str(chat_checkpoint()), dtype="float32")
    tokens = torch.arange(3, 19)[None]
    output = model.train()(input_ids=tokens, labels=tokens)
    assert output.mtp_loss is None
    torch.testing.assert_close(output.loss, output.lm_loss)


def test_loss_falls(chat_checkpoint):
    model, tokenizer = sft.load_model(str(chat_checkpoint()), dtype="float32")
    settings = sft.TrainSettings(steps=30, batch_size=16, learning_rate=1e-2)
    losses = _losses(add_lora(model), tokenizer, settings)
    assert len(losses) == 30
    assert losses[-1] < 0.6 * losses[0]


def test_same_seed_same_adapter(chat_checkpoint):
    folder, results = chat_checkpoint(), []
    for seed in (0, 0, 1):
        sft.set_seed(seed)
        model, tokenizer = sft.load_model(str(folder), dtype="float32")
        results.append(_losses(add_lora(model), tokenizer, sft.TrainSettings(steps=3, batch_size=4, seed=seed)))
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_accumulated_step_equals_one_large_batch(chat_checkpoint):
    """Although answers differ in length: the mean is over the tokens of the step."""
    folder, adapters = chat_checkpoint(), []
    for batch_size, accumulation_steps in ((16, 1), (4, 4)):
        sft.set_seed(0)
        model, tokenizer = sft.load_model(str(folder), dtype="float32")
        model = add_lora(model)
        settings = sft.TrainSettings(steps=2, batch_size=batch_size, accumulation_steps=accumulation_steps)
        losses = _losses(model, tokenizer, settings)
        adapters.append((losses, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}))
    (large_losses, large), (small_losses, small) = adapters
    assert small_losses == pytest.approx(large_losses, rel=1e-5)
    for name in large:
        # Adam's steps are of the size of the rate, whatever the gradient: only a part in a hundred of it may differ
        torch.testing.assert_close(small[name], large[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("accumulation_steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("max_grad_norm", -1.0),
        ("warmup_fraction", 1.5),
        ("weight_decay", -0.1),
    ],
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} is"):
        sft.TrainSettings(**{"steps": 1, field: value})


# ---------------------------------------------------------------- evaluation


def test_evaluation_is_the_same_for_any_batch_size_and_counts_exact_answers(chat_checkpoint):
    model, tokenizer = sft.load_model(str(chat_checkpoint()), dtype="float32")
    examples, _ = number_problems(10, 1)
    answers = sft.evaluate(Accelerator(), model, tokenizer, examples, batch_size=10)
    single = sft.evaluate(Accelerator(), model, tokenizer, examples, batch_size=1)
    assert [answer.example for answer in answers] == examples
    assert [answer.num_targets for answer in answers] == [answer.num_targets for answer in single]
    assert [answer.nll for answer in answers] == pytest.approx([answer.nll for answer in single], rel=1e-4)

    # Make the model's own answers the references: now all are exact, unless decoding does not round-trip.
    conversations = [[example["messages"][0]] for example in examples]
    texts = sft.greedy_answers(model, tokenizer, conversations, max_new_tokens=1)
    for example, text in zip(examples, texts, strict=True):
        example["messages"][-1]["content"] = text or "x"
    for answer, text in zip(sft.evaluate(Accelerator(), model, tokenizer, examples), texts, strict=True):
        assert answer.is_exact == (answer.text == (text or "x"))
        assert answer.text.startswith(text)


def test_score_averages_loss_over_tokens():
    answers = [sft.Answer({}, "1", True, 2.0, 1), sft.Answer({}, "2", False, 4.0, 5)]
    assert sft.score(answers) == sft.Score(loss=1.0, exact_match=0.5, examples=2)
    with pytest.raises(ValueError, match="no answers"):
        sft.score([])


# ---------------------------------------------------------------- command line


@pytest.mark.parametrize("family", ["v3", "llama"])
def test_command_line_writes_an_adapter_that_loads(chat_checkpoint, files, capsys, family):
    model_dir, output = chat_checkpoint(family), files / "out" / "adapter"
    more = ("--held-out", str(files / "held_out.jsonl"), "--steps", "4", "--learning-rate", "1e-2")
    assert sft.main(_arguments(model_dir, files, *more)) == 0

    printed = capsys.readouterr().out
    assert "48 training examples (0 longer" in printed
    report = json.loads((output / "training.json").read_text())
    assert report["after"]["examples"] == 12
    assert report["after"]["loss"] < report["before"]["loss"]
    assert [path.name for path in output.parent.iterdir()] == ["adapter"]

    base, tokenizer = sft.load_model(str(model_dir), dtype="auto")
    model = PeftModel.from_pretrained(base, output)
    answers = sft.evaluate(Accelerator(), model, tokenizer, sft.read_examples(files / "held_out.jsonl"))
    assert sft.score(answers).loss == pytest.approx(report["after"]["loss"], rel=1e-5)


def test_mtp_modules_are_trained_with_their_loss(chat_checkpoint, files):
    more = ("--mtp-loss-weight", "0.3", "--epochs", "1", "--held-out-fraction", "0.3", "--targets", "attention")
    assert sft.main(_arguments(chat_checkpoint(), files, *more)) == 0
    assert "layers\\\\.(?:0|1|2|3)\\\\." in (files / "out" / "adapter" / "adapter_config.json").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--held-out", "absent.jsonl"), "absent.jsonl does not exist"),
        (("--held-out-fraction", "1"), "between 0 and 1"),
        (("--epochs", "0"), "--epochs is 0"),
        (("--steps", "0"), "steps is 0"),
        (("--batch-size", "0"), "batch_size is 0"),
        (("--rank", "0"), "rank is 0"),
        (("--max-tokens", "3"), "raise --max-tokens"),
        (("--dropout", "0.5"), "leave out 'routed'"),
    ],
)
def test_mistakes_are_explained_and_leave_nothing(chat_checkpoint, files, capsys, more, message):
    assert sft.main(_arguments(chat_checkpoint(), files, *more)) == 2
    assert message in capsys.readouterr().err
    assert not (files / "out").exists()


def test_existing_output_and_missing_model_are_refused(files, capsys):
    (files / "out" / "adapter").mkdir(parents=True)
    assert sft.main(_arguments("absent-model", files)) == 2
    assert "exists; remove it" in capsys.readouterr().err
    (files / "out" / "adapter").rmdir()
    assert sft.main(_arguments(files / "absent-model", files)) == 2
    assert "absent-model" in capsys.readouterr().err


def test_failed_saving_leaves_nothing(files):
    class Broken:
        def save_pretrained(self, folder, **kwargs):
            (folder / "half").write_text("x")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        sft.save_adapter(Broken(), files / "out" / "adapter", {})
    assert list((files / "out").iterdir()) == []


def test_options_are_stable():
    options = {option for action in sft.build_parser()._actions for option in action.option_strings}
    files = {"--model", "--data", "--held-out", "--held-out-fraction", "--output"}
    adapter = {"--targets", "--rank", "--alpha", "--dropout", "--mtp-loss-weight", "--dtype"}
    length = {"--epochs", "--steps", "--batch-size", "--accumulation-steps", "--max-tokens"}
    recipe = {"--learning-rate", "--warmup-fraction", "--weight-decay", "--max-grad-norm", "--seed"}
    assert options == {"-h", "--help"} | files | adapter | length | recipe


def test_a_larger_tokenizer_than_vocabulary_is_an_error(checkpoint):
    folder = add_tokenizer(checkpoint("v3", vocab_size=VOCAB_SIZE - 8))
    with pytest.raises(ValueError, match=r"`vocab_size` is .*resize_token_embeddings"):
        sft.load_model(str(folder))
