"""A chat in the terminal with any checkpoint that has a chat template.

    python chat.py                                        # the model in this folder
    python chat.py --model path/or/hub-name --trust-remote-code
    python chat.py --adapter runs/my-adapter              # a PEFT adapter on its base model
    python chat.py --prompt "One question"                # one answer, for scripts
    python chat.py --prompt "Summarise this:" - < text.txt
    python chat.py --prefix manual.safetensors            # a long text, read before (python -m tools.prefix)

Answers stream as they are written, thinking apart and dim. Ctrl-C stops an answer and keeps the part that is written;
`/help` lists the commands. The cache of the chat is kept, so a turn reads only the tokens that are new. What is typed or loaded
from a file never becomes a control token (tokenization/safe_chat.py). A chat that no longer fits the model's context is
refused with the remedy; nothing is forgotten unless `/drop` or `/clear` say so.

With `--prompt`, or with input that is no terminal, there is one answer: it alone is written to stdout, and thinking and
statistics to stderr. Exit codes: 0 the answer is whole, 3 it was cut by --max-new-tokens or the context, 1 an error, 2
wrong options, 130 Ctrl-C.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.command import Parser, run_command
from common.extras import extra
from common.names import check_model_name
from common.settings import Settings

with extra("serve"):
    from rich.console import Console
    from rich.text import Text

if TYPE_CHECKING:
    from serving.conversation import Chat, Piece

try:
    import readline  # gives `input` history, editing, pasted lines as one text, and lines above 4,096 bytes
except ImportError:  # on Windows, whose terminal does it itself
    readline = None

CUT = 3  # exit code of one answer that is not whole
# Control characters, which could move the cursor or change the terminal, become their pictures.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
# Commands that set a number of the settings.
_NUMBERS = {
    "/temperature": ("temperature", float),
    "/top-p": ("top_p", float),
    "/top-k": ("top_k", int),
    "/min-p": ("min_p", float),
    "/repetition-penalty": ("repetition_penalty", float),
    "/tokens": ("max_new_tokens", int),
}


# ---------------------------------------------------------------- the terminal

HELP = """\
/help                this list
/clear               forget what was said
/retry               answer the last text again
/drop [N]            forget the N oldest turns (1)
/system [TEXT]       set the system message; without a text, remove it
/thinking on|off     whether the model thinks before it answers
/temperature NUMBER  of sampling; 0 takes the likeliest token
/top-p, /top-k, /min-p, /repetition-penalty NUMBER
                     as the options of these names (chat.py --help)
/tokens N            longest answer, in tokens
/stats               what the last answer took, the context and the cache
/save FILE           write the chat as JSON
/load FILE           go on with a saved chat
/exit, /quit         leave, as does Ctrl-D

