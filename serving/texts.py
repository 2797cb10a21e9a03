"""The text of an answer as it may be shown: cut before a stop text, and each token with its bytes and its place."""

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


class StopFinder:
    """Passes text on up to the stop text that is complete first, and which may come in pieces.

    What could be the beginning of a stop text is held back until it is certain that it is none.
    """

    def __init__(self, stops: list[str]):
        self.found = False
        self._stops = stops
        self._held = ""

    def feed(self, text: str) -> str:
        """Further text -> what may be shown now."""
        if self.found:
            return ""
        text = self._held + text
        places = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)[1]]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """What is left when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` and is not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class TokenTexts:
    """The bytes and the name of each token.

    Args:
        tokenizer: a byte-level tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}

    def bytes(self, id: int) -> bytes:
        """What the token stands for; a control token for its name, an id without a token for nothing."""
        if id in self._added:
            return self._added[id].encode()
        token = self.tokenizer.convert_ids_to_tokens(id) or ""
        return bytes(_BYTES[character] for character in token if character in _BYTES)

    def name(self, id: int) -> str:
        """The token's text; of half a character `bytes:` and its bytes, so that no two tokens have one name."""
        data = self.bytes(id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
