"""GPUs and published trainings, in figures; without torch, so that command lines may list their names."""

from typing import NamedTuple


class GPU(NamedTuple):
    """Peak rates as NVIDIA gives them, without sparsity."""

    bf16_flops: float  # operations a second
    memory: float  # bytes
    bandwidth: float  # bytes a second


GPUS = {
    "h800": GPU(989.4e12, 80e9, 3.35e12),
    "h100": GPU(989.4e12, 80e9, 3.35e12),
    "h200": GPU(989.4e12, 141e9, 4.8e12),
    "h20": GPU(148e12, 96e9, 4.0e12),
    "b200": GPU(2250e12, 180e9, 8.0e12),
    "a100": GPU(312e12, 80e9, 2.039e12),
    "a800": GPU(312e12, 80e9, 2.039e12),
    "l40s": GPU(362e12, 48e9, 0.864e12),
    "rtx4090": GPU(165.2e12, 24e9, 1.008e12),
}
# Trainings whose GPU hours were published: H800 hours for 1e12 tokens in rows of 4096, and the model they belong to.
# V2 report (arXiv:2405.04434) section 3.2.3 for V2 and 67B, V3 report (arXiv:2412.19437) table 1.
_V2_SIZES = {
    **{"model_type": "deepseek_v2", "num_hidden_layers": 60, "hidden_size": 5120, "intermediate_size": 12288},
    **{"num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "n_routed_experts": 160},
    **{"moe_intermediate_size": 1536},
}
_67B_SIZES = {
    **{"model_type": "llama", "num_hidden_layers": 95, "hidden_size": 8192, "intermediate_size": 22016},
    **{"num_attention_heads": 64, "num_key_value_heads": 8},
}
MEASURED = {
    "v3": ({"model_type": "deepseek_v3"}, 180.0e3),
    "v2": (_V2_SIZES, 172.8e3),
    "67b": (_67B_SIZES, 300.6e3),
}
DEFAULT_ROW = 4096  # tokens of a training row, as in the pretraining of all published models
