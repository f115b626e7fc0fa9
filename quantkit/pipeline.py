"""The story, from a bf16 checkpoint to artefacts. The only file that knows the order.

folder     <- model (local, or the Hub's)          a LoRA adapter is merged as tensors are read
plan       <- recipe, config, tensor shapes        refuses an unknown family or tensor; predicts bytes
batches    <- calibration mix, tokenizer
for block:    fill, observe, solve, store, empty   one decoder block in memory
artefacts  <- store, checkpoint                    shards as the blocks they need are solved
scores     <- held-out samples                     they ran beside, through original and quantized blocks
"""

import ctypes
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit import families, report
from quantkit import recipe as recipes
from quantkit.calibrate.batches import make_batches, reserve_batches
from quantkit.calibrate.collect import Reserve, collect
from quantkit.calibrate.coverage import cells_of, coverage_report
from quantkit.calibrate.draw import Drawn, Row, draw, make_row, manifest
from quantkit.calibrate.draw import report as calibration_report
from quantkit.calibrate.observe import observe
from quantkit.calibrate.render import load_tokenizer
from quantkit.calibrate.samples import choose
from quantkit.calibrate.sources import read_samples
from quantkit.calibrate.statistics import save_statistics
from quantkit.errors import CalibrationError, CheckpointError, StoreError, WriteError
from quantkit.evaluate.divergence import Scores, compare
from quantkit.grid.integer import from_codes
from quantkit.model.adapter import Adapted
from quantkit.model.blocks import Skeleton, State, Stream, published_entries
from quantkit.model.checkpoint import Checkpoint, TensorSource, file_digest, read_json
from quantkit.model.experts import weight_of
from quantkit.model.hub import find_folder, is_folder, remote_headers
from quantkit.model.memory import Memory, give_back_memory, left_for_activations
from quantkit.plan import make_plan, text_config
from quantkit.publish.card import write_card
from quantkit.publish.manifest import write_manifest
from quantkit.recipe import Calibration, Recipe
from quantkit.report import Clock, Listener, silent
from quantkit.solve.block import solve_block
from quantkit.store import Store
from quantkit.types import Batch, BlockPlan, Effort, InputStats, Json, Plan, SolvedBlock, Statistics
from quantkit.write.compressed_tensors import FORMAT, PASSED_ON, CompressedTensors

SOLVED = "solved"
OURS = (SOLVED, FORMAT, "run.json")  # what a run leaves in its folder
LOGIT_POSITIONS = 64  # positions whose logits are in memory at a time: a vocabulary of 262,144 takes 1 MiB each


@dataclass(frozen=True, slots=True)
class Result:
    """What a run leaves: where, how large, how near to the original."""

    output: Path
    artefacts: Mapping[str, Path]
    bytes: Mapping[str, int]
    report: Json

    @property
    def scores(self) -> Json:
        return dict(self.report["heldout"])


def load_recipe(name: str, calibration: str | None = None) -> Recipe:
    """A recipe, with another calibration mix where one is asked for."""
    recipe = recipes.load_recipe(name)
    if calibration is None:
        return recipe
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"mix": calibration})})


def _name(model: str | None) -> str:
    """What a run calls its model: the folder's own name, wherever one stands, or the Hub's."""
    if model is None:
        return "reference"
    return Path(model).resolve().name if Path(model).is_dir() else Path(model.partition("@")[0]).name


def open_checkpoint(model: str | None, adapter: str | None = None) -> TensorSource:
    """A model's headers: the embedded reference model, a folder or a Hub id, with an adapter merged on the way."""
    folder = recipes.reference_model() if model is None else find_folder(model)
    checkpoint: TensorSource = Checkpoint(folder)
    return Adapted(checkpoint, Path(adapter)) if adapter else checkpoint


def plan(model: str | None, recipe: str = "awq-w4", adapter: str | None = None) -> tuple[Plan, Json]:
    """Every tensor's fate and the exact bytes of each format, before a weight is read. `model` may be a config.json alone."""
    chosen = load_recipe(recipe)
    if model is not None and Path(model).is_file():
        if adapter:
            raise CheckpointError(f"{model}: a config alone cannot take an adapter; give the model's folder")
        config = read_json(Path(model))
        families.find(config)  # an unknown architecture is better named by us than by a class that cannot be found
        made = make_plan(chosen, config, published_entries(config))
    elif model is not None and adapter is None and not is_folder(model):
        made = make_plan(chosen, *remote_headers(model))
    else:
        checkpoint = open_checkpoint(model, adapter)
        made = make_plan(chosen, checkpoint.config, checkpoint.entries)
    return made, {name: CompressedTensors(made, chosen.experts_layout).bytes for name in chosen.formats}


def calibrate(
    model: str | None = None,
    *,
    output: str | Path,
    recipe: str = "awq-w4",
    calibration: str | None = None,
    adapter: str | None = None,
    imatrix: str | Path | None = None,
    imported: str | Path | None = None,
    grams: bool = False,
    max_memory: int | None = None,
    tell: Listener = silent,
) -> Json:
    """Statistics alone: what every linear of the original model is fed, and which experts the calibration set reaches.

    Args:
        model, recipe, calibration, adapter, tell: as for `quantize`; of the recipe only `calibration` counts.
        output: the file of statistics (docs/statistics.md).
        imatrix: write them as an importance matrix for `llama-quantize` too.
        imported: an importance matrix of llama.cpp; it becomes the statistics, and nothing is run.
        grams: keep x x^T of every linear that has one, several times the model's size.
        max_memory: bytes; activations that do not fit beside a block lie in mapped files beside `output`, with the same result.

    Returns:
        What was fed and how experts were covered; it stands in the file too.

    Raises:
        QuantkitError: as for `quantize`.
    """
    chosen = load_recipe(recipe, calibration)
    checkpoint = open_checkpoint(model, adapter)
    settings, clock = chosen.calibration, Clock(tell)
    for path in (output, imatrix):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise CalibrationError(f"{path}: there is no such folder to write to")
    plan = make_plan(chosen, checkpoint.config, checkpoint.entries)
    clock.blocks = len(plan.blocks)
    about: Json = {"model": _name(model), "versions": report.versions()}
    memory = Memory(left_for_activations(plan, max_memory), Path(output).absolute().parent)
    if imported is not None:
        widths = [{linear.local: linear.shape[1] for linear in block.linears} for block in plan.blocks]
        statistics = _imatrix().read_imatrix(Path(imported), plan.family, widths)
        statistics = replace(statistics, about={**about, **statistics.about})
    else:
        statistics = _collected(plan, checkpoint, settings, clock, about, grams, memory)
    with clock.phase("writing", len(plan.blocks)):
        save_statistics(Path(output), statistics)
        if imatrix is not None:
            names = [f"quantkit:{settings.mix}"] if imported is None else statistics.about["datasets"]
            _imatrix().write_imatrix(Path(imatrix), statistics, plan.family, names, settings.sequence_length)
    seconds = {phase: round(seconds, 2) for phase, seconds in clock.seconds.items()}
    return {**statistics.about, "seconds": seconds, "spilled": memory.spilled, "peak_memory": report.peak_memory()}


def _collected(
    plan: Plan, checkpoint: TensorSource, settings: Calibration, clock: Clock, about: Json, grams: bool, memory: Memory
) -> Statistics:
    """The original model, block after block, over the calibration set and as much of the reserve as its experts need."""
    with clock.phase("tokenizing"):
        tokenizer = load_tokenizer(checkpoint.folder)
        drawn = draw(recipes.load_mix(settings.mix), settings, tokenizer)
        batches, fed = _batches(drawn.rows, settings), calibration_report(drawn, tokenizer, settings.thinking)
        clock.tokens = sum(int(batch.real.sum()) for batch in batches)
        spare = int(clock.tokens * settings.reserve) if settings.expert_tokens else 0
        more = reserve_batches(drawn.reserve, spare, settings.batch_tokens, settings.ignore_prompts)
        _check_vocabulary([*batches, *more], checkpoint)
    with clock.phase("building the skeleton"):
        skeleton = Skeleton(checkpoint, plan.dtype, memory)
        stream, reserve = Stream(skeleton, batches), Reserve.start(skeleton, more)
        state = stream.start()
        state.check("the embeddings")
    cells = cells_of([*batches, *more])
    blocks = []
    for block_plan in plan.blocks:
        with clock.block(counts=True), clock.phase("observing", block_plan.index), skeleton.block(block_plan.index) as block:
            blocks.append(collect(stream, block, state, reserve, cells, settings.expert_tokens, grams))
        state.check(f"block {block_plan.index}")
        give_back_memory()
    fed |= {"reserve_tokens": sum(int(batch.real.sum()) for batch in more)}
    coverage = coverage_report(blocks, cells, settings.expert_tokens)
    return Statistics(tuple(blocks), tuple(cells), {**about, "calibration": fed, "coverage": coverage, "samples": manifest(drawn.rows)})


