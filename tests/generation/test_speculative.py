"""`generate(mtp_tokens=...)`: greedy the tokens of plain greedy, sampled the model's own distribution."""

import json

import pytest
import torch
from checks import assert_close
from deepseek_repo import drafts_deepseek as drafts
from tiny import make_model, make_tokens, randomise
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

GREEDY = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
FAMILIES = ("llama", "v2_lite", "v3", "v3_mtp2", "v32", "nsa")
STATIC = {"cache_implementation": "static", "disable_compile": True}


def mtp_model(family: str, **overrides):
    modules = 2 if family == "v3_mtp2" else 1
    return make_model(family, **{"num_nextn_predict_layers": modules, **overrides})


def padded_batch() -> dict[str, torch.Tensor]:
    ids, mask = make_tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[1, :9], mask[2, :3] = 0, 0
    return {"input_ids": ids.masked_fill(mask == 0, 2), "attention_mask": mask}


@pytest.fixture
def oracle(monkeypatch):
    """A function (continuations [B, n], quality): from then on drafts are what the continuations say, right for a share
    `quality` of places, each row having its own; the MTP modules run all the same."""

    def install(prompt_width: int, continuations: torch.Tensor, quality: float):
        right = torch.rand(continuations.shape, generator=torch.Generator().manual_seed(1)) < quality
        wrong = (continuations + 1) % 128
        choose = drafts.Speculation._choose

        def choose_from_oracle(self, number, logits):
            choose(self, number, logits)
            places = torch.tensor(self.lengths)[:, None] + number
            inside = (places - prompt_width).clamp(max=continuations.shape[1] - 1)
            tokens = torch.where(right, continuations, wrong).gather(1, inside)
            self.ids.scatter_(1, places, tokens)
            return tokens[:, 0]

        monkeypatch.setattr(drafts.Speculation, "_choose", choose_from_oracle)

    return install


