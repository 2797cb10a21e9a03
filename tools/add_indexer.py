"""Adds a freshly initialised lightning indexer, as in V3.2, to a DeepSeek-V3 checkpoint for further training.

    python -m tools.add_indexer path/to/DeepSeek-V3-Base path/to/DeepSeek-V3-sparse

The result is a `deepseek_v32` checkpoint with the official names. Nothing else changes, so on texts of up to
`--index-topk` tokens the new model computes what the old one does. On longer ones the selection is random until the
indexer has learned: first with `index_warmup=True` in the config and all but the indexer frozen, then with
`index_warmup=False` and all weights free.

Multi-token-prediction layers get an indexer too. Weights go through memory a shard at a time; beside FP8 weights, which
stay as they are, the indexer is stored in bfloat16. OUTPUT must not exist; it appears when it is complete.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from common.command import Parser, check_early, one_line_errors, run_command
from common.extras import extra

SIZES = {"index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128}  # of V3.2


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m tools.add_indexer", description=__doc__.split("\n\n")[0], epilog="Sizes default to V3.2's."
    )
    parser.add_argument("source", type=Path, help="checkpoint folder, model_type deepseek_v3")
    parser.add_argument("output", type=Path, help="folder to write; must not exist")
    for field, meaning in (
        ("index_topk", "tokens that a query selects"),
        ("index_n_heads", "heads of the indexer"),
        ("index_head_dim", "width of a head, at least qk_rope_head_dim"),
    ):
        option = f"--{field.replace('_', '-')}"
        parser.add_argument(option, metavar="N", type=int, default=SIZES[field], help=f"{meaning} (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the indexer's random weights (%(default)s)")
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

_QUERY_LATENT = re.compile(r"(?P<prefix>(?:model\.)?layers\.\d+\.self_attn\.)q_a_proj\.weight")


def indexer_config(source: dict, sizes: dict[str, int]) -> dict:
    """The config.json of the new model.

    Args:
        source: the dense model's config.json.
        sizes: the `index_` fields.

    Raises:
        ValueError: the source is no V3 model with a query latent and without indexer, or a size is impossible.
    """
    if source["model_type"] != "deepseek_v3":
        remedy = "name a DeepSeek-V3 or R1 checkpoint"
        if source["model_type"] in ("llama", "deepseek"):
            remedy += ", or use tools/upcycle_nsa.py, which gives grouped-query attention another sparse form"
        raise ValueError(f"`model_type` is {source['model_type']!r}; it must be 'deepseek_v3': {remedy}.")
    if source.get("index_topk") is not None:
        raise ValueError(
            f"`index_topk` is {source['index_topk']!r}, so there is an indexer already; it must be null: "
            "use the checkpoint as it is."
        )
    config = {**source, **sizes, "model_type": "deepseek_v32"}
    config["architectures"] = [
        name.replace("DeepseekV3", "DeepseekV32") for name in source.get("architectures") or ["DeepseekV3ForCausalLM"]
    ]
    resolve_config(config)  # refuses a model without a query latent, too
    return config


def add_indexer(source: Path, output: Path, sizes: dict[str, int], seed: int = 0):
    """Writes the folder `output`: the checkpoint in `source` with an indexer in each layer.

    Raises:
        ValueError: `output` exists, or `source` cannot be converted.
    """
    refuse_existing(output)
    config = indexer_config(read_config(source), sizes)
    resolved = resolve_config(config)
    heads, width, std = resolved.index_n_heads, resolved.index_head_dim, resolved.initializer_range

    def change(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        yield name, tensor
        match = _QUERY_LATENT.fullmatch(name)
        if match is None:
            return
        indexer = f"{match['prefix']}indexer"
        for part, shape, dtype in (
            ("wq_b", (heads * width, resolved.q_lora_rank), dtype_beside(tensor)),
            ("wk", (width, resolved.hidden_size), dtype_beside(tensor)),
            ("weights_proj", (heads, resolved.hidden_size), torch.float32),
        ):
            new_name = f"{indexer}.{part}.weight"
            yield new_name, new_matrix(new_name, shape, std, seed, dtype)
        yield f"{indexer}.k_norm.weight", torch.ones(width)
        yield f"{indexer}.k_norm.bias", torch.zeros(width)

    what = f"{model_name(source)} with a lightning indexer in each layer, which is untrained (`tools.add_indexer`)."
    required = [f"layers.{i}.self_attn.q_a_proj.weight" for i in range(resolved.num_hidden_layers)]
    write_checkpoint(source, output, config, tensor_files(source, required), change, what)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    arguments = vars(build_parser().parse_args(argv))
    sizes = {name: value for name, value in arguments.items() if name.startswith("index_")}
    add_indexer(arguments["source"], arguments["output"], sizes, arguments["seed"])
    print(f"wrote {arguments['output']}; unchanged on texts of up to {sizes['index_topk']} tokens, train it for more")
    print(
        f"next: python -m pretrain.train --model {arguments['output']} --start weights --dsa-stage warmup --data DATA ..."
    )
    return 0


if __name__ == "__main__":
    run_command(main)
