"""Supervised fine-tuning with LoRA, as one explicit loop on accelerate.

    python -m finetune.sft --model . --data my.jsonl --output runs/x
    python -m finetune.sft --model . --data train.jsonl --held-out held_out.jsonl --targets attention shared --output runs/x

Several processes: `accelerate launch --module finetune.sft ...` (on CPUs `torchrun --nproc_per_node 2 -m finetune.sft ...`).

The loss is on the assistant's words only. Before and after training, held-out examples are scored: the loss of the
reference answer in nats a token, and the share of examples where greedy decoding gives exactly that answer. `--output`
gets a PEFT adapter and `training.json`, complete or not at all; use it with

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True), "runs/x")

Shapes: B examples, S tokens, V vocabulary.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)

from finetune.data import IGNORED_LABEL, collate, read_examples, render, render_all, split_examples
from finetune.lora import TARGETS, add_lora, describe_adapters

DTYPES = ("auto", "float32", "bfloat16")


# ---------------------------------------------------------------- model


def load_model(
    model_dir: str, dtype: str = "auto", mtp_loss_weight: float = 0.0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer for LoRA fine-tuning, by the Auto classes.

    Args:
        model_dir: folder or Hub name.
        dtype: of the frozen weights, from `DTYPES`; "auto" is the checkpoint's. Adapters are float32 in any case.
        mtp_loss_weight: weight of the multi-token-prediction loss.

    Raises:
        ValueError: the tokenizer has ids that the model's vocabulary lacks.
    """
    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=True)
    config.mtp_loss_weight = mtp_loss_weight
    # The balance loss is for the router, which LoRA leaves frozen; it would only bend the hidden states.
    config.aux_loss_alpha = 0.0
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=True)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {model_dir} has {len(tokenizer)} tokens, but `vocab_size` is {config.vocab_size}; use the "
            "tokenizer that belongs to the model, or call model.resize_token_embeddings(len(tokenizer)) and save"
        )
    return AutoModelForCausalLM.from_pretrained(
        model_dir, config=config, trust_remote_code=True, dtype=dtype
    ), tokenizer


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class TrainSettings:
    """How to train; see the command line's help for the fields."""

    steps: int
    batch_size: int = 16
    accumulation_steps: int = 1
    learning_rate: float = 1e-3
    warmup_fraction: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number above 0")
        if not 0.0 <= self.warmup_fraction <= 1.0:
            raise ValueError(f"warmup_fraction is {self.warmup_fraction}; it must be in [0, 1]")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}; it must be at least 0")


@dataclass(frozen=True)
class StepReport:
    """One optimizer step: its number from 1 on, the loss before it in nats a target token, and its learning rate."""

    step: int
    loss: float
    learning_rate: float


def train(
    accelerator: Accelerator,
    model: nn.Module,
    rows: list[dict[str, list[int]]],
    pad_token_id: int,
    settings: TrainSettings,
) -> Iterator[StepReport]:
    """Train what is trainable in `model`, in place, and report each step while the caller iterates.

    Args:
        accelerator: decides on devices and processes.
        model: a causal language model, usually from `add_lora`.
        rows: rendered training examples (`finetune.data.render_all`).
        pad_token_id: what `collate` fills with.
        settings: how to train.
    """
    loader = DataLoader(
        rows,
        batch_size=settings.batch_size,
        shuffle=True,
        collate_fn=lambda batch: collate(batch, pad_token_id),
        generator=torch.Generator().manual_seed(settings.seed),
    )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    # Not prepared by accelerate, which would step it once for each process.
    warmup_steps = round(settings.warmup_fraction * settings.steps)
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup_steps, settings.steps)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    model.train()
    batches = _endless(loader)
    for step in range(1, settings.steps + 1):
        micro_batches = [next(batches) for _ in range(settings.accumulation_steps)]
        # The mean over all target tokens of the step; a mean of the micro-batches' means would favour short answers.
        num_targets = sum((batch["labels"][:, 1:] != IGNORED_LABEL).sum() for batch in micro_batches)
        num_targets = accelerator.reduce(num_targets, reduction="sum")
        step_loss = torch.zeros((), device=accelerator.device)
        for i, batch in enumerate(micro_batches, start=1):
            with nullcontext() if i == settings.accumulation_steps else accelerator.no_sync(model):
                loss = model(**batch, use_cache=False, num_items_in_batch=num_targets).loss
                accelerator.backward(loss * accelerator.num_processes)  # gradients are averaged over processes
            step_loss += loss.detach()
        accelerator.clip_grad_norm_(trainable, settings.max_grad_norm)
        learning_rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        yield StepReport(step, accelerator.reduce(step_loss, reduction="sum").item(), learning_rate)


