"""A user's data: formats that are told apart, checked with file and line, and rendered into tokens with a loss mask.

    messages            {"messages": [{"role", "content", ...}, ...], "tools": [...]}; OpenAI's form. An assistant's message
                        may have "reasoning" (or "reasoning_content") and "tool_calls". In all formats an answer of the
                        form <think>...</think>... is read as reasoning and content
    alpaca              {"instruction", "input" (may be absent), "output", "system" (may be absent)}
    sharegpt            {"conversations": [{"from": "human" | "gpt" | "system" | "tool", "value"}, ...], "system", "tools"}
    prompt-completion   {"prompt", "completion"}: plain text without chat template, or two lists of messages
    qa                  {"question", "answer"}, as GSM8K has them
    preference          {"prompt", "chosen", "rejected"}, each text or a list of messages; without "prompt", "chosen" and
                        "rejected" are whole conversations that begin alike
    text                {"text"}, or a .txt file, which is one document

After reading there are four forms: a chat (`messages`, perhaps `tools`), a prompt with its completion, a text, a
preference. Other keys of a record stay with it.

Shapes: B examples, S tokens of the longest one.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from common.command import no_command
from tokenization.plain import PlainEncoder
from tokenization.safe_chat import MESSAGE_FIELDS, encode_chat

IGNORED_LABEL = -100  # the label that every transformers loss skips
ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"},
    **{"system": "system", "tool": "tool", "observation": "tool"},
}
_ERRORS_SHOWN = 5
_THINK = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)
_SUFFIXES = (".jsonl", ".json", ".txt")


# ---------------------------------------------------------------- files


def write_jsonl(records: Iterable[dict], path: Path) -> None:
    """Write one record a line; the file is complete or absent."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    os.replace(partial, path)


def read_examples(sources: Sequence[str | Path], format: str = "auto") -> list[dict]:
    """Read files or named datasets and check every record.

    Args:
        sources: paths of .jsonl, .json and .txt files, or names for `datasets.load_dataset`, NAME[:CONFIG][:SPLIT].
        format: a format's name, or "auto" to tell by the keys of each source's first record.

    Raises:
        FileNotFoundError: a source is neither a file nor a dataset that can be loaded.
        ValueError: records are malformed; the message names the source, the line and the remedy of the first few.
    """
    examples, errors, total = [], [], 0
    for source in map(str, sources):
        chosen = format
        for where, record in _records(source):
            total += 1
            try:
                if isinstance(record, ValueError):
                    raise record
                if chosen == "auto":
                    chosen = detect_format(record)
                examples.append(normalise(record, chosen))
            except ValueError as error:
                errors.append(f"{where}: {error}")
    if errors:
        more = f"\nand {len(errors) - _ERRORS_SHOWN} more" if len(errors) > _ERRORS_SHOWN else ""
        raise ValueError(
            f"{len(errors)} of {total} records are malformed:\n" + "\n".join(errors[:_ERRORS_SHOWN]) + more
        )
    if not examples:
        raise ValueError(
            f"{', '.join(map(str, sources))} has no examples; docs/finetuning.md shows the formats under Data"
        )
    return examples


def _records(source: str) -> Iterator[tuple[str, object]]:
    """(where, record or the ValueError that reading it gave) of a source."""
    path = Path(source)
    if path.suffix == ".txt" and path.is_file():
        yield source, {"text": path.read_text(encoding="utf-8")}
    elif path.suffix == ".json" and path.is_file():
        try:
            records = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{source} is no JSON: {error}") from error
        if not isinstance(records, list):
            raise ValueError(
                f"{source} holds a {type(records).__name__}; it must hold a list of records, or be .jsonl"
            )
        yield from ((f"{source}, record {i}", record) for i, record in enumerate(records, start=1))
    elif path.is_file():
        with open(path, "rb") as file:  # bytes, so that a wrong encoding is reported with its line
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield f"{source}, line {number}", json.loads(line.rstrip(b"\r\n"))
                    except json.JSONDecodeError as error:  # its own line is that of the record, always 1
                        yield f"{source}, line {number}", ValueError(f"is no JSON: {error.msg}, column {error.colno}")
                    except ValueError as error:  # encoding errors are ValueErrors too
                        yield f"{source}, line {number}", ValueError(str(error))
    elif path.suffix in _SUFFIXES or path.exists():
        raise FileNotFoundError(
            f"data file {source} does not exist; pass a .jsonl, .json or .txt file or a dataset's name"
        )
    else:
        yield from _named_dataset(source)


