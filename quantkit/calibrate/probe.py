"""How far the open block's output moves with what its linears put out: a random probe, backwards through a few batches.

The gradient g of z . block(h) for random signs z has, at a linear's output, the expected second moments of the block's Jacobian there
(Hutchinson's estimator): g^2 says how much each row matters, g g^T which rows answer for one another. An expert's are before its router
weighs them: its inputs are summed by that weight.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from quantkit.model.experts import is_experts
from quantkit.model.streams import State, Stream
from quantkit.types import OutputStats

TOKENS_OF_A_ROW = 8  # as many for each row of a head, so that its second moments are more than noise


def heads_of(block: nn.Module, locals_: Iterable[str]) -> dict[str, int]:
    """Of the linears whose rows are an attention's heads: rows of a head, by transformers' `head_dim`."""
    found = {}
    for local in locals_:
        try:
            owner, linear = block.get_submodule(local.rpartition(".")[0]), block.get_submodule(local)
        except AttributeError:  # an expert, or a published leftover
            continue
        width = getattr(owner, "head_dim", None)
        if isinstance(linear, nn.Linear) and isinstance(width, int) and width > 1 and linear.out_features % width == 0:
            found[local] = width
    return found


def batches_for(heads: Mapping[str, int], tokens: Sequence[int]) -> range:
    """Which batches to probe, of so many counted tokens each: from the middle on, for they lie from long to short rows."""
    enough = TOKENS_OF_A_ROW * max(heads.values(), default=0)
    first, last = len(tokens) // 2, len(tokens) // 2 + 1
    while sum(tokens[first:last]) < enough and last < len(tokens):
        last += 1
    while sum(tokens[first:last]) < enough and first:
        first -= 1
    return range(first, last)


@dataclass(frozen=True, slots=True)
class _Grown:
    """One linear's outputs in the probed run, or an expert's."""

    local: str
    out: Float[Tensor, "*rows out"]
    chosen: Bool[Tensor, " rows"]  # those that count
    weight: Float[Tensor, " rows"] | None  # the router's, where it has one


def probe(
    stream: Stream, block: nn.Module, state: State, wanted: Collection[str], batch: int, heads: Mapping[str, int], seed: int = 0
) -> dict[str, OutputStats]:
    """Sums over one batch's counted tokens; the state does not move.

    Args:
        wanted: local names of linears, experts' among them.
        heads: of some of them the rows of a head: sums of g g^T, too, head by head.
    """
    outputs: list[_Grown] = []
    real = stream.batches[batch].counted.reshape(-1)
    routing: dict[str, tuple[Tensor, Tensor]] = {}

    def grown(local: str, out: Tensor, chosen: Tensor, weight: Tensor | None = None) -> Tensor:
        out = out if out.requires_grad else out.requires_grad_(True)
        outputs.append(_Grown(local, out, chosen, weight))
        return out

    def of_expert(name: str, leaf: str, expert: int, token: Tensor, out: Tensor) -> Tensor:
        index, weights = (one.detach() for one in routing[name])
        return grown(f"{name}.{expert}.{leaf}", out, real[token], (weights[token] * (index[token] == expert)).sum(-1))

    handles = []
    for local, module in block.named_modules():
        if isinstance(module, nn.Linear) and local in wanted:
            handles.append(module.register_forward_hook(lambda m, a, out, local=local: grown(local, out, real)))
        elif is_experts(module):
            handles.append(module.register_forward_pre_hook(lambda m, args, local=local: routing.update({local: args[1:]})))
            module.tap = partial(of_expert, local)  # type: ignore[assignment]
    try:
        with torch.enable_grad():
            out = stream.run(block, state.fork(), batch, grad=True)
            signs = torch.randint(0, 2, out.shape, generator=torch.Generator().manual_seed(seed)).to(out) * 2 - 1
            stream.by_token(signs).mul_(stream.batches[batch].real[..., None])  # nobody reads what comes of padding
            gradients = torch.autograd.grad((out * signs).sum(), [one.out for one in outputs], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
        for module in block.modules():
            module.__dict__.pop("tap", None)
    found: dict[str, OutputStats] = {}
    for one, gradient in zip(outputs, gradients, strict=True):
        if gradient is None:
            continue
        flat = gradient.reshape(-1, gradient.shape[-1])[: len(one.chosen)][one.chosen].float()  # experts' rows may be padded behind
        if one.weight is not None:  # it weighs the tokens already, where inputs are summed
            flat /= one.weight[one.chosen, None].float().clamp(min=torch.finfo(torch.float32).tiny)
        stem, _, leaf = one.local.rpartition(".")
        parts = {f"{stem}.gate_proj": 0, f"{stem}.up_proj": 1} if leaf == "gate_up_proj" else {one.local: 0}
        for name, share in zip(parts, flat.chunk(len(parts), -1), strict=True):
            if name in wanted and len(share):
                tokens, by_head = torch.tensor(len(share), device=share.device), _by_head(share, heads[name]) if name in heads else None
                found[name] = OutputStats(tokens, share.square().sum(0), by_head)
    return found


def apart(stats: Mapping[str, OutputStats], batch: int) -> dict[str, Tensor]:
    """One batch's sums, each under a name of its own: what ranks send one another."""
    return {
        f"{batch}/{part.name}/{local}": sum_
        for local, one in stats.items()
        for part in fields(one)
        if (sum_ := getattr(one, part.name)) is not None
    }


def summed(tensors: Mapping[str, Tensor]) -> dict[str, OutputStats]:
    """What `apart` took apart, over all batches, added up in their order whoever sent them."""
    sums: dict[str, dict[str, Tensor]] = {}
    for name in sorted(tensors, key=lambda name: (int(name.partition("/")[0]), name)):
        _, part, local = name.split("/", 2)
        of = sums.setdefault(local, {})
        of[part] = of[part] + tensors[name] if part in of else tensors[name]
    return {local: OutputStats(**of) for local, of in sums.items()}


def sensitivity(stats: Mapping[str, OutputStats]) -> dict[str, Float[Tensor, " out"]]:
    """How much a change of each row matters to one token, relative to the mean over all rows of all linears: only proportions count."""
    found = {local: one.square / one.tokens for local, one in sorted(stats.items())}
    total, rows = sum(float(value.sum()) for value in found.values()), sum(len(value) for value in found.values())
    return {local: value * (rows / total) if total else torch.ones_like(value) for local, value in found.items()}


def _by_head(gradient: Float[Tensor, "tokens out"], width: int) -> Float[Tensor, "heads width width"]:
    heads = gradient.unflatten(-1, (-1, width)).transpose(0, 1)
    return heads.mT @ heads
