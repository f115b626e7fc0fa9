"""What a linear shall compute where earlier rounding has already moved its inputs: the original model's output, from the inputs it gets.

With x the input behind quantized blocks, x + d the original's and e what the residual stream lacks, the weight that comes nearest to
W (x + d) + e from x alone is W + (W sum(d x^T) + sum(e x^T)) (sum(x x^T) + damping)^-1: least squares, damped, since the tokens are few.
(Asymmetric calibration: Li et al. 2025, GPTAQ; in closed form from sums, with the residual's error as part of the target.)
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from quantkit.types import InputStats


class Target:
    """The shift of all weights that share one input."""

    def __init__(self, stats: InputStats, share: float, damping: float):
        self._drift: Tensor | None = None
        self._residual: Tensor | None = None
        gram = stats.gram
        if not share or gram is None or (stats.drift is None and stats.residual is None):
            return
        mean = float(gram.diagonal().mean(dtype=torch.float64))
        if not mean:
            return
        damped = gram.double() + damping * mean * torch.eye(len(gram), dtype=torch.float64)
        root, info = torch.linalg.cholesky_ex(damped)
        if int(info):
            return
        if stats.drift is not None:
            self._drift = torch.cholesky_solve(stats.drift.double().mT * share, root).mT.float()
        if stats.residual is not None:
            self._residual = torch.cholesky_solve(stats.residual.double().mT * share, root).mT.float()

    def of(self, weight: Float[Tensor, "rows in"], rows: Int[Tensor, " rows"] | None = None) -> Float[Tensor, "rows in"]:
        """The weight to be rounded in place of this one; `rows` says which rows of the linear these are, where they are not all."""
        if self._drift is not None:
            weight = weight + weight @ self._drift
        if self._residual is not None:
            weight = weight + (self._residual if rows is None else self._residual[rows])
        return weight


def loss(
    weight: Float[Tensor, "rows in"],
    rounded: Float[Tensor, "rows in"],
    stats: InputStats,
    drift: Float[Tensor, "in in"] | None,
    residual: Float[Tensor, "rows in"] | None,
) -> float:
    """Squared distance of the rounded weight's output to weight (x + d) + e, summed over tokens, up to what no rounding can change.

    tr(E G E^T) + 2 tr((weight drift + residual) E^T) with E = weight - rounded; by the diagonal where there is no Gram. Below zero
    where the rounded weight makes more good than it breaks.
    """
    error = weight - rounded
    if stats.gram is None:
        return float((error.square() @ stats.square).sum(dtype=torch.float64))
    pull = error @ stats.gram
    if drift is not None:
        pull += 2 * (weight @ drift)
    if residual is not None:
        pull += 2 * residual
    return float((pull * error).sum(dtype=torch.float64))
