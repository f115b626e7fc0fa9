"""ggml's blocks: read back by the gguf package, which is their description in Python."""

import numpy as np
import pytest
import torch

from quantkit.grid import ggml, integer
from quantkit.grid.integer import from_codes, to_codes, unpack
from quantkit.types import Scheme

gguf = pytest.importorskip("gguf")


def read_back(rows: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[kind]).copy())


def weights(rows: int = 24, columns: int = 192, scale: float = 0.02, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def codes_of(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype = torch.bfloat16):
    grouped = weight.view(len(weight), -1, scheme.width(weight.shape[1]))
    scale, zero = integer.extremes_to_params(grouped.amin(-1), grouped.amax(-1), scheme, dtype)
    return to_codes(weight, scale, zero, scheme, dtype)


def test_sizes_are_those_of_the_package():
    for kind, size in ggml.SIZES.items():
        assert size == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    with pytest.raises(ValueError, match="whole blocks"):
        ggml.row_bytes("Q4_0", 48)


@pytest.mark.parametrize("kind", [*ggml.FLOATS, *ggml.BITS])
def test_plain_rounding_is_within_half_a_step(kind):
    weight = weights()
    weight[2, 32:64] = 0
    back = read_back(ggml.round_rows(weight, kind), kind)
    assert ggml.round_rows(weight, kind).shape == (len(weight), ggml.row_bytes(kind, weight.shape[1]))
    if kind in ggml.FLOATS:
        assert torch.equal(back, weight.to(ggml.FLOATS[kind]).float())
        return
    grouped = weight.view(len(weight), -1, 32)
    reach = grouped.abs().amax(-1) * 2 if kind not in ggml.MINIMA else grouped.amax(-1) - grouped.amin(-1)
    step = reach / ((1 << ggml.BITS[kind]) - 1) * 1.01 + 1e-6
    if kind != "Q8_0" and kind not in ggml.MINIMA:
        step *= 2  # the highest code is one short of the range's other end
    assert bool(((back - weight).view_as(grouped).abs() <= step[..., None] / 2 * 1.03).all())
    assert bool((back[2, 32:64] == 0).all())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_plain_rounding_is_no_worse_than_the_packages(kind):
    weight = weights(64, seed=1)
    theirs = torch.from_numpy(
        gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind]), gguf.GGMLQuantizationType[kind])
    )
    ours = read_back(ggml.round_rows(weight, kind), kind)
    assert float((ours - weight).square().sum()) <= 1.0005 * float((theirs - weight).square().sum())


@pytest.mark.parametrize("group", [32, 64, 0])
@pytest.mark.parametrize("bits", [4, 5, 8])
def test_symmetric_codes_pass_over_bit_for_bit(bits, group):
    weight, scheme = weights(), Scheme(bits, group, True)
    weight[3] *= -0.3
    codes = codes_of(weight, scheme)
    made = ggml.transcode(codes)
    kind = ggml.type_of(scheme, weight.shape[1])
    assert (made.scales_rounded, made.minima_rounded) == (0, 0)
    assert torch.equal(read_back(made.rows, kind), from_codes(codes))
    raw = made.rows.view(len(weight), -1, ggml.SIZES[kind][1])
    scale = raw[..., :2].contiguous().view(torch.float16)[..., 0].float()
    assert torch.equal(scale, codes.scale.float().repeat_interleave(scheme.width(weight.shape[1]) // 32, 1))
    if kind == "Q8_0":
        assert torch.equal(raw[..., 2:].contiguous().view(torch.int8).view(weight.shape), unpack(codes.packed, 8, weight.shape[1]))


@pytest.mark.parametrize("bits", [4, 5])
def test_zero_points_become_minima(bits):
    weight, scheme = weights(seed=2) + 0.01, Scheme(bits, 32, False)
    codes = codes_of(weight, scheme)
    made = ggml.transcode(codes)
    kind = ggml.type_of(scheme, 192)
    raw = made.rows.view(len(weight), -1, ggml.SIZES[kind][1])
    halves = raw[..., :4].contiguous().view(torch.float16).float()
    low = raw[..., -16:].to(torch.int16)
    q = torch.cat([low & 15, low >> 4], -1)
    half, given = 1 << (bits - 1), codes.scale.float()
    if bits == 5:
        fifth = raw[..., 4:8].contiguous().view(torch.int32)
        q += ((fifth >> torch.arange(32, dtype=torch.int32)) & 1).to(torch.int16) << 4
    assert torch.equal((q - half).view(weight.shape).to(torch.int8), unpack(codes.packed, bits, 192))
    assert torch.equal(halves[..., 0], given)
    exact = -(codes.zero.float() + half) * given
    assert torch.equal(halves[..., 1], exact.half().float())
    assert made.minima_rounded == int((exact.half().float() != exact).sum())
    assert made.scales_rounded == 0
    apart = (read_back(made.rows, kind) - from_codes(codes)).view(len(weight), -1, 32).abs()
    assert bool((apart <= exact.abs()[..., None] * 2**-11).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_that_fp16_cannot_hold_are_counted_and_come_near(symmetric):
    weight = weights(8, 64) + (0 if symmetric else 0.005)
    weight[0, :32] *= 1e-5  # a scale among fp16's subnormals
    weight[1] *= 1e-9  # under its smallest
    scheme = Scheme(4, 32, symmetric)
    codes = codes_of(weight, scheme)
    made = ggml.transcode(codes)
    lost = codes.scale.float() != codes.scale.float().half().float()
    assert made.scales_rounded == int(lost.sum()) == 3
    back, stood = read_back(made.rows, "Q4_0" if symmetric else "Q4_1"), from_codes(codes)
    other = ~lost.repeat_interleave(32, 1)
    assert torch.allclose(back[other], stood[other], rtol=0 if symmetric else 1e-2, atol=0 if symmetric else 1e-5)
    assert float((back - stood).abs().max()) < (3.1e-8 if symmetric else 6e-6)


def test_scales_of_fp32_models_lose_less_than_a_code():
    codes = codes_of(weights(), Scheme(4, 32, True), torch.float32)
    made = ggml.transcode(codes)
    assert made.scales_rounded > 0.9 * codes.scale.numel()
    back, stood = read_back(made.rows, "Q4_0"), from_codes(codes)
    assert bool(((back - stood).abs() <= stood.abs() * 2**-10).all())


def test_a_scale_beyond_fp16_is_refused():
    with pytest.raises(ValueError, match="beyond fp16"):
        ggml.transcode(codes_of(weights(scale=1e6), Scheme(4, 32, True)))
    with pytest.raises(ValueError, match="beyond F16"):
        ggml.round_rows(weights(scale=1e6), "F16")
    with pytest.raises(ValueError, match="beyond Q8_0"):
        ggml.round_rows(weights(scale=1e9), "Q8_0")


@pytest.mark.parametrize("scheme", [Scheme(8, 32, False), Scheme(3, 32, True), Scheme(6, 32, True), Scheme(4, 0, True)], ids=str)
def test_what_no_type_holds(scheme):
    assert ggml.type_of(scheme, 48 if scheme.group == 0 else 64) is None


def test_bf16_scales_are_exact_where_the_docstring_says():
    smallest, largest = 2.0**-17, 65504.0
    scales = torch.arange(0, 1 << 15, dtype=torch.int16).view(torch.bfloat16).float()
    inside = scales[(scales >= smallest) & (scales <= largest)]
    assert torch.equal(inside.half().float(), inside)
    assert np.isinf(float(torch.tensor(65536.0).half()))
