"""Distillation: `finetune.sft --teacher` learns another model's distribution of the next token instead of the text's.

    loss = mean over the places that count of  sum over tokens v of  p(v) (ln p(v) - ln q(v)),   p teacher, q student

It is the Kullback-Leibler divergence in nats a token, 0 where both agree, over the same places and with the same
denominator as the loss that it replaces. TRL's DistillationTrainer has the student write the texts; here they are given, so
rows may be packed and only answers counted. For a pruned or quantised model the teacher is the one it was made from.

Shapes: B rows, S tokens a row, K places of a row, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.command import no_command
from finetune.config import SFTOptions
from finetune.data import IGNORED_LABEL
from finetune.models import load_model
from finetune.trainers import DeepseekSFTTrainer

_CHUNK = 1024  # places whose distributions are held in float32 at once


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Sum over places of the divergence from the teacher's distribution to the student's, nats; calculated in float32.

    Args:
        student, teacher: logits [K, V]; gradients reach the student's.
    """
    total = student[:0].float().sum()  # a zero that has a gradient even where there are no places
    for one, other in zip(student.split(_CHUNK), teacher.split(_CHUNK), strict=True):
        total = total + checkpoint(_divergence, one, other, use_reentrant=False)
    return total


def _divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    log_q, log_p = (logits.float().log_softmax(dim=-1) for logits in (student, teacher))
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def load_teacher(options: SFTOptions, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The teacher, frozen.

    Raises:
        ValueError: it does not read the student's tokens.
        OSError: there is no such model.
    """
    model, own = load_model(
        options.teacher, options.dtype, attention=options.attention, trust_remote_code=options.trust_remote_code
    )
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"teacher is {options.teacher}, whose tokenizer has other tokens than that of {options.model}; distributions can be "
            "compared over the same tokens only: name the model that the student was made from"
        )
    return model.eval().requires_grad_(False)


class DistillationTrainer(DeepseekSFTTrainer):
    """SFT whose loss, in evaluations too, is the divergence from a teacher.

    Args:
        load_teacher: makes the teacher for a tokenizer.

    Raises:
        ValueError: the model is sharded, or the teacher does not fit.
    """

    def __init__(self, model, args, *, load_teacher: Callable[[PreTrainedTokenizerBase], nn.Module], **kwargs):
        if args.loss_type == "chunked_nll":
            args.loss_type = (
                "nll"  # TRL before 1.16 puts its forward, which makes no logits, in the place of the model's
            )
        super().__init__(model, args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "teacher is set, and each process holds the whole of it, which FSDP and DeepSpeed are not for; launch it with "
                "DistributedDataParallel (configs/accelerate/ddp.yaml)"
            )
        teacher = load_teacher(self.processing_class).to(self.accelerator.device)
        if teacher.config.vocab_size != self.model.config.vocab_size:
            raise ValueError(
                f"`vocab_size` of the teacher is {teacher.config.vocab_size} and of the model {self.model.config.vocab_size}; "
                "name the model that it was made from"
            )
        self._teacher = [teacher]  # in a list, so that nothing takes it for a part of what is trained and saved

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        counts = inputs["labels"][:, 1:] != IGNORED_LABEL  # [B, S - 1]
        places = counts.any(dim=0).nonzero()[:, 0]  # where any row counts
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        inputs |= {"use_cache": False, "logits_to_keep": places}
        counts = counts[:, places]
        outputs = model(**inputs)
        with torch.no_grad():
            teacher = self._teacher[0](**inputs).logits[counts]  # [K, V]
        loss = divergence(outputs.logits[counts], teacher)
        if num_items_in_batch is None:
            loss = loss / counts.sum().clamp(min=1)
        else:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        if self.model.training:
            tokens = torch.tensor(inputs["input_ids"].numel(), device=loss.device)
            self._total_train_tokens += self.accelerator.gather(tokens).sum().item()
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics.pop(
            f"{kwargs.get('metric_key_prefix', 'eval')}_perplexity", None
        )  # the loss is no cross entropy
        return output


if __name__ == "__main__":
    no_command("distil by python -m finetune.sft --teacher")
