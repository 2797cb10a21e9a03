"""The models that are checked: those of the tests, wider where there is a GPU, and two of the published shapes."""

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from typing import NamedTuple

import torch

from benchmarks.common import ROOT

if (
    "deepseek_repo" not in sys.modules
):  # a package over the root, whose modules import their siblings; see tests/conftest.py
    _spec = ModuleSpec("deepseek_repo", None, is_package=True)
    _spec.submodule_search_locations = [str(ROOT)]
    sys.modules["deepseek_repo"] = importlib.util.module_from_spec(_spec)
if str(ROOT / "tests") not in sys.path:
    sys.path.append(str(ROOT / "tests"))

import tiny

FAMILIES = ("llama", "deepseek", "v2_lite", "v2", "v3", "v32", "nsa")

# What the tests' models get where kernels should meet widths like the published ones.
_WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "vocab_size": 4096}
_WIDE_MOE = {"moe_intermediate_size": 256, "n_routed_experts": 32}
_WIDE_MLA = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_WIDE_FAMILIES = {
    "llama": {"head_dim": 64},
    "deepseek": {"head_dim": 64, "num_key_value_heads": 8, **_WIDE_MOE},
    "v2_lite": _WIDE_MLA | _WIDE_MOE,
    "v2": _WIDE_MLA | _WIDE_MOE | {"q_lora_rank": 384},
    "v3": _WIDE_MLA | _WIDE_MOE | {"q_lora_rank": 384},
    "v32": _WIDE_MLA | _WIDE_MOE | {"q_lora_rank": 384, "index_topk": 64, "index_head_dim": 128},
    "nsa": {
        **{"head_dim": 64, "num_attention_heads": 32, "nsa_compress_block_size": 32, "nsa_compress_stride": 16},
        **{"nsa_select_block_size": 64, "nsa_window_size": 64, **_WIDE_MOE},
    },
}
# What published shapes lose where they only have to run.
_SMALL = {
    **{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16},
    **{"qk_rope_head_dim": 8, "v_head_dim": 16, "moe_intermediate_size": 32, "n_routed_experts": 16},
    **{"num_experts_per_tok": 4, "first_k_dense_replace": 1},
}


class Setup(NamedTuple):
    """What all parts are run with."""

    device: str  # "cuda" or "cpu"
    full: bool  # sizes for a GPU; else such that a CPU is through in seconds

    @property
    def repeats(self) -> int:
        """Turns of each contestant after the one that warms it up."""
        return 5 if self.full else 1


def make_family(family: str, setup: Setup, attention: str = "sdpa", **overrides):
    """A model of the tests with random float32 weights that bfloat16 can hold, on the CPU."""
    wide = _WIDE | _WIDE_FAMILIES[family] if setup.full else {}
    model = tiny.make_model(family, attention=attention, **(wide | overrides))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model.set_experts_implementation("eager")  # the reference; on a GPU something else would be the default
    return model


def make_tokens(setup: Setup, batch: int = 2, length: int | None = None) -> torch.Tensor:
    """Random ids of the models above, int64 [batch, length]."""
    return tiny.make_tokens(batch, length or (300 if setup.full else 40))


def published_config(name: str, setup: Setup, **overrides) -> dict:
    """A published config.json ("deepseek_v2_lite" or "deepseek_v3"), without what asks for other code or for FP8."""
    config = json.loads((ROOT / "tests" / "configs" / f"{name}.json").read_text())
    for key in ("auto_map", "quantization_config"):
        config.pop(key, None)
    small = {}
    if not setup.full:
        small = _SMALL | {"q_lora_rank": config["q_lora_rank"] and 24}
        small |= {"n_group": 4, "topk_group": 2} if config["n_group"] > 1 else {}
    return config | {"num_nextn_predict_layers": 0} | small | overrides


def make_pair(config: dict, native_class, setup: Setup) -> dict[str, torch.nn.Module]:
    """Our model with random bfloat16 weights made on the device, and transformers' own around the same tensors."""
    from deepseek_repo.configuration_deepseek import DeepseekConfig
    from deepseek_repo.modeling_deepseek import DeepseekForCausalLM

    with torch.device(setup.device):
        ours = DeepseekForCausalLM._from_config(DeepseekConfig(**config), dtype=torch.bfloat16)
    native_config = native_class.config_class(**{key: value for key, value in config.items() if key != "model_type"})
    with torch.device("meta"):
        native = native_class._from_config(native_config, dtype=torch.bfloat16)
    native.load_state_dict(ours.state_dict(), assign=True)
    native.model.rotary_emb = type(native.model.rotary_emb)(config=native.config).to(setup.device)
    return {"ours": ours.eval(), "transformers": native.eval()}
