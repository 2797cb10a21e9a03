"""Comparisons with tolerances by dtype, and child processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]

# Largest allowed |actual - expected| - RELATIVE * |expected|.
ABSOLUTE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 6e-2}
RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}


def assert_close(actual, expected, what: str = "tensors", atol: float | None = None, rtol: float | None = None):
    """Compares two tensors; the coarser of their dtypes sets the tolerance unless one is given."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    coarser = max(actual.dtype, expected.dtype, key=lambda dtype: ABSOLUTE.get(dtype, 0))
    atol = ABSOLUTE[coarser] if atol is None else atol
    rtol = RELATIVE[coarser] if rtol is None else rtol
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.isfinite().all(), f"{what}: {(~actual.isfinite()).sum()} numbers are not finite"
    difference = (actual - expected).abs()
    excess = difference - rtol * expected.abs()
    assert excess.numel() == 0 or excess.max() <= atol, (
        f"{what}: difference max {difference.max():.3g}, mean {difference.mean():.3g}; expected up to "
        f"{expected.abs().max():.3g}; allowed {atol:g} + {rtol:g} * |expected|"
    )


def assert_gradients_close(actual: dict, expected: dict, relative: float = 1e-3):
    """Compares gradients by name, each relative to the largest entry of the expected one."""
    assert actual.keys() == expected.keys(), f"names differ: {sorted(actual.keys() ^ expected.keys())}"
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert scale > 0, f"{name}: the expected gradient is 0, nothing is compared"
        assert_close(actual[name], gradient, f"gradient of {name}", atol=relative * scale, rtol=0)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by name; parameters without one are left out."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run_python(code: str, timeout: float = 120, cwd: Path | None = None, fails: bool = False, **environment) -> str:
    """Runs code in a fresh interpreter without network -> what it printed; fails with its error output.

    With `fails` the code is to end in an error, and its error output is the result.
    """
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code],
        **{"capture_output": True, "text": True, "timeout": timeout, "env": variables, "cwd": cwd, "check": False},
    )
    if fails:
        assert done.returncode != 0, done.stdout[-2000:]
        return done.stderr
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout
