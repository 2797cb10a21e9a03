"""Group relative policy optimisation (arXiv:2402.03300) with verifiable rewards, by TRL's GRPOTrainer.

    python -m finetune.grpo --model runs/sft --data problems.jsonl --rewards numeric format --output runs/x

The data are questions with answers in any of SFT's formats; the answer is only compared, never shown to the model.
"""

from common.command import check_early, run_command
from common.extras import extra

with extra("train"):
    from finetune.config import GRPOOptions, read_options

check_early(__name__, lambda: read_options(GRPOOptions, None, "python -m finetune.grpo"))

with extra("train"):
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainerCallback
    from trl import GRPOConfig

    from finetune.data import question_and_answer, template_messages
    from finetune.rewards import REWARDS
    from finetune.run import Task, command, fine_tune
    from finetune.trainers import DeepseekGRPOTrainer


def run(options: GRPOOptions, callbacks: tuple[TrainerCallback, ...] = ()):
    """A whole run; see `finetune.run.fine_tune`.

    Raises:
        ValueError, OSError: something the user gave is wrong.
    """

    def dataset(examples: list[dict], tokenizer: PreTrainedTokenizerBase) -> Dataset:
        rows = []
        for example in examples:
            question, answer = question_and_answer(example)
            if "tools" in question:
                raise ValueError("an example has tools, which GRPO here does not call; leave such examples out")
            prompt = question["prompt"] if "prompt" in question else template_messages(question, tokenizer)
            rows.append({"prompt": prompt, "answer": answer})
        return Dataset.from_list(rows)

    task = Task(
        trainer_class=DeepseekGRPOTrainer,
        arguments_class=GRPOConfig,
        arguments={
            "num_generations": options.generations,
            "max_completion_length": options.answer_tokens,
            "temperature": options.temperature,
            "beta": options.kl_weight,
            "reward_weights": options.reward_weights or None,
            "chat_template_kwargs": {"thinking": "format" in options.rewards},
        },
        dataset=dataset,
        best_metric=("reward", True),
        trainer_kwargs={"reward_funcs": [REWARDS[name] for name in options.rewards]},
    )
    return fine_tune(options, task, callbacks)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("python -m finetune.grpo", GRPOOptions, run, argv)


if __name__ == "__main__":
    run_command(main)
