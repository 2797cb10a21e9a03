"""Sparse attention against dense attention of the same shape: time, memory, and the arithmetic floor.

    python -m benchmarks.sparse                          # everything, five to ten minutes on two cores
    python -m benchmarks.sparse --only decode dsa        # some parts
    python -m benchmarks.sparse --longest 16384          # shorter
    python -m benchmarks.sparse --device cuda            # on a GPU, bfloat16

NSA: one layer's attention from queries, keys and values to the gated output, compression of blocks counted, projections
not, against `scaled_dot_product_attention` with as many heads. 16 query heads of 64, 1 and 2 key/value heads; decoding
with 64 query and 4 key/value heads of 128. The sizes are the paper's: 32, 16, 64, 16 blocks, window 512.
DSA: a one-layer V3.2 model against transformers' DeepseekV32 class on the same checkpoint, 512 of 8192 tokens selected.

Queries are scaled so that scores have a standard deviation of 3: attention is peaked and blocks differ in importance.
Contestants take turns in one process. Memory is the growth of a fresh process's peak resident size, or of the GPU's
peak allocation, over one call.
The floor is the dense time multiplied by the share of its products of queries with keys that NSA makes.
Writes runs/benchmarks/sparse.json, sparse.png and the state of each gate, which are goals for CPUs; with a GPU
sparse_cuda.json and sparse_cuda.png.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DeepseekV32ForCausalLM, DynamicCache
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from benchmarks.common import RESULTS, interleave, save_checkpoint, summarise, write_results
from common.command import run_command
from common.machine import describe_machine

HEADS, WIDTH = 16, 64
LENGTHS = [4096, 8192, 16384, 32768, 65536]
PARTS = ("prefill", "training", "decode", "memory", "dsa")
DSA_LENGTH = 8192
DECODE_TURN = (
    8  # steps of a turn of decoding, as in generation; single steps find caches flushed by the other contestant
)
NSA_CONFIG = {
    "architectures": ["DeepseekForCausalLM"],
    "model_type": "deepseek_nsa",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": WIDTH,
}
DSA_CONFIG = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "index_topk": 512,
    "index_n_heads": 8,
    "index_head_dim": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 16384,
    "torch_dtype": "float32",
    "rope_theta": 10000.0,
}
# (result, at least or at most, bound); results are looked up in the JSON by "part/key".
GATES = [
    ("prefill/16384 tokens, 1 kv heads", "at least", 1.0),
    ("prefill/16384 tokens, 2 kv heads", "at least", 1.0),
    ("prefill/32768 tokens, 1 kv heads", "at least", 1.8),
    ("prefill/32768 tokens, 2 kv heads", "at least", 1.8),
    ("prefill/65536 tokens, 1 kv heads", "at least", 2.8),
    ("prefill/65536 tokens, 2 kv heads", "at least", 2.8),
    ("training/32768 tokens, 1 kv heads", "at least", 1.8),
    ("decode/65536 tokens, 4 kv heads of 128", "at least", 8.0),
    ("memory/growth from 32768 to 65536", "at most", 2.2),
    ("dsa/prefill speed", "at least", 2.0),
    ("dsa/decode speed", "at least", 15.0),
    ("dsa/prefill memory", "at most", 0.25),
]


class Setup(NamedTuple):
    """What all parts are run with."""

    code: Path  # folder of the checkpoints
    device: str  # "cpu" or "cuda"
    longest: int  # tokens
    repeats: int  # turns of each contestant

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.bfloat16


class Shape:
    """Random queries, keys and values of one layer, and NSA and dense attention over them."""

    def __init__(self, setup: Setup, length: int, queries: int, heads: int, kv_heads: int, width: int):
        load = partial(get_class_from_dynamic_module, pretrained_model_name_or_path=str(setup.code))
        module = "nsa_deepseek."
        names = ("NSASizes", "NSAStates", "BlockCompressor", "attend_sequence", "attend_gathered")
        sizes, self.make_states, compressor, self.attend_sequence, self.attend_gathered = (
            load(module + name) for name in names
        )
        torch.manual_seed(0)
        self.sizes, self.scaling, self.kv_heads, self.length = sizes(), width**-0.5, kv_heads, length
        kind = {"device": setup.device, "dtype": setup.dtype}
        self.query = 3 * torch.randn(1, heads, queries, width, **kind)
        self.key, self.value = torch.randn(2, 1, kv_heads, length, width, **kind).unbind(0)
        self.gates = torch.rand(1, heads, queries, 3, **kind)
        self.phi = compressor(width, self.sizes).to(**kind)
        with torch.no_grad():
            self.compressed = self.compress()

    def compress(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.phi(self.key), self.phi(self.value)

    def sequence(self) -> torch.Tensor:
        pair = self.key, self.value
        states = self.make_states(self.compress(), pair, pair)
        return self.attend_sequence(self.query, self.query, states, self.gates, self.scaling, self.sizes)

    def gathered(self) -> torch.Tensor:
        pair = self.key, self.value
        window = tuple(states[:, :, -1024:] for states in pair)
        states = self.make_states(self.compressed, pair, window)
        return self.attend_gathered(self.query, self.query, states, None, self.gates, self.scaling, self.sizes)

    def dense(self) -> torch.Tensor:
        """Many queries: causal, the keys of a group seen by its heads without a copy."""
        heads = self.query.shape[1]
        key, value = (
            states[:, :, None].expand(-1, -1, heads // self.kv_heads, -1, -1).flatten(1, 2)
            for states in (self.key, self.value)
        )
        return F.scaled_dot_product_attention(self.query, key, value, is_causal=True, scale=self.scaling)

    def dense_step(self) -> torch.Tensor:
        """One query: the heads of a group are rows of one product, so that its keys are read once."""
        query = self.query.unflatten(1, (self.kv_heads, -1)).flatten(2, 3)  # [1, K, G, D]
        return F.scaled_dot_product_attention(query, self.key, self.value, scale=self.scaling)

    def floor(self) -> float:
        """Products of a query with a key: NSA's share of the dense ones."""
        sizes, length = self.sizes, self.length
        seen = min(length, sizes.num_select * sizes.select_block) + min(length, sizes.window)
        return (length / 2 / sizes.stride + seen) / (length / 2)


