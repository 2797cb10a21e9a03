"""One answer as the protocol has it, built token by token: of a chat (`ChatChoice`) and of a prompt (`TextChoice`).

Both are fed what an engine gives, and tell after each event what can be sent; `done` says that no more is wanted.
"""

import uuid

from serving.engine import PromptRead, Score, Token
from serving.texts import StopFinder, TokenTexts
from tokenization.answers import AnswerCall, AnswerParser, TokenStream

REASONING, CONTENT = "reasoning_content", "content"


class Choice:
    """What both kinds share: counting, why an answer ended, and the choice as part of an answer."""

    def __init__(self, index: int, max_tokens: int, end_ids: list[int]):
        self.index = index
        self.new_tokens = 0
        self.prompt: PromptRead | None = None
        self.finish_reason: str | None = None
        self._max_tokens = max_tokens
        self._end_ids = end_ids

    @property
    def done(self) -> bool:
        """Whether the answer has ended."""
        return self.finish_reason is not None

    def _count(self, token: Token) -> bool:
        """Count a token -> whether it has a text: the end token has none."""
        self.new_tokens += 1
        if token.id in self._end_ids:
            self.finish_reason = "stop"
        return token.id not in self._end_ids

    def _end_if_full(self) -> None:
        if not self.done and self.new_tokens >= self._max_tokens:
            self.finish_reason = "length"


# ---------------------------------------------------------------- chats


