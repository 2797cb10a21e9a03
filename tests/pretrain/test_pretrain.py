"""Pretraining: packing, bits per byte, exact resumption, the exported checkpoint."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from tiny_corpus import TEXTS, VOCAB_SIZE, write_workspace
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pretrain import evaluate, plot, train
from pretrain.data import (
    IGNORED_LABEL,
    HeldOut,
    PretrainingData,
    batch_of,
    build_dataset,
    load_held_out,
    load_held_out_text,
    row_quotas,
)
from tokenization.documents import is_held_out
from tokenization.train_bpe import MIN_VOCAB_SIZE, save_tokenizer, train_tokenizer
from tools import publish


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("pretrain"))


# ---------------------------------------------------------------- data


def test_train_and_held_out_tokens_are_the_documents(workspace):
    tokenizer = AutoTokenizer.from_pretrained(workspace / "tokenizer")
    index = json.loads((workspace / "data" / "index.json").read_text())
    for language, texts in TEXTS.items():
        held_out = load_held_out(workspace / "data", window_tokens=16)[language]
        expected = [text for text in texts if is_held_out(text, 0.2)]
        tokens = [token for text in expected for token in [*tokenizer(text)["input_ids"], 1]]
        stream = torch.cat((held_out.windows[:1, 0], held_out.windows[:, 1:].flatten()))
        assert stream[: len(tokens)].tolist() == tokens
        assert held_out.num_targets == len(tokens) - 1
        assert held_out.num_bytes == sum(len(text.encode()) for text in expected)
        entry = index["languages"][language]
        assert entry["train"]["documents"] + len(expected) == len(texts)
        assert len(entry["train"]["shards"]) > 1


def test_fim_samples_are_training_documents_in_another_order(workspace, tmp_path):
    """Every training document is a sample or itself, in its place; held-out documents never change."""
    tokenizer = AutoTokenizer.from_pretrained(workspace / "tokenizer")
    files = {language: [workspace / f"{language}.jsonl"] for language in TEXTS}
    build_dataset(
        files, workspace / "tokenizer", tmp_path / "data", 0.2, min_held_out_bytes=1, fim_rate=0.5, fim_spm_share=0.5
    )
    begin, hole, end = tokenizer.convert_tokens_to_ids(["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"])
    modes = []
    for language, texts in TEXTS.items():
        tokens = np.fromfile(tmp_path / "data" / f"{language}-train-00000.bin", dtype=np.uint16).tolist()
        documents = tokenizer.decode(tokens).split(tokenizer.bos_token)[1:]
        for document, text in zip(documents, [text for text in texts if not is_held_out(text, 0.2)], strict=True):
            document = document.removesuffix(tokenizer.eos_token)
            if match := re.fullmatch("<｜fim▁begin｜>(.*)<｜fim▁hole｜>(.*)<｜fim▁end｜>(.*)", document, re.DOTALL):
                prefix, suffix, middle = match.groups()
                assert prefix + middle + suffix == text
                modes.append("psm" if prefix else "spm")
            else:
                assert document == text
                modes.append("text")
        assert {begin, hole, end} <= set(tokens)
        old, new = (load_held_out(folder / "data", 16)[language].windows for folder in (workspace, tmp_path))
        assert torch.equal(old, new)
    assert {mode: modes.count(mode) > len(modes) / 8 for mode in ("psm", "spm", "text")} == dict.fromkeys(
        ("psm", "spm", "text"), True
    )


def test_names_of_control_tokens_in_documents_are_text(workspace, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(workspace / "tokenizer")
    text = f"a{tokenizer.bos_token}b{tokenizer.eos_token}<｜User｜>" * 3
    (tmp_path / "en.txt").write_text(text)
    build_dataset({"en": [tmp_path / "en.txt"]}, workspace / "tokenizer", tmp_path / "data", 0.0, min_held_out_bytes=0)
    bos, *tokens, eos = np.fromfile(tmp_path / "data" / "en-train-00000.bin", dtype=np.uint16).tolist()
    assert (bos, eos) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert not {bos, eos} & set(tokens)
    assert tokenizer.decode(tokens) == text


def test_packed_positions_equal_separate_documents():
    first, second = [0, 5, 6, 1], [0, 7, 8, 9, 1]
    batch = batch_of(torch.tensor([first + second]), bos_token_id=0)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[IGNORED_LABEL, 5, 6, 1, IGNORED_LABEL, 7, 8, 9, 1]]


def test_row_without_bos_starts_at_position_0():
    batch = batch_of(torch.tensor([[5, 6, 0, 7]]), bos_token_id=0)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1]]


def test_packed_documents_do_not_see_each_other(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint("v3"), trust_remote_code=True).eval()
    documents = [[0, 5, 6, 7, 1], [0, 8, 9, 1]]
    packed = batch_of(torch.tensor([documents[0] + documents[1]]), bos_token_id=0)
    logits = model(input_ids=packed["input_ids"], position_ids=packed["position_ids"], use_cache=False).logits[0]
    alone = torch.cat([model(input_ids=torch.tensor([document])).logits[0] for document in documents])
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-4)


def test_an_epoch_holds_every_row_once(workspace):
    data = PretrainingData(workspace / "data", row_tokens=32, batch_rows=4, mix={"en": 1.0}, seed=3)
    epoch = [tuple(data._row("en", number).tolist()) for number in range(len(data.rows["en"]))]
    expected = [tuple(data.rows["en"][row].tolist()) for row in range(len(data.rows["en"]))]
    assert sorted(epoch) == sorted(expected)
    assert epoch != expected


def test_batches_depend_on_the_step_alone_and_keep_the_mix(workspace):
    make = lambda: PretrainingData(workspace / "data", 32, 8, {"en": 3, "zh": 1}, seed=1)  # noqa: E731
    data = make()
    assert data.quotas == {"en": 6, "zh": 2}
    batches = [data.batch(step) for step in range(40)]  # several epochs
    assert batches[0].shape == (8, 32)
    assert torch.equal(make().batch(33), batches[33])


def test_quotas_fill_the_batch():
    assert row_quotas({"en": 0.5, "zh": 0.5}, 7) == {"en": 4, "zh": 3}
    assert row_quotas({"en": 1, "zh": 0}, 5) == {"en": 5, "zh": 0}


def test_failed_build_leaves_nothing(workspace, tmp_path):
    with pytest.raises(ValueError, match=r"'en' has \d+ held-out bytes.*raise --held-out-fraction"):
        build_dataset({"en": [workspace / "en.jsonl"]}, workspace / "tokenizer", tmp_path / "data", 0.1)
    assert list(tmp_path.iterdir()) == []


def test_unknown_language_in_the_mix_is_refused(workspace):
    with pytest.raises(ValueError, match=r"weights for some of en, zh"):
        PretrainingData(workspace / "data", 32, 4, {"fr": 1.0})


# ---------------------------------------------------------------- bits per byte


class Uniform(torch.nn.Module):
    """Gives every token of the vocabulary the same probability."""

    def forward(self, input_ids, **kwargs):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCAB_SIZE))


@pytest.mark.parametrize("window_tokens", [7, 64])
def test_bits_per_byte_of_a_uniform_model(workspace, window_tokens):
    for held_out in load_held_out(workspace / "data", window_tokens).values():
        num_documents = int((held_out.windows[:, 1:] == 0).sum()) + 1
        expected = (held_out.num_targets - (num_documents - 1)) * math.log2(VOCAB_SIZE) / held_out.num_bytes
        result = evaluate.evaluate_model(Uniform(), {"en": held_out}, 0, 3, torch.device("cpu"))
        assert result["en"] == pytest.approx(expected, rel=1e-5)


def test_another_tokenizer_reads_the_same_documents(workspace, tmp_path, checkpoint, capsys):
    """Every document's text and bytes; the same tokenizer again gives the same windows."""
    old = AutoTokenizer.from_pretrained(workspace / "tokenizer")
    texts = [text for some in TEXTS.values() for text in some]
    save_tokenizer(train_tokenizer(texts, MIN_VOCAB_SIZE + 5, show_progress=False), tmp_path / "other", 4096)
    other = AutoTokenizer.from_pretrained(tmp_path / "other")
    before = load_held_out(workspace / "data", 16, 40)
    same = load_held_out_text(workspace / "data", 16, 40, old, old)
    assert all(torch.equal(before[language].windows, same[language].windows) for language in TEXTS)
    read = load_held_out_text(workspace / "data", 16, None, old, other)
    for language, some in TEXTS.items():
        stream = torch.cat((read[language].windows[:1, 0], read[language].windows[:, 1:].flatten()))
        documents = other.decode(stream[: read[language].num_targets + 1]).split(other.bos_token)[1:]
        expected = [text for text in some if is_held_out(text, 0.2)]
        assert [document.removesuffix(other.eos_token) for document in documents] == expected
        assert read[language].num_bytes == sum(len(text.encode()) for text in expected)

    model = checkpoint("v3", vocab_size=len(other))
    save_tokenizer(train_tokenizer(texts, MIN_VOCAB_SIZE + 5, show_progress=False), model, 4096)
    options = [str(model), "--data", str(workspace / "data"), "--context-tokens", "32"]
    assert evaluate.main(options) == 2
    assert "--data-tokenizer" in capsys.readouterr().err
    assert evaluate.main([*options, "--data-tokenizer", str(workspace / "tokenizer")]) == 0
    assert capsys.readouterr().out.count("bits per byte") == len(TEXTS)


def test_filling_and_bos_are_not_counted():
    held_out = HeldOut(torch.tensor([[0, 5, 1, 0], [0, 6, 1, 1]]), num_targets=5, num_bytes=2)
    nll = evaluate.held_out_nll(Uniform(), held_out, bos_token_id=0, batch_rows=1, device=torch.device("cpu"))
    assert nll == pytest.approx(4 * math.log(VOCAB_SIZE), rel=1e-5)  # 5, eos, 6, eos
    assert evaluate.bits_per_byte(4 * math.log(2), 2) == 2.0


# ---------------------------------------------------------------- training


def test_schedules():
    wsd = [train.learning_rate(step, 100, 1.0, 10, 0.2, 0.1, "wsd") for step in range(100)]
    assert wsd[0] == pytest.approx(0.1)
    assert wsd[9:81] == [1.0] * 72
    assert wsd[99] == pytest.approx(1 - 0.9 * 19 / 20)
    cosine = [train.learning_rate(step, 100, 1.0, 10, 0.2, 0.1, "cosine") for step in range(10, 100)]
    assert cosine[0] == 1.0
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[-1] == pytest.approx(0.1, abs=1e-3)


def test_deadline_starts_the_decay_once():
    progress = train.Progress(step=80, seconds=47.9)
    progress.keep_deadline(1000, decay_fraction=0.2, max_minutes=1)
    assert progress.total_steps(1000) == 1000
    progress.seconds = 48.0
    progress.keep_deadline(1000, decay_fraction=0.2, max_minutes=1)
    assert progress.total_steps(1000) == 100
    progress.step, progress.seconds = 90, 500.0
    progress.keep_deadline(1000, decay_fraction=0.2, max_minutes=1)
    assert progress.total_steps(1000) == 100


def _train(workspace, model_dir, run_dir, *more):
    arguments = {
        "--model": model_dir,
        "--data": workspace / "data",
        "--run-dir": run_dir,
        "--tokenizer": workspace / "tokenizer",
        "--batch-rows": 4,
        "--row-tokens": 32,
        "--accumulation-steps": 2,
        "--precision": "fp32",
        "--warmup-steps": 2,
        "--log-every": 1,
        "--eval-every": 3,
        "--checkpoint-every": 2,
        "--learning-rate": 5e-3,
    }
    flat = [str(part) for pair in arguments.items() for part in pair]
    return train.main([*flat, *map(str, more)])


def _records(run_dir):
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    timed = ("tokens_per_second", "mfu")
    return [{key: value for key, value in record.items() if key not in timed} for record in records]


@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_resumed_run_equals_uninterrupted_run(workspace, checkpoint, tmp_path, monkeypatch, optimizer):
    model_dir = checkpoint("v3", vocab_size=VOCAB_SIZE)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = ["--steps", 6, "--optimizer", optimizer]
    assert _train(workspace, model_dir, whole, *options, "--export-dir", tmp_path / "export") == 0
    reference = _records(whole)
    losses = [record["loss"] for record in reference if "loss" in record]
    assert losses[-1] < losses[0]
    assert all(record["expert_load"] for record in reference if "loss" in record)

    real_step, calls = train.train_step, []

    def dies_in_the_fourth_step(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", dies_in_the_fourth_step)
        with pytest.raises(KeyboardInterrupt):
            _train(workspace, model_dir, stopped, *options)
    assert [path.name for path in train.checkpoints_in(stopped)] == ["checkpoint-00000002"]
    assert _train(workspace, model_dir, stopped, *options, "--resume") == 0
    assert _records(stopped) == reference

    _check_export(tmp_path / "export", model_dir)
    assert evaluate.main([str(tmp_path / "export"), "--data", str(workspace / "data"), "--context-tokens", "32"]) == 0


@pytest.mark.slow
def test_muon_learns_more_than_adamw_in_as_many_steps(workspace, checkpoint, tmp_path):
    model_dir = checkpoint("v3", vocab_size=VOCAB_SIZE)
    bits = {}
    for optimizer in train.OPTIMIZERS:
        options = ["--steps", 40, "--optimizer", optimizer, "--eval-every", 40, "--accumulation-steps", 1]
        assert _train(workspace, model_dir, tmp_path / optimizer, *options, "--checkpoint-every", 40) == 0
        bits[optimizer] = _records(tmp_path / optimizer)[-1]["bits_per_byte"]
    assert bits["muon"]["en"] < bits["adamw"]["en"]
    assert bits["muon"]["zh"] < bits["adamw"]["zh"]


def _check_export(export_dir, model_dir):
    names = {path.name for path in export_dir.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "README.md"} <= names
    card = (export_dir / "README.md").read_text()
    assert "6 steps, 768 tokens" in card
    assert "| zh | " in card
    assert [check.name for check in publish.check_card(export_dir, False) if "library" in check.text] == []
    assert not [name for name in names if name.startswith(".export")]
    assert AutoConfig.from_pretrained(export_dir, trust_remote_code=True).vocab_size == VOCAB_SIZE
    assert (export_dir / "config.json").read_bytes() == (model_dir / "config.json").read_bytes()
    model, report = AutoModelForCausalLM.from_pretrained(export_dir, trust_remote_code=True, output_loading_info=True)
    assert not any(report.values())
    assert (model.generation_config.bos_token_id, model.generation_config.pad_token_id) == (0, 2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch-rows", "3"], "--batch-rows 3 must be a multiple of processes (1) times --accumulation-steps (2)"),
        (["--resume"], "drop --resume to start a new run"),
        (["--max-minutes", "5", "--schedule", "cosine"], "only its decay can begin at any time"),
        (["--peak-tflops", "0"], "--peak-tflops is 0.0; it must be positive"),
        (["--mix", "en"], "write LANGUAGE=WEIGHT,LANGUAGE=WEIGHT"),
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
    ],
)
def test_wrong_options_stop_before_training(workspace, tmp_path, capsys, more, message):
    assert _train(workspace, tmp_path, tmp_path / "run", "--steps", 6, *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_figure_of_one_record_shows_it():
    figure, axes = plt.subplots()
    record = {"tokens": 20480, "tokens_per_second": 372, "mfu": 0.01}
    for draw in (plot.draw_throughput, plot.draw_mfu):
        draw(axes, [record])
    plot.finish(axes)
    figure.canvas.draw()
    assert [line.get_marker() for line in axes.lines] == [".", "."]
    assert "20k" in [label.get_text() for label in axes.get_xticklabels()]  # tokens, not millions of them
    plt.close(figure)


def test_report_and_tensorboard(workspace, checkpoint, tmp_path):
    run = tmp_path / "<run>"
    model_dir = checkpoint("v3", vocab_size=VOCAB_SIZE)
    assert _train(workspace, model_dir, run, "--steps", 4, "--tensorboard", "--peak-tflops", "1e-3") == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    figures = {path.stem for path in (run / "figures").iterdir()}
    assert figures >= {"loss", "bits_per_byte", "expert_load", "router_bias", "learning_rate", "throughput", "mfu"}
    assert page.count("<img") == page.count("data:image/png;base64,") == len(figures)
    assert "&lt;run&gt;" in page
    assert "<run>" not in page
    assert "<th>kv_lora_rank<td>16" in page
    assert "tokens a second on all devices together" in page
    assert "of the devices&#x27; peak is the model&#x27;s arithmetic" in page
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    last = [record for record in logged if "loss" in record][-1]
    flops = json.loads((run / "run.json").read_text())["training_flops_per_token"]
    assert last["mfu"] == pytest.approx(last["tokens_per_second"] * flops / 1e9, rel=0.01, abs=1e-4)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("lm_loss")] == [1, 2, 3, 4]
    assert events.Scalars("expert_load/1")[-1].value == pytest.approx(last["expert_load"]["1"])
    assert events.Scalars("bits_per_byte/zh")
    assert events.Scalars("router_bias/2/1")


@pytest.mark.compatibility("training of compiled layers")
@pytest.mark.slow
@pytest.mark.parametrize("family", ["v3", "nsa"])
def test_compiled_layers_train_alike(workspace, checkpoint, tmp_path, family):
    model_dir = checkpoint(family, vocab_size=VOCAB_SIZE)
    losses = {}
    for name, more in {"plain": [], "compiled": ["--compile"]}.items():
        assert _train(workspace, model_dir, tmp_path / name, "--steps", 3, *more) == 0
        losses[name] = [record["loss"] for record in _records(tmp_path / name) if "loss" in record]
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-3)


def test_small_vocabulary_is_refused(workspace, checkpoint):
    with pytest.raises(ValueError, match=r"vocab_size is 128 .* set vocab_size to at least 320"):
        train.build_model(checkpoint("v3"), VOCAB_SIZE)


# ---------------------------------------------------------------- what a user should know


def test_surprises_are_said(workspace, checkpoint, tmp_path, capsys):
    model_dir = checkpoint("v3", vocab_size=VOCAB_SIZE + 7)
    assert _train(workspace, model_dir, tmp_path / "run", "--steps", 2) == 0
    shown = capsys.readouterr().out
    assert f"vocab_size is {VOCAB_SIZE + 7} and the data's tokenizer has {VOCAB_SIZE} tokens: 448 parameters" in shown
    assert "--steps 2 ends inside the warm-up of 2 steps" in shown
    assert "times through the text" not in shown
    assert "en 2 rows, zh 2 rows" in shown
    assert "next: " in shown


def test_text_that_is_read_many_times_is_said(workspace):
    data = PretrainingData(workspace / "data", 32, 4, None)
    once = min(len(rows) // data.quotas[name] for name, rows in data.rows.items())
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=data.index["vocab_size"]))
    for steps, said in ((once, False), (10 * once, True)):
        args = SimpleNamespace(steps=steps, warmup_steps=0, schedule="cosine")
        notes = train.find_surprises(args, model, data)
        assert any("times through the text of" in note for note in notes) == said


def test_the_bar_names_its_numbers():
    text = train.progress_text({"loss": 9.0, "lm_loss": 3.21, "mtp_loss": 5.0, "aux_loss": None}, 1e-3, 12345.6)
    assert text == "next token 3.210, mtp 5.000, rate 1.0e-03, 12,346 tokens/s"


def test_one_language_whatever_its_name(workspace, checkpoint, tmp_path):
    """Samples of it are in log and report."""
    files = {"fr": [workspace / "en.jsonl"]}
    build_dataset(files, workspace / "tokenizer", tmp_path / "data", 0.2, min_held_out_bytes=1)
    model_dir, run = checkpoint("v3", vocab_size=VOCAB_SIZE), tmp_path / "run"
    assert _train(workspace, model_dir, run, "--steps", 3, "--data", tmp_path / "data") == 0
    sample = [record for record in _records(run) if "samples" in record][-1]["samples"]["fr"]
    assert sample["begins"].startswith("Number")
    assert sample["goes_on"]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Samples after 3 steps" in page
    assert sample["begins"] in page


