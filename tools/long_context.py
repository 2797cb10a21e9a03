"""Finds out how far back a model finds what it has read: numbers hidden in long texts, by length and depth.

    python -m tools.long_context . --lengths 1k 2k 4k --output runs/long.json        # also runs/long.png, the heat maps
    python -m tools.long_context path/or/hub-name --trust-remote-code --haystack en=books/ zh=novel.txt --output long.json

    passkey    one number is hidden and asked for
    multikey   eight numbers, each with the name of a place; one of them is asked for
    tracking   "variable AB is 12345", "variable CD has the value of variable AB", ...: the value of the last one is asked
               for, three steps from the number; a second chain leads to another number

A prompt has exactly the asked number of tokens, the question included. What is asked for stands at a depth between 0, right
at the beginning of the text, and 1, right before the question (of a chain: its first link, and the others follow evenly up
to the question). The other numbers stand anywhere. The text around comes from `--haystack`, or is made of short sentences.

Three scores, means over the samples of a cell:

    exact   the model, writing greedily, writes the right number. Guessing gives 0; copying any number of the text, which
            is no finding, 1/8 in multikey and 1/2 in tracking.
    first   the right number is likelier than nine wrong ones, of which as many as possible are in the text; chance 1/10
    rank    share of those nine that are less likely; chance 1/2. It shows a little of the ability before `exact` does.

Prompts are read in chunks, so memory grows with the cache only. Results are written after every cell; Ctrl-C
shows what there is, and the same command goes on.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from common.command import Parser, check_early, one_line_errors, run_command
from common.extras import extra
from common.names import check_model_name

TASKS = ("passkey", "multikey", "tracking")
LANGUAGES = ("en", "zh")  # of `WORDINGS`


def parse_length(text: str) -> int:
    """'4096' or '4k' -> 4096"""
    match = re.fullmatch(r"(\d{1,9})(k?)", text.lower())
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; write 4096 or 4k")
    return int(match[1]) * (1024 if match[2] else 1)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m tools.long_context", description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder or Hub name of the model")
    parser.add_argument("--adapter", help="folder or Hub name of a PEFT adapter to put on it")
    parser.add_argument("--trust-remote-code", action="store_true", help="let code that comes with the checkpoint run")
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASKS,
        default=list(TASKS),
        metavar="TASK",
        help=f"of {', '.join(TASKS)} (default all)",
    )
    parser.add_argument(
        "--languages",
        nargs="+",
        choices=LANGUAGES,
        default=list(LANGUAGES),
        metavar="LANGUAGE",
        help=f"of {', '.join(LANGUAGES)} (default all)",
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=parse_length,
        metavar="N",
        help="tokens of a prompt, as 4096 or 4k (default: 1k, 2k, 4k, ... up to what the model reads, at most 128k)",
    )
    parser.add_argument(
        "--depths",
        nargs="+",
        type=float,
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        metavar="X",
        help="places of what is asked for, 0 the beginning, 1 the end (default 0 0.25 0.5 0.75 1)",
    )
    parser.add_argument("--samples", type=int, default=5, help="prompts a cell (default 5)")
    parser.add_argument(
        "--haystack",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="by language, UTF-8 text to hide things in, or a folder of .txt and .md files (default: short sentences of our making)",
    )
    parser.add_argument("--chunk-size", type=int, default=1024, help="tokens read at a time (default 1024)")
    parser.add_argument("--seed", type=int, default=0, help="of what is hidden where (default 0)")
    parser.add_argument(
        "--dtype", default="auto", help="of the weights, for instance float32 (default: the checkpoint's)"
    )
    parser.add_argument("--device", help="for instance cuda or auto (default: cpu)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; heat maps go beside it as .png")
    return parser


def check(args: argparse.Namespace) -> dict[str, Path]:
    """Refuses a command line that would fail later -> paths of haystacks by language

    Raises:
        ValueError: what is wrong and the remedy.
    """
    for name in ("samples", "chunk_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1.")
    for depth in args.depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"--depths has {depth:g}; depths are from 0, the beginning, to 1, the end.")
    if args.output.suffix != ".json" or not args.output.parent.is_dir():
        raise ValueError(f"--output {args.output} must be a .json file in a folder that is there.")
    haystacks = {}
    for item in args.haystack:
        language, _, path = item.partition("=")
        if language not in args.languages or not Path(path).exists():
            raise ValueError(f"--haystack {item} must be {' or '.join(args.languages)}, =, and a path that is there.")
        haystacks[language] = Path(path)
    check_model_name(args.model, "model")
    return haystacks


check_early(__name__, lambda: check(build_parser().parse_args()))

with extra("tools"):
    import torch
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils import logging

    from common.loading import load
    from common.machine import describe_machine

NUM_KEYS, NUM_STEPS, NUM_CANDIDATES = 8, 3, 10
SCORES = ("exact", "first", "rank")
# What a guess among the candidates gives, and what copying any number of the text gives for `exact`.
CHANCE = {"guessing": {"exact": 0.0, "first": 1 / NUM_CANDIDATES, "rank": 0.5}}
CHANCE["copying any number, exact"] = {"multikey": 1 / NUM_KEYS, "tracking": 1 / 2}
_LONGEST_SENTENCE = 64  # tokens; longer ones are cut, so that a needle can stand near its depth


# ---------------------------------------------------------------- words


class Wording(NamedTuple):
    """How one language says it. Questions end where the number follows."""

    space: str  # before a sentence
    head: str
    key: str
    asks_key: str
    named_key: str
    asks_named_key: str
    first_link: str
    link: str
    asks_variable: str
    answer: str
    places: tuple[str, ...]
    filler: str  # a sentence of the three parts that follow
    parts: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]


WORDINGS = {
    "en": Wording(
        space=" ",
        head="Numbers are hidden in the following text. Remember them, for they will be asked for.\n\n",
        key="The pass key is {value}.",
        asks_key="\n\nWhat is the pass key? The pass key is",
        named_key="The pass key of {name} is {value}.",
        asks_named_key="\n\nWhat is the pass key of {name}? The pass key of {name} is",
        first_link="The value of variable {name} is {value}.",
        link="Variable {name} has the value of variable {before}.",
        asks_variable="\n\nWhat is the value of variable {name}? The value of variable {name} is",
        answer=" {value}",
        places=(
            *("Lisbon", "Cairo", "Oslo", "Lima", "Delhi", "Rome", "Quito", "Tokyo"),
            *("Berlin", "Dakar", "Paris", "Havana", "Madrid", "Dublin", "Vienna", "Boston"),
        ),
        filler="{0} {1} {2}.",
        parts=(
            tuple(
                f"The {who}"
                for who in (
                    *("gardener", "old sailor", "teacher", "baker", "young doctor", "miller", "clerk", "painter"),
                    *("shepherd", "carpenter", "widow", "postman", "librarian", "tailor", "farmer", "captain"),
                    *("musician", "fisherman", "innkeeper", "mason", "student", "judge", "weaver", "driver"),
                )
            ),
            (
                *("watered the roses", "mended the fence", "read a long letter", "opened the window", "lit the lamp"),
                *("carried the basket home", "swept the yard", "talked about the harvest", "looked at the clouds"),
                *("waited for the ferry", "sharpened a pencil", "hung the coats to dry", "fed the horses"),
                *("counted the apples", "wrote a short note", "walked along the river", "told the same story again"),
                *("polished the silver", "listened to the rain", "bought some bread", "closed the heavy door"),
                *("looked for the ladder", "drank a cup of tea", "painted the gate green"),
            ),
            (
                *("before breakfast", "in the evening", "after the storm", "without a word", "on the way to town"),
                *("while the children slept", "as every year", "near the old bridge", "with great care", "at noon"),
                *("during the holidays", "in spite of the cold", "behind the church", "until the bell rang"),
                *("with a neighbour", "for the first time", "under the chestnut trees", "rather slowly", "at dawn"),
                *("as quietly as possible", "in the small kitchen", "on the last day of spring", "by the fire"),
                "when the wind had turned",
            ),
        ),
    ),
    "zh": Wording(
        space="",
        head="下面的文字里藏着一些数字，请记住，后面会问到。\n\n",
        key="密码是{value}。",
        asks_key="\n\n密码是多少？密码是",
        named_key="{name}的密码是{value}。",
        asks_named_key="\n\n{name}的密码是多少？{name}的密码是",
        first_link="变量{name}的值是{value}。",
        link="变量{name}的值等于变量{before}的值。",
        asks_variable="\n\n变量{name}的值是多少？变量{name}的值是",
        answer="{value}",
        places=(
            *("北京", "上海", "广州", "成都", "西安", "杭州", "南京", "武汉"),
            *("长沙", "昆明", "沈阳", "青岛", "厦门", "大连", "苏州", "贵阳"),
        ),
        filler="{2}，{0}{1}。",
        parts=(
            (
                *("园丁", "老水手", "老师", "面包师", "年轻的医生", "磨坊主", "店员", "画家", "牧羊人", "木匠"),
                *("邻居", "邮差", "图书管理员", "裁缝", "农夫", "船长", "乐师", "渔夫", "客栈老板", "石匠"),
                *("学生", "法官", "织布工", "车夫"),
            ),
            (
                *("给玫瑰浇了水", "修好了篱笆", "读了一封长信", "打开了窗户", "点亮了油灯", "把篮子提回了家"),
                *("扫了院子", "谈起了收成", "望着天上的云", "等着渡船", "削了一支铅笔", "把外衣晾了起来"),
                *("喂了马", "数了数苹果", "写了一张便条", "沿着河边散步", "又讲了那个故事", "擦亮了银器"),
                *("听着雨声", "买了些面包", "关上了沉重的门", "寻找着梯子", "喝了一杯茶", "把大门漆成了绿色"),
            ),
            (
                *("早饭以前", "傍晚时分", "暴风雨过后", "进城的路上", "孩子们睡着的时候", "和往年一样", "在旧桥旁边"),
                *("到了中午", "放假期间", "天气虽冷", "在教堂后面", "钟声响起之前", "第一次来到这里", "在栗子树下"),
                *("天刚亮", "在小厨房里", "春天的最后一天", "坐在火炉边", "风向变了以后", "在集市上", "过了很久"),
                *("吃过晚饭", "在村子的另一头", "趁着月光"),
            ),
        ),
    ),
}


def filler_sentences(wording: Wording, seed: int) -> list[str]:
    """All sentences of a subject, an action and a circumstance, 13,824 of them, in random order."""
    sentences = [wording.filler.format(*parts) for parts in itertools.product(*wording.parts)]
    random.Random(seed).shuffle(sentences)
    return sentences


def read_sentences(path: Path) -> list[str]:
    """The sentences of a UTF-8 text, or of all .txt and .md files below a folder.

    Raises:
        ValueError: there is no such file, or it holds no text.
    """
    files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md")) if path.is_dir() else [path]
    sentences = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--haystack {file} is no UTF-8 text ({error}); name a text or a folder.") from error
        sentences += [part.strip() for part in re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n+", text)]
    sentences = [sentence for sentence in sentences if sentence]
    if not sentences:
        raise ValueError(f"--haystack {path} holds no text; name a .txt or .md file, or a folder that has some.")
    return sentences


# ---------------------------------------------------------------- prompts


class Plan(NamedTuple):
    """What a prompt hides. The first needle is the one whose depth was asked for, the first value the right one."""

    needles: list[tuple[float, str]]  # depth and sentence
    question: str
    values: list[str]  # all numbers that are in the text


class Prompt(NamedTuple):
    ids: list[int]
    needle_at: int  # place of the first token of the needle
    answer: str
    candidates: list[list[int]]  # tokens of the right number and of wrong ones, equally many each


def plan_prompt(task: str, wording: Wording, numbers: list[str], depth: float, draw: random.Random) -> Plan:
    """Names, numbers (of `numbers`) and depths of one sample."""
    if task == "tracking":
        letters = ("".join(pair) for pair in itertools.permutations("ABCDEFGHJKLMNPQRSTUVWXYZ", 2))
        names = draw.sample(list(letters), 2 * (NUM_STEPS + 1))
        values = draw.sample(numbers, 2)
        own, other = names[: NUM_STEPS + 1], names[NUM_STEPS + 1 :]
        depths = [depth + (1 - depth) * i / (NUM_STEPS + 1) for i in range(NUM_STEPS + 1)]
        anywhere = sorted(draw.random() for _ in other)
        needles = []
        for chain, value, at in ((own, values[0], depths), (other, values[1], anywhere)):
            links = [wording.first_link.format(name=chain[0], value=value)]
            links += [wording.link.format(name=b, before=a) for a, b in itertools.pairwise(chain)]
            needles += zip(at, links, strict=True)
        return Plan(needles, wording.asks_variable.format(name=own[-1]), values)
    if task == "multikey":
        names, values = draw.sample(wording.places, NUM_KEYS), draw.sample(numbers, NUM_KEYS)
        keys = [wording.named_key.format(name=name, value=value) for name, value in zip(names, values, strict=True)]
        depths = [depth, *(draw.random() for _ in keys[1:])]
        return Plan(list(zip(depths, keys, strict=True)), wording.asks_named_key.format(name=names[0]), values)
    values = draw.sample(numbers, 1)
    return Plan([(depth, wording.key.format(value=values[0]))], wording.asks_key, values)


class Builder:
    """Makes the prompts of one language. Sentences are encoded one by one, so that lengths are exact.

    Args:
        tokenizer: of the model.
        wording: the language.
        sentences: the text to hide things in, in order; it is begun anew when it ends.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, wording: Wording, sentences: list[str]):
        self.tokenizer = tokenizer
        self.wording = wording
        rows = tokenizer([wording.space + sentence for sentence in sentences], add_special_tokens=False)["input_ids"]
        self.pieces = [
            row[i : i + _LONGEST_SENTENCE] for row in rows for i in range(0, len(row), _LONGEST_SENTENCE) if row
        ]
        begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        self.head = [tokenizer.bos_token_id] * begins + self._encode(wording.head)
        self.numbers = self._equally_long_numbers()

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def build(self, task: str, length: int, depth: float, draw: random.Random) -> Prompt:
        """A prompt of `length` tokens.

        Raises:
            ValueError: so few have no room for the question and what is hidden.
        """
        plan = plan_prompt(task, self.wording, self.numbers, depth, draw)
        needles = [(at, self._encode(self.wording.space + text)) for at, text in plan.needles]
        question = self._encode(plan.question)
        fixed = len(self.head) + len(question) + sum(len(ids) for _, ids in needles)
        if fixed > length:
            raise ValueError(
                f"{length} tokens have no room for a prompt of {task}, which takes {fixed} without a text."
            )
        text, ends = self._text(length - fixed, draw.randrange(len(self.pieces)))
        # Needle i goes behind the sentence that ends nearest to its depth.
        places = [_nearest(ends, at * (length - fixed)) for at, _ in needles]
        order = sorted(range(len(needles)), key=lambda i: (places[i], needles[i][0]))
        ids, begun, needle_at = list(self.head), 0, 0
        for i in order:
            ids += text[begun : places[i]]
            begun = places[i]
            needle_at = len(ids) if i == 0 else needle_at
            ids += needles[i][1]
        ids += text[begun:] + question
        return Prompt(ids, needle_at, plan.values[0], self._candidates(plan.values, draw))

    def _text(self, length: int, first: int) -> tuple[list[int], list[int]]:
        """`length` tokens of the text from a sentence on, cut at their front -> ids, the places between sentences"""
        pieces, total = [], 0
        while total < length:
            pieces.append(self.pieces[(first + len(pieces)) % len(self.pieces)])
            total += len(pieces[-1])
        cut = total - length
        ends = [0, *(end - cut for end in itertools.accumulate(map(len, pieces)) if end > cut)]
        return list(itertools.chain(*pieces))[cut:], ends

    def _candidates(self, values: list[str], draw: random.Random) -> list[list[int]]:
        """The right number, the others of the text, and more from nowhere."""
        more = [number for number in draw.sample(self.numbers, 2 * NUM_CANDIDATES) if number not in values]
        return [self._encode(self.wording.answer.format(value=value)) for value in [*values, *more][:NUM_CANDIDATES]]

    def _equally_long_numbers(self) -> list[str]:
        """Numbers that the tokenizer writes in as many tokens, so that none is likelier for being shorter."""
        by_length = {}
        for number in random.Random(0).sample(range(10_000, 100_000), 3000):
            length = len(self._encode(self.wording.answer.format(value=number)))
            by_length.setdefault(length, []).append(str(number))
        return max(by_length.values(), key=len)


