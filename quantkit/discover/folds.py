"""Trials of folds: random scales leave a producer and enter its readers; what leaves the logits alone is a fold, if half of it shows."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.discover.calls import Call, is_norm, parts_of, same, starred
from quantkit.families.family import Fold
from quantkit.model.experts import is_linear, readable
from quantkit.model.twin import logits_of

SAME = 1e-5  # relative change of the logits that rounding explains
SHOWS = 1e-4  # what half a fold must change at least, or the trial proved nothing

Edits = list[tuple[Tensor, Tensor]]


@dataclass(slots=True)
class Trials:
    """The twin, and how far its logits are from where they were under some edits."""

    model: Any
    blocks: list[nn.Module]
    logits: Tensor
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(2))

    def scale(self, *shape: int) -> Tensor:
        """1/2 to 2, log-uniform."""
        return torch.exp2(2 * torch.rand(shape, generator=self.generator, dtype=torch.float64) - 1).to(self.logits.dtype)

    @torch.no_grad()
    def moved(self, edits: Edits) -> float:
        """Relative to the largest logit; the weights are as they were afterwards."""
        before = []
        for tensor, value in edits:
            before.append((tensor, tensor.clone()))
            tensor.copy_(value)
        change = float((logits_of(self.model) - self.logits).abs().max() / self.logits.abs().max())
        for tensor, value in reversed(before):
            tensor.copy_(value)
        return change


def _offset_of(call: Call) -> float:
    """What a norm adds to its weight before it multiplies, by what comes out with weights 0 and 1."""
    weight: Any = call.module.weight
    before, outs = weight.clone(), []
    bias = getattr(call.module, "bias", None)
    shift = 0 if bias is None else bias
    try:
        for value in (0.0, 1.0):
            weight.fill_(value)
            outs.append(call.module(call.read) - shift)
    except Exception:  # a gated norm reads more than one tensor: left alone, for no trial succeeds with it
        return float("nan")
    finally:
        weight.copy_(before)
    gain = (outs[1] - outs[0]).double()
    return round(float((outs[0].double() * gain).sum() / gain.square().sum()), 4) if bool(gain.any()) else float("nan")


def _columns(call: Call, width: int) -> Tensor | None:
    """The weight whose columns read the call's input; None where there is no such matrix."""
    weight: Any = call.module.gate_up_proj if readable(call.module) else getattr(call.module, "weight", None)
    return weight if torch.is_tensor(weight) and weight.ndim >= 2 and weight.shape[-1] == width else None


def norm_folds(trials: Trials, calls: list[list[Call]], folds: list[Fold], evidence: dict[str, str], rejected: list[str]) -> float:
    """norm -> everything that reads its output, in all blocks at once. Returns the offset that the norms share."""
    found: dict[float, list[tuple[Fold, str]]] = {}
    names = dict.fromkeys(call.local for block_calls in calls for call in block_calls if is_norm(call))
    for norm in names:
        enter: Edits = []
        leave: Edits = []
        consumers: dict[str, None] = {}
        offsets, without = set(), ""
        for block_calls in calls:
            for call in (one for one in block_calls if one.local == norm and is_norm(one)):
                weight: Any = call.module.weight
                readers = [one for one in block_calls if one.module is not call.module and same(one.read, call.made)]
                scale = trials.scale(len(weight))
                for reader in readers:
                    columns = _columns(reader, len(weight))
                    if columns is None:  # a module around others is read through them; what it does besides, the trial shows
                        without = without if next(reader.module.children(), None) else reader.local
                        continue
                    enter.append((columns, columns * scale))
                    consumers |= dict.fromkeys(parts_of(reader.local)[:2] if readable(reader.module) else (reader.local,))
                if readers:
                    offset = _offset_of(call)
                    offsets.add(offset)
                    leave.append((weight, (offset + weight) / scale - offset))
                    if (bias := getattr(call.module, "bias", None)) is not None:
                        leave.append((bias, bias / scale))
        if not consumers:
            continue
        to = f"{norm} -> {', '.join(consumers)}"
        if without or len(offsets) != 1 or any(starred(name) != name for name in consumers if ".*." not in name):
            rejected.append(f"{to}: {without or 'its readers'} cannot take a scale by its columns")
            continue
        verdict = _tried(trials, leave, enter, to, rejected)
        if verdict:
            found.setdefault(offsets.pop(), []).append((Fold(norm, tuple(consumers)), verdict))
    if not found:
        return 0.0
    offset = max(found, key=lambda one: len(found[one]))  # a table holds one
    for other, some in found.items():
        for fold, verdict in some:
            if other == offset:
                folds.append(fold)
                evidence[f"{fold.producer} ->"] = verdict
            else:
                rejected.append(f"{fold.producer} -> {', '.join(fold.consumers)}: its norm adds {other:g} to its weight, others {offset:g}")
    return offset


