"""Recipe + family + tensor shapes -> what happens to every tensor. From headers alone: no weight is read, no torch model is built."""

import difflib
import fnmatch
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit import families
from quantkit.errors import FamilyError, RecipeError
from quantkit.families.family import SERVED_AS_ONE, Family, Gguf, in_block, matches, outside_block, rename
from quantkit.recipe import GROUPS, Override, Recipe, Weights
from quantkit.types import BlockPlan, Entry, Fold, Json, Linear, Plan, Scheme, Source

GRIDS = {"q4_k": (4, 32, False), "q5_k": (5, 32, False), "q6_k": (6, 16, True), "iq4_nl": (4, 32, True)}  # bits, group, symmetric
SUPER = {"q4_k": 256, "q5_k": 256, "q6_k": 256, "iq4_nl": 32}  # columns that share a block
OTHERWISE = {  # where 256 does not divide the columns: the next larger type with groups of 32, as llama.cpp takes
    "q4_k": Weights(bits=5, group=32, signed=True),
    "q5_k": Weights(bits=5, group=32, symmetric=False),
    "q6_k": Weights(bits=8, group=32),
    "iq4_nl": Weights(bits=4, group=32, signed=True),
}
WEIGHTS = ("torch.bfloat16", "torch.float16", "torch.float32")  # by name: a plan is made without torch


def make_plan(
    recipe: Recipe,
    config: Json,
    entries: Mapping[str, Entry],
    inputs: str = "",
    chosen: Mapping[tuple[int, str], Weights] | None = None,
    family: Family | None = None,
) -> Plan:
    """The fate of every tensor of a checkpoint.

    Args:
        recipe: what to do.
        config: the checkpoint's config.json.
        entries: names, dtypes and shapes of its tensors.
        inputs: a digest of everything else that decides the output (weights, calibration set, versions).
        chosen: (block, linear) -> its scheme in place of the recipe's, where a target was asked for (see `ties`).
        family: a table in place of the shipped one.

    Raises:
        FamilyError: an architecture or a tensor that no table knows.
        RecipeError: a grid that a format does not hold, a group that divides no width, linears served as one matrix with different
            schemes, nothing to quantize.
    """
    if config.get("quantization_config"):
        raise RecipeError("config.json: the checkpoint is quantized already (quantization_config); start from the original weights")
    _check_grids(recipe)
    family, model_type = families.find(config) if family is None else (family, families.named_by(family, config))
    from_disk = {disk: local for local, disk in family.on_disk.items()}
    blocks: dict[int, tuple[str, dict[str, str]]] = {}  # index -> prefix, {local tensor name: name in the checkpoint}
    outside: list[str] = []
    entries = dict(sorted(entries.items(), key=lambda item: dot_natural(item[0])))  # shards come in any order, artefacts in one
    for name in entries:
        place = in_block(name)
        if place is None:
            _check_outside(family, name)
            outside.append(name)
            continue
        prefix, index, local = place
        module, dot, leaf = local.rpartition(".")
        local = rename(from_disk, module) + dot + leaf if dot else local
        blocks.setdefault(index, (prefix, {}))[1][local] = name
    if not blocks:
        raise FamilyError("the checkpoint holds no decoder block (model.layers.N.…); is it a whole causal language model?")
    if sorted(blocks) != list(range(len(blocks))):
        missing = next(i for i in range(max(blocks) + 1) if i not in blocks)
        raise FamilyError(f"the checkpoint has no tensor of decoder block {missing}; is a shard missing?")
    depth = text_config(config).get("num_hidden_layers")
    if isinstance(depth, int) and depth != len(blocks):
        raise FamilyError(f"the checkpoint holds {len(blocks)} decoder blocks, config.json says {depth} (num_hidden_layers)")
    head = _head_width(config)
    values = [i for i in sorted(blocks) if "self_attn.v_proj.weight" in blocks[i][1]]
    places = {i: _Place(i, len(blocks), values.index(i) if i in values else 0, len(values)) for i in blocks}
    plans = tuple(_plan_block(recipe, family, model_type, places[i], *blocks[i], entries, head, chosen or {}) for i in sorted(blocks))
    only_converted = not recipe.targets and recipe.formats == ["gguf"]
    if not only_converted and not any(linear.scheme for block in plans for linear in block.linears):
        raise RecipeError(f"recipe {recipe.name}: its targets leave nothing to quantize")
    _check_patterns(recipe, plans)
    schemes = [[linear.name, str(linear.scheme)] for block in plans for linear in block.linears]
    digest = hashlib.sha256(
        json.dumps(
            [
                _deciding(recipe),
                model_type,
                sorted((n, str(e.dtype), e.shape) for n, e in entries.items()),
                schemes,
                inputs,
            ]
        ).encode()
    ).hexdigest()
    called = f"{family.name} ({family.origin})" if family.origin else family.name
    return Plan(called, model_type, family.norm_offset, _precision(entries), plans, tuple(outside), dict(entries), family.ignore, digest)


