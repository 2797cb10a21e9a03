"""An OpenAI-compatible server for one model: transformers' own, made to run this repository's code and to be safe.

    python serve.py                                          # the model in this folder, http://localhost:8000/v1
    python serve.py --model path/or/hub-name --trust-remote-code --continuous-batching
    python serve.py --adapter runs/my-adapter

    from openai import OpenAI
    client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")
    client.chat.completions.create(model="deepseek", messages=[{"role": "user", "content": "Hello"}], stream=True)

The handlers, the generation threads and continuous batching are those of `transformers serve`. That command itself loads
a checkpoint of a published type into transformers' own class, whatever `auto_map` says, lets what users write become
control tokens, and loads any model (and its code) that a request names. Here the model is the one that was started with,
chats are encoded by tokenization/safe_chat.py, and requests are checked before they reach the model. In
`/v1/completions` the caller writes the whole prompt, control tokens included.
"""

import argparse
import asyncio
import copy
import inspect
import json
import sys
import uuid
from contextlib import asynccontextmanager

from common.extras import extra

with extra("serve"):
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.responses import JSONResponse
    from starlette.requests import ClientDisconnect
    from transformers import BatchEncoding, ContinuousBatchingConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.utils import CBWorkerDeadError, GenerationState, Modality
    from transformers.utils import logging

    from common.loading import load
    from tokenization.safe_chat import encode_chat

MAX_BODY_BYTES = 8 * 2**20
BODY_SECONDS = 60  # for a client to send it
# Newer releases of transformers than 5.20 can check calls of tools against their descriptions.
_PARSER_TAKES_TOOLS = "tools" in inspect.signature(ChatCompletionHandler._streaming).parameters
# How a DeepSeek answer falls into thinking, tool calls and the rest, in the form that transformers' parser takes.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": ["<｜Assistant｜></think>", "<｜Assistant｜>"],
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"(?:<｜tool▁calls▁begin｜>)?<｜tool▁call▁begin｜>(?P<name>[^<]+)<｜tool▁sep｜>",
            "close": "<｜tool▁call▁end｜>",
            "repeats": True,
            "content": "text",  # the API wants the arguments as a string, and a model may write what is no JSON
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close_pattern": r"(?:<｜tool▁calls▁end｜>)?<｜end▁of▁sentence｜>", "content": "text"},
    },
}


# ---------------------------------------------------------------- requests


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _is_text(value: object) -> bool:
    """Whether it is Unicode text of at least one character; JSON can also say half a surrogate pair, which is none."""
    return (
        isinstance(value, str) and len(value) > 0 and not any("\ud800" <= character <= "\udfff" for character in value)
    )


def _is_stop(value: object) -> bool:
    texts = [value] if isinstance(value, str) else value
    return (
        isinstance(texts, list) and 1 <= len(texts) <= 4 and all(_is_text(text) and len(text) <= 256 for text in texts)
    )


# Field -> what it must be, and how that is said. Fields not named here are refused, so that none is ignored unnoticed.
_COMMON_FIELDS = {
    "model": (lambda value: isinstance(value, str), "the name of the model"),
    "stream": (lambda value: isinstance(value, bool), "true or false"),
    "temperature": (lambda value: _is_number(value) and 0 <= value <= 2, "a number from 0 to 2"),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0 and up to 1"),
    "frequency_penalty": (lambda value: _is_number(value) and 0 <= value <= 2, "a number from 0 to 2"),
    "max_tokens": (_is_count, "a whole number of at least 1"),
    "stop": (_is_stop, "a Unicode text or up to four, of 1 to 256 characters each"),
    "seed": (lambda value: isinstance(value, int) and -(2**63) <= value < 2**63, "a whole number of 64 bits"),
    "n": (lambda value: value == 1, "1"),
    "user": (lambda value: isinstance(value, str), "a text"),
}
_SAMPLING_FIELDS = ("temperature", "top_p", "frequency_penalty", "stop", "seed")
CHAT_FIELDS = _COMMON_FIELDS | {
    "messages": (lambda value: isinstance(value, list) and len(value) > 0, "a list of at least one message"),
    "tools": (lambda value: isinstance(value, list), "a list of functions"),
    "max_completion_tokens": _COMMON_FIELDS["max_tokens"],
    "chat_template_kwargs": (
        lambda value: (
            isinstance(value, dict) and set(value) <= {"thinking"} and isinstance(value.get("thinking"), bool)
        ),
        'nothing but {"thinking": true} or {"thinking": false}',
    ),
}
COMPLETION_FIELDS = _COMMON_FIELDS | {
    "prompt": (_is_text, "a Unicode text of at least one character"),
}


