"""Trainers run what their launcher asks for, and one at a time in a folder; otherwise they say so and write nothing."""

import subprocess
import sys

import pytest
from checks import ROOT, run_python

from common.launch import join_processes
from common.outputs import only_run_in
from finetune import dpo, grpo, sft
from pretrain import train

PRETRAIN = ("--model", "no-model", "--data", "no-data", "--steps", "1", "--run-dir")
FINETUNE = ("--model", "no-model", "--data", "no-data.jsonl", "--track", "none", "--output")
COMMANDS = {"pretrain.train": PRETRAIN, "finetune.sft": FINETUNE, "finetune.dpo": FINETUNE, "finetune.grpo": FINETUNE}
MAINS = {"pretrain.train": train.main, "finetune.sft": sft.main, "finetune.dpo": dpo.main, "finetune.grpo": grpo.main}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "2 processes were started together, but this one found 1"),
        ({"ACCELERATE_USE_FSDP": "true"}, "the launcher asks for FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "the launcher asks for DeepSpeed"),
    ],
)
def test_every_trainer_refuses_to_run_something_else(tmp_path, monkeypatch, capsys, command, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert MAINS[command]([*COMMANDS[command], str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision 'fp16', the command for 'no'"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}, "gradient_accumulation_steps 3, the command for 2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
            "parallelism_config_tp_size 2",
        ),
    ],
)
def test_what_a_launcher_asks_for_and_the_options_do_not(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        join_processes(accumulation_steps=2, precision="no")


def test_a_launcher_that_asks_for_the_same_or_nothing(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    assert join_processes(accumulation_steps=2, precision="bf16").num_processes == 1
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    assert join_processes(accumulation_steps=4, precision="bf16").num_processes == 1


@pytest.mark.parametrize("command", [name for name in COMMANDS if name.startswith("finetune")])
def test_one_process_on_several_gpus_is_refused(tmp_path, monkeypatch, capsys, command):
    """transformers' Trainer would copy the model for each pass, and the copies' loads of experts would be lost."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert MAINS[command]([*COMMANDS[command], str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 2" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pretrain.train", "finetune.sft"])
def test_launched_without_accelerators(tmp_path, command):
    """The shipped FSDP2 configuration where there is nothing to shard over."""
    config = ROOT / "configs" / "accelerate" / "fsdp2.yaml"
    launch = ["--config_file", str(config), "--num_processes", "2", "--module", command, *COMMANDS[command]]
    code = f"import sys; sys.argv = ['accelerate', 'launch', *{[*launch, str(tmp_path / 'run')]!r}]\n"
    code += "from accelerate.commands.accelerate_cli import main; main()"
    done = run_python(code, timeout=200, cwd=ROOT, fails=True, CUDA_VISIBLE_DEVICES="")
    assert "2 processes were started together, but this one found 1" in done
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_one_run_at_a_time_in_a_folder(tmp_path, capsys, command):
    run = tmp_path / "run"
    script = "import sys\nfrom pathlib import Path\nfrom common.outputs import only_run_in\n"
    script += f"with only_run_in(Path({str(run)!r})):\n    print('begun', flush=True)\n    sys.stdin.read()\n"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == "begun\n"
        assert MAINS[command]([*COMMANDS[command], str(run)]) == 2
        assert f"another run writes to {run}" in capsys.readouterr().err
        other.kill()  # and a run that was killed keeps nobody out
    assert MAINS[command]([*COMMANDS[command], str(run)]) == 2
    assert "another run" not in capsys.readouterr().err


def test_a_folder_without_files_goes_again(tmp_path):
    with pytest.raises(ValueError, match="no data"), only_run_in(tmp_path / "run"):
        raise ValueError("no data")
    assert not (tmp_path / "run").exists()
    with only_run_in(tmp_path / "run"):
        (tmp_path / "run" / "log").write_text("")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log"]
