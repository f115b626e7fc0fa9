"""Bits where they pay: a size, or bits a weight, and the solver's own losses say which linear gets which scheme.

ties      <- plan, recipe            linears that engines serve as one matrix, and the schemes that would do for them
losses    <- a few batches           every tie's weights rounded to every scheme: how far does the block's output move?
schemes   <- losses, bytes           a knapsack; the writer's own count has the last word

A block's output is the residual stream, so a relative change of it is one currency for all blocks.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from quantkit.calibrate.observe import observe
from quantkit.disk import write_whole
from quantkit.errors import RecipeError
from quantkit.families import gguf_of
from quantkit.model.blocks import Skeleton
from quantkit.model.memory import give_back_memory
from quantkit.model.proof import outputs_with
from quantkit.model.sound import block_weights
from quantkit.model.streams import State, Stream
from quantkit.plan import GRIDS, SUPER, any_match, served_as
from quantkit.recipe import Recipe, Weights
from quantkit.report import Clock
from quantkit.run import effort_of
from quantkit.solve.block import nearly
from quantkit.solve.budget import allocate
from quantkit.solve.folds import choose_folds
from quantkit.solve.pooling import Pooled
from quantkit.types import Batch, BlockPlan, Fold, Json, Linear, Plan, Scheme, expert_of

GRID_BITS = {"q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625, "iq4_nl": 4.5}  # a weight
TOKENS = 4096  # of the calibration set, on which schemes are told apart
EXPERTS = 8  # of a block that are looked at, evenly spread: rounding errors of different experts add up
CHOICES = {  # what a target is reached with, where the recipe offers nothing
    "compressed-tensors": (
        Weights(bits=4, group=128, signed=True),
        Weights(bits=4, group=64, signed=True),
        Weights(bits=4, group=32, signed=True),
        Weights(bits=8, group=128),
        Weights(bits=8, group=32),
    ),
    "gguf": (
        Weights(grid="iq4_nl"),
        Weights(grid="q4_k"),
        Weights(grid="q5_k"),
        Weights(grid="q6_k"),
        Weights(bits=5, signed=True),
        Weights(bits=8),
    ),
}


@dataclass(frozen=True, slots=True)
class Tie:
    """Linears that must share a scheme, and the schemes that engines would take for them."""

    linears: tuple[tuple[int, Linear], ...]  # with their blocks
    choices: tuple[Weights, ...]
    schemes: tuple[Scheme, ...]  # what the choices come to
    bytes: tuple[int, ...]  # of all the linears, by choice


def ties(recipe: Recipe, plan: Plan) -> list[Tie]:
    """What a target's budget is divided among: what engines serve as one matrix goes together; what an override names keeps its scheme,
    and so does what is served with it.

    Experts of families whose checkpoints keep them apart (Qwen3-MoE, Mixtral) share one scheme in all blocks of a compressed-tensors
    checkpoint: transformers decodes them by one.

    Raises:
        RecipeError: no choice fits a linear, or nothing is left to pick.
    """
    first = recipe.formats[0]
    table = gguf_of(plan.family, plan.model_type)
    offered = tuple(recipe.choices) or CHOICES["gguf" if recipe.formats == ["gguf"] else "compressed-tensors"]
    served: dict[tuple[int | None, str], list[tuple[int, Linear]]] = {}
    for block in plan.blocks:
        matrices: dict[str, list[Linear]] = {}
        for linear in block.linears:
            matrices.setdefault(served_as(recipe, table, linear.local), []).append(linear)
        overrides = [one for one in recipe.overrides if one.layers is None or block.index in one.layers]
        for matrix, linears in matrices.items():
            if any(linear.scheme is None or any(any_match(one.patterns(), linear.local) for one in overrides) for linear in linears):
                continue
            apart = expert_of(linears[0].local) is not None and linears[0].source.expert is None
            place = None if apart and recipe.formats != ["gguf"] else block.index
            served.setdefault((place, matrix), []).extend((block.index, linear) for linear in linears)
    found = []
    for tied in served.values():
        widths = {linear.shape[1] for _, linear in tied}
        fitting = [choice for choice in offered if all(_fits(choice, width) for width in widths)]
        if not fitting:
            raise RecipeError(
                f"recipe {recipe.name}: none of the choices fits the {sorted(widths)[0]} columns of {tied[0][1].name}; "
                "offer one that does, or give it weights by an override"
            )
        schemes = [_scheme(choice) for choice in fitting]
        sizes = [sum(scheme_bytes(scheme, linear.shape, first) for _, linear in tied) for scheme in schemes]
        found.append(Tie(tuple(tied), tuple(fitting), tuple(schemes), tuple(sizes)))
    if not found:
        raise RecipeError(
            f"recipe {recipe.name}: its overrides leave nothing to pick for the target; leave the target out, or some of them"
        )
    return found


def _fits(weights: Weights, width: int) -> bool:
    if weights.grid != "integer":
        return width % SUPER[weights.grid] == 0
    return weights.group == "row" or width % weights.group == 0


def _scheme(weights: Weights) -> Scheme:
    if weights.grid != "integer":
        return Scheme(*GRIDS[weights.grid], grid=weights.grid)
    group = 0 if weights.group == "row" else weights.group
    return Scheme(weights.bits, group, weights.symmetric, weights.signed and weights.symmetric)


def scheme_bytes(scheme: Scheme, shape: tuple[int, int], form: str) -> int:
    """Bytes of one matrix: codes, 16-bit scales, zero points (a 16-bit minimum in GGUF, which repeats scales for every 32 columns)."""
    out, columns = shape
    if scheme.grid != "integer":
        bits = GRID_BITS[scheme.grid] * columns
    elif form == "gguf":
        bits = (scheme.bits + (16 if scheme.symmetric else 32) / 32) * columns
    else:
        bits = scheme.bits * columns + (16 + (0 if scheme.symmetric else scheme.bits)) * (columns // scheme.width(columns))
    return round(out * bits / 8)


def extremes(recipe: Recipe, plan: Plan) -> dict[str, dict[tuple[int, str], Weights]]:
    """The "smallest" and the "largest" choices: between their sizes lies every target that can be kept."""
    sets = ties(recipe, plan)
    return {end: _spread(sets, choice) for end, choice in _ends(sets).items()}


def mixtures(recipe: Recipe, plan: Plan) -> Iterator[dict[tuple[int, str], Weights]]:
    """All choices in turn over the sets, until each set had each: what no file could hold is to be refused before it is weighed."""
    sets = ties(recipe, plan) if recipe.has_target else []
    for turn in range(max((len(tie.choices) for tie in sets), default=0)):
        yield _spread(sets, [(number + turn) % len(tie.choices) for number, tie in enumerate(sets)])


def _ends(sets: Sequence[Tie]) -> dict[str, list[int]]:
    return {
        end: [best(range(len(tie.bytes)), key=tie.bytes.__getitem__) for tie in sets] for end, best in (("smallest", min), ("largest", max))
    }


def _spread(sets: Sequence[Tie], choice: Sequence[int]) -> dict[tuple[int, str], Weights]:
    return {(i, linear.local): tie.choices[c] for tie, c in zip(sets, choice, strict=True) for i, linear in tie.linears}


def pick(
    recipe: Recipe,
    plan: Plan,
    remade: Callable[[Mapping[tuple[int, str], Weights]], Plan],
    size_of: Callable[[Plan], int],
    skeleton: Skeleton,
    batches: Sequence[Batch],
    notes: Path | None,
    clock: Clock,
) -> tuple[Plan, Json]:
    """The best schemes within the recipe's target.

    Args:
        plan: made without a choice.
        remade: schemes by (block, linear) -> the plan with them.
        size_of: exact bytes of the weight files under a plan.
        notes: where the losses are kept, so that a run that goes on need not measure them again; None keeps nothing.

    Returns:
        the plan, and set by set of linears what each scheme costs, in bytes and in the block's output.

    Raises:
        RecipeError: the smallest choices exceed the target, or what a scheme costs is no number.
    """
    sets = ties(recipe, plan)
    losses = _losses(recipe, plan, sets, skeleton, batches, notes, clock)
    for tie, loss in zip(sets, losses, strict=True):
        for scheme, value in zip(tie.schemes, loss, strict=True):
            if not math.isfinite(value):
                raise RecipeError(
                    f"recipe {recipe.name}: {tie.linears[0][1].name} in {scheme} makes NaN or infinity of its block's output; "
                    "keep it with an override, or offer other choices"
                )
    tied = sum(linear.shape[0] * linear.shape[1] for tie in sets for _, linear in tie.linears)
    options = [list(zip(tie.bytes, loss, strict=True)) for tie, loss in zip(sets, losses, strict=True)]

    def taking(choice: Sequence[int]) -> Plan:
        return remade(_spread(sets, choice))

    smallest = _ends(sets)["smallest"]
    least = sum(tie.bytes[c] for tie, c in zip(sets, smallest, strict=True))
    if recipe.target_bits is not None:
        free = {linear.name for tie in sets for _, linear in tie.linears}
        quantized = [linear for linear in plan.linears() if linear.scheme]
        weights = sum(linear.shape[0] * linear.shape[1] for linear in quantized)
        fixed = 0  # what overrides gave a scheme of its own
        for linear in quantized:
            if linear.scheme and linear.name not in free:
                fixed += scheme_bytes(linear.scheme, linear.shape, recipe.formats[0])
        budget = int(recipe.target_bits * weights / 8) - fixed
        if budget < least:
            bits = (least + fixed) * 8 / weights
            raise RecipeError(f"recipe {recipe.name}: target_bits {recipe.target_bits}: the smallest choices take {bits:.3f} bits a weight")
        made = taking(allocate(options, budget))
    else:
        assert recipe.target_size is not None
        floor = size_of(taking(smallest))
        if floor > recipe.target_size:
            raise RecipeError(
                f"recipe {recipe.name}: target_size {recipe.target_size:,}: the smallest choices take {floor:,} bytes "
                f"({(floor - least) / floor:.0%} of them are no choice's); offer smaller choices, or quantize more"
            )
        budget = recipe.target_size - (floor - least)
        made = taking(allocate(options, budget))
        while (excess := size_of(made) - recipe.target_size) > 0:
            budget -= excess  # what headers and alignment take hangs on the choice, by a few bytes
            made = taking(allocate(options, budget) if budget >= least else smallest)
    schemes = {(block.index, linear.local): linear.scheme for block in made.blocks for linear in block.linears}
    table: list[Json] = [
        {
            "linears": len(tie.linears),
            "first": tie.linears[0][1].name,
            "picked": str(schemes[tie.linears[0][0], tie.linears[0][1].local]),
            "costs": {str(scheme): [size, value] for scheme, size, value in zip(tie.schemes, tie.bytes, loss, strict=True)},
        }
        for tie, loss in zip(sets, losses, strict=True)
    ]
    taken = sum(int(row["costs"][row["picked"]][0]) for row in table)
    return made, {"bits": recipe.target_bits, "size": recipe.target_size, "picked_bits": taken * 8 / tied, "sets": table}


def _losses(
    recipe: Recipe, plan: Plan, sets: Sequence[Tie], skeleton: Skeleton, batches: Sequence[Batch], notes: Path | None, clock: Clock
) -> list[list[float]]:
    """Of every set, by choice: the relative square change of a block's output, as measured, or as an earlier process of this run did."""
    names = [[tie.linears[0][1].name, *map(str, tie.schemes)] for tie in sets]
    if notes is not None and notes.is_file():
        try:
            held = json.loads(notes.read_text(encoding="utf-8"))
            if held["fingerprint"] == plan.fingerprint and held["names"] == names:
                return [[float(value) for value in row] for row in held["losses"]]
        except (ValueError, KeyError, TypeError):
            pass  # damaged: measured anew
    losses = [[0.0] * len(tie.schemes) for tie in sets]
    stream = Stream(skeleton, _some(batches))
    state = stream.start()
    for block_plan in plan.blocks:
        index = block_plan.index
        with clock.phase("weighing schemes", index), skeleton.block(index) as block:
            for number, measured in _of_block(recipe, plan, block_plan, sets, stream, state, block).items():
                losses[number] = [sum(pair) for pair in zip(losses[number], measured, strict=True)]
            stream.advance(block, state)
        stream.close()
        state.check(f"block {index}")
        give_back_memory()
    if notes is not None:
        write_whole(notes, json.dumps({"fingerprint": plan.fingerprint, "names": names, "losses": losses}) + "\n")
    return losses


