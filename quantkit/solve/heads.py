"""Rows of a head that answer for one another: what one row's rounding does wrong, the rows behind it make good.

Attention is far from indifferent to where a head's error points: a key's counts along the queries that it meets. With F = sum g g^T over
the gradients at the head's outputs beside G = sum x x^T over its inputs, an error E costs tr(F E G E^T), the two taken for independent
(Martens and Grosse 2015, section 3; for rounding: Tseng, Sun and De Sa 2025). With F = V C V^T (V unit upper triangular) that is
sum_i C_i |(V^T E)_i|^2_G: row after row, round what is wanted plus the errors made so far as V carries them over, each row by the columns'
own compensation.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from quantkit.solve.rounding import Factor, factor

STEPS = 8  # turns in which a head's rows are rounded; those of one turn do not see one another
# Of F, in mean diagonals: it rests on few tokens, and on inputs and gradients being independent.
# On the stories .1 to .6 are alike within noise; with next to none most of the gain is gone.
DAMPING = 0.2

# rows to round -> what is stored of them (rows first in each tensor), and the weights that this stands for
Rounding = Callable[[Float[Tensor, "rows in"]], tuple[Sequence[Tensor], Float[Tensor, "rows in"]]]


def metric(grams: Sequence[Float[Tensor, "_ width width"]], rows: Sequence[Float[Tensor, " _"] | None]) -> Factor:
    """The factor of some linears' heads, one after the other.

    Args:
        rows: what a fold divides each linear's rows by: an error of the folded weight weighs so much more.

    Raises:
        ValueError: NaN or infinity in a Gram.
    """
    under = []
    for gram, scale in zip(grams, rows, strict=True):
        spread = torch.ones_like(gram[:, 0]) if scale is None else scale.view(gram.shape[:2])
        under.append(gram * spread[:, :, None] * spread[:, None])
    return factor(torch.cat(under), DAMPING)


def by_turns(weight: Float[Tensor, "rows in"], factored: Factor, rounding: Rounding) -> tuple[Tensor, ...]:
    """What is stored of all rows of some heads, rounded so that rows make good the errors of those before them.

    Args:
        weight: the heads' rows, one head after the other.
        factored: of each head, as `metric` makes it.
    """
    heads, width = factored.diagonal.shape
    wanted = weight.unflatten(0, (heads, width))
    error = torch.zeros_like(wanted)
    made: list[list[Tensor]] = []
    for turn in torch.arange(width).tensor_split(min(STEPS, width)):
        first, last = int(turn[0]), int(turn[-1]) + 1
        target = wanted[:, first:last] + factored.upper[:, :first, first:last].mT @ error[:, :first]
        stored, stands_for = rounding(target.flatten(0, 1))
        error[:, first:last] = wanted[:, first:last] - stands_for.unflatten(0, (heads, -1))
        made.append([part.unflatten(0, (heads, -1)) for part in stored])
    return tuple(torch.cat(parts, 1).flatten(0, 1) for parts in zip(*made, strict=True))