def row_folds(
    trials: Trials,
    calls: list[list[Call]],
    linears: Iterable[str],
    folds: list[Fold],
    evidence: dict[str, str],
    rejected: list[str],
) -> None:
    """A linear's rows -> the columns of one that is called later, value heads repeated where widths ask for it; expert by expert."""
    allowed = set(linears)
    head = _head_width(trials.model.config)
    pairs: dict[tuple[str, str], list[tuple[Call, Call]]] = {}
    experts: dict[str, list[nn.Module]] = {}
    for block_calls in calls:
        ours = [call for call in block_calls if is_linear(call.module) and call.local in allowed]
        for place, first in enumerate(ours):
            for second in ours[place + 1 :]:
                rows, columns = first.module.out_features, second.module.in_features  # type: ignore[operator]
                fits = rows == columns or (head and columns % rows == 0 and rows % head == 0)  # type: ignore[operator]
                if fits and first.module is not second.module:
                    pairs.setdefault((first.local, second.local), []).append((first, second))
        for call in block_calls:
            if readable(call.module):
                experts.setdefault(call.local, []).append(call.module)
    for (producer, consumer), each in pairs.items():
        leave: Edits = []
        enter: Edits = []
        for first, second in each:
            a: Any = first.module
            b: Any = second.module
            scale, repeats = trials.scale(a.out_features), b.in_features // a.out_features
            leave.append((a.weight, a.weight / scale[:, None]))
            if a.bias is not None:
                leave.append((a.bias, a.bias / scale))
            over = scale if repeats == 1 else scale.view(-1, head).repeat_interleave(repeats, 0).reshape(-1)
            enter.append((b.weight, b.weight * over))
        if verdict := _tried(trials, leave, enter, f"{producer} -> {consumer}", rejected):
            folds.append(Fold(producer, (consumer,)))
            evidence[f"{producer} ->"] = verdict
    for local, modules in experts.items():
        gate, up, down = parts_of(local)
        for producer, half in ((up, 1), (gate, 0)):
            leave, enter = [], []
            for module in modules:
                of: Any = module
                half_rows, out = of.gate_up_proj.chunk(2, dim=1)[half], of.down_proj
                scale = trials.scale(*half_rows.shape[:2])
                leave.append((half_rows, half_rows / scale[:, :, None]))
                enter.append((out, out * scale[:, None, :]))
            if verdict := _tried(trials, leave, enter, f"{producer} -> {down}", rejected):
                folds.append(Fold(producer, (down,)))
                evidence[f"{producer} ->"] = verdict


def _tried(trials: Trials, leave: Edits, enter: Edits, name: str, rejected: list[str]) -> str:
    """What to say for a fold that holds; "" for one that does not."""
    moved = trials.moved([*leave, *enter])
    if not moved < SAME:
        rejected.append(f"{name}: logits moved by {moved:.1e}")
        return ""
    half = trials.moved(enter)
    if half < SHOWS:
        rejected.append(f"{name}: the logits do not depend on it ({half:.1e}), so nothing is proven")
        return ""
    return f"logits moved by {moved:.1e}, by {half:.1e} with half of it"


def _head_width(config: Any) -> int:
    text = config.to_dict()
    head, heads, hidden = (text.get(key) for key in ("head_dim", "num_attention_heads", "hidden_size"))
    if isinstance(head, int):
        return head
    return hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else 0
