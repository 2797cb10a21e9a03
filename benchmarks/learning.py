"""Do sparse attentions learn what dense attention learns? Small models from nothing, on the same data and steps.

    python -m benchmarks.learning text    --data runs/data    # NSA, full attention and a window alone on real text
    python -m benchmarks.learning passkey --data runs/data    # finding a passkey far outside the window

DATA is a folder written by `python -m pretrain.data`; its languages get equal shares of the rows. Each finished
training is kept in --work and not repeated, so that a stopped run goes on. Writes benchmarks/results/learning_NAME.json
and .png. The sizes are such that selection selects: a query at the end of a row reads 64 of 512 tokens.

"full" and "window" are the same grouped-query model; "window" has a mask that hides all but the last `nsa_window_size`
tokens in every layer. NSA has its widths, and more parameters: keys and values of three branches, compressors, gates.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from tqdm import trange
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common import RESULTS, ROOT, describe_machine, write_results
from benchmarks.recall import RecallBatch, hide_passkeys, recall_vocab_size
from pretrain.data import INDEX_NAME, PretrainingData, batch_of, load_held_out

NSA_SIZES = {
    "nsa_compress_block_size": 8,
    "nsa_compress_stride": 4,
    "nsa_select_block_size": 8,
    "nsa_num_select_blocks": 6,
    "nsa_num_init_blocks": 1,
    "nsa_num_local_blocks": 2,
    "nsa_window_size": 16,
}
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
}
KINDS = {
    "full": GQA | {"model_type": "llama"},
    "nsa": GQA | {"model_type": "deepseek_nsa"} | NSA_SIZES,
    "window": GQA | {"model_type": "llama"},
}
TEXT_TOKENS, TEXT_ROWS, HELD_OUT_TOKENS = 512, 4, 16384  # of a row, rows of a batch, held-out tokens of each language
NUM_PASSKEYS = 6
PASSKEY_STAGES = ((64, 24, 150), (128, 12, 50), (256, 6, 50), (512, 3, 50))  # tokens of a row, rows of a batch, steps
PASSKEY_LENGTHS, PASSKEY_ROWS, DEPTHS = (128, 256, 512), 32, 8  # of the last measurement; depths are eighths
COLOURS = {"full": "C0", "nsa": "C2", "window": "C3"}


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
            group["lr"] = learning_rate * min(1.0, (step + 1) / 20) * min(1.0, 2.0 - 1.8 * step / steps)
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


def train_on_text(model, kind: str, data: Path, seed: int, steps: int, title: str) -> list[dict]:
    """-> curve of the held-out loss"""
    rows = open_rows(data, TEXT_TOKENS, TEXT_ROWS, seed)
    windows = held_out_windows(data, TEXT_TOKENS, HELD_OUT_TOKENS)
    return train(
        model,
        steps,
        3e-3,
        lambda step: model(**text_inputs(kind, rows.batch(step), rows.bos_token_id)).lm_loss,
        lambda: text_loss(model, kind, windows, rows.bos_token_id),
        50,
        title,
    )


def text_run(arguments, kind: str, seed: int) -> dict:
    """One training on text -> its curve, and the number of parameters."""

    def run() -> dict:
        model = make_model(
            arguments.work / "code" / f"text_{kind}_{seed}",
            kind,
            seed,
            vocab_size=read_index(arguments.data)["vocab_size"],
        )
        title = f"text {kind} {seed}"
        curve = train_on_text(model, kind, arguments.data, seed, arguments.steps, title)
        return {"curve": curve, "parameters": sum(parameter.numel() for parameter in model.parameters())}

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
        for seed, run in enumerate(by_seed):
            label = kind if seed == 0 else None
            plot_curve(
                axes, run["curve"], "held_out_loss", color=COLOURS[kind], label=label, ls=("-", "--", ":")[seed % 3]
            )
    axes.set(xlabel="step", ylabel="held-out loss, nats a token")
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
    parts = [batch._replace(input_ids=ids) for ids in batch.input_ids.split(8)]
    hits = torch.cat([passkey_logits(model, kind, part).argmax(dim=-1) for part in parts]) == batch.answers
    model.train()
    return hits


def passkey_eval_batch(data: Path, length: int, rows: int) -> RecallBatch:
    """Held-out rows, the same for every model."""
    vocab_size = read_index(data)["vocab_size"]
    windows = held_out_windows(data, length, 32 * length)
    picked = torch.randperm(len(windows), generator=torch.Generator().manual_seed(1))[:rows]
    return hide_passkeys(windows[picked], vocab_size, NUM_PASSKEYS, REACH, torch.Generator().manual_seed(2))


def accuracy_by_depth(hits: torch.Tensor, batch: RecallBatch) -> list[float | None]:
    """Share of right answers in each of DEPTHS equal parts of the text in which passkeys may stand."""
    room = batch.input_ids.shape[1] - 2 * NUM_PASSKEYS - min(REACH, batch.input_ids.shape[1] // 4)
    depth = batch.found_at * DEPTHS // room
    return [
        round(hits[depth == part].float().mean().item(), 4) if (depth == part).any() else None
        for part in range(DEPTHS)
    ]


def train_on_passkeys(model, kind: str, data: Path, seed: int, stages, title: str) -> list[dict]:
    """-> curve of the accuracy at the longest length"""
    vocab_size, generator = read_index(data)["vocab_size"], torch.Generator().manual_seed(seed)
    schedule = [(length, rows) for length, rows, steps in stages for _ in range(steps)]
    sources = {length: open_rows(data, length, rows, seed) for length, rows, _ in stages}
    longest = passkey_eval_batch(data, PASSKEY_LENGTHS[-1], 8)

    def loss_of(step: int) -> torch.Tensor:
        rows = sources[schedule[step][0]].batch(step)
        return passkey_loss(model, kind, hide_passkeys(rows, vocab_size, NUM_PASSKEYS, REACH, generator))

    def measure() -> dict:
        return {"accuracy": round(passkey_hits(model, kind, longest).float().mean().item(), 4)}

    return train(model, len(schedule), 6e-3, loss_of, measure, 20, title)


def passkey_run(arguments, kind: str, seed: int) -> dict:
    """One training on passkeys -> its curve, and accuracy by length and depth at its end."""

    def run() -> dict:
        vocab_size = recall_vocab_size(read_index(arguments.data)["vocab_size"])
        model = make_model(arguments.work / "code" / f"passkey_{kind}_{seed}", kind, seed, vocab_size=vocab_size)
        curve = train_on_passkeys(model, kind, arguments.data, seed, arguments.stages, f"passkey {kind} {seed}")
        by_length = {}
        for length in PASSKEY_LENGTHS:
            batch = passkey_eval_batch(arguments.data, length, PASSKEY_ROWS)
            hits = passkey_hits(model, kind, batch)
            by_length[length] = {
                "accuracy": round(hits.float().mean().item(), 4),
                "by_depth": accuracy_by_depth(hits, batch),
            }
        return {"curve": curve, "by_length": by_length}

    options = {"stages": arguments.stages, "data": describe_data(arguments.data), "config": KINDS[kind]}
    return kept(arguments.work, f"passkey_{kind}_{seed}", options, run)


def passkey(arguments) -> dict:
    kinds = ("full", "nsa", "window")
    runs = {kind: [passkey_run(arguments, kind, seed) for seed in range(arguments.seeds)] for kind in kinds}
    figure, axes = new_figure(1, 4, width=13, ratios=(1.6, 1, 1, 1))
    for kind, by_seed in runs.items():
        for seed, run in enumerate(by_seed):
            label = kind if seed == 0 else None
            plot_curve(
                axes[0], run["curve"], "accuracy", color=COLOURS[kind], label=label, ls=("-", "--", ":")[seed % 3]
            )
    for end in torch.tensor([steps for *_, steps in arguments.stages]).cumsum(0)[:-1].tolist():
        axes[0].axvline(end, color="0.8", lw=0.8)
    axes[0].set(xlabel="step", ylabel=f"accuracy at {PASSKEY_LENGTHS[-1]} tokens", ylim=(-0.02, 1.02))
    axes[0].legend(loc="center left")
    for axis, kind in zip(axes[1:], kinds, strict=True):
        by_length = runs[kind][0]["by_length"]
        grid = [[float("nan") if x is None else x for x in entry["by_depth"]] for entry in by_length.values()]
        axis.imshow(torch.tensor(grid).T.numpy(), vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(grid)), list(by_length))
        axis.set_yticks((0, DEPTHS - 1), ("first", "last"))
        for i, column in enumerate(grid):
            for j, value in enumerate(column):
                axis.text(i, j, f"{value:.2f}", ha="center", va="center", fontsize=7)
        axis.set(xlabel="tokens in the row", title=kind)
        axis.grid(False)
    axes[1].set_ylabel("place of the passkey")
    final = {
        kind: {length: [run["by_length"][length]["accuracy"] for run in by_seed] for length in by_seed[0]["by_length"]}
        for kind, by_seed in json.loads(json.dumps(runs)).items()
    }
    return finish("passkey", arguments, figure, {"final_accuracy": final, "reach_of_windows": REACH, "runs": runs})


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


def finish(name: str, arguments, figure, results: dict) -> dict:
    """Writes the result file and the picture."""
    head = {"machine": describe_machine(), "data": describe_data(arguments.data), "nsa_sizes": NSA_SIZES}
    write_results(f"learning_{name}", head | results)
    figure.tight_layout()
    figure.savefig(RESULTS / f"learning_{name}.png", dpi=110)
    return {key: value for key, value in results.items() if key != "runs"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__.split("\n\n")[0])
    parser.add_argument("name", choices=tuple(BENCHMARKS), help="what to train and compare")
    parser.add_argument("--data", type=Path, required=True, help="folder written by python -m pretrain.data")
    parser.add_argument("--work", type=Path, default=Path("runs/learning"), help="finished trainings (%(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each kind (%(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="steps of each training on text (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (%(default)s)")
    return parser


BENCHMARKS = {"text": text, "passkey": passkey}


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if not (arguments.data / INDEX_NAME).is_file():
        print(f"error: {arguments.data / INDEX_NAME} does not exist; write a dataset with `python -m pretrain.data`")
        return 2
    arguments.stages = PASSKEY_STAGES
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    print(json.dumps(BENCHMARKS[arguments.name](arguments), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
