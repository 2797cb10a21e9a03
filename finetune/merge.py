"""Merge a LoRA adapter or an ESFT result into its base model, shard by shard, without loading the model.

    python -m finetune.merge --model path/to/base --adapter runs/x/final --output path/to/merged

The output is a checkpoint with DeepSeek's names that any engine reads. Memory holds one shard and one layer's adapter at
a time. An FP8 checkpoint becomes bfloat16, since merged weights have no block scales. LoRA, rsLoRA and DoRA are known.
"""

import argparse
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from common.command import Parser, check_early, one_line_errors, run_command
from common.extras import extra


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = Parser(prog="python -m finetune.merge", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder or Hub name of the base model")
    parser.add_argument("--adapter", type=Path, required=True, help="folder with a LoRA adapter or an ESFT result")
    parser.add_argument("--output", type=Path, required=True, help="folder for the merged model; must not exist")
    return parser


check_early(__name__, lambda: build_parser().parse_args())

with extra("train"):
    import torch
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from safetensors import safe_open

    from common.card import model_name
    from common.hub import local_folder
    from common.loading import load_config, new_model
    from common.remote_code import quant_method
    from common.rewrite import refuse_existing, tensor_files, write_checkpoint
    from finetune.experts import ESFT_WEIGHTS, read_esft
    from finetune.lora import AdapterFiles, check_fits
    from loading_deepseek import CheckpointFiles, dequantised_state_dict

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


class LoraMerge:
    """Adds an adapter's updates to the tensors of its base checkpoint, one at a time.

    Raises:
        FileNotFoundError, ValueError: there is no adapter, it is for another model, or it holds what cannot be merged.
    """

    def __init__(self, source: Path, folder: Path):
        files = AdapterFiles(folder)
        config = load_config(source)
        with torch.device("meta"):
            model = new_model(config)
        empty = check_fits(model, files)
        self._file = safe_open(files.path, framework="pt")
        # Weight or stacked parameter -> where its factors are, their scale and their rank.
        self._layers: dict[str, tuple[str, float, int]] = {}
        for name, module in empty.named_modules():
            if isinstance(module, LoraLayer):
                plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
                parameter = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
                self._layers[f"{plain}.{parameter}"] = (name, module.scaling["default"], module.r["default"])
        used = {prefix for prefix, _, _ in self._layers.values()}
        other = sorted(
            key for key in files.shapes if re.split(r"\.lora_(?:A|B|magnitude_vector)\b", key)[0] not in used
        )
        if other:
            raise ValueError(f"the adapter in {folder} holds {other[0]}, which is no LoRA factor; merge it with PEFT")
        self._tensor = lru_cache(maxsize=4)(self._file.get_tensor)

    def __call__(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A tensor of the checkpoint -> the merged one; the same object where nothing is adapted."""
        expert = _EXPERT.fullmatch(name)
        if expert is None or name in self._layers:
            return self._merge_module(name, weight) if name in self._layers else weight
        stack = f"{expert[1]}.{'down_proj' if expert[3] == 'down' else 'gate_up_proj'}"
        return self._merge_expert(stack, int(expert[2]), expert[3], weight) if stack in self._layers else weight

    def _merge_module(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        prefix, scale, _ = self._layers[name]
        down, up = (self._tensor(f"{prefix}.lora_{part}.weight").float() for part in "AB")  # [R, in], [out, R]
        merged = weight.float() + scale * up @ down
        magnitude = f"{prefix}.lora_magnitude_vector"
        if magnitude in self._file.keys():  # noqa: SIM118 - DoRA: the length of each row is learned apart
            merged = merged * (self._tensor(magnitude).float() / merged.norm(dim=1))[:, None]
        return merged.to(weight.dtype)

    def _merge_expert(self, stack: str, expert: int, part: str, weight: torch.Tensor) -> torch.Tensor:
        prefix, scale, rank = self._layers[stack]
        down, up = (self._tensor(f"{prefix}.lora_{factor}.weight") for factor in "AB")  # [E * R, in], [out, R * E]
        down = down[expert * rank : (expert + 1) * rank].float()  # [R, in]: PEFT has experts outermost here
        up = up.unflatten(1, (rank, -1))[:, :, expert].float()  # [out, R]: and innermost there
        if part != "down":
            up = up.chunk(2)[part == "up"]
        return (weight.float() + scale * up @ down).to(weight.dtype)

    def needed(self) -> list[str]:
        """Names, without "model.", that the base checkpoint must have."""
        stacks = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
        names = []
        for name in self._layers:
            owner, _, parameter = name.removeprefix("model.").rpartition(".")
            names += (
                [name.removeprefix("model.")]
                if parameter == "weight"
                else [f"{owner}.0.{part}.weight" for part in stacks[parameter]]
            )
        return names


class ExpertMerge:
    """Puts the experts of an ESFT result in the place of the base checkpoint's.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is damaged.
    """

    def __init__(self, folder: Path):
        self._folder, self._experts = folder, read_esft(folder)

    def __call__(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A tensor of the checkpoint -> the trained one; the same object where it was not trained."""
        if name not in self._experts:
            return weight
        trained = self._experts[name]
        if trained.shape != weight.shape:
            raise ValueError(
                f"the experts in {self._folder} are for another model: {name} is {list(trained.shape)}, the checkpoint's "
                f"{list(weight.shape)}"
            )
        return trained.to(weight.dtype)

    def needed(self) -> list[str]:
        """Names, without "model.", that the base checkpoint must have."""
        return [name.removeprefix("model.") for name in self._experts]


def merge(source: Path, adapter: Path, output: Path) -> None:
    """Write the checkpoint `output`: `source` with the result in `adapter` merged in.

    Raises:
        FileNotFoundError, ValueError: something is missing, damaged or does not fit, or `output` exists.
    """
    refuse_existing(output)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(
            f"{source} has no config.json; name the folder of the model that the adapter was made for"
        )
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    merged = ExpertMerge(adapter) if (adapter / ESFT_WEIGHTS).is_file() else LoraMerge(source, adapter)
    # Before anything is written: every part of the result has its place. The names are without the leading "model.".
    shard_of = tensor_files(source, merged.needed())
    method, quantisation = quant_method(config), config.pop("quantization_config", None)
    plain = {}
    if quantisation is not None:
        if method != "fp8" or not quantisation.get("weight_block_size"):
            raise ValueError(f"{source} is quantised with {method!r}; merge into plain or FP8 weights")
        plain = dequantised_state_dict(CheckpointFiles(source, {}), tuple(quantisation["weight_block_size"]))

    def change(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        if plain and name not in plain:
            return  # a block scale
        if plain and tensor.dtype.itemsize == 1:
            yield name, merged(name, plain[name][...]).to(torch.bfloat16)
        else:
            yield name, merged(name, tensor)

    what = f"{model_name(source)} with the result `{adapter.resolve().name}` of a fine-tuning merged in (`finetune.merge`)."
    write_checkpoint(source, output, config, shard_of, change, what)


# ---------------------------------------------------------------- command line


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    refuse_existing(args.output)
    merge(local_folder(args.model), args.adapter, args.output)
    print(f"merged model written to {args.output}")
    print(f"next: python chat.py --model {args.output}, or python -m tools.publish {args.output} --dry-run")
    return 0


if __name__ == "__main__":
    run_command(main)
