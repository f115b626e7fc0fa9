"""On another device: one block solved from the same sums, and whole runs. Prints JSON; test_device.py reads it.

A process of its own: the second device has to be known before autograd counts devices.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

if not torch.cuda.is_available():
    import second_device
import tiny
import yaml

from quantkit import pipeline
from quantkit.calibrate.observe import observe
from quantkit.inputs import Samples
from quantkit.model.blocks import Skeleton
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.sound import block_weights
from quantkit.model.streams import Stream
from quantkit.plan import make_plan
from quantkit.recipe import load_recipe
from quantkit.run import effort_of
from quantkit.solve.block import solve_block
from quantkit.store import taken_apart

SMALL = {
    "calibration": {"samples": 12, "sequence_length": 64},
    "score": {"samples": 4, "sequence_length": 64},
    "search": {"exponents": 3, "shrinks": 3, "rows": 16},
}
RUNS: dict[str, dict] = {"llama": {"num_hidden_layers": 2}, "gemma4_moe": {"num_hidden_layers": 2}}
BLOCKS = (("llama", "awq-w4"), ("llama", "awq-w4-asym"), ("llama", "gguf-q4_k_m"), ("gemma4_moe", "awq-w4"))


def recipe_file(folder: Path, base: str) -> str:
    fields = load_recipe(base).model_dump(mode="json", exclude={"name"})
    path = folder / f"{base}.yaml"
    path.write_text(yaml.safe_dump({**fields, **SMALL}))
    return str(path)


def moved(value, device):
    """Sums and weights on another device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(one, device) for key, one in value.items()}
    return replace(
        value,
        **{name: moved(getattr(value, name), device) for name in value.__slots__ if getattr(value, name) is not None and name != "tokens"},
    )


def block_differs(model: Path, recipe: str, device: torch.device) -> list[str]:
    """Tensors of the first block that are solved otherwise there than on the CPU, from the very same sums."""
    chosen, checkpoint = load_recipe(recipe), Checkpoint(model)
    plan = make_plan(chosen, checkpoint.config, checkpoint.entries)
    stream = Stream(Skeleton(checkpoint, plan.dtype), Samples.read(chosen, checkpoint, calibrated=True, scored=False).calibration)
    with stream.skeleton.block(0) as block:
        weights, kept = block_weights(plan.blocks[0], block, stream.skeleton, plan.dtype)
        stats = observe(stream, block, stream.start())
        found = []
        for place in (torch.device("cpu"), device):
            sums = {local: moved(one, place) for local, one in stats.items()}
            solved = solve_block(
                plan.blocks[0], moved(dict(weights), place), moved(dict(kept), place), sums, plan.norm_offset, effort_of(chosen)
            )
            found.append({name: tensor.cpu() for name, tensor in taken_apart(solved)[0].items()})
    return sorted(name for name in found[0] if not torch.equal(found[0][name], found[1][name]))


def main(device: torch.device) -> dict:
    told: dict = {"device": str(device), "blocks": {}, "runs": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for family, changes in RUNS.items():
            tiny.build(family, folder / family, **changes)
        for family, base in BLOCKS:
            told["blocks"][f"{family} {base}"] = block_differs(folder / family, recipe_file(folder, base), device)
        for family in RUNS:
            both = [
                pipeline.quantize(
                    str(folder / family), recipe=recipe_file(folder, "awq-w4"), output=folder / f"{family}-{where}", device=where
                )
                for where in ("cpu", device.type)
            ]
            linears = [{n: one for block in result.report["blocks"] for n, one in block["linears"].items()} for result in both]
            # the guard says yes or no, by a handful of an expert's tokens: the last bit may turn it
            guarded = sorted(n for n in linears[0] if any(ones[n]["fell_back"] for ones in linears))
            told["runs"][family] = {
                "device": both[1].report["device"],
                "kl": [result.scores["kl"] for result in both],
                "guarded": guarded,
                "error": [sum(one["error"] for n, one in ones.items() if n not in guarded) for ones in linears],
            }
    return told


if __name__ == "__main__":
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        found = main(torch.device("cuda", 0))
    else:
        with second_device.second_device() as there:
            found = main(there)
    json.dump(found, sys.stdout)
