"""Cleans a corpus: quality rules, decontamination, exact and near duplicates over all files at once.

    python -m corpus.deduplicate corpus/*.jsonl.gz --output runs/corpus --test-sets gsm8k_test.jsonl HumanEval.jsonl
    python -m corpus.deduplicate a.parquet b.jsonl c.txt --output runs/corpus --backend rensa --paragraphs --no-quality

Of equal or similar documents the first stays, in the order in which the files are given: name the best source first. The
output folder holds one file for each input, with the same name and format and all fields, and `report/`: `report.html` to
read, `figures.json`, `removed.jsonl` (each removed document, its keeper or the rule) and `problems.jsonl` (damaged lines).

1. scan: each file once; what the rules and the test sets say of each document, its fingerprint, its signature.
2. select: equal fingerprints; shared bands; candidates read again and compared in full; clusters; keepers.
3. write: each file once more, kept lines as they were.
4. report.

Memory holds about 500 bytes a document and no texts but the current one. Work is kept in `OUTPUT.partial` until all of
it is done. After a kill, run the same command again: it continues at the first unfinished file, and the result is the
same.
"""

import argparse
import dataclasses
import functools
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.command import Parser, one_line_errors, run_command
from common.extras import extra

with extra("corpus"):
    import numpy as np
    from tqdm import tqdm

    from corpus.clusters import band_keys, buckets, first_equal, jaccard, join_similar
    from corpus.decontaminate import SUFFIXES as TEST_SUFFIXES, Contaminants
    from corpus.quality import RULES, broken_rule
    from corpus.report import NUM_PAIRS, plot, write_html
    from corpus.signatures import BACKENDS, make_signer
    from corpus.text import fingerprint, ngrams, normalise, tokenise
    from tokenization.documents import Record, check_paths, read_records

REASONS = ("", *RULES, "contaminated")  # why a document is out before any comparison
STAGES = ("kept", "quality", "contaminated", "exact", "near", "paragraphs")
DOCUMENT = np.dtype(
    [
        ("line", "<i8"),
        ("bytes", "<i8"),
        ("source", "<i4"),  # number in the sources of the file
        ("reason", "<i4"),  # number in REASONS
        ("fingerprint", "<u8", 2),
        ("signed", "?"),  # has enough tokens for a signature
    ]
)
GZIP_LEVEL = 4  # files 4 % larger than level 6 in half the time
MIN_PARAGRAPH_BYTES = 100  # shorter ones (headings, bylines) may repeat
_PARAGRAPH_BREAK = re.compile(r"(\n\s*\n)")
_WORK_VERSION = 1  # change it when files in the work folder change their meaning


@dataclass(frozen=True)
class Options:
    """What is done to a corpus; every field is an option of the command line.

    Attributes:
        text_field: key or column of the text.
        source_field: key or column that names a document's source in the report; without it the file's name does.
        threshold: least Jaccard similarity of near duplicates, in (0, 1].
        ngram: tokens in the n-grams that are compared.
        bands: b, bands of a signature.
        rows: r, entries of a band.
        seed: seed of the hash functions.
        backend: one of `signatures.BACKENDS`.
        exact_only: leave near duplicates in.
        paragraphs: remove paragraphs that an earlier kept document has.
        quality: apply the rules of `corpus.quality`.
        test_ngram: a document that shares this many consecutive tokens with a test is removed.
    """

    text_field: str = "text"
    source_field: str = "source"
    threshold: float = 0.8
    ngram: int = 5
    bands: int = 14
    rows: int = 8
    seed: int = 1
    backend: str = "datasketch"
    exact_only: bool = False
    paragraphs: bool = False
    quality: bool = True
    test_ngram: int = 13

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise ValueError(f"--threshold is {self.threshold}; it must be in (0, 1], for example 0.8")
        for name in ("ngram", "bands", "rows", "test_ngram"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"--seed is {self.seed}; it must be in [0, 2^32)")


