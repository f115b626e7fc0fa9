"""Solve one decoder block: folds first, then ranges, then codes. Pure: tensors and sums in, codes and folded tensors out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from quantkit.grid.integer import from_codes, to_codes
from quantkit.solve import awq, ranges
from quantkit.solve.pooling import Pooled, kind
from quantkit.types import BlockPlan, Codes, Effort, Fold, FoldReport, InputStats, Linear, Scheme, Solved, SolvedBlock

JUDGED_ROWS = 512  # rows of a matrix on which its output error is measured
EXPERT_ROWS = 32  # rows of each expert on which a scale that all experts share is judged
CHUNK = 1 << 20  # weights at a time in the range search: temporaries stay in the cache


@dataclass(slots=True)
class _Block:
    """A block while it is solved: what is given, and what the folds chose so far do to it (W' = W * columns / rows)."""

    linears: dict[str, Linear]
    weights: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]
    inputs: Pooled
    norm_offset: float
    columns: dict[str, Float[Tensor, " in"]] = field(default_factory=dict)
    rows: dict[str, Float[Tensor, " out"]] = field(default_factory=dict)
    folded: dict[str, Tensor] = field(default_factory=dict)

    def scheme(self, local: str) -> Scheme:
        scheme = self.linears[local].scheme
        assert scheme is not None
        return scheme

    def scaled(self, local: str, part: slice) -> Float[Tensor, "rows in"]:
        """Some rows of a linear's weight under the folds, fp32."""
        weight = self.weights[local][part].float()
        if local in self.columns:
            weight = weight * self.columns[local]
        if local in self.rows:
            weight = weight / self.rows[local][part, None]
        return weight

    def unscaled(self, local: str, codes: Codes, judged: Int[Tensor, " rows"]) -> Float[Tensor, "rows in"]:
        """Some rows of the quantized weight with the folds taken back: comparable with the original weight."""
        zero = None if codes.zero is None else codes.zero[judged]
        weight = from_codes(Codes(codes.packed[judged], codes.scale[judged], zero, codes.scheme, codes.columns))
        if local in self.rows:
            weight *= self.rows[local][judged, None]
        if local in self.columns:
            weight /= self.columns[local]
        return weight


def solve_block(
    plan: BlockPlan,
    weights: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    stats: dict[str, InputStats],
    norm_offset: float,
    effort: Effort,
) -> SolvedBlock:
    """All linears of a block on their grids.

    Args:
        plan: the block's linears, with their schemes, and its legal folds.
        weights: (out, in) of every linear with a scheme, by local name; not changed.
        kept: the block's other tensors by local tensor name; not changed.
        stats: what each linear was fed; emptied linear by linear, so that Grams give way to codes in memory. A linear without stats
            is read by nothing (published leftovers): it is rounded plainly.
        norm_offset: a norm multiplies by (offset + weight).
        effort: which searches, and how hard.

    Returns:
        codes of every linear with a scheme, and the kept tensors that a fold changed (in their own dtype).
    """
    linears = {linear.local: linear for linear in plan.linears if linear.scheme is not None}
    block = _Block(linears, weights, kept, Pooled(stats, effort.expert_floor), norm_offset)
    reports = [report for fold in plan.folds if effort.folds and (report := _fold(block, fold, effort))]
    solved = {}
    for local in linears:
        solved[local] = _quantize(block, local, effort.shrinks if local in block.inputs else 1)
        stats.pop(local, None)
    return SolvedBlock(plan.index, solved, block.folded, tuple(reports))


def _fold(block: _Block, fold: Fold, effort: Effort) -> FoldReport | None:
    """Choose one fold's scale and enter it where it acts: in linears' columns and rows, in norms, routers and biases."""
    readers = [local for local in fold.consumers if local in block.linears and local in block.inputs]
    if not readers:
        return None
    routers = [name for local in fold.consumers if local not in block.linears and (name := f"{local}.weight") in block.kept]
    norm, bias = f"{fold.producer}.weight", f"{fold.producer}.bias"
    from_norm = fold.producer not in block.linears
    channels = len(block.kept[norm] if from_norm else block.weights[fold.producer])
    exact = bool(routers) or bias in block.kept  # tensors that stay in bf16 take powers of two, which lose nothing

    def realize(scale: Tensor) -> Tensor:
        scale = torch.exp2(scale.log2().round()) if exact else scale
        return awq.norm_fold(block.kept[norm], block.norm_offset, scale)[1] if from_norm else scale

    rows = EXPERT_ROWS if len(readers) > 1 and kind(readers[0]) else effort.rows
    consumers, tokens, total = [], 0, torch.zeros(block.weights[readers[0]].shape[1])
    for local in readers:
        fed, weight = block.inputs[local], block.weights[local]
        judged = awq.every_nth(weight, rows)
        consumers.append(awq.Consumer(judged, fed.square * (len(weight) / len(judged)), block.scheme(local), weight.dtype))
        tokens, total = tokens + fed.tokens, total + fed.abs
    choice = awq.choose_scale(fold.producer, consumers, total / max(tokens, 1), channels, fold.head, effort.exponents, realize)
    if choice.report.exponents is None:
        return choice.report
    if from_norm and not _holds(block, readers, choice.scale, effort):
        return FoldReport(fold.producer, None, (1.0, 1.0), 1.0)
    for local in readers:
        block.columns[local] = awq.over_columns(choice.scale, block.weights[local].shape[1], fold.head)
    for name in routers:
        block.folded[name] = (block.kept[name].float() * choice.scale).to(block.kept[name].dtype)
    if from_norm:
        block.folded[norm] = awq.norm_fold(block.kept[norm], block.norm_offset, choice.scale)[0]
    else:
        block.rows[fold.producer] = choice.scale
        if bias in block.kept:
            block.folded[bias] = (block.kept[bias].float() / choice.scale).to(block.kept[bias].dtype)
    return choice.report


