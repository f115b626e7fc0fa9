"""Solve one decoder block: folds first, then ranges, then codes. Pure: tensors and sums in, codes and folded tensors out."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from quantkit.grid.integer import from_codes, to_codes
from quantkit.solve import awq, ranges
from quantkit.solve.pooling import Pooled, kind
from quantkit.types import BlockPlan, Codes, Fold, FoldReport, InputStats, Linear, Scheme, Solved, SolvedBlock

JUDGED_ROWS = 512  # rows of a matrix on which its output error is measured
EXPERT_ROWS = 32  # rows of each expert on which a scale that all experts share is judged
CHUNK = 1 << 20  # weights at a time in the range search: temporaries stay in the cache


class _Scales:
    """What the folds of a block do to each linear: W' = W * columns / rows."""

    def __init__(self) -> None:
        self.columns: dict[str, Float[Tensor, " in"]] = {}
        self.rows: dict[str, Float[Tensor, " out"]] = {}

    def apply(self, local: str, weight: Float[Tensor, "rows in"], part: slice) -> Float[Tensor, "rows in"]:
        if local in self.columns:
            weight = weight * self.columns[local]
        if local in self.rows:
            weight = weight / self.rows[local][part, None]
        return weight


def solve_block(
    plan: BlockPlan,
    weights: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    stats: dict[str, InputStats],
    *,
    method: str,
    norm_offset: float,
    exponents: int,
    rows: int,
    shrinks: int,
    expert_floor: int,
) -> SolvedBlock:
    """All linears of a block on their grids.

    Args:
        plan: the block's linears, with their schemes, and its legal folds.
        weights: (out, in) of every linear with a scheme, by local name; not changed.
        kept: the block's other tensors by local tensor name; not changed.
        stats: what each linear was fed; emptied linear by linear, so that Grams give way to codes in memory. A linear without stats
            is read by nothing (published leftovers): it is rounded plainly.
        method: "awq", or "rtn" for plain rounding without folds and searches.
        norm_offset: a norm multiplies by (offset + weight).
        exponents, rows, shrinks, expert_floor: see recipe.Search.

    Returns:
        codes of every linear with a scheme, and the kept tensors that a fold changed (in their own dtype).
    """
    pooled = Pooled(stats, expert_floor)
    scales, folded, reports = _Scales(), dict[str, Tensor](), list[FoldReport]()
    linears = {linear.local: linear for linear in plan.linears if linear.scheme is not None}
    if method == "awq":
        for fold in plan.folds:
            _fold(fold, linears, weights, kept, pooled, scales, folded, reports, norm_offset, exponents, rows)
    solved = {}
    for local, linear in linears.items():
        searched = shrinks if method == "awq" and local in pooled else 1
        solved[local] = _quantize(linear, weights[local], pooled, scales, searched)
        stats.pop(local, None)
    return SolvedBlock(plan.index, solved, folded, tuple(reports))


def _fold(
    fold: Fold,
    linears: Mapping[str, Linear],
    weights: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    pooled: Pooled,
    scales: _Scales,
    folded: dict[str, Tensor],
    reports: list[FoldReport],
    norm_offset: float,
    exponents: int,
    rows: int,
) -> None:
    """Choose one fold's scale and enter it where it acts: `scales` for linears, `folded` for norms, routers and biases."""
    readers = [local for local in fold.consumers if local in linears and local in pooled]
    routers = [f"{local}.weight" for local in fold.consumers if f"{local}.weight" in kept and local not in linears]
    if not readers:
        return
    norm, bias = f"{fold.producer}.weight", f"{fold.producer}.bias"
    from_norm = fold.producer not in linears
    channels = len(kept[norm]) if from_norm else len(weights[fold.producer])
    exact_in_kept = bool(routers) or bias in kept  # tensors that stay in bf16 take powers of two, which lose nothing

    def realize(scale: Tensor) -> Tensor:
        if exact_in_kept:
            scale = torch.exp2(scale.log2().round())
        return awq.norm_fold(kept[norm], norm_offset, scale)[1] if from_norm else scale

    shared = kind(readers[0]) is not None and len(readers) > 1
    consumers, tokens, total_abs = [], 0, torch.zeros(weights[readers[0]].shape[1])
    for local in readers:
        own, weight = pooled[local], weights[local]
        judged = awq.every_nth(weight, EXPERT_ROWS if shared else rows)
        scheme = linears[local].scheme
        assert scheme is not None
        consumers.append(awq.Consumer(judged, own.square * (len(weight) / len(judged)), scheme, weight.dtype))
        tokens, total_abs = tokens + own.tokens, total_abs + own.abs
    choice = awq.choose_scale(fold.producer, consumers, total_abs / max(tokens, 1), channels, fold.head, exponents, realize)
    reports.append(choice.report)
    if choice.report.exponents is None:
        return
    for local in readers:
        scales.columns[local] = awq.over_columns(choice.scale, weights[local].shape[1], fold.head)
    for name in routers:
        folded[name] = (kept[name].float() * choice.scale).to(kept[name].dtype)
    if from_norm:
        folded[norm] = awq.norm_fold(kept[norm], norm_offset, choice.scale)[0]
    else:
        scales.rows[fold.producer] = choice.scale
        if bias in kept:
            folded[bias] = (kept[bias].float() / choice.scale).to(kept[bias].dtype)


