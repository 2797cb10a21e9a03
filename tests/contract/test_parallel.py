"""Tensor and expert parallelism by transformers' plans: two processes compute what one computes."""

import inspect

import pytest
import torch
from checks import ROOT, assert_close, assert_gradients_close, gradients, run_python
from tiny import make_model, make_tokens
from transformers.distributed import DistributedConfig

pytestmark = pytest.mark.slow

WORKER = """
import sys
sys.path.insert(0, {tests!r})
import conftest
import torch
from tiny import make_tokens
from deepseek_repo.modeling_deepseek import DeepseekForCausalLM

if {mode!r} == "tensor":
    arguments = {{"tp_plan": "auto"}}
else:
    from transformers.distributed import DistributedConfig
    arguments = {{"distributed_config": DistributedConfig(tp_size=2, ep_size=2)}}
model = DeepseekForCausalLM.from_pretrained({folder!r} + "/model", **arguments)
tokens, results = make_tokens(2, 24), {{}}
with torch.no_grad():
    results["full"] = model(tokens, use_cache=False).logits
    cache, parts = None, []
    for part in (tokens[:, :12], tokens[:, 12:13], tokens[:, 13:]):
        outputs = model(part, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        parts.append(outputs.logits)
    results["cached"] = torch.cat(parts, dim=1)
    results["generated"] = model.generate(
        tokens[:, :12], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=2
    )
if {mode!r} == "tensor":
    model.train()(tokens, labels=tokens).loss.backward()
    parts = {{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}
    if any(hasattr(part, "full_tensor") for part in parts.values()):
        results["gradients"] = {{n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in parts.items()}}
results["local experts"] = [
    tuple(getattr(p, "to_local", lambda p=p: p)().shape) for n, p in model.named_parameters() if n.endswith("experts.down_proj")
]
if torch.distributed.get_rank() == 0:
    torch.save(results, {folder!r} + "/results")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def run_two(family: str, mode: str, folder) -> dict:
    make_model(family).save_pretrained(folder / "model")
    (folder / "worker.py").write_text(WORKER.format(tests=str(ROOT / "tests"), mode=mode, folder=str(folder)))
    run_python(
        "from torch.distributed.run import main\n"
        f"main(['--standalone', '--nproc-per-node', '2', {str(folder / 'worker.py')!r}])",
        timeout=280,
    )
    return torch.load(folder / "results", weights_only=False)


def compare(family: str, results: dict):
    model, tokens = make_model(family), make_tokens(2, 24)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        generated = model.generate(
            tokens[:, :12], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=2
        )
    assert_close(results["full"], expected, "full forward")
    assert_close(results["cached"], expected, "cached forward")
    assert torch.equal(results["generated"], generated)


@pytest.mark.compatibility("tensor parallelism")
@pytest.mark.parametrize("family", ["llama", "deepseek", "v2_lite", "v3", "v32", "nsa"])
def test_tensor_parallel(family, tmp_path):
    results = run_two(family, "tensor", tmp_path)
    compare(family, results)
    assert all(shape == (8, 32, 12) for shape in results["local experts"]), "the experts' width is not halved"
    if "gradients" not in results:
        pytest.skip("in this transformers a gradient is its process's part only; logits and generation are the same")
    model, tokens = make_model(family).train(), make_tokens(2, 24)
    model(tokens, labels=tokens).loss.backward()
    assert_gradients_close(results["gradients"], gradients(model))


@pytest.mark.skipif(
    "tp_size" not in inspect.signature(DistributedConfig).parameters,
    reason="expert parallelism with a plan came later",
)
@pytest.mark.compatibility("expert parallelism")
@pytest.mark.parametrize("family", ["deepseek", "v3"])
def test_expert_parallel(family, tmp_path):
    results = run_two(family, "experts", tmp_path)
    compare(family, results)
    assert all(shape == (4, 32, 24) for shape in results["local experts"]), "the experts are not shared out"