def _endless(loader: Iterable) -> Iterator:
    while True:
        yield from loader  # shuffled anew each time


# ---------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Answer:
    """What a model makes of one example."""

    example: dict
    text: str  # the greedy answer
    is_exact: bool  # whether it is the reference, but for white space around it
    nll: float  # -ln p of the reference answer, in nats
    num_targets: int  # tokens of the reference answer


@dataclass(frozen=True)
class Score:
    """Means over answers: the loss in nats a target token, and the share of exact answers in [0, 1]."""

    loss: float
    exact_match: float
    examples: int


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict],
    batch_size: int = 64,
) -> list[Answer]:
    """Score every example's last message; each process does its part and gets all answers, in order.

    Args:
        accelerator: decides on devices and processes.
        model: a causal language model, not wrapped by accelerate.
        tokenizer: its chat template is used.
        examples: chat examples.
        batch_size: examples scored at once by a process.
    """
    model.to(accelerator.device).eval()
    with accelerator.split_between_processes(examples) as part:
        answers = []
        for first in range(0, len(part), batch_size):
            answers += _answer_batch(model, tokenizer, part[first : first + batch_size])
    return gather_object(answers)


def score(answers: list[Answer]) -> Score:
    """Average answers.

    Raises:
        ValueError: there are none.
    """
    if not answers:
        raise ValueError("there are no answers to average; give at least one held-out example")
    loss = sum(answer.nll for answer in answers) / sum(answer.num_targets for answer in answers)
    return Score(loss, sum(answer.is_exact for answer in answers) / len(answers), len(answers))


def _answer_batch(model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: list[dict]) -> list[Answer]:
    rows = [render(example, tokenizer) for example in examples]
    batch = {name: tensor.to(model.device) for name, tensor in collate(rows, pad_token(tokenizer)).items()}
    labels = batch.pop("labels")[:, 1:]  # [B, S - 1]
    logits = model(**batch, use_cache=False).logits[:, :-1].float()  # [B, S - 1, V]
    nlls = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none").sum(
        dim=1
    )  # [B]
    num_targets = (labels != IGNORED_LABEL).sum(dim=1)  # [B]

    references = [example["messages"][-1]["content"].strip() for example in examples]
    # An answer longer than the longest reference is wrong anyway; one more token lets it show that it ends.
    longest = max(len(tokenizer(reference, add_special_tokens=False)["input_ids"]) for reference in references)
    texts = greedy_answers(model, tokenizer, [example["messages"][:-1] for example in examples], longest + 1)
    return [
        Answer(example, text, text == reference, nll, count)
        for example, text, reference, nll, count in zip(
            examples, texts, references, nlls.tolist(), num_targets.tolist(), strict=True
        )
    ]