def _quantize(linear: Linear, weight: Tensor, pooled: Pooled, scales: _Scales, shrinks: int) -> Solved:
    local, scheme = linear.local, linear.scheme
    assert scheme is not None
    used = local in pooled
    own = pooled[local] if used else None
    square = own.square if own is not None else torch.ones(weight.shape[1])
    importance = square / scales.columns[local].square() if local in scales.columns else square
    codes = _round(local, weight, importance, scheme, scales, shrinks)
    judged = torch.linspace(0, len(weight) - 1, min(len(weight), JUDGED_ROWS)).round().long()
    original = weight[judged].float()
    gram = own.gram if own is not None else None
    power = max(_output_power(original, square, gram), 1e-30)
    plainly = _output_power(_plainly_rounded(original, scheme, weight.dtype) - original, square, gram) / power
    error = _output_power(_as_original(local, codes, judged, scales) - original, square, gram) / power
    if shrinks > 1 and error > plainly:  # the diagonal misjudged the ranges; the extremes may serve better under the same fold
        other = _round(local, weight, importance, scheme, scales, 1)
        other_error = _output_power(_as_original(local, other, judged, scales) - original, square, gram) / power
        if other_error < error:
            codes, error = other, other_error
    return Solved(codes, plainly, error, pooled.tokens(local) if used else 0)


def _round(local: str, weight: Tensor, importance: Tensor, scheme: Scheme, scales: _Scales, shrinks: int) -> Codes:
    out, columns = weight.shape
    width = scheme.width(columns)
    weighted = importance.view(1, -1, width)
    parts = []
    for start in range(0, out, max(1, CHUNK // columns)):
        part = slice(start, start + max(1, CHUNK // columns))
        folded = scales.apply(local, weight[part].float(), part)
        grouped = folded.view(len(folded), -1, width)
        if shrinks > 1:
            scale, zero, _ = ranges.search(grouped, weighted, scheme, weight.dtype, shrinks)
        else:
            scale, zero = ranges.plain(grouped, scheme, weight.dtype)
        parts.append(to_codes(folded, scale, zero, scheme, weight.dtype))
    return Codes(
        packed=torch.cat([part.packed for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero=None if scheme.symmetric else torch.cat([part.zero for part in parts if part.zero is not None]),
        scheme=scheme,
        columns=columns,
    )


def _plainly_rounded(weight: Float[Tensor, "rows in"], scheme: Scheme, dtype: torch.dtype) -> Float[Tensor, "rows in"]:
    grouped = weight.view(len(weight), -1, scheme.width(weight.shape[1]))
    return from_codes(to_codes(weight, *ranges.plain(grouped, scheme, dtype), scheme, dtype))


def _as_original(local: str, codes: Codes, judged: Tensor, scales: _Scales) -> Float[Tensor, "rows in"]:
    """Some rows of the quantized weight, with the folds taken back: comparable with the original weight."""
    zero = None if codes.zero is None else codes.zero[judged]
    weight = from_codes(Codes(codes.packed[judged], codes.scale[judged], zero, codes.scheme, codes.columns))
    if local in scales.rows:
        weight *= scales.rows[local][judged, None]
    if local in scales.columns:
        weight /= scales.columns[local]
    return weight


def _output_power(weight: Float[Tensor, "rows in"], square: Float[Tensor, " in"], gram: Float[Tensor, "in in"] | None) -> float:
    """tr(W G W^T): the squared output of these rows over the calibration tokens; by the diagonal where there is no Gram."""
    if gram is None:
        return float((weight.square() @ square).sum(dtype=torch.float64))
    return float(((weight @ gram) * weight).sum(dtype=torch.float64))
