"""tools/evaluate.py: right answers score 1, wrong ones 0; generated programs run within limits; bits per byte are right."""

import json
import math
import time
from pathlib import Path

import datasets
import pytest
import torch
from tiny_chat import VOCAB_SIZE, add_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools import evaluate, publish

# ---------------------------------------------------------------- made-up data

SUMS = [(i, i + 2) for i in range(1, 7)]
HUMANEVAL = [
    {
        "task_id": "Made/0",
        "prompt": 'def add(a, b):\n    """The sum."""\n',
        "canonical_solution": "    return a + b\n",
        "test": "def check(f):\n    assert f(2, 3) == 5\n    assert f(-1, 1) == 0\n",
        "entry_point": "add",
    },
    {
        "task_id": "Made/1",
        "prompt": "def last(items):\n",
        "canonical_solution": "    return items[-1]\n",
        "test": "def check(f):\n    assert f([1, 2]) == 2\n",
        "entry_point": "last",
    },
]
MBPP = [
    {
        "task_id": i,
        "text": f"Write a function that adds {i}.",
        "code": f"def f(x):\n    return x + {i}",
        "test_setup_code": "",
        "test_list": [f"assert f({x}) == {x + i}" for x in (0, 1, 5)],
    }
    for i in (2, 3, 4, 11, 12, 600)
]
MBPP[3] |= {
    "test_setup_code": "start = f(0)",
    "test_list": ["assert f(start) == 22"] * 3,
}  # uses what the answer defines


def write_lines(file: Path, rows: list[dict]):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"What is {a} and {b}?", "answer": f"<<{a}+{b}={a + b}>>\n#### {a + b}"} for a, b in SUMS]
    write_lines(folder / "gsm8k_train.jsonl", rows)
    write_lines(folder / "gsm8k_test.jsonl", rows[:3])
    for language, question in (("en", "What is {} and {}?"), ("zh", "{} 加 {} 是多少？")):
        lines = [f"{question.format(a, b)}\t{1000 * (a + b):,}" for a, b in SUMS[:2]]
        (folder / f"mgsm_{language}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_lines(folder / "HumanEval.jsonl", HUMANEVAL)
    write_lines(folder / "mbpp.jsonl", MBPP)
    return folder


def parse(*options: str):
    return evaluate.build_parser().parse_args(list(options))


# ---------------------------------------------------------------- programs


def test_a_program_passes_if_it_comes_to_its_end():
    assert evaluate.passes("assert 1 + 1 == 2", 20)
    assert evaluate.passes("print('x' * 1000)", 20)


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 3",
        "def f(:",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "x = bytearray(3 * 2**30)",
        "open('large', 'wb').write(b'x' * 2**21)",
        "import os; assert 'A_SECRET' in os.environ",
        "input()",
        "\ud800",
    ],
)
def test_a_program_that_fails_leaves_early_or_takes_too_much_does_not_pass(program, monkeypatch):
    monkeypatch.setenv("A_SECRET", "x")
    assert not evaluate.passes(program, 20)


def test_a_program_without_end_is_ended_with_what_it_started(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    program = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\nwhile True: pass"
    start = time.monotonic()
    assert not evaluate.passes(program, 1.0)
    time.sleep(max(0.0, 4.5 - (time.monotonic() - start)))
    assert not mark.exists()


def test_reference_solutions_pass_and_changed_ones_do_not():
    for doc in HUMANEVAL:
        assert evaluate.passes(evaluate.humaneval_program(doc, doc["canonical_solution"]), 20)
        assert not evaluate.passes(evaluate.humaneval_program(doc, "    return None\n"), 20)
    assert evaluate.passes(evaluate.mbpp_program(MBPP[0], MBPP[0]["code"]), 20)
    assert not evaluate.passes(evaluate.mbpp_program(MBPP[0], MBPP[1]["code"]), 20)


# ---------------------------------------------------------------- data and command line


def test_splits(data):
    assert [row["answer_number"] for row in evaluate.load_splits("mgsm_zh", data)["test"]] == [4000, 6000]
    mbpp = evaluate.load_splits("mbpp", data)
    assert [row["task_id"] for row in mbpp["examples"]] == [2, 3, 4]
    assert [row["task_id"] for row in mbpp["test"]] == [11, 12]  # 600 is of another part


@pytest.mark.parametrize(
    ("task", "file", "content", "message"),
    [
        ("gsm8k", "gsm8k_test.jsonl", None, "which is not there"),
        ("gsm8k", "gsm8k_test.jsonl", '{"question": "x"}\n', "line 1 lacks `answer`"),
        ("gsm8k", "gsm8k_test.jsonl", "\n", "no rows"),
        ("humaneval", "HumanEval.jsonl", "[1]\n", "line 1 lacks `prompt`"),
        ("humaneval", "HumanEval.jsonl", "{\n", "line 1 is not JSON"),
        ("mbpp", "mbpp.jsonl", json.dumps(MBPP[0]) + "\n", "lacks task_id 3"),
        ("mgsm_en", "mgsm_en.tsv", "a question\tfour\n", "line 1 is no question, tab, whole number"),
    ],
)
def test_files_of_another_form_are_refused(data, task, file, content, message):
    (data / file).unlink() if content is None else (data / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        evaluate.load_splits(task, data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "neither --tasks nor --text"),
        (["--tasks", "gsm8k"], "needs --data"),
        (["--tasks", "humaneval", "--data", "."], "--allow-code-execution"),
        (["--tasks", "gsm8k", "--data", ".", "--limit", "0"], "--limit is 0"),
        (["--text", "en"], "NAME=FILE"),
        (["--tasks", "arc_easy"], "arc_easy needs --data"),
        (["--tasks", "gsm8k", "--data", "no/folder"], "no/folder: there is no such folder"),
        (["--tasks", "no.yaml"], "no.yaml: there is no such file"),
        (["--tasks", "gsm8k", "--data", ".", "--log-samples"], "--log-samples needs --output"),
    ],
)
def test_command_line_is_checked_first(options, message, capsys):
    assert evaluate.main(["no/model", *options]) == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------- the harness


