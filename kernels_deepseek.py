"""What Triton kernels share: where they can run, loads and stores of tiles, steps of online softmax.

A head's width is padded to a power of two; what is beyond it reads as zero. Without Triton, which PyTorch for CPUs does
not bring, the modules load all the same and no kernel is ever called.
"""

from __future__ import annotations  # kernels' annotations name `tl`, which is None without Triton

import functools

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def kernels_run_on(states: torch.Tensor) -> bool:
    """Whether the functions below can take this tensor: Triton is there and the tensor on a GPU."""
    return triton is not None and states.is_cuda


def on_its_gpu(function):
    """Makes the first argument's GPU the current one for the call: Triton launches there, wherever tensors lie."""

    @functools.wraps(function)
    def run(states: torch.Tensor, *arguments):
        with torch.cuda.device_of(states):
            return function(states, *arguments)

    return run


def kernel(function):
    """`triton.jit`; without Triton the function stays as it is and is never called."""
    return triton.jit(function) if triton is not None else function


@kernel
def load_tile(pointer, rows, exists, stride, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows of a matrix -> [rows, PADDED]; zeros where a row does not exist. Offsets in 64 bits: caches are long."""
    columns = tl.arange(0, PADDED)
    mask = exists[:, None] & (columns < WIDTH)[None, :]
    return tl.load(pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@kernel
def store_tile(pointer, rows, exists, tile, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """[rows, PADDED] -> rows of a contiguous matrix, in its dtype"""
    columns = tl.arange(0, PADDED)
    mask = exists[:, None] & (columns < WIDTH)[None, :]
    offsets = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(pointer + offsets, tile.to(pointer.dtype.element_ty), mask=mask)


@kernel
def product(a, b):
    """float32 matrix product; of float32 factors without rounding them to TF32, as PyTorch does"""
    return tl.dot(a, b, input_precision="ieee")


@kernel
def take_in(scores, value, maximum, total, mixed):
    """One step of online softmax: what rows know after a tile of keys, whose scores [rows, keys] are -inf where they
    are hidden. The sums are without the last division."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    probs = tl.exp(scores - new_maximum[:, None])
    decay = tl.exp(maximum - new_maximum)
    total = total * decay + tl.sum(probs, 1)
    mixed = mixed * decay[:, None] + product(probs.to(value.dtype), value)
    return new_maximum, total, mixed


@kernel
def finish(maximum, total, mixed):
    """-> the attention's output and log-sum-exp; zero and +inf, so that probabilities are 0, for a row without keys"""
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    return mixed / total[:, None], tl.where(empty, float("inf"), maximum + tl.log(total))


def power_of_two(size: int, least: int) -> int:
    return max(least, triton.next_power_of_2(size))


def padded_width(states: torch.Tensor) -> int:
    """A power of two, and at least the 16 that tensor cores multiply."""
    return power_of_two(states.shape[-1], least=16)


def dense_rows(states):
    """[N, T, D] as it is if the numbers of a row lie together, so that a part of a cache is not copied."""
    return states if states.stride(-1) == 1 else states.contiguous()