def check_request(body: object, fields: dict, required: str) -> dict:
    """The request without the fields that are null.

    Raises:
        ValueError: it is no table, lacks the required field, or a field is unknown or has another value than it may.
    """
    if not isinstance(body, dict):
        raise ValueError("the request must be a JSON object")
    body = {name: value for name, value in body.items() if value is not None}
    for name, value in body.items():
        if name not in fields:
            raise ValueError(f"the field {name[:80]!r} is not supported; allowed are {', '.join(fields)}")
        is_right, meaning = fields[name]
        if not is_right(value):
            raise ValueError(f"`{name}` is {repr(value)[:80]}; it must be {meaning}")
    if required not in body:
        raise ValueError(f"the field `{required}` is missing")
    return body


def plain_messages(messages: list) -> list:
    """Messages with content in parts -> with content as one text, which is all that a language model takes."""
    plain = []
    for i, message in enumerate(messages):
        if isinstance(message, dict) and isinstance(message.get("content"), list):
            parts = message["content"]
            if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
                raise ValueError(f"messages[{i}].content has a part that is no text; this model reads text only")
            if not all(isinstance(part.get("text"), str) for part in parts):
                raise ValueError(f"messages[{i}].content has a part whose `text` is no string")
            message = {**message, "content": " ".join(part["text"] for part in parts)}
        plain.append(message)
    return plain


# With these the template opens an answer.
_OPENING = ("<｜Assistant｜>", "<think>", "</think>")


def answer_opening(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int]) -> str:
    """What the template itself wrote at the end of a prompt to open the answer; without such, that of a plain answer.

    Told by token ids: in a chat that `encode_chat` encoded, only the template has control tokens.
    """
    names = {tokenizer.convert_tokens_to_ids(name): name for name in _OPENING if name in tokenizer.get_vocab()}
    if len(names) < len(_OPENING):
        return ""
    first = len(prompt_ids)
    while first and prompt_ids[first - 1] in names:
        first -= 1
    opening = "".join(names[token] for token in prompt_ids[first:])
    return opening if opening.startswith(_OPENING[0]) else _OPENING[0] + (opening or "</think>")


def answer_reader(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int]) -> PreTrainedTokenizerBase:
    """A tokenizer for reading one answer: what it decodes the prompt to is `answer_opening`, and nothing else of it.

    transformers gives its parser the decoded prompt, and takes for the answer all that follows the last assistant's
    marker. After a tool's result there is none, so the results of tools (pages that strangers wrote) and earlier calls
    would be parsed as what the model says.
    """
    opening, reader = answer_opening(tokenizer, prompt_ids), copy.copy(tokenizer)

    def decode(token_ids, *args, **kwargs):
        if token_ids == prompt_ids:
            return opening
        return tokenizer.decode(token_ids, *args, **kwargs)

    reader.decode = decode
    return reader