def _nearest(ends: list[int], place: float) -> int:
    right = min(bisect_left(ends, place), len(ends) - 1)
    left = max(right - 1, 0)
    return ends[right] if ends[right] - place < place - ends[left] else ends[left]


# ---------------------------------------------------------------- scores


class Score(NamedTuple):
    exact: float
    first: float
    rank: float


@torch.inference_mode()
def score_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    chunk_size: int,
    progress: Callable[[int], object],
) -> Score:
    """Lets the model read the prompt in chunks, weigh the candidates and write.

    Args:
        model: one whose cache can be cropped.
        chunk_size: tokens read at a time.
        progress: gets the number of tokens read, chunk by chunk.

    Raises:
        ValueError: the model's logits are not finite.
    """
    cache = DynamicCache(config=model.config.get_text_config())

    def run(ids: list[int]) -> torch.Tensor:
        """Reads on -> log-probabilities of what follows each of the last tokens, float32 [tokens, vocab_size]"""
        kept = len(ids) if len(ids) <= len(prompt.candidates[0]) else 1
        inputs = torch.tensor([ids], device=model.device)
        logits = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=kept).logits[0]
        return logits.float().log_softmax(dim=-1)

    for start in range(0, len(prompt.ids), chunk_size):
        part = prompt.ids[start : start + chunk_size]
        after_prompt = run(part)[-1]
        progress(len(part))
    if not after_prompt.isfinite().all():
        raise ValueError(
            f"the model's logits are not finite after {len(prompt.ids)} tokens; load it in another --dtype."
        )

    likelihoods = []
    for candidate in prompt.candidates:
        likelihood = after_prompt[candidate[0]].item()
        if candidate[1:]:
            rows = run(candidate[:-1])
            likelihood += rows.gather(1, torch.tensor(candidate[1:], device=rows.device)[:, None]).sum().item()
            cache.crop(1 - len(candidate))
        likelihoods.append(likelihood)
    right, wrong = likelihoods[0], likelihoods[1:]

    # Two tokens more than the answer has: a model may write it in other tokens, and must not go on with a digit.
    written = [int(after_prompt.argmax())]
    for _ in range(len(prompt.candidates[0]) + 1):
        written.append(int(run(written[-1:])[-1].argmax()))
    text = tokenizer.decode(written)
    return Score(
        exact=float(re.match(rf"\s*{prompt.answer}(?!\d)", text) is not None),
        first=float(right > max(wrong)),
        rank=sum((right > other) + 0.5 * (right == other) for other in wrong) / len(wrong),
    )


