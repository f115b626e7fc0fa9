"""The uniform integer grid: weight ~ (code - zero) * scale, codes of b bits, one scale (and zero point) for a group of a row.

Codes are signed, -2^(b-1) .. 2^(b-1)-1, as compressed-tensors stores them; ONNX and GGUF add 2^(b-1). Scales are rounded to the dtype
that is stored *before* codes are chosen, so that what is searched is what is served.
"""

import itertools

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor

from quantkit.types import Codes, Scheme

SMALLEST_SCALE = float(torch.finfo(torch.bfloat16).tiny)


def limits(bits: int) -> tuple[int, int]:
    """The lowest and the highest code."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def extremes_to_params(
    low: Float[Tensor, "*batch"], high: Float[Tensor, "*batch"], scheme: Scheme, dtype: torch.dtype
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"] | None]:
    """Scale (in fp32, but rounded to `dtype`) and zero point that cover the range low..high; zero itself is always on the grid.

    Symmetric: max |w| falls half a step beyond the highest code, (2^b - 1)/2, the convention of compressed-tensors.
    """
    bottom, top = limits(scheme.bits)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if scheme.symmetric:
        scale = storable(torch.maximum(-low, high) / ((top - bottom) / 2), dtype)
        return scale, None
    scale = storable((high - low) / (top - bottom), dtype)
    return scale, (bottom - low / scale).round_().clamp_(bottom, top)


def storable(scale: Float[Tensor, "*batch"], dtype: torch.dtype) -> Float[Tensor, "*batch"]:
    """The scale as it will be stored, in fp32; a group of zeros gets the scale 1, never 0."""
    stored = scale.to(dtype).float()
    return torch.where(stored.abs() < SMALLEST_SCALE, 1.0, stored)


def encode(
    weight: Float[Tensor, "*batch width"], scale: Float[Tensor, "*batch"], zero: Float[Tensor, "*batch"] | None, bits: int
) -> Float[Tensor, "*batch width"]:
    """The nearest codes, as floats."""
    codes = (weight / scale[..., None]).round_()
    if zero is not None:
        codes += zero[..., None]
    return codes.clamp_(*limits(bits))


def decode(
    codes: Float[Tensor, "*batch width"], scale: Float[Tensor, "*batch"], zero: Float[Tensor, "*batch"] | None
) -> Float[Tensor, "*batch width"]:
    """What the codes stand for, in fp32."""
    return (codes if zero is None else codes - zero[..., None]) * scale[..., None]


def pack(codes: Int8[Tensor, "rows columns"], bits: int) -> Int32[Tensor, "rows words"]:
    """Signed codes as a dense little-endian bit stream of 32-bit words a row, the first code in the lowest bits.

    compressed-tensors' pack-quantized: 2^(bits-1) is added, a row is padded with zeros to whole words.
    """
    rows, columns = codes.shape
    words = -(-columns * bits // 32)
    if 32 % bits == 0:
        per_word = 32 // bits
        unsigned = codes.new_zeros(rows, words * per_word, dtype=torch.int32)
        unsigned[:, :columns] = codes.to(torch.int32) + (1 << (bits - 1))
        packed = codes.new_zeros(rows, words, dtype=torch.int32)
        for k in range(per_word):
            packed |= unsigned[:, k::per_word] << (bits * k)
        return packed
    stream = codes.new_zeros(rows, words * 32, dtype=torch.uint8)
    unsigned = codes.to(torch.int32) + (1 << (bits - 1))
    for k in range(bits):
        stream[:, k : columns * bits : bits] = ((unsigned >> k) & 1).to(torch.uint8)
    packed = codes.new_zeros(rows, words, dtype=torch.int32)
    for k in range(32):
        packed |= stream[:, k::32].to(torch.int32) << k
    return packed


def unpack(packed: Int32[Tensor, "rows words"], bits: int, columns: int) -> Int8[Tensor, "rows columns"]:
    """The inverse of `pack`."""
    rows, words = packed.shape
    half, mask = 1 << (bits - 1), (1 << bits) - 1
    if 32 % bits == 0:
        per_word = 32 // bits
        codes = packed.new_empty(rows, words, per_word, dtype=torch.int8)
        for k in range(per_word):
            codes[:, :, k] = (((packed >> (bits * k)) & mask) - half).to(torch.int8)
        return codes.view(rows, -1)[:, :columns].contiguous()
    stream = packed.new_empty(rows, words, 32)
    for k in range(32):
        stream[:, :, k] = (packed >> k) & 1
    bit = stream.view(rows, -1)[:, : columns * bits].view(rows, columns, bits)
    return ((bit << torch.arange(bits, device=bit.device)).sum(-1) - half).to(torch.int8)


def to_codes(
    weight: Float[Tensor, "out in"],
    scale: Float[Tensor, "out groups"],
    zero: Float[Tensor, "out groups"] | None,
    scheme: Scheme,
    dtype: torch.dtype,
) -> Codes:
    """Round a weight on a grid that is already chosen. `scale` must be representable in `dtype` (see `storable`)."""
    out, columns = weight.shape
    grouped = weight.view(out, -1, scheme.width(columns))
    codes = encode(grouped, scale, zero, scheme.bits).to(torch.int8).view(out, columns)
    return Codes(
        packed=pack(codes, scheme.bits),
        scale=scale.to(dtype),
        zero=None if zero is None else zero.to(torch.int8),
        scheme=scheme,
        columns=columns,
    )


def on_grid(weight: Float[Tensor, "out in"], scheme: Scheme, dtype: torch.dtype) -> Codes | None:
    """The codes that give this weight back to the last bit, where every group of it lies on a grid already (quantization-aware training).

    A group's step is its largest magnitude over a whole number, but for the last bit: each is tried, and the codes must decode to the
    stored weight.
    """
    columns = weight.shape[1]
    bottom, top = limits(scheme.bits)
    if scheme.bits > 4:  # so many steps fit that nearly every group of 32 would have to be searched; plain rounding is as good
        return None
    for rows in (slice(0, 4), slice(None)):  # a few rows tell most weights off
        stored = weight[rows]
        grouped = stored.float().view(len(stored), -1, scheme.width(columns))
        largest = grouped.abs().amax(-1)
        best, best_zero = torch.ones_like(largest), torch.zeros_like(largest)
        found = largest == 0
        signs = (1, -1) if scheme.signed else (1,)
        nudges = [step * torch.finfo(dtype).eps for step in (0, 0.5, -0.5, 1, -1)]
        for steps, sign, nudge in itertools.product(range(1, top - bottom + 1), signs, nudges):
            scale = storable((sign * largest / steps).double() * (1 + nudge), dtype)
            codes = (grouped / scale[..., None]).round_()
            low, high = codes.amin(-1), codes.amax(-1)
            zero = torch.zeros_like(low) if scheme.symmetric else (bottom - low).clamp(bottom, top)
            fits = (low + zero >= bottom) & (high + zero <= top)
            exact = ((codes * scale[..., None]).to(weight.dtype) == stored.view(grouped.shape)).all(-1)
            wins = fits & exact & ~found
            best, best_zero = torch.where(wins, scale, best), torch.where(wins, zero, best_zero)
            found |= wins
            if bool(found.all()):
                break
        if not bool(found.all()):
            return None
    return to_codes(weight.float(), best, None if scheme.symmetric else best_zero, scheme, dtype)


def from_codes(codes: Codes) -> Float[Tensor, "out in"]:
    """The weight that codes stand for, in fp32."""
    integers = unpack(codes.packed, codes.scheme.bits, codes.columns).float()
    grouped = integers.view(len(integers), -1, codes.scheme.width(codes.columns))
    zero = None if codes.zero is None else codes.zero.float()
    return decode(grouped, codes.scale.float(), zero).view(integers.shape)
