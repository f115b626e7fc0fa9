"""The story, from a bf16 checkpoint to artefacts. What happens to each block stands in run.py; no other file knows the order.

folder     <- model (local, or the Hub's)          a LoRA adapter is merged as tensors are read
plan       <- recipe, config, tensor shapes        refuses an unknown family or tensor; predicts bytes
batches    <- calibration mix, tokenizer
schemes    <- batches, a target                    only where the recipe names a size: bits go where they pay
for block:    fill, observe, solve, store, empty   one decoder block in memory
artefacts  <- store, checkpoint                    shards as the blocks they need are solved
scores     <- held-out samples                     they ran beside, through original and quantized blocks
verdict    <- artefact, original, suite, gate      `evaluate`: what ships, opened by the engine that will serve it
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantkit import recipe as recipes
from quantkit import report
from quantkit.calibrate.collect import Reserve, collect
from quantkit.calibrate.coverage import coverage_report
from quantkit.calibrate.statistics import save_statistics
from quantkit.discover import NAMES, family_for
from quantkit.errors import CalibrationError, CheckpointError, EvaluationError, RankError, RecipeError, WriteError
from quantkit.evaluate.session import Evaluation, made_from
from quantkit.evaluate.session import evaluate as judge
from quantkit.formats import FORMATS, Writer, other_sizes, told, writer_of
from quantkit.inputs import Samples, input_hashes, load_recipe, name_of, open_checkpoint
from quantkit.model.adapter import Adapted
from quantkit.model.blocks import Skeleton, published_entries
from quantkit.model.checkpoint import TensorSource, read_json
from quantkit.model.hub import card_of, find_folder, is_folder, remote_headers
from quantkit.model.memory import Memory, give_back_memory, left_for_activations, left_on_device
from quantkit.model.streams import Stream
from quantkit.plan import make_plan
from quantkit.publish.card import write_card
from quantkit.publish.manifest import listed, write_manifest
from quantkit.ranks import Ranks, started
from quantkit.recipe import Recipe
from quantkit.report import Clock, Listener, silent
from quantkit.run import Rounding, Run
from quantkit.store import Store, check_room, clear, held, solved_bytes
from quantkit.target import extremes, mixtures, pick
from quantkit.types import Entry, Json, Plan, Statistics
from quantkit.write.gguf.artefact import GgufFile
from quantkit.write.gguf.metadata import family_table
from quantkit.write.onnx.artefact import OnnxFolder

SOLVED = "solved"
OURS = (SOLVED, *FORMATS, "run.json", "report.html", "report")  # what a run leaves in its folder


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


def plan(
    model: str | None,
    recipe: str = "awq-w4",
    adapter: str | None = None,
    formats: Sequence[str] = (),
    target_size: int | None = None,
    target_bits: float | None = None,
    family: str | None = None,
) -> tuple[Plan, Json]:
    """Every tensor's fate and the exact bytes of each format, before a weight is read. `model` may be a config.json alone.

    A GGUF carries its tokenizer: where that is not at hand (a config alone, the Hub's headers), its bytes are told without it. With a
    target the schemes are picked by what calibration shows: told are the recipe's own, and the bytes of the smallest and largest choices.
    """
    return plan_and_others(model, recipe, adapter, formats, target_size, target_bits, family)[:2]


def plan_and_others(
    model: str | None,
    recipe: str = "awq-w4",
    adapter: str | None = None,
    formats: Sequence[str] = (),
    target_size: int | None = None,
    target_bits: float | None = None,
    family: str | None = None,
) -> tuple[Plan, Json, Json]:
    """As `plan`, and what the same recipe would give in the formats that it does not ask for (`report.sizes_report`)."""
    chosen = load_recipe(recipe, None, formats, target_size, target_bits)
    folder = None
    entries: Mapping[str, Entry]
    if model is not None and Path(model).is_file():
        if adapter:
            raise CheckpointError(f"{model}: a config alone cannot take an adapter; give the model's folder")
        config, entries = read_json(Path(model)), {}
    elif model is not None and adapter is None and not is_folder(model):
        config, entries = remote_headers(model)
    else:
        checkpoint = open_checkpoint(model, adapter)
        config, entries, folder = checkpoint.config, checkpoint.entries, checkpoint.folder
    table = family_for(config, family, entries)  # an unknown architecture is better named by us than by a class that cannot be found
    entries = entries or published_entries(config)
    made = make_plan(chosen, config, entries, family=table)
    plans = {"": made}
    if chosen.has_target:
        plans = {f", {end} choices": make_plan(chosen, config, entries, "", ends, table) for end, ends in extremes(chosen, made).items()}
    sizes: dict[str, int] = {}
    for name in chosen.formats:
        sizes |= {
            told(name, folder) + which: writer_of(name, chosen, one, name_of(model), config, folder).bytes for which, one in plans.items()
        }
    return made, sizes, other_sizes(chosen, made, name_of(model), config, folder, table)


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
    family: str | None = None,
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
        family: "discovered" or a table's .yaml file, in place of a shipped table.
        max_memory: bytes; activations that do not fit beside a block lie in mapped files beside `output`, with the same result.

    Returns:
        What was fed and how experts were covered; it stands in the file too.

    Raises:
        QuantkitError: as for `quantize`.
    """
    if started() > 1:
        raise RankError("several ranks work at `quantize` alone; start `calibrate` as one process, without torchrun")
    chosen = load_recipe(recipe, calibration, solved=False)
    checkpoint = open_checkpoint(model, adapter)
    settings, clock = chosen.calibration, Clock(tell)
    for path in (output, imatrix):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise CalibrationError(f"{path}: there is no such folder to write to")
    plan = make_plan(chosen, checkpoint.config, checkpoint.entries, family=family_for(checkpoint.config, family))
    clock.blocks = len(plan.blocks)
    about: Json = {"model": name_of(model), "versions": report.versions()}
    memory = Memory(left_for_activations(plan, max_memory, False), Path(output).absolute().parent)
    if imported is not None:
        widths = [{linear.local: linear.shape[1] for linear in block.linears} for block in plan.blocks]
        statistics = _imatrix().read_imatrix(Path(imported), family_table(plan), widths)
        statistics = replace(statistics, about={**about, **statistics.about})
    else:
        statistics = _collected(chosen, plan, checkpoint, clock, about, grams, memory)
    with clock.phase("writing", len(plan.blocks)):
        save_statistics(Path(output), statistics)
        if imatrix is not None:
            names = [f"quantkit:{settings.mix}"] if imported is None else statistics.about["datasets"]
            _imatrix().write_imatrix(Path(imatrix), statistics, family_table(plan), names, settings.sequence_length)
    seconds = {phase: round(seconds, 2) for phase, seconds in clock.seconds.items()}
    return {**statistics.about, "seconds": seconds, "spilled": memory.spilled, "peak_memory": report.peak_memory()}


def _collected(recipe: Recipe, plan: Plan, checkpoint: TensorSource, clock: Clock, about: Json, grams: bool, memory: Memory) -> Statistics:
    """The original model, block after block, over the calibration set and as much of the reserve as its experts need."""
    with clock.phase("tokenizing"):
        samples = Samples.read(recipe, checkpoint, calibrated=True, scored=False)
        clock.tokens = samples.tokens
    with clock.phase("building the skeleton"):
        skeleton = Skeleton(checkpoint, plan.dtype, memory)
        stream, reserve = Stream(skeleton, samples.calibration), Reserve.start(skeleton, samples.reserve)
        state = stream.start()
        state.check("the embeddings")
    cells, blocks, floor = samples.cells, [], recipe.calibration.expert_tokens
    for block_plan in plan.blocks:
        with clock.block(counts=True), clock.phase("observing", block_plan.index), skeleton.block(block_plan.index) as block:
            blocks.append(collect(stream, block, state, reserve, cells, floor, grams))
        state.check(f"block {block_plan.index}")
        give_back_memory()
    fed = {**samples.about, "reserve_tokens": samples.reserve_tokens}
    coverage = coverage_report(blocks, cells, floor, recipe.search.expert_floor)
    return Statistics(tuple(blocks), tuple(cells), {**about, "calibration": fed, "coverage": coverage, "samples": samples.manifest})


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
    formats: Sequence[str] = (),
    target_size: int | None = None,
    target_bits: float | None = None,
    family: str | None = None,
    fresh: bool = False,
    max_memory: int | None = None,
    device: str = "auto",
    tell: Listener = silent,
) -> Result:
    """Quantize a checkpoint and write it in the recipe's formats; one rank of several where torchrun started them.

    Args:
        model: a folder or a Hub id; None is the embedded reference model.
        recipe: a shipped recipe's name or a YAML file.
        output: the run's folder; a run that was killed goes on there. Default: MODEL-RECIPE in the working directory.
        calibration: another mix or a .jsonl file in place of the recipe's.
        adapter: a PEFT LoRA adapter's folder, merged as the checkpoint is read.
        formats: some of "compressed-tensors", "gguf", "onnx", in place of the recipe's; one more can be added to a run that is done
            (with a target behind the format that it was kept in).
        target_size: bytes of the weight files (of the first format): each linear's scheme is picked by what it costs.
        target_bits: the same by bits a weight of what is quantized, scales and zero points counted.
        family: "discovered" or a table's .yaml file, in place of a shipped table; every fold is still proven on the real weights.
            "names" reads a table from tensor names and runs nothing: plain rounding, unproven and unscored, of what cannot be streamed.
        fresh: delete what an earlier run left in `output` and start anew.
        max_memory: bytes; activations that do not fit beside a block lie in mapped files in `output`, with the same result.
        device: where blocks are run and solved: "auto" (CUDA where there is one), "cpu" or "cuda".
        tell: is told of each phase.

    Returns:
        What the run left; on a rank that is not the first, which writes, the held-out scores alone.

    Raises:
        QuantkitError: one line that says what is wrong, where, and what to do; nothing half-written looks whole.
    """
    chosen = load_recipe(recipe, calibration, formats, target_size, target_bits)
    checkpoint = open_checkpoint(model, adapter)
    name = name_of(model)
    out = Path(output) if output is not None else Path(f"{name}-{chosen.name}")
    with Ranks.join(device) as ranks, held(out) if ranks.first else nullcontext():
        return _quantized(chosen, checkpoint, model, name, out, adapter, family, fresh, max_memory, ranks, Clock(tell))


