"""This repository's model code as a checkpoint carries it: which files, and what config.json says of them."""

import json
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AUTO_MAP = {
    "AutoConfig": "configuration_deepseek.DeepseekConfig",
    "AutoModel": "modeling_deepseek.DeepseekModel",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    "AutoModelForQuestionAnswering": "modeling_deepseek.DeepseekForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_deepseek.DeepseekForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_deepseek.DeepseekForTokenClassification",
}


def code_files() -> list[Path]:
    """The model code: flat siblings in the root of this repository."""
    return sorted(ROOT.glob("*_deepseek.py"))


def quant_method(config) -> str | None:
    """By which method a checkpoint is quantised, for instance "fp8"; None for plain weights.

    Args:
        config: a config.json as a dict, or the config that transformers makes of it.
    """
    fields = config if isinstance(config, dict) else vars(config)
    quantization = fields.get("quantization_config")
    if quantization is None:
        return None
    fields = quantization if isinstance(quantization, dict) else vars(quantization)
    method = fields.get("quant_method") or "a method without a name"
    return getattr(method, "value", method)  # transformers' objects have an Enum there


def read_config(folder: Path) -> dict:
    """The folder's config.json.

    Raises:
        ValueError: there is none, it is not JSON, or it describes no model of this family.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; name the folder of a transformers checkpoint.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again.") from error
    from configuration_deepseek import FAMILY_DEFAULTS, DeepseekConfig

    if config.get("model_type") is None:
        raise ValueError(f"{path} has no `model_type`; allowed are {', '.join(FAMILY_DEFAULTS)}.")
    DeepseekConfig(**{name: value for name, value in config.items() if name != "auto_map"})
    return config


def write_json(path: Path, content: dict):
    """Writes the whole file or none of it."""
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)
