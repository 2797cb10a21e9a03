"""A passkey test that a small model learns in minutes: passkeys hidden in text, asked for far behind it.

    text text P37 text text text text P12 text ... P05 text | text, too long for a window | Q1 A2  Q3 A7  Q0 A5
                                                                                               ^      ^      ^  loss

A passkey is one token, P37 the one with key 3 and value 7. Question Q3 asks for the value of the passkey with key 3, of
which the row holds exactly one; the token after the question is the answer A7. Values are drawn anew for each row, so
nothing but the passkey itself answers. Ids of passkeys, questions and answers lie behind those of the text.

Shapes: B rows, T tokens a row, P passkeys in a row.
"""

from typing import NamedTuple

import torch

NUM_KEYS = NUM_VALUES = 8


class RecallBatch(NamedTuple):
    """Rows with questions. Questions stand at the same places in all rows."""

    input_ids: torch.Tensor  # int64 [B, T]
    asked_at: torch.Tensor  # int64 [P], places of the questions; the next token is the answer
    answers: torch.Tensor  # int64 [B, P]
    found_at: torch.Tensor  # int64 [B, P], place of the passkey that answers


def recall_vocab_size(text_vocab_size: int) -> int:
    """Number of ids of text, passkeys, questions and answers."""
    return text_vocab_size + NUM_KEYS * NUM_VALUES + NUM_KEYS + NUM_VALUES


def hide_passkeys(
    text: torch.Tensor, text_vocab_size: int, num_passkeys: int, reach: int, generator: torch.Generator
) -> RecallBatch:
    """Overwrites some tokens of text rows with passkeys, and the last ones with questions and answers.

    Args:
        text: int64 [B, T], ids below `text_vocab_size`.
        text_vocab_size: the first id of a passkey.
        num_passkeys: P, each asked for once; at most NUM_KEYS.
        reach: tokens of plain text between the last passkey and the first question, but at most a quarter of the row.
        generator: of places, keys, values and the order of questions.

    Raises:
        ValueError: the passkeys do not fit.
    """
    rows, length = text.shape
    room = length - 2 * num_passkeys - min(reach, length // 4)  # tokens that may become passkeys
    if not 0 < num_passkeys <= min(NUM_KEYS, room):
        raise ValueError(
            f"`num_passkeys` is {num_passkeys}; it must be 1 to {NUM_KEYS}, and rows of {length} tokens with a reach of "
            f"{reach} have room for {room}: ask for fewer or give longer rows."
        )

    def draw(count: int) -> torch.Tensor:
        """P different numbers below `count` for each row, in random order."""
        return torch.rand(rows, count, generator=generator).argsort(dim=1)[:, :num_passkeys]

    keys, places = draw(NUM_KEYS), draw(room)  # [B, P], in the order of the questions
    values = torch.randint(NUM_VALUES, (rows, num_passkeys), generator=generator)
    first_question = text_vocab_size + NUM_KEYS * NUM_VALUES
    questions, answers = first_question + keys, first_question + NUM_KEYS + values
    asked_at = torch.arange(length - 2 * num_passkeys, length, 2)
    input_ids = text.scatter(1, places, text_vocab_size + keys * NUM_VALUES + values)
    input_ids[:, asked_at], input_ids[:, asked_at + 1] = questions, answers
    return RecallBatch(input_ids, asked_at, answers, places)
