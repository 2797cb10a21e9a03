"""TRL's trainers with what they lack for these models: whole checkpoints, the model's own losses, ESFT, accuracy by
generation.

What stays TRL's: batching, packing, the preference and the policy losses, generation for GRPO, mixed precision,
accumulation, distribution through accelerate.
"""

import contextlib
import logging
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import DistributedType
from accelerate.utils import gather_object
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import DPOTrainer, GRPOTrainer, SFTTrainer
from trl.models import unwrap_model_for_generation

from common.command import no_command
from finetune.config import CommonOptions
from finetune.evaluate import Answer, answer_all, score
from finetune.experts import load_esft, save_esft

_STAGING = ".partial-checkpoint"

if TYPE_CHECKING:
    from transformers import Trainer as _Mixed  # what the mixin below finds behind it
else:
    _Mixed = object


class DeepseekTrainerMixin(_Mixed):
    """What all three trainers share. Set `options` and `task_examples` after construction."""

    args: Any  # with the model and the tokenizer, what transformers declares more widely than it is here
    model: Any
    processing_class: Any
    options: CommonOptions
    task_examples: list[dict] = []  # noqa: RUF012 - replaced, never changed
    _run_dir: str | None = None

    # ------------------------------------------------------------ checkpoints

    def _get_output_dir(self, trial):
        return self._run_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        """Writes a checkpoint beside its place and renames it, so that every `checkpoint-N` is whole.

        Raises:
            OSError: it could not be written, for instance because the disk is full; what was written is removed.
        """
        output, step = Path(self.args.output_dir), self.state.global_step
        staging, final = output / _STAGING, output / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._run_dir = str(staging)
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # older ones go when the new one is whole
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            self._publish(staging / final.name, final)
        except Exception as error:
            last = last_checkpoint(output)
            raise OSError(
                f"checkpoint {step} could not be written to {output} ({type(error).__name__}: {error}); "
                + (f"{last.name} is whole: free some space and continue with --resume" if last else "free some space")
            ) from error
        finally:
            self._run_dir, self.args.save_total_limit = None, limit
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            rotate_checkpoints(str(output), limit, self.state.best_model_checkpoint, use_mtime=True)

    def _publish(self, staged: Path, final: Path):
        is_best = self.state.best_global_step == self.state.global_step
        if is_best:
            self.state.best_model_checkpoint = str(final)  # transformers noted the name before the renaming
        if not self.args.should_save:
            return
        if is_best:
            self.state.save_to_json(str(staged / "trainer_state.json"))
        if final.exists():
            shutil.rmtree(final)
        os.rename(staged, final)

    def _save(self, output_dir=None, state_dict=None):
        if self.options.method != "esft":
            return super()._save(output_dir, state_dict)
        if self.args.should_save:
            save_esft(self.model, Path(output_dir or self.args.output_dir), self.model.name_or_path)
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.options.method != "esft":
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        return load_esft(self.model, resume_from_checkpoint)

    def _load_best_model(self):
        if self.options.method != "esft":
            return super()._load_best_model()
        return load_esft(self.model, str(self.state.best_model_checkpoint))

    def take_if_finished(self, checkpoint: Path) -> bool:
        """Whether `checkpoint` is that of the run's last step, after which only the result was not written; if so, take its
        history and the best weights. Training on from there would take one step too many.

        Raises:
            ValueError: it is, and the model is sharded.
        """
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step < state.max_steps:
            return False
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                f"the run reached its last step; resume it in one process to write the result of {checkpoint}"
            )
        self.state = state
        self._load_best_model()
        return True

    def create_model_card(self, *args, **kwargs):
        """None in the run's folder; the result gets one of its own (`finetune.report.write_card`)."""

    # ------------------------------------------------------------ evaluation

    def evaluation_loop(self, *args, **kwargs):
        """Adds the perplexity and, where there are task examples, the accuracy of generated answers."""
        output: Any = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        loss = output.metrics.get(f"{prefix}_loss")
        if loss is not None and isinstance(self, SFTTrainer):
            output.metrics[f"{prefix}_perplexity"] = math.exp(min(loss, 700.0))
        if self.task_examples:
            output.metrics[f"{prefix}_accuracy"] = score(self.answers(self.task_examples)).accuracy
        return output

    def answers(self, examples: list[dict]) -> list[Answer]:
        """Greedy answers of the model as it is; each process makes its share and gets all, in order."""
        was_training = self.model.training
        # Sharded models need every process in every forward, so there each makes all answers.
        sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        share: Any = (
            contextlib.nullcontext(examples) if sharded else self.accelerator.split_between_processes(examples)
        )
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model, share as part:
            model.eval()
            answers = answer_all(
                model, self.processing_class, part, self.options.answer_tokens, self.options.answer_kind
            )
        self.model.train(was_training)
        return answers if sharded else gather_object(answers)


