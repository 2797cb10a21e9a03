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
import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BACKUP = ".before_remote_code"
AUTO_MAP = {
    "AutoConfig": "configuration_deepseek.DeepseekConfig",
    "AutoModel": "modeling_deepseek.DeepseekModel",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    "AutoModelForQuestionAnswering": "modeling_deepseek.DeepseekForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_deepseek.DeepseekForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_deepseek.DeepseekForTokenClassification",
}


def code_files() -> list[Path]:
    """The model code: flat siblings in the root of this repository."""
    return sorted(ROOT.glob("*_deepseek.py"))


def read_config(folder: Path) -> dict:
    """The folder's config.json.

    Raises:
        ValueError: there is none, it is not JSON, or it describes no model of this family.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; name the folder of a transformers checkpoint.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again.") from error
    spec = importlib.util.spec_from_file_location("configuration_deepseek", ROOT / "configuration_deepseek.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if config.get("model_type") is None:
        raise ValueError(f"{path} has no `model_type`; allowed are {', '.join(module.FAMILY_DEFAULTS)}.")
    module.DeepseekConfig(**{name: value for name, value in config.items() if name != "auto_map"})
    return config


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
        done.append(f"kept the former {', '.join(replaced)} in {BACKUP}/")
    for file in files:
        shutil.copy2(file, folder / file.name)
    if files:
        done.append(f"copied {', '.join(file.name for file in files)}")
    prefix = "" if repository is None else f"{repository}--"
    config["auto_map"] = {auto: prefix + name for auto, name in AUTO_MAP.items()}
    write_json(folder / "config.json", config)
    done.append("set auto_map in config.json: " + ", ".join(AUTO_MAP))
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
    return [f"removed {', '.join(names) or 'no code'}", f"put back {', '.join(restored)}"]


def write_json(path: Path, content: dict):
    """Writes the whole file or none of it."""
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="Weights and tokenizer files are never touched."
    )
    parser.add_argument("checkpoint_dir", type=Path, help="folder with config.json and weights")
    parser.add_argument(
        "--from", dest="repository", metavar="OWNER/NAME", help="use the code of this repository on the Hub, copy none"
    )
    parser.add_argument("--remove", action="store_true", help="undo: restore the folder as it was")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        folder = arguments.checkpoint_dir
        for line in remove(folder) if arguments.remove else add(folder, arguments.repository):
            print(line)
        if not arguments.remove:
            print(f"next: AutoModelForCausalLM.from_pretrained('{folder}', trust_remote_code=True)")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
