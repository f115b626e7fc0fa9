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
    """The shift of all weights that share one input.

    Args:
        share, damping: of the shift, and of the Gram in mean diagonals.
        rows: of all these weights together. Where they are fewer than columns, each is solved for by itself: the shift of an o_proj 8192
            wide would take three times its own rows.
    """

    def __init__(self, stats: InputStats, share: float, damping: float, rows: int):
        self._drift: Tensor | None = None
        self._residual: Tensor | None = None
        self._root: Tensor | None = None
        gram = stats.gram
        if not share or gram is None or (stats.drift is None and stats.residual is None):
            return
        mean = float(gram.diagonal().mean(dtype=torch.float64))
        if not mean:
            return
        damped = gram.double()
        damped.diagonal().add_(damping * mean)
        root, info = torch.linalg.cholesky_ex(damped)
        if int(info):
            return
        if rows < len(gram):
            self._root, self._share, self._drift, self._residual = root, share, stats.drift, stats.residual
            return
        if stats.drift is not None:
            self._drift = torch.cholesky_solve(stats.drift.double().mT * share, root).mT.float()
        if stats.residual is not None:
            self._residual = torch.cholesky_solve(stats.residual.double().mT * share, root).mT.float()

    def of(self, weight: Float[Tensor, "rows in"], rows: Int[Tensor, " rows"] | None = None) -> Float[Tensor, "rows in"]:
        """The weight to be rounded in place of this one; `rows` says which rows of the linear these are, where they are not all."""
        moved = lacking(weight, self._drift, self._residual if self._residual is None or rows is None else self._residual[rows])
        if moved is not None and self._root is not None:
            moved = torch.cholesky_solve(moved.double().mT * self._share, self._root).mT.float()
        return weight if moved is None else weight + moved


def lacking(
    weight: Float[Tensor, "rows in"], drift: Float[Tensor, "in in"] | None, residual: Float[Tensor, "rows in"] | None
) -> Float[Tensor, "rows in"] | None:
    """weight drift + residual: what a weight's output lacks of weight (x + d) + e, summed with the inputs; None where nothing drifted."""
    if drift is None:
        return residual
    return weight @ drift if residual is None else weight @ drift + residual


def loss(
    weight: Float[Tensor, "rows in"],
    rounded: Float[Tensor, "rows in"],
    stats: InputStats,
    lacks: Float[Tensor, "rows in"] | None = None,
) -> float:
    """Squared distance of the rounded weight's output to weight (x + d) + e, summed over tokens, up to what no rounding can change.

    tr(E G E^T) + 2 tr(lacks E^T) with E = weight - rounded and `lacks` as above; by the diagonal where there is no Gram. Below zero where
    the rounded weight makes more good than it breaks.
    """
    error = weight - rounded
    if stats.gram is None:
        return float((error.square() @ stats.square).sum(dtype=torch.float64))
    pull = error @ stats.gram
    if lacks is not None:
        pull += 2 * lacks
    return float((pull * error).sum(dtype=torch.float64))
