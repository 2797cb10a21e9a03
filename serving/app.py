"""The web application: OpenAI's chat completions, completions and models, `/load_model` as `transformers chat` asks it,
`/health`, `/metrics` and a chat page at `/`.

service = Service("deepseek")
app = service.app()          # answers 503 "loading" until
service.attach(model, tokenizer)
"""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import ContinuousBatchingConfig, PreTrainedModel, PreTrainedTokenizerBase

from common.extras import MissingExtra
from serving.choices import ChatChoice, Choice, TextChoice, whole_message, whole_text
from serving.engine import BothEngines, Engine, EngineFailed, Generation, check_settings, end_ids
from serving.page import page
from serving.protocol import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    DEFAULT_COMPLETION_TOKENS,
    RequestError,
    Sampling,
    check_request,
    error_body,
    is_continued,
    list_prompts,
    plain_messages,
    sampling_of,
    spell_out,
    stops_of,
    wants_thinking,
)
from serving.texts import TokenTexts
from tokenization.answers import AnswerParser, TokenStream
from tokenization.plain import TextTooLong, check_length
from tokenization.safe_chat import encode_chat

MAX_BODY_BYTES = 8 * 2**20
BODY_SECONDS = 60  # for a client to send it
DRAINED_BYTES = 64 * 2**20  # of a request that is refused for its size: clients read the answer once they have sent it
DRAIN_SECONDS = 10
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")

log = logging.getLogger("serve")


