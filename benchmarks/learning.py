"""Do sparse attentions learn what dense attention learns? Small models from nothing, on the same data and steps.

    python -m benchmarks.learning passkey --data runs/data    # finding passkeys far outside the window
    python -m benchmarks.learning choices --data runs/data    # what the NSA paper leaves open
    python -m benchmarks.learning text    --data runs/data    # NSA, full attention and a window alone on real text
    python -m benchmarks.learning upcycle --data runs/data    # the full models turned into NSA; on text, trained on
    python -m benchmarks.learning dsa     --data runs/data    # MLA, an indexer added, both stages of its training

DATA is a folder written by `python -m pretrain.data`; its languages get equal shares of the rows. Each finished
training is kept in --work and not repeated, so that a stopped run goes on. Writes runs/benchmarks/learning_NAME.json
and .png. The sizes are such that selection selects: a query at the end of a row reads at most 80 of 1,024 tokens, besides the
compressed entries.

"nsa_fine" is "nsa" with compressed blocks of 4 every 2 tokens, rather than of 8 every 4. "full" and "window" are one
grouped-query model; "window" has a mask that hides all but the last `nsa_window_size` tokens in every layer. NSA has its
widths, and more parameters: keys and values of three branches, compressors, gates.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from tqdm import trange
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common import RESULTS, ROOT, write_results
from benchmarks.recall import RecallBatch, hide_passkeys, recall_vocab_size, room_for_passkeys
from common.command import run_command
from common.machine import describe_machine
from pretrain.data import INDEX_NAME, PretrainingData, batch_of, load_held_out
from tools import add_indexer, upcycle_nsa

NSA_SIZES = {
    "nsa_compress_block_size": 8,
    "nsa_compress_stride": 4,
    "nsa_select_block_size": 8,
    "nsa_num_select_blocks": 8,
    "nsa_num_init_blocks": 1,
    "nsa_num_local_blocks": 2,
    "nsa_window_size": 16,
}
FINE = {"nsa_compress_block_size": 4, "nsa_compress_stride": 2}  # then a passkey fills a compressed block
WINDOW, LAYERS = NSA_SIZES["nsa_window_size"], 2
REACH = LAYERS * (WINDOW - 1)  # tokens back from which anything can come through windows alone
GQA = {
    "architectures": ["DeepseekForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},  # rows of 1,024 tokens after rows of 64
}
KINDS = {
    "full": GQA | {"model_type": "llama"},
    "nsa": GQA | {"model_type": "deepseek_nsa"} | NSA_SIZES,
    "nsa_fine": GQA | {"model_type": "deepseek_nsa"} | NSA_SIZES | FINE,
    "window": GQA | {"model_type": "llama"},
    "mla": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 48,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": None,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 2048,
        "rope_parameters": GQA["rope_parameters"],
    },
}
TEXT_TOKENS, TEXT_ROWS, HELD_OUT_TOKENS = 1024, 2, 16384  # of a row, rows of a batch, held-out tokens of each language
NUM_PASSKEYS, PASSKEY_TOKENS = 6, 4
# tokens of a row, rows of a batch, steps
LONG_STAGES = ((64, 32, 150), (128, 16, 100), (256, 8, 100), (512, 4, 100), (1024, 2, 100))
SHORT_STAGES = ((64, 32, 80),)
PASSKEY_LENGTHS, PASSKEY_ROWS, DEPTHS = (128, 256, 512, 1024), 32, 8  # of the last measurement; depths are eighths
COLOURS = {"full": "C0", "nsa": "C2", "nsa_fine": "C4", "window": "C3"}


# ---------------------------------------------------------------------------------------------------------------
# Models and their training
# ---------------------------------------------------------------------------------------------------------------


def make_model(folder: Path, kind: str, seed: int, **overrides):
    """A float32 model with random weights in training mode, from code in a folder of its own, so that it can be changed.

    Weights have a standard deviation of 0.1, not 0.02: at width 64 the latter leaves attention flat for hundreds of
    steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in ROOT.glob("*_deepseek.py"):
        shutil.copy(file, folder)
    auto_map = json.loads((ROOT / "config.json").read_text())["auto_map"]
    config = KINDS[kind] | {"initializer_range": 0.1, "auto_map": auto_map} | overrides
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32).train()


def window_mask(position_ids: torch.Tensor, window: int) -> torch.Tensor:
    """bool [B, 1, S, S], true where a query sees a key: of its document, not after it, less than `window` before it."""
    slots = torch.arange(position_ids.shape[1])
    age = slots[:, None] - slots  # [S, S], tokens from key to query
    return ((age >= 0) & (age < window) & (age <= position_ids[..., None]))[:, None]


