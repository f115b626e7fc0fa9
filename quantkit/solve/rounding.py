"""Rounding that compensates: what a column's rounding does wrong, the columns behind it make good.

With the Gram G = U D U^T (U unit upper triangular) the loss tr(E G E^T) of an error E is sum_j D_j |(E U)_j|^2: column after column,
round what is wanted plus the errors made so far as U carries them over. This is LDLQ (Chee et al. 2023, section 3), which is GPTQ
(Frantar et al. 2022) without an inverse. The ranges of a group are searched when its turn comes, for what is then wanted.

Matrices are solved as stacks (stack, rows, in): experts with Grams of their own, or one stack of all rows that share a Gram. Inside,
columns lie contiguous, and blocks of columns are carried over by one matrix product.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from quantkit.finite import finite
from quantkit.grid.integer import decode, encode
from quantkit.grid.superblock import GROUP, SIZES, Superblocks, fit, grid_of, joined, nearest, with_codes
from quantkit.solve import ranges
from quantkit.types import Scheme

BLOCK = 32  # columns that are carried over by one product; never wider than a group


@dataclass(frozen=True, slots=True)
class Factor:
    """G + damping = U D U^T."""

    upper: Float[Tensor, "stack in in"]
    diagonal: Float[Tensor, "stack in"]


@dataclass(slots=True)
class Rounded:
    """Codes of a stack, with the ranges that they were chosen in."""

    codes: Int8[Tensor, "stack rows in"]
    scale: Float[Tensor, "stack rows groups"]
    zero: Float[Tensor, "stack rows groups"] | None


def factor(gram: Float[Tensor, "stack in in"], damping: float) -> Factor:
    """The factor of a Gram with `damping` mean diagonals added, ten times more wherever that does not make it positive definite.

    A stack whose Gram is zero gets the identity: nothing is carried over.

    Raises:
        ValueError: a Gram that holds NaN or infinity, which no damping mends.
    """
    if not finite(gram):
        raise ValueError("a Gram with NaN or infinity has no factor")
    mean = gram.diagonal(dim1=1, dim2=2).mean(-1, dtype=torch.float64)
    mean = torch.where(mean == 0, 1.0, mean)
    share = torch.full_like(mean, damping)
    upper, diagonal = torch.empty_like(gram), torch.empty_like(gram[:, 0])
    left = torch.arange(len(gram), device=gram.device)
    while len(left):
        # flipped Cholesky: (J H J) = L L^T, so H = (J L J)(J L J)^T with J L J upper triangular
        damped = gram[left].double()
        damped.diagonal(dim1=1, dim2=2).add_((share * mean)[left, None])
        lower, info = torch.linalg.cholesky_ex(damped.flip(1, 2))
        stands = info == 0
        root = lower[stands].flip(1, 2)
        own = root.diagonal(dim1=1, dim2=2)
        upper[left[stands]] = (root / own[:, None]).float()
        diagonal[left[stands]] = own.square().float()
        left = left[~stands]
        share[left] = (share[left] * 10).clamp(min=1e-6)
    return Factor(upper, diagonal)


def compensated(
    weight: Float[Tensor, "stack rows in"],
    factored: Factor,
    scheme: Scheme,
    dtype: torch.dtype,
    shrinks: int,
) -> Rounded:
    """Every column rounded to its group's grid, its error carried over to the columns behind it.

    Args:
        factored: of each matrix's Gram, or one for all of the stack.
        dtype: of the stored scales.
        shrinks: clip candidates of each range (see `ranges.search`).
    """
    stack, rows, columns = weight.shape
    width = scheme.width(columns)
    upper, diagonal = factored.upper, factored.diagonal
    wanted = weight.mT.contiguous()  # (stack, in, rows)
    error = torch.zeros_like(wanted)
    codes = torch.empty(stack, columns, rows, dtype=torch.int8, device=weight.device)
    scales, zeros = [], []
    step = min(BLOCK, width)
    for start in range(0, columns, width):
        target = _carried(wanted, error, upper, start, start + width)
        scale, zero, _ = ranges.search(target.mT.unsqueeze(2), diagonal[:, None, None, start : start + width], scheme, dtype, shrinks)
        scales.append(scale)
        scale = scale.squeeze(-1)
        if zero is not None:
            zeros.append(zero)
            zero = zero.squeeze(-1)
        for first in range(start, start + width, step):
            last = min(first + step, start + width)
            target = _carried(wanted, error, upper, first, last) if first > start else target[:, : last - first]
            _round_columns(target, wanted, error, codes, upper[:, first:last, first:last], scale, zero, scheme.bits, first, last)
    return Rounded(codes.mT, torch.cat(scales, -1), torch.cat(zeros, -1) if zeros else None)


def compensated_superblocks(weight: Float[Tensor, "stack rows in"], factored: Factor, kind: str) -> list[Superblocks]:
    """The same on K-quants: a superblock's scales are searched when its turn comes, then its columns are rounded to the grids they make."""
    stack, _, columns = weight.shape
    upper, width, span = factored.upper, GROUP[kind], SIZES[kind][0]
    diagonal = factored.diagonal.expand(stack, -1)
    wanted = weight.mT.contiguous()
    error = torch.zeros_like(wanted)
    parts: list[list[Superblocks]] = [[] for _ in range(stack)]
    for start in range(0, columns, span):
        target = _carried(wanted, error, upper, start, start + span)
        fits = [fit(one.mT.contiguous(), kind, diagonal[i, start : start + span]) for i, one in enumerate(target)]
        grids = [grid_of(one) for one in fits]
        scale, minimum = torch.stack([s for s, _ in grids]), torch.stack([m for _, m in grids])  # (stack, rows, groups)
        codes = torch.empty_like(target)
        for first in range(start, start + span, BLOCK):
            last = first + BLOCK
            target = _carried(wanted, error, upper, first, last)
            inner = upper[:, first:last, first:last]
            for j in range(BLOCK):
                group = (first + j - start) // width
                q = nearest(target[:, j], scale[..., group], minimum[..., group], kind)
                codes[:, first + j - start] = q
                error[:, first + j] = wanted[:, first + j] - (q * scale[..., group] + minimum[..., group])
                target[:, j + 1 :] += inner[:, j, j + 1 :, None] * error[:, None, first + j]
        for i, one in enumerate(fits):
            parts[i].append(with_codes(one, codes[i].mT))
    return [joined(part) for part in parts]


