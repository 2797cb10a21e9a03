"""tools/publish.py: what is wrong with a folder is said before anything is sent; what is sent loads again from the Hub."""

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import tiny
import torch
from checks import ROOT, run_python
from huggingface_hub import HfApi, ModelCard, constants
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny_chat import VOCAB_SIZE, add_tokenizer
from transformers import AutoModelForCausalLM

from finetune.lora import lora_config
from tools import publish, try_loading

sys.path.insert(0, str(Path(__file__).parent))  # hub_server.py
from hub_server import TOKEN, Hub

CARD = """---
license: apache-2.0
language:
- en
- zh
library_name: transformers
pipeline_tag: text-generation
tags:
- custom_code
---
# A model

Words of its author.
"""
RESULT = {
    "task_type": "text-generation",
    "dataset_type": "openai/gsm8k",
    "dataset_name": "GSM8K",
    "dataset_split": "test",
    "metric_type": "exact_match",
    "metric_value": 0.125,
}


@pytest.fixture
def folder(checkpoint) -> Path:
    """A complete model repository of a tiny V3, in two shards."""
    path = checkpoint("v3", vocab_size=VOCAB_SIZE)
    model = tiny.make_model("v3", vocab_size=VOCAB_SIZE)
    config = json.loads((path / "config.json").read_text())
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="200KB")
    (path / "config.json").write_text(json.dumps(config))
    model.generation_config.save_pretrained(path)
    add_tokenizer(path)
    shutil.copy(ROOT / "LICENSE", path)
    (path / "README.md").write_text(CARD)
    return path


