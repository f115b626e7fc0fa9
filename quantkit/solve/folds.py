"""The folds of one block: which scale leaves which producer, chosen before anything is rounded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from quantkit.grid import superblock
from quantkit.grid.found import on_grid
from quantkit.grid.integer import from_codes, to_codes
from quantkit.solve import awq, ranges
from quantkit.solve.pooling import Pooled, kind
from quantkit.types import BlockPlan, Codes, Effort, Fold, FoldReport, Linear, Scheme

Rows = slice | Int[Tensor, " rows"]
EVERY = slice(None)
EXPERT_ROWS = 128  # rows of an expert on which a scale of its own is judged
SHARED_EXPERT_ROWS = 32  # where all experts share it


@dataclass(slots=True)
class Folding:
    """What the folds of a block do to its weights (W' = W * columns / rows) and to its kept tensors; weights that they leave alone."""

    columns: dict[str, Float[Tensor, " in"]] = field(default_factory=dict)
    rows: dict[str, Float[Tensor, " out"]] = field(default_factory=dict)
    folded: dict[str, Tensor] = field(default_factory=dict)
    reports: list[FoldReport] = field(default_factory=list)
    copied: dict[str, Codes] = field(default_factory=dict)  # linears that lie on their grid already: nothing is left to solve

    def apply(self, local: str, weight: Float[Tensor, "rows in"], rows: Rows = EVERY) -> Float[Tensor, "rows in"]:
        """Some rows of a linear's weight (fp32) under the folds."""
        if local in self.columns:
            weight = weight * self.columns[local]
        if local in self.rows:
            weight = weight / self.rows[local][rows, None]
        return weight

    def undo(self, local: str, weight: Float[Tensor, "rows in"], rows: Rows = EVERY) -> Float[Tensor, "rows in"]:
        """Some rows of a rounded weight with the folds taken back: comparable with the original."""
        if local in self.rows:
            weight = weight * self.rows[local][rows, None]
        if local in self.columns:
            weight = weight / self.columns[local]
        return weight


def choose_folds(
    plan: BlockPlan,
    weights: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    inputs: Pooled,
    sensitivity: Mapping[str, Float[Tensor, " out"]],
    norm_offset: float,
    effort: Effort,
) -> Folding:
    """Every legal fold's scale, chosen one after the other; none where the effort asks for none, or where it would take a weight off
    the grid that it lies on already.

    Args:
        inputs: what each linear is fed; diagonals suffice.
        sensitivity: how much a change of each output row moves the block's output (mean square); linears that are not there count evenly.
        norm_offset: a norm multiplies by (offset + weight).
    """
    folding = Folding()
    if effort.searches:
        schemes = {linear.local: linear.scheme for linear in plan.linears if linear.scheme and linear.scheme.grid == "integer"}
        found = {local: on_grid(weights[local], scheme) for local, scheme in schemes.items()}
        folding.copied = {local: codes for local, codes in found.items() if codes is not None}
    if effort.folds:
        chooser = _Chooser(plan, weights, kept, inputs, sensitivity, norm_offset, effort, folding)
        folding.reports += chooser.chosen(plan.folds)
    return folding


@dataclass(frozen=True, slots=True)
class _Asked:
    """One fold's search before it begins."""

    fold: Fold
    readers: list[str]
    routers: list[str]
    from_norm: bool
    channels: int
    consumers: list[awq.Consumer]
    mean_abs: Float[Tensor, " in"]
    realize: Callable[[Tensor], Tensor]
    shape: object | None  # the same for folds that can be searched side by side; None for one of its own


class _Chooser:
    def __init__(
        self,
        plan: BlockPlan,
        weights: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
        inputs: Pooled,
        sensitivity: Mapping[str, Tensor],
        norm_offset: float,
        effort: Effort,
        folding: Folding,
    ):
        self.linears: dict[str, Linear] = {linear.local: linear for linear in plan.linears if linear.scheme is not None}
        self.weights, self.kept, self.inputs, self.sensitivity = weights, kept, inputs, sensitivity
        self.norm_offset, self.effort, self.folding = norm_offset, effort, folding

    def scheme(self, local: str) -> Scheme:
        scheme = self.linears[local].scheme
        assert scheme is not None
        return scheme

    def chosen(self, folds: Sequence[Fold]) -> list[FoldReport]:
        """Choose every fold's scale and enter it where it acts: in linears' columns and rows, in norms, routers and biases."""
        asked = [one for one in map(self._asked, folds) if one is not None]
        alike: dict[object, list[_Asked]] = {}
        for one in asked:
            alike.setdefault(one.shape or one.fold.producer, []).append(one)
        reports: dict[str, FoldReport] = {}
        for group in alike.values():
            first = group[0]
            if len(group) > 1:
                means, consumers = [one.mean_abs for one in group], [one.consumers[0] for one in group]
                choices = awq.choose_alike([one.fold.producer for one in group], consumers, means, self.effort.exponents, first.realize)
            else:
                fold, exponents = first.fold, self.effort.exponents
                channels = first.channels
                choices = [awq.choose_scale(fold.producer, first.consumers, first.mean_abs, channels, fold.head, exponents, first.realize)]
            for one, choice in zip(group, choices, strict=True):
                reports[one.fold.producer] = self._entered(one, choice)
        return [reports[one.fold.producer] for one in asked]

    def _asked(self, fold: Fold) -> "_Asked | None":
        """What one fold's search starts from; None where nothing that is quantized reads it, or one of its weights is copied."""
        readers = [local for local in fold.consumers if local in self.linears and local in self.inputs]
        if not readers or not self.folding.copied.keys().isdisjoint((fold.producer, *readers)):
            return None
        kept = self.kept
        routers = [name for local in fold.consumers if local not in self.linears and (name := f"{local}.weight") in kept]
        norm, bias = f"{fold.producer}.weight", f"{fold.producer}.bias"
        from_norm = fold.producer not in self.linears
        channels = len(kept[norm] if from_norm else self.weights[fold.producer])
        exact = bool(routers) or bias in kept  # tensors that stay in bf16 take powers of two, which lose nothing

        def realize(scale: Tensor) -> Tensor:
            scale = torch.exp2(scale.log2().round()) if exact else scale
            return awq.norm_fold(kept[norm], self.norm_offset, scale)[1] if from_norm else scale

        tokens, total = 0, torch.zeros_like(self.inputs[readers[0]].abs)
        parts: dict[tuple[Scheme, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
        for local in readers:
            fed, weight = self.inputs[local], self.weights[local]
            rows = min(self.effort.rows, (SHARED_EXPERT_ROWS if len(readers) > 1 else EXPERT_ROWS) if kind(local) else len(weight))
            judged = awq.every_nth(weight, rows)
            importance = (fed.square * (len(weight) / len(judged)))[None]
            if local in self.sensitivity:
                importance = importance * awq.every_nth(self.sensitivity[local][:, None], rows)
            parts.setdefault((self.scheme(local), weight.dtype), []).append((judged, importance))
            tokens, total = tokens + fed.tokens, total + fed.abs
        consumers = [
            awq.Consumer(
                torch.cat([judged for judged, _ in pairs]),
                torch.cat([importance.expand(len(judged), -1) for judged, importance in pairs]) if len(pairs) > 1 else pairs[0][1],
                scheme,
                dtype,
            )
            for (scheme, dtype), pairs in parts.items()
        ]
        shape = None
        if len(readers) == 1 and kind(readers[0]) and not from_norm and not exact and channels == len(total):
            only = consumers[0]
            shape = kind(readers[0]), only.weight.shape, only.importance.shape, only.scheme, only.scheme.signed, only.dtype
        return _Asked(fold, readers, routers, from_norm, channels, consumers, total / max(tokens, 1), realize, shape)

    def _entered(self, asked: "_Asked", choice: awq.Choice) -> FoldReport:
        fold, kept, folding = asked.fold, self.kept, self.folding
        if choice.report.exponents is None:
            return choice.report
        if asked.from_norm and not self._holds(asked.readers, choice.scale):
            return FoldReport(fold.producer, None, (1.0, 1.0), 1.0)
        norm, bias = f"{fold.producer}.weight", f"{fold.producer}.bias"
        for local in asked.readers:
            folding.columns[local] = awq.over_columns(choice.scale, self.weights[local].shape[1], fold.head)
        for name in asked.routers:
            folding.folded[name] = (kept[name].float() * choice.scale).to(kept[name].dtype)
        if asked.from_norm:
            folding.folded[norm] = awq.norm_fold(kept[norm], self.norm_offset, choice.scale)[0]
        else:
            folding.rows[fold.producer] = choice.scale
        if bias in kept:
            folding.folded[bias] = (kept[bias].float() / choice.scale).to(kept[bias].dtype)
        return choice.report

    def _holds(self, readers: Sequence[str], scale: Float[Tensor, " in"]) -> bool:
        """The diagonal proposed a scale for a norm; does it stand by the whole Gram? No reader may end above plain rounding.

        Inputs with a mean or a few strong directions are where the two differ. Readers without a Gram (experts) are taken at the
        diagonal's word, and so are all where rounding compensates: it mends what the diagonal does not see.
        """
        for local in readers:
            fed, scheme = self.inputs[local], self.scheme(local)
            if fed.gram is None or self.effort.compensate:
                continue
            original = awq.every_nth(self.weights[local], self.effort.rows)
            dtype, width = self.weights[local].dtype, scheme.width(original.shape[1])
            plainly = plainly_rounded(original, scheme, dtype)
            grouped = (original * scale).view(len(original), -1, width)
            importance = (fed.square / scale.square()).view(1, -1, width)
            best, zero, _ = ranges.search(grouped, importance, scheme, dtype, self.effort.shrinks)
            searched = from_codes(to_codes(grouped.view_as(original), best, zero, scheme, dtype)) / scale
            simple = plainly_rounded(original * scale, scheme, dtype) / scale
            allowed = _power(plainly - original, fed.gram)
            if min(_power(rounded - original, fed.gram) for rounded in (searched, simple)) > allowed:
                return False
        return True


def plainly_rounded(weight: Float[Tensor, "rows in"], scheme: Scheme, dtype: torch.dtype) -> Float[Tensor, "rows in"]:
    """Round to nearest within the groups' own extremes: what every search has to beat."""
    grouped = weight.view(len(weight), -1, scheme.width(weight.shape[1]))
    if scheme.grid != "integer":
        return superblock.decode(superblock.fit(weight, scheme.grid.upper(), rounds=0))
    return from_codes(to_codes(weight, *ranges.plain(grouped, scheme, dtype), scheme, dtype))


def _power(weight: Float[Tensor, "rows in"], gram: Float[Tensor, "in in"]) -> float:
    return float(((weight @ gram) * weight).sum(dtype=torch.float64))
