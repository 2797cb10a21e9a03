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
chats are encoded by tokenization/safe_chat.py, answers are parsed by the ids of their tokens (tokenization/answers.py),
and requests are checked before they reach the model. In `/v1/completions` the caller writes the whole prompt, control
tokens included.
"""

import argparse
import asyncio
import json
import sys
import uuid
from contextlib import asynccontextmanager

import torch

from common.extras import extra

with extra("serve"):
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.responses import JSONResponse
    from openai.types.completion_usage import CompletionUsage
    from starlette.requests import ClientDisconnect
    from transformers import BatchEncoding, ContinuousBatchingConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.utils import (
        CBGenerateManager,
        CBWorkerDeadError,
        DirectStreamer,
        GenerateManager,
        GenerationState,
        Modality,
        ReasoningText,
        ToolCall,
        _GenerationCancelled,
        _StreamError,
    )
    from transformers.utils import logging

    from common.loading import load
    from tokenization.answers import AnswerCall, AnswerParser, AnswerText
    from tokenization.safe_chat import encode_chat

MAX_BODY_BYTES = 8 * 2**20
BODY_SECONDS = 60  # for a client to send it


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


class _AnswerStreamer(DirectStreamer):
    """Takes the ids of an answer's tokens and queues what transformers' handler streams.

    transformers' own decodes them first, and what an answer spells then looks like control tokens.
    """

    def __init__(self, parser: AnswerParser):
        super().__init__(None, asyncio.get_running_loop(), asyncio.Queue())
        self.parser = parser

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt, then with each token."""
        if self._first or self._cancelled.is_set():
            super().put(value)
        else:
            self.take(value.tolist())

    def take(self, ids: list[int]) -> None:
        """Read further tokens of the answer."""
        for token in ids:
            self.total_tokens += 1
            for piece in self.parser.feed(token):
                self._enqueue(_queued(piece))

    def fail(self, error: object) -> None:
        """End the answer with an error."""
        self._enqueue(_StreamError(json.dumps(str(error))[1:-1]))  # the handler puts it between quotation marks


def _queued(piece: AnswerText | AnswerCall) -> str | ToolCall:
    if isinstance(piece, AnswerCall):
        return ToolCall(*piece)
    return ReasoningText(piece.text) if piece.is_reasoning else piece.text


class _Generation:
    """Generates one answer by a manager of transformers, but streams it through an `AnswerParser`."""

    def __init__(self, manager: GenerateManager | CBGenerateManager, parser: AnswerParser):
        self.manager = manager
        self.parser = parser

    def generate_streaming(self, model, tokenizer, inputs, settings, request_id, response_parser=None):
        """Start -> the queue of the answer's pieces, and its streamer. transformers' parser is not used."""
        streamer = _AnswerStreamer(self.parser)
        if isinstance(self.manager, CBGenerateManager):
            self._start_batched(streamer, inputs["input_ids"], settings, request_id)
        else:
            self._start(streamer, model, {**inputs, "generation_config": settings, "tokenizer": tokenizer})
        return streamer._queue, streamer

    def _start(self, streamer: _AnswerStreamer, model: PreTrainedModel, arguments: dict) -> None:
        def work():
            try:
                model.generate(**arguments, streamer=streamer)
            except _GenerationCancelled:
                streamer.end()
            except Exception as error:
                streamer.fail(error)

        self.manager.submit(work)

    def _start_batched(self, streamer: _AnswerStreamer, ids: list[int], settings, request_id: str) -> None:
        self.manager._check_alive(request_id)
        batching = self.manager._cb

        def take(output):
            try:
                streamer.take(output.generated_tokens[streamer.total_tokens :])
                if output.error is not None:
                    streamer.fail(output.error)
                elif output.is_finished():
                    streamer.end()
            except Exception as error:
                streamer.fail(error)

        streamer.cancel = lambda: batching.cancel_request(request_id)
        batching.register_result_handler(request_id, take)
        batching.add_request(
            ids,
            request_id=request_id,
            streaming=True,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=settings.eos_token_id,
        )


class ChatHandler(_Limits, ChatCompletionHandler):
    """Chat completions whose texts never become control tokens, neither of the prompt nor of the answer."""

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
        parser = AnswerParser(tokenizer, ids)
        if body.get("stream"):
            generation = _Generation(manager, parser)
            return self._streaming(request_id, model, tokenizer, model_id, inputs, settings, generation)
        _, _, written = await manager.generate_non_streaming(model, tokenizer, inputs, settings, request_id=request_id)
        answer = self._whole_answer(request_id, model_id, parser, written, len(ids), settings.max_new_tokens)
        return JSONResponse(answer)

    def _whole_answer(
        self, request_id, model_id, parser: AnswerParser, written, prompt_tokens: int, limit: int
    ) -> dict:
        """The answer with the generated ids `written` (a tensor or list), as the API has it."""
        pieces = [piece for token in written for piece in parser.feed(int(token))]
        calls = [piece for piece in pieces if isinstance(piece, AnswerCall)]
        texts = [piece for piece in pieces if isinstance(piece, AnswerText)]
        return self._build_completion(
            request_id,
            "".join(piece.text for piece in texts if not piece.is_reasoning),
            model_id,
            finish_reason="tool_calls" if calls else "length" if len(written) >= limit else "stop",
            usage=CompletionUsage(
                prompt_tokens=prompt_tokens,
                completion_tokens=len(written),
                total_tokens=prompt_tokens + len(written),
            ),
            tool_calls=[
                {"id": f"{request_id}_tool_call_{i}", "type": "function", "function": call._asdict()}
                for i, call in enumerate(calls)
            ]
            or None,
            reasoning_content="".join(piece.text for piece in texts if piece.is_reasoning) or None,
        )


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
    tokenizer.response_template = None  # with one, transformers' handler would parse the text of the prompt
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
