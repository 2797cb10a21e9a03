"""Which experts matter: what the experts of a layer do to the calibration tokens, scores made of it, and the choice.

Over the tokens t that chose expert j, N_j of them, with the weight g by which the expert's output f is added, and the
residual stream h that the block of experts adds to:

    frequency   N_j
    reap        mean of g |f|                               REAP (arXiv:2510.13999)
    man, msan   mean of |f|, of |f|^2                       (arXiv:2606.15716)
    easy-ep     sum of g |f| (1 - cos(h, h + block(h)))     EASY-EP (arXiv:2504.06792)

Letters: N tokens, E experts, P experts a token, S files of calibration text.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from common.command import no_command

FIELDS = ("tokens", "weight", "weighted_norm", "norm", "squared_norm", "weighted_change")


class Visits(NamedTuple):
    """What the experts of one layer did to the tokens.

    indices: int64 [N, P], the experts that each token chose.
    weights: float32 [N, P], g.
    norms: float32 [N, P], |f|.
    change: float32 [N], 1 - cos(h, h + block(h)).
    """

    indices: torch.Tensor
    weights: torch.Tensor
    norms: torch.Tensor
    change: torch.Tensor


def sum_visits(visits: Visits, num_experts: int, source: torch.Tensor, num_sources: int, counted: torch.Tensor):
    """Sums of the `FIELDS` by file and expert, float64 [S, E, 6]; tokens outside of bool `counted` [N] are left out."""
    weighted = visits.weights.double() * visits.norms.double()  # [N, P]
    values = (
        torch.ones_like(weighted),
        visits.weights.double(),
        weighted,
        visits.norms.double(),
        visits.norms.double() ** 2,
        weighted * visits.change.double()[:, None],
    )
    place = (source[:, None] * num_experts + visits.indices)[counted].flatten()
    sums = torch.zeros(num_sources * num_experts, len(FIELDS), dtype=torch.float64)
    sums.index_add_(0, place, torch.stack(values, dim=-1)[counted].flatten(0, 1))
    return sums.view(num_sources, num_experts, len(FIELDS))


def _mean(name: str) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    return lambda sums: sums[name] / sums["tokens"].clamp(min=1)


SCORES: dict[str, Callable[[dict[str, torch.Tensor]], torch.Tensor]] = {
    "reap": _mean("weighted_norm"),
    "man": _mean("norm"),
    "msan": _mean("squared_norm"),
    "easy-ep": lambda sums: sums["weighted_change"],
    "frequency": lambda sums: sums["tokens"],
}


def score(sums: torch.Tensor, name: str) -> torch.Tensor:
    """[S, E, 6] -> float64 [E]; an expert that no token chose has 0."""
    return SCORES[name](dict(zip(FIELDS, sums.sum(dim=0).unbind(dim=-1), strict=True)))


def choose(scores: torch.Tensor, keep: int, num_groups: int) -> list[int]:
    """The experts that stay, in their order: as many of each group, those with the largest scores; of equal ones the first.

    Args:
        scores: [E].
        keep: how many of all stay, a multiple of `num_groups`.
    """
    grouped = scores.view(num_groups, -1)  # [G, E/G]
    best = grouped.sort(dim=-1, descending=True, stable=True).indices[:, : keep // num_groups].sort(dim=-1).values
    return (best + torch.arange(num_groups)[:, None] * grouped.shape[1]).flatten().tolist()


if __name__ == "__main__":
    no_command("prune a checkpoint by python -m compress.prune")
