"""Draws the figures of docs/code.md, docs/images/code_*.png: `python -m docs.draw_code`."""

from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from common.command import run_command

BOX, REPEATED, EDGE, QUIET = "#eef2f6", "#fff6e5", "#44525f", "#6b7884"
WIDTH, HEIGHT, GAP = 6.1, 0.56, 0.34  # of a step, and between two, in inches


class Step(NamedTuple):
    """One step of a flow: what happens, where it stands (a file, or a library), and what goes on to the next step."""

    what: str
    where: str
    result: str = ""
    repeated: bool = False  # part of the flow's loop


class Flow(NamedTuple):
    loop: str  # what its repeated steps are done for
    steps: list[Step]


FLOWS = {
    "forward": Flow(
        "each layer",
        [
            Step("embedding of the token ids", "modeling_deepseek.py", "stream [B, S, hidden]"),
            Step("the cache gets the layers' own cache layers", "cache_deepseek.py"),
            Step("one view for each kind of attention: what may be seen", "attention_deepseek.py", "views"),
            Step("cosines and sines of the positions", "layers_deepseek.py", "rotary table"),
            Step("read the stream, normalise", "layers_deepseek.py", "[B, S, hidden]", True),
            Step("attention of the layer's kind", "gqa_ mla_ dsa_ nsa_deepseek.py", "[B, S, hidden]", True),
            Step("write to the stream, read, normalise", "layers_deepseek.py", "[B, S, hidden]", True),
            Step("MLP, or router and experts", "layers_deepseek.py, moe_deepseek.py", "[B, S, hidden]", True),
            Step("write to the stream; note losses and loads", "losses_deepseek.py", "stream, notes", True),
            Step("last norm, output head", "modeling_deepseek.py", "logits [B, S, vocabulary]"),
            Step("with labels: next-token, MTP, balance, indexer losses", "modeling_deepseek.py"),
        ],
    ),
    "decoding": Flow(
        "each layer",
        [
            Step("generate: the loop over new tokens", "transformers, generation_deepseek.py", "one token id a row"),
            Step("embedding, views, rotary table", "modeling_deepseek.py", "stream [B, 1, hidden]"),
            Step("query, latent and rotated key of one token", "mla_deepseek.py", "[B, 1, C + Dr]", True),
            Step(
                "update: write behind the past, return all of it", "cache_deepseek.py", "latents [B, T, C + Dr]", True
            ),
            Step("absorbed form: queries against latents", "mla_deepseek.py", "[B, 1, hidden]", True),
            Step("router, and the token's experts", "moe_deepseek.py", "stream", True),
            Step("last norm, output head", "modeling_deepseek.py", "logits [B, 1, vocabulary]"),
            Step("logits processors, choice, stopping criteria", "transformers", "next token"),
            Step("with mtp_tokens: one forward checks several drafts", "drafts_deepseek.py"),
        ],
    ),
    "finetuning": Flow(
        "each step",
        [
            Step("options of the command line and of YAML", "finetune/config.py", "options"),
            Step("records read, checked, brought to one format", "finetune/data.py", "messages"),
            Step("model and tokenizer loaded, weights quantised", "finetune/models.py", "model"),
            Step("messages rendered by the chat template", "finetune/data.py", "ids and labels"),
            Step(
                "LoRA, chosen experts, or all parameters", "finetune/lora.py, finetune/experts.py", "what is trained"
            ),
            Step("rows padded or packed", "TRL", "batch [B, S]", True),
            Step("forward; loss over the tokens of the step", "finetune/trainers.py", "loss", True),
            Step("backward, optimizer step, router bias", "transformers, finetune/callbacks.py", "", True),
            Step("now and then: evaluation, checkpoint", "finetune/trainers.py", "the best checkpoint", True),
            Step("adapter, experts or model", "finetune/trainers.py", "final/"),
            Step("report.html and the model card", "finetune/report.py"),
        ],
    ),
}


def draw(flow: Flow, path: Path):
    rows = len(flow.steps)
    height = rows * (HEIGHT + GAP) - GAP + 0.2
    figure, axes = plt.subplots(figsize=(11, height))
    axes.set(xlim=(0, 11), ylim=(0, height))
    axes.axis("off")
    left = 1.3
    bottoms = [height - 0.1 - (number + 1) * (HEIGHT + GAP) + GAP for number in range(rows)]
    repeated = [bottom for bottom, step in zip(bottoms, flow.steps, strict=True) if step.repeated]
    axes.add_patch(
        FancyBboxPatch(
            (left - 0.18, repeated[-1] - 0.07),
            WIDTH + 0.36,
            repeated[0] - repeated[-1] + HEIGHT + 0.14,
            boxstyle="round,pad=0,rounding_size=0.1",
            facecolor="none",
            edgecolor=QUIET,
            linestyle="--",
        )
    )
    middle = (repeated[0] + repeated[-1] + HEIGHT) / 2
    axes.text(left - 0.4, middle, flow.loop, rotation=90, ha="center", va="center", fontsize=11, color=QUIET)
    for number, (bottom, step) in enumerate(zip(bottoms, flow.steps, strict=True)):
        axes.add_patch(
            FancyBboxPatch(
                (left, bottom),
                WIDTH,
                HEIGHT,
                boxstyle="round,pad=0,rounding_size=0.08",
                facecolor=REPEATED if step.repeated else BOX,
                edgecolor=EDGE,
            )
        )
        axes.text(left + WIDTH / 2, bottom + HEIGHT / 2, step.what, ha="center", va="center", fontsize=11)
        axes.text(left + WIDTH + 0.35, bottom + HEIGHT / 2, step.where, va="center", fontsize=9, family="monospace")
        if number < rows - 1:
            axes.annotate(
                "",
                (left + WIDTH / 2, bottom - GAP),
                (left + WIDTH / 2, bottom),
                arrowprops={"arrowstyle": "-|>", "color": EDGE, "lw": 1.2},
            )
        if step.result:
            axes.text(left + WIDTH / 2 + 0.15, bottom - GAP / 2, step.result, va="center", fontsize=8.5, color=QUIET)
    figure.subplots_adjust(0, 0, 1, 1)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    for name, flow in FLOWS.items():
        draw(flow, Path(__file__).parent / "images" / f"code_{name}.png")


if __name__ == "__main__":
    run_command(main)
