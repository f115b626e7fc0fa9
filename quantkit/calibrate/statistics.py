"""Statistics as a safetensors file: written whole or not at all, read back only if nothing is missing, changed or impossible.

docs/statistics.md tells the format for readers other than this one.

    blocks.3.self_attn.q_proj.square              F32 (in,)            an input that several linears share stands once
    blocks.3.mlp.experts.down_proj.square         F32 (experts, in)    an expert's linear is a row
    reserve.3.mlp.experts.down_proj.square        F32 (experts, in)    what the reserve added, apart
    routing.3.mlp.experts                         I64 (cells, experts)
    topped_up.3.mlp.experts                       I64 (experts,)
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantkit.disk import replacing
from quantkit.errors import CalibrationError
from quantkit.types import BlockStatistics, InputStats, Json, Statistics

FORMAT, VERSION = "quantkit.statistics", 1
PARTS = ("abs", "square", "gram")
_EXPERT = re.compile(r"(.*experts)\.(\d+)\.(\w+)")


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Beside and renamed, so that a reader never meets half a file."""
    tensors: dict[str, Tensor] = {}
    inputs: dict[str, str] = {}
    for index, block in enumerate(statistics.blocks):
        experts: dict[str, int] = {}
        for match in filter(None, map(_EXPERT.fullmatch, block.inputs)):
            experts[match[1]] = max(experts.get(match[1], 0), int(match[2]) + 1)
        for kind, stats in (("blocks", block.inputs), ("reserve", block.reserve)):
            _flatten(f"{kind}.{index}.", stats, experts, tensors, inputs)
        tensors |= {f"routing.{index}.{local}": table for local, table in block.routing.items()}
        tensors |= {f"topped_up.{index}.{local}": tokens for local, tokens in block.topped_up.items()}
    tensors = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    header: Json = {
        "version": VERSION,
        "blocks": len(statistics.blocks),
        "cells": statistics.cells,
        "inputs": inputs,
        "about": dict(statistics.about),
    }
    header["sha256"] = _digest(tensors, json.loads(json.dumps(header)))  # as it will be read: tuples are lists then
    with replacing(path) as temporary:
        save_file(tensors, temporary, {FORMAT: json.dumps(header, ensure_ascii=False)})  # one key: several come in any order


def _flatten(
    prefix: str, stats: Mapping[str, InputStats], experts: Mapping[str, int], tensors: dict[str, Tensor], inputs: dict[str, str]
) -> None:
    """Tensors of one block; `inputs` leads from a linear to the one whose statistics it shares."""
    known: dict[int, str] = {}
    for local, one in stats.items():
        match = _EXPERT.fullmatch(local)
        name = prefix + (f"{match[1]}.{match[3]}" if match else local)
        key = inputs.setdefault(name, known.setdefault(id(one), name))
        if key != name:
            continue
        fields = {"tokens": torch.tensor(one.tokens), **{part: value for part in PARTS if (value := getattr(one, part)) is not None}}
        for part, value in fields.items():
            if match is None:
                tensors[f"{key}.{part}"] = value
                continue
            rows = tensors.setdefault(f"{key}.{part}", torch.zeros(experts[match[1]], *value.shape, dtype=value.dtype))
            rows[int(match[2])] = value


def read_statistics(path: Path) -> Statistics:
    """A file of `save_statistics`.

    Raises:
        CalibrationError: not such a file, of another version, damaged, or with values that no run leaves (negative, NaN).
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if FORMAT not in metadata:
                raise CalibrationError(f"{path}: not a file of statistics; `quantkit calibrate` writes one")
            header = json.loads(metadata[FORMAT])
            if header["version"] != VERSION:
                raise CalibrationError(f"{path}: statistics of version {header['version']}, this quantkit reads {VERSION}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as problem:
        raise CalibrationError(f"{path}: cannot be read ({' '.join(str(problem).split())[:120]})") from None
    if header.pop("sha256", None) != _digest(tensors, header):
        raise CalibrationError(f"{path}: damaged: its tensors are not those that were written; run `quantkit calibrate` again")
    for name, tensor in tensors.items():
        if not name.endswith(".gram") and not bool(((tensor >= 0) & tensor.isfinite()).all()):
            raise CalibrationError(f"{path}: {name} holds negative or infinite sums, which no run leaves")
    try:
        return _assembled(tensors, header)
    except (KeyError, ValueError, TypeError, IndexError) as problem:
        raise CalibrationError(f"{path}: statistics without a part of theirs ({type(problem).__name__}: {problem})") from None


def _assembled(tensors: Mapping[str, Tensor], header: Json) -> Statistics:
    read: dict[str, InputStats] = {}

    def one(key: str, expert: int | None) -> InputStats:
        name = f"{key}#{expert}"
        if name not in read:
            row = {part: tensors[f"{key}.{part}"] for part in ("tokens", *PARTS) if f"{key}.{part}" in tensors}
            if expert is not None:
                row = {part: value[expert] for part, value in row.items()}
            read[name] = InputStats(int(row["tokens"]), row["abs"], row["square"], row.get("gram"))
        return read[name]

    blocks: list[dict[str, dict[str, Any]]] = [
        {"inputs": {}, "reserve": {}, "routing": {}, "topped_up": {}} for _ in range(header["blocks"])
    ]
    for name, key in header["inputs"].items():
        kind, index, local = name.split(".", 2)
        place = blocks[int(index)]["inputs" if kind == "blocks" else kind]
        tokens = tensors[f"{key}.tokens"]
        if tokens.ndim == 0:
            place[local] = one(key, None)
            continue
        module, leaf = local.rsplit(".", 1)
        fed = [expert for expert in range(len(tokens)) if kind == "blocks" or tokens[expert]]
        place |= {f"{module}.{expert}.{leaf}": one(key, expert) for expert in fed}
    for name, tensor in tensors.items():
        kind, index, local = name.split(".", 2)
        if kind in ("routing", "topped_up"):
            blocks[int(index)][kind][local] = tensor
    cells = tuple((language, domain) for language, domain in header["cells"])
    return Statistics(tuple(BlockStatistics(**block) for block in blocks), cells, header["about"])


def _digest(tensors: Mapping[str, Tensor], header: Json) -> str:
    total = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()
