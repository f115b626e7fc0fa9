"""Several processes at one run, as torchrun starts them: which batches are whose, what is summed, who tells the others what.

One process is rank 0 of 1: the same calls, and nobody to ask. What passes between ranks is tensors and JSON, never pickled objects.
Whatever a rank sums or solves, it does as one rank would, operation by operation: the artefacts have the same bytes.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from quantkit.errors import GONE, RankError
from quantkit.types import InputStats

T = TypeVar("T")
Part = tuple[str, bool, bool, Mapping[str, Tensor]]  # as `calibrate.observe` shows them
PATIENCE = timedelta(hours=2)  # one rank may hash a checkpoint or pick schemes while the others wait
CPU = torch.device("cpu")
SUMS = tuple(part.name for part in fields(InputStats) if part.name not in ("tokens", "held"))


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of its run, and the device that it computes on."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @classmethod
    @contextmanager
    def join(cls, device: str = "auto") -> "Iterator[Ranks]":
        """Meet the other ranks by torchrun's environment variables; without them this process is alone.

        Args:
            device: auto (CUDA where there is one), cpu, cuda, or a device of torch by its name. Of several GPUs a rank takes its own.

        Raises:
            RankError: the device is not there, or the ranks do not meet.
        """
        place = _device(device)
        if started() == 1:
            yield cls(device=place)
            return
        ours = not dist.is_initialized()
        try:
            if ours:
                dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as problem:
            raise RankError(f"the ranks do not meet ({_line(problem)}); start them with torchrun") from None
        try:
            yield cls(dist.get_rank(), dist.get_world_size(), place)
        finally:
            if ours:
                dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """The one that reads and writes the run's folder."""
        return self.rank == 0

    @property
    def first_here(self) -> bool:
        """The one of its machine that looks at what all of them read."""
        return self.size == 1 or os.environ.get("LOCAL_RANK", "0") == "0"

    def share(self, things: Sequence[T]) -> Sequence[T]:
        """Every `size`-th: batches lie by length, so that all ranks get as much to do."""
        return things[self.rank :: self.size]

    def has(self, number: int) -> bool:
        """Whether the thing of that number is in this rank's share."""
        return number % self.size == self.rank

    def turns(self) -> Iterator[bool]:
        """For one thing after the other: whether it is this rank's to do."""
        number = 0
        while True:
            yield self.has(number)
            number += 1

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of whole numbers over all ranks, in place."""
        if self.size > 1:
            with _one_line():
                dist.all_reduce(tensor)
        return tensor

    def union(self, stats: Mapping[str, InputStats]) -> dict[str, InputStats]:
        """Each rank's own statistics, on all ranks; linears that share sums share them afterwards."""
        if self.size == 1:
            return dict(stats)
        first = _firsts(stats)
        mine = {local: one for local, one in stats.items() if first[local] == local}
        tensors = self.gathered({f"{local}/{name}": tensor for local, one in mine.items() for name, tensor in _sums(one)})
        told = self.told([first, {local: _tokens(one) for local, one in mine.items()}])
        whole = {local: _joined(tokens, local, tensors) for _, counts in told for local, tokens in counts.items()}
        return {local: whole[of] for firsts, _ in told for local, of in firsts.items()}

    def swap(self) -> "Swap":
        """A hand-over of inputs for one observation."""
        return Swap(self)

    def told(self, mine: Any) -> list[Any]:
        """What every rank has to say, in their order, as JSON."""
        if self.size == 1:
            return [mine]
        said = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
        lengths = torch.zeros(self.size, dtype=torch.long)
        lengths[self.rank] = len(said)
        with _one_line():
            dist.all_reduce(lengths)
            padded = torch.zeros(int(lengths.max()), dtype=torch.uint8)
            padded[: len(said)] = said
            heard = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(heard, padded)
        return [json.loads(bytes(one[:length].tolist())) for one, length in zip(heard, lengths.tolist(), strict=True)]

    def agreed(self, mine: dict[str, str] | None) -> dict[str, str]:
        """What the ranks that look say, all of them the same.

        Raises:
            RankError: two machines read other files.
        """
        told = [one for one in self.told(mine) if one is not None]
        for other in told[1:]:
            if wrong := sorted(name for name in {*told[0], *other} if told[0].get(name) != other.get(name)):
                raise RankError(f"{wrong[0]}: differs from one machine of this run to another; give all of them the same files")
        return dict(told[0])

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all ranks; no name is given by two. A tensor under two names comes as one tensor under both."""
        if self.size == 1:
            return dict(tensors)
        firsts: dict[int, str] = {}
        same = {name: firsts.setdefault(id(tensor), name) for name, tensor in tensors.items()}
        mine = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items() if same[name] == name}
        found: dict[str, Tensor] = {}
        for source, (names, layout) in enumerate(self.told([same, mine])):
            made = {}
            for name, (dtype, shape) in layout.items():
                own = tensors[name].to(self.device).contiguous() if source == self.rank else None
                made[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device) if own is None else own
                with _one_line():
                    dist.broadcast(made[name], source)
            found |= {name: made[of] for name, of in names.items()}
        return found


class Swap:
    """Hands every linear's inputs to the rank that sums them, batch after batch in the order of one rank: the same sums to the bit.

    Sums of sums would be less to send where tokens are many, and add in another order than one rank does: solutions that build on one
    another turn the last bit of a Gram into other integers, more of them with every block (docs/ranks.md).
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.owners: dict[str, int] = {}  # linear -> rank, in turn as they come

    def __call__(self, parts: Sequence[Part]) -> Sequence[Part]:
        ranks = self.ranks
        if ranks.size == 1:
            return parts
        told = ranks.told([[local, hold, gram, _layout(tensors)] for local, hold, gram, tensors in parts])
        for local in sorted({one[0] for ones in told for one in ones} - self.owners.keys()):
            self.owners[local] = len(self.owners) % ranks.size
        buffers: dict[int, Tensor] = {}
        calls = []
        for other in range(ranks.size):
            if other == ranks.rank:
                continue
            mine = [tensor for local, _, _, tensors in parts if self.owners[local] == other for tensor in tensors.values()]
            if mine:
                calls.append(dist.P2POp(dist.isend, _as_bytes(mine), other))
            if size := sum(_bytes(layout) for local, _, _, layout in told[other] if self.owners[local] == ranks.rank):
                buffers[other] = torch.empty(size, dtype=torch.uint8, device=ranks.device)
                calls.append(dist.P2POp(dist.irecv, buffers[other], other))
        with _one_line():
            for request in dist.batch_isend_irecv(calls) if calls else ():
                request.wait()
        found: list[Part] = []
        for source, ones in enumerate(told):
            at = 0
            for number, (local, hold, gram, layout) in enumerate(ones):
                if self.owners[local] != ranks.rank:
                    continue
                if source == ranks.rank:
                    found.append(parts[number])
                    continue
                tensors = {}
                for name, (dtype, shape) in layout.items():
                    size = _bytes({name: (dtype, shape)})
                    tensors[name] = buffers[source][at : at + size].clone().view(getattr(torch, dtype)).view(shape)
                    at += size
                found.append((local, hold, gram, tensors))
        return found

    def gathered(self, stats: Mapping[str, InputStats]) -> dict[str, InputStats]:
        """What each rank summed, on all ranks, in the order of `stats`."""
        if self.ranks.size == 1:
            return dict(stats)
        first = _firsts(stats)
        whole = self.ranks.union({local: one for local, one in stats.items() if self._owner(first[local]) == self.ranks.rank})
        order = [local for local in stats if local in whole]  # experts stand in one order on all ranks: pools add them up in it
        return {local: whole[local] for local in (*order, *sorted(whole.keys() - set(order)))}

    def _owner(self, local: str) -> int:
        """Who sums a linear; an expert's gate and up are summed with the input of all experts, from which they take their share."""
        together = re.sub(r"(^|\.)experts\.\d+\.", r"\1experts.*.", local)
        return self.owners.get(local, self.owners.get(together, 0))