@torch.no_grad()
def _of_block(
    recipe: Recipe, plan: Plan, block_plan: BlockPlan, sets: Sequence[Tie], stream: Stream, state: State, block: nn.Module
) -> dict[int, list[float]]:
    """Set by set, the change of one block's output under each of its schemes."""
    own = {number: _sampled(tie, block_plan.index) for number, tie in enumerate(sets)}
    own = {number: linears for number, linears in own.items() if linears}
    linears = [linear for some in own.values() for linear in some]
    weights, kept = block_weights(block_plan, block, stream.skeleton, plan.dtype)
    effort = effort_of(recipe)
    inputs = Pooled(observe(stream, block, state, {linear.local for linear in linears}, grams=False), effort.expert_floor)
    within = replace(
        block_plan, linears=tuple(linears), folds=tuple(_within(block_plan.folds, {linear.local for linear in linears}, weights))
    )
    folding = choose_folds(within, weights, kept, inputs, {}, plan.norm_offset, effort)
    before = outputs_with(stream, block, state, {})
    found = {}
    for number, some in own.items():
        every = sum(1 for index, _ in sets[number].linears if index == block_plan.index)
        found[number] = [
            _change(before, outputs_with(stream, block, state, rounded)) * every / len(some)
            for rounded in (
                {linear.local: nearly(linear, scheme, weights[linear.local], folding, inputs, effort.shrinks) for linear in some}
                for scheme in sets[number].schemes
            )
        ]
    return found