def deduplicate(
    files: list[Path], output: Path, options: Options, test_sets: tuple[Path, ...] = (), workers: int = 1
) -> dict:
    """Write the cleaned corpus to `output` and return the figures of the report.

    Args:
        files: input files; their order decides which of several copies stays.
        output: folder to create; must not exist. Complete or absent.
        options: what to do.
        test_sets: files for `decontaminate.Contaminants`.
        workers: processes that scan; changes nothing but the time.

    Raises:
        ValueError: an option or a file name is unusable, or `OUTPUT.partial` belongs to another command.
        FileNotFoundError: an input is missing.
        FileExistsError: `output` exists.
    """
    _check_inputs(files, output, test_sets, workers)
    make_signer(options.backend, 1, options.seed)  # an unusable backend is reported before any work
    partial = output.with_name(output.name + ".partial")
    work, result = partial / "work", partial / "result"
    _claim(partial, files, test_sets, options)
    work.mkdir(exist_ok=True)
    (result / "report").mkdir(parents=True, exist_ok=True)

    scans = scan_files(files, options, test_sets, work, workers)
    decisions = select(files, scans, options, work)
    written = write_files(files, scans, decisions, options, work, result)
    figures = report(files, scans, decisions, written, options, test_sets, result / "report")
    result.rename(output)
    shutil.rmtree(partial)
    return figures


def _check_inputs(files: list[Path], output: Path, test_sets: tuple[Path, ...], workers: int) -> None:
    check_paths(files)
    names = Counter(path.name for path in files)
    if repeated := sorted(name for name, count in names.items() if count > 1):
        raise ValueError(f"two input files are called {repeated[0]!r}; the output has one folder: rename one of them")
    for path in test_sets:
        if not path.is_file():
            raise FileNotFoundError(f"test set {path} does not exist; pass existing {', '.join(TEST_SUFFIXES)} files")
        if not path.name.endswith(TEST_SUFFIXES):
            raise ValueError(f"test set {path.name!r} must end in one of {', '.join(TEST_SUFFIXES)}; convert it")
    if workers < 1:
        raise ValueError(f"--workers is {workers}; it must be at least 1")
    if output.exists():
        raise FileExistsError(f"--output {output} exists; remove it or name another folder")


def _claim(partial: Path, files: list[Path], test_sets: tuple[Path, ...], options: Options) -> None:
    """Record in the work folder which command it belongs to, or check the record of an earlier run."""

    def identity(path: Path) -> list:
        state = path.stat()
        return [str(path.resolve()), state.st_size, state.st_mtime_ns]

    plan = {
        "version": _WORK_VERSION,
        "options": dataclasses.asdict(options),
        "files": [identity(path) for path in files],
        "test_sets": [identity(path) for path in test_sets],
    }
    note = partial / "plan.json"
    if note.exists():
        earlier = json.loads(note.read_text(encoding="utf-8"))
        changed = [name for name in plan if earlier.get(name) != plan[name]]
        if changed:
            raise ValueError(
                f"{partial} was begun with other {', '.join(changed)}; repeat that command or remove the folder"
            )
        return
    partial.mkdir(parents=True, exist_ok=True)
    with _atomic(note) as part:
        part.write_text(json.dumps(plan), encoding="utf-8")


@contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """A temporary name to write to; when the block ends without an error, the file is renamed to `path`."""
    part = path.with_name(path.name + ".part")
    yield part
    os.replace(part, path)


# ---------------------------------------------------------------- 1. scan


@dataclass(frozen=True)
class Scan:
    """What is known of one file.

    Attributes:
        documents: one row a readable document, [N], dtype DOCUMENT.
        signatures: [N, P] uint32, memory-mapped; rows of unsigned documents are zero.
        sources: names of the sources.
        tests: the test that a contaminated document shares an n-gram with, by line.
        problems: lines that could not be read and why.
        test_counts: strings in the test sets and how many of them are too short to protect.
    """

    documents: np.ndarray
    signatures: np.ndarray
    sources: list[str]
    tests: dict[int, str]
    problems: list[tuple[int, str]]
    test_counts: tuple[int, int]


def scan_files(
    files: list[Path], options: Options, test_sets: tuple[Path, ...], work: Path, workers: int
) -> list[Scan]:
    """Scan what is not scanned yet; one result a file."""
    stems = [work / f"scan-{number:05d}" for number in range(len(files))]
    missing = [(path, stem) for path, stem in zip(files, stems, strict=True) if not _json(stem).exists()]
    total = sum(path.stat().st_size for path in files)
    with tqdm(desc="scanning", total=total, unit="B", unit_scale=True, disable=None) as bar:
        bar.update(total - sum(path.stat().st_size for path, _ in missing))
        scan = functools.partial(_scan_file, options=options, test_sets=test_sets)
        if workers > 1 and len(missing) > 1:
            with ProcessPoolExecutor(workers) as pool:
                for size in pool.map(scan, *zip(*missing, strict=True)):
                    bar.update(size)
        else:
            for path, stem in missing:
                bar.update(scan(path, stem))
    return [_load_scan(stem) for stem in stems]


