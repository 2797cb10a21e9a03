"""GRPO with a verifiable reward: a short SFT teaches the form of answers, then sampled answers are rewarded.

    python -m benchmarks.grpo          # the checkpoint in this folder; writes runs/benchmarks/grpo.json and grpo.png

Training and held-out problems are disjoint. The reward is 1 for the right number, else 0; held-out accuracy is that of
greedy answers.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, write_results
from common.command import run_command
from common.machine import describe_machine
from finetune import grpo, sft
from finetune.config import GRPOOptions, SFTOptions, make_options
from finetune.data import write_jsonl
from finetune.merge import merge
from finetune.problems import KINDS, number_problems
from finetune.report import draw_curves


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grpo", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT, help="folder of the model (default: this repository)")
    parser.add_argument("--sft-steps", type=int, default=60, help="steps of 32 examples before GRPO (default 60)")
    parser.add_argument("--steps", type=int, default=60, help="GRPO's optimizer steps (default 60)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["largest", "smallest"], help="kinds of problems")
    parser.add_argument("--seed", type=int, default=0, help="of data and sampling (default 0)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, held_out = number_problems(4000, 64, arguments.seed, arguments.kinds)
        write_jsonl(train, folder / "train.jsonl")
        write_jsonl(held_out, folder / "held_out.jsonl")
        shared = {
            "data": [str(folder / "train.jsonl")],
            "eval_data": [str(folder / "held_out.jsonl")],
            "task_data": [str(folder / "held_out.jsonl")],
            **{"dtype": "float32", "max_tokens": 128, "preview": False, "track": ["none"], "seed": arguments.seed},
        }
        taught = {"model": str(arguments.model), "output": str(folder / "sft"), "steps": arguments.sft_steps}
        taught |= {"batch_size": 32, "learning_rate": 3e-3, "eval_steps": arguments.sft_steps}
        sft.run(make_options(SFTOptions, {**shared, **taught}))
        merge(arguments.model, folder / "sft" / "final", folder / "merged")
        rewarded = {"model": str(folder / "merged"), "output": str(folder / "grpo"), "steps": arguments.steps}
        rewarded |= {"batch_size": 64, "generations": 8, "learning_rate": 1e-3, "answer_tokens": 4, "log_steps": 1}
        rewarded |= {"eval_steps": max(1, arguments.steps // 4), "answer_kind": "number"}
        _, _, report = grpo.run(make_options(GRPOOptions, {**shared, **rewarded}))
    rewards = [[entry["step"], round(entry["reward"], 4)] for entry in report.log if "reward" in entry]
    accuracy = [[entry["step"], entry["eval_accuracy"]] for entry in report.log if "eval_accuracy" in entry]
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    settings.pop("model")
    held_out = [[entry["step"], round(entry["eval_reward"], 4)] for entry in report.log if "eval_reward" in entry]
    results = {"machine": describe_machine(), "settings": settings, "reward": rewards}
    results |= {"held_out_reward": held_out, "held_out_accuracy": accuracy}
    write_results("grpo", results)
    (RESULTS / "grpo.png").write_bytes(draw_curves(report.log))
    return 0


if __name__ == "__main__":
    run_command(main)
