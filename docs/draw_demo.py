"""Draws docs/images/demo.png, the terminal after `make demo`, from a recording of it.

script --quiet --command "make demo" demo.log
python -m docs.draw_demo demo.log --font NotoSansSC-Regular.ttf
"""

import argparse
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import font_manager
from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI as THEME
from rich.text import Text

from common.command import run_command

COLUMNS = 110
CELL, LINE = 0.0755, 0.165  # inches
BACKGROUND, FOREGROUND = "#1e2127", "#d7dae0"


def last_screen(recording: str) -> list[str]:
    """The lines that stay on the screen: of a line that is drawn again and again, such as a progress bar, the last."""
    lines = []
    for line in recording.replace("\r\n", "\n").split("\n"):
        line = re.split(r"\x1b\[2K|\r", line)[-1]
        line = re.sub(r"\x1b\[[0-9;?]*[A-KS-Zhl]", "", line)  # moves of the cursor; colours end in m
        is_redrawn = lines and re.match(r"learning .*\d+/\d+", _plain(line)) and "learning" in _plain(lines[-1])
        lines[-1 if is_redrawn else len(lines) :] = [line]
    return "\n".join(line for line in lines if not line.startswith("Script ")).strip("\n").split("\n")


def _plain(line: str) -> str:
    return Text.from_ansi(line).plain


def draw(lines: list[str], font: str | None, output: Path):
    console = Console(width=COLUMNS, force_terminal=True, color_system="truecolor", legacy_windows=False)
    rows = [row for line in lines for row in console.render_lines(Text.from_ansi(line), pad=False)]
    figure = plt.figure(figsize=(COLUMNS * CELL + 0.3, len(rows) * LINE + 0.3), facecolor=BACKGROUND)
    width, height = figure.get_size_inches()
    families = ["DejaVu Sans Mono"]
    if font:
        font_manager.fontManager.addfont(font)
        families.append(font_manager.FontProperties(fname=font).get_name())
    for number, row in enumerate(rows):
        column = 0
        for segment in row:
            style = segment.style
            has_colour = style and style.color and not style.color.is_default
            colour = style.color.get_truecolor(THEME) if has_colour else None
            for character in segment.text:  # one at a time: every character stands in its cell, wide ones in two
                figure.text(
                    (0.15 + column * CELL) / width,
                    1 - (0.15 + (number + 0.75) * LINE) / height,
                    character,
                    color=[part / 255 for part in colour] if colour else FOREGROUND,
                    family=families,
                    fontsize=9,
                    weight="bold" if style and style.bold else "normal",
                    parse_math=False,
                )
                column += console.measure(character).maximum if character.strip() else 1
    figure.savefig(output, dpi=110, facecolor=BACKGROUND)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", type=Path, help="what script(1) has written")
    parser.add_argument("--font", help="font file with Chinese characters")
    options = parser.parse_args()
    draw(
        last_screen(options.recording.read_text(errors="ignore")),
        options.font,
        Path(__file__).parent / "images" / "demo.png",
    )


if __name__ == "__main__":
    run_command(main)
