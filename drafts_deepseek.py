"""Speculative decoding: the model's multi-token-prediction (MTP) modules draft tokens, the model checks them in one forward.

    model.generate(**inputs, mtp_tokens=2)        # or `mtp_tokens` in generation_config.json, or use_mtp=True

From top to bottom: `RowCache`, a cache whose rows fill differently; `Drafter`, the MTP modules with caches of their own;
`Speculation`, the loop.

The accept rule is that of Leviathan et al. (arXiv:2211.17192): a draft d ~ q is accepted with probability
min(1, p(d) / q(d)), the first rejected one is replaced by a token drawn from max(p - q, 0) normalised; what comes out is
distributed as p, the model's own distribution after all logits processors. Greedy: accepted where it is the argmax.

A place counts tokens of a row from 0, its padding included. Shape letters: B batch, S tokens of a forward, N drafts,
V vocabulary, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from .attention_deepseek import GAPS
from .cache_deepseek import move_tokens, take_back
from .compat_deepseek import CACHE_NAME, cache_field
from .linear_deepseek import project

# Processors that look at the scores of a place and at nothing else, so that all places may go in one call.
_PLACE_WISE = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
)
# transformers' own that keep a state from one call to the next.
STATEFUL_PROCESSORS = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
GRAMMAR_LIBRARIES = ("xgrammar", "outlines", "outlines_core", "llguidance")  # whose processors do so too


def keeps_state(processor) -> bool:
    """Whether a logits processor must be called once for each token of the text, in order. Of others' (grammars of
    xgrammar and outlines do) it cannot be known, so it is taken for granted."""
    return isinstance(processor, STATEFUL_PROCESSORS) or type(processor).__module__.split(".")[0] != "transformers"


class RowCache:
    """A cache whose rows hold different numbers of tokens.

    Row b's tokens lie in slots 0 to filled[b] - 1. New tokens come into the slots behind the longest row, as cache
    layers have it; `keep` then moves them behind each row's own. What lies between is hidden by `mask`. Rows that are
    not `active` are finished: what happens to them does not matter, and they do not count for the longest.
    """

    def __init__(self, cache: Cache, prompt_mask: torch.Tensor | None, batch: int, filled: int):
        """prompt_mask: [B, any number], 0 for those of the first slots that are padding; None if there is none."""
        self.cache = cache
        self.prompt_mask = prompt_mask
        self.filled = [filled] * batch
        self.active = [True] * batch

    @property
    def length(self) -> int:
        """Slots in use."""
        return max(filled for filled, active in zip(self.filled, self.active, strict=True) if active)

    def places(self, count: int, device) -> torch.Tensor:
        """int64 [B, count], places of the next tokens."""
        return torch.tensor(self.filled, device=device)[:, None] + torch.arange(count, device=device)

    def mask(self, count: int, device) -> torch.Tensor | None:
        """int64 [B, length + count], what `count` new tokens may see; None if nothing is hidden."""
        length = self.length
        ragged = any(active and filled < length for filled, active in zip(self.filled, self.active, strict=True))
        if self.prompt_mask is None and not ragged:
            return None
        slots = torch.arange(length + count, device=device)
        mask = (slots < torch.tensor(self.filled, device=device)[:, None]) | (slots >= length)
        if self.prompt_mask is not None:
            width = min(self.prompt_mask.shape[1], length + count)
            mask[:, :width] &= self.prompt_mask[:, :width].bool().to(device)
        return mask.long()

    def keep(self, put: int, counts: list[int]):
        """Of the last `put` tokens, row b keeps its first counts[b]; the others are forgotten."""
        length = self.length
        targets = [filled if active else length for filled, active in zip(self.filled, self.active, strict=True)]
        if any(target != length for target in targets):
            for layer in self._layers():
                move_tokens(layer, length, put, targets)
        self.filled = [target + count for target, count in zip(targets, counts, strict=True)]
        self._take_back(length + put - self.length)

    def set_active(self, active: list[bool]):
        """Tells which rows go on; a row that does not gives its slots up."""
        length = self.length
        self.active = active
        self._take_back(length - self.length)

    def forget(self, count: int):
        """Every row forgets its last `count` tokens."""
        self.filled = [filled - count for filled in self.filled]
        self._take_back(count)

    def _take_back(self, count: int):
        for layer in self._layers():
            take_back(layer, count)

    def _layers(self) -> list:
        return list(dict.fromkeys(self.cache.layers))  # each once, see Drafter


class Drafter:
    """The first of a model's MTP modules, each with a cache of its own.

    Module k (from 1) makes of its predecessor's state at place t (module 1: of the model's) and token t + k the
    prediction of token t + k + 1. If the last known token is n, all modules run up to place n - 1: module 1 drafts token
    n + 1 from known tokens, module 2 token n + 2 from that draft, and so on. Further drafts come from the last module
    applied again, at places n, n + 1, ..., with its own state in place of the one that is not there yet.

    What was made from drafts is taken back and made again from the tokens that came to stand there: module k starts
    k - 1 places before the others' first new one, for which it needs one state of module k - 1 from before, kept in
    `held`.
    """

    def __init__(self, model, num_drafts: int, prompt_mask: torch.Tensor | None, batch: int, prompt_length: int):
        config = model.config
        self.model = model
        self.num_drafts = num_drafts
        # a prompt shorter than the chain of modules gives the later ones nothing to begin with
        num_modules = min(config.num_nextn_predict_layers, num_drafts, prompt_length)
        self.rows = []
        for k in range(num_modules):
            index = config.num_hidden_layers + k
            cache, layer = DynamicCache(config=config), model.model.make_cache_layer(index)
            # one layer under every index: masks are made for index 0, the module asks for its own
            cache.layers = [layer] * (index + 1)
            self.rows.append(RowCache(cache, prompt_mask, batch, filled=0))
        self.held: list[torch.Tensor] = []  # [B, 1, D] for each module but the first

    def advance(
        self,
        states: torch.Tensor,
        next_embeds: torch.Tensor,
        counts: list[int],
        position_offset: torch.Tensor,
        choose: Callable[[int, torch.Tensor], torch.Tensor] | None,
    ):
        """Takes in what is known now, and drafts.

        Args:
            states: [B, S, D], the model's `last_hidden_state` at new places; of row b the first counts[b] are right.
            next_embeds: [B, S, D], embeddings of the tokens that follow those places.
            position_offset: int64 [B or 1, 1], position ids minus places.
            choose: (number of the draft from 0, logits [B, V]) -> tokens [B]; None to draft nothing.
        """
        each, extra = torch.arange(len(counts), device=states.device), 0
        kept, held, drafts = torch.tensor(counts, device=states.device), [], 0
        draft_embeds = next_embeds[:, 0]  # of the draft before; of none yet
        for k, rows in enumerate(self.rows):
            if k:  # one place further back than the module before, of which the first call has none
                states = states[:, :-1] if choose is None else states
                if self.held:
                    states = torch.cat((self.held[k - 1], states), dim=1)
                else:
                    next_embeds, kept = next_embeds[:, 1:], kept - 1
                if choose is not None:
                    next_embeds = torch.cat((next_embeds, next_embeds[:, :1]), dim=1)
                    next_embeds[each, kept + k - 1] = draft_embeds
            states = self._run(k, states, next_embeds, position_offset)
            if k < len(self.rows) - 1:
                held.append(states[each, kept - 1][:, None])
            extra = k if choose is not None else 0  # columns that stand on drafts
            if choose is not None:
                draft_embeds = self._draft(k, states[each, kept + extra - 1], choose, drafts)
                drafts += 1
            last = k == len(self.rows) - 1
            rows.keep(states.shape[1], (kept + (extra if last else 0)).tolist())
        self.held = held
        if choose is None:
            return
        state = states[each, kept + extra - 1][:, None]
        for draft in range(drafts, self.num_drafts):
            state = self._run(k, state, draft_embeds[:, None], position_offset)
            draft_embeds = self._draft(k, state[:, 0], choose, draft)
            rows.keep(1, [1] * len(counts))
        rows.forget(self.num_drafts - 1)

    def set_active(self, active: list[bool]):
        """Tells which rows go on."""
        for rows in self.rows:
            rows.set_active(active)

    def _run(self, k: int, states: torch.Tensor, next_embeds: torch.Tensor, position_offset) -> torch.Tensor:
        rows, count, device = self.rows[k], states.shape[1], next_embeds.device
        return self.model.model.run_mtp_module(
            k,
            states,
            next_embeds,
            attention_mask=rows.mask(count, device),
            position_ids=(rows.places(count, device) + position_offset.to(device)).clamp(min=0),
            past_key_values=rows.cache,
        )

    def _draft(self, k: int, state: torch.Tensor, choose, number: int) -> torch.Tensor:
        """state [B, D] -> embeddings [B, D] of the tokens drafted from it"""
        module = self.model.model.layers[self.model.config.num_hidden_layers + k]
        tokens = choose(number, project(self.model.lm_head, module.shared_head.norm(state)))
        return self.model.get_input_embeddings()(tokens)


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """What transformers returns (`past_key_values` for one row only), and how the drafts did.

    rounds: forwards of the model after the prompt's.
    drafted: int64 [mtp_tokens], drafts made for each place behind the last known token, over all rounds and rows.
    accepted: int64 [mtp_tokens], those of them that were accepted, all before them too.
    """

    rounds: int | None = None
    drafted: torch.Tensor | None = None
    accepted: torch.Tensor | None = None


class Speculation:
    """One call of `generate` with drafts.

    `ids` [B, room] holds each row's tokens, `lengths` how many they are; a row's last one is known but not yet run. A
    round drafts N tokens, runs the model over the last token and the drafts, accepts some, and draws one more.
    """

    def __init__(
        self,
        model,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        model_kwargs: dict,
    ):
        self.model = model
        self.processor = logits_processor
        self.draft_processor = LogitsProcessorList([one for one in logits_processor if not keeps_state(one)])
        self.in_order = len(self.draft_processor) < len(logits_processor)
        self.criteria = stopping_criteria
        self.config = generation_config
        self.kwargs = model_kwargs
        self.num_drafts = generation_config.mtp_tokens
        self.batch, self.prompt_width = input_ids.shape
        room = generation_config.max_length - self.prompt_width + self.num_drafts + 1
        self.ids = torch.cat((input_ids, input_ids.new_zeros(self.batch, room)), dim=1)
        self.each = torch.arange(self.batch, device=input_ids.device)
        self.lengths = [self.prompt_width] * self.batch
        self.active = [True] * self.batch
        # Rows that accept different numbers of drafts have hidden slots between their tokens, which not every attention
        # allows; and a processor with a state takes a token of every row at once.
        allows_gaps = all(GAPS in kind.supports for kind in model.model.attention_kinds.values())
        self.in_step = self.batch > 1 and (self.in_order or not allows_gaps)
        self.draft_probs: list[torch.Tensor] = []  # [B, V] a draft, when sampling
        self.records: dict[str, list[torch.Tensor]] = {"scores": [], "logits": []}  # [B, V] a generated place
        self.rounds = 0
        self.drafted = torch.zeros(self.num_drafts, dtype=torch.long)
        self.accepted = torch.zeros(self.num_drafts, dtype=torch.long)

    def run(self, streamer=None) -> torch.Tensor | SpeculativeOutput:
        """Generates until all rows have stopped."""
        states, prompt_embeds = self._prefill()
        counts = self._take(states[:, -1:], num_drafts=0, streamer=streamer)
        known = prompt_embeds[:, 1:]  # the tokens after the places of `states`, without the new ones
        forward = self.model.model
        if self.model._valid_auto_compile_criteria(self.kwargs, self.config):
            forward = forward.get_compiled_call(self.config.compile_config)
        with self.model._optimize_model_for_decode():
            while any(self.active):
                going = [True] * self.batch if self.in_step else self.active
                self.rows.set_active(going)
                self.drafter.set_active(going)
                new = self._window([n - count for n, count in zip(self.lengths, counts, strict=True)], max(counts))
                next_embeds = torch.cat((known, self._embed(new)), dim=1)
                num_known, known = known.shape[1], known[:, :0]
                self.draft_probs.clear()
                self.drafter.advance(
                    states[:, : next_embeds.shape[1]],
                    next_embeds,
                    [num_known + count for count in counts],
                    self.drafter_offset,
                    self._choose,
                )
                longest = max(n for n, active in zip(self.lengths, self.active, strict=True) if active)
                num_drafts = min(self.num_drafts, self.config.max_length - 1 - longest)  # a static cache ends there
                states = self._check(num_drafts, forward)
                counts = self._take(states, num_drafts, streamer)
                self.rows.keep(num_drafts + 1, counts)
        if streamer is not None:
            streamer.end()
        return self._output()

    def _prefill(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the model over the prompt, and the MTP modules over all of it but the last chunk -> that chunk's states
        and embeddings, [B, S, D] each"""
        cache = self.kwargs[CACHE_NAME]
        past, count = check_new_tokens(self.prompt_width, self.config, self.kwargs)
        embeds, mask = self.kwargs.get("inputs_embeds"), self.kwargs.get("attention_mask")
        total, prompt_mask = past + count, None
        if mask is not None and not bool(mask.all()):
            prompt_mask = nn.functional.pad(mask, (total - mask.shape[1], 0), value=1)
        positions = self.kwargs["position_ids"][..., -count:].to(self.model.device)  # [B or 1, count]
        self.position_offset = positions[:, -1:] - (total - 1)
        self.drafter_offset = self.position_offset + past
        self.rows = RowCache(cache, prompt_mask, self.batch, filled=past)
        drafter_mask = None if prompt_mask is None else prompt_mask[:, past:]
        self.drafter = Drafter(self.model, self.num_drafts, drafter_mask, self.batch, count)

        def tokens(start: int, stop: int) -> dict[str, torch.Tensor]:
            if embeds is not None:
                return {"inputs_embeds": embeds[:, past + start : past + stop]}
            first = self.prompt_width - count
            return {"input_ids": self.ids[:, first + start : first + stop].to(self.model.device)}

        def embedded(start: int, stop: int) -> torch.Tensor:
            (given,) = tokens(start, stop).values()
            return given if embeds is not None else self._embed(given)

        size, stop = max(self.config.prefill_chunk_size or count, len(self.drafter.rows)), 0
        states: Any = None
        for start in range(0, count, size):
            stop = min(start + size, count)
            states = self.model.model(
                **tokens(start, stop),
                attention_mask=self.rows.mask(stop - start, positions.device),
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            counts = [stop - start] * self.batch
            self.rows.keep(stop - start, counts)
            if stop < count:
                self.drafter.advance(states, embedded(start + 1, stop + 1), counts, self.drafter_offset, choose=None)
        return states, embedded(start, stop)

    def _check(self, num_drafts: int, forward: Callable) -> torch.Tensor:
        """The model's states [B, num_drafts + 1, D] at the last known token and the drafts."""
        device, count = self.model.device, num_drafts + 1
        tokens = self._window([length - 1 for length in self.lengths], count).to(device)
        positions = self.rows.places(count, device) + self.position_offset
        mask = self.rows.mask(count, device)
        if forward is not self.model.model:  # a compiled step cannot make it
            mask = self.model.create_masks_for_generate(
                config=self.model.config,
                inputs_embeds=torch.empty(*tokens.shape, 0, dtype=self.model.dtype, device=device),
                attention_mask=mask,
                past_key_values=self.rows.cache,
                position_ids=positions,
            )
        self.rounds += 1
        return forward(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.rows.cache,
            use_cache=True,
        ).last_hidden_state

    def _take(self, states: torch.Tensor, num_drafts: int, streamer) -> list[int]:
        """Accepts and draws tokens from states [B, num_drafts + 1, D] -> how many new tokens each row has."""
        logits = self._logits(states)
        drafts = self._window(self.lengths, num_drafts)
        if self.in_order:
            scores, tokens, matches = self._accept_in_order(logits, drafts)
        else:
            scores = self._process(self.processor, logits, first=0)
            tokens, matches = self._accept(scores, drafts, self.draft_probs)
        matches = matches.tolist()
        if self.in_step:
            matches = [min(match for match, active in zip(matches, self.active, strict=True) if active)] * self.batch
        for match in (match for match, active in zip(matches, self.active, strict=True) if active):
            self.drafted[:num_drafts] += 1
            self.accepted[:match] += 1
        counts = [match + 1 for match in matches]
        starts = torch.tensor(self.lengths, device=self.ids.device)[:, None]
        self.ids.scatter_(1, starts + torch.arange(num_drafts + 1, device=self.ids.device), tokens)
        self._record(scores, logits, counts)
        stops = self._find_stops(counts)
        if streamer is not None:
            for token in self.ids[0, self.lengths[0] : stops[0] or self.lengths[0] + counts[0]].cpu():
                streamer.put(token[None])
        for row, (active, stop) in enumerate(zip(self.active, stops, strict=True)):
            if not self.in_step:
                counts[row] = 1 if not active else counts[row] if stop is None else stop - self.lengths[row]
            if active:
                self.lengths[row] = self.lengths[row] + counts[row] if stop is None else stop
        self.active = [active and stop is None for active, stop in zip(self.active, stops, strict=True)]
        return counts

    def _accept(
        self, scores: torch.Tensor, drafts: torch.Tensor, draft_probs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """scores [B, n + 1, V], drafts [B, n] and, when sampling, what they were drawn from, n or more [B, V] -> tokens
        [B, n + 1] and how many drafts are accepted, m [B]: the first m tokens are those, the next is drawn anew, the rest
        means nothing."""
        num_drafts = drafts.shape[1]
        if not self.config.do_sample:
            tokens = scores.argmax(dim=-1)
            return tokens, (tokens[:, :num_drafts] == drafts).long().cumprod(dim=1).sum(dim=1)
        probs = scores.softmax(dim=-1)
        drawn_from = torch.stack([*draft_probs[:num_drafts], torch.zeros_like(probs[:, 0])], dim=1)
        p, q = (x[:, :num_drafts].gather(2, drafts[:, :, None])[:, :, 0] for x in (probs, drawn_from))
        matches = (torch.rand_like(p) * q < p).long().cumprod(dim=1).sum(dim=1)
        target = probs[self.each, matches]
        rest = (target - drawn_from[self.each, matches]).clamp(min=0)
        # where p and q differ by rounding only, nothing is left
        rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, target)
        tokens = nn.functional.pad(drafts, (0, 1))
        tokens[self.each, matches] = _draw(rest)
        return tokens, matches

    def _accept_in_order(
        self, logits: torch.Tensor, drafts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """logits [B, n + 1, V], drafts [B, n] -> scores [B, n + 1, V] and what `_accept` gives, m alike for all rows.

        Place by place until a row rejects its draft or ends, so that processors see the tokens of the text, each once, in
        order.
        """
        active = torch.tensor(self.active, device=logits.device)
        ends = self.config._eos_token_tensor
        scores, tokens = torch.zeros_like(logits), torch.zeros_like(logits[..., 0], dtype=torch.long)
        for place in range(logits.shape[1]):
            scores[:, place] = self.processor(self._text(place), logits[:, place].clone())
            draft = drafts[:, place : place + 1]  # none at the last place
            same = scores[:, place : place + 1].expand(-1, draft.shape[1] + 1, -1)
            token, match = self._accept(same, draft, self.draft_probs[place : place + 1])
            tokens[:, place] = token[:, 0]
            ended = ends is not None and bool(torch.isin(tokens[active, place], ends.to(tokens.device)).any())
            if ended or not match[active].all() or not draft.shape[1]:
                break
        return scores, tokens, torch.full((self.batch,), place)

    def _text(self, num_drafts: int) -> Any:
        """Ids of all rows up to the first drafts, of the length that those have that go on; padding behind the others."""
        text = self.ids[:, : self.lengths[self.active.index(True)] + num_drafts].clone()
        for row, (length, active) in enumerate(zip(self.lengths, self.active, strict=True)):
            if not active:
                text[row, length:] = self.config._pad_token_tensor
        return text

    def _choose(self, number: int, logits: torch.Tensor) -> torch.Tensor:
        """Draft `number` of each row from the draft's logits [B, V] -> [B]"""
        logits = logits[:, None].to(self.ids.device, torch.float32)  # [B, 1, V]
        scores = self._process(self.draft_processor, logits, first=number)[:, 0]
        if self.config.do_sample:
            self.draft_probs.append(scores.softmax(dim=-1))
            tokens = _draw(self.draft_probs[-1])
        else:
            tokens = scores.argmax(dim=-1)
        self.ids[self.each, torch.tensor(self.lengths, device=self.ids.device) + number] = tokens
        return tokens.to(logits.device)

    def _process(self, processor: LogitsProcessorList, logits: torch.Tensor, first: int) -> torch.Tensor:
        """logits [B, n, V] of the tokens that follow the first lengths[b] + first, + 1, ... -> their scores

        Most processors want rows of one length, and some count them: so one call for each length that occurs.
        """
        if not processor:
            return logits
        if all(type(one) in _PLACE_WISE for one in processor):
            scores = logits.flatten(0, 1)  # [B * n, V]
            for one in processor:
                scores = one(self.ids, scores)
            return scores.view(logits.shape)
        scores, count = logits.clone(), logits.shape[1]
        starts = [length + first for length in self.lengths]
        wanted = {start + i for start, active in zip(starts, self.active, strict=True) if active for i in range(count)}
        for width in sorted(wanted):
            columns = [width - start for start in starts]
            rows = [row for row, column in enumerate(columns) if 0 <= column < count]
            inside = torch.tensor(columns, device=scores.device).clamp(0, count - 1)
            # a copy, since some processors write into what they get
            text: Any = self.ids[:, :width]
            processed = processor(text, logits[self.each, inside].clone())
            scores[rows, inside[rows]] = processed[rows]
        return scores

    def _find_stops(self, counts: list[int]) -> list[int | None]:
        """The length at which each row stops among its new tokens, if it does."""
        starts = self.lengths
        active = [row for row, active in enumerate(self.active) if active]
        widths = sorted({starts[row] + i for row in active for i in range(1, counts[row] + 1)})
        scores = tuple(self.records["scores"]) or None
        stopped = torch.stack(
            [
                self.criteria(self.ids[:, :width], scores and scores[: width - self.prompt_width]).to(self.ids.device)
                for width in widths
            ]
        ).tolist()  # bool [widths, B]
        stops: list[int | None] = [None] * self.batch
        for row in active:
            own = range(starts[row] + 1, starts[row] + counts[row] + 1)
            stops[row] = next(
                (width for width, stop in zip(widths, stopped, strict=True) if stop[row] and width in own), None
            )
        return stops

    def _record(self, scores: torch.Tensor, logits: torch.Tensor, counts: list[int]):
        """Keeps what `output_scores` and `output_logits` ask for; zeros where a row has ended."""
        if not self.config.return_dict_in_generate:
            return
        for name, values in (("scores", scores), ("logits", logits)):
            if not getattr(self.config, f"output_{name}"):
                continue
            record = self.records[name]
            for row, active in enumerate(self.active):
                for i in range(counts[row] if active else 0):
                    place = self.lengths[row] + i - self.prompt_width
                    while len(record) <= place:
                        record.append(torch.zeros_like(values[:, 0]))
                    record[place][row] = values[row, i]

    def _output(self) -> torch.Tensor | SpeculativeOutput:
        sequences: Any = self.ids[:, : max(self.lengths)].clone()
        for row, length in enumerate(self.lengths):
            if length < sequences.shape[1]:
                sequences[row, length:] = self.config._pad_token_tensor
        if not self.config.return_dict_in_generate:
            return sequences
        new = sequences.shape[1] - self.prompt_width
        records: dict[str, Any] = {name: tuple(record[:new]) or None for name, record in self.records.items()}
        return SpeculativeOutput(
            sequences=sequences,
            **cache_field(self.rows.cache if self.batch == 1 else None),
            rounds=self.rounds,
            drafted=self.drafted,
            accepted=self.accepted,
            **records,
        )

    def _window(self, starts: list[int], count: int) -> torch.Tensor:
        """The `count` ids of each row from starts[b] on, [B, count]"""
        places = torch.tensor(starts, device=self.ids.device)[:, None] + torch.arange(count, device=self.ids.device)
        return self.ids.gather(1, places)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.get_input_embeddings()(tokens.to(self.model.device))

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        return project(self.model.lm_head, states).to(self.ids.device, torch.float32)


def _draw(weights: torch.Tensor) -> torch.Tensor:
    """One index for each row of weights [B, V], with probability in their proportion -> [B]

    torch.multinomial draws a random number for each of the V; one is enough. In float64, so that the end of the sum is
    never met.
    """
    sums = weights.cumsum(dim=-1, dtype=torch.float64)
    drawn = torch.rand_like(sums[:, :1]) * sums[:, -1:]
    return torch.searchsorted(sums, drawn, right=True)[:, 0]  # the first sum above: its weight is not zero


def count_cached(cache: Cache | None) -> int:
    """Tokens in a cache."""
    return 0 if cache is None else int(cache.get_seq_length())


def check_new_tokens(prompt_width: int, generation_config: Any, model_kwargs: dict) -> tuple[int, int]:
    """-> how many tokens the cache holds, and how many of a prompt it does not

    Args:
        prompt_width: of `input_ids`, which are all tokens so far or, with a wider mask, the new ones.
        model_kwargs: what `generate` hands from step to step.

    Raises:
        ValueError: none of the tokens is new.
    """
    cache, embeds, mask = (model_kwargs.get(name) for name in (CACHE_NAME, "inputs_embeds", "attention_mask"))
    past = count_cached(cache)
    mask_width = getattr(generation_config, "_mask_length", prompt_width) if mask is None else mask.shape[-1]
    if embeds is not None:
        count = embeds.shape[1] - past
    elif mask_width == prompt_width:
        count = prompt_width - past
    else:
        count = prompt_width  # the cache's tokens are not among them
    if past and count < 1:
        raise ValueError(
            f"`past_key_values` holds {past} tokens and the inputs are {past + count} with those counted: at least "
            "one must be new. Pass all tokens so far and a new one, or crop the cache."
        )
    return past, count