def _named_dataset(source: str) -> Iterator[tuple[str, object]]:
    from datasets import load_dataset

    name, *rest = source.split(":")
    config, split = (rest[0] if len(rest) > 1 else None), (rest[-1] if rest else "train")
    try:
        rows: Any = load_dataset(name, config, split=split)
    except Exception as error:  # the library raises many kinds, all of them mean the same here
        raise FileNotFoundError(
            f"{source!r} is no file, and `datasets` cannot load it either ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); pass a file or NAME[:CONFIG][:SPLIT]"
        ) from error
    for i, row in enumerate(rows):
        yield f"{source}, row {i}", {key: value for key, value in row.items() if value is not None}


# ---------------------------------------------------------------- formats


def detect_format(record: object) -> str:
    """The name of a record's format, by its keys. Raises ValueError if none fits."""
    if not isinstance(record, dict):
        raise ValueError(f"is a {type(record).__name__}; each record must be an object")
    for name, keys in (
        ("preference", {"chosen", "rejected"}),
        ("messages", {"messages"}),
        ("sharegpt", {"conversations"}),
        ("alpaca", {"instruction", "output"}),
        ("prompt-completion", {"prompt", "completion"}),
        ("qa", {"question", "answer"}),
        ("text", {"text"}),
    ):
        if keys <= set(record):
            return name
    raise ValueError(
        f"has the keys {sorted(record)}, which no format has; e.g. `messages`, `instruction` and `output`, "
        "`conversations`, `prompt` and `completion`, `question` and `answer`, `text`, `chosen` and `rejected`"
    )


def normalise(record: object, format: str) -> dict:
    """A record of a known format -> chat, prompt with completion, text or preference. Raises ValueError if malformed."""
    if not isinstance(record, dict):
        raise ValueError(f"is a {type(record).__name__}; each record must be an object")
    keys = {
        "messages": ("messages", "tools"),
        "alpaca": ("instruction", "input", "output", "system", "history"),
        "sharegpt": ("conversations", "system", "tools"),
        "prompt-completion": ("prompt", "completion"),
        "qa": ("question", "answer"),
        "preference": ("prompt", "chosen", "rejected"),
        "text": ("text",),
    }[format]
    extra = {key: value for key, value in record.items() if key not in keys}
    return {**extra, **_FORMATS[format](record)}


def _from_messages(record: dict) -> dict:
    return _chat(_messages(record.get("messages"), "messages"), record.get("tools"))


def _from_alpaca(record: dict) -> dict:
    question = _text(record, "instruction")
    if record.get("input"):
        question += "\n\n" + _text(record, "input")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": _text(record, "output")}]
    for past in reversed(record.get("history") or []):
        messages = [{"role": "user", "content": past[0]}, {"role": "assistant", "content": past[1]}, *messages]
    return _chat(_with_system(record, _messages(messages, "alpaca")))


def _from_sharegpt(record: dict) -> dict:
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"`conversations` is {_shown(turns)}; it must be a non-empty list")
    messages = []
    for i, turn in enumerate(turns):
        sender = turn.get("from") if isinstance(turn, dict) else None
        if sender not in _SHAREGPT_ROLES:
            raise ValueError(f"`from` of turn {i} is {_shown(sender)}; use one of {', '.join(_SHAREGPT_ROLES)}")
        messages.append({"role": _SHAREGPT_ROLES[sender], "content": turn.get("value")})
    return _chat(_with_system(record, _messages(messages, "conversations")), record.get("tools"))