class _Limits:
    """What both handlers add to transformers' own: checks, the context, and no settings of other requests."""

    def check(self, body: object, fields: dict, required: str) -> dict:
        """`check_request`; and with continuous batching, no sampling settings, which are the server's."""
        body = check_request(body, fields, required)
        if self.generation_state.use_continuous_batching(self.model_manager.model, Modality.LLM):
            for name in _SAMPLING_FIELDS:
                if name in body:
                    raise ValueError(
                        f"`{name}` cannot be set by a request, since all requests share the forward passes of continuous "
                        "batching and its sampling; set --temperature for the server, or start it without "
                        "--continuous-batching"
                    )
        return body

    def _build_generation_config(self, body, model_generation_config, use_cb=False):
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        config.max_new_tokens = min(config.max_new_tokens, body["_room"])
        if config.temperature == 0:
            config.do_sample, config.temperature = False, None
        return config

    def room(self, prompt_tokens: int) -> int:
        context = self.model_manager.model.config.get_text_config().max_position_embeddings
        if prompt_tokens >= context:
            raise ValueError(f"the prompt has {prompt_tokens} tokens; with its answer the model reads {context}")
        return context - prompt_tokens


class ChatHandler(_Limits, ChatCompletionHandler):
    """Chat completions whose texts never become control tokens."""

    async def handle_request(self, body: dict, request_id: str):
        body = self.check(body, CHAT_FIELDS, "messages")
        model_id, model, tokenizer = self._resolve_model(body)
        use_cb = self.generation_state.use_continuous_batching(model, Modality.LLM)
        manager = self.generation_state.get_manager(model_id, use_cb=use_cb)
        # In a thread: a text of some megabytes takes seconds, and the other requests are not to wait for it.
        encoded = await asyncio.to_thread(
            encode_chat,
            tokenizer,
            plain_messages(body["messages"]),
            tools=body.get("tools"),
            add_generation_prompt=True,
            **(self.chat_template_kwargs | body.get("chat_template_kwargs", {})),
        )
        ids = encoded["input_ids"]
        body["_room"] = self.room(len(ids))
        inputs = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if not use_cb:
            inputs = BatchEncoding({name: [row] for name, row in inputs.items()}, tensor_type="pt").to(model.device)
        settings = self._build_generation_config(body, model.generation_config, use_cb=use_cb)
        if use_cb:
            manager.init_cb(model, settings)
        reader = answer_reader(tokenizer, ids)
        arguments = (request_id, model, reader, model_id, inputs, settings, manager)
        tools = {"tools": body.get("tools")} if _PARSER_TAKES_TOOLS else {}
        if body.get("stream"):
            return self._streaming(*arguments, **tools)
        return await self._non_streaming(*arguments, **tools)


class PromptHandler(_Limits, CompletionHandler):
    """Completions of a prompt as it is."""

    async def handle_request(self, body: dict, request_id: str):
        body = self.check(body, COMPLETION_FIELDS, "prompt")
        for unused in ("n", "user"):
            body.pop(unused, None)
        encoded = await asyncio.to_thread(self.model_manager.tokenizer, body["prompt"])
        body["_room"] = self.room(len(encoded["input_ids"]))
        return await super().handle_request(body, request_id)

    def _validate_request(self, body: dict) -> None:
        """Done by `check_request`."""


# ---------------------------------------------------------------- the server


