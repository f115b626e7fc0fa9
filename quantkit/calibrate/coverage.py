"""Which experts the calibration set reaches, by language and domain, and what to draw so that none is left unfed.

The set itself is never changed: what a reserve adds is counted apart, so that the router's own distribution still says how much an
expert matters, and the reserve only how well its inputs are known.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from quantkit.model.experts import is_experts
from quantkit.types import Batch, BlockStatistics, Json

Counts = Mapping[str, Int[Tensor, " experts"]]  # experts module, by local name -> tokens that each expert saw
USED = 0.25  # of an even share: an expert that a language or domain gives fewer tokens is not one of its own


def cells_of(batches: Sequence[Batch]) -> list[tuple[str, str]]:
    """Every (language, domain) of some batches, sorted."""
    return sorted({(labels["language"], labels["domain"]) for batch in batches for labels in batch.labels})


@contextmanager
def watch_routing(
    block: nn.Module, batches: Sequence[Batch], cells: Sequence[tuple[str, str]]
) -> Iterator[dict[str, Int[Tensor, "cells experts"]]]:
    """Counted tokens that each expert of the open block gets, by language and domain, while each batch runs once and in order.

    Works beside `observe`, which runs the batches: it reads the router's choice as the experts receive it.
    """
    counts: dict[str, Tensor] = {}
    handles = []

    def hook(local: str, experts: int) -> Callable[..., None]:
        seen = 0

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal seen
            batch = batches[seen % len(batches)]
            seen += 1
            chosen = (args[1] if len(args) > 1 else kwargs["top_k_index"]).reshape(batch.ids.numel(), -1)
            rows = torch.tensor([cells.index((one["language"], one["domain"])) for one in batch.labels])
            counted = batch.counted.reshape(-1).cpu()
            cell = rows.repeat_interleave(batch.ids.shape[1])[counted, None]
            place = cell * experts + chosen.cpu()[counted]
            counts[local] += torch.bincount(place.reshape(-1), minlength=len(cells) * experts).reshape(len(cells), experts)

        return count

    for local, module in block.named_modules():
        if is_experts(module):
            experts = len(module.down_proj)  # type: ignore[arg-type]
            counts[local] = torch.zeros(len(cells), experts, dtype=torch.long)
            handles.append(module.register_forward_pre_hook(hook(local, experts), with_kwargs=True))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def hungry(fed: Counts, floor: int) -> int:
    """Experts with fewer than `floor` tokens."""
    return sum(int((tokens < floor).sum()) for tokens in fed.values())


def top_up(natural: Counts, floor: int, draw: Callable[[], Counts | None]) -> dict[str, Int[Tensor, " experts"]]:
    """Go on drawing until every expert has `floor` tokens or the reserve is spent.

    Args:
        natural: tokens of the calibration set itself; not changed.
        floor: tokens that an expert shall have seen, both kinds together.
        draw: runs another batch of the reserve and says what it fed; None when there is none left.

    Returns:
        What the reserve fed to every expert, apart from `natural`.
    """
    more = {local: torch.zeros_like(tokens) for local, tokens in natural.items()}
    while hungry({local: natural[local] + more[local] for local in natural}, floor):
        fed = draw()
        if fed is None:
            break
        for local in more:
            more[local] = more[local] + fed[local]
    return more


def coverage_report(
    blocks: Sequence[BlockStatistics], cells: Sequence[tuple[str, str]], floor: int, pooled: int, least: int = 3
) -> list[Json]:
    """For each block with experts: its least-fed experts, and how many experts each language and domain uses.

    Args:
        floor: tokens that the reserve tops experts up to.
        pooled: tokens with which an expert weighs its own statistics and its layer's pool alike (`expert_floor`). With fewer it leans on
            the pool for the most part ("shrunk"); without any it has nothing else ("fell_back").
    """
    report = []
    for index, block in enumerate(blocks):
        for local, routing in block.routing.items():
            natural, more = routing.sum(0), block.topped_up[local]
            even = natural.sum().item() / max(len(natural), 1)
            order = sorted(range(len(natural)), key=lambda expert: (int(natural[expert]), expert))
            report.append(
                {
                    "block": index,
                    "experts": len(natural),
                    "tokens": natural.tolist(),
                    "reserve_tokens": more.tolist(),
                    "below_floor": int((natural < floor).sum()),
                    "below_floor_with_reserve": int((natural + more < floor).sum()),
                    "shrunk": int((natural + more < pooled).sum()),
                    "fell_back": int((natural + more == 0).sum()),
                    "least_fed": [
                        {
                            "expert": expert,
                            "tokens": int(natural[expert]),
                            "reserve_tokens": int(more[expert]),
                            "of_even_share": round(int(natural[expert]) / max(even, 1), 3),
                            "by": _by(cells, routing[:, expert]),
                        }
                        for expert in order[:least]
                    ],
                    "used": _used(cells, routing),
                }
            )
    return report


def _by(cells: Sequence[tuple[str, str]], tokens: Tensor) -> dict[str, int]:
    """A column of a routing table, largest first, zeros left out."""
    named = {" / ".join(cell): int(count) for cell, count in zip(cells, tokens, strict=True) if count}
    return dict(sorted(named.items(), key=lambda item: -item[1]))


def _used(cells: Sequence[tuple[str, str]], routing: Tensor) -> Json:
    """For each language and each domain: how many experts it uses, and the four that it uses most."""
    used: Json = {}
    for place, kind in enumerate(("language", "domain")):
        for name in sorted({cell[place] for cell in cells}):
            tokens = routing[[number for number, cell in enumerate(cells) if cell[place] == name]].sum(0)
            even = tokens.sum().item() / max(len(tokens), 1)
            most = sorted(range(len(tokens)), key=lambda expert: (-int(tokens[expert]), expert))[:4]
            used.setdefault(kind, {})[name] = {"experts": int((tokens >= max(USED * even, 1)).sum()), "most": most}
    return used