def greedy_answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict]], max_new_tokens: int
) -> list[str]:
    """Answer conversations that end with the user's turn, all in one batch; white space around answers is cut."""
    encoded = tokenizer.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        tokenizer_kwargs={"padding_side": "left"},  # so that all answers begin at the same place
    ).to(model.device)
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        **{"temperature": 1.0, "top_p": 1.0, "top_k": 50},  # neutral: else the checkpoint's, with a warning
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_token(tokenizer),
    )
    tokens = model.generate(
        input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], generation_config=greedy
    )
    new_tokens = tokens[:, encoded["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to fill with; masked everywhere, so the end token does where there is no other."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


# ---------------------------------------------------------------- output


def check_output(output: Path) -> None:
    """Raise FileExistsError if `output` is there: found out before training, not after."""
    if output.exists():
        raise FileExistsError(f"--output {output} exists; remove it or name another folder")


def save_adapter(peft_model: nn.Module, output: Path, report: dict) -> None:
    """Write the adapter and `training.json` to the folder `output`, which is complete or absent."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    try:
        # False: the embeddings are not trained; the default would ask the Hub whether they were resized.
        peft_model.save_pretrained(partial, save_embedding_layers=False)
        text = json.dumps(report, ensure_ascii=False, indent=2) + "\n"
        (partial / "training.json").write_text(text, encoding="utf-8")
        partial.chmod(0o755)  # mkdtemp makes folders that only the owner can read
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ---------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = argparse.ArgumentParser(prog="python -m finetune.sft", description=__doc__.partition("\n")[0])

    files = parser.add_argument_group("files")
    files.add_argument("--model", required=True, help="folder or Hub name of the model")
    files.add_argument("--data", type=Path, nargs="+", required=True, help=".jsonl files of chat examples")
    files.add_argument("--held-out", type=Path, help=".jsonl file to score with (default: a part of --data)")
    files.add_argument("--held-out-fraction", type=float, default=0.1, help="that part, between 0 and 1 (default 0.1)")
    files.add_argument("--output", type=Path, required=True, help="folder for the adapter; must not exist")

    adapter = parser.add_argument_group("adapter")
    adapter.add_argument("--targets", nargs="+", choices=TARGETS, default=["all"], help="what to adapt (default all)")
    adapter.add_argument("--rank", type=int, default=8, help="width of the adapters (default 8)")
    adapter.add_argument("--alpha", type=float, default=16.0, help="updates are scaled by alpha / rank (default 16)")
    adapter.add_argument("--dropout", type=float, default=0.0, help="on adapters' inputs, in [0, 1) (default 0)")
    adapter.add_argument(
        "--mtp-loss-weight",
        type=float,
        default=0.0,
        help="weight of the multi-token-prediction loss; above 0 those modules are adapted too (default 0)",
    )
    adapter.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype of the frozen weights (default auto)")

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=int, default=3, help="passes over the data (default 3)")
    training.add_argument("--steps", type=int, help="optimizer steps, instead of --epochs")
    training.add_argument(
        "--batch-size", type=int, default=16, help="examples of a micro-batch on one process (default 16)"
    )
    training.add_argument("--accumulation-steps", type=int, default=1, help="micro-batches of a step (default 1)")
    training.add_argument("--max-tokens", type=int, default=1024, help="leave out longer examples (default 1024)")
    training.add_argument("--learning-rate", type=float, default=1e-3, help="peak rate (default 1e-3)")
    training.add_argument(
        "--warmup-fraction", type=float, default=0.05, help="share of steps with a rising rate (default 0.05)"
    )
    training.add_argument("--weight-decay", type=float, default=0.0, help="of the adapters (default 0)")
    training.add_argument("--max-grad-norm", type=float, default=1.0, help="clip gradients to this norm (default 1)")
    training.add_argument("--seed", type=int, default=0, help="seed of adapters and data order (default 0)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        ValueError, OSError: something the user gave is wrong.
    """
    check_output(args.output)
    if args.epochs < 1:
        raise ValueError(f"--epochs is {args.epochs}; it must be at least 1")
    examples = [example for path in args.data for example in read_examples(path)]
    if args.held_out is not None:
        train_examples, held_out = examples, read_examples(args.held_out)
    else:
        train_examples, held_out = split_examples(examples, args.held_out_fraction)

    accelerator = Accelerator()
    set_seed(args.seed)
    model, tokenizer = load_model(args.model, args.dtype, args.mtp_loss_weight)
    rows = render_all(train_examples, tokenizer, args.max_tokens)
    step_examples = args.batch_size * args.accumulation_steps * accelerator.num_processes
    settings = TrainSettings(
        steps=math.ceil(args.epochs * len(rows) / max(1, step_examples)) if args.steps is None else args.steps,
        batch_size=args.batch_size,
        accumulation_steps=args.accumulation_steps,
        learning_rate=args.learning_rate,
        warmup_fraction=args.warmup_fraction,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
    )
    model = add_lora(model, args.targets, args.rank, args.alpha, args.dropout, include_mtp=args.mtp_loss_weight > 0)

    accelerator.print(describe_adapters(model))
    accelerator.print(
        f"{len(rows)} training examples ({len(train_examples) - len(rows)} longer than {args.max_tokens} tokens left "
        f"out), {len(held_out)} held out, {settings.steps} steps of {step_examples} examples"
    )
    before = score(evaluate(accelerator, model, tokenizer, held_out))
    accelerator.print(f"before: held-out loss {before.loss:.3f}, exact answers {before.exact_match:.1%}")
    with tqdm(total=settings.steps, unit="step", disable=not accelerator.is_main_process) as bar:
        for report in train(accelerator, model, rows, pad_token(tokenizer), settings):
            bar.set_postfix(loss=f"{report.loss:.3f}", lr=f"{report.learning_rate:.1e}")
            bar.update()
    after = score(evaluate(accelerator, model, tokenizer, held_out))
    accelerator.print(f"after:  held-out loss {after.loss:.3f}, exact answers {after.exact_match:.1%}")

    if accelerator.is_main_process:
        report = {"settings": asdict(settings), "before": asdict(before), "after": asdict(after)}
        save_adapter(model, args.output, report)
        print(f"adapter written to {args.output}")
    accelerator.end_training()


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
