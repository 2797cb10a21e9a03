"""How the experts of a layer should lie in memory: speed of each form, and what LoRA reaches in it.

    python -m benchmarks.experts

Forms: one module an expert (`ModuleList`, DeepSeek's own hub code), and stacked parameters run by each experts
implementation. LoRA: the usual target names given to PEFT, on transformers' DeepseekV3 class, on this model as it is,
and on this model if it kept `model_type` "deepseek_v3" in memory. Writes runs/benchmarks/experts.json.
"""

import argparse
import json
import re
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM
from transformers.utils import logging

from benchmarks.common import interleave, save_checkpoint, summarise, write_results
from benchmarks.decode import CONFIG
from common.command import run_command
from common.machine import describe_machine

USUAL_TARGETS = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STACKED_TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
GROUPS = {
    "attention": r"self_attn\.",
    "routed experts": r"mlp\.experts\.",
    "shared experts": r"mlp\.shared_experts\.",
    "router": r"mlp\.gate\.",
    "dense layers": r"mlp\.(gate|up|down)_proj",
}


class ListOfExperts(nn.Module):
    """The same experts as one module each, run as DeepSeek's hub code runs them in training."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.act_fn = experts.act_fn
        self.gate_up = nn.ParameterList([weight.detach().clone() for weight in experts.gate_up_proj])
        self.down = nn.ParameterList([weight.detach().clone() for weight in experts.down_proj])

    def forward(self, hidden_states, indices, weights):
        output = torch.zeros_like(hidden_states)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            token, slot = torch.where(indices == expert)
            if len(token):
                gate, up = nn.functional.linear(hidden_states[token], gate_up).chunk(2, dim=-1)
                rows = nn.functional.linear(self.act_fn(gate) * up, down) * weights[token, slot, None]
                output = output.index_add(0, token, rows)
        return output


def time_forms(model, num_tokens: int, backward: bool) -> dict:
    """Milliseconds of the experts of one layer in each form."""
    mlp = model.model.layers[-1].mlp
    listed = ListOfExperts(mlp.experts)
    hidden_states = torch.randn(num_tokens, CONFIG["hidden_size"], requires_grad=backward)
    with torch.no_grad():
        _, weights, indices = mlp.gate(hidden_states)

    def run(module, implementation=None):
        if implementation is not None:
            model.set_experts_implementation(implementation)
        module.zero_grad()
        with torch.set_grad_enabled(backward):
            output = module(hidden_states, indices, weights)
            if backward:
                output.sum().backward()

    forms = {"list of modules": lambda: run(listed)}
    for name in ("eager", "grouped_mm", "batched_mm"):
        if name != "batched_mm" or num_tokens <= 64:  # it copies a whole expert for each token
            forms[f"stacked, {name}"] = lambda name=name: run(mlp.experts, name)
    return summarise(interleave(forms, repeats=max(5, 200 // num_tokens), warmup=2), "list of modules")


def lora_reach(model, target_parameters: list[str] | None) -> dict[str, int]:
    """Numbers of adapted modules by group."""
    config = LoraConfig(r=4, target_modules=USUAL_TARGETS, target_parameters=target_parameters, lora_dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config)
    names = {name for name, _ in adapted.named_parameters() if "lora_A" in name}
    return dict(Counter(next(g for g, pattern in GROUPS.items() if re.search(pattern, name)) for name in names))


def build_parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=__doc__.split("\n\n")[0])


def main(argv: list[str] | None = None) -> int:
    build_parser().parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), CONFIG)

        def ours():
            return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

        model = ours()
        results = {"machine": describe_machine(), "config": CONFIG}
        results["forward"] = {str(n): time_forms(model, n, backward=False) for n in (1, 8, 64, 2048)}
        results["forward and backward"] = {str(n): time_forms(model, n, backward=True) for n in (512, 2048)}
        published_type = ours()
        type(published_type.config).model_type = "deepseek_v3"
        results["lora"] = {
            "transformers' DeepseekV3, usual names": lora_reach(DeepseekV3ForCausalLM.from_pretrained(folder), None),
            "this model under type deepseek_v3, usual names": lora_reach(published_type, None),
        }
        type(published_type.config).model_type = "deepseek_hub"
        results["lora"]["this model, usual names"] = lora_reach(ours(), None)
        results["lora"]["this model, usual names and the stacked parameters"] = lora_reach(ours(), STACKED_TARGETS)
    print(json.dumps(results, indent=2))
    write_results("experts", results)
    return 0


if __name__ == "__main__":
    run_command(main)
