"""Checks a model folder or PEFT adapter as a Hub repository, loads it as a stranger would, and uploads it.

    python -m tools.publish . --dry-run
    python -m tools.publish path/to/model --repo-id me/my-deepseek --results results.json --private
    python -m tools.publish runs/my-adapter --repo-id me/my-adapter --base-model me/my-deepseek --base-folder path/to/model

Each check is a line: passed, a warning, or failed with the remedy. A failed check prevents the upload. The upload
holds what belongs to a checkpoint (common/checkpoint_files.py) and, in a git work tree, what git tracks; other files
are named. The files to upload are first laid out in a new folder. That folder is checked, loaded by a new process with
an empty code cache (`tools/try_loading.py`), and sent.

`--results` takes files of measurements (as `tools.evaluate` writes them): {"results": [row, ...]}, a row having the fields of
`huggingface_hub.EvalResult`. They go into the card's `model-index` and into a table in its text. With `--dry-run` the card
is shown, not written, and nothing is sent.

The upload is one commit, after all large files are there. After an interruption, run it again: the Hub says which
large files it has already, and those are not sent a second time. At the end, what the Hub lists is compared with what
was sent.
"""

import argparse
import ast
import fnmatch
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from common.command import Parser, check_early, run_command
from common.extras import extra
from common.names import folder_below


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m tools.publish", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a model's folder, or a PEFT adapter's")
    parser.add_argument("--repo-id", help="where to, OWNER/NAME; needed unless --dry-run")
    parser.add_argument(
        "--revision", default="main", help="branch to commit to, made if it is not there (default main)"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry-run", action="store_true", help="check and show; write and send nothing")
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="PATTERN", help="files to leave out, as in 'runs/*'"
    )
    parser.add_argument(
        "--include", nargs="+", default=[], metavar="PATTERN", help="files to take that are no part of a checkpoint"
    )
    parser.add_argument(
        "--delete-others", action="store_true", help="delete what the repository has and the folder has not"
    )
    parser.add_argument("--no-generate", action="store_true", help="do not load weights (larger than this machine)")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="try the folder even if code in it is not this repository's, which then runs",
    )
    parser.add_argument("--base-folder", type=Path, help="of an adapter: local folder of the base model, to try it on")

    card = parser.add_argument_group("card", "written into README.md; what is not given stays as it is")
    card.add_argument("--results", type=Path, nargs="+", default=[], metavar="FILE", help="measurements, JSON")
    card.add_argument("--license", help="identifier on the Hub, as apache-2.0")
    card.add_argument("--language", nargs="+", help="ISO codes, as en zh")
    card.add_argument("--pipeline-tag", help="as text-generation")
    card.add_argument("--tag", nargs="+", help="tags to add")
    card.add_argument("--base-model", help="name on the Hub of the model that this one comes from")
    return parser


check_early(__name__, lambda: build_parser().parse_args())

with extra("publish"):
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, EvalResult, HfApi, ModelCard
    from huggingface_hub.errors import HfHubHTTPError
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from safetensors import SafetensorError, safe_open
    from tqdm import tqdm

    from common.checkpoint_files import belonging
    from common.loading import foreign_code