def _quantized(
    chosen: Recipe,
    checkpoint: TensorSource,
    model: str | None,
    name: str,
    out: Path,
    adapter: str | None,
    family: str | None,
    fresh: bool,
    max_memory: int | None,
    ranks: Ranks,
    clock: Clock,
) -> Result:
    """The main job, in a folder that no other run writes to."""
    with clock.phase("reading headers"):
        hashes = ranks.agreed(input_hashes(checkpoint, chosen, adapter) if ranks.first_here else None)
        table = family_for(checkpoint.config, family, checkpoint.entries)
        runs = table.origin != NAMES  # a table read from names serves where no model can be built
        if not runs and chosen.method != "rtn":
            raise RecipeError(f"--family {NAMES}: nothing is run, so only plain rounding is possible; use --recipe rtn-w4")
        inputs = repr([sorted(hashes.items()), report.versions(), *([table] if family else [])])

        def planned(schemes: Mapping[tuple[int, str], recipes.Weights] | None = None) -> Plan:
            return make_plan(chosen, checkpoint.config, checkpoint.entries, inputs, schemes, table)

        plan = planned()
        # what a format cannot express is refused before anything runs, and what the disk cannot hold
        offered = [plan, *map(planned, mixtures(chosen, plan))]
        sizing = [
            [writer_of(wanted, chosen, one, name, checkpoint.config, checkpoint.folder) for wanted in chosen.formats] for one in offered
        ]
        if ranks.first and not chosen.has_target:
            check_room(out, sum(writer.bytes for writer in sizing[0]) + solved_bytes(plan))
        clock.blocks = len(plan.blocks)
    with clock.phase("tokenizing"):
        samples = Samples.read(chosen, checkpoint, calibrated=chosen.method != "rtn", scored=runs)
        plan = replace(plan, fingerprint=f"{plan.fingerprint} {samples.about['digest']}")  # solved blocks are those of these very tokens
        clock.tokens = samples.tokens
    if fresh and ranks.first:
        clear(out, OURS)
    told_by = {"model": name, "recipe": chosen.name, "calibration": chosen.calibration.mix, "adapter": adapter}
    if chosen.has_target:
        told_by["target"] = f"{chosen.target_size or chosen.target_bits} in {chosen.formats[0]}"
    store = Store(out / SOLVED, plan, told_by) if ranks.first else None
    with clock.phase("building the skeleton"):
        staged = chosen.method != "rtn" and chosen.search.stages
        there = left_on_device(plan, ranks.device, staged)
        memory = Memory(left_for_activations(plan, max_memory, staged), out if ranks.first else None, there)
        skeleton = Skeleton(checkpoint, plan.dtype, memory, ranks.device) if runs else None
    target: Json | None = None
    if chosen.has_target and skeleton is not None:  # a target is never plain rounding's
        first, fingerprint = chosen.formats[0], plan.fingerprint

        def remade(schemes: Mapping[tuple[int, str], recipes.Weights]) -> Plan:
            """The plan with other schemes. They follow from its inputs, so it is the same run."""
            return replace(planned(schemes), fingerprint=fingerprint)

        def size_of(plan: Plan) -> int:
            return writer_of(first, chosen, plan, name, checkpoint.config, checkpoint.folder).bytes

        notes = store.folder / "target.json" if store is not None else None
        plan, target = pick(chosen, plan, remade, size_of, skeleton, samples.calibration, notes, clock)
    writers: dict[str, Writer] = {
        wanted: writer_of(wanted, chosen, plan, name, checkpoint.config, checkpoint.folder, checkpoint, store, out)
        for wanted in (chosen.formats if ranks.first else ())
    }
    with clock.phase("building the skeleton"):
        run: Run | Rounding = Rounding(plan, checkpoint, store, clock)
        if skeleton is not None:
            run = Run.start(chosen, plan, skeleton, store, ranks, clock, samples.calibration, samples.heldout, samples.reserve)
    reports = []
    for block_plan in plan.blocks:
        with clock.block(counts=block_plan.index not in run.known):
            reports.append(run.block(block_plan))
        with clock.phase("writing", block_plan.index):
            for writer in writers.values():
                writer.write_ready()
    with clock.phase("scoring held-out samples", len(plan.blocks)):
        scores = run.score()
    if not ranks.first:
        return Result(out, {}, {}, {"heldout": scores})
    with clock.phase("writing", len(plan.blocks)):
        for writer in writers.values():
            writer.write_ready()
            writer.finish()
    sizes: dict[str, int] = {name: writer.bytes for name, writer in writers.items()}
    about = {
        "model": name,
        "base_model": model.partition("@")[0] if model is not None and not Path(model).exists() else None,
        "date": report.today(),
        "recipe": chosen.model_dump(mode="json"),
        "family": plan.family,
        "model_type": plan.model_type,
        "parameters": report.parameters(plan),
        "bytes": sizes,
        "bits_per_weight": {name: report.bits_per_weight(size, plan) for name, size in sizes.items()},
        "sizes": {**report.sizes_report(sizes, plan), **other_sizes(chosen, plan, name, checkpoint.config, checkpoint.folder, table)},
        "kept": report.kept_report(plan),
        "calibration": samples.about,
        "coverage": coverage_report(run.coverage, samples.cells, chosen.calibration.expert_tokens, chosen.search.expert_floor),
        "heldout": scores,
        "target": target,
        **{name: asdict(writer.layout.rounded) for name, writer in writers.items() if isinstance(writer, GgufFile)},
        **{name: writer.about for name, writer in writers.items() if isinstance(writer, OnnxFolder)},
        "summary": report.summary(reports, chosen.search.expert_floor),
        "adapter": asdict(checkpoint.adapter) if isinstance(checkpoint, Adapted) else None,
        "seconds": {phase: round(seconds, 2) for phase, seconds in clock.seconds.items()},
        "seconds_by_block": [{name: round(spent, 6) for name, spent in clock.by_block.get(b.index, {}).items()} for b in plan.blocks],
        "memory": clock.memory,
        "peak_memory": report.peak_memory(),
        "spilled": memory.spilled,
        "threads": torch.get_num_threads(),
        "ranks": ranks.size,
        "device": ranks.device.type,
        "versions": report.versions(),
        "inputs": hashes,
        "samples": samples.manifest,
        "base_card": card_of(checkpoint.folder),
        "adapter_card": card_of(Path(adapter)) if adapter else None,
        "blocks": reports,
    }
    for made in writers:
        files = listed(out / made)
        write_card(out / made, about, made, files)
        write_manifest(out / made, about, made, files)
    report.write_json(out / "run.json", about)
    return Result(out, {made: out / made for made in writers}, sizes, about)


