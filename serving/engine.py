"""Writes answers token by token: one after the other by `generate`, or together by transformers' continuous batching.

All engines take the answers that one request asks for, each as the ids of its prompt and a `Sampling`, and give a
`Generation` for each, over which one iterates for a `PromptRead` and then `Token`s. They stand on public methods of
transformers: `generate` with a streamer, a logits processor and a stopping criterion, and the manager of
`init_continuous_batching`.
"""

import asyncio
import copy
import queue
import secrets
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from serving.protocol import Sampling

PREFILL_TOKENS = 512  # of a prompt read at a time, so that its logits need bounded memory and it can be stopped
MAX_OPEN = 1000  # answers of an engine that are being written or wait
STOP_SECONDS = 5


class Score(NamedTuple):
    """Log-probability of a token, and of the likeliest ones by id, the likeliest first."""

    logprob: float
    top: list[tuple[int, float]]


class PromptRead(NamedTuple):
    """The prompt has been read: how many of its tokens were in a cache, and the scores of its tokens if they were asked
    for (the first has none)."""

    cached_tokens: int
    scores: list[Score | None] | None


class Token(NamedTuple):
    """A token of the answer, and its score if that was asked for."""

    id: int
    score: Score | None


class EngineFailed(RuntimeError):
    """The engine takes no more requests."""


Planned = list[tuple[list[int], Sampling]]  # the answers of one request: the prompt's ids, and how each is written


