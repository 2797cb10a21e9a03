"""Callbacks for transformers' and TRL's trainers."""

import warnings
from typing import Any

from peft import PeftModel
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments

from common.command import no_command


class RouterBiasCallback(TrainerCallback):
    """Keeps experts balanced in full fine-tuning: the model's `update_router_bias` after each optimizer step.

    Auxiliary-loss-free balancing (arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437, section 2.1.2). The trainer's log gets
    `expert_load`: over the last step, the largest tokens per expert divided by the mean, worst layer; 1 is perfect balance.

    The bias is part of the base model. A LoRA adapter's file does not hold it, so with LoRA either leave `update_rate` at
    0 (only the load is logged) or save the merged model.

    Args:
        update_rate: step of the bias, in [0, 1]; V3 used 1e-3 in most of pretraining, 0 only reads the load.

    Raises:
        ValueError: `update_rate` is out of range, or (when training begins) the model has no `update_router_bias` or would
            be trained by `nn.DataParallel`.
    """

    def __init__(self, update_rate: float = 1e-3):
        if not 0.0 <= update_rate <= 1.0:
            raise ValueError(f"update_rate is {update_rate}; it must be in [0, 1], for example 1e-3")
        self.update_rate = update_rate
        self.expert_load: float | None = None

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        """Fails early rather than at the first step."""
        find_routed_model(model)
        refuse_data_parallel(args)
        if isinstance(model, PeftModel) and self.update_rate:
            warnings.warn(
                "RouterBiasCallback changes the router's bias, which is not saved with the adapter; use update_rate=0, or "
                "save the merged model.",
                stacklevel=2,
            )

    def on_optimizer_step(self, args, state, control, model: Any = None, **kwargs):
        """Called once for each optimizer step, whatever the gradient accumulation."""
        loads = find_routed_model(model).update_router_bias(self.update_rate)
        if loads:
            self.expert_load = max(float(load.max() / load.mean()) for load in loads.values())

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Adds the load to what the progress display prints and to the state's history."""
        if self.expert_load is None or logs is None or "loss" not in logs:
            return
        logs["expert_load"] = round(self.expert_load, 3)
        state.log_history[-1]["expert_load"] = logs["expert_load"]


def find_routed_model(model: nn.Module) -> Any:
    """The module with `update_router_bias` inside whatever wraps it: PEFT, DistributedDataParallel, ...

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if hasattr(type(module), "update_router_bias"):
            return module
    raise ValueError(f"{type(model).__name__} has no update_router_bias; it is no DeepSeek model of this repository")


def refuse_data_parallel(arguments: TrainingArguments) -> None:
    """For one process that sees several GPUs transformers' Trainer takes `nn.DataParallel`. Its copies of the model live for
    one pass, and the tokens that they count for their experts are gone with them.

    Raises:
        ValueError: that would happen.
    """
    if arguments.n_gpu > 1:
        raise ValueError(
            f"this is one process and it sees {arguments.n_gpu} GPUs, which would be trained on by nn.DataParallel: that loses "
            "the load of the experts. Start one process a GPU, `accelerate launch --config_file "
            f"configs/accelerate/ddp.yaml --num_processes {arguments.n_gpu} --module finetune.sft ...` (or .dpo, .grpo, or a "
            "script of your own), or show it one GPU, `CUDA_VISIBLE_DEVICES=0 python -m finetune.sft ...`"
        )


class LogOften(TrainerCallback):
    """Logs 50 times a run, and at least every 10 steps, so that the bar and the curves of short runs have points."""

    def on_train_begin(self, args, state, control, **kwargs):
        """The first event that knows the length of the run."""
        state.logging_steps = min(10, max(1, state.max_steps // 50))


class ProgressBar(TrainerCallback):
    """A bar with the latest loss; evaluation results get lines of their own."""

    def __init__(self):
        self.bar: tqdm | None = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Opens the bar, at the step a resumed run has reached."""
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        """One optimizer step."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Shows losses and, of GRPO, the reward at the bar; evaluations above it."""
        if self.bar is None or not logs:
            return
        if any(key.startswith("eval_") for key in logs):
            names = ("eval_loss", "eval_perplexity", "eval_accuracy", "eval_reward")
            parts = [f"{name.removeprefix('eval_')} {logs[name]:.4g}" for name in names if name in logs]
            self.bar.write(f"step {state.global_step}: held out: {', '.join(parts)}")
            return
        names = ("loss", "reward", "expert_load", "learning_rate")
        self.shown |= {name: f"{float(logs[name]):.3g}" for name in names if name in logs}
        self.bar.set_postfix(self.shown)

    def on_train_end(self, args, state, control, **kwargs):
        """Closes the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


if __name__ == "__main__":
    no_command("fine-tune by python -m finetune.sft, .dpo or .grpo")
