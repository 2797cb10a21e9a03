"""Imports run one way: from what uses to what is used, never back, and never around."""

import ast
from pathlib import Path

import pytest
from checks import ROOT

# From the lowest: a file imports from its own layer only within its own package, else from lower ones.
LAYERS = (
    ("model",),  # *_deepseek.py in the root
    ("common",),
    ("tokenization",),
    ("corpus",),
    ("pretrain", "finetune"),
    ("compress",),
    ("serving",),
    ("tools",),
    ("chat", "serve", "demo"),
    ("benchmarks", "docs", "examples"),
)
RANKS = {package: rank for rank, layer in enumerate(LAYERS) for package in layer}


def owner(module: str) -> str:
    """The package of a module's dotted name; the model's modules are one package."""
    first = module.partition(".")[0]
    return "model" if first.endswith("_deepseek") else first


def files() -> list[Path]:
    found = [file for package in RANKS for file in (ROOT / package).rglob("*.py")] + list(ROOT.glob("*.py"))
    return sorted(file.relative_to(ROOT) for file in found)


def imports_of(file: Path) -> set[str]:
    """Dotted names of what a file imports, wherever in it; a relative import is one of the root's siblings."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_every_file_has_a_layer():
    assert {owner(".".join(file.with_suffix("").parts)) for file in files()} == RANKS.keys()


@pytest.mark.parametrize("package", RANKS)
def test_imports_run_one_way(package):
    wrong = []
    for file in files():
        own = owner(".".join(file.with_suffix("").parts))
        if own != package:
            continue
        for module in imports_of(file):
            other = owner(module)
            if other in RANKS and other != own and RANKS[other] >= RANKS[own]:
                wrong.append(f"{file} imports {module}")
    assert not wrong, "\n".join(wrong)
