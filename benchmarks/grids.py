"""Our search of ggml's grids beside ggml's own: seconds for a million weights, and the weighted error, in one run.

    python benchmarks/grids.py --library libggml-base.so [--rows 1024] [--columns 2816]

The library is llama.cpp's (llama-cpp-python installs one as llama_cpp/lib/libggml-base.so). Both get the same weights (normal with heavy
tails, seed 0) and the same importance of columns (log-normal); one thread each, in turns, the best of three. `compensated` rounds by a
Gram, which ggml does not do: its error is not comparable here, its time is.
"""

import argparse
import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantkit.grid import ggml, superblock
from quantkit.solve.rounding import compensated_superblocks, factor

TYPES = {"IQ4_NL": 20, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}  # ggml_type in ggml.h
TURNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=2816)
    options = parser.parse_args()
    torch.set_num_threads(1)
    library = ctypes.CDLL(str(options.library))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(options.rows, options.columns, generator=generator) * 0.02
    weight = weight / torch.rand(weight.shape, generator=generator).clamp(min=0.05).sqrt()
    importance = torch.exp(torch.randn(options.columns, generator=generator))
    spread = torch.randn(options.columns, options.columns, generator=generator) / options.columns**0.5
    gram = importance.sqrt()[:, None] * (torch.eye(options.columns) + spread @ spread.T) * importance.sqrt()
    factored = factor(gram[None], 0.01)
    millions = weight.numel() / 1e6
    print(f"{'grid':8} {'s per M':>8} {'ggml':>8} {'ratio':>7} {'error of ggml':>14} {'compensated, s per M':>21}")
    for kind, number in TYPES.items():

        def theirs(kind: str = kind, number: int = number) -> Tensor:
            made = np.empty((options.rows, ggml.row_bytes(kind, options.columns)), np.uint8)
            source, weights = weight.numpy(), importance.numpy()
            library.ggml_quantize_chunk(
                number, source.ctypes.data_as(ctypes.c_void_p), made.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(0),
                ctypes.c_int64(options.rows), ctypes.c_int64(options.columns), weights.ctypes.data_as(ctypes.c_void_p),
            )  # fmt: skip
            return torch.from_numpy(made)

        def ours(kind: str = kind) -> Tensor:
            return superblock.pack(superblock.fit(weight, kind, importance))

        def compensated(kind: str = kind) -> Tensor:
            return superblock.pack(compensated_superblocks(weight[None], factored, kind)[0])

        best: dict[Callable[[], Tensor], float] = {}
        rows: dict[Callable[[], Tensor], Tensor] = {}
        for _ in range(TURNS):
            for one in (ours, theirs, compensated):
                began = time.process_time()
                rows[one] = one()
                best[one] = min(best.get(one, 1e9), time.process_time() - began)
        error = {
            one: float((importance * (superblock.decode(superblock.unpack(r, kind)) - weight).square()).sum()) for one, r in rows.items()
        }
        mine, other, third = (best[one] / millions for one in (ours, theirs, compensated))
        print(f"{kind:8} {mine:8.3f} {other:8.3f} {mine / other:7.2f} {error[ours] / error[theirs]:14.3f} {third:21.3f}", flush=True)


if __name__ == "__main__":
    main()
