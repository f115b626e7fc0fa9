"""Peak memory of the main job at the 26B-A4B's real width, against its limit: so many times the largest block, plus the activations.

    python benchmarks/memory.py [--blocks 2 4] [--samples 16] [--length 256] [--threads 1] [--recipe awq-w4] [--folder DIR]

Runs `quantkit quantize` on a generated checkpoint of each depth in a process of its own and reads the peak from the operating system's
account of that process. The peak must not grow with depth by more than 5 %. Exit code 1 where a limit is broken.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import yaml
from wide import SHAPES, make

from quantkit.model.memory import BESIDE_ACTIVATIONS
from quantkit.recipe import load_recipe

GROWTH = 1.05


def measure(folder: Path, blocks: int, recipe: Path, threads: int) -> tuple[int, int, dict]:
    """(peak bytes, bytes of the largest block, run.json) of one run."""
    model, out = folder / f"wide-{blocks}", folder / f"out-{blocks}"
    largest = make(model, blocks, replace(SHAPES["26b-a4b"], vocabulary=4096))  # the limit is of blocks; a head reads its own size
    command = [sys.executable, "-m", "quantkit", "quantize", str(model), "--recipe", str(recipe), "--output", str(out)]
    began = time.perf_counter()
    process = subprocess.Popen([*command, "--threads", str(threads)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"quantize ended with {process.returncode}")
    report = json.loads((out / "run.json").read_text())
    report["wall"] = time.perf_counter() - began
    shutil.rmtree(model)
    shutil.rmtree(out)
    return usage.ru_maxrss * 1024, largest, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--recipe", default="awq-w4")
    parser.add_argument("--folder", type=Path, help="where the checkpoints lie while they are needed (4 GB for 2 blocks)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        recipe = folder / "recipe.yaml"
        chosen = load_recipe(arguments.recipe)
        times = BESIDE_ACTIVATIONS[chosen.method != "rtn" and chosen.search.stages]
        fields = chosen.model_dump(mode="json", exclude={"name"})
        fields["calibration"] |= {"samples": arguments.samples, "sequence_length": arguments.length}
        fields["score"] = {"samples": 4, "sequence_length": 64}
        recipe.write_text(yaml.safe_dump(fields))
        peaks = []
        for blocks in arguments.blocks:
            peak, largest, report = measure(folder, blocks, recipe, arguments.threads)
            tokens = report["calibration"]["tokens"]
            limit = times * largest + tokens * SHAPES["26b-a4b"].hidden * 2
            peaks.append(peak)
            print(
                f"{blocks} blocks: peak {peak / 2**30:.2f} GiB = {peak / limit:.2f} of the limit ({times} x {largest / 1e9:.3f} GB + "
                f"{tokens} tokens of activations = {limit / 2**30:.2f} GiB); {report['wall']:.0f} s with {arguments.threads} thread(s)"
            )
            print("  seconds: " + ", ".join(f"{phase} {seconds:.0f}" for phase, seconds in report["seconds"].items() if seconds >= 1))
        growth = peaks[-1] / peaks[0]
        print(f"peak with {arguments.blocks[-1]} blocks over {arguments.blocks[0]}: {growth:.3f} (limit {GROWTH})")
        sys.exit(int(growth > GROWTH or peaks[-1] > limit))


if __name__ == "__main__":
    main()