def _deciding(recipe: Recipe) -> Json:
    """What of a recipe decides codes. Formats and what only a writer asks do not: a format can be added to a run later.

    With a target they do: it is kept in the bytes of the first format, and a GGUF alone has other choices and other ties.
    """
    said = recipe.model_dump(mode="json", exclude={"formats", "gguf", "onnx"})
    first: str = recipe.formats[0]
    if recipe.has_target:
        said["picked for"] = [recipe.formats == ["gguf"], first == "gguf"]
    if recipe.target_size is not None:
        said["counted in"] = [first, recipe.model_dump(mode="json", include={first})]
    return said


def _precision(entries: Mapping[str, Entry]) -> Any:
    """The dtype of most of the weights."""
    sizes: dict[Any, int] = {}
    for entry in entries.values():
        if str(entry.dtype) in WEIGHTS:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.bytes
    if not sizes:
        raise FamilyError(f"the checkpoint holds no {', '.join(WEIGHTS)} tensor; quantkit starts from the original weights")
    return max(sizes, key=lambda dtype: sizes[dtype])


def _check_grids(recipe: Recipe) -> None:
    """K-quants and IQ4_NL are GGUF's alone."""
    said = [recipe.weights, *recipe.choices, *(override.weights for override in recipe.overrides)]
    grid = next((weights.grid for weights in said if weights and weights.grid != "integer"), None)
    other = next((name for name in recipe.formats if name != "gguf"), None)
    if grid and other:
        raise RecipeError(f"recipe {recipe.name}: {other} does not hold {grid}, that grid is GGUF's; use --format gguf alone, or bits")


def _check_outside(family: Family, name: str) -> None:
    rest = outside_block(name)
    if not any(matches(pattern, rest) for pattern in family.outside):
        _unknown(family, name, rest, family.outside)


