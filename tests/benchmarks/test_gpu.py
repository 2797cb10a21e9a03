"""`python -m benchmarks.gpu` without a GPU: its checks in tiny sizes, its time, its failures, its files."""

import importlib.util
import json
import sys

import pytest
import torch
from checks import ROOT
from deepseek_repo.modeling_deepseek import DeepseekForCausalLM

from benchmarks.gpu import report, smoke, sparse, speed
from benchmarks.gpu.__main__ import build_parser, main
from benchmarks.gpu.models import FAMILIES, Setup
from benchmarks.gpu.runner import BROKEN, Check, NotRun, Report, deadlines, run_part, supervise

SETUP = Setup("cpu", full=False)
LACKING = ("Triton", "flash_attn", "peft is not installed", "FP8", "compiles for half a minute")


class Clock:
    """A time that only checks spend."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def check(self, name: str, takes: float, needs: float = 5.0) -> Check:
        def run():
            self.now += takes
            return {"took": takes}

        return Check(name, run, seconds=needs)


def run_all(part: str, module, path) -> dict[str, dict]:
    found = Report(path)
    run_part(part, module.checks(SETUP), found, deadline=float("inf"))
    return found.checks


@pytest.fixture
def path(tmp_path):
    return tmp_path / "gpu.json"


@pytest.mark.parametrize(("part", "module"), [("smoke", smoke), ("speed", speed), ("sparse", sparse)])
def test_every_check_runs_in_tiny_sizes(part, module, path):
    found = run_all(part, module, path)
    assert len(found) > 10
    for name, record in found.items():
        assert record["status"] in ("passed", "not run"), f"{name}: {record.get('traceback', record)}"
        if record["status"] == "not run":
            assert any(lacking in record["reason"] for lacking in LACKING), f"{name}: {record['reason']}"
    assert Report(path).checks == found


def test_smoke_has_every_family():
    names = {check.name for check in smoke.checks(SETUP)}
    assert {f"family/{family}" for family in FAMILIES} <= names


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_run_in_the_interpreter():
    import triton

    if not triton.knobs.runtime.interpret:
        pytest.skip("runs with TRITON_INTERPRET=1")
    assert smoke.check_nsa_kernels(SETUP)
    assert smoke.check_dsa_kernels(SETUP)


def test_a_wrong_model_fails(monkeypatch):
    put = smoke.put

    def damaged(*arguments, **kwargs):
        model = put(*arguments, **kwargs)
        model.model.layers[0].self_attn.o_proj.weight.data *= 1.5
        return model

    monkeypatch.setattr(smoke, "put", damaged)
    with pytest.raises(AssertionError, match="logits: error"):
        smoke.check_family(SETUP, "llama")
    with pytest.raises(AssertionError, match="tokens"):
        smoke.check_generate(SETUP, "llama", "dynamic")


def test_fp8_checkpoint_means_the_model(tmp_path):
    original = smoke.save_fp8(tmp_path, SETUP).state_dict()
    loaded = DeepseekForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert loaded.keys() == original.keys()
    changed = [name for name, tensor in loaded.items() if not torch.equal(tensor, original[name])]
    assert {"model.layers.0.self_attn.kv_b_proj.weight", "model.layers.1.mlp.experts.down_proj"} <= set(changed)
    for name in changed:
        assert smoke.relative(loaded[name], original[name]) < 0.04, name


def test_time_is_shared_and_kept(path):
    assert deadlines(["smoke", "speed", "sparse"], 0, 110) == {"smoke": 30, "speed": 80, "sparse": 110}
    assert deadlines(["sparse"], 50, 60) == {"sparse": 60}
    clock, found = Clock(), Report(path)
    checks = [clock.check("a/quick", 10), clock.check("a/long", 80, needs=50), clock.check("a/late", 1, needs=11)]
    checks.append(clock.check("a/still fits", 2, needs=2))
    run_part("smoke", iter(checks), found, deadline=1100, clock=clock)
    statuses = {name: record["status"] for name, record in found.checks.items()}
    assert list(statuses.values()) == ["passed", "passed", "not run", "passed"]
    assert "the time was up: 10 s" in found.checks["smoke/a/late"]["reason"]
    assert clock.now < 1100


def test_a_failure_costs_only_itself(path):
    def wrong():
        raise RuntimeError("an illegal access\nand more")

    def lacking():
        raise NotRun("no such card")

    def checks():
        yield Check("a/wrong", wrong)
        yield Check("a/lacking", lacking)
        yield Check("a/right", lambda: {"speed": 3})
        raise ValueError("the next model cannot be made")

    run_part("smoke", checks(), found := Report(path), deadline=float("inf"))
    written = json.loads(path.read_text())["checks"]
    assert written == found.checks
    wrong_record, lacking_record, right, rest = written.values()
    assert wrong_record["status"] == "failed"
    assert wrong_record["reason"] == "RuntimeError: an illegal access"
    assert "in wrong" in wrong_record["traceback"]
    assert lacking_record == {"status": "not run", "reason": "no such card", "seconds": lacking_record["seconds"]}
    assert right["result"] == {"speed": 3}
    assert rest["reason"] == "ValueError: the next model cannot be made"


CHILD = """
import os, sys
from pathlib import Path
from benchmarks.gpu.runner import BROKEN, Check, Report, run_part
import time

