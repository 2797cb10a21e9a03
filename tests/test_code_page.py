"""docs/code.md: what it names exists, and it names every module of the model."""

import ast
import re

import pytest
from checks import ROOT

from docs.draw_code import FLOWS

PAGE = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
ROWS = re.findall(
    r"^\| ([^|]+) \| ([\w/]+\.py) \| ([^|]+) \|$", PAGE.partition("## Where do I change")[2], re.MULTILINE
)


def defined_in(file) -> set[str]:
    """Names that a module defines at its top level; what it only imports is not among them."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def test_the_table_is_read():
    lines = PAGE.partition("## Where do I change")[2].count("\n|") - 2  # without its head
    assert len(ROWS) == lines > 20


@pytest.mark.parametrize(("question", "file", "names"), ROWS, ids=[row[0] for row in ROWS])
def test_what_the_table_names_exists(question, file, names):
    named = set(re.findall(r"`(\w+)`", names))
    assert named
    assert named <= defined_in(ROOT / file)


def test_every_module_of_the_model_is_described():
    assert {file.name for file in ROOT.glob("*_deepseek.py")} <= set(re.findall(r"\w+\.py", PAGE))


def test_files_in_the_figures_exist():
    places = " ".join(step.where for flow in FLOWS.values() for step in flow.steps)
    # "gqa_ mla_deepseek.py" is short for both files
    files = re.findall(r"[\w/]+\.py", re.sub(r"\b(\w+_)(?= )", r"\1deepseek.py", places))
    assert len(files) > 20
    assert [file for file in files if not (ROOT / file).is_file()] == []
