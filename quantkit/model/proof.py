"""What a block computes in fp32 with its weights as they are, as folds make them, or as rounding would.

No second block is held: linears and experts scale their bf16 weights as they read them, only small tensors are copied.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quantkit.model.experts import is_experts, is_linear
from quantkit.model.streams import State, Stream

PROVEN = 1e-4  # relative change of a token's output that fp32 sums explain; a wrong fold's is percents


def fold_change(
    stream: Stream,
    block: nn.Module,
    state: State,
    columns: Mapping[str, Float[Tensor, " in"]],
    rows: Mapping[str, Float[Tensor, " out"]],
    folded: Mapping[str, Tensor],
    batch: int,
) -> float:
    """Relative change of the open block's output that folds make: what 99 of 100 tokens of a batch of the stream stay below.

    A hundredth may lie beyond, for a token on the edge between two experts can fall to either side by fp32's last bit.

    Args:
        columns, rows: what folds multiply a linear's columns by and divide its rows by, by local name.
        folded: other tensors that they replaced, by local tensor name.
    """
    with _in_full_precision(block, {}, {}, {}):
        before = stream.run(block, state.fork(), batch, dtype=torch.float32)
    with _in_full_precision(block, columns, rows, folded):
        after = stream.run(block, state.fork(), batch, dtype=torch.float32)
    change = (after - before).norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-30)
    return float(stream.by_token(change, 0)[..., stream.batches[batch].real].float().quantile(0.99))


def outputs_with(
    stream: Stream, block: nn.Module, state: State, instead: Mapping[str, Float[Tensor, "out in"]]
) -> list[Float[Tensor, "*streams tokens hidden"]]:
    """The open block's output for every batch of the stream, fp32, counted tokens only, with some linears' weights exchanged."""
    found = []
    for number, batch in enumerate(stream.batches):
        with _in_full_precision(block, {}, {}, {}, instead):
            out = stream.by_token(stream.run(block, state.fork(), number, dtype=torch.float32))
            found.append(out[..., batch.counted, :])
    return found


@contextmanager
def _in_full_precision(
    block: nn.Module,
    columns: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
    folded: Mapping[str, Tensor],
    instead: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """The block computing in fp32, folds applied as weights are read, or other weights read `instead`."""

    def scaled(local: str, weight: Tensor) -> Tensor:
        if instead and local in instead:
            return instead[local]
        weight = weight.float()
        weight = weight * columns[local] if local in columns else weight
        return weight / rows[local][:, None] if local in rows else weight

    def linear(local: str, module: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            bias = folded.get(f"{local}.bias", module.bias)
            weight = scaled(local, folded.get(f"{local}.weight", module.weight))
            return nn.functional.linear(x, weight, None if bias is None else bias.float())

        return forward

    def expert(stem: str, module: Any) -> Callable[[str, int], Tensor]:
        def read(leaf: str, number: int) -> Tensor:
            if leaf == "down_proj":
                return scaled(f"{stem}.{number}.down_proj", module.down_proj[number])
            gate, up = module.gate_up_proj[number].chunk(2)
            return torch.cat([scaled(f"{stem}.{number}.gate_proj", gate), scaled(f"{stem}.{number}.up_proj", up)])

        return read

    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    patched: list[tuple[nn.Module, str]] = []
    try:
        for local, module in block.named_modules():
            if is_linear(module):
                assert isinstance(module, nn.Linear)
                module.forward = linear(local, module)  # type: ignore[assignment, method-assign]
                patched.append((module, "forward"))
                continue
            fused = is_experts(module)
            if fused:
                module.reader = expert(local, module)  # type: ignore[assignment]
                patched.append((module, "reader"))
            for leaf, old in list(module.named_parameters(recurse=False)):
                if fused and old.ndim == 3:
                    continue
                value = folded.get(f"{local}.{leaf}" if local else leaf, old)
                setattr(module, leaf, nn.Parameter(value.detach().float(), requires_grad=False))
                replaced.append((module, leaf, old))
        yield
    finally:
        for module, leaf, old in replaced:
            setattr(module, leaf, old)
        for module, name in patched:
            module.__dict__.pop(name, None)
