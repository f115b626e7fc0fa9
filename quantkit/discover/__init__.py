"""A family's table, found on a random twin of its config: no name is known beforehand, every line is tried.

twin       <- config               the text model's structure, small, random weights (model/twin.py)
proof      <- twin                 block by block it computes what it computes as a whole, or nothing can be calibrated
calls      <- one forward          which module read which tensor, in what order
folds      <- calls, trials        random scales leave a producer and enter its readers; kept if the logits stay and half of it shows
the rest   <- calls, shapes        routers and narrow linears stay, names on disk, stages, what is added to the residual

A fold is exact algebra, so fp64 logits move by what fp32 norms round (1e-7); a wrong one moves them by percents.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit import families
from quantkit.discover import table
from quantkit.discover.calls import watch
from quantkit.discover.folds import Trials, norm_folds, row_folds
from quantkit.discover.names import NAMES, by_names
from quantkit.errors import FamilyError, QuantkitError
from quantkit.families.family import Family, Fold, in_block
from quantkit.model.blocks import decoder_blocks
from quantkit.model.twin import build_twin, streamed
from quantkit.recipe import load_family_table
from quantkit.types import Entry, Json

DISCOVERED = "discovered"
STREAMS = 1e-4  # relative change of the twin's logits that sums in another order explain
INSTEAD = f"`--recipe rtn-w4 --family {NAMES}` rounds its linears without running it; for more use a tool that loads the whole model"


@dataclass(frozen=True, slots=True)
class Discovery:
    """A table, why each of its lines stands there, and what was tried in vain or cannot be done."""

    family: Family
    evidence: Mapping[str, str]  # "producer ->" of a fold, a kept tensor, a field's name -> one line
    rejected: tuple[str, ...]
    notes: tuple[str, ...]


def family_for(config: Json, asked: str | None, entries: Mapping[str, Entry] | None = None) -> Family:
    """The table that `--family` asks for: the shipped one where nothing is asked, one found on a twin or read from names, or a file's.

    Args:
        entries: the checkpoint's tensors, where they are at hand; a table from names needs them.

    Raises:
        FamilyError: no table is shipped; the file is none, or speaks of other model types; nothing could be found; a model that has a
            file's table and computes something else one block at a time.
    """
    if asked is None:
        return families.find(config)[0]
    if asked == DISCOVERED:
        return discover(config).family
    if asked == NAMES:
        if not entries:
            raise FamilyError(
                f"--family {NAMES}: rounds a checkpoint's tensors by their names and runs nothing; give quantize the model's folder"
            )
        return by_names(config, entries)
    if Path(asked).suffix not in (".yaml", ".yml"):
        raise FamilyError(
            f"--family {asked}: give {DISCOVERED!r}, {NAMES!r}, or the .yaml file of a table (`quantkit families discover` writes one)"
        )
    table = families.from_table(load_family_table(Path(asked)), Path(asked).name)
    try:
        twin = _running_twin(config)
    except QuantkitError:  # written by hand because no twin can be built
        return table
    _blocks_of(*twin)
    return table


@torch.no_grad()
def discover(config: Json) -> Discovery:
    """A table for the architecture of a config.json; 0.1 to 5 s, whatever the model's size.

    Raises:
        FamilyError: no twin can be built, it does not stream, or nothing in it can be quantized.
        CheckpointError: transformers cannot read the config.
    """
    model, logits = _running_twin(config)
    blocks = _blocks_of(model, logits)
    calls, outputs = watch(model, blocks)
    notes = list(table.obstacles(blocks, calls))
    trials = Trials(model, blocks, logits)
    kept_linears = table.staying(config, model, calls)
    linears = table.linears(blocks, calls, kept_linears)
    if not linears:
        raise FamilyError(f"config.json: no linear of {model.config.model_type} can be quantized ({'; '.join(notes) or 'all are kept'})")
    evidence: dict[str, str] = {}
    rejected: list[str] = []
    folds: list[Fold] = []
    offset = norm_folds(trials, calls, folds, evidence, rejected)
    row_folds(trials, calls, linears, folds, evidence, rejected)
    fused = dict(table.fused(blocks))
    on_disk, leaves = table.on_disk(model, blocks, fused)
    kept = table.kept(blocks, linears, fused, leaves)
    text_type = model.config.model_type
    named = [t for t in (config.get("model_type"), text_type) if isinstance(t, str)]
    nested = isinstance(config.get("text_config"), Mapping)
    family = Family(
        name=named[0],
        model_types=tuple(dict.fromkeys(named)),
        linears=tuple(linears),
        kept=kept,
        outside=table.outside(model, nested),
        folds=tuple(folds),
        ignore=table.ignored(model, blocks, linears, on_disk, nested),
        norm_offset=offset,
        on_disk=on_disk,
        fused=fused,
        residual=table.residual(calls, outputs, linears),
        stages=table.stages(calls, linears),
        origin=DISCOVERED,
    )
    evidence |= {f"{local}.weight": why for local, why in kept_linears.items()}
    evidence["norm_offset"] = f"a norm of weight 0 multiplies by {offset:g}"
    return Discovery(family, evidence, tuple(rejected), tuple(notes))


def _running_twin(config: Json) -> tuple[Any, Tensor]:
    """The twin in fp64, or in fp32 where the architecture computes in no other."""
    try:
        return build_twin(config, torch.float64)
    except FamilyError:
        return build_twin(config, torch.float32)


def _blocks_of(model: Any, logits: Tensor) -> list[nn.Module]:
    """The decoder's blocks, proven to stream.

    Raises:
        FamilyError: they are not found, or compute something else one at a time.
    """
    place, layers = decoder_blocks(model)
    kind = model.config.model_type
    if in_block(f"{place}.0.weight") is None:
        raise FamilyError(
            f"config.json: the decoder blocks of {kind} are at {place}.N, where quantkit does not look for them; use a tool that loads the "
            "whole model"
        )
    try:
        moved = float((streamed(model) - logits).abs().max() / logits.abs().max())
    except QuantkitError as problem:
        raise FamilyError(f"{problem}; {INSTEAD}") from None
    except Exception as problem:  # whatever a class does that expects all its blocks
        said = f"{type(problem).__name__}: {' '.join(str(problem).split())[:160]}"
        raise FamilyError(f"config.json: {kind} does not run one block at a time ({said}); {INSTEAD}") from None
    if not moved < STREAMS:
        raise FamilyError(f"config.json: one block at a time, {kind} computes other logits (they move by {moved:.0e}); {INSTEAD}")
    return list(layers)


def as_yaml(found: Discovery, made_with: str = "") -> str:
    """The table as a file that `--family FILE` reads, the evidence beside each line."""
    family, evidence = found.family, found.evidence
    lines = [f"# Found by `quantkit families discover`{f', {made_with}' if made_with else ''}. Names are a decoder block's own."]
    lines += [f"# Mind: {note}." for note in found.notes]

    def listed(key: str, values: Iterable[str]) -> None:
        values = list(values)
        lines.append(f"{key}:" if values else f"{key}: []")
        lines.extend(_beside(f"- {_quoted(value)}", evidence.get(value, "")) for value in values)

    def mapped(key: str, values: Mapping[str, Any]) -> None:
        lines.append(f"{key}:" if values else f"{key}: {{}}")
        lines.extend(f"  {_quoted(one)}: {_quoted(other)}" for one, other in values.items())

    for one in fields(Family):
        value = getattr(family, one.name)
        if one.name in ("gguf", "origin"):
            continue
        if one.name == "folds":
            lines.append("folds:" if value else "folds: []")
            for fold in value:
                lines.append(_beside(f"- producer: {_quoted(fold.producer)}", evidence.get(f"{fold.producer} ->", "")))
                lines.append(f"  consumers: {_quoted(fold.consumers)}")
            lines += [f"# not {reason}" for reason in found.rejected]
        elif one.name == "stages":
            lines.append("stages:" if value else "stages: []")
            lines.extend(f"- {_quoted(stage)}" for stage in value)
        elif isinstance(value, Mapping):
            mapped(one.name, value)
        elif one.name in ("name", "norm_offset"):
            lines.append(_beside(f"{one.name}: {_quoted(value)}", evidence.get(one.name, "")))
        else:
            listed(one.name, value)
    return "\n".join(lines) + "\n"


def _quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)  # JSON is YAML


def _beside(line: str, why: str) -> str:
    return f"{line}  # {why}" if why else line