def _unknown(family: Family, name: str, local: str, known: Iterable[str]) -> None:
    near = difflib.get_close_matches(local, list(known), n=1, cutoff=0.0)
    raise FamilyError(
        f"{name}: the family {family.name} knows no such tensor; the nearest it knows is {near[0] if near else 'none'!r}; "
        f"if it belongs there, add it to {family.place}"
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a block stands, for mixes that give some layers more bits."""

    index: int
    depth: int
    value: int  # how many blocks with values come before it
    values: int  # and how many there are

    def more_bits(self, number: int, count: int) -> bool:
        """The first and the last eighth, and every third between: llama.cpp's use_more_bits."""
        return number < count // 8 or number >= 7 * count // 8 or (number - count // 8) % 3 == 2


def _of_mix(weights: Weights, local: str, place: _Place) -> Weights:
    """A mix's type for one linear (llama.cpp, src/llama-quant.cpp: llama_tensor_get_type)."""
    if weights.grid not in ("q4_k_m", "q4_k_s"):
        return weights
    rich = False
    if local.endswith("v_proj"):
        rich = place.more_bits(place.value, place.values) if weights.grid == "q4_k_m" else place.value < 4
    elif local.endswith("down_proj"):
        rich = place.more_bits(place.index, place.depth) if weights.grid == "q4_k_m" else place.index < place.depth // 8
    return Weights(grid=("q6_k" if weights.grid == "q4_k_m" else "q5_k") if rich else "q4_k")


def _plan_block(
    recipe: Recipe,
    family: Family,
    model_type: str,
    place: _Place,
    prefix: str,
    tensors: Mapping[str, str],
    entries: Mapping[str, Entry],
    head: int,
    chosen: Mapping[tuple[int, str], Weights],
) -> BlockPlan:
    index = place.index
    found: dict[str, tuple[Source, tuple[int, int], str]] = {}  # local name -> source, shape, name as written
    kept: dict[str, str] = {}
    for local, name in tensors.items():
        shape = entries[name].shape
        module = local.removesuffix(".weight")
        if local in family.fused and len(shape) == 3:
            for expert, matrix in _split_fused(family.fused[local], shape):
                written = f"{prefix}{rename(family.on_disk, matrix.local)}"
                found[matrix.local] = (Source(name, expert, matrix.rows), matrix.shape, written)
        elif local.endswith(".weight") and len(shape) == 2 and any(matches(p, module) for p in family.linears):
            found[module] = (Source(name), (shape[0], shape[1]), name.removesuffix(".weight"))
        elif any(matches(pattern, local) for pattern in family.kept):
            kept[local] = name
        else:
            _unknown(family, name, local, (*family.kept, *(f"{p}.weight" for p in family.linears), *family.fused))
    for source, _, _ in found.values():
        if str(entries[source.tensor].dtype) not in WEIGHTS:
            raise FamilyError(f"{source.tensor}: holds {entries[source.tensor].dtype}; quantkit starts from bf16, fp16 or fp32 weights")
    wanted = {local: _wanted(recipe, place, local) for local in found}
    wanted |= {local: (chosen[index, local], "picked for the target") for local in found if (index, local) in chosen}
    schemes, notes = _schemes(recipe, family, model_type, index, found, wanted)
    linears = tuple(
        Linear(written, local, source, shape, schemes[local], notes.get(local, ""))
        for local, (source, shape, written) in sorted(found.items(), key=lambda item: _order(family, item[0]))
    )
    quantized = {linear.local for linear in linears if linear.scheme}
    present = {*found, *(local.removesuffix(".weight") for local in tensors)}
    residual = {local: norm for local, norm in family.residual.items() if local in quantized}
    folds = tuple(_folds(family, present, set(found), quantized, found, head))
    return BlockPlan(index, prefix, linears, folds, kept, tuple(_stages(family, linears)), residual)


def _stages(family: Family, linears: Iterable[Linear]) -> Iterator[tuple[str, ...]]:
    """The linears that are quantized, stage by stage in the order of computation."""
    locals_ = [linear.local for linear in linears if linear.scheme]
    for patterns in family.stages:
        if stage := tuple(local for local in locals_ if local.rpartition(".")[2] in patterns or any(matches(p, local) for p in patterns)):
            yield stage


def _order(family: Family, local: str) -> tuple[int, int]:
    position = next(i for i, pattern in enumerate(family.linears) if matches(pattern, local))
    number = next((int(part) for part in local.split(".") if part.isdigit()), 0)
    return (position if number == 0 and ".0." not in local else len(family.linears) + number, position)


class _Matrix:
    def __init__(self, local: str, rows: tuple[int, int] | None, shape: tuple[int, int]):
        self.local, self.rows, self.shape = local, rows, shape


def _split_fused(parts: tuple[str, ...], shape: tuple[int, ...]) -> Iterable[tuple[int, _Matrix]]:
    """The matrices of a fused (experts, out, in) tensor: the out rows are shared evenly by `parts`."""
    experts, out, columns = shape
    share = out // len(parts)
    for expert in range(experts):
        for j, pattern in enumerate(parts):
            rows = (j * share, (j + 1) * share) if len(parts) > 1 else None
            yield expert, _Matrix(pattern.replace("*", str(expert)), rows, (share, columns))


def _wanted(recipe: Recipe, place: _Place, local: str) -> tuple[Weights | None, str]:
    """The scheme that the recipe asks for, or None and why."""
    answer: tuple[Weights | None, str]
    if not any_match(recipe.targets, local):
        answer = None, "not a target of the recipe"
    elif any_match(recipe.ignore, local):
        answer = None, "ignored by the recipe"
    else:
        answer = recipe.weights, ""
    for override in recipe.overrides:
        if any_match(override.patterns(), local) and (override.layers is None or place.index in override.layers):
            answer = _overridden(override, recipe)
    weights, why = answer
    return (None, why) if weights is None else (_of_mix(weights, local, place), why)


def _overridden(override: Override, recipe: Recipe) -> tuple[Weights | None, str]:
    if override.keep:
        return None, "kept by an override of the recipe"
    # what an override leaves unsaid is the recipe's
    said = override.weights.model_dump(exclude_unset=True) if override.weights else {}
    if "grid" in said or recipe.weights.grid != "integer":  # a grid says all
        return override.weights or recipe.weights, ""
    return recipe.weights.model_copy(update=said), ""


def any_match(patterns: Iterable[str], local: str) -> bool:
    return any(fnmatch.fnmatchcase(local, pattern) for pattern in patterns)


def _schemes(
    recipe: Recipe,
    family: Family,
    model_type: str,
    index: int,
    found: Mapping[str, tuple[Source, tuple[int, int], str]],
    wanted: Mapping[str, tuple[Weights | None, str]],
) -> tuple[dict[str, Scheme | None], dict[str, str]]:
    """Each linear's scheme, groups made to divide: one set of experts shares a scheme, as engines serve it as one matrix."""
    notes = {local: why for local, (_, why) in wanted.items() if why}
    together: dict[str, list[str]] = {}
    for local in found:
        together.setdefault(served_as(recipe, family.gguf.get(model_type), local), []).append(local)
    schemes: dict[str, Scheme | None] = {}
    for locals_ in together.values():
        asked = {wanted[local][0] for local in locals_}
        if len(asked) > 1:
            raise RecipeError(
                f"recipe {recipe.name}: block {index} asks for different schemes in {', '.join(sorted(locals_)[:3])}, "
                "which engines serve as one matrix; give them one"
            )
        weights = asked.pop()
        if weights is None:
            schemes |= dict.fromkeys(locals_, None)
            continue
        widths = {found[local][1][1] for local in locals_}
        if weights.grid != "integer":
            odd = next((width for width in sorted(widths) if width % SUPER[weights.grid]), None)
            if odd is None:
                schemes |= dict.fromkeys(locals_, Scheme(*GRIDS[weights.grid], grid=weights.grid))
                continue
            notes |= dict.fromkeys(locals_, f"{weights.grid}: {SUPER[weights.grid]} does not divide {odd}")
            weights = OTHERWISE[weights.grid]
        group = _fitting_group(recipe, weights, widths, index, locals_, found)
        for local in locals_:
            schemes[local] = Scheme(weights.bits, group, weights.symmetric, weights.signed and weights.symmetric)
            if weights.group != "row" and group != weights.group:
                at_fault = next(width for width in sorted(widths) if width % weights.group)
                elsewhere = "" if found[local][1][1] == at_fault else ", the columns of another matrix that is served with it"
                notes[local] = f"group {group}: {weights.group} does not divide {at_fault}{elsewhere}"
    return schemes, notes


def served_as(recipe: Recipe, table: Gguf | None, local: str) -> str:
    """A name for the matrix as which an engine serves a linear: its parts share a scheme."""
    if recipe.formats == ["gguf"] and table:  # each of its tensors has a type of its own
        return table.called(local) or local
    stem = local.partition("experts.")[0] + "experts" if "experts." in local else local
    return next((names[0] for names in SERVED_AS_ONE if local in names), stem)


def _fitting_group(
    recipe: Recipe,
    weights: Weights,
    widths: set[int],
    index: int,
    locals_: list[str],
    found: Mapping[str, tuple[Source, tuple[int, int], str]],
) -> int:
    if weights.group == "row":
        return 0
    for group in sorted((g for g in GROUPS if g <= weights.group), reverse=True):
        if all(width % group == 0 for width in widths):
            return group
    at_fault = next(local for local in sorted(locals_, key=dot_natural) if found[local][1][1] % GROUPS[0])
    raise RecipeError(
        f"recipe {recipe.name}: no group of {weights.group} or less (32, 64, 128) divides the {found[at_fault][1][1]} columns of "
        f"{at_fault} in block {index}; use `group: row`, or keep it with an override"
    )


def _folds(
    family: Family,
    present: set[str],
    linears: set[str],
    quantized: set[str],
    found: Mapping[str, tuple[Source, tuple[int, int], str]],
    head: int,
) -> Iterable[Fold]:
    """The family's folds, expert by expert where they are an expert's own, without those that would touch a linear that is kept."""
    for fold in family.folds:
        starred = "*" in fold.producer
        experts = sorted({_number(fold.producer, name) for name in present if matches(fold.producer, name)}) if starred else [None]
        for expert in experts:
            producer = fold.producer if expert is None else fold.producer.replace("*", str(expert))
            if producer not in present:
                continue
            if expert is None:
                named = {name for name in present if any(matches(pattern, name) for pattern in fold.consumers)}
            else:
                named = {consumer.replace("*", str(expert)) for consumer in fold.consumers} & present
            consumers = tuple(sorted(named, key=dot_natural))
            touched = {producer, *consumers} & linears
            if not consumers or not touched & quantized or touched - quantized:
                continue
            repeats = producer in found and found[producer][1][0] != found[consumers[0]][1][1]
            if repeats and (not head or found[producer][1][0] % head):
                continue  # a value head's width that the config does not tell
            yield Fold(producer, consumers, head if repeats else 0)


def _number(pattern: str, name: str) -> int:
    before = pattern.index("*")
    return int(name[before : len(name) - len(pattern) + before + 1])


def dot_natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts experts.2 before experts.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _head_width(config: Json) -> int:
    text = text_config(config)
    head, heads, hidden = (text.get(key) for key in ("head_dim", "num_attention_heads", "hidden_size"))
    if isinstance(head, int):
        return head
    return hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else 0


def text_config(config: Json) -> Mapping[str, object]:
    """The part of a config.json that speaks of the text model: nested, or all of it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def _check_patterns(recipe: Recipe, blocks: Iterable[BlockPlan]) -> None:
    """A pattern that matches nothing is a slip of the pen, not a wish."""
    blocks = list(blocks)
    locals_ = {linear.local for block in blocks for linear in block.linears}
    for override in recipe.overrides:
        for layer in override.layers or ():
            if not 0 <= layer < len(blocks):
                raise RecipeError(f"recipe {recipe.name}: an override names layer {layer}, the model has 0 to {len(blocks) - 1}")
    patterns = [*recipe.targets, *recipe.ignore, *(p for override in recipe.overrides for p in override.patterns())]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(local, pattern) for local in locals_):
            near = difflib.get_close_matches(pattern, sorted(locals_), n=1, cutoff=0.0)
            raise RecipeError(f"recipe {recipe.name}: the pattern {pattern!r} matches no linear of this model; the nearest is {near[0]!r}")
