"""Does balancing balance? Three short trainings of the same small model, told apart only by what balances its router.

    python -m benchmarks.balance            # about three minutes on two cores

The text is the source code of Python's standard library, read as bytes, so nothing needs downloading. Reported is the
load of the busiest expert over the mean, by layer, over the last tenth of the steps, and the loss. Writes
runs/benchmarks/balance.json and balance.png.
"""

import argparse
import json
import sysconfig
import tempfile
from pathlib import Path

import torch
from tqdm import trange
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common import RESULTS, save_checkpoint, write_results
from common.command import run_command
from common.machine import describe_machine

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
    "bos_token_id": None,
    "eos_token_id": None,
}
RUNS = {
    "nothing": {"aux_loss_alpha": 0.0, "update_rate": 0.0},
    "sequence loss (alpha 0.01)": {"aux_loss_alpha": 0.01, "update_rate": 0.0},
    "router bias (rate 0.01)": {"aux_loss_alpha": 0.0, "update_rate": 0.01},
}


def read_text(megabytes: float) -> torch.Tensor:
    """Python's standard library as one row of byte tokens."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)[: int(megabytes * 2**20)]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def train(folder: str, text: torch.Tensor, aux_loss_alpha: float, update_rate: float, steps: int) -> dict:
    """One training; returns the loss and, for each layer, the busiest expert's load over the mean, step by step."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True, aux_loss_alpha=aux_loss_alpha)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses, imbalance = [], []
    for _ in (bar := trange(steps, leave=False)):
        starts = torch.randint(0, len(text) - 128, (16,))
        ids = torch.stack([text[start : start + 128] for start in starts])  # [16, 128]
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loads = model.update_router_bias(update_rate)
        losses.append(output.lm_loss.item())
        imbalance.append([(load.max() / load.mean()).item() for load in loads.values()])
        bar.set_description(f"loss {losses[-1]:.2f}, busiest / mean {max(imbalance[-1]):.2f}")
    return {"losses": losses, "imbalance": imbalance}


def summarise(run: dict) -> dict:
    """The last tenth of a run: mean loss, and by layer the mean of busiest over mean."""
    last = max(1, len(run["losses"]) // 10)
    by_layer = torch.tensor(run["imbalance"][-last:]).mean(dim=0)
    return {
        "loss": round(sum(run["losses"][-last:]) / last, 4),
        "busiest_over_mean_by_layer": [round(value, 2) for value in by_layer.tolist()],
    }


def plot(runs: dict, path: Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, run in runs.items():
        worst = torch.tensor(run["imbalance"]).amax(dim=1)
        axes.plot(worst.unfold(0, 20, 1).mean(dim=1), label=name)
    axes.set(xlabel="step", ylabel="busiest expert / mean, worst layer", ylim=(0.9, None))
    axes.axhline(1, color="k", lw=0.5)
    axes.grid(alpha=0.3)
    axes.legend(title="balanced by")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps of each training (default: 400)")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    text = read_text(megabytes=8)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), CONFIG)
        runs = {name: train(folder, text, **options, steps=arguments.steps) for name, options in RUNS.items()}
    summary = {name: summarise(run) for name, run in runs.items()}
    print(json.dumps(summary, indent=2))
    write_results("balance", {"machine": describe_machine(), "steps": arguments.steps, "runs": summary})
    plot(runs, RESULTS / "balance.png")
    return 0


if __name__ == "__main__":
    run_command(main)
