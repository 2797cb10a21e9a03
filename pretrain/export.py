"""Writes a trained model as a small Hub-shaped checkpoint: bf16 safetensors, generation defaults, tokenizer files.

Used by `pretrain.train --export-dir`. The folder's own `config.json` and Python files are kept if it has them.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig

from common.card import write_card
from common.command import no_command
from common.loading import load_config, load_model, new_model
from common.remote_code import AUTO_MAP, code_files, write_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# What an export replaces; config.json and the code stay where they are.
EXPORTED_FILES = ("model.safetensors", "model.safetensors.index.json", "generation_config.json")


def export_checkpoint(
    state_dict: dict[str, torch.Tensor],
    model_dir: Path,
    tokenizer_dir: Path,
    export_dir: Path,
    what: str = "Exported by `pretrain.export`.",
    measured: str = "",
) -> None:
    """Write a model in bf16 with tokenizer and generation defaults into `export_dir`, and load it back to check it.

    Args:
        state_dict: all weights of the trained model, any dtype; the model itself may hold only shards of them.
        model_dir: the folder it was built from, with config.json.
        tokenizer_dir: folder of the tokenizer.
        export_dir: target; may be `model_dir`. An existing `config.json`, card and code stay.
        what, measured: of the card (common/card.py).

    Raises:
        ValueError: the written checkpoint does not fit the model: names the missing and unexpected keys.
    """
    model = new_model(load_config(model_dir), dtype=torch.float32)
    model.load_state_dict(state_dict)
    export_dir.mkdir(parents=True, exist_ok=True)
    if not (export_dir / "config.json").exists():
        shutil.copy(model_dir / "config.json", export_dir)
        config = json.loads((export_dir / "config.json").read_text(encoding="utf-8"))
        if config.get("auto_map") != AUTO_MAP:
            write_json(export_dir / "config.json", config | {"auto_map": AUTO_MAP})
    for file in code_files():
        if not (export_dir / file.name).exists():
            shutil.copy(file, export_dir)
    with tempfile.TemporaryDirectory(dir=export_dir, prefix=".export-") as temporary:
        full, small = Path(temporary, "full"), Path(temporary, "small")
        model.save_pretrained(full)
        # Loading, not `.to(bfloat16)`: it keeps in fp32 what the model declares so (the router's selection bias).
        rounded = load_model(full, dtype=torch.bfloat16)
        rounded.generation_config = generation_defaults(tokenizer_dir)
        rounded.save_pretrained(small)
        for name in ("model.safetensors", "generation_config.json"):
            (small / name).chmod(0o644)  # safetensors makes files that only the owner can read
            os.replace(small / name, export_dir / name)
    for name in TOKENIZER_FILES:
        if (tokenizer_dir / name).is_file() and tokenizer_dir.resolve() != export_dir.resolve():
            shutil.copy(tokenizer_dir / name, export_dir / name)
    if not (export_dir / "README.md").exists():
        write_card(export_dir, what, name=export_dir.resolve().name, text=measured)
    check_loads(export_dir)


def generation_defaults(tokenizer_dir: Path) -> GenerationConfig:
    """Sampling defaults for a small base model, with the tokenizer's bos, eos and pad."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
    )


def check_loads(folder: Path) -> None:
    """Raise ValueError unless the checkpoint has exactly the keys and shapes its model wants."""
    _, report = load_model(folder, output_loading_info=True)
    problems = {name: sorted(map(str, keys)) for name, keys in report.items() if keys}
    if problems:
        raise ValueError(
            f"{folder}/model.safetensors does not fit its model: {problems}; was the code changed meanwhile?"
        )


if __name__ == "__main__":
    no_command("export by python -m pretrain.train --export-dir FOLDER")
