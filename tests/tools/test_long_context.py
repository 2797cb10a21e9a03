"""tools/long_context.py: prompts have their length and needles their depth; a reader that finds is told from one that does not."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given, settings as run_with, strategies as st
from tiny_chat import VOCAB_SIZE, add_tokenizer
from transformers import AutoTokenizer, LlamaConfig

from tools import long_context, publish
from tools.long_context import TASKS, WORDINGS, Builder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT)


@pytest.fixture(scope="module")
def builders(tokenizer):
    return {
        name: Builder(tokenizer, wording, long_context.filler_sentences(wording, seed=0)[:2000])
        for name, wording in WORDINGS.items()
    }


def build(builder, task="passkey", length=1024, depth=0.5, seed=0):
    return builder.build(task, length, depth, long_context.random.Random(seed))


# ---------------------------------------------------------------- prompts


@run_with(max_examples=60, deadline=None)
@given(
    task=st.sampled_from(TASKS),
    language=st.sampled_from(list(WORDINGS)),
    length=st.integers(400, 3000),
    depth=st.floats(0, 1),
    seed=st.integers(0, 10**9),
)
def test_a_prompt_has_its_length_and_the_needle_its_depth(builders, tokenizer, task, language, length, depth, seed):
    builder = builders[language]
    prompt = build(builder, task, length, depth, seed)
    assert len(prompt.ids) == length
    assert prompt.ids == build(builder, task, length, depth, seed).ids
    needle = tokenizer.decode(prompt.ids[prompt.needle_at :][:30])
    assert prompt.answer in re.split("[.。]", needle)[0]  # the needle starts right there
    text = tokenizer.decode(prompt.ids[len(builder.head) :])
    assert text.count(prompt.answer) == 1
    question = text.rpartition("\n\n")[2]
    assert len(question) < 100
    others = len(prompt.ids) - len(builder.head) - len(tokenizer(question)["input_ids"])
    # other needles may stand before or behind; a needle stands between sentences
    assert abs((prompt.needle_at - len(builder.head)) / others - depth) < (20 + 200 * (task != "passkey")) / others


def test_depth_0_is_the_beginning_and_depth_1_the_end(builders, tokenizer):
    for builder in builders.values():
        first, last = (build(builder, depth=depth) for depth in (0.0, 1.0))
        assert first.needle_at == len(builder.head)
        needle = tokenizer(
            builder.wording.space + builder.wording.key.format(value=last.answer), add_special_tokens=False
        )
        question = tokenizer(builder.wording.asks_key, add_special_tokens=False)
        tail = needle["input_ids"] + question["input_ids"]
        assert last.ids[-len(tail) :] == tail
        assert first.ids[0] == tokenizer.bos_token_id


def test_candidates_have_as_many_tokens_and_the_numbers_of_the_text_are_among_them(builders, tokenizer):
    for task, in_text in (("passkey", 1), ("multikey", 8), ("tracking", 2)):
        prompt = build(builders["en"], task)
        numbers = [tokenizer.decode(ids).strip() for ids in prompt.candidates]
        assert numbers[0] == prompt.answer
        assert len(set(numbers)) == long_context.NUM_CANDIDATES
        assert len({len(ids) for ids in prompt.candidates}) == 1
        text = tokenizer.decode(prompt.ids)
        assert sum(number in text for number in numbers) == in_text


def test_the_filler_has_no_numbers_and_no_keys():
    for wording in WORDINGS.values():
        sentences = long_context.filler_sentences(wording, seed=0)
        assert len(set(sentences)) == 24**3
        assert not re.search(r"\d|key|variable|密码|变量", " ".join(sentences))
        assert sentences != long_context.filler_sentences(wording, seed=1)


def test_a_text_of_ones_own_is_the_haystack_in_its_order(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("One two. Three four! 五六七。八九十？\nEleven", encoding="utf-8")
    (tmp_path / "b.md").write_text("Twelve", encoding="utf-8")
    (tmp_path / "c.json").write_text("no text")
    sentences = long_context.read_sentences(tmp_path)
    assert sentences == ["One two.", "Three four!", "五六七。", "八九十？", "Eleven", "Twelve"]
    ids = build(Builder(tokenizer, WORDINGS["zh"], sentences), length=200, depth=0.0).ids
    assert "".join(sentences) in tokenizer.decode(ids)
    long = Builder(tokenizer, WORDINGS["en"], ["word " * 1000])
    assert max(map(len, long.pieces)) == 64


def test_128k_tokens(builders):
    prompt = build(builders["zh"], "multikey", 131072, 0.5)
    assert len(prompt.ids) == 131072
    assert abs(prompt.needle_at / 131072 - 0.5) < 0.01


# ---------------------------------------------------------------- scores


class Reader:
    """A model that keeps the tokens in its cache as keys do, and writes what `find` makes of them."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, find):
        self.tokenizer = tokenizer
        self.find = find
        self.config = LlamaConfig(num_hidden_layers=1)

    def __call__(self, input_ids, past_key_values, use_cache, logits_to_keep):
        states = input_ids[:, None, :, None].double()
        ids = past_key_values.update(states, states, 0)[0].flatten().long().tolist()
        logits = torch.zeros(1, logits_to_keep, len(self.tokenizer))
        for row, end in enumerate(range(len(ids) - logits_to_keep + 1, len(ids) + 1)):
            logits[0, row, self._next(ids[:end])] = 20.0
        return SimpleNamespace(logits=logits)

    def _next(self, ids: list[int]) -> int:
        text, _, question = self.tokenizer.decode(ids).rpartition("\n\n")
        begun = re.search(r"(?<=is)[ \d]*$|(?<=是)\d*$", question)
        if begun is None:
            return self.tokenizer.eos_token_id
        space = " " if question[: begun.start()].endswith("is") else ""
        answer, written = (
            self.tokenizer(part, add_special_tokens=False)["input_ids"]
            for part in (space + self.find(text, question), begun[0])
        )
        begins = answer[: len(written)] == written
        return [*answer, self.tokenizer.eos_token_id][len(written)] if begins else self.tokenizer.eos_token_id


