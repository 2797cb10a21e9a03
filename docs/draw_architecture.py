"""Draws docs/images/architecture.png: `python -m docs.draw_architecture`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from common.command import run_command

PLAIN, CACHED, EXPERT, FRAME = "#eef2f6", "#ffe3b3", "#d7ecd9", "#fbfcfd"


def box(axes, x, y, width, height, text, colour=PLAIN, size=8.5, weight="normal"):
    """A rounded box with its lower left corner at (x, y)."""
    axes.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.08", fc=colour, ec="#44525f", lw=0.9
        )
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, weight=weight)


def frame(axes, x, y, width, height, title):
    axes.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.1", fc=FRAME, ec="#9aa7b3", ls="--"
        )
    )
    axes.text(x + 0.12, y + height - 0.1, title, ha="left", va="top", fontsize=9.5, weight="bold")


def arrow(axes, start, end, colour="#44525f"):
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.1})


def draw_model(axes):
    frame(axes, 0.1, 0.1, 3.2, 8.3, "model")
    for y, text in [(0.4, "token embedding"), (6.2, "RMSNorm"), (6.95, "output head → next token")]:
        box(axes, 0.5, y, 2.4, 0.5, text)
    frame(axes, 0.4, 1.3, 2.6, 4.5, "N decoder\nlayers")
    for y, text in [
        (1.5, "RMSNorm"),
        (2.25, "attention: GQA or MLA"),
        (3.5, "RMSNorm"),
        (4.25, "MLP or mixture of experts"),
    ]:
        box(axes, 0.55, y, 2.3, 0.5, text, weight="bold" if ":" in text or "mixture" in text else "normal", size=8)
    for y in (3.05, 5.05):
        axes.text(1.7, y, "⊕ residual", ha="center", va="center", fontsize=8.5)
    for start, end in [
        (0.9, 1.5),
        (2.0, 2.25),
        (2.75, 2.92),
        (3.2, 3.5),
        (4.0, 4.25),
        (4.75, 4.92),
        (5.2, 6.2),
        (6.7, 6.95),
    ]:
        arrow(axes, (1.7, start), (1.7, end))


def draw_mla(axes):
    frame(axes, 3.7, 4.3, 6.1, 4.1, "multi-head latent attention (V2, V3)")
    box(axes, 6.0, 4.5, 1.6, 0.42, "hidden state")
    box(axes, 3.9, 5.3, 1.6, 0.5, "query latent\n(q_lora_rank)", size=7.5)
    box(axes, 6.0, 5.3, 1.6, 0.5, "KV latent c\n(kv_lora_rank)", CACHED, 7.5, "bold")
    box(axes, 8.05, 5.3, 1.55, 0.5, "key part with\nRoPE, shared", CACHED, 7.5, "bold")
    box(axes, 3.9, 6.25, 1.6, 0.5, "queries\nof H heads", size=7.5)
    box(axes, 5.75, 6.25, 2.1, 0.62, "prompt: expanded to\nkeys, values of H heads", size=7.5)
    box(axes, 8.0, 6.25, 1.65, 0.62, "decoding: read as\nit is (absorbed)", size=7.5)
    box(axes, 5.2, 7.35, 3.2, 0.45, "softmax attention → output")
    for start, end in [
        ((6.4, 4.92), (4.7, 5.3)),
        ((6.8, 4.92), (6.8, 5.3)),
        ((7.2, 4.92), (8.8, 5.3)),
        ((4.7, 5.8), (4.7, 6.25)),
        ((6.8, 5.8), (6.8, 6.25)),
        ((7.4, 5.8), (8.5, 6.25)),
        ((8.9, 5.8), (8.9, 6.25)),
        ((8.3, 5.8), (7.4, 6.25)),
        ((4.7, 6.75), (5.6, 7.35)),
        ((6.8, 6.87), (6.8, 7.35)),
        ((8.8, 6.87), (8.0, 7.35)),
    ]:
        arrow(axes, start, end)
    axes.text(6.75, 8.02, "orange: what the cache holds", ha="center", fontsize=7.5, color="#9a6a12")


def draw_moe(axes):
    frame(axes, 3.7, 0.1, 3.55, 3.8, "mixture of experts")
    box(axes, 4.7, 0.3, 1.6, 0.42, "hidden state")
    box(axes, 5.15, 1.15, 1.95, 0.5, "router: scores → choice\n→ weights (+ bias)", size=7.2)
    box(axes, 3.85, 2.1, 0.95, 0.6, "shared\nexperts", EXPERT, 7.5)
    for i, name in enumerate(["expert 1", "expert 2", "…", "expert E"]):
        box(axes, 4.92 + 0.56 * i, 2.1, 0.5, 0.6, name.replace(" ", "\n"), EXPERT if i in (1, 3) else PLAIN, 6.5)
    axes.text(5.45, 3.15, "⊕ weighted sum", ha="center", va="center", fontsize=8.5)
    for start, end in [((5.2, 0.72), (4.3, 2.1)), ((5.8, 0.72), (6.1, 1.15)), ((5.9, 1.65), (5.73, 2.1))]:
        arrow(axes, start, end)
    for start, end in [
        ((6.4, 1.65), (6.85, 2.1)),
        ((4.3, 2.7), (5.1, 3.05)),
        ((5.73, 2.7), (5.5, 3.05)),
        ((6.85, 2.7), (5.9, 3.05)),
    ]:
        arrow(axes, start, end)


def draw_mtp(axes):
    frame(axes, 7.55, 0.1, 2.25, 3.8, "multi-token prediction")
    box(axes, 7.7, 0.3, 0.95, 0.55, "state of\ntoken t", size=7)
    box(axes, 8.75, 0.3, 0.95, 0.55, "embedding\nof t + k", size=7)
    box(axes, 7.85, 1.2, 1.7, 0.42, "norms, projection", size=7.5)
    box(axes, 7.85, 1.95, 1.7, 0.42, "decoder layer", size=7.5, weight="bold")
    box(axes, 7.75, 2.75, 1.9, 0.5, "shared head →\ntoken t + k + 1", size=7.5)
    for start, end in [
        ((8.2, 0.85), (8.5, 1.2)),
        ((9.2, 0.85), (8.9, 1.2)),
        ((8.7, 1.62), (8.7, 1.95)),
        ((8.7, 2.37), (8.7, 2.75)),
    ]:
        arrow(axes, start, end)


def main():
    figure, axes = plt.subplots(figsize=(10.5, 8.9))
    axes.set(xlim=(0, 9.95), ylim=(0, 8.55))
    axes.axis("off")
    for draw in (draw_model, draw_mla, draw_moe, draw_mtp):
        draw(axes)
    figure.tight_layout(pad=0.3)
    figure.savefig(Path(__file__).parent / "images" / "architecture.png", dpi=110)


if __name__ == "__main__":
    run_command(main)
