"""Experts that saw few tokens lean on their layer: statistics shrunk towards the pool of all experts of one kind."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.types import InputStats

_EXPERT = re.compile(r"(.*\.)?experts\.(\d+)\.(.+)")


def kind(local: str) -> str | None:
    """'experts.*.down_proj' of 'experts.17.down_proj'; None for a linear that is no expert."""
    match = _EXPERT.fullmatch(local)
    return f"{match[1] or ''}experts.*.{match[3]}" if match else None


class Pooled:
    """A block's statistics, an expert's shrunk when asked for: (own sum + floor x the pool's mean) / (tokens + floor) x tokens.

    An expert with `floor` tokens weighs itself and the pool alike. One without any takes the pool's word and the weight of one
    token: it is neither skipped nor rounded blindly, and it hardly pulls a scale that all experts share. Where no expert of a kind
    saw a token every channel counts the same. Other linears pass unchanged.

    Statistics under a kind's own name ("experts.*.gate_proj") are what all its experts were fed together: the Gram that each of them
    is rounded by where one for each would be too large.
    """

    def __init__(self, stats: Mapping[str, InputStats], floor: int):
        self._stats, self._floor = stats, floor
        self._pools: dict[str, InputStats] = {}
        for local, own in stats.items():
            if (group := kind(local)) is not None:
                self._pools[group] = _sum(self._pools.get(group), own)

    def __contains__(self, local: str) -> bool:
        return local in self._stats

    def tokens(self, local: str) -> int:
        """Tokens that really reached the linear."""
        return self._stats[local].tokens

    def has_own_gram(self, local: str) -> bool:
        return local in self._stats and self._stats[local].gram is not None

    def has_gram(self, local: str) -> bool:
        """A Gram of its own, or one of all experts of its kind."""
        return self.has_own_gram(local) or (local in self._stats and self.source(local) != id(self._stats[local]))

    def source(self, local: str) -> int:
        """The same number for all linears that are rounded by one Gram."""
        own, together = self._stats[local], self._stats.get(kind(local) or "")
        return id(own) if own.gram is not None or together is None or together.gram is None else id(together)

    def __getitem__(self, local: str) -> InputStats:
        own, group = self._stats[local], kind(local)
        if group is None:
            return own
        shrunk, together = _shrunk(own, self._pools[group], self._floor), self._stats.get(group)
        if own.gram is not None or together is None or together.gram is None:
            return shrunk
        return InputStats(shrunk.tokens, shrunk.abs, shrunk.square, together.gram, together.drift, None, together.held)


def _sum(so_far: InputStats | None, own: InputStats) -> InputStats:
    """A running sum of statistics; the Grams of the first argument are written. What one lacks, for no token came, is nothing to add."""
    if so_far is None:
        so_far = InputStats(0, torch.zeros_like(own.abs), torch.zeros_like(own.square), None)

    def plus(total: Tensor | None, part: Tensor | None) -> Tensor | None:
        if total is None or part is None:
            return total if part is None else part.clone()
        return total.add_(part)

    return InputStats(
        so_far.tokens + own.tokens,
        so_far.abs + own.abs,
        so_far.square + own.square,
        plus(so_far.gram, own.gram),
        plus(so_far.drift, own.drift),
        None,
        so_far.held if own.held is None else _sum(so_far.held, own.held),
    )


def _shrunk(own: InputStats, pool: InputStats, floor: int | float) -> InputStats:
    if not pool.tokens:
        even = torch.ones_like(own.square)
        return InputStats(1, even, even, None if own.gram is None else even.diag())
    share = floor if own.tokens else max(floor, 1)
    weight, tokens = share / pool.tokens, max(own.tokens, 1)
    scale = tokens / (own.tokens + share)

    def blend(mine: Tensor | None, all_: Tensor | None) -> Tensor | None:
        if all_ is None or (mine is None and own.tokens):
            return None
        return (all_ * weight if mine is None else torch.add(mine, all_, alpha=weight)).mul_(scale)

    held = None
    if own.held is not None and pool.held is not None and pool.held.tokens:
        # judged by as much of the pool as it was solved by: what an expert's own inputs gain is no fault
        held = _shrunk(own.held, pool.held, floor * own.held.tokens / tokens)
    return InputStats(
        tokens,
        (own.abs + pool.abs * weight) * scale,
        (own.square + pool.square * weight) * scale,
        blend(own.gram, pool.gram),
        blend(own.drift, pool.drift),
        None,
        held,
    )