class Service:
    """One model and what is known of its requests.

    Args:
        name: what requests call the model.
        thinking: whether answers begin with thinking where a request does not say.
        api_key: what requests must bring as `Authorization: Bearer`; None asks for none.
        allowed_hosts: names that the Host header may have, without port; "*" is any. Others are refused, since with a
            name of its own a web page could use a server on this machine.
    """

    def __init__(
        self,
        name: str = "deepseek",
        thinking: bool = False,
        api_key: str | None = None,
        allowed_hosts: tuple[str, ...] = LOOPBACK_HOSTS,
    ):
        self.name = name
        self.thinking = thinking
        self.api_key = api_key
        self.allowed_hosts = {host.lower() for host in allowed_hosts}
        self.engine: Engine | BothEngines | None = None
        self.metrics = Metrics()
        self._created = int(time.time())

    def attach(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        continuous_batching: ContinuousBatchingConfig | None = None,
        kept_caches: int = 4,
        lone_too: bool = False,
    ) -> None:
        """Serve this model from now on.

        Args:
            continuous_batching: settings of its paged cache; None answers one request after the other.
            kept_caches: caches of earlier chats that are kept, of requests that are answered one after the other.
            lone_too: whether a request that comes alone is batched as well, with those that come after it.

        Raises:
            ValueError: the model's own settings cannot be kept.
        """
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.texts = TokenTexts(tokenizer)
        self.vocab_size = model.config.get_text_config().vocab_size
        self.end_ids = end_ids(model)
        self.grammars = _grammars(tokenizer, self.vocab_size, self.end_ids)
        check_settings(model)
        if continuous_batching is None:
            self.engine = Engine(model, kept_caches, self.grammars)
        else:
            self.engine = BothEngines(model, continuous_batching, lone_too, kept_caches, self.grammars)

    @property
    def context(self) -> int:
        """Tokens that the model reads, prompt and answer together."""
        return self.model.config.get_text_config().max_position_embeddings

    def stop(self) -> None:
        """End all answers, with an error."""
        if self.engine is not None:
            self.engine.stop()

    def app(self) -> "Guard":
        """The application, for an ASGI server."""

        @asynccontextmanager
        async def lifespan(app: Starlette):
            yield
            await asyncio.to_thread(self.stop)

        routes = [
            Route("/", self._page),
            Route("/v1/chat/completions", self._answering(self._chat), methods=["POST"]),
            Route("/v1/completions", self._answering(self._completion), methods=["POST"]),
            Route("/load_model", self._answering(self._load_model, before_loading=True), methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._one_model),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
        ]
        handlers = {HTTPException: _http_error, RequestError: lambda request, error: _refusal(error)}
        app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
        return Guard(app, self)

    # ---- routes

    async def _page(self, request: Request) -> Response:
        return page()

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_entry()]})

    async def _one_model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._model_entry())

    def _model_entry(self) -> dict:
        entry = {"id": self.name, "object": "model", "created": self._created, "owned_by": "local"}
        return entry | ({"max_model_len": self.context, "thinking": self.thinking} if self.engine is not None else {})

    def _check_name(self, name: str) -> None:
        if name != self.name:
            raise RequestError(
                f"the model {name[:200]!r} does not exist; this server has {self.name!r}",
                "model",
                "model_not_found",
                404,
            )

    async def _health(self, request: Request) -> Response:
        status = "loading" if self.engine is None else "ok" if self.engine.is_alive() else "failed"
        return JSONResponse({"status": status}, status_code=200 if status == "ok" else 503)

    async def _metrics(self, request: Request) -> Response:
        running, waiting = self.engine.load() if self.engine is not None else (0, 0)
        return PlainTextResponse(self.metrics.text(running, waiting), media_type="text/plain; version=0.0.4")

    async def _load_model(self, body: object, request: Request) -> Response:
        """What `transformers chat` asks first. Nothing is loaded: the answer comes when the model is there."""
        name = check_request(body, {"model": CHAT_FIELDS["model"]}, "model")["model"]
        self._check_name(name)

        async def events() -> AsyncIterator[str]:
            is_there = self.engine is not None
            if not is_there:
                yield _event({"status": "loading", "model": name, "stage": "weights"})
            while self.engine is None:
                await asyncio.sleep(0.1)
            yield _event({"status": "ready", "model": name, "cached": is_there})

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    def _answering(self, handler: Callable, before_loading: bool = False) -> Callable:
        async def answer(request: Request) -> Response:
            try:
                body = await asyncio.wait_for(_read_json(request), BODY_SECONDS)
                if self.engine is None and not before_loading:
                    raise EngineFailed("the model is being loaded; try again later")
                return await handler(body, request)
            except (asyncio.TimeoutError, TimeoutError):  # until Python 3.11 two different ones
                return _refusal(RequestError(f"the request did not arrive within {BODY_SECONDS} seconds", status=408))
            except ClientDisconnect:
                return Response(status_code=499)  # to nobody
            except Exception as error:
                return _refusal(error)

        return answer

    # ---- chats

    async def _chat(self, body: object, request: Request) -> Response:
        body = check_request(body, CHAT_FIELDS, "messages")
        self._check_name(body.get("model", self.name))
        if "generation_config" in body:
            body = spell_out(body, self.model.generation_config.temperature or 1.0, self.end_ids)
        continued = is_continued(body)
        calls_allowed = body.get("tool_choice", "auto") != "none"
        ids = await self._encode(
            lambda: encode_chat(
                self.tokenizer,
                plain_messages(body["messages"]),
                tools=body.get("tools") if calls_allowed else None,
                thinking=wants_thinking(body, self.thinking),
                add_generation_prompt=not continued,
                continue_final_message=continued,
                max_tokens=self.context,
            )["input_ids"]
        )
        default_tokens = self.model.generation_config.max_new_tokens
        sampling = sampling_of(body, self._room(ids), default_tokens, self.vocab_size)
        if body.get("response_format", {}).get("type", "text") != "text":
            sampling = replace(sampling, grammar=await self._grammar(body))
        choices = [
            ChatChoice(
                i,
                sampling.max_tokens,
                self.end_ids,
                AnswerParser(self.tokenizer, ids),
                self.texts,
                stops_of(body),
                max_calls=1 if body.get("parallel_tool_calls") is False else None,
                calls_allowed=calls_allowed,
            )
            for i in range(body.get("n", 1))
        ]
        planned = [(choice, ids, _with_own_seed(sampling, choice.index)) for choice in choices]
        answer = Answer(self, request, body, "chatcmpl", "chat.completion", planned)
        return await answer.respond(
            _chat_chunk, whole_message, opening={"delta": {"role": "assistant", "content": ""}}
        )

    async def _grammar(self, body: dict) -> str:
        if self.grammars is None:
            raise RequestError(
                "`response_format` with JSON needs llguidance on the server: pip install -e '.[structured]'",
                "response_format",
            )
        if body.get("tools") and body.get("tool_choice") != "none":
            raise RequestError(
                "`response_format` with JSON leaves no room for tool calls; leave out `tools`, or set `tool_choice`: none",
                "response_format",
            )
        return await asyncio.to_thread(self.grammars.compile, body["response_format"])

    # ---- completions

    async def _completion(self, body: object, request: Request) -> Response:
        body = check_request(body, COMPLETION_FIELDS, "prompt")
        self._check_name(body.get("model", self.name))
        n, echo = body.get("n", 1), body.get("echo", False)
        planned = []
        for prompt in list_prompts(body["prompt"]):
            ids = prompt
            if isinstance(prompt, str):
                ids = await self._encode(lambda prompt=prompt: self._encode_prompt(prompt))
            elif max(ids) >= self.vocab_size:
                raise RequestError(f"`prompt` has the token {max(ids)}; the model has {self.vocab_size}", "prompt")
            if not ids:
                raise RequestError("`prompt` has no tokens", "prompt")
            sampling = sampling_of(body, self._room(ids, body), DEFAULT_COMPLETION_TOKENS, self.vocab_size)
            text = None
            if echo:
                stream = TokenStream(self.tokenizer)
                text = prompt if isinstance(prompt, str) else "".join(map(stream.feed, ids)) + stream.end()
            for i in range(n):
                arguments = (self.end_ids, self.texts, stops_of(body), ids, text, sampling.logprobs is not None)
                choice = TextChoice(len(planned), sampling.max_tokens, *arguments)
                planned.append((choice, ids, _with_own_seed(sampling, i)))
        answer = Answer(self, request, body, "cmpl", "text_completion", planned)
        return await answer.respond(_text_chunk, whole_text)

    def _encode_prompt(self, prompt: str) -> list[int]:
        """The ids, with one bos if the tokenizer writes one, also where the prompt spells it itself."""
        check_length(self.tokenizer, prompt, self.context)
        ids = self.tokenizer(prompt, verbose=False)["input_ids"]
        return ids[1:] if ids[:2] == [self.tokenizer.bos_token_id] * 2 else ids

    # ---- both

    async def _encode(self, encode: Callable[[], list[int]]) -> list[int]:
        """In a thread: a text of some megabytes takes seconds, and the other requests are not to wait for it."""
        try:
            return await asyncio.to_thread(encode)
        except RequestError:
            raise
        except TextTooLong as error:
            raise RequestError(str(error), code="context_length_exceeded") from error
        except ValueError as error:
            raise RequestError(str(error)) from error

    def _room(self, ids: list[int], body: dict | None = None) -> int:
        """Tokens that the context has left for the answer."""
        room = self.context - len(ids)
        if room < 0 or (room == 0 and (body or {}).get("max_tokens") != 0):
            raise RequestError(
                f"the prompt has {len(ids)} tokens; with its answer the model reads {self.context}",
                "messages" if body is None else "prompt",
                "context_length_exceeded",
            )
        return room


