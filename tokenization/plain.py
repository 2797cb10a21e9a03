"""Encodes text as text only: no part of it becomes a control token, whatever it spells.

DeepSeek's tokenizers turn `<｜User｜>`, `</think>` or `<｜tool▁calls▁begin｜>` anywhere in a text into the control token.
transformers' `split_special_tokens=True` does not prevent it: these tokens are added, but not `special` in
tokenizer.json, and that option only reaches special ones.
"""

import itertools

from transformers import PreTrainedTokenizerBase

from common.command import no_command

_PIECE_CHARACTERS = 8192
_CUT_TOKENS = 64  # more tokens than cutting a text in two can add


class TextTooLong(ValueError):
    """A text has more tokens than there is room for."""


class PlainEncoder:
    """Encodes texts with a tokenizer's ordinary tokens only.

    Control tokens are the added tokens of two characters or more. (Some tokenizers add single characters, which are
    text.) A text without their names gets the ids that the tokenizer itself gives.

    Args:
        tokenizer: a byte-level tokenizer.

    Attributes:
        control_ids: id by name of every control token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items()}
        self.control_ids = {name: id for name, id in added.items() if len(name) > 1}
        self._forbidden = frozenset(self.control_ids.values())

    def has_control_tokens(self, text: str) -> bool:
        """Whether the text spells the name of a control token."""
        return any(name in text for name in self.control_ids)

    def __call__(self, text: str, max_tokens: int | None = None) -> list[int]:
        """The ids of `text`, without bos or eos; they decode to exactly `text`.

        Raises:
            ValueError: the text holds lone surrogates, which have no UTF-8, or the tokenizer's normalizer makes control
                tokens out of other text, or `check_length` refuses it.
        """
        check_unicode(text)
        if max_tokens is not None:
            check_length(self.tokenizer, text, max_tokens)
        # The first character of a name is encoded apart from the rest, so the tokenizer never sees the name.
        edges = [0, *sorted(self._cuts(text)), len(text)]
        pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
        encoded = self.tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
        ids = list(itertools.chain.from_iterable(encoded))
        if not self._forbidden.isdisjoint(ids):
            raise ValueError("the tokenizer's normalizer makes control tokens of text; use a tokenizer without one")
        return ids

    def _cuts(self, text: str) -> set[int]:
        """Positions behind the first character of every occurrence of a name, overlapping ones too."""
        cuts = set()
        for name in self.control_ids:
            at = text.find(name)
            while at >= 0:
                cuts.add(at + 1)
                at = text.find(name, at + 1)
        return cuts


def check_unicode(text: str, name: str = "text") -> None:
    """Raise ValueError, naming the field `name`, if the text holds lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which no UTF-8 "
            "text can hold; decode the source with errors='replace'"
        ) from error


def check_length(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> None:
    """Raise TextTooLong if the text has clearly more than `max_tokens` tokens.

    It is encoded in pieces until that is certain, so that a text of any size takes no longer than one that just fits.
    Short texts, and those a little above the limit, pass.
    """
    if len(text) <= _PIECE_CHARACTERS:
        return
    tokens = 0
    for start in range(0, len(text), _PIECE_CHARACTERS):
        piece = text[start : start + _PIECE_CHARACTERS]
        tokens += len(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]) - _CUT_TOKENS
        if tokens > max_tokens:
            raise TextTooLong(
                f"a text of {len(text)} characters has more tokens than the {max_tokens} that there is room for; "
                "shorten it"
            )


if __name__ == "__main__":
    no_command("train a tokenizer by python -m tokenization.train_bpe")
