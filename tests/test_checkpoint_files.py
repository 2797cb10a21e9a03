"""The one list of what belongs to a checkpoint, and all that use it, on a folder that holds much else."""

import json
import shutil
import subprocess

import pytest
from checks import ROOT
from huggingface_hub import ModelCard
from tiny_chat import VOCAB_SIZE, add_tokenizer

from common.card import model_name
from common.checkpoint_files import belonging
from compress import prune, quantise
from finetune import merge
from finetune.lora import add_lora
from tokenization import extend
from tools import add_indexer, publish

OTHERS = ("Makefile", "chat.json", "notes.txt", "results.json", "train.py", "pytorch_model.bin", "old.safetensors.bak")
CARD = """---
license: mit
language: [en, zh]
model-index: []
---
# The base

It has 1.641 bits per byte.
"""


@pytest.fixture
def crowded(checkpoint):
    """A checkpoint among private and other files."""
    folder = add_tokenizer(checkpoint("v3", vocab_size=VOCAB_SIZE))
    for name in OTHERS:
        (folder / name).write_text("secret words")
    (folder / "runs").mkdir()
    (folder / "runs" / "model.safetensors").write_text("other weights")
    shutil.copy(ROOT / "LICENSE", folder)
    (folder / "README.md").write_text(CARD)
    return folder


def _extend(source, output):
    text = output.parent / "text.txt"
    text.write_text("a b c d e f g h number number number " * 20)
    arguments = ["--model", source, "--text", text, "--output", output, "--new-tokens", 3]
    return extend.main([str(part) for part in arguments])


def _merge(source, output):
    from common.loading import load_model

    adapter = output.parent / "my-adapter"
    add_lora(load_model(source), targets=["attention"], rank=2).save_pretrained(adapter, save_embedding_layers=False)
    return merge.main(["--model", str(source), "--adapter", str(adapter), "--output", str(output)])


def _add_indexer(source, output):
    sizes = ["--index-topk", "16", "--index-n-heads", "4", "--index-head-dim", "12"]
    return add_indexer.main([str(source), str(output), *sizes])


def _prune(source, output):
    config = json.loads((source / "config.json").read_text())  # without groups, of which too few experts could go
    (source / "config.json").write_text(json.dumps({**config, "n_group": 1, "topk_group": 1}))
    text = output.parent / "text.txt"
    text.write_text("It was a dark night, and 从前有一个国王。 def fib(n): return n\n" * 50)
    options = ["--keep", "4", "--calibration", str(text), "--tokens", "1000", "--unseen", "drop"]
    return prune.main(["--model", str(source), "--output", str(output), *options])


def _quantise(source, output):
    return quantise.main(["--model", str(source), "--output", str(output)])


WRITERS = {
    "extend": (_extend, "3 more tokens"),
    "merge": (_merge, "my-adapter"),
    "indexer": (_add_indexer, "indexer"),
    "prune": (_prune, "4 of 8 routed experts"),
    "quantise": (_quantise, "in FP8"),
}
REPORTS = {"pruning.json", "pruning.html"}  # on how a model came to be, beside it


@pytest.mark.parametrize("tool", WRITERS)
def test_new_checkpoints_hold_what_belongs_and_a_card_of_their_own(crowded, tmp_path, tool):
    write, says = WRITERS[tool]
    output = tmp_path / "new-model"
    assert write(crowded, output.with_name("new-model")) == 0
    files = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert not files & set(OTHERS)
    assert files - REPORTS == set(belonging(output))
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "LICENSE",
        "README.md",
    } <= files
    card = (output / "README.md").read_text()
    assert "# new-model" in card
    assert says in card
    assert "1.641" not in card
    assert str(tmp_path) not in card
    config = json.loads((output / "config.json").read_text())
    assert f"| vocabulary | {config['vocab_size']:,} |" in card
    data = ModelCard(card).data
    assert (data.license, data.language) == ("mit", ["en", "zh"])
    assert {"custom_code", "deepseek"} == set(data.tags)
    # all but a base model's words is there that publishing asks of a card
    assert [check for check in publish.check_card(output, False) if check.status == publish.FAILED] == []


def test_publishing_leaves_out_what_does_not_belong_and_names_it(crowded):
    paths = publish.list_files(crowded, [])
    assert not set(paths) & set(OTHERS)
    assert not [path for path in paths if path.startswith("runs/")]
    assert {"model.safetensors", "modeling_deepseek.py", "moe_deepseek.py", "README.md", "LICENSE"} <= set(paths)
    check = publish.check_left_out(crowded, paths, [])
    assert check.status == publish.WARNING
    assert "Makefile, chat.json" in check.text
    assert "--include" in check.text
    assert "notes.txt" in publish.list_files(crowded, [], ["*.txt"])


def test_in_a_work_tree_what_git_tracks_belongs_too(crowded):
    git = ["git", "-C", str(crowded), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "Makefile"], check=True)
    paths = publish.list_files(crowded, [])
    assert "Makefile" in paths
    assert "chat.json" not in paths


def test_a_tokenizers_own_code_belongs(crowded):
    settings = json.loads((crowded / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_x.Slow", None]}
    (crowded / "tokenizer_config.json").write_text(json.dumps(settings))
    (crowded / "tokenization_x.py").write_text("from .words_x import WORDS\n")
    (crowded / "words_x.py").write_text("WORDS = ()\n")
    assert {"tokenization_x.py", "words_x.py"} <= set(belonging(crowded))
    assert "train.py" not in belonging(crowded)


def test_names_of_cached_models_are_those_of_the_hub(tmp_path):
    folder = tmp_path / "models--deepseek-ai--DeepSeek-V2-Lite" / "snapshots" / "abc"
    assert model_name(folder) == "deepseek-ai/DeepSeek-V2-Lite"
    assert model_name(tmp_path / "mine") == "mine"
