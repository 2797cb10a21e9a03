"""Two processes learn what one process learns: sharded by FSDP2 with LoRA and in full, and with a model each."""

import json

import pytest
from checks import ROOT, run_python
from tiny_chat import VOCAB_SIZE, add_tokenizer

from finetune.data import write_jsonl
from finetune.models import load_model, load_result
from finetune.problems import number_problems

pytestmark = pytest.mark.slow

# What configs/accelerate/fsdp2.yaml says to a launched process.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
WORKER = """
import json, os, sys
sys.path.insert(0, {root!r})
from accelerate import DistributedType, PartialState
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

if "ACCELERATE_USE_FSDP" in os.environ:
    # accelerate shards only where it believes in accelerators; on CPUs it would quietly take DistributedDataParallel
    make_state = PartialState.__init__

    def believe(self, *args, **kwargs):
        make_state(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = believe

from finetune import sft
from finetune.config import SFTOptions, make_options

counts = {{}}

class Count(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        sharded = {{n for n, p in model.named_parameters() if isinstance(p, DTensor)}}
        counts["sharded"] = len(sharded)
        counts["all"] = len(list(model.parameters()))
        counts["adapters"] = len([n for n in sharded if ".lora_" in n])
        counts["wrapped"] = sum(type(m).__name__ == "FSDPDeepseekDecoderLayer" for m in model.modules())
        counts["local experts"] = [list(getattr(p, "to_local", lambda p=p: p)().shape) for n, p in model.named_parameters()
                                   if n.endswith("experts.down_proj") or n.endswith("experts.base_layer.base_layer.down_proj")][0]

options = make_options(SFTOptions, json.loads(open({folder!r} + "/options.json").read()))
_, _, report = sft.run(options, callbacks=(Count(),))
if PartialState().is_main_process:
    losses = [e["loss"] for e in report.log if "loss" in e]
    held_out = [e["eval_loss"] for e in report.log if "eval_loss" in e]
    with open(options.output + "/counts.json", "w") as file:
        accuracy = [e["eval_accuracy"] for e in report.log if "eval_accuracy" in e]
        json.dump({{"losses": losses, "held_out": held_out, "accuracy": accuracy, **counts}}, file)
"""


def _run(folder, base, processes, environment, **more):
    output = folder / f"run{processes}"
    values = {
        "model": str(base),
        "data": [str(folder / "train.jsonl")],
        "eval_data": [str(folder / "held_out.jsonl")],
        "output": str(output),
        **{"steps": 4, "batch_size": 8 // processes, "learning_rate": 1e-2, "eval_steps": 2, "log_steps": 1},
        **{"max_tokens": 128, "track": ["none"], "preview": False, "cpu": True, "dtype": "float32"},
        **more,
    }
    (folder / "options.json").write_text(json.dumps(values))
    (folder / "worker.py").write_text(WORKER.format(root=str(ROOT), folder=str(folder)))
    launch = ["--standalone", "--nproc-per-node", str(processes), str(folder / "worker.py")]
    run_python(f"from torch.distributed.run import main\nmain({launch!r})", timeout=280, **environment)
    return json.loads((output / "counts.json").read_text()), output


def _prepare(checkpoint, folder):
    train, held_out = number_problems(48, 16, kinds=["count"])
    write_jsonl(train, folder / "train.jsonl")
    write_jsonl(held_out, folder / "held_out.jsonl")
    return add_tokenizer(checkpoint("v3", vocab_size=VOCAB_SIZE))


@pytest.mark.compatibility("FSDP2, fine-tuning", family="v3")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_fsdp2_learns_what_one_process_learns(checkpoint, tmp_path, method):
    base = _prepare(checkpoint, tmp_path)
    more = {"method": method, "learning_rate": 1e-2 if method == "lora" else 1e-3}
    single, _ = _run(tmp_path, base, 1, {}, **more)
    sharded, output = _run(tmp_path, base, 2, FSDP2, **more)
    assert single["sharded"] == 0
    assert sharded["sharded"] == sharded["all"] > 50  # every parameter lies in two halves
    assert sharded["adapters"] == (2 * 28 if method == "lora" else 0)
    assert sharded["wrapped"] == 3  # the decoder layers, by the model's own _no_split_modules
    assert sharded["local experts"][0] == single["local experts"][0] // 2
    assert sharded["losses"] == pytest.approx(single["losses"], rel=1e-4)
    assert sharded["held_out"] == pytest.approx(single["held_out"], rel=1e-4)
    if method == "lora":
        load_result(load_model(str(base))[0], output / "final")
    else:
        load_model(str(output / "final"))


@pytest.mark.compatibility("DistributedDataParallel, fine-tuning", family="v3")
@pytest.mark.parametrize("method", ["lora", "esft"])
def test_a_model_in_each_process_learns_what_one_process_learns(checkpoint, tmp_path, method):
    base = _prepare(checkpoint, tmp_path)
    more = {"method": method, "task_data": [str(tmp_path / "held_out.jsonl")], "esft_threshold": 0.4}
    single, _ = _run(tmp_path, base, 1, {}, **more)
    double, _ = _run(tmp_path, base, 2, {}, **more)
    assert double["sharded"] == 0
    assert double["losses"] == pytest.approx(single["losses"], rel=1e-4)
    assert double["held_out"] == pytest.approx(single["held_out"], rel=1e-4)
    assert double["accuracy"] == single["accuracy"]
    assert len(double["accuracy"]) == 3