def _json(stem: Path) -> Path:
    return stem.with_suffix(".json")  # written last: its presence says that the step is complete


def _scan_file(path: Path, stem: Path, *, options: Options, test_sets: tuple[Path, ...]) -> int:
    """Write the scan of one file beside `stem`; returns the file's size."""
    tests = _load_tests(test_sets, options.test_ngram)
    length = options.bands * options.rows
    sign = make_signer(options.backend, length, options.seed)
    sources: dict[str, int] = {}
    rows, found, problems = [], {}, []
    with _atomic(stem.with_suffix(".signatures")) as part, part.open("wb") as signatures:
        for record in read_records(path, options.text_field):
            if record.problem:
                problems.append((record.line, record.problem))
                continue
            normal = normalise(record.text)
            tokens = tokenise(normal)
            reason = broken_rule(record.text, tokens) if options.quality else ""
            if not reason and (test := tests.find(tokens.hashes)):
                reason, found[record.line] = "contaminated", test
            signed = not reason and not options.exact_only and len(tokens) >= options.ngram
            signature = sign(ngrams(tokens.hashes, options.ngram)) if signed else np.zeros(length, np.uint32)
            signatures.write(signature.tobytes())
            rows.append(
                (
                    record.line,
                    len(record.text.encode("utf-8")),
                    sources.setdefault(_source_of(record, options, path), len(sources)),
                    REASONS.index(reason),
                    tuple(np.frombuffer(fingerprint(normal), dtype="<u8")),
                    signed,
                )
            )
    with _atomic(stem.with_suffix(".npy")) as part, part.open("wb") as file:
        np.save(file, np.array(rows, dtype=DOCUMENT))
    note = {
        "sources": list(sources),
        "tests": found,
        "problems": problems,
        "test_counts": [tests.num_strings, tests.num_short],
    }
    with _atomic(_json(stem)) as part:
        part.write_text(json.dumps(note), encoding="utf-8")
    return path.stat().st_size


@functools.cache
def _load_tests(paths: tuple[Path, ...], n: int) -> Contaminants:
    return Contaminants(list(paths), n)


def _source_of(record: Record, options: Options, path: Path) -> str:
    source = record.fields.get(options.source_field)
    return source if isinstance(source, str) and source else path.name


def _load_scan(stem: Path) -> Scan:
    documents = np.load(stem.with_suffix(".npy"))
    signatures = stem.with_suffix(".signatures")
    note = json.loads(_json(stem).read_text(encoding="utf-8"))
    return Scan(
        documents,
        np.memmap(signatures, dtype=np.uint32, mode="r").reshape(len(documents), -1)
        if len(documents)
        else np.zeros((0, 0), dtype=np.uint32),
        note["sources"],
        {int(line): test for line, test in note["tests"].items()},
        [(line, problem) for line, problem in note["problems"]],
        tuple(note["test_counts"]),
    )


# ---------------------------------------------------------------- 2. select


@dataclass(frozen=True)
class Decisions:
    """What becomes of each document, numbered over all files in input order.

    Attributes:
        stage: number in STAGES, [N]; "paragraphs" is not decided yet.
        keeper: the document that stays in its place, its own number if none, [N].
        similarity: Jaccard similarity of a near duplicate to its keeper, else NaN, [N]. Below the threshold where a chain
            of similar documents connects the two.
        num_compared: pairs whose true similarity was computed.
        num_rejected: how many of them were below the threshold.
    """

    stage: np.ndarray
    keeper: np.ndarray
    similarity: np.ndarray
    num_compared: int
    num_rejected: int


def select(files: list[Path], scans: list[Scan], options: Options, work: Path) -> Decisions:
    """Decide which documents stay."""
    target = work / "decisions.npz"
    if not target.exists():
        decisions = _decide(files, scans, options, work)
        with _atomic(target) as part, part.open("wb") as file:
            np.savez(file, **{field.name: getattr(decisions, field.name) for field in dataclasses.fields(Decisions)})
    with np.load(target) as stored:
        return Decisions(
            stored["stage"],
            stored["keeper"],
            stored["similarity"],
            int(stored["num_compared"]),
            int(stored["num_rejected"]),
        )


