"""AWQ scales from statistics: no forward pass inside the search.

A fold moves a scale s per channel from a producer (a norm's gain, a linear's rows) into the columns of its consumers. What it costs a
consumer with weight W and input second moments h is sum_rj v_r h_j (Q(W s)/s - W)_rj^2 (v: how much a row matters to what comes
after), the diagonal of tr(dW G dW^T); rounding errors of different channels are uncorrelated, so the diagonal picks as the full Gram
does. Candidates follow AWQ (Lin et al. 2023, section 3.2) in its two-sided form: s = a^alpha / m^(1-alpha), a the mean |input|, m the
mean magnitude of a column within its groups.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from quantkit.solve import ranges
from quantkit.types import FoldReport, Scheme

CLIPS_IN_SEARCH = 4  # a candidate is judged with its ranges searched, coarsely
CHUNK = 1 << 18  # weights at a time: temporaries stay in the cache
WIDEST = 2.0**10  # a scale beyond this would leave a norm without resolution


@dataclass(frozen=True, slots=True)
class Consumer:
    """Linears of one scheme that read a fold's channels, on the rows that the search judges."""

    weight: Float[Tensor, "rows in"]
    # second moment of the inputs, times tokens, times how much a row matters; one row where all rows have the same
    importance: Float[Tensor, "#rows in"]
    scheme: Scheme
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Choice:
    """The scale that won, as it acts on producer's channels, and how."""

    scale: Float[Tensor, " channels"]
    report: FoldReport


def every_nth(weight: Float[Tensor, "out in"], rows: int) -> Float[Tensor, "rows in"]:
    """At most `rows` rows, evenly spread, in fp32: enough to rank candidates, whatever the matrix's height."""
    if len(weight) <= rows:
        return weight.float()
    return weight[torch.linspace(0, len(weight) - 1, rows).round().long().to(weight.device)].float()