class ChatChoice(Choice):
    """An answer in a chat: reasoning, content and tool calls.

    Stop texts are looked for in the reasoning and in the content, each by itself.

    Args:
        index: of the choice.
        max_tokens, end_ids: when it ends.
        parser: of the answer.
        texts: of the tokens, for `logprobs`.
        stops: stop texts.
        max_calls: the answer ends with so many tool calls; None is without limit.
        calls_allowed: whether the model may call tools; if not, what it writes as a call is left out.
    """

    def __init__(
        self,
        index: int,
        max_tokens: int,
        end_ids: list[int],
        parser: AnswerParser,
        texts: TokenTexts,
        stops: list[str],
        max_calls: int | None = None,
        calls_allowed: bool = True,
    ):
        super().__init__(index, max_tokens, end_ids)
        self._parser = parser
        self._texts = texts
        self._finders = {part: StopFinder(stops) for part in (REASONING, CONTENT)}
        self._max_calls = max_calls
        self._calls_allowed = calls_allowed
        self._calls = 0
        self._fed = self._shown = 0  # characters of the content that came, and that were shown
        self._scores: list[tuple[int, dict]] = []  # with the place in the content where the token begins

    def feed(self, event: PromptRead | Token) -> list[dict]:
        """An event -> the deltas that it makes."""
        if isinstance(event, PromptRead):
            self.prompt = event
            return []
        deltas: list[dict] = []
        if self._count(event):
            if event.score is not None and self._parser.is_content(event.id):
                self._scores.append((self._fed, self._content_score(event.id, event.score)))
            for piece in self._parser.feed(event.id):
                deltas += self._call(piece) if isinstance(piece, AnswerCall) else self._text(*piece)
                if self.done:
                    break
        self._end_if_full()
        if self.done:
            deltas += self._end()
        if self._calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        return deltas

    def _text(self, text: str, is_reasoning: bool) -> list[dict]:
        part = REASONING if is_reasoning else CONTENT
        finder = self._finders[part]
        if not is_reasoning:
            self._fed += len(text)
        shown = finder.feed(text)
        if finder.found:
            self.finish_reason = "stop"
        return self._delta(part, shown)

    def _delta(self, part: str, text: str) -> list[dict]:
        if not text:
            return []
        delta = {"delta": {part: text}}
        if part == CONTENT:
            self._shown += len(text)
            delta |= self._released(self._shown)
        return [delta]

    def _released(self, end: int) -> dict:
        """`logprobs` of the tokens that begin before a place in the content."""
        scores = [score for start, score in self._scores if start < end]
        self._scores = [(start, score) for start, score in self._scores if start >= end]
        return {"logprobs": {"content": scores, "refusal": None}} if scores else {}

    def _call(self, call: AnswerCall) -> list[dict]:
        if not self._calls_allowed:
            return []
        function = {"name": call.name, "arguments": call.arguments}
        made = {"index": self._calls, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        self._calls += 1
        if self._calls == self._max_calls:
            self.finish_reason = "tool_calls"
        # Text that was held back stands before the call.
        return [*self._flush(), {"delta": {"tool_calls": [made]}}]

    def _flush(self) -> list[dict]:
        return [
            delta
            for part, finder in self._finders.items()
            if not finder.found
            for delta in self._delta(part, finder.end())
        ]

    def _end(self) -> list[dict]:
        cut = any(finder.found for finder in self._finders.values())
        deltas = [] if cut else [delta for piece in self._parser.end() for delta in self._text(*piece)]
        deltas += self._flush()
        if self._scores and not self._finders[CONTENT].found:  # tokens that completed no character
            deltas.append({"delta": {}} | self._released(self._fed + 1))
        return deltas

    def _content_score(self, id: int, score: Score) -> dict:
        def entry(id: int, logprob: float) -> dict:
            return {"token": self._texts.name(id), "logprob": logprob, "bytes": list(self._texts.bytes(id))}

        return entry(id, score.logprob) | {"top_logprobs": [entry(*pair) for pair in score.top]}


def whole_message(deltas: list[dict]) -> dict:
    """The deltas of an answer -> the fields `message` and `logprobs` of its choice."""
    parts = {part: "".join(delta["delta"].get(part, "") for delta in deltas) for part in (REASONING, CONTENT)}
    calls = [call for delta in deltas for call in delta["delta"].get("tool_calls", [])]
    message: dict = {"role": "assistant", "content": parts[CONTENT], "refusal": None}
    if parts[REASONING]:
        message[REASONING] = parts[REASONING]
    if calls:
        message["content"] = parts[CONTENT] or None
        message["tool_calls"] = [{key: value for key, value in call.items() if key != "index"} for call in calls]
    scores = [score for delta in deltas for score in delta.get("logprobs", {}).get("content", [])]
    return {"message": message, "logprobs": {"content": scores, "refusal": None} if scores else None}


# ---------------------------------------------------------------- prompts


class TextChoice(Choice):
    """The continuation of a prompt, with the prompt before it if that is to be repeated.

    Args:
        index, max_tokens, end_ids: as in `ChatChoice`.
        texts: of the tokens.
        stops: stop texts; they are looked for in the answer only.
        prompt_ids: the prompt's tokens.
        prompt_text: the prompt, to be repeated; None is not to.
        with_scores: whether `logprobs` are told.
    """

    def __init__(
        self,
        index: int,
        max_tokens: int,
        end_ids: list[int],
        texts: TokenTexts,
        stops: list[str],
        prompt_ids: list[int],
        prompt_text: str | None,
        with_scores: bool,
    ):
        super().__init__(index, max_tokens, end_ids)
        self._texts = texts
        self._finder = StopFinder(stops)
        self._stream = TokenStream(texts.tokenizer)
        self._prompt_ids = prompt_ids
        self._prompt_text = prompt_text
        self._with_scores = with_scores
        self._fed = self._shown = 0
        self._entries: list[tuple[int, int, Score | None]] = []  # where it begins, id, score

    def feed(self, event: PromptRead | Token) -> list[dict]:
        """An event -> parts of the choice: `text` and perhaps `logprobs`."""
        if isinstance(event, PromptRead):
            self.prompt = event
            if not self._max_tokens:
                self.finish_reason = "length"
            return self._repeat(event.scores)
        if self._with_scores:
            self._entries.append((self._fed, event.id, event.score))
        shown = ""
        if self._count(event):
            text = self._stream.feed(event.id)
            self._fed += len(text)
            shown = self._finder.feed(text)
            if self._finder.found:
                self.finish_reason = "stop"
        self._end_if_full()
        if self.done and not self._finder.found:
            shown += self._finder.feed(self._stream.end())
            if self._finder.found:
                self.finish_reason = "stop"
            shown += self._finder.end()
        return self._part(shown)

    def _repeat(self, scores: list[Score | None] | None) -> list[dict]:
        if self._prompt_text is None:
            return []
        if scores is not None:
            stream, at = TokenStream(self._texts.tokenizer), 0
            for id, score in zip(self._prompt_ids, scores, strict=True):
                self._entries.append((at, id, score))
                at += len(stream.feed(id))
        self._fed = len(self._prompt_text)
        return self._part(self._prompt_text, all_entries=True)

    def _part(self, text: str, all_entries: bool = False) -> list[dict]:
        self._shown += len(text)
        # The end token and half a character begin where the text ends; of what follows a stop text nothing is told.
        all_entries = all_entries or (self.done and not self._finder.found)
        released = [entry for entry in self._entries if all_entries or entry[0] < self._shown]
        self._entries = [] if self._finder.found else self._entries[len(released) :]
        if not text and not released:
            return []
        return [{"text": text, "logprobs": self._logprobs(released) if self._with_scores else None}]

    def _logprobs(self, entries: list[tuple[int, int, Score | None]]) -> dict:
        name = self._texts.name

        def top(id: int, score: Score | None) -> dict | None:
            # As the protocol has it, the token itself is always among them.
            return score and {name(one): value for one, value in score.top} | {name(id): score.logprob}

        return {
            "tokens": [name(id) for _, id, _ in entries],
            "token_logprobs": [score and score.logprob for _, _, score in entries],
            "top_logprobs": [top(id, score) for _, id, score in entries],
            "text_offset": [start for start, _, _ in entries],
        }


def whole_text(parts: list[dict]) -> dict:
    """The parts of a choice -> its fields `text` and `logprobs`."""
    tables = [part["logprobs"] for part in parts if part["logprobs"] is not None]
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    logprobs = {name: [entry for table in tables for entry in table[name]] for name in names} if tables else None
    return {"text": "".join(part["text"] for part in parts), "logprobs": logprobs}
