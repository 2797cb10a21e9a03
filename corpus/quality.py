"""Rules that a text must pass to be worth training on.

Thresholds are Gopher's (Rae et al., arXiv:2112.11446, tables A1 and A2). They count words. A text mostly in a script
without spaces has no words to count. Its rules count characters instead: no word lengths and no stop words; a longer
minimum, since a Chinese word has about 1.6 characters; longer n-grams in the rules on repetition; and a limit on
punctuation in place of the one on words without letters.

The stop words are English: texts in other languages with spaces need `--no-quality`.
"""

from collections import Counter

import numpy as np

from common.command import no_command
from corpus.text import DIGIT, LETTER, OTHER, Tokens, ngrams, tokenise

WORD_RULES = ("words", "word_length", "letters", "stop_words")
CHARACTER_RULES = ("characters", "punctuation")
COMMON_RULES = ("symbols", "bullets", "ellipses", "repeated_lines", "top_ngram", "repeated_ngrams")
RULES = WORD_RULES + CHARACTER_RULES + COMMON_RULES

STOP_WORDS = tokenise("the be to of and that have with").hashes
BULLETS = ("•", "-", "*", "‣", "▪", "·", "●")
ELLIPSES = ("...", "…")


def broken_rule(text: str, tokens: Tokens) -> str:
    """The first of `RULES` that a text breaks, or "".

    Args:
        text: the document as it stands in its file.
        tokens: the tokens of its normal form.
    """
    single = np.count_nonzero(tokens.is_single)
    if 2 * single > len(tokens):
        own, long_ngram, top_ngrams = _broken_character_rule(tokens), 16, ((3, 0.20), (5, 0.18), (7, 0.16))
    else:
        own, long_ngram, top_ngrams = _broken_word_rule(tokens), 10, ((2, 0.20), (3, 0.18), (4, 0.16))
    return own or _broken_line_rule(text, len(tokens)) or _broken_repetition_rule(tokens, long_ngram, top_ngrams)


def _broken_word_rule(tokens: Tokens) -> str:
    if not 50 <= len(tokens) <= 100_000:
        return "words"
    if not 3 <= (tokens.ends - tokens.starts).mean() <= 10:
        return "word_length"
    letters = np.concatenate([[0], np.cumsum(tokens.classes == LETTER)])
    if np.count_nonzero(letters[tokens.ends] > letters[tokens.starts]) < 0.8 * len(tokens):
        return "letters"
    if sum(np.any(tokens.hashes == stop_word) for stop_word in STOP_WORDS) < 2:
        return "stop_words"
    return ""


def _broken_character_rule(tokens: Tokens) -> str:
    if len(tokens) < 100:
        return "characters"
    visible = len(tokens.text) - tokens.text.count(" ")
    neither_letter_nor_digit = np.count_nonzero(tokens.classes == OTHER) - tokens.text.count(" ")
    if neither_letter_nor_digit + np.count_nonzero(tokens.classes == DIGIT) > 0.5 * visible:
        return "punctuation"
    return ""


def _broken_line_rule(text: str, num_tokens: int) -> str:
    if text.count("#") + text.count("…") + text.count("...") > 0.1 * num_tokens:
        return "symbols"
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if sum(line.startswith(BULLETS) for line in lines) > 0.9 * len(lines):
        return "bullets"
    if sum(line.endswith(ELLIPSES) for line in lines) > 0.3 * len(lines):
        return "ellipses"
    counts = Counter(lines)
    # By characters, not by lines: the speakers of a play and the headings of a reference repeat in good text.
    characters_again = sum((count - 1) * len(line) for line, count in counts.items() if count > 1)
    if characters_again > 0.2 * sum(map(len, lines)):
        return "repeated_lines"
    return ""


def _broken_repetition_rule(tokens: Tokens, long_ngram: int, top_ngrams: tuple[tuple[int, float], ...]) -> str:
    for n, limit in top_ngrams:
        most = max(1, int(limit * len(tokens) / n))
        ordered = np.sort(ngrams(tokens.hashes, n))
        if np.any(ordered[most:] == ordered[:-most]):  # an n-gram occurs more than `most` times
            return "top_ngram"
    hashes = ngrams(tokens.hashes, long_ngram)
    ordered = np.sort(hashes)
    # Each repetition covers at most n tokens, so for nearly all texts a count settles it.
    if long_ngram * np.count_nonzero(ordered[1:] == ordered[:-1]) <= 0.1 * len(tokens):
        return ""
    _, first = np.unique(hashes, return_index=True)
    again = np.ones(len(hashes), dtype=np.int64)
    again[first] = 0
    covered = np.convolve(again, np.ones(long_ngram, dtype=np.int64)) > 0  # tokens in an n-gram that came before
    return "repeated_ngrams" if np.count_nonzero(covered) > 0.1 * len(tokens) else ""


if __name__ == "__main__":
    no_command("clean a corpus by python -m corpus.deduplicate")
