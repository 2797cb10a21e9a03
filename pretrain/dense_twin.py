"""Writes the dense model that a mixture of experts is compared with: equal but for its MLPs, and as many active parameters.

    python -m pretrain.dense_twin . runs/dense
    python -m pretrain.train --model runs/dense --data runs/data --run-dir runs/dense-run --steps 3000

Layers, width, attention and vocabulary stay; every MLP gets the width at which the decoder layers together hold as many
parameters as a token meets in those of the mixture (shared experts and routers counted; embedding, head and
multi-token-prediction modules not). The width is a whole number, so the two differ by less than half a column a layer.
"""

import argparse
import json
import shutil
from pathlib import Path

from common.command import Parser, check_early, one_line_errors, run_command
from common.extras import extra


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = Parser(prog="python -m pretrain.dense_twin", description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="folder with config.json and code of a mixture of experts")
    parser.add_argument("output", type=Path, help="folder to create")
    parser.add_argument(
        "--no-mtp", action="store_true", help="leave multi-token prediction out (default: as the source)"
    )
    return parser


check_early(__name__, lambda: build_parser().parse_args())

with extra("train"):
    import torch
    from transformers import PreTrainedModel

    from common.loading import load_config, new_model
    from common.remote_code import AUTO_MAP, code_files
    from pretrain.cost import body_parameters


def empty_model(folder: Path) -> PreTrainedModel:
    """The model of a folder's config.json, without memory for its weights."""
    with torch.device("meta"):
        return new_model(load_config(folder))


def write_dense_twin(source: Path, output: Path, keep_mtp: bool = True) -> tuple[int, int]:
    """Write config.json and code of the twin of `source` into the new folder `output`.

    Args:
        source: folder with config.json and the model's code.
        output: folder to create.
        keep_mtp: keep the multi-token-prediction modules (with dense MLPs).

    Returns:
        Active parameters of the decoder layers of the source and of the twin.

    Raises:
        ValueError: the source has no experts, or `output` exists.
    """
    if output.exists():
        raise ValueError(f"{output} exists; remove it or name another folder")
    model = empty_model(source)
    if getattr(model.config, "n_routed_experts", None) is None:
        raise ValueError(
            f"n_routed_experts is null in {source}/config.json: the model is dense already; name a mixture"
        )
    twin_config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    twin_config["auto_map"] = AUTO_MAP
    twin_config |= {"n_routed_experts": None, "n_shared_experts": None, "num_experts_per_tok": None}
    twin_config.pop("mlp_layer_types", None)
    if not keep_mtp:
        twin_config["num_nextn_predict_layers"] = 0
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in code_files():
        shutil.copy(file, partial)
    wanted = body_parameters(model)
    columns = 3 * model.config.hidden_size * model.config.num_hidden_layers  # of gate, up and down, in all layers
    width = model.config.intermediate_size
    for _ in range(2):  # first with the source's width, to see how far that is off
        twin_config["intermediate_size"] = width
        (partial / "config.json").write_text(json.dumps(twin_config, indent=2) + "\n", encoding="utf-8")
        found = body_parameters(empty_model(partial))
        width += round((wanted - found) / columns)
    partial.rename(output)
    return wanted, found


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    source, twin = write_dense_twin(args.source, args.output, not args.no_mtp)
    print(f"wrote {args.output}: {twin:,} parameters in its layers, {source:,} active in those of {args.source}")
    print(f"next: python -m pretrain.train --model {args.output} --data DATA --run-dir RUN --steps N")
    return 0


if __name__ == "__main__":
    run_command(main)
