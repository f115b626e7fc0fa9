"""The gate: figures with their uncertainty against what a YAML demands -> PASS, FAIL or INCONCLUSIVE, check by check.

A budget is kept when the bound that is hardest on the artefact keeps it, and missed when the bound that is kindest misses it; between
the two nobody knows, and the check says how much data would tell. PASS needs all of a gate's checks, FAIL one.

Groups (languages, domains, kinds, tasks) are alarms: each may only fail, at a level that the groups of a check share (Holm). With a
few dozen items each could hardly ever be proven non-inferior, and the pooled check asks for that proof already.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

from quantkit.evaluate import significance
from quantkit.types import Json

PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"
EXIT_CODES = {PASS: 0, FAIL: 3, INCONCLUSIVE: 4}


@dataclass(frozen=True, slots=True)
class Check:
    """One demand and what became of it."""

    name: str
    verdict: str
    found: float
    limit: float
    bounds: tuple[float, float] | None = None
    needed: int | None = None  # how many documents or items would decide, where it is open
    of: str = ""  # what `needed` counts
    note: str = ""

    def line(self) -> str:
        """For people."""
        text = f"{self.verdict:12} {self.name}: {self.found:.4g}"
        if self.bounds is not None and all(map(math.isfinite, self.bounds)):
            text += f" [{self.bounds[0]:.4g}, {self.bounds[1]:.4g}]"
        text += f", demanded {self.limit:.4g}"
        if self.verdict == INCONCLUSIVE:
            text += (
                f"; about {self.needed:,} {self.of} would decide"
                if self.needed
                else f"; no number of {self.of} decides: it lies on the border"
            )
        return text + (f" ({self.note})" if self.note else "")

    def as_json(self) -> Json:
        bounds = [b if math.isfinite(b) else None for b in self.bounds] if self.bounds is not None else None
        return {**asdict(self), "bounds": bounds}


@dataclass(frozen=True, slots=True)
class Pairs:
    """Both models' verdicts on the same items, counted."""

    items: int
    lost: int
    won: int
    right: int  # of the baseline

    @classmethod
    def of(cls, base: Sequence[bool], other: Sequence[bool]) -> "Pairs":
        lost = sum(b and not o for b, o in zip(base, other, strict=True))
        won = sum(o and not b for b, o in zip(base, other, strict=True))
        return cls(len(base), lost, won, sum(base))

    @property
    def difference(self) -> float:
        return (self.won - self.lost) / self.items

    @property
    def flips(self) -> float:
        return (self.won + self.lost) / self.items

    def as_json(self, confidence: float = 0.95) -> Json:
        low, high = significance.difference_bounds(self.lost, self.won, self.items, confidence)
        return {
            "items": self.items,
            "accuracy_base": self.right / self.items,
            "accuracy": self.right / self.items + self.difference,
            "difference": self.difference,
            "bounds": [low, high],
            "right_to_wrong": self.lost,
            "wrong_to_right": self.won,
            "mcnemar": significance.mcnemar(self.lost, self.won),
        }


def verdict_of(checks: Sequence[Check]) -> str:
    """FAIL outweighs INCONCLUSIVE, which outweighs PASS."""
    found = {check.verdict for check in checks}
    return FAIL if FAIL in found else INCONCLUSIVE if INCONCLUSIVE in found or not found else PASS


def at_most(name: str, found: float, limit: float, bounds: tuple[float, float], blocks: int, of: str = "documents") -> Check:
    """A figure that must not exceed its budget."""
    verdict = PASS if bounds[1] <= limit else FAIL if bounds[0] > limit else INCONCLUSIVE
    needed = significance.blocks_needed(blocks, found, bounds, limit) if verdict == INCONCLUSIVE else None
    if verdict == INCONCLUSIVE and not math.isfinite(bounds[0]) and not math.isfinite(bounds[1]):
        needed = 2  # one block has no spread
    return Check(name, verdict, found, limit, bounds, needed, of)


def at_least(name: str, found: float, limit: float, bounds: tuple[float, float], blocks: int, of: str = "documents") -> Check:
    """A figure that must not fall below its demand."""
    turned = at_most(name, -found, -limit, (-bounds[1], -bounds[0]), blocks, of)
    return Check(name, turned.verdict, found, limit, bounds, turned.needed, of)


def none_of(name: str, count: int) -> Check:
    """What may not happen once."""
    return Check(name, FAIL if count else PASS, float(count), 0.0)


def not_inferior(name: str, pairs: Pairs, margin: float, confidence: float) -> Check:
    """The artefact answers no worse than the baseline, less a margin: shown, refuted, or open."""
    z = NormalDist().inv_cdf(confidence)
    statistic = significance.score_statistic(pairs.lost, pairs.won, pairs.items, -margin)
    verdict = PASS if statistic > z else FAIL if statistic < -z else INCONCLUSIVE
    needed = None
    if verdict == INCONCLUSIVE:
        needed = significance.items_needed(pairs.flips, pairs.difference, margin, confidence)
        needed = max(needed, pairs.items + 1) if needed is not None else None
    bounds = significance.difference_bounds(pairs.lost, pairs.won, pairs.items, confidence)
    note = f"{pairs.items} items, {pairs.lost} lost, {pairs.won} won, McNemar p {significance.mcnemar(pairs.lost, pairs.won):.3g}"
    if not pairs.right:
        note += "; the baseline has none right, so none could be lost"
    return Check(name, verdict, pairs.difference, -margin, bounds, needed, "items", note)


def few_flips(name: str, pairs: Pairs, limit: float, confidence: float) -> Check:
    """The share of changed verdicts, with Wilson's interval."""
    z, n, p = NormalDist().inv_cdf(confidence), pairs.items, pairs.flips
    centre, reach = (p + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    check = at_most(name, p, limit, (max(centre - reach, 0.0), min(centre + reach, 1.0)), n, "items")
    return Check(check.name, check.verdict, p, limit, check.bounds, check.needed, "items", f"{pairs.lost} lost, {pairs.won} won")


def alarms(name: str, groups: Mapping[str, Pairs], margin: float, confidence: float) -> Check:
    """No group is shown to lose more than the margin, at a level that all groups share."""
    names = [group for group, pairs in groups.items() if pairs.items]
    p_values = [significance.worse_than(groups[g].lost, groups[g].won, groups[g].items, margin) for g in names]
    adjusted = dict(zip(names, significance.holm(p_values), strict=True))
    failed = sorted(group for group, p in adjusted.items() if p < 1 - confidence)
    worst = min(names, key=lambda group: groups[group].difference)
    note = f"worst {worst}" + (f"; shown to lose more: {', '.join(failed)}" if failed else "")
    return Check(f"{name}, {len(names)} groups", FAIL if failed else PASS, groups[worst].difference, -margin, None, None, "items", note)


def budget_alarms(name: str, groups: Mapping[str, tuple[float, float]], limit: float) -> Check:
    """No group is shown to exceed a budget: (its figure, a lower bound at the level that all groups share) by group."""
    failed = sorted(group for group, (_, low) in groups.items() if low > limit)
    worst = max(groups, key=lambda group: groups[group][0])
    note = f"worst {worst}" + (f"; shown to exceed it: {', '.join(failed)}" if failed else "")
    return Check(f"{name}, {len(groups)} groups", FAIL if failed else PASS, groups[worst][0], limit, None, None, "documents", note)
