"""Bits where they pay: one scheme for each set of linears, so that the losses' sum is least and the bytes stay within a budget.

A multiple-choice knapsack (Kellerer, Pferschy, Pisinger 2004, chapter 11) by dynamic programming over the bytes above the smallest
choice, in steps so fine that rounding them up loses next to nothing.
"""

import math
from collections.abc import Sequence

import numpy as np

STEPS = 1 << 16  # of the bytes between the smallest answer and the budget


def allocate(options: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int]:
    """The number of the option taken for each set.

    Args:
        options: (bytes, loss) of every option of every set.
        budget: bytes that all sets may take together.

    Raises:
        ValueError: even the smallest options do not fit, or a loss is no number.
    """
    if not all(math.isfinite(loss) for of in options for _, loss in of):
        raise ValueError("a loss that is NaN or infinite cannot be weighed")
    smallest = [min(size for size, _ in of) for of in options]
    free = budget - sum(smallest)
    if free < 0:
        raise ValueError(f"{sum(smallest):,} bytes are the least")
    unit = max(1, -(-free // STEPS))
    room = free // unit + 1
    best = np.zeros(room)  # least loss of the sets so far within so many steps
    taken = np.zeros((len(options), room), np.int16)
    for number, (of, least) in enumerate(zip(options, smallest, strict=True)):
        after = np.full(room, np.inf)
        for choice, (size, loss) in enumerate(of):
            steps = -(-(size - least) // unit)
            if steps >= room:
                continue
            cost = np.full(room, np.inf)
            cost[steps:] = best[: room - steps] + loss
            better = cost < after
            after[better] = cost[better]
            taken[number][better] = choice
        best = after
    chosen, left = [0] * len(options), room - 1
    for number in reversed(range(len(options))):
        choice = chosen[number] = int(taken[number][left])
        left -= -(-(options[number][choice][0] - smallest[number]) // unit)
    return chosen
