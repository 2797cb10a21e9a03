"""Distillation: the divergence against a slow loop, its denominator, and a pruned model that recovers."""

import json
import shutil

import pytest
import torch
from checks import ROOT, assert_close
from datasets import Dataset
from tiny_chat import VOCAB_SIZE, add_tokenizer
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from compress import prune, quantise
from compress.compare import compare
from compress.rewrite import Source
from finetune import sft
from finetune.config import SFTOptions, make_options
from finetune.data import IGNORED_LABEL, render_all, write_jsonl
from finetune.distil import DistillationTrainer, divergence
from finetune.models import load_model
from finetune.problems import number_problems


@pytest.fixture
def chat_checkpoint(checkpoint):
    return lambda family="v3", **more: add_tokenizer(checkpoint(family, vocab_size=VOCAB_SIZE, **more))


def slow_divergence(student: torch.Tensor, teacher: torch.Tensor) -> float:
    """Place by place and token by token."""
    total = 0.0
    for q, p in zip(student.double().softmax(-1).tolist(), teacher.double().softmax(-1).tolist(), strict=True):
        total += sum(
            a * (torch.tensor(a / b, dtype=torch.float64).log().item()) for a, b in zip(p, q, strict=True) if a
        )
    return total


def test_divergence_equals_a_slow_loop(monkeypatch):
    monkeypatch.setattr("finetune.distil._CHUNK", 3)
    student, teacher = (3 * torch.randn(7, 11) for _ in range(2))
    student.requires_grad_()
    loss = divergence(student, teacher)
    assert loss.item() == pytest.approx(slow_divergence(student.detach(), teacher), rel=1e-5)
    loss.backward()
    assert_close(student.grad, student.softmax(-1).detach() - teacher.softmax(-1), "gradient q - p", atol=1e-6)


def test_no_places_are_no_loss():
    student = torch.randn(0, 5, requires_grad=True)
    loss = divergence(student, torch.randn(0, 5))
    loss.backward()
    assert loss.item() == 0


def trainer_for(student, teacher, folder, rows, tokenizer, batch_size=4, packing=False):
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        packing=packing,
        max_length=96,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
    )
    return DistillationTrainer(
        student,
        arguments,
        load_teacher=lambda _: teacher.eval(),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def whole_step(trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of all of the training data as one accumulated step."""
    model, batches = trainer.model.train(), list(trainer.get_train_dataloader())
    count = sum((batch["labels"][:, 1:] != IGNORED_LABEL).sum() for batch in batches)
    trainer.current_gradient_accumulation_steps = len(batches)
    total = sum(trainer.compute_loss(model, batch, num_items_in_batch=count) for batch in batches)
    total.backward()
    return total.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["v3", "v2_lite", "v32"])
def test_a_teacher_that_is_the_student_teaches_nothing(chat_checkpoint, tmp_path, family):
    base = chat_checkpoint(family)
    (student, tokenizer), (teacher, _) = (load_model(str(base), "float32") for _ in range(2))
    rows = render_all(number_problems(6, 1)[0], tokenizer, 96)
    loss, gradients = whole_step(trainer_for(student, teacher, tmp_path / "out", rows, tokenizer))
    assert abs(loss) < 1e-6
    assert gradients
    assert max(gradient.abs().max() for gradient in gradients.values()) < 1e-5


def answer_of(text: str) -> dict:
    return {"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": text}]}


@pytest.mark.parametrize("family", ["v3", "v2_lite"])
def test_one_denominator_for_packed_accumulated_and_single_rows(chat_checkpoint, tmp_path, family):
    """The mean over answers' places alone, whatever they are packed into or accumulated over."""
    base = chat_checkpoint(family, max_position_embeddings=512)
    teacher, tokenizer = load_model(str(base), "float32")
    with torch.no_grad():
        for parameter in teacher.eval().parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter) if parameter.ndim > 1 else 0.0
    rows = render_all([answer_of("count " * (1 + i % 5)) for i in range(12)], tokenizer, 96)
    assert len({sum(label != IGNORED_LABEL for label in row["labels"]) for row in rows}) == 5
    student, _ = load_model(str(base), "float32")
    total, places = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids, counts = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:]) != IGNORED_LABEL
            student_logits, teacher_logits = (model.eval()(ids).logits[0, :-1][counts] for model in (student, teacher))
            total += slow_divergence(student_logits, teacher_logits)
            places += int(counts.sum())
    assert 0 < places < sum(len(row["labels"]) for row in rows)
    expected = None
    for batch_size, packing in ((12, False), (3, False), (1, False), (1, True)):
        student, _ = load_model(str(base), "float32")
        trainer = trainer_for(student, teacher, tmp_path / "out", rows, tokenizer, batch_size, packing)
        if packing:
            assert len(trainer.train_dataset) < len(rows) / 2
        loss, gradients = whole_step(trainer)
        assert loss == pytest.approx(total / places, rel=1e-4), (batch_size, packing)
        expected = expected or gradients
        assert expected.keys() == gradients.keys()
        for name, gradient in expected.items():
            atol = 1e-4 * float(gradient.abs().max()) + 1e-8
            torch.testing.assert_close(gradients[name], gradient, atol=atol, rtol=1e-3, msg=name)