# ---------------------------------------------------------------- full disks and damaged files


def test_a_full_disk_leaves_no_part_of_a_checkpoint(workspace, checkpoint, tmp_path, monkeypatch, capsys):
    from accelerate import Accelerator

    model_dir, run = checkpoint("v3", vocab_size=VOCAB_SIZE), tmp_path / "run"
    save = Accelerator.save_state

    def fill_disk(self, folder):
        if "00000004" in folder:
            Path(folder).mkdir()
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise errors.pop()
        return save(self, folder)

    monkeypatch.setattr(Accelerator, "save_state", fill_disk)
    errors = [OSError(28, "No space left on device")]
    assert _train(workspace, model_dir, run, "--steps", 6) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "No space left" in error
    assert "--resume" in error
    assert [path.name for path in run.glob("checkpoint*")] == ["checkpoint-00000002"]
    errors = [RuntimeError("PytorchStreamWriter failed writing file")]
    assert _train(workspace, model_dir, run, "--steps", 6, "--resume") == 2
    assert "PytorchStreamWriter" in capsys.readouterr().err
    monkeypatch.undo()
    (run / "checkpoint-00000006.partial").mkdir()  # of a kill
    assert _train(workspace, model_dir, run, "--steps", 6, "--resume") == 0
    assert not list(run.glob("*.partial"))


def test_damaged_files_do_not_block_resuming(workspace, checkpoint, tmp_path, capsys):
    """A cut last line of the log, a cut newest checkpoint: said, and the run becomes what it would have been."""
    model_dir, run = checkpoint("v3", vocab_size=VOCAB_SIZE), tmp_path / "run"
    assert _train(workspace, model_dir, run, "--steps", 4) == 0
    reference = _records(run)
    log, weights = run / "log.jsonl", run / "checkpoint-00000004" / "model.safetensors"
    log.write_bytes(log.read_bytes()[:-20])
    weights.write_bytes(weights.read_bytes()[:-100])
    capsys.readouterr()
    assert _train(workspace, model_dir, run, "--steps", 4, "--resume") == 0
    notes = capsys.readouterr().err
    assert f"the last line of {log} is cut" in notes
    assert "checkpoint-00000004 is damaged (model.safetensors has" in notes
    assert _records(run) == reference
    for checkpoint_dir in train.checkpoints_in(run):
        (checkpoint_dir / "optimizer.bin").unlink()
    assert _train(workspace, model_dir, run, "--steps", 8, "--resume") == 2
    assert f"all checkpoints in {run} are damaged" in capsys.readouterr().err


def test_a_damaged_line_in_a_log_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"log.jsonl line 2 is not JSON"):
        plot.read_log(tmp_path / "log.jsonl")
