"""Products of few rows with a weight matrix, as decoding makes them: on CPUs they are as fast as the memory gives weights.

`project` calls a Linear module, `linear` multiplies by a weight. On GPUs, in training and for many rows both are what
PyTorch does.

Shape letters: N rows (tokens of a batch), D width of a row, F rows of the matrix.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as _hooks

from .compat_deepseek import is_exporting

FEW_ROWS = 32  # up to so many, a product costs what reading its weights costs
_FEW_COMPILED_ROWS = 8  # up to so many, a loop for each row is faster than the libraries
_CACHED_WEIGHTS = 2**21  # weights that a processor keeps from one row to the next
_PART_WEIGHTS = 2**16  # weights that are worth a thread
_HAS_MKL = torch.backends.mkl.is_available()


def project(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """`module(rows)`; where the module is nothing but an `nn.Linear`, by way of `linear`.

    The modules stay exactly what they are, since quantisers and parallel runtimes look for that class.
    """
    if type(module) is not nn.Linear or _is_observed(module):
        return module(rows)
    return linear(rows, module.weight, module.bias)


def _is_observed(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class says: by hooks, or by a `forward` of its own."""
    hooks = module._forward_hooks or module._forward_pre_hooks or _hooks._global_forward_hooks
    return bool(hooks or _hooks._global_forward_pre_hooks or "forward" in module.__dict__)


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`, for few rows on a CPU as a batched product.

    Intel's MKL, PyTorch's library for float32, multiplies few rows with a matrix on one thread of some processors, so that
    one core alone reads the weights. Of a batch of parts of the matrix each thread takes one. In a compiled step Inductor
    makes loops of its own of a batch of single rows, all threads at work and joined with what is before and after.

    Args:
        rows: [..., D].
        weight: [F, D].
        bias: [F] or None.

    Returns:
        [..., F]
    """
    # first what most calls of a small model end with
    small = torch.jit.is_tracing() or weight.numel() < 2 * _PART_WEIGHTS
    if (small and not torch.compiler.is_compiling()) or _is_special(rows, weight):
        return F.linear(rows, weight, bias)
    if compiles_few_rows(rows) and (rows.shape[:-1].numel() == 1 or weight.numel() <= _CACHED_WEIGHTS):
        single = rows.reshape(-1, 1, rows.shape[-1])  # [N, 1, D]
        product = single @ weight.T.expand(len(single), -1, -1)  # [N, 1, F]
    else:
        parts = _count_parts(rows, weight)
        if parts == 1:
            return F.linear(rows, weight, bias)
        repeated = rows.reshape(1, -1, rows.shape[-1]).expand(parts, -1, -1)  # [parts, N, D]
        product = repeated @ weight.unflatten(0, (parts, -1)).transpose(1, 2)  # [parts, N, F / parts]
        product = product.transpose(0, 1)
    product = product.reshape(*rows.shape[:-1], len(weight))  # [..., F]
    return product if bias is None else product + bias


def compiles_few_rows(rows: torch.Tensor) -> bool:
    """Whether a step with a few rows [..., D] is being compiled for a CPU; an export must hold for any number of them."""
    if not torch.compiler.is_compiling() or is_exporting() or torch.is_grad_enabled():
        return False
    return rows.device.type == "cpu" and 0 < rows.shape[:-1].numel() <= _FEW_COMPILED_ROWS


def _is_special(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `F.linear` may be more than a product of two matrices in memory, or is to learn, or runs elsewhere."""
    if type(rows) is not torch.Tensor or type(weight) not in (torch.Tensor, nn.Parameter):
        return True  # a tracer's, or a library's own kind of weight
    if rows.device.type != "cpu" or weight.dtype != rows.dtype or torch.is_autocast_enabled("cpu"):
        return True
    return torch.is_grad_enabled() or is_exporting()


def _count_parts(rows: torch.Tensor, weight: torch.Tensor) -> int:
    """Of the matrix [F, D] in a product with `rows` [..., D]; 1 where the plain product is as fast."""
    if not _HAS_MKL or rows.dtype != torch.float32 or not weight.is_contiguous():
        return 1
    parts = min(count_threads(), weight.numel() // _PART_WEIGHTS)
    if parts <= 1 or not 0 < rows.shape[:-1].numel() <= FEW_ROWS:
        return 1
    return parts if len(weight) % parts == 0 else math.gcd(len(weight), 8 * parts)


@torch.compiler.assume_constant_result
def count_threads() -> int:
    """PyTorch's threads for one operation, also in what is being compiled."""
    return torch.get_num_threads()
