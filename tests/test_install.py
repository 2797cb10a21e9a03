"""pyproject.toml and common/extras.py: what is installed is what is there, and a missing library names its extra."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.extras import MissingExtra, extra

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "chat": ("rich", "serve"),
    "serve": ("uvicorn", "serve"),
    "finetune.sft": ("trl", "train"),
    "finetune.merge": ("peft", "train"),
    "pretrain.train": ("accelerate", "train"),
    "corpus.deduplicate": ("datasketch", "corpus"),
    "tools.evaluate": ("rich", "evaluate"),
    "tools.publish": ("tqdm", "publish"),
    "tools.long_context": ("rich", "tools"),
    "tools.plan": ("rich", "tools"),
    "tokenization.train_bpe": ("tqdm", "train"),
}


def test_every_module_is_installed():
    setuptools = re.search(r"\[tool\.setuptools\](.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.DOTALL)[1]
    modules, packages = (set(re.findall(r'"(\w+)"', part)) for part in setuptools.split("packages ="))
    assert modules == {file.stem for file in ROOT.glob("*.py")} - {"demo"}
    folders = {file.parent.name for file in ROOT.glob("*/*.py")}
    assert packages == folders - {"tests", "docs", "benchmarks", "examples"}


def test_a_missing_library_names_its_extra():
    with pytest.raises(MissingExtra, match=r"no_such_library is not installed.*'\.\[train\]'"), extra("serve"):  # noqa: SIM117
        with extra("train"):
            import no_such_library  # noqa: F401


@pytest.mark.parametrize(("module", "library", "name"), [(m, *rest) for m, rest in COMMANDS.items()])
def test_commands_name_what_they_lack(module, library, name):
    if library in ("rich", "tqdm"):  # cheap to try in a process; the others are many seconds of imports
        code = f"import sys; sys.modules[{library!r}] = None; import runpy; runpy.run_module({module!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert f"'.[{name}]'" in done.stderr
    text = (ROOT / (module.replace(".", "/") + ".py")).read_text()
    assert f'with extra("{name}"):' in text
