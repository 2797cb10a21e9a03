"""Gives a checkpoint's tokenizer new tokens for a domain, and its model the rows for them.

    python -m tokenization.extend --model . --text law.jsonl.gz --new-tokens 1000 --output runs/law

New merges are learned on the text on top of the old ones, as byte-level BPE training would continue: every old token
keeps its id and its merges, new ids follow the old. A new token's rows, in the embedding and in the output head, start
as the mean of the rows of the old tokens that it replaces; multi-token-prediction modules use the same two matrices.
Where a config has more rows than its tokenizer has tokens (V3: 129,280 and 128,815), new tokens take those first. OUT
is complete or absent.

Train the result on the domain before use: the old model has never read or written the new tokens.
"""

import argparse
import heapq
import itertools
import json
import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.command import Parser, check_early, one_line_errors, run_command
from common.extras import extra


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = Parser(prog="python -m tokenization.extend", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder with tokenizer.json")
    parser.add_argument("--text", nargs="+", type=Path, required=True, help=".jsonl or .txt files, optionally .gz")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--new-tokens", type=int, default=1000, help="merges to learn (default 1000)")
    parser.add_argument("--max-token-length", type=int, default=16, help="longest new token, in bytes (default 16)")
    parser.add_argument("--control-tokens", nargs="*", default=[], metavar="TOKEN", help="tokens to add by name")
    parser.add_argument(
        "--multiple-of", type=int, default=1, help="round the vocabulary's rows up to this (default 1)"
    )
    parser.add_argument("--text-field", default="text", help="key of the text in .jsonl files (default text)")
    return parser


check_early(__name__, lambda: build_parser().parse_args())

with extra("train"):
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tqdm import tqdm

    from common.card import model_name
    from common.remote_code import read_config
    from common.rewrite import refuse_existing, tensor_files, write_checkpoint
    from tokenization.documents import check_paths, read_documents

# [vocab_size, hidden_size]: the embedding, the output head, and the copies of both in published prediction modules.
_VOCABULARY_MATRIX = re.compile(r"(^|\.)(embed_tokens|lm_head|shared_head\.head)\.weight$")


# ---------------------------------------------------------------- tokenizer


def learn_merges(
    tokenizer: Tokenizer, texts: Iterable[str], new_tokens: int, max_token_length: int = 16
) -> list[tuple[str, str]]:
    """Continue BPE training from a tokenizer's vocabulary.

    Args:
        tokenizer: a byte-level BPE; not changed.
        texts: the domain's texts; consumed once.
        new_tokens: merges to learn.
        max_token_length: longest new token, in bytes.

    Returns:
        Pairs of tokens in the order in which they are merged: the most frequent first, ties to the smaller ids.

    Raises:
        ValueError: no BPE, an option is out of range, or the texts have too few frequent pairs.
    """
    if not isinstance(tokenizer.model, BPE):
        raise ValueError(
            f"the tokenizer's model is {type(tokenizer.model).__name__}; only byte-level BPE can be extended"
        )
    if new_tokens < 1 or max_token_length < 1:
        raise ValueError(
            f"--new-tokens is {new_tokens}, --max-token-length {max_token_length}; both must be at least 1"
        )
    names = {id: name for name, id in tokenizer.get_vocab().items()}
    taken = set(names.values())
    words = _count_words(tokenizer, texts)
    pieces = [[token.id for token in tokenizer.model.tokenize(word)] for word in words]
    frequencies = list(words.values())

    counts: Counter[tuple[int, int]] = Counter()
    words_with = defaultdict(set)
    for word, (ids, frequency) in enumerate(zip(pieces, frequencies, strict=True)):
        for pair in itertools.pairwise(ids):
            counts[pair] += frequency
            words_with[pair].add(word)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)

    merges = []
    with tqdm(total=new_tokens, desc="learning merges", unit="token") as bar:
        while len(merges) < new_tokens:
            if not heap:
                raise ValueError(
                    f"the texts have only {len(merges)} pairs that occur twice, --new-tokens is {new_tokens}; "
                    "give more text, fewer new tokens or a larger --max-token-length"
                )
            negative, pair = heapq.heappop(heap)
            if counts[pair] != -negative:  # outdated: the true count is pushed when it grows, else here
                if counts[pair] > 0:
                    heapq.heappush(heap, (-counts[pair], pair))
                continue
            left, right = names[pair[0]], names[pair[1]]
            if counts[pair] < 2 or len(left + right) > max_token_length or left + right in taken:
                continue
            new_id = len(names)
            names[new_id] = left + right
            taken.add(left + right)
            merges.append((left, right))
            bar.update()
            grown = set()
            for word in words_with.pop(pair):
                ids, frequency = pieces[word], frequencies[word]
                for old in itertools.pairwise(ids):
                    counts[old] -= frequency
                pieces[word] = ids = _merge(ids, pair, new_id)
                for new in itertools.pairwise(ids):
                    counts[new] += frequency
                    words_with[new].add(word)
                    if new_id in new:
                        grown.add(new)
            for new in grown:
                heapq.heappush(heap, (-counts[new], new))
    return merges


