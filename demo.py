"""What `make demo` shows: this repository's checkpoint writes in two languages, then learns number problems in two minutes.

    python demo.py [--model FOLDER] [--quick]

The model is loaded as by every command here; the training is `finetune.sft`'s.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

from common.command import Parser, check_early, one_line_errors, run_command
from common.extras import extra
from common.names import check_model_name


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = Parser(prog="demo.py", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model",
        default=str(Path(__file__).parent),
        help="folder or Hub name of the model (default: this repository)",
    )
    parser.add_argument("--quick", action="store_true", help="a few tokens and steps, to see that everything runs")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling, data and adapters (default 0)")
    return parser


check_early(__name__, lambda: build_parser().parse_args())

with extra("train"):
    from accelerate.utils import set_seed
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
    from torch import nn
    from transformers import PreTrainedTokenizerBase, TextStreamer, TrainerCallback
    from transformers.utils import logging

    from finetune.config import SFTOptions
    from finetune.data import pad_token, write_jsonl
    from finetune.evaluate import Answer, answer_all, score
    from finetune.models import load_model
    from finetune.problems import number_problems

PROMPTS = {"English": "It was a fine morning, and the old man", "Chinese": "话说那日天色已晚，"}
LANGUAGE_NAMES = {"en": "English", "zh": "Chinese"}
KINDS = ("largest", "smallest", "last", "count")  # what so small a model learns in so short a time
BATCH_SIZE = 32


# ---------------------------------------------------------------- what the model is


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """All parameters, and those that one token uses in plain generation."""
    config = model.config
    total = sum(parameter.numel() for parameter in model.parameters())
    mtp = sum(parameter.numel() for parameter in model.model.layers[config.num_hidden_layers :].parameters())
    idle = 0
    if getattr(config, "n_routed_experts", None):
        for layer in model.model.layers[: config.num_hidden_layers]:
            experts = getattr(layer.mlp, "experts", None)
            if experts is not None:
                stacked = sum(parameter.numel() for parameter in experts.parameters())
                idle += stacked * (config.n_routed_experts - config.num_experts_per_tok) // config.n_routed_experts
    return total, total - mtp - idle


def cache_numbers(config) -> tuple[int, int]:
    """Numbers cached for a token by this attention, and by plain multi-head attention with the same heads."""
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    if config.has_latent:
        own = config.kv_lora_rank + config.qk_rope_head_dim
        return layers * own, layers * heads * (config.qk_head_dim + config.v_head_dim)
    return layers * 2 * config.num_key_value_heads * config.head_dim, layers * 2 * heads * config.head_dim


def describe(console: Console, model: nn.Module) -> None:
    """Print size, kind and cache of the model."""
    config = model.config
    total, active = parameter_counts(model)
    cached, plain = cache_numbers(config)
    width = model.dtype.itemsize
    mlp = "dense MLPs"
    if getattr(config, "n_routed_experts", None):
        mlp = f"{config.n_routed_experts} routed experts, {config.num_experts_per_tok} a token, {config.n_shared_experts} shared"
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("parameters", f"{total / 1e6:.1f} million, {active / 1e6:.1f} million active for a token")
    table.add_row(
        "layers", f"{config.num_hidden_layers}, and {config.num_nextn_predict_layers} for multi-token prediction"
    )
    table.add_row("attention", f"{config.attention_kind.upper()}, {config.num_attention_heads} heads")
    table.add_row("MLP", mlp)
    table.add_row(
        "cache",
        f"{cached * width:,} bytes a token in {str(model.dtype).removeprefix('torch.')}, "
        f"{plain / cached:.1f} times less than plain multi-head attention",
    )
    console.print(table)


# ---------------------------------------------------------------- writing


class ConsoleStreamer(TextStreamer):
    """Prints text as its tokens come, and notes when they came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console = console
        self.token_times: list[float] = []  # seconds

    def put(self, value):
        """Called with the prompt, then with each token."""
        if not self.next_tokens_are_prompt:
            self.token_times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False):
        """Called with the text that later tokens cannot change."""
        self.console.print(text, end="\n" if stream_end else "", markup=False, highlight=False, soft_wrap=True)


def write(
    console: Console, model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int
) -> None:
    """Stream a sampled continuation, then print speed and what the cache really holds."""
    console.print(prompt, end="", style="bold", highlight=False, soft_wrap=True)
    streamer = ConsoleStreamer(tokenizer, console)
    output = model.generate(
        **tokenizer(prompt, return_tensors="pt").to(model.device),
        max_new_tokens=max_new_tokens,
        min_new_tokens=2,
        do_sample=True,
        pad_token_id=pad_token(tokenizer),
        streamer=streamer,
        return_dict_in_generate=True,
    )
    times, cache = streamer.token_times, output.get("cache", output.get("past_key_values"))
    cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    console.print(
        f"{(len(times) - 1) / (times[-1] - times[0]):.0f} tokens a second, "
        f"{cache_bytes / cache.get_seq_length():,.0f} bytes of cache a token measured\n",
        style="dim",
        highlight=False,
    )


# ---------------------------------------------------------------- learning