def _from_prompt_completion(record: dict) -> dict:
    if isinstance(record.get("prompt"), list):
        messages = [*record["prompt"], *_as_messages(record.get("completion"), "assistant")]
        return _chat(_messages(messages, "prompt and completion"))
    if not _text(record, "completion").strip():
        raise ValueError("`completion` is empty; there is nothing to learn from it")
    return {"prompt": _text(record, "prompt"), "completion": record["completion"]}


def _from_qa(record: dict) -> dict:
    question, answer = _text(record, "question"), record.get("answer")
    answer = (
        str(answer) if isinstance(answer, int | float) and not isinstance(answer, bool) else _text(record, "answer")
    )
    return _chat(_messages([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], "qa"))


def _from_preference(record: dict) -> dict:
    chosen = _as_messages(record.get("chosen"), "assistant")
    rejected = _as_messages(record.get("rejected"), "assistant")
    if "prompt" in record:
        prompt = _as_messages(record["prompt"], "user")
    else:
        same = 0
        while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
            same += 1
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        if not prompt:
            raise ValueError("has no `prompt`, and `chosen` and `rejected` do not begin with the same messages")
    asked = len(prompt)
    whole, other = _messages([*prompt, *chosen], "chosen"), _messages([*prompt, *rejected], "rejected")
    prompt, chosen, rejected = whole[:asked], whole[asked:], other[asked:]
    if chosen == rejected:
        raise ValueError("`chosen` and `rejected` are the same; there is nothing to prefer")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _from_text(record: dict) -> dict:
    if not _text(record, "text").strip():
        raise ValueError("`text` is empty")
    return {"text": record["text"]}


_FORMATS = {
    "messages": _from_messages,
    "alpaca": _from_alpaca,
    "sharegpt": _from_sharegpt,
    "prompt-completion": _from_prompt_completion,
    "qa": _from_qa,
    "preference": _from_preference,
    "text": _from_text,
}


def _chat(messages: list[dict], tools=None) -> dict:
    if isinstance(tools, str):  # sharegpt files hold them as JSON in a string
        tools = json.loads(tools) if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"`tools` is {_shown(tools)}; it must be a list of functions")
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}


def _with_system(record: dict, messages: list[dict]) -> list[dict]:
    return [{"role": "system", "content": _text(record, "system")}, *messages] if record.get("system") else messages


def _as_messages(value, role: str) -> list[dict]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value if isinstance(value, list) else []