def _change(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float:
    """Mean over tokens of |after - before|^2 / |before|^2."""
    each = [(b - a).square().sum(-1) / b.square().sum(-1).clamp(min=1e-30) for b, a in zip(before, after, strict=True)]
    return float(torch.cat([one.reshape(-1) for one in each]).double().mean())


def _sampled(tie: Tie, block: int) -> list[Linear]:
    """A set's linears of one block; of many experts a few."""
    linears = [linear for index, linear in tie.linears if index == block]
    numbers = sorted({number for linear in linears if (number := _expert(linear.local)) is not None})
    if len(numbers) <= EXPERTS:
        return linears
    chosen = {numbers[i * len(numbers) // EXPERTS] for i in range(EXPERTS)}
    return [linear for linear in linears if _expert(linear.local) in chosen]


def _expert(local: str) -> int | None:
    return expert_of(local)


def _within(folds: Sequence[Fold], some: set[str], weights: Mapping[str, torch.Tensor]) -> Iterator[Fold]:
    """The folds among some of a block's linears."""
    for fold in folds:
        consumers = tuple(local for local in fold.consumers if local in some)
        if consumers and (fold.producer in some or fold.producer not in weights):
            yield replace(fold, consumers=consumers)


def _some(batches: Sequence[Batch]) -> list[Batch]:
    """A few batches from all over the set: they lie by the length of their rows."""
    tokens = sum(int(batch.counted.sum()) for batch in batches)
    count = min(len(batches), max(1, -(-TOKENS * len(batches) // max(1, tokens))))
    return [batches[(2 * i + 1) * len(batches) // (2 * count)] for i in range(count)]