Ctrl-C stops an answer and keeps the chat. A line of three quotation marks
(\""") begins a text of several lines, another one ends it. A text that begins
with a slash is said with two of them."""


class Terminal:
    """Reads lines, obeys commands and shows answers.

    Args:
        chat: the conversation; if it has tools, the user says what they return.
        console: where to write.
        read: prompt -> a line; raises EOFError at the end, KeyboardInterrupt at Ctrl-C.
    """

    def __init__(self, chat: "Chat", console: Console, read: Callable[[str], str] = input):
        self.chat = chat
        self.console = console
        self.read = read

    def run(self) -> None:
        """Talk until the user leaves."""
        while True:
            try:
                text = self._read_text()
                if text.startswith("/") and not text.startswith("//"):
                    if text.split()[0] in ("/exit", "/quit"):
                        return
                    self._obey(text)
                elif text.strip():
                    self._answer(self.chat.answer(text.removeprefix("/")))
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:
                self._note("\nCtrl-D or /exit leaves")
            except (ValueError, OSError) as error:
                self._note(f"{error}")

    def _read_text(self, prompt: str = "> ") -> str:
        line = self.read(prompt)
        if line.strip() != '"""':
            return line
        lines = []
        while (line := self.read("… ")).strip() != '"""':
            lines.append(line)
        text = "\n".join(lines)
        return "/" + text if text.startswith("/") else text  # quoted, so no command

    def _answer(self, pieces: Iterator["Piece"]) -> None:
        """Show an answer, and as long as it calls tools, ask what they return and show the next."""
        self._show(pieces)
        while self.chat.tools and (calls := self.chat.open_calls):
            self._show(self.chat.answer_results([self._read_text(f"{call.name} returns> ") for call in calls]))

    def _show(self, pieces: Iterator["Piece"]) -> None:
        thought = False
        with closing(pieces):
            try:
                for piece in pieces:
                    if thought and not piece.thinking:
                        self.console.print("\n")
                    thought = piece.thinking
                    self._print(piece.text, "dim" if piece.thinking else "")
                    if piece.call:
                        self._print(f"{piece.call.name}({piece.call.arguments})\n", "bold")
            except KeyboardInterrupt:
                pass
        self.console.print()
        stats = self.chat.stats
        if stats.ended == "interrupted" and not stats.new_tokens:
            self._note("stopped before the first token; the chat is as before")
        else:
            self._note(summary(self.chat))

    def _print(self, text: str, style: str) -> None:
        self.console.print(Text(text.translate(_VISIBLE), style=style), end="", soft_wrap=True, highlight=False)

    def show_loaded(self) -> None:
        """Show where a loaded chat stands: its last texts; all of the user's can be had again by the arrow keys."""
        for message in self.chat.messages:
            if readline is not None and message["role"] == "user":
                readline.add_history(message["content"])
        last = max((i for i, message in enumerate(self.chat.messages) if message["role"] == "user"), default=0)
        for message in self.chat.messages[last:]:
            self._print(f"{'> ' if message['role'] == 'user' else ''}{message['content']}\n", "dim")

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
            case "/retry":
                self._answer(chat.retry())
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
            case _ if name in _NUMBERS:
                field, kind = _NUMBERS[name]
                chat.settings = replace(settings, **{field: _number(name, argument, kind)})
                self._note(f"{field} is {getattr(chat.settings, field):g}")
            case "/stats":
                self._note(summary(chat))
            case "/save" | "/load":
                if not argument:
                    raise ValueError(f"{name} needs a file")
                path = Path(argument).expanduser()
                try:
                    chat.save(path) if name == "/save" else chat.load(path)
                except OSError as error:
                    verb = "written" if name == "/save" else "read"
                    raise ValueError(f"{path} cannot be {verb}: {error.strerror or error}") from error
                if name == "/load":
                    self.show_loaded()
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


def summary(chat: "Chat") -> str:
    """What the last answer took."""
    stats, used = chat.stats, chat.tokens()
    return (
        f"{stats.new_tokens} tokens, {stats.tokens_per_second:.1f} a second, {stats.ended} · read "
        f"{stats.prompt_tokens - stats.reused_tokens} of {stats.prompt_tokens} prompt tokens · context {used} of "
        f"{chat.context} ({used / chat.context:.0%}) · cache {chat.cache_bytes():,} bytes"
    )


def answer_once(chat: "Chat", text: str) -> int:
    """Write one answer to stdout, calls of tools as one JSON object a line, and all else to stderr -> the exit code.

    Raises:
        ValueError: the text does not fit the context, or is no Unicode text.
    """
    from serving.conversation import FINISHED

    visible = _VISIBLE if sys.stdout.isatty() else {}
    with closing(chat.answer(text)) as pieces:
        for piece in pieces:
            written = json.dumps(piece.call._asdict(), ensure_ascii=False) + "\n" if piece.call else piece.text
            print(written.translate(visible), end="", flush=True, file=sys.stderr if piece.thinking else sys.stdout)
    print(flush=True)
    print(summary(chat), file=sys.stderr)
    return 0 if chat.stats.ended == FINISHED else CUT


# ---------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """Define the command line. Settings that are not given are None, so that those of a loaded chat stay."""
    defaults = Settings()
    parser = Parser(prog="chat.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--prompt",
        nargs="+",
        metavar="TEXT",
        help="write one answer to this and leave; several texts are joined by empty lines, and - is what stdin has",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="folder or Hub name (default: the adapter's base model, or this repository)")
    model.add_argument("--adapter", help="folder or Hub name of a PEFT adapter to put on the model")
    model.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let code that comes with the checkpoint run; this repository's own needs no such permission",
    )
    model.add_argument(
        "--dtype", default="auto", help="of the weights, for instance float32 (default: the checkpoint's)"
    )
    model.add_argument("--device", help="for instance cpu, cuda or auto (default: cpu)")
    chat = parser.add_argument_group("chat")
    chat.add_argument("--system", help="system message")
    chat.add_argument(
        "--prefix", type=Path, metavar="FILE", help="begin with the text of a file that tools.prefix wrote"
    )
    chat.add_argument("--tools", type=Path, metavar="FILE", help="JSON list of functions that the model may call")
    chat.add_argument("--load", type=Path, metavar="FILE", help="continue a chat that /save wrote")
    chat.add_argument("--thinking", action=argparse.BooleanOptionalAction, help="think before answering (default: no)")
    sampling = parser.add_argument_group("sampling")
    for field, kind, meaning in (
        ("temperature", float, "0 takes the likeliest token"),
        ("top_p", float, "sample among the likeliest tokens that have this probability together"),
        ("top_k", int, "sample among this many likeliest tokens; 0 is no limit"),
        ("min_p", float, "sample among tokens with this share of the likeliest one's probability"),
        ("repetition_penalty", float, "above 1, tokens that occurred become less likely"),
        ("max_new_tokens", int, "longest answer, in tokens, thinking included"),
    ):
        name = f"--{field.replace('_', '-')}"
        sampling.add_argument(name, type=kind, help=f"{meaning} (default {getattr(defaults, field):g})")
    sampling.add_argument("--seed", type=int, help="seed of sampling")
    return parser