class Generation:
    """One answer in the making.

    Args:
        ids: the prompt.
        sampling: how it is written.
        on_cancel: called when nobody waits for it any longer.
    """

    def __init__(self, ids: list[int], sampling: Sampling, on_cancel: Callable[[], None] | None = None):
        self.ids = ids
        self.sampling = sampling
        self._on_cancel = on_cancel
        self.cancelled = threading.Event()
        self._events: asyncio.Queue = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def put(self, event: PromptRead | Token | BaseException | None) -> None:
        """Called by the engine, from any thread; None ends the answer."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def cancel(self) -> None:
        """Write no more of it."""
        self.cancelled.set()
        if self._on_cancel is not None:
            self._on_cancel()

    async def __aiter__(self) -> AsyncIterator[PromptRead | Token]:
        while (event := await self._events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event


def end_ids(model: PreTrainedModel) -> list[int]:
    """Ids of the tokens that end an answer."""
    eos = model.generation_config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _check_room(open_answers: int, more: int) -> None:
    if open_answers + more > MAX_OPEN:
        raise EngineFailed(f"{open_answers} answers are being written or wait already; try again later")


# ---------------------------------------------------------------- one after the other


class Engine:
    """Answers one request after the other, in a thread of its own.

    Args:
        model: a causal language model, also a `PeftModel`.
        kept_caches: how many caches of earlier chats are kept, so that a next turn reads only what is new.
        grammars: a `Grammars` for requests that ask for a schema; None if it is not installed.
    """

    def __init__(self, model: PreTrainedModel, kept_caches: int = 4, grammars=None):
        self._model = model
        self._grammars = grammars
        self._caches = KeptCaches(model.config.get_text_config(), kept_caches)
        self._jobs: queue.Queue[Generation | None] = queue.Queue()
        self._open: set[Generation] = set()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="generate")
        self._thread.start()

    def submit(self, planned: Planned) -> list[Generation]:
        """Begin the answers of a request.

        Raises:
            EngineFailed: too many requests wait, or the server is stopping.
        """
        if self._stopping:
            raise EngineFailed("the server is stopping")
        _check_room(len(self._open), len(planned))
        generations = [Generation(ids, sampling) for ids, sampling in planned]
        for generation in generations:
            self._open.add(generation)
            self._jobs.put(generation)
        return generations

    def load(self) -> tuple[int, int]:
        """How many answers are being written, and how many wait."""
        wanted = sum(not generation.cancelled.is_set() for generation in tuple(self._open))
        return min(wanted, 1), max(wanted - 1, 0)

    def is_idle(self) -> bool:
        """Whether nobody waits for an answer."""
        return not any(self.load())

    def is_alive(self) -> bool:
        """Whether it can answer."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """End all answers and the thread."""
        self._stopping = True
        for generation in tuple(self._open):
            generation.cancel()
            generation.put(EngineFailed("the server is stopping"))
        self._jobs.put(None)
        self._thread.join(STOP_SECONDS)

    def _work(self) -> None:
        while (generation := self._jobs.get()) is not None:
            end = None
            if not generation.cancelled.is_set():
                try:
                    self._write(generation)
                except BaseException as error:
                    end = error
            self._open.discard(generation)  # first, so that who has read the answer finds the engine idle
            generation.put(end)

    @torch.inference_mode()
    def _write(self, generation: Generation) -> None:
        sampling, ids = generation.sampling, generation.ids
        cache, cached = self._caches.take([] if sampling.prompt_logprobs else ids)
        scores = self._read_prompt(generation, cache, cached)
        generation.put(PromptRead(cached, scores))
        written: list[int] = []
        if sampling.max_tokens and not generation.cancelled.is_set():
            written = self._write_answer(generation, cache)
        # What was raised before has left half a step in the cache, which is then dropped.
        self._caches.give((ids + written)[: cache.get_seq_length()], cache)

    def _read_prompt(self, generation: Generation, cache: DynamicCache, cached: int) -> list[Score | None] | None:
        """Read all but the last token, which `generate` reads -> the scores of the tokens if they are asked for."""
        ids, count = generation.ids, generation.sampling.logprobs
        scores: list[Score | None] = [None]
        for start in range(cached, len(ids) - 1, PREFILL_TOKENS):
            if generation.cancelled.is_set():
                return None
            end = min(start + PREFILL_TOKENS, len(ids) - 1)
            part = torch.tensor([ids[start:end]], device=self._model.device)
            keep = 0 if generation.sampling.prompt_logprobs else 1  # 0 is all
            logits = self._model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
            if generation.sampling.prompt_logprobs:
                rows = logits[0].float().log_softmax(-1)
                scores += [score(row, id, count) for row, id in zip(rows, ids[start + 1 : end + 1], strict=True)]
        return scores if generation.sampling.prompt_logprobs else None

    def _write_answer(self, generation: Generation, cache: DynamicCache) -> list[int]:
        sampling = filled(generation.sampling, self._model.generation_config)
        settings = _settings(self._model, sampling)
        grammar = None
        if generation.sampling.grammar is not None:
            grammar = self._grammars.start(generation.sampling.grammar, generation.ids)
        logits = _Logits(generation, sampling, self._model.device, grammar)
        prompt = torch.tensor([generation.ids], device=self._model.device)
        output = self._model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            generation_config=settings,
            logits_processor=LogitsProcessorList([logits]),
            stopping_criteria=StoppingCriteriaList([_WhenCancelled(generation)]),
            streamer=_Streamer(generation, logits),
        )
        return output[0, len(generation.ids) :].tolist()


# Settings of sampling in a generation_config.json that are not known here, with what they are when they do nothing.
_UNKNOWN_SAMPLING = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None}


def check_settings(model: PreTrainedModel) -> None:
    """Raise ValueError if a model's own settings, or its adapter, cannot be kept."""
    if any(adapter.is_prompt_learning for adapter in getattr(model, "peft_config", {}).values()):
        raise ValueError(
            "the adapter is a learned prompt, which is not read by parts as here; merge one of another kind"
        )
    settings = model.generation_config
    for name, nothing in _UNKNOWN_SAMPLING.items():
        if getattr(settings, name, None) not in (None, nothing):
            raise ValueError(
                f"the model's generation_config.json sets {name}, which this server does not know; take it out"
            )
    if (settings.num_beams or 1) > 1:
        raise ValueError("the model's generation_config.json sets num_beams, and answers are streamed; take it out")


def filled(sampling: Sampling, settings: GenerationConfig) -> Sampling:
    """The sampling with the model's own settings where the request does not say; all numbers are numbers then."""
    temperature = sampling.temperature
    if temperature is None:
        temperature = (1.0 if settings.temperature is None else settings.temperature) if settings.do_sample else 0.0

    def first(*values):
        return next(value for value in values if value is not None)

    return replace(
        sampling,
        temperature=float(temperature),
        top_p=float(first(sampling.top_p, settings.top_p, 1.0)),
        top_k=max(0, first(sampling.top_k, settings.top_k, 0)),
        min_p=float(first(sampling.min_p, settings.min_p, 0.0)),
        repetition_penalty=float(first(sampling.repetition_penalty, settings.repetition_penalty, 1.0)),
    )


