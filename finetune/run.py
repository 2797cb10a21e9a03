"""What `finetune.sft`, `finetune.dpo` and `finetune.grpo` share: from options to a trained result and its report.

A run's folder holds

    final/               the result: a PEFT adapter, the chosen experts (ESFT) or a whole model
    report.html          curves, expert load, samples; `training.json` has the numbers
    checkpoint-N/        to resume from; each is whole
    options.yaml         the options of the run; usable as --config
    logs/                tensorboard
"""

import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import disable_progress_bars
from rich.console import Console
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    is_wandb_available,
)

from common.command import INTERRUPTED, no_command, one_line_errors
from common.launch import join_processes
from common.outputs import has_files, only_run_in
from finetune.callbacks import LogOften, ProgressBar, RouterBiasCallback, refuse_data_parallel
from finetune.config import CommonOptions, GRPOOptions, read_options
from finetune.data import pad_token, question_and_answer, read_examples, render_all, split_examples
from finetune.experts import finish_expert_training, measure_routing
from finetune.lora import check_adapters, describe_adapters
from finetune.models import describe_trainable, load_model, prepare
from finetune.report import Report, write_card, write_report
from finetune.schedule import EVALUATIONS, EvaluateSometimes, EvaluationPlan, plan_evaluations
from finetune.trainers import DeepseekTrainerMixin, last_checkpoint, save_result

_SAMPLES = 5  # answers shown before and after
_ROUTING_ROWS = 64  # held-out examples that the expert load is measured on
_FEW_HELD_OUT = 20  # examples; a checkpoint chosen by fewer is chosen by chance


@dataclass
class Task:
    """One command's part of a run.

    Args:
        trainer_class, arguments_class: TRL's, with the mixin.
        arguments: what the command adds to the trainer's arguments.
        dataset: makes the trainer's dataset of examples.
        best_metric: of an evaluation, without "eval_"; and whether more is better.
        trainer_kwargs: more of the trainer's own keyword arguments.
        mtp_loss, balance_loss: weights of the model's own losses.
    """

    trainer_class: type
    arguments_class: type
    arguments: dict[str, Any]
    dataset: Callable[[list[dict], PreTrainedTokenizerBase], Any]
    best_metric: tuple[str, bool] = ("loss", False)
    trainer_kwargs: dict[str, Any] = field(default_factory=dict)
    mtp_loss: float = 0.0
    balance_loss: float = 0.0
    own_losses: bool = False


def fine_tune(
    options: CommonOptions, task: Task, callbacks: tuple[TrainerCallback, ...] = (), console: Console | None = None
) -> tuple[nn.Module, PreTrainedTokenizerBase, Report]:
    """Do a whole run.

    Args:
        options: what the user asked for.
        task: the command's part.
        callbacks: more callbacks; if there are any, they replace the progress bar.
        console: where tables and the preview go.

    Returns:
        The trained model, its tokenizer and the report that was written.

    Raises:
        ValueError, OSError: something the user gave is wrong, or the disk is full.
    """
    state = join_processes(options.accumulation_steps, "bf16" if options.bf16 else None, options.cpu)
    with only_run_in(Path(options.output)) if state.is_main_process else nullcontext():
        return _fine_tune(options, task, callbacks, console or Console(quiet=not state.is_main_process), state)


