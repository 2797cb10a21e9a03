"""Fill-in-the-middle samples with DeepSeek's tokens: the model learns to write what stands between two given texts.

With B, H, E for `<｜fim▁begin｜>`, `<｜fim▁hole｜>`, `<｜fim▁end｜>`:

    psm   B prefix H suffix E middle       DeepSeek-Coder (arXiv:2401.14196) and V3 (arXiv:2412.19437), 10 % of documents
    spm   B H suffix E prefix middle       the variant of arXiv:2207.14255 that shares its tokens with psm

To complete a text with such a model, encode it with an empty middle and generate.
"""

import hashlib
import random
from typing import NamedTuple

from common.command import no_command
from tokenization.plain import PlainEncoder

BEGIN, HOLE, END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
MODES = ("psm", "spm")


class FimSample(NamedTuple):
    """A text in three parts, and the order in which to show them."""

    mode: str
    prefix: str
    middle: str
    suffix: str


def fim_token_ids(encode: PlainEncoder) -> tuple[int, int, int]:
    """Ids of begin, hole and end; ValueError if the tokenizer lacks one."""
    missing = [name for name in (BEGIN, HOLE, END) if name not in encode.control_ids]
    if missing:
        raise ValueError(f"the tokenizer has no {missing[0]}; add it with tokenization.extend --control-tokens")
    return encode.control_ids[BEGIN], encode.control_ids[HOLE], encode.control_ids[END]


def encode_fim(encode: PlainEncoder, sample: FimSample) -> list[int]:
    """Ids of a sample, without bos and eos. The parts are encoded one by one: no token crosses a seam.

    Raises:
        ValueError: the mode is unknown or the tokenizer lacks the three tokens.
    """
    if sample.mode not in MODES:
        raise ValueError(f"mode is {sample.mode!r}; choose one of {', '.join(MODES)}")
    begin, hole, end = fim_token_ids(encode)
    if sample.mode == "psm":
        return [begin, *encode(sample.prefix), hole, *encode(sample.suffix), end, *encode(sample.middle)]
    return [begin, hole, *encode(sample.suffix), end, *encode(sample.prefix + sample.middle)]


def draw_fim(text: str, rate: float, spm_share: float = 0.0, seed: int = 0) -> FimSample | None:
    """Decide whether a document becomes a sample, and cut it at two random characters.

    The draw depends on the text and the seed alone, so it is the same in any order of documents.

    Args:
        text: the document.
        rate: probability of a sample, in [0, 1].
        spm_share: of the samples, the share in mode spm, in [0, 1].
        seed: another seed draws anew.

    Returns:
        The sample, or None where the document stays as it is.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=str(seed).encode()).digest()
    rng = random.Random(int.from_bytes(digest, "big"))
    if rng.random() >= rate:
        return None
    mode = "spm" if rng.random() < spm_share else "psm"
    first, second = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
    return FimSample(mode, text[:first], text[first:second], text[second:])


def check_rates(rate: float, spm_share: float) -> None:
    """Raise ValueError unless both are in [0, 1]."""
    for name, value in (("--fim-rate", rate), ("--fim-spm-share", spm_share)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} is {value}; it must be in [0, 1], for example 0.1")


if __name__ == "__main__":
    no_command("train a tokenizer by python -m tokenization.train_bpe")