class ShowProgress(TrainerCallback):
    """A live progress bar; without a terminal, a line after each fifth of the steps."""

    def __init__(self, console: Console):
        columns = (
            TextColumn("learning"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeRemainingColumn(),
        )
        self.console = console
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.loss = float("nan")

    def on_train_begin(self, args, state, control, **kwargs):
        """Opens the bar."""
        self.bar = self.progress.add_task("learning", total=state.max_steps, loss=self.loss)
        self.progress.start()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Takes the loss of the latest steps."""
        self.loss = float(logs.get("loss", self.loss))

    def on_step_end(self, args, state, control, **kwargs):
        """One optimizer step."""
        step, steps = state.global_step, state.max_steps
        self.progress.update(self.bar, completed=step, loss=self.loss)
        if not self.console.is_terminal and step * 5 // steps > (step - 1) * 5 // steps:
            self.console.print(f"step {step} of {steps}, loss {self.loss:.3f}", highlight=False)

    def on_train_end(self, args, state, control, **kwargs):
        """Closes the bar."""
        self.progress.stop()


def draft(
    console: Console, model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int
) -> None:
    """Greedy generation without and with drafts by the model's own prediction module: the same tokens in fewer rounds."""
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": pad_token(tokenizer)}
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    plain = model.generate(**inputs, **options)
    drafted = model.generate(**inputs, **options, mtp_tokens=1, return_dict_in_generate=True)
    new_tokens = plain.shape[1] - inputs["input_ids"].shape[1]
    same = "the same tokens" if plain.equal(drafted.sequences) else "other tokens"
    accepted = drafted.accepted.sum() / drafted.drafted.sum()
    console.print(
        f"{same} as without drafts, {new_tokens} of them in {drafted.rounds} forwards of the model after the prompt's; "
        f"{accepted:.0%} of the drafts accepted\n",
        style="dim",
    )


def show_scores(console: Console, before: list[Answer], after: list[Answer]) -> None:
    """Print held-out scores by language, and one question of each with both answers."""
    table = Table("held-out problems", "exact before", "exact after", "loss before", "loss after")
    for language, name in LANGUAGE_NAMES.items():
        old, new = (score([a for a in answers if a.example["language"] == language]) for answers in (before, after))
        table.add_row(
            f"{name} ({new.examples})",
            f"{old.accuracy:.0%}",
            f"{new.accuracy:.0%}",
            f"{old.loss:.2f}",
            f"{new.loss:.2f}",
        )
    console.print(table)
    for language in LANGUAGE_NAMES:
        old, new = next(pair for pair in zip(before, after, strict=True) if pair[0].example["language"] == language)
        question, reference = (message["content"] for message in old.example["messages"])
        console.print(question, style="bold", markup=False, highlight=False)
        for name, text in (("before", old.text), ("after", new.text), ("correct", reference)):
            console.print(f"  {name:<8}{text}", markup=False, highlight=False)


def learn(
    console: Console,
    model_dir: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    seed: int,
    held_out: int,
) -> None:
    """Fine-tune with LoRA on number problems and compare answers to problems that were not in training."""
    from datasets import disable_progress_bars

    from finetune import sft  # TRL takes seconds to import, in which the model can already write

    disable_progress_bars()  # of the data's preparation
    train, asked = number_problems(steps * BATCH_SIZE, held_out, seed, KINDS)
    before = answer_all(model.eval(), tokenizer, asked)
    with tempfile.TemporaryDirectory() as folder:
        write_jsonl(train, Path(folder) / "train.jsonl")
        write_jsonl(asked[:24], Path(folder) / "held_out.jsonl")
        options = SFTOptions(
            model=model_dir,
            data=[f"{folder}/train.jsonl"],
            eval_data=[f"{folder}/held_out.jsonl"],
            output=f"{folder}/run",
            dtype="float32",
            max_tokens=128,
            steps=steps,
            batch_size=BATCH_SIZE,
            learning_rate=3e-3,
            eval_steps=steps,
            log_steps=max(1, steps // 40),
            track=["none"],
            seed=seed,
            cpu=True,
        )
        model, _, _ = sft.run(options, callbacks=(ShowProgress(console),), console=console)
    show_scores(console, before, answer_all(model.eval(), tokenizer, asked))


# ---------------------------------------------------------------- command line


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    started = time.perf_counter()
    console = Console()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries, to each other

    console.rule("The model")
    check_model_name(args.model)
    # float32: on CPUs faster than bfloat16 for matrices as small as these.
    model, tokenizer = load_model(args.model, dtype="float32")
    describe(console, model)
    set_seed(args.seed)
    for language, prompt in PROMPTS.items():
        console.rule(f"It writes {language}")
        write(console, model, tokenizer, prompt, max_new_tokens=8 if args.quick else 80)
        if getattr(model.config, "num_nextn_predict_layers", 0):
            draft(console, model, tokenizer, prompt, max_new_tokens=8 if args.quick else 80)
    console.rule("It learns number problems in two languages (LoRA)")
    steps, held_out = (5, 24) if args.quick else (300, 240)
    learn(console, args.model, model, tokenizer, steps, args.seed, held_out)
    console.rule(f"{time.perf_counter() - started:.0f} seconds in all")
    print("next: python chat.py, or fine-tune on your own data: python -m finetune.sft --help")
    return 0


if __name__ == "__main__":
    run_command(main)
