"""Kill it, starve it, watch it grow, feed it garbage; prints what was tried and what went wrong. Exit code 1 where anything did.

    python benchmarks/torture.py [--minutes 10] [--kills 40] [--faults 20] [--seed 0] [--only kill starve creep limits fuzz] [--folder DIR]

kill    SIGKILL in every phase, the download and the card included; the command again, until it ends: all bytes of all formats are those
        of an undisturbed run, and no block is solved again but the one that was being solved
starve  the disk becomes full at a random touch of a file (a small one, mounted; a shim below Python's files where nobody may mount)
creep   resident memory, read from outside, at block 40 of 48 beside block 8
limits  --max-memory, read from outside
fuzz    mutations of every kind of input (benchmarks/mutations.py), in what is left of the minutes
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1", HF_HUB_OFFLINE="1", SOURCE_DATE_EPOCH="1700000000")

import doors  # noqa: E402
import mutations  # noqa: E402
import runs  # noqa: E402
import torch  # noqa: E402

from quantkit import release  # noqa: E402
from quantkit.cli.common import quiet  # noqa: E402


def torture(
    folder: Path, minutes: float, kills: int, faults: int, seed: int, only: list[str], blocks: int = 48
) -> tuple[dict[str, Any], int]:
    """Every part within the minutes; what was found, and how many things were wrong."""
    ends, found, wrong = time.monotonic() + minutes * 60, dict[str, Any](), 0
    quiet()
    torch.set_num_threads(1)
    release.__name__  # loaded before the first fork  # noqa: B018
    runs.warm(folder / "warm")
    for part in only:
        (folder / part).mkdir()
        began = time.monotonic()
        if part == "kill":
            told = runs.kill(folder / part, kills, seed, began + (ends - began) * 0.5)
        elif part == "starve":
            told = runs.starve(folder / part, faults, seed, began + (ends - began) * 0.4)
        elif part == "creep":
            told = runs.creep(folder / part, blocks, blocks // 6, blocks * 5 // 6)
        elif part == "limits":
            told = runs.limits(folder / part)
        else:
            ways = doors.doors(folder / part)
            doors.warm(ways, folder / part)
            counts = mutations.fuzz(ways, folder / part, ends - time.monotonic(), seed)
            told = {"mutations": counts.tried.total(), "refused": counts.refused.total(), "by door": dict(counts.tried)}
            told |= {"kinds of defect": dict(counts.kinds), "wrong": [f"{key} | {what}" for key, what in counts.examples.items()]}
        found[part] = {**told, "seconds": round(time.monotonic() - began, 1)}
        wrong += len(told["wrong"])
    return found, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--folder", type=Path, help="A folder to work in, kept. [default: a temporary one]")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = asked.folder or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        found, wrong = torture(folder.resolve(), asked.minutes, asked.kills, asked.faults, asked.seed, asked.only)
    for part, told in found.items():
        print(part)
        for key, value in told.items():
            for line in value if isinstance(value, list) else [value]:
                print(f"  {key}: {f'{line:,}' if isinstance(line, int) else line}")
    print(f"{wrong} things wrong")
    sys.exit(1 if wrong else 0)


PARTS = ["kill", "starve", "creep", "limits", "fuzz"]

if __name__ == "__main__":
    main()
