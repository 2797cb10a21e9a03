"""The whole command on small corpora."""

import gzip
import itertools
import json
import math
import random
import shutil
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

import corpus.deduplicate
from corpus.deduplicate import STAGES, Options, deduplicate, main, without_seen_paragraphs
from corpus.signatures import candidate_probability
from tokenization.documents import read_documents, read_records

ROOT = Path(__file__).resolve().parents[2]
EASY = Options(quality=False)


def document(seed: int, length: int = 80) -> str:
    """Random words, so that two seeds share no 5-gram."""
    return " ".join(f"w{random.Random(seed).getrandbits(32)}x{i}" for i in range(length))


def similar(seed: int, changed: int, length: int = 80) -> str:
    """`document(seed)` with other words at the end: of 2 (length - 4) 5-grams, twice `changed` are in one only."""
    return " ".join([*document(seed, length).split()[: length - changed], *document(-seed - 1, changed).split()])


def write_jsonl(path: Path, texts: list[str], **fields) -> Path:
    content = "".join(
        json.dumps({"text": text, "number": number, **fields}, ensure_ascii=False) + "\n"
        for number, text in enumerate(texts)
    ).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def removed(output: Path) -> dict[str, dict]:
    lines = (output / "report" / "removed.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


@pytest.fixture
def shards(tmp_path) -> list[Path]:
    """Three shards with exact and near copies within and across them."""
    folder = tmp_path / "in"
    folder.mkdir()
    chinese = "".join(chr(0x4E00 + random.Random(5).getrandbits(12) + i) for i in range(120))
    return [
        write_jsonl(
            folder / "a.jsonl.gz", [document(1), document(2), similar(1, 3), chinese], source="books", lang="en"
        ),
        write_jsonl(
            folder / "b.jsonl", [document(3), document(2).upper() + "\n", similar(2, 2), "tiny"], source="web"
        ),
        write_jsonl(folder / "c.jsonl", [similar(3, 4), chinese[:-4] + "一二三四", document(4), "Tiny"]),
    ]


def test_first_of_several_copies_stays(shards, tmp_path):
    output = tmp_path / "out"
    figures = deduplicate(shards, output, EASY)
    assert sorted(path.name for path in output.iterdir()) == ["a.jsonl.gz", "b.jsonl", "c.jsonl", "report"]
    kept = {path.name: [record.fields["number"] for record in read_records(output / path.name)] for path in shards}
    assert kept == {"a.jsonl.gz": [0, 1, 3], "b.jsonl": [0, 3], "c.jsonl": [2]}
    rows = removed(output)
    assert {name: (row["stage"], row["keeper"]) for name, row in rows.items()} == {
        "a.jsonl.gz:3": ("near", "a.jsonl.gz:1"),
        "b.jsonl:2": ("exact", "a.jsonl.gz:2"),
        "b.jsonl:3": ("near", "a.jsonl.gz:2"),
        "c.jsonl:1": ("near", "b.jsonl:1"),
        "c.jsonl:2": ("near", "a.jsonl.gz:4"),
        "c.jsonl:4": ("exact", "b.jsonl:4"),
    }
    assert rows["a.jsonl.gz:3"]["jaccard"] == round((76 - 3) / (76 + 3), 4)
    assert rows["c.jsonl:2"]["jaccard"] == round((116 - 4) / (116 + 4), 4)
    # Kept lines are the lines of the input, byte for byte: every field and the split by hash stay.
    lines = gzip.decompress(shards[0].read_bytes()).splitlines(keepends=True)
    assert gzip.decompress((output / "a.jsonl.gz").read_bytes()) == lines[0] + lines[1] + lines[3]

    assert figures == json.loads((output / "report" / "figures.json").read_text(encoding="utf-8"))
    total = figures["total"]
    assert (total["documents_in"], total["documents_out"]) == (12, 6)
    assert total["removed"] == {**dict.fromkeys(STAGES[1:], 0), "exact": 2, "near": 4}
    for direction, paths in (("in", shards), ("out", [output / path.name for path in shards])):
        assert total[f"bytes_{direction}"] == sum(len(t.encode()) for path in paths for t in read_documents(path))
    assert total["bytes_in"] - total["bytes_out"] == sum(total["removed_bytes"].values())
    assert set(figures["sources"]) == {"books", "web", "c.jsonl"}
    across = {(row["removed"], row["kept"]): row["documents"] for row in figures["between_sources"]}
    assert across == {
        ("web", "books"): 2, ("c.jsonl", "web"): 2, ("books", "books"): 1, ("c.jsonl", "books"): 1
    }  # fmt: skip
    assert figures["clusters"] == {"count": 5, "largest": 3, "sizes": {"2": 4, "3": 1}}
    page = (output / "report" / "report.html").read_text(encoding="utf-8")
    assert "12 → 6 documents" in page
    assert page.count("class='pair'") == 4
    assert "<mark>一二三四</mark>" in page
    assert (output / "report" / "report.png").stat().st_size > 1000
    assert not (tmp_path / "out.partial").exists()


def test_order_of_shards_changes_only_which_copy_stays(shards, tmp_path):
    def clusters(paths: list[Path], output: Path) -> set[frozenset[str]]:
        deduplicate(paths, output, EASY)
        rows = removed(output)
        groups: dict[str, set[str]] = {}
        for name, row in rows.items():
            assert row["keeper"] not in rows, "a keeper must be there"
            groups.setdefault(row["keeper"], {row["keeper"]}).add(name)
        position = {path.name: number for number, path in enumerate(paths)}
        for keeper, group in groups.items():
            first = min(group, key=lambda name: (position[name.split(":")[0]], int(name.split(":")[1])))
            assert keeper == first
        return {frozenset(group) for group in groups.values()}

    found = [
        clusters(list(order), tmp_path / f"out{number}") for number, order in enumerate(itertools.permutations(shards))
    ]
    assert len(found[0]) == 5
    assert all(other == found[0] for other in found)


def test_workers_and_repetition_change_nothing(shards, tmp_path):
    deduplicate(shards, tmp_path / "one", EASY)
    deduplicate(shards, tmp_path / "two", EASY, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_killed_run_goes_on_and_ends_the_same(shards, tmp_path, monkeypatch):
    """Stopped at each record of each pass in turn, as by a kill: nothing on the way out cleans up."""
    options = Options(quality=False, paragraphs=True)
    deduplicate(shards, tmp_path / "whole", options)
    output = tmp_path / "out"
    budget = 0

    def stopping(path, text_field):
        for record in read_records(path, text_field):
            nonlocal budget
            budget -= 1
            if budget < 0:
                raise KeyboardInterrupt
            yield record

    monkeypatch.setattr(corpus.deduplicate, "read_records", stopping)
    kills = 0
    # All passes read about 40 records: with 13 at most in one go, only a run that keeps what it did can end.
    for allowed in [*range(1, 14), *[13] * 10]:
        budget = allowed
        try:
            deduplicate(shards, output, options)
        except KeyboardInterrupt:
            kills += 1
            assert not output.exists()
            continue
        break
    assert kills > 3, "the run must have been stopped in several places"
    assert output.exists()
    assert contents(output) == contents(tmp_path / "whole")

    budget = 20  # now stop in the middle of the second pass
    with pytest.raises(KeyboardInterrupt):
        deduplicate(shards, tmp_path / "other", options)
    with pytest.raises(ValueError, match="was begun with other options; repeat that command or remove the folder"):
        deduplicate(shards, tmp_path / "other", EASY)


def test_a_damaged_line_is_reported_and_costs_only_itself(tmp_path, capsys):
    good = [json.dumps({"text": document(seed)}).encode() for seed in range(4)]
    damage = [b'{"text": "half', b"\xff\xfe", b'{"body": "x"}', b'{"text": "\\ud800"}', b"[1]", b"", b'{"text": null}']
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([good[0], *damage, *good[1:]]))
    assert main([str(path), "--output", str(tmp_path / "out"), "--no-quality"]) == 0
    assert (tmp_path / "out" / "a.jsonl").read_bytes().splitlines() == good
    problems = (tmp_path / "out" / "report" / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["line"] for line in problems] == [2, 3, 4, 5, 6, 8]
    assert "a.jsonl:4 has no text in field 'text' (found ['body'])" in capsys.readouterr().err


def test_a_cut_gzip_file_keeps_what_came_before(tmp_path):
    whole = write_jsonl(tmp_path / "a.jsonl.gz", [document(seed) for seed in range(40)]).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    write_jsonl(tmp_path / "b.jsonl", [document(100)])
    figures = deduplicate([tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl"], tmp_path / "out", EASY)
    (problem,) = figures["problems"]
    kept = list(read_documents(tmp_path / "out" / "a.jsonl.gz"))
    assert kept == [document(seed) for seed in range(len(kept))]
    assert 5 < len(kept) == problem["line"] - 1 < 40
    assert "cannot be decompressed from here on" in problem["problem"]
    assert list(read_documents(tmp_path / "out" / "b.jsonl")) == [document(100)]


def test_parquet_and_text_files(tmp_path):
    table = pyarrow.table({"body": [document(1), document(2), document(3), None], "id": [7, 8, 9, 10]})
    parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text(document(2), encoding="utf-8")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(document(4).encode()))
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no more")
    files = [tmp_path / name for name in ("b.txt", "c.txt.gz", "a.parquet", "d.parquet")]
    figures = deduplicate(files, tmp_path / "out", Options(quality=False, text_field="body"))
    assert parquet.read_table(tmp_path / "out" / "a.parquet").equals(table.take([0, 2]))
    assert list(read_documents(tmp_path / "out" / "a.parquet", "body")) == [document(1), document(3)]
    assert (tmp_path / "out" / "b.txt").read_text(encoding="utf-8") == document(2)
    assert gzip.decompress((tmp_path / "out" / "c.txt.gz").read_bytes()).decode() == document(4)
    assert not (tmp_path / "out" / "d.parquet").exists()
    assert [(row["file"], row["line"]) for row in figures["problems"]] == [("a.parquet", 4), ("d.parquet", 1)]


def test_paragraphs_that_came_before_are_removed(tmp_path):
    shared, heading = "p" * 100, "Chapter one"
    texts = [f"{heading}\n\n{shared}\n\n{document(1)}", f"{heading}\n\n{document(2)}\n \n{shared.upper()}", shared]
    path = write_jsonl(tmp_path / "a.jsonl", texts, lang="en")
    figures = deduplicate([path], tmp_path / "out", Options(quality=False, paragraphs=True))
    records = list(read_records(tmp_path / "out" / "a.jsonl"))
    assert [record.text for record in records] == [texts[0], f"{heading}\n\n{document(2)}"]
    assert records[1].fields["lang"] == "en"
    assert records[1].fields["number"] == 1
    assert removed(tmp_path / "out") == {"a.jsonl:3": {"id": "a.jsonl:3", "stage": "paragraphs", "source": "a.jsonl"}}
    assert figures["total"]["paragraphs_removed"] == 2
    text, num_removed, added = without_seen_paragraphs(texts[0], set())
    assert (text, num_removed, len(added)) == (texts[0], 0, 2)


def test_filters_say_why(tmp_path):
    question = " ".join(document(9).split()[:13])
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": question}))
    path = write_jsonl(tmp_path / "a.jsonl", [document(1, 20), f"{document(2)} {question}", document(3)])
    deduplicate([path], tmp_path / "out", EASY, (tmp_path / "test.jsonl",))
    assert removed(tmp_path / "out") == {
        "a.jsonl:2": {"id": "a.jsonl:2", "stage": "contaminated", "source": "a.jsonl", "test": "test.jsonl:1"}
    }
    figures = deduplicate([path], tmp_path / "strict", Options())
    assert removed(tmp_path / "strict")["a.jsonl:1"]["rule"] == "words"
    assert figures["rules"]["words"] == 1


@pytest.mark.parametrize("changed", [6, 9, 14])
def test_planted_copies_are_found_at_the_theoretical_rate(tmp_path, changed):
    pairs = 150
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [text for seed in range(pairs) for text in (document(seed), similar(seed, changed))],
    )
    similarity = (76 - changed) / (76 + changed)
    options = Options(quality=False, threshold=similarity - 1e-9)
    found = deduplicate([path], tmp_path / "out", options)["total"]["removed"]["near"]
    expected = candidate_probability(similarity, options.bands, options.rows)
    assert abs(found - pairs * expected) <= 4 * math.sqrt(pairs * expected * (1 - expected))
    above = deduplicate([path], tmp_path / "above", Options(quality=False, threshold=similarity + 1e-9))
    assert above["total"]["removed"]["near"] == 0, "a candidate below the threshold must stay"
    exact = deduplicate([path], tmp_path / "exact", Options(quality=False, exact_only=True))
    assert exact["total"]["documents_out"] == 2 * pairs


def test_pretraining_reads_the_output(tmp_path):
    from pretrain.data import build_dataset

    texts = [document(seed) for seed in range(30)]
    path = write_jsonl(tmp_path / "en.jsonl.gz", [*texts, *texts[:10]])
    deduplicate([path], tmp_path / "out", EASY)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / name, tokenizer)
    index = build_dataset({"en": [tmp_path / "out" / "en.jsonl.gz"]}, tokenizer, tmp_path / "data", 0.2, 1)
    splits = index["languages"]["en"]
    assert splits["train"]["documents"] + splits["held_out"]["documents"] == 30


def test_errors_come_before_any_work(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "more").mkdir()
    twin = write_jsonl(tmp_path / "more" / "a.jsonl", ["y"])
    output = tmp_path / "out"
    for field, value in (
        ("threshold", 0.0),
        ("ngram", 0),
        ("bands", 0),
        ("rows", -1),
        ("test_ngram", 0),
        ("seed", -1),
    ):
        with pytest.raises(ValueError, match=f"--{field.replace('_', '-')} is {value}"):
            Options(**{field: value})
    with pytest.raises(ValueError, match=r"two input files are called 'a.jsonl'"):
        deduplicate([path, twin], output, EASY)
    with pytest.raises(FileNotFoundError, match="test set"):
        deduplicate([path], output, EASY, (tmp_path / "no.jsonl",))
    with pytest.raises(ValueError, match="--workers is 0"):
        deduplicate([path], output, EASY, workers=0)
    assert not list(tmp_path.glob("out*"))
    output.mkdir()
    assert main([str(path), "--output", str(output)]) == 2
    assert "exists; remove it or name another folder" in capsys.readouterr().err