def train(function, shape: Shape):
    leaves = [shape.query, shape.key, shape.value]
    for leaf in leaves:
        leaf.requires_grad_().grad = None
    function().sum().backward()


@torch.no_grad()
def run_prefill(setup: Setup) -> dict:
    results = {}
    for kv_heads in (1, 2):
        for length in (length for length in LENGTHS if length <= setup.longest):
            shape = Shape(setup, length, length, HEADS, kv_heads, WIDTH)
            seconds = interleave(
                {"dense": shape.dense, "nsa": shape.sequence},
                setup.repeats if length <= 16384 else 1,
                int(length <= 16384),
            )
            results[f"{length} tokens, {kv_heads} kv heads"] = summarise(seconds, "dense") | {"floor": shape.floor()}
            report("prefill", results)
    return results


def run_training(setup: Setup) -> dict:
    results = {}
    for length in (length for length in LENGTHS if length <= min(setup.longest, 32768)):
        shape = Shape(setup, length, length, HEADS, 1, WIDTH)
        functions = {"dense": partial(train, shape.dense, shape), "nsa": partial(train, shape.sequence, shape)}
        seconds = interleave(functions, setup.repeats if length <= 8192 else 1, int(length <= 8192))
        results[f"{length} tokens, 1 kv heads"] = summarise(seconds, "dense") | {"floor": shape.floor()}
        report("training", results)
    return results


@torch.no_grad()
def run_decode(setup: Setup) -> dict:
    results = {}
    for length in (length for length in LENGTHS if length <= setup.longest):
        shape = Shape(setup, length, 1, 64, 4, 128)
        for count, turn in ((DECODE_TURN, ""), (1, ", single steps")):
            functions = {
                "dense": partial(several, shape.dense_step, count),
                "nsa": partial(several, shape.gathered, count),
            }
            seconds = interleave(functions, 6 * setup.repeats, 2)
            each = {name: [value / count for value in values] for name, values in seconds.items()}
            results[f"{length} tokens, 4 kv heads of 128{turn}"] = summarise(each, "dense")
        report("decode", results)
    return results