def evaluate(
    artefact: str | Path,
    *,
    baseline: str | Path | None = None,
    suite: str = "quick",
    engine: str = "auto",
    baseline_engine: str = "auto",
    gate: str | None = None,
    limit: int | None = None,
    against: str | Path | None = None,
    cache: str | Path | None = None,
    tell: Listener = silent,
) -> Evaluation:
    """Judge the files that ship: open them in the engine that will serve them, beside their original, on the same tokens.

    Args:
        artefact: an artefact's folder, a run's folder that holds one, or a .gguf file.
        baseline: the original, a folder or a Hub id; None: the embedded reference model, where the artefact was made from it.
        suite: a shipped suite's name, a YAML file, or `lm-eval:task,task`.
        engine, baseline_engine: auto, transformers, vllm, llama.cpp, onnxruntime or dequantized.
        gate: a shipped gate's name or a YAML file; None: figures without a verdict.
        limit: documents, items of each kind and items of each harness task at most.
        against: JSON that an earlier evaluation stored; the gate judges by that run too.
        cache: the folder of baselines; None: the user's.

    Returns:
        The report and its verdict: PASS, FAIL, INCONCLUSIVE, or None without a gate.

    Raises:
        EvaluationError: there is no verdict; one line says why.
    """
    chosen, judged = recipes.load_suite(suite), recipes.load_gate(gate) if gate else None
    place = Path(artefact)
    if baseline is None:
        if not made_from(place, recipes.reference_model()):
            raise EvaluationError(f"{artefact}: was not made from the embedded reference model; name its original with --baseline")
        baseline = recipes.reference_model()
    stored = None
    if against is not None:
        if judged is None:
            raise EvaluationError(f"{against}: a stored run needs a gate to judge by; give --gate too")
        if not isinstance(stored := read_json(Path(against)), dict) or not stored.keys() & {"documents", "items"}:
            raise EvaluationError(f"{against}: not what `quantkit eval --store` writes")
    return judge(
        place,
        find_folder(str(baseline)),
        chosen,
        gate=judged,
        engine=engine,
        baseline_engine=baseline_engine,
        limit=limit,
        stored=stored,
        cache=Path(cache) if cache is not None else None,
        tell=tell,
    )
