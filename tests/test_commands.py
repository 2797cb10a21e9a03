"""What all commands have in common: which modules are commands, how they end, and what they say before torch is loaded."""

import subprocess
import sys

import pytest
from checks import ROOT

from common.command import run_command

PACKAGES = ("corpus", "finetune", "pretrain", "tokenization", "tools")
SCRIPTS = ("add_remote_code", "try_loading")  # run by their paths, without this repository's packages
EARLY = (
    *("pretrain.train", "pretrain.data", "pretrain.evaluate", "tokenization.extend", "tools.publish"),
    *("finetune.merge", "finetune.sft", "finetune.dpo", "finetune.grpo", "chat"),
)


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


@pytest.mark.parametrize("module", EARLY)
@pytest.mark.parametrize(("option", "code"), [("--nonsense", 2), ("--help", 0)])
def test_options_are_read_before_torch_is_imported(module, option, code):
    program = "import runpy, sys\nsys.modules['torch'] = None\nsys.argv = [sys.argv[1], sys.argv[2]]\n"
    program += f"runpy.run_module({module!r}, run_name='__main__')"
    command = [sys.executable, "-c", program, module, option]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert ("usage" in done.stdout + done.stderr) or "nonsense" in done.stderr


def test_names_that_stand_in_two_places_are_the_same():
    """Once without torch, for the command line, and once where the work is done."""
    from finetune import config, lora
    from pretrain import optimizers, train

    assert config.TARGETS == lora.TARGETS
    assert train.OPTIMIZERS == optimizers.OPTIMIZERS


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
