"""`demo.py` runs from start to end on a tiny checkpoint, as a program of its own."""

import subprocess
import sys

import pytest
from checks import ROOT
from tiny_chat import VOCAB_SIZE, add_tokenizer


def _run(*arguments):
    command = [sys.executable, str(ROOT / "demo.py"), "--quick", *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=200)


@pytest.mark.parametrize("family", ["v3", "llama"])
def test_demo_runs(checkpoint, family):
    folder = add_tokenizer(checkpoint(family, vocab_size=VOCAB_SIZE))
    result = _run("--model", str(folder))
    assert result.returncode == 0, result.stderr
    for expected in (
        "active for a token",
        "It writes Chinese",
        "tokens a second",
        "step 5 of 5",
        "English (12)",
        "correct",
    ):
        assert expected in result.stdout
    # What the configuration says about the cache is what the cache holds: 3 layers of 16 + 8 numbers of MLA, or of
    # keys and values of 2 heads of width 8; 4 bytes each.
    in_cache = {"v3": 3 * (16 + 8) * 4, "llama": 3 * 2 * 2 * 8 * 4}[family]
    assert f"{in_cache} bytes a token in float32" in result.stdout
    assert f"{in_cache} bytes of cache a token measured" in result.stdout
    assert "Traceback" not in result.stderr


def test_missing_model_is_explained(tmp_path):
    result = _run("--model", str(tmp_path / "absent"))
    assert result.returncode == 2
    # the last line: an optional library may have warned about itself before it
    assert any(line.startswith("error: ") and "absent" in line for line in result.stderr.splitlines())
