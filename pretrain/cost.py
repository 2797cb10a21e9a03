"""What a training step costs: active parameters, FLOPs of a token, and the peak that a device reaches.

Model FLOPs utilisation (MFU) = FLOPs that the model needs / seconds / peak FLOPs. "Needs" is counted from the shapes, whatever
a kernel does (recomputation, dense masks): a matrix costs 2 FLOPs an entry and token forward and 4 backward.
"""

import time

import torch
from torch import nn
from transformers import PreTrainedModel

from common.command import no_command
from common.costs import attention_costs


def active_parameters(module: nn.Module, experts_per_token: int | None) -> int:
    """Parameters of a module that a token meets: of stacked experts the share that it visits, all of the rest."""
    total = sum(parameter.numel() for parameter in module.parameters())
    for part in module.modules():
        if hasattr(part, "gate_up_proj"):
            experts = part.gate_up_proj.numel() + part.down_proj.numel()
            total -= experts - experts * experts_per_token // part.num_experts
    return total


def body_parameters(model: PreTrainedModel) -> int:
    """Active parameters of the decoder layers and the last norm: no embedding, no head, no multi-token prediction."""
    per_token = getattr(model.config, "num_experts_per_tok", None)  # of a dense model none
    layers = model.model.layers[: model.config.num_hidden_layers]
    return active_parameters(layers, per_token) + active_parameters(model.model.norm, per_token)


def training_flops_per_token(model: PreTrainedModel, row_tokens: int) -> float:
    """FLOPs of forward and backward for a token of a row of `row_tokens` tokens that all belong to one document.

    Shorter documents in a row need less than this; with an output head for each multi-token-prediction module. Frozen
    matrices are counted forward only (as if nothing trainable lay below them, which is so when only indexers learn).
    """
    config, layers = model.config, model.model.layers
    head = model.get_output_embeddings().weight
    flops = (1 + config.num_nextn_predict_layers) * 2 * _passes(head) * head.numel()
    for module in layers.modules():
        share = config.num_experts_per_tok / module.num_experts if hasattr(module, "gate_up_proj") else 1
        matrices = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim >= 2]
        flops += sum(2 * _passes(matrix) * matrix.numel() * share for matrix in matrices)
    for index, layer in enumerate(layers):
        attention, indexer = attention_costs(config, index).training_flops(row_tokens)
        flops += _passes(layer.self_attn.o_proj.weight) * attention
        flops += _passes(layer.self_attn.indexer.wk.weight) * indexer if indexer else 0
    return flops


def _passes(matrix: torch.Tensor) -> int:
    """Times the FLOPs of a forward: forward and twice that backward, or forward only."""
    return 3 if matrix.requires_grad else 1


@torch.no_grad()
def measure_peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOPs a second of the fastest of the square matrix products that fit into `seconds`."""
    size = 1024 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    fastest, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline or fastest == float("inf"):
        started = time.perf_counter()
        left @ right
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * size**3 / fastest


if __name__ == "__main__":
    no_command("train by python -m pretrain.train")