# ---------------------------------------------------------------- the run


class Cell(NamedTuple):
    """One place of a heat map."""

    task: str
    language: str
    length: int
    depth: float

    def key(self) -> str:
        return f"{self.task}/{self.language}/{self.length}/{self.depth:g}"


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    builders: dict[str, Builder],
    settings: dict,
    done: dict,
) -> Iterator[dict]:
    """Scores the cells that are not in `done`, short prompts first -> each as a row of the results

    Args:
        builders: by language.
        settings: `tasks`, `lengths`, `depths`, `samples`, `seed`, `chunk_size`.
        done: rows by the key of their cell.
    """
    cells = [
        Cell(task, language, length, depth)
        for length, task, language, depth in itertools.product(
            settings["lengths"], settings["tasks"], builders, settings["depths"]
        )
    ]
    samples = settings["samples"]
    with tqdm(total=samples * sum(cell.length for cell in cells), unit="token", unit_scale=True) as bar:
        for cell in cells:
            if cell.key() in done:
                bar.update(samples * cell.length)
                continue
            bar.set_description(cell.key())
            start, scores = time.perf_counter(), []
            for sample in range(samples):
                draw = random.Random(f"{settings['seed']}/{cell.key()}/{sample}")
                prompt = builders[cell.language].build(cell.task, cell.length, cell.depth, draw)
                scores.append(score_prompt(model, tokenizer, prompt, settings["chunk_size"], bar.update))
            means = {
                name: sum(column) / samples for name, column in zip(SCORES, zip(*scores, strict=True), strict=True)
            }
            yield cell._asdict() | means | {"samples": samples, "seconds": round(time.perf_counter() - start, 1)}