def several(function, count: int):
    for _ in range(count):
        function()


def run_memory(setup: Setup) -> dict:
    """Peak memory of one prefill, in MiB beyond what was in use before."""
    results = {}
    for length in (length for length in (32768, 65536) if length <= setup.longest):
        results[f"{length} tokens"] = in_fresh_process("nsa", setup, length)
    if len(results) == 2:
        small, large = results.values()
        results["growth from 32768 to 65536"] = round(large / small, 2)
    if results:  # --longest can leave none
        report("memory", results)
    return results


@torch.no_grad()
def run_dsa(setup: Setup) -> dict:
    if setup.longest < DSA_LENGTH:
        return {}
    length = DSA_LENGTH
    tokens = torch.randint(0, DSA_CONFIG["vocab_size"], (1, length), device=setup.device)
    models = {"native": load_native(setup), "ours": load_ours(setup)}
    prefill = {name: partial(model, tokens, use_cache=False, logits_to_keep=1) for name, model in models.items()}
    outputs = {name: run().logits for name, run in prefill.items()}
    results = {"prefill": summarise(interleave(prefill, setup.repeats, 0), "native")}
    decode = {
        name: partial(several, partial(step, model, fill_cache(model, length)), DECODE_TURN)
        for name, model in models.items()
    }
    seconds = interleave(decode, 3 * setup.repeats, 1)
    each = {name: [value / DECODE_TURN for value in values] for name, values in seconds.items()}
    results["decode"] = summarise(each, "native")
    results["largest difference of logits"] = (outputs["ours"] - outputs["native"]).abs().max().item()
    for part in ("prefill", "decode"):
        results[f"{part} speed"] = results[part]["ours"]["times_faster_than_native"]
    memory = {name: in_fresh_process(name, setup, length) for name in models}
    results["prefill MiB"] = memory
    results["prefill memory"] = round(memory["ours"] / memory["native"], 3)
    print(f"dsa: {json.dumps(results)}", flush=True)
    return results


def load_ours(setup: Setup):
    model = AutoModelForCausalLM.from_pretrained(setup.code / "dsa", trust_remote_code=True, dtype=setup.dtype)
    return model.to(setup.device).eval()


def load_native(setup: Setup):
    model = DeepseekV32ForCausalLM.from_pretrained(setup.code / "dsa", attn_implementation="sdpa", dtype=setup.dtype)
    return model.to(setup.device).eval()


def step(model, cache: DynamicCache):
    """Decodes one token; the cache gets longer by one with each call."""
    return model(torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=cache)


def fill_cache(model, length: int) -> DynamicCache:
    """Random states of `length` tokens: a step's time does not depend on them."""
    cache = DynamicCache(config=model.config)
    step(model, cache)
    kind = {"device": model.device, "dtype": model.dtype}
    cache.update(
        torch.randn(1, 1, length - 1, DSA_CONFIG["kv_lora_rank"], **kind),
        torch.randn(1, 1, length - 1, DSA_CONFIG["qk_rope_head_dim"], **kind),
        0,
    )
    cache.update_indexer(torch.randn(1, length - 1, DSA_CONFIG["index_head_dim"], **kind), 0)
    return cache


