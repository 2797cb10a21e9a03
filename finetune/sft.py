"""Supervised fine-tuning: LoRA, QLoRA, ESFT or full, by TRL's SFTTrainer.

    python -m finetune.sft --model . --data my.jsonl --output runs/x
    python -m finetune.sft --config sft.yaml --learning-rate 1e-4
    accelerate launch --config_file configs/accelerate/fsdp2.yaml -m finetune.sft --config sft.yaml

The loss is on the assistant's words only. With --teacher it is the divergence from another model's distribution
(`finetune/distil.py`). `docs/finetuning.md` explains data formats, methods and the result.
"""

from functools import partial
from pathlib import Path

from common.command import check_early, run_command
from common.extras import extra

with extra("train"):
    from finetune.config import SFTOptions, read_options

check_early(__name__, lambda: read_options(SFTOptions, None, "python -m finetune.sft"))

with extra("train"):
    from accelerate import PartialState
    from datasets import Dataset
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase, TrainerCallback
    from trl import SFTConfig

    from common.hub import local_folder
    from finetune.data import preview, render_all, warn_of_lost_text
    from finetune.distil import DistillationTrainer, load_teacher
    from finetune.merge import merge
    from finetune.run import Task, command, fine_tune
    from finetune.trainers import DeepseekSFTTrainer


def run(options: SFTOptions, callbacks: tuple[TrainerCallback, ...] = (), console: Console | None = None):
    """A whole run; see `finetune.run.fine_tune`.

    Raises:
        ValueError, OSError: something the user gave is wrong.
    """
    shown = not options.preview

    def dataset(examples: list[dict], tokenizer: PreTrainedTokenizerBase) -> Dataset:
        nonlocal shown
        if any("chosen" in example for example in examples):
            raise ValueError("the data are preferences, which `python -m finetune.dpo` learns from")
        rows = render_all(examples, tokenizer, options.max_tokens)
        warn_of_lost_text(examples, tokenizer)
        if not shown:
            preview(rows[0], tokenizer, console or Console())
            shown = True
        return Dataset.from_list(rows)

    task = Task(
        trainer_class=DistillationTrainer if options.teacher else DeepseekSFTTrainer,
        arguments_class=SFTConfig,
        arguments={"packing": options.packing, "max_length": options.max_tokens, "eval_packing": options.packing},
        dataset=dataset,
        mtp_loss=options.mtp_loss,
        balance_loss=options.balance_loss,
        own_losses=options.teacher is None,
        trainer_kwargs={"load_teacher": partial(load_teacher, options)} if options.teacher else {},
    )
    result = fine_tune(options, task, callbacks, console)
    if options.merge and PartialState().is_main_process:
        output = Path(options.output)
        merge(local_folder(options.model), output / "final", output / "merged")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("python -m finetune.sft", SFTOptions, run, argv)


if __name__ == "__main__":
    run_command(main)