def test_only_a_newline_ends_a_line(tmp_path):
    text = "What\u2028is\x85two\x0bmore?"  # str.splitlines would cut here
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert evaluate.read_jsonl(tmp_path / "a.jsonl", ("question",)) == [{"question": text}]
    (tmp_path / "mgsm_en.tsv").write_text(f"{text}\t2\n", encoding="utf-8")
    assert evaluate.read_mgsm(tmp_path / "mgsm_en.tsv")[0]["question"] == text


def test_right_answers_score_one_and_wrong_ones_zero(data, tmp_path, monkeypatch):
    """All tasks through the harness, answered by a model that knows the answers, or none of them."""
    pytest.importorskip("lm_eval", reason="lm-eval is an optional dependency")
    import lm_eval.models.huggingface
    from lm_eval.api.model import LM

    prompts = []

    def answer(prompt: str) -> str:
        prompts.append(prompt)
        for doc in HUMANEVAL:
            if prompt == doc["prompt"]:
                return doc["canonical_solution"]
        for doc in reversed(MBPP):
            if prompt.rstrip().endswith("[BEGIN]") and doc["text"] in prompt.rpartition("task: ")[2]:
                return doc["code"] + "\n"
        a, b = (
            (int(word) for word in prompt.rpartition("uestion: ")[2].replace("？", " ").split() if word.isdigit())
            if ("加" in prompt)
            else (
                int(word.strip("?")) for word in prompt.rpartition("What is")[2].split() if word.strip("?\n").isdigit()
            )
        )
        return f" so it is {a + b}\n#### {a + b}" if prompt.count("Question:") > 1 else f"{1000 * (a + b)}"

    class Known(LM):
        knows = True

        def __init__(self, **_):
            super().__init__()

        def generate_until(self, requests, **_):
            return [answer(request.args[0]) if self.knows else "?" for request in requests]

        def loglikelihood(self, requests, **_):
            raise AssertionError("not asked for")

        loglikelihood_rolling = loglikelihood

    monkeypatch.setattr(lm_eval.models.huggingface, "HFLM", Known)
    monkeypatch.setattr(evaluate, "load", lambda *_, **__: (None, None))
    options = ["any/model", "--data", str(data), "--allow-code-execution", "--tasks", *evaluate.TASKS]
    report = evaluate.run(parse(*options))
    scores = {}
    for row in report["results"]:
        key = (row["dataset_name"], row["dataset_config"], row["metric_args"].get("filter"))
        scores[key] = row["metric_value"]
    assert scores == {
        ("GSM8K", "main", "strict-match"): 1.0,
        ("GSM8K", "main", "flexible-extract"): 1.0,
        ("MGSM", "en", "remove_whitespace"): 1.0,
        ("MGSM", "en", "flexible-extract"): 1.0,
        ("MGSM", "zh", "remove_whitespace"): 1.0,
        ("MGSM", "zh", "flexible-extract"): 1.0,
        ("HumanEval", None, None): 1.0,
        ("MBPP", "full", None): 1.0,
    }
    assert report["programs"] == {"run": 4, "passed": 4}
    mbpp = next(prompt for prompt in prompts if "[BEGIN]" in prompt)
    assert mbpp.count("[BEGIN]") == 4  # three examples, then the question
    assert mbpp.count("[DONE]") == 3

    # the results are what a card takes
    file = tmp_path / "results.json"
    file.write_text(json.dumps(report))
    card = publish.updated_card("", {"license": "mit"}, publish.read_results([file]), "known")
    assert "| GSM8K main | test | exact_match (5-shot, strict-match) | 1 |" in card

    monkeypatch.setattr(Known, "knows", False)
    assert {row["metric_value"] for row in evaluate.run(parse(*options))["results"]} == {0.0}


