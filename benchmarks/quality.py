"""The solver beside its rivals: KL to the original, on the same calibration tokens and evaluation text, at the same bits.

    python benchmarks/quality.py MODEL CALIBRATION.safetensors EVALUATION.safetensors [--bits 4 3] [--schemes sym asym]
        [--contenders rtn fast awq-w4 best] [--rivals PYTHON] [--methods awq awq+gptq] [--observers minmax mse] [--autoround PYTHON]
        [--cache FOLDER] [--ablation]

Tokens are made by benchmarks/rivals/tokens.py (seed 0). Every contender runs in a process of its own, one thread, one after the other;
its dense weights are scored in transformers in fp32 (benchmarks/rivals/score.py). `worst language` is the largest KL ratio to the first
contender of any language over the ratio of all, with its 95 % interval (rows drawn anew within every language, the same for both); the
largest of many is high by itself, so `chance` is what it would reach in one draw of twenty if all languages gained alike. `worse` counts
linears that ended above plain rounding. --rivals names the interpreter of an environment with llm-compressor (`make rivals`); it runs
with its own ranges (minmax) and with those that serve it best (mse). --autoround names one with AutoRound. What a rival did is kept in the
cache under a hash of all that went into it. --ablation switches the solver's steps off in turn.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent / "rivals"
sys.path.insert(0, str(HERE))

from common import load_model  # noqa: E402  # of benchmarks/rivals
from run import run as run_rival  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from score import score, worst_language  # noqa: E402

OURS = ("rtn", "fast", "awq-w4", "best")
ABLATION: dict[str, dict[str, Any]] = {
    "awq-w4": {},
    "no folds": {"folds": False},
    "folds, rows even": {"sensitivity": False},
    "extremes, no range search": {"shrinks": 1},
    "nearest, not compensated": {"compensate": False, "stages": False},
    "one stage a block": {"stages": False},
    "stages, no retarget": {"retarget": 0.0},
    "retarget, no residual": {"residual": False},
    "nothing held out": {"hold_out": False},
    "rows by themselves": {"output_grams": False},
    "one sweep": {"sweeps": 1},
    "two sweeps": {"sweeps": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "calibration", "evaluation"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--schemes", nargs="+", choices=("sym", "asym"), default=["sym"])
    parser.add_argument("--contenders", nargs="*", default=list(OURS))
    parser.add_argument("--rivals", type=Path, metavar="PYTHON")
    parser.add_argument("--methods", nargs="+", default=["awq", "awq+gptq"])
    parser.add_argument("--observers", nargs="+", choices=("minmax", "mse"), default=["minmax", "mse"])
    parser.add_argument("--autoround", type=Path, metavar="PYTHON")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "quantkit-rivals")
    parser.add_argument("--ablation", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    original = load_model(arguments.model)
    for bits in arguments.bits:
        for scheme in arguments.schemes:
            symmetric = scheme == "sym"
            print(f"\n{arguments.model.name}, {bits} bits, {scheme}, group 32")
            print(
                f"{'contender':32} {'KL':>8} {'95 % interval':>17} {'of first':>8} {'same top':>8} {'worst language':>22} {'chance':>6} "
                f"{'worse':>5} {'CPU s':>7} {'peak GiB':>8}"
            )
            first: dict[str, Any] | None = None
            for name, weights, result in contenders(arguments, bits, symmetric):
                figures = score(original, load_model(arguments.model, weights=load_file(weights)), arguments.evaluation)
                first = first or figures
                low, high = figures["kl_interval"]
                language, most, (least, largest), chance = worst_language(first, figures)
                of_first, worst = figures["kl"] / first["kl"], f"{language} {most:.3f} ({least:.3f}-{largest:.3f})"
                worse = result.get("summary", {}).get("worse_than_rounded", "")
                print(
                    f"{name:32} {figures['kl']:8.5f} {f'{low:.5f}-{high:.5f}':>17} {of_first:8.3f} {figures['same_top']:8.4f} "
                    f"{worst:>22} {chance:6.3f} {worse:>5} {result['cpu_seconds']:7.1f} {result['peak_rss_bytes'] / 2**30:8.2f}",
                    flush=True,
                )


def contenders(arguments: argparse.Namespace, bits: int, symmetric: bool) -> Any:
    """(name, file of dense weights, its run) of each in turn; plain rounding first."""
    kind = [f"--bits={bits}", *([] if symmetric else ["--asymmetric"])]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        for name in arguments.contenders:
            yield name, *ours(arguments, output, *kind, f"--recipe={'rtn-w4' if name == 'rtn' else name}")
        if arguments.ablation:
            for name, search in ABLATION.items():
                yield name, *ours(arguments, output, *kind, f"--search={json.dumps(search)}")
            if symmetric:
                yield "positive scales", *ours(arguments, output, *kind, "--unsigned")
        common = {"bits": bits, "symmetric": symmetric}
        for method, observer in itertools.product(arguments.methods, arguments.observers) if arguments.rivals else ():
            name, how = f"llm-compressor {method}, {observer}", f"--observer=memoryless_{observer}"
            found = run_rival(arguments.rivals, arguments.model, arguments.calibration, arguments.cache, how, method=method, **common)
            yield name, *found
        if arguments.autoround:
            rival = {"rival": "autoround", **common}
            yield "AutoRound", *run_rival(arguments.autoround, arguments.model, arguments.calibration, arguments.cache, **rival)


def ours(arguments: argparse.Namespace, output: Path, *options: str) -> tuple[Path, dict[str, Any]]:
    command = [sys.executable, str(HERE / "ours.py"), str(arguments.model), str(arguments.calibration), str(output), *options]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(options)}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return output / "weights.safetensors", json.loads((output / "result.json").read_text())


if __name__ == "__main__":
    main()
