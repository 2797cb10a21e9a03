"""What requests of OpenAI's protocol may say, and how they are refused.

Every field has a check. A field whose value asks for what is done anyway is accepted; one that asks for what cannot be
done is refused by name. So nothing that a client asks for is ignored without a word.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_CHOICES = 32
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_MESSAGES = 4096
MAX_TOOLS = 256
MAX_PROMPTS = 256
DEFAULT_COMPLETION_TOKENS = 16  # the protocol's
GREEDY_BELOW = 1e-5  # logits divided by a smaller temperature would be infinite


class RequestError(ValueError):
    """A request that is refused, as the protocol says it.

    Args:
        message: what is wrong and what is allowed.
        param: name of the field.
        code: the protocol's word for the error.
        status: of HTTP.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


def error_body(message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None):
    """The protocol's form of an error."""
    # Both may quote what has no UTF-8.
    message, param = (text and text.encode("utf-8", "backslashreplace").decode("utf-8") for text in (message, param))
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Sampling:
    """How one answer is written. None means the model's own setting.

    max_tokens: most tokens that are written.
    temperature, top_p, top_k, min_p: of sampling; a temperature of 0 takes the likeliest token; top_k of 0 or less takes
        all.
    repetition_penalty: divides the logits of what prompt and answer hold.
    presence_penalty, frequency_penalty: are taken from the logits of what the answer holds, once and for each time.
    logit_bias: is added, by id of the token.
    seed: of the random numbers.
    logprobs: how many of the likeliest tokens are told with each token; None tells no probabilities at all.
    prompt_logprobs: whether those of the prompt's tokens are told.
    grammar: what the content must match, as `Grammars` has it.
    """

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False
    grammar: str | None = None


# ---------------------------------------------------------------- fields


