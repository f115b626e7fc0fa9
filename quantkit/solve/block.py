"""Solve linears on their grids: targets first, then ranges and codes, then the guard. Pure: tensors and sums in, codes out.

A block is solved in stages, in the order of computation, so that each stage's statistics are of inputs that already carry the earlier
stages' rounding. `solve_block` does it in one, from statistics of the whole block.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from jaxtyping import Float
from torch import Tensor

from quantkit.errors import WriteError
from quantkit.grid import superblock
from quantkit.grid.decoded import decoded
from quantkit.grid.integer import pack, to_codes
from quantkit.solve import ranges
from quantkit.solve.folds import Folding, choose_folds, plainly_rounded
from quantkit.solve.heads import by_turns, metric
from quantkit.solve.pooling import Pooled, kind
from quantkit.solve.rounding import Factor, compensated, compensated_superblocks, descend, factor
from quantkit.solve.targets import Target, lacking, loss
from quantkit.types import BlockPlan, Blocks, Codes, Effort, InputStats, Linear, OutputStats, Scheme, Solved, SolvedBlock

JUDGED_ROWS = 512  # rows of a matrix on which its output error is measured
JUDGED_EXPERT_ROWS = 64
CHUNK = 1 << 18  # weights at a time in the range search: temporaries stay in the cache
STACK = 1 << 24  # weights at a time under compensation: tall enough that products dominate
STACK_ON_GPU = 1 << 27  # all its cores want rows


def solve_block(
    plan: BlockPlan,
    weights: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    stats: dict[str, InputStats],
    norm_offset: float,
    effort: Effort,
) -> SolvedBlock:
    """All linears of a block on their grids, from one set of statistics.

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
    inputs = Pooled(stats, effort.expert_floor)
    folding = choose_folds(plan, weights, kept, inputs, {}, norm_offset, effort)
    solved = solve_linears([linear for linear in plan.linears if linear.scheme], weights, folding, inputs, effort, stats)
    return SolvedBlock(plan.index, solved, folding.folded, tuple(folding.reports))


def solve_linears(
    linears: Sequence[Linear],
    weights: Mapping[str, Tensor],
    folding: Folding,
    inputs: Pooled,
    effort: Effort,
    used_up: dict[str, InputStats] | None = None,
    turns: Iterator[bool] | None = None,
    outputs: Mapping[str, OutputStats] | None = None,
) -> dict[str, Solved]:
    """Some linears of a block, under folds that are already chosen.

    Args:
        used_up: statistics to drop as soon as their linear is solved.
        turns: for each part that is rounded in one go, whether it is to be done here (and not by another rank); None: all are.
        outputs: of linears whose rows answer for one another, head by head: how far their outputs move the block's.

    Returns:
        by local name; no linear is worse than plain rounding on the tokens that its statistics hold back, unless a fold that others
        gain by makes it so.

    Raises:
        WriteError: weights beyond what their scheme can hold.
    """
    solved: dict[str, Solved] = {}
    turns = repeat(True) if turns is None else turns
    grams = {local: one.gram for local, one in (outputs or {}).items() if one.gram is not None}
    for group in _groups(linears, folding, inputs, grams, effort):
        parts = [part for part in _parts(group, weights[group[0].local].device) if next(turns)]
        height = sum(task.shape[0] for task in group)
        try:
            for local, codes, target in _rounded(parts, height, weights, folding, inputs, grams, effort):
                solved[local] = _judged(local, codes, target, weights[local], folding, inputs, effort)
        except ValueError as problem:  # what no grid of this kind holds, sums that are no numbers
            names = " or ".join(linear.name for linear in linears if linear.local in {task.local for task in group})
            raise WriteError(f"{names}: {problem}; keep it with an override, or give it another scheme") from None
        for task in group:
            if used_up is not None:
                used_up.pop(task.local, None)
    return {linear.local: solved[linear.local] for linear in linears if linear.local in solved}


