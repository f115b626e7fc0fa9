"""Which module read which tensor, in what order: one forward of the twin, watched."""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.model.experts import is_linear
from quantkit.model.twin import logits_of


@dataclass(frozen=True, slots=True)
class Call:
    """One module's call within a block."""

    local: str
    module: nn.Module
    read: Tensor
    made: Tensor | None  # None of a module that returns several things, as routers do


def watch(model: Any, blocks: list[nn.Module]) -> tuple[list[list[Call]], list[Any]]:
    """Every call of a module that owns weights, block by block; the tensors stay alive, so that no storage is used twice."""
    calls: list[list[Call]] = [[] for _ in blocks]
    outputs: list[Any] = [None for _ in blocks]
    hooks = []

    def caller(index: int, local: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
            read = next((value for value in (*args, *kwargs.values()) if torch.is_tensor(value)), None)
            if read is not None:
                calls[index].append(Call(local, module, read, made if torch.is_tensor(made) else None))

        return hook

    def output(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], made: Any) -> None:
            outputs[index] = made

        return hook

    for index, block in enumerate(blocks):
        hooks.append(block.register_forward_hook(output(index)))
        for local, module in block.named_modules():
            if local and next(module.parameters(recurse=False), None) is not None:
                hooks.append(module.register_forward_hook(caller(index, local), with_kwargs=True))
    logits_of(model)
    for hook in hooks:
        hook.remove()
    return calls, outputs


def read_elsewhere(model: Any, place: str) -> Iterator[str]:
    """Linears whose weight other code reads than their own forward: an engine that keeps them packed has no such tensor there."""
    spare = copy.deepcopy(model)
    hollow = copy.deepcopy(model).to("meta")  # from_pretrained initializes modules, which costs nothing here
    initialized = [module for module in hollow.modules() if _runs(hollow._init_weights, module)]
    linears = [name for name, module in spare.get_submodule(place).named_modules() if is_linear(module)]
    for local in dict.fromkeys(name.partition(".")[2] for name in linears):
        names = [f"{place}.{name}" for name in linears if name.partition(".")[2] == local]
        opened = [_close(one.get_submodule(name)) for name in names for one in (spare, hollow)]
        if not _runs(logits_of, spare) or not all(_runs(hollow._init_weights, module) for module in initialized):
            yield local
        for again in opened:
            again()


def _close(module: Any) -> Callable[[], None]:
    """Take a linear's weight out of sight. Returns what brings it back."""
    weight = module._parameters.pop("weight")
    module.forward = lambda x: nn.functional.linear(x, weight, module.bias)

    def again() -> None:
        del module.forward
        module.weight = weight

    return again


def _runs(call: Callable[[Any], Any], value: Any) -> bool:
    try:
        call(value)
    except AttributeError:
        return False
    return True


def same(one: Tensor, other: Tensor | None) -> bool:
    """The same values in the same memory: the tensor itself, or a view of all of it."""
    return other is not None and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() and one.numel() == other.numel()


def starred(local: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", local)


def parts_of(local: str) -> tuple[str, str, str]:
    return tuple(f"{local}.*.{leaf}_proj" for leaf in ("gate", "up", "down"))  # type: ignore[return-value]


def is_norm(call: Call) -> bool:
    weight = getattr(call.module, "weight", None)
    shaped = call.made is not None and call.made.shape == call.read.shape
    return shaped and torch.is_tensor(weight) and weight.ndim == 1 and call.read.shape[-1] == len(weight)
