"""tools/add_remote_code.py: any checkpoint of the family gets this code, and loses it again without a trace."""

import importlib.util
import json

import pytest
import tiny
import torch
from checks import ROOT, assert_close, run_python
from conftest import copy_code
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

spec = importlib.util.spec_from_file_location("add_remote_code", ROOT / "tools" / "add_remote_code.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path):
    """A Llama-type checkpoint as transformers' own class saves it, without any code."""
    tiny.make_model("llama").save_pretrained(tmp_path / "model")
    for code in (tmp_path / "model").glob("*.py"):
        code.unlink()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config.pop("auto_map", None)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config, indent=1))
    return tmp_path / "model"


def test_adds_code_and_touches_no_weight(folder, capsys):
    before = contents(folder)
    assert tool.main([str(folder)]) == 0
    assert "auto_map" in capsys.readouterr().out
    after = contents(folder)
    assert {name: after[name] for name in before if name != "config.json"} == {
        name: data for name, data in before.items() if name != "config.json"
    }
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__name__ == "DeepseekForCausalLM"
    native = LlamaForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert_close(model(ids).logits, native(ids).logits, "logits after adding the code")


def test_remove_restores_every_byte(folder, capsys):
    (folder / "modeling_deepseek.py").write_text("# DeepSeek's own hub code\n")
    before = contents(folder)
    assert tool.main([str(folder)]) == 0
    kept = "kept the former config.json and 1 file of model code (*_deepseek.py) in .before_remote_code/"
    assert kept in capsys.readouterr().out
    assert tool.main([str(folder)]) == 0  # twice: what is kept is still what was there first
    assert contents(folder) != before
    assert tool.main([str(folder), "--remove"]) == 0
    assert "put back config.json and 1 file of model code" in capsys.readouterr().out
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json"),
        ("{", "is not JSON"),
        ({"hidden_size": 8}, "no `model_type`"),
        ({"model_type": "qwen2"}, "must be one of 'llama', 'deepseek'"),
        ({"model_type": "deepseek_v3", "topk_method": "best"}, "`topk_method` is 'best'"),
    ],
)
def test_refuses_what_it_does_not_know(tmp_path, capsys, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    before = contents(tmp_path)
    assert tool.main([str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_remove_without_add_is_refused(folder, capsys):
    assert tool.main([str(folder), "--remove"]) == 2
    assert "nothing to undo" in capsys.readouterr().err


def test_the_repository_itself_is_left_alone(capsys):
    before = sorted(path.name for path in ROOT.iterdir())
    assert tool.main([str(ROOT)]) == 2
    assert "has the code already" in capsys.readouterr().err
    assert sorted(path.name for path in ROOT.iterdir()) == before


def test_code_from_the_hub(folder, tmp_path, capsys):
    """`auto_map` names a repository that has the code, and the folder gets none."""
    before = contents(folder)
    assert tool.main([str(folder), "--from", "someone/code"]) == 0
    assert not list(folder.glob("*.py"))
    repository, commit = tmp_path / "home" / "hub" / "models--someone--code", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    copy_code(repository / "snapshots" / commit)
    printed = run_python(
        f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
print(type(model).__module__)
""",
        HF_HOME=str(tmp_path / "home"),
    )
    assert "transformers_modules.someone" in printed
    assert tool.main([str(folder), "--remove"]) == 0
    assert contents(folder) == before
    assert tool.main([str(folder), "--from", "no name"]) == 2
    assert "owner/name" in capsys.readouterr().err


def test_the_readmes_lines(folder):
    """A published checkpoint in this code, without changing it."""
    before = contents(folder)
    model_class = get_class_from_dynamic_module("modeling_deepseek.DeepseekForCausalLM", str(ROOT))
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert type(model).__name__ == "DeepseekForCausalLM"
    assert contents(folder) == before