class TestGreedy:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 6}, STATIC], ids=["", "chunks", "static"])
    @pytest.mark.parametrize("quality", [0.0, 0.6, 1.0])
    def test_tokens_of_plain_greedy(self, family, settings, quality, oracle):
        if settings is STATIC and family == "nsa":
            pytest.skip("it has no static cache")
        model, batch = mtp_model(family), padded_batch()
        expected = model.generate(**batch, **GREEDY)
        oracle(20, expected[:, 20:], quality)
        outputs = model.generate(**batch, mtp_tokens=3, return_dict_in_generate=True, **settings, **GREEDY)
        assert torch.equal(outputs.sequences, expected)
        if quality == 1:
            assert outputs.rounds == 4  # 1 token of the prompt's forward, then 4 + 4 + 4 + 3
            assert torch.equal(outputs.accepted, outputs.drafted)
        elif quality == 0:
            assert outputs.rounds == 15
            assert not outputs.accepted.any()
        else:
            assert outputs.rounds < 15
            assert outputs.accepted[0] > 0
            assert (outputs.accepted < outputs.drafted).all()

    @pytest.mark.parametrize("mtp_tokens", [1, 2, 5])
    @pytest.mark.parametrize("family", ["v3", "v3_mtp2"])
    def test_own_drafts(self, family, mtp_tokens):
        model, batch = mtp_model(family), padded_batch()
        outputs = model.generate(**batch, mtp_tokens=mtp_tokens, **GREEDY)
        assert torch.equal(outputs, model.generate(**batch, **GREEDY))

    @pytest.mark.parametrize("width", [1, 2, 3])
    def test_prompts_shorter_than_the_chain(self, width):
        model, prompt = mtp_model("v3", num_nextn_predict_layers=3), make_tokens(2, width)
        assert torch.equal(model.generate(prompt, mtp_tokens=4, **GREEDY), model.generate(prompt, **GREEDY))

    def test_module_that_predicts_perfectly(self):
        """Attention and MLPs silenced, the next token depends on the last one only, and the module can say it: the real
        chain of drafts, applied to itself, is right every time."""
        model = mtp_model("v3")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                for name, parameter in layer.mlp.named_parameters():
                    if "down_proj" in name:
                        parameter.zero_()
            module = model.model.layers[-1]
            module.eh_proj.weight.copy_(torch.cat((torch.eye(32), torch.zeros(32, 32)), dim=1))
            module.enorm.weight.fill_(1)
            module.shared_head.norm.weight.copy_(model.model.norm.weight)
        prompt = make_tokens(2, 8)
        outputs = model.generate(prompt, mtp_tokens=3, return_dict_in_generate=True, **GREEDY)
        assert torch.equal(outputs.sequences, model.generate(prompt, **GREEDY))
        assert torch.equal(outputs.accepted, outputs.drafted)
        assert outputs.rounds == 4

    def test_going_on_from_a_cache(self):
        model, prompt, turn = mtp_model("v3"), make_tokens(1, 12), make_tokens(1, 11, seed=1)
        first = model.generate(prompt, mtp_tokens=2, return_dict_in_generate=True, **GREEDY)
        assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
        longer = torch.cat((first.sequences, turn), dim=1)
        actual = model.generate(longer, past_key_values=first.past_key_values, mtp_tokens=2, **GREEDY)
        assert torch.equal(actual, model.generate(longer, **GREEDY))

    def test_prompt_of_embeddings(self):
        model, prompt = mtp_model("v3"), make_tokens(2, 12)
        embeds = model.get_input_embeddings()(prompt)
        actual = model.generate(inputs_embeds=embeds, mtp_tokens=2, **GREEDY)
        assert torch.equal(actual, model.generate(prompt, **GREEDY)[:, 12:])

    def test_static_cache_of_the_user(self):
        model, prompt = mtp_model("v3"), make_tokens(2, 12)
        cache = StaticCache(config=model.config, max_cache_len=27)  # what plain generation needs, and no slot more
        actual = model.generate(prompt, past_key_values=cache, mtp_tokens=3, disable_compile=True, **GREEDY)
        assert torch.equal(actual, model.generate(prompt, **GREEDY))

    @pytest.mark.parametrize("family", ["v3", "nsa"])
    def test_processors_that_read_the_row(self, family, oracle):
        """Such as the repetition penalty and the least length, for rows that are not equally long."""
        model, batch = mtp_model(family), padded_batch()
        settings = {**GREEDY, "repetition_penalty": 1.8, "no_repeat_ngram_size": 2, "min_new_tokens": 9}
        settings["eos_token_id"] = model.generate(**batch, **GREEDY)[0, 24].item()
        expected = model.generate(**batch, **settings)
        assert not torch.equal(
            expected, model.generate(**batch, **{**GREEDY, "eos_token_id": settings["eos_token_id"]})
        )
        padding = torch.zeros(3, 16 - (expected.shape[1] - 20), dtype=torch.long)
        oracle(20, torch.cat((expected[:, 20:], padding), dim=1), 0.6)
        assert torch.equal(model.generate(**batch, mtp_tokens=3, **settings), expected)


class Grammar(LogitsProcessor):
    """As those of xgrammar and outlines: a state for each row, moved on by the row's last token at each call.

    After token t come those with the remainder (t + number of tokens) modulo 3, and the end; after the end, anything.
    """

    def __init__(self, end: int | None):
        self.end, self.width, self.states, self.tokens = end, None, None, []

    def __call__(self, input_ids, scores):
        rows = range(len(input_ids))
        if self.width is None:
            self.states = [0 for _ in rows]
        else:
            assert input_ids.shape[1] == self.width + 1, "called out of order"
            for row in rows:
                token = input_ids[row, -1].item()
                if self.states[row] is None:
                    continue
                assert token == self.end or token % 3 == self.states[row], "a token that the grammar did not allow"
                self.states[row] = None if token == self.end else (token + self.width) % 3
                self.tokens.append((row, token))
        self.width = input_ids.shape[1]
        scores = scores.clone()
        for row, state in enumerate(self.states):
            if state is not None:
                hidden = torch.arange(scores.shape[1]) % 3 != state
                if self.end is not None:
                    hidden[self.end] = False
                scores[row, hidden] = float("-inf")
        return scores