# A task of one's own, in the harness's format, with a function beside it.
OWN_TASK = """
task: capitals
output_type: multiple_choice
test_split: test
process_docs: !function words.shout
doc_to_text: "Capital of {{country}}?"
doc_to_target: label
doc_to_choice: cities
metric_list:
  - metric: acc
"""
WORDS = """
def shout(documents):
    return documents.map(lambda document: {"country": document["country"].upper()})
"""


@pytest.fixture
def more_tasks(tmp_path) -> Path:
    """A folder with the data of a task of the harness and of one's own, whose file is `own/capitals.yaml`."""
    pytest.importorskip("lm_eval", reason="lm-eval is an optional dependency")
    for name in ("arc_easy", "capitals", "own"):
        (tmp_path / name).mkdir()
    rows = [
        {"question": q, "choices": {"label": ["A", "B"], "text": ["yes", "no"]}, "answerKey": "B"} for q in ("a", "b")
    ]
    write_lines(tmp_path / "arc_easy" / "test.jsonl", rows)
    row = {"country": "France", "cities": ["Paris", "Rome"], "label": 0}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "capitals" / "test.parquet")
    (tmp_path / "own" / "capitals.yaml").write_text(OWN_TASK)
    (tmp_path / "own" / "words.py").write_text(WORDS)
    return tmp_path


def test_other_tasks_of_the_harness_and_of_ones_own(more_tasks, checkpoint, tmp_path, capsys):
    folder = add_tokenizer(checkpoint("v3", vocab_size=VOCAB_SIZE))
    output, own = tmp_path / "out.json", str(more_tasks / "own" / "capitals.yaml")
    options = ["--tasks", "arc_easy", own, "--data", str(more_tasks), "--output", str(output), "--log-samples"]
    assert evaluate.main([str(folder), *options]) == 0
    rows = json.loads(output.read_text())["results"]
    assert {(row["dataset_type"], row["dataset_name"], row["metric_args"]["samples"]) for row in rows} == {
        ("allenai/ai2_arc", "arc_easy", 2),
        ("capitals", "capitals", 1),
    }
    samples = [json.loads(line) for line in (tmp_path / "out.samples.jsonl").read_text().splitlines()]
    assert sorted(sample["task"] for sample in samples) == ["arc_easy", "arc_easy", "capitals"]
    own_sample = next(sample for sample in samples if sample["task"] == "capitals")
    assert "Capital of FRANCE?" in json.dumps(own_sample["arguments"])
    assert own_sample["acc"] == next(row["metric_value"] for row in rows if row["dataset_name"] == "capitals")
    assert "next: python -m tools.publish" in capsys.readouterr().out
    assert evaluate.main([str(folder), *options]) == 2  # nothing is overwritten
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("no_such_task", "no task of the harness"),
        ("hellaswag", "validation.jsonl or"),
        ("humaneval_instruct", "runs generated programs"),
    ],
)
def test_other_tasks_that_cannot_be_measured_are_refused(more_tasks, task, message):
    with pytest.raises(ValueError, match=message):
        evaluate.build_other_task(evaluate.find_definition(task), more_tasks)


def test_an_own_task_without_data_is_refused(more_tasks):
    with pytest.raises(ValueError, match="no dataset_path, and there is no folder capitals"):
        evaluate.build_other_task(more_tasks / "own" / "capitals.yaml", more_tasks / "own")


def test_a_checkpoint_by_one_command(checkpoint, data, tmp_path, capsys):
    """A tiny random model: bits per byte equal to the sum over its own logits, and a task from a file."""
    pytest.importorskip("lm_eval", reason="lm-eval is an optional dependency")
    folder = add_tokenizer(checkpoint("v3", vocab_size=VOCAB_SIZE))
    text = "What is 3 and 4? 话说天下大势。\n" * 3
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    output = tmp_path / "results.json"
    options = ["--text", f"both={tmp_path / 'text.txt'}", "--tasks", "mgsm_zh", "--data", str(data), "--limit", "1"]
    assert evaluate.main([str(folder), *options, "--max-new-tokens", "4", "--output", str(output)]) == 0
    rows = {row["dataset_name"]: row for row in json.loads(output.read_text())["results"]}
    assert rows["MGSM"]["metric_args"]["samples"] == 1
    assert "first 1 only" in rows["MGSM"]["metric_name"]
    assert "held-out text, both" in capsys.readouterr().out

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
    assert ids.shape[1] < 256  # one window
    with torch.no_grad():
        logprobs = model(ids).logits[:, :-1].double().log_softmax(-1)
    nats = -logprobs.gather(-1, ids[:, 1:, None]).sum().item()
    expected = nats / math.log(2) / len(text.encode())
    assert rows["held-out text, both"]["metric_value"] == pytest.approx(expected, rel=1e-4)
