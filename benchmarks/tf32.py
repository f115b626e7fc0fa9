"""What a GPU's tf32 products in the Grams would change: the main job with fp32 operands, and with operands rounded to tf32's ten bits.

    python benchmarks/tf32.py [MODEL ...] [--recipe awq-w4] [--threads 1]

Runs on the CPU, which has no such products: operands are rounded to the nearest of ten mantissa bits before an fp32 product, as the
tensor cores do it; sums stay fp32. MODEL is a folder; none is the embedded model. Prints the held-out KL of both, the largest change of
an operand that is bf16 already (none: eight bits fit in ten), and how many codes differ.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from quantkit import pipeline
from quantkit.calibrate import observe
from quantkit.grid.integer import unpack


def tf32(x: Tensor) -> Tensor:
    """The nearest values of eight exponent and ten mantissa bits, ties to even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def rounded_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    total.addmm_(tf32(left).T, tf32(right))


def codes(out: Path) -> dict[str, Tensor]:
    """Four-bit codes of every linear of a run."""
    found = {}
    for path in sorted((out / "solved").glob("block-*.safetensors")):
        for name, tensor in load_file(path).items():
            if name.endswith("/packed"):
                found[f"{path.stem} {name}"] = unpack(tensor, 4, tensor.shape[1] * 8)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--recipe", default="awq-w4")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    some = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    print(f"largest change of a bf16 operand: {float((tf32(some) - some).abs().max())}")
    print("| model | KL, fp32 operands | KL, tf32 operands | ratio | other codes |\n|---|---|---|---|---|")
    for model in arguments.models or [None]:
        plain, found = observe._add_product, []
        with tempfile.TemporaryDirectory() as folder:
            for name, product in (("fp32", plain), ("tf32", rounded_product)):
                observe._add_product = product
                try:
                    result = pipeline.quantize(model and str(model), recipe=arguments.recipe, output=Path(folder) / name, device="cpu")
                finally:
                    observe._add_product = plain
                found.append((result.scores["kl"], codes(result.output)))
        (before, ours), (after, theirs) = found
        other = sum(int((ours[name] != theirs[name]).sum()) for name in ours) / sum(one.numel() for one in ours.values())
        print(f"| {model.name if model else 'embedded'} | {before:.5f} | {after:.5f} | {after / before:.3f} | {other:.1%} |", flush=True)


if __name__ == "__main__":
    main()
