"""What all tests share.

The root of the repository is no package (its folder may bear any name), yet its modules import their siblings. Tests
import them as parts of a package `deepseek_repo` that exists only here: `from deepseek_repo.moe_deepseek import ...`.
"""

import importlib.util
import json
import os
import platform
import shutil
import sys
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the first import of transformers

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))  # tiny.py, checks.py, slow_reference.py

if "deepseek_repo" not in sys.modules:
    _spec = ModuleSpec("deepseek_repo", None, is_package=True)
    _spec.submodule_search_locations = [str(ROOT)]
    sys.modules["deepseek_repo"] = importlib.util.module_from_spec(_spec)

collect_ignore = [] if importlib.util.find_spec("vllm") else ["engines"]  # `make test-vllm` has an environment with it

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


# Tests marked `compatibility("what people do")` make the cells of docs/compatibility.md, a row a mark, a column a family.


def pytest_addoption(parser):
    parser.addoption(
        "--compatibility",
        type=Path,
        metavar="FILE",
        help="write what the tests marked compatibility find as JSON, for docs/draw_compatibility.py",
    )


def pytest_collection_modifyitems(config, items):
    for item in items:
        if mark := item.get_closest_marker("compatibility"):
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            family = parameters.get("family", parameters.get("name", mark.kwargs.get("family")))
            assert family in tiny.FAMILIES, f"{item.nodeid} needs a parameter or keyword `family` with a family's name"
            column = family if family == "v2_lite" else tiny.FAMILIES[family]["model_type"]
            item.user_properties.append(("cell", (mark.args[0], column)))


@pytest.fixture
def refused(record_property):
    """A function like `pytest.raises`, whose message becomes the cell: what a user is told where something is refused."""

    @contextmanager
    def raises(error: type[Exception], match: str):
        with pytest.raises(error, match=match) as found:
            yield found
        record_property("refused", str(found.value))

    return raises


_rows: dict[str, dict[str, dict]] = {}


def pytest_runtest_logreport(report):
    properties = dict(report.user_properties)
    if "cell" in properties and (report.when == "call" or (report.when == "setup" and report.outcome != "passed")):
        row, family = properties["cell"]
        cell = _rows.setdefault(row, {}).setdefault(
            family, {"passed": 0, "failed": 0, "skipped": 0, "refused": {}, "left_out": []}
        )
        cell[report.outcome] += 1
        if "refused" in properties:
            cell["refused"][properties["refused"]] = cell["refused"].get(properties["refused"], 0) + 1
        if (
            report.skipped
            and isinstance(report.longrepr, (tuple, list))
            and report.longrepr[2] not in cell["left_out"]
        ):
            cell["left_out"].append(report.longrepr[2].removeprefix("Skipped: "))


def pytest_sessionfinish(session):
    path = session.config.getoption("--compatibility")
    if path and not hasattr(session.config, "workerinput"):  # with workers, the process that hears from all of them
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"versions": versions, "rows": _rows}, indent=1, sort_keys=True) + "\n")
