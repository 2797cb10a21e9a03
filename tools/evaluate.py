"""Runs lm-evaluation-harness on a checkpoint with local task files, and writes results for a model card.

    python -m tools.evaluate . --tasks gsm8k mgsm_en mgsm_zh --data path/to/tasks --output results.json
    python -m tools.evaluate . --tasks humaneval mbpp --data path/to/tasks --allow-code-execution
    python -m tools.evaluate . --text en=held_out_en.txt zh=held_out_zh.txt

Needs the extra: `pip install -e '.[evaluate]'`. The prompts, few-shot examples, stop words and answer filters are the
harness's own, so the figures compare with others made by it. Only the data come from files, and generated programs run
here:

    gsm8k             gsm8k_train.jsonl (few-shot examples), gsm8k_test.jsonl    {"question", "answer"}
    mgsm_en, mgsm_zh  mgsm_en.tsv, mgsm_zh.tsv                                   question TAB number
    humaneval         HumanEval.jsonl                                            as OpenAI published it
    mbpp              mbpp.jsonl                                                 as Google published it, task_id 1 to 974

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
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common.command import run_command
from common.extras import extra
from common.outputs import refuse_existing

with extra("evaluate"):
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from common.loading import load


class Source(NamedTuple):
    """A task: the harness's definition, the files it needs, and the names that a model card gives it."""

    definition: str  # a YAML file in lm_eval/tasks
    files: tuple[str, ...]
    dataset_type: str  # the dataset's name on the Hub
    dataset_name: str
    dataset_config: str | None
    runs_code: bool = False


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
    from datasets import Dataset

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


def card_rows(found: dict, limit: int | None) -> list[dict]:
    """The harness's results as fields of `huggingface_hub.EvalResult`, a row for each metric and answer filter.

    Settings that a figure depends on are in `metric_args`, so that a card replaces a figure only by one of its kind.
    """
    rows = []
    for task, metrics in found["results"].items():
        source = TASKS.get(task)
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, float):
                continue
            shots = found["n-shot"].get(task, 0) or 0
            settings = {"num_fewshot": shots, "samples": found["n-samples"][task]["effective"]}
            how = [f"{shots}-shot"] if source else []
            if filtered != "none":
                settings["filter"] = filtered
                how.append(filtered)
            if source and limit is not None:
                how.append(f"first {settings['samples']} only")
            name = f"{metric} ({', '.join(how)})" if how else metric
            if source:
                dataset = {
                    "dataset_type": source.dataset_type,
                    "dataset_name": source.dataset_name,
                    "dataset_config": source.dataset_config,
                    "dataset_split": "test",
                }
            else:
                text = task.removeprefix("text_")
                dataset = {"dataset_type": f"held-out-{text}", "dataset_name": f"held-out text, {text}"}
            rows.append(
                {
                    "task_type": "text-generation",
                    **dataset,
                    "metric_type": metric,
                    "metric_name": name,
                    "metric_value": value,
                    "metric_args": settings if source else {},
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


def show(console: Console, rows: list[dict], errors: dict[str, float]):
    table = Table(box=box.SIMPLE)
    for heading in ("measured on", "metric"):
        table.add_column(heading, overflow="fold")
    for heading in ("value", "standard error", "samples"):
        table.add_column(heading, justify="right")
    names = {(source.dataset_type, source.dataset_config): name for name, source in TASKS.items()}
    for row in rows:
        task = names.get((row["dataset_type"], row.get("dataset_config")))
        error = errors.get(f"{task}/{row['metric_type']},{row['metric_args'].get('filter', 'none')}")
        dataset = " ".join(filter(None, [row["dataset_name"], row.get("dataset_config")]))
        values = [f"{row['metric_value']:.4f}", "" if error is None else f"{error:.4f}"]
        table.add_row(dataset, row["metric_name"], *values, str(row["metric_args"].get("samples", "")))
    console.print(table)


# ---------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.evaluate", description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder or Hub name of the model")
    parser.add_argument("--adapter", help="folder or Hub name of a PEFT adapter to put on it")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[], help="what to run")
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
    if args.tasks and args.data is None:
        raise ValueError("--tasks needs --data, the folder with their files.")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit is {args.limit}; it must be at least 1.")
    code = [name for name in args.tasks if TASKS[name].runs_code]
    if code and not args.allow_code_execution:
        raise ValueError(
            f"{', '.join(code)} runs programs that the model writes; add --allow-code-execution on a machine where that "
            "can do no harm."
        )
    for item in args.text:
        name, _, file = item.partition("=")
        if not name or not Path(file).is_file():
            raise ValueError(f"--text {item} must be NAME=FILE with a file that is there.")


def run(args: argparse.Namespace) -> dict:
    """Does what the command line says -> what `--output` gets.

    Raises:
        ValueError, OSError, ImportError: something given is wrong or missing.
    """
    check(args)
    if args.output is not None:
        refuse_existing("--output", [args.output])
    import torch
    import transformers

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
    tasks = [build_task(name, args.data, args.program_seconds, programs) for name in args.tasks]
    for item in args.text:
        name, _, file = item.partition("=")
        tasks.append(build_text_task(name, Path(file).read_text(encoding="utf-8")))
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
        log_samples=False,
    )
    return {
        "model": args.model,
        "adapter": args.adapter,
        "results": card_rows(found, args.limit),
        "standard_errors": standard_errors(found),
        "settings": {"limit": args.limit, "max_new_tokens": args.max_new_tokens, "chat": args.chat},
        "programs": programs,
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, lm_eval)},
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        report = run(args)
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(Console(), report["results"], report["standard_errors"])
    if args.output is not None:
        part = args.output.with_name(f"{args.output.name}.part")
        part.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, args.output)
    return 0


if __name__ == "__main__":
    run_command(main)
