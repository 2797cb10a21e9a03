"""Attention that reads a part of the past, beside dense attention: 8 to 128 thousand tokens in bfloat16, one layer.

NSA has the paper's heads: 64 queries' in 4 groups; its blocks, window and compression are counted, projections not
(`benchmarks.sparse` has the same on CPUs). The paper's own figures stand beside (arXiv:2502.11089, A100, against
FlashAttention-2): 9.0 times forward and 6.0 backward at 65,536 tokens; decoding by the memory that is read.
DSA has V3.2's: 128 heads over latents, an indexer of 64 heads, 2,048 selected tokens; choosing them is counted.
Dense attention is `scaled_dot_product_attention`, for DSA over expanded keys; a decoded token over latents.
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from benchmarks import sparse as on_cpu
from benchmarks.common import interleave, save_checkpoint

from .models import Setup
from .runner import Check
from .smoke import number

LENGTHS = (8192, 65536, 32768, 16384, 131072)
PAPER = {  # times faster than full attention
    "forward": {65536: 9.0},
    "backward": {65536: 6.0},
    "decode": {8192: 4.0, 16384: 6.4, 32768: 9.1, 65536: 11.6},
}
STEPS = 8  # of a turn of decoding


def checks(setup: Setup) -> Iterator[Check]:
    """The checks of this part, most telling first."""
    lengths = LENGTHS if setup.full else (64, 160)
    nsa = NSA(setup)
    dsa = DSA(setup)
    for length in lengths:
        seconds = 5 + 15 * (length / 131072) ** 2
        for kind, run in (("forward", nsa.forward), ("backward", nsa.backward), ("decode", nsa.decode)):
            yield Check(f"NSA {kind}/{length} tokens", partial(run, length), seconds=seconds)
        for kind, run in (("forward", dsa.forward), ("decode", dsa.decode)):
            yield Check(f"DSA {kind}/{length} tokens", partial(run, length), seconds=2 * seconds)
    for length in sorted(lengths)[:2]:
        yield Check(f"DSA backward/{length} tokens", partial(dsa.backward, length), seconds=20)


def contest(turns: dict[str, Callable], steps: int = 1, **more) -> dict:
    """Milliseconds of dense and sparse turns, and how many times faster the sparse one is."""
    seconds = interleave(turns, repeats=1, warmup=1)
    if sum(times[0] for times in seconds.values()) < 1:
        seconds = interleave(turns, repeats=5, warmup=0)
    milliseconds = {name: 1e3 * median(times) / steps for name, times in seconds.items()}
    dense, ours = milliseconds.values()
    return {f"{name}, ms": number(value) for name, value in milliseconds.items()} | {
        "times faster": number(dense / ours),
        **{name: value for name, value in more.items() if value is not None},
    }


class NSA:
    """Native sparse attention, by the shapes of `benchmarks.sparse`."""

    def __init__(self, setup: Setup):
        self.heads = (64, 4, 128) if setup.full else (4, 2, 16)  # queries', keys', width
        self.device = setup.device

    @cached_property
    def setup(self) -> on_cpu.Setup:
        """A checkpoint whose code is loaded as users load it; its folder is there as long as this object."""
        self._folder = tempfile.TemporaryDirectory()
        save_checkpoint(Path(self._folder.name), on_cpu.NSA_CONFIG)
        return on_cpu.Setup(Path(self._folder.name), self.device, max(LENGTHS), repeats=1)

    @torch.no_grad()
    def forward(self, length: int) -> dict:
        """One prompt."""
        shape = on_cpu.Shape(self.setup, length, length, *self.heads)
        return contest({"dense": shape.dense, "NSA": shape.sequence}, paper=PAPER["forward"].get(length))

    def backward(self, length: int) -> dict:
        """Gradients of queries, keys and values; forwards are not counted."""
        shape = on_cpu.Shape(self.setup, length, length, *self.heads)
        both = contest({name: partial(on_cpu.train, f, shape) for name, f in self._functions(shape).items()})
        with torch.no_grad():
            forward = contest(self._functions(shape))
        dense, ours = (both[f"{name}, ms"] - forward[f"{name}, ms"] for name in ("dense", "NSA"))
        return {"dense, ms": number(dense), "NSA, ms": number(ours), "times faster": number(dense / ours)} | (
            {"paper": PAPER["backward"][length]} if length in PAPER["backward"] else {}
        )

    @torch.no_grad()
    def decode(self, length: int) -> dict:
        """One token behind `length` others."""
        shape = on_cpu.Shape(self.setup, length, 1, *self.heads)
        turns = {"dense": shape.dense_step, "NSA": shape.gathered}
        turns = {name: partial(on_cpu.several, turn, STEPS) for name, turn in turns.items()}
        return contest(turns, STEPS, paper=PAPER["decode"].get(length))

    @staticmethod
    def _functions(shape: on_cpu.Shape) -> dict[str, Callable]:
        return {"dense": shape.dense, "NSA": shape.sequence}


class DSA:
    """V3.2's selected attention over latents."""

    def __init__(self, setup: Setup):
        self.setup = setup

    @torch.no_grad()
    def forward(self, length: int) -> dict:
        """One prompt."""
        latents = _Latents(self.setup, length, length)
        return contest({"dense": latents.dense, "DSA": latents.selected})

    def backward(self, length: int) -> dict:
        """Forward and gradients of queries and latents."""
        latents = _Latents(self.setup, length, length)
        leaves = latents.q_nope, latents.q_rope, latents.entries
        for leaf in leaves:
            leaf.requires_grad_()

        def train(function):
            torch.autograd.grad(function().float().sum(), leaves)

        return contest({"dense": partial(train, latents.dense), "DSA": partial(train, latents.selected)})

    @torch.no_grad()
    def decode(self, length: int) -> dict:
        """One token behind `length` others."""
        latents = _Latents(self.setup, length, 1)
        turns = {"dense": latents.dense_step, "DSA": latents.selected}
        return contest({name: partial(on_cpu.several, turn, STEPS) for name, turn in turns.items()}, STEPS)


