"""Decoding, prefill and a training step against transformers' own DeepseekV3 class, same weights, float32, CPU.

    python -m benchmarks.decode                # everything, about ten minutes
    python -m benchmarks.decode --only decode

The model is V3-shaped: 4 layers, hidden 512, 16 heads, kv_lora_rank 256, rope 32, 16 experts of which a token visits
4. Both implementations take turns in one process; memory is the peak resident size of a process that does one prefill.
The caches are filled with random latents, so that no minutes go into prefilling them; time does not depend on values.
"compiled" is our step as `generate` runs it over a static cache with torch.compile: the mask made outside, no more slots
than the turn needs.

Two floors: the bytes of the weights and latents that a token needs over the measured bandwidth, and the operations of
attention over latents (2 (2C + Dr) for each head and token) over the speed of a large float32 product.
Writes runs/benchmarks/decode.json and decode.png.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM, DynamicCache, StaticCache
from transformers.generation import CompileConfig
from transformers.utils import logging

from benchmarks.common import (
    RESULTS,
    interleave,
    measure_bandwidth,
    save_checkpoint,
    summarise,
    write_results,
)
from common.command import run_command
from common.machine import describe_machine

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 256,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 65536,
    "aux_loss_alpha": 0.0,
    "torch_dtype": "float32",
    "rope_theta": 10000.0,
}
CONTEXTS = [512, 2048, 8192, 32768]
TOKENS_PER_TURN = 8  # as in generation, a model's weights then lie in the processor's caches from the token before
LOADERS = {
    "ours": lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True),
    "native": lambda folder: DeepseekV3ForCausalLM.from_pretrained(folder),
}


def filled_cache(model, length: int) -> DynamicCache:
    """A cache of `length` random tokens, made as `generate` makes it; our model lets it grow in place."""
    cache = DynamicCache(config=model.config)
    model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
    generator = torch.Generator().manual_seed(0)
    for layer in range(CONFIG["num_hidden_layers"]):
        latent = torch.randn(1, 1, length - 1, CONFIG["kv_lora_rank"], generator=generator)
        rope = torch.randn(1, 1, length - 1, CONFIG["qk_rope_head_dim"], generator=generator)
        cache.update(latent, rope, layer)
    return cache


def compiled_turn(model, context: int) -> Callable[[], None]:
    """Decodes TOKENS_PER_TURN tokens behind `context` random ones in a static cache, as `generate` compiles it."""
    cache = StaticCache(config=model.config, max_cache_len=context + TOKENS_PER_TURN)
    model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
    generator = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        layer.keys.normal_(generator=generator)
        layer.values.normal_(generator=generator)
    step = model.get_compiled_call(CompileConfig())
    token, mask = torch.ones(1, 1, dtype=torch.long), torch.ones(1, context + TOKENS_PER_TURN, dtype=torch.long)

    def turn():
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)
        for i in range(TOKENS_PER_TURN):
            positions = torch.tensor([[context + i]])
            mask_of_step = model.create_masks_for_generate(
                config=model.config,
                inputs_embeds=torch.empty(1, 1, 0),
                attention_mask=mask,
                past_key_values=cache,
                position_ids=positions,
            )
            step(input_ids=token, attention_mask=mask_of_step, position_ids=positions, past_key_values=cache)

    return turn


@torch.no_grad()
def decode(models: dict, bandwidth: float, operations: float) -> list[dict]:
    """Milliseconds a decoded token at each context length."""
    rows = []
    active = active_parameters(models["ours"])
    token = torch.ones(1, 1, dtype=torch.long)
    for context in CONTEXTS:
        caches = {name: filled_cache(model, context) for name, model in models.items()}

        def turn(name, caches=caches):
            for _ in range(TOKENS_PER_TURN):
                models[name](token, past_key_values=caches[name])

        turns = {name: partial(turn, name) for name in models} | {"compiled": compiled_turn(models["ours"], context)}
        seconds = interleave(turns, repeats=max(4, 2**15 // context))
        per_token = {name: [t / TOKENS_PER_TURN for t in times] for name, times in seconds.items()}
        row = {"context": context, **summarise(per_token, "native")}
        latent = CONFIG["kv_lora_rank"], CONFIG["qk_rope_head_dim"]
        entries = context * CONFIG["num_hidden_layers"]
        row["floor_ms"] = round(4 * (active + entries * sum(latent)) / bandwidth * 1e3, 3)
        attention = 2 * (2 * latent[0] + latent[1]) * CONFIG["num_attention_heads"] * entries
        row["attention_floor_ms"] = round(attention / operations * 1e3, 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
        del caches, turn, turns
        gc.collect()
        torch._dynamo.reset()
    return rows


def measure_operations(size: int = 2048) -> float:
    """Float32 operations a second in the product of two square matrices, the best of ten."""
    left, right = torch.ones(size, size), torch.ones(size, size)
    return 2 * size**3 / min(interleave({"product": lambda: left @ right}, repeats=10)["product"])


def active_parameters(model) -> int:
    """Parameters that a decoded token must read: all but the embedding rows and experts of other tokens."""
    total = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return total - experts + experts * CONFIG["num_experts_per_tok"] // CONFIG["n_routed_experts"]


@torch.no_grad()
def prefill(models: dict, length: int) -> dict:
    """Time of one prompt of `length` tokens, last logits only."""
    ids = torch.randint(0, CONFIG["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0))
    calls = {name: lambda m=model: m(ids, use_cache=True, logits_to_keep=1) for name, model in models.items()}
    return {"tokens": length, **summarise(interleave(calls, repeats=3), "native")}


def training_step(models: dict, batch: int, length: int) -> dict:
    """Time of forward and backward."""
    ids = torch.randint(0, CONFIG["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(0))

    def step(model):
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()

    for model in models.values():
        model.train()
    result = summarise(interleave({n: lambda m=m: step(m) for n, m in models.items()}, repeats=5), "native")
    for model in models.values():
        model.eval()
        model.zero_grad()
    return {"batch": batch, "tokens": length, **result}


def peak_memory(folder: str, length: int) -> dict:
    """MiB that one prefill adds to a process at its peak, for each implementation in a process of its own (Linux)."""
    command = [sys.executable, "-m", "benchmarks.decode", "--child-prefill", folder, "--tokens", str(length)]
    return {
        name: json.loads(subprocess.run([*command, "--child-model", name], capture_output=True, check=True).stdout)
        for name in LOADERS
    }


def child_prefill(folder: str, name: str, length: int):
    model = LOADERS[name](folder).eval()
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.long))  # what is allocated once and for all
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident_kib("VmRSS")
        model(torch.zeros(1, length, dtype=torch.long), use_cache=True, logits_to_keep=1)
    print(json.dumps({"peak_mib": (resident_kib("VmHWM") - before) // 1024}))


def resident_kib(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def plot(rows: list[dict], path: Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    contexts = [row["context"] for row in rows]
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, label, colour in (
        ("native", "transformers DeepseekV3", "#b2524c"),
        ("ours", "this repository", "#2f6f9f"),
        ("compiled", "this repository, torch.compile", "#6fa84f"),
    ):
        axes.plot(contexts, [row[name]["median_ms"] for row in rows], "o-", label=label, color=colour)
    axes.plot(contexts, [row["floor_ms"] for row in rows], "k--", lw=1, label="floor: bytes read / memory bandwidth")
    for row in rows:
        faster = row["ours"]["times_faster_than_native"]
        axes.annotate(f"{faster:.1f}x", (row["context"], row["ours"]["median_ms"]), (0, 8), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="milliseconds per decoded token")
    axes.set_xticks(contexts, [str(c) for c in contexts])
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=["decode", "prefill", "train"], help="run one part and write nothing")
    parser.add_argument("--tokens", type=int, default=4096, help="prompt length of the prefill part (default: 4096)")
    parser.add_argument("--child-prefill", help=argparse.SUPPRESS)
    parser.add_argument("--child-model", choices=list(LOADERS), help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if arguments.child_prefill:
        child_prefill(arguments.child_prefill, arguments.child_model, arguments.tokens)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), CONFIG)
        models = {name: load(folder).eval() for name, load in LOADERS.items()}
        bandwidth, operations = measure_bandwidth(), measure_operations()
        results = {
            "machine": describe_machine(),
            "bandwidth_gb_per_s": round(bandwidth / 1e9, 1),
            "gflop_per_s": round(operations / 1e9),
            "config": CONFIG,
        }
        parts = {
            "decode": lambda: decode(models, bandwidth, operations),
            "prefill": lambda: (
                prefill(models, arguments.tokens) | {"peak_memory": peak_memory(folder, arguments.tokens)}
            ),
            "train": lambda: training_step(models, batch=4, length=512),
        }
        for name, part in parts.items():
            if arguments.only in (None, name):
                results[name] = part()
                print(json.dumps({name: results[name]}, indent=2), flush=True)
    if arguments.only is None:
        write_results("decode", results)
        plot(results["decode"], RESULTS / "decode.png")
    return 0


if __name__ == "__main__":
    run_command(main)