class TestProcessorsWithAState:
    @pytest.mark.parametrize("rows", [1, 3])
    @pytest.mark.parametrize("quality", [None, 0.0, 0.7, 1.0])
    @pytest.mark.parametrize("family", ["v3", "v3_mtp2", "v32", "nsa"])
    def test_grammars(self, family, rows, quality, oracle):
        model, batch = mtp_model(family), padded_batch()
        batch = {name: states[:rows] for name, states in batch.items()}
        free = model.generate(**batch, **GREEDY, logits_processor=LogitsProcessorList([Grammar(None)]))
        assert not torch.equal(free, model.generate(**batch, **GREEDY)), "the grammar forbids nothing"
        for end in (None, free[0, 27].item()):  # the first row ends before the others
            settings = {**GREEDY, "eos_token_id": end}
            plain, drafted = Grammar(end), Grammar(end)
            expected = model.generate(**batch, **settings, logits_processor=LogitsProcessorList([plain]))
            if quality is not None:
                padding = torch.zeros(rows, 16 - (expected.shape[1] - 20), dtype=torch.long)
                oracle(20, torch.cat((expected[:, 20:], padding), dim=1), quality)
            outputs = model.generate(
                **batch,
                **settings,
                logits_processor=LogitsProcessorList([drafted]),
                mtp_tokens=3,
                return_dict_in_generate=True,
            )
            assert torch.equal(outputs.sequences, expected)
            assert drafted.tokens == plain.tokens
            if quality == 1.0 and end is None:
                assert outputs.rounds == 4, "drafts that are right are not accepted"

    @pytest.mark.parametrize("sample", [False, True])
    def test_watermark(self, sample):
        """Of transformers, which counts its calls."""
        model, prompt = mtp_model("v3"), make_tokens(2, 12)

        def generate(**more):
            torch.manual_seed(0)
            watermark = SynthIDTextWatermarkLogitsProcessor(
                ngram_len=3, keys=[7, 11, 13], sampling_table_size=64, sampling_table_seed=0, context_history_size=8,
                device="cpu",
            )  # fmt: skip
            settings = {**GREEDY, "do_sample": sample, "logits_processor": LogitsProcessorList([watermark])}
            return model.generate(prompt, **settings, **more)

        assert generate(mtp_tokens=2).shape == (2, 28)
        if not sample:
            assert torch.equal(generate(mtp_tokens=2), generate())

    def test_reported_scores_are_those_of_plain_generation(self):
        model, prompt = mtp_model("v3"), make_tokens(1, 12)
        settings = {**GREEDY, "return_dict_in_generate": True, "output_scores": True}
        plain, drafted = (
            model.generate(prompt, logits_processor=LogitsProcessorList([Grammar(None)]), **settings, **more)
            for more in ({}, {"mtp_tokens": 2})
        )
        assert_close(torch.stack(drafted.scores).clamp(min=-1e9), torch.stack(plain.scores).clamp(min=-1e9), "scores")


class TestDrafts:
    """The drafter against its definition: the modules over whole rows, without caches."""

    @pytest.mark.parametrize("family", ["v3", "v3_mtp2", "v32", "llama", "nsa"])
    @pytest.mark.parametrize("chunk", [None, 6])
    @torch.no_grad()
    def test_equal_to_whole_rows(self, family, chunk, oracle, monkeypatch):
        model, batch = mtp_model(family), padded_batch()
        num_drafts, seen = 4, []
        original = drafts.Speculation._choose

        def spy(self, number, logits):
            rows = [(row, self.ids[row, : self.lengths[row] + number].clone()) for row in range(3) if self.active[row]]
            seen.append((number, rows, logits.clone()))
            return original(self, number, logits)

        expected = model.generate(**batch, **GREEDY)
        monkeypatch.setattr(drafts.Speculation, "_choose", spy)
        oracle(20, expected[:, 20:], 0.6)
        model.generate(**batch, mtp_tokens=num_drafts, prefill_chunk_size=chunk, **GREEDY)
        assert len(seen) > 8
        for number, rows, logits in seen:
            for row, ids in rows:
                first = int((batch["attention_mask"][row] == 0).sum())
                wanted = self.slow_logits(model, ids[first:], number)
                assert (logits[row] - wanted).abs().max() < 1e-3, f"draft {number} of row {row}, {len(ids)} tokens"

    @staticmethod
    def slow_logits(model, ids: torch.Tensor, number: int) -> torch.Tensor:
        """Logits [V] of draft `number` (from 0), the drafts before it being the last `number` of the ids."""
        known = len(ids) - number
        states = model.model(ids[None, : known - 1], use_cache=False).last_hidden_state
        num_modules = model.config.num_nextn_predict_layers
        for k in range(min(number + 1, num_modules)):
            embeds = model.get_input_embeddings()(ids[None, k + 1 : known + k])
            before, states = states, run_whole(model, k, states, embeds)
        for draft in range(num_modules, number + 1):
            before = torch.cat((before, states[:, -1:]), dim=1)
            embeds = model.get_input_embeddings()(ids[None, num_modules : known + draft])
            states = run_whole(model, num_modules - 1, before, embeds)
        norm = model.model.layers[model.config.num_hidden_layers + min(number, num_modules - 1)].shared_head.norm
        return model.lm_head(norm(states[0, -1]))