def read_prompt(parts: list[str] | None) -> str | None:
    """The one text to answer; None where somebody sits at the terminal.

    Raises:
        ValueError: it is empty.
    """
    if parts is None and sys.stdin.isatty():
        return None
    text = "\n\n".join(sys.stdin.read().strip("\n") if part == "-" else part for part in parts or ["-"])
    if not text.strip():
        raise ValueError("there is nothing to answer; give a text with --prompt, or write one to stdin")
    return text


def read_tools(path: Path) -> list[dict]:
    """The functions of a JSON file; what a schema must have is checked when the chat is made.

    Raises:
        ValueError: it is no JSON list.
    """
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--tools {path} is not JSON ({error})") from error
    if not isinstance(tools, list) or not tools:
        raise ValueError(f'--tools {path} must be a list of functions: [{{"name": ..., "parameters": {{...}}}}, ...]')
    return tools


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        for name, value in (("--model", args.model), ("--adapter", args.adapter)):
            if value is not None:
                check_model_name(value, name)
        given = {field.name: getattr(args, field.name) for field in fields(Settings)}
        given = {name: value for name, value in given.items() if value is not None}
        settings = Settings(**given)
        tools = None if args.tools is None else read_tools(args.tools)
        if args.load is not None and not args.load.is_file():
            raise ValueError(f"--load {args.load}: there is no such file")
        if args.prefix is not None and not args.prefix.is_file():
            raise ValueError(f"--prefix {args.prefix}: there is no such file; make one with python -m tools.prefix")
        if args.prefix is not None and (args.system is not None or args.load is not None):
            raise ValueError("--prefix has a system message of its own; leave --system and --load away")
        prompt = read_prompt(args.prompt)
        base = args.model or ("the adapter's base model" if args.adapter else "the model of this repository")
        adapter = f" with the adapter {args.adapter}" if args.adapter else ""
        print(f"loading {base}{adapter} ...", file=sys.stderr)
        chat = load_chat(args, settings, tools)
        if args.prefix is not None:
            chat.load_prefix(args.prefix)
        if args.load is not None:
            chat.load(args.load)
            chat.settings = replace(chat.settings, **given)
            chat.system = chat.system if args.system is None else args.system
        if prompt is not None:
            return answer_once(chat, prompt)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 1
    console = Console()
    parameters = sum(parameter.numel() for parameter in chat.model.parameters())
    console.print(
        f"{chat.model.config.name_or_path}{adapter}: {parameters / 1e6:,.1f} million parameters, reads {chat.context:,} tokens. "
        "/help lists the commands.",
        highlight=False,
        markup=False,
    )
    terminal = Terminal(chat, console)
    if args.load is not None:
        terminal.show_loaded()
    terminal.run()
    return 0


def load_chat(args: argparse.Namespace, settings: Settings, tools: list[dict] | None) -> "Chat":
    """The model of the command line, ready to talk. Here, not above, so that wrong options are said before torch comes."""
    with extra("serve"):
        from transformers import set_seed
        from transformers.utils import logging

        from common import loading
        from serving.conversation import Chat

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, tokenizer = loading.load(args.model, args.adapter, args.trust_remote_code, args.dtype, args.device)
    if args.seed is not None:
        set_seed(args.seed)
    return Chat(model, tokenizer, settings, args.system or "", tools)


if __name__ == "__main__":
    run_command(main)
