"""Checkpoints of this repository in llama.cpp: the same tokens and logits, and who is faster on this CPU.

    python -m benchmarks.llama_cpp --llama-cpp path/to/llama.cpp --files en corpus/en_*.jsonl.gz \\
        --files zh corpus/zh_*.jsonl.gz --held-out-fraction 0.01
    python -m benchmarks.llama_cpp --llama-cpp path/to/llama.cpp --only families

Needs llama-cpp-python and a clone of llama.cpp for its converter (docs/interoperability.md). Four parts:

    tokenizer   token ids of the given texts, of this repository's files and of random Unicode, tokenizer.json against GGUF
    root        the checkpoint of this folder in float32, bfloat16, 8-bit: greedy tokens, logits, bits per byte
    families    a small random checkpoint of each family, as `save_pretrained` writes it
    speed       decoding and prefill, both implementations taking turns in one process with as many threads

Writes runs/benchmarks/llama_cpp.json.
"""

import argparse
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from benchmarks.common import ROOT, interleave, save_checkpoint, write_results
from benchmarks.decode import CONFIG as DECODE_CONFIG
from common.command import one_line_errors, run_command
from common.machine import describe_machine
from tokenization.documents import check_fraction, check_paths, is_held_out, read_documents

PARTS = ("tokenizer", "root", "families", "speed")
TYPES = ("f32", "bf16", "q8_0")
F32 = 0  # GGML_TYPE_F32; llama.cpp keeps its cache in float16 unless told otherwise

GREEDY_TOKENS = 96
PROMPTS = {
    "en story": "It was a dark night, and",
    "en documentation": "The following example shows how to open a file and",
    "en dialogue": '"My dear Watson," said he, "',
    "code": "def main(argv):\n    ",
    "zh novel": "话说那日天色已晚，",
    "zh documentation": "以下示例展示了如何使用",
    "zh poem": "春风又绿江南岸，",
    "chat": "<｜User｜>What is a book? 什么是书？<｜Assistant｜></think>",
}
WINDOW, WINDOWS = 1024, 16  # bits per byte: the first tokens of so many documents of each language

_SMALL = {
    "vocab_size": 8192,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_MOE = {
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "aux_loss_alpha": 0.0,
}
_MLA = {"kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "v_head_dim": 20, "q_lora_rank": 40}


def _yarn(mscale: float) -> dict:
    return {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 128,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }


_V2 = _SMALL | _MOE | _MLA | {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"}
_V3 = _V2 | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "n_shared_experts": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope_scaling": _yarn(1.0),
    "num_nextn_predict_layers": 1,
}
_V32 = _V3 | {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}
FAMILIES = {
    "DeepSeek-LLM": _SMALL
    | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 2, "head_dim": 16},
    "DeepSeekMoE": _SMALL | _MOE | {"architectures": ["DeepseekForCausalLM"], "model_type": "deepseek"},
    # V2 without a query latent: llama.cpp takes it only with as many layers as a published one has, 26 or 27
    "V2-Lite": _V2 | {"q_lora_rank": None, "num_hidden_layers": 27, "rope_scaling": _yarn(0.707)},
    "V2-Lite of 3 layers": _V2 | {"q_lora_rank": None, "rope_scaling": _yarn(0.707)},
    "V2": _V2 | {"routed_scaling_factor": 16.0, "rope_scaling": _yarn(1.0)},
    "V2, best experts of the best groups": _V2
    | {
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 16.0,
        "rope_scaling": _yarn(1.0),
    },
    "V3": _V3,
    # llama.cpp wants a multiple of 64 as index_head_dim; with 4 heads selections differed, see the document
    "V3.2, all tokens selected": _V32 | {"index_topk": 2048, "index_n_heads": 32, "index_head_dim": 64},
    "V3.2, 64 tokens selected": _V32 | {"index_topk": 64, "index_n_heads": 32, "index_head_dim": 64},
    "NSA": _SMALL | {"architectures": ["DeepseekForCausalLM"], "model_type": "deepseek_nsa", "num_key_value_heads": 2},
}
FAMILY_TOKENS = 300

V3_SHAPED = DECODE_CONFIG | {"q_lora_rank": 384}  # the model of benchmarks.decode, with V3's query latent
CONTEXTS = {"this folder": (512, 3584), "V3-shaped, hidden 512": (512, 2048, 8192)}
TOKENS_PER_TURN = 16
PREFILL = 2048


def convert(folder: Path, llama_cpp: Path, output_type: str) -> Path:
    """The checkpoint as GGUF, beside it. RuntimeError with the converter's last line where it refuses."""
    output = folder / f"{output_type}.gguf"
    command = [sys.executable, "-m", "tools.to_gguf", folder, output, "--llama-cpp", llama_cpp]
    done = subprocess.run(
        [*command, "--outtype", output_type], cwd=ROOT, capture_output=True, text=True, check=False, errors="replace"
    )
    if done.returncode != 0 or not output.is_file():
        raise RuntimeError(f"convert_hf_to_gguf.py: {done.stderr.strip().splitlines()[-1]}")
    return output


def open_gguf(path: Path, context: int, **options):
    """A llama.cpp model, as many threads as torch has."""
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    options = {"n_batch": max(2048, context), "n_threads": threads, "n_threads_batch": threads} | options
    return Llama(model_path=str(path), n_ctx=context, verbose=False, **options)


def open_ours(folder: Path, **fields):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **fields).eval()