def _is_number(value: object) -> bool:
    return (isinstance(value, float) and math.isfinite(value)) or _is_whole(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def is_text(value: object) -> bool:
    """Whether it is Unicode text of at least one character; JSON can also say half a surrogate pair, which is none."""
    return (
        isinstance(value, str) and len(value) > 0 and not any("\ud800" <= character <= "\udfff" for character in value)
    )


def _is_stop(value: object) -> bool:
    texts = [value] if isinstance(value, str) else value
    return (
        isinstance(texts, list)
        and len(texts) <= MAX_STOPS
        and all(is_text(text) and len(text) <= MAX_STOP_CHARACTERS for text in texts)
    )


def _number(low: float, high: float) -> tuple[Callable, str]:
    return lambda value: _is_number(value) and low <= value <= high, f"a number from {low:g} to {high:g}"


def _whole(low: int, high: int) -> tuple[Callable, str]:
    return lambda value: _is_whole(value) and low <= value <= high, f"a whole number from {low} to {high}"


def _one_of(*allowed: object) -> tuple[Callable, str]:
    # Not `in`, which takes 1 for True.
    return (
        lambda value: any(type(value) is type(one) and value == one for one in allowed),
        "nothing but " + " or ".join(map(repr, allowed)),
    )


def _is_bias(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= MAX_BIASES
        and all(key.isascii() and key.isdigit() and len(key) < 10 for key in value)
        and all(_is_number(bias) and -100 <= bias <= 100 for bias in value.values())
    )


def _is_table_of(value: object, **checks: Callable) -> bool:
    """Whether it is a table with no other fields than these, each null or as it must be."""
    return isinstance(value, dict) and all(
        name in checks and (entry is None or checks[name](entry)) for name, entry in value.items()
    )


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_choice_of_tools(value: object) -> bool:
    return value in ("auto", "none") if isinstance(value, str) else False


def _is_format(value: object) -> bool:
    return isinstance(value, dict) and value.get("type") in ("text", "json_object", "json_schema")


# Of transformers' GenerationConfig, as `transformers chat` sends one -> the protocol's name; None has none.
GENERATION_FIELDS = {
    "max_new_tokens": "max_tokens",
    "do_sample": None,
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
    "transformers_version": None,
}


def _settings_in(text: object) -> dict | None:
    """The settings of a `generation_config` that are not null; None if it is malformed."""
    try:
        settings = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(settings, dict) or not set(settings) <= set(GENERATION_FIELDS):
        return None
    return {name: value for name, value in settings.items() if value is not None}


_TOKENS = _whole(1, 2**31 - 1)
# Field -> what it must be, and how that is said. Fields not named here are refused, so that none is ignored unnoticed.
_COMMON_FIELDS: dict[str, tuple[Callable, str]] = {
    "model": (_is_string, "the name of the model"),
    "stream": (_is_bool, "true or false"),
    "stream_options": (
        lambda value: _is_table_of(value, include_usage=_is_bool, include_obfuscation=_is_bool),
        'a table such as {"include_usage": true}',
    ),
    "max_tokens": _TOKENS,
    "temperature": _number(0, 2),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0 and up to 1"),
    "top_k": (lambda value: _is_whole(value) and -1 <= value < 2**31, "a whole number; 0 or -1 takes all tokens"),
    "min_p": _number(0, 1),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0.01, 100),
    "logit_bias": (
        _is_bias,
        f"a table of up to {MAX_BIASES} ids of tokens, as texts, with numbers from -100 to 100",
    ),
    "stop": (
        _is_stop,
        f"a Unicode text or up to {MAX_STOPS} in a list, of 1 to {MAX_STOP_CHARACTERS} characters each",
    ),
    "seed": (lambda value: _is_whole(value) and -(2**63) <= value < 2**63, "a whole number of 64 bits"),
    "n": _whole(1, MAX_CHOICES),
    "user": (_is_string, "a text"),
}
CHAT_FIELDS = _COMMON_FIELDS | {
    "messages": (
        lambda value: isinstance(value, list) and 1 <= len(value) <= MAX_MESSAGES,
        f"a list of 1 to {MAX_MESSAGES} messages",
    ),
    "tools": (
        lambda value: isinstance(value, list) and len(value) <= MAX_TOOLS,
        f"a list of up to {MAX_TOOLS} functions",
    ),
    "tool_choice": (_is_choice_of_tools, '"auto" or "none"; a call cannot be forced'),
    "parallel_tool_calls": (_is_bool, "true or false"),
    "max_completion_tokens": _TOKENS,
    "logprobs": (_is_bool, "true or false"),
    "top_logprobs": _whole(0, MAX_LOGPROBS),
    "response_format": (_is_format, "a table whose `type` is text, json_object or json_schema"),
    "reasoning_effort": _one_of("none", "minimal", "low", "medium", "high", "xhigh", "max"),
    "chat_template_kwargs": (
        lambda value: isinstance(value, dict) and set(value) <= {"thinking"} and _is_bool(value.get("thinking", True)),
        'nothing but {"thinking": true} or {"thinking": false}',
    ),
    "add_generation_prompt": (_is_bool, "true or false"),
    "continue_final_message": (_is_bool, "true or false"),
    "modalities": _one_of(["text"]),
    "store": (lambda value: value is False, "false, since nothing is stored"),
    "metadata": (
        lambda value: isinstance(value, dict) and all(_is_string(text) for text in value.values()),
        "a table of texts; nothing is done with it",
    ),
    "service_tier": _one_of("auto", "default"),
    "verbosity": _one_of("medium"),
    "generation_config": (
        lambda value: _settings_in(value) is not None,
        f"a JSON text of a table with {', '.join(GENERATION_FIELDS)}",
    ),
    "prompt_cache_key": (_is_string, "a text; nothing is done with it"),
    "safety_identifier": (_is_string, "a text; nothing is done with it"),
}
COMPLETION_FIELDS = _COMMON_FIELDS | {
    "max_tokens": _whole(0, 2**31 - 1),
    "prompt": (
        lambda value: len(list_prompts(value)) > 0,
        f"a Unicode text of at least one character, a list of ids of tokens, or a list of up to {MAX_PROMPTS} such prompts",
    ),
    "echo": (_is_bool, "true or false"),
    "logprobs": _whole(0, MAX_LOGPROBS),
    "best_of": _whole(1, MAX_CHOICES),
    "suffix": _one_of(""),
}