def _holds(block: _Block, readers: Sequence[str], scale: Float[Tensor, " in"], effort: Effort) -> bool:
    """The diagonal proposed a scale for a norm; does it stand by the whole Gram? No reader may end above plain rounding.

    Inputs with a mean or a few strong directions are where the two differ. Readers without a Gram (experts) are taken at the
    diagonal's word.
    """
    for local in readers:
        fed, scheme = block.inputs[local], block.scheme(local)
        if fed.gram is None:
            continue
        original = awq.every_nth(block.weights[local], effort.rows)
        dtype, width = block.weights[local].dtype, scheme.width(original.shape[1])
        plainly = _plainly_rounded(original, scheme, dtype)
        grouped = (original * scale).view(len(original), -1, width)
        importance = (fed.square / scale.square()).view(1, -1, width)
        best, zero, _ = ranges.search(grouped, importance, scheme, dtype, effort.shrinks)
        searched = from_codes(to_codes(grouped.view_as(original), best, zero, scheme, dtype)) / scale
        simple = _plainly_rounded(original * scale, scheme, dtype) / scale
        allowed = _output_power(plainly - original, fed.square, fed.gram)
        if min(_output_power(rounded - original, fed.square, fed.gram) for rounded in (searched, simple)) > allowed:
            return False
    return True


def _quantize(block: _Block, local: str, shrinks: int) -> Solved:
    """One linear under its folds: ranges, codes, and both errors of its output on some of its rows."""
    weight, used = block.weights[local], local in block.inputs
    square, gram = torch.ones(weight.shape[1]), None
    if used:
        fed = block.inputs[local]
        square, gram = fed.square, fed.gram
    judged = torch.linspace(0, len(weight) - 1, min(len(weight), JUDGED_ROWS)).round().long()
    original = weight[judged].float()
    power = max(_output_power(original, square, gram), 1e-30)

    def error_of(rounded: Float[Tensor, "rows in"]) -> float:
        return _output_power(rounded - original, square, gram) / power

    plainly = error_of(_plainly_rounded(original, block.scheme(local), weight.dtype))
    codes = _round(block, local, square, shrinks)
    error = error_of(block.unscaled(local, codes, judged))
    if shrinks > 1 and error > plainly:  # the diagonal misjudged the ranges; the extremes may serve better under the same fold
        other = _round(block, local, square, 1)
        other_error = error_of(block.unscaled(local, other, judged))
        if other_error < error:
            codes, error = other, other_error
    return Solved(codes, plainly, error, block.inputs.tokens(local) if used else 0)


def _round(block: _Block, local: str, square: Float[Tensor, " in"], shrinks: int) -> Codes:
    weight, scheme = block.weights[local], block.scheme(local)
    out, columns = weight.shape
    width = scheme.width(columns)
    importance = (square / block.columns[local].square() if local in block.columns else square).view(1, -1, width)
    parts = []
    step = max(1, CHUNK // columns)
    for start in range(0, out, step):
        scaled = block.scaled(local, slice(start, start + step))
        grouped = scaled.view(len(scaled), -1, width)
        if shrinks > 1:
            scale, zero, _ = ranges.search(grouped, importance, scheme, weight.dtype, shrinks)
        else:
            scale, zero = ranges.plain(grouped, scheme, weight.dtype)
        parts.append(to_codes(scaled, scale, zero, scheme, weight.dtype))
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


def _output_power(weight: Float[Tensor, "rows in"], square: Float[Tensor, " in"], gram: Float[Tensor, "in in"] | None) -> float:
    """tr(W G W^T): the squared output of these rows over the calibration tokens; by the diagonal where there is no Gram."""
    if gram is None:
        return float((weight.square() @ square).sum(dtype=torch.float64))
    return float(((weight @ gram) * weight).sum(dtype=torch.float64))