# Tokenizer


def corpus(files: dict[str, list[Path]], fraction: float) -> dict[str, list[str]]:
    """Documents by language, only held-out ones where a fraction is given; this repository's files are there always."""
    texts = {
        language: [
            text for path in paths for text in read_documents(path) if not fraction or is_held_out(text, fraction)
        ]
        for language, paths in files.items()
    }
    sources = sorted(path for pattern in ("*.py", "*/*.py", "docs/*.md", "*.jinja") for path in ROOT.glob(pattern))
    return texts | {"files of this repository": [path.read_text(encoding="utf-8") for path in sources]}


def random_texts(count: int = 4000, seed: int = 0) -> Iterator[str]:
    """Short mixtures of what pre-tokenizers treat apart: letters of many scripts, digits, spaces, marks, symbols."""
    draw = random.Random(seed)
    ranges = [(0x20, 0x7E)] * 3 + [(0x4E00, 0x9FFF), (0x3000, 0x30FF), (0xA0, 0x24F), (0x370, 0x5FF), (0x600, 0x1FFF)]
    ranges += [(0x2000, 0x2BFF), (0xAC00, 0xD7A3), (0xF900, 0xFFEF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF)]
    for _ in range(count):
        runs = []
        for _ in range(draw.randint(1, 6)):
            low, high = draw.choice(ranges)
            runs.append("".join(chr(draw.randint(low, high)) for _ in range(draw.randint(1, 6))))
            runs.append(draw.choice(["", "", " ", "  ", "\n", "\r\n", "\t", " \n\n", "7", "12345", "'s", "。"]))
        yield "".join(runs)


def tokenizer_part(llm, tokenizer, texts: dict[str, list[str]]) -> dict:
    """For each kind of text, documents whose ids differ, and the first difference."""
    result = {}
    for name, documents in (texts | {"random Unicode": list(random_texts())}).items():
        row = {"texts": len(documents), "tokens": 0, "texts_that_differ": 0}
        for text in documents:
            ours = tokenizer(text, add_special_tokens=False).input_ids
            theirs = llm.tokenize(text.encode(), add_bos=False, special=True)
            row["tokens"] += len(ours)
            if ours != theirs:
                row["texts_that_differ"] += 1
                at = equal_start(ours, theirs)
                row.setdefault("first_difference", tokenizer.decode(ours[max(0, at - 4) : at + 4]))
        result[name] = row
    return result


# Same tokens


