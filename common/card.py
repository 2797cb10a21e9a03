"""Writes the README.md of a new checkpoint from what lies in its folder, so that it never speaks of another model."""

import json
import math
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open

_KEPT = ("license", "license_name", "license_link", "language")  # of the card of the model that it comes from


def model_name(folder: Path) -> str:
    """The Hub's name of a folder in the Hub's cache, else the folder's own; never a path of this machine."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return folder.parents[1].name.removeprefix("models--").replace("--", "/")
    return folder.name


def write_card(folder: Path, what: str, source: Path | None = None, name: str | None = None, text: str = "") -> None:
    """Write README.md into a complete checkpoint folder.

    Args:
        what: a sentence on how the model came to be.
        source: folder of the model that it was made of, whose licence and languages still hold.
        name: of the model (default: the folder's).
        text: more, in Markdown.
    """
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["deepseek", "custom_code"]}
    if source is not None:
        front |= _front_of(source)
        if "/" in model_name(source):
            front["base_model"] = model_name(source)
    rows = "".join(f"| {fact} | {value} |\n" for fact, value in _facts(folder).items())
    card = f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n# {name or folder.name}\n\n{what}\n\n"
    card += (
        f"| | |\n|---|---|\n{rows}\n{text}```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    )
    card += 'folder = "path/to/this/folder"\ntokenizer = AutoTokenizer.from_pretrained(folder)\n'
    card += "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n```\n"
    (folder / "README.md").write_text(card, encoding="utf-8")


def _front_of(folder: Path) -> dict:
    """The fields of a card that still hold for a model made from its model."""
    try:
        data = ModelCard((folder / "README.md").read_text(encoding="utf-8")).data
    except Exception:  # there is none, or its YAML is damaged: then nothing is known
        return {}
    return {field: data.get(field) for field in _KEPT if data.get(field)}


def _facts(folder: Path) -> dict[str, str]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    numbers: dict[str, int] = {}  # by dtype
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(key)
                numbers[part.get_dtype()] = numbers.get(part.get_dtype(), 0) + math.prod(part.get_shape())
    stored = ", ".join(f"{count:,} as {dtype}" for dtype, count in sorted(numbers.items(), key=lambda it: -it[1]))
    facts = {"family": config.get("model_type"), "numbers in the files": stored}
    names = {"layers": "num_hidden_layers", "hidden size": "hidden_size", "vocabulary": "vocab_size"}
    names |= {"context, tokens": "max_position_embeddings", "routed experts": "n_routed_experts"}
    return facts | {fact: f"{config[name]:,}" for fact, name in names.items() if isinstance(config.get(name), int)}