def _decide(files: list[Path], scans: list[Scan], options: Options, work: Path) -> Decisions:
    documents = np.concatenate([scan.documents for scan in scans])
    stage = np.zeros(len(documents), dtype=np.int8)
    stage[documents["reason"] > 0] = STAGES.index("quality")
    stage[documents["reason"] == REASONS.index("contaminated")] = STAGES.index("contaminated")
    keeper = np.arange(len(documents))
    similarity = np.full(len(documents), np.nan)

    alive = np.flatnonzero(stage == STAGES.index("kept"))
    keeper[alive] = alive[first_equal(documents["fingerprint"][alive])]
    stage[keeper != np.arange(len(documents))] = STAGES.index("exact")

    signed = np.flatnonzero((stage == STAGES.index("kept")) & documents["signed"])
    groups = _candidates(scans, signed, options)
    wanted = np.unique(np.concatenate([*groups, np.empty(0, dtype=np.int64)]))
    shingles = _Shingles(files, scans, wanted, options, work / "shingles.bin")
    sets, num_compared, num_rejected = join_similar(groups, len(documents), shingles.of, options.threshold)
    for document in map(int, wanted):
        root = sets.find(document)
        if root != document:
            keeper[document], stage[document] = root, STAGES.index("near")
            similarity[document] = jaccard(shingles.of(document), shingles.of(root))
    return Decisions(stage, keeper[keeper], similarity, num_compared, num_rejected)


def _candidates(scans: list[Scan], signed: np.ndarray, options: Options) -> list[np.ndarray]:
    """Groups of documents that share a band, each group once."""
    if not len(signed):
        return []
    firsts = np.cumsum([0, *(len(scan.documents) for scan in scans)])
    parts = np.split(signed, np.searchsorted(signed, firsts[1:-1]))
    groups: dict[bytes, np.ndarray] = {}
    for band in tqdm(range(options.bands), desc="comparing bands", disable=None):
        columns = slice(band * options.rows, (band + 1) * options.rows)
        keys = [
            band_keys(scan.signatures[part - first, columns])
            for scan, part, first in zip(scans, parts, firsts[:-1], strict=True)
            if len(part)
        ]
        for group in buckets(np.concatenate(keys)):
            members = signed[group]
            groups.setdefault(members.tobytes(), members)
    return list(groups.values())


class _Shingles:
    """The n-gram sets of some documents, read again from their files and kept on disk.

    Args:
        wanted: document numbers, ascending.
        target: file for the sets.
    """

    def __init__(self, files: list[Path], scans: list[Scan], wanted: np.ndarray, options: Options, target: Path):
        self._slices: dict[int, tuple[int, int]] = {}
        end = 0
        with target.open("wb") as file:
            for number, record in reread(files, scans, wanted, options):
                shingles = np.unique(ngrams(tokenise(normalise(record.text)).hashes, options.ngram))
                file.write(shingles.tobytes())
                self._slices[number] = (end, end + len(shingles))
                end += len(shingles)
        self._hashes = np.memmap(target, dtype=np.uint64, mode="r") if end else np.empty(0, dtype=np.uint64)

    def of(self, document: int) -> np.ndarray:
        """The n-gram hashes of a document, ascending, [distinct n-grams], uint64."""
        return self._hashes[slice(*self._slices[document])]


def reread(files: list[Path], scans: list[Scan], wanted: np.ndarray, options: Options) -> Iterator[tuple[int, Record]]:
    """Yield (document number, record) for some documents, in order; only files that hold one are opened.

    Args:
        wanted: document numbers, ascending.
    """
    first = 0
    for path, scan in zip(files, scans, strict=True):
        here = wanted[(wanted >= first) & (wanted < first + len(scan.documents))]
        numbers = {int(scan.documents["line"][number - first]): int(number) for number in here}
        first += len(scan.documents)
        for record in read_records(path, options.text_field) if numbers else ():
            if record.line in numbers:
                yield numbers.pop(record.line), record
                if not numbers:
                    break


# ---------------------------------------------------------------- 3. write


@dataclass(frozen=True)
class Written:
    """What was written of one file.

    Attributes:
        documents: documents by source.
        bytes: UTF-8 bytes of their texts by source.
        paragraphs: removed paragraphs by source.
        emptied: lines whose every paragraph was removed; these documents are not written.
    """

    documents: dict[str, int]
    bytes: dict[str, int]
    paragraphs: dict[str, int]
    emptied: list[int]