def options_for(model, teacher, folder, **more) -> SFTOptions:
    values = {"model": str(model), "teacher": str(teacher), "data": [str(folder / "train.jsonl")]}
    values |= {"output": str(folder / "run"), "steps": 30, "batch_size": 8, "learning_rate": 5e-3, "eval_steps": 10}
    values |= {"max_tokens": 128, "track": ["none"], "preview": False, "cpu": True, "log_steps": 1}
    return make_options(SFTOptions, values | more)


@pytest.fixture
def pruned(chat_checkpoint, tmp_path):
    """-> folder of the whole model, and of one with half of its experts"""
    base = chat_checkpoint(n_routed_experts=16)
    train, held_out = number_problems(64, 16, kinds=["count"])
    write_jsonl(train, tmp_path / "train.jsonl")
    write_jsonl(held_out, tmp_path / "held_out.jsonl")
    arguments = ["--model", str(base), "--output", str(tmp_path / "pruned"), "--keep", "8", "--unseen", "drop"]
    assert prune.main([*arguments, "--calibration", str(tmp_path / "train.jsonl"), "--dtype", "float32"]) == 0
    return base, tmp_path / "pruned"


@torch.no_grad()
def divergence_of(folder, teacher, texts) -> float:
    student, tokenizer = load_model(str(folder), "float32")
    original, _ = load_model(str(teacher), "float32")
    total = places = 0
    for row in render_all([json.loads(line) for line in texts.read_text().splitlines()], tokenizer, 128):
        counts = torch.tensor(row["labels"][1:]) != IGNORED_LABEL
        ids = torch.tensor([row["input_ids"]])
        total += divergence(*(model.eval()(ids).logits[0, :-1][counts] for model in (student, original))).item()
        places += int(counts.sum())
    return total / places


@pytest.mark.parametrize("quantised", [False, True])
def test_a_pruned_model_recovers_and_is_merged(pruned, quantised, tmp_path):
    """The result loads by itself, is nearer to the original than the pruned one, and has no expert more; of one in FP8
    it is no longer in FP8."""
    base, folder = pruned
    names = Source(folder).shard_of.keys()
    if quantised:
        assert quantise.main(["--model", str(folder), "--output", str(tmp_path / "fp8")]) == 0
        folder = tmp_path / "fp8"
    held_out = tmp_path / "held_out.jsonl"
    options = options_for(folder, base, tmp_path, eval_data=[str(held_out)], merge=True)
    _, _, report = sft.run(options)
    merged = tmp_path / "run" / "merged"
    before, after = (divergence_of(path, base, held_out) for path in (folder, merged))
    assert report.before["loss"] == pytest.approx(before, rel=1e-3)
    assert report.after["loss"] == pytest.approx(after, rel=1e-2)
    assert after < 0.8 * before
    assert "perplexity" not in report.after
    model = AutoModelForCausalLM.from_pretrained(merged, trust_remote_code=True)
    assert model.config.n_routed_experts == 8
    assert Source(merged).shard_of.keys() == names


@pytest.mark.slow
def test_recovery_lowers_the_bits_per_byte_of_the_checkpoint_of_this_repository(tmp_path):
    """Half of its experts gone, recovered on some of this repository's documents, read on others."""
    documents = sorted((ROOT / "docs").glob("*.md"))
    for name, part, most in (("train", documents[::2], 200), ("held_out", documents[1::2], 30)):
        pieces = [text for path in part for text in path.read_text().split("\n\n") if len(text) > 200]
        write_jsonl([{"text": text} for text in pieces[:most]], tmp_path / f"{name}.jsonl")
    pruned, held_out = tmp_path / "pruned", tmp_path / "held_out.jsonl"
    arguments = ["--model", str(ROOT), "--output", str(pruned), "--keep", "8", "--unseen", "drop"]
    assert prune.main([*arguments, "--calibration", str(tmp_path / "train.jsonl"), "--tokens", "4096"]) == 0
    more = {"steps": 16, "eval_steps": 16, "batch_size": 4, "learning_rate": 2e-3, "packing": True, "max_tokens": 256}
    sft.run(options_for(pruned, ROOT, tmp_path, merge=True, eval_data=[str(held_out)], **more))
    names = [str(ROOT), str(pruned), str(tmp_path / "run" / "merged")]
    whole, before, after = compare(names, [held_out], 4096, 256, torch.float32, "cpu")
    bits, divergences = ([getattr(x, field)["held_out"] for x in (whole, before, after)] for field in ("bits", "kl"))
    assert bits[0] < bits[2] < bits[1]
    assert divergences[2] < 0.8 * divergences[1]
    assert after.parameters == before.parameters < whole.parameters


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"mtp_loss": 0.3}, "mtp_loss is 0.3, but with a teacher"),
        ({"merge": True, "method": "full"}, "whole model already"),
    ],
)
def test_options_that_contradict_each_other(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        options_for("m", "t", tmp_path, **more)


def test_a_teacher_with_other_tokens_is_refused(chat_checkpoint, checkpoint, tmp_path):
    base = chat_checkpoint()
    write_jsonl(number_problems(32, 1)[0], tmp_path / "train.jsonl")
    shutil.copytree(base, tmp_path / "student")
    base, wider = tmp_path / "student", add_tokenizer(checkpoint("v3", vocab_size=VOCAB_SIZE + 8))
    with pytest.raises(ValueError, match="`vocab_size` of the teacher"):
        sft.run(options_for(base, wider, tmp_path))
    path = wider / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, last = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[last] = vocabulary[last], vocabulary[first]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="whose tokenizer has other tokens"):
        sft.run(options_for(base, wider, tmp_path))
    assert not (tmp_path / "run" / "final").exists()
