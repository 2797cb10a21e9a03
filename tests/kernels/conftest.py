"""Where Triton's kernels run: `TRITON_INTERPRET=1 python -m pytest tests/kernels` in its interpreter, on CPU tensors;
`python -m pytest -m gpu tests/kernels` on a GPU. Both need Triton; elsewhere these tests are skipped.
"""

import os

import pytest
import torch
from deepseek_repo import dsa_deepseek, nsa_deepseek


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """The device of the tensors that kernels get."""
    pytest.importorskip("triton")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if request.param == "interpreter" and not interpreted:
        pytest.skip("runs with TRITON_INTERPRET=1")
    if request.param == "cuda" and (interpreted or not torch.cuda.is_available()):
        pytest.skip("needs a GPU, and no TRITON_INTERPRET")
    return "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture
def use_kernels(monkeypatch):
    """A function; until it is called, models use the PyTorch functions, afterwards the kernels, on any device."""

    def switch(on: bool = True):
        for module in (nsa_deepseek, dsa_deepseek):
            monkeypatch.setattr(module, "kernels_run_on", lambda states: on)

    switch(False)
    return switch


@pytest.fixture
def half(device) -> tuple[torch.dtype, float]:
    """A 16-bit dtype and its tolerance: bfloat16, but float16 in the interpreter, whose products take a bfloat16's bits
    for an integer."""
    return (torch.bfloat16, 6e-2) if device == "cuda" else (torch.float16, 5e-3)
