"""Runs lm-evaluation-harness on a checkpoint with local task files, and writes results for a model card.

    python -m tools.evaluate . --tasks gsm8k mgsm_en mgsm_zh --data path/to/tasks --output results.json
    python -m tools.evaluate . --tasks humaneval mbpp --data path/to/tasks --allow-code-execution
    python -m tools.evaluate . --text en=held_out_en.txt zh=held_out_zh.txt
    python -m tools.evaluate . --tasks arc_easy my_task.yaml --data path/to/tasks --output results.json --log-samples

Needs the extra: `pip install -e '.[evaluate]'`. The prompts, few-shot examples, stop words and answer filters are the
harness's own, so the figures compare with others made by it. Only the data come from files, and generated programs run
here. These tasks read the files that their authors published:

    gsm8k             gsm8k_train.jsonl (few-shot examples), gsm8k_test.jsonl    {"question", "answer"}
    mgsm_en, mgsm_zh  mgsm_en.tsv, mgsm_zh.tsv                                   question TAB number
    humaneval         HumanEval.jsonl                                            as OpenAI published it
    mbpp              mbpp.jsonl                                                 as Google published it, task_id 1 to 974

Any other task of the harness reads `NAME/SPLIT.jsonl` or `NAME/SPLIT.parquet` in the folder of `--data`, with the
columns that its dataset has on the Hub, for instance `arc_easy/test.jsonl`. A task of your own is a YAML file in the
harness's format (https://github.com/EleutherAI/lm-evaluation-harness, docs/new_task_guide.md). It reads such a folder
where there is one, else what its `dataset_path` names. Functions that a YAML file names with `!function` run.

`--log-samples` writes every prompt, answer and score to a file beside `--output`, one JSON object a line.

`--text NAME=FILE` measures bits per byte of the UTF-8 text, each token predicted from at most one context of earlier ones
(windows of the model's length that do not overlap, as the harness cuts them).

A program that a model wrote can do what you can do. It runs only with `--allow-code-execution`, in a process of its own,
in an empty folder, without your environment variables, with limits on time, memory and file size. It is not kept from
the network or from reading your files: use a container or a machine without secrets.
"""

import argparse
import json
import logging
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common.command import Parser, check_early, one_line_errors, run_command
from common.extras import extra
from common.names import check_model_name
from common.outputs import refuse_existing


class Source(NamedTuple):
    """A task: the harness's definition, the files it needs, and the names that a model card gives it."""

    definition: str  # a YAML file in lm_eval/tasks
    files: tuple[str, ...]
    dataset_type: str  # the dataset's name on the Hub
    dataset_name: str
    dataset_config: str | None
    runs_code: bool = False

    def dataset(self) -> dict:
        """The fields of a model card that name the dataset."""
        names = {name: getattr(self, name) for name in ("dataset_type", "dataset_name", "dataset_config")}
        return names | {"dataset_split": "test"}


TASKS = {
    "gsm8k": Source("gsm8k/gsm8k.yaml", ("gsm8k_train.jsonl", "gsm8k_test.jsonl"), "openai/gsm8k", "GSM8K", "main"),
    "mgsm_en": Source("mgsm/direct/mgsm_direct_en.yaml", ("mgsm_en.tsv",), "juletxara/mgsm", "MGSM", "en"),
    "mgsm_zh": Source("mgsm/direct/mgsm_direct_zh.yaml", ("mgsm_zh.tsv",), "juletxara/mgsm", "MGSM", "zh"),
    "humaneval": Source(
        "humaneval/humaneval.yaml", ("HumanEval.jsonl",), "openai/openai_humaneval", "HumanEval", None, runs_code=True
    ),
    "mbpp": Source("mbpp/mbpp.yaml", ("mbpp.jsonl",), "google-research-datasets/mbpp", "MBPP", "full", runs_code=True),
}
MBPP_EXAMPLES, MBPP_TEST = (2, 3, 4), range(11, 511)  # task_ids: the paper's few-shot examples and test part
MEMORY_BYTES, FILE_BYTES = 2 * 2**30, 2**20  # what a generated program may use


# ---------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m tools.evaluate", description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder or Hub name of the model")
    parser.add_argument("--adapter", help="folder or Hub name of a PEFT adapter to put on it")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help=f"{', '.join(TASKS)}, another task of the harness, or a YAML file of your own",
    )
    parser.add_argument("--data", type=Path, help="folder with the tasks' files")
    parser.add_argument("--text", nargs="+", default=[], metavar="NAME=FILE", help="texts for bits per byte")
    parser.add_argument("--limit", type=int, help="samples a task, the first ones (default: all)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="tokens of an answer (default 512)")
    parser.add_argument("--batch-size", default="8", help="rows at once, or auto (default 8)")
    parser.add_argument("--device", help="as cuda:0 (default: what there is)")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let code that comes with the model run, instead of this repository's",
    )
    parser.add_argument("--chat", action="store_true", help="put prompts through the chat template")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    parser.add_argument(
        "--log-samples",
        action="store_true",
        help="write prompts, answers and scores beside --output, as .samples.jsonl",
    )
    parser.add_argument(
        "--allow-code-execution", action="store_true", help="run programs that the model writes (humaneval, mbpp)"
    )
    parser.add_argument(
        "--program-seconds", type=float, default=10.0, help="time limit of such a program (default 10)"
    )
    return parser


def check(args: argparse.Namespace):
    """Refuses a command line that would fail later.

    Raises:
        ValueError: what is wrong and the remedy.
    """
    if not args.tasks and not args.text:
        raise ValueError(f"neither --tasks nor --text is given; tasks are {', '.join(TASKS)}.")
    from_files = [name for name in args.tasks if not is_yaml(name)]
    if from_files and args.data is None:
        raise ValueError(f"--tasks {' '.join(from_files)} needs --data, the folder with the tasks' files.")
    for name in args.tasks:
        if is_yaml(name) and not Path(name).is_file():
            raise ValueError(f"--tasks {name}: there is no such file.")
    if args.data is not None and not args.data.is_dir():
        raise ValueError(f"--data {args.data}: there is no such folder.")
    if args.log_samples and args.output is None:
        raise ValueError("--log-samples needs --output, beside which the samples are written.")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit is {args.limit}; it must be at least 1.")
    code = [name for name in args.tasks if name in TASKS and TASKS[name].runs_code]
    if code and not args.allow_code_execution:
        raise ValueError(
            f"{', '.join(code)} runs programs that the model writes; add --allow-code-execution on a machine where that "
            "can do no harm."
        )
    for item in args.text:
        name, _, file = item.partition("=")
        if not name or not Path(file).is_file():
            raise ValueError(f"--text {item} must be NAME=FILE with a file that is there.")
    check_model_name(args.model, "model")
    if args.output is not None:
        refuse_existing("--output", [args.output, *([samples_file(args.output)] if args.log_samples else [])])


def is_yaml(task: str) -> bool:
    """Whether `--tasks` names a file rather than a task."""
    return task.endswith((".yaml", ".yml"))


def samples_file(output: Path) -> Path:
    """Where `--log-samples` writes."""
    return output.with_suffix(".samples.jsonl")


check_early(__name__, lambda: check(build_parser().parse_args()))

with extra("evaluate"):
    import torch
    import transformers
    import yaml
    from datasets import Dataset
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from common.loading import load


# ---------------------------------------------------------------- data files


def read_jsonl(file: Path, fields: tuple[str, ...]) -> list[dict]:
    """Rows of a file with one JSON object a line, each having `fields`.

    Raises:
        ValueError: a line is no object or lacks a field; the message gives its number.
    """
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file} line {number} is not JSON ({error}); download the file again.") from error
        missing = [field for field in fields if not isinstance(row, dict) or field not in row]
        if missing:
            raise ValueError(f"{file} line {number} lacks `{missing[0]}`; every line needs {', '.join(fields)}.")
        rows.append(row)
    if not rows:
        raise ValueError(f"{file} has no rows; download the file again.")
    return rows


def read_mgsm(file: Path) -> list[dict]:
    """Rows of an MGSM file as the harness's task has them: `answer_number`, and no worked `answer`.

    Raises:
        ValueError: a line is not a question, a tab and a whole number; thousands may have commas.
    """
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        question, _, answer = line.rpartition("\t")
        answer = answer.strip().replace(",", "")
        if not question or not answer.removeprefix("-").isdigit():
            raise ValueError(f"{file} line {number} is no question, tab, whole number; download the file again.")
        rows.append({"question": question, "answer": None, "answer_number": int(answer)})
    if not rows:
        raise ValueError(f"{file} has no rows; download the file again.")
    return rows


def load_splits(name: str, folder: Path) -> dict[str, list[dict]]:
    """The rows of a task by split.

    Raises:
        ValueError: a file is missing or is not what it should be.
    """
    files = [folder / file for file in TASKS[name].files]
    for file in files:
        if not file.is_file():
            raise ValueError(f"task {name} needs {file}, which is not there; name the folder that has it with --data.")
    if name == "gsm8k":
        train, test = (read_jsonl(file, ("question", "answer")) for file in files)
        return {"train": train, "test": test}
    if name.startswith("mgsm"):
        return {"test": read_mgsm(files[0])}
    if name == "humaneval":
        return {"test": read_jsonl(files[0], ("prompt", "test", "entry_point"))}
    rows = {row["task_id"]: row for row in read_jsonl(files[0], ("task_id", "text", "code", "test_list"))}
    if absent := [i for i in MBPP_EXAMPLES if i not in rows]:
        raise ValueError(f"{files[0]} lacks task_id {absent[0]}, one of the few-shot examples; download it again.")
    test = [row for i, row in rows.items() if i in MBPP_TEST]
    return {"examples": [rows[i] | {"is_fewshot": True} for i in MBPP_EXAMPLES], "test": test}


def read_folder(name: str, folder: Path, splits: list[str], needed: str) -> dict[str, Dataset]:
    """The splits of a task whose files lie in a folder of the task's name.

    Args:
        name: of the task.
        folder: that has a folder `name`.
        splits: the names that the task gives its splits.
        needed: the one that is measured.

    Raises:
        ValueError: the needed split has no file, or a file is damaged.
    """
    found = {}
    for split in splits:
        lines, table = (folder / name / f"{split}.{suffix}" for suffix in ("jsonl", "parquet"))
        if lines.is_file():
            found[split] = Dataset.from_list(read_jsonl(lines, ()))
        elif table.is_file():
            try:
                found[split] = Dataset.from_parquet(str(table))
            except Exception as error:  # pyarrow's are of many types
                raise ValueError(f"{table} is no Parquet file ({error}); download it again.") from error
        elif split == needed:
            raise ValueError(f"task {name} needs {lines} or {table}, which are not there; download its dataset.")
    return found


# ---------------------------------------------------------------- generated programs

# Says that the program came to its end, with a word that it cannot know: a program that leaves early did not pass.
_RUNNER = """
import runpy, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
    resource.setrlimit(resource.RLIMIT_FSIZE, ({file}, {file}))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except ImportError:  # not on Windows
    pass
runpy.run_path("program.py", run_name="__main__")
sys.__stdout__.write("\\n{word}")
"""