def follow(text: str, question: str) -> str:
    """Finds the right number by reading."""
    if name := re.search(r"variable (..)\?|变量(..)的值是多少", question):
        name = name[1] or name[2]
        while link := re.search(
            rf"Variable {name} has the value of variable (..)\.|变量{name}的值等于变量(..)的值", text
        ):
            name = link[1] or link[2]
        return re.search(rf"variable {name} is (\d+)\.|变量{name}的值是(\d+)。", text).expand(r"\1\2")
    if place := re.search(r"pass key of (\w+)\?|(\w+)的密码是多少", question):
        place = place[1] or place[2]
        return re.search(rf"pass key of {place} is (\d+)|{place}的密码是(\d+)", text).expand(r"\1\2")
    return re.search(r"pass key is (\d+)|密码是(\d+)", text).expand(r"\1\2")


def score(model, tokenizer, prompt, chunk_size=300):
    read = []
    found = long_context.score_prompt(model, tokenizer, prompt, chunk_size, read.append)
    assert sum(read) == len(prompt.ids)
    assert max(read) <= chunk_size
    return found


@pytest.mark.parametrize("language", WORDINGS)
@pytest.mark.parametrize("task", TASKS)
def test_a_reader_that_finds_scores_1_and_one_that_takes_another_number_does_not(builders, tokenizer, task, language):
    for seed, depth in enumerate((0.0, 0.6, 1.0)):
        prompt = build(builders[language], task, 900, depth, seed)
        assert score(Reader(tokenizer, follow), tokenizer, prompt) == (1.0, 1.0, 1.0)
        wrong = tokenizer.decode(prompt.candidates[1]).strip()
        found = score(Reader(tokenizer, lambda text, question, wrong=wrong: wrong), tokenizer, prompt)
        assert found.exact == found.first == 0.0
        assert found.rank < 0.9
        longer = score(Reader(tokenizer, lambda *texts: follow(*texts) + "7"), tokenizer, prompt)
        assert longer.exact == 0.0


def test_a_random_model_guesses(builders, tokenizer):
    model = tiny.make_model("v3", vocab_size=len(tokenizer), max_position_embeddings=1024)
    found = [score(model, tokenizer, build(builders["en"], task, 450, 0.5, s)) for task in TASKS for s in range(8)]
    assert sum(one.exact for one in found) == 0
    assert sum(one.first for one in found) <= 9  # 2.4 expected of 24
    assert 0.3 < sum(one.rank for one in found) / len(found) < 0.7


@pytest.mark.parametrize("family", ["llama", "v2_lite", "v32", "nsa"])
def test_scores_are_those_of_one_forward_without_a_cache(builders, tokenizer, family):
    model = tiny.make_model(family, vocab_size=len(tokenizer), max_position_embeddings=1024)
    prompt = build(builders["en"], "multikey", 450)
    likelihoods = []
    with torch.no_grad():
        for candidate in prompt.candidates:
            logits = model(input_ids=torch.tensor([prompt.ids + candidate]), use_cache=False).logits[0].log_softmax(-1)
            places = torch.arange(len(prompt.ids) - 1, len(prompt.ids) - 1 + len(candidate))
            likelihoods.append(logits[places, torch.tensor(candidate)].sum().item())
    found = score(model, tokenizer, prompt)
    assert found.rank == sum(likelihoods[0] > other for other in likelihoods[1:]) / 9
    assert found.first == (likelihoods[0] > max(likelihoods[1:]))