def _fine_tune(
    options: CommonOptions, task: Task, callbacks: tuple[TrainerCallback, ...], console: Console, state: PartialState
) -> tuple[nn.Module, PreTrainedTokenizerBase, Report]:
    output, checkpoint = Path(options.output), None
    started = time.perf_counter()
    if options.resume:
        checkpoint = _check_resumable(output, options)
    elif has_files(output):
        raise FileExistsError(
            f"output {output} is not empty; name another folder, remove it, or continue it with --resume"
        )
    arguments = _arguments(options, task)
    refuse_data_parallel(arguments)
    examples, held_out, task_examples = _read(options)

    set_seed(options.seed)
    model, tokenizer = load_model(
        options.model,
        options.dtype,
        options.quantise,
        options.attention,
        task.balance_loss,
        task.mtp_loss,
        options.trust_remote_code,
    )
    plan = _plan_evaluations(options, task, examples, held_out, task_examples, tokenizer)
    num_held_out, num_tasks = len(held_out), len(task_examples)
    held_out, task_examples = held_out[: plan.examples], task_examples[: plan.task_examples]
    train_data, eval_data = task.dataset(examples, tokenizer), task.dataset(held_out, tokenizer)

    def routing_on(some: list[dict]):
        rows = render_all([_as_chat(example) for example in some], tokenizer, options.max_tokens)
        return measure_routing(model, rows, pad_token(tokenizer))

    peft_config, trained = prepare(
        model, options, lambda: routing_on(examples[: options.esft_samples]), bool(task.mtp_loss), task.own_losses
    )
    trainer: DeepseekTrainerMixin = task.trainer_class(
        model=model,
        args=arguments,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=_callbacks(options, model, plan, callbacks),
        **task.trainer_kwargs,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.options, trainer.task_examples = options, task_examples
    whole = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    if options.method == "esft" and not whole:
        raise ValueError(
            "method is 'esft', whose experts share memory with their layer, which FSDP and DeepSpeed cut up; launch it "
            "with DistributedDataParallel (configs/accelerate/ddp.yaml)"
        )
    if peft_config is not None:
        check_adapters(trainer.model, options.targets, bool(task.mtp_loss))
        trained = describe_adapters(trainer.model) + "\n" + describe_trainable(trainer.model)
    console.print(trained, highlight=False, markup=False)
    console.print(f"{len(examples)} examples to train on, {num_held_out} held out", highlight=False)
    evaluated = _describe_evaluations(options, plan, num_held_out, num_tasks)
    console.print(evaluated, highlight=False, markup=False)

    report = Report(options=asdict(options), trained=f"{trained}\n{evaluated}")
    # A sharded model lives only inside the trainer's loop, so the extra looks at it are for the others.
    if whole:
        report.routing_before = routing_on(held_out[:_ROUTING_ROWS])
        report.samples = _samples(trainer, task_examples or held_out, "before", [])
    if state.is_main_process:
        _write_options(output, options)
    state.wait_for_everyone()

    if checkpoint is None or not trainer.take_if_finished(checkpoint):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    if trainer.is_fsdp_enabled:  # whatever form the checkpoints have, the result is whole
        plugin: Any = trainer.accelerator.state.fsdp_plugin
        plugin.set_state_dict_type("FULL_STATE_DICT")
    save_result(trainer, output / "final")
    if whole:
        report.routing_after = routing_on(held_out[:_ROUTING_ROWS])
        report.samples = _samples(trainer, task_examples or held_out, "after", report.samples)
    report.log = trainer.state.log_history
    report.before, report.after = _first_and_best(report.log, arguments)
    if kept := _describe_kept(report.after, trainer.state.global_step, arguments.metric_for_best_model, num_held_out):
        console.print(f"{kept}; {output}/checkpoint-* has the last steps", highlight=False, markup=False)
    report.seconds = time.perf_counter() - started
    if state.is_main_process:
        write_report(report, output)
        write_card(report, output / "final")
    if options.method == "esft":
        finish_expert_training(model)
    state.wait_for_everyone()
    return trainer.accelerator.unwrap_model(trainer.model), tokenizer, report


@one_line_errors
def command(prog: str, schema: type, run: Callable[[Any], Any], argv: list[str] | None) -> int:
    """Read the options, run, and report the user's errors in one line; returns the exit code."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\.")  # to each other
    try:
        options = read_options(schema, argv, prog)
        disable_progress_bars()  # of the data's preparation, one a step of it
        run(options)
    except KeyboardInterrupt:
        print("interrupted; continue from the last checkpoint with --resume", file=sys.stderr)
        return INTERRUPTED
    if PartialState().is_main_process:
        print(f"result in {options.output}/final, report in {options.output}/report.html")
        if getattr(options, "method", "lora") == "full":
            print(f"next: python chat.py --model {options.output}/final")
        elif getattr(options, "merge", False):
            print(f"next: python chat.py --model {options.output}/merged")
        else:
            if options.method == "lora":
                print(f"next: python chat.py --model {options.model} --adapter {options.output}/final, or")
            print(
                f"next: python -m finetune.merge --model {options.model} --adapter {options.output}/final --output MERGED, then "
                "python chat.py --model MERGED"
            )
    return 0


# ---------------------------------------------------------------- parts


def _read(options: CommonOptions) -> tuple[list[dict], list[dict], list[dict]]:
    """Examples to train on, held-out ones, and questions for the accuracy."""
    examples = read_examples(options.data, options.format)
    if options.eval_data:
        held_out = read_examples(options.eval_data, options.format)
    else:
        examples, held_out = split_examples(examples, options.eval_fraction)
    task_examples = read_examples(options.task_data) if options.task_data else []
    for example in task_examples:
        question_and_answer(example)  # raises for what asks nothing
    return examples, held_out, task_examples


def _arguments(options: CommonOptions, task: Task):
    """The trainer's arguments."""
    trackers = [name for name in options.track if name != "none"]
    if "wandb" in trackers and not is_wandb_available():
        raise ValueError("track has 'wandb', which is not installed; pip install wandb or leave it out")
    eval_steps = options.eval_steps or 1 / EVALUATIONS  # a share of the run; EvaluateSometimes may choose a larger one
    save_steps = options.save_steps or eval_steps
    if options.save_steps and (not options.eval_steps or options.save_steps % options.eval_steps):
        raise ValueError(
            f"save_steps is {options.save_steps} and eval_steps {options.eval_steps}; save_steps must be a multiple, so that "
            "every checkpoint has its evaluation"
        )
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(options.output) / "logs")  # transformers has no argument for it
    metric, more_is_better = ("accuracy", True) if options.best_by == "accuracy" else task.best_metric
    return task.arguments_class(
        output_dir=options.output,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation_steps,
        num_train_epochs=options.epochs,
        max_steps=options.steps or -1,
        learning_rate=options.peak_rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup_fraction,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        gradient_checkpointing=options.gradient_checkpointing,
        bf16=options.bf16,
        seed=options.seed,
        data_seed=options.seed,
        logging_steps=options.log_steps or 10,  # without the option, LogOften goes by the length of the run
        logging_first_step=True,
        eval_strategy="steps",
        eval_steps=eval_steps,
        eval_on_start=not options.resume,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=options.keep_checkpoints,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=more_is_better,
        report_to=trackers,
        disable_tqdm=True,  # our own bar
        use_cpu=options.cpu or not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,
        **task.arguments,
    )


