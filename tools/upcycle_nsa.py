"""Turns a dense checkpoint with grouped-query attention into one with native sparse attention, for further training.

    python -m tools.upcycle_nsa path/to/deepseek-llm-7b-base path/to/deepseek-llm-7b-nsa

The new model starts near the old one. Keys and values of all three branches are the dense ones; compressed entries are
exact means of their blocks; and the gates are constant, 0.982 for the selected branch and 0.018 for the others. A text
of up to `--num-select-blocks` * `--select-block-size` tokens is selected whole, so there the selected branch is dense
attention and the new model differs from the old one by the gates alone. On longer texts it does not: train it first.

Weights go through memory a shard at a time. OUTPUT must not exist; it appears when it is complete.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from common.command import Parser, check_early, one_line_errors, run_command
from common.extras import extra

# Of the paper (arXiv:2502.11089): the fields `nsa_...` of a config, their values and meanings.
SIZES = {
    "compress_block_size": (32, "tokens of a compressed block"),
    "compress_stride": (16, "tokens from one compressed block to the next"),
    "select_block_size": (64, "tokens of a selected block"),
    "num_select_blocks": (16, "blocks that a query selects, the fixed ones counted"),
    "num_init_blocks": (1, "first blocks that are always selected"),
    "num_local_blocks": (2, "last blocks that are always selected"),
    "window_size": (512, "tokens of the window"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m tools.upcycle_nsa",
        description=__doc__.split("\n\n")[0],
        epilog="Sizes default to the paper's.",
    )
    parser.add_argument("source", type=Path, help="checkpoint folder, model_type llama or deepseek")
    parser.add_argument("output", type=Path, help="folder to write; must not exist")
    for option, (default, meaning) in SIZES.items():
        parser.add_argument(
            f"--{option.replace('_', '-')}",
            dest=f"nsa_{option}",
            metavar="N",
            type=int,
            default=default,
            help=f"{meaning} (%(default)s)",
        )
    parser.add_argument("--seed", type=int, default=0, help="of the compressors' random first layer (%(default)s)")
    return parser


check_early(__name__, lambda: build_parser().parse_args())

with extra("tools"):
    import torch

    from common.card import model_name
    from common.remote_code import read_config
    from common.rewrite import (
        dtype_beside,
        new_matrix,
        refuse_existing,
        resolve_config,
        tensor_files,
        write_checkpoint,
    )
    from configuration_deepseek import FAMILY_DEFAULTS

SOURCE_TYPES = ("llama", "deepseek")
GATE_BIAS = (-4.0, 4.0, -4.0)  # of the compressed, the selected and the window branch, before the sigmoid
BRANCHES = ("compress", "select", "window")
_ATTENTION_TENSOR = re.compile(r"(?P<prefix>(?:model\.)?layers\.\d+\.self_attn\.)(?P<proj>[qkvo]_proj)\.(?P<kind>.+)")


def nsa_config(source: dict, sizes: dict[str, int]) -> dict:
    """The config.json of the new model.

    Args:
        source: the dense model's config.json.
        sizes: the `nsa_` fields.

    Raises:
        ValueError: the source is no dense GQA model, or the sizes do not fit together.
    """
    model_type = source["model_type"]
    if model_type not in SOURCE_TYPES:
        remedy = "use a dense model of DeepSeek-LLM's or DeepSeekMoE's kind"
        if model_type == "deepseek_v3":
            remedy += ", or tools/add_indexer.py, which gives a V3 model its own sparse attention"
        raise ValueError(
            f"`model_type` is {model_type!r}; it must be {' or '.join(map(repr, SOURCE_TYPES))}: {remedy}."
        )
    if source.get("kv_lora_rank") is not None:
        raise ValueError(
            f"`kv_lora_rank` is {source['kv_lora_rank']!r}, so this is multi-head latent attention; it must be null: "
            "use a model with grouped-query attention."
        )
    if source.get("attention_kind", "gqa") != "gqa":
        raise ValueError(f"`attention_kind` is {source['attention_kind']!r}; it must be 'gqa': use a dense model.")
    # fields that the source leaves to its type's defaults, where the new type's differ
    implied = {
        name: value
        for name, value in FAMILY_DEFAULTS[model_type].items()
        if name not in source and value != FAMILY_DEFAULTS["deepseek_nsa"][name]
    }
    config = {**source, **implied, **sizes, "model_type": "deepseek_nsa"}
    config["architectures"] = [
        re.sub("^Llama", "Deepseek", name) for name in source.get("architectures") or ["DeepseekForCausalLM"]
    ]
    resolve_config(config)
    return config


def upcycle(source: Path, output: Path, sizes: dict[str, int], seed: int = 0):
    """Writes the folder `output` with native sparse attention, from the dense checkpoint in `source`.

    Raises:
        ValueError: `output` exists, or `source` cannot be converted.
    """
    refuse_existing(output)
    config = nsa_config(read_config(source), sizes)
    resolved = resolve_config(config)
    heads, width, block = resolved.num_attention_heads, resolved.head_dim, resolved.nsa_compress_block_size

    def change(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        match = _ATTENTION_TENSOR.fullmatch(name)
        if match is None:
            yield name, tensor
            return
        prefix, projection, kind = match["prefix"], match["proj"], match["kind"]
        dtype = dtype_beside(tensor)
        if projection in ("q_proj", "o_proj"):
            yield name, tensor
        else:  # its bias and its FP8 scales likewise
            for branch in BRANCHES:
                yield f"{prefix}{branch}_{projection}.{kind}", tensor.clone()
        if kind != "weight":
            return
        if projection == "o_proj":
            yield f"{prefix}branch_gate.weight", torch.zeros(3 * heads, resolved.hidden_size, dtype=dtype)
            yield f"{prefix}branch_gate.bias", torch.tensor(GATE_BIAS, dtype=dtype).repeat(heads)
        if projection in ("k_proj", "v_proj"):
            compressor = prefix + {"k_proj": "compress_key", "v_proj": "compress_value"}[projection]
            up_name, up_shape = f"{compressor}.up_proj.weight", (2 * width, block * width)
            yield f"{compressor}.position", torch.zeros(block, width, dtype=dtype)
            yield up_name, new_matrix(up_name, up_shape, resolved.initializer_range, seed, dtype)
            yield f"{compressor}.down_proj.weight", torch.zeros(width, 2 * width, dtype=dtype)

    what = f"{model_name(source)} with native sparse attention, not yet trained with it (`tools.upcycle_nsa`)."
    required = [f"layers.{i}.self_attn.{x}_proj.weight" for i in range(resolved.num_hidden_layers) for x in "qkvo"]
    write_checkpoint(source, output, config, tensor_files(source, required), change, what)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    arguments = vars(build_parser().parse_args(argv))
    sizes = {name: value for name, value in arguments.items() if name.startswith("nsa_")}
    upcycle(arguments["source"], arguments["output"], sizes, arguments["seed"])
    whole = sizes["nsa_num_select_blocks"] * sizes["nsa_select_block_size"]
    print(f"wrote {arguments['output']}; close to the dense model on texts of up to {whole} tokens, train it for more")
    print(
        f"next: python -m pretrain.train --model {arguments['output']} --start weights --data DATA --run-dir RUN --steps N"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
