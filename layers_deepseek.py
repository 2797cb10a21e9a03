"""Layers every DeepSeek model shares: RMSNorm, the gated MLP and rotary position embeddings.

Shape letters: B batch, S tokens, H heads, D rotated width of a head.
Papers: RoPE (arXiv:2104.09864), YaRN (arXiv:2309.00071), DeepSeek-V2 (arXiv:2405.04434).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .linear_deepseek import project


class DeepseekRMSNorm(nn.Module):
    """x * weight / sqrt(mean(x^2) + eps), computed in float32, returned in the input's dtype."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., size] -> [..., size]"""
        normalised = F.rms_norm(hidden_states.float(), self.weight.shape, eps=self.eps)
        return self.weight * normalised.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class DeepseekMLP(nn.Module):
    """SwiGLU: down(act(gate(x)) * up(x)). Dense layers and, with its own width, the shared experts."""

    def __init__(self, config, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> [..., hidden_size]"""
        gate, up = project(self.gate_proj, hidden_states), project(self.up_proj, hidden_states)
        return project(self.down_proj, self.act_fn(gate) * up)


class Residual:
    """The stream that runs through the layers: where a sublayer's input is taken from, and where its output goes."""

    def read(self, stream: torch.Tensor) -> torch.Tensor:
        """The input of a sublayer, before its norm. [B, S, hidden_size]"""
        return stream

    def write(self, stream: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The stream with a sublayer's output [B, S, hidden_size] added."""
        return stream + output


class DeepseekRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotation angles, with transformers' RoPE types (YaRN among them).

    YaRN has two factors on DeepSeek models: the one on cos/sin, mscale(factor, mscale) / mscale(factor,
    mscale_all_dim), is applied here; the one on the softmax scale is `yarn_softmax_factor`.
    """

    inv_freq: torch.Tensor

    def __init__(self, parameters: dict, width: int, max_positions: int):
        """
        Args:
            parameters: `rope_type`, `rope_theta` and what the type needs, as in transformers' `rope_parameters`.
            width: D, the numbers of a head that are rotated.
            max_positions: longest context; types of a growing base start to change beyond it.
        """
        super().__init__()
        # What transformers' RoPE functions read: here, and again when it fills the frequencies after loading.
        self.config = PreTrainedConfig.from_dict(
            {
                "rope_parameters": dict(parameters),
                "head_dim": width,
                "hidden_size": width,
                "num_attention_heads": 1,
                "max_position_embeddings": max_positions,
            }
        )
        self.max_seq_len_cached = max_positions
        self.original_max_seq_len = max_positions
        self.rope_type = parameters["rope_type"]
        init = (
            self.compute_default_rope_parameters
            if self.rope_type == "default"
            else ROPE_INIT_FUNCTIONS[self.rope_type]
        )
        inv_freq, self.attention_scaling = init(self.config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        # transformers fills both again after loading on the meta device
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @classmethod
    def from_config(cls, config) -> "DeepseekRotaryEmbedding":
        """The table of a model that has one."""
        return cls(config.rope_parameters, config.head_dim, config.max_position_embeddings)

    def _apply(self, fn, recurse=True):
        """Follows a model to another device, not to another dtype: rounded frequencies turn far positions wrongly."""
        exact = {name: getattr(self, name) for name in ("inv_freq", "original_inv_freq")}
        super()._apply(fn, recurse)
        for name, values in exact.items():
            if not values.is_meta:
                setattr(self, name, values.to(getattr(self, name).device))
        return self

    @staticmethod
    def compute_default_rope_parameters(config, **kwargs) -> tuple[torch.Tensor, float]:
        """theta^(-2i / D) for i in 0 .. D/2 - 1, float32 [D/2], and the factor 1 on cos and sin."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids [B, S] -> cos, sin, each float32 [B, S, D/2].

        They stay in float32, as in DeepSeek's own inference code: at position 100,000 a bfloat16 cosine is noise.
        """
        angles = position_ids[..., None].float() * self.inv_freq.float()  # [B, S, D/2]
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: str) -> torch.Tensor:
    """Rotates heads by their positions' angles; computed in float32, returned in the dtype of `states`.

    Args:
        states: [B, H, S, D].
        cos, sin: float32 [B, S, D/2].
        layout: which numbers form a pair. "half": (i, i + D/2), as in Llama and the V3.2 indexer. "interleaved":
            (2i, 2i + 1), as in MLA.

    Returns:
        [B, H, S, D]. The first members of the pairs come first, then the second ones, whatever the layout: queries
        and keys are permuted alike, so their products do not change, and the layout is that of transformers' cache.
    """
    cos, sin = cos[:, None], sin[:, None]  # [B, 1, S, D/2]
    x = states.float()
    first, second = (x[..., 0::2], x[..., 1::2]) if layout == "interleaved" else x.chunk(2, dim=-1)  # [B, H, S, D/2]
    turned_first = torch.addcmul(first * cos, second, sin, value=-1)
    turned_second = torch.addcmul(second * cos, first, sin)
    return torch.cat((turned_first, turned_second), dim=-1).to(states.dtype)  # [B, H, S, D]


def yarn_softmax_factor(rope_parameters: dict) -> float:
    """DeepSeek's factor on the softmax scale under YaRN: (0.1 * mscale_all_dim * ln(factor) + 1)^2, else 1.

    About 1.59 for V2-Lite and 1.87 for V3.
    """
    mscale_all_dim = rope_parameters.get("mscale_all_dim")
    if rope_parameters["rope_type"] == "default" or not mscale_all_dim or rope_parameters["factor"] <= 1:
        return 1.0
    return (0.1 * mscale_all_dim * math.log(rope_parameters["factor"]) + 1.0) ** 2
