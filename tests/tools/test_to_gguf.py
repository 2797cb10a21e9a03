"""tools/to_gguf.py: what it tells llama.cpp's converter, by a converter that only shows what it was told."""

import json
import subprocess
import sys

import pytest
from checks import ROOT

from tokenization.chains import build_chain
from tools.to_gguf import main, pre_tokenizer_name

CONVERTER = """
import sys
from conversion.base import TextModel
from conversion.deepseek import DeepseekV32Model

print([DeepseekV32Model().get_vocab_base_pre(None), DeepseekV32Model().set_vocab(), *sys.argv[1:]])
"""
CLASSES = {
    "base.py": """
class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        return "by hash"

    def set_vocab(self):
        return "as it is"
""",
    "deepseek.py": """
from .base import TextModel

class DeepseekV32Model(TextModel):
    def set_vocab(self):
        return "asks for bos"
""",
}


@pytest.fixture
def llama_cpp(tmp_path):
    folder = tmp_path / "llama.cpp"
    (folder / "conversion").mkdir(parents=True)
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    for name, code in CLASSES.items():
        (folder / "conversion" / name).write_text(code)
    return folder


def convert(folder, llama_cpp) -> str:
    command = [sys.executable, "-m", "tools.to_gguf", folder, "out.gguf", "--llama-cpp", llama_cpp, "--outtype", "f16"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def test_tokenizer_of_this_repository(llama_cpp):
    expected = ["deepseek-v3", "as it is", str(ROOT), "--outfile", "out.gguf", "--outtype", "f16"]
    said, after = convert(ROOT, llama_cpp).splitlines()
    assert said == str(expected)
    assert after.startswith("next: llama-cli")


def test_other_tokenizers_are_left_to_the_converter(llama_cpp, tmp_path):
    tokenizer = json.loads((ROOT / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}"
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert convert(tmp_path, llama_cpp).startswith("['by hash', 'asks for bos', ")


def test_names(tmp_path):
    assert pre_tokenizer_name(tmp_path) is None
    tokenizer = {"pre_tokenizer": json.loads(build_chain("llm").__getstate__())}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert pre_tokenizer_name(tmp_path) == "deepseek-llm"


def test_folder_without_converter(tmp_path, capsys):
    assert main([str(ROOT), str(tmp_path / "out.gguf"), "--llama-cpp", str(tmp_path)]) == 2
    assert "no convert_hf_to_gguf.py" in capsys.readouterr().err
