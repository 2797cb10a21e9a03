"""How often a run is evaluated, and on how much, so that evaluation takes about a tenth of a run of any length."""

from dataclasses import dataclass

from transformers import TrainerCallback

from common.command import no_command

EVALUATIONS = 10  # of a run, besides the one before the first step
SHARE = 0.1  # of the time of training, that all evaluations together may take
FEWEST = 32  # examples that an evaluation has at least, if there are as many: with fewer, losses are mostly noise
TRAINING_COST = 3.0  # of an example, in forward passes: one forward and a backward of twice its operations
GENERATION_COST = (
    4.0  # of a written token, in tokens of a forward pass: each is a forward of its own that reads all weights
)


@dataclass(frozen=True)
class EvaluationPlan:
    """What is evaluated in a run.

    Attributes:
        times: evaluations after the first step.
        examples: held-out examples of an evaluation, the first ones.
        task_examples: questions of an evaluation whose answers are generated, the first ones.
    """

    times: int
    examples: int
    task_examples: int


def plan_evaluations(
    trained_examples: float, held_out: int, tasks: int, example_tokens: float, answer_tokens: int, generates: bool
) -> EvaluationPlan:
    """Choose numbers that keep evaluation within its share; first examples are left out, then evaluations.

    Args:
        trained_examples: examples that the run trains on, repetitions included.
        held_out, tasks: examples and questions that there are.
        example_tokens: mean length of an example.
        answer_tokens: longest generated answer.
        generates: whether training and evaluation write answers, as in GRPO; both then cost about the same.
    """
    answer_cost = 1 + GENERATION_COST * answer_tokens / max(example_tokens, 1)
    example_cost, trained_cost = (answer_cost, answer_cost + TRAINING_COST) if generates else (1, TRAINING_COST)
    room = SHARE * trained_examples * trained_cost  # in forward passes of an example
    whole = held_out * example_cost + tasks * answer_cost
    part = min(1.0, room / ((EVALUATIONS + 1) * whole))
    examples = min(held_out, max(FEWEST, int(part * held_out)))
    questions = min(tasks, max(FEWEST, int(part * tasks)))
    times = int(room / (examples * example_cost + questions * answer_cost)) - 1
    return EvaluationPlan(min(max(times, 1), EVALUATIONS), examples, questions)


class EvaluateSometimes(TrainerCallback):
    """Spreads a number of evaluations evenly over a run, with a checkpoint at each; the last is after the last step.

    Args:
        times: evaluations of a run.
    """

    def __init__(self, times: int):
        self.times = times

    def on_train_begin(self, args, state, control, **kwargs):
        """The first event that knows the length of the run."""
        state.eval_steps = state.save_steps = -(-state.max_steps // self.times)  # rounded up

    def on_step_end(self, args, state, control, **kwargs):
        """Where the steps are no multiple, the end has its evaluation too, since the result may be its weights."""
        if state.global_step == state.max_steps:
            control.should_evaluate = control.should_save = True
        return control


if __name__ == "__main__":
    no_command("fine-tune by python -m finetune.sft, .dpo or .grpo")
