"""What belongs to a checkpoint: the one list for all code that copies, saves, extends or publishes checkpoints.

A model's folder often holds more: results, notes, saved chats, a whole repository. None of that is part of the model.
"""

import ast
import json
from pathlib import Path

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
    "additional_chat_templates/*.jinja",
)
LICENCE = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*")
# Also of an adapter of PEFT and of an ESFT result (finetune/experts.py).
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "esft_experts.safetensors", "expert_cfg.json")
ALL = (
    "config.json",
    "generation_config.json",
    *WEIGHTS,
    *TOKENIZER,
    *LICENCE,
    *ADAPTER,
    "README.md",
    ".gitattributes",
)


def belonging(folder: Path, patterns: tuple[str, ...] = ALL) -> list[str]:
    """The folder's files that match, relative to it, and the modules that its tokenizer and model need."""
    paths = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    names = {path.relative_to(folder).as_posix() for path in paths}
    configs = [name for name in ("config.json", "tokenizer_config.json") if name in names]
    return sorted(names | {f"{module}.py" for module in _modules(folder, configs)})


def _modules(folder: Path, configs: list[str]) -> set[str]:
    """Modules beside the files that the `auto_map` of `configs` names, and what these import; missing ones are left out."""
    found: set[str] = set()
    waiting = []
    for name in configs:
        try:
            auto_map = json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map") or {}
        except (ValueError, AttributeError):
            continue  # damage, which other checks report
        # The values are texts, or of tokenizers lists of them; "owner/name--module.Class" lies elsewhere.
        references = [text for text in json.dumps(auto_map).split('"') if "." in text and "--" not in text]
        waiting += [text.partition(".")[0] for text in references]
    while waiting:
        module = waiting.pop()
        file = folder / f"{module}.py"
        if module in found or not file.is_file():
            continue
        found.add(module)
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
        waiting += [node.module for node in relative if node.module]
    return found
