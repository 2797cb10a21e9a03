"""A small bilingual dataset, tokenised as `pretrain.data` does."""

import json
from pathlib import Path

from pretrain.data import build_dataset
from tokenization.train_bpe import save_tokenizer, train_tokenizer

VOCAB_SIZE = 320
TEXTS = {
    "en": [f"Number {i} is followed by number {i + 1}, and so on until {i + 9}.\n" * 3 for i in range(60)],
    "zh": [f"数字{i}之后是数字{i + 1}，一直到{i + 9}为止。\n" * 3 for i in range(60)],
}


def write_workspace(folder: Path) -> Path:
    """Fills a folder with a tokenizer, jsonl files and a dataset of both languages in small shards."""
    documents = [text for texts in TEXTS.values() for text in texts]
    save_tokenizer(train_tokenizer(documents, VOCAB_SIZE, show_progress=False), folder / "tokenizer", 256)
    files = {}
    for language, texts in TEXTS.items():
        files[language] = [folder / f"{language}.jsonl"]
        files[language][0].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build_dataset(files, folder / "tokenizer", folder / "data", 0.2, min_held_out_bytes=1, shard_tokens=1000)
    return folder