def _grammars(tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_ids: list[int]):
    """What compiles schemas; None if the library for it is not installed, or no token ends an answer."""
    try:
        from serving.grammar import Grammars
    except MissingExtra:
        return None
    return Grammars(tokenizer, vocab_size, end_ids) if end_ids else None


# ---------------------------------------------------------------- an answer


class Answer:
    """The choices of one request, written, and sent whole or as a stream of events.

    Args:
        planned: for each choice its prompt and how it is written.
    """

    def __init__(self, service: Service, request: Request, body: dict, prefix: str, kind: str, planned: list):
        self._service = service
        self._request = request
        self._stream = body.get("stream", False)
        self._with_usage = (body.get("stream_options") or {}).get("include_usage") or False
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind + (".chunk" if self._stream and kind == "chat.completion" else ""),
            "created": int(time.time()),
            "model": service.name,
        }
        self._choices: list[Choice] = [choice for choice, _, _ in planned]
        self._generations: list[Generation] = service.engine.submit([(ids, sampling) for _, ids, sampling in planned])
        # Of several choices for one prompt, the prompt counts once.
        prompts = {id(ids): (len(ids), choice) for choice, ids, _ in reversed(planned)}
        self._prompts = list(prompts.values())

    async def respond(self, make_chunk: Callable, make_whole: Callable, opening: dict | None = None) -> Response:
        """The response.

        Args:
            make_chunk: (delta, reason why it ended) -> fields of a choice in a stream.
            make_whole: all deltas -> fields of a choice.
            opening: the first delta of each choice in a stream.
        """
        if self._stream:
            events = self._events(make_chunk, opening)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        gone = asyncio.ensure_future(_client_gone(self._request))
        work = asyncio.ensure_future(self._whole(make_whole))
        try:
            await asyncio.wait([gone, work], return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            return JSONResponse(work.result())
        finally:
            gone.cancel()
            work.cancel()
            self._finish()

    async def _whole(self, make_whole: Callable) -> dict:
        async def one(choice: Choice, generation: Generation) -> dict:
            deltas = [delta async for delta in _deltas(choice, generation)]
            return {"index": choice.index} | make_whole(deltas) | {"finish_reason": choice.finish_reason}

        pairs = zip(self._choices, self._generations, strict=True)
        choices = await asyncio.gather(*(one(*pair) for pair in pairs))
        return self._head | {"choices": choices, "usage": self._usage()}

    async def _events(self, make_chunk: Callable, opening: dict | None) -> AsyncIterator[str]:
        """The stream's events; ends with [DONE] also after an error."""
        chunks: asyncio.Queue = asyncio.Queue()

        async def write(choice: Choice, generation: Generation) -> None:
            try:
                async for delta in _deltas(choice, generation):
                    await chunks.put({"index": choice.index} | make_chunk(delta, None))
                await chunks.put({"index": choice.index} | make_chunk({}, choice.finish_reason))
            except Exception as error:
                await chunks.put(error)
            await chunks.put(None)

        pairs = zip(self._choices, self._generations, strict=True)
        tasks = [asyncio.ensure_future(write(*pair)) for pair in pairs]
        usage = {"usage": None} if self._with_usage else {}
        try:
            if opening is not None:
                for choice in self._choices:
                    yield _event(
                        self._head | {"choices": [{"index": choice.index} | make_chunk(opening, None)]} | usage
                    )
            open_choices = len(tasks)
            while open_choices:
                chunk = await chunks.get()
                if isinstance(chunk, Exception):
                    log.error("an answer failed: %s", chunk)
                    yield _event(error_body(str(chunk), "server_error"))
                    break
                if chunk is None:
                    open_choices -= 1
                else:
                    yield _event(self._head | {"choices": [chunk]} | usage)
            else:
                if self._with_usage:
                    yield _event(self._head | {"choices": [], "usage": self._usage()})
            yield "data: [DONE]\n\n"
        finally:
            for task in tasks:
                task.cancel()
            self._finish()

    def _usage(self) -> dict:
        prompt_tokens = sum(count for count, _ in self._prompts)
        cached = sum(choice.prompt.cached_tokens for _, choice in self._prompts if choice.prompt)
        new_tokens = sum(choice.new_tokens for choice in self._choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": new_tokens,
            "total_tokens": prompt_tokens + new_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _finish(self) -> None:
        """Stop what is still being written, and keep the books."""
        for generation in self._generations:
            generation.cancel()
        usage = self._usage()
        self._service.metrics.count_tokens(usage)
        self._request.scope.setdefault("state", {})["usage"] = usage


def _with_own_seed(sampling: Sampling, i: int) -> Sampling:
    """With a seed, each of `n` answers has one of its own, so that they differ."""
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + i)


async def _deltas(choice: Choice, generation: Generation) -> AsyncIterator[dict]:
    async for event in generation:
        for delta in choice.feed(event):
            yield delta
        if choice.done:
            generation.cancel()
            return
    if not choice.done:
        choice.finish_reason = "stop"


async def _client_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _chat_chunk(delta: dict, finish_reason: str | None) -> dict:
    return {"delta": delta.get("delta", {}), "logprobs": delta.get("logprobs"), "finish_reason": finish_reason}


def _text_chunk(part: dict, finish_reason: str | None) -> dict:
    return {"text": part.get("text", ""), "logprobs": part.get("logprobs"), "finish_reason": finish_reason}


def _event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


# ---------------------------------------------------------------- requests and what is refused


async def _read_json(request: Request) -> object:
    body, size = bytearray(), 0
    declared = request.headers.get("content-length", "")
    if not declared.isdecimal() or int(declared) <= DRAINED_BYTES:
        async for part in request.stream():
            size += len(part)
            if size > DRAINED_BYTES:
                break
            if size <= MAX_BODY_BYTES:
                body += part
            else:
                body.clear()
    if size > MAX_BODY_BYTES or (declared.isdecimal() and int(declared) > MAX_BODY_BYTES):
        raise RequestError(f"the request is longer than {MAX_BODY_BYTES} bytes", status=413)
    try:
        return json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request is not JSON: {error}") from error


async def _drain(receive) -> None:
    """Read and forget a request, so that the refusal arrives: many clients read no answer before they have sent all."""
    size = 0
    while size < DRAINED_BYTES:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            return


def _refusal(error: Exception) -> Response:
    """An error as a response in the protocol's form."""
    if isinstance(error, RequestError):
        content = error_body(str(error), param=error.param, code=error.code)
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
        return JSONResponse(content, status_code=error.status, headers=headers)
    if isinstance(error, EngineFailed):
        return JSONResponse(error_body(str(error), "server_error"), status_code=503, headers={"Retry-After": "5"})
    log.error("%s: %s", type(error).__name__, error, exc_info=error)
    return JSONResponse(error_body(f"the answer failed: {error}", "server_error"), status_code=500)


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return JSONResponse(error_body(message), status_code=error.status_code, headers=error.headers)


class Guard:
    """Around the application: who may ask, errors in the protocol's form, and a line in the log for each request."""

    def __init__(self, app: Starlette, service: Service):
        self.app = app
        self.service = service

    async def __call__(self, scope, receive, send) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def note(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self._check(Request(scope))
            except RequestError as error:
                with suppress(asyncio.TimeoutError, TimeoutError):
                    await asyncio.wait_for(_drain(receive), DRAIN_SECONDS)
                await _refusal(error)(scope, receive, note)
            else:
                await self.app(scope, receive, note)
        finally:
            self._report(scope, status, time.perf_counter() - start)

    def _check(self, request: Request) -> None:
        """Refuse whom this server does not answer, before anything of the body is read."""
        hosts, host = self.service.allowed_hosts, _host_name(request.headers.get("host", ""))
        if "*" not in hosts and host not in hosts:
            raise RequestError(
                f"the Host header names {host[:100]!r}; this server answers to {', '.join(sorted(hosts))} "
                "(--allowed-hosts)",
                status=403,
            )
        # Not `request.url`, of which older releases of Starlette make the Host header a part as it is.
        if request.scope["path"] in ("/", "/health"):  # the page asks for the key itself
            return
        if self.service.api_key is not None:
            given = request.headers.get("authorization", "").partition(" ")
            is_right = hmac.compare_digest(given[2].strip().encode(), self.service.api_key.encode())
            if given[0].lower() != "bearer" or not is_right:
                raise RequestError(
                    "the API key is missing or wrong; send it as Authorization: Bearer", None, "invalid_api_key", 401
                )
        if request.method == "POST":
            kind, _, _ = request.headers.get("content-type", "").partition(";")
            if kind.strip().lower() != "application/json":
                raise RequestError(
                    f"the Content-Type is {kind[:100]!r}; it must be application/json", None, status=415
                )

    def _report(self, scope, status: int, seconds: float) -> None:
        self.service.metrics.count_request(scope["path"] if scope["path"] in _PATHS else "other", status, seconds)
        usage = scope.get("state", {}).get("usage")
        tokens = f" {usage['prompt_tokens']} tokens read, {usage['completion_tokens']} written," if usage else ""
        path = ascii(scope["path"][:80])[1:-1]  # a path is what a client writes
        log.info("%s %s %d%s %.2f s", scope["method"], path, status, tokens, seconds)


_PATHS = ("/", "/load_model", "/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")


def _host_name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


class Metrics:
    """Counts in Prometheus' text format."""

    def __init__(self):
        self._requests: Counter = Counter()
        self._seconds: Counter = Counter()
        self._tokens: Counter = Counter()

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count a request that has been answered."""
        self._requests[path, status] += 1
        self._seconds[path] += seconds

    def count_tokens(self, usage: dict) -> None:
        """Count the tokens of a request."""
        self._tokens["prompt"] += usage["prompt_tokens"]
        self._tokens["cached"] += usage["prompt_tokens_details"]["cached_tokens"]
        self._tokens["generated"] += usage["completion_tokens"]

    def text(self, running: int, waiting: int) -> str:
        """All of them."""
        lines = [
            "# HELP serve_requests_total Requests that have been answered.",
            "# TYPE serve_requests_total counter",
        ]
        for (path, status), count in sorted(self._requests.items()):
            lines.append(f'serve_requests_total{{path="{path}",status="{status}"}} {count}')
        lines += ["# HELP serve_request_seconds Time that requests took.", "# TYPE serve_request_seconds summary"]
        for path, seconds in sorted(self._seconds.items()):
            count = sum(count for (other, _), count in self._requests.items() if other == path)
            lines.append(f'serve_request_seconds_sum{{path="{path}"}} {seconds:.6f}')
            lines.append(f'serve_request_seconds_count{{path="{path}"}} {count}')
        explained = {
            "prompt": "Tokens of prompts.",
            "cached": "Tokens of prompts that were in a cache already.",
            "generated": "Tokens of answers.",
        }
        for name, meaning in explained.items():
            metric = f"serve_{name}_tokens_total"
            lines += [f"# HELP {metric} {meaning}", f"# TYPE {metric} counter", f"{metric} {self._tokens[name]}"]
        for name, value, meaning in (
            ("running", running, "Answers that are being written."),
            ("waiting", waiting, "Answers that wait for their turn."),
        ):
            metric = f"serve_answers_{name}"
            lines += [f"# HELP {metric} {meaning}", f"# TYPE {metric} gauge", f"{metric} {value}"]
        return "\n".join(lines) + "\n"
