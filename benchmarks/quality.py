"""What the search is worth: every recipe's KL to the original on held-out samples, over that of plain rounding at the same bits.

    python benchmarks/quality.py [MODEL ...] [--recipes rtn-w4 awq-w4 awq-w4-asym]

Without a MODEL the embedded reference model is taken. KL is measured while streaming, on samples that were never calibrated on, with the
integers that are written; the time is the run's own process time.
"""

import argparse
import resource
import tempfile
from pathlib import Path

import torch

from quantkit import pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=[None])
    parser.add_argument("--recipes", nargs="+", default=["rtn-w4", "awq-w4", "awq-w4-asym"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'model':20} {'recipe':14} {'bits/weight':>11} {'KL':>9} {'of first':>8} {'same top':>8} {'perplexity':>10} {'CPU s':>6}")
    for model in arguments.models:
        first = None
        for recipe in arguments.recipes:
            began = resource.getrusage(resource.RUSAGE_SELF).ru_utime
            with tempfile.TemporaryDirectory() as folder:
                report = pipeline.quantize(model, recipe=recipe, output=Path(folder) / "out").report
            seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime - began
            scores = report["heldout"]
            first = first or scores["kl"]
            print(
                f"{report['model'][:20]:20} {report['recipe']['name'][:14]:14} {report['bits_per_weight']:11.3f} {scores['kl']:9.5f} "
                f"{scores['kl'] / first:8.3f} {scores['same_top']:8.4f} {scores['perplexity']:10.4f} {seconds:6.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
