"""How far one model's next-token distribution is from another's: KL, agreement, and what each pays for the real next token.

Figures are sums over tokens in nats, kept by language and domain; perplexity is exp of the mean negative log-likelihood.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from quantkit.types import Json


@dataclass(slots=True)
class Score:
    """Sums over scored tokens."""

    tokens: int = 0
    kl: float = 0.0  # KL(base || other), nats
    nll_base: float = 0.0
    nll: float = 0.0
    same_top: int = 0

    def add(self, other: "Score") -> None:
        self.tokens += other.tokens
        self.kl += other.kl
        self.nll_base += other.nll_base
        self.nll += other.nll
        self.same_top += other.same_top

    def as_json(self) -> Json:
        n = max(self.tokens, 1)
        return {
            "tokens": self.tokens,
            "kl": min(self.kl / n, sys.float_info.max),  # JSON has no infinity
            "perplexity_base": math.exp(min(self.nll_base / n, 700)),
            "perplexity": math.exp(min(self.nll / n, 700)),
            "same_top": self.same_top / n,
        }


@dataclass(slots=True)
class Scores:
    """A score for everything, for each language and for each domain."""

    total: Score = field(default_factory=Score)
    by: dict[str, dict[str, Score]] = field(default_factory=lambda: {"language": {}, "domain": {}})

    def add(self, score: Score, labels: Mapping[str, str]) -> None:
        self.total.add(score)
        for kind, table in self.by.items():
            table.setdefault(labels.get(kind, "unknown"), Score()).add(score)

    def as_json(self) -> Json:
        tables = {f"by_{kind}": {name: score.as_json() for name, score in sorted(table.items())} for kind, table in self.by.items()}
        return {**self.total.as_json(), **tables}


def compare(
    base: Float[Tensor, "tokens vocabulary"],
    other: Float[Tensor, "tokens vocabulary"],
    following: Int[Tensor, " tokens"],
    counted: Bool[Tensor, " tokens"],
) -> Score:
    """Two models' logits at the same positions of one row. `following` holds the next tokens, `counted` says where one is real."""
    base, other, following = base[counted].float(), other[counted].float(), following[counted]
    if not len(following):
        return Score()
    log_p, log_q = base.log_softmax(-1), other.log_softmax(-1)
    p = log_p.exp()
    # - p + q sums to nothing and keeps every term at or above zero: what is left of rounding cannot turn a tiny KL negative
    kl = (torch.where(p > 0, p * (log_p - log_q), torch.zeros(())) - p + log_q.exp()).sum(dtype=torch.float64)
    at = following[:, None]
    return Score(
        tokens=len(following),
        kl=float(kl),
        nll_base=-float(log_p.gather(1, at).sum(dtype=torch.float64)),
        nll=-float(log_q.gather(1, at).sum(dtype=torch.float64)),
        same_top=int((base.argmax(-1) == other.argmax(-1)).sum()),
    )
