"""What the linears of an open block are fed: counts, |x|, x^2 and x x^T over the calibration tokens, summed in fp32.

Beside the block as it is quantized the original may run on its own stream, token by token in step: then the sums hold, too, what the
inputs have drifted by. Experts are paired by the original's routing.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from quantkit.calibrate.kept import Kept
from quantkit.errors import CheckpointError
from quantkit.finite import finite
from quantkit.model.experts import is_experts
from quantkit.model.streams import State, Stream
from quantkit.types import Batch, InputStats

HELD = 20  # every twentieth token is held back, for judging: of every row, for one row speaks for one language alone
WIDE, STRIPS = 1024, 4  # a Gram of this width is symmetric: only its upper strips are summed, 5/8 of the products


# Some tokens' inputs of one linear: (its local name, whether they are held back, whether it has a Gram, "x" and what stands beside it)
Part = tuple[str, bool, bool, Mapping[str, Tensor]]
Swap = Callable[[Sequence[Part]], Iterable[Part]]


def _alone(parts: Sequence[Part]) -> Sequence[Part]:
    return parts


class _Enough(Exception):
    """Leaves a block's forward once everything that is wanted has been seen."""


def _add_product(total: Float[Tensor, "a b"], left: Float[Tensor, "tokens a"], right: Float[Tensor, "tokens b"]) -> None:
    """total += left^T right. On a GPU by tf32 products, summed in fp32: bf16 activations lose nothing by it (docs/ranks.md)."""
    if not total.is_cuda:
        total.addmm_(left.T, right)
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        total.addmm_(left.T, right)
    finally:
        torch.set_float32_matmul_precision(before)


class _Sums:
    def __init__(self, width: int, gram: bool, device: torch.device):
        self.tokens = 0
        self.abs, self.square = torch.zeros(width, device=device), torch.zeros(width, device=device)
        self.gram = torch.zeros(width, width, device=device) if gram else None
        self.drift: Tensor | None = None
        self.residual: Tensor | None = None

    def add(self, x: Tensor, weight: Tensor | None, original: Tensor | None, lacking: Tensor | None) -> None:
        x = x.float()
        self.tokens += len(x)
        self.abs += x.abs().sum(0)
        weighted = x if weight is None else x * weight.float()[:, None]
        self.square += (x * weighted).sum(0)
        if self.gram is None:
            return
        for strip in _strips(self.gram):
            _add_product(self.gram[strip, strip.start :], x[:, strip], weighted[:, strip.start :])  # in place: never a second Gram
        if original is not None:
            self.drift = torch.zeros_like(self.gram) if self.drift is None else self.drift
            _add_product(self.drift, original.float() - x, weighted)
        if lacking is not None:
            self.residual = x.new_zeros(lacking.shape[-1], x.shape[-1]) if self.residual is None else self.residual
            _add_product(self.residual, lacking.float(), weighted)

    def frozen(self, held: "InputStats | None" = None) -> InputStats:
        for strip in _strips(self.gram) if self.gram is not None else ():
            self.gram[strip, : strip.start] = self.gram[: strip.start, strip].T  # type: ignore[index]
        return InputStats(self.tokens, self.abs, self.square, self.gram, self.drift, self.residual, held)


def _strips(gram: Float[Tensor, "in in"]) -> list[slice]:
    """Rows of a symmetric sum that are summed together, from the diagonal on."""
    width = len(gram)
    step = -(-width // STRIPS) if width >= WIDE else width
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]


@dataclass(frozen=True, slots=True)
class _Seen:
    """One linear's input in one run: of all tokens, or of an expert's."""

    local: str  # "experts.*.gate_proj": all experts' gate and up, one row for each token and expert
    x: Float[Tensor, "rows in"]
    token: Int[Tensor, " rows"] | None = None
    weight: Float[Tensor, " rows"] | None = None  # squared routing weight
    experts: tuple[Int[Tensor, "rows slots"], Float[Tensor, "rows slots"]] | None = None  # chosen ones, their squared weights


def _add_routed(
    sums: dict[tuple[str, bool], _Sums],
    local: str,
    hold: bool,
    count: int,
    x: Float[Tensor, "rows in"],
    index: Int[Tensor, "rows slots"],
    squared: Float[Tensor, "rows slots"],
) -> None:
    """What each expert's gate and up are fed, diagonals only: tokens are many, so two products in place of a gather for each expert."""
    x = x.float()
    routed = x.new_zeros(len(x), count)
    there, weight = routed.scatter(1, index, 1.0), routed.scatter(1, index, squared)
    tokens, mean, square = there.sum(0).long().tolist(), there.T @ x.abs(), weight.T @ x.square()
    for expert in range(count):
        if tokens[expert]:
            part = sums.setdefault((local.replace("*", str(expert)), hold), _Sums(x.shape[-1], False, x.device))
            part.tokens += tokens[expert]
            part.abs += mean[expert]
            part.square += square[expert]


@dataclass(slots=True)
class _Run:
    """What one run of a block showed."""

    seen: list[_Seen] = field(default_factory=list)
    residual: dict[str, Tensor] = field(default_factory=dict)  # what each norm was given
    routing: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def observe(
    stream: Stream,
    block: nn.Module,
    state: State,
    wanted: Container[str] | None = None,
    *,
    move: bool = False,
    grams: bool = True,
    held: bool = False,
    beside: tuple[nn.Module, State] | None = None,
    residual: Mapping[str, str] | None = None,
    kept: Kept | None = None,
    kept_beside: Kept | None = None,
    swap: Swap = _alone,
    rounds: int | None = None,
) -> dict[str, InputStats]:
    """Statistics of linears and experts of the open block, by local name, padding (and prompts, where the recipe ignores them) left out.

    Linears that are given one tensor (q, k, v; gate, up) share one InputStats. An expert's gate and up have no Gram of their own, which
    would be the size of the model; one of all experts together stands under "experts.*.gate_proj" and "experts.*.up_proj". Experts that
    no token reached are there, with zero tokens.

    Args:
        wanted: local names of the linears to watch; None is all of them.
        move: leave `state` behind the block, as `stream.advance` would; otherwise it stays, and a run ends with the last wanted linear.
        grams: False: diagonals only.
        held: keep every twentieth token apart, as `InputStats.held`.
        beside: the original block and its state: sums of the drift, too; with `move` it is this state that moves.
        residual: linear -> the norm that reads the residual stream where the linear adds to it: sums of what the stream lacks there.
        kept, kept_beside: of the block and of the one beside it, what earlier calls left of runs that need not be computed again.
        swap: called once a batch with what it showed; returns what is to be summed here (with several ranks: what all of them saw of
            the linears that are this rank's to sum). Then the other linears' statistics are of no meaning.
        rounds: how often to call it, where others have more batches than this rank; None: once a batch.
    """
    tap, other = _Tap(block, wanted, residual or {}, kept), None
    if beside is not None:
        other = _Tap(beside[0], wanted, residual or {}, kept_beside)
    sums: dict[tuple[str, bool], _Sums] = {
        (local, False): _Sums(width, gram and grams, stream.device) for local, width, gram in tap.experts()
    }
    with tap.attached(), other.attached() if other is not None else _nothing():
        for number in range(len(stream.batches) if rounds is None else rounds):
            if number >= len(stream.batches):
                _add(sums, swap([]), tap.counts)
                continue
            batch, pair = stream.batches[number], None
            if other is not None and beside is not None:
                pair, out = other.run(stream, beside[1], number, whole=move)
                if move:
                    assert out is not None
                    beside[1].pass_on(number, out)
            whole = (move and other is None) or (kept is not None and kept.finds)
            run, out = tap.run(stream, state, number, whole=whole, routing=pair.routing if pair else None)
            if move and other is None:
                assert out is not None
                state.pass_on(number, out)
            _add(sums, swap(list(_parts(run, pair, batch, held, residual or {}, grams, stream.skeleton.open))), tap.counts)
    for one in (kept, kept_beside):
        if one is not None:
            one.finds = False
    stats = {
        local: one.frozen(sums[local, True].frozen() if (local, True) in sums else None) for (local, back), one in sums.items() if not back
    }
    return stats | {local: stats[first] for local, first in tap.same.items() if first in stats}


