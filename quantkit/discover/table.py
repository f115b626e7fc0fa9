"""The lines of a table that are no folds: what is quantized, what stays and why, names on disk, stages, the residual."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.discover.calls import Call, is_norm, parts_of, read_elsewhere, same, starred
from quantkit.errors import FamilyError
from quantkit.families import FAMILIES
from quantkit.families.family import ENDS, IGNORE_TOWERS, TOWERS, in_block, outside_block, rename
from quantkit.model.blocks import decoder_blocks, hollow_text_model
from quantkit.model.experts import is_experts, is_linear, readable, unreadable
from quantkit.model.twin import EXPERTS, ROWS, TOKENS, published
from quantkit.types import Json

NARROW = 32  # no group of columns fits; such linears are gates


def obstacles(blocks: list[nn.Module], calls: list[list[Call]]) -> Iterator[str]:
    """What cannot be quantized, each as one sentence with what comes of it."""
    for why in dict.fromkeys(why for block in blocks for why in unreadable(block)):
        yield f"{why}, which stay in the checkpoint's precision"
    called = {call.local for block_calls in calls for call in block_calls}
    silent = {local for block in blocks for local, module in block.named_modules() if is_linear(module)} - called
    for local in sorted(silent):
        yield f"{local}: nothing called it, so it is kept as it is; a recipe cannot target it"
    numbered = sorted({starred(local) for local in called if starred(local) != local})
    if numbered:
        yield f"{numbered[0]}: experts as a list of modules, outside transformers' experts interface, are kept as they are"


def staying(config: Json, model: Any, calls: list[list[Call]]) -> dict[str, str]:
    """What stays in the checkpoint's precision: routers; linears narrower than any group in the published model, or read elsewhere;
    those that a shipped table keeps under the same name (low-rank side paths, which a twin cannot tell from other linears)."""
    (place, blocks), (_, full) = decoder_blocks(model), decoder_blocks(hollow_text_model(config, torch.bfloat16))
    narrow: dict[str, int] = {}
    for block in full:
        for local, module in block.named_modules():
            if is_linear(module):
                narrow[local] = min(narrow.get(local, NARROW), module.in_features, module.out_features)
    found = dict.fromkeys(read_elsewhere(model, place), "its weight is read by other code than its own forward")
    others = (
        call.local for one in calls for call in one if is_linear(call.module) and call.read.numel() != ROWS * TOKENS * call.read.shape[-1]
    )
    found |= dict.fromkeys(others, "it is not fed one row for each token")
    for block in blocks:
        routes = any(is_experts(module) or _fused_elsewhere(module) for module in block.modules())
        for local, module in block.named_modules():
            weight = getattr(module, "weight", None)
            if routes and torch.is_tensor(weight) and weight.ndim == 2 and len(weight) == EXPERTS:
                found[local] = "a router: as many outputs as experts"
            elif shipped := next((family.name for family in FAMILIES if f"{local}.weight" in family.kept), None):
                found[local] = f"kept in {shipped}, for engines expect it in the checkpoint's precision"
            elif not is_linear(module):
                continue
            elif narrow.get(local, NARROW) < NARROW:
                found[local] = f"narrow: {narrow[local]} channels"
            elif starred(local) != local:
                found[local] = "an expert in a list of modules"
    return found


def _fused_elsewhere(module: nn.Module) -> bool:
    return any(parameter.ndim == 3 for parameter in module.parameters(recurse=False)) and not isinstance(module, nn.Conv1d)


def linears(blocks: list[nn.Module], calls: list[list[Call]], staying: Mapping[str, str]) -> list[str]:
    """What may be quantized, in the order of computation."""
    found: dict[str, None] = {}
    for block_calls in calls:
        for call in block_calls:
            if is_linear(call.module) and call.local not in staying:
                found[call.local] = None
            elif readable(call.module):
                found |= dict.fromkeys(parts_of(call.local))
    return list(found)


def fused(blocks: list[nn.Module]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for block in blocks:
        for local, module in block.named_modules():
            if readable(module):
                gate, up, down = parts_of(local)
                yield f"{local}.gate_up_proj", (gate, up)
                yield f"{local}.down_proj", (down,)


def kept(blocks: list[nn.Module], linears: Iterable[str], fused: Mapping[str, Any], leaves: Iterable[str]) -> tuple[str, ...]:
    """Every tensor of a block that is no quantized matrix."""
    quantized = {f"{local}.weight" for local in linears}
    names = dict.fromkeys(starred(name) for block in blocks for name in block.state_dict() if name not in quantized | fused.keys())
    return tuple(names | dict.fromkeys(leaves))


def on_disk(model: Any, blocks: list[nn.Module], fused: dict[str, tuple[str, ...]]) -> tuple[dict[str, str], list[str]]:
    """Modules whose published name differs, found by their values; and published tensors that hold a kept tensor under another leaf.

    Experts that are published in one tensor under another name get an entry in `fused` under that name too.

    Raises:
        FamilyError: a published tensor that is no tensor, expert or half of experts of the model, or none of a decoder block at all.
    """
    table: dict[str, str] = {}
    leaves: dict[str, None] = {}
    whole = [dict(_tensors(block, fused)) for block in blocks]
    together = [{name: block.state_dict()[name] for name in fused if name in block.state_dict()} for block in blocks]
    placed = [(place, tensor) for name, tensor in published(model).items() if (place := in_block(name)) is not None]
    if not placed:
        raise FamilyError("config.json: no published tensor of a decoder block is called model.layers.N.…; write its table by hand")
    for (prefix, index, disk), tensor in placed:
        have = whole[index]
        if disk in fused or (disk in have and have[disk].shape == tensor.shape):
            continue
        if one := _same(together[index], tensor):
            fused[disk] = fused[one]
            continue
        local = _same(have, tensor)
        if local is None and (tensor.ndim != 2 or _part_of_kept(blocks[index], fused, tensor)):
            # a convolution's share of one that the model holds in one piece, an expert of a layout that is not taken apart; no linear
            leaves[starred(disk)] = None
            continue
        if local is None:
            raise FamilyError(
                f"{prefix}{disk}: the published checkpoint lays this tensor out otherwise than the model; write its table by hand"
            )
        if local.rpartition(".")[2] == disk.rpartition(".")[2]:
            table[starred(local.rpartition(".")[0])] = starred(disk.rpartition(".")[0])
        else:
            leaves[starred(disk)] = None
    locals_ = {disk: local for local, disk in table.items()}  # as plans name a tensor: its module by the table, its leaf as it is
    return table, [_renamed(locals_, disk) for disk in leaves]


def _renamed(table: Mapping[str, str], tensor: str) -> str:
    module, dot, leaf = tensor.rpartition(".")
    return f"{rename(table, module)}{dot}{leaf}"


def _part_of_kept(block: nn.Module, fused: Mapping[str, Any], tensor: Tensor) -> bool:
    """Is it a matrix, or rows of one, in a tensor of three dimensions that stays?"""
    stay = [whole for name, whole in block.state_dict().items() if whole.ndim == 3 and name not in fused]
    matrices = (half for whole in stay for matrix in whole for one in (matrix, matrix.T) for half in (one, *one.chunk(2)))
    return any(matrix.shape == tensor.shape and torch.equal(matrix, tensor) for matrix in matrices)


def _same(among: Mapping[str, Tensor], tensor: Tensor) -> str | None:
    return next((name for name, value in among.items() if value.shape == tensor.shape and torch.equal(value, tensor)), None)


def _tensors(block: nn.Module, fused: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, Tensor]]:
    """A block's tensors, fused experts as the linears in their rows."""
    for name, tensor in block.state_dict().items():
        if name not in fused:
            yield name, tensor
            continue
        for expert, matrix in enumerate(tensor):
            for part, rows in zip(fused[name], matrix.chunk(len(fused[name])), strict=True):
                yield f"{part.replace('*', str(expert))}.weight", rows


