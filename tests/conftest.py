"""What all tests share.

The root of the repository is no package (its folder may bear any name), yet its modules import their siblings. Tests
import them as parts of a package `deepseek_repo` that exists only here: `from deepseek_repo.moe_deepseek import ...`.
"""

import importlib.util
import json
import os
import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the first import of transformers

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))  # tiny.py, checks.py, slow_reference.py

if "deepseek_repo" not in sys.modules:
    _spec = ModuleSpec("deepseek_repo", None, is_package=True)
    _spec.submodule_search_locations = [str(ROOT)]
    sys.modules["deepseek_repo"] = importlib.util.module_from_spec(_spec)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

import tiny  # noqa: E402


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def code_dir(tmp_path) -> Path:
    """A folder with a copy of the root modules, as a model repository has them."""
    return copy_code(tmp_path / "code")


@pytest.fixture
def checkpoint(tmp_path):
    """A function family -> folder with code, a tiny random checkpoint and a config.json with `auto_map`."""

    def save(family: str = "v3", **overrides) -> Path:
        folder = tmp_path / f"checkpoint_{family}"
        tiny.make_model(family, **overrides).save_pretrained(folder)
        copy_code(folder)
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = json.loads((ROOT / "config.json").read_text())["auto_map"]
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return save


def copy_code(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for module in ROOT.glob("*_deepseek.py"):
        shutil.copy(module, folder)
    return folder
