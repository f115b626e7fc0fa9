"""Several ranks beside one: seconds and bytes of the same run, each rank with one thread.

    python benchmarks/ranks.py [MODEL ...] [--ranks 2] [--recipe awq-w4] [--repeat 1]

MODEL is a folder; none is the embedded model. One rank and several run in turn, each by its own command (several by torchrun, gloo on the
CPU); prints wall and processor seconds, and whether every block and artefact has the same bytes.
"""

import argparse
import hashlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(command: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of a command and all that it starts."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic() - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def digests(out: Path) -> dict[str, str]:
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.rglob("*.safetensors"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--recipe", default="awq-w4")
    parser.add_argument("--repeat", type=int, default=1)
    arguments = parser.parse_args()
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.ranks)]
    print(f"| model | 1 rank: wall, processor s | {arguments.ranks} ranks: wall, processor s | wall, ratio | files with other bytes |")
    print("|---|---|---|---|---|")
    for model in arguments.models or [None]:
        best: dict[int, tuple[float, float]] = {}
        with tempfile.TemporaryDirectory() as folder:
            for turn in range(arguments.repeat):
                for ranks, starts in ((1, [sys.executable]), (arguments.ranks, several)):
                    out = Path(folder) / f"{ranks}-{turn}"
                    job = [
                        "-m",
                        "quantkit",
                        "quantize",
                        *([str(model)] if model else []),
                        "--recipe",
                        arguments.recipe,
                        "--output",
                        str(out),
                    ]
                    seconds = run([*starts, *job, "--device", "cpu"])
                    best[ranks] = min(best.get(ranks, seconds), seconds)
            ours, theirs = digests(Path(folder) / "1-0"), digests(Path(folder) / f"{arguments.ranks}-0")
        other = sum(ours.get(name) != theirs.get(name) for name in {*ours, *theirs})
        one, more = best[1], best[arguments.ranks]
        name = model.name if model else "embedded"
        print(
            f"| {name} | {one[0]:.0f}, {one[1]:.0f} | {more[0]:.0f}, {more[1]:.0f} | {more[0] / one[0]:.2f} | {other} of {len(ours)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
