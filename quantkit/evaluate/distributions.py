"""A model's next-token distributions, kept small enough for a disk, and what another model's differ from them.

Of each distribution the likeliest tokens are kept, until no more than `tail` of probability is left or `most` tokens are; the rest is
one number, the log of its sum. Against a distribution that is known in full the rest is compared as one lump, so that

    lumped KL  <=  KL  <=  lumped KL + bound

(log-sum inequality below; above, no left-out token is likelier than the last one kept, and none has less than the other model's least).
The bound is kept for every token and stated with the mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

FLOOR = -1e4  # of a log-probability: an impossible token costs that much, not infinity


@dataclass(frozen=True, slots=True)
class Kept:
    """Distributions at the positions of one row."""

    counts: Int[Tensor, " positions"]  # tokens kept at each position
    ids: Int[Tensor, " kept"]  # likeliest first, position after position
    log_p: Float[Tensor, " kept"]  # fp32
    rest: Float[Tensor, " positions"]  # fp64, log of what is left; -inf where nothing is
    actual: Float[Tensor, " positions"]  # log-probability of the token that follows
    finite: Bool[Tensor, " positions"]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True, slots=True)
class Difference:
    """What another model's distributions differ by, at each position of a row."""

    kl: Float[Tensor, " positions"]  # KL(base || other), nats, what was left out taken as one lump
    bound: Float[Tensor, " positions"]  # the true KL is at most so much more
    nll_base: Float[Tensor, " positions"]
    nll: Float[Tensor, " positions"]
    same_top: Bool[Tensor, " positions"]
    right_base: Bool[Tensor, " positions"]  # the likeliest token is the one that follows
    right: Bool[Tensor, " positions"]
    finite_base: Bool[Tensor, " positions"]
    finite: Bool[Tensor, " positions"]


def is_finite(log_p: Float[Tensor, "positions vocabulary"]) -> Bool[Tensor, " positions"]:
    """Where a model gave numbers. A token may be impossible (-inf), not all of them, and nothing may be NaN."""
    return (log_p.max(-1).values > -torch.inf) & ~log_p.isnan().any(-1) & (log_p < torch.inf).all(-1)


def keep(log_p: Float[Tensor, "positions vocabulary"], following: Int[Tensor, " positions"], tail: float = 1e-4, most: int = 8192) -> Kept:
    """The likeliest tokens of each distribution. A vocabulary of at most `most` tokens with `tail` 0 is kept whole."""
    finite = is_finite(log_p)
    log_p = _cleaned(log_p, finite)
    likeliest, ids = log_p.topk(min(most, log_p.shape[1]), -1)
    mass = likeliest.double().exp().cumsum(-1)
    total = log_p.double().exp().sum(-1)
    enough = total[:, None] - mass <= tail if tail else torch.zeros_like(mass, dtype=torch.bool)
    counts = torch.where(enough.any(-1), enough.int().argmax(-1) + 1, likeliest.shape[1])
    chosen = torch.arange(likeliest.shape[1])[None] < counts[:, None]
    kept = ids[chosen]
    return Kept(counts.int(), kept.int(), likeliest[chosen], _log_rest(log_p, counts, kept), _at(log_p, following), finite)


def difference(base: Kept, log_q: Float[Tensor, "positions vocabulary"], following: Int[Tensor, " positions"]) -> Difference:
    """Another model's distributions, known in full, beside a kept one's at the same positions."""
    finite = is_finite(log_q)
    log_q = _cleaned(log_q, finite)
    rows = _rows(base.counts)
    log_p, log_other = base.log_p.double(), log_q[rows, base.ids.long()].double()
    # - p + q keeps every term at or above zero, and sums to nothing with that of the rest
    terms = log_p.exp() * (log_p - log_other) - log_p.exp() + log_other.exp()
    kl = torch.zeros(len(base.counts), dtype=torch.float64).index_add_(0, rows, terms)
    rest_q, partly = _log_rest(log_q, base.counts, base.ids), base.rest > -torch.inf
    p, q = base.rest.exp(), rest_q.exp()
    lump = torch.where(partly, p * (base.rest - rest_q) - p + q, 0.0)
    last = base.log_p.double()[base.counts.long().cumsum(0) - 1]
    dearest = p * (torch.minimum(last, base.rest) - log_q.min(-1).values.double()) - p + q
    top = base.ids.long()[base.counts.long().cumsum(0) - base.counts]
    other_top = log_q.argmax(-1)
    return Difference(
        kl=(kl + lump).clamp(min=0),
        bound=torch.where(partly, (dearest - lump).clamp(min=0), 0.0),
        nll_base=-base.actual.double(),
        nll=-_at(log_q, following).double(),
        same_top=top == other_top,
        right_base=top == following,
        right=other_top == following,
        finite_base=base.finite,
        finite=finite,
    )


def joined(parts: Sequence[Difference]) -> Difference:
    """Rows one after the other."""
    return Difference(*(torch.cat([getattr(part, name) for part in parts]) for name in Difference.__dataclass_fields__))


def _cleaned(log_p: Tensor, finite: Tensor) -> Tensor:
    """Without infinities; where the model gave none but nonsense, an even distribution stands in (it is counted, and fails any gate)."""
    even = torch.full((), -float(torch.tensor(float(log_p.shape[1])).log()))
    return torch.where(finite[:, None], log_p.float().clamp(min=FLOOR), even)


def _rows(counts: Tensor) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(counts)), counts.long())


def _at(log_p: Tensor, following: Tensor) -> Tensor:
    return log_p.gather(1, following[:, None].long())[:, 0]


def _log_rest(log_p: Tensor, counts: Tensor, ids: Tensor) -> Tensor:
    """Log of the probability of all tokens that were not kept, summed one by one: a difference of sums would lose a small rest, and a
    rest that no double holds would lie infinitely far."""
    rest = log_p.double()
    rest[_rows(counts), ids.long()] = -torch.inf
    return torch.where(counts == log_p.shape[1], -torch.inf, rest.logsumexp(-1))
