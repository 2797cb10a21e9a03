"""benchmarks/ngram.py against the definition of modified Kneser-Ney, written out with sets and dictionaries."""

import json
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks import ngram

BOS, SYMBOLS = 0, 7


def random_documents(seed: int, count: int = 60) -> list[list[int]]:
    """Documents in which the next symbol depends on the last, so that n-grams of all counts occur."""
    generator = np.random.default_rng(seed)
    table = generator.dirichlet(np.full(SYMBOLS - 1, 0.4), size=SYMBOLS)
    documents = []
    for length in generator.integers(1, 40, size=count):
        document = [BOS]
        for _ in range(length):
            document.append(1 + int(generator.choice(SYMBOLS - 1, p=table[document[-1]])))
        documents.append(document)
    return documents


class Slow:
    """The same model by definition: n-grams are tuples, counts below the highest order are sizes of sets."""

    def __init__(self, documents, order):
        self.order = order
        self.counts = Counter()
        for document in documents:
            padded = [BOS] * (order - 1) + document[1:]
            for i in range(order - 1, len(padded)):
                self.counts[tuple(padded[i - order + 1 : i + 1])] += 1
        longer = set(self.counts)
        for _ in range(order - 1):
            in_front = defaultdict(set)
            for gram in longer:
                in_front[gram[1:]].add(gram[0])
            self.counts.update({gram: len(symbols) for gram, symbols in in_front.items()})
            longer = set(in_front)
        self.discounts = {n: self._discounts(n) for n in range(1, order + 1)}

    def _discounts(self, n):
        of_count = Counter(count for gram, count in self.counts.items() if len(gram) == n)
        if not all(of_count[k] for k in (1, 2, 3, 4)):
            return {1: 0.5, 2: 1.0, 3: 1.5}
        y = of_count[1] / (of_count[1] + 2 * of_count[2])
        found = {k: k - (k + 1) * y * of_count[k + 1] / of_count[k] for k in (1, 2, 3)}
        return {k: min(max(value, 0), k) for k, value in found.items()}

    def probability(self, context, symbol):
        """p(symbol | tuple of at most order - 1 symbols)"""
        n = len(context) + 1
        lower = 1 / (SYMBOLS - 1) if n == 1 else self.probability(context[1:], symbol)
        behind = {v: self.counts.get((*context, v), 0) for v in range(1, SYMBOLS)}
        total = sum(behind.values())
        if not total:
            return lower
        discount = self.discounts[n]
        taken = sum(discount[min(count, 3)] for count in behind.values() if count)
        count = behind[symbol]
        return (count - (discount[min(count, 3)] if count else 0)) / total + taken / total * lower


def flat(documents):
    return np.array([symbol for document in documents for symbol in document])


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_the_definition(order):
    train, held_out = random_documents(1), random_documents(2, count=15)
    fast = ngram.KneserNey(flat(train), order, SYMBOLS, BOS).probabilities(flat(held_out))
    slow = Slow(train, order)
    expected = []
    for document in held_out:
        padded = [BOS] * (order - 1) + document[1:]
        for i in range(order - 1, len(padded)):
            expected.append(slow.probability(tuple(padded[i - order + 1 : i]), padded[i]))
    assert len(fast) == len(expected) > 100
    np.testing.assert_allclose(fast, expected, rtol=1e-10)


def test_discounts_of_known_counts():
    """Eight n-grams once, four twice, two three times, one four times: Y = 8 / 16."""
    counts = np.array([1] * 8 + [2] * 4 + [3] * 2 + [4] + [9] * 3 + [0] * 5)
    np.testing.assert_allclose(
        ngram.discounts_of(counts), [0, 1 - 2 * 0.5 * 4 / 8, 2 - 3 * 0.5 * 2 / 4, 3 - 4 * 0.5 / 2]
    )
    np.testing.assert_allclose(ngram.discounts_of(np.array([1, 1, 2])), [0, 0.5, 1, 1.5])


@pytest.mark.parametrize("order", [1, 2, 4, 5])
def test_probabilities_sum_to_one(order):
    train = random_documents(3)
    model = ngram.KneserNey(flat(train), order, SYMBOLS, BOS)
    generator = np.random.default_rng(4)
    for length in (0, 1, 2, 7):  # contexts that were seen, contexts that were not, starts of documents
        context = [BOS, *generator.integers(1, SYMBOLS, size=length)]
        last = [model.probabilities(np.array([*context, symbol]))[-1] for symbol in range(1, SYMBOLS)]
        assert sum(last) == pytest.approx(1, abs=1e-12)
        assert min(last) > 0