def _count_words(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    words: Counter[str] = Counter()
    for text in texts:
        if tokenizer.normalizer is not None:
            text = tokenizer.normalizer.normalize_str(text)
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    return words


def _merge(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    merged, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def extend_tokenizer(
    tokenizer: Tokenizer, merges: list[tuple[str, str]], control_tokens: Iterable[str] = ()
) -> tuple[Tokenizer, dict[int, list[int]]]:
    """Add merges, then control tokens, behind the last id.

    Args:
        tokenizer: not changed.
        merges: pairs of tokens, old ones or results of earlier merges.
        control_tokens: names of tokens to be read as one wherever they stand.

    Returns:
        The new tokenizer, and for each new id the old ids that stood in its place.

    Raises:
        ValueError: a token exists already, or the tokenizer's ids have gaps.
    """
    size = tokenizer.get_vocab_size()
    data = json.loads(tokenizer.to_str())
    vocabulary = data["model"]["vocab"]
    # Added tokens get explicit ids, as V3's bos has: else the library would number them anew, behind the new tokens.
    vocabulary.update((token["content"], token["id"]) for token in data["added_tokens"])
    if sorted(vocabulary.values()) != list(range(size)):
        raise ValueError(f"the tokenizer's {size} ids are not 0 to {size - 1}; it cannot be extended")
    replaced: dict[int, list[int]] = {}
    for left, right in merges:
        _check_new(left + right, vocabulary)
        ids = [vocabulary[left], vocabulary[right]]
        data["model"]["merges"].append([left, right])
        new_id = vocabulary[left + right] = len(vocabulary)
        replaced[new_id] = [old for id in ids for old in replaced.get(id, [id])]
    for name in control_tokens:
        _check_new(name, vocabulary)
        new_id = vocabulary[name] = len(vocabulary)
        replaced[new_id] = tokenizer.encode(name, add_special_tokens=False).ids
        options = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        data["added_tokens"].append({"id": new_id, "content": name, **options})
    return Tokenizer.from_str(json.dumps(data)), replaced


def _check_new(token: str, vocabulary: dict[str, int]) -> None:
    if not token or token in vocabulary:
        raise ValueError(f"token {token!r} is empty or exists already; leave it out")


# ---------------------------------------------------------------- model


def extend_rows(matrix: torch.Tensor, replaced: dict[int, list[int]], num_rows: int) -> torch.Tensor:
    """Give a vocabulary matrix rows for new tokens.

    Args:
        matrix: [old rows, hidden_size].
        replaced: for each new id the old ids whose mean is its row.
        num_rows: rows of the result, at least the old ones; rows without a token start as the mean of all.

    Returns:
        [num_rows, hidden_size] in the dtype of `matrix`.
    """
    old = matrix.float()
    rows = torch.cat([old, old.mean(dim=0).expand(num_rows - len(old), -1)])  # [num_rows, hidden_size]
    for new_id, ids in replaced.items():
        rows[new_id] = old[ids].mean(dim=0)
    return rows.to(matrix.dtype)


def extend_checkpoint(
    source: Path,
    output: Path,
    tokenizer: Tokenizer,
    replaced: dict[int, list[int]],
    multiple_of: int = 1,
) -> int:
    """Write `output`: the checkpoint `source` with another tokenizer and rows for its new tokens; returns `vocab_size`.

    Args:
        source: a checkpoint folder with safetensors weights.
        output: the folder to write; must not exist.
        tokenizer, replaced: from `extend_tokenizer`.
        multiple_of: round the number of rows up to a multiple of this.

    Raises:
        ValueError: `output` exists, or the checkpoint is not of this family or does not fit the tokenizer.
    """
    refuse_existing(output)
    if multiple_of < 1:
        raise ValueError(f"--multiple-of is {multiple_of}; it must be at least 1")
    config = read_config(source)
    old_rows = config.get("vocab_size", 0)
    if old_rows < min(replaced):
        raise ValueError(
            f"the tokenizer had {min(replaced)} tokens, config.json has `vocab_size` {old_rows}; "
            "use the tokenizer that belongs to the model"
        )
    num_rows = -(-max(old_rows, tokenizer.get_vocab_size()) // multiple_of) * multiple_of  # rounded up

    def change(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        yield name, extend_rows(tensor, replaced, num_rows) if _VOCABULARY_MATRIX.search(name) else tensor

    partial = output.with_name(f".{output.name}.{os.getpid()}.extended")
    try:
        what = (
            f"{model_name(source)} with {len(replaced)} more tokens, whose rows are means of the old ones and untrained "
            "(`tokenization.extend`)."
        )
        shards = tensor_files(source, ["embed_tokens.weight"])
        write_checkpoint(source, partial, {**config, "vocab_size": num_rows}, shards, change, what, output.name)
        tokenizer.save(str(partial / "tokenizer.json"))
        os.rename(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return num_rows


# ---------------------------------------------------------------- command line


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    check_paths(args.text)
    refuse_existing(args.output)
    file = args.model / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{file} does not exist; --model must be a folder with a model and its tokenizer")
    old = Tokenizer.from_file(str(file))
    texts = [text for path in args.text for text in read_documents(path, args.text_field)]
    merges = learn_merges(old, texts, args.new_tokens, args.max_token_length)
    new, replaced = extend_tokenizer(old, merges, args.control_tokens)
    num_rows = extend_checkpoint(args.model, args.output, new, replaced, args.multiple_of)
    characters = sum(map(len, texts))
    before, after = (sum(len(one.encode(text).ids) for text in texts) for one in (old, new))
    print(f"{args.output}: {len(replaced)} new tokens, vocab_size {num_rows}")
    print(
        f"the text has {characters / before:.2f} characters a token with the old, {characters / after:.2f} with the new"
    )
    print(
        f"next: train the new rows, by python -m finetune.sft --model {args.output} --method full --data FILE --output RUN"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