def _settings(model: PreTrainedModel, sampling: Sampling) -> GenerationConfig:
    """The settings for `generate`: all that changes or draws from logits is done by `_Logits`."""
    settings = copy.deepcopy(model.generation_config)
    settings.repetition_penalty = None
    settings.do_sample = False
    settings.temperature = settings.top_p = settings.top_k = settings.min_p = None
    settings.max_length, settings.max_new_tokens = None, sampling.max_tokens
    settings.eos_token_id = end_ids(model) or None
    if settings.pad_token_id is None:
        settings.pad_token_id = (end_ids(model) or [0])[0]
    return settings


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """What narrows down the tokens that are drawn from, in the order of `generate`."""
    warpers = LogitsProcessorList()
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers


def score(row: torch.Tensor, id: int, count: int) -> Score:
    """The score of the token `id`.

    Args:
        row: log-probabilities [V].
        count: how many of the likeliest are told.
    """
    values, ids = row.topk(min(count, len(row)))
    return Score(row[id].item(), list(zip(ids.tolist(), values.tolist(), strict=True)))


class _Logits(LogitsProcessor):
    """Keeps the log-probabilities of the next token, changes its logits as the request asks, and draws it.

    The penalties count as in vLLM: repetition is of prompt and answer, presence and frequency are of the answer. Random
    numbers are the answer's own, so that a seed means the same whatever else the process does.
    """

    def __init__(self, generation: Generation, sampling: Sampling, device: torch.device, grammar=None):
        self.sampling = sampling
        self.prompt_tokens = len(generation.ids)
        self.grammar = grammar
        self.generator = torch.Generator(device)
        self.generator.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed)
        self.warpers = _warpers(sampling) if sampling.temperature else None
        self.row: torch.Tensor | None = None  # [V]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """ids [1, S] and logits [1, V] -> logits [1, V]."""
        if scores.isnan().any():
            raise RuntimeError("the model computes numbers that are none (NaN); its weights are damaged or overflow")
        sampling = self.sampling
        if sampling.logprobs is not None:
            self.row = scores[0].float().log_softmax(-1)
        if sampling.repetition_penalty != 1:
            seen = input_ids[0].unique()
            kept = scores[:, seen]
            penalty = sampling.repetition_penalty
            penalised = torch.where(kept < 0, kept * penalty, kept / penalty)
            scores = scores.index_copy(1, seen, penalised)
        if sampling.presence_penalty or sampling.frequency_penalty:
            seen, counts = input_ids[0, self.prompt_tokens :].unique(return_counts=True)
            penalty = sampling.presence_penalty + sampling.frequency_penalty * counts.to(scores.dtype)
            scores = scores.index_add(1, seen, -penalty[None].to(scores.dtype))
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias), device=scores.device)
            biases = torch.tensor(list(sampling.logit_bias.values()), device=scores.device, dtype=scores.dtype)
            scores = scores.index_add(1, ids, biases[None])
        if self.grammar is not None:
            scores = self.grammar(scores, input_ids[0, self.prompt_tokens :])
        if self.warpers is not None:
            probabilities = self.warpers(input_ids, scores.float()).softmax(-1)
            drawn = torch.multinomial(probabilities, 1, generator=self.generator)
            scores = torch.full_like(scores, float("-inf")).scatter(1, drawn, 0.0)
        return scores


class _Streamer(BaseStreamer):
    """Passes on what `generate` writes."""

    def __init__(self, generation: Generation, logits: _Logits):
        self.generation = generation
        self.logits = logits
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self.is_prompt:
            for id in value.flatten().tolist():
                row, count = self.logits.row, self.generation.sampling.logprobs
                self.generation.put(Token(id, None if count is None else score(row, id, count)))
        self.is_prompt = False

    def end(self) -> None:
        pass


class _WhenCancelled(StoppingCriteria):
    def __init__(self, generation: Generation):
        self.generation = generation

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.generation.cancelled.is_set(), device=input_ids.device)