def test_documents_do_not_see_each_other():
    train, held_out = random_documents(5), random_documents(6, count=4)
    model = ngram.KneserNey(flat(train), 4, SYMBOLS, BOS)
    alone = np.concatenate([model.probabilities(np.array(document)) for document in held_out])
    np.testing.assert_array_equal(model.probabilities(flat(held_out)), alone)
    shuffled = ngram.KneserNey(flat(train[::-1]), 4, SYMBOLS, BOS)
    np.testing.assert_array_equal(shuffled.probabilities(flat(held_out)), model.probabilities(flat(held_out)))


def test_large_alphabets_do_not_overflow():
    """65536 ** 5 is far above 2 ** 63."""
    stream = np.array([65535, *range(65530, 65535), 65535, *range(65530, 65535)])
    probabilities = ngram.KneserNey(stream, 5, 65536, 65535).probabilities(stream)
    assert probabilities.min() > 0.1


def test_bad_streams_are_refused():
    for stream in ([], [1, 2], [BOS, SYMBOLS], [BOS, -1]):
        with pytest.raises(ValueError, match="must begin with bos"):
            ngram.KneserNey(np.array(stream, dtype=int), 3, SYMBOLS, BOS)
    with pytest.raises(ValueError, match="order is 0"):
        ngram.KneserNey(np.array([BOS, 1]), 0, SYMBOLS, BOS)


@pytest.fixture
def dataset(tmp_path):
    """A dataset as `pretrain.data` writes it and its tokenizer, one token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(
        models.BPE(vocab={"<bos>": 0, "<eos>": 1, **{c: i + 2 for i, c in enumerate(letters)}}, merges=[])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>")
    texts = {
        "train": ["the cat sat on the mat", "the dog sat", "the cat ran", "猫坐在垫子上", "狗坐在垫子上"] * 4,
        "held_out": ["the cat sat", "猫在狗上"],
    }
    entry = {}
    for split, documents in texts.items():
        ids = [[0, *tokenizer(text)["input_ids"], 1] for text in documents]
        np.concatenate(ids).astype(np.uint16).tofile(tmp_path / f"{split}.bin")
        sizes = {"tokens": sum(map(len, ids)), "bytes": sum(len(text.encode()) for text in documents)}
        entry[split] = {
            "shards": [{"file": f"{split}.bin", "tokens": sizes["tokens"]}],
            "documents": len(ids),
            **sizes,
        }
    index = {"vocab_size": 258, "bos_token_id": 0, "languages": {"mixed": entry}}
    (tmp_path / "index.json").write_text(json.dumps(index))
    return tmp_path, tokenizer


def test_units_agree_where_they_are_the_same(dataset):
    """With one token a byte, tokens and bytes are two numberings of one alphabet, so the model is the same."""
    folder, tokenizer = dataset
    token, byte = (ngram.measure(folder, unit, 3, tokenizer)["held_out"]["mixed"] for unit in ("token", "byte"))
    assert token["symbols"] == byte["symbols"]
    assert token["bytes"] == byte["bytes"] == len(b"the cat sat") + len("猫在狗上".encode())
    assert byte["bits_per_byte"] == pytest.approx(token["bits_per_byte"], rel=1e-12)
    expected = math.log2(token["perplexity"]) * token["symbols"] / token["bytes"]
    assert token["bits_per_byte"] == pytest.approx(expected, rel=1e-9)


def test_characters_are_symbols_and_rare_ones_bytes(dataset):
    folder, tokenizer = dataset
    index = json.loads((folder / "index.json").read_text())
    alphabet = ngram.make_alphabet(
        "character", index, ngram.read_documents(folder, index, ["mixed"], "train"), tokenizer
    )
    encoded = alphabet.encode(np.array([0, *tokenizer("猫龙")["input_ids"], 1]))
    assert encoded.tolist() == [256, alphabet.symbol["猫"], *"龙".encode(), 257]
    assert ngram.measure(folder, "character", 3, tokenizer)["held_out"]["mixed"]["symbols"] == 11 + 4 + 2


def test_command_line(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.common.RESULTS", tmp_path / "results")
    folder, _ = dataset
    assert ngram.main(["--data", str(folder), "--order", "2", "3"]) == 0
    runs = json.loads((tmp_path / "results" / "ngram.json").read_text())["runs"]
    assert [(run["unit"], run["order"]) for run in runs] == [("token", 2), ("token", 3)]
    assert ngram.main(["--data", str(tmp_path / "none")]) == 2
    assert "pretrain.data" in capsys.readouterr().err
    assert ngram.main(["--data", str(folder), "--units", "byte"]) == 2
    assert "--tokenizer" in capsys.readouterr().err
    (folder / "train.bin").write_bytes(b"\0\0")
    assert ngram.main(["--data", str(folder)]) == 2
    assert "damaged" in capsys.readouterr().err
