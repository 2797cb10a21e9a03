"""Measures a checkpoint in bits per byte on held-out text, for each language, and can show continuations.

    python -m pretrain.evaluate . --data runs/data --context-tokens 512 --prompt "It is a truth" --prompt "话说"

    python -m pretrain.evaluate path/to/other-model --data runs/data --data-tokenizer runs/tokenizer

Bits per byte = (sum over tokens of -ln p) / ln 2 / UTF-8 bytes of the documents. Unlike the loss per token it compares
models with different tokenizers. A model whose tokenizer is not the data's reads the same documents in its own tokens;
`--data-tokenizer` names the tokenizer that turns the data back into text. Every token after a document's bos counts, its eos included; with a window of S tokens a
token is predicted from at most S - 1 earlier ones of the same document.

Shapes: B windows, S tokens a window, V vocabulary.
"""

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path

from common.command import Parser, check_early, one_line_errors, run_command
from common.extras import extra
from common.names import check_model_name


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = Parser(prog="python -m pretrain.evaluate", description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="folder with the checkpoint and its tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="folder written by pretrain.data")
    parser.add_argument(
        "--data-tokenizer", type=Path, help="folder of the tokenizer that made --data, if it is not the model's"
    )
    parser.add_argument("--context-tokens", type=int, default=512, help="window length, in tokens (default 512)")
    parser.add_argument("--batch-rows", type=int, default=8, help="windows at once (default 8)")
    parser.add_argument("--max-tokens", type=int, help="held-out tokens a language (default: all)")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; repeatable")
    parser.add_argument("--max-new-tokens", type=int, default=80, help="tokens a continuation (default 80)")
    parser.add_argument("--seed", type=int, default=0, help="sampling seed (default 0)")
    return parser


check_early(__name__, lambda: build_parser().parse_args())

with extra("train"):
    import torch
    import torch.distributed as dist
    from torch import nn
    from tqdm import tqdm
    from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

    from common.loading import load_model, load_tokenizer
    from pretrain.data import (
        IGNORED_LABEL,
        INDEX_NAME,
        HeldOut,
        batch_of,
        load_held_out,
        load_held_out_text,
    )


def bits_per_byte(nll_nats: float, num_bytes: int) -> float:
    """Convert a sum of negative log-likelihoods (natural logarithm) over a text of `num_bytes` UTF-8 bytes."""
    return nll_nats / math.log(2) / num_bytes


@torch.no_grad()
def held_out_nll(
    model: nn.Module, held_out: HeldOut, bos_token_id: int, batch_rows: int, device: torch.device
) -> float:
    """Sum of -ln p over all targets of the held-out windows, in nats.

    Processes of a distributed run share the windows out, and all call the model as often: a sharded one needs that.

    Args:
        model: a causal language model; called with `input_ids` and `position_ids`, [B, S].
        held_out: windows of one language.
        bos_token_id: the id that opens a document; never a target.
        batch_rows: B, windows evaluated at once by a process.
        device: where the model is.
    """
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    window_tokens = held_out.windows.shape[1]
    total = torch.zeros((), dtype=torch.float64)
    for first in range(0, len(held_out.windows), batch_rows * processes):
        start = min(first + rank * batch_rows, len(held_out.windows) - 1)  # who has none left reads one in vain
        batch = batch_of(held_out.windows[start : start + batch_rows].to(device), bos_token_id)
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        if first + rank * batch_rows >= len(held_out.windows):
            continue
        targets = batch["labels"][:, 1:].flatten()  # [B * (S - 1)]
        targets[max(0, held_out.num_targets - start * (window_tokens - 1)) :] = IGNORED_LABEL  # the filling
        # fp32: a bf16 log-softmax is off by more than the differences we want to see.
        total += nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORED_LABEL, reduction="sum"
        ).item()
    if processes > 1:
        total = total.to(device)
        dist.all_reduce(total)
    return total.item()