class KeptCaches:
    """The caches of the last prompts and answers; of a new prompt's, what both begin with need not be read again.

    Args:
        config: of the model.
        limit: how many are kept; the one used longest ago goes first.
    """

    def __init__(self, config, limit: int):
        self._config = config
        self._limit = limit
        self._kept: list[tuple[list[int], DynamicCache]] = []

    def take(self, ids: list[int]) -> tuple[DynamicCache, int]:
        """A cache that holds the beginning of `ids`, and of how many tokens; it is no longer kept."""
        common = [_common_beginning(kept, ids) for kept, _ in self._kept]
        for i in sorted(range(len(common)), key=common.__getitem__, reverse=True):
            held, cache = self._kept[i]
            # One token is always read: the answer's first is predicted from it. A cache of which less than half would
            # be left belongs to another chat, which may go on.
            count = min(common[i], len(ids) - 1)
            if count < 1 or 2 * count < len(held):
                continue
            del self._kept[i]
            try:
                if count < len(held):
                    cache.crop(count - len(held))
                return cache, count
            except ValueError:  # a layer has let go what the next token would need
                break
        return DynamicCache(config=self._config), 0

    def give(self, ids: list[int], cache: DynamicCache) -> None:
        """Keep the cache, which holds `ids`."""
        if ids and self._limit:
            self._kept = [*self._kept, (ids, cache)][-self._limit :]


def _common_beginning(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---------------------------------------------------------------- together


class BatchingEngine:
    """Answers requests together, in forward passes that they share.

    Of a request's settings it knows the temperature, `top_p` and `top_k`; of equally likely tokens any may be taken.

    Args:
        model: with full attention in all layers, on one device.
        paging: settings of the paged cache.

    Raises:
        ValueError: the model, or this release of transformers, cannot batch.
    """

    def __init__(self, model: PreTrainedModel, paging: ContinuousBatchingConfig):
        places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
        if len(places) > 1:
            raise ValueError(f"the model lies on several devices ({', '.join(sorted(places))}); batches need one")
        paging.per_request_processors = True
        # A graph must not be recorded while another thread, that of `Engine`, uses the GPU.
        paging.use_cuda_graph = False
        self._model = model
        self._manager = model.init_continuous_batching(
            generation_config=self._settings(), continuous_batching_config=paging
        )
        self._paging = self._manager.continuous_batching_config
        self._is_started = False
        self._open: dict[str, Generation] = {}
        if self._paging.num_blocks is None:  # how many fit into the memory is known once they lie there
            self._start()
            while self._paging.num_blocks is None and self._manager.is_running():
                time.sleep(0.01)
            if self._paging.num_blocks is None:
                self.stop()  # gives the model its attention back
                raise ValueError("the memory has no room for a paged cache; --cache-blocks makes a smaller one")

    def takes(self, planned: Planned) -> bool:
        """Whether all that a request asks for can be done together with others."""
        return all(self._knows(sampling) and self._has_room(ids, sampling) for ids, sampling in planned)

    def _has_room(self, ids: list[int], sampling: Sampling) -> bool:
        """Whether the cache holds the answer at its longest; one that outgrows it would end them all."""
        return len(ids) + sampling.max_tokens <= self._paging.num_blocks * self._paging.page_size

    def _knows(self, sampling: Sampling) -> bool:
        sampling = filled(sampling, self._model.generation_config)
        if not sampling.temperature:
            sampling = replace(sampling, seed=None)
        known = Sampling(
            sampling.max_tokens,
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            min_p=0.0,
            repetition_penalty=1.0,
        )
        return sampling == known and sampling.max_tokens > 0

    def submit(self, planned: Planned) -> list[Generation]:
        """Begin the answers of a request.

        Raises:
            EngineFailed: too many requests wait, or the thread that writes has died.
        """
        if not self._is_started:
            self._start()
        if not self.is_alive():
            raise EngineFailed("continuous batching has failed; start the server again")
        _check_room(len(self._open), len(planned))
        return [self._begin(ids, sampling) for ids, sampling in planned]

    def _start(self) -> None:
        self._manager.start()
        self._is_started = True

    def _begin(self, ids: list[int], sampling: Sampling) -> Generation:
        request_id, written = uuid.uuid4().hex, 0

        def cancel():
            if self._open.pop(request_id, None):
                self._manager.cancel_request(request_id)

        generation = Generation(ids, sampling, cancel)

        def take(output):
            nonlocal written
            for id in output.generated_tokens[written:]:
                generation.put(Token(id, None))
            written = len(output.generated_tokens)
            if output.error is not None:
                generation.put(RuntimeError(str(output.error)))
            elif output.is_finished():
                generation.put(None)
            if output.error is not None or output.is_finished():
                self._open.pop(request_id, None)

        self._open[request_id] = generation
        generation.put(PromptRead(0, None))
        self._manager.register_result_handler(request_id, take)
        added = self._manager.add_request(
            ids,
            request_id=request_id,
            streaming=True,
            max_new_tokens=sampling.max_tokens,
            eos_token_id=end_ids(self._model) or -1,
            **self._of_request(sampling),
        )
        if added is None:  # it is stopping; nobody would end the answer
            del self._open[request_id]
            generation.put(EngineFailed("continuous batching has ended; start the server again"))
        return generation

    def _settings(self) -> GenerationConfig:
        """The manager has only the processors that its own settings need, so each has a value that needs one."""
        return GenerationConfig(
            do_sample=True,
            temperature=0.5,
            top_k=2,
            top_p=0.5,
            eos_token_id=end_ids(self._model) or -1,
            use_cache=False,
        )

    def _of_request(self, sampling: Sampling) -> dict:
        sampling = filled(sampling, self._model.generation_config)
        vocab_size = self._model.config.get_text_config().vocab_size
        if not sampling.temperature:
            return {"temperature": 1.0, "top_k": 1, "top_p": 1e-6}  # the latter leaves one of equally likely tokens
        top_k = min(sampling.top_k or vocab_size, vocab_size)
        return {"temperature": sampling.temperature, "top_k": top_k, "top_p": sampling.top_p}

    def load(self) -> tuple[int, int]:
        """How many answers are being written or wait for it; they are not told apart."""
        return len(self._open), 0

    def is_alive(self) -> bool:
        """Whether it can answer."""
        return not self._is_started or self._manager.is_running()

    def stop(self) -> None:
        """End all answers and the thread."""
        for generation in list(self._open.values()):
            generation.put(EngineFailed("the server is stopping"))
        if self._is_started:
            self._manager.stop(block=True, timeout=STOP_SECONDS, hard_stop=True)


class BothEngines:
    """Answers requests that come together in shared forward passes, and the others one after the other.

    A request that comes while no other is answered is written by `Engine`: `generate` is faster for one, and the chat's
    cache is kept for its next turn. So is what `BatchingEngine` does not take, beside the batch.

    Args:
        model, paging: as in `BatchingEngine`.
        lone_too: whether a request that comes alone is answered by `BatchingEngine` as well.
        more: further arguments of `Engine`.
    """

    def __init__(self, model: PreTrainedModel, paging: ContinuousBatchingConfig, lone_too: bool, *more):
        self._together = BatchingEngine(model, paging)
        self._alone = Engine(twin(model), *more)
        self._lone_too = lone_too

    def submit(self, planned: Planned) -> list[Generation]:
        """Begin the answers of a request.

        Raises:
            EngineFailed: as the engines do.
        """
        is_lone = len(planned) == 1 and self.is_idle() and not self._lone_too
        batched = not is_lone and self._together.takes(planned)
        return (self._together if batched else self._alone).submit(planned)

    def is_idle(self) -> bool:
        """Whether nobody waits for an answer."""
        return not any(self.load())

    def load(self) -> tuple[int, int]:
        """How many answers are being written, and how many wait."""
        return tuple(map(sum, zip(self._together.load(), self._alone.load(), strict=True)))

    def is_alive(self) -> bool:
        """Whether it can answer."""
        return self._together.is_alive() and self._alone.is_alive()

    def stop(self) -> None:
        """End all answers and the threads."""
        self._together.stop()
        self._alone.stop()


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own with the same weights in memory.

    While a forward pass runs, transformers writes into the model's config (`is_causal`, and False in continuous batching),
    so two threads with one model would compute with each other's masks.
    """
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
