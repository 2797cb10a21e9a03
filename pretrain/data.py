"""Turns text files into token shards for pretraining, and reads packed rows back from them.

    python -m pretrain.data --files en corpus/en_*.jsonl.gz --files zh corpus/zh_*.jsonl.gz \\
        --tokenizer runs/tokenizer --output runs/data

A shard is a flat uint16 file of documents, each `bos text eos`. A row is a window of such a file, so it may hold the end
of one document and the start of the next. Packing (DeepSeek-V3, arXiv:2412.19437, section 4.1, here without cross-document
attention): `position_ids` restart at 0 at each bos, from which the model's mask keeps documents apart, and a bos is never
a target. With `--fim-rate` some training documents become fill-in-the-middle samples. A document that spells the name of a
control token is encoded as text.

Shapes: B rows, S tokens a row.
"""

import argparse
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.command import Parser, check_early, one_line_errors, run_command
from common.extras import extra


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = Parser(prog="python -m pretrain.data", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--files",
        nargs="+",
        action="append",
        required=True,
        metavar=("LANGUAGE", "FILE"),
        help="a language name and its .jsonl, .txt (.gz) or .parquet files, a .txt being one document; repeat for each",
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--output", type=Path, required=True, help="folder to create for the shards")
    parser.add_argument(
        "--held-out-fraction", type=float, default=0.01, help="share of documents, in [0, 1) (default 0.01)"
    )
    parser.add_argument(
        "--min-held-out-bytes", type=int, default=200_000, help="least UTF-8 bytes a language (default 200000)"
    )
    parser.add_argument("--shard-tokens", type=int, default=1 << 23, help="tokens in a shard (default 8388608)")
    parser.add_argument(
        "--text-field", default="text", help="key of the text in .jsonl files, column in .parquet (default text)"
    )
    parser.add_argument(
        "--fim-rate",
        type=float,
        default=0.0,
        help="share of training documents made fill-in-the-middle samples, in [0, 1]; V3 has 0.1 (default 0)",
    )
    parser.add_argument(
        "--fim-spm-share", type=float, default=0.0, help="of these, in suffix-prefix-middle order (default 0)"
    )
    return parser


check_early(__name__, lambda: build_parser().parse_args())

with extra("train"):
    import numpy as np
    import torch
    from tqdm import tqdm
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    from tokenization.documents import check_fraction, check_paths, is_held_out, read_documents
    from tokenization.fim import check_rates, draw_fim, encode_fim, fim_token_ids
    from tokenization.plain import PlainEncoder

INDEX_NAME = "index.json"
IGNORED_LABEL = -100  # the label that every transformers loss skips
TOKEN_DTYPE = np.uint16  # two bytes a token; hence vocabularies of at most 65536


# ---------------------------------------------------------------- writing


class ShardWriter:
    """Writes a token stream as numbered uint16 files of at least `shard_tokens` tokens each, the last one shorter.

    A document never spans two files, so each file can be read alone.
    """

    def __init__(self, folder: Path, prefix: str, shard_tokens: int):
        self.folder, self.prefix, self.shard_tokens = folder, prefix, shard_tokens
        self.shards: list[dict] = []
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0

    def add(self, tokens: list[int]) -> None:
        """Append one document."""
        self._pending.append(np.asarray(tokens, dtype=TOKEN_DTYPE))
        self._pending_tokens += len(tokens)
        if self._pending_tokens >= self.shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as the next file."""
        if not self._pending:
            return
        name = f"{self.prefix}-{len(self.shards):05d}.bin"
        np.concatenate(self._pending).tofile(self.folder / name)
        self.shards.append({"file": name, "tokens": self._pending_tokens})
        self._pending, self._pending_tokens = [], 0


def write_language(
    language: str,
    paths: list[Path],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    held_out_fraction: float,
    shard_tokens: int,
    text_field: str,
    fim_rate: float,
    fim_spm_share: float,
) -> dict:
    """Tokenise one language's files into train and held-out shards in `folder`; returns its index entry.

    The entry lists the shards of both splits and, for the held-out split, tokens and UTF-8 bytes of each document: bits
    per byte needs the bytes.
    """
    writers = {
        "train": ShardWriter(folder, f"{language}-train", shard_tokens),
        "held_out": ShardWriter(folder, f"{language}-held-out", sys.maxsize),  # one file: evaluation reads it whole
    }
    sizes: dict[str, list[tuple[int, int]]] = {"train": [], "held_out": []}
    encode = PlainEncoder(tokenizer)
    documents = itertools.chain.from_iterable(read_documents(path, text_field) for path in paths)
    with tqdm(desc=f"tokenising {language}", unit="B", unit_scale=True) as bar:
        for texts in _batched(documents, 64):
            for text, ids in zip(texts, tokenizer(texts, verbose=False)["input_ids"], strict=True):
                split = "held_out" if is_held_out(text, held_out_fraction) else "train"
                num_bytes = len(text.encode("utf-8"))
                sample = draw_fim(text, fim_rate, fim_spm_share) if split == "train" else None
                if sample is not None:
                    ids = [tokenizer.bos_token_id, *encode_fim(encode, sample)]
                elif encode.has_control_tokens(text):
                    ids = [tokenizer.bos_token_id, *encode(text)]
                ids.append(tokenizer.eos_token_id)
                writers[split].add(ids)
                sizes[split].append((len(ids), num_bytes))
                bar.update(num_bytes)
    entry = {}
    for split, writer in writers.items():
        writer.flush()
        entry[split] = {
            "shards": writer.shards,
            "documents": len(sizes[split]),
            "tokens": sum(tokens for tokens, _ in sizes[split]),
            "bytes": sum(num_bytes for _, num_bytes in sizes[split]),
        }
    entry["held_out"]["document_sizes"] = sizes["held_out"]
    return entry


def _batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def build_dataset(
    files: dict[str, list[Path]],
    tokenizer_dir: Path,
    output: Path,
    held_out_fraction: float = 0.01,
    min_held_out_bytes: int = 200_000,
    shard_tokens: int = 1 << 23,
    text_field: str = "text",
    fim_rate: float = 0.0,
    fim_spm_share: float = 0.0,
) -> dict:
    """Tokenise all languages into `output` and return the index.

    Everything is written to a folder beside `output` that is renamed at the end: `output` is complete or absent.

    Args:
        files: input files by language name.
        tokenizer_dir: folder that AutoTokenizer loads; its tokenizer must put bos in front of a text.
        output: folder to create; must not exist.
        held_out_fraction: expected share of documents kept out of training, in [0, 1).
        min_held_out_bytes: refuse a split whose held-out text is shorter, in UTF-8 bytes for each language.
        shard_tokens: tokens in a training file.
        text_field: key of the text in .jsonl files, column in .parquet files.
        fim_rate: share of training documents made fill-in-the-middle samples, in [0, 1]; V3 has 0.1.
        fim_spm_share: of these, the share in the order suffix-prefix-middle, in [0, 1].

    Raises:
        ValueError: an option, the tokenizer or the size of the held-out set is unusable.
        FileExistsError: `output` exists.
    """
    check_fraction(held_out_fraction)
    check_rates(fim_rate, fim_spm_share)
    check_paths([path for paths in files.values() for path in paths])
    if output.exists():
        raise FileExistsError(f"--output {output} exists; remove it or name another folder")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    check_tokenizer(tokenizer)
    if fim_rate:
        fim_token_ids(PlainEncoder(tokenizer))  # refuses a tokenizer without them
    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        index = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "tokenizer_sha256": hashlib.sha256((tokenizer_dir / "tokenizer.json").read_bytes()).hexdigest(),
            "held_out_fraction": held_out_fraction,
            "fim_rate": fim_rate,
            "fim_spm_share": fim_spm_share,
            "languages": {
                language: write_language(
                    language,
                    paths,
                    tokenizer,
                    partial,
                    held_out_fraction,
                    shard_tokens,
                    text_field,
                    fim_rate,
                    fim_spm_share,
                )
                for language, paths in files.items()
            },
        }
        for language, entry in index["languages"].items():
            held_out_bytes = entry["held_out"]["bytes"]
            if held_out_bytes < min_held_out_bytes:
                raise ValueError(
                    f"language {language!r} has {held_out_bytes} held-out bytes, fewer than --min-held-out-bytes "
                    f"{min_held_out_bytes}; raise --held-out-fraction (now {held_out_fraction}; "
                    "tokenization.train_bpe must get the same one, else the tokenizer has seen the held-out text), lower "
                    "--min-held-out-bytes, or add files; a .txt is one document, which corpus.split cuts into many"
                )
        (partial / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return index


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless the tokenizer fits uint16 shards and starts a text with exactly one bos."""
    if len(tokenizer) > 1 << 16:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens; uint16 shards hold ids below 65536")
    check_bos(tokenizer)


def check_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless the tokenizer starts a text with exactly one bos, and ends it without eos."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = tokenizer("text")["input_ids"]
    if bos is None or eos is None or ids[:1] != [bos] or ids.count(bos) != 1 or eos in ids:
        raise ValueError(
            f"the tokenizer encodes 'text' as {ids} with bos {bos} and eos {eos}; it must put one bos in front and no eos: "
            "set the post-processor of tokenizer.json as tokenization.train_bpe does"
        )


# ---------------------------------------------------------------- reading


def position_ids_of(input_ids: torch.Tensor, bos_token_id: int) -> torch.Tensor:
    """Positions that restart at 0 at every bos and at the start of the row.

    Args:
        input_ids: token ids, [B, S].
        bos_token_id: the id that opens a document.

    Returns:
        Position ids, [B, S], int64.
    """
    columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)  # [B, S]
    starts = torch.where(input_ids == bos_token_id, columns, 0).cummax(dim=1).values  # [B, S] latest bos so far
    return columns - starts