def _add(sums: dict[tuple[str, bool], _Sums], parts: Iterable[Part], experts: Mapping[str, int]) -> None:
    """`experts`: how many there are behind the name of all of them."""
    for local, hold, gram, seen in parts:
        x = seen["x"]
        if "index" in seen:
            _add_routed(sums, local, hold, experts[local], x, seen["index"], seen["squared"])
        total = sums.setdefault((local, hold), _Sums(x.shape[-1], gram, x.device))
        total.add(x, seen.get("weight"), seen.get("original"), seen.get("lacking"))


def _parts(run: _Run, pair: _Run | None, batch: Batch, held: bool, residual: Mapping[str, str], grams: bool, block: int) -> Iterator[Part]:
    """One batch's inputs of a block, linear by linear; `held`: some of its tokens are held back."""
    real = batch.counted.reshape(-1)
    back = torch.zeros_like(batch.real)
    if held:
        rows, tokens = (torch.arange(length, device=back.device) for length in back.shape)
        back = (rows[:, None] + batch.row + tokens) % HELD == HELD - 1
    back = back.reshape(-1)
    for number, seen in enumerate(run.seen):
        _check(seen, real, batch, block)
        original = pair.seen[number].x if pair is not None else None
        lacking = None
        if pair is not None and (norm := residual.get(seen.local)):
            lacking = pair.residual[norm].float() - run.residual[norm].float()
        for hold in (False, True):
            of_token = real & (back == hold)
            chosen = of_token if seen.token is None else of_token[seen.token]
            if hold and not bool(chosen.any()):
                continue
            index, squared = seen.experts or (None, None)
            beside = {"weight": seen.weight, "original": original, "lacking": lacking, "index": index, "squared": squared}
            shown = {"x": seen.x[chosen], **{name: tensor[chosen] for name, tensor in beside.items() if tensor is not None}}
            yield seen.local, hold, grams, shown


