"""quantkit beside llm-compressor in one run: the same model, tokens, groups, machine and threads, in turn, each in a process of its own.

    python benchmarks/vs_llmcompressor.py .venv-rivals/bin/python MODEL CALIBRATION.safetensors EVALUATION.safetensors
        [--rounds 2] [--methods awq awq+gptq] [--all-experts] [--bits 4] [--asymmetric] [--recipe awq-w4]

The interpreter is that of `make rivals`; tokens are made by benchmarks/rivals/tokens.py. Rounds go A B A B: what else the machine does
meets both. Seconds (the processor's, user and system, and the wall's) are of the quantization alone, imports and loading left out of both;
the peak is the process's. KL to the original on held-out text, by benchmarks/rivals/score.py. llm-compressor gets what is best for it
(benchmarks/rivals/README.md): a correct table for Gemma 4, its crash without an accelerator patched out, ranges by mean squared error.
--all-experts adds, once, its default for experts: every token through every expert.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "rivals"), str(HERE)]

from common import load_model  # noqa: E402  # of benchmarks/rivals
from quality import ours  # noqa: E402
from run import run as run_rival  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from score import score  # noqa: E402

Contender = Callable[[Path], tuple[Path, dict[str, Any]]]  # a folder for its results -> dense weights, its figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("python", "model", "calibration", "evaluation"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--recipe", default="awq-w4")
    parser.add_argument("--methods", nargs="+", default=["awq", "awq+gptq"])
    parser.add_argument("--all-experts", action="store_true")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--asymmetric", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kind = f"{arguments.bits} bits, {'asymmetric' if arguments.asymmetric else 'symmetric'}, groups of 32, one thread"
    tokens = load_file(arguments.calibration)["ids"].shape
    print(f"{arguments.model.name}: {kind}; calibrated on {tokens[0]} x {tokens[1]} tokens")
    original = load_model(arguments.model)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, contender in turns(arguments):
        with tempfile.TemporaryDirectory() as folder:
            weights, result = contender(Path(folder))
            if name not in found:
                result |= score(original, load_model(arguments.model, weights=load_file(weights)), arguments.evaluation)
        found.setdefault(name, []).append(result)
        print(f"  {name}: {result['cpu_seconds']:.1f} s of the processor", file=sys.stderr, flush=True)
    print("\n".join(table(found)))


def turns(arguments: argparse.Namespace) -> Iterator[tuple[str, Contender]]:
    """Every contender in turn, round after round; ours is the first of each."""
    kind = [f"--bits={arguments.bits}", *(["--asymmetric"] if arguments.asymmetric else []), f"--recipe={arguments.recipe}"]
    given = SimpleNamespace(model=arguments.model, calibration=arguments.calibration)

    def rival(method: str, *options: str) -> Contender:
        def contend(folder: Path) -> tuple[Path, dict[str, Any]]:
            how: dict[str, Any] = {"method": method, "bits": arguments.bits, "symmetric": not arguments.asymmetric}
            return run_rival(arguments.python, arguments.model, arguments.calibration, folder, *options, **how)

        return contend

    for number in range(arguments.rounds):
        yield f"quantkit {arguments.recipe}", lambda folder: ours(given, folder, *kind)  # type: ignore[arg-type]
        for method in arguments.methods:
            yield f"llm-compressor {method}", rival(method)
        if arguments.all_experts and not number:
            yield f"llm-compressor {arguments.methods[0]}, all experts", rival(arguments.methods[0], "--all-experts")


def table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A row for each contender, means over its rounds; what ours is of each of the others; the settings of all."""
    lines = [f"{'contender':34} {'KL':>8} {'95 % interval':>17} {'processor s':>18} {'wall s':>8} {'peak GiB':>8}"]
    averages = {name: {key: mean(run[key] for run in runs) for key in MEASURES} for name, runs in found.items()}
    for name, runs in found.items():
        low, high = runs[0]["kl_interval"]
        each = " ".join(f"{run['cpu_seconds']:.1f}" for run in runs)
        lines.append(
            f"{name:34} {runs[0]['kl']:8.5f} {f'{low:.5f}-{high:.5f}':>17} {each:>18} {averages[name]['wall_seconds']:8.1f} "
            f"{averages[name]['peak_rss_bytes'] / 2**30:8.2f}"
        )
    first, *others = found
    for other in others:
        ratios = [averages[first][key] / averages[other][key] for key in MEASURES]
        kl = found[first][0]["kl"] / found[other][0]["kl"]
        told = ", ".join(f"{name} {ratio:.3f}" for name, ratio in zip(MEASURES.values(), ratios, strict=True))
        lines.append(f"{first} over {other}: KL {kl:.3f}, {told}")
    for name, runs in found.items():
        version = f" {runs[0]['version']}" if "version" in runs[0] else ""
        lines.append(f"settings of {name}{version}: {json.dumps(runs[0]['settings'])}")
    return lines


MEASURES = {"cpu_seconds": "processor seconds", "wall_seconds": "wall seconds", "peak_rss_bytes": "peak memory"}

if __name__ == "__main__":
    main()
