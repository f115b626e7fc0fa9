"""What the linears that end a submodule were fed, kept while a block is solved in stages: later runs start behind what they saw.

Attention ends in its o_proj, an MLP in its down_proj. Once such a linear's statistics are taken, what lies before it in the submodule is
final, so a later run of the same block need not compute it again: the linear's product alone stands in for the submodule. Whether a
submodule ends so is not assumed but seen: its output is the very tensor that its last linear made.
"""

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from quantkit.model.memory import Memory


@dataclass(frozen=True, slots=True)
class _End:
    linear: str
    nones: int | None  # results that the submodule returns beside its output, all None; None where it returns no tuple


class Kept:
    """Inputs of ending linears, batch by batch, within the budget of the activations.

    Args:
        like: of a block of the same structure, whose ends are known; without it the first pass runs to the end and finds them.
    """

    def __init__(self, memory: Memory, like: "Kept | None" = None):
        self._memory = memory
        self._ends: dict[str, _End] = like._ends if like else {}  # by submodule
        self._inputs: dict[tuple[str, int], Tensor] = {}
        self._batch = 0
        self.finds = like is None

    @contextmanager
    def over(self, block: nn.Module, batch: int, wanted: Container[str]) -> Iterator[None]:
        """One batch through the block, of which `wanted` linears are observed: by ends where they are known, finding them where not."""
        self._batch = batch
        with self._finding(block) if self.finds else self._standing_in(block, wanted):
            yield

    def put(self, local: str, x: Tensor) -> None:
        """What a linear is fed in the run that is on, where it is an end."""
        for name, end in self._ends.items():
            if end.linear == local and not self.finds:
                self._inputs[name, self._batch] = self._memory.keep(x)

    @contextmanager
    def _finding(self, block: nn.Module) -> Iterator[None]:
        made: dict[str, tuple[str, Tensor, Tensor]] = {}
        handles = []

        def on_linear(name: str, local: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
                made[name] = local, args[0], out

            return hook

        def on_end(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
                first, *rest = out if isinstance(out, tuple) else (out,)
                if name in made and made[name][2] is first and all(one is None for one in rest):
                    self._ends[name] = _End(made[name][0], len(rest) if isinstance(out, tuple) else None)
                    self._inputs[name, self._batch] = self._memory.keep(made[name][1])

            return hook

        for name, child in block.named_children():
            linears = [(local, module) for local, module in child.named_modules() if isinstance(module, nn.Linear) and module is not child]
            handles += [module.register_forward_hook(on_linear(name, f"{name}.{local}")) for local, module in linears]
            handles += [child.register_forward_hook(on_end(name))] if linears else []
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _standing_in(self, block: nn.Module, wanted: Container[str]) -> Iterator[None]:
        replaced = []
        for name, end in self._ends.items():
            x, child = self._inputs.get((name, self._batch)), block.get_submodule(name)
            inside = [f"{name}.{local}" for local, module in child.named_modules() if isinstance(module, nn.Linear)]
            if x is not None and not any(local in wanted for local in inside if local != end.linear):
                child.forward = _product(block.get_submodule(end.linear), x, end.nones)  # type: ignore[method-assign]
                replaced.append(child)
        try:
            yield
        finally:
            for child in replaced:
                del child.forward


def _product(linear: nn.Module, x: Tensor, nones: int | None) -> Callable[..., Any]:
    return lambda *args, **kwargs: linear(x) if nones is None else (linear(x), *[None] * nones)
