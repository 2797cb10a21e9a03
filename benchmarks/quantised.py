"""Weights in int8 and int4: bytes on disk and in memory, speed of decoding, bits per byte of held-out text.

    python -m benchmarks.quantised --data runs/data     # the checkpoint in this folder; the data of pretrain.data

torchao always; bitsandbytes too where it is installed. All variants decode in turn in one process, one row over 128 tokens,
in float32 arithmetic. What is quantised is what the libraries take by default: every Linear layer, routed experts included,
without the output head, the embedding and the routers. Writes runs/benchmarks/quantised.json.

torchao's int4 on a CPU keeps each weight in a byte: its numbers show what four bits cost in quality, not the size.
"""

import argparse
import gc
import importlib
import importlib.util
import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, TorchAoConfig
from transformers.utils import logging

from benchmarks.common import ROOT, interleave, summarise, write_results
from common.command import run_command
from common.machine import describe_machine
from pretrain.data import load_held_out
from pretrain.evaluate import bits_per_byte, held_out_nll

GROUP = 32  # weights that share a scale in int4; every width of the small models is a multiple
CONTEXT, TOKENS_PER_TURN = 128, 16


def variants(model) -> dict[str, object]:
    """Names and transformers configurations; `model` is the float one."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    configs = {
        "float32": None,
        "torchao int8": TorchAoConfig(Int8WeightOnlyConfig()),
        f"torchao int4, groups of {GROUP}": TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP))),
    }
    if importlib.util.find_spec("bitsandbytes"):
        # its CPU kernels for 4 bits take outputs in blocks of 32 and inputs in blocks of 64
        odd = {
            f".*{name.rsplit('.', 1)[-1]}"
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and (module.out_features % 32 or module.in_features % 64)
        }
        configs["bitsandbytes int8"] = BitsAndBytesConfig(load_in_8bit=True)
        configs["bitsandbytes nf4"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["lm_head", *sorted(odd)],
        )
    return configs


def tensors_of(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that hold a weight and its scales."""
    names = getattr(parameter, "tensor_data_names", None)  # torchao
    yield from (getattr(parameter, name) for name in names) if names else (parameter,)
    state = getattr(parameter, "quant_state", None)  # bitsandbytes, 4 bits
    if state is not None:
        yield from (x for x in state.as_dict(packed=True).values() if isinstance(x, torch.Tensor))
    scales = getattr(parameter, "SCB", None)  # bitsandbytes, 8 bits
    if isinstance(scales, torch.Tensor):
        yield scales


def megabytes_in_memory(model: nn.Module) -> float:
    parts = (x for parameter in (*model.parameters(), *model.buffers()) for x in tensors_of(parameter))
    return sum(x.numel() * x.element_size() for x in parts) / 1e6


def megabytes_on_disk(model: nn.Module) -> float:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 1e6


@torch.no_grad()
def decode_turn(model, cache: DynamicCache):
    """TOKENS_PER_TURN tokens behind CONTEXT ones."""
    for _ in range(TOKENS_PER_TURN):
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    cache.crop(-TOKENS_PER_TURN)


@torch.no_grad()
def measure_speed(models: dict[str, nn.Module], repeats: int) -> dict:
    turns = {}
    for name, model in models.items():
        cache = DynamicCache(config=model.config)
        model(torch.arange(3, 3 + CONTEXT)[None], past_key_values=cache)
        turns[name] = partial(decode_turn, model, cache)
    seconds = interleave(turns, repeats)
    per_token = {name: [t / TOKENS_PER_TURN for t in times] for name, times in seconds.items()}
    return summarise(per_token, "float32")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT), help="folder of the checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder that pretrain.data has written")
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens of each language, about")
    parser.add_argument("--repeats", type=int, default=20, help="timed turns of 16 tokens, after one untimed")
    parser.add_argument("--name", default="quantised", help="name of the result file")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    load = partial(AutoModelForCausalLM.from_pretrained, arguments.model, trust_remote_code=True, dtype=torch.float32)
    plain = load().eval()
    models, results = {}, {name: {} for name in variants(plain)}
    for name, config in variants(plain).items():
        models[name] = load(quantization_config=config).eval() if config else plain
        results[name]["disk_mb"] = round(megabytes_on_disk(models[name]), 2)  # before the first use, see docs
        results[name]["memory_mb"] = round(megabytes_in_memory(models[name]), 2)
    gc.collect()
    for name, speed in measure_speed(models, arguments.repeats).items():
        results[name] |= {"ms_a_token": speed["median_ms"], "speed_of_float32": speed["times_faster_than_float32"]}
    bos = plain.config.bos_token_id
    for language, held_out in load_held_out(arguments.data, 512, max_tokens=arguments.tokens).items():
        for name, model in models.items():
            nll = held_out_nll(model, held_out, bos, batch_rows=8, device=torch.device("cpu"))
            results[name][f"bits_per_byte_{language}"] = round(bits_per_byte(nll, held_out.num_bytes), 5)
    command = f"python -m benchmarks.quantised --data DATA --tokens {arguments.tokens} --repeats {arguments.repeats}"
    results = {"machine": describe_machine() | _library_versions(), "command": command, "variants": results}
    print(json.dumps(results, indent=1))
    write_results(arguments.name, results)


def _library_versions() -> dict[str, str]:
    found = [name for name in ("torchao", "bitsandbytes") if importlib.util.find_spec(name)]
    return {name: importlib.import_module(name).__version__ for name in found}


if __name__ == "__main__":
    run_command(main)