def evaluate_model(
    model: nn.Module, held_out: dict[str, HeldOut], bos_token_id: int, batch_rows: int, device: torch.device
) -> dict[str, float]:
    """Bits per byte by language; leaves the model in the mode it was in."""
    was_training = model.training
    model.eval()
    result = {
        language: bits_per_byte(held_out_nll(model, text, bos_token_id, batch_rows, device), text.num_bytes)
        for language, text in tqdm(held_out.items(), desc="evaluating", unit="language", leave=False)
    }
    model.train(was_training)
    return result


@torch.no_grad()
def load_and_drafts(
    model: PreTrainedModel, held_out: dict[str, HeldOut], bos_token_id: int, batch_rows: int, device: torch.device
) -> tuple[dict[int, float], float | None]:
    """How evenly experts are visited over all held-out text, and how often the first prediction module guesses right.

    A guess is right if it is the token that the model itself finds most probable there, which is when greedy generation
    accepts a draft. The text is given, not generated.

    Returns:
        visits of the busiest expert over the mean, by number of the layer, prediction modules included, empty without
        experts; and the share of right guesses, None without prediction modules.
    """
    visits, hooks = {}, []
    for index, layer in enumerate(model.model.layers):
        for router in (module for module in layer.modules() if type(module).__name__ == "DeepseekRouter"):

            def count(router, arguments, output, index=index):
                experts = torch.bincount(output[2].flatten(), minlength=output[0].shape[-1])
                visits[index] = visits.get(index, 0) + experts

            hooks.append(router.register_forward_hook(count))
    has_drafts = model.config.num_nextn_predict_layers > 0
    right = total = 0
    for text in held_out.values():
        for windows in text.windows.split(batch_rows):
            batch = batch_of(windows.to(device), bos_token_id)
            places = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
            hidden = model.model(**places, use_cache=False).last_hidden_state  # [B, S, hidden_size]
            if not has_drafts:
                continue
            further = model.model.predict_further(hidden, **places)[0][0]  # [B, S, hidden_size]
            head = model.model.layers[model.config.num_hidden_layers].shared_head
            guesses = model.lm_head(head(further)).argmax(dim=-1)[:, :-2]  # [B, S - 2], of the token two places on
            chosen = model.lm_head(hidden).argmax(dim=-1)[:, 1:-1]
            known = (batch["labels"] != IGNORED_LABEL)[:, 1:].unfold(1, 2, 1).all(dim=-1)  # both in the same document
            right, total = right + ((guesses == chosen) & known).sum().item(), total + known.sum().item()
    for hook in hooks:
        hook.remove()
    loads = {index: (experts.max() / experts.float().mean()).item() for index, experts in visits.items()}
    return loads, right / total if has_drafts else None