def _imatrix() -> Any:
    """Importance matrices, which need a library that not everybody has."""
    try:
        from quantkit.write import imatrix
    except ImportError:
        raise WriteError("an importance matrix needs the gguf library; pip install 'quantkit[gguf]'") from None
    return imatrix


def quantize(
    model: str | None = None,
    *,
    recipe: str = "awq-w4",
    output: str | Path | None = None,
    calibration: str | None = None,
    adapter: str | None = None,
    fresh: bool = False,
    tell: Listener = silent,
) -> Result:
    """Quantize a checkpoint and write it in the recipe's formats.

    Args:
        model: a folder or a Hub id; None is the embedded reference model.
        recipe: a shipped recipe's name or a YAML file.
        output: the run's folder; a run that was killed goes on there. Default: MODEL-RECIPE in the working directory.
        calibration: another mix or a .jsonl file in place of the recipe's.
        adapter: a PEFT LoRA adapter's folder, merged as the checkpoint is read.
        fresh: delete what an earlier run left in `output` and start anew.
        tell: is told of each phase.

    Raises:
        QuantkitError: one line that says what is wrong, where, and what to do; nothing half-written looks whole.
    """
    chosen = load_recipe(recipe, calibration)
    checkpoint = open_checkpoint(model, adapter)
    name = _name(model)
    out = Path(output) if output is not None else Path(f"{name}-{chosen.name}")
    clock = Clock(tell)
    with clock.phase("reading headers"):
        hashes = _input_hashes(checkpoint, chosen, adapter)
        plan = make_plan(chosen, checkpoint.config, checkpoint.entries, inputs=repr([sorted(hashes.items()), report.versions()]))
        CompressedTensors(plan, chosen.experts_layout)  # what the format cannot express is refused before anything runs
        clock.blocks = len(plan.blocks)
    with clock.phase("tokenizing"):
        tokenizer = load_tokenizer(checkpoint.folder)
        settings = chosen.calibration
        drawn = Drawn([], iter(()), None, None)
        batches: list[Batch] = []
        if chosen.method != "rtn":  # plain rounding needs no data
            drawn = draw(recipes.load_mix(settings.mix), settings, tokenizer)
            batches = _batches(drawn.rows, settings)
        fed = calibration_report(drawn, tokenizer, settings.thinking)
        plan = replace(plan, fingerprint=f"{plan.fingerprint} {fed['digest']}")  # solved blocks are those of these very tokens
        clock.tokens = sum(int(batch.real.sum()) for batch in batches)
        heldout = _heldout(chosen, tokenizer)
        _check_vocabulary([*batches, *heldout], checkpoint)
    if fresh:
        _clear(out)
    store = Store(out / SOLVED, plan, {"model": name, "recipe": chosen.name, "calibration": settings.mix, "adapter": adapter})
    folder = out / FORMAT
    writer = CompressedTensors(plan, chosen.experts_layout, checkpoint, store, folder)

    with clock.phase("building the skeleton"):
        run = _Run.start(chosen, plan, checkpoint, store, clock, batches, heldout)
    reports = []
    for block_plan in plan.blocks:
        with clock.block(counts=block_plan.index not in store):
            reports.append(run.block(block_plan))
        with clock.phase("writing", block_plan.index):
            writer.write_ready()
    with clock.phase("scoring held-out samples", len(plan.blocks)):
        scores = run.score()
    with clock.phase("writing", len(plan.blocks)):
        writer.write_ready()
        writer.finish()
    about = {
        "model": name,
        "base_model": model.partition("@")[0] if model is not None and not Path(model).exists() else None,
        "recipe": chosen.model_dump(mode="json"),
        "family": plan.family,
        "model_type": plan.model_type,
        "parameters": report.parameters(plan),
        "bytes": {FORMAT: writer.bytes},
        "bits_per_weight": round(writer.bytes * 8 / report.parameters(plan), 4),
        "calibration": fed,
        "heldout": scores,
        "summary": report.summary(reports),
        "adapter": asdict(checkpoint.adapter) if isinstance(checkpoint, Adapted) else None,
        "seconds": {phase: round(seconds, 2) for phase, seconds in clock.seconds.items()},
        "peak_memory": report.peak_memory(),
        "threads": torch.get_num_threads(),
        "versions": report.versions(),
        "inputs": hashes,
        "samples": manifest(drawn.rows),
        "blocks": reports,
    }
    write_card(folder, about)
    write_manifest(folder, about)
    report.write_json(out / "run.json", about)
    return Result(out, {FORMAT: folder}, {FORMAT: writer.bytes}, about)


@dataclass(slots=True)
class _Run:
    """Three streams through one skeleton: the calibration set behind solved blocks, held-out samples through original and solved ones."""

    recipe: Recipe
    plan: Plan
    checkpoint: TensorSource
    store: Store
    clock: Clock
    skeleton: Skeleton
    calibration: Stream
    calibrated: State
    heldout: Stream
    original: State
    quantized: State

    @classmethod
    def start(
        cls,
        recipe: Recipe,
        plan: Plan,
        checkpoint: TensorSource,
        store: Store,
        clock: Clock,
        calibration: Sequence[Batch],
        heldout: Sequence[Batch],
    ) -> "_Run":
        skeleton = Skeleton(checkpoint, plan.dtype)
        streams = Stream(skeleton, calibration), Stream(skeleton, heldout)
        first, original = streams[0].start(), streams[1].start()
        for state in (first, original):
            _check_finite(state, "the embeddings")
        return cls(recipe, plan, checkpoint, store, clock, skeleton, streams[0], first, streams[1], original, original.fork())

    def block(self, plan: BlockPlan) -> Json:
        """One block: held-out samples through the original, statistics, solution, and the streams through what was solved."""
        index, behind_original = plan.index, self.recipe.search.propagate == "original"
        with self.skeleton.block(index) as block:
            with self.clock.phase("running held-out samples", index):
                self.heldout.advance(block, self.original)
            if index in self.store:
                if behind_original:
                    self.calibration.advance(block, self.calibrated)
                solved = self.store.get(plan)
            else:
                solved = self._solve(plan, block, behind_original)
            _install(plan, block, solved)
            about = report.block_report(plan, solved, observed=self.recipe.method != "rtn")
            del solved  # its codes are on the disk and in the block; they need not meet the streams in memory
            _give_back_memory()
            with self.clock.phase("running the quantized block", index):
                if not behind_original:
                    self.calibration.advance(block, self.calibrated)
                self.heldout.advance(block, self.quantized)
        for stream in (self.calibration, self.heldout):
            stream.close()
        for state in (self.calibrated, self.original, self.quantized):
            _check_finite(state, f"block {index}")
        _give_back_memory()
        return about

    def _solve(self, plan: BlockPlan, block: nn.Module, behind_original: bool) -> SolvedBlock:
        """Observe, solve and store the open block; where later blocks shall see the original, the observing pass moves the stream."""
        stats: dict[str, InputStats] = {}
        if self.recipe.method != "rtn":
            with self.clock.phase("observing", plan.index):
                wanted = {linear.local for linear in plan.linears if linear.scheme}
                stats = observe(self.calibration, block, self.calibrated, wanted, move=behind_original)
                _check_stats(plan, block, stats)
        with self.clock.phase("solving", plan.index):
            weights, kept = _weights(plan, block, self.checkpoint, self.plan.dtype)
            solved = solve_block(plan, weights, kept, stats, self.plan.norm_offset, _effort(self.recipe))
            _give_back_memory()
        with self.clock.phase("storing", plan.index):
            self.store.put(solved)
        return solved

    def score(self) -> Json:
        """The held-out samples' logits behind original and quantized blocks, compared token by token."""
        scores = Scores()
        for number, batch in enumerate(self.heldout.batches):
            last = batch.ids.shape[1] - 1
            for start in range(0, last, LOGIT_POSITIONS):
                part = slice(start, min(start + LOGIT_POSITIONS, last))
                following = slice(part.start + 1, part.stop + 1)
                base = self.heldout.logits(self.original, number, part)
                ours = self.heldout.logits(self.quantized, number, part)
                for row, labels in enumerate(batch.labels):
                    scores.add(compare(base[row], ours[row], batch.ids[row, following], batch.real[row, following]), labels)
        return scores.as_json()


def _effort(recipe: Recipe) -> Effort:
    if recipe.method == "rtn":
        return Effort(folds=False, shrinks=1)
    search = recipe.search
    return Effort(True, search.exponents, search.rows, search.shrinks, search.expert_floor)


def _weights(
    plan: BlockPlan, block: nn.Module, checkpoint: TensorSource, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Views of every linear to be solved, and the block's other tensors, by local name, as the model computes with them.

    Raises:
        CheckpointError: a weight that is not finite.
    """
    weights = {}
    for linear in plan.linears:
        if linear.scheme is None:
            continue
        weight = weight_of(block, linear.local)
        # published leftovers that the model does not read (keys and values of layers that borrow them) have no module
        weights[linear.local] = checkpoint.view(linear.source.tensor).to(dtype) if weight is None else weight
        if not bool(weights[linear.local].isfinite().all()):
            raise CheckpointError(f"{linear.source.tensor}: holds NaN or infinity; the checkpoint is damaged")
    return weights, {local: checkpoint.view(name).to(dtype) for local, name in plan.kept.items()}


def _check_stats(plan: BlockPlan, block: nn.Module, stats: Mapping[str, InputStats]) -> None:
    for linear in plan.linears:
        if linear.scheme is not None and linear.local not in stats and weight_of(block, linear.local) is not None:
            raise CalibrationError(f"{linear.name}: the model never called this linear during calibration, so it cannot be solved")


def _give_back_memory() -> None:
    """Hand freed memory back to the system: glibc keeps up to a gigabyte of a block's small allocations for the next one's peak."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@torch.no_grad()
def _install(plan: BlockPlan, block: nn.Module, solved: SolvedBlock) -> None:
    """The block as an engine will compute it: every weight decoded from its codes, every folded tensor replaced."""
    for linear in plan.linears:
        if linear.scheme is None:
            continue
        weight = weight_of(block, linear.local)
        if weight is not None:
            weight.copy_(from_codes(solved.linears[linear.local].codes))
    for local, tensor in solved.folded.items():
        owner, _, leaf = local.rpartition(".")
        getattr(block.get_submodule(owner), leaf).data.copy_(tensor)


def _heldout(recipe: Recipe, tokenizer: Any) -> list[Batch]:
    """Our held-out samples as batches; none where the recipe scores nothing."""
    if recipe.score.samples == 0:
        return []
    samples = choose(read_samples(recipes.heldout_files()), recipe.score.samples, recipe.calibration.seed)
    rows = [make_row(sample, tokenizer, recipe.score.sequence_length, recipe.calibration.thinking) for sample in samples]
    return make_batches(rows, recipe.calibration.batch_tokens)


def _batches(rows: Sequence[Row], settings: Calibration) -> list[Batch]:
    fill_to = settings.sequence_length if settings.packing == "fixed" else None
    return make_batches(rows, settings.batch_tokens, fill_to, settings.ignore_prompts)


def _check_finite(state: State, what: str) -> None:
    for hidden in state.hidden:
        if not bool(hidden.isfinite().all()):
            raise CheckpointError(f"{what}: NaN or infinity in the activations: a damaged weight, or fp16 that overflows (convert to bf16)")


def _check_vocabulary(batches: Sequence[Batch], checkpoint: TensorSource) -> None:
    size = text_config(checkpoint.config).get("vocab_size")
    highest = max((int(batch.ids.max()) for batch in batches), default=0)
    if isinstance(size, int) and highest >= size:
        raise CalibrationError(
            f"{checkpoint.folder}: its tokenizer makes token {highest}, its vocabulary ends at {size - 1}; another model's?"
        )


def _input_hashes(checkpoint: TensorSource, recipe: Recipe, adapter: str | None) -> dict[str, str]:
    """Digests of all that a run reads; a store refuses blocks that were solved from other inputs."""
    files = [p for p in sorted(checkpoint.folder.iterdir()) if p.suffix in (".safetensors", *PASSED_ON)]
    hashes = {path.name: file_digest(path) for path in files if path.is_file()}
    if recipe.method != "rtn":
        hashes |= {f"calibration/{path.name}": file_digest(path) for path in recipes.load_mix(recipe.calibration.mix).files()}
    if adapter:
        hashes |= {f"adapter/{p.name}": file_digest(p) for p in sorted(Path(adapter).iterdir()) if p.suffix in (".safetensors", ".json")}
    return hashes


def _clear(out: Path) -> None:
    """Delete an earlier run of ours; anything else in the folder is left, and refused by the store."""
    if not out.exists():
        return
    ours = (out / SOLVED / "plan.json").exists() or (out / "run.json").exists()
    if not ours and any(out.iterdir()):
        raise StoreError(f"{out}: not a run of quantkit; --fresh deletes only those; give another --output")
    if foreign := [path.name for path in out.iterdir() if path.name not in OURS and not path.name.endswith(".part")]:
        raise StoreError(f"{out}: holds {foreign[0]!r}, which is not of a run; --fresh deletes nothing beside it; move it away")
    for path in (out / SOLVED, out / FORMAT):
        shutil.rmtree(path, ignore_errors=True)
    (out / "run.json").unlink(missing_ok=True)
