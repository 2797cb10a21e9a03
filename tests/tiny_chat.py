"""What tests that fine-tune share: a tiny bilingual tokenizer with the chat template, and an interruption."""

from functools import cache
from pathlib import Path

from tokenizers import Tokenizer
from transformers import TrainerCallback

from finetune.problems import number_problems
from tokenization.train_bpe import MIN_VOCAB_SIZE, save_tokenizer, train_tokenizer

VOCAB_SIZE = MIN_VOCAB_SIZE + 60


@cache
def _tokenizer() -> Tokenizer:
    examples, _ = number_problems(200, 1)
    texts = [message["content"] for example in examples for message in example["messages"]]
    return train_tokenizer(texts, vocab_size=VOCAB_SIZE, show_progress=False)


def add_tokenizer(folder: Path) -> Path:
    """Put the tokenizer's files into a checkpoint folder whose `vocab_size` is `VOCAB_SIZE`."""
    save_tokenizer(_tokenizer(), folder, model_max_length=256)
    return folder


class StopAt(TrainerCallback):
    """Ctrl-C after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt
