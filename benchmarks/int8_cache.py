"""What an int8 cache costs in quality and saves in bytes: bits per byte of held-out text and bytes a token in the cache.

    python -m benchmarks.int8_cache --data runs/data    # the checkpoint in this folder; the data of pretrain.data

Windows of held-out text run through the cache 16 tokens at a time, so that nearly all attention reads what the cache has
kept; the same windows with the full cache and with the int8 cache. Writes runs/benchmarks/int8_cache.json.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

from benchmarks.common import ROOT, write_results
from common.command import run_command
from common.machine import describe_machine
from pretrain.data import load_held_out
from pretrain.evaluate import bits_per_byte

CHUNK = 16


@torch.no_grad()
def window_nll(model, windows: torch.Tensor, cache) -> tuple[float, int]:
    """Sum of -ln p over all tokens of windows [B, S] but their first ones, and the cache's bytes for a token of a row"""
    total = 0.0
    for start in range(0, windows.shape[1] - 1, CHUNK):
        part = windows[:, start : start + CHUNK]
        logits = model(part, past_key_values=cache).logits
        targets = windows[:, start + 1 : start + CHUNK + 1]
        total += nn.functional.cross_entropy(
            logits[:, : targets.shape[1]].flatten(0, 1), targets.flatten(), reduction="sum"
        ).item()
    kept = sum(x.numel() * x.element_size() for layer in cache.layers for x in layer.tensors().values())
    return total, kept // (len(windows) * cache.get_seq_length())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT), help="folder of the checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder that pretrain.data has written")
    parser.add_argument("--windows", type=int, default=32, help="windows of 512 tokens for each language")
    parser.add_argument("--name", default="int8_cache", help="name of the result file")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, trust_remote_code=True, dtype=torch.float32).eval()
    caches = {"full": lambda: DynamicCache(config=model.config), "int8": model.int8_cache}
    results = {"machine": describe_machine(), "windows": arguments.windows}
    for language, held_out in load_held_out(arguments.data, 512).items():
        windows = held_out.windows[: arguments.windows]
        # the share of the text's bytes that these windows hold
        num_bytes = held_out.num_bytes * windows[:, 1:].numel() / held_out.num_targets
        for name, make_cache in caches.items():
            total, size = 0.0, 0
            for rows in tqdm(windows.split(8), desc=f"{language} {name}"):
                nll, size = window_nll(model, rows, make_cache())
                total += nll
            results.setdefault(name, {"bytes_a_token": size})[language] = round(bits_per_byte(total, num_bytes), 6)
    print(json.dumps(results, indent=1))
    write_results(arguments.name, results)


if __name__ == "__main__":
    run_command(main)
