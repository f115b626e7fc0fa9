"""Do integers depend on the number of threads? One recipe, one model, 1 and N threads, every artefact byte compared.

    python benchmarks/threads.py [--model DIR] [--recipe awq-w4] [--threads 2 4]

Prints, for each count, the codes that differ from one thread's, and what that does to the error that the run reports.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("SOURCE_DATE_EPOCH", "1700000000")

import torch
from safetensors.torch import load_file
from torch import Tensor

from quantkit import pipeline, recipe
from quantkit.cli.common import quiet


def run(model: str | None, name: str, out: Path, threads: int) -> tuple[dict[str, Tensor], float]:
    """Every tensor of a compressed-tensors artefact, and the mean error that the run reports."""
    torch.set_num_threads(threads)
    made = pipeline.quantize(model, recipe=name, output=out)
    folder, found = made.artefacts["compressed-tensors"], dict[str, Tensor]()
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found, made.report["summary"]["mean_error"]


def compare(one: dict[str, Tensor], other: dict[str, Tensor], bits: int = 4) -> tuple[int, int, int]:
    """(tensors that differ in any bit, codes that differ, codes)."""
    differing = codes = total = 0
    for name, tensor in one.items():
        differing += not torch.equal(tensor, other[name])
        if name.endswith("packed"):
            places = range(0, 32, bits)
            codes += sum(int(((tensor >> at & 15) != (other[name] >> at & 15)).sum()) for at in places)
            total += tensor.numel() * len(places)
    return differing, codes, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="A folder. [default: the embedded reference model]")
    parser.add_argument("--recipe", default="awq-w4", help="One of 4 bits.")
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    asked = parser.parse_args()
    quiet()
    recipe.load_recipe(asked.recipe)
    with tempfile.TemporaryDirectory() as place:
        first, error = run(asked.model, asked.recipe, Path(place) / "1", 1)
        for threads in asked.threads:
            ours, error_of = run(asked.model, asked.recipe, Path(place) / str(threads), threads)
            differing, codes, total = compare(first, ours)
            print(f"{threads} threads beside 1: {differing} of {len(first)} tensors differ, {codes:,} of {total:,} codes", end=" ")
            print(f"({codes / total:.1e}); mean error {error_of:.6e} beside {error:.6e}")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