def _plan_evaluations(
    options: CommonOptions, task: Task, examples, held_out, task_examples, tokenizer: PreTrainedTokenizerBase
) -> EvaluationPlan:
    """What the options say of evaluations; what they leave open is chosen by the length of the run."""
    if options.eval_steps or options.eval_examples:
        number = min(options.eval_examples or len(held_out), len(held_out))
        return EvaluationPlan(EVALUATIONS, number, len(task_examples))
    rows = render_all([_as_chat(example) for example in held_out[:_ROUTING_ROWS]], tokenizer, options.max_tokens)
    length = sum(len(row["input_ids"]) for row in rows) / len(rows)
    trained = options.epochs * len(examples)
    if options.steps:
        trained = options.steps * options.batch_size * options.accumulation_steps * PartialState().num_processes
        if task.arguments.get("packing"):
            trained *= max(1.0, options.max_tokens / length)
    generates = task.best_metric[0] == "reward"
    if isinstance(options, GRPOOptions) and options.steps:  # a batch holds several answers to each of its questions
        trained /= options.generations
    return plan_evaluations(
        trained, len(held_out), len(task_examples), length, options.answer_tokens, generates=generates
    )


def _describe_evaluations(options: CommonOptions, plan: EvaluationPlan, held_out: int, tasks: int) -> str:
    """One line for the terminal and the report."""
    what = f"{plan.examples} of {held_out} held-out examples"
    if tasks:
        what += f" and {plan.task_examples} of {tasks} questions"
    if options.eval_steps:
        return f"evaluated every {options.eval_steps} steps on {what}"
    share = "" if options.eval_examples else ", so that this takes about a tenth of the time or less"
    times = f"{plan.times} times" if plan.times > 1 else "at the end"
    return f"evaluated {times} on {what}{share} (--eval-steps, --eval-examples)"


def _callbacks(
    options: CommonOptions, model: nn.Module, plan: EvaluationPlan, more: tuple[TrainerCallback, ...]
) -> list[TrainerCallback]:
    callbacks = []
    if getattr(model.config, "n_routed_experts", None):
        callbacks.append(RouterBiasCallback(options.router_bias_rate))  # first, since it adds to what others show
    elif options.router_bias_rate:
        raise ValueError(f"router_bias_rate is {options.router_bias_rate}, but the model has no routed experts")
    callbacks += list(more) or [ProgressBar()]
    callbacks += [] if options.log_steps else [LogOften()]
    callbacks += [] if options.eval_steps else [EvaluateSometimes(plan.times)]
    if options.early_stopping:
        callbacks.append(EarlyStoppingCallback(options.early_stopping))
    return callbacks


