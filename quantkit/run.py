"""The second half of the story: every block in turn, filled, observed, solved, stored, emptied, and the streams that run through it.

original      held-out samples through the checkpoint's own blocks         \\ compared at the end:
quantized     held-out samples through the solved ones                     / what quantization cost
calibrated    calibration samples through the solved blocks                what the next block will be fed when it is served
reference     calibration samples through the checkpoint's own blocks      what the next block ought to be fed (recipes with stages)
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from quantkit import report
from quantkit.calibrate.collect import Reserve, added, unfed
from quantkit.calibrate.coverage import cells_of, top_up, watch_routing
from quantkit.calibrate.kept import Kept
from quantkit.calibrate.observe import observe
from quantkit.calibrate.probe import apart, batches_for, heads_of, probe, sensitivity, summed
from quantkit.evaluate.divergence import Score, Scores, compare
from quantkit.grid.decoded import decoded
from quantkit.model.blocks import Skeleton
from quantkit.model.checkpoint import TensorSource
from quantkit.model.experts import replace_weight, weight_of
from quantkit.model.memory import give_back_memory
from quantkit.model.proof import PROVEN, fold_change
from quantkit.model.sound import block_weights, check_numbers, check_stats, check_weight
from quantkit.model.streams import State, Stream
from quantkit.ranks import Ranks
from quantkit.recipe import Recipe
from quantkit.report import Clock
from quantkit.solve.block import solve_linears
from quantkit.solve.folds import Folding, choose_folds
from quantkit.solve.pooling import Pooled
from quantkit.store import Store, fold_report, put_together, taken_apart
from quantkit.types import Batch, BlockPlan, BlockStatistics, Effort, InputStats, Json, Linear, OutputStats, Plan, Solved, SolvedBlock

LOGIT_POSITIONS = 64  # positions whose logits are in memory at a time: a vocabulary of 262,144 takes 1 MiB each


@dataclass(slots=True)
class Run:
    """The streams, and the skeleton that they run through."""

    recipe: Recipe
    plan: Plan
    skeleton: Skeleton
    store: Store | None  # the first rank's
    ranks: Ranks
    clock: Clock
    known: Container[int]  # blocks that an earlier process solved
    tokens: Sequence[int]  # counted ones of each batch of the calibration set, all ranks'
    spares: int  # of the reserve
    calibration: Stream
    calibrated: State
    reference: State | None
    heldout: Stream
    original: State
    quantized: State
    reserve: Reserve  # behind solved blocks, as `calibrated`
    reserve_reference: Reserve  # behind the checkpoint's own, as `reference`
    cells: Sequence[tuple[str, str]]  # every (language, domain)
    coverage: list[BlockStatistics] = field(default_factory=list)  # routing alone, of every block of a recipe with stages

    @classmethod
    def start(
        cls,
        recipe: Recipe,
        plan: Plan,
        skeleton: Skeleton,
        store: Store | None,
        ranks: Ranks,
        clock: Clock,
        calibration: Sequence[Batch],
        heldout: Sequence[Batch],
        reserve: Sequence[Batch] = (),
    ) -> "Run":
        """All streams in front of block 0, each with this rank's share of the batches.

        Raises:
            CheckpointError: embeddings that are not finite.
        """
        known = set(ranks.told([block.index for block in plan.blocks if store is not None and block.index in store])[0])
        before = accumulate((len(batch.ids) for batch in calibration), initial=0)
        numbered = [replace(batch, row=row) for batch, row in zip(calibration, before, strict=False)]
        streams = Stream(skeleton, ranks.share(numbered)), Stream(skeleton, ranks.share(heldout))
        first, original = streams[0].start(), streams[1].start()
        for state in (first, original):
            state.check("the embeddings")
        staged = recipe.method != "rtn" and recipe.search.stages
        reference = first.fork() if staged else None
        spare = Reserve.start(skeleton, ranks.share(reserve))
        return cls(
            recipe,
            plan,
            skeleton,
            store,
            ranks,
            clock,
            known,
            tokens=[int(batch.counted.sum()) for batch in calibration],
            spares=len(reserve),
            calibration=streams[0],
            calibrated=first,
            reference=reference,
            heldout=streams[1],
            original=original,
            quantized=original.fork(),
            reserve=spare,
            reserve_reference=spare.fork(),
            cells=cells_of([*calibration, *reserve]),
        )

    def block(self, plan: BlockPlan) -> Json:
        """One block: held-out samples through the original, statistics, solution, and the streams through what was solved."""
        index, behind_original = plan.index, self.reference is None and self.recipe.search.propagate == "original"
        with self.skeleton.block(index) as block:
            with self.clock.phase("running held-out samples", index):
                self.heldout.advance(block, self.original)
            if index in self.known:
                if behind_original:
                    self.calibration.advance(block, self.calibrated)
                if self.reference is not None:
                    self._past(block, self.reference)
                solved = self._recalled(plan)
            else:
                solved = self._solve(plan, block, behind_original)
            _install(plan, block, solved)
            about = report.block_report(plan, solved, observed=self.recipe.method != "rtn")
            del solved  # its codes are on the disk and in the block; they need not meet the streams in memory
            give_back_memory()
            with self.clock.phase("running the quantized block", index):
                if not behind_original:
                    self.calibration.advance(block, self.calibrated)
                self.reserve.advance(block)
            with self.clock.phase("running held-out samples", index):
                self.heldout.advance(block, self.quantized)
        for stream in (self.calibration, self.heldout, *self.reserve.streams):
            stream.close()
        for state in (self.calibrated, self.original, self.quantized):
            state.check(f"block {index}")
        give_back_memory()
        return about

    def _solve(self, plan: BlockPlan, block: nn.Module, behind_original: bool) -> SolvedBlock:
        """Observe, solve and store the open block; where later blocks shall see the original, the observing pass moves the stream."""
        weights, kept = block_weights(plan, block, self.skeleton, self.plan.dtype)
        if self.reference is not None and not plan.stages:  # nothing of it is quantized
            self._past(block, self.reference)
            solved = SolvedBlock(plan.index, {}, {}, ())
        elif self.reference is not None:
            solved = self._in_stages(plan, block, weights, kept)
        else:
            stats: dict[str, InputStats] = {}
            state = self.calibrated.fork()  # what the block is fed, wherever observing moves the stream
            if self.recipe.method != "rtn":
                with self.clock.phase("observing", plan.index):
                    stats = self._observe(block, _quantized(plan), move=behind_original)
                    check_stats(plan, block, stats)
            with self.clock.phase("solving", plan.index):
                effort = effort_of(self.recipe)
                inputs = Pooled(stats, effort.expert_floor)
                folding = self._folding(plan, weights, kept, inputs, {})
            folding, proof = self._proven(plan, block, state, folding)
            with self.clock.phase("solving", plan.index):
                linears = [linear for linear in plan.linears if linear.scheme]
                done = self._gathered(plan, linears, solve_linears(linears, weights, folding, inputs, effort, stats, self.ranks.turns()))
                solved = SolvedBlock(plan.index, done, folding.folded, tuple(folding.reports), proof)
        give_back_memory()
        with self.clock.phase("storing", plan.index):
            if self.store is not None:
                self.store.put(solved)
        return solved

    def _past(self, block: nn.Module, reference: State) -> None:
        """The streams of the original, through a block that is not to be solved."""
        with watch_routing(block, self.calibration.batches, self.cells) as routing:
            self.calibration.advance(block, reference)
        self._draw(block, routing)
        self.reserve_reference.advance(block)

    def _observe(self, block: nn.Module, wanted: Iterable[str], move: bool) -> dict[str, InputStats]:
        grams = self.recipe.search.compensate or self.recipe.search.folds
        held = self.recipe.search.hold_out and self.recipe.search.compensate
        return self._seen(block, self.calibrated, set(wanted), move=move, grams=grams, held=held)

    def _seen(self, block: nn.Module, state: State, wanted: Container[str], **options: Any) -> dict[str, InputStats]:
        """Statistics of the calibration set, all ranks' batches."""
        swap = self.ranks.swap()
        rounds = -(-len(self.tokens) // self.ranks.size)
        return swap.gathered(observe(self.calibration, block, state, wanted, swap=swap, rounds=rounds, **options))

    def _spare(
        self,
        drawn: int,
        hungry: Container[str],
        block: nn.Module,
        reserve: Reserve,
        wanted: Container[str],
        beside: tuple[nn.Module, Reserve] | None = None,
        **options: Any,
    ) -> Iterator[dict[str, InputStats]]:
        """Statistics of each batch of the reserve that was drawn, in their order, of the experts in need alone."""
        for number in range(drawn):
            more: dict[str, InputStats] = {}
            if self.ranks.has(number):
                own = number // self.ranks.size
                other = None if beside is None else (beside[0], beside[1].states[own])
                more = _only(observe(reserve.streams[own], block, reserve.states[own], wanted, beside=other, **options), hungry)
            yield self.ranks.union(more)

    def _in_stages(self, plan: BlockPlan, block: nn.Module, weights: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> SolvedBlock:
        """Folds from the original's inputs; then stage by stage, on inputs that carry all rounding so far, beside the original's."""
        assert self.reference is not None
        search, effort = self.recipe.search, effort_of(self.recipe)
        wanted = _quantized(plan)
        of_original = Kept(self.skeleton.memory)
        with self.clock.phase("observing", plan.index):
            with watch_routing(block, self.calibration.batches, self.cells) as routing:
                fed = self._seen(block, self.reference, set(wanted), grams=False, kept=of_original)
            drawn, hungry = self._draw(block, routing)
            for more in self._spare(drawn, hungry, block, self.reserve_reference, set(wanted), grams=False):
                fed = added(fed, more)
            check_stats(plan, block, fed)
            outputs = self._probed(plan, block, self.reference)
        with self.clock.phase("solving", plan.index):
            matter = sensitivity(outputs) if search.sensitivity else {}
            folding = self._folding(plan, weights, kept, Pooled(fed, effort.expert_floor), matter)
        folding, proof = self._proven(plan, block, self.reference, folding)
        twin, of_twin = self.skeleton.twin(block), Kept(self.skeleton.memory, like=of_original)
        solved: dict[str, Solved] = {}
        pairs, turns = search.retarget > 0, self.ranks.turns()
        residual = plan.residual if search.residual and pairs else None
        for number, stage in enumerate(plan.stages):
            last = number == len(plan.stages) - 1
            with self.clock.phase("observing", plan.index):
                beside = (block, self.reference) if pairs else None
                stats = self._seen(
                    twin,
                    self.calibrated,
                    set(stage),
                    held=search.hold_out,
                    beside=beside,
                    residual=residual,
                    move=last and pairs,
                    kept=of_twin,
                    kept_beside=of_original,
                )
                spare = (block, self.reserve_reference) if pairs else None
                for more in self._spare(drawn, hungry, twin, self.reserve, set(stage), spare, residual=residual):
                    stats = added(stats, more)
                if last:
                    self.reserve_reference.advance(block)
                if last and not pairs:
                    self.calibration.advance(block, self.reference)
                check_numbers(plan, stats)
            with self.clock.phase("solving", plan.index):
                linears = [linear for linear in plan.linears if linear.local in stage]
                done = solve_linears(linears, weights, folding, Pooled(stats, effort.expert_floor), effort, stats, turns, outputs)
                solved |= self._gathered(plan, linears, done)
                if not last:
                    for local in stage:
                        replace_weight(twin, local, folding.undo(local, decoded(solved[local].codes)))
            give_back_memory()
        ordered = {linear.local: solved[linear.local] for linear in plan.linears if linear.scheme}
        return SolvedBlock(plan.index, ordered, folding.folded, tuple(folding.reports), proof)

    def _probed(self, plan: BlockPlan, block: nn.Module, state: State) -> dict[str, OutputStats]:
        """How far outputs move the block's, over as many batches as that takes, each probed by the rank that has it."""
        search = self.recipe.search
        heads = heads_of(block, plan.stages[0]) if search.output_grams else {}
        if not heads and not (search.folds and search.sensitivity):
            return {}
        wanted = set(_quantized(plan)) if search.folds and search.sensitivity else set(heads)
        mine: dict[str, Tensor] = {}
        for number in batches_for(heads, self.tokens):
            if self.ranks.has(number):
                mine |= apart(probe(self.calibration, block, state, wanted, number // self.ranks.size, heads), number)
        return summed(self.ranks.gathered(mine))

    def _proven(self, plan: BlockPlan, block: nn.Module, state: State, folding: Folding) -> tuple[Folding, float | None]:
        """The folds, if the block computes the same under them; none, if it does not."""
        if not folding.columns:
            return folding, None
        with self.clock.phase("proving folds", plan.index):
            last, change = len(self.tokens) - 1, None  # the shortest rows
            if self.ranks.has(last):
                its = last // self.ranks.size
                change = fold_change(self.calibration, block, state, folding.columns, folding.rows, folding.folded, its)
            change = self.ranks.told(change)[last % self.ranks.size]
        return (folding, change) if change <= PROVEN else (Folding(copied=folding.copied), change)

    def _draw(self, block: nn.Module, routing: Mapping[str, Tensor]) -> tuple[int, set[str]]:
        """How many batches of the reserve the block's experts need, and which of them are in need. `routing` becomes all ranks'."""
        for local in sorted(routing):
            self.ranks.add(routing[local])
        natural, floor = {local: counts.sum(0) for local, counts in routing.items()}, self.recipe.calibration.expert_tokens
        drawn = 0

        def more() -> Mapping[str, Tensor] | None:
            nonlocal drawn
            if drawn == self.spares:
                return None
            own = drawn // self.ranks.size if self.ranks.has(drawn) else None
            drawn += 1
            batches = [] if own is None else self.reserve.streams[own].batches
            with watch_routing(block, batches, self.cells) as counts:
                if own is not None:
                    self.reserve.streams[own].run(block, self.reserve_reference.states[own], 0)
            return {local: self.ranks.add(counts[local].sum(0)) for local in sorted(counts)}

        topped_up = top_up(natural, floor, more)
        self.coverage.append(BlockStatistics({}, {}, dict(routing), topped_up))
        return drawn, unfed(natural, floor)

    def _folding(
        self,
        plan: BlockPlan,
        weights: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
        inputs: Pooled,
        matter: Mapping[str, Tensor],
    ) -> Folding:
        """Every fold's scale, each chosen by one rank."""
        mine = replace(plan, folds=tuple(self.ranks.share(plan.folds)))
        found = choose_folds(mine, weights, kept, inputs, matter, self.plan.norm_offset, effort_of(self.recipe))
        if self.ranks.size == 1:
            return found
        parts = {"columns": found.columns, "rows": found.rows, "folded": found.folded}
        named = self.ranks.gathered({f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()})
        every = {part: {key.partition("/")[2]: tensor for key, tensor in named.items() if key.startswith(f"{part}/")} for part in parts}
        reports = [fold_report(about) for told in self.ranks.told([asdict(report) for report in found.reports]) for about in told]
        order = [fold.producer for fold in plan.folds]
        return Folding(**every, reports=sorted(reports, key=lambda report: order.index(report.producer)), copied=found.copied)

    def _gathered(self, plan: BlockPlan, linears: Sequence[Linear], solved: Mapping[str, Solved]) -> dict[str, Solved]:
        """Some linears of a block, each solved by one rank."""
        if self.ranks.size == 1:
            return dict(solved)
        tensors, about = taken_apart(SolvedBlock(plan.index, solved, {}, ()))
        about["linears"] = {local: numbers for told in self.ranks.told(about["linears"]) for local, numbers in told.items()}
        whole = put_together(replace(plan, linears=tuple(linears)), self.ranks.gathered(tensors), about)
        return dict(whole.linears)

    def _recalled(self, plan: BlockPlan) -> SolvedBlock:
        """A block that an earlier process solved, from the first rank's folder."""
        tensors, about = ({}, {}) if self.store is None else taken_apart(self.store.get(plan))
        return put_together(plan, self.ranks.gathered(tensors), self.ranks.told(about)[0])

    def score(self) -> Json:
        """The held-out samples' logits behind original and quantized blocks, compared token by token."""
        scores: list[list[Any]] = []  # row by row, so that sums over them do not depend on who had which
        for number, batch in enumerate(self.heldout.batches):
            of_rows = [Score() for _ in batch.labels]
            last = batch.ids.shape[1] - 1
            for start in range(0, last, LOGIT_POSITIONS):
                part = slice(start, min(start + LOGIT_POSITIONS, last))
                following = slice(part.start + 1, part.stop + 1)
                base = self.heldout.logits(self.original, number, part)
                ours = self.heldout.logits(self.quantized, number, part)
                for row, score in enumerate(of_rows):
                    score.add(compare(base[row], ours[row], batch.ids[row, following], batch.real[row, following]))
            scores.append([[asdict(score), dict(labels)] for score, labels in zip(of_rows, batch.labels, strict=True)])
        total, told = Scores(), self.ranks.told(scores)
        for number in range(sum(map(len, told))):
            for score, labels in told[number % self.ranks.size][number // self.ranks.size]:
                total.add(Score(**score), labels)
        return total.as_json()


@dataclass(slots=True)
class Rounding:
    """Plain rounding straight from the checkpoint's tensors, for a model that cannot be run: no class is built, no sample is scored."""

    plan: Plan
    checkpoint: TensorSource
    store: Store | None  # the first rank's: the others have nothing to do
    clock: Clock
    coverage: Sequence[BlockStatistics] = ()

    @property
    def known(self) -> Container[int]:
        return [block.index for block in self.plan.blocks if self.store is not None and block.index in self.store]

    def block(self, plan: BlockPlan) -> Json:
        """One block, each linear by itself."""
        if self.store is None:
            return {}
        if plan.index not in self.store:
            with self.clock.phase("solving", plan.index):
                linears = [linear for linear in plan.linears if linear.scheme]
                weights = {one.local: self.checkpoint.view(one.source.tensor).to(self.plan.dtype) for one in linears}
                for one in linears:
                    check_weight(one, weights[one.local])
                solved = solve_linears(linears, weights, Folding(), Pooled({}, 0), Effort(folds=False, shrinks=1))
            with self.clock.phase("storing", plan.index):
                self.store.put(SolvedBlock(plan.index, solved, {}, ()))
        return report.block_report(plan, self.store.get(plan), observed=False)

    def score(self) -> Json:
        """Of no token."""
        return Scores().as_json()


def effort_of(recipe: Recipe) -> Effort:
    if recipe.method == "rtn":
        return Effort(folds=False, shrinks=1)
    search = recipe.search
    return Effort(
        folds=search.folds,
        exponents=search.exponents,
        rows=search.rows,
        shrinks=search.shrinks,
        expert_floor=search.expert_floor,
        compensate=search.compensate,
        damping=search.damping,
        sweeps=search.sweeps,
        retarget=search.retarget if search.stages else 0.0,
        retarget_damping=search.retarget_damping,
    )


def _only(stats: Mapping[str, InputStats], experts: Container[str]) -> dict[str, InputStats]:
    """The statistics of some experts: the set's own go untouched, those of all experts together too."""
    return {local: one for local, one in stats.items() if one.tokens and local.rpartition(".")[0] in experts}


def _quantized(plan: BlockPlan) -> list[str]:
    return [linear.local for linear in plan.linears if linear.scheme]


@torch.no_grad()
def _install(plan: BlockPlan, block: nn.Module, solved: SolvedBlock) -> None:
    """The block as an engine will compute it: every weight decoded from its codes, every folded tensor replaced."""
    for linear in plan.linears:
        if linear.scheme is None:
            continue
        weight = weight_of(block, linear.local)
        if weight is not None:
            weight.copy_(decoded(solved.linears[linear.local].codes))
    for local, tensor in solved.folded.items():
        owner, _, leaf = local.rpartition(".")
        getattr(block.get_submodule(owner), leaf).data.copy_(tensor)
