"""Makes the config.json of a new model of a family and size, and says what training it takes.

    python -m pretrain.config --tokenizer runs/tokenizer --parameters 15M --family v3 --output runs/model

The vocabulary is the tokenizer's. Width and depth grow together, in the proportions of this repository's own checkpoint; the
number of parameters, multi-token prediction included, is the nearest that they give. The result is a file to edit:
docs/design.md and `DeepseekConfig` say what each field does. `pretrain.train --model runs/model` trains it.
"""

import argparse
import json
import math
from pathlib import Path

from common.command import Parser, check_early, one_line_errors, run_command
from common.extras import extra
from common.hardware import GPUS
from common.outputs import refuse_existing

MODEL_TYPES = {
    **{"llm": "llama", "moe": "deepseek", "v2": "deepseek_v2", "v3": "deepseek_v3", "v32": "deepseek_v32"},
    "nsa": "deepseek_nsa",
}
TOKENS_PER_PARAMETER = 20  # of a run of the length that is best for its cost (arXiv:2203.15556)


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = Parser(prog="python -m pretrain.config", description=__doc__.partition("\n")[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder whose tokenizer the model will have")
    parser.add_argument("--parameters", required=True, help="size of the model, as 15M or 1.3B")
    parser.add_argument("--family", choices=MODEL_TYPES, default="v3", help="architecture (default v3)")
    parser.add_argument("--context", type=int, default=4096, help="longest context, in tokens (default 4096)")
    parser.add_argument("--output", type=Path, required=True, help="folder for config.json; must have none")
    plan = parser.add_argument_group("plan", "what the memory and time are told for")
    plan.add_argument("--tokens", help=f"tokens of the training, as 300M (default {TOKENS_PER_PARAMETER} a parameter)")
    plan.add_argument("--row-tokens", type=int, default=512, help="tokens a row (default 512)")
    plan.add_argument("--batch-rows", type=int, default=16, help="rows at once (default 16)")
    plan.add_argument("--gpu", default="h100", help="kind of GPU, as tools.plan knows them (default h100)")
    plan.add_argument("--mfu", default="0.3", help="share of its peak that is reached (default 0.3)")
    return parser


check_early(__name__, lambda: build_parser().parse_args())

with extra("tools"):
    from tokenizers import Tokenizer

    from common.economics import (
        model_parts,
        mtp_flops,
        mtp_part,
        parse_quantity,
        quantity,
        resolve_mfu,
        training_flops,
        training_memory,
    )
    from common.remote_code import AUTO_MAP, write_json
    from common.rewrite import resolve_config
    from configuration_deepseek import _ARCHITECTURE_PREFIX

WIDTH_OF_A_LAYER = 48  # hidden size over layers; at a width of 256 these are 5 layers
CORE_FLOPS = 1e11  # what the training of this repository's checkpoint made of a core with AVX-512 (docs/checkpoint.md)


def shape(family: str, width: int, layers: int, vocabulary: dict, context: int) -> dict:
    """The fields of a config.json of this width and depth; `vocabulary` as from `read_tokenizer`."""
    head = 32 if width < 768 else 64 if width < 2048 else 128
    heads = width // head
    fields = {
        "model_type": MODEL_TYPES[family],
        **vocabulary,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads
        if family != "nsa"
        else next(n for n in range(max(1, heads // 4), 0, -1) if heads % n == 0),
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    }
    if family in ("llm", "moe", "nsa"):
        fields["head_dim"] = head
    else:
        fields |= {"q_lora_rank": width // 2, "kv_lora_rank": width // 4}
        fields |= {"qk_nope_head_dim": head, "qk_rope_head_dim": head // 2, "v_head_dim": head}
    if family in ("moe", "v2", "v3", "v32"):
        fields |= {"first_k_dense_replace": 1, "moe_layer_freq": 1, "moe_intermediate_size": width // 2}
        fields |= {"n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4}
        fields |= {"routed_scaling_factor": 1.0}
    if family in ("moe", "v2"):
        fields |= {
            "scoring_func": "softmax",
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "aux_loss_alpha": 1e-2,
        }
    if family in ("v3", "v32"):
        fields |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 4, "topk_group": 2}
        fields |= {"norm_topk_prob": True, "aux_loss_alpha": 1e-4, "num_nextn_predict_layers": 1}
    if family == "v32":
        fields |= {"index_topk": min(2048, context // 4), "index_n_heads": 4, "index_head_dim": head}
    return fields


def fit(family: str, parameters: float, vocabulary: dict, context: int) -> tuple[dict, int]:
    """The fields of the model that is nearest to a size, and how many parameters it has.

    Raises:
        ValueError: no model that this command makes is near.
    """
    found = []
    for width in _widths():
        usual = max(2, round(width / WIDTH_OF_A_LAYER))
        depths = [usual]
        if 0.5 < count_parameters(shape(family, width, usual, vocabulary, context)) / parameters < 2:
            depths = range(max(2, usual * 3 // 4), max(usual + 1, usual * 4 // 3) + 1, max(1, usual // 8))
        for layers in depths:
            fields = shape(family, width, layers, vocabulary, context)
            total = count_parameters(fields)
            # of models about as near, the one of usual proportions
            found.append((abs(math.log(total / parameters)) + 0.1 * abs(math.log(layers / usual)), total, fields))
        if total > 2 * parameters:
            break
    _, total, fields = min(found, key=lambda it: it[0])
    if not 1 / 1.3 < total / parameters < 1.3:
        remedy = "give more, or train a smaller tokenizer" if total > parameters else "give fewer"
        raise ValueError(
            f"--parameters is {parameters:,.0f}; the nearest {family} model with {vocabulary['vocab_size']:,} tokens has {total:,}: {remedy}"
        )
    return fields, total


def _widths() -> list[int]:
    """Widths of whole heads, in steps of an eighth or less where they are large."""
    steps = ((64, 256, 16), (256, 768, 32), (768, 2048, 64), (2048, 16385, 256))
    return [width for first, end, step in steps for width in range(first, end, step)]


def count_parameters(fields: dict) -> int:
    """Parameters of the model, its prediction modules included."""
    config = resolve_config(fields)
    return int(sum(model_parts(config).values(), mtp_part(config)).total)


def read_tokenizer(folder: Path) -> dict:
    """The fields of a config that a tokenizer decides: `vocab_size` and the ids of bos, eos and pad.

    Raises:
        ValueError, OSError: there is no tokenizer, or it has no bos or eos.
    """
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"--tokenizer {folder} has no {name}; make one with tokenization.train_bpe")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings, ids = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")), {}
    for kind in ("bos", "eos", "pad"):
        name = settings.get(f"{kind}_token")
        name = name["content"] if isinstance(name, dict) else name
        ids[f"{kind}_token_id"] = None if name is None else tokenizer.token_to_id(name)
    if None in (ids["bos_token_id"], ids["eos_token_id"]):
        raise ValueError(f"--tokenizer {folder} has no bos or no eos token, which pretraining puts around documents")
    return {"vocab_size": tokenizer.get_vocab_size(), **ids}


def write_config(fields: dict, output: Path) -> None:
    """Write config.json, with the names by which transformers and other engines know such a model."""
    output.mkdir(parents=True, exist_ok=True)
    head = {"architectures": [f"{_ARCHITECTURE_PREFIX[fields['model_type']]}ForCausalLM"], "auto_map": AUTO_MAP}
    write_json(output / "config.json", head | fields | {"dtype": "bfloat16"})


def what_it_takes(
    fields: dict, parameters: int, tokens: float, row: int, batch_rows: int, gpu: str, mfu: str
) -> list[str]:
    """The planner's word on memory and time, in lines."""
    config = resolve_config(fields)
    memory = training_memory(config, 1, 0, batch_rows, row, False)
    flops = (training_flops(config, row) + mtp_flops(config, row)) * tokens
    hours = flops / (GPUS[gpu].bf16_flops * resolve_mfu(mfu)) / 3600
    return [
        f"training memory, {batch_rows} rows of {row:,} tokens at once: {quantity(memory['total'], 'B')}, "
        f"of which {quantity(16 * parameters, 'B')} for weights, gradients and AdamW",
        f"training on {quantity(tokens)} tokens: {flops:.2e} operations, {hours:,.2g} hours of one {gpu.upper()} at "
        f"{resolve_mfu(mfu):.0%} of its peak; on one CPU core {flops / CORE_FLOPS / 3600:,.2g} hours",
    ]


# ---------------------------------------------------------------- command line


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    for name in ("context", "row_tokens", "batch_rows"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if args.gpu not in GPUS:
        raise ValueError(f"--gpu is {args.gpu!r}; it must be one of {', '.join(GPUS)}")
    refuse_existing("--output", [args.output / "config.json"])
    wanted = parse_quantity(args.parameters)
    fields, parameters = fit(args.family, wanted, read_tokenizer(args.tokenizer), args.context)
    tokens = parse_quantity(args.tokens) if args.tokens else TOKENS_PER_PARAMETER * parameters
    lines = what_it_takes(fields, parameters, tokens, args.row_tokens, args.batch_rows, args.gpu, args.mfu)
    write_config(fields, args.output)
    table = 2 * fields["vocab_size"] * fields["hidden_size"]
    print(
        f"{args.output / 'config.json'}: {fields['model_type']}, {parameters:,} parameters, {fields['num_hidden_layers']} layers"
    )
    print(f"of these, {table:,} are the two matrices of the vocabulary of {fields['vocab_size']:,} tokens")
    print("\n".join(lines))
    print(
        f"next: python -m pretrain.train --model {args.output} --tokenizer {args.tokenizer} --data DATA --run-dir RUN --steps N"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
