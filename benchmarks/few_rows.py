"""Decoding with few rows on a CPU: products split among the threads against `F.linear`, alone, in a model, and compiled.

    python -m benchmarks.few_rows                 # 12 GiB of memory, ten minutes
    python -m benchmarks.few_rows --only products

Products: float32, matrices of DeepSeek-V2-Lite and of this repository's checkpoint, one to 64 rows. Each call takes another
matrix of so many that no cache holds them, as the weights of a model do. Model: the widths of V2-Lite with four layers,
random weights, 1 to 8 texts; the time of a step is that of a generation of several tokens without that of the first. Compiled:
the same for the checkpoint of this repository after 512 tokens, plain and with a static cache and a `compile_config`.
Writes runs/benchmarks/few_rows.json.
"""

import argparse
import json
import statistics
import sys
from functools import partial
from itertools import cycle

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.common import ROOT, interleave, measure_bandwidth, summarise, write_results
from benchmarks.profile_decode import compiled, load, token_seconds
from common.command import run_command
from common.machine import describe_machine

SHAPES = {
    "V2-Lite": [(1408, 2048), (2048, 1408), (2048, 2048), (10944, 2048)],
    "this checkpoint": [(768, 256), (8192, 256)],
}
ROWS = (1, 2, 4, 8, 16, 32, 64)
TEXTS = (1, 2, 4, 8)
V2_LITE = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
}


def code_of(model) -> object:
    """The module linear_deepseek of a model's code."""
    return sys.modules[type(model.model.norm).__module__.replace("layers_deepseek", "linear_deepseek")]


def time_products(layers, repeats: int) -> list[dict]:
    """`F.linear` and `linear` in turns, for each shape and number of rows."""
    results = []
    for source, shapes in SHAPES.items():
        for out, width in shapes:
            matrices = [torch.randn(out, width) for _ in range(max(2, int(300e6) // (4 * out * width)))]
            for count in ROWS:
                rows = torch.randn(count, width)
                taken = cycle(matrices)
                functions = {
                    "F.linear": lambda rows=rows, taken=taken: F.linear(rows, next(taken)),
                    "linear": lambda rows=rows, taken=taken: layers.linear(rows, next(taken)),
                }
                summary = summarise(interleave(functions, repeats), "F.linear")
                results.append({"of": source, "matrix": [out, width], "rows": count, **summary})
                medians = {name: part["median_ms"] for name, part in summary.items()}
                print(source, (out, width), count, medians, flush=True)
    return results


def time_model(model, repeats: int) -> list[dict]:
    """A decoding step of 1 to 8 texts, with the split and without it in turns."""
    layers = code_of(model)

    def generate(worth: int, *arguments, **settings):
        layers._PART_WEIGHTS = worth
        return model.generate(*arguments, **settings)

    ways = {"F.linear": partial(generate, 2**62), "linear": partial(generate, layers._PART_WEIGHTS)}
    return time_steps(ways, repeats, prompt=64, new=9, vocabulary=model.config.vocab_size)


def time_steps(ways: dict, repeats: int, **sizes) -> list[dict]:
    """A decoding step of 1 to 8 texts in each way in turns; the first is what the others are compared with. Sizes are those of
    `token_seconds`."""
    results = []
    for texts in TEXTS:
        steps = token_seconds(ways, repeats, texts, **sizes)
        results.append({"texts": texts, **summarise(steps, next(iter(ways)))})
        print(texts, {name: round(statistics.median(values) * 1e3, 1) for name, values in steps.items()}, flush=True)
    return results


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.few_rows", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("products", "model", "compiled"), help="one part")
    parser.add_argument(
        "--repeats", type=int, default=5, help="turns of the model; products take ten times as many (5)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    results = {"machine": describe_machine(), "gigabytes_a_second": round(measure_bandwidth() / 1e9, 1)}
    with torch.inference_mode():
        if arguments.only in (None, "products"):
            results["products"] = time_products(code_of(load(ROOT)), 10 * arguments.repeats)
        if arguments.only in (None, "compiled"):
            model = load(ROOT)
            ways = {"plain": model.generate, "compiled": partial(model.generate, **compiled())}
            results["compiled"] = time_steps(ways, arguments.repeats)
        if arguments.only in (None, "model"):
            config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True, **V2_LITE)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32).eval()
            results["model"] = time_model(model, arguments.repeats)
    print(json.dumps(results, indent=2))
    write_results("few_rows", results)
    return 0


if __name__ == "__main__":
    run_command(main)