class OneModel:
    """The model manager of a server that has one model and loads no other."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.force_model = name

    def process_model_name(self, name: str) -> str:
        return name

    def load_model_and_processor(self, name: str, gguf_file: str | None = None):
        return self.model, self.tokenizer

    def get_model_modality(self, model, processor=None) -> Modality:
        return Modality.LLM


def build_app(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str = "deepseek",
    continuous_batching: ContinuousBatchingConfig | None = None,
    thinking: bool = False,
) -> FastAPI:
    """The web application.

    Args:
        model, tokenizer: what is served.
        name: what requests call the model.
        continuous_batching: settings of its paged cache; None answers one request after the other.
        thinking: whether answers begin with thinking where a request does not say.
    """
    if "</think>" in tokenizer.get_vocab() and getattr(tokenizer, "response_template", None) is None:
        tokenizer.response_template = RESPONSE_TEMPLATE
    manager = OneModel(model, tokenizer, name)
    state = GenerationState(continuous_batching=continuous_batching is not None, cb_config=continuous_batching)
    chat = ChatHandler(manager, state, chat_template_kwargs={"thinking": thinking})
    completion = PromptHandler(manager, state)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        state.shutdown()

    app = FastAPI(lifespan=lifespan)

    @app.exception_handler(CBWorkerDeadError)
    async def worker_died(request: Request, error: CBWorkerDeadError):
        return JSONResponse({"error": {"message": str(error), "type": "server_error"}}, status_code=503)

    async def answer(handler, request: Request):
        # The id is ours: with one that a client chooses, two requests could be taken for one.
        request_id = str(uuid.uuid4())
        try:
            body = await asyncio.wait_for(_read_json(request), BODY_SECONDS)
            return await handler.handle_request(body, request_id)
        except asyncio.TimeoutError:  # until Python 3.11 not the builtin one
            return _refusal(408, f"the request did not arrive within {BODY_SECONDS} seconds")
        except ClientDisconnect:
            return _refusal(400, "the client went away")  # to nobody
        except ValueError as error:
            return _refusal(400, str(error))
        except HTTPException as error:
            return _refusal(error.status_code, str(error.detail))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        return await answer(chat, request)

    @app.post("/v1/completions")
    async def completions(request: Request):
        return await answer(completion, request)

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "local"}]}

    @app.get("/health")
    async def health():
        alive = state.is_cb_alive()
        return JSONResponse({"status": "ok" if alive else "unhealthy"}, status_code=200 if alive else 503)

    return app


async def _read_json(request: Request) -> object:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the request is longer than {MAX_BODY_BYTES} bytes")
    try:
        return json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the request is not JSON: {error}") from error


def _refusal(status: int, message: str) -> JSONResponse:
    message = message.encode("utf-8", "backslashreplace").decode("utf-8")  # it may quote what has no UTF-8
    content = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return JSONResponse(content, status_code=status)


# ---------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = argparse.ArgumentParser(prog="serve.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder or Hub name (default: the adapter's base model, or this repository)")
    parser.add_argument("--adapter", help="folder or Hub name of a PEFT adapter to put on the model")
    parser.add_argument("--trust-remote-code", action="store_true", help="let code that comes with the checkpoint run")
    parser.add_argument(
        "--dtype", default="auto", help="of the weights, for instance float32 (default: the checkpoint's)"
    )
    parser.add_argument("--device", help="for instance cpu, cuda or auto (default: cpu)")
    parser.add_argument("--name", default="deepseek", help="what requests call the model (default deepseek)")
    parser.add_argument("--thinking", action="store_true", help="think where a request does not say")
    parser.add_argument(
        "--temperature", type=float, help="where a request does not say; 0 is greedy (default: the model's)"
    )
    parser.add_argument("--host", default="localhost", help="address to listen at (default localhost)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (default 8000)")
    batching = parser.add_argument_group(
        "continuous batching", "requests share forward passes, and the server's sampling settings"
    )
    batching.add_argument("--continuous-batching", action="store_true")
    batching.add_argument("--cache-blocks", type=int, help="blocks of the paged cache (default: from the free memory)")
    batching.add_argument(
        "--batch-tokens", type=int, help="most tokens of a forward pass (default: from the free memory)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    batching = None
    if args.continuous_batching:
        batching = ContinuousBatchingConfig(
            num_blocks=args.cache_blocks, max_batch_tokens=args.batch_tokens, auto_switch_to_flash=False
        )
    try:
        model, tokenizer = load(args.model, args.adapter, args.trust_remote_code, args.dtype, args.device)
        if args.temperature is not None:
            model.generation_config.do_sample = args.temperature > 0
            model.generation_config.temperature = args.temperature or None
        app = build_app(model, tokenizer, args.name, batching, args.thinking)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main())