@pytest.fixture
def hub(monkeypatch):
    """A running server, and this process's client allowed to reach it."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET"):
        monkeypatch.setattr(constants, name, name == "HF_HUB_DISABLE_XET")
    with Hub() as server:
        yield server
    huggingface_hub.close_session()
    assert server.unknown == []


@pytest.fixture
def results(tmp_path) -> Path:
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"results": [RESULT]}))
    return file


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def send(hub: Hub, folder: Path, *options: str, monkeypatch, repo: str = "me/tiny") -> int:
    """The command with uploads to `hub`; loading is tested on its own, it takes a process."""
    monkeypatch.setattr(publish, "check_loading", lambda *_: [])
    return publish.main([str(folder), "--repo-id", repo, *options], HfApi(endpoint=hub.url, token=TOKEN))


def failures(folder: Path) -> dict[str, str]:
    return {check.name: check.text for check in publish.check_folder(folder) if check.status == publish.FAILED}


# ---------------------------------------------------------------- checks


def test_a_good_folder_passes_every_check(folder):
    (folder / "optimizers.py").write_text("# code, not the state of one\n")
    assert [check for check in publish.check_folder(folder) if check.status != publish.PASSED] == []


def _edit(file: str, change):
    def apply(folder: Path):
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return apply


def _write(file: str, text: str):
    def apply(folder: Path):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)

    return apply


def _remove(file: str):
    return lambda folder: (folder / file).unlink()


INDEX = "model.safetensors.index.json"
# What is done to a good folder -> the check that fails, and what it says.
DAMAGE = {
    "module": (_remove("moe_deepseek.py"), "code", "moe_deepseek.py is missing"),
    "class": (
        _edit("config.json", lambda c: c["auto_map"].update(AutoModel="modeling_deepseek.Nothing")),
        "code",
        "no class Nothing",
    ),
    "foreign code": (
        _edit("config.json", lambda c: c["auto_map"].update(AutoModel="me/x--modeling_deepseek.DeepseekModel")),
        "code",
        "another repository",
    ),
    "package import": (_write("layers_deepseek.py", "from .parts.norm import Norm\n"), "code", "line 1"),
    "syntax": (_write("layers_deepseek.py", "def f(:\n"), "code", "layers_deepseek.py is no Python"),
    "auto_map": (_edit("config.json", lambda c: c.pop("auto_map")), "auto_map", "add_remote_code.py"),
    "config": (_write("config.json", "{"), "config", "not JSON"),
    "licence": (_remove("LICENSE"), "licence file", "add LICENSE"),
    "card": (_remove("README.md"), "card", "no README.md"),
    "yaml": (_write("README.md", "---\nlicense: [a\n---\n"), "card", "front matter"),
    "metadata": (_write("README.md", "---\nlicense: mit\n---\n"), "card metadata", "`language` (--language en zh)"),
    "generation": (_remove("generation_config.json"), "generation config", "save_pretrained"),
    "cache": (_write("__pycache__/a.pyc", ""), "stray files", "__pycache__/a.pyc (a cache)"),
    "optimizer": (_write("optimizer.pt", "x"), "stray files", "optimizer.pt (the state of a training)"),
    "pickle": (_write("pytorch_model.bin", "x"), "stray files", "a pickle"),
    "key file": (_write(".env", "x"), "stray files", ".env (a file of secrets)"),
    "key": (_write("notes.txt", "token = hf_" + "a1B2" * 9), "secrets", "notes.txt (hf_a1B...)"),
    "dtype": (_edit("config.json", lambda c: c.update(dtype="bfloat16")), "dtype", "most weights are F32"),
    "index lacks": (
        _edit(INDEX, lambda i: i["weight_map"].pop("lm_head.weight")),
        "weight files",
        "lm_head.weight, which the index does not name",
    ),
    "index invents": (
        _edit(INDEX, lambda i: i["weight_map"].update(extra="model-00001-of-00003.safetensors")),
        "weight files",
        "lacks extra",
    ),
    "shard": (
        _remove("model-00002-of-00003.safetensors"),
        "weight files",
        "model-00002-of-00003.safetensors is missing",
    ),
    "broken shard": (_write("model-00002-of-00003.safetensors", "not weights"), "weight files", "is damaged"),
    "two sets": (
        lambda folder: save_file({"a": torch.ones(1)}, folder / "model.safetensors"),
        "weight files",
        "both there",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_every_damage_is_named_with_its_remedy(folder, case):
    damage, check, message = DAMAGE[case]
    damage(folder)
    found = failures(folder)
    assert check in found
    assert message in found[check]


def test_sizes(folder, monkeypatch):
    monkeypatch.setattr(publish, "MAX_FILE_BYTES", 1000)
    assert "max_shard_size" in failures(folder)["sizes"]


def test_loading_as_a_stranger_finds_what_files_do_not_show(folder, monkeypatch):
    """In one process: every stage passes on the good folder, then each is broken and says so."""
    stages = {
        "weights": lambda: try_loading.try_weights(folder),
        "tokenizer": lambda: try_loading.try_tokenizer(folder),
        "chat": lambda: try_loading.try_chat(folder),
        "generation": lambda: try_loading.try_generation(folder),
    }
    found = try_loading.run_stages(stages)
    shapes = try_loading.shapes_in_files(sorted(folder.glob("*.safetensors")))
    assert found["weights"] == {"tensors": len(shapes), "missing": [], "unexpected": [], "shapes": []}
    assert publish._judge_tokenizer(found["tokenizer"], VOCAB_SIZE)[0] == publish.PASSED
    assert publish._judge_tokenizer(found["tokenizer"], VOCAB_SIZE - 1)[0] == publish.FAILED
    assert publish._judge_chat(found["chat"])[0] == publish.PASSED
    assert publish._judge_generation(found["generation"], found["tokenizer"])[0] == publish.PASSED
    assert publish._judge_generation({"eos_token_id": 5}, found["tokenizer"])[0] == publish.FAILED

    shard = next(file for file in sorted(folder.glob("*.safetensors")) if "lm_head.weight" in load_file(file))
    tensors = load_file(shard)
    tensors["lm_heads.weight"] = tensors.pop("lm_head.weight")
    name, tensor = next((n, t) for n, t in tensors.items() if n.endswith("experts.0.up_proj.weight"))
    tensors[name] = tensor[:-1].contiguous()
    save_file(tensors, shard, metadata={"format": "pt"})
    (folder / "chat_template.jinja").write_text("{{ nothing.at_all.here }}")
    found = try_loading.run_stages(stages)
    assert found["weights"]["missing"] == ["lm_head.weight"]
    assert found["weights"]["unexpected"] == ["lm_heads.weight"]
    assert found["weights"]["shapes"] == [[name, list(tensors[name].shape), list(tensor.shape)]]
    assert publish._judge_weights(found["weights"])[0] == publish.FAILED
    assert publish._judge("chat", found["chat"], publish._judge_chat).status == publish.FAILED


@pytest.mark.parametrize("family", ["llama", "v2", "v32", "nsa", "v3_mtp0"])
def test_names_and_shapes_of_every_family(checkpoint, family):
    found = try_loading.try_weights(checkpoint(family))
    assert found.pop("tensors") > 20
    assert found == {"missing": [], "unexpected": [], "shapes": []}


def test_names_and_shapes_of_fp8_and_of_shared_copies(checkpoint):
    """As published: FP8 with scales block by block, and a copy of the embedding in the prediction module."""
    folder = checkpoint("v3")
    tensors = load_file(folder / "model.safetensors")
    names = [name for name in tensors if "self_attn" in name and tensors[name].ndim == 2]
    for name in names:
        height, width = tensors[name].shape
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(-(-height // 16), -(-width // 16))
    tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
    _edit("config.json", lambda config: config.update(quantization_config=quantization))(folder)
    found = try_loading.try_weights(folder)
    assert found.pop("tensors") == len(tensors) - 1
    assert found == {"missing": [], "unexpected": [], "shapes": []}
    tensors[f"{names[0]}_scale_inv"] = torch.ones(1, 7)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert [row[0] for row in try_loading.try_weights(folder)["shapes"]] == [f"{names[0]}_scale_inv"]


# ---------------------------------------------------------------- the card


def test_results_go_into_model_index_and_table_and_are_replaced_not_doubled(results):
    rows = publish.read_results([results])
    card = publish.updated_card(CARD, {"tags": ["deepseek", "custom_code"]}, rows, "tiny")
    again = publish.updated_card(card, {}, publish.read_results([results]), "tiny")
    rows[0].metric_value = 0.25
    replaced = publish.updated_card(again, {}, rows, "other")
    for text, value in ((card, 0.125), (again, 0.125), (replaced, 0.25)):
        data = ModelCard(text).data
        assert [row.metric_value for row in data.eval_results] == [value]
        assert data.model_name == "tiny"
        assert data.tags == ["custom_code", "deepseek"]
        assert text.count(publish.TABLE_START) == 1
        assert f"| GSM8K | test | exact_match | {value} |" in text
        assert "Words of its author." in text


def test_a_card_is_begun_where_there_is_none():
    text = publish.updated_card("", {"license": "mit", "language": ["en"]}, [], "tiny")
    assert ModelCard(text).data.to_dict() == {"license": "mit", "language": ["en"]}


@pytest.mark.parametrize("content", ["[]", '{"results": []}', '{"results": [{"task_type": "x"}]}', "{"])
def test_result_files_of_another_form_are_refused(tmp_path, content):
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="EvalResult"):
        publish.read_results([file])


# ---------------------------------------------------------------- upload


def test_the_folder_above_a_model_names_the_model(folder, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(folder, run / "final")
    assert publish.main([str(run), "--dry-run"]) == 2
    shown = capsys.readouterr().err
    assert f"{run / 'final'} has some" in shown
    assert "again" not in shown


def test_dry_run_shows_the_files_and_touches_nothing(folder, hub, results, monkeypatch, capsys):
    before = contents(folder)
    assert send(hub, folder, "--dry-run", "--results", str(results), monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr().out
    for entry in publish.manifest(folder):
        if entry.path != "README.md":  # which would get the results
            assert any(entry.path in line and entry.sha256 in line for line in shown.splitlines())
    assert "model-index:" in shown
    assert contents(folder) == before
    assert hub.repos == {}


def test_upload_sends_the_folder_and_says_what_it_is(folder, hub, results, monkeypatch):
    (folder / "notes.txt").write_text("mine")
    options = ["--results", str(results), "--private", "--exclude", "*.txt"]
    assert send(hub, folder, *options, monkeypatch=monkeypatch) == 0
    expected = contents(folder)  # the card as it was written
    del expected["notes.txt"]
    assert ModelCard(expected["README.md"].decode()).data.eval_results[0].metric_value == 0.125
    assert {path: hub.content("me/tiny", path) for path in hub.repos["me/tiny"]} == expected
    assert hub.private == {"me/tiny": True}
    assert len(hub.commits["me/tiny"]) == 2  # the empty repository's and ours


def test_interrupted_upload_goes_on_without_sending_twice(folder, hub, monkeypatch, capsys):
    hub.refuse_put_after = 2
    assert send(hub, folder, monkeypatch=monkeypatch) == 2
    assert "again" in capsys.readouterr().err
    assert hub.repos["me/tiny"] == {}  # nothing half-published
    assert len(hub.puts) == 2
    hub.refuse_put_after = None
    assert send(hub, folder, monkeypatch=monkeypatch) == 0
    assert len(hub.puts) == len(set(hub.puts)) > 2
    sent = list(hub.puts)
    assert send(hub, folder, monkeypatch=monkeypatch) == 0  # nothing has changed: neither files nor a commit
    assert hub.puts == sent
    assert len(hub.commits["me/tiny"]) == 2


def test_other_files_are_deleted_only_when_asked(folder, hub, monkeypatch):
    hub.repos["me/tiny"] = {"old.txt": ("file", b"old"), ".gitattributes": ("file", b"kept")}
    hub.commits["me/tiny"], hub.private["me/tiny"] = ["0" * 40], False
    assert send(hub, folder, monkeypatch=monkeypatch) == 0
    assert "old.txt" in hub.repos["me/tiny"]
    assert send(hub, folder, "--delete-others", monkeypatch=monkeypatch) == 0
    assert set(hub.repos["me/tiny"]) == {*contents(folder), ".gitattributes"}


def test_what_the_hub_lists_is_compared(folder, hub, monkeypatch):
    assert send(hub, folder, monkeypatch=monkeypatch) == 0
    api, entries = HfApi(endpoint=hub.url, token=TOKEN), publish.manifest(folder)
    publish.verify(folder, entries, "me/tiny", "main", api)
    hub.repos["me/tiny"]["LICENSE"] = ("file", b"another")
    del hub.repos["me/tiny"]["config.json"]
    with pytest.raises(ValueError, match=r"LICENSE, config.json \(missing\)"):
        publish.verify(folder, entries, "me/tiny", "main", api)


def test_a_failed_check_and_a_wrong_token_send_nothing(folder, hub, monkeypatch, capsys):
    assert publish.main([str(folder), "--repo-id", "me/tiny", "--no-generate"], HfApi(hub.url, token="wrong")) == 2
    assert "401" in capsys.readouterr().err
    (folder / "LICENSE").unlink()
    assert send(hub, folder, monkeypatch=monkeypatch) == 1
    assert "1 checks failed" in capsys.readouterr().out
    assert hub.repos == {}


def test_files_of_a_git_work_tree_are_those_of_git(folder):
    import subprocess

    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    _write(".gitignore", "runs/\n")(folder)
    _write("runs/x.txt", "private")(folder)
    assert "runs/x.txt" not in publish.list_files(folder, [])
    assert "config.json" in publish.list_files(folder, [])
    assert not [path for path in publish.list_files(folder, []) if path.startswith(".git/")]


def test_published_model_loads_from_the_hub(folder, hub, tmp_path):
    """The whole command, its clean loading process included, then from_pretrained by name with nothing local."""
    api = HfApi(endpoint=hub.url, token=TOKEN)
    assert publish.main([str(folder), "--repo-id", "me/tiny"], api) == 0
    code = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = AutoTokenizer.from_pretrained("me/tiny")("1 + 1 = ?", return_tensors="pt")
assert ids["input_ids"].shape[1] > 3
for where in ("me/tiny", {str(folder)!r}):
    model = AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True).eval()
    print(type(model).__name__, model(**ids).logits.double().sum().item())
"""
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": TOKEN}
    hub_line, local_line = run_python(code, **environment).splitlines()[-2:]
    assert hub_line == local_line
    assert hub_line.startswith("DeepseekForCausalLM")
    hub.unknown.clear()  # optional files that transformers asks for


