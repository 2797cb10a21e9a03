"""The repository as others load it: import rules of remote code, local folders, saved folders, the Hub's cache."""

import ast
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from checks import ROOT, run_python
from conftest import copy_code
from tiny import FAMILIES, make_model, make_tokens
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

MODULES = {path.stem: path for path in sorted(ROOT.glob("*_deepseek.py"))}
THIRD_PARTY = {"torch", "transformers", "safetensors"}  # the last one is in every installation of transformers
KINDS = {"attention_deepseek", "cache_deepseek", "layers_deepseek", "linear_deepseek"}
SPARSE = {"kernels_deepseek", "selection_deepseek", "spans_deepseek"}
# Who may import whom, beyond torch, transformers and the standard library.
ALLOWED = {
    "configuration_deepseek": set(),
    "layers_deepseek": {"linear_deepseek"},
    "linear_deepseek": {"compat_deepseek"},
    "cache_deepseek": {"compat_deepseek"},
    "compat_deepseek": set(),
    "spans_deepseek": set(),
    "selection_deepseek": set(),
    "kernels_deepseek": set(),
    "loading_deepseek": set(),
    "losses_deepseek": set(),
    "moe_deepseek": {"layers_deepseek", "linear_deepseek"},
    "generation_deepseek": {
        "attention_deepseek",
        "cache_deepseek",
        "compat_deepseek",
        "drafts_deepseek",
        "prefix_deepseek",
    },
    "drafts_deepseek": {"attention_deepseek", "cache_deepseek", "compat_deepseek", "linear_deepseek"},
    "prefix_deepseek": set(),
    # kinds of attention: what all share, what some share, each kind and its own kernels
    "attention_deepseek": {"cache_deepseek", "compat_deepseek"},
    "gqa_deepseek": {*KINDS, "compat_deepseek"},
    "mla_deepseek": {*KINDS, "compat_deepseek"},
    "dsa_deepseek": {*KINDS, *SPARSE, "compat_deepseek", "mla_deepseek", "dsa_kernels_deepseek"},
    "nsa_deepseek": {*KINDS, *SPARSE, "compat_deepseek", "nsa_kernels_deepseek"},
    "nsa_kernels_deepseek": {"kernels_deepseek", "selection_deepseek"},
    "dsa_kernels_deepseek": {"kernels_deepseek"},
    "modeling_deepseek": set(MODULES) - {"modeling_deepseek"},
}


# Who may know a kind of attention by its name: the configuration, which says it, and the table of the kinds.
NAMES_OF_KINDS = re.compile(r"""attention_kind\b|has_indexer|["'](?:gqa|mla|dsa|nsa)["']""")


def imports(path: Path) -> list[tuple[ast.AST, int, str]]:
    """-> (node, leading dots, module) of every import statement, wherever it stands"""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node, 0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node, node.level, node.module or ""))
    return found


@pytest.fixture(params=MODULES)
def module(request) -> Path:
    return MODULES[request.param]


# Rules for the source


def test_every_module_has_its_place_in_the_graph():
    assert MODULES.keys() == ALLOWED.keys()


def test_only_torch_and_transformers(module):
    """And, where a missing one is caught, Triton."""
    attempts = [node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.Try)]
    caught = {child.lineno for attempt in attempts for child in attempt.body}
    for node, level, name in imports(module):
        if level == 0:
            top = name.split(".")[0]
            allowed = THIRD_PARTY | sys.stdlib_module_names | ({"triton"} if node.lineno in caught else set())
            assert top in allowed, f"line {node.lineno}: {name}"


def test_siblings_are_flat_and_one_way(module):
    for node, level, name in imports(module):
        if level:
            assert level == 1, f"line {node.lineno}: parent folders are not copied"
            assert name, f"line {node.lineno}: `from . import x` is not seen by the loader"
            assert "." not in name, f"line {node.lineno}: sub-packages are not copied"
            assert name in ALLOWED[module.stem], f"line {node.lineno}: {module.stem} must not import {name}"
            assert node.col_offset == 0, f"line {node.lineno}: a guarded relative import is not guarded for the loader"


def test_only_the_table_names_kinds_of_attention(module):
    """Others ask the layers, so that a kind is added in one file and one line."""
    found = [
        f"line {number}: {line.strip()}"
        for number, line in enumerate(module.read_text().splitlines(), start=1)
        if NAMES_OF_KINDS.search(line)
    ]
    if module.stem == "configuration_deepseek":
        return
    if module.stem == "modeling_deepseek":
        table = [line for line in found if "ATTENTION_KINDS = " in line]
        assert len(table) == 1
        found.remove(table[0])
    assert not found


def test_modeling_imports_every_sibling():
    """Older loaders copy only what the entry file names."""
    direct = {name for _, level, name in imports(MODULES["modeling_deepseek"]) if level}
    reachable, waiting = set(), ["modeling_deepseek", "configuration_deepseek"]
    while waiting:
        for _, level, name in imports(MODULES[waiting.pop()]):
            if level and name not in reachable:
                reachable.add(name)
                waiting.append(name)
    assert direct == reachable == set(MODULES) - {"modeling_deepseek"}