def run_whole(model, k: int, states: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(embeds.shape[1])[None]
    return model.model.run_mtp_module(k, states, embeds, None, positions, None)


class TestSampling:
    """Chi-square of many sampled continuations against the probabilities of all continuations."""

    VOCAB, LENGTH, ROWS = 10, 3, 4000

    @pytest.fixture
    def model(self):
        model = make_model("v3", vocab_size=self.VOCAB)
        with (
            torch.no_grad()
        ):  # drafts that resemble the truth: the module's head sees what the model's does, and noise
            model.model.layers[-1].shared_head.norm.weight.copy_(model.model.norm.weight)
        return model

    PROMPT = torch.tensor([[3, 7, 4, 5, 9, 3, 6]])
    WARPERS = (
        ({"top_k": 0}, LogitsProcessorList()),
        (
            {"temperature": 1.5, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.3},
            LogitsProcessorList(
                [
                    RepetitionPenaltyLogitsProcessor(1.3),
                    TemperatureLogitsWarper(1.5),
                    TopKLogitsWarper(7),
                    TopPLogitsWarper(0.9),
                ]
            ),
        ),
    )

    @torch.no_grad()
    def exact(self, model, processors) -> torch.Tensor:
        """Probabilities of all VOCAB ** LENGTH continuations."""
        ids, probs = self.PROMPT, torch.ones(1)
        for _ in range(self.LENGTH):
            scores = processors(ids, model(ids, use_cache=False).logits[:, -1])
            probs = (probs[:, None] * scores.softmax(dim=-1)).flatten()
            tokens = torch.arange(self.VOCAB).repeat(len(ids))
            ids = torch.cat((ids.repeat_interleave(self.VOCAB, dim=0), tokens[:, None]), dim=1)
        return probs

    def sample(self, model, settings, **more):
        torch.manual_seed(0)
        outputs = model.generate(
            self.PROMPT.expand(self.ROWS, -1),
            **{"max_new_tokens": self.LENGTH, "do_sample": True, "eos_token_id": None, "pad_token_id": 2},
            **{"return_dict_in_generate": True, **settings, **more},
        )
        new = outputs.sequences[:, self.PROMPT.shape[1] :]
        places = (new * self.VOCAB ** torch.arange(self.LENGTH - 1, -1, -1)).sum(dim=1)
        return torch.bincount(places, minlength=self.VOCAB**self.LENGTH), outputs

    def p_value(self, counts: torch.Tensor, probs: torch.Tensor) -> float:
        expected = probs.double() * self.ROWS
        order = expected.argsort(descending=True)
        counts, expected = counts[order].double(), expected[order]
        own = int((expected >= 8).sum())  # the rare ones together
        counts = torch.cat((counts[:own], counts[own:].sum()[None]))
        expected = torch.cat((expected[:own], expected[own:].sum()[None]))
        statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()
        return torch.special.gammaincc(torch.tensor(own / 2, dtype=torch.double), statistic / 2).item()

    @pytest.mark.parametrize(("settings", "processors"), WARPERS, ids=["plain", "warped"])
    def test_distribution(self, model, settings, processors):
        probs = self.exact(model, processors)
        counts, outputs = self.sample(model, settings, mtp_tokens=2)
        assert 0.05 < outputs.accepted[0] / outputs.drafted[0] < 0.95, (
            "one of accepting and rejecting is hardly tested"
        )
        assert self.p_value(counts, probs) > 1e-3
        assert self.p_value(self.sample(model, settings)[0], probs) > 1e-3, "of plain sampling"

    def test_distribution_of_a_processor_with_a_state(self, model):
        """Drafts are drawn without it, and it is called in order; what comes out is distributed by it all the same."""

        class Prefers(LogitsProcessor):
            def __call__(self, input_ids, scores):
                return scores + torch.arange(scores.shape[1]) % 3

        processors = LogitsProcessorList([Prefers()])
        counts, _ = self.sample(model, {"top_k": 0, "logits_processor": processors}, mtp_tokens=2)
        assert self.p_value(counts, self.exact(model, processors)) > 1e-3
        assert self.p_value(counts, self.exact(model, LogitsProcessorList())) < 1e-6

    def test_a_wrong_rule_is_noticed(self, model, monkeypatch):
        settings, processors = self.WARPERS[0]
        monkeypatch.setattr(torch, "rand_like", torch.zeros_like)  # all drafts are accepted
        counts, _ = self.sample(model, settings, mtp_tokens=2)
        assert self.p_value(counts, self.exact(model, processors)) < 1e-6


class Stops(StoppingCriteria):
    """Stops a row where a token occurs, and notes what it saw."""

    def __init__(self, token: int):
        self.token, self.widths = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.widths.append(input_ids.shape[1])
        return input_ids[:, -1] == self.token


class TestEnds:
    @pytest.mark.parametrize("family", ["v3", "nsa"])
    @pytest.mark.parametrize("quality", [0.0, 0.6, 1.0])
    def test_end_of_sequence(self, family, quality, oracle):
        model, batch = mtp_model(family), padded_batch()
        plain = model.generate(**batch, **GREEDY)
        oracle(20, plain[:, 20:], quality)
        for row, place in ((0, 20), (1, 25), (2, 27), (0, 30)):
            settings = {**GREEDY, "eos_token_id": [plain[row, place].item(), 1]}
            expected = model.generate(**batch, **settings)
            assert torch.equal(model.generate(**batch, mtp_tokens=3, **settings), expected), (row, place)

    def test_stopping_criteria_see_every_length(self, oracle):
        model, prompt = mtp_model("v3"), make_tokens(1, 12)
        plain = model.generate(prompt, **GREEDY)
        oracle(12, plain[:, 12:], 1.0)
        stops = Stops(plain[0, 21].item())
        settings = {**GREEDY, "stopping_criteria": StoppingCriteriaList([stops])}
        expected = model.generate(prompt, **settings)
        widths, stops.widths = stops.widths, []
        assert torch.equal(model.generate(prompt, mtp_tokens=3, **settings), expected)
        assert stops.widths[: len(widths)] == widths

    @pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 7])
    def test_lengths(self, max_new_tokens, oracle):
        model, prompt = mtp_model("v3"), make_tokens(2, 12)
        plain = model.generate(prompt, **GREEDY)
        oracle(12, plain[:, 12:], 0.7)
        settings = {**GREEDY, "max_new_tokens": max_new_tokens}
        assert torch.equal(model.generate(prompt, mtp_tokens=4, **settings), plain[:, : 12 + max_new_tokens])

    def test_streamer_gets_what_plain_generation_gives(self, oracle):
        class Streamer:
            def __init__(self):
                self.got = []

            def put(self, value):
                self.got.append(value.tolist())

            def end(self):
                self.got.append("end")

        model, prompt, plain, ours = mtp_model("v3"), make_tokens(1, 12), Streamer(), Streamer()
        expected = model.generate(prompt, **GREEDY)
        settings = {**GREEDY, "eos_token_id": expected[0, 22].item()}
        model.generate(prompt, streamer=plain, **settings)
        oracle(12, expected[:, 12:], 0.6)
        model.generate(prompt, mtp_tokens=3, streamer=ours, **settings)
        assert ours.got == plain.got

    def test_scores_and_logits(self, oracle):
        model, batch = mtp_model("v3"), padded_batch()
        settings = {**GREEDY, "repetition_penalty": 1.5, "return_dict_in_generate": True}
        settings |= {"output_scores": True, "output_logits": True}
        expected = model.generate(**batch, **settings)
        oracle(20, expected.sequences[:, 20:], 0.6)
        actual = model.generate(**batch, mtp_tokens=3, **settings)
        for name in ("scores", "logits"):
            mine, other = torch.stack(actual[name]), torch.stack(expected[name])
            assert mine.shape == other.shape
            assert (mine - other).abs().max() < 1e-3

    def test_several_sequences(self):
        model, prompt = mtp_model("v3"), make_tokens(2, 12)
        settings = {**GREEDY, "do_sample": True, "num_return_sequences": 3}
        assert model.generate(prompt, mtp_tokens=2, **settings).shape == (6, 28)