def passes(program: str, seconds: float) -> bool:
    """Whether a program runs to its end without an exception, in a process of its own with limits.

    Args:
        program: source with its tests.
        seconds: limit of wall-clock time, after which it and what it started are ended.
    """
    word = secrets.token_hex(16)
    runner = _RUNNER.format(memory=MEMORY_BYTES, file=FILE_BYTES, word=word)
    with tempfile.TemporaryDirectory(prefix="program-") as folder:
        Path(folder, "program.py").write_text(program, encoding="utf-8", errors="replace")
        environment = {"PATH": os.defpath, "HOME": folder, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        with tempfile.TemporaryFile() as printed:  # a file: FILE_BYTES then limits what is printed, too
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", runner],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                return False
            finally:
                _end_group(process)
            printed.seek(0)
            return process.returncode == 0 and printed.read().endswith(word.encode())


def _end_group(process: subprocess.Popen):
    """Ends the process and all that it started in its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()


def humaneval_program(doc: dict, response: str) -> str:
    return f"{doc['prompt']}{response}\n{doc['test']}\ncheck({doc['entry_point']})\n"


def mbpp_program(doc: dict, response: str) -> str:
    # The preparation comes after the answer: that of task 367 builds trees of a class that the answer defines.
    return "\n".join([response, doc.get("test_setup_code") or "", *doc["test_list"], ""])


# ---------------------------------------------------------------- tasks of the harness


def build_task(name: str, folder: Path, program_seconds: float, programs: dict[str, int]):
    """The harness's task with the data of `folder` -> an `lm_eval` task.

    Args:
        name: from `TASKS`.
        folder: where its files are.
        program_seconds: time limit of a generated program.
        programs: counts runs and passes of generated programs, for the report.
    """
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    source, splits = TASKS[name], load_splits(name, folder)
    path = Path(lm_eval.tasks.__file__).parent / source.definition
    # Unresolved functions of the code tasks would fetch a metric from the Hub that runs programs without limits.
    config = load_yaml(path, resolve_func=not source.runs_code)
    config = {key: value for key, value in config.items() if key != "tag"} | {"task": name}
    config |= {"custom_dataset": _dataset(splits), "test_split": "test"}
    if "train" not in splits:
        config["training_split"] = None
    if source.runs_code:
        config.update(filter_list=None, unsafe_code=True, process_results=_scorer(name, program_seconds, programs))
        config["metric_list"] = [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}]
    if "examples" in splits:
        config["fewshot_config"] = {"sampler": "first_n", "samples": splits["examples"]}
    return ConfigurableTask(config=config)


def find_definition(name: str) -> Path:
    """The YAML file of a task of the harness.

    Raises:
        ValueError: there is none of this name.
    """
    import lm_eval.tasks

    named = re.compile(rf"^task:\s*[\"']?{re.escape(name)}[\"']?\s*$", re.MULTILINE)
    for path in sorted(Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")):
        if named.search(path.read_text(encoding="utf-8")):
            return path
    raise ValueError(
        f"--tasks has {name}, which is no task of the harness; name one (a group's members one by one), or a YAML file."
    )


def build_other_task(definition: Path, folder: Path | None) -> tuple:
    """A task of the harness or of the user's own, from its YAML file -> an `lm_eval` task, and what a card calls its dataset.

    Raises:
        ValueError: the file is damaged, runs generated programs, or its data are not there.
    """
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        config = load_yaml(definition, resolve_func=False)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--tasks {definition} is no YAML file ({error}).") from error
    name = config.get("task")
    if not isinstance(name, str) or "class" in config:
        raise ValueError(f"--tasks {definition} has no `task: NAME`, or is defined in Python; name another one.")
    if config.get("unsafe_code"):
        runs = [task for task, source in TASKS.items() if source.runs_code]
        raise ValueError(f"--tasks {name} runs generated programs; of such tasks there are {', '.join(runs)} here.")
    roles = ("test_split", "validation_split", "training_split", "fewshot_split")
    splits = {role: config[role] for role in roles if config.get(role)}
    measured = splits.get("test_split") or splits.get("validation_split")
    if measured is None:
        raise ValueError(f"--tasks {definition} has neither test_split nor validation_split; name the one to measure.")
    # Functions are those beside the file.
    config = {key: value for key, value in load_yaml(definition).items() if key not in ("tag", "group")}
    is_own = Path(lm_eval.tasks.__file__).parent not in definition.parents
    if (folder is not None and (folder / name).is_dir()) or not is_own:
        data = read_folder(name, folder, list(splits.values()), measured)
        config["custom_dataset"] = lambda **_: data
        config |= {role: None for role, split in splits.items() if split not in data}
    elif not config.get("dataset_path"):
        raise ValueError(f"--tasks {definition} has no dataset_path, and there is no folder {name} in --data.")
    dataset = {"dataset_type": config.get("dataset_path") or name, "dataset_name": name}
    dataset |= {"dataset_config": config.get("dataset_name"), "dataset_split": measured}
    return ConfigurableTask(config=config), dataset


def build_text_task(name: str, text: str):
    """Bits per byte of one text -> an `lm_eval` task.

    Raises:
        ValueError: the text is empty.
    """
    from lm_eval.api.task import ConfigurableTask

    if not text:
        raise ValueError(f"--text {name} is empty; name a file with held-out text.")
    return ConfigurableTask(
        config={
            "task": f"text_{name}",
            "custom_dataset": _dataset({"test": [{"text": text}]}),
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        }
    )


def _dataset(splits: dict[str, list[dict]]) -> Callable:
    return lambda **_: {split: Dataset.from_list(rows) for split, rows in splits.items()}


def _scorer(name: str, seconds: float, programs: dict[str, int]) -> Callable:
    program_of = humaneval_program if name == "humaneval" else mbpp_program

    def score(doc: dict, results: list[str]) -> dict[str, float]:
        passed = passes(program_of(doc, results[0]), seconds)
        programs["run"] = programs.get("run", 0) + 1
        programs["passed"] = programs.get("passed", 0) + passed
        return {"pass@1": float(passed)}

    return score


# ---------------------------------------------------------------- results


def text_dataset(name: str) -> dict:
    """What a card calls a text of `--text`."""
    return {"dataset_type": f"held-out-{name}", "dataset_name": f"held-out text, {name}"}


def card_rows(found: dict, limit: int | None, datasets: dict[str, dict]) -> list[dict]:
    """The harness's results as fields of `huggingface_hub.EvalResult`, a row for each metric and answer filter.

    Settings that a figure depends on are in `metric_args`, so that a card replaces a figure only by one of its kind.

    Args:
        found: what `lm_eval.simple_evaluate` returned.
        limit: of samples a task, if there was one.
        datasets: by task, the fields that name its dataset.
    """
    rows = []
    for task, metrics in found["results"].items():
        is_text = "dataset_split" not in datasets[task]
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, float):
                continue
            shots = found["n-shot"].get(task, 0) or 0
            settings = {"num_fewshot": shots, "samples": found["n-samples"][task]["effective"]}
            how = [] if is_text else [f"{shots}-shot"]
            if filtered != "none":
                settings["filter"] = filtered
                how.append(filtered)
            if limit is not None and not is_text:
                how.append(f"first {settings['samples']} only")
            name = f"{metric} ({', '.join(how)})" if how else metric
            rows.append(
                {
                    "task_type": "text-generation",
                    **datasets[task],
                    "metric_type": metric,
                    "metric_name": name,
                    "metric_value": value,
                    "metric_args": {} if is_text else settings,
                }
            )
    return rows


def standard_errors(found: dict) -> dict[str, float]:
    """task/metric,filter -> standard error, of those that the harness could compute."""
    return {
        f"{task}/{key.replace('_stderr', '')}": value
        for task, metrics in found["results"].items()
        for key, value in metrics.items()
        if "_stderr" in key and isinstance(value, float)
    }


def write_samples(samples: dict[str, list[dict]], path: Path) -> None:
    """Write what the model was asked, what it answered and what that scored: one JSON object a line, or no file."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        for task, rows in samples.items():
            for row in rows:
                # Documents may hold what JSON has no form for, such as dates.
                file.write(json.dumps({"task": task, **row}, ensure_ascii=False, default=str) + "\n")
    os.replace(part, path)


def show(console: Console, rows: list[dict], errors: dict[str, float], datasets: dict[str, dict]):
    table = Table(box=box.SIMPLE)
    for heading in ("measured on", "metric"):
        table.add_column(heading, overflow="fold")
    for heading in ("value", "standard error", "samples"):
        table.add_column(heading, justify="right")
    names = {(it["dataset_type"], it.get("dataset_config")): name for name, it in datasets.items()}
    for row in rows:
        task = names.get((row["dataset_type"], row.get("dataset_config")))
        error = errors.get(f"{task}/{row['metric_type']},{row['metric_args'].get('filter', 'none')}")
        dataset = " ".join(filter(None, [row["dataset_name"], row.get("dataset_config")]))
        values = [f"{row['metric_value']:.4f}", "" if error is None else f"{error:.4f}"]
        table.add_row(dataset, row["metric_name"], *values, str(row["metric_args"].get("samples", "")))
    console.print(table)


# ---------------------------------------------------------------- the run


def run(args: argparse.Namespace) -> dict:
    """Does what the command line says -> what `--output` gets.

    Raises:
        ValueError, OSError, ImportError: something given is wrong or missing.
    """
    check(args)
    with extra("evaluate"):
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

    class Model(HFLM):
        def loglikelihood_rolling(self, *arguments, **keywords):
            # The harness puts a bos before the text; one that the tokenizer adds would be counted as a part of the text.
            before, self.add_bos_token = self.add_bos_token, False
            try:
                return super().loglikelihood_rolling(*arguments, **keywords)
            finally:
                self.add_bos_token = before

    programs: dict[str, int] = {}
    tasks, datasets = [], {}
    for name in args.tasks:
        if name in TASKS:
            tasks.append(build_task(name, args.data, args.program_seconds, programs))
            datasets[name] = TASKS[name].dataset()
        else:
            task, dataset = build_other_task(Path(name) if is_yaml(name) else find_definition(name), args.data)
            tasks.append(task)
            datasets[task.config.task] = dataset
    for item in args.text:
        name, _, file = item.partition("=")
        tasks.append(build_text_task(name, Path(file).read_text(encoding="utf-8")))
        datasets[tasks[-1].config.task] = text_dataset(name)
    start = time.perf_counter()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded, tokenizer = load(args.model, args.adapter, args.trust_remote_code, device=device)
    model = Model(pretrained=loaded, tokenizer=tokenizer, batch_size=args.batch_size)
    found = lm_eval.simple_evaluate(
        model,
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        limit=args.limit,
        gen_kwargs={"max_gen_toks": args.max_new_tokens} if args.tasks else None,
        apply_chat_template=args.chat,
        fewshot_as_multiturn=args.chat,
        confirm_run_unsafe_code=args.allow_code_execution,
        log_samples=args.log_samples,
    )
    if args.log_samples:
        write_samples(found["samples"], samples_file(args.output))
    return {
        "model": args.model,
        "adapter": args.adapter,
        "results": card_rows(found, args.limit, datasets),
        "standard_errors": standard_errors(found),
        "datasets": datasets,
        "settings": {"limit": args.limit, "max_new_tokens": args.max_new_tokens, "chat": args.chat},
        "programs": programs,
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, lm_eval)},
    }


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    report = run(args)
    show(Console(), report["results"], report["standard_errors"], report["datasets"])
    if args.output is not None:
        part = args.output.with_name(f"{args.output.name}.part")
        part.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, args.output)
        print(f"next: python -m tools.publish {args.model} --results {args.output} --dry-run")
    else:
        print("next: the same with --output FILE, whose figures tools.publish puts into the model's card")
    return 0


if __name__ == "__main__":
    run_command(main)