@torch.inference_mode()
def our_logits(model, ids: list[int]) -> np.ndarray:
    """[tokens, vocabulary]"""
    return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def their_logits(llm, ids: list[int]) -> np.ndarray:
    """[tokens, vocabulary]; `llm` was opened with `logits_all`"""
    llm.reset()
    llm.eval(ids)
    return llm.scores[: len(ids)]


@torch.inference_mode()
def our_greedy(model, ids: list[int], count: int) -> list[int]:
    output = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
    return output[0, len(ids) :].tolist()


def their_greedy(llm, ids: list[int], count: int) -> list[int]:
    llm.reset()
    output = []
    for token in llm.generate(ids, temp=0.0):
        output.append(token)
        if token == llm.token_eos() or len(output) == count:
            return output


def equal_start(a: list[int], b: list[int]) -> int:
    """How many tokens two lists have in common at their beginning."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def bits(logits: np.ndarray, ids: list[int]) -> float:
    """What ids[1:] cost in bits, given what stands before each."""
    logits = logits[: len(ids) - 1].astype(np.float64)
    highest = logits.max(axis=-1)
    log_sum = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=-1))
    return float((log_sum - logits[np.arange(len(ids) - 1), ids[1:]]).sum() / math.log(2))


def compare(model, llm, ids: list[int]) -> dict:
    ours, theirs = our_logits(model, ids), their_logits(llm, ids)
    return {
        "tokens": len(ids),
        "largest_logit": round(float(np.abs(ours).max()), 3),
        "largest_difference": float(f"{np.abs(ours - theirs).max():.3g}"),
        "same_first_choice": round(float((ours.argmax(-1) == theirs.argmax(-1)).mean()), 4),
    }


def root_part(folder: Path, files: dict[str, Path], texts: dict[str, list[str]]) -> dict:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), open_ours(folder)
    windows = {name: [tokenizer(text).input_ids[:WINDOW] for text in texts[name][:WINDOWS]] for name in texts}
    size = {name: [len(tokenizer.decode(ids[1:]).encode()) for ids in rows] for name, rows in windows.items()}
    prompts = {name: tokenizer(text).input_ids for name, text in PROMPTS.items()}
    expected = {name: our_greedy(model, ids, GREEDY_TOKENS) for name, ids in prompts.items()}
    sample = prompts["en story"] + expected["en story"] + prompts["zh novel"] + expected["zh novel"]

    def bits_per_byte(logits_of) -> dict:
        return {
            name: round(sum(bits(logits_of(ids), ids) for ids in rows) / sum(size[name]), 5)
            for name, rows in windows.items()
        }

    result = {"ours, float32": {"bits_per_byte": bits_per_byte(partial(our_logits, model))}}
    for output_type, path in files.items():
        cache = {"type_k": F32, "type_v": F32} if output_type == "f32" else {}
        llm = open_gguf(path, WINDOW, logits_all=True, **cache)
        greedy = {}
        for name, text in PROMPTS.items():
            ids = llm.tokenize(text.encode(), add_bos=True, special=True)
            tokens = their_greedy(llm, ids, GREEDY_TOKENS)
            greedy[name] = {"tokens": len(expected[name]), "equal_from_the_start": equal_start(tokens, expected[name])}
            if ids != prompts[name]:
                greedy[name]["prompt"] = "encoded differently"
        result[f"llama.cpp, {output_type}"] = {
            "greedy": greedy,
            "logits": compare(model, llm, sample),
            "bits_per_byte": bits_per_byte(partial(their_logits, llm)),
        }
        print(output_type, json.dumps(result[f"llama.cpp, {output_type}"]), flush=True)
    return result


# Families


def save_random(folder: Path, config: dict):
    """A checkpoint with random weights, none of them at its default, and the tokenizer of this folder."""
    save_checkpoint(folder, config)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.ndim == 1 and "inv_freq" not in name:  # norms, biases
                tensor += 0.1 * torch.randn_like(tensor)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / name, folder)


def families_part(folder: Path, llama_cpp: Path) -> dict:
    result = {}
    ids = torch.randint(3, 8175, (FAMILY_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    for name, config in FAMILIES.items():
        place = folder / name
        save_random(place, config)
        try:
            llm = open_gguf(convert(place, llama_cpp, "f32"), 512, logits_all=True, type_k=F32, type_v=F32)
        except (RuntimeError, ValueError) as error:
            result[name] = {"refused": str(error).replace(f"{place}/", "")}
        else:
            model = open_ours(place)
            prompt = ids[:40]
            ours, theirs = our_greedy(model, prompt, GREEDY_TOKENS), their_greedy(llm, prompt, GREEDY_TOKENS)
            greedy = {"tokens": len(ours), "equal_from_the_start": equal_start(ours, theirs)}
            result[name] = {"logits": compare(model, llm, ids), "greedy": greedy}
            if config.get("topk_method") == "group_limited_greedy":
                model = open_ours(place, topk_method="noaux_tc")  # V3's choice of groups, with a bias of 0
                result[name]["logits, groups chosen as in V3"] = compare(model, llm, ids)
        print(name, json.dumps(result[name]), flush=True)
    return result


# Speed


class Ours:
    """Greedy decoding from a prompt of random tokens; the cache is put back after each turn."""

    def __init__(self, folder: Path):
        self.model = open_ours(folder)

    @torch.inference_mode()
    def read(self, ids: list[int]):
        self.cache = DynamicCache(config=self.model.config)
        logits = self.model(torch.tensor([ids]), past_key_values=self.cache, logits_to_keep=1).logits
        self.token = logits[:, -1].argmax(dim=-1, keepdim=True)

    @torch.inference_mode()
    def write(self):
        token = self.token
        for _ in range(TOKENS_PER_TURN):
            token = self.model(token, past_key_values=self.cache).logits[:, -1].argmax(dim=-1, keepdim=True)
        self.cache.crop(-TOKENS_PER_TURN)


class Theirs:
    """The same in llama.cpp."""

    def __init__(self, path: Path, context: int, **options):
        from llama_cpp import llama_get_logits_ith

        # the batch sizes of llama.cpp's own programs
        self.llm = open_gguf(path, context, n_batch=2048, n_ubatch=512, **options)
        self.logits = partial(llama_get_logits_ith, self.llm.ctx, -1)

    def choose(self) -> int:
        return int(np.ctypeslib.as_array(self.logits(), shape=(self.llm.n_vocab(),)).argmax())

    def read(self, ids: list[int]):
        self.llm.reset()
        self.llm.eval(ids)
        self.token, self.length = self.choose(), len(ids)

    def write(self):
        token = self.token
        for _ in range(TOKENS_PER_TURN):
            self.llm.eval([token])
            token = self.choose()
        self.llm.n_tokens = self.length  # what comes next overwrites what was written


def speed_part(folders: dict[str, Path], files: dict[str, dict[str, Path]]) -> list[dict]:
    """Milliseconds a decoded token at each context, and of a prompt."""
    rows = []
    for name, folder in folders.items():
        context = max(*CONTEXTS[name], PREFILL) + TOKENS_PER_TURN
        exact = {"type_k": F32, "type_v": F32}
        contestants = {
            "ours, float32": Ours(folder),
            "llama.cpp, f32": Theirs(files[name]["f32"], context, **exact),
            "llama.cpp, f32, flash attention": Theirs(files[name]["f32"], context, flash_attn=True, **exact),
            "llama.cpp, bf16, flash attention": Theirs(files[name]["bf16"], context, flash_attn=True),
            "llama.cpp, q8_0, flash attention": Theirs(files[name]["q8_0"], context, flash_attn=True),
        }
        ids = torch.randint(3, 8175, (max(*CONTEXTS[name], PREFILL),), generator=torch.Generator().manual_seed(0))
        ids = ids.tolist()
        prompt = {key: partial(one.read, ids[:PREFILL]) for key, one in contestants.items()}
        rows.append({"model": name, "prefill": PREFILL, **times(interleave(prompt, repeats=3), PREFILL)})
        print(json.dumps(rows[-1]), flush=True)
        for length in CONTEXTS[name]:
            for one in contestants.values():
                one.read(ids[:length])
            turns = {key: one.write for key, one in contestants.items()}
            seconds = interleave(turns, repeats=8)
            rows.append({"model": name, "decode_after": length, **times(seconds, TOKENS_PER_TURN)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def times(seconds: dict[str, list[float]], tokens: int) -> dict:
    """Tokens a second of each (median, best), and ours over theirs (of the medians)."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        name: {
            "tokens_per_second": round(tokens / medians[name], 1),
            "best": round(tokens / min(values), 1),
            "ours_is_faster_by": round(medians[name] / medians["ours, float32"], 2),
        }
        for name, values in seconds.items()
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.llama_cpp",
        description=__doc__.split("\n\n")[0],
        epilog="See docs/interoperability.md.",
    )
    parser.add_argument("--llama-cpp", type=Path, required=True, help="clone of llama.cpp, for its converter")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="run some parts and write nothing")
    parser.add_argument(
        "--files", action="append", nargs="+", default=[], metavar="NAME FILE", help="a language and its texts; repeat"
    )
    parser.add_argument(
        "--held-out-fraction", type=float, default=0.0, help="read held-out documents only, in [0, 1) (default 0: all)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both (default: %(default)s)")
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        import llama_cpp
    except ImportError:
        print("error: llama-cpp-python is not installed; pip install llama-cpp-python", file=sys.stderr)
        return 1
    check_fraction(arguments.held_out_fraction)
    files = {group[0]: [Path(name) for name in group[1:]] for group in arguments.files}
    check_paths([path for paths in files.values() for path in paths])
    if not (arguments.llama_cpp / "convert_hf_to_gguf.py").is_file():
        raise ValueError(f"--llama-cpp is {arguments.llama_cpp}, which has no convert_hf_to_gguf.py")
    texts = corpus(files, arguments.held_out_fraction)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    parts = arguments.only or PARTS
    versions = {
        "llama_cpp_python": llama_cpp.__version__,
        "llama_cpp_build": llama_cpp.llama_print_system_info().decode(),
    }
    command = [word if word.startswith("-") else Path(word).name for word in sys.argv[1:]]
    results = {"machine": describe_machine() | versions, "command": command}
    with tempfile.TemporaryDirectory() as temporary:
        temporary = Path(temporary)
        folders = {"this folder": temporary / "root", "V3-shaped, hidden 512": temporary / "v3_shaped"}
        shutil.copytree(ROOT, folders["this folder"], ignore=lambda _, names: [n for n in names if not _is_model(n)])
        if "speed" in parts:
            save_random(folders["V3-shaped, hidden 512"], V3_SHAPED)
        else:
            del folders["V3-shaped, hidden 512"]
        ggufs = {
            name: {output_type: convert(folder, arguments.llama_cpp, output_type) for output_type in TYPES}
            for name, folder in folders.items()
        }
        if "tokenizer" in parts:
            llm = open_gguf(ggufs["this folder"]["f32"], 512, vocab_only=True)
            results["tokenizer"] = tokenizer_part(llm, AutoTokenizer.from_pretrained(ROOT), texts)
            print(json.dumps(results["tokenizer"], ensure_ascii=False, indent=2), flush=True)
        if "root" in parts:
            results["root"] = root_part(folders["this folder"], ggufs["this folder"], texts)
        if "families" in parts:
            results["families"] = families_part(temporary, arguments.llama_cpp)
        if "speed" in parts:
            results["speed"] = speed_part(folders, ggufs)
    if arguments.only is None:
        write_results("llama_cpp", results)
    return 0


def _is_model(name: str) -> bool:
    return name.endswith(("_deepseek.py", ".safetensors", ".jinja")) or name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    )


if __name__ == "__main__":
    run_command(main)