def write_files(
    files: list[Path], scans: list[Scan], decisions: Decisions, options: Options, work: Path, result: Path
) -> list[Written]:
    """Write what stays of each file that is not written yet."""
    written, first = [], 0
    seen: set[int] = set()  # paragraphs of the documents written so far
    total = sum(path.stat().st_size for path in files)
    with tqdm(desc="writing", total=total, unit="B", unit_scale=True, disable=None) as bar:
        for number, (path, scan) in enumerate(zip(files, scans, strict=True)):
            stem = work / f"write-{number:05d}"
            stages = decisions.stage[first : first + len(scan.documents)]
            first += len(scan.documents)
            if not _json(stem).exists():
                outcome, added = _write_file(path, result / path.name, scan, stages, options, seen)
                with _atomic(stem.with_suffix(".npy")) as part, part.open("wb") as file:
                    np.save(file, np.array(added, dtype=np.uint64))
                with _atomic(_json(stem)) as part:
                    part.write_text(json.dumps(dataclasses.asdict(outcome)), encoding="utf-8")
            else:
                seen.update(np.load(stem.with_suffix(".npy")).tolist())
            written.append(Written(**json.loads(_json(stem).read_text(encoding="utf-8"))))
            bar.update(path.stat().st_size)
    return written


def _write_file(
    path: Path, target: Path, scan: Scan, stages: np.ndarray, options: Options, seen: set[int]
) -> tuple[Written, list[int]]:
    """Write one file, or none if nothing of it stays; returns what was written and the paragraphs added to `seen`."""
    documents, num_bytes, paragraphs = Counter(), Counter(), Counter()
    emptied, added = [], []
    if not np.any(stages == STAGES.index("kept")):
        return Written({}, {}, {}, []), []
    readable = (record for record in read_records(path, options.text_field) if not record.problem)
    with _open_writer(path, target) as write:
        for document, stage, record in zip(scan.documents, stages, readable, strict=True):
            if stage != STAGES.index("kept"):
                continue
            source, text = scan.sources[document["source"]], record.text
            if options.paragraphs:
                text, num_removed, new = without_seen_paragraphs(text, seen)
                paragraphs[source] += num_removed
                added += new
                if num_removed and not text.strip():
                    emptied.append(record.line)
                    continue
            write(record, text, options.text_field)
            documents[source] += 1
            num_bytes[source] += len(text.encode("utf-8"))
    if not documents:
        target.unlink()
    return Written(dict(documents), dict(num_bytes), dict(paragraphs), emptied), added


def without_seen_paragraphs(text: str, seen: set[int]) -> tuple[str, int, list[int]]:
    """Remove paragraphs, parted by blank lines, that were seen before; short ones stay.

    Args:
        text: a document.
        seen: hashes of the paragraphs seen so far; those of this document are added.

    Returns:
        The text, unchanged if nothing was removed; the number of removed paragraphs; the added hashes.
    """
    pieces = _PARAGRAPH_BREAK.split(text)  # paragraph, break, paragraph, ..., paragraph
    kept, num_removed, added = [], 0, []
    for paragraph, after in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
        normal = normalise(paragraph).encode("utf-8")
        if len(normal) >= MIN_PARAGRAPH_BYTES:
            key = int.from_bytes(hashlib.blake2b(normal, digest_size=8).digest(), "big")
            if key in seen:
                num_removed += 1
                continue
            seen.add(key)
            added.append(key)
        kept.append(paragraph + after)
    return ("".join(kept).rstrip() if num_removed else text), num_removed, added


@contextmanager
def _open_writer(path: Path, target: Path):
    """A function (record, text, text field) that appends a document to `target` in the format of `path`."""
    with _atomic(target) as part:
        if path.suffix == ".parquet":
            from pyarrow import Table
            from pyarrow.parquet import ParquetFile, ParquetWriter

            with ParquetFile(path) as source:
                schema = source.schema_arrow
            rows: list[dict] = []
            with ParquetWriter(part, schema) as writer:

                def flush():
                    writer.write_table(Table.from_pylist(rows, schema=schema))
                    rows.clear()

                def write(record: Record, text: str, text_field: str) -> None:
                    rows.append({**record.fields, text_field: text})
                    if len(rows) == 1024:
                        flush()

                yield write
                flush()
            return
        with part.open("wb") as raw:
            # No name and no time in the header: equal contents give equal files.
            packed = gzip.GzipFile("", "wb", GZIP_LEVEL, raw, mtime=0) if path.suffix == ".gz" else raw
            with packed as file:
                is_text = ".txt" in path.suffixes

                def write(record: Record, text: str, text_field: str) -> None:
                    if text == record.text:
                        line = record.raw
                    elif is_text:
                        line = text.encode("utf-8")
                    else:
                        line = json.dumps({**record.fields, text_field: text}, ensure_ascii=False).encode("utf-8")
                    file.write(line if is_text else line + b"\n")

                yield write


