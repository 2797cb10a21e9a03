"""Loads a model folder or adapter as a stranger does, in a process of its own, and prints what it found as JSON.

    python tools/try_loading.py FOLDER
    python tools/try_loading.py ADAPTER --base BASE_FOLDER

`tools.publish` runs this file with an empty `HF_MODULES_CACHE`, so that code left over from other runs cannot help.
The last line printed is a JSON object, stage -> {"error": ...} or what the stage found:

    config      class and vocabulary size, by AutoConfig with trust_remote_code
    weights     names and shapes in the files against the model built on the meta device
    tokenizer   its size and special tokens, and whether it gives text back unchanged
    chat        ids of a rendered conversation
    generation  the generation config's values
    generate    what loading reports, and the number of tokens generated; left out with --no-generate
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.core_model_loading import revert_weight_conversion

SAMPLE = 'It was late, "so" he said: 3.14 x 2 = 6.28.\n话说天下大势，分久必合。\tdef f(x): return x  # 🙂\n'
CONVERSATION = [{"role": "user", "content": "1 + 1 = ?"}]


def shapes_in_files(files: list[Path]) -> dict[str, list[int]]:
    """Tensor name -> shape, read from the headers of safetensors files."""
    shapes = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    return shapes


def compare(expected: dict[str, list[int]], found: dict[str, list[int]]) -> dict:
    """Names that one side lacks, and shapes that differ as [name, in the files, expected]."""
    return {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "shapes": [
            [name, found[name], expected[name]] for name in found if expected.get(name, found[name]) != found[name]
        ],
    }


# ---------------------------------------------------------------- stages


def try_config(folder: Path) -> dict:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return {"class": f"{type(config).__module__}.{type(config).__name__}", "vocab_size": config.vocab_size}


def try_weights(folder: Path) -> dict:
    """Compares the files with the model under the names that it would be saved with."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    fp8 = isinstance(getattr(config, "quantization_config", None), dict)
    found = shapes_in_files(sorted(folder.glob("*.safetensors")))
    # as the model's own from_pretrained does: a checkpoint may come without its prediction modules
    if not any(f"layers.{config.num_hidden_layers}." in name for name in found):
        config.num_nextn_predict_layers = 0
    if fp8:
        rows, columns = config.quantization_config["weight_block_size"]
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    state = revert_weight_conversion(model, model.state_dict())
    expected = {name: list(tensor.shape) for name, tensor in state.items()}
    if fp8:
        scales = [
            name for name in found if name.endswith("_scale_inv") and name.removesuffix("_scale_inv") in expected
        ]
        for name in scales:
            height, width = expected[name.removesuffix("_scale_inv")]
            expected[name] = [-(-height // rows), -(-width // columns)]
    for name in model.all_tied_weights_keys:  # a tied weight may be in the files or not
        if name not in found:
            expected.pop(name, None)
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    found = {
        name: shape
        for name, shape in found.items()
        if name in expected or not any(pattern.search(name) for pattern in optional)
    }
    return {"tensors": len(found), **compare(expected, found)}


def try_tokenizer(folder: Path) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
    return {
        "size": len(tokenizer),
        "largest_id": max(tokenizer.get_vocab().values()),
        "lossless": tokenizer.decode(ids, clean_up_tokenization_spaces=False) == SAMPLE,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def try_chat(folder: Path) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    if tokenizer.chat_template is None:
        return {"template": False}
    rendered = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = list(rendered["input_ids"])
    return {
        "template": True,
        "tokens": len(ids),
        "keeps_the_words": CONVERSATION[0]["content"] in tokenizer.decode(ids),
        "bos": ids.count(tokenizer.bos_token_id),
    }


def try_generation(folder: Path) -> dict:
    generation = GenerationConfig.from_pretrained(folder)
    generation.validate(strict=True)
    return {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def try_generate(folder: Path, num_tokens: int) -> dict:
    model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    return {
        "class": f"{type(model).__module__}.{type(model).__name__}",
        "report": {name: sorted(map(str, keys)) for name, keys in report.items() if keys},
        "new_tokens": _new_tokens(model, folder, num_tokens),
    }


def try_adapter(folder: Path, base: Path, num_tokens: int) -> dict:
    """Puts the adapter on its base model, compares its file with what PEFT made, and generates."""
    from peft import PeftModel, get_peft_model_state_dict

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True), folder)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {name: list(tensor.shape) for name, tensor in state.items()}
    differences = compare(expected, shapes_in_files([folder / "adapter_model.safetensors"]))
    return {"tensors": len(expected), **differences, "new_tokens": _new_tokens(model, base, num_tokens)}


def _new_tokens(model, tokenizer_folder: Path, num_tokens: int) -> int:
    inputs = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=True)(SAMPLE[:20], return_tensors="pt")
    output = model.eval().generate(
        **inputs, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, temperature=1.0, top_p=1.0
    )
    return output.shape[1] - inputs["input_ids"].shape[1]


# ---------------------------------------------------------------- command line


def run_stages(stages: dict) -> dict:
    """Runs every stage, whatever became of the others."""
    results = {}
    for name, stage in stages.items():
        try:
            results[name] = stage()
        except Exception as error:  # whatever a stranger would meet is what is to be reported
            results[name] = {"error": f"{type(error).__name__}: {error}".strip()}
    return results


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="model folder, or with --base a PEFT adapter")
    parser.add_argument("--base", type=Path, help="model folder that the adapter was made for")
    parser.add_argument("--tokens", type=int, default=8, help="tokens to generate (default 8)")
    parser.add_argument("--no-generate", action="store_true", help="do not load the weights")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    folder = args.folder
    if args.base is not None:
        stages = {"adapter": lambda: try_adapter(folder, args.base, args.tokens)}
    else:
        stages = {
            "config": lambda: try_config(folder),
            "weights": lambda: try_weights(folder),
            "tokenizer": lambda: try_tokenizer(folder),
            "chat": lambda: try_chat(folder),
            "generation": lambda: try_generation(folder),
        }
        if not args.no_generate:
            stages["generate"] = lambda: try_generate(folder, args.tokens)
    report = run_stages(stages)
    sys.stdout.flush()
    print("\n" + json.dumps(report))
    return 0


if __name__ == "__main__":
    # `tools/` is not for import here: nothing but what is installed and what is in the folder.
    sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(os.path.abspath(__file__))]
    sys.exit(main())