def norm_fold(
    weight: Float[Tensor, " channels"], offset: float, scale: Float[Tensor, " channels"]
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """The norm's stored weight after 1/scale, and the scale that the rounding of that weight really leaves to the consumers.

    The stored value is rounded first and the scale recomputed from it, so the fold is exact in the stored dtype; also where a norm
    stores w and multiplies by 1 + w (offset 1). A channel whose gain is or would become zero is left alone.
    """
    gain = offset + weight.float()
    stored = (gain / scale - offset).to(weight.dtype)
    left = offset + stored.float()
    alive = (gain != 0) & (left != 0) & left.isfinite()
    return torch.where(alive, stored, weight), torch.where(alive, gain / left, torch.ones_like(gain))


def choose_scale(
    producer: str,
    consumers: Sequence[Consumer],
    mean_abs: Float[Tensor, " in"],
    channels: int,
    head: int,
    exponents: int,
    realize: Callable[[Float[Tensor, " channels"]], Float[Tensor, " channels"]],
) -> Choice:
    """The candidate with the smallest joint loss over all consumers; identity is one of them and wins ties.

    Args:
        producer: its name, for the report.
        consumers: all linears that read the channels; the sum of their losses decides.
        mean_abs: mean |input| of the consumers' columns.
        channels: the producer's channels; fewer than columns where heads of width `head` repeat (see `over_columns`).
        exponents: steps of alpha between 0 and 1.
        realize: a wished scale -> the one that the producer can store.
    """
    columns = len(mean_abs)
    mean_abs = _over_channels(mean_abs, channels, head)
    magnitude = _over_channels(_magnitude(consumers), channels, head)

    def loss(scale: Tensor) -> float:
        spread = over_columns(scale, columns, head)
        return sum(_loss(consumer, spread) for consumer in consumers)

    best, exponent = torch.ones(channels, device=mean_abs.device), None
    unfolded = least = loss(best)
    for alpha, wished in _candidates(mean_abs, magnitude, exponents):
        scale = realize(wished)
        value = loss(scale)
        if value < least:
            best, exponent, least = scale, (alpha, 1 - alpha), value
    bounds = (float(best.min()), float(best.max()))
    return Choice(best, FoldReport(producer, exponent, bounds, least / unfolded if unfolded else 1.0))


def choose_alike(
    producers: Sequence[str],
    consumers: Sequence[Consumer],
    mean_abs: Sequence[Float[Tensor, " in"]],
    exponents: int,
    realize: Callable[[Float[Tensor, " in"]], Float[Tensor, " in"]],
) -> list[Choice]:
    """`choose_scale` for many producers with one consumer each, of one shape and scheme (a layer's experts): searched side by side.

    Dozens of experts cost what one does where a matrix is too small to keep the machine busy.
    """
    first = consumers[0]
    weight, importance = torch.stack([c.weight for c in consumers]), torch.stack([c.importance for c in consumers])
    candidates = [list(_candidates(fed, _magnitude([consumer]), exponents)) for fed, consumer in zip(mean_abs, consumers, strict=True)]
    best = torch.ones(len(consumers), weight.shape[-1], device=weight.device)
    unfolded = least = _losses(weight, importance, best, first)
    chosen: list[tuple[float, float] | None] = [None] * len(consumers)
    for step in range(exponents):
        alive = [number for number, found in enumerate(candidates) if found]
        if not alive:
            break
        scale = best.clone()
        for number in alive:
            scale[number] = realize(candidates[number][step][1])
        value = _losses(weight, importance, scale, first)
        for number in alive:
            if value[number] < least[number]:
                alpha = candidates[number][step][0]
                chosen[number] = alpha, 1 - alpha
        wins = value < least
        best, least = torch.where(wins[:, None], scale, best), torch.where(wins, value, least)
    ratios = torch.where(unfolded > 0, least / unfolded, 1.0).tolist()
    return [
        Choice(best[number], FoldReport(name, chosen[number], (float(best[number].min()), float(best[number].max())), ratios[number]))
        for number, name in enumerate(producers)
    ]


def over_columns(scale: Float[Tensor, " channels"], columns: int, head: int) -> Float[Tensor, " in"]:
    """The producer's scale on a consumer's columns. Where a value head serves several query heads (GQA), its `head` channels repeat."""
    if len(scale) == columns:
        return scale
    return scale.view(-1, 1, head).expand(-1, columns // len(scale), head).reshape(-1)


def _over_channels(value: Float[Tensor, " in"], channels: int, head: int) -> Float[Tensor, " channels"]:
    if len(value) == channels:
        return value
    return value.view(-1, len(value) // channels, head).mean(1).reshape(-1)


def _candidates(mean_abs: Tensor, magnitude: Tensor, exponents: int) -> Iterator[tuple[float, Tensor]]:
    alive = (mean_abs > 0) & (magnitude > 0)
    if not alive.any():
        return
    for step in range(exponents):
        alpha = step / (exponents - 1)
        scale = mean_abs.clamp(min=1e-30) ** alpha / magnitude.clamp(min=1e-30) ** (1 - alpha)
        scale = scale / scale[alive].median()  # of live channels: a dead one must not move all others
        yield alpha, torch.where(alive, scale.clamp(1 / WIDEST, WIDEST), torch.ones_like(scale))


def _magnitude(consumers: Sequence[Consumer]) -> Float[Tensor, " in"]:
    """Mean over rows of |w| relative to the largest of its group: AWQ's measure of a column."""
    total, rows = torch.zeros(consumers[0].weight.shape[1], device=consumers[0].weight.device), 0
    for consumer in consumers:
        rows_of, columns = consumer.weight.shape
        grouped = consumer.weight.abs().view(rows_of, -1, consumer.scheme.width(columns))
        total += (grouped / grouped.amax(-1, keepdim=True).clamp(min=1e-30)).view(rows_of, columns).sum(0)
        rows += rows_of
    return total / rows


def _loss(consumer: Consumer, scale: Float[Tensor, " in"]) -> float:
    """Ranges are searched coarsely and with one sign only: enough to rank scales."""
    rows, columns = consumer.weight.shape
    width = consumer.scheme.width(columns)
    scheme = replace(consumer.scheme, signed=False)
    total, step = 0.0, max(1, CHUNK // columns)
    for start in range(0, rows, step):
        grouped = (consumer.weight[start : start + step] * scale).view(-1, columns // width, width)
        own = consumer.importance if len(consumer.importance) == 1 else consumer.importance[start : start + step]
        importance = (own / scale.square()).view(-1, columns // width, width)
        *_, error = ranges.search(grouped, importance, scheme, consumer.dtype, CLIPS_IN_SEARCH, refits=1)
        total += float(error.sum(dtype=torch.float64))
    return total


def _losses(
    weight: Float[Tensor, "stack rows in"], importance: Float[Tensor, "stack _ in"], scale: Float[Tensor, "stack in"], like: Consumer
) -> Float[Tensor, " stack"]:
    """`_loss` of every matrix of a stack."""
    stack, rows, columns = weight.shape
    width, scheme = like.scheme.width(columns), replace(like.scheme, signed=False)
    losses, step = [], max(1, CHUNK // (rows * columns))
    for start in range(0, stack, step):
        spread = scale[start : start + step, None]
        grouped = (weight[start : start + step] * spread).unflatten(-1, (-1, width))
        share = (importance[start : start + step] / spread.square()).unflatten(-1, (-1, width))
        *_, error = ranges.search(grouped, share, scheme, like.dtype, CLIPS_IN_SEARCH, refits=1)
        losses.append(error.flatten(1).sum(1, dtype=torch.float64))
    return torch.cat(losses)
