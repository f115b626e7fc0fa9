"""One open block's statistics: the calibration set through it, then as much of the reserve as its hungriest expert needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from quantkit.calibrate.coverage import top_up, watch_routing
from quantkit.calibrate.observe import observe
from quantkit.model.blocks import Skeleton, State, Stream
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
    with watch_routing(block, stream.batches, cells) as routing:
        inputs = observe(stream, block, state, move=True)
    natural = {local: counts.sum(0) for local, counts in routing.items()}
    wanting = {f"{local}.{expert}." for local, tokens in natural.items() for expert in (tokens < floor).nonzero().flatten().tolist()}
    more: dict[str, InputStats] = {}
    number = 0

    def draw() -> Mapping[str, Tensor] | None:
        nonlocal number, more
        if number == len(reserve.streams):
            return None
        waiting, number = reserve.streams[number], number + 1
        with watch_routing(block, waiting.batches, cells) as fed:
            found = observe(waiting, block, reserve.states[number - 1], wanted=(), move=True)
        more = _sum(more, {local: s for local, s in found.items() if s.tokens and local.startswith(tuple(wanting))})
        return {local: counts.sum(0) for local, counts in fed.items()}

    topped_up = top_up(natural, floor, draw)
    for left in range(number, len(reserve.streams)):
        reserve.streams[left].advance(block, reserve.states[left])
    for each in (stream, *reserve.streams):
        each.close()
    return BlockStatistics(inputs if grams else _lean(inputs), more if grams else _lean(more), dict(routing), topped_up)


def _sum(ours: Mapping[str, InputStats], theirs: Mapping[str, InputStats]) -> dict[str, InputStats]:
    total = dict(ours)
    for local, one in theirs.items():
        had = ours.get(local)
        gram = one.gram if had is None or had.gram is None or one.gram is None else had.gram + one.gram
        total[local] = InputStats(had.tokens + one.tokens, had.abs + one.abs, had.square + one.square, gram) if had else one
    return total


def _lean(inputs: Mapping[str, InputStats]) -> dict[str, InputStats]:
    """Without Grams; linears that shared their statistics still do."""
    lean: dict[int, InputStats] = {}
    for one in inputs.values():
        lean.setdefault(id(one), replace(one, gram=None))
    return {local: lean[id(one)] for local, one in inputs.items()}
