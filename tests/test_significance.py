"""Tests and intervals against closed forms and 2,000 simulated pairs of models."""

import math
from itertools import product
from statistics import NormalDist

import numpy as np
import pytest

from quantkit.evaluate import significance as sig

RUNS = 2000


def simulate(items: int, flips: float, difference: float, seed: int) -> np.ndarray:
    """(lost, won) of RUNS pairs of models whose true flips and difference are these."""
    lost, won = (flips - difference) / 2, (flips + difference) / 2
    return np.random.default_rng(seed).multinomial(items, [lost, won, 1 - flips], size=RUNS)[:, :2]


def verdicts(items: int, flips: float, difference: float, margin: float, seed: int = 1) -> tuple[float, float]:
    """Shares of runs that show "no worse than the margin" and "worse than the margin"."""
    z = NormalDist().inv_cdf(0.95)
    statistics = [sig.score_statistic(float(lost), float(won), items, -margin) for lost, won in simulate(items, flips, difference, seed)]
    return float(np.mean([s > z for s in statistics])), float(np.mean([s < -z for s in statistics]))


@pytest.mark.parametrize("lost, won", [(0, 0), (1, 0), (5, 5), (10, 2), (0, 9), (30, 14)])
def test_mcnemar_is_the_coins_exact_tail(lost, won):
    n = lost + won
    throws = [sum(throw) for throw in product((0, 1), repeat=n)] if n <= 12 else None
    if throws is not None:
        expected = min(1.0, sum(min(t, n - t) <= min(lost, won) for t in throws) / 2**n)
        if lost == won:
            expected = 1.0
        assert sig.mcnemar(lost, won) == pytest.approx(expected)
    assert sig.mcnemar(lost, won) == sig.mcnemar(won, lost)


def test_mcnemar_of_a_textbook_pair():
    assert sig.mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)


def test_bounds_are_where_the_statistic_meets_the_level():
    low, high = sig.difference_bounds(12, 5, 400)
    z = NormalDist().inv_cdf(0.95)
    assert sig.score_statistic(12, 5, 400, low) == pytest.approx(z, abs=1e-6)
    assert sig.score_statistic(12, 5, 400, high) == pytest.approx(-z, abs=1e-6)
    assert low < (5 - 12) / 400 < high


def test_without_a_flip_the_bound_is_the_rule_of_three():
    low, high = sig.difference_bounds(0, 0, 300)
    z = NormalDist().inv_cdf(0.95)
    assert low == pytest.approx(-(z**2) / (300 + z**2), abs=1e-6)
    assert high == pytest.approx(-low, abs=1e-6)


@pytest.mark.parametrize("items, flips, margin", [(3090, 0.05, 0.01), (440, 0.10, 0.05), (1319, 0.08, 0.02)])
def test_false_alarms_and_false_passes_stay_at_five_percent(items, flips, margin):
    """The gate of 2,000 synthetic pairs: nothing lost, then exactly the margin lost."""
    _, alarms = verdicts(items, flips, 0.0, margin)
    assert alarms <= 0.05
    passes, fails = verdicts(items, flips, -margin, margin, seed=2)
    noise = 3 * math.sqrt(0.05 * 0.95 / RUNS)
    assert passes <= 0.05 + noise
    assert fails <= 0.05 + noise


@pytest.mark.parametrize(
    "items, flips, difference, margin",
    [(3090, 0.05, 0.0, 0.01), (440, 0.10, 0.0, 0.05), (1319, 0.08, 0.0, 0.02), (771, 0.05, 0.005, 0.02), (440, 0.05, 0.0, 0.01)],
)
def test_power_is_as_predicted_within_three_points(items, flips, difference, margin):
    passes, _ = verdicts(items, flips, difference, margin, seed=3)
    assert passes == pytest.approx(sig.power(items, flips, difference, margin), abs=0.03)


def test_items_needed_reach_the_power_they_promise():
    needed = sig.items_needed(0.05, 0.0, 0.01)
    assert needed == pytest.approx(3092, abs=2)
    passes, _ = verdicts(needed, 0.05, 0.0, 0.01, seed=4)
    assert passes == pytest.approx(0.8, abs=0.03)
    assert sig.items_needed(0.05, -0.01, 0.01) is None, "on the margin itself no number decides"
    few = sig.items_needed(0.0, 0.0, 0.01)
    assert sig.difference_bounds(0, 0, few)[0] == pytest.approx(-0.01, abs=1e-4)


def test_holm_against_a_worked_example():
    assert sig.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert sig.holm([0.9, 0.8]) == [1.0, 1.0]
    assert sig.holm([]) == []


def test_holm_keeps_the_familys_false_alarms():
    p_values = np.random.default_rng(0).uniform(size=(RUNS, 10))
    alarms = np.mean([min(sig.holm(list(row))) < 0.05 for row in p_values])
    assert alarms <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / RUNS)


@pytest.mark.parametrize("freedom, t", [(3, 2.353), (5, 2.015), (19, 1.729), (100, 1.660)])
def test_students_quantile(freedom, t):
    assert sig.student(0.95, freedom) == pytest.approx(t, rel=0.01)


def test_documents_are_drawn_whole():
    """Tokens of a document move together: the bounds cover the truth, those of single tokens would not."""
    random, covered, naive = np.random.default_rng(5), 0, 0
    for _ in range(200):
        offsets = random.normal(0.0, 1.0, 20)
        values = offsets[:, None] + random.normal(0.0, 0.3, (20, 50))
        low, high = sig.mean_bounds(values.sum(1), np.full(20, 50.0), 0.95, draws=300)
        covered += low <= 0 <= high
        error = 1.645 * values.std() / math.sqrt(values.size)
        naive += abs(values.mean()) <= error
    assert covered / 200 == pytest.approx(0.9, abs=0.06), "two one-sided bounds at 95%"
    assert naive / 200 < 0.5


def test_bounds_of_a_quantile_cover_it():
    random, covered = np.random.default_rng(6), 0
    truth = float(np.quantile(random.exponential(size=200_000), 0.9))
    for _ in range(100):
        values = random.exponential(size=1000)
        low, high = sig.quantile_bounds(values, np.repeat(np.arange(25), 40), 0.9, 0.95, draws=200)
        covered += low <= truth <= high
    assert covered >= 80


def test_one_document_has_no_spread():
    assert sig.mean_bounds(np.array([3.0]), np.array([2.0])) == (-math.inf, math.inf)


def test_documents_needed_shrink_the_reach_below_the_gap():
    needed = sig.blocks_needed(20, 0.04, (0.02, 0.06), 0.05)
    assert needed == 80, "twice the reach of the gap needs four times the documents"
    assert sig.blocks_needed(20, 0.05, (0.04, 0.06), 0.05) is None
