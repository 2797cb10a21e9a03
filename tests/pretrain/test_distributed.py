"""Two processes train as one does: replicated, and sharded by the shipped accelerate configs."""

import json
import sys
from types import ModuleType

import pytest
import torch
from accelerate import DeepSpeedPlugin
from accelerate.commands.config.config_args import load_config_from_file
from checks import ROOT, run_python
from tiny import make_model
from tiny_corpus import VOCAB_SIZE, write_workspace
from transformers import AutoModelForCausalLM

CONFIGS = ROOT / "configs" / "accelerate"

# accelerate shards only where it has found an accelerator, and replicates on CPUs without a word: so it is told that it has.
WORKER = """
import sys
sys.path.insert(0, {root!r})
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from pretrain import train

PartialState(cpu=True)
if {sharded}:
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
train_to_the_end = train.train_to_the_end

def watched(args, accelerator, model, *rest):
    parameters = list(model.parameters())
    sharded = sum(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in parameters)
    print(f"processes {{accelerator.num_processes}}, sharded {{sharded}} of {{len(parameters)}}", flush=True)
    train_to_the_end(args, accelerator, model, *rest)

train.train_to_the_end = watched
sys.exit(train.main({arguments!r}))
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("pretrain"))


def _train(folder, model_dir, workspace, run, config, *more) -> str:
    options = {
        "--model": model_dir,
        "--data": workspace / "data",
        "--tokenizer": workspace / "tokenizer",
        "--run-dir": run,
        "--batch-rows": 4,
        "--row-tokens": 32,
        "--precision": "fp32",
        "--warmup-steps": 2,
        "--log-every": 1,
        "--eval-every": 2,
        "--checkpoint-every": 2,
        "--learning-rate": 5e-3,
        "--steps": 4,
    }
    arguments = [*(str(part) for pair in options.items() for part in pair), *map(str, more)]
    script = folder / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), sharded=config == "fsdp2", arguments=arguments))
    if config is None:
        return run_python(script.read_text(), timeout=280, ACCELERATE_USE_CPU="true")
    launch = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes", "2", str(script)]
    code = f"import sys; sys.argv = ['accelerate', 'launch', *{launch!r}]\n"
    code += "from accelerate.commands.accelerate_cli import main; main()"
    return run_python(code, timeout=280, ACCELERATE_USE_CPU="true")


def _records(run) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def _assert_alike(run, reference, tolerance):
    """The first step to rounding. AdamW then makes steps of gradients near its epsilon, which are noise: the norm shows it."""
    found, expected = _records(run), _records(reference)
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for record, wanted in zip(found, expected, strict=True):
        for name in {"loss", "lm_loss", "mtp_loss", "aux_loss", "grad_norm"} & wanted.keys():
            later = max(tolerance, 1e-3) if name == "grad_norm" else tolerance
            allowed = 1e-6 if record["step"] == 1 else later
            assert record[name] == pytest.approx(wanted[name], rel=allowed), (record["step"], name)
        for name in {"bits_per_byte", "router_bias"} & wanted.keys():
            assert {k: pytest.approx(v, rel=tolerance) for k, v in wanted[name].items()} == record[name]


@pytest.mark.compatibility("DistributedDataParallel and FSDP2, pretraining", family="v3")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "optimizer", "tolerance"),
    # Muon's iteration runs in bfloat16, which makes more of a last digit
    [("ddp", "adamw", 1e-4), ("fsdp2", "adamw", 1e-4), ("fsdp2", "muon", 1e-3)],
)
def test_two_processes_train_as_one(workspace, checkpoint, tmp_path, config, optimizer, tolerance):
    model_dir = checkpoint("v3", vocab_size=VOCAB_SIZE)
    shared = (tmp_path, model_dir, workspace)
    _train(*shared, tmp_path / "one", None, "--optimizer", optimizer, "--export-dir", tmp_path / "one-model")
    printed = _train(
        *shared, tmp_path / "two", config, "--optimizer", optimizer, "--export-dir", tmp_path / "two-model"
    )
    num_parameters = len(list(make_model("v3").parameters()))
    expected = num_parameters if config == "fsdp2" else 0
    assert printed.count(f"processes 2, sharded {expected} of {num_parameters}") == 2
    _assert_alike(tmp_path / "two", tmp_path / "one", tolerance)

    # stopped after step 2 and resumed: the same once more
    (tmp_path / "two").rename(tmp_path / "stopped")
    for path in (tmp_path / "stopped").glob("checkpoint-00000004"):
        path.rename(tmp_path / "beyond")
    _train(*shared, tmp_path / "stopped", config, "--optimizer", optimizer, "--resume")
    _assert_alike(tmp_path / "stopped", tmp_path / "one", tolerance)

    # AdamW divides a gradient by its own size, so noise about zero becomes a whole step in a few entries: what the training
    # changed is compared as a vector, matrix by matrix and as a whole.
    start, one, two = (
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).state_dict()
        for folder in (model_dir, tmp_path / "one-model", tmp_path / "two-model")
    )
    assert start.keys() == one.keys() == two.keys()
    changes = {name: one[name] - start[name] for name in one}
    for name, change in changes.items():
        assert torch.linalg.vector_norm(two[name] - one[name]) <= 0.3 * torch.linalg.vector_norm(change), name
    apart, changed = (
        torch.cat([tensor.flatten() for tensor in tensors]).norm()
        for tensors in ([two[name] - one[name] for name in one], changes.values())
    )
    assert apart <= 0.05 * changed


def test_zero3_declares_the_mixture_as_a_leaf(monkeypatch):
    config = load_config_from_file(str(CONFIGS / "zero3.yaml"))  # refuses keys that accelerate does not know
    assert config.deepspeed_config["zero_stage"] == 3
    monkeypatch.setenv(
        "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", config.deepspeed_config["deepspeed_moe_layer_cls_names"]
    )
    leaves = []
    deepspeed = ModuleType("deepspeed.utils")
    deepspeed.set_z3_leaf_modules = lambda model, classes: leaves.append(
        [m for m in model.modules() if type(m) in classes]
    )
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", deepspeed)
    monkeypatch.setattr("accelerate.utils.dataclasses.compare_versions", lambda *_: False)
    plugin = object.__new__(DeepSpeedPlugin)  # its own constructor wants deepspeed
    plugin.transformer_moe_cls_names = None
    model = make_model("v3")
    plugin.set_moe_leaf_modules(model)
    assert [leaves[0]] == leaves
    assert leaves[0] == [layer.mlp for layer in model.model.layers if layer.is_sparse]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_shipped_configs_are_accelerates(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}[name]
    assert config.mixed_precision == "no"