def batch_of(input_ids: torch.Tensor, bos_token_id: int) -> dict[str, torch.Tensor]:
    """Model inputs for packed rows: `input_ids`, `position_ids`, `labels`, each [B, S], int64.

    Labels are not shifted (the model shifts them). A bos is no target: what precedes it is another document.
    """
    return {
        "input_ids": input_ids,
        "position_ids": position_ids_of(input_ids, bos_token_id),
        "labels": input_ids.masked_fill(input_ids == bos_token_id, IGNORED_LABEL),
    }


class PackedRows:
    """Fixed-length rows over the memory-mapped shards of one language and split.

    Consecutive rows share one token: the last of a row is the first of the next, so every token is a target exactly once.

    Args:
        folder: folder with the shards.
        shards: `{"file", "tokens"}` entries of the index.
        row_tokens: S, tokens in a row, at least 2.
    """

    def __init__(self, folder: Path, shards: list[dict], row_tokens: int):
        if row_tokens < 2:
            raise ValueError(f"row length is {row_tokens} tokens; it must be at least 2")
        self.row_tokens = row_tokens
        self._shards = [np.memmap(folder / shard["file"], dtype=TOKEN_DTYPE, mode="r") for shard in shards]
        for shard, tokens in zip(shards, self._shards, strict=True):
            if len(tokens) != shard["tokens"]:
                raise ValueError(
                    f"shard {shard['file']} holds {len(tokens)} tokens, its index says {shard['tokens']}; "
                    "the file is damaged: run pretrain.data again"
                )
        rows_per_shard = [max(0, (len(tokens) - 1) // (row_tokens - 1)) for tokens in self._shards]
        self._first_rows = np.cumsum([0, *rows_per_shard])  # [shards + 1]

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def __getitem__(self, row: int) -> np.ndarray:
        """Row number `row` as int64, [S]."""
        shard = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        start = (row - int(self._first_rows[shard])) * (self.row_tokens - 1)
        return self._shards[shard][start : start + self.row_tokens].astype(np.int64)


@dataclass(frozen=True)
class HeldOut:
    """Held-out windows of one language with the size of the text they cover.

    Attributes:
        windows: token ids, [windows, S], int64; the last window is filled up with eos.
        num_targets: how many tokens of `windows`, read in order without the shared ones, are text and not filling.
        num_bytes: UTF-8 bytes of the documents.
    """

    windows: torch.Tensor
    num_targets: int
    num_bytes: int


class PretrainingData:
    """A dataset written by `build_dataset`: reproducible training batches and held-out windows.

    The rows of a batch are a function of (seed, step) alone, so resuming needs no reader state. Each language gives a
    fixed number of rows to each batch and walks through its own rows in a new random order every epoch.

    Args:
        folder: folder with `index.json`.
        row_tokens: S, tokens in a training row.
        batch_rows: B, rows in a batch over all processes and accumulation steps.
        mix: share of rows by language; normalised; a language left out is not trained on. None: equal shares.
        seed: seed of the orders.

    Raises:
        FileNotFoundError: `folder` holds no index.
        ValueError: the mix names an unknown language, has no positive weight, or a language has no full row.
    """

    def __init__(self, folder: Path, row_tokens: int, batch_rows: int, mix: dict[str, float] | None, seed: int = 0):
        index_path = folder / INDEX_NAME
        if not index_path.is_file():
            raise FileNotFoundError(
                f"{index_path.absolute()} does not exist; write a dataset with `python -m pretrain.data`"
            )
        self.index = json.loads(index_path.read_text(encoding="utf-8"))
        self.folder, self.seed = folder, seed
        languages = self.index["languages"]
        mix = dict.fromkeys(languages, 1.0) if mix is None else mix
        unknown = sorted(set(mix) - set(languages))
        if unknown or min(mix.values(), default=-1) < 0 or sum(mix.values()) <= 0:
            raise ValueError(f"mix is {mix}; give non-negative weights for some of {', '.join(sorted(languages))}")
        self.rows = {name: PackedRows(folder, languages[name]["train"]["shards"], row_tokens) for name in sorted(mix)}
        self.quotas = row_quotas(mix, batch_rows)
        for name, quota in self.quotas.items():
            if quota and not len(self.rows[name]):
                raise ValueError(f"language {name!r} has no row of {row_tokens} tokens; shorten the rows or add text")
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    @property
    def bos_token_id(self) -> int:
        """The id that opens every document."""
        return self.index["bos_token_id"]

    def passes(self, steps: int) -> dict[str, float]:
        """How often `steps` optimizer steps go through the rows of each language."""
        return {name: steps * quota / len(self.rows[name]) for name, quota in self.quotas.items() if quota}

    def batch(self, step: int) -> torch.Tensor:
        """Token ids of the rows of optimizer step `step` (from 0), [B, S], int64, languages interleaved."""
        rows = [
            (number / quota, name, self._row(name, step * quota + number))
            for name, quota in self.quotas.items()
            for number in range(quota)
        ]
        # Interleaved, so that every process and accumulation step sees about the same mix.
        rows.sort(key=lambda row: row[:2])
        return torch.from_numpy(np.stack([tokens for _, _, tokens in rows]))

    def _row(self, language: str, number: int) -> np.ndarray:
        """The `number`-th row that training takes from a language, counted over all epochs."""
        epoch, place = divmod(number, len(self.rows[language]))
        if self._orders.get(language, (None, None))[0] != epoch:
            key = hashlib.blake2b(f"{self.seed}/{language}/{epoch}".encode(), digest_size=8).digest()
            generator = np.random.default_rng(int.from_bytes(key, "big"))
            self._orders[language] = (epoch, generator.permutation(len(self.rows[language])))
        return self.rows[language][int(self._orders[language][1][place])]


def row_quotas(mix: dict[str, float], batch_rows: int) -> dict[str, int]:
    """Split `batch_rows` by weight into whole rows, largest remainder first; ties go to the earlier name."""
    total = sum(mix.values())
    exact = {name: batch_rows * mix[name] / total for name in sorted(mix)}
    quotas = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: quotas[name] - exact[name])
    for name in by_remainder[: batch_rows - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


def load_held_out(folder: Path, window_tokens: int, max_tokens: int | None = None) -> dict[str, HeldOut]:
    """Read the held-out text of each language as windows that cover every token once as a target.

    Args:
        folder: folder written by `build_dataset`.
        window_tokens: S, tokens in a window, at least 2; a token is predicted from at most S - 1 earlier ones.
        max_tokens: stop after the document that passes this many tokens in each language; None reads all.

    Returns:
        Windows by language; languages without held-out documents are absent.
    """
    if window_tokens < 2:
        raise ValueError(f"window length is {window_tokens} tokens; it must be at least 2")
    index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    held_out = {}
    for language, entry in index["languages"].items():
        num_tokens = num_bytes = 0
        for document_tokens, document_bytes in entry["held_out"]["document_sizes"]:
            if max_tokens is not None and num_tokens >= max_tokens:
                break
            num_tokens += document_tokens
            num_bytes += document_bytes
        if not num_tokens:
            continue
        stream = np.memmap(folder / entry["held_out"]["shards"][0]["file"], dtype=TOKEN_DTYPE, mode="r")[:num_tokens]
        held_out[language] = _windows(stream, window_tokens, index["eos_token_id"], num_bytes)
    return held_out


def load_held_out_text(
    folder: Path,
    window_tokens: int,
    max_tokens: int | None,
    data_tokenizer: PreTrainedTokenizerBase,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, HeldOut]:
    """The held-out documents of `load_held_out` as windows of another tokenizer: the same text, hence the same bytes.

    Args:
        folder, window_tokens, max_tokens: as of `load_held_out`; `max_tokens` counts tokens of the data.
        data_tokenizer: that made the data.
        tokenizer: of the windows.

    Raises:
        ValueError: `tokenizer` puts no bos in front, or `data_tokenizer` does not give the documents back.
    """
    check_bos(tokenizer)
    encode, index = PlainEncoder(tokenizer), json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    found = {}
    for language, held_out in load_held_out(folder, window_tokens, max_tokens).items():
        sizes = index["languages"][language]["held_out"]["document_sizes"]
        tokens = np.memmap(
            folder / index["languages"][language]["held_out"]["shards"][0]["file"], dtype=TOKEN_DTYPE, mode="r"
        )
        stream, start = [], 0
        for document_tokens, document_bytes in sizes:
            if start > held_out.num_targets:  # the documents that `max_tokens` left in end here
                break
            ids = tokens[start + 1 : start + document_tokens - 1].tolist()
            text = data_tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            if len(text.encode("utf-8")) != document_bytes:
                raise ValueError(
                    f"a held-out document of {language!r} has {document_bytes} bytes, but its tokens decode to "
                    f"{len(text.encode('utf-8'))}; the tokenizer of {folder} does not give texts back as they were"
                )
            stream += [tokenizer.bos_token_id, *encode(text), tokenizer.eos_token_id]
            start += document_tokens
        windows = _windows(np.asarray(stream), window_tokens, tokenizer.eos_token_id, held_out.num_bytes)
        found[language] = windows
    return found


def _windows(stream: np.ndarray, window_tokens: int, fill: int, num_bytes: int) -> HeldOut:
    num_windows = -(-(len(stream) - 1) // (window_tokens - 1))  # rounded up
    padded = np.full(num_windows * (window_tokens - 1) + 1, fill, dtype=np.int64)
    padded[: len(stream)] = stream
    windows = np.lib.stride_tricks.sliding_window_view(padded, window_tokens)[:: window_tokens - 1]
    return HeldOut(torch.from_numpy(windows.copy()), num_targets=len(stream) - 1, num_bytes=num_bytes)


# ---------------------------------------------------------------- command line


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    index = build_dataset(
        _files_by_language(args.files),
        args.tokenizer,
        args.output,
        args.held_out_fraction,
        args.min_held_out_bytes,
        args.shard_tokens,
        args.text_field,
        args.fim_rate,
        args.fim_spm_share,
    )
    for language, entry in index["languages"].items():
        for split in ("train", "held_out"):
            size = entry[split]
            print(f"{language} {split}: {size['documents']} documents, {size['tokens']} tokens, {size['bytes']} bytes")
    print(
        f"next: python -m pretrain.train --data {args.output} --tokenizer {args.tokenizer} --model MODEL --run-dir RUN --steps N"
    )
    print(
        f"      a MODEL for this tokenizer: python -m pretrain.config --tokenizer {args.tokenizer} --parameters 15M --output MODEL"
    )
    return 0


def _files_by_language(groups: list[list[str]]) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for language, *names in groups:
        if not names or not language.isidentifier():
            raise ValueError(f"--files {language} {' '.join(names)}: give a language name, then at least one file")
        files.setdefault(language, []).extend(Path(name) for name in names)
    return files


if __name__ == "__main__":
    run_command(main)
