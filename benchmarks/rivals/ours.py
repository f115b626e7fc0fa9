"""quantkit on given tokens, measured and laid down as the rivals' scripts do: dense weights, seconds of the processor, peak memory.

    python benchmarks/rivals/ours.py MODEL IDS.safetensors OUTPUT [--recipe awq-w4] [--bits 4] [--asymmetric] [--search '{"sweeps": 2}']

Runs with quantkit's environment. Rows that the group does not divide (the stories' FFN of 172) get one scale each, as the rivals do.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantkit import report
from quantkit.errors import RecipeError
from quantkit.grid.integer import from_codes
from quantkit.model.blocks import Skeleton
from quantkit.model.checkpoint import Checkpoint
from quantkit.plan import make_plan
from quantkit.ranks import Ranks
from quantkit.recipe import Recipe, load_recipe
from quantkit.report import Clock, silent
from quantkit.run import Run
from quantkit.store import Store
from quantkit.types import Batch, Plan

BATCH_TOKENS = 2048
LABELS = {"id": "", "language": "", "domain": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--recipe", default="awq-w4")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--unsigned", action="store_true", help="symmetric scales are positive")
    parser.add_argument("--search", type=json.loads, default={}, help="keys of the recipe's search, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = load_recipe(arguments.recipe).model_dump(mode="json")
    chosen["weights"] |= {"bits": arguments.bits} | ({"symmetric": False, "signed": False} if arguments.asymmetric else {})
    chosen["weights"] |= {"signed": False} if arguments.unsigned else {}
    chosen["search"] |= arguments.search
    rows = load_file(arguments.ids)["ids"]
    count = max(1, BATCH_TOKENS // rows.shape[1])
    batches = [Batch(part, torch.ones_like(part, dtype=torch.bool), (LABELS,) * len(part)) for part in rows.split(count)]
    checkpoint = Checkpoint(arguments.model)
    plan, recipe = planned(chosen, checkpoint)
    clock = Clock(silent)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "solved", plan, {})
        skeleton = Skeleton(checkpoint, plan.dtype)  # as the rivals' clocks start behind their loading
        began, wall = time.process_time(), time.perf_counter()
        run = Run.start(recipe, plan, skeleton, store, Ranks(), clock, batches, [])
        reports = [run.block(block) for block in plan.blocks]
        seconds, wall = time.process_time() - began, time.perf_counter() - wall
        peak = peak_memory()
        arguments.output.mkdir(parents=True, exist_ok=True)
        save_file(dense(plan, store, checkpoint), arguments.output / "weights.safetensors")
    result = {
        "rival": "quantkit",
        "method": arguments.recipe,
        "bits": arguments.bits,
        "symmetric": not arguments.asymmetric,
        "cpu_seconds": round(seconds, 2),
        "wall_seconds": round(wall, 2),
        "peak_rss_bytes": peak,
        "seconds": {phase: round(spent, 2) for phase, spent in clock.seconds.items()},
        "summary": report.summary(reports, recipe.search.expert_floor),
        "settings": chosen["search"],
    }
    (arguments.output / "result.json").write_text(json.dumps(result, indent=1) + "\n")


def peak_memory() -> int:
    """Of this process since it began; rusage would count its parent's size at the fork."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def planned(chosen: dict, checkpoint: Checkpoint) -> tuple[Plan, Recipe]:
    """The plan; rows that no group divides get one scale."""
    while True:
        recipe = Recipe.model_validate(chosen)
        try:
            return make_plan(recipe, checkpoint.config, checkpoint.entries), recipe
        except RecipeError as problem:
            if "divides" not in str(problem) or chosen["overrides"]:
                raise
            chosen["overrides"] = [{"match": "*.down_proj", "weights": {"group": "row"}}]


def dense(plan: Plan, store: Store, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor that the run changed, decoded, under the checkpoint's names."""
    changed: dict[str, torch.Tensor] = {}
    for block in plan.blocks:
        solved = store.get(block)
        for linear in block.linears:
            if linear.scheme is None:
                continue
            source, weight = linear.source, from_codes(solved.linears[linear.local].codes)
            if source.expert is None:
                changed[source.tensor] = weight
                continue
            fused = changed.setdefault(source.tensor, checkpoint.read(source.tensor).float())
            fused[source.expert, slice(*source.rows) if source.rows else slice(None)] = weight
        changed |= {block.kept[local]: tensor.float() for local, tensor in solved.folded.items()}
    return changed


if __name__ == "__main__":
    main()
