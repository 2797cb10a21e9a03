"""A chat in the terminal with any checkpoint that has a chat template.

    python chat.py                                        # the model in this folder
    python chat.py --model path/or/hub-name --trust-remote-code
    python chat.py --adapter runs/my-adapter              # a PEFT adapter on its base model

Answers stream as they are written, thinking apart and dim. Ctrl-C stops an answer and keeps what there is of it; `/help`
lists the commands. The cache of the chat is kept, so a turn reads only the tokens that are new. What is typed or loaded
from a file never becomes a control token (tokenization/safe_chat.py). A chat that no longer fits the model's context is
refused with the remedy; nothing is forgotten unless `/drop` or `/clear` say so.
"""

import argparse
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common.extras import extra

with extra("serve"):
    import torch
    from rich.console import Console
    from rich.text import Text
    from tokenizers.decoders import DecodeStream
    from transformers import (
        DynamicCache,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        StoppingCriteria,
        set_seed,
    )
    from transformers.generation.streamers import BaseStreamer
    from transformers.utils import logging

    from common.loading import load
    from tokenization.safe_chat import encode_chat

with suppress(ImportError):  # not on Windows, whose terminal does it itself
    import readline  # noqa: F401  gives `input` history, editing, pasted lines as one text, and lines above 4,096 bytes

PREFILL_TOKENS = 512  # read at a time, so that a long text needs bounded memory and Ctrl-C is heard
# Control characters, which could move the cursor or change the terminal, become their pictures.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


# ---------------------------------------------------------------- the chat


@dataclass(frozen=True)
class Settings:
    """How answers are written.

    thinking: whether the model thinks before it answers, if its template knows that.
    temperature: of sampling; 0 takes the likeliest token.
    top_p: sample among the likeliest tokens that have this probability together.
    max_new_tokens: of one answer, thinking included.
    """

    thinking: bool = False
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 1024

    def __post_init__(self):
        if not isinstance(self.thinking, bool):
            raise ValueError(f"thinking is {self.thinking!r}; it must be true or false")
        _check_number("temperature", self.temperature, 0, 100)
        _check_number("top_p", self.top_p, 1e-6, 1)
        if isinstance(self.max_new_tokens, bool) or not isinstance(self.max_new_tokens, int):
            raise ValueError(f"max_new_tokens is {self.max_new_tokens!r}; it must be a whole number")
        _check_number("max_new_tokens", self.max_new_tokens, 1, 2**31 - 1)