def fingerprint(model: PreTrainedModel) -> str:
    """Of the weights: a hash over the first numbers of each."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        if not parameter.is_meta:
            digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- results


def card_rows(cells: list[dict], depths: list[float]) -> list[dict]:
    """Means over the depths as fields of `huggingface_hub.EvalResult`, one row for a task, language and length whose depths
    are all there."""
    rows, groups = [], {}
    for cell in cells:
        groups.setdefault((cell["task"], cell["language"], cell["length"]), []).append(cell)
    for (task, language, length), group in groups.items():
        if len(group) == len(depths):
            rows.append(
                {
                    "task_type": "text-generation",
                    "dataset_type": f"long-context-{task}-{language}",
                    "dataset_name": f"long context, {task}, {language}",
                    "metric_type": "exact_match",
                    "metric_name": f"exact match at {length:,} tokens",
                    "metric_value": sum(cell["exact"] for cell in group) / len(group),
                    "metric_args": {"tokens": length, "depths": len(depths), "samples": group[0]["samples"]},
                }
            )
    return rows


def mean_over(cells: list[dict], score: str, **fields) -> float | None:
    """The mean score of the cells that have these fields; None if there is none."""
    values = [cell[score] for cell in cells if all(cell[name] == value for name, value in fields.items())]
    return sum(values) / len(values) if values else None


def show(console: Console, report: dict):
    """Prints the means over depths, a line for each task and language."""
    cells, settings = report["cells"], report["settings"]
    table = Table(box=box.SIMPLE, title=f"means over depths: {' / '.join(SCORES)}")
    table.add_column("task")
    for length in settings["lengths"]:
        table.add_column(f"{length:,}", justify="right")
    for task, language in itertools.product(settings["tasks"], settings["haystacks"]):
        row = [f"{task} {language}"]
        for length in settings["lengths"]:
            means = [mean_over(cells, score, task=task, language=language, length=length) for score in SCORES]
            row.append("" if means[0] is None else " / ".join(f"{mean:.2f}" for mean in means))
        table.add_row(*row)
    console.print(table)
    console.print(
        "guessing gives 0.00 / 0.10 / 0.50; copying any number of the text, exact 0.12 (multikey), 0.50 (tracking)"
    )


def plot(report: dict, path: Path):
    """Heat maps of the three scores, length by depth: a row for each task, three columns for each language."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    settings, cells = report["settings"], report["cells"]
    tasks, lengths, depths = settings["tasks"], settings["lengths"], settings["depths"]
    columns = list(itertools.product(settings["haystacks"], SCORES))
    size = (1.5 + len(columns) * (0.4 + 0.5 * len(lengths)), 0.4 + len(tasks) * (0.5 + 0.3 * len(depths)))
    figure, axes = pyplot.subplots(len(tasks), len(columns), figsize=size, squeeze=False, layout="constrained")
    for (y, task), (x, (language, score)) in itertools.product(enumerate(tasks), enumerate(columns)):
        axis, fields = axes[y][x], {"task": task, "language": language}
        values = [[mean_over(cells, score, **fields, length=n, depth=depth) for n in lengths] for depth in depths]
        grid = [[float("nan") if value is None else value for value in row] for row in values]
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for row, column in itertools.product(range(len(depths)), range(len(lengths))):
            if values[row][column] is not None:
                ink = readable_on(image.cmap(image.norm(values[row][column])))
                axis.text(column, row, f"{values[row][column]:.2g}", ha="center", va="center", fontsize=6, color=ink)
        axis.set_xticks(range(len(lengths)), [_short(n) for n in lengths], fontsize=6)
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths] if x == 0 else [], fontsize=6)
        axis.set_title(f"{task} {language}, {score}", fontsize=7)
        if y == len(tasks) - 1:
            axis.set_xlabel("tokens of the prompt", fontsize=6)
        if x == 0:
            axis.set_ylabel("depth", fontsize=6)
    figure.colorbar(image, ax=axes, shrink=0.6).ax.tick_params(labelsize=6)
    part = path.with_name(f"{path.name}.part")
    figure.savefig(part, dpi=160, format="png")
    pyplot.close(figure)
    os.replace(part, path)


def readable_on(colour: tuple[float, ...]) -> str:
    """Black or white, whichever has more contrast to a colour.

    Args:
        colour: red, green and blue in [0, 1], as sRGB has them.
    """
    red, green, blue = ((c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in colour[:3])
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # relative, as WCAG 2 defines it
    return "black" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "white"


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def write(report: dict, path: Path):
    """Writes the whole file or nothing."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_cells(path: Path, made_by: dict) -> list[dict]:
    """The cells of an earlier run into the same file; none if there is no file.

    Args:
        made_by: what the cells depend on; tasks and lengths may be others now.

    Raises:
        ValueError: the file is no such report, or another model, haystack or setting made it.
    """
    if not path.exists():
        return []
    remedy = "name another --output, or delete the file."
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        cells, before = report["cells"], report["made_by"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"--output {path} is there and is no report of this tool; {remedy}") from error
    for name, value in made_by.items():
        if before.get(name) != value:
            raise ValueError(
                f"--output {path} was made with {name} {before.get(name)!r}, now it is {value!r}; {remedy}"
            )
    return cells


# ---------------------------------------------------------------- command line


def default_lengths(model: PreTrainedModel) -> list[int]:
    """1k, 2k, 4k, ... up to `max_position_embeddings`, at most 128k; at least 1k."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1024
    return [1024 * 2**i for i in range(8) if i == 0 or 1024 * 2**i <= context]


def run(args: argparse.Namespace) -> dict:
    """Does what the command line says -> the report, which `--output` then holds

    Raises:
        ValueError, OSError: something given is wrong or missing.
    """
    haystacks = check(args)
    sentences = {
        language: read_sentences(haystacks[language])
        if language in haystacks
        else filler_sentences(WORDINGS[language], args.seed)
        for language in args.languages
    }
    model, tokenizer = load(args.model, args.adapter, args.trust_remote_code, args.dtype, args.device)
    model.eval()
    builders = {name: Builder(tokenizer, WORDINGS[name], texts) for name, texts in sentences.items()}
    settings = {
        "tasks": list(dict.fromkeys(args.tasks)),
        "lengths": sorted(set(args.lengths or default_lengths(model))),
        "depths": sorted(set(args.depths)),
        "samples": args.samples,
        "seed": args.seed,
        "chunk_size": args.chunk_size,
        "haystacks": {name: str(haystacks.get(name, "filler sentences")) for name in builders},
    }
    for name, task in itertools.product(builders, settings["tasks"]):  # too few tokens are noticed before any work
        builders[name].build(task, settings["lengths"][0], 0.0, random.Random(0))
    texts = {name: hashlib.sha256("\n".join(sentences[name]).encode()).hexdigest()[:16] for name in sorted(sentences)}
    made_by = {"weights": fingerprint(model), "dtype": str(model.dtype)}
    made_by |= {name: settings[name] for name in ("depths", "samples", "seed")}
    made_by |= {f"haystack {name}": digest for name, digest in texts.items()}
    cells = read_cells(args.output, made_by)
    report = {
        "model": args.model,
        "adapter": args.adapter,
        "context": getattr(model.config.get_text_config(), "max_position_embeddings", None),
        "results": [],
        "chance": CHANCE,
        "settings": settings,
        "made_by": made_by,
        "machine": describe_machine(),
        "cells": cells,
    }
    done = {Cell(*(cell[name] for name in Cell._fields)).key(): cell for cell in cells}
    try:
        for cell in measure(model, tokenizer, builders, settings, done):
            cells.append(cell)
            write(report, args.output)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is missing", file=sys.stderr)
    report["results"] = card_rows(cells, settings["depths"])
    return report


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    report = run(args)
    write(report, args.output)
    plot(report, args.output.with_suffix(".png"))
    show(Console(), report)
    print(f"heat maps: {args.output.with_suffix('.png')}")
    print(f"next: python -m tools.publish {args.model} --results {args.output} --dry-run")
    return 0


if __name__ == "__main__":
    run_command(main)