def _samples(trainer: DeepseekTrainerMixin, examples: list[dict], when: str, earlier: list[dict]) -> list[dict]:
    """A few questions with references and greedy answers, added to those of earlier."""
    asking = [example for example in examples if _asks(example)][:_SAMPLES]
    if not asking:
        return earlier
    texts = [answer.text for answer in trainer.answers(asking)]
    if earlier:
        return [{**sample, when: text} for sample, text in zip(earlier, texts, strict=True)]
    samples = []
    for example, text in zip(asking, texts, strict=True):
        question, reference = question_and_answer(example)
        shown = question["prompt"] if "prompt" in question else _conversation(question["messages"])
        samples.append({"question": shown, "reference": reference, when: text})
    return samples


def _asks(example: dict) -> bool:
    """Whether there are a question and an answer that can be compared."""
    try:
        question_and_answer(example)
    except ValueError:
        return False
    return True


def _conversation(messages: list[dict]) -> str:
    """A question for people: its text, and where there is more than one message, who says what."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content'] or 'calls a tool'}" for message in messages)


def _as_chat(example: dict) -> dict:
    """Of a preference, the preferred conversation; everything else as it is."""
    return {"messages": [*example["prompt"], *example["chosen"]]} if "chosen" in example else example


def _describe_kept(best: dict, last_step: int, metric: str, num_held_out: int) -> str:
    """What to know where the result is not the last step's; else nothing."""
    step = best.get("step", last_step)
    if step == last_step:
        return ""
    few = ", few to choose by" if num_held_out < _FEW_HELD_OUT else ""
    return f"the result is step {step} of {last_step}, the best by {metric} on {num_held_out} held-out examples{few}"


def _first_and_best(log: list[dict], arguments) -> tuple[dict, dict]:
    """The evaluation before the first step, and the one whose checkpoint the result is."""
    evaluations = [entry for entry in log if any(key.startswith("eval_") for key in entry)]
    if not evaluations:
        return {}, {}
    key = f"eval_{arguments.metric_for_best_model}"
    trained = [entry for entry in evaluations if entry["step"] > 0 and key in entry]
    best = (max if arguments.greater_is_better else min)(
        trained, key=lambda entry: entry[key], default=evaluations[-1]
    )
    skipped = ("runtime", "samples_per_second", "steps_per_second", "num_tokens")

    def metrics(entry: dict) -> dict:
        values = {k.removeprefix("eval_"): v for k, v in entry.items() if k.startswith("eval_")}
        return {"step": entry["step"]} | {k: v for k, v in values.items() if not k.endswith(skipped)}

    return metrics(evaluations[0]), metrics(best)


# ---------------------------------------------------------------- resuming


def _write_options(output: Path, options: CommonOptions) -> None:
    partial = output / "options.yaml.partial"
    values = {name: value for name, value in asdict(options).items() if name != "resume"}
    partial.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    partial.replace(output / "options.yaml")


def _check_resumable(output: Path, options: CommonOptions) -> Path | None:
    """The checkpoint to continue from; None where the run was stopped before its first.

    Raises:
        FileNotFoundError: there is no run in `output`.
        ValueError: the options differ from those the run began with, so it would not be the same run; or it is finished.
    """
    path = output / "options.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"--resume, but {output} holds no run ({path} does not exist)")
    began = yaml.safe_load(path.read_text(encoding="utf-8"))
    free = (
        "resume",
        "keep_checkpoints",
        "preview",
        "track",
        "log_steps",
        "merge",
    )  # change nothing in what is learned
    for name, value in asdict(options).items():
        if name not in free and began.get(name) != value:
            raise ValueError(
                f"--resume, but {name} is {value!r} and the run began with {began.get(name)!r}; a resumed run must have the "
                f"options it began with: --config {path} --resume"
            )
    if (output / "final").is_dir():
        raise ValueError(f"--resume, but the run in {output} is finished: its result is in {output / 'final'}")
    return last_checkpoint(output)


if __name__ == "__main__":
    no_command("fine-tune by python -m finetune.sft, .dpo or .grpo")
