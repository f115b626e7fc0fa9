"""Batches run through a transformers 5 causal LM one decoder block at a time.

    skeleton = Skeleton(checkpoint, torch.bfloat16) # the model on the meta device; embeddings, norm and head as mapped pages
    stream = Stream(skeleton, batches)
    state = stream.start()                          # hidden states before block 0; state.fork() for a second stream
    for i in range(len(skeleton.blocks)):
        with skeleton.block(i) as block:            # filled from the shards, emptied on exit
            stream.advance(block, state)
    logits = stream.logits(state, batch, part)      # the model's own tail on the streamed hidden states

How: the real model runs its own forward with `block.forward` replaced on the instance, so that every family's arguments (positions,
masks, per-layer inputs, shared keys and values) come from transformers itself.
"""

import copy
from collections import UserDict
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quantkit.errors import CheckpointError, FamilyError
from quantkit.finite import finite
from quantkit.model.blocks import Skeleton
from quantkit.model.memory import Activations
from quantkit.types import Batch


class _Captured(Exception):
    """Leaves the model's forward once the wanted block's arguments are known."""


@dataclass(slots=True)
class State:
    """Where a stream stands, per batch: the hidden states and what blocks hand to later blocks (shared keys and values)."""

    hidden: MutableSequence[Tensor]
    shared: list[dict[str, Any]]
    beside: list[tuple[Any, ...] | None]  # what the last block returned behind the hidden states; None of one that returns them alone
    ahead: dict[int, tuple[Any, ...] | None] = field(default_factory=dict)  # the same, of a block that was run and not yet passed

    def fork(self) -> "State":
        """An independent stream from here: the tensors are shared until one of the two moves on."""
        hidden = self.hidden.fork() if isinstance(self.hidden, Activations) else list(self.hidden)
        return State(hidden, [{k: copy.copy(v) for k, v in s.items()} for s in self.shared], list(self.beside))

    def pass_on(self, batch: int, hidden: Tensor) -> None:
        """The block that was run last on this batch lies behind; `hidden`: what it returned."""
        self.hidden[batch], self.beside[batch] = hidden, self.ahead.pop(batch, None)

    def check(self, what: str) -> None:
        """Refuse to go on with activations that are no numbers; `what` made them.

        Raises:
            CheckpointError: NaN or infinity in a hidden state.
        """
        if not all(map(finite, self.hidden)):
            raise CheckpointError(f"{what}: NaN or infinity in the activations: a damaged weight, or fp16 that overflows (convert to bf16)")