def _carried(wanted: Tensor, error: Tensor, upper: Tensor, start: int, stop: int) -> Float[Tensor, "stack width rows"]:
    """What some columns shall become: themselves and the errors of all columns before them."""
    target = wanted[:, start:stop].clone()
    if start:
        target += upper[:, :start, start:stop].mT @ error[:, :start]
    return target


def _round_columns(
    target: Float[Tensor, "stack width rows"],
    wanted: Float[Tensor, "stack columns rows"],
    error: Float[Tensor, "stack columns rows"],
    codes: Int8[Tensor, "stack columns rows"],
    inner: Float[Tensor, "#stack width width"],
    scale: Float[Tensor, "stack rows"],
    zero: Float[Tensor, "stack rows"] | None,
    bits: int,
    first: int,
    last: int,
) -> None:
    """Round the columns first..last in turn; `target`, `error` and `codes` are written."""
    for j in range(last - first):
        code = encode(target[:, j, :, None], scale, zero, bits)
        codes[:, first + j] = code[..., 0].to(torch.int8)
        error[:, first + j] = wanted[:, first + j] - decode(code, scale, zero)[..., 0]
        if j + 1 < last - first:
            target[:, j + 1 :] += inner[:, j, j + 1 :, None] * error[:, None, first + j]


def descend(
    weight: Float[Tensor, "stack rows in"],
    gram: Float[Tensor, "#stack in in"],
    damping: float,
    rounded: Rounded,
    scheme: Scheme,
    dtype: torch.dtype,
    shrinks: int,
    sweeps: int,
) -> Rounded:
    """Coordinate descent over groups: each group's range and codes anew, given all others; kept in the rows where the loss falls.

    Args:
        damping: in mean diagonals, as the factor had it.
    """
    stack, rows, columns = weight.shape
    gram = gram.clone()
    gram.diagonal(dim1=1, dim2=2).add_(damping * gram.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True))
    width = scheme.width(columns)
    codes, scale = rounded.codes.mT.clone(), rounded.scale.clone()
    zero = None if rounded.zero is None else rounded.zero.clone()
    wanted = weight.mT.contiguous()
    error = wanted - _decoded(codes, scale, zero, width)
    step = min(BLOCK, width)
    for _ in range(sweeps):
        for number, start in enumerate(range(0, columns, width)):
            own = slice(start, start + width)
            inside = gram[:, own, own]
            small = factor(inside, 1e-6)
            # the others' errors ask for a shift of this group: argmin over S of tr((S + others)) is -inside^-1 cross
            cross = gram[:, own] @ error - inside @ error[:, own]
            shift, singular = torch.linalg.solve_ex(inside.double(), cross.double())
            # a group that was never fed has no inverse, and nothing to make good
            shifted = wanted[:, own] + torch.where(singular[:, None, None] == 0, shift, 0.0).float()
            fresh, fresh_codes = torch.zeros_like(shifted), torch.empty(stack, width, rows, dtype=torch.int8, device=weight.device)
            new_scale, new_zero, _ = ranges.search(shifted.mT.unsqueeze(2), small.diagonal[:, None, None], scheme, dtype, shrinks)
            new_scale = new_scale.squeeze(-1)
            new_zero = None if new_zero is None else new_zero.squeeze(-1)
            for first in range(0, width, step):
                last = min(first + step, width)
                target = _carried(shifted, fresh, small.upper, first, last)
                _round_columns(
                    target,
                    shifted,
                    fresh,
                    fresh_codes,
                    small.upper[:, first:last, first:last],
                    new_scale,
                    new_zero,
                    scheme.bits,
                    first,
                    last,
                )
            before = shifted - (wanted[:, own] - error[:, own])
            wins = ((inside @ fresh) * fresh).sum(1) < ((inside @ before) * before).sum(1)  # (stack, rows)
            codes[:, own] = torch.where(wins[:, None], fresh_codes, codes[:, own])
            scale[..., number] = torch.where(wins, new_scale, scale[..., number])
            if zero is not None and new_zero is not None:
                zero[..., number] = torch.where(wins, new_zero, zero[..., number])
            error[:, own] = torch.where(wins[:, None], wanted[:, own] - (shifted - fresh), error[:, own])
    return Rounded(codes.mT, scale, zero)


def _decoded(codes: Int8[Tensor, "stack columns rows"], scale: Tensor, zero: Tensor | None, width: int) -> Tensor:
    spread = scale.mT.repeat_interleave(width, 1)
    shift = 0.0 if zero is None else zero.mT.repeat_interleave(width, 1)
    return (codes.float() - shift) * spread
