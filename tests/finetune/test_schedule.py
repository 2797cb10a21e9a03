"""Evaluation takes about a tenth of a run: fewer examples first, then fewer evaluations."""

from types import SimpleNamespace

import pytest
from hypothesis import given, strategies as st

from finetune.schedule import EVALUATIONS, FEWEST, SHARE, TRAINING_COST, EvaluateSometimes, plan_evaluations


def test_a_long_run_is_evaluated_on_all_there_is():
    plan = plan_evaluations(100_000, 500, 20, 100, 64, generates=False)
    assert (plan.times, plan.examples, plan.task_examples) == (EVALUATIONS, 500, 20)


def test_a_short_run_leaves_examples_out_and_then_evaluations():
    fewer = plan_evaluations(2_000, 400, 0, 100, 64, generates=False)
    assert fewer.times == EVALUATIONS
    assert FEWEST < fewer.examples < 400
    fewest = plan_evaluations(400, 400, 0, 100, 64, generates=False)
    assert fewest.examples == FEWEST
    assert 1 < fewest.times < EVALUATIONS
    assert plan_evaluations(8, 400, 0, 100, 64, generates=False).times == 1


@given(
    trained=st.floats(1, 1e6),
    held_out=st.integers(1, 10_000),
    tasks=st.integers(0, 10_000),
    tokens=st.floats(1, 4000),
    answer=st.integers(1, 2000),
    generates=st.booleans(),
)
def test_the_share_is_kept_unless_the_least_is_more(trained, held_out, tasks, tokens, answer, generates):
    plan = plan_evaluations(trained, held_out, tasks, tokens, answer, generates)
    assert 1 <= plan.times <= EVALUATIONS
    assert min(FEWEST, held_out) <= plan.examples <= held_out
    assert min(FEWEST, tasks) <= plan.task_examples <= tasks
    answer_cost = 1 + 4 * answer / tokens
    cost, trained_cost = (answer_cost, answer_cost + TRAINING_COST) if generates else (1, TRAINING_COST)
    spent = (plan.times + 1) * (plan.examples * cost + plan.task_examples * answer_cost)
    least = plan.times == 1 and (plan.examples <= FEWEST or plan.task_examples <= FEWEST)
    assert spent <= SHARE * trained * trained_cost * 1.001 or least


@pytest.mark.parametrize(("steps", "times"), [(100, 10), (25, 10), (7, 3), (3, 10), (1, 1)])
def test_evaluations_are_even_and_the_last_is_at_the_end(steps, times):
    callback, state = EvaluateSometimes(times), SimpleNamespace(max_steps=steps, global_step=0)
    callback.on_train_begin(None, state, None)
    assert state.save_steps == state.eval_steps
    evaluated = []
    for step in range(1, steps + 1):
        state.global_step = step
        control = SimpleNamespace(should_evaluate=step % state.eval_steps == 0, should_save=False)
        if callback.on_step_end(None, state, control).should_evaluate:
            evaluated.append(step)
    assert evaluated[-1] == steps
    assert len(evaluated) <= times + 1