def test_loader_sees_the_imports_that_python_sees(module):
    """The loader searches the text with regular expressions, which also read docstrings."""
    text = module.read_text()
    seen = set(re.findall(r"^\s*import\s+\.(\S+)\s*$", text, re.M)) | set(
        re.findall(r"^\s*from\s+\.(\S+)\s+import", text, re.M)
    )
    assert seen == {name for _, level, name in imports(module) if level}


def test_no_optional_imports_in_functions(module):
    tree = ast.parse(module.read_text())
    inside = [
        child
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.Lambda))
        for child in ast.walk(function)
        if isinstance(child, (ast.Import, ast.ImportFrom))
    ]
    assert not inside, f"imports in functions, at lines {[node.lineno for node in inside]}"


def test_no_identity_across_copies(module):
    """The classes of one module may exist twice in a process: no isinstance on the config, no enums, no own errors."""
    tree = ast.parse(module.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            assert "Config" not in ast.unparse(node.args[1]), f"line {node.lineno}"
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base).split(".")[-1] for base in node.bases}
            assert not any(base.endswith(("Enum", "Error", "Exception")) for base in bases), f"line {node.lineno}"


def test_ascii_only(module):
    assert module.read_text().isascii()


# Loading


@pytest.mark.compatibility("Auto classes, `trust_remote_code`")
@pytest.mark.parametrize("family", FAMILIES)
def test_local_folder(family, checkpoint):
    folder, tokens = checkpoint(family), make_tokens(1, 9)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(config).__name__ == "DeepseekConfig"
    assert config.checkpoint_model_type == FAMILIES[family]["model_type"]
    model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert type(model).__module__.startswith("transformers_modules.")
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(model(tokens).logits, make_model(family)(tokens).logits)


@pytest.mark.parametrize("family", ["llama", "v3"])
def test_saved_again(family, checkpoint, tmp_path):
    """save_pretrained copies the code; the new folder stands alone."""
    folder, tokens, again = checkpoint(family), make_tokens(1, 9), tmp_path / "again"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(again)
    assert {path.name for path in again.glob("*.py")} == {path.name for path in MODULES.values()}
    shutil.rmtree(folder)
    saved = json.loads((again / "config.json").read_text())
    assert saved["model_type"] == FAMILIES[family]["model_type"]
    assert saved["auto_map"]["AutoModelForCausalLM"] == "modeling_deepseek.DeepseekForCausalLM"
    assert saved["auto_map"]["AutoConfig"] == "configuration_deepseek.DeepseekConfig"
    loaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_saved_again_keeps_the_other_classes(checkpoint, tmp_path):
    """A fine-tuned copy must still serve AutoModel, which serving engines ask for."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint("v3"), trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["auto_map"] == json.loads((ROOT / "config.json").read_text())["auto_map"]


@pytest.mark.parametrize("family", ["llama", "v3"])
def test_base_model(family, checkpoint):
    folder, tokens = checkpoint(family), make_tokens(1, 9)
    model, report = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert type(model).__name__ == "DeepseekModel"
    assert not report["missing_keys"]
    expected = make_model(family).model(tokens).last_hidden_state
    assert torch.equal(model(tokens).last_hidden_state, expected)


@pytest.mark.parametrize(
    ("auto_class", "shape"),
    [(AutoModelForSequenceClassification, (2, 3)), (AutoModelForTokenClassification, (2, 9, 3))],
)
@pytest.mark.parametrize("family", ["llama", "v3"])
def test_classification(family, auto_class, shape, checkpoint, tmp_path):
    folder, tokens = checkpoint(family), make_tokens(2, 9)
    model, report = auto_class.from_pretrained(folder, trust_remote_code=True, num_labels=3, output_loading_info=True)
    assert all("score" in key for key in report["missing_keys"]), report["missing_keys"]
    logits = model.eval()(tokens).logits
    assert logits.shape == shape
    model.save_pretrained(tmp_path / "again")
    again = auto_class.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    assert torch.equal(again(tokens).logits, logits)


@pytest.mark.parametrize("family", ["llama", "v3", "v32", "nsa"])
def test_question_answering(family, checkpoint, tmp_path):
    """Every checkpoint of a language model loads, under its own names and but for the new head."""
    folder, tokens = checkpoint(family), make_tokens(2, 9)
    load = AutoModelForQuestionAnswering.from_pretrained
    model, report = load(folder, trust_remote_code=True, output_loading_info=True)
    assert report["missing_keys"] == {"qa_outputs.weight", "qa_outputs.bias"}
    states = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()(tokens).last_hidden_state
    expected = model.eval()(tokens)
    assert torch.equal(expected.start_logits, model.qa_outputs(states)[..., 0])
    model.save_pretrained(tmp_path / "again")
    again, report = load(tmp_path / "again", trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name in ("start_logits", "end_logits"):
        assert torch.equal(again.eval()(tokens)[name], expected[name])


def test_from_config(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint("v3"), trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert model(make_tokens(1, 4)).logits.isfinite().all()


def test_two_versions_in_one_process(checkpoint, tmp_path):
    """The module is executed twice; neither copy must disturb the other."""
    folder, tokens = checkpoint("v3"), make_tokens(1, 9)
    first = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    expected = first(tokens).logits
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "modeling_deepseek.py").write_text((other / "modeling_deepseek.py").read_text() + "\n# changed\n")
    second = AutoModelForCausalLM.from_pretrained(other, trust_remote_code=True)
    assert type(first) is not type(second)
    assert torch.equal(second(tokens).logits, expected)
    assert torch.equal(first(tokens).logits, expected)
    first.save_pretrained(tmp_path / "first")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "first", trust_remote_code=True)
    assert torch.equal(third(tokens).logits, expected)


@pytest.mark.parametrize("family", ["llama", "v3"])
def test_hub_cache(family, checkpoint, tmp_path):
    """By repository id, as after a download: the Hub path checks every sibling's imports, the local one does not."""
    folder, name, commit = checkpoint(family), "someone/tiny-model.v1", "0" * 40
    repository = tmp_path / "home" / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    torch.save(make_tokens(1, 9), tmp_path / "tokens")
    printed = run_python(
        f"""
import torch
from transformers import AutoModelForCausalLM, AutoConfig
config = AutoConfig.from_pretrained({name!r}, trust_remote_code=True)
model, report = AutoModelForCausalLM.from_pretrained({name!r}, trust_remote_code=True, output_loading_info=True)
assert not report["missing_keys"], report
torch.save(model(torch.load({str(tmp_path / "tokens")!r})).logits, {str(tmp_path / "logits")!r})
model.save_pretrained({str(tmp_path / "saved")!r})
print(type(model).__module__)
""",
        HF_HOME=str(tmp_path / "home"),
    )
    assert "transformers_modules.someone" in printed
    with torch.no_grad():
        expected = make_model(family)(make_tokens(1, 9)).logits
    assert torch.allclose(torch.load(tmp_path / "logits"), expected, atol=1e-5)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["auto_map"]["AutoModelForCausalLM"].endswith("modeling_deepseek.DeepseekForCausalLM")


