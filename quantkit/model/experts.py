"""Fused experts as linears. The only file that knows how transformers 5 lays experts out: (experts, 2 x width, hidden), gate over up.

One forward serves every experts class of transformers (they all go through its experts interface), computes what the default
grouped_mm computes, shows each expert's inputs to whoever watches, and can be held to another run's routing.
"""

import re
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "quantkit"
# The CPU's half-precision products keep compiled code for every number of rows they ever met, some .2 MB each and never freed: an
# expert's tokens are padded with zero rows to a multiple of this, so that a run meets tens of shapes and not thousands.
ROWS_STEP = 32
Watcher = Callable[[str, int, Tensor, Tensor], None]  # (linear's leaf name, expert, token indices, inputs)
Tap = Callable[[str, int, Tensor, Tensor], Tensor]  # (weight's leaf name, expert, token indices, outputs) -> outputs
_EXPERT = re.compile(r"(.*experts)\.(\d+)\.(gate|up|down)_proj")


def experts_forward(
    experts: nn.Module,
    hidden: Float[Tensor, "tokens hidden"],
    index: Int[Tensor, "tokens slots"],
    weights: Float[Tensor, "tokens slots"],
) -> Float[Tensor, "tokens hidden"]:
    """Each expert on the tokens routed to it; rounds where grouped_mm rounds: output x routing weight in the model's dtype, sum in fp32.

    Experts of another layout run the loop of their own class, unwatched.
    """
    if not readable(experts):
        return type(experts).forward.__wrapped__(experts, hidden, index, weights)  # type: ignore[attr-defined, no-any-return]
    watcher: Watcher | None = getattr(experts, "watcher", None)
    tap: Tap = getattr(experts, "tap", _untouched)
    read: Callable[[str, int], Tensor] = getattr(experts, "reader", None) or (lambda leaf, expert: getattr(experts, leaf)[expert])
    if pinned := getattr(experts, "routing", None):  # another run's choice of experts
        index, weights = pinned
    total = torch.zeros_like(hidden, dtype=torch.float32)
    step = ROWS_STEP if hidden.device.type == "cpu" and hidden.dtype != torch.float32 else 1
    for expert in index.unique().tolist():
        token, slot = torch.where(index == expert)
        count = len(token)
        x = hidden[token]
        if watcher:
            watcher("gate_proj", expert, token, x)
        x = nn.functional.pad(x, (0, 0, 0, -count % step))
        x = experts._apply_gate(tap("gate_up_proj", expert, token, nn.functional.linear(x, read("gate_up_proj", expert))))  # type: ignore[operator]
        if watcher:
            watcher("down_proj", expert, token, x[:count])
        x = tap("down_proj", expert, token, nn.functional.linear(x, read("down_proj", expert)))[:count]
        total.index_add_(0, token, (x * weights[token, slot, None]).float())
    return total.to(hidden.dtype)


def _untouched(leaf: str, expert: int, token: Tensor, out: Tensor) -> Tensor:
    return out


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def is_linear(module: nn.Module) -> bool:
    """x W^T + b and nothing else: classes derived from nn.Linear that compute otherwise (routers, grouped ones) are none."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def is_experts(module: nn.Module) -> bool:
    """A fused-experts module that goes through transformers' experts interface."""
    return hasattr(module, "_apply_gate")


def readable(module: nn.Module) -> bool:
    """Experts of the one layout that this file reads: (experts, 2 x width, hidden), gate over up, no biases."""
    if not is_experts(module):
        return False
    other = module.has_bias or module.is_transposed or getattr(module, "has_post_expert_norm", False)  # 5.17 knows none
    return bool(module.has_gate and getattr(module, "is_concatenated", True) and not other)


def unreadable(block: nn.Module) -> Iterator[str]:
    """Experts that cannot be taken apart into linears, each as one sentence."""
    for name, module in block.named_modules():
        fused = any(p.ndim == 3 for p in module.parameters(recurse=False)) and not isinstance(module, nn.Conv1d)
        if fused and not is_experts(module):
            yield f"{name} ({type(module).__name__}): weights of three dimensions outside transformers' experts interface"
        if is_experts(module) and not readable(module):
            yield f"{name} ({type(module).__name__}): experts of this layout (biases, transposed, interleaved or ungated)"


def weight_of(block: nn.Module, local: str) -> Float[Tensor, "out in"] | None:
    """The weight of a linear by its local name, a view into the block (an expert's is a slice); None where the block has no such module."""
    if match := _EXPERT.fullmatch(local):
        experts = block.get_submodule(match[1])
        expert, part = int(match[2]), match[3]
        if part == "down":
            return experts.down_proj.data[expert]  # type: ignore[union-attr, index, return-value]
        gate_up: Tensor = experts.gate_up_proj.data[expert]  # type: ignore[union-attr, index, assignment]
        width = len(gate_up) // 2
        return gate_up[:width] if part == "gate" else gate_up[width:]
    try:
        module = block.get_submodule(local)
    except AttributeError:
        return None
    return module.weight.data if is_linear(module) else None  # type: ignore[union-attr, return-value]


def replace_weight(block: nn.Module, local: str, value: Float[Tensor, "out in"]) -> None:
    """Give a linear of a twin another weight; the tensor that it shared with the original is left alone. No module: nothing to do."""
    if match := _EXPERT.fullmatch(local):
        experts = block.get_submodule(match[1])
        leaf = "down_proj" if match[3] == "down" else "gate_up_proj"
        if leaf not in experts.__dict__.setdefault("replaced", set()):
            setattr(experts, leaf, nn.Parameter(getattr(experts, leaf).detach().clone(), requires_grad=False))
            experts.__dict__["replaced"].add(leaf)
        weight = weight_of(block, local)
        assert weight is not None
        weight.copy_(value)
    elif (old := weight_of(block, local)) is not None:
        block.get_submodule(local).weight = nn.Parameter(value.to(old.dtype), requires_grad=False)


def fuse(target: Tensor, parts: Sequence[Sequence[Callable[[], Tensor]]]) -> None:
    """Per-expert matrices straight into their slices of one fused tensor: parts[j][expert] fills the j-th share of that expert's rows.

    Stacking and concatenating a whole layer's experts, as a loader does, peaks at 2.4 blocks.
    """
    for share, experts in enumerate(parts):
        for expert, read in enumerate(experts):
            target[expert].chunk(len(parts))[share].copy_(read())