def nearly(linear: Linear, scheme: Scheme, weight: Tensor, folding: Folding, inputs: Pooled, shrinks: int) -> Float[Tensor, "out in"]:
    """A linear's weight on another scheme's grid, every weight to the nearest code: enough to tell schemes apart."""
    task = _Task(linear.local, scheme, linear.shape)
    return folding.undo(linear.local, decoded(_nearest(task, weight, folding, inputs, shrinks)))


@dataclass(frozen=True, slots=True)
class _Task:
    """One linear to be rounded."""

    local: str
    scheme: Scheme
    shape: tuple[int, int]
    grid: Codes | None = None  # the weight lies on this grid already
    compensates: bool = False
    shares: bool = True  # one Gram serves its whole group; False: each has its own
    head: int = 0  # rows that answer for one another; 0: each for itself


def _groups(
    linears: Sequence[Linear], folding: Folding, inputs: Pooled, grams: Mapping[str, Float[Tensor, "_ _ _"]], effort: Effort
) -> list[list[_Task]]:
    """Linears that are rounded together: rows that share a Gram, or experts' matrices of one shape, each with its own."""
    groups: dict[object, list[_Task]] = {}
    for linear in linears:
        local, scheme = linear.local, linear.scheme
        assert scheme is not None
        grid = folding.copied.get(local)
        compensates = effort.compensate and grid is None and inputs.has_gram(local)
        shares = not inputs.has_own_gram(local) or kind(local) is None
        head = grams[local].shape[-1] if compensates and local in grams else 0
        key: object = local
        if compensates:
            key = (
                inputs.source(local) if shares else kind(local),
                scheme,
                scheme.signed,  # which no comparison of schemes sees
                linear.shape[1],
                id(folding.columns.get(local)) if shares else 0,
                head,
            )
        groups.setdefault(key, []).append(_Task(local, scheme, linear.shape, grid, compensates, shares, head))
    return list(groups.values())


def _rounded(
    parts: Sequence[Sequence[_Task]],
    height: int,
    weights: Mapping[str, Tensor],
    folding: Folding,
    inputs: Pooled,
    grams: Mapping[str, Float[Tensor, "_ _ _"]],
    effort: Effort,
) -> Iterator[tuple[str, Codes | Blocks, Target | None]]:
    """Codes of every linear in some parts of a group of `height` rows, and the target that they were rounded to."""
    if not parts:
        return
    first = parts[0][0]
    if not first.compensates:
        yield first.local, first.grid or _nearest(first, weights[first.local], folding, inputs, effort.shrinks), None
        return
    dtype = weights[first.local].dtype
    target, factored, gram = None, None, torch.empty(0)
    if first.shares:
        fed = inputs[first.local]
        target = Target(fed, effort.retarget, effort.retarget_damping, height)
        gram = _under(fed, folding.columns.get(first.local))[None]
        factored = factor(gram, effort.damping)
        del fed
    for part in parts:
        if first.shares:
            assert target is not None
            targets = [target] * len(part)
            wanted = torch.cat([folding.apply(t.local, target.of(weights[t.local].float())) for t in part])[None]
        else:
            each = [inputs[task.local] for task in part]
            targets = [Target(fed, effort.retarget, effort.retarget_damping, first.shape[0]) for fed in each]
            gram = torch.stack([_under(fed, folding.columns.get(task.local)) for task, fed in zip(part, each, strict=True)])
            wanted = torch.stack([folding.apply(t.local, to.of(weights[t.local].float())) for t, to in zip(part, targets, strict=True)])
            factored = factor(gram, effort.damping)
        assert factored is not None
        rounding = _Compensated(gram, factored, first.scheme, dtype, effort)
        if first.head:
            answering = metric([grams[task.local] for task in part], [folding.rows.get(task.local) for task in part])
            rows = by_turns(wanted[0], answering, rounding.rows)
            stored = tuple(one[None] for one in rows)
        else:
            stored = rounding.stack(wanted)
        yield from zip((task.local for task in part), _split(stored, part, first.scheme, dtype), targets, strict=True)


@dataclass(frozen=True, slots=True)
class _Compensated:
    """How a stack is rounded by the Gram of its columns: what is stored of it, rows second in each tensor."""

    gram: Float[Tensor, "#stack in in"]
    factored: Factor
    scheme: Scheme
    dtype: torch.dtype
    effort: Effort

    def stack(self, wanted: Float[Tensor, "stack rows in"]) -> tuple[Tensor, ...]:
        """(codes, scale[, zero]) on an integer grid, (bytes,) on one of ggml's."""
        scheme, effort = self.scheme, self.effort
        if scheme.grid != "integer":
            return (torch.stack([superblock.pack(one) for one in compensated_superblocks(wanted, self.factored, scheme.grid.upper())]),)
        rounded = compensated(wanted, self.factored, scheme, self.dtype, effort.shrinks)
        if effort.sweeps:
            rounded = descend(wanted, self.gram, effort.damping, rounded, scheme, self.dtype, effort.shrinks, effort.sweeps)
        return (rounded.codes, rounded.scale) if rounded.zero is None else (rounded.codes, rounded.scale, rounded.zero)

    def rows(self, wanted: Float[Tensor, "rows in"]) -> tuple[tuple[Tensor, ...], Float[Tensor, "rows in"]]:
        """The same of one matrix's rows, and the weights that they stand for."""
        stored = tuple(one[0] for one in self.stack(wanted[None]))
        return stored, decoded(_laid_out(stored, self.scheme, wanted.shape[1], self.dtype))


def _parts(group: Sequence[_Task], device: torch.device) -> Iterator[list[_Task]]:
    """As many of a group as are solved at a time."""
    most = STACK_ON_GPU if device.type == "cuda" else STACK
    part: list[_Task] = []
    size = 0
    for task in group:
        weights = task.shape[0] * task.shape[1]
        if part and size + weights > most:
            yield part
            part, size = [], 0
        part.append(task)
        size += weights
    yield part


def _under(fed: InputStats, columns: Float[Tensor, " in"] | None) -> Float[Tensor, "in in"]:
    """The Gram of a linear's inputs when a fold has divided them."""
    assert fed.gram is not None
    return fed.gram if columns is None else fed.gram / columns[:, None] / columns


def _split(stored: tuple[Tensor, ...], part: Sequence[_Task], scheme: Scheme, dtype: torch.dtype) -> Iterator[Codes | Blocks]:
    """What is stored of a stack, matrix by matrix."""
    start = 0
    for number, task in enumerate(part):
        out, columns = task.shape
        own = (0, slice(start, start + out)) if task.shares else (number, slice(None))
        start += out
        yield _laid_out(tuple(one[own].contiguous() for one in stored), scheme, columns, dtype)


def _laid_out(stored: tuple[Tensor, ...], scheme: Scheme, columns: int, dtype: torch.dtype) -> Codes | Blocks:
    """Some rows as an artefact holds them."""
    if scheme.grid != "integer":
        return Blocks(stored[0], scheme, columns)
    codes, scale, *zero = stored
    return Codes(pack(codes, scheme.bits), scale.to(dtype), zero[0].to(torch.int8) if zero else None, scheme, columns)


def _nearest(task: _Task, weight: Tensor, folding: Folding, inputs: Pooled, shrinks: int) -> Codes | Blocks:
    """Every weight to the nearest code, ranges searched by the diagonal."""
    scheme, (out, columns) = task.scheme, task.shape
    width = scheme.width(columns)
    square = inputs[task.local].square if task.local in inputs else torch.ones(columns, device=weight.device)
    shrinks = shrinks if task.local in inputs else 1
    if task.local in folding.columns:
        square = square / folding.columns[task.local].square()
    step = max(1, CHUNK // columns)
    if scheme.grid != "integer":
        scaled_parts = (folding.apply(task.local, weight[at : at + step].float(), slice(at, at + step)) for at in range(0, out, step))
        rounds = superblock.ROUNDS if shrinks > 1 else 0
        fits = [superblock.fit(part, scheme.grid.upper(), square, rounds) for part in scaled_parts]
        return Blocks(torch.cat([superblock.pack(one) for one in fits]), scheme, columns)
    parts = []
    for start in range(0, out, step):
        scaled = folding.apply(task.local, weight[start : start + step].float(), slice(start, start + step))
        grouped = scaled.view(len(scaled), -1, width)
        if shrinks > 1:
            scale, zero, _ = ranges.search(grouped, square.view(1, -1, width), scheme, weight.dtype, shrinks)
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


def _judged(
    local: str, codes: Codes | Blocks, target: Target | None, weight: Tensor, folding: Folding, inputs: Pooled, effort: Effort
) -> Solved:
    """The guard, and both errors of the linear's output around what was wanted, on some of its rows.

    Where plain rounding would serve the tokens better that were held back (all of them where none were), simpler solutions take the place:
    ranges by the diagonal, or the extremes, under the same fold.
    """
    scheme, dtype = codes.scheme, weight.dtype
    count = JUDGED_EXPERT_ROWS if kind(local) else JUDGED_ROWS
    judged = torch.linspace(0, len(weight) - 1, min(len(weight), count)).round().long().to(weight.device)
    original = weight[judged].float()
    even = torch.ones(weight.shape[1], device=weight.device)
    fed = inputs[local] if local in inputs else InputStats(0, even, even, None)
    wanted = original if target is None else target.of(original, judged)
    plainly = plainly_rounded(original, scheme, dtype)
    held = fed.held if fed.held is not None and fed.held.tokens else None
    plain_seen, plain_held, lacks = loss(wanted, plainly, fed), None, None
    if held is not None:
        own = None if held.residual is None else held.residual[judged]
        lacks = lacking(original, held.drift if target is not None else None, own)
        plain_held = loss(original, plainly, held, lacks)

    def worth(rounded: Float[Tensor, "rows in"]) -> tuple[float, float]:
        """What it costs beyond plain rounding, in doubt the worse of what was seen and held back; and its loss on what was seen."""
        seen = loss(wanted, rounded, fed)
        more = seen - plain_seen
        if held is not None and plain_held is not None:
            more = max(more, loss(original, rounded, held, lacks) - plain_held)
        return math.inf if math.isnan(more) else more, seen

    def of(rounded: Codes | Blocks) -> Float[Tensor, "rows in"]:
        if isinstance(rounded, Blocks):
            some: Codes | Blocks = Blocks(rounded.rows[judged], scheme, rounded.columns)
        else:
            zero = None if rounded.zero is None else rounded.zero[judged]
            some = Codes(rounded.packed[judged], rounded.scale[judged], zero, scheme, rounded.columns)
        return folding.undo(local, decoded(some), judged)

    best, fell_back = of(codes), False
    cost, seen = worth(best)
    if cost > 0 and effort.searches and local not in folding.copied:
        task = _Task(local, scheme, (weight.shape[0], weight.shape[1]))
        for shrinks in dict.fromkeys((effort.shrinks, 1)):
            other_codes = _nearest(task, weight, folding, inputs, shrinks)
            simpler = of(other_codes)
            value, other_seen = worth(simpler)
            if value < cost:
                codes, cost, seen, fell_back = other_codes, value, other_seen, True
        if cost == math.inf:
            raise ValueError("its outputs are beyond fp32")
    power = max(loss(original, torch.zeros_like(original), fed), 1e-30)
    return Solved(
        codes,
        plain_seen / power,
        seen / power,
        inputs.tokens(local) if local in inputs else 0,
        fell_back,
    )