# ---------------------------------------------------------------- 4. report


def report(
    files: list[Path],
    scans: list[Scan],
    decisions: Decisions,
    written: list[Written],
    options: Options,
    test_sets: tuple[Path, ...],
    folder: Path,
) -> dict:
    """Write removed.jsonl, problems.jsonl, figures.json, report.png and report.html; returns the figures."""
    documents = np.concatenate([scan.documents for scan in scans])
    file_of = np.repeat(np.arange(len(files)), [len(scan.documents) for scan in scans])
    emptied = {(number, line) for number, outcome in enumerate(written) for line in outcome.emptied}

    def name_of(document: int) -> str:
        return f"{files[file_of[document]].name}:{documents['line'][document]}"

    def source_of(document: int) -> str:
        return scans[file_of[document]].sources[documents["source"][document]]

    sources: dict[str, dict] = {}
    rules, between, sizes = Counter(), Counter(), Counter()
    for document in range(len(documents)):
        entry = sources.setdefault(
            source_of(document),
            {"documents_in": 0, "bytes_in": 0, "documents_out": 0, "bytes_out": 0, "paragraphs_removed": 0}
            | {"removed": dict.fromkeys(STAGES[1:], 0), "removed_bytes": dict.fromkeys(STAGES[1:], 0)},
        )
        entry["documents_in"] += 1
        entry["bytes_in"] += int(documents["bytes"][document])
    with (folder / "removed.jsonl").open("w", encoding="utf-8") as removed:
        for document in range(len(documents)):
            stage = STAGES[decisions.stage[document]]
            if (file_of[document], documents["line"][document]) in emptied:
                stage = "paragraphs"
            if stage == "kept":
                continue
            source, row = source_of(document), {"id": name_of(document), "stage": stage}
            row["source"] = source
            if stage == "quality":
                row["rule"] = REASONS[documents["reason"][document]]
                rules[row["rule"]] += 1
            elif stage == "contaminated":
                row["test"] = scans[file_of[document]].tests[int(documents["line"][document])]
            elif stage in ("exact", "near"):
                keeper = int(decisions.keeper[document])
                row["keeper"], row["keeper_source"] = name_of(keeper), source_of(keeper)
                between[source, row["keeper_source"]] += 1
                sizes[keeper] += 1
            if stage == "near":
                row["jaccard"] = round(float(decisions.similarity[document]), 4)
            removed.write(json.dumps(row, ensure_ascii=False) + "\n")
            sources[source]["removed"][stage] += 1
            sources[source]["removed_bytes"][stage] += int(documents["bytes"][document])
    for outcome in written:
        for source, count in outcome.documents.items():
            sources[source]["documents_out"] += count
            sources[source]["bytes_out"] += outcome.bytes[source]
            sources[source]["paragraphs_removed"] += outcome.paragraphs.get(source, 0)
    problems = [
        {"file": path.name, "line": line, "problem": problem}
        for path, scan in zip(files, scans, strict=True)
        for line, problem in scan.problems
    ]
    with (folder / "problems.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems)
    num_strings, num_short = scans[0].test_counts
    figures = {
        "options": dataclasses.asdict(options),
        "test_sets": {"files": [path.name for path in test_sets], "strings": num_strings, "too_short": num_short},
        "total": _total(list(sources.values())),
        "sources": sources,
        "rules": dict(rules.most_common()),
        "between_sources": [
            {"removed": removed, "kept": kept, "documents": count} for (removed, kept), count in between.most_common()
        ],
        "clusters": {
            "count": len(sizes),
            "largest": max(sizes.values(), default=-1) + 1,
            "sizes": {str(size + 1): count for size, count in sorted(Counter(sizes.values()).items())},
        },
        "candidates": {"compared": decisions.num_compared, "below_threshold": decisions.num_rejected},
        "problems": problems,
    }
    (folder / "figures.json").write_text(json.dumps(figures, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    near = decisions.similarity[decisions.stage == STAGES.index("near")]
    plot(figures, near, folder / "report.png")
    write_html(figures, _sample_pairs(files, scans, decisions, options, name_of), folder / "report.html")
    return figures


def _total(entries: list[dict]) -> dict:
    """The sums of entries of equal shape, whose values are numbers or dictionaries of numbers."""
    total: dict = {}
    for entry in entries:
        for key, value in entry.items():
            if isinstance(value, dict):
                total[key] = _total([total.get(key, {}), value])
            else:
                total[key] = total.get(key, 0) + value
    return total


def _sample_pairs(files, scans, decisions: Decisions, options: Options, name_of) -> list[dict]:
    """Near duplicates with the texts of both sides: half of them the least similar, half the most similar."""
    near = np.flatnonzero(decisions.stage == STAGES.index("near"))
    near = near[np.argsort(decisions.similarity[near], kind="stable")]
    if len(near) > NUM_PAIRS:
        near = np.concatenate([near[: NUM_PAIRS // 2], near[-(NUM_PAIRS - NUM_PAIRS // 2) :]])
    wanted = np.unique(np.concatenate([near, decisions.keeper[near]]))
    texts = {number: record.text for number, record in reread(files, scans, wanted, options)}
    return [
        {
            "jaccard": float(decisions.similarity[number]),
            "kept": (name_of(decisions.keeper[number]), texts[int(decisions.keeper[number])]),
            "removed": (name_of(number), texts[int(number)]),
        }
        for number in near
    ]


# ---------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = Parser(prog="python -m corpus.deduplicate", description=__doc__.partition("\n")[0])
    default = Options()
    parser.add_argument("files", nargs="+", type=Path, help=".jsonl, .txt (.gz) or .parquet; the first copy stays")
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--workers", type=int, default=1, help="processes that scan files (default 1)")
    fields = parser.add_argument_group("input")
    fields.add_argument("--text-field", default=default.text_field, help="key of the text (default text)")
    fields.add_argument(
        "--source-field", default=default.source_field, help="key of the source, for the report (default source)"
    )
    near = parser.add_argument_group("duplicates")
    near.add_argument("--threshold", type=float, default=default.threshold, help="least similarity (default 0.8)")
    near.add_argument("--ngram", type=int, default=default.ngram, help="tokens in an n-gram (default 5)")
    near.add_argument("--bands", type=int, default=default.bands, help="bands of a signature (default 14)")
    near.add_argument("--rows", type=int, default=default.rows, help="entries of a band (default 8)")
    near.add_argument("--seed", type=int, default=default.seed, help="seed of the hash functions (default 1)")
    near.add_argument("--backend", choices=BACKENDS, default=default.backend, help="who computes MinHash signatures")
    near.add_argument("--exact-only", action="store_true", help="leave near duplicates in")
    near.add_argument("--paragraphs", action="store_true", help="also remove paragraphs that occurred before")
    rules = parser.add_argument_group("filters")
    rules.add_argument(
        "--quality", action=argparse.BooleanOptionalAction, default=default.quality, help="quality rules (default on)"
    )
    rules.add_argument("--test-sets", nargs="+", type=Path, default=[], help="test sets, which must not be trained on")
    rules.add_argument(
        "--test-ngram",
        type=int,
        default=default.test_ngram,
        help="tokens that a document may not share with a test, in a row (default 13)",
    )
    return parser


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = vars(build_parser().parse_args(argv))
    files, output = args.pop("files"), args.pop("output")
    test_sets, workers = tuple(args.pop("test_sets")), args.pop("workers")
    figures = deduplicate(files, output, Options(**args), test_sets, workers)
    total = figures["total"]
    print(f"documents: {total['documents_in']} in, {total['documents_out']} out")
    print(f"bytes:     {total['bytes_in']} in, {total['bytes_out']} out")
    print("removed:   " + ", ".join(f"{count} {stage}" for stage, count in total["removed"].items()))
    for problem in figures["problems"]:
        print(f"warning: {problem['file']}:{problem['line']} {problem['problem']}", file=sys.stderr)
    print(f"report:    {output / 'report' / 'report.html'}")
    print(f"next: python -m tokenization.train_bpe, or python -m pretrain.data --files LANGUAGE {output}/*.jsonl* ...")
    return 0


if __name__ == "__main__":
    run_command(main)
