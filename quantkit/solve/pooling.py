"""Experts that saw few tokens lean on their layer: statistics shrunk towards the pool of all experts of one kind."""

import re
from collections.abc import Mapping

import torch

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
    """

    def __init__(self, stats: Mapping[str, InputStats], floor: int):
        self._stats, self._floor = stats, floor
        self._pools: dict[str, InputStats] = {}
        for local, own in stats.items():
            if (group := kind(local)) is None:
                continue
            so_far = self._pools.get(group)
            if so_far is None:
                blank = None if own.gram is None else torch.zeros_like(own.gram)
                so_far = InputStats(0, torch.zeros_like(own.abs), torch.zeros_like(own.square), blank)
            if so_far.gram is not None and own.gram is not None:
                so_far.gram.add_(own.gram)
            self._pools[group] = InputStats(so_far.tokens + own.tokens, so_far.abs + own.abs, so_far.square + own.square, so_far.gram)

    def __contains__(self, local: str) -> bool:
        return local in self._stats

    def tokens(self, local: str) -> int:
        """Tokens that really reached the linear."""
        return self._stats[local].tokens

    def __getitem__(self, local: str) -> InputStats:
        own, group = self._stats[local], kind(local)
        if group is None:
            return own
        pool = self._pools[group]
        if not pool.tokens:
            return InputStats(1, torch.ones_like(own.abs), torch.ones_like(own.square), None)
        share = self._floor if own.tokens else max(self._floor, 1)
        weight, tokens = share / pool.tokens, max(own.tokens, 1)
        scale = tokens / (own.tokens + share)
        gram = None
        if own.gram is not None and pool.gram is not None:
            gram = torch.add(own.gram, pool.gram, alpha=weight).mul_(scale)
        return InputStats(tokens, (own.abs + pool.abs * weight) * scale, (own.square + pool.square * weight) * scale, gram)
