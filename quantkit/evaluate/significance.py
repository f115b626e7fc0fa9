"""What a difference between two models on the same questions proves: exact and score tests, bootstraps, and how much data would decide.

Everything is paired: both models answered the same items, so only items whose verdict changed carry information. `lost` counts items
that the baseline had right and the artefact has wrong, `won` the reverse; the difference is (won - lost) / items.

Sources: McNemar (1947); Tango, Statistics in Medicine 17 (1998), the score interval of a paired difference of proportions; Holm (1979);
Hesterberg, The American Statistician 69 (2015), percentiles of a bootstrap from few blocks.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

DRAWS = 2000
_NORMAL = NormalDist()


def mcnemar(lost: int, won: int) -> float:
    """Two-sided exact p value of "as many lost as won": a fair coin thrown for every item that changed."""
    n, least = lost + won, min(lost, won)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)


def score_statistic(lost: int | float, won: int | float, items: int, difference: float) -> float:
    """How many standard errors the observed difference lies above `difference`, the variance taken where `difference` is true (Tango)."""
    a = 2 * items
    b = -won - lost + (2 * items - won + lost) * difference
    c = -lost * difference * (1 - difference)
    q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = items * (2 * q + difference * (1 - difference))
    distance = won - lost - items * difference
    if variance <= 0:
        return 0.0 if abs(distance) < 1e-9 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def difference_bounds(lost: int, won: int, items: int, confidence: float = 0.95) -> tuple[float, float]:
    """Lower and upper one-sided bounds of the true difference, each at `confidence`."""
    z = _NORMAL.inv_cdf(confidence)

    def solve(target: float) -> float:  # the statistic falls as the difference grows
        low, high = -1.0 + 1e-12, 1.0 - 1e-12
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if score_statistic(lost, won, items, middle) > target else (low, middle)
        return (low + high) / 2

    return solve(z), solve(-z)


def worse_than(lost: int, won: int, items: int, margin: float) -> float:
    """One-sided p value of "no worse than `margin`": small where the artefact is shown to be worse by more than that."""
    return _NORMAL.cdf(score_statistic(lost, won, items, -margin))


def items_needed(flips: float, difference: float, margin: float, confidence: float = 0.95, power: float = 0.8) -> int | None:
    """Items that decide, in `power` of all runs, on which side of -margin a difference lies. None: it lies on the margin itself.

    Args:
        flips: the share of items whose verdict changes, either way.
        difference: the true difference, artefact minus baseline.
    """
    gap = abs(difference + margin)
    if gap < 1e-9:
        return None
    z, more = _NORMAL.inv_cdf(confidence), _NORMAL.inv_cdf(power)
    without_flips = z * z * (1 - gap) / gap  # so many items without a single flip bound the difference within the gap
    return math.ceil(max((z + more) ** 2 * max(flips - difference**2, 0.0) / gap**2, without_flips))


def power(items: int, flips: float, difference: float, margin: float, confidence: float = 0.95) -> float:
    """The share of runs that show non-inferiority when the true difference is this one: the test's error is taken where the margin is
    the truth, the spread of runs where the difference is."""
    spread = math.sqrt(max(flips - difference**2, 1e-12) / items)
    lost, won = (flips - difference) / 2 * items, (flips + difference) / 2 * items
    statistic = score_statistic(lost, won, items, -margin)
    tested = (difference + margin) / statistic if statistic else spread
    return _NORMAL.cdf((difference + margin - _NORMAL.inv_cdf(confidence) * tested) / spread)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values: each may be compared with the level by itself, and the chance of any false alarm stays below it."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, p_values[i] * (len(order) - rank)))
        adjusted[i] = largest
    return adjusted


# --- Blocks ----------------------------------------------------------------------------------------------------------------------


def block_bounds(
    blocks: int, statistic: Callable[[np.ndarray], np.ndarray], confidence: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """One-sided bounds of a statistic when whole blocks are drawn anew: tokens of one document are no independent witnesses.

    Args:
        statistic: of how often each block was drawn, (draws, blocks) -> (draws,).

    Returns:
        Lower and upper bound, each at `confidence`; (-inf, inf) of fewer than two blocks, which say nothing about their spread.
    """
    if blocks < 2:
        return -math.inf, math.inf
    found = statistic(np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1 / blocks), size=draws))
    # few blocks vary less among themselves than the truth they stand for: percentiles further out, as Student's t lies further out
    outer = _NORMAL.cdf(math.sqrt(blocks / (blocks - 1)) * student(confidence, blocks - 1))
    low, high = np.quantile(found, [1 - outer, outer])
    return float(low), float(high)


def mean_bounds(sums: np.ndarray, counts: np.ndarray, confidence: float = 0.95, draws: int = DRAWS) -> tuple[float, float]:
    """Bounds of a mean over tokens or items, from each block's sum and count."""
    return block_bounds(len(sums), lambda drawn: drawn @ sums / np.maximum(drawn @ counts, 1e-300), confidence, draws)


def quantile_bounds(
    values: np.ndarray, block: np.ndarray, quantile: float, confidence: float = 0.95, draws: int = DRAWS
) -> tuple[float, float]:
    """Bounds of a quantile over tokens; `block` says which document each belongs to, 0 upwards."""
    order = np.argsort(values)
    ordered, owner = values[order], block[order]

    def one(drawn: np.ndarray) -> float:
        weight = np.cumsum(drawn[owner])
        return float(ordered[min(int(np.searchsorted(weight, quantile * weight[-1])), len(ordered) - 1)]) if weight[-1] else 0.0

    def statistic(drawn: np.ndarray) -> np.ndarray:
        return np.array([one(row) for row in drawn])

    return block_bounds(int(block.max()) + 1, statistic, confidence, draws)


def blocks_needed(blocks: int, value: float, bounds: tuple[float, float], limit: float) -> int | None:
    """Blocks (documents) with which a bound would clear the limit, if the value stays: errors shrink with their square root."""
    gap, reach = abs(value - limit), bounds[1] - value if value <= limit else value - bounds[0]
    if gap < 1e-12 or not math.isfinite(reach):
        return None
    return max(blocks + 1, math.ceil(blocks * (reach / gap) ** 2))


def student(confidence: float, freedom: int) -> float:
    """Student's t quantile, by Cornish and Fisher's expansion (within 1% from three degrees of freedom upwards at 95%)."""
    z, n = _NORMAL.inv_cdf(confidence), freedom
    return (
        z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2) + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )
