"""Makes an existing checkpoint folder use this repository's model code.

    python tools/add_remote_code.py path/to/DeepSeek-V2-Lite
    python tools/add_remote_code.py path/to/DeepSeek-V2-Lite --from someone/this-repository-on-the-hub
    python tools/add_remote_code.py path/to/DeepSeek-V2-Lite --remove

Copies the code files beside the weights and points `auto_map` in config.json at them, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads this implementation. Weights and tokenizer
are not touched. With `--from`, `auto_map` names the repository on the Hub that has the code, and no code is copied.
What was in the folder before is kept in `.before_remote_code/`, and `--remove` restores it.
"""

import argparse
import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # it runs by its path too, from any folder

from common.command import Parser, one_line_errors, run_command  # noqa: E402
from common.remote_code import AUTO_MAP, code_files, read_config, write_json  # noqa: E402

BACKUP = ".before_remote_code"


def add(folder: Path, repository: str | None = None) -> list[str]:
    """Copies the code, sets `auto_map`; returns what was done, a line each. Doing it again refreshes the code.

    Args:
        repository: name on the Hub of a copy of this repository, whose code is then used; no code is copied.

    Raises:
        ValueError: the folder is this repository, or no checkpoint of this family; or a wrong name.
    """
    if folder.resolve() == ROOT:
        raise ValueError(f"{folder} is this repository, which has the code already; name another checkpoint's folder.")
    if repository is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"--from is {repository!r}; it must be a repository's name on the Hub, owner/name.")
    config = read_config(folder)
    backup = folder / BACKUP
    done = []
    files = code_files() if repository is None else []
    if not backup.exists():
        names = ["config.json", *(file.name for file in files)]
        replaced = [name for name in names if (folder / name).exists()]
        staging = folder / f"{BACKUP}.part"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        for name in replaced:
            shutil.copy2(folder / name, staging / name)
        os.replace(staging, backup)
        done.append(f"kept the former {_listed(replaced)} in {BACKUP}/")
    for file in files:
        shutil.copy2(file, folder / file.name)
    if files:
        done.append(f"copied {_listed([file.name for file in files])}")
    prefix = "" if repository is None else f"{repository}--"
    config["auto_map"] = {auto: prefix + name for auto, name in AUTO_MAP.items()}
    write_json(folder / "config.json", config)
    done.append("set auto_map in config.json, which the Auto classes read")
    return done


def remove(folder: Path) -> list[str]:
    """Removes the code and restores what was there before; returns what was done.

    Raises:
        ValueError: the code was not added by this tool.
    """
    backup = folder / BACKUP
    if not backup.is_dir():
        raise ValueError(f"{folder} has no {BACKUP}/, so this tool did not add code to it; there is nothing to undo.")
    names = [file.name for file in code_files() if (folder / file.name).exists()]
    for name in names:
        (folder / name).unlink()
    restored = sorted(file.name for file in backup.iterdir())
    for name in restored:
        os.replace(backup / name, folder / name)
    backup.rmdir()
    return [f"removed {_listed(names)}", f"put back {_listed(restored)}"]


def _listed(names: list[str]) -> str:
    """Names of files for a reader: those of the code are counted."""
    code = sum(name.endswith("_deepseek.py") for name in names)
    listed = [name for name in names if not name.endswith("_deepseek.py")]
    if code:
        listed.append(f"{code} {'file' if code == 1 else 'files'} of model code (*_deepseek.py)")
    return " and ".join(listed) or "nothing"


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.split("\n\n")[0], epilog="Weights and tokenizer files are never touched.")
    parser.add_argument("checkpoint_dir", type=Path, help="folder with config.json and weights")
    parser.add_argument(
        "--from", dest="repository", metavar="OWNER/NAME", help="use the code of this repository on the Hub, copy none"
    )
    parser.add_argument("--remove", action="store_true", help="undo: restore the folder as it was")
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    folder = arguments.checkpoint_dir
    for line in remove(folder) if arguments.remove else add(folder, arguments.repository):
        print(line)
    if not arguments.remove:
        print(f"next: AutoModelForCausalLM.from_pretrained('{folder}', trust_remote_code=True)")
    return 0


if __name__ == "__main__":
    run_command(main)