class Stream:
    """Batches on their way through a skeleton's blocks."""

    def __init__(self, skeleton: Skeleton, batches: Sequence[Batch]):
        self.skeleton, self.device = skeleton, skeleton.device
        self.batches = [batch.to(skeleton.device) for batch in batches]
        self._cache: dict[tuple[int, int], Any] = {}

    @torch.no_grad()
    def start(self) -> State:
        """The hidden states in front of block 0.

        Raises:
            CheckpointError: NaN or infinity in one of them.
        """

        def embedded(number: int) -> Tensor:
            hidden = self._arguments(number, 0, None)[0]
            if not finite(hidden):
                raise CheckpointError(f"the embeddings: NaN or infinity {self._at(hidden, number)}; the checkpoint is damaged")
            return hidden

        hidden = map(embedded, range(len(self.batches)))
        return State(Activations(hidden, self.skeleton.memory), [{} for _ in self.batches], [None for _ in self.batches])

    def run(self, block: nn.Module, state: State, batch: int, grad: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """The open block's (or its twin's) output for one batch; the hidden states do not move. Running twice is safe.

        `dtype`: of all that the block is given, where it computes in another precision than the model; whether that gives numbers is
        its caller's business.

        Raises:
            CheckpointError: NaN or infinity comes out; told are the module that made it, the token and its sample.
        """
        with torch.no_grad():
            _, args, kwargs = self._arguments(batch, self.skeleton.open, state.beside[batch])
        # dict arguments (shared keys and values) are written by some blocks and read by later ones: one dict for each batch and state
        shared = state.shared[batch]
        kwargs = {k: shared.setdefault(k, copy.copy(v)) if isinstance(v, (dict, UserDict)) else v for k, v in kwargs.items()}
        hidden = state.hidden[batch].to(self.device)  # where the device has no room for all of them they wait in memory
        if dtype is not None:
            hidden, args, kwargs = _cast((hidden, args, kwargs), dtype)
        with torch.set_grad_enabled(grad):
            made = block(hidden, *args, **kwargs)
        out, beside = (made[0], made[1:]) if isinstance(made, tuple) and made else (made, None)
        if not torch.is_tensor(out) or out.shape != state.hidden[batch].shape:
            raise FamilyError(f"{type(block).__name__} returns no hidden states of the shape it was given, so it cannot be streamed")
        if dtype is None and not finite(out):
            raise CheckpointError(self._blame(block, out, lambda: block(hidden, *args, **kwargs), batch))
        state.ahead[batch] = beside
        return out

    def _blame(self, block: nn.Module, out: Tensor, again: Callable[[], Tensor], batch: int) -> str:
        """What first made NaN or infinity in an open block, by running it once more, and for which token."""
        found: list[tuple[str, nn.Module]] = []

        def hook(name: str) -> Callable[..., None]:
            def see(module: nn.Module, args: Any, made: Any) -> None:
                made = made[0] if isinstance(made, tuple) else made
                if not found and torch.is_tensor(made) and not finite(made):
                    found.append((name, module))

            return see

        handles = [module.register_forward_hook(hook(name)) for name, module in block.named_modules() if name]
        try:
            with torch.no_grad():
                again()
        finally:
            for handle in handles:
                handle.remove()
        where, at = f"block {self.skeleton.open}", self._at(out, batch)
        for name, module in found:
            for leaf, weight in module.named_parameters():
                if not finite(weight):
                    return f"{where}: {name}.{leaf} holds NaN or infinity (met {at}); the checkpoint is damaged"
            where += f": {name}"
        return f"{where}: NaN or infinity in the activations {at}: a damaged weight, or fp16 that overflows (convert to bf16)"

    def _at(self, hidden: Tensor, batch: int) -> str:
        """The first token and sample of a batch whose hidden state is no number."""
        wrong = (~hidden.isfinite()).any(-1)
        row, token = wrong.reshape(-1, *wrong.shape[-2:]).any(0).nonzero()[0].tolist()  # before it there may be AltUp's streams
        labels = self.batches[batch].labels
        of = f" of sample {labels[row]['id']} ({labels[row]['language']}, {labels[row]['domain']})" if labels else ""
        return f"at token {token}{of}"

    def advance(self, block: nn.Module, state: State) -> None:
        """Every batch through the open block."""
        for batch in range(len(self.batches)):
            state.pass_on(batch, self.run(block, state, batch))

    @cached_property
    def rows_at(self) -> int:
        """Where hidden states count rows, tokens behind: 0 of (rows, tokens, hidden), 1 of AltUp's (streams, rows, tokens, hidden)."""
        ids, shapes = self.batches[0].ids[:1, :1], []
        for tokens in (2, 3):
            (hidden, _, _), _ = self._captured(ids.expand(1, tokens), 0, None)
            shapes.append(hidden.shape)
        return next(dim for dim, sizes in enumerate(zip(*shapes, strict=True)) if sizes[0] != sizes[1]) - 1

    def by_token(self, hidden: Tensor, features: int = 1) -> Tensor:
        """(*streams, rows, tokens, *features) of hidden states, or of figures of each, wherever the model counts its streams."""
        at = self.rows_at
        return hidden.movedim((at, at + 1), (-2 - features, -1 - features))

    def close(self) -> None:
        """Forget the arguments of the block that was open."""
        self._cache.clear()

    @torch.no_grad()
    def logits(self, state: State, batch: int, part: slice) -> Float[Tensor, "rows tokens vocabulary"]:
        """The model's own tail (norm, head, softcap) on some positions of the streamed hidden states; cut, for vocabularies are large."""
        last = len(self.skeleton.blocks) - 1
        whole, dim = state.hidden[batch].shape, self.rows_at + 1
        hidden = state.hidden[batch].narrow(dim, *_bounds(part, whole[dim])).to(self.device)

        def cut(value: Any) -> Any:  # a second residual stream, say
            alike = torch.is_tensor(value) and value.shape[: dim + 1] == whole[: dim + 1]
            return value.narrow(dim, *_bounds(part, whole[dim])) if alike else value

        beside = state.beside[batch]
        beside = None if beside is None else tuple(cut(value) for value in beside)

        def make(k: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: _returned(hidden if k == last else _hidden_of(args, kwargs), beside)

        with self._stand_ins(make):
            return self.skeleton.model(input_ids=self.batches[batch].ids[:, part], use_cache=False).logits

    def _arguments(self, batch: int, index: int, beside: tuple[Any, ...] | None) -> Any:
        """(hidden states, args, kwargs) that block `index` gets: the model's own forward, blocks before it passing through.

        `beside`: what the block before it returned behind the hidden states; the model's own loop hands it on.
        """
        if (batch, index) in self._cache:
            return self._cache[batch, index]
        got, costly = self._captured(self.batches[batch].ids, index, beside)
        if (
            costly and not beside
        ):  # per-layer inputs take a third of a block's forward to make; masks and positions are cheaper made than kept
            self._cache[batch, index] = got
        return got

    @torch.no_grad()
    def _captured(self, ids: Tensor, index: int, beside: tuple[Any, ...] | None) -> tuple[Any, bool]:
        """What block `index` gets of some rows of tokens, and whether it is dear to make."""
        call: dict[str, Any] = {}
        costly = False

        def own(value: Any) -> Any:
            # per_layer_inputs[:, :, i] is a view that would keep every layer's inputs alive
            nonlocal costly
            if torch.is_tensor(value) and value.untyped_storage().nbytes() > 2 * value.nbytes:
                costly = True
                return value.clone()
            return value

        def make(k: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = _hidden_of(args, kwargs)
                if k < index:
                    return _returned(hidden, beside)
                kwargs.pop("hidden_states", None)
                call["got"] = hidden if index == 0 else None, [own(v) for v in args[1:]], {n: own(v) for n, v in kwargs.items()}
                raise _Captured

            return forward

        with self._stand_ins(make), suppress(_Captured):
            self.skeleton.model(input_ids=ids, use_cache=False)
        return call["got"], costly

    @contextmanager
    def _stand_ins(self, make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        blocks = self.skeleton.blocks
        for k, block in enumerate(blocks):
            block.forward = make(k)  # type: ignore[method-assign]  # on the instance: everything else of the block stays visible
        try:
            yield
        finally:
            for block in blocks:
                del block.forward


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Every float tensor within, in another precision."""
    if torch.is_tensor(value):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(one, dtype) for one in value)
    if isinstance(value, (dict, UserDict)):
        return type(value)({key: _cast(one, dtype) for key, one in value.items()})
    return value


def _returned(hidden: Tensor, beside: tuple[Any, ...] | None) -> Any:
    """As the blocks of this model return it."""
    return hidden if beside is None else (hidden, *beside)


def _hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _bounds(part: slice, length: int) -> tuple[int, int]:
    start, stop, _ = part.indices(length)
    return start, stop - start