def _check_number(name: str, value: object, minimum: float, maximum: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not minimum <= value <= maximum:
        raise ValueError(f"{name} is {value!r}; it must be a number from {minimum:g} to {maximum:g}")


@dataclass(frozen=True)
class Piece:
    """Some new text of an answer, and whether it is thinking."""

    text: str
    thinking: bool


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

    Raises:
        ValueError: the tokenizer has no chat template, or ids that the model lacks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings | None = None,
        system: str = "",
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
        self.messages: list[dict] = []  # without the system message
        self.stats = Stats()
        self.context = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
        self._think_ids = [tokenizer.convert_tokens_to_ids(name) for name in ("<think>", "</think>")]
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
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._encode(messages)
        room = self.context - len(ids)
        if room < 1:
            raise ValueError(
                f"the chat with this text has {len(ids)} tokens, and the model reads {self.context} with its answer. "
                "Shorten the text, or make room: /drop forgets the oldest turn, /clear all of them"
            )
        self.stats = Stats(prompt_tokens=len(ids), ended="interrupted")
        parts: dict[bool, list[str]] = {True: [], False: []}  # by whether it is thinking
        self.stats.reused_tokens = self._rewind(ids)
        stop = threading.Event()
        tokens: queue.Queue = queue.Queue()
        limit = min(room, self.settings.max_new_tokens)
        worker = threading.Thread(target=self._work, args=(ids, limit, tokens, stop), daemon=True)
        worker.start()
        try:
            for piece in self._pieces(tokens, limit, limit == room):
                parts[piece.thinking].append(piece.text)
                yield piece
        finally:
            stop.set()
            worker.join()
            reasoning, content = "".join(parts[True]), "".join(parts[False])
            if reasoning or content:
                reply = {"role": "assistant", "content": content}
                self.messages = [*messages, reply | ({"reasoning_content": reasoning} if reasoning else {})]

    def _pieces(self, tokens: queue.Queue, limit: int, context_ends: bool) -> Iterator[Piece]:
        """The answer's text from the worker's tokens; keeps the books."""
        thinking, stream = self.settings.thinking and self._knows_thinking(), DecodeStream(skip_special_tokens=False)
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
                self.stats.ended = "finished"
            elif token in self._think_ids:
                thinking, stream = token == self._think_ids[0], DecodeStream(skip_special_tokens=False)
            elif text := stream.step(self.tokenizer.backend_tokenizer, token):
                yield Piece(text, thinking)
        if self.stats.ended != "finished" and self.stats.new_tokens >= limit:
            self.stats.ended = "the context is full" if context_ends else "the limit of /tokens is reached"

    def _knows_thinking(self) -> bool:
        return isinstance(self._think_ids[1], int) and self._think_ids[1] != self.tokenizer.unk_token_id

    def _encode(self, messages: list[dict], prompt: bool = True) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        encoded = encode_chat(
            self.tokenizer, system + messages, thinking=self.settings.thinking, add_generation_prompt=prompt
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
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.settings.temperature:
            sampling = {"do_sample": True, "temperature": self.settings.temperature, "top_p": self.settings.top_p}
        output = self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=self._cache,
            max_new_tokens=limit,
            eos_token_id=sorted(self._end_ids),
            pad_token_id=min(self._end_ids),
            streamer=_TokenQueue(tokens),
            stopping_criteria=[_StopWhenSet(stop)],
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
            self._forget_cache()
        return len(self._cached_ids)

    def _forget_cache(self) -> None:
        self._cache = DynamicCache(config=self.model.config.get_text_config())
        self._cached_ids: list[int] = []

    def cache_bytes(self) -> int:
        """Bytes of the tensors that the cache's layers hold of the chat; spare room is not counted."""
        return sum(_tensor_bytes(value) for layer in self._cache.layers for value in vars(layer).values())

    def tokens(self) -> int:
        """Tokens of the chat so far."""
        return len(self._encode(self.messages, prompt=False))

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


# ---------------------------------------------------------------- the terminal

HELP = """\
/help                this list
/clear               forget what was said
/drop [N]            forget the N oldest turns (1)
/system [TEXT]       set the system message; without a text, remove it
/thinking on|off     whether the model thinks before it answers
/temperature NUMBER  of sampling; 0 takes the likeliest token
/tokens N            longest answer, in tokens
/stats               what the last answer took, the context and the cache
/save FILE           write the chat as JSON
/load FILE           go on with a saved chat
/exit                leave, as does Ctrl-D

Ctrl-C stops an answer and keeps the chat. A line of three quotation marks
(\""") begins a text of several lines, another one ends it. A text that begins
with a slash is said with two of them."""


class Terminal:
    """Reads lines, obeys commands and shows answers.

    Args:
        chat: the conversation.
        console: where to write.
        read: prompt -> a line; raises EOFError at the end, KeyboardInterrupt at Ctrl-C.
    """

    def __init__(self, chat: Chat, console: Console, read: Callable[[str], str] = input):
        self.chat = chat
        self.console = console
        self.read = read

    def run(self) -> None:
        """Talk until the user leaves."""
        while True:
            try:
                text = self._read_text()
                if text.startswith("/") and not text.startswith("//"):
                    if text.split()[0] == "/exit":
                        return
                    self._obey(text)
                elif text.strip():
                    self._answer(text.removeprefix("/"))
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:
                self._note("\nCtrl-D or /exit leaves")
            except (ValueError, OSError) as error:
                self._note(f"{error}")

    def _read_text(self) -> str:
        line = self.read("> ")
        if line.strip() != '"""':
            return line
        lines = []
        while (line := self.read("… ")).strip() != '"""':
            lines.append(line)
        text = "\n".join(lines)
        return "/" + text if text.startswith("/") else text  # quoted, so no command

    def _answer(self, text: str) -> None:
        thought = False
        with closing(self.chat.answer(text)) as pieces:
            try:
                for piece in pieces:
                    if thought and not piece.thinking:
                        self.console.print("\n")
                    thought = piece.thinking
                    style = "dim" if piece.thinking else ""
                    self.console.print(
                        Text(piece.text.translate(_VISIBLE), style=style), end="", soft_wrap=True, highlight=False
                    )
            except KeyboardInterrupt:
                pass
        self.console.print()
        stats = self.chat.stats
        if stats.ended == "interrupted" and not stats.new_tokens:
            self._note("stopped before the first token; the question is taken back")
        else:
            self._note(self._summary())

    def _summary(self) -> str:
        stats, used = self.chat.stats, self.chat.tokens()
        return (
            f"{stats.new_tokens} tokens, {stats.tokens_per_second:.1f} a second, {stats.ended} · read "
            f"{stats.prompt_tokens - stats.reused_tokens} of {stats.prompt_tokens} prompt tokens · context {used} of "
            f"{self.chat.context} ({used / self.chat.context:.0%}) · cache {self.chat.cache_bytes():,} bytes"
        )

    def _obey(self, line: str) -> None:
        name, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        chat, settings = self.chat, self.chat.settings
        match name:
            case "/help":
                self._note(HELP)
            case "/clear":
                chat.clear()
                self._note("the chat is empty")
            case "/drop":
                dropped = chat.drop(_number("/drop", argument or "1", int))
                self._note(f"{dropped} turn{'s' * (dropped != 1)} forgotten; the chat has {chat.tokens()} tokens")
            case "/system":
                chat.system = argument
                self._note("system message set" if argument else "no system message")
            case "/thinking":
                if argument not in ("on", "off"):
                    raise ValueError(f"/thinking is {argument!r}; say on or off")
                chat.settings = replace(settings, thinking=argument == "on")
                self._note(f"thinking is {argument}")
            case "/temperature":
                chat.settings = replace(settings, temperature=_number(name, argument, float))
                self._note(f"temperature is {chat.settings.temperature:g}")
            case "/tokens":
                chat.settings = replace(settings, max_new_tokens=_number(name, argument, int))
                self._note(f"answers have at most {chat.settings.max_new_tokens} tokens")
            case "/stats":
                self._note(self._summary())
            case "/save" | "/load":
                if not argument:
                    raise ValueError(f"{name} needs a file")
                path = Path(argument).expanduser()
                chat.save(path) if name == "/save" else chat.load(path)
                self._note(f"{len(chat.messages)} messages {'saved to' if name == '/save' else 'from'} {path}")
            case _:
                raise ValueError(f"{name} is no command; /help lists them, and // begins a text with a slash")

    def _note(self, text: str) -> None:
        self.console.print(Text(text.translate(_VISIBLE), style="dim italic"), highlight=False)


def _number(name: str, text: str, kind: type) -> int | float:
    try:
        number = kind(text)
    except ValueError:
        number = -1
    if number < 0:
        raise ValueError(f"{name} is {text!r}; give a {'whole ' if kind is int else ''}number of at least 0")
    return number


# ---------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="chat.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder or Hub name (default: the adapter's base model, or this repository)")
    parser.add_argument("--adapter", help="folder or Hub name of a PEFT adapter to put on the model")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let code that comes with the checkpoint run; this repository's own needs no such permission",
    )
    parser.add_argument(
        "--dtype", default="auto", help="of the weights, for instance float32 (default: the checkpoint's)"
    )
    parser.add_argument("--device", help="for instance cpu, cuda or auto (default: cpu)")
    parser.add_argument("--system", default="", help="system message")
    parser.add_argument("--thinking", action="store_true", help="think before answering")
    parser.add_argument(
        "--temperature", type=float, default=defaults.temperature, help=f"default {defaults.temperature}; 0 is greedy"
    )
    parser.add_argument(
        "--top-p", type=float, default=defaults.top_p, help=f"probability to sample among (default {defaults.top_p})"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=defaults.max_new_tokens,
        help=f"longest answer, in tokens (default {defaults.max_new_tokens})",
    )
    parser.add_argument("--load", type=Path, metavar="FILE", help="go on with a chat that /save wrote")
    parser.add_argument("--seed", type=int, help="seed of sampling")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    try:
        settings = Settings(args.thinking, args.temperature, args.top_p, args.max_new_tokens)
        model, tokenizer = load(args.model, args.adapter, args.trust_remote_code, args.dtype, args.device)
        chat = Chat(model, tokenizer, settings, args.system)
        if args.load is not None:
            chat.load(args.load)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False)
        return 1
    if args.seed is not None:
        set_seed(args.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"{model.config.name_or_path}: {parameters / 1e6:,.1f} million parameters, reads {chat.context:,} tokens. "
        "/help lists the commands.",
        highlight=False,
        markup=False,
    )
    Terminal(chat, console).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