def test_pipeline(checkpoint):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    folder = checkpoint("v3")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w0", eos_token="w1", pad_token="w2", padding_side="left"
    ).save_pretrained(folder)
    generate = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    assert type(generate.model).__name__ == "DeepseekForCausalLM"
    texts = generate(
        ["w5 w6 w7", "w9"], max_new_tokens=5, do_sample=False, batch_size=2, return_full_text=False, eos_token_id=None
    )
    expected = make_model("v3").generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=2
    )[0, 3:]
    assert texts[0][0]["generated_text"].split() == [f"w{i}" for i in expected.tolist()]


def test_without_other_packages(code_dir):
    """Only torch, transformers and what transformers itself cannot do without."""
    run_python(
        f"""
import importlib.metadata, importlib.util, re, sys
from importlib.machinery import ModuleSpec

def requirements(name, found):
    if name in found:
        return found
    found.add(name)
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return found
    for line in lines:
        if "extra ==" not in line:
            requirements(re.split(r"[^A-Za-z0-9_.-]", line)[0].lower().replace("_", "-"), found)
    return found

needed = requirements("torch", requirements("transformers", set()))
owners = {{}}  # importlib.metadata.packages_distributions() misses some before Python 3.11
for distribution in importlib.metadata.distributions():
    for file in distribution.files or ():
        if file.suffix in (".py", ".so"):
            owners.setdefault(file.parts[0].split(".")[0], set()).add(distribution.metadata["Name"])
blocked = {{top for top, names in owners.items() if not any(n.lower().replace("_", "-") in needed for n in names)}}
assert "pytest" in blocked and "accelerate" in blocked and "numpy" not in blocked, sorted(blocked)

class Finder:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in blocked else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Finder(finder) for finder in sys.meta_path]
distributions = importlib.metadata.distribution
def hidden(name):
    if name.lower().replace("_", "-") not in needed:
        raise importlib.metadata.PackageNotFoundError(name)
    return distributions(name)
importlib.metadata.distribution = hidden

spec = ModuleSpec("repo", None, is_package=True)
spec.submodule_search_locations = [{str(code_dir)!r}]
sys.modules["repo"] = importlib.util.module_from_spec(spec)
import torch
from repo.modeling_deepseek import DeepseekForCausalLM, DeepseekConfig
config = DeepseekConfig(**{FAMILIES["v3"]!r})
model = DeepseekForCausalLM(config)
tokens = torch.arange(3, 13)[None]
model.train()(tokens, labels=tokens).loss.backward()
model.eval().generate(tokens, max_new_tokens=3)
"""
    )


def test_copied_code_is_complete(tmp_path):
    assert {path.stem for path in copy_code(tmp_path).glob("*.py")} == set(MODULES)
