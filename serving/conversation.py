"""A conversation with a model that keeps its cache between turns; `chat.py` is its keyboard.

conversation = Chat(model, tokenizer)
for piece in conversation.answer("Hello"):
    print(piece.text, end="")
"""

import itertools
import json
import os
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from common.settings import Settings
from tokenization.answers import AnswerCall, AnswerParser, AnswerText
from tokenization.safe_chat import encode_chat

PREFILL_TOKENS = 512  # read at a time, so that a long text needs bounded memory and Ctrl-C is heard
FINISHED = "finished"  # how an answer ended that the model itself brought to its end


@dataclass(frozen=True)
class Piece:
    """Some new text of an answer, and whether it is thinking; or a call of a tool, without text."""

    text: str
    thinking: bool
    call: AnswerCall | None = None


@dataclass
class Stats:
    """What the last answer took: tokens of the prompt, how many of them were in the cache already, tokens written, the
    rate of writing after the first token (0 if there is no second one), and why the answer ended."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    tokens_per_second: float = 0.0
    ended: str = "not begun"


class Chat:
    """A conversation with a model, its settings and its cache.

    Args:
        model: a causal language model, also a `PeftModel`.
        tokenizer: with a chat template.
        settings: how answers are written; may be replaced between answers.
        system: the system message; empty for none.
        tools: JSON schemas of functions that the model may call. Whoever talks to it says what they return.

    Raises:
        ValueError: the tokenizer has no chat template, or ids that the model lacks; or a tool is no schema.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings | None = None,
        system: str = "",
        tools: list[dict] | None = None,
    ):
        config = model.config.get_text_config()
        if len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, but the model's `vocab_size` is {config.vocab_size}; use "
                "the tokenizer that belongs to the model"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.settings = settings or Settings()
        self.system = system
        self.tools = tools
        self.messages: list[dict] = []  # without the system message
        self.stats = Stats()
        self._prefix = None  # of prefix_deepseek.py, from `load_prefix`
        self.context = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
        eos = model.generation_config.eos_token_id
        self._end_ids = {eos} if isinstance(eos, int) else set(eos or [tokenizer.eos_token_id])
        self.clear()
        self._encode([{"role": "user", "content": "x"}])  # an unfit template is found now and not at the first turn

    # ---- what is said

    def answer(self, text: str) -> Iterator[Piece]:
        """Say `text` and yield the answer piece by piece.

        Whoever stops iterating (`close`) or is interrupted stops the answer; what had come stays in the chat. If
        nothing had, the question is taken back.

        Raises:
            ValueError: the chat would not fit the context, or `text` is no Unicode text; the chat is as before.
        """
        yield from self._answer([*self.messages, {"role": "user", "content": text}])

    def answer_results(self, results: list[str]) -> Iterator[Piece]:
        """Say what the tools of `open_calls` returned, one text each; else as `answer`."""
        yield from self._answer([*self.messages, *({"role": "tool", "content": text} for text in results)])

    def retry(self) -> Iterator[Piece]:
        """Answer the last text again; else as `answer`. The last answer stays if no new one comes.

        Raises:
            ValueError: nothing was said yet.
        """
        said = [i for i, message in enumerate(self.messages) if message["role"] != "assistant"]
        if not said:
            raise ValueError("there is nothing to answer again")
        yield from self._answer(self.messages[: said[-1] + 1])

    @property
    def open_calls(self) -> list[AnswerCall]:
        """Calls of tools by the last answer, whose results are to be said next."""
        calls = self.messages[-1].get("tool_calls") if self.messages else None
        return [AnswerCall(**call["function"]) for call in calls or []]

    def _answer(self, messages: list[dict]) -> Iterator[Piece]:
        ids = self._encode(messages)
        room = self.context - len(ids)
        if room < 1:
            raise ValueError(
                f"the chat with this text has {len(ids)} tokens, and the model reads {self.context} with its answer. "
                "Shorten the text, or in a chat make room: /drop forgets the oldest turn, /clear all of them"
            )
        self.stats = Stats(prompt_tokens=len(ids), ended="interrupted")
        pieces: list[Piece] = []
        self.stats.reused_tokens = self._rewind(ids)
        stop = threading.Event()
        tokens: queue.Queue = queue.Queue()
        limit = min(room, self.settings.max_new_tokens)
        worker = threading.Thread(target=self._work, args=(ids, limit, tokens, stop), daemon=True)
        worker.start()
        try:
            for piece in self._pieces(AnswerParser(self.tokenizer, ids), tokens, limit, limit == room):
                pieces.append(piece)
                yield piece
        finally:
            stop.set()
            worker.join()
            if pieces:
                self.messages = [*messages, _as_message(pieces)]

    def _pieces(self, parser: AnswerParser, tokens: queue.Queue, limit: int, context_ends: bool) -> Iterator[Piece]:
        """The answer's text from the worker's tokens; keeps the books."""
        first_at = time.perf_counter()
        while (token := tokens.get()) is not None:
            if isinstance(token, BaseException):
                raise token
            self.stats.new_tokens += 1
            now = time.perf_counter()
            if self.stats.new_tokens == 1:
                first_at = now
            else:
                self.stats.tokens_per_second = (self.stats.new_tokens - 1) / max(now - first_at, 1e-9)
            if token in self._end_ids:
                self.stats.ended = FINISHED
                continue
            yield from map(_piece, parser.feed(token))
        yield from map(_piece, parser.end())
        if self.stats.ended != FINISHED and self.stats.new_tokens >= limit:
            self.stats.ended = "the context is full" if context_ends else "the limit of /tokens is reached"

    def _encode(self, messages: list[dict], prompt: bool = True) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        encoded = encode_chat(
            self.tokenizer, system + messages, self.tools, self.settings.thinking, add_generation_prompt=prompt
        )
        return encoded["input_ids"]

    # ---- the model at work, in a thread of its own so that it is never interrupted in the middle of a step

    @torch.inference_mode()
    def _work(self, ids: list[int], limit: int, tokens: queue.Queue, stop: threading.Event) -> None:
        """Read what is new of `ids` and write up to `limit` tokens into the queue; ends it with None or an error."""
        try:
            written = self._prefill_and_generate(ids, limit, tokens, stop)
            self._cached_ids = (ids + written)[: self._cache.get_seq_length()]
            tokens.put(None)
        except BaseException as error:
            self._forget_cache()  # it may hold half a step
            tokens.put(error)

    def _prefill_and_generate(self, ids, limit, tokens, stop) -> list[int]:
        device = self.model.device
        for start in range(len(self._cached_ids), len(ids) - 1, PREFILL_TOKENS):
            if stop.is_set():
                return []
            part = torch.tensor([ids[start : min(start + PREFILL_TOKENS, len(ids) - 1)]], device=device)
            self.model(input_ids=part, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        if stop.is_set():
            return []
        prompt = torch.tensor([ids], device=device)
        settings = self.settings
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
        if settings.temperature:
            sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p}
            sampling |= {"top_k": settings.top_k, "min_p": settings.min_p or None}
        output = self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=self._cache,
            max_new_tokens=limit,
            eos_token_id=sorted(self._end_ids),
            pad_token_id=min(self._end_ids),
            streamer=_TokenQueue(tokens),
            stopping_criteria=[_StopWhenSet(stop)],
            repetition_penalty=settings.repetition_penalty,
            **sampling,
        )
        return output[0, len(ids) :].tolist()

    # ---- the cache

    def _rewind(self, ids: list[int]) -> int:
        """Take from the cache what does not begin `ids` -> how many tokens are left in it."""
        # one token is always read: the first new one is predicted from it
        same = next((i for i, (a, b) in enumerate(zip(self._cached_ids, ids, strict=False)) if a != b), None)
        kept = min(len(self._cached_ids), len(ids) - 1) if same is None else same
        try:
            if kept < len(self._cached_ids):
                self._cache.crop(kept - len(self._cached_ids))
            self._cached_ids = self._cached_ids[:kept]
        except ValueError:  # a layer has let go what the next token would need
            self._forget_cache(ids)
        return len(self._cached_ids)

    def _forget_cache(self, ids: list[int] | None = None) -> None:
        """Begin with the prefix if there is one, and `ids` begin with it; else with an empty cache."""
        kept = [] if self._prefix is None else self._prefix.input_ids[0].tolist()
        if kept and (ids is None or (len(ids) > len(kept) and ids[: len(kept)] == kept)):
            self._cache = self._prefix.make_cache()
        else:
            kept, self._cache = [], DynamicCache(config=self.model.config.get_text_config())
        self._cached_ids: list[int] = kept

    def cache_bytes(self) -> int:
        """Bytes of the tensors that the cache's layers hold of the chat; spare room is not counted."""
        return sum(_tensor_bytes(value) for layer in self._cache.layers for value in vars(layer).values())

    def tokens(self) -> int:
        """Tokens of the chat so far."""
        return len(self._encode(self.messages, prompt=False))

    def _opening(self) -> list[int]:
        """The tokens that every chat with this system message and these tools begins with."""
        first, second = (self._encode([{"role": "user", "content": text}]) for text in ("x", "1"))
        return [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))]

    def save_prefix(self, path: Path, chunk_size: int = PREFILL_TOKENS) -> int:
        """Read the system message and write what the cache holds of it, for `load_prefix` -> its tokens.

        Args:
            path: safetensors file.
            chunk_size: tokens read at a time.

        Raises:
            ValueError: it does not fit the context, or the model's code is not this repository's.
        """
        if not hasattr(self.model, "make_prefix"):
            raise ValueError(f"{type(self.model).__name__} has no `make_prefix`; load it without --trust-remote-code")
        ids = self._opening()
        if len(ids) >= self.context:
            raise ValueError(f"the text has {len(ids)} tokens, and the model reads {self.context}; shorten it")
        prefix = self.model.make_prefix(torch.tensor([ids], device=self.model.device), chunk_size=chunk_size)
        prefix.made_by["system"] = self.system
        prefix.save(path)
        return len(ids)

    def load_prefix(self, path: Path) -> None:
        """Begin with a file of `save_prefix`: its text becomes the system message, and its tokens are not read again.

        Raises:
            ValueError: the file is damaged, of another model, or its chats begin otherwise (with tools, for instance).
        """
        if not hasattr(self.model, "load_prefix"):
            raise ValueError(f"{type(self.model).__name__} has no `load_prefix`; load it without --trust-remote-code")
        prefix = self.model.load_prefix(path)
        with safe_open(path, framework="pt") as file:
            system = (file.metadata() or {}).get("system")
        if system is None:
            raise ValueError(f"{path} does not say which text it was made of; make it with python -m tools.prefix")
        before, self.system = self.system, system
        if self._opening() != prefix.input_ids[0].tolist():
            self.system = before
            raise ValueError(
                f"{path} holds the beginning of another chat; it goes with the tokenizer and chat template that made it, "
                "and without tools"
            )
        self._prefix = prefix
        self.clear()

    # ---- changes to the chat

    def clear(self) -> None:
        """Forget all that was said; the system message stays."""
        self.messages = []
        self._forget_cache()

    def drop(self, turns: int) -> int:
        """Forget the oldest turns, a user's text and what follows up to the next one -> how many there were to drop."""
        starts = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        dropped = min(turns, len(starts))
        self.messages = self.messages[starts[dropped] :] if dropped < len(starts) else []
        return dropped

    def save(self, path: Path) -> None:
        """Write the chat and its settings as JSON, the whole file or none of it."""
        content = {"system": self.system, "settings": asdict(self.settings), "messages": self.messages}
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, path)

    def load(self, path: Path) -> None:
        """Go on with a chat written by `save`.

        Raises:
            ValueError: the file is none such; the chat is as before.
        """
        before = self.system, self.settings, self.messages
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or set(content) != {"system", "settings", "messages"}:
                raise ValueError("it must hold `system`, `settings` and `messages`")
            if not isinstance(content["system"], str) or not isinstance(content["settings"], dict):
                raise ValueError("`system` must be a string and `settings` a table")
            self.system, self.settings = content["system"], Settings(**content["settings"])
            self._encode(content["messages"], prompt=False)
            if any(message["role"] == "system" for message in content["messages"]):
                raise ValueError("`messages` has a system message, which belongs into `system`")
            self.messages = content["messages"]
        except (ValueError, TypeError, RecursionError) as error:
            self.system, self.settings, self.messages = before
            raise ValueError(f"{path} is no saved chat: {error}") from error


def _piece(part: AnswerText | AnswerCall) -> Piece:
    return Piece("", False, part) if isinstance(part, AnswerCall) else Piece(part.text, part.is_reasoning)


def _as_message(pieces: list[Piece]) -> dict:
    """An answer as a message of the chat."""
    message = {"role": "assistant", "content": "".join(piece.text for piece in pieces if not piece.thinking)}
    if reasoning := "".join(piece.text for piece in pieces if piece.thinking):
        message["reasoning_content"] = reasoning
    if calls := [{"function": piece.call._asdict()} for piece in pieces if piece.call]:
        message["tool_calls"] = calls
    return message


class _TokenQueue(BaseStreamer):
    """Passes what `generate` writes on, token by token."""

    def __init__(self, tokens: queue.Queue):
        self.tokens = tokens
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self.is_prompt:
            for token in value.flatten().tolist():
                self.tokens.put(token)
        self.is_prompt = False

    def end(self) -> None:
        pass


class _StopWhenSet(StoppingCriteria):
    def __init__(self, stop: threading.Event):
        self.stop = stop

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.stop.is_set(), device=input_ids.device)


def _tensor_bytes(value: object) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_tensor_bytes, value)) if isinstance(value, tuple) else 0