def check_request(body: object, fields: dict, required: str) -> dict:
    """The request without the fields that are null.

    Raises:
        RequestError: it is no table, lacks the required field, or a field is unknown or has another value than it may.
    """
    if not isinstance(body, dict):
        raise RequestError("the request must be a JSON object")
    body = {name: value for name, value in body.items() if value is not None}
    for name, value in body.items():
        if name not in fields:
            raise RequestError(f"the field {name[:80]!r} is not supported; allowed are {', '.join(fields)}", name[:80])
        is_right, meaning = fields[name]
        if not is_right(value):
            raise RequestError(f"`{name}` is {_shown(value)}; it must be {meaning}", name)
    if required not in body:
        raise RequestError(f"the field `{required}` is missing", required)
    if "top_logprobs" in body and body["top_logprobs"] and not body.get("logprobs"):
        raise RequestError("`top_logprobs` needs `logprobs`: true", "top_logprobs")
    if body.get("best_of", 1) > body.get("n", 1):
        raise RequestError("`best_of` must not be above `n`: answers are not written to be thrown away", "best_of")
    if body.get("max_tokens") == 0 and not body.get("echo"):
        raise RequestError("`max_tokens` of 0 needs `echo`: true, since nothing else is told", "max_tokens")
    return body


def spell_out(body: dict, temperature: float, end_ids: list[int]) -> dict:
    """A checked request with the settings of its `generation_config` as fields; what it says itself goes first.

    Args:
        temperature: of `do_sample`: true where no temperature is given.
        end_ids: tokens that end an answer.

    Raises:
        RequestError: a setting has another value than it may.
    """
    settings = _settings_in(body["generation_config"]) or {}
    samples = settings.get("do_sample", True)
    if not _is_bool(samples):
        raise RequestError("`generation_config` has a do_sample that is not true or false", "generation_config")
    ends = settings.get("eos_token_id", end_ids)
    if sorted(map(str, ends if isinstance(ends, list) else [ends])) != sorted(map(str, end_ids)):
        raise RequestError(
            f"`generation_config` has another eos_token_id than the model, whose is {end_ids}", "generation_config"
        )
    fields = {name: settings[key] for key, name in GENERATION_FIELDS.items() if name and key in settings}
    if "do_sample" in settings:
        fields["temperature"] = fields.get("temperature", temperature) if samples else 0
    check_request({"messages": body["messages"]} | fields, CHAT_FIELDS, "messages")  # those too that give way
    own = {name: value for name, value in body.items() if name != "generation_config"}
    if "max_completion_tokens" in own:
        fields.pop("max_tokens", None)
    return fields | own


def _shown(value: object) -> str:
    """The beginning of a value, which may be very long."""
    if isinstance(value, str):
        return repr(value[:80])
    if isinstance(value, (list, dict)) and len(value) > 8:
        return f"a {'list' if isinstance(value, list) else 'table'} of {len(value)} entries"
    try:
        return repr(value)[:80]
    except ValueError:  # a number of more digits than Python writes
        return "a very large number"


def list_prompts(value: object) -> list[str | list[int]]:
    """The prompts of a completion request; none if it is malformed."""
    if is_text(value) or _is_ids(value):
        return [value]
    if isinstance(value, list) and len(value) <= MAX_PROMPTS and all(is_text(one) or _is_ids(one) for one in value):
        return value
    return []


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(_is_whole(id) and 0 <= id < 2**31 for id in value)


def stops_of(body: dict) -> list[str]:
    """The stop texts of a request."""
    stop = body.get("stop", [])
    return [stop] if isinstance(stop, str) else stop


def sampling_of(body: dict, room: int, default_tokens: int | None, vocab_size: int) -> Sampling:
    """The settings of a checked request.

    Args:
        room: tokens that the context has left.
        default_tokens: most tokens of an answer where the request does not say; None is as many as there is room for.
    """
    biases = {int(id): float(bias) for id, bias in body.get("logit_bias", {}).items()}
    unknown = [id for id in biases if id >= vocab_size]
    if unknown:
        raise RequestError(f"`logit_bias` names the token {unknown[0]}; the model has {vocab_size}", "logit_bias")
    asked = body.get("max_completion_tokens", body.get("max_tokens", default_tokens))
    temperature = body.get("temperature")
    if temperature is not None and temperature < GREEDY_BELOW:
        temperature = 0.0
    logprobs = body.get("logprobs")
    if isinstance(logprobs, bool):
        logprobs = body.get("top_logprobs", 0) if logprobs else None
    return Sampling(
        max_tokens=room if asked is None else min(asked, room),
        temperature=temperature,
        top_p=body.get("top_p"),
        top_k=body.get("top_k"),
        min_p=body.get("min_p"),
        repetition_penalty=body.get("repetition_penalty"),
        presence_penalty=float(body.get("presence_penalty", 0)),
        frequency_penalty=float(body.get("frequency_penalty", 0)),
        logit_bias=biases,
        seed=body.get("seed"),
        logprobs=logprobs,
        prompt_logprobs=logprobs is not None and body.get("echo", False),
    )


