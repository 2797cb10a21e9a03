"""Nothing that exists is overwritten without being asked, by any command that writes."""

import json

import pytest

from benchmarks import common, places, publish
from finetune import problems
from pretrain import plot, train
from tokenization import report, train_bpe
from tools import evaluate, to_gguf


def _text(folder):
    (folder / "text.txt").write_text("one two three four five six seven " * 30)
    return folder / "text.txt"


# What writes -> the file that it would replace, and its command line.
COMMANDS = {
    "tokenization.train_bpe": (
        train_bpe.main,
        "out/tokenizer.json",
        lambda at: [_text(at), "--output", at / "out", "--vocab-size", 280],
    ),
    "tokenization.report": (
        report.main,
        "out/report.md",
        lambda at: ["--tokenizers", at, "--files", "en", _text(at), "--output", at / "out"],
    ),
    "finetune.problems": (problems.main, "out/train.jsonl", lambda at: ["--output", at / "out"]),
    "tools.evaluate": (
        evaluate.main,
        "out/results.json",
        lambda at: [at, "--text", f"text={_text(at)}", "--output", at / "out/results.json"],
    ),
    "tools.to_gguf": (to_gguf.main, "out/model.gguf", lambda at: [at, at / "out/model.gguf", "--llama-cpp", at]),
    "pretrain.plot": (plot.main, "out/mfu.png", lambda at: [_log(at), "--output", at / "out"]),
    **{
        f"pretrain.train {option}": (
            train.main,
            f"out/{file}",
            lambda at, option=option: [
                *("--model", at, "--data", at, "--run-dir", at / "run", "--steps", 200, "--tokenizer", at),
                *(option, at / "out"),
            ],
        )
        for option, file in {
            "--export-dir": "model.safetensors",
            "--export-dir ": "tokenizer.json",
            "--figures-dir": "loss.png",
        }.items()
    },
}


def _log(folder):
    (folder / "log.jsonl").write_text(json.dumps({"step": 1, "tokens": 5, "loss": 2.0, "mfu": 0.1}) + "\n")
    return folder / "log.jsonl"


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_there_stays(command, tmp_path, capsys):
    main, name, make = COMMANDS[command]
    arguments = [str(part).strip() for part in make(tmp_path)]
    file = tmp_path / name
    file.parent.mkdir()
    file.write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(arguments) in (1, 2)
    error = capsys.readouterr().err
    assert str(file) in error
    assert "name another" in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_figures_are_replaced_when_asked(tmp_path):
    (tmp_path / "mfu.png").write_text("mine")
    assert plot.main([str(_log(tmp_path)), "--output", str(tmp_path), "--overwrite"]) == 0
    assert (tmp_path / "mfu.png").read_bytes().startswith(b"\x89PNG")


def test_benchmarks_write_beside_the_committed_results_until_asked(tmp_path, monkeypatch, capsys):
    assert places.RESULTS != places.PUBLISHED
    results, published = tmp_path / "runs/benchmarks", tmp_path / "results"
    published.mkdir()
    (published / "decode.json").write_text("committed")
    for module in (common, publish):
        monkeypatch.setattr(module, "RESULTS", results)
    monkeypatch.setattr(publish, "PUBLISHED", published)
    assert publish.main(["decode"]) == 2
    common.write_results("decode", {"ms": 1})
    (results / "decode.png").write_text("drawn")
    assert (published / "decode.json").read_text() == "committed"
    assert "benchmarks.publish decode" in capsys.readouterr().out
    assert publish.main(["decode"]) == 0
    assert json.loads((published / "decode.json").read_text()) == {"ms": 1}
    assert (published / "decode.png").read_text() == "drawn"


def test_no_benchmark_knows_the_committed_results(monkeypatch):
    """They take the folder from benchmarks/places.py."""
    for file in places.PUBLISHED.parent.glob("*.py"):
        if file.name not in ("places.py", "publish.py"):
            text = file.read_text(encoding="utf-8")
            assert "PUBLISHED" not in text, file.name
            assert '/ "results"' not in text, file.name