@torch.no_grad()
def index_recall(
    model: PreTrainedModel, held_out: dict[str, HeldOut], bos_token_id: int, windows: int, device: torch.device
) -> dict[str, float]:
    """Of the tokens that matter most to dense attention, the share that the indexer selects, by layer.

    What matters most to a query are the `index_topk` tokens with the largest probabilities, summed over the heads, when the
    model attends densely. Counted are queries that see more tokens than that; layers where no query does are absent.

    Args:
        model: a model with an indexer in each layer.
        held_out: windows by language, [N, S].
        bos_token_id: the id that opens a document.
        windows: how many windows of each language to look at, all in one batch.
        device: where the model is.
    """
    layers, topk = model.model.layers[: model.config.num_hidden_layers], model.config.index_topk
    functions = sys.modules[type(layers[0].self_attn.indexer).__module__]  # of the model's own dsa_deepseek.py
    input_ids = torch.cat([text.windows[:windows] for text in held_out.values()]).to(device)  # [B, S]
    length = input_ids.shape[1]
    position_ids = batch_of(input_ids, bos_token_id)["position_ids"]
    visible = functions.find_visible_tokens(None, position_ids, past_length=0, has_cache=False)

    states, true = (
        {},
        {},
    )  # by layer: what its indexer makes of the tokens; slots of the largest probabilities [B, S, n]

    def watch(layer: nn.Module, i: int) -> list:
        def keep_largest(_module, _inputs, output):
            true[i] = output[1].float().sum(dim=1).topk(min(topk, length), dim=-1).indices

        def keep_states(attention, arguments, kwargs):  # dense attention has no need of its indexer
            (hidden_states,) = arguments
            query_latent = attention.query_latent(hidden_states)
            states[i] = attention.indexer(hidden_states, query_latent, kwargs["position_embeddings"])

        attention = layer.self_attn
        before = attention.register_forward_pre_hook(keep_states, with_kwargs=True)
        return [before, attention.register_forward_hook(keep_largest)]

    hooks = [hook for i, layer in enumerate(layers) for hook in watch(layer, i)]
    was_training, implementation = model.training, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("eager")  # the one that returns probabilities
    model.config.index_topk = length  # dense
    try:
        model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    finally:
        model.config.index_topk = topk
        model.set_attn_implementation(implementation)
        model.train(was_training)
        for hook in hooks:
            hook.remove()

    counted = position_ids >= topk  # [B, S]; a document's first topk tokens see no more than topk
    recall = {}
    for i, layer in enumerate(layers if counted.any() else ()):
        chosen = layer.self_attn.indexer.select(states[i], states[i].key, visible, slice(0, length))  # [B, S, n]
        selected = torch.zeros(*chosen.shape[:2], length + 1, dtype=torch.bool, device=device)
        selected.scatter_(-1, chosen.masked_fill(chosen < 0, length), True)
        recall[str(i)] = selected.gather(-1, true[i])[counted].float().mean().item()
    return recall


def check_same_tokenizer(tokenizer_dir: Path, data_dir: Path) -> None:
    """Raise ValueError unless `data_dir` was tokenised with the tokenizer.json of `tokenizer_dir`."""
    expected = json.loads((data_dir / INDEX_NAME).read_text(encoding="utf-8"))["tokenizer_sha256"]
    found = hashlib.sha256((tokenizer_dir / "tokenizer.json").read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(
            f"{tokenizer_dir / 'tokenizer.json'} has sha256 {found}, but {data_dir} was tokenised with {expected}; "
            "use that tokenizer, or run pretrain.data with this one; pretrain.evaluate compares models of different "
            "tokenizers with --data-tokenizer"
        )


def continue_prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, seed: int
) -> str:
    """The prompt with a continuation sampled by the model's own generation_config.json."""
    set_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens)
    return tokenizer.decode(output[0], skip_special_tokens=True)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    check_model_name(args.model, "model")
    check_same_tokenizer(args.data_tokenizer or args.model, args.data)
    tokenizer = load_tokenizer(args.model)
    if args.data_tokenizer is None:
        held_out = load_held_out(args.data, args.context_tokens, args.max_tokens)
    else:
        made_by = AutoTokenizer.from_pretrained(args.data_tokenizer)
        held_out = load_held_out_text(args.data, args.context_tokens, args.max_tokens, made_by, tokenizer)
    model = load_model(args.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    result = evaluate_model(model, held_out, tokenizer.bos_token_id, args.batch_rows, device)
    for language, bits in result.items():
        text = held_out[language]
        print(f"{language}: {bits:.4f} bits per byte over {text.num_bytes} bytes, {text.num_targets} tokens")
    loads, accepted = load_and_drafts(model, held_out, tokenizer.bos_token_id, args.batch_rows, device)
    if loads:
        print("busiest expert over the mean, by layer: " + ", ".join(f"{i}: {load:.2f}" for i, load in loads.items()))
    if accepted is not None:
        print(f"the first prediction module guesses the model's choice {accepted:.1%} of the time")
    for prompt in args.prompt:
        print("----\n" + continue_prompt(model, tokenizer, prompt, args.max_new_tokens, args.seed))
    print(f"next: python chat.py --model {args.model}, or python -m tools.publish {args.model} --dry-run")
    return 0


if __name__ == "__main__":
    run_command(main)