# ---------------------------------------------------------------- messages

_EMPTY_FIELDS = ("refusal", "audio", "function_call", "annotations")  # of messages that client libraries give back


def plain_messages(messages: list) -> list:
    """Messages of the protocol -> as `encode_chat` takes them.

    Null fields are left out, `developer` is `system`, `reasoning` is `reasoning_content`, and content in parts is one
    text, with a line break between two of them.
    """
    for i, message in enumerate(messages[:-1]):
        if isinstance(message, dict) and message.get("prefix"):
            raise RequestError(f"messages[{i}].prefix is set; only the last message can be continued", "messages")
    return [
        _plain_message(message, f"messages[{i}]") if isinstance(message, dict) else message
        for i, message in enumerate(messages)
    ]


def _plain_message(message: dict, name: str) -> dict:
    plain = {
        key: value
        for key, value in message.items()
        if not (value is None or (key in _EMPTY_FIELDS and value == []) or key == "prefix")
    }
    if "prefix" in message and not isinstance(message["prefix"], (bool, type(None))):
        raise RequestError(f"{name}.prefix is {_shown(message['prefix'])}; it must be true or false", "messages")
    for unsupported in _EMPTY_FIELDS:
        if unsupported in plain:
            raise RequestError(f"{name}.{unsupported} cannot be shown to this model; it must be null", "messages")
    if plain.get("role") == "developer":
        plain["role"] = "system"
    if "reasoning" in plain:
        plain.setdefault("reasoning_content", plain.pop("reasoning"))
    if plain.get("tool_calls") == []:
        del plain["tool_calls"]
    if isinstance(plain.get("tool_calls"), list):
        plain["tool_calls"] = [_without_nulls(call) for call in plain["tool_calls"]]
    if isinstance(plain.get("content"), list):
        plain["content"] = _join_parts(plain["content"], name)
    return plain


def _without_nulls(value: object) -> object:
    return {key: entry for key, entry in value.items() if entry is not None} if isinstance(value, dict) else value


def _join_parts(parts: list, name: str) -> str:
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        raise RequestError(f"{name}.content has a part that is no text; this model reads text only", "messages")
    if not all(isinstance(part.get("text"), str) for part in parts):
        raise RequestError(f"{name}.content has a part whose `text` is no string", "messages")
    return "\n".join(part["text"] for part in parts)


def is_continued(body: dict) -> bool:
    """Whether the last message is the beginning of the answer.

    An assistant's last message is, unless the request says `continue_final_message`: false.

    Raises:
        RequestError: the request asks for what the message cannot be.
    """
    last = body["messages"][-1]
    by_assistant = isinstance(last, dict) and last.get("role") == "assistant"
    continued = body.get("continue_final_message", by_assistant)
    if continued and not by_assistant:
        raise RequestError(
            "`continue_final_message` needs an assistant's message at the end of `messages`", "continue_final_message"
        )
    if by_assistant and not continued:
        raise RequestError(
            "`messages` ends with an assistant's message; it can only be continued, so add what is to be answered",
            "messages",
        )
    if continued and last.get("tool_calls"):
        raise RequestError(
            "`messages` ends with tool_calls; add their results, as messages with the role tool", "messages"
        )
    if continued and body.get("add_generation_prompt"):
        raise RequestError(
            "`add_generation_prompt` begins a new answer, and the last message is to be continued; leave it out",
            "add_generation_prompt",
        )
    if not continued and body.get("add_generation_prompt") is False:
        raise RequestError(
            "`add_generation_prompt` must be true: nobody else's turn is written", "add_generation_prompt"
        )
    return continued


def wants_thinking(body: dict, default: bool) -> bool:
    """Whether the answer begins with thinking, of which the model knows no degrees."""
    effort = body.get("reasoning_effort")
    by_effort = default if effort is None else effort not in ("none", "minimal")
    return body.get("chat_template_kwargs", {}).get("thinking", by_effort)
