"""What all commands have in common: which modules are commands, how they end, and what they say before torch is loaded."""

import itertools
import os
import re
import subprocess
import sys

import pytest
from checks import ROOT

from common.command import Parser, one_line_errors, run_command

PACKAGES = ("compress", "corpus", "finetune", "pretrain", "tokenization", "tools")
SCRIPTS = ("add_remote_code", "try_loading")  # run by their paths, without this repository's packages


def commands() -> list[str]:
    """The modules that `python -m` runs, found by their last line."""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).glob("*.py"))]
    files += sorted(ROOT.glob("*.py"))
    endings = {file: file.read_text(encoding="utf-8").rstrip().rpartition("\n")[2].strip() for file in files}
    runs = ("run_command(main)", "sys.exit(main())")
    found = [file.relative_to(ROOT).with_suffix("") for file, ending in endings.items() if ending in runs]
    return [".".join(path.parts) for path in found if path.name not in SCRIPTS]


def source(module: str) -> str:
    return (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")


def run_module(module: str, *options: str, forbidden: tuple[str, ...] = (), **variables: str):
    """Run a command in a terminal of 80 columns, with some modules that cannot be imported."""
    program = f"import runpy, sys\nfor name in {forbidden!r}:\n    sys.modules[name] = None\n"
    program += f"sys.argv = [{module!r}, *sys.argv[1:]]\nrunpy.run_module({module!r}, run_name='__main__')"
    environment = {**os.environ, "COLUMNS": "80", "HF_HUB_OFFLINE": "1", **variables}
    command = [sys.executable, "-c", program, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_the_commands_are_found():
    assert {"chat", "demo", "serve", "corpus.deduplicate", "finetune.sft", "tools.plan"} <= set(commands())


def test_every_module_is_a_command_or_says_that_it_is_none():
    for package in PACKAGES:
        for file in (ROOT / package).glob("*.py"):
            text = file.read_text(encoding="utf-8")
            ending = text.rpartition('if __name__ == "__main__":\n')[2].strip()
            if file.stem not in SCRIPTS:
                assert ending == "run_command(main)" or ending.startswith("no_command("), file
                assert ("\ndef main(" in text) == (ending == "run_command(main)"), file


def test_a_module_that_is_no_command_names_the_command():
    done = subprocess.run([sys.executable, "-m", "corpus.text"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "python -m corpus.deduplicate" in done.stderr


@pytest.mark.parametrize("module", commands())
def test_help_and_wrong_options_need_no_torch(module):
    """Which takes seconds to import. The help is grouped or short, and fits the terminal, without colours."""
    heavy = ("torch", "transformers", "datasets")
    shown = run_module(module, "--help", forbidden=heavy)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("usage: ")
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert "\x1b" not in shown.stdout
    for line, after in itertools.pairwise([*shown.stdout.splitlines(), ""]):
        if line.startswith("  -"):  # an option, explained in its line or below it
            assert "  " in line.strip() or after.startswith(" " * 10), line
    refused = run_module(module, "--nonsense", forbidden=heavy)
    assert refused.returncode == 2, refused.stderr
    assert "Traceback" not in refused.stderr
    assert "usage" in refused.stderr or "nonsense" in refused.stderr


@pytest.mark.parametrize("module", sorted({*commands()} - {"tools.to_gguf"}))  # which hands on what it does not know
def test_a_misspelt_option_gets_a_suggestion(module):
    """Also where options are missing that must be given, since it may be one of them."""
    option = max(
        re.findall(r"^  (?:-\w, )?(--[a-z-]+)", run_module(module, "--help").stdout, re.MULTILINE),
        key=len,
        default="--help",
    )
    refused = run_module(module, f"{option}x", "1")
    assert refused.returncode == 2
    assert f"unknown argument '{option}x'; did you mean '{option}'?" in refused.stderr


def test_only_options_are_taken_for_misspelt():
    parser = Parser()
    parser.add_argument("--text")
    parser.add_argument("more", nargs="*")
    assert parser.parse_args(["--tex", "--no option", "--", "--textx"]).__dict__ == {
        "text": "--no option",
        "more": ["--textx"],
    }


@pytest.mark.parametrize("module", commands())
def test_every_command_names_the_next_one(module):
    text = source(module)
    if "finetune.run import" in text and "command(" in text:  # the trainers share their end
        text = source("finetune.run")
    # A chat and a server have no end of their own.
    assert module in ("chat", "serve") or "next: " in text


NOWHERE = "没有 nothing"  # a name with a blank, not ASCII, of no file or folder
# Of each command, options of which one names what is not there; {file} is there, and {new} a place to write.
UNKNOWN = {
    "chat": ["--model", NOWHERE, "--prompt", "x"],
    "demo": ["--model", NOWHERE],
    "serve": ["--model", NOWHERE],
    "compress.compare": [NOWHERE, "--texts", "{file}", "--output", "{new}"],
    "compress.prune": ["--model", NOWHERE, "--keep", "0.5", "--output", "{new}", "--calibration", "{file}"],
    "compress.quantise": ["--model", NOWHERE, "--output", "{new}"],
    "compress.report": [NOWHERE],
    "corpus.deduplicate": [NOWHERE, "--output", "{new}"],
    "corpus.split": [NOWHERE, "--output", "{new}.jsonl"],
    "finetune.dpo": ["--model", ".", "--data", f"{NOWHERE}.jsonl", "--output", "{new}"],
    "finetune.evaluate": ["--model", NOWHERE, "--data", "{file}"],
    "finetune.grpo": ["--model", ".", "--data", f"{NOWHERE}.jsonl", "--output", "{new}"],
    "finetune.merge": ["--model", ".", "--adapter", NOWHERE, "--output", "{new}"],
    "finetune.sft": ["--config", NOWHERE],
    "pretrain.config": ["--tokenizer", NOWHERE, "--parameters", "15M", "--output", "{new}"],
    "pretrain.data": ["--files", "en", NOWHERE, "--tokenizer", ".", "--output", "{new}"],
    "pretrain.dense_twin": [NOWHERE, "{new}"],
    "pretrain.evaluate": [NOWHERE, "--data", "."],
    "pretrain.plot": [NOWHERE, "--output", "{new}"],
    "pretrain.report": [NOWHERE],
    "pretrain.train": ["--model", ".", "--data", NOWHERE, "--run-dir", "{new}", "--steps", "1"],
    "tokenization.extend": ["--model", NOWHERE, "--text", "{file}", "--output", "{new}"],
    "tokenization.report": ["--tokenizers", NOWHERE, "--files", "en", "{file}", "--output", "{new}"],
    "tokenization.train_bpe": [NOWHERE, "--output", "{new}"],
    "tools.add_indexer": [NOWHERE, "{new}"],
    "tools.evaluate": [NOWHERE, "--text", "en={file}"],
    "tools.long_context": [NOWHERE, "--output", "{new}.json"],
    "tools.plan": [NOWHERE],
    "tools.prefix": ["--model", NOWHERE, "--text", "{file}", "--output", "{new}"],
    "tools.publish": [NOWHERE, "--dry-run"],
    "tools.to_gguf": [NOWHERE, "{new}", "--llama-cpp", NOWHERE],
    "tools.upcycle_nsa": [NOWHERE, "{new}"],
}


def test_every_command_that_reads_something_is_asked_for_what_is_not_there():
    assert set(commands()) - set(UNKNOWN) == {"finetune.problems"}  # which reads nothing


@pytest.mark.slow
@pytest.mark.parametrize("module", UNKNOWN)
def test_what_is_not_there_is_one_line_that_names_it(module, tmp_path):
    (tmp_path / "here.txt").write_text("Some text.", encoding="utf-8")
    places = {"{file}": str(tmp_path / "here.txt"), "{new}": str(tmp_path / "新 new")}
    options = []
    for option in UNKNOWN[module]:
        for place, path in places.items():
            option = option.replace(place, path)
        options.append(option)
    done = run_module(module, *options, NO_COLOR="1")
    assert done.returncode in (1, 2), done.stdout + done.stderr
    assert NOWHERE in done.stderr.replace("\n", " "), done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["here.txt"]


def test_names_that_stand_in_two_places_are_the_same():
    """Once without torch, for the command line, and once where the work is done."""
    from compress import prune, scores
    from configuration_deepseek import FAMILY_DEFAULTS
    from finetune import config, lora
    from pretrain import optimizers, train
    from tools import add_indexer, long_context, upcycle_nsa

    assert tuple(long_context.WORDINGS) == long_context.LANGUAGES
    assert add_indexer.SIZES.items() <= FAMILY_DEFAULTS["deepseek_v32"].items()
    sizes = {f"nsa_{name}": value for name, (value, _) in upcycle_nsa.SIZES.items()}
    assert sizes == {k: v for k, v in FAMILY_DEFAULTS["deepseek_nsa"].items() if k.startswith("nsa_")}
    assert config.TARGETS == lora.TARGETS
    assert tuple(scores.SCORES) == prune.SCORES
    assert train.OPTIMIZERS == optimizers.OPTIMIZERS


@pytest.mark.parametrize("kind", [ValueError, OSError, ModuleNotFoundError, FloatingPointError])
def test_what_the_user_can_mend_is_one_line(kind, capsys):
    @one_line_errors
    def main():
        raise kind("what is wrong")

    assert main() == 2
    assert capsys.readouterr() == ("", "error: what is wrong\n")


def test_mistakes_of_the_program_keep_their_traceback():
    with pytest.raises(KeyError):
        one_line_errors(lambda: {}["x"])()


def test_ctrl_c_is_no_traceback(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_command(interrupted)
    assert end.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_ctrl_c_in_imports_is_no_traceback(tmp_path):
    program = "import sys, common.extras as extras\nsys.modules['__main__'].__file__ = extras.__file__\n"
    program += "with extras.extra('train'):\n    raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "\ninterrupted while loading\n")


def test_a_broken_pipe_is_no_traceback():
    program = (
        "from common.command import run_command\ndef main():\n    for i in range(10**5):\n        print('line', i)\n"
    )
    program += "    return 0\nrun_command(main)"
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "$0" | head -n 1; exit ${{PIPESTATUS[0]}}', program],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (141, "line 0\n", "")