PASSED, WARNING, FAILED = "passed", "warning", "FAILED"
MAX_FILE_BYTES = 50 * 10**9  # the Hub's documentation: 50 GB a file at most, 20 GB recommended
NEVER_SENT = (".git", ".cache")  # folders that the Hub's client refuses
STRAY = {
    "a cache": ("__pycache__", "*.pyc", ".ipynb_checkpoints", ".pytest_cache", ".ruff_cache", ".venv", ".DS_Store"),
    "the state of a training": (
        *("optimizer*.pt", "optimizer*.bin", "optimizer*.safetensors", "scheduler.pt", "scheduler.bin"),
        *("rng_state*", "global_step*", "trainer_state.json"),
    ),
    "an unfinished or temporary file": ("*.part", "*.tmp", "*.lock", "*.incomplete", "*~", "*.swp"),
    "a pickle, which can run code": ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib"),
    "a backup of tools/add_remote_code.py": (".before_remote_code",),
    "a file of secrets": (".env", ".netrc", "*.pem", "id_rsa*", "id_ed25519*", ".git-credentials"),
}
SECRET = re.compile(
    rb"\bhf_[A-Za-z0-9]{30,}\b|\bgh[pousr]_[A-Za-z0-9]{30,}\b|\bAKIA[0-9A-Z]{16}\b|\bsk-[A-Za-z0-9_-]{32,}\b"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
TABLE_START, TABLE_END = "<!-- measured -->", "<!-- /measured -->"


class Check(NamedTuple):
    """One line of the report."""

    name: str
    status: str  # PASSED, WARNING or FAILED
    text: str  # what was found, or what is wrong and the remedy


class Entry(NamedTuple):
    """One file of the upload."""

    path: str  # in the repository
    bytes: int
    sha256: str


# ---------------------------------------------------------------- what is uploaded


def list_files(folder: Path, exclude: list[str], include: list[str] = ()) -> list[str]:
    """The folder's files relative to it that belong to a checkpoint; in a git work tree also those that git tracks.

    Args:
        exclude: patterns of files to leave out.
        include: patterns of more files to take, such as pictures of the card.

    Raises:
        ValueError: there is no such folder, or none of its files is left to send.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; name a model's or an adapter's.")
    taken = {*belonging(folder), *_tracked(folder)}
    kept = [path for path in all_files(folder) if path in taken or _matches(path, include)]
    kept = [path for path in kept if not _matches(path, exclude)]
    if not kept:
        below = folder_below(folder, "*.safetensors")
        hint = f"{below} has some" if below else "name a model's or an adapter's folder"
        raise ValueError(f"{folder} has no files to upload{f', without {exclude}' if exclude else ''}; {hint}.")
    return kept


def all_files(folder: Path) -> list[str]:
    """All files of the folder, relative to it; in a git work tree without those that git ignores."""
    if (folder / ".git").exists():
        paths = _git_files(folder, "--cached", "--others", "--exclude-standard")
    else:
        paths = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    return [path for path in sorted(set(paths)) if path.partition("/")[0] not in NEVER_SENT]


def _tracked(folder: Path) -> list[str]:
    return _git_files(folder, "--cached") if (folder / ".git").exists() else []


def _git_files(folder: Path, *which: str) -> list[str]:
    command = ["git", "-C", str(folder), "ls-files", "-z", *which]
    listed = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
    return [path for path in listed if path and (folder / path).is_file()]


def _matches(path: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(path, pattern) for pattern in patterns)


def check_left_out(folder: Path, paths: list[str], exclude: list[str]) -> Check:
    """Files in the folder that are not sent, although no option excludes them."""
    left = [path for path in all_files(folder) if path not in paths and not _matches(path, exclude)]
    if left:
        return Check(
            "left out", WARNING, f"{_some(left)}: no part of a checkpoint; --include PATTERN takes such files"
        )
    return Check("left out", PASSED, "nothing: all files belong to the checkpoint")


@contextmanager
def laid_out(folder: Path, paths: list[str], changed: dict[str, str]) -> Iterator[Path]:
    """A temporary folder with exactly what is uploaded: links to the folder's files, and the changed ones' new text."""
    with tempfile.TemporaryDirectory(prefix="publish-") as temporary:
        # A name that the loader's code cache accepts and that says nothing of this machine.
        root = Path(temporary, "repository")
        for path in sorted({*paths, *changed}):
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if path in changed:
                target.write_text(changed[path], encoding="utf-8")
            else:
                target.symlink_to((folder / path).resolve())
        yield root


def manifest(root: Path) -> list[Entry]:
    """Path, size and sha256 of every file."""
    files = sorted(file for file in root.rglob("*") if file.is_file())
    entries = []
    for file in tqdm(files, desc="hashing", unit="file", leave=False):
        with file.open("rb") as stream:
            digest = hashlib.sha256()
            while block := stream.read(2**22):
                digest.update(block)
        entries.append(Entry(file.relative_to(root).as_posix(), file.stat().st_size, digest.hexdigest()))
    return entries


# ---------------------------------------------------------------- the card


def read_results(files: list[Path]) -> list[EvalResult]:
    """The measurements of result files.

    Raises:
        ValueError: a file is not JSON, has no `results`, or a row lacks a field or has an unknown one.
    """
    rows = []
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or not isinstance(content.get("results"), list) or not content["results"]:
                raise ValueError("it has no list `results`")
            rows += [EvalResult(**row) for row in content["results"]]
        except (ValueError, TypeError) as error:
            raise ValueError(
                f'{file} holds no results ({error}); it must be {{"results": [row, ...]}}, a row having task_type, '
                "dataset_type, dataset_name, metric_type, metric_value and other fields of huggingface_hub.EvalResult."
            ) from error
    return rows


def updated_card(text: str, metadata: dict, results: list[EvalResult], name: str) -> str:
    """The card with `metadata` set and `results` in its model-index and its table; its other text is kept.

    Args:
        text: README.md as it is; may be empty or without front matter.
        metadata: fields of the front matter to set; a list under "tags" is added to the tags that are there.
        results: measurements; one of the same task, dataset and metric that the card has already is replaced.
        name: the model's name in `model-index`, unless the card has one.
    """
    if not metadata and not results:
        return text
    if not text.startswith("---\n"):
        text = f"---\n{{}}\n---\n{text or f'# {name}'}\n"
    card = ModelCard(text)
    for field, value in metadata.items():
        if field == "tags":
            value = list(dict.fromkeys([*(card.data.get("tags") or []), *value]))
        card.data[field] = value
    if results:
        # huggingface_hub turns `model-index` into these two attributes when it reads a card
        old = [
            row for row in card.data.eval_results or [] if not any(row.is_equal_except_value(new) for new in results)
        ]
        card.data.eval_results = [*old, *results]
        card.data.model_name = card.data.model_name or name
        card.text = _with_table(card.text, card.data.eval_results)
    return str(card)


def _with_table(text: str, results: list[EvalResult]) -> str:
    lines = [TABLE_START, "", "| measured on | split | metric | value |", "|---|---|---|---|"]
    for row in results:
        value = f"{row.metric_value:.4g}" if isinstance(row.metric_value, float) else str(row.metric_value)
        dataset = " ".join(filter(None, [row.dataset_name, row.dataset_config]))
        lines.append(f"| {dataset} | {row.dataset_split or ''} | {row.metric_name or row.metric_type} | {value} |")
    table = "\n".join([*lines, "", TABLE_END])
    if TABLE_START in text and TABLE_END in text:
        before, _, rest = text.partition(TABLE_START)
        return before + table + rest.partition(TABLE_END)[2]
    return f"{text.rstrip()}\n\n## Measured on tasks\n\n{table}\n"


def changed_files(folder: Path, args: argparse.Namespace) -> dict[str, str]:
    """Path -> new text, of the files that the command line changes: the card, and an adapter's config."""
    metadata = {
        "license": args.license,
        "language": args.language,
        "base_model": args.base_model,
        "tags": args.tag,
        "pipeline_tag": args.pipeline_tag,
    }
    metadata = {field: value for field, value in metadata.items() if value}
    name = args.repo_id.rpartition("/")[2] if args.repo_id else folder.resolve().name
    card = folder / "README.md"
    old = card.read_text(encoding="utf-8") if card.is_file() else ""
    changed = {"README.md": updated_card(old, metadata, read_results(args.results), name)}
    adapter = folder / "adapter_config.json"
    if args.base_model and adapter.is_file():
        config = json.loads(adapter.read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = args.base_model
        changed["adapter_config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        # PEFT writes the path of the base model on this machine into the tags of its card
        changed["README.md"] = re.sub(r"(?m)^- base_model:adapter:.*$", "- lora", changed["README.md"])
    return {path: text for path, text in changed.items() if not (path == "README.md" and text == old)}


# ---------------------------------------------------------------- checks of the files


def check_folder(root: Path) -> list[Check]:
    """All checks that need no model: of an adapter if there is an adapter_config.json, else of a model."""
    is_adapter = (root / "adapter_config.json").is_file()
    checks = [
        check_stray(root),
        check_secrets(root),
        check_sizes(root),
        check_licence(root),
        *check_card(root, is_adapter),
    ]
    if is_adapter:
        return [*checks, check_adapter_config(root), check_weight_files(root, "adapter_model")]
    return [
        *checks,
        *check_code(root),
        check_weight_files(root, "model"),
        check_dtype(root),
        check_generation_file(root),
    ]


def check_stray(root: Path) -> Check:
    found = []
    for file in sorted(root.rglob("*")):
        parts = file.relative_to(root).parts
        for kind, patterns in STRAY.items():
            if file.is_file() and any(fnmatch.fnmatch(part, pattern) for part in parts for pattern in patterns):
                found.append(f"{'/'.join(parts)} ({kind})")
                break
    if found:
        return Check("stray files", FAILED, f"{_some(found)}; remove them or leave them out with --exclude PATTERN")
    return Check("stray files", PASSED, "no caches, training states, pickles, backups or key files")


def check_secrets(root: Path) -> Check:
    """Looks for access keys in all files but the weights and files above 20 MB."""
    found = []
    for file in sorted(root.rglob("*")):
        if file.is_file() and file.suffix != ".safetensors" and file.stat().st_size <= 20 * 10**6:
            match = SECRET.search(file.read_bytes())
            if match:
                found.append(f"{file.relative_to(root).as_posix()} ({match[0][:6].decode()}...)")
    if found:
        return Check("secrets", FAILED, f"access keys in {_some(found)}; revoke them, then take them out of the files")
    return Check("secrets", PASSED, "no access keys in the texts")


def check_sizes(root: Path) -> Check:
    sizes = {file.relative_to(root).as_posix(): file.stat().st_size for file in root.rglob("*") if file.is_file()}
    large = [f"{path} ({size / 1e9:.1f} GB)" for path, size in sizes.items() if size > MAX_FILE_BYTES]
    if large:
        return Check("sizes", FAILED, f"{_some(large)} above the Hub's 50 GB a file; save with max_shard_size='5GB'")
    empty = [path for path, size in sizes.items() if size == 0]
    if empty:
        return Check("sizes", WARNING, f"empty: {_some(empty)}; a copy that failed?")
    return Check("sizes", PASSED, f"{len(sizes)} files, {sum(sizes.values()) / 1e6:.1f} MB")


def check_licence(root: Path) -> Check:
    names = [file.name for file in root.iterdir() if re.match(r"(?i)(licen[cs]e|copying)", file.name)]
    if not names:
        return Check(
            "licence file", FAILED, "there is none; add LICENSE with the text that the card's `license` names"
        )
    return Check("licence file", PASSED, ", ".join(sorted(names)))


def check_card(root: Path, is_adapter: bool) -> list[Check]:
    """README.md and its front matter."""
    path = root / "README.md"
    if not path.is_file():
        return [Check("card", FAILED, "there is no README.md; write one, or let --license, --language ... begin it")]
    try:
        data = ModelCard(path.read_text(encoding="utf-8")).data
    except Exception as error:  # the YAML reader and the model-index reader have errors of their own
        return [Check("card", FAILED, f"its front matter cannot be read ({error}); correct the YAML at its head")]
    wanted = {
        "license": "--license apache-2.0",
        "language": "--language en zh",
        "library_name": f"`library_name: {'peft' if is_adapter else 'transformers'}` in README.md",
        "pipeline_tag": "--pipeline-tag text-generation",
        "tags": "--tag deepseek",
        **({"base_model": "--base-model OWNER/NAME"} if is_adapter else {}),
    }
    missing = [f"`{field}` ({remedy})" for field, remedy in wanted.items() if not data.get(field)]
    checks = [
        Check("card metadata", FAILED, f"lacks {', '.join(missing)}")
        if missing
        else Check("card metadata", PASSED, ", ".join(f"{field} {_short(data.get(field))}" for field in wanted))
    ]
    if data.get("license") == "other" and not data.get("license_name"):
        checks.append(Check("card licence", FAILED, "`license: other` needs `license_name` and `license_link`"))
    if not is_adapter and "custom_code" not in (data.get("tags") or []):
        checks.append(
            Check("card tags", WARNING, "no `custom_code`, by which the Hub marks remote code; --tag custom_code")
        )
    bases = data.get("base_model") or []
    local = [base for base in ([bases] if isinstance(bases, str) else bases) if not _is_hub_id(base)]
    if local:
        checks.append(Check("card base model", FAILED, f"{_some(local)} is no Hub name; --base-model OWNER/NAME"))
    return checks


def check_code(root: Path) -> list[Check]:
    """config.json's `auto_map`: its modules, what they import from beside them, and its classes."""
    try:
        config = _read_json(root / "config.json")
    except ValueError as error:
        return [Check("config", FAILED, str(error))]
    if not config.get("model_type"):
        return [Check("config", FAILED, "config.json has no `model_type`")]
    checks = [Check("config", PASSED, f"model_type {config['model_type']}")]
    remedy = "python tools/add_remote_code.py FOLDER copies the code and sets auto_map"
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, dict) or not {"AutoConfig", "AutoModelForCausalLM"} <= auto_map.keys():
        return [*checks, Check("auto_map", FAILED, f"it must map AutoConfig and AutoModelForCausalLM; {remedy}")]
    problems, reached = [], set()
    for auto_class, reference in auto_map.items():
        if "--" in reference:
            problems.append(f"{auto_class} points to the code of another repository ({reference})")
            continue
        module, _, name = reference.rpartition(".")
        problems += _unreachable(root, module, reached)
        classes = _class_names(root / f"{module}.py")
        if classes is not None and name not in classes:
            problems.append(f"{module}.py has no class {name}, which auto_map gives for {auto_class}")
    if problems:
        return [*checks, Check("code", FAILED, f"{_some(list(dict.fromkeys(problems)))}; {remedy}")]
    return [*checks, Check("code", PASSED, f"{len(auto_map)} classes; {', '.join(sorted(reached))}")]


def _unreachable(root: Path, module: str, reached: set[str]) -> list[str]:
    """What prevents `module`, or a module that it imports, from loading; adds the loadable ones to `reached`."""
    if module in reached:
        return []
    file = root / f"{module}.py"
    if not file.is_file():
        return [f"{module}.py is missing"]
    reached.add(module)
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError as error:
        return [f"{file.name} is no Python: {error}"]
    problems = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or node.module is None or "." in node.module:
                problems.append(
                    f"{file.name} line {node.lineno}: the Hub's loader knows only `from .module import Name`"
                )
            else:
                problems += _unreachable(root, node.module, reached)
    return problems


def _class_names(file: Path) -> set[str] | None:
    """Names of the classes that a module defines; None if it cannot be read, which is reported elsewhere."""
    try:
        return {
            node.name for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)
        }
    except (OSError, SyntaxError):
        return None


def check_weight_files(root: Path, stem: str) -> Check:
    """The safetensors files against each other: one file, or shards of which the index names every tensor."""
    remedy = "save the model again with save_pretrained into an empty folder"
    index, single = root / f"{stem}.safetensors.index.json", root / f"{stem}.safetensors"
    files = {file.name: file for file in root.glob("*.safetensors")}
    try:
        names = {name: _tensor_names(file) for name, file in files.items()}
        if index.is_file():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index.name} has no `weight_map`")
            if single.is_file():
                raise ValueError(f"{single.name} and {index.name} are both there, and loaders read the former only")
        elif single.is_file():
            weight_map = dict.fromkeys(names[single.name], single.name)
        else:
            raise ValueError(f"there is neither {single.name} nor {index.name}")
    except ValueError as error:
        return Check("weight files", FAILED, f"{error}; {remedy}")
    problems = [f"{name} is not named by the index" for name in files.keys() - set(weight_map.values())]
    problems += [f"{name} is missing" for name in set(weight_map.values()) - files.keys()]
    for name, tensors in names.items():
        indexed = {tensor for tensor, file in weight_map.items() if file == name}
        problems += [f"{name} lacks {tensor}, which the index names" for tensor in sorted(indexed - tensors)]
        problems += [f"{name} has {tensor}, which the index does not name" for tensor in sorted(tensors - indexed)]
    if problems:
        return Check("weight files", FAILED, f"{_some(sorted(problems))}; {remedy}")
    return Check("weight files", PASSED, f"{len(weight_map)} tensors in {len(files)} files")