def _check(seen: _Seen, real: Tensor, batch: Batch, block: int) -> None:
    """Refuse to add up what is no number, by its linear, token and sample.

    Raises:
        CheckpointError: NaN or infinity in an input.
    """
    if finite(seen.x):
        return
    wrong = ((real if seen.token is None else real[seen.token]) & ~seen.x.isfinite().all(-1)).nonzero().flatten()
    if len(wrong):  # not in padding alone
        at = int(wrong[0] if seen.token is None else seen.token[wrong[0]])
        row, token = divmod(at, batch.ids.shape[1])
        labels = batch.labels[row] if batch.labels else {}
        of = f" of sample {labels['id']} ({labels['language']}, {labels['domain']})" if labels else ""
        raise CheckpointError(
            f"block {block}: {seen.local}: NaN or infinity in the activations that it is fed, at token {token}{of}: a damaged weight, or "
            "fp16 that overflows (convert to bf16)"
        )


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class _Tap:
    """Hooks on a block that record its linears' inputs, run by run."""

    def __init__(self, block: nn.Module, wanted: Container[str] | None, residual: Mapping[str, str], kept: Kept | None):
        self.block, self._wanted, self._kept = block, wanted or (), kept
        self.same: dict[str, str] = {}
        self._linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear) and (wanted is None or n in wanted)}
        self._norms = {norm for local, norm in residual.items() if local in self._linears}
        self._experts: dict[str, tuple[nn.Module, bool, bool]] = {}
        for name, module in block.named_modules():
            if is_experts(module):
                inputs = wanted is None or f"{name}.0.gate_proj" in wanted or f"{name}.0.up_proj" in wanted
                inner = wanted is None or f"{name}.0.down_proj" in wanted
                if inputs or inner:
                    self._experts[name] = module, inputs, inner
        self._all = wanted is None  # then a run goes to the end: who calls a linear twice is seen twice
        self._run, self._whole = _Run(), True
        self._left: set[str] = set()
        self._last: tuple[Tensor | None, str] = (None, "")
        self._of_router: tuple[Tensor, Tensor] | None = None
        self.counts: dict[str, int] = {}
        for name, (module, inputs, _) in self._experts.items():
            if inputs:
                self.counts[f"{name}.*.gate_proj"] = len(module.down_proj)  # type: ignore[arg-type]
                for expert in range(len(module.down_proj)):  # type: ignore[arg-type]
                    self.same[f"{name}.{expert}.up_proj"] = f"{name}.{expert}.gate_proj"
                self.same[f"{name}.*.up_proj"] = f"{name}.*.gate_proj"

    def experts(self) -> Iterator[tuple[str, int, bool]]:
        """(local name, width, has a Gram) of everything that experts are fed, whether a token comes or not."""
        for name, (module, inputs, inner) in self._experts.items():
            count, hidden, width = module.down_proj.shape  # type: ignore[union-attr, misc]
            for expert in range(int(count)):
                if inputs:
                    yield f"{name}.{expert}.gate_proj", int(hidden), False
                if inner:
                    yield f"{name}.{expert}.down_proj", int(width), True

    def run(
        self, stream: Stream, state: State, batch: int, whole: bool, routing: Mapping[str, tuple[Tensor, Tensor]] | None = None
    ) -> tuple[_Run, Tensor | None]:
        """One batch through the block; its output where it is run to the end."""
        self._run, self._last, self._whole = _Run(), (None, ""), whole or self._all
        self._left = {*self._linears}
        for name, (_, inputs, inner) in self._experts.items():
            self._left |= {f"{name} in"} if inputs else set()
            self._left |= {f"{name} out"} if inner else set()
        for name, (module, _, _) in self._experts.items():
            module.routing = routing.get(name) if routing else None  # type: ignore[assignment]
        try:
            with self._kept.over(self.block, batch, self._wanted) if self._kept else _nothing():
                return self._run, stream.run(self.block, state, batch)
        except _Enough:
            return self._run, None

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = [module.register_forward_pre_hook(self._on_linear(local)) for local, module in self._linears.items()]
        handles += [self.block.get_submodule(norm).register_forward_pre_hook(self._on_norm(norm)) for norm in self._norms]
        for name, (module, inputs, inner) in self._experts.items():
            handles.append(module.register_forward_pre_hook(self._on_experts(name, inputs, inner)))
            if inner:
                module.watcher = self._on_expert(name)  # type: ignore[assignment]
                handles.append(module.register_forward_hook(lambda *_, name=name: self._saw(f"{name} out")))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, _, _ in self._experts.values():
                module.__dict__.pop("watcher", None)
                module.__dict__.pop("routing", None)

    def _saw(self, what: str) -> None:
        self._left.discard(what)
        if not self._left and not self._whole:
            raise _Enough

    def _on_linear(self, local: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._last[0] is args[0]:
                self.same[local] = self._last[1]
            else:
                self._last = (args[0], local)
                self._run.seen.append(_Seen(local, args[0].reshape(-1, args[0].shape[-1])))
                if self._kept:
                    self._kept.put(local, args[0])
            self._saw(local)

        return hook

    def _on_norm(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._run.residual[name] = args[0].reshape(-1, args[0].shape[-1])

        return hook

    def _on_experts(self, name: str, inputs: bool, inner: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            hidden, index, weights = args
            pinned = module.__dict__.get("routing")
            index, weights = pinned or (index, weights)
            self._of_router = index, weights
            self._run.routing[name] = index, weights
            if inputs:
                squared = weights.float().square()
                everyone = torch.arange(len(hidden), device=hidden.device)
                self._run.seen.append(_Seen(f"{name}.*.gate_proj", hidden, everyone, squared.sum(-1), (index, squared)))
                self._saw(f"{name} in")

        return hook

    def _on_expert(self, name: str) -> Callable[[str, int, Tensor, Tensor], None]:
        def watch(leaf: str, expert: int, token: Tensor, x: Tensor) -> None:
            if leaf == "down_proj" and self._of_router is not None:
                index, weights = self._of_router
                weight = (weights[token].float().square() * (index[token] == expert)).sum(-1)
                self._run.seen.append(_Seen(f"{name}.{expert}.down_proj", x, token, weight))

        return watch