def test_adapter(folder, hub, tmp_path, monkeypatch, capsys):
    base = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    adapter = tmp_path / "adapter"
    get_peft_model(base, lora_config(base, rank=2)).save_pretrained(adapter, save_embedding_layers=False)
    shutil.copy(ROOT / "LICENSE", adapter)
    assert {"card metadata", "card base model", "adapter config"} <= failures(
        adapter
    ).keys()  # PEFT wrote a local path
    options = ["--repo-id", "me/lora", "--base-model", "me/tiny", "--base-folder", str(folder)]
    options += ["--license", "apache-2.0", "--language", "en", "zh", "--pipeline-tag", "text-generation"]
    assert publish.main([str(adapter), *options], HfApi(endpoint=hub.url, token=TOKEN)) == 0
    assert "8 tokens generated" in capsys.readouterr().out
    assert json.loads(hub.content("me/lora", "adapter_config.json"))["base_model_name_or_path"] == "me/tiny"
    assert str(folder).encode() not in b"".join(contents(adapter).values())
    # an adapter of another model is found out
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors["base_model.model.model.layers.9.x.lora_A.weight"] = tensors.pop(name)
    save_file(tensors, adapter / "adapter_model.safetensors")
    found = try_loading.try_adapter(adapter, folder, 2)
    assert found["missing"] == [name]
    assert publish._judge_adapter(found)[0] == publish.FAILED