def _tensor_names(file: Path) -> set[str]:
    try:
        with safe_open(file, framework="np") as tensors:
            return set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file.name} is damaged ({error})") from error


def check_dtype(root: Path) -> Check:
    """The config's dtype against the one that most of the weights have."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    try:
        config = _read_json(root / "config.json")
        sizes: dict[str, int] = {}  # dtype -> numbers
        for file in root.glob("*.safetensors"):
            with safe_open(file, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    tensor = tensors.get_slice(name)
                    sizes[tensor.get_dtype()] = sizes.get(tensor.get_dtype(), 0) + math.prod(tensor.get_shape())
        stored = max(sizes, key=sizes.get)
    except (ValueError, SafetensorError, OSError) as error:
        return Check("dtype", FAILED, f"the weights or config.json cannot be read ({error}); save the model again")
    said = config.get("dtype") or config.get("torch_dtype")
    if config.get("quantization_config"):
        return Check("dtype", PASSED, f"{stored}, quantised by the config's quantization_config")
    if names.get(stored) != said:
        return Check(
            "dtype",
            FAILED,
            f'most weights are {stored}, config.json says {said}; set "torch_dtype": "{names.get(stored)}"',
        )
    return Check("dtype", PASSED, f"{said}, in the files and in config.json")


def check_generation_file(root: Path) -> Check:
    if (root / "generation_config.json").is_file():
        return Check("generation config", PASSED, "generation_config.json")
    return Check(
        "generation config",
        FAILED,
        "there is no generation_config.json; model.generation_config.save_pretrained(FOLDER)",
    )


def check_adapter_config(root: Path) -> Check:
    try:
        config = _read_json(root / "adapter_config.json")
    except ValueError as error:
        return Check("adapter config", FAILED, str(error))
    base = config.get("base_model_name_or_path")
    if not config.get("peft_type") or not _is_hub_id(str(base)):
        return Check(
            "adapter config",
            FAILED,
            f"`peft_type` is {config.get('peft_type')}, `base_model_name_or_path` is {base!r}, which must be a name on the "
            "Hub; --base-model OWNER/NAME",
        )
    return Check("adapter config", PASSED, f"{config['peft_type']} for {base}")


# ---------------------------------------------------------------- checks of the loaded model


def check_loading(root: Path, base_folder: Path | None, generate: bool, trust_remote_code: bool) -> list[Check]:
    """Runs `tools/try_loading.py` in a clean process and turns what it found into checks.

    Whoever loads the folder runs its code. Here, code that is not this repository's runs only with permission.
    """
    is_adapter = (root / "adapter_config.json").is_file()
    if is_adapter and base_folder is None:
        return [Check("loads", WARNING, "not tried: --base-folder names the base model that it belongs to")]
    foreign = foreign_code(base_folder if is_adapter else root)
    if foreign and not trust_remote_code:
        remedy = "python tools/add_remote_code.py FOLDER puts it in place, --trust-remote-code lets the other code run"
        return [Check("loads", FAILED, f"not tried: {_some(foreign)} is not this repository's code; {remedy}")]
    command = [sys.executable, str(Path(__file__).with_name("try_loading.py")), str(root)]
    command += ["--base", str(base_folder.resolve())] if is_adapter else []
    command += [] if generate else ["--no-generate"]
    with tempfile.TemporaryDirectory(prefix="publish-modules-") as empty:
        offline = {"HF_MODULES_CACHE": empty, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        done = subprocess.run(command, capture_output=True, text=True, cwd=empty, env={**os.environ, **offline})
    try:
        found = json.loads(done.stdout.rstrip().rpartition("\n")[2])
    except ValueError:
        return [
            Check("loads", FAILED, f"the loading process ended with {done.returncode}: {done.stderr[-800:].strip()}")
        ]
    if is_adapter:
        return [_judge("adapter", found["adapter"], _judge_adapter)]
    judges = {
        "config": ("config class", _judge_config),
        "weights": ("weights and config", _judge_weights),
        "tokenizer": ("tokenizer", lambda it: _judge_tokenizer(it, found["config"].get("vocab_size"))),
        "chat": ("chat template", _judge_chat),
        "generation": ("generation values", lambda it: _judge_generation(it, found["tokenizer"])),
        "generate": ("loads and generates", _judge_generate),
    }
    return [_judge(name, found[stage], judge) for stage, (name, judge) in judges.items() if stage in found]


def _judge(name: str, found: dict, judge) -> Check:
    if "error" in found:
        return Check(name, FAILED, _short(found["error"], 400))
    return Check(name, *judge(found))


def _judge_config(found: dict) -> tuple[str, str]:
    if not found["class"].startswith("transformers_modules."):
        return FAILED, f"{found['class']} was loaded instead of the folder's code; check auto_map"
    return PASSED, found["class"].rpartition(".")[2]


def _differences(found: dict, foreign: str, wants: str) -> list[str]:
    """What is wrong with tensors: `foreign` is said of one too many, `wants` sets the shapes."""
    return [
        *(f"{name} is missing" for name in found["missing"]),
        *(f"{name} {foreign}" for name in found["unexpected"]),
        *(f"{name} is {shape}, {wants} asks for {expected}" for name, shape, expected in found["shapes"]),
    ]


def _judge_weights(found: dict) -> tuple[str, str]:
    if problems := _differences(found, foreign="is not of the model", wants="the config"):
        return FAILED, f"{_some(problems)}; use the config.json that belongs to the weights"
    return PASSED, f"{found['tensors']} tensors have the names and shapes that config.json asks for"


def _judge_tokenizer(found: dict, vocab_size: int | None) -> tuple[str, str]:
    if vocab_size is not None and found["largest_id"] >= vocab_size:
        return (
            FAILED,
            f"its largest id is {found['largest_id']}, but `vocab_size` is {vocab_size}; resize_token_embeddings",
        )
    if found["eos_token_id"] is None:
        return FAILED, "it has no eos token, so generation cannot end; set `eos_token` in tokenizer_config.json"
    if not found["lossless"]:
        return WARNING, f"{found['size']} tokens, but a text of two languages and code did not come back unchanged"
    return PASSED, f"{found['size']} tokens; a text of two languages and code comes back unchanged"


def _judge_chat(found: dict) -> tuple[str, str]:
    if not found["template"]:
        return WARNING, "none; for a chat model add chat_template.jinja"
    if not found["keeps_the_words"] or found["bos"] > 1:
        return FAILED, f"it loses the user's words or begins {found['bos']} times; correct chat_template.jinja"
    return PASSED, f"a question becomes {found['tokens']} tokens"


def _judge_generation(found: dict, tokenizer: dict) -> tuple[str, str]:
    ends = found["eos_token_id"]
    if "error" not in tokenizer and tokenizer["eos_token_id"] not in (ends if isinstance(ends, list) else [ends]):
        return FAILED, f"`eos_token_id` is {ends}, the tokenizer's is {tokenizer['eos_token_id']}; make them agree"
    return PASSED, f"eos_token_id {ends}, as the tokenizer's"


def _judge_generate(found: dict) -> tuple[str, str]:
    if found["report"]:
        return FAILED, f"loading reports {_short(found['report'], 400)}"
    return PASSED, f"{found['class'].rpartition('.')[2]} in a clean process, {found['new_tokens']} tokens generated"


def _judge_adapter(found: dict) -> tuple[str, str]:
    if problems := _differences(found, foreign="has no place in the base model", wants="the base model"):
        return FAILED, f"{_some(problems)}; is --base-folder the model that it was trained on?"
    return PASSED, f"{found['tensors']} tensors on the base model, {found['new_tokens']} tokens generated"


# ---------------------------------------------------------------- upload


def upload(
    root: Path, entries: list[Entry], repo_id: str, private: bool, revision: str, delete_others: bool, api: HfApi
) -> str:
    """Sends the folder as one commit and compares what the Hub then lists -> the commit's address.

    Raises:
        HfHubHTTPError: the Hub refused something.
        ValueError: the Hub lists other files afterwards than were sent.
    """
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision != "main":
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    additions = [CommitOperationAdd(entry.path, str(root / entry.path)) for entry in entries]
    deletions = []
    if delete_others:
        kept = {entry.path for entry in entries} | {".gitattributes"}
        present = api.list_repo_files(repo_id, revision=revision)
        deletions = [CommitOperationDelete(path) for path in present if path not in kept]
    commit = api.create_commit(
        repo_id, [*additions, *deletions], commit_message=f"Publish {len(entries)} files", revision=revision
    )
    verify(root, entries, repo_id, revision, api)
    return commit.commit_url


def verify(root: Path, entries: list[Entry], repo_id: str, revision: str, api: HfApi):
    """Compares contents by hash: sha256 of large files, git's sha1 of the others.

    Raises:
        ValueError: a file is missing on the Hub or differs there.
    """
    remote = {item.path: item for item in api.list_repo_tree(repo_id, recursive=True, revision=revision)}
    wrong = []
    for entry in entries:
        item = remote.get(entry.path)
        if item is None:
            wrong.append(f"{entry.path} (missing)")
        elif item.lfs is not None:
            if item.lfs.sha256 != entry.sha256:
                wrong.append(entry.path)
        else:
            content = (root / entry.path).read_bytes()
            if item.blob_id != hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest():
                wrong.append(entry.path)
    if wrong:
        raise ValueError(f"on {repo_id} these differ from what was sent: {_some(wrong)}; run the upload again.")


# ---------------------------------------------------------------- report


def show_checks(console: Console, checks: list[Check]):
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column(style="bold")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    colours = {PASSED: "green", WARNING: "yellow", FAILED: "red"}
    for check in checks:
        table.add_row(check.name, f"[{colours[check.status]}]{check.status}[/]", check.text.replace("[", r"\["))
    console.print(table)


def show_files(console: Console, entries: list[Entry]):
    table = Table(box=box.SIMPLE, caption=f"{len(entries)} files, {sum(entry.bytes for entry in entries):,} bytes")
    table.add_column("file", overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("sha256", overflow="fold")
    for entry in entries:
        table.add_row(entry.path, f"{entry.bytes:,}", entry.sha256)
    console.print(table)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"there is no {path.name}") from error
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds a {type(content).__name__}, not an object")
    return content


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def _some(items: list[str], limit: int = 5) -> str:
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def _short(value: object, limit: int = 60) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


# ---------------------------------------------------------------- command line


def run(args: argparse.Namespace, console: Console, api: HfApi) -> int:
    """Does what the command line says -> exit code: 0, or 1 if a check failed.

    Raises:
        ValueError, OSError, HfHubHTTPError: something given is wrong, or the Hub refused.
    """
    if args.repo_id is None and not args.dry_run:
        raise ValueError("--repo-id is not given; name the repository OWNER/NAME, or ask for --dry-run.")
    paths = list_files(args.folder, args.exclude, args.include)
    changed = changed_files(args.folder, args)
    with laid_out(args.folder, paths, changed) as root:
        checks = [check_left_out(args.folder, paths, args.exclude), *check_folder(root)]
        checks += check_loading(root, args.base_folder, not args.no_generate, args.trust_remote_code)
        show_checks(console, checks)
        entries = manifest(root)
        show_files(console, entries)
        for path, text in changed.items():
            console.print(f"{path} {'would be' if args.dry_run else 'is'} changed to begin:")
            console.print(
                text[: text.find("\n---", 4) + 5] if path == "README.md" else text, markup=False, highlight=False
            )
        failed = sum(check.status == FAILED for check in checks)
        if failed:
            console.print(f"{failed} checks failed; nothing was sent.")
            return 1
        if args.dry_run:
            console.print("dry run: nothing was written or sent.")
            console.print(
                f"next: python -m tools.publish {args.folder} --repo-id OWNER/NAME",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            return 0
        for path, text in changed.items():
            part = args.folder / f"{path}.part"
            part.write_text(text, encoding="utf-8")
            os.replace(part, args.folder / path)
        user = api.whoami()["name"]
        console.print(f"as {user} to {args.repo_id}, {args.revision}")
        address = upload(root, entries, args.repo_id, args.private, args.revision, args.delete_others, api)
        console.print(f"published and compared: {address}", soft_wrap=True)
        console.print(f"next: python chat.py --model {args.repo_id}", markup=False, highlight=False, soft_wrap=True)
    return 0


def main(argv: list[str] | None = None, api: HfApi | None = None) -> int:
    """Runs the command line; returns 0, 1 where a check failed, or 2 where something given is wrong."""
    args = build_parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 130)
    try:
        return run(args, console, HfApi() if api is None else api)
    except (ValueError, OSError, RuntimeError, HfHubHTTPError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
        again = "" if isinstance(error, ValueError) else "\nRun the same command again to go on with an upload."
        print(f"error: {error}{cause}{again}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    run_command(main)