def _messages(messages: object, what: str) -> list[dict]:
    """Check a conversation that ends with the assistant; unify what has several spellings."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`{what}` is {_shown(messages)}; it must be a non-empty list of messages")
    unified = []
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        role = "system" if role == "developer" else role
        if role not in ROLES:
            raise ValueError(f"role of message {i} is {_shown(role)}; use one of {', '.join(ROLES)}")
        content, calls = message.get("content"), message.get("tool_calls")
        if isinstance(content, list) and all(
            isinstance(part, dict) and part.get("type") == "text" for part in content
        ):
            content = "".join(part.get("text", "") for part in content)
        if content is None and calls:
            content = ""
        if not isinstance(content, str):
            raise ValueError(f"content of message {i} is {_shown(content)}; it must be a string")
        kept = {
            key: value
            for key, value in message.items()
            if key not in ("role", "content", "reasoning") and value is not None
        }
        reasoning = message.get("reasoning_content", message.get("reasoning"))
        if reasoning is not None:
            if role != "assistant" or not isinstance(reasoning, str):
                raise ValueError(
                    f"reasoning of message {i} is {_shown(reasoning)} by {role!r}; only the assistant's, as text"
                )
            kept["reasoning_content"] = reasoning
        elif role == "assistant" and (thought := _THINK.fullmatch(content)):
            # Chat templates leave the thinking in a content out, since they are for turns that are past.
            content = thought[2]
            if thought[1].strip():
                kept["reasoning_content"] = thought[1].strip()
        unified.append({"role": role, "content": content, **kept})
    last = unified[-1]
    if last["role"] != "assistant":
        raise ValueError(f"the last message is by {last['role']!r}; it must be the assistant's answer")
    if not last["content"].strip() and not last.get("tool_calls"):
        raise ValueError("the assistant's last answer is empty; there is nothing to learn from it")
    return unified


def _text(record: dict, key: str) -> str:
    if not isinstance(record.get(key), str):
        raise ValueError(f"`{key}` is {_shown(record.get(key))}; it must be a string")
    return record[key]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------- questions


def question_and_answer(example: dict) -> tuple[dict, str]:
    """Split an example into what is asked (a chat or a prompt, without answer) and the text of the answer.

    Raises:
        ValueError: it asks nothing (a plain text or a preference), or a tool call answers it, which has no text.
    """
    if "completion" in example:
        return {"prompt": example["prompt"]}, example["completion"].strip()
    if "messages" in example:
        if not example["messages"][-1]["content"].strip():
            raise ValueError("an example ends with a tool call; to compare answers it must end with text")
        asked = {"tools": example["tools"]} if "tools" in example else {}
        if template_arguments(example):
            asked["thinking"] = True
        return {"messages": example["messages"][:-1], **asked}, example["messages"][-1]["content"].strip()
    raise ValueError(f"an example with the keys {sorted(example)} has no question and answer")


def split_examples(examples: list[dict], held_out_fraction: float) -> tuple[list[dict], list[dict]]:
    """Hold out about a fraction of the examples, by a hash of what they ask (of a text: of itself).

    Examples that ask the same are on the same side, and an example stays on its side when the file grows.

    Raises:
        ValueError: one side would be empty.
    """
    train, held_out = [], []
    for example in examples:
        asked = example.get("text", example.get("prompt")) or example["messages"][:-1]
        digest = hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=8).digest()
        is_held_out = int.from_bytes(digest, "big") < held_out_fraction * 2**64
        (held_out if is_held_out else train).append(example)
    if not train or not held_out:
        raise ValueError(
            f"of {len(examples)} examples a held-out fraction of {held_out_fraction} leaves {len(train)} to train on and "
            f"{len(held_out)} held out; give more examples, another eval_fraction or eval_data"
        )
    return train, held_out


# ---------------------------------------------------------------- tokens


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless the chat template marks what the assistant says, so that the loss can be limited to it."""
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise ValueError("the tokenizer has no chat template; add a chat_template.jinja to its folder")
    if not re.search(r"\{%-?\s*generation\b", template):
        raise ValueError(
            "the chat template has no {% generation %} ... {% endgeneration %} around the assistant's words, so the loss "
            "cannot be limited to them; add the two markers to chat_template.jinja"
        )


