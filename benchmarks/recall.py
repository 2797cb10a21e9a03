"""A passkey test that a small model learns in minutes: passkeys hidden in text, asked for far behind it.

    text P37 P37 text text text P12 P12 text ... P05 P05 text | text, too long for a window | Q1 A2  Q3 A7  Q0 A5
                                                                                                 ^      ^      ^  loss

A passkey is one token, given once or several times in a row; P37 is the one with key 3 and value 7. Question Q3 asks for
the value of the passkey with key 3, of which the row holds exactly one; the token after the question is the answer A7.
Values are drawn anew for each row, so nothing but the passkey itself answers. Ids of passkeys, questions and answers lie
behind those of the text.

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
    found_at: torch.Tensor  # int64 [B, P], place of the passkey that answers, of its first token


def recall_vocab_size(text_vocab_size: int) -> int:
    """Number of ids of text, passkeys, questions and answers."""
    return text_vocab_size + NUM_KEYS * NUM_VALUES + NUM_KEYS + NUM_VALUES


def room_for_passkeys(length: int, num_passkeys: int, reach: int) -> int:
    """Tokens of a row, from its first on, in which passkeys may stand."""
    return length - 2 * num_passkeys - min(reach, length // 4)


def hide_passkeys(
    text: torch.Tensor,
    text_vocab_size: int,
    num_passkeys: int,
    passkey_tokens: int,
    reach: int,
    generator: torch.Generator,
) -> RecallBatch:
    """Overwrites some tokens of text rows with passkeys, and the last ones with questions and answers.

    Args:
        text: int64 [B, T], ids below `text_vocab_size`.
        text_vocab_size: the first id of a passkey.
        num_passkeys: P, each asked for once; at most NUM_KEYS.
        passkey_tokens: how often in a row a passkey is given.
        reach: tokens of plain text between the last passkey and the first question, but at most a quarter of the row.
        generator: of places, keys, values and the order of questions.

    Raises:
        ValueError: the passkeys do not fit.
    """
    rows, length = text.shape
    room = room_for_passkeys(length, num_passkeys, reach)
    free = room - num_passkeys * (passkey_tokens - 1)  # places, were every passkey one token
    if passkey_tokens < 1 or not 0 < num_passkeys <= min(NUM_KEYS, free):
        raise ValueError(
            f"`num_passkeys` is {num_passkeys} and `passkey_tokens` {passkey_tokens}; there must be 1 to {NUM_KEYS} of "
            f"at least 1 token, and rows of {length} tokens with a reach of {reach} have room for {room} tokens: ask "
            "for fewer, shorter ones or give longer rows."
        )

    def draw(count: int) -> torch.Tensor:
        """P different numbers below `count` for each row, in random order."""
        return torch.rand(rows, count, generator=generator).argsort(dim=1)[:, :num_passkeys]

    keys, starts = draw(NUM_KEYS), draw(free)  # [B, P], in the order of the questions
    starts = starts + starts.argsort(dim=1).argsort(dim=1) * (passkey_tokens - 1)  # moved by those that stand before
    values = torch.randint(NUM_VALUES, (rows, num_passkeys), generator=generator)
    first_question = text_vocab_size + NUM_KEYS * NUM_VALUES
    questions, answers = first_question + keys, first_question + NUM_KEYS + values
    asked_at = torch.arange(length - 2 * num_passkeys, length, 2)
    places = (starts[..., None] + torch.arange(passkey_tokens)).flatten(1)  # [B, P * passkey_tokens]
    passkeys = text_vocab_size + keys * NUM_VALUES + values
    input_ids = text.scatter(1, places, passkeys.repeat_interleave(passkey_tokens, dim=1))
    input_ids[:, asked_at], input_ids[:, asked_at + 1] = questions, answers
    return RecallBatch(input_ids, asked_at, answers, starts)