def outside(model: Any, nested: bool) -> tuple[str, ...]:
    names = (starred(outside_block(name)) for name in published(model) if in_block(name) is None)
    return tuple(dict.fromkeys((*ENDS, *names, *(TOWERS if nested else ()))))


def ignored(model: Any, blocks: list[nn.Module], linears: Iterable[str], on_disk: Mapping[str, str], nested: bool) -> tuple[str, ...]:
    """Matrices that an engine may take for linears and that are kept, as compressed-tensors patterns."""
    quantized, names = set(linears), dict[str, None]()
    for block in blocks:
        for local, module in block.named_modules():
            weight = getattr(module, "weight", None)
            if torch.is_tensor(weight) and weight.ndim == 2 and local not in quantized:
                names |= dict.fromkeys((starred(local), rename(on_disk, local)))
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if is_linear(module) and in_block(f"{name}.weight") is None and module is not head:
            names[starred(outside_block(name))] = None
    patterns = (rf"re:.*\b{re.escape(name)}$".replace(r"\*", r"\d+") for name in names)
    return ("lm_head", *patterns, *((IGNORE_TOWERS,) if nested else ()))


def residual(calls: list[list[Call]], outputs: list[Any], linears: Iterable[str]) -> dict[str, str]:
    """Linears whose output is added to the residual as it is, and the norm that reads the residual there: the sum is seen again."""
    allowed, found, against = set(linears), dict[str, str](), set[str]()
    for block_calls, output in zip(calls, outputs, strict=True):
        norms = [(place, call) for place, call in enumerate(block_calls) if is_norm(call)]
        for place, call in enumerate(block_calls):
            if not is_linear(call.module) or call.local not in allowed or call.made is None:
                continue
            sums = [one.read for later, one in norms if later > place] + [one for one in (output,) if torch.is_tensor(one)]
            made, before = call.made, [one for earlier, one in norms if earlier < place and one.read.shape == call.made.shape]
            norm = next((one for one in reversed(before) if any(_is_sum(total, one.read, made) for total in sums)), None)
            if norm is None or found.get(call.local, norm.local) != norm.local:
                against.add(call.local)
            else:
                found[call.local] = norm.local
    return {local: norm for local, norm in found.items() if local not in against}


def _is_sum(total: Tensor, one: Tensor, other: Tensor) -> bool:
    return total.shape == one.shape and torch.allclose(total, one + other, rtol=1e-6, atol=1e-6)


def stages(calls: list[list[Call]], linears: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Linears that read the same tensor go together, in the order of computation in every block."""
    allowed = set(linears)
    groups: list[list[list[str]]] = []
    for block_calls in calls:
        made: list[tuple[Tensor, list[str]]] = []
        for call in block_calls:
            names = parts_of(call.local)[:2] if readable(call.module) else (call.local,)
            if names[0] not in allowed:
                continue
            together = next((group for read, group in made if same(read, call.read)), None)
            if together is None:
                made.append((call.read, together := []))
            together += [name for name in names if name not in together]
            if readable(call.module) and call.made is not None:
                made.append((call.made, [parts_of(call.local)[2]]))
        groups.append([group for _, group in made])
    level = dict.fromkeys(allowed, 0)
    for _ in level:  # longest path
        for in_order in groups:
            reached = -1
            for group in in_order:
                reached = max(reached + 1, *(level[name] for name in group))
                level |= dict.fromkeys(group, reached)
    return tuple(tuple(name for name in linears if level[name] == stage) for stage in sorted(set(level.values())))
