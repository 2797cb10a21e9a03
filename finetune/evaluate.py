"""Answers of a model to questions, and whether they are right; also as a command:

    python -m finetune.evaluate --model . --adapter runs/x/final --data held_out.jsonl

Shapes: B questions, S tokens of the longest, V vocabulary.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.command import Parser, check_early, one_line_errors, run_command
from common.extras import extra
from common.names import check_model_name


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = Parser(
        prog="python -m finetune.evaluate", description="Loss and accuracy of a model on questions with answers."
    )
    parser.add_argument("--model", required=True, help="folder or Hub name of the model")
    parser.add_argument("--adapter", type=Path, help="folder of a LoRA adapter or an ESFT result to put on it")
    parser.add_argument("--data", nargs="+", required=True, help="files or dataset names, as for training")
    parser.add_argument(
        "--answer-kind", choices=("exact", "number"), default="exact", help="what counts (default exact)"
    )
    parser.add_argument("--answer-tokens", type=int, default=64, help="longest answer, in tokens (default 64)")
    parser.add_argument("--batch-size", type=int, default=64, help="questions at once (default 64)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="default auto")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let code that comes with the model run, instead of this repository's",
    )
    return parser


check_early(__name__, lambda: build_parser().parse_args())

with extra("train"):
    import torch
    import torch.nn.functional as F
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from finetune.data import IGNORED_LABEL, collate, pad_token, prompt_ids, question_and_answer, read_examples, render
    from finetune.models import load_model, load_result
    from finetune.rewards import same_number

CausalLM = Any  # transformers has no type for a model that generates, with PEFT's wrapper or without


@dataclass(frozen=True)
class Answer:
    """A model's answer to one example, and how it compares."""

    example: dict
    text: str  # the greedy answer
    is_right: bool
    nll: float  # -ln p of what the loss counts in the example, in nats
    num_targets: int  # its tokens


@dataclass(frozen=True)
class Score:
    """Means over answers: the loss in nats a target token, and the share of right answers in [0, 1]."""

    loss: float
    accuracy: float
    examples: int


@torch.no_grad()
def answer_all(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict],
    max_new_tokens: int = 64,
    kind: str = "exact",
    batch_size: int = 64,
) -> list[Answer]:
    """Answer every example's question greedily, and compare.

    Args:
        model: a causal language model, in eval mode.
        tokenizer: its chat template is used.
        examples: chats or prompts with completions.
        max_new_tokens: longest answer, reasoning included; without reasoning one more token than the longest reference is
            made at most, since longer answers are wrong anyway (not where only the number counts).
        kind: "exact": the texts are the same but for white space around them; "number": they end with the same number.
            What is before </think> does not count.
        batch_size: examples at once.
    """
    answers = []
    for first in range(0, len(examples), batch_size):
        part = examples[first : first + batch_size]
        questions, references = zip(*(question_and_answer(example) for example in part), strict=True)
        limit = max_new_tokens
        if kind == "exact" and not any("thinking" in question for question in questions):
            longest = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in references)
            limit = min(limit, longest + 1)
        texts = greedy_answers(model, tokenizer, list(questions), limit)
        nlls, counts = _losses(model, tokenizer, part)
        for example, text, reference, nll, count in zip(part, texts, references, nlls, counts, strict=True):
            final = text.rpartition("</think>")[2].strip()
            is_right = same_number(text, reference) if kind == "number" else final == reference
            answers.append(Answer(example, text, is_right, nll, count))
    return answers


def score(answers: list[Answer]) -> Score:
    """Average answers.

    Raises:
        ValueError: there are none.
    """
    if not answers:
        raise ValueError("there are no answers to average; give at least one held-out example")
    loss = sum(answer.nll for answer in answers) / sum(answer.num_targets for answer in answers)
    return Score(loss, sum(answer.is_right for answer in answers) / len(answers), len(answers))


def _losses(model: CausalLM, tokenizer: PreTrainedTokenizerBase, examples: list[dict]) -> tuple[list, list]:
    """-ln p of each example's counted tokens, and how many they are."""
    rows = [render(example, tokenizer) for example in examples]
    batch = {name: tensor.to(model.device) for name, tensor in collate(rows, pad_token(tokenizer)).items()}
    labels = batch.pop("labels")[:, 1:]  # [B, S - 1]
    logits = model(**batch, use_cache=False).logits[:, :-1].float()  # [B, S - 1, V]
    nlls = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none").sum(dim=1)
    return nlls.tolist(), (labels != IGNORED_LABEL).sum(dim=1).tolist()  # [B] each


@torch.no_grad()
def greedy_answers(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, questions: list[dict], max_new_tokens: int
) -> list[str]:
    """Answer questions (from `question_and_answer`) in one batch; white space around answers is cut."""
    prompts = [prompt_ids(question, tokenizer) for question in questions]
    longest = max(map(len, prompts))
    filler = pad_token(tokenizer)
    # padding on the left, so that all answers begin at the same place
    inputs = torch.tensor([[filler] * (longest - len(ids)) + ids for ids in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        **{"temperature": 1.0, "top_p": 1.0, "top_k": 50},  # neutral: else the checkpoint's, with a warning
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=filler,
    )
    tokens = model.generate(input_ids=inputs, attention_mask=mask, generation_config=greedy)
    return [text.strip() for text in tokenizer.batch_decode(tokens[:, longest:], skip_special_tokens=True)]


# ---------------------------------------------------------------- command line


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    check_model_name(args.model)
    examples = read_examples(args.data)
    loaded, tokenizer = load_model(args.model, args.dtype, trust_remote_code=args.trust_remote_code)
    model: CausalLM = loaded if args.adapter is None else load_result(loaded, args.adapter)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    answers = answer_all(model, tokenizer, examples, args.answer_tokens, args.answer_kind, args.batch_size)
    print(json.dumps(asdict(score(answers))))
    if args.adapter is None:
        print(f"next: python chat.py --model {args.model}", file=sys.stderr)
    else:
        merge = f"python -m finetune.merge --model {args.model} --adapter {args.adapter} --output MERGED"
        print(f"next: {merge}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main)
