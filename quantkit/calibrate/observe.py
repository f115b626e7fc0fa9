"""What every linear of an open block is fed: counts, |x|, x^2 and x x^T over the calibration tokens, summed in fp32."""

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.model.blocks import State, Stream
from quantkit.model.experts import is_experts
from quantkit.types import InputStats


class _Sums:
    def __init__(self, width: int, gram: bool):
        self.tokens = 0
        self.abs, self.square = torch.zeros(width), torch.zeros(width)
        self.gram = torch.zeros(width, width) if gram else None

    def add(self, x: Tensor) -> None:
        x = x.float()
        self.tokens += len(x)
        self.abs += x.abs().sum(0)
        self.square += x.square().sum(0)
        if self.gram is not None:
            self.gram.addmm_(x.T, x)  # in place: there is never a second Gram

    def frozen(self) -> InputStats:
        return InputStats(self.tokens, self.abs, self.square, self.gram)


def observe(
    stream: Stream, block: nn.Module, state: State, wanted: Container[str] | None = None, move: bool = False
) -> dict[str, InputStats]:
    """Statistics of every linear and expert of the open block, by local name, padding left out.

    Linears that are given one tensor (q, k, v; gate, up) share one InputStats. An expert's gate and up have no Gram: one for each expert
    would be the size of the model; its down has. Experts that no token reached are there, with zero tokens.

    Args:
        wanted: local names of the linears to watch; None is all of them. Experts are always watched.
        move: leave `state` behind the block, as `stream.advance` would; otherwise it stays.
    """
    sums: dict[str, _Sums] = {}
    same: dict[str, str] = {}
    real: Tensor = torch.empty(0)
    last: tuple[Tensor | None, str] = (None, "")
    handles = []

    def on_linear(local: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal last
            if last[0] is args[0]:
                same[local] = last[1]
                return
            last = (args[0], local)
            x = args[0].reshape(-1, args[0].shape[-1])
            sums.setdefault(local, _Sums(x.shape[-1], gram=True)).add(x[real])

        return hook

    def on_expert(local: str) -> Callable[[str, int, Tensor, Tensor], None]:
        def watch(leaf: str, expert: int, token: Tensor, x: Tensor) -> None:
            sums[f"{local}.{expert}.{leaf}"].add(x[real[token]])

        return watch

    for local, module in block.named_modules():
        if isinstance(module, nn.Linear) and (wanted is None or local in wanted):
            handles.append(module.register_forward_pre_hook(on_linear(local)))
        elif is_experts(module):
            module.watcher = on_expert(local)  # type: ignore[assignment]
            count, hidden, width = module.down_proj.shape  # type: ignore[union-attr, misc]
            for expert in range(int(count)):
                sums[f"{local}.{expert}.gate_proj"] = _Sums(int(hidden), gram=False)
                sums[f"{local}.{expert}.down_proj"] = _Sums(int(width), gram=True)
                same[f"{local}.{expert}.up_proj"] = f"{local}.{expert}.gate_proj"
    try:
        for number, batch in enumerate(stream.batches):
            real, last = batch.real.reshape(-1), (None, "")
            out = stream.run(block, state, number)
            if move:
                state.hidden[number] = out
    finally:
        for handle in handles:
            handle.remove()
        for module in block.modules():
            module.__dict__.pop("watcher", None)
    stats = {local: s.frozen() for local, s in sums.items()}
    return stats | {local: stats[other] for local, other in same.items()}
