"""benchmarks/recall.py: what a passkey row holds, and that its answer stands nowhere else."""

import pytest
import torch

from benchmarks.recall import NUM_KEYS, NUM_VALUES, hide_passkeys, recall_vocab_size

TEXT_VOCAB, LENGTH, PASSKEYS, REACH = 50, 96, 5, 20
TOKENS = 3  # of a passkey
FIRST_QUESTION = TEXT_VOCAB + NUM_KEYS * NUM_VALUES


def make_batch(seed: int = 0, rows: int = 64, tokens: int = TOKENS):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(TEXT_VOCAB, (rows, LENGTH), generator=generator)
    return text, hide_passkeys(text, TEXT_VOCAB, PASSKEYS, tokens, REACH, generator)


def test_each_answer_is_read_from_the_one_passkey_with_the_asked_key():
    text, batch = make_batch()
    for row in range(len(text)):
        ids = batch.input_ids[row].tolist()
        passkeys = [i for i, token in enumerate(ids) if TEXT_VOCAB <= token < FIRST_QUESTION]
        assert len(passkeys) == PASSKEYS * TOKENS
        for question, answer, place in zip(
            batch.asked_at.tolist(), batch.answers[row].tolist(), batch.found_at[row].tolist(), strict=True
        ):
            key = ids[question] - FIRST_QUESTION
            value = ids[question + 1] - FIRST_QUESTION - NUM_KEYS
            assert ids[question + 1] == answer
            matching = [i for i in passkeys if (ids[i] - TEXT_VOCAB) // NUM_VALUES == key]
            assert matching == [place, place + 1, place + 2]
            assert len({ids[i] for i in matching}) == 1
            assert (ids[place] - TEXT_VOCAB) % NUM_VALUES == value
        untouched = [i for i in range(LENGTH - 2 * PASSKEYS) if i not in passkeys]
        assert batch.input_ids[row, untouched].equal(text[row, untouched])


def test_ids_fit_the_vocabulary_and_all_are_used():
    _, batch = make_batch(rows=512)
    assert batch.input_ids.max().item() == recall_vocab_size(TEXT_VOCAB) - 1
    passkeys = batch.input_ids[(batch.input_ids >= TEXT_VOCAB) & (batch.input_ids < FIRST_QUESTION)]
    assert len(passkeys.unique()) == NUM_KEYS * NUM_VALUES


def test_no_passkey_is_nearer_than_reach_and_places_are_even():
    _, batch = make_batch(rows=2048, tokens=1)
    distance = batch.asked_at[0] - batch.found_at
    room = LENGTH - 2 * PASSKEYS - REACH
    assert distance.min() == REACH + 1
    assert distance.max() == REACH + room
    counts = (batch.found_at * 4 // room).flatten().bincount()  # quarters of the text
    assert counts.min() > 0.85 * counts.max()


def test_values_say_nothing_about_keys():
    """A model that sees the questions alone can do no better than chance."""
    _, batch = make_batch(rows=4096)
    keys = batch.input_ids[:, batch.asked_at] - FIRST_QUESTION
    values = batch.answers - FIRST_QUESTION - NUM_KEYS
    joint = torch.zeros(NUM_KEYS, NUM_VALUES).index_put_((keys, values), torch.ones(()), accumulate=True)
    assert (joint / joint.sum() * NUM_KEYS * NUM_VALUES - 1).abs().max() < 0.5
    assert keys.flatten().bincount().min() > 0.9 * keys.numel() / NUM_KEYS


def test_seeds_repeat_and_differ():
    assert make_batch(1)[1].input_ids.equal(make_batch(1)[1].input_ids)
    assert not make_batch(1)[1].input_ids.equal(make_batch(2)[1].input_ids)


def test_long_passkeys_stand_as_far_from_the_questions():
    _, batch = make_batch(rows=2048)
    assert (batch.asked_at[0] - batch.found_at).min() == REACH + TOKENS
    assert batch.found_at.min() == 0


@pytest.mark.parametrize(
    ("passkeys", "tokens", "length"), [(NUM_KEYS + 1, 1, LENGTH), (0, 1, LENGTH), (6, 1, 20), (6, 0, 96), (6, 12, 96)]
)
def test_what_does_not_fit_is_refused(passkeys, tokens, length):
    text = torch.zeros(1, length, dtype=torch.int64)
    with pytest.raises(ValueError, match="num_passkeys"):
        hide_passkeys(text, TEXT_VOCAB, passkeys, tokens, REACH, torch.Generator())
