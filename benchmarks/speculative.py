"""Speculative decoding with a checkpoint's own multi-token-prediction module: acceptance at each place, and speed-up.

    python -m benchmarks.speculative                    # the checkpoint in this folder
    python -m benchmarks.speculative --model PATH --new-tokens 128 --repeats 5

Prompts are the beginnings of English and Chinese sentences below, one row at a time and four at once (padded on the left),
over a dynamic and a static cache, in float32 on a CPU. Without drafts and with 1, 2 and 3 take turns in one process; greedy
and sampled (temperature 0.7, top-p 0.95). Tokens per second count the time of `generate`. Writes
runs/benchmarks/speculative.json.

Acceptance at place i is the share of rounds in which draft i and all before it were accepted; tokens a round is one more
than their sum (of several rows: of those that go on).
"""

import argparse
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks.common import ROOT, interleave, summarise, write_results
from common.command import run_command
from common.machine import describe_machine

PROMPTS = (
    "It was a dark night, and the old house stood alone on the hill. She looked out of the window and",
    "The first thing that a traveller sees when he comes into the town is",
    "Returns the number of elements in the list. If the list is empty,",
    "却说那人走进门来，看见众人都在堂上坐着，便",
    "次日天明，大家吃了早饭，一同出门，",
)
SETTINGS = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "temperature": 0.7, "top_p": 0.95}}
DRAFTS = (0, 1, 2, 3)
BATCHES = (1, 4)
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}}


def measure(model, prompts: list[dict], settings: dict, new_tokens: int, repeats: int) -> dict:
    """-> for each number of drafts: milliseconds for all prompts, speed-up, acceptance"""
    rounds, drafted, accepted = (dict.fromkeys(DRAFTS, 0) for _ in range(3))

    def generate(drafts: int):
        torch.manual_seed(0)
        for prompt in prompts:
            outputs = model.generate(
                **prompt,
                max_new_tokens=new_tokens,
                mtp_tokens=drafts,
                eos_token_id=None,  # all rows equally long
                pad_token_id=0,
                return_dict_in_generate=True,
                **settings,
            )
            if drafts:
                rounds[drafts] += outputs.rounds
                drafted[drafts] = drafted[drafts] + outputs.drafted
                accepted[drafts] = accepted[drafts] + outputs.accepted

    names = {str(drafts): (lambda drafts=drafts: generate(drafts)) for drafts in DRAFTS}
    results = summarise(interleave(names, repeats), baseline="0")
    rows = sum(len(prompt["input_ids"]) for prompt in prompts)
    for drafts in DRAFTS:
        row = results[str(drafts)]
        row["tokens_per_second"] = round(rows * new_tokens / row["median_ms"] * 1e3, 1)
        if drafts:
            row["acceptance"] = [round(rate, 3) for rate in (accepted[drafts] / drafted[drafts]).tolist()]
            row["tokens_a_round"] = round(1 + float((accepted[drafts] / drafted[drafts]).sum()), 3)
            row["rounds"] = rounds[drafts] // (repeats + 1)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT), help="folder of the checkpoint")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens generated for each prompt")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns, after one untimed")
    parser.add_argument("--name", default="speculative", help="name of the result file")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(arguments.model, trust_remote_code=True, dtype=torch.float32).eval()
    results = {
        "machine": describe_machine(),
        "command": f"python -m benchmarks.speculative --new-tokens {arguments.new_tokens} --repeats {arguments.repeats}",
        "seed": 0,
    }
    for batch in BATCHES:
        groups = [PROMPTS[i : i + batch] for i in range(0, len(PROMPTS) - batch + 1, batch)]
        prompts = [dict(tokenizer(list(group), padding=True, return_tensors="pt")) for group in groups]
        for cache, cache_settings in CACHES.items():
            for name, settings in SETTINGS.items():
                key = f"{name}, {batch} {'row' if batch == 1 else 'rows'}, {cache} cache"
                results[key] = measure(
                    model, prompts, settings | cache_settings, arguments.new_tokens, arguments.repeats
                )
                print(key, json.dumps(results[key]), flush=True)
    write_results(arguments.name, results)


if __name__ == "__main__":
    run_command(main)