def extra_inputs(kind: str, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> dict:
    """What the forward of a kind needs besides ids and positions."""
    if kind != "window":
        return {}
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    return {"attention_mask": window_mask(position_ids, WINDOW)}


def train(
    model,
    steps: int,
    learning_rate: float,
    loss_of: Callable[[int], torch.Tensor],
    measure: Callable[[], dict],
    every: int,
    title: str,
    warmup: int = 20,
) -> list[dict]:
    """AdamW with a linear warm-up and, in the second half, a linear decay; a curve of what `measure` says every few steps.

    Args:
        loss_of: step (from 0) -> the loss of its batch.
        measure: numbers of the model as it is; called before the first step and after every `every`-th.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    curve = [{"step": 0} | measure()]
    for step in (bar := trange(steps, desc=title, mininterval=10)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / warmup) * min(1.0, 2.0 - 1.8 * step / steps)
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % every == 0 or step + 1 == steps:
            curve.append({"step": step + 1, "train_loss": round(loss.item(), 4)} | measure())
            bar.set_postfix(curve[-1])
    return curve


def kept(work: Path, name: str, options: dict, run: Callable[[], dict]) -> dict:
    """The result of `run`, from --work if it was made there with the same options."""
    path = work / f"{name}.json"
    if path.exists():
        stored = json.loads(path.read_text())
        if stored["options"] == json.loads(json.dumps(options)):
            return stored["result"]
    result = run()
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"options": options, "result": result}))
    part.rename(path)
    return result


# ---------------------------------------------------------------------------------------------------------------
# Real text
# ---------------------------------------------------------------------------------------------------------------


def read_index(data: Path) -> dict:
    """The dataset's index.json; languages are mixed evenly."""
    return json.loads((data / INDEX_NAME).read_text(encoding="utf-8"))


def describe_data(data: Path) -> dict:
    """What the models were trained on, for the head of a result file."""
    index = read_index(data)
    sizes = {
        name: {split: entry[split]["tokens"] for split in ("train", "held_out")} for name, entry in languages(index)
    }
    return {"tokens": sizes, "vocab_size": index["vocab_size"], "tokenizer_sha256": index["tokenizer_sha256"]}


def languages(index: dict) -> Iterable[tuple[str, dict]]:
    return index["languages"].items()


def open_rows(data: Path, row_tokens: int, batch_rows: int, seed: int) -> PretrainingData:
    mix = {name: 1.0 for name, _ in languages(read_index(data))}
    return PretrainingData(data, row_tokens, batch_rows, mix, seed)


def held_out_windows(data: Path, row_tokens: int, tokens: int) -> torch.Tensor:
    """Whole windows of each language's held-out text, int64 [windows, S]."""
    held_out = load_held_out(data, row_tokens, max_tokens=tokens).values()
    return torch.cat([part.windows[:-1][: tokens // row_tokens] for part in held_out])


def text_inputs(kind: str, input_ids: torch.Tensor, bos_token_id: int) -> dict:
    inputs = batch_of(input_ids, bos_token_id)
    return inputs | extra_inputs(kind, input_ids, inputs["position_ids"])


@torch.no_grad()
def text_loss(model, kind: str, windows: torch.Tensor, bos_token_id: int) -> dict:
    """Mean cross entropy of held-out windows, nats a token."""
    model.eval()
    losses = [model(**text_inputs(kind, rows, bos_token_id), use_cache=False).loss for rows in windows.split(4)]
    model.train()
    return {"held_out_loss": round(torch.stack(losses).mean().item(), 4)}


def train_on_text(
    model,
    kind: str,
    data: Path,
    seed: int,
    steps: int,
    title: str,
    first_step: int = 0,
    learning_rate: float = 3e-3,
    every: int = 50,
) -> list[dict]:
    """-> curve of the held-out loss, measured after every `every`-th step; the rows begin with those of `first_step`"""
    rows = open_rows(data, TEXT_TOKENS, TEXT_ROWS, seed)
    windows = held_out_windows(data, TEXT_TOKENS, HELD_OUT_TOKENS)
    return train(
        model,
        steps,
        learning_rate,
        lambda step: model(**text_inputs(kind, rows.batch(first_step + step), rows.bos_token_id)).lm_loss,
        lambda: text_loss(model, kind, windows, rows.bos_token_id),
        every,
        title,
    )


def text_run(arguments, kind: str, seed: int) -> dict:
    """One training on text -> its curve and its number of parameters; the weights are kept too."""

    def run() -> dict:
        vocab_size = read_index(arguments.data)["vocab_size"]
        model = make_model(arguments.work / "code" / f"text_{kind}_{seed}", kind, seed, vocab_size=vocab_size)
        curve = train_on_text(model, kind, arguments.data, seed, arguments.steps, f"text {kind} {seed}")
        model.save_pretrained(arguments.work / f"text_{kind}_{seed}")
        return {"parameters": sum(parameter.numel() for parameter in model.parameters()), "curve": curve}

    options = {"steps": arguments.steps, "data": describe_data(arguments.data), "config": KINDS[kind]}
    return kept(arguments.work, f"text_{kind}_{seed}", options, run)


def text(arguments) -> dict:
    runs = {
        kind: [text_run(arguments, kind, seed) for seed in range(arguments.seeds)]
        for kind in ("full", "nsa", "window")
    }
    final = {kind: [run["curve"][-1]["held_out_loss"] for run in by_seed] for kind, by_seed in runs.items()}
    ratios = {
        kind: [round(loss / full, 4) for loss, full in zip(final[kind], final["full"], strict=True)]
        for kind in ("nsa", "window")
    }
    figure, axes = new_figure(1, 1)
    for kind, by_seed in runs.items():
        plot_seeds(axes, by_seed, "held_out_loss", color=COLOURS[kind], label=kind)
    axes.set(xlabel="step", ylabel="held-out loss, nats a token", ylim=(None, 8))
    axes.legend()
    return finish("text", arguments, figure, {"final_loss": final, "loss_over_full": ratios, "runs": runs})


# ---------------------------------------------------------------------------------------------------------------
# Passkeys
# ---------------------------------------------------------------------------------------------------------------


def passkey_logits(model, kind: str, batch: RecallBatch) -> torch.Tensor:
    """[B, P, vocab_size], at the questions"""
    extra = extra_inputs(kind, batch.input_ids)
    return model(input_ids=batch.input_ids, logits_to_keep=batch.asked_at, use_cache=False, **extra).logits


def passkey_loss(model, kind: str, batch: RecallBatch) -> torch.Tensor:
    return F.cross_entropy(passkey_logits(model, kind, batch).flatten(0, 1), batch.answers.flatten())


@torch.no_grad()
def passkey_hits(model, kind: str, batch: RecallBatch) -> torch.Tensor:
    """bool [B, P]: is the answer the likeliest of all tokens?"""
    model.eval()
    hits = passkey_logits(model, kind, batch).argmax(dim=-1) == batch.answers
    model.train()
    return hits


def passkey_eval_batch(data: Path, length: int, rows: int) -> RecallBatch:
    """Held-out rows, the same for every model."""
    vocab_size = read_index(data)["vocab_size"]
    windows = held_out_windows(data, length, 32 * length)
    picked = torch.randperm(len(windows), generator=torch.Generator().manual_seed(1))[:rows]
    generator = torch.Generator().manual_seed(2)
    return hide_passkeys(windows[picked], vocab_size, NUM_PASSKEYS, PASSKEY_TOKENS, REACH, generator)


def accuracy_by_depth(hits: torch.Tensor, batch: RecallBatch) -> list[float | None]:
    """Share of right answers in each of DEPTHS equal parts of the text in which passkeys may stand."""
    depth = batch.found_at * DEPTHS // room_for_passkeys(batch.input_ids.shape[1], NUM_PASSKEYS, REACH)
    return [
        round(hits[depth == part].float().mean().item(), 4) if (depth == part).any() else None
        for part in range(DEPTHS)
    ]


def attentions(model) -> list[nn.Module]:
    return [layer.self_attn for layer in model.model.layers]


def nsa_module(model):
    """The model's own copy of nsa_deepseek.py."""
    return sys.modules[type(attentions(model)[0]).__module__]


@contextmanager
def chosen_blocks(model) -> Iterator[list[torch.Tensor]]:
    """A list that gets the selected blocks of each layer of a forward pass, int64 [B * K, S, num_select]."""
    module, seen = nsa_module(model), []
    branches = module._PYTORCH

    def attend_selected(query, key, value, blocks, *rest):
        seen.append(blocks)
        return branches[1](query, key, value, blocks, *rest)

    module._PYTORCH = branches[0], attend_selected, branches[2]
    try:
        yield seen
    finally:
        module._PYTORCH = branches


def measure_passkeys(model, kind: str, batch: RecallBatch) -> tuple[dict, torch.Tensor]:
    """-> accuracy, and for NSA the share of questions for which a layer selects the block in which their passkey begins;
    and the right answers, bool [B, P]"""
    hits, found = [], []
    for rows in range(0, len(batch.input_ids), 8):
        part = RecallBatch(*(x if x is batch.asked_at else x[rows : rows + 8] for x in batch))
        if not kind.startswith("nsa"):
            hits.append(passkey_hits(model, kind, part))
            continue
        with chosen_blocks(model) as layers:
            hits.append(passkey_hits(model, kind, part))
        block = (part.found_at // NSA_SIZES["nsa_select_block_size"])[..., None]  # [B, P, 1]
        found.append(torch.stack([(layer[:, part.asked_at] == block).any(dim=-1) for layer in layers]).any(dim=0))
    numbers = {"accuracy": hits} | ({"selected": found} if found else {})
    return {name: round(torch.cat(x).float().mean().item(), 4) for name, x in numbers.items()}, torch.cat(hits)


def train_on_passkeys(model, kind: str, data: Path, seed: int, stages, title: str) -> list[dict]:
    """-> curve of the accuracy at the longest length, and for NSA of the share of passkeys that are selected"""
    vocab_size, generator = read_index(data)["vocab_size"], torch.Generator().manual_seed(seed)
    schedule = [(length, rows) for length, rows, steps in stages for _ in range(steps)]
    sources = {length: open_rows(data, length, rows, seed) for length, rows, _ in stages}
    longest = passkey_eval_batch(data, PASSKEY_LENGTHS[-1], 16)

    def loss_of(step: int) -> torch.Tensor:
        rows = sources[schedule[step][0]].batch(step)
        batch = hide_passkeys(rows, vocab_size, NUM_PASSKEYS, PASSKEY_TOKENS, REACH, generator)
        return passkey_loss(model, kind, batch)

    return train(model, len(schedule), 6e-3, loss_of, lambda: measure_passkeys(model, kind, longest)[0], 25, title)


def passkey_run(
    arguments,
    kind: str,
    seed: int,
    stages=LONG_STAGES,
    change: Callable | None = None,
    name: str = "passkey",
) -> dict:
    """One training on passkeys -> its curve, and accuracy by length and depth at its end.

    The weights are kept too, unless `change` made another model of it.
    """

    def run() -> dict:
        vocab_size = recall_vocab_size(read_index(arguments.data)["vocab_size"])
        model = make_model(arguments.work / "code" / f"{name}_{kind}_{seed}", kind, seed, vocab_size=vocab_size)
        if change is not None:
            change(model)
        title = f"{name} {kind} {seed}"
        curve = train_on_passkeys(model, kind, arguments.data, seed, stages, title)
        by_length = {}
        for length in PASSKEY_LENGTHS:
            batch = passkey_eval_batch(arguments.data, length, PASSKEY_ROWS)
            numbers, hits = measure_passkeys(model, kind, batch)
            by_length[str(length)] = numbers | {"by_depth": accuracy_by_depth(hits, batch)}
        if change is None:
            model.save_pretrained(arguments.work / f"{name}_{kind}_{seed}")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return {"parameters": parameters, "curve": curve, "by_length": by_length}

    options = {"stages": stages, "data": describe_data(arguments.data), "config": KINDS[kind]}
    return kept(arguments.work, f"{name}_{kind}_{seed}", options | {"passkey_tokens": PASSKEY_TOKENS}, run)


def at_length(runs: list[dict], length: int, field: str = "accuracy") -> list[float]:
    """One number of each seed."""
    return [run["by_length"][str(length)][field] for run in runs]


def passkey(arguments) -> dict:
    kinds, longest = ("full", "nsa_fine", "nsa", "window"), PASSKEY_LENGTHS[-1]
    runs = {kind: [passkey_run(arguments, kind, seed) for seed in range(arguments.seeds)] for kind in kinds}
    figure, axes = new_figure(1, 5, width=15, ratios=(1.8, 1, 1, 1, 1))
    for kind, by_seed in runs.items():
        plot_seeds(axes[0], by_seed, "accuracy", color=COLOURS[kind], label=kind)
    for end in torch.tensor([steps for *_, steps in LONG_STAGES]).cumsum(0)[:-1].tolist():
        axes[0].axvline(end, color="0.8", lw=0.8)
    axes[0].set(xlabel="step", ylabel=f"accuracy at {longest} tokens", ylim=(-0.02, 1.02))
    axes[0].legend(loc="lower right", bbox_to_anchor=(1, 0.18), fontsize=8)
    for axis, kind in zip(axes[1:], kinds, strict=True):
        by_length = runs[kind][0]["by_length"]
        grid = [[float("nan") if x is None else x for x in entry["by_depth"]] for entry in by_length.values()]
        axis.imshow(torch.tensor(grid).T.numpy(), vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(grid)), list(by_length))
        axis.set_yticks((0, DEPTHS - 1), ("first", "last"))
        for i, column in enumerate(grid):
            for j, value in enumerate(column):
                axis.text(i, j, f"{value:.2f}", ha="center", va="center", fontsize=7)
        axis.set(xlabel="tokens in the row", title=f"{kind}, seed 0")
        axis.grid(False)
    axes[1].set_ylabel("place of the passkey")
    final = {
        kind: {length: at_length(by_seed, length) for length in by_seed[0]["by_length"]}
        for kind, by_seed in runs.items()
    }
    selected = {
        kind: {length: at_length(runs[kind], length, "selected") for length in final[kind]}
        for kind in ("nsa_fine", "nsa")
    }
    results = {
        "final_accuracy": final,
        "selected": selected,
        "fine": FINE,
        "reach_of_windows": REACH,
        "stages": LONG_STAGES,
    }
    return finish("passkey", arguments, figure, results | {"passkey_tokens": PASSKEY_TOKENS, "runs": runs})


# ---------------------------------------------------------------------------------------------------------------
# What the paper leaves open
# ---------------------------------------------------------------------------------------------------------------


def start_at_mean(model):
    """W_2 = 0: phi is the mean at first, as in a converted model."""
    for attention in attentions(model):
        for compressor in (attention.compress_key, attention.compress_value):
            nn.init.zeros_(compressor.down_proj.weight)


def compress_by_mean(model):
    """phi is the mean of a block."""
    for attention in attentions(model):
        for compressor in (attention.compress_key, attention.compress_value):
            compressor.forward = lambda x, c=compressor: x.unfold(-2, c.block, c.stride).mean(dim=-1)


def compress_by_mlp(model):
    """phi is the MLP without the mean, with weights of size 1 / sqrt(inputs) to make up for it."""

    def forward(x: torch.Tensor, compressor: nn.Module) -> torch.Tensor:
        blocks = x.unfold(-2, compressor.block, compressor.stride).transpose(-1, -2)
        return compressor.down_proj(F.silu(compressor.up_proj((blocks + compressor.position).flatten(-2))))

    for attention in attentions(model):
        for compressor in (attention.compress_key, attention.compress_value):
            for linear in (compressor.up_proj, compressor.down_proj):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            compressor.forward = partial(forward, compressor=compressor)


def rotate_compressed_branch(model, keys_too: bool):
    """Queries of the compressed branch are rotated; keys as well, by the position of their block's first token."""
    module, rotary = nsa_module(model), model.model.rotary_emb
    attend, *others = module._PYTORCH

    def rotate(states: torch.Tensor, first: int, stride: int) -> torch.Tensor:
        """[N, S, G, D], at the positions first, first + stride, ..."""
        cos, sin = rotary(states, first + stride * torch.arange(states.shape[1])[None])  # [1, S, D/2]
        return module.apply_rotary(states.transpose(1, 2), cos, sin, layout="half").transpose(1, 2)

    def rotated(query, key, value, scaling, first_position, sizes):
        query = rotate(query, first_position, 1)
        if keys_too:
            key = rotate(key[:, :, None], 0, sizes.stride)[:, :, 0]
        return attend(query, key, value, scaling, first_position, sizes)

    module._PYTORCH = rotated, *others
    return rotate


def rotate_before_compressing(model):
    """Compressed keys are made of rotated keys."""
    rotate = rotate_compressed_branch(model, keys_too=False)
    for attention in attentions(model):
        compress = attention._compress
        attention._compress = lambda key, value, compress=compress: compress(
            rotate(key.transpose(1, 2), 0, 1).transpose(1, 2), value
        )


def rotate_after_compressing(model):
    """Compressed keys are rotated by the position of their block's first token."""
    rotate_compressed_branch(model, keys_too=True)


class SharedGate(nn.Module):
    """One gate for each branch, the same for all heads."""

    def __init__(self, gate: nn.Linear):
        super().__init__()
        self.linear, self.heads = nn.Linear(gate.in_features, 3), gate.out_features // 3
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden_states).repeat(1, 1, self.heads)


def share_gates(model):
    for attention in attentions(model):
        attention.branch_gate = SharedGate(attention.branch_gate)


def branch_projections(model) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Each attention, the name of a projection of the selected or the window branch, and the compressed branch's twin."""
    for attention in attentions(model):
        for part in ("k_proj", "v_proj"):
            for branch in ("select", "window"):
                yield attention, f"{branch}_{part}", getattr(attention, f"compress_{part}")


def share_keys_and_values(model):
    """One projection for keys and one for values of all branches."""
    for attention, name, projection in branch_projections(model):
        setattr(attention, name, projection)


def start_with_equal_keys_and_values(model):
    """The branches have projections of their own, which are the same at first."""
    for attention, name, projection in branch_projections(model):
        getattr(attention, name).load_state_dict(projection.state_dict())


CHOICES = {
    "as_is": None,
    "zero_start": start_at_mean,
    "mean": compress_by_mean,
    "mlp": compress_by_mlp,
    "rotate_first": rotate_before_compressing,
    "rotate_after": rotate_after_compressing,
    "shared_gates": share_gates,
    "shared_kv": share_keys_and_values,
    "equal_kv": start_with_equal_keys_and_values,
}
CHOICE_LABELS = {
    "as_is": "as it is: mean + MLP, no rotation, gates by head, own K and V",
    "zero_start": "compressor: mean + MLP that begins at 0",
    "mean": "compressor: mean only",
    "mlp": "compressor: MLP only",
    "rotate_first": "keys rotated before compressing",
    "rotate_after": "keys rotated after compressing",
    "shared_gates": "gates shared by the heads",
    "shared_kv": "keys and values shared by the branches",
    "equal_kv": "keys and values of the branches equal at first",
}


COARSE_CHOICES = ("as_is", "equal_kv", "shared_kv")  # those that are also compared with blocks longer than a passkey


def choices(arguments) -> dict:
    table, runs, longest = {}, {}, PASSKEY_LENGTHS[-1]
    figure, axes = new_figure(1, 2, width=15)
    for place, (name, change) in enumerate(CHOICES.items()):
        options = {"stages": SHORT_STAGES, "change": change, "name": f"choice_{name}"}
        runs[name] = [passkey_run(arguments, "nsa_fine", seed, **options) for seed in range(arguments.seeds)]
        table[name] = {"what": CHOICE_LABELS[name], "parameters": runs[name][0]["parameters"]} | {
            field: {length: at_length(runs[name], length, field) for length in (PASSKEY_LENGTHS[0], longest)}
            for field in ("accuracy", "selected")
        }
        style = {"color": f"C{place}", "label": CHOICE_LABELS[name], "lw": 2.5 if change is None else 1.2}
        plot_seeds(axes[0], runs[name], "accuracy", **style)
        plot_seeds(axes[1], runs[name], "selected", **style)
    axes[0].set(xlabel="step", ylabel=f"passkey accuracy at {longest} tokens", ylim=(-0.02, 1.02))
    axes[1].set(xlabel="step", ylabel="passkeys in selected blocks", ylim=(-0.02, 1.02))
    axes[1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8)
    coarse = {}
    for name in COARSE_CHOICES:
        options = {"name": "passkey" if CHOICES[name] is None else f"coarse_{name}", "change": CHOICES[name]}
        by_seed = [passkey_run(arguments, "nsa", seed, **options) for seed in range(arguments.seeds)]
        coarse[name] = {length: at_length(by_seed, length) for length in PASSKEY_LENGTHS}
        runs[f"coarse_{name}"] = by_seed
    results = {"table": table, "stages": SHORT_STAGES, "coarse": coarse, "coarse_stages": LONG_STAGES, "runs": runs}
    return finish("choices", arguments, figure, results)


# ---------------------------------------------------------------------------------------------------------------
# A dense checkpoint becomes a sparse one
# ---------------------------------------------------------------------------------------------------------------


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).train()


def convert(tool, source: Path, output: Path, sizes: dict[str, int]) -> Path:
    """Runs a tool of tools/ by its command line."""
    shutil.rmtree(output, ignore_errors=True)
    flags = [f"--{name.removeprefix('nsa_').replace('_', '-')}={size}" for name, size in sizes.items()]
    if tool.main([str(source), str(output), *flags]):
        raise RuntimeError(f"{tool.__name__} failed on {source}")
    return output


def converted_passkeys(arguments) -> dict:
    """Accuracy of `passkey`'s full models by length, one number a seed: as they are, with a window's mask, and turned
    into NSA, all without further training."""
    accuracy = {kind: {length: [] for length in PASSKEY_LENGTHS} for kind in ("full", "window", "nsa_fine", "nsa")}
    for seed in range(arguments.seeds):
        passkey_run(arguments, "full", seed)
        source = arguments.work / f"passkey_full_{seed}"
        for kind, by_length in accuracy.items():
            folder = source
            if kind.startswith("nsa"):
                sizes = {name: KINDS[kind][name] for name in NSA_SIZES}
                folder = convert(upcycle_nsa, source, arguments.work / "upcycled_passkeys", sizes)
            model = load(folder)
            for length, numbers in by_length.items():
                batch = passkey_eval_batch(arguments.data, length, PASSKEY_ROWS)
                numbers.append(measure_passkeys(model, kind, batch)[0]["accuracy"])
    return accuracy


def upcycle(arguments) -> dict:
    dense = text_run(arguments, "full", 0)["curve"]
    source, steps = arguments.work / "text_full_0", arguments.continued_steps

    def run(kind: str) -> dict:
        folder = source
        if kind == "nsa":
            folder = convert(upcycle_nsa, source, arguments.work / "upcycled", NSA_SIZES)
        # other rows than before, at the rate at which the dense run ended
        options = {"first_step": arguments.steps, "learning_rate": 6e-4, "every": 10}
        title = f"upcycle {kind}"
        return {"curve": train_on_text(load(folder), kind, arguments.data, 0, steps, title, **options)}

    options = {"steps": arguments.steps, "continued": steps, "data": describe_data(arguments.data), "config": GQA}
    runs = {kind: kept(arguments.work, f"upcycle_{kind}", options, partial(run, kind)) for kind in ("full", "nsa")}
    curves = {kind: run["curve"] for kind, run in runs.items()}
    scratch = text_run(arguments, "nsa", 0)["curve"]
    figure, axes = new_figure(1, 1)
    plot_curve(axes, dense, "held_out_loss", color=COLOURS["full"], label="full, from nothing")
    plot_curve(axes, scratch, "held_out_loss", color=COLOURS["nsa"], ls=":", label="nsa, from nothing")
    for kind, label in (("full", "full, continued"), ("nsa", "converted to nsa, continued")):
        moved = [point | {"step": point["step"] + arguments.steps} for point in curves[kind]]
        plot_curve(axes, moved, "held_out_loss", color=COLOURS[kind], lw=2, marker=".", label=label)
    axes.axvline(arguments.steps, color="0.8", lw=0.8)
    low = min(point["held_out_loss"] for point in curves["full"])
    axes.set(xlabel="step", ylabel="held-out loss, nats a token", ylim=(low - 0.1, low + 1.5))
    axes.legend()
    results = {
        "dense": curves["full"][0]["held_out_loss"],
        "converted": curves["nsa"][0]["held_out_loss"],
        "dense_continued": curves["full"][-1]["held_out_loss"],
        "converted_continued": curves["nsa"][-1]["held_out_loss"],
        "passkeys_without_training": converted_passkeys(arguments),
        "runs": curves,
    }
    return finish("upcycle", arguments, figure, results)


# ---------------------------------------------------------------------------------------------------------------
# DeepSeek sparse attention
# ---------------------------------------------------------------------------------------------------------------

INDEXER_SIZES = {"index_topk": 64, "index_n_heads": 4, "index_head_dim": 32}
DSA_TOKENS, DSA_ROWS = 512, 4  # of the indexer's stages
DSA_STAGES = ((128, 16, 120), (256, 8, 60), (DSA_TOKENS, DSA_ROWS, 50))  # of the dense model


@torch.no_grad()
def indexer_recall(model, batch: RecallBatch) -> dict:
    """How many of the tokens with the most attention the indexer finds, mean over layers and over queries that have
    more than `index_topk` tokens to choose from; and the share of the attention that lies on what it finds.

    Attention is that of the model without selection: as many tokens are allowed as there are.
    """
    topk, states = model.config.index_topk, []
    indexers = [layer.self_attn.indexer for layer in model.model.layers]
    hooks = [indexer.register_forward_hook(lambda _, __, output: states.append(output)) for indexer in indexers]
    attention = model.config._attn_implementation
    model.eval()
    model.config.index_topk, model.config._attn_implementation = batch.input_ids.shape[1], "eager"
    try:
        maps = model(input_ids=batch.input_ids, output_attentions=True, use_cache=False).attentions
    finally:
        model.config.index_topk, model.config._attn_implementation = topk, attention
        for hook in hooks:
            hook.remove()
        model.train()
    found, covered = [], []
    for probs, (query, weights, key) in zip(maps, states, strict=True):
        total = probs.mean(dim=1)  # [B, S, T]
        scores = torch.einsum("bshd,btd->bsht", query, key).relu().mul(weights[..., None]).sum(dim=2)  # [B, S, T]
        hidden = torch.ones(total.shape[1:], dtype=torch.bool).triu(1)
        chosen = scores.masked_fill(hidden, float("-inf")).topk(topk).indices[:, topk:]  # [B, S - topk, topk]
        best = torch.zeros_like(total).scatter_(2, total.masked_fill(hidden, -1.0).topk(topk).indices, 1.0)[:, topk:]
        found.append(best.gather(2, chosen).mean().item())
        covered.append(total[:, topk:].gather(2, chosen).sum(dim=-1).mean().item())
    return {"recall": round(sum(found) / LAYERS, 4), "attention_covered": round(sum(covered) / LAYERS, 4)}


def dsa(arguments) -> dict:
    vocab_size = read_index(arguments.data)["vocab_size"]
    dense_run = passkey_run(arguments, "mla", 0, stages=DSA_STAGES, name="dsa_source")
    source = arguments.work / "dsa_source_mla_0"
    rows = open_rows(arguments.data, DSA_TOKENS, DSA_ROWS, seed=1)
    batch = passkey_eval_batch(arguments.data, DSA_TOKENS, 8)

    steps = arguments.indexer_steps

    def continue_training(model, rate: float, title: str, indexed: bool = True, first: int = 0) -> list[dict]:
        generator = torch.Generator().manual_seed(3 + first)
        index_losses = []

        def loss_of(step: int) -> torch.Tensor:
            train_batch = hide_passkeys(
                rows.batch(first + step), vocab_size, NUM_PASSKEYS, PASSKEY_TOKENS, REACH, generator
            )
            output = model.model(input_ids=train_batch.input_ids, use_cache=False)
            logits = model.lm_head(output.last_hidden_state[:, train_batch.asked_at])
            loss = F.cross_entropy(logits.flatten(0, 1), train_batch.answers.flatten())
            if not indexed:
                return loss
            index_losses.append(output.index_loss.item() / LAYERS)
            return loss + output.index_loss

        def measure() -> dict:
            model.eval()
            with torch.no_grad():
                loss = passkey_loss(model, "mla", batch).item()
            hits = passkey_hits(model, "mla", batch)
            point = {"loss": round(loss, 4), "accuracy": round(hits.float().mean().item(), 4)}
            if indexed:
                sparse, model.config.index_warmup = model.config.index_warmup, False
                point |= indexer_recall(model, batch)
                model.config.index_warmup = sparse
            if index_losses:
                point["index_loss"] = round(sum(index_losses[-10:]) / len(index_losses[-10:]), 4)
            return point

        return train(model, steps, rate, loss_of, measure, 10, title, warmup=5)

    def run() -> dict:
        folder = convert(add_indexer, source, arguments.work / "indexed", INDEXER_SIZES)
        model = load(folder)
        model.config.index_warmup = True
        model.requires_grad_(False)
        for layer in model.model.layers:
            layer.self_attn.indexer.requires_grad_(True)
        warmup = continue_training(model, 5e-3, "dsa, warm-up")
        model.config.index_warmup = False
        model.requires_grad_(True)
        sparse = continue_training(model, 1e-3, "dsa, sparse", first=steps)
        control = continue_training(load(source), 1e-3, "dsa, dense", indexed=False, first=steps)
        return {"warmup": warmup, "sparse": sparse, "dense": control}

    options = {"stages": DSA_STAGES, "steps": steps, "config": KINDS["mla"] | INDEXER_SIZES}
    runs = kept(arguments.work, "dsa", options, run)
    figure, axes = new_figure(1, 3, width=13)
    for stage, colour in (("warmup", "C1"), ("sparse", "C2"), ("dense", "C0")):
        moved = [point | {"step": point["step"] + (0 if stage == "warmup" else steps)} for point in runs[stage]]
        label = {"warmup": "warm-up", "sparse": "sparse", "dense": "dense MLA"}[stage]
        if stage != "dense":
            plot_curve(axes[0], moved, "recall", color=colour, label=f"{label}: true top-k found")
            plot_curve(axes[0], moved, "attention_covered", color=colour, ls="--", label=f"{label}: attention covered")
            plot_curve(axes[1], moved, "index_loss", color=colour, label=label)
        plot_curve(axes[2], moved, "accuracy", color=colour, label=label)
    axes[0].set(xlabel="step", ylabel="indexer", ylim=(0, 1.02))
    axes[1].set(xlabel="step", ylabel="KL of a layer, nats", yscale="log")
    axes[2].set(xlabel="step", ylabel=f"passkey accuracy, {INDEXER_SIZES['index_topk']} of {DSA_TOKENS} tokens read")
    axes[2].set_ylim(-0.02, 1.02)
    axes[0].legend(fontsize=8)
    axes[1].legend()
    axes[2].legend()
    final = {stage: curve[-1] for stage, curve in runs.items()}
    results = {"start": runs["warmup"][0], "final": final, "dense_run": dense_run, "runs": runs}
    return finish("dsa", arguments, figure, results)


# ---------------------------------------------------------------------------------------------------------------
# Files, pictures, command line
# ---------------------------------------------------------------------------------------------------------------


def new_figure(rows: int, columns: int, width: float = 6.5, ratios=None):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=(width, 3.8), width_ratios=ratios)
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    return figure, axes


def plot_curve(axes, curve: list[dict], field: str, **style):
    points = [point for point in curve if field in point]
    axes.plot([point["step"] for point in points], [point[field] for point in points], **style)


def plot_seeds(axes, runs: list[dict], field: str, label: str, **style):
    """One line for each seed, of its own dash."""
    for seed, run in enumerate(runs):
        plot_curve(
            axes, run["curve"], field, label=label if seed == 0 else None, ls=("-", "--", ":")[seed % 3], **style
        )


def finish(name: str, arguments, figure, results: dict) -> dict:
    """Writes the result file and the picture."""
    head = {"machine": describe_machine(), "data": describe_data(arguments.data), "kinds": KINDS}
    write_results(f"learning_{name}", head | results)
    figure.tight_layout()
    figure.savefig(RESULTS / f"learning_{name}.png", dpi=110)
    return {key: value for key, value in results.items() if key != "runs"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__.split("\n\n")[0])
    parser.add_argument("name", choices=tuple(BENCHMARKS), help="what to train and compare")
    parser.add_argument("--data", type=Path, required=True, help="folder written by python -m pretrain.data")
    parser.add_argument("--work", type=Path, default=Path("runs/learning"), help="finished trainings (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each kind (%(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="steps of each training on text (%(default)s)")
    parser.add_argument("--continued-steps", type=int, default=150, help="of `upcycle`, after those (%(default)s)")
    parser.add_argument("--indexer-steps", type=int, default=80, help="of each stage of `dsa` (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (%(default)s)")
    return parser


BENCHMARKS = {function.__name__: function for function in (passkey, choices, text, upcycle, dsa)}


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if not (arguments.data / INDEX_NAME).is_file():
        print(f"error: {arguments.data / INDEX_NAME} does not exist; write a dataset with `python -m pretrain.data`")
        return 2
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    print(json.dumps(BENCHMARKS[arguments.name](arguments), indent=2))
    return 0


if __name__ == "__main__":
    run_command(main)
