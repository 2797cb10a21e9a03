"""Each recipe of examples/ runs, on a tiny model and for a few steps; a user's whole path among them."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from checks import ROOT
from tiny_chat import VOCAB_SIZE, add_tokenizer
from tiny_corpus import TEXTS

EXAMPLES = ROOT / "examples"


def run(*command, **environment) -> str:
    """Runs a recipe from another folder -> its output; fails with it."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=variables, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture
def model(checkpoint):
    return add_tokenizer(checkpoint("v3", vocab_size=VOCAB_SIZE))


def test_every_recipe_is_listed():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for file in EXAMPLES.iterdir():
        assert file.name == "README.md" or f"({file.name})" in listed, file.name


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sft", "esft", "dpo", "grpo"])
def test_fine_tuning(model, tmp_path, recipe):
    command = "sft" if recipe == "esft" else recipe
    options = ["--model", model, "--output", tmp_path / "run", "--steps", 2, "--eval-steps", 2, "--cpu"]
    shown = run(
        sys.executable,
        "-m",
        f"finetune.{command}",
        "--config",
        EXAMPLES / f"{recipe}.yaml",
        *options,
        "--batch-size",
        4,
    )
    assert "next: python -m finetune.merge" in shown
    assert (tmp_path / "run" / "final" / "README.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["plain", "文件 夹"])
def test_from_a_text_file_to_a_chat_with_ones_own_model(tmp_path, where):
    """Also where folders have blanks and names that are not ASCII."""
    folder = tmp_path / where
    folder.mkdir()
    text = folder / "text.txt"
    text.write_text("\n\n".join(part for texts in TEXTS.values() for part in texts) * 3, encoding="utf-8")
    sizes = {"VOCABULARY": "300", "PARAMETERS": "300K", "STEPS": "12", "LESSON_STEPS": "3", "HELD_OUT": "0.3"}
    shown = run(EXAMPLES / "text_to_chat.sh", text, folder / "own", **sizes)
    assert "parameters" in shown
    assert "training memory" in shown
    assert f"chat.py --model {folder / 'own' / 'chat' / 'final'}" in shown
    assert "bits per byte" in (folder / "own/base/README.md").read_text(encoding="utf-8")
    assert "Samples after" in (folder / "own/run/report.html").read_text(encoding="utf-8")
    assert json.loads((folder / "own/config/config.json").read_text())["vocab_size"] == 300


@pytest.mark.slow
def test_pretraining_on_own_text(model, tmp_path):
    documents = tmp_path / "documents.jsonl"
    texts = [text for texts in TEXTS.values() for text in texts] * 3
    documents.write_text("".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i, text in enumerate(texts)))
    shown = run(
        EXAMPLES / "pretrain_own_text.sh", documents, tmp_path / "out", MODEL=str(model), STEPS="3", HELD_OUT="0.3"
    )
    assert "bits per byte" in shown


@pytest.mark.slow
def test_deduplication(tmp_path):
    file = tmp_path / "a.jsonl"
    stories = [
        f"The {place} was quiet when the travellers came, and nobody had told them that its people had left in spring. "
        f"They slept under the roof of an old mill, ate what they had carried, and went on over the hills to the sea."
        for place in ("village", "harbour", "monastery")
    ]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*stories, stories[0]]))
    run(EXAMPLES / "deduplicate.sh", tmp_path / "out", file)
    assert (tmp_path / "out" / "report").is_dir()
    kept = [line for path in (tmp_path / "out").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(kept) < 4


@pytest.mark.slow
def test_server_and_client(model):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHON": sys.executable}
    server = subprocess.Popen([str(EXAMPLES / "serve.sh"), str(model), "--port", str(port)], env=variables)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models")
                break
            except OSError:
                time.sleep(0.5)
        command = [sys.executable, EXAMPLES / "chat_client.py", "Hello", "--base-url", f"http://127.0.0.1:{port}/v1"]
        run(*command, "--max-tokens", 5)
    finally:
        server.terminate()
        server.wait(30)
