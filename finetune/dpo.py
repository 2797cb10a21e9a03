"""Direct preference optimisation (arXiv:2305.18290) by TRL's DPOTrainer.

    python -m finetune.dpo --model . --data preferences.jsonl --output runs/x

A line of the data is {"prompt", "chosen", "rejected"}, each text or a list of messages. With LoRA the reference is the
model without its adapter; otherwise it is a second copy of the model.
"""

from common.command import check_early, run_command
from common.extras import extra

with extra("train"):
    from finetune.config import DPOOptions, read_options

check_early(__name__, lambda: read_options(DPOOptions, None, "python -m finetune.dpo"))

with extra("train"):
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainerCallback
    from trl import DPOConfig

    from finetune.data import template_arguments, template_messages, warn_of_lost_text
    from finetune.run import Task, command, fine_tune
    from finetune.trainers import DeepseekDPOTrainer


def run(options: DPOOptions, callbacks: tuple[TrainerCallback, ...] = ()):
    """A whole run; see `finetune.run.fine_tune`.

    Raises:
        ValueError, OSError: something the user gave is wrong.
    """

    def dataset(examples: list[dict], tokenizer: PreTrainedTokenizerBase) -> Dataset:
        if not all("chosen" in example for example in examples):
            raise ValueError(
                "the data hold examples without `chosen` and `rejected`; `python -m finetune.sft` learns from those"
            )
        warn_of_lost_text(examples, tokenizer)
        rows = []
        for example in examples:
            row = {
                key: template_messages({"messages": example[key]}, tokenizer)
                for key in ("prompt", "chosen", "rejected")
            }
            # of each row, since the template writes reasoning only where it is told that there is some
            thinking = bool(template_arguments({"messages": example["chosen"]}))
            rows.append({**row, "chat_template_kwargs": {"thinking": thinking}})
        return Dataset.from_list(rows)

    task = Task(
        trainer_class=DeepseekDPOTrainer,
        arguments_class=DPOConfig,
        arguments={
            "beta": options.beta,
            "loss_type": [options.dpo_loss],
            "max_length": options.max_tokens,
        },
        dataset=dataset,
    )
    return fine_tune(options, task, callbacks)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("python -m finetune.dpo", DPOOptions, run, argv)


if __name__ == "__main__":
    run_command(main)
