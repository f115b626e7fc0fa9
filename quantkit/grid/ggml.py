"""ggml's types (ggml/src/ggml-common.h in llama.cpp): rows of bytes from codes, or from floats by plain rounding. In blocks of 32:

    F32, F16, BF16  as they are
    Q8_0            f16 d; 32 x int8 q                                       w = d q
    Q4_0            f16 d; 16 bytes: q[j] | q[j + 16] << 4                   w = d (q - 8)
    Q4_1            f16 d; f16 m; 16 bytes as Q4_0                           w = d q + m
    Q5_0            f16 d; 32 fifth bits; 16 bytes of the lower four         w = d (q - 16)
    Q5_1            f16 d; f16 m; 32 fifth bits; 16 bytes                    w = d q + m

Our codes are signed, so Q4_0 and Q5_0 take code + 2^(bits-1), and a zero point becomes m = -(zero + 2^(bits-1)) scale.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16, UInt8
from torch import Tensor

from quantkit.grid import superblock
from quantkit.grid.integer import unpack
from quantkit.types import Codes, Scheme

BLOCK = 32
SIZES = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24),
    **superblock.SIZES,
}  # fmt: skip
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BITS = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5}
MINIMA = ("Q4_1", "Q5_1")  # types with a minimum, for schemes with zero points
LARGEST_SCALE = float(torch.finfo(torch.float16).max)


@dataclass(frozen=True, slots=True)
class Transcoded:
    """A matrix of codes as rows of ggml blocks, and the groups of it that fp16 could not hold to the last bit."""

    rows: UInt8[Tensor, "out bytes"]
    scales_rounded: int  # a scale outside fp16's range, or of more than 11 bits: the nearest, its codes chosen anew
    minima_rounded: int  # -(zero + 2^(bits-1)) scale of more than 11 bits: at most 2^-12 of it is lost


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of one row of a type."""
    block, size = SIZES[kind]
    if columns % block:
        raise ValueError(f"{columns} columns are not whole blocks of {kind}")
    return columns // block * size


def type_of(scheme: Scheme, columns: int) -> str | None:
    """The type that holds a scheme's codes exactly, or None. Wider groups repeat their scale in every block."""
    if scheme.grid != "integer":
        return scheme.grid.upper()
    if scheme.width(columns) % BLOCK:
        return None
    kinds = {(8, True): "Q8_0", (4, True): "Q4_0", (4, False): "Q4_1", (5, True): "Q5_0", (5, False): "Q5_1"}
    return kinds.get((scheme.bits, scheme.symmetric))


def transcode(codes: Codes) -> Transcoded:
    """The same integers and scales as blocks of `type_of(codes.scheme)`.

    fp16 holds every bf16 scale from 2^-17 to 65504 exactly. Where it cannot, the group gets the nearest fp16 scale (0 under 2^-25) and
    the codes that then come nearest to what it stood for; the caller is told how many.

    Raises:
        ValueError: a scale beyond fp16's largest.
    """
    scheme, out = codes.scheme, len(codes.packed)
    half = 1 << (scheme.bits - 1)
    wide = scheme.width(codes.columns) // BLOCK
    given = codes.scale.float().repeat_interleave(wide, 1)
    if bool((given.abs() > LARGEST_SCALE).any()):
        raise ValueError(f"a scale of {float(given.abs().max()):.3g} is beyond fp16")
    scale = given.half()
    q = (unpack(codes.packed, scheme.bits, codes.columns).view(out, -1, BLOCK) + half).to(torch.int16)
    off = scale.float() != given
    minimum = None
    if codes.zero is None:
        target = (q - half) * given[..., None]
    else:
        zero = codes.zero.repeat_interleave(wide, 1).float() + half
        exact = -zero * given
        minimum = exact.half()
        target = q * given[..., None] + exact[..., None]
    if bool(off.any()):
        step = torch.where(scale == 0, torch.ones_like(given), scale.float())[off][:, None]
        base = -half * step if minimum is None else minimum.float()[off][:, None]
        nearest = ((target[off] - base) / step).round().clamp(0, 2 * half - 1)
        nearest[scale[off] == 0] = half if minimum is None else 0
        q[off] = nearest.to(torch.int16)
    kind = type_of(scheme, codes.columns)
    if kind is None:
        raise ValueError(f"no type of ggml holds {scheme}")
    lost = 0 if minimum is None else int((minimum.float() != -zero * given)[:, ::wide].sum())
    return Transcoded(_blocks(kind, q, scale, minimum), int(off[:, ::wide].sum()), lost)


def round_rows(weight: Float[Tensor, "rows columns"], kind: str) -> UInt8[Tensor, "rows bytes"]:
    """Plain rounding: the extreme of a block sets its range. Unlike ggml, codes are chosen for the scale as it is stored.

    K-quants (see superblock.py) are searched, every column alike.

    Raises:
        ValueError: a weight that the type cannot hold.
    """
    if kind in FLOATS:
        stored = weight.to(FLOATS[kind])
        if bool(stored.isinf().any()) and not bool(weight.isinf().any()):
            raise ValueError(f"a weight of {float(weight.abs().max()):.3g} is beyond {kind}")
        return stored.contiguous().view(torch.uint8).view(len(weight), -1)
    if kind in superblock.SIZES:
        return superblock.pack(superblock.fit(weight.float(), kind))
    x = weight.float().view(len(weight), -1, BLOCK)
    top = (1 << BITS[kind]) - 1
    half, minimum = (top + 1) // 2, None
    if kind in MINIMA:
        low, high = x.amin(-1), x.amax(-1)
        scale, base = ((high - low) / top).half(), low
        minimum = low.half()
    elif kind == "Q8_0":
        scale = (x.abs().amax(-1) / 127).half()
        base = -half * scale.float()
    else:
        extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))[..., 0]
        scale = (extreme / -half).half()
        base = -half * scale.float()
    if bool(scale.isinf().any()):
        raise ValueError(f"a weight of {float(weight.abs().max()):.3g} is beyond {kind}")
    step = torch.where(scale == 0, torch.ones_like(x[..., 0]), scale.float())
    q = ((x - base[..., None]) / step[..., None]).round_().clamp_(0, top)
    q[scale == 0] = 0 if minimum is not None else half
    return _blocks(kind, q.to(torch.int16), scale, minimum)


def _blocks(
    kind: str, q: Tensor, scale: Float16[Tensor, "rows blocks"], minimum: Float16[Tensor, "rows blocks"] | None
) -> UInt8[Tensor, "rows bytes"]:
    """Bytes of one kind from codes 0 .. 2^bits-1 (rows, blocks, 32)."""
    parts = [_bytes(scale)] + ([] if minimum is None else [_bytes(minimum)])
    if kind == "Q8_0":
        parts.append((q - 128).to(torch.int8).view(torch.uint8))
    else:
        if BITS[kind] == 5:
            fifth = ((q >> 4).to(torch.int64) << torch.arange(BLOCK)).sum(-1)
            parts.append(torch.stack([(fifth >> shift) & 255 for shift in (0, 8, 16, 24)], -1).to(torch.uint8))
        low = (q & 15).to(torch.uint8)
        parts.append(low[..., : BLOCK // 2] | (low[..., BLOCK // 2 :] << 4))
    return torch.cat(parts, -1).view(len(q), -1)


def _bytes(value: Float16[Tensor, "rows blocks"]) -> UInt8[Tensor, "rows blocks two"]:
    return value.contiguous().view(torch.uint8).view(*value.shape, 2)