class _Latents:
    """Random queries and latents of one layer, and what an indexer makes of its tokens."""

    def __init__(self, setup: Setup, length: int, queries: int):
        from deepseek_repo import dsa_deepseek as dsa

        heads, nope, rope, value, width = (128, 128, 64, 128, 512) if setup.full else (4, 16, 8, 16, 32)
        index_heads, index_width, topk = (64, 128, 2048) if setup.full else (4, 16, 32)
        self.heads, self.scaling = heads, (nope + rope) ** -0.5
        kind = {"device": setup.device, "dtype": torch.bfloat16 if setup.device == "cuda" else torch.float32}
        torch.manual_seed(0)
        self.q_nope = 3 * torch.randn(1, heads, queries, nope, **kind)
        self.q_rope = 3 * torch.randn(1, heads, queries, rope, **kind)
        self.entries = torch.randn(1, length, width + rope, **kind)  # side by side, as in our cache
        self.width = width
        self.w_uk = width**-0.5 * torch.randn(heads, nope, width, **kind)
        self.w_uv = width**-0.5 * torch.randn(heads, value, width, **kind)
        self.states = dsa.IndexStates(
            torch.randn(1, queries, index_heads, index_width, **kind),
            torch.randn(1, queries, index_heads, device=setup.device),
            torch.randn(1, length, index_width, **kind),
        )
        self.indexer = _IndexerSizes(dsa.LightningIndexer, index_heads, index_width, topk)
        self.visible = dsa.VisibleTokens(length, None, None)
        self.attend = dsa.selected_latent_attention

    @property
    def latent(self) -> torch.Tensor:
        """[1, T, C]"""
        return self.entries[..., : self.width]

    @property
    def k_rope(self) -> torch.Tensor:
        """[1, T, Dr]"""
        return self.entries[..., self.width :]

    def selected(self) -> torch.Tensor:
        """[1, S, H, Dv]"""
        queries = self.q_nope * self.scaling, self.q_rope * self.scaling
        ups = self.w_uk, self.w_uv
        output, _ = self.attend(
            *queries, self.latent, self.k_rope, ups, self.indexer, self.states, self.states.key, self.visible
        )
        return output

    def dense(self) -> torch.Tensor:
        """[1, H, S, Dv], over keys and values that are expanded for it."""
        k_nope, value = (self.latent[:, None] @ w.transpose(1, 2) for w in (self.w_uk, self.w_uv))  # [1, H, T, .]
        key = torch.cat((k_nope, self.k_rope[:, None].expand(-1, self.heads, -1, -1)), dim=-1)
        query = torch.cat((self.q_nope, self.q_rope), dim=-1)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scaling)

    def dense_step(self) -> torch.Tensor:
        """[1, H, 1, Dv], absorbed: all heads are rows of one product with the latents."""
        query = torch.cat((self.q_nope @ self.w_uk, self.q_rope), dim=-1)[:, :, 0] * self.scaling  # [1, H, C + Dr]
        scores = query @ self.entries.transpose(1, 2)  # [1, H, T]
        mixed = scores.float().softmax(dim=-1).to(query.dtype) @ self.latent  # [1, H, C]
        return mixed[:, :, None] @ self.w_uv.transpose(1, 2)


class _IndexerSizes:
    """A lightning indexer without its projections: what choosing tokens needs."""

    def __init__(self, indexer_class, num_heads: int, head_dim: int, topk: int):
        self.num_heads, self.head_dim, self.topk = num_heads, head_dim, topk
        self.select = partial(indexer_class.select, self)
