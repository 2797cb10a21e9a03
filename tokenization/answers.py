"""Tells an answer's reasoning, content and tool calls apart, by the ids of the tokens that the model generated.

    parser = AnswerParser(tokenizer, prompt_ids)
    pieces = [piece for token in generated_ids for piece in parser.feed(token)] + parser.end()

The counterpart of safe_chat.py. A parser of decoded text takes `<｜tool▁call▁begin｜>` in a web page that an answer
quotes, or in the prompt, for the model's own. Here only control tokens count. Of the prompt it matters only whether it
ends with `<think>`.
"""

from typing import NamedTuple

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from common.command import no_command
from tokenization.plain import PlainEncoder

# (part of the answer, control token) -> the part that follows. All other control tokens are text of the part they are in.
_NEXT_PART = {
    ("content", "<think>"): "reasoning",
    ("reasoning", "</think>"): "content",
    ("content", "<｜tool▁calls▁begin｜>"): "content",
    ("content", "<｜tool▁calls▁end｜>"): "content",
    ("content", "<｜tool▁call▁begin｜>"): "name",
    ("name", "<｜tool▁sep｜>"): "arguments",
    ("arguments", "<｜tool▁call▁end｜>"): "content",
}


class AnswerText(NamedTuple):
    """Some new text of an answer, and whether it is reasoning."""

    text: str
    is_reasoning: bool


class AnswerCall(NamedTuple):
    """A tool call from its begin token to its end token. The arguments are as the model wrote them and may be no JSON."""

    name: str
    arguments: str


class TokenStream:
    """Decodes tokens one by one; special tokens have no text.

    Args:
        tokenizer: a byte-level tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer.backend_tokenizer
        self._begin()

    def _begin(self) -> None:
        self._stream, self._pending = DecodeStream(skip_special_tokens=True), []

    def feed(self, token: int) -> str:
        """The text that a token completes. While the last character is incomplete, all of it is held back."""
        self._pending.append(token)
        text = self._stream.step(self._tokenizer, token)
        if text:
            self._pending = []
        return text or ""

    def end(self) -> str:
        """What was held back, without the character that never became complete; a new text may begin."""
        pending = self._pending
        self._begin()
        return self._tokenizer.decode(pending, skip_special_tokens=True).rstrip("\ufffd")


class AnswerParser:
    """Reads the tokens of one answer in DeepSeek's format, one by one.

    Special tokens have no text. A call without its end token is not reported.

    Args:
        tokenizer: a byte-level tokenizer. Of one without DeepSeek's control tokens, all text is content.
        prompt_ids: the prompt, in which text is no control token (`encode_chat`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int]):
        self._stream = TokenStream(tokenizer)
        self._names = {id: name for name, id in PlainEncoder(tokenizer).control_ids.items()}
        self._enter("reasoning" if self._names.get(prompt_ids[-1]) == "<think>" else "content")

    def is_content(self, token: int) -> bool:
        """Whether a generated token, not yet fed, is text of the content."""
        return self._part == "content" and ("content", self._names.get(token)) not in _NEXT_PART

    def feed(self, token: int) -> list[AnswerText | AnswerCall]:
        """What a generated token completes."""
        part, following = self._part, _NEXT_PART.get((self._part, self._names.get(token)))
        if following is None:
            return self._text_pieces(self._stream.feed(token))
        pieces = self.end()
        written = self._text
        self._enter(following)
        if part == "name":
            self._name = written
        if part == "arguments":
            pieces.append(AnswerCall(self._name, written))
        return pieces

    def end(self) -> list[AnswerText | AnswerCall]:
        """The text that was held back, once no more tokens come."""
        return self._text_pieces(self._stream.end())

    def _text_pieces(self, text: str) -> list[AnswerText | AnswerCall]:
        if self._part not in ("content", "reasoning"):
            self._text += text
            return []
        return [AnswerText(text, self._part == "reasoning")] if text else []

    def _enter(self, part: str) -> None:
        self._part, self._text = part, ""


if __name__ == "__main__":
    no_command("chat by python chat.py, serve by python serve.py")
