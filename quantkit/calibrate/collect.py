"""One open block's statistics: the calibration set through it, then as much of the reserve as its hungriest expert needs.

Plain sums over tokens, for files that others read; what the solver wants to know beyond them is `observe`'s business.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.calibrate.coverage import top_up, watch_routing
from quantkit.model.blocks import Skeleton
from quantkit.model.experts import is_experts
from quantkit.model.streams import State, Stream
from quantkit.types import Batch, BlockStatistics, InputStats


@dataclass(slots=True)
class Reserve:
    """Batches that every block may draw on: each a stream of its own, so that a block takes as many as it needs."""

    streams: list[Stream]
    states: list[State]

    @classmethod
    def start(cls, skeleton: Skeleton, batches: Sequence[Batch]) -> "Reserve":
        streams = [Stream(skeleton, [batch]) for batch in batches]
        return cls(streams, [stream.start() for stream in streams])

    def fork(self) -> "Reserve":
        """The same batches with states of their own: another prefix that they run behind."""
        return Reserve(self.streams, [state.fork() for state in self.states])

    def advance(self, block: nn.Module) -> None:
        for stream, state in zip(self.streams, self.states, strict=True):
            stream.advance(block, state)


def collect(
    stream: Stream,
    block: nn.Module,
    state: State,
    reserve: Reserve,
    cells: Sequence[tuple[str, str]],
    floor: int,
    grams: bool = False,
) -> BlockStatistics:
    """The open block's statistics; stream and reserve stand behind it afterwards.

    Args:
        cells: every (language, domain) of the stream and the reserve.
        floor: tokens that an expert shall have seen; those with fewer take from the reserve, kept apart.
        grams: keep x x^T too, the size of a block and more.
    """
    inputs, routing = _fed(stream, block, state, cells, grams)
    natural = {local: counts.sum(0) for local, counts in routing.items()}
    wanting = unfed(natural, floor)
    more: dict[str, InputStats] = {}
    waiting = iter(zip(reserve.streams, reserve.states, strict=True))

    def draw() -> Mapping[str, Tensor] | None:
        nonlocal more
        for spare, spare_state in waiting:
            found, routed = _fed(spare, block, spare_state, cells, grams)
            more = added(more, {local: one for local, one in found.items() if one.tokens and local.rpartition(".")[0] in wanting})
            return {local: counts.sum(0) for local, counts in routed.items()}
        return None

    topped_up = top_up(natural, floor, draw)
    for spare, spare_state in waiting:
        spare.advance(block, spare_state)
    for each in (stream, *reserve.streams):
        each.close()
    return BlockStatistics(inputs, more, routing, topped_up)


def unfed(natural: Mapping[str, Tensor], floor: int) -> set[str]:
    """Experts below the floor, by local name."""
    return {f"{local}.{expert}" for local, tokens in natural.items() for expert in (tokens < floor).nonzero().flatten().tolist()}


def added(ours: Mapping[str, InputStats], theirs: Mapping[str, InputStats]) -> dict[str, InputStats]:
    """Sums of both, linear by linear; a sum that one of the two lacks is not there."""
    return {**ours, **{local: _plus(ours[local], one) if local in ours else one for local, one in theirs.items()}}


def _plus(one: Any, other: Any) -> Any:
    if one is None or other is None:
        return None
    if isinstance(one, InputStats):
        if not one.tokens or not other.tokens:  # sums that come with the first token are zero, not unknown
            return replace(one if one.tokens else other, held=one.held)
        sums = {part.name: _plus(getattr(one, part.name), getattr(other, part.name)) for part in fields(InputStats)}
        return InputStats(**{**sums, "held": one.held})  # what is kept for judging stays the calibration set's own
    return one + other


@dataclass(slots=True)
class _Sums:
    width: int
    has_gram: bool
    device: torch.device
    tokens: int = 0
    abs: Tensor = field(init=False)
    square: Tensor = field(init=False)
    gram: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        self.abs, self.square = torch.zeros(self.width, device=self.device), torch.zeros(self.width, device=self.device)
        self.gram = torch.zeros(self.width, self.width, device=self.device) if self.has_gram else None

    def add(self, x: Tensor) -> None:
        x = x.float()
        self.tokens += len(x)
        self.abs += x.abs().sum(0)
        self.square += x.square().sum(0)
        if self.gram is not None:
            self.gram.addmm_(x.T, x)  # in place: there is never a second Gram


def _fed(
    stream: Stream, block: nn.Module, state: State, cells: Sequence[tuple[str, str]], grams: bool
) -> tuple[dict[str, InputStats], dict[str, Tensor]]:
    """(statistics of every linear and expert, routing tables) of a stream, which moves on; uncounted tokens are read and left out."""
    with watch_routing(block, stream.batches, cells) as routing, _watching(block, grams) as watch:
        for number, batch in enumerate(stream.batches):
            watch.counted, watch.last = batch.counted.reshape(-1), (None, "")
            state.pass_on(number, stream.run(block, state, number))
    stats = {local: InputStats(s.tokens, s.abs, s.square, s.gram) for local, s in watch.sums.items()}
    return stats | {local: stats[first] for local, first in watch.same.items()}, routing


@dataclass(slots=True)
class _Watch:
    grams: bool
    sums: dict[str, _Sums] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)  # linear -> the one before it that is given the same tensor
    counted: Tensor = field(default_factory=lambda: torch.empty(0))
    last: tuple[Tensor | None, str] = (None, "")

    def linear(self, local: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self.last[0] is args[0]:
                self.same[local] = self.last[1]
                return
            self.last = args[0], local
            x = args[0].reshape(-1, args[0].shape[-1])
            self.sums.setdefault(local, _Sums(x.shape[-1], self.grams, x.device)).add(x[self.counted])

        return hook

    def expert(self, local: str) -> Callable[[str, int, Tensor, Tensor], None]:
        def watch(leaf: str, expert: int, token: Tensor, x: Tensor) -> None:
            self.sums[f"{local}.{expert}.{leaf}"].add(x[self.counted[token]])

        return watch

    def experts(self, local: str, count: int, hidden: int, width: int) -> None:
        """Places for all experts, for some may see no token. Grams of their gate and up would be the size of the model."""
        for expert in range(count):
            self.sums[f"{local}.{expert}.gate_proj"] = _Sums(hidden, False, self.counted.device)
            self.sums[f"{local}.{expert}.down_proj"] = _Sums(width, self.grams, self.counted.device)
            self.same[f"{local}.{expert}.up_proj"] = f"{local}.{expert}.gate_proj"


@contextmanager
def _watching(block: nn.Module, grams: bool) -> Iterator[_Watch]:
    watch, handles = _Watch(grams), []
    for local, module in block.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(watch.linear(local)))
        elif is_experts(module):
            watch.experts(local, *module.down_proj.shape)  # type: ignore[union-attr, arg-type]
            module.watcher = watch.expert(local)  # type: ignore[assignment]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
        for module in block.modules():
            module.__dict__.pop("watcher", None)