def test_logits_that_are_not_finite_are_an_error(builders, tokenizer):
    model = tiny.make_model("llama", vocab_size=len(tokenizer), max_position_embeddings=1024)
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"not finite after 450 tokens.*--dtype"):
        score(model, tokenizer, build(builders["en"], length=450))


def read_long(builders, tokenizer, family: str, length: int):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = tiny.make_model(family, vocab_size=len(tokenizer), max_position_embeddings=length, **sizes)
    return score(model, tokenizer, build(builders["en"], length=length), chunk_size=1024)


def test_8k_tokens_in_chunks(builders, tokenizer):
    assert 0 <= read_long(builders, tokenizer, "v2_lite", 8192).rank <= 1


@pytest.mark.slow
def test_128k_tokens_in_chunks(builders, tokenizer):
    assert 0 <= read_long(builders, tokenizer, "llama", 131072).rank <= 1


# ---------------------------------------------------------------- command line


@pytest.fixture
def model_folder(checkpoint):
    return add_tokenizer(checkpoint("v3", vocab_size=VOCAB_SIZE, max_position_embeddings=2048))


def arguments(folder, output, *more):
    options = ["--trust-remote-code", "--lengths", "700", "1k", "--depths", "0", "1", "--samples", "1"]
    return [str(folder), *options, "--output", str(output), *more]


def test_the_command_writes_results_and_heat_maps_and_goes_on_after_an_interruption(
    model_folder, tmp_path, capsys, monkeypatch
):
    whole, broken = tmp_path / "whole.json", tmp_path / "broken.json"
    tasks = ("--tasks", "passkey", "tracking")
    assert long_context.main(arguments(model_folder, whole, *tasks)) == 0
    report = json.loads(whole.read_text(encoding="utf-8"))
    assert len(report["cells"]) == 2 * 2 * 2 * 2
    assert "passkey en" in capsys.readouterr().out
    assert whole.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    rows = publish.read_results([whole])
    assert {(row.dataset_type, row.metric_args["tokens"]) for row in rows} == {
        (f"long-context-{task}-{language}", length)
        for task in ("passkey", "tracking")
        for language in WORDINGS
        for length in (700, 1024)
    }
    assert "long context, passkey, zh" in publish.updated_card("---\nlicense: mit\n---\n", {}, rows, "m")

    calls, real = [], long_context.score_prompt

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(long_context, "score_prompt", interrupted)
    assert long_context.main(arguments(model_folder, broken, *tasks)) == 0
    assert "the same command goes on" in capsys.readouterr().err
    assert broken.with_suffix(".png").exists()
    assert len(json.loads(broken.read_text(encoding="utf-8"))["cells"]) == 3
    assert long_context.main(arguments(model_folder, broken, *tasks)) == 0
    assert len(calls) == 4 + 16 - 3
    done = json.loads(broken.read_text(encoding="utf-8"))
    untimed = [[{**cell, "seconds": 0} for cell in one["cells"]] for one in (report, done)]
    assert untimed[0] == untimed[1]
    assert done["results"] == report["results"]

    assert long_context.main(arguments(model_folder, broken, *tasks, "--seed", "1")) == 2
    assert "was made with seed 0, now it is 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "50"], "50 tokens have no room for a prompt of passkey"),
        (["--depths", "1.5"], "--depths has 1.5"),
        (["--depths", "nan"], "--depths has nan"),
        (["--samples", "0"], "--samples is 0"),
        (["--chunk-size", "0"], "--chunk-size is 0"),
        (["--haystack", "en=nowhere"], "--haystack en=nowhere must be"),
        (["--haystack", "fr=."], "--haystack fr=. must be"),
        (["--output", "there.txt"], "must be a .json file"),
        (["--output", "nowhere/there.json"], "in a folder that is there"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(model_folder, tmp_path, capsys, options, message):
    assert long_context.main(arguments(model_folder, tmp_path / "out.json", *options)) == 2
    assert message in capsys.readouterr().err


def test_another_file_is_not_overwritten(model_folder, tmp_path, capsys):
    output = tmp_path / "mine.json"
    output.write_text("[1]")
    assert long_context.main(arguments(model_folder, output)) == 2
    assert "no report of this tool" in capsys.readouterr().err
    assert output.read_text() == "[1]"