class TestSettings:
    def test_from_files(self, checkpoint):
        folder = checkpoint("v3")
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "mtp_tokens": 2}))
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        prompt, settings = make_tokens(1, 12), {**GREEDY, "return_dict_in_generate": True}
        by_file = model.generate(prompt, **settings)
        assert by_file.drafted.shape == (2,)
        assert not hasattr(model.generate(prompt, mtp_tokens=0, **settings), "drafted")
        assert model.generate(prompt, mtp_tokens=1, **settings).drafted.shape == (1,)
        config = GenerationConfig(mtp_tokens=3, **settings)
        assert model.generate(prompt, generation_config=config).drafted.shape == (3,)
        model.generation_config.save_pretrained(folder)
        assert GenerationConfig.from_pretrained(folder).mtp_tokens == 2

    def test_transformers_switch(self):
        model, prompt = mtp_model("v3_mtp2"), make_tokens(1, 12)
        outputs = model.generate(prompt, use_mtp=True, return_dict_in_generate=True, **GREEDY)
        assert outputs.drafted.shape == (2,)

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"mtp_tokens": -1}, "mtp_tokens"),
            ({"mtp_tokens": 1.5}, "mtp_tokens"),
            ({"num_beams": 2}, "num_beams"),
            ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
            ({"use_cache": False}, "use_cache"),
            ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
            ({"guidance_scale": 2.0}, "guidance_scale"),
            ({"synced_gpus": True}, "synced_gpus"),
            ({"streamer": object()}, "streamer"),
            ({"cache_implementation": "offloaded"}, "offloaded cache"),
            ({"cache_implementation": "offloaded_static"}, "offloaded cache"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_what_does_not_go_together(self, settings, words, monkeypatch):
        if "cache_implementation" in settings:  # which is refused by itself where there is no GPU
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(torch.cuda, "default_stream", lambda *arguments: None)
            monkeypatch.setattr(torch, "Stream", lambda *arguments, **kwargs: None)
        if "streamer" in settings:
            settings = {"streamer": type("Streamer", (), {"put": lambda self, value: None})()}
        with pytest.raises(ValueError, match=words):
            mtp_model("v3").generate(make_tokens(2, 5), **{"mtp_tokens": 2, **GREEDY, **settings})

    @pytest.mark.parametrize("settings", [{"mtp_tokens": 1}, {"use_mtp": True}], ids=["mtp_tokens", "use_mtp"])
    def test_without_a_module(self, settings):
        with pytest.raises(ValueError, match="num_nextn_predict_layers"):
            make_model("v3_mtp0").generate(make_tokens(1, 5), **settings, **GREEDY)

    def test_processors_may_write_into_their_input(self):
        class Writes(LogitsProcessor):
            def __call__(self, input_ids, scores):
                return scores.add_(torch.arange(128) * 0.1 * (input_ids.shape[1] % 3))

        model, batch = mtp_model("v3"), padded_batch()
        settings = {**GREEDY, "logits_processor": LogitsProcessorList([Writes()])}
        assert torch.equal(model.generate(**batch, mtp_tokens=2, **settings), model.generate(**batch, **settings))

    def test_place_wise_processors_go_in_one_call(self, monkeypatch):
        """One call for all places gives what one call for each length gives."""
        settings = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
        drawn = []
        for place_wise in (drafts._PLACE_WISE, ()):
            monkeypatch.setattr(drafts, "_PLACE_WISE", place_wise)
            torch.manual_seed(0)
            drawn.append(mtp_model("v3").generate(**padded_batch(), mtp_tokens=3, **settings))
        assert torch.equal(*drawn)

    def test_draws_in_proportion(self):
        torch.manual_seed(0)
        weights = torch.tensor([0.0, 3.0, 0.0, 1.0, 4.0, 0.0])
        drawn = drafts._draw(weights.expand(40_000, -1))
        shares = drawn.bincount(minlength=6) / len(drawn)
        assert torch.allclose(shares, weights / 8, atol=0.01)
        assert shares[weights == 0].sum() == 0

    def test_lora_and_other_weights(self):
        """Drafts come from the module as it is now, whatever happened to the weights."""
        model, prompt = mtp_model("v3"), make_tokens(2, 12)
        model.generate(prompt, mtp_tokens=2, **GREEDY)
        randomise(model, seed=5)
        assert torch.equal(model.generate(prompt, mtp_tokens=2, **GREEDY), model.generate(prompt, **GREEDY))