def template_messages(example: dict, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """The messages as the tokenizer's template wants them: reasoning goes into the content where it has no place of its own.

    Raises:
        ValueError: the example has tools, and the template does not know any.
    """
    template = str(tokenizer.chat_template)
    messages = example["messages"]
    uses_tools = example.get("tools") or any(
        message["role"] == "tool" or message.get("tool_calls") for message in messages
    )
    if uses_tools and "tool" not in template:
        raise ValueError(
            "an example has tools, but the chat template has no place for them; use another chat_template.jinja"
        )
    if "reasoning_content" in template:
        return messages
    moved = []
    for message in messages:
        reasoning = message.get("reasoning_content")
        rest = {key: value for key, value in message.items() if key != "reasoning_content"}
        moved.append(
            rest if reasoning is None else {**rest, "content": f"<think>{reasoning}</think>{message['content']}"}
        )
    return moved


def template_arguments(example: dict) -> dict[str, Any]:
    """What the template is told besides the messages: `thinking` where the last answer has reasoning, as V3.1's wants it."""
    thinks = example.get("thinking") or "reasoning_content" in example["messages"][-1]
    return {"thinking": True} if thinks else {}


def _strings(value: object) -> Iterator[str]:
    """All strings in lists and dicts, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _strings(part)


def _encode(example: dict, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False, **more) -> Any:
    """`apply_chat_template` to a chat, in which no text becomes a control token.

    Only a template with a place for reasoning is protected: elsewhere `<think>` in an answer is the model's own.
    """
    messages, tools, arguments = (
        template_messages(example, tokenizer),
        example.get("tools"),
        template_arguments(example),
    )
    spells = PlainEncoder(tokenizer).has_control_tokens
    if "reasoning_content" in str(tokenizer.chat_template) and any(map(spells, _strings([messages, tools]))):
        known = [{key: message[key] for key in MESSAGE_FIELDS if key in message} for message in messages]
        return encode_chat(tokenizer, known, tools, add_generation_prompt=add_generation_prompt, **arguments)
    return tokenizer.apply_chat_template(
        messages,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=True,
        **arguments,
        **more,
    )


def render(example: dict, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Tokens and labels of an example; what the loss does not count has the label -100.

    Counted are, of a chat, the assistant's words with their end token, of a prompt with completion the completion and an
    end token, of a text everything and an end token.

    Raises:
        ValueError: the tokenizer's chat template is missing, marks nothing, or refuses the example.
    """
    if "text" in example or "completion" in example:
        ids = tokenizer(example.get("text", example.get("prompt", "")))["input_ids"]
        if "text" in example:
            encode = PlainEncoder(tokenizer)
            if encode.has_control_tokens(example["text"]):
                ids = [*tokenizer("")["input_ids"], *encode(example["text"])]
            ids = [*ids, tokenizer.eos_token_id]
            return {"input_ids": ids, "labels": list(ids)}
        completion = tokenizer(example["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return {"input_ids": ids + completion, "labels": [IGNORED_LABEL] * len(ids) + completion}
    check_template(tokenizer)
    try:
        rendered = _encode(example, tokenizer, return_assistant_tokens_mask=True)
    except Exception as error:  # jinja's own, raised by templates for roles and orders they do not know
        raise ValueError(f"the chat template refuses an example: {error}") from error
    ids, mask = rendered["input_ids"], rendered["assistant_masks"]
    labels = [token if wrote else IGNORED_LABEL for token, wrote in zip(ids, mask, strict=True)]
    if all(label == IGNORED_LABEL for label in labels):
        raise ValueError(
            "the chat template marks no token of an example as the assistant's; see its generation markers"
        )
    reasoning = example["messages"][-1].get("reasoning_content", "").strip()
    if reasoning not in tokenizer.decode(ids):
        raise ValueError(
            "the chat template leaves out the last answer's reasoning; put it into the content, in <think> tags"
        )
    return {"input_ids": ids, "labels": labels}


def token_ids(example: dict, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of an example that is read and not learnt: without a mask, so any chat template does.

    Raises:
        ValueError: the tokenizer has no chat template, or it refuses the example.
    """
    if "messages" not in example:
        return render(example, tokenizer)["input_ids"]
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; add a chat_template.jinja to its folder")
    try:
        return _encode(example, tokenizer)["input_ids"]
    except Exception as error:  # jinja's own, raised by templates for roles and orders they do not know
        raise ValueError(f"the chat template refuses an example: {error}") from error


def lost_text(messages: list[dict], tokenizer: PreTrainedTokenizerBase, **arguments) -> tuple[str, str] | None:
    """The first words of an assistant that the chat template leaves out: ("reasoning" or "content", text); None if all
    are there.

    Args:
        messages: a conversation, as the readers make it.
        arguments: what `apply_chat_template` is given besides.
    """
    text: Any = tokenizer.apply_chat_template(
        template_messages({"messages": messages}, tokenizer), tokenize=False, **arguments
    )
    position = 0
    for message in messages:
        if message["role"] != "assistant":
            continue
        for part, name in (("reasoning", "reasoning_content"), ("content", "content")):
            words = message.get(name, "").strip()
            found = text.find(words, position)
            if found < 0:
                return part, words
            position = found + len(words)
    return None


_REMEDIES = {
    "reasoning": "it is read only where a turn is the last and reasoning opens it; to learn the reasoning of another turn, "
    "end an example with that turn",
    "content": "if it is thinking, let the content begin with <think>, or put the thinking into `reasoning_content`",
}


def warn_of_lost_text(examples: Sequence[dict], tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn of assistants' words in chats and preferences that will not be learned because the template drops them."""
    lost: dict[str, list[str]] = {part: [] for part in _REMEDIES}
    for example in examples:
        chats = [example["messages"]] if "messages" in example else []
        chats += [[*example["prompt"], *example[side]] for side in ("chosen", "rejected") if side in example]
        for messages in chats:
            arguments = template_arguments({"messages": chats[0]})  # a preference's two sides share the prompt
            if found := lost_text(messages, tokenizer, tools=example.get("tools"), **arguments):
                lost[found[0]].append(found[1])
                break
    for part, texts in lost.items():
        if texts:
            warnings.warn(
                f"{len(texts)} of {len(examples)} examples lose {part} that is to be learned, e.g. {_shown(texts[0])}, "
                f"since the chat template leaves it out: {_REMEDIES[part]}",
                stacklevel=2,
            )


def render_all(
    examples: Sequence[dict], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[dict[str, list[int]]]:
    """Render examples; those longer than `max_tokens` are left out with a warning, since a cut answer would teach to stop
    in the middle. Plain texts are cut into pieces instead.

    Raises:
        ValueError: nothing is left, or as in `render`.
    """
    kept, too_long, shortest = [], 0, None
    for example in examples:
        row = render(example, tokenizer)
        length = len(row["input_ids"])
        if "text" in example:
            starts = range(0, length - 1, max_tokens)
            kept += [{key: value[start : start + max_tokens] for key, value in row.items()} for start in starts]
        elif length <= max_tokens:
            kept.append(row)
        else:
            too_long += 1
            shortest = min(length, shortest or length)
    if not kept:
        raise ValueError(f"no example has at most {max_tokens} tokens (the shortest has {shortest}); raise max_tokens")
    if too_long:
        warnings.warn(
            f"{too_long} of {len(examples)} examples have more than {max_tokens} tokens and are left out; raise max_tokens "
            "to keep them",
            stacklevel=2,
        )
    return kept


def prompt_ids(question: dict, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a question (from `question_and_answer`), up to where the answer begins."""
    if "prompt" in question:
        return tokenizer(question["prompt"])["input_ids"]
    return _encode(question, tokenizer, add_generation_prompt=True)["input_ids"]


def collate(rows: Sequence[dict[str, list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad rendered examples on the right -> input_ids, attention_mask, labels, each int64 [B, S]."""
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (longest - len(values))

    return {
        "input_ids": torch.tensor([pad(row["input_ids"], pad_token_id) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor([pad(row["labels"], IGNORED_LABEL) for row in rows]),
    }


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to fill with; masked everywhere, so the end token does where there is no other."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def preview(row: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """Print a rendered example: green is what the loss counts, dim what it does not; special tokens are shown."""
    text, counted = Text(), None
    part: list[Any] = []
    for token, label in [*zip(row["input_ids"], row["labels"], strict=True), (None, None)]:
        if (
            label != IGNORED_LABEL
        ) != counted or token is None:  # decode whole stretches: a character may be many tokens
            text.append(str(tokenizer.decode(part)), style="bold green" if counted else "dim")
            part, counted = [], label != IGNORED_LABEL
        part.append(token)
    trained = sum(label != IGNORED_LABEL for label in row["labels"])
    console.rule(f"one example: {len(row['labels'])} tokens, the loss counts the {trained} in green")
    console.print(text, soft_wrap=True)
    console.rule()


if __name__ == "__main__":
    no_command("fine-tune by python -m finetune.sft, .dpo or .grpo")