class DeepseekSFTTrainer(DeepseekTrainerMixin, SFTTrainer):
    """SFT. Where the model has losses of its own that are to be minimised too, its forward computes all of them.

    TRL's forward goes past the model's, straight to its backbone and output head, so it knows no balance loss, no
    multi-token prediction and no indexer.
    """

    def __init__(self, model, args, *more, **kwargs):
        if has_own_losses(model) and args.loss_type == "chunked_nll":
            args.loss_type = "nll"  # TRL before 1.16 puts its forward in the place of the model's
        super().__init__(model, args, *more, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not (self.model.training and has_own_losses(self.model)):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss  # over the tokens of the whole step where num_items_in_batch is given
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        metrics = self._metrics["train"]
        for name in ("lm_loss", "mtp_loss", "aux_loss", "index_loss"):
            part = getattr(outputs, name)
            if part is not None:
                metrics[name].append(self.accelerator.gather_for_metrics(part.detach()).mean().item())
        tokens = inputs["position_ids"] if "position_ids" in inputs else inputs["input_ids"]
        self._total_train_tokens += (
            self.accelerator.gather(torch.tensor(tokens.numel(), device=loss.device)).sum().item()
        )
        metrics["num_tokens"] = [self._total_train_tokens]
        return (loss, outputs) if return_outputs else loss


class DeepseekDPOTrainer(DeepseekTrainerMixin, DPOTrainer):
    """Preference optimisation."""

    def __init__(self, model, args, **kwargs):
        with _reference_of_class(type(model), args):
            super().__init__(model, args=args, **kwargs)


class DeepseekGRPOTrainer(DeepseekTrainerMixin, GRPOTrainer):
    """Policy optimisation with rewards."""

    def __init__(self, model, args, **kwargs):
        with _reference_of_class(type(model), args):
            super().__init__(model, args=args, **kwargs)


@contextlib.contextmanager
def _reference_of_class(cls: type, args):
    """While a trainer is made, a reference model that it loads is of the policy's class; TRL would take the one that the
    checkpoint's config.json names."""
    args.model_init_kwargs = {"architecture": cls}
    loggers = [logging.getLogger(trainer.__module__) for trainer in (DPOTrainer, GRPOTrainer)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)  # it warns that these keywords are for no policy
    try:
        yield
    finally:
        args.model_init_kwargs = None
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def has_own_losses(model: nn.Module) -> bool:
    """Whether the configuration asks for the balance loss or multi-token prediction, or an indexer is trained."""
    config = model.config
    if getattr(config, "mtp_loss_weight", 0.0) and getattr(config, "num_nextn_predict_layers", 0):
        return True
    if getattr(config, "aux_loss_alpha", 0.0) and getattr(config, "n_routed_experts", None):
        return True
    return bool(getattr(config, "index_loss_weight", 0.0)) and any(
        parameter.requires_grad for name, parameter in model.named_parameters() if ".indexer." in name
    )


def last_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint in a run's folder."""
    found = [path for path in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def save_result(trainer: DeepseekTrainerMixin, folder: Path) -> None:
    """Write the trained adapter, experts or model to `folder`, which is complete or absent."""
    partial = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        trainer.save_model(str(partial), _internal_call=True)
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle, of no use to who loads the result
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(partial, folder)
    finally:
        if trainer.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    no_command("fine-tune by python -m finetune.sft, .dpo or .grpo")