def in_fresh_process(name: str, setup: Setup, length: int) -> float:
    """MiB by which the peak memory of a process grows during one prefill of `name`."""
    command = [sys.executable, "-m", "benchmarks.sparse", "--measure-memory", name, str(setup.code), str(length)]
    command += ["--threads", str(torch.get_num_threads()), "--device", setup.device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


@torch.no_grad()
def measure_memory(name: str, setup: Setup, length: int) -> float:
    def peak() -> float:
        if setup.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        # not getrusage's ru_maxrss: a child begins with its parent's
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024

    if name == "nsa":
        run = Shape(setup, length, length, HEADS, 1, WIDTH).sequence
    else:
        model = load_ours(setup) if name == "ours" else load_native(setup)
        tokens = torch.zeros(1, length, dtype=torch.long, device=setup.device)
        model(tokens[:, :64], use_cache=False)  # what is loaded only once
        run = partial(model, tokens, use_cache=False, logits_to_keep=1)
    before = peak()
    run()
    return round(peak() - before, 1)


def report(part: str, results: dict):
    key, value = list(results.items())[-1]
    print(f"{part}: {key}: {json.dumps(value)}", flush=True)


def check_gates(results: dict) -> list[dict]:
    """Each gate that was measured, and whether it holds."""
    checked = []
    for name, direction, bound in GATES:
        part, key = name.split("/")
        value = results.get(part, {}).get(key)
        if isinstance(value, dict):
            value = value["nsa"]["times_faster_than_dense"]
        if value is not None:
            holds = value >= bound if direction == "at least" else value <= bound
            checked.append({"gate": name, "value": value, direction: bound, "holds": holds})
            print(f"{'holds' if holds else 'FAILS'}  {name}: {value} ({direction} {bound})")
    return checked


def draw(name: str, results: dict):
    """Time against length, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = [part for part in ("prefill", "training", "decode") if results.get(part)]
    if not parts:
        return
    figure, axes = pyplot.subplots(1, len(parts), figsize=(5 * len(parts), 4), squeeze=False)
    for axis, part in zip(axes[0], parts, strict=True):
        rows = {
            int(key.split()[0]): row
            for key, row in results[part].items()
            if "2 kv heads" not in key and "single" not in key
        }
        for contestant, label in (("dense", "dense SDPA"), ("nsa", "NSA")):
            axis.plot(rows.keys(), [row[contestant]["median_ms"] for row in rows.values()], marker="o", label=label)
        if part != "decode":
            floor = [row["dense"]["median_ms"] * row["floor"] for row in rows.values()]
            axis.plot(rows.keys(), floor, linestyle="--", color="gray", label="arithmetic floor of NSA")
        axis.set(xscale="log", yscale="log", title=part, xlabel="tokens", ylabel="milliseconds")
        axis.set_xticks(list(rows), [f"{length // 1024}k" for length in rows])
        axis.minorticks_off()
        axis.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run (default: all)")
    parser.add_argument(
        "--longest", type=int, default=LENGTHS[-1], help="longest sequence in tokens (default 65536; DSA needs 8192)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="turns of each contestant (default 3)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="float32 on cpu, bfloat16 on cuda")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--measure-memory", nargs=3, metavar=("NAME", "CODE", "TOKENS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device is cuda, but there is no CUDA device; use cpu")
        torch.cuda.init()
    if arguments.measure_memory:
        name, code, length = arguments.measure_memory
        setup = Setup(Path(code), arguments.device, arguments.longest, arguments.repeats)
        print(measure_memory(name, setup, int(length)))
        return 0

    name = "sparse" if arguments.device == "cpu" else f"sparse_{arguments.device}"
    results = {"machine": describe_machine()}
    previous = json.loads(path.read_text()) if (path := RESULTS / f"{name}.json").exists() else {}
    if previous.get("machine") == results["machine"]:
        results = previous  # of the same day and versions: the parts that do not run now stay
    runs = {
        "prefill": run_prefill,
        "training": run_training,
        "decode": run_decode,
        "memory": run_memory,
        "dsa": run_dsa,
    }
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(Path(folder), arguments.device, arguments.longest, arguments.repeats)
        save_checkpoint(setup.code, NSA_CONFIG)
        save_checkpoint(setup.code / "dsa", DSA_CONFIG)
        for part in arguments.only:
            results[part] = runs[part](setup)
    if arguments.device == "cpu":
        results["gates"] = check_gates(results)
    write_results(name, results)
    draw(name, results)
    return 0 if all(gate["holds"] for gate in results.get("gates", ())) else 1


if __name__ == "__main__":
    run_command(main)