def die(): os._exit({code})
def wait(): time.sleep(60)
checks = [Check("a/first", dict), Check("a/deadly", die), Check("a/last", dict), Check("a/endless", {last})]
run_part("smoke", iter(checks), Report(Path(sys.argv[1])), deadline=float("inf"))
"""


@pytest.mark.parametrize("code", [BROKEN, 134])
def test_a_dead_process_costs_a_new_one(path, monkeypatch, code):
    monkeypatch.chdir(ROOT)
    supervise([sys.executable, "-c", CHILD.format(code=code, last="dict"), str(path)], path, end=2e10)
    found = Report(path).checks
    assert [record["status"] for record in found.values()] == ["passed", "failed", "passed", "passed"]
    assert f"ended with code {code}" in found["smoke/a/deadly"]["reason"]


def test_what_never_ends_is_ended(path):
    Report(path).note("smoke/a/endless", status="running")
    times = iter([0.0, 0.0])
    supervise([sys.executable, "-c", "import time; time.sleep(60)"], path, end=0.5, clock=lambda: next(times))
    assert Report(path).checks["smoke/a/endless"] == {"status": "not run", "reason": "the time was up while it ran"}


def test_a_command_that_cannot_begin_is_an_error(path):
    with pytest.raises(RuntimeError, match="code 7 while no check ran"):
        supervise([sys.executable, "-c", "raise SystemExit(7)"], path, end=2e10)


def test_page(path, tmp_path):
    head = {"machine": {"gpu": "Model 1", "torch": "2.11"}}
    checks = {
        "smoke/family/v3": {"status": "passed", "result": {"logits": 0.001}, "seconds": 1},
        "smoke/family/nsa": {"status": "failed", "reason": "AssertionError: logits", "traceback": "...", "seconds": 1},
        "speed/decode/batch 1": {"status": "passed", "result": {"ours tokens/s": 12345}, "seconds": 1},
        "sparse/NSA/8 tokens": {"status": "not run", "reason": "the time was up"},
    }
    report.write(ROOT / "docs" / "gpu.md", tmp_path / "gpu.md", head, checks)
    text = (tmp_path / "gpu.md").read_text()
    assert text.startswith((ROOT / "docs" / "gpu.md").read_text().partition(report.BEGIN)[0])
    for line in (
        "Machine: gpu Model 1, torch 2.11.",
        "2 passed, 1 failed, 1 not run.",
        "| v3 | passed | 0.001 |",
        "| batch 1 | passed | 12,345 |",
        "- smoke/family/nsa: failed: AssertionError: logits",
        "- sparse/NSA/8 tokens: not run: the time was up",
    ):
        assert line in text.splitlines(), line
    report.write(tmp_path / "gpu.md", tmp_path / "again.md", head, checks)
    assert (tmp_path / "again.md").read_text() == text


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--device", "cpu", "--size", "tiny", "--parts", "sparse", "--output", str(tmp_path)]
    assert main([*arguments, "--minutes", "0.35"]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["settings"] == {"device": "cpu", "size": "tiny", "minutes": 0.35}
    assert found["machine"]["torch"] == torch.__version__
    assert "## Sparse attention beside dense" in (tmp_path / "gpu.md").read_text()
    for wrong, message in ((["--parts", "smok"], "no part is called smok"), ([], "no CUDA device")):
        with pytest.raises(SystemExit):
            main(wrong)
        assert message in capsys.readouterr().err


def test_options():
    names = {option for action in build_parser()._actions for option in action.option_strings}
    assert names == {"-h", "--help", "--minutes", "--device", "--parts", "--size", "--output", "--until"}