def started() -> int:
    """How many processes torchrun started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def told_already() -> bool:
    """Whether another rank of this torchrun has said what is wrong: one line is enough."""
    if started() == 1:
        return False
    try:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*place, is_master=False, timeout=timedelta(seconds=5))
        return int(store.add(f"quantkit told {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1)) > 1
    except (RuntimeError, KeyError, ValueError):  # nobody keeps count: better twice than never
        return False


def _layout(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, list[int]]]:
    return {name: (str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in tensors.items()}


def _bytes(layout: Mapping[str, tuple[str, Sequence[int]]]) -> int:
    return sum(getattr(torch, dtype).itemsize * math.prod(shape) for dtype, shape in layout.values())


def _as_bytes(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])


def _firsts(stats: Mapping[str, InputStats]) -> dict[str, str]:
    """Of every linear the first that has the very same sums."""
    seen: dict[int, str] = {}
    return {local: seen.setdefault(id(one), local) for local, one in stats.items()}


def _sums(stats: InputStats, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, sum) of all that are there, those of held rows under "held/"."""
    for name in SUMS:
        if (tensor := getattr(stats, name)) is not None:
            yield prefix + name, tensor
    if stats.held is not None:
        yield from _sums(stats.held, f"{prefix}held/")


def _tokens(stats: InputStats) -> list[int]:
    """Its tokens; those of its held rows behind them."""
    return [stats.tokens, *([] if stats.held is None else _tokens(stats.held))]


def _joined(tokens: Sequence[int], at: str, tensors: Mapping[str, Tensor]) -> InputStats:
    sums = {name: tensors.get(f"{at}/{name}") for name in SUMS}
    held = _joined(tokens[1:], f"{at}/held", tensors) if len(tokens) > 1 else None
    return InputStats(tokens=tokens[0], held=held, **sums)  # type: ignore[arg-type]


def _device(name: str) -> torch.device:
    """A device by its name, this rank's own where there are several."""
    there = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if there else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RankError(f"--device {name}: no device of torch; say auto, cpu or cuda") from None
    if device.type != "cuda":
        return device
    if not there:
        raise RankError(f"--device {name}: this torch sees no GPU; say cpu, or install a CUDA build of torch")
    number = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    if number >= torch.cuda.device_count():
        raise RankError(f"--device {name}: rank {number} has no GPU of its own; start as many ranks as there are GPUs")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except RuntimeError as problem:
        raise RankError(GONE) from problem


def _line(problem: BaseException) -> str:
    return " ".join(str(problem).split())[:160]
