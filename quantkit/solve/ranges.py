"""Ranges: for every group the scale (and zero point) under which its weighted rounding error is smallest.

Clip candidates shrink the group's extremes by a few factors; the winner's scale is then refitted by least squares to the codes it
chose (the scale that minimises sum h (w - s d)^2 is sum(h w d) / sum(h d^2)), rounded to the stored dtype and kept where it helps.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from quantkit.grid.integer import decode, encode, extremes_to_params, storable
from quantkit.types import Scheme

SMALLEST_SHRINK = 0.6  # the narrowest clip that is tried


def plain(
    grouped: Float[Tensor, "*batch groups width"], scheme: Scheme, dtype: torch.dtype
) -> tuple[Float[Tensor, "*batch groups"], Float[Tensor, "*batch groups"] | None]:
    """The range of plain rounding: each group's own extremes."""
    return extremes_to_params(grouped.amin(-1), grouped.amax(-1), scheme, dtype)


def search(
    grouped: Float[Tensor, "*batch groups width"],
    importance: Float[Tensor, "*#batch #groups width"],
    scheme: Scheme,
    dtype: torch.dtype,
    shrinks: int,
    refits: int = 2,
) -> tuple[Float[Tensor, "*batch groups"], Float[Tensor, "*batch groups"] | None, Float[Tensor, "*batch groups"]]:
    """The best of `shrinks` clipped ranges for each group, then `refits` alternations of codes and their least-squares scale.

    Args:
        grouped: weights, the last axis a group.
        importance: second moment of each input channel (a weight's error counts times this).
        shrinks: clip candidates between 1 (the group's extremes) and SMALLEST_SHRINK; 1 means plain ranges. Where the scheme's scales
            are signed each is tried with either sign.

    Returns:
        scale and zero point (None where symmetric) of every group, and its weighted squared error.
    """
    low, high = grouped.amin(-1), grouped.amax(-1)
    best_scale, best_zero = extremes_to_params(low, high, scheme, dtype)
    best_error = _error(grouped, importance, best_scale, best_zero, scheme.bits)
    if shrinks == 1:
        return best_scale, best_zero, best_error
    levels = 1 << scheme.bits
    extreme = torch.where(-low > high, low, high) / -(levels / 2)  # on the lowest code, whatever its sign
    for step in range(shrinks):
        # the first is wider: the extreme on the highest code itself, where weights that lie on a grid already have theirs
        shrink = 1 - (1 - SMALLEST_SHRINK) * step / (shrinks - 1)
        factor = shrink if step else (levels - 1) / (levels - 2)
        candidates = [extremes_to_params(low * factor, high * factor, scheme, dtype)]
        if scheme.signed:
            candidates.append((storable(extreme * shrink, dtype), None))
        for scale, zero in candidates:
            error = _error(grouped, importance, scale, zero, scheme.bits)
            best_scale, best_zero, best_error = _better(best_scale, best_zero, best_error, scale, zero, error)
    for _ in range(refits):
        codes = encode(grouped, best_scale, best_zero, scheme.bits)
        if best_zero is not None:
            codes -= best_zero[..., None]
        weighted = importance * codes
        fitted = (weighted * grouped).sum(-1) / (weighted * codes).sum(-1)
        stands = (fitted > 0) | (scheme.signed & (fitted < 0))
        scale = torch.where(stands, storable(fitted.nan_to_num(0, 0, 0), dtype), best_scale)
        error = _error(grouped, importance, scale, best_zero, scheme.bits)
        best_scale, best_zero, best_error = _better(best_scale, best_zero, best_error, scale, best_zero, error)
    return best_scale, best_zero, best_error


def _error(grouped: Tensor, importance: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Float[Tensor, "*batch groups"]:
    codes = encode(grouped, scale, zero, bits)
    difference = decode(codes, scale, zero).sub_(grouped)
    return difference.square_().mul_(importance).sum(-1)


def _better(
    scale: Tensor, zero: Tensor | None, error: Tensor, other_scale: Tensor, other_zero: Tensor | None, other_error: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    wins = other_error < error
    scale = torch.where(wins, other_scale, scale)
    if zero is not None and other_zero is not None:
        zero = torch.where(wins, other_zero, zero)
    return scale, zero, torch.where(wins, other_error, error)
