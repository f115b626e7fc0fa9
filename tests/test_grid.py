"""The integer grid is compressed-tensors' own, to the bit, and no code could be nearer to its weight."""

from importlib.metadata import version

import jaxtyping
import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils.helpers import calculate_qparams
from packaging.version import Version
from torch import Tensor

from quantkit.grid.integer import decode, encode, extremes_to_params, from_codes, limits, pack, storable, to_codes, unpack
from quantkit.types import Codes, InputStats, Scheme
from quantkit.write.compressed_tensors import pack_rows

BITS = range(2, 9)
# before 0.19 compressed-tensors let no code of these widths straddle two words; no writer of ours uses them there (4 and 8 alone)
PACKED = [bits for bits in BITS if 32 % bits == 0 or Version(version("compressed-tensors")) >= Version("0.19")]
WIDTHS = (1, 7, 31, 32, 33, 64, 96, 101)  # columns of a matrix: whole words, odd ones, less than a word
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCHEMES = [Scheme(bits, group, symmetric) for bits in (4, 8) for group in (32, 64, 128, 0) for symmetric in (True, False)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_codes(rows: int, columns: int, bits: int) -> Tensor:
    """Both ends of the range are in it."""
    low, high = limits(bits)
    codes = torch.randint(low, high + 1, (rows, columns), generator=generator(columns), dtype=torch.int8)
    codes[0, 0], codes[-1, -1] = low, high
    return codes


def hard_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Random rows, then a row of zeros, one huge outlier, constants of both signs, only negative, only positive, tiny, huge."""
    w = torch.randn(rows + 8, columns, generator=generator(seed)) * 0.05 + 0.01
    w[-8] = 0
    w[-7, columns // 2] = 1e4
    w[-6] = 0.3
    w[-5] = -0.3
    w[-4] = -w[-4].abs() - 0.01
    w[-3] = w[-3].abs() + 0.01
    w[-2] *= 1e-3
    w[-1] *= 1e3
    return w


def plain(w: Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weight in its groups, and its plain range."""
    grouped = w.view(len(w), -1, scheme.width(w.shape[1]))
    return grouped, *extremes_to_params(grouped.amin(-1), grouped.amax(-1), scheme, dtype)


def theirs(scheme: Scheme, dtype: torch.dtype | None = None) -> QuantizationArgs:
    strategy = {"strategy": "group", "group_size": scheme.group} if scheme.group else {"strategy": "channel"}
    return QuantizationArgs(num_bits=scheme.bits, type="int", symmetric=scheme.symmetric, scale_dtype=dtype, **strategy)


# -- packing -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", PACKED)
@pytest.mark.parametrize("columns", WIDTHS)
def test_packed_words_are_compressed_tensors(bits, columns):
    codes = random_codes(5, columns, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (5, -(-columns * bits // 32))
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack(packed, bits, columns), codes)
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)


@pytest.mark.parametrize("bits", PACKED)
@pytest.mark.parametrize("rows", WIDTHS)
def test_zero_points_are_packed_along_the_rows(bits, rows):
    zero = random_codes(rows, 3, bits)
    packed = pack_rows(zero, bits)
    assert packed.is_contiguous()
    assert torch.equal(packed, pack_to_int32(zero, bits, packed_dim=0))
    assert torch.equal(unpack_from_int32(packed, bits, zero.shape, packed_dim=0), zero)


def test_the_first_code_lies_in_the_lowest_bits():
    """By hand: codes -8 -7 .. -1 are stored as 0 1 .. 7."""
    assert pack(torch.arange(-8, 0, dtype=torch.int8)[None], 4).tolist() == [[0x76543210]]
    assert pack(torch.tensor([[-128, -127, 127, 0]], dtype=torch.int8), 8).view(torch.uint8).tolist() == [[0, 1, 255, 128]]
    # 3 bits: the eleventh code straddles two words, its low two bits end the first
    codes = torch.full((1, 11), -4, dtype=torch.int8)
    codes[0, 10] = 3
    assert pack(codes, 3).tolist() == [[-(1 << 30), 1]]


# -- ranges ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_symmetric_scales_are_compressed_tensors(bits, dtype):
    scheme = Scheme(bits, 32, True)
    w = torch.randn(40000, 32, generator=generator()) * 0.05
    _, scale, zero = plain(w, scheme, dtype)
    expected, _ = calculate_qparams(w.amin(-1, keepdim=True), w.amax(-1, keepdim=True), theirs(scheme, dtype))
    assert zero is None
    assert torch.equal(scale, expected)
    assert torch.equal(scale, scale.to(dtype).float())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0.0, 0.03, -0.3])
def test_asymmetric_ranges_are_compressed_tensors(bits, dtype, shift):
    scheme = Scheme(bits, 32, False)
    w = torch.randn(10000, 32, generator=generator()) * 0.05 + shift
    _, scale, zero = plain(w, scheme, dtype)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    expected_scale, expected_zero = calculate_qparams(low, high, theirs(scheme, dtype))
    assert torch.equal(scale, expected_scale)
    assert torch.equal(scale, scale.to(dtype).float())
    assert ((zero - expected_zero).abs() <= 1).all()
    # theirs comes from the scale before it is rounded, ours from the one that is stored; where rounding does nothing they agree
    if dtype == torch.float32:
        assert torch.equal(zero, expected_zero.float())
    bottom, top = limits(bits)
    assert torch.equal(zero, (bottom - low.clamp(max=0) / scale).round().clamp(bottom, top))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_is_on_every_grid(symmetric, dtype):
    for bits in BITS:
        scheme = Scheme(bits, 32, symmetric)
        grouped, scale, zero = plain(hard_weight(8, 32), scheme, dtype)
        nothing = torch.zeros_like(grouped)
        assert (decode(encode(nothing, scale, zero, bits), scale, zero) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_scale_is_zero(dtype):
    """Groups of zeros, and what a dtype rounds to zero or denormals of fp32, get the scale 1; fp16 keeps its own small ones."""
    smallest = {torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24, torch.float32: 2.0**-126}[dtype]
    stored = storable(torch.tensor([0.0, smallest / 4, smallest, 3 * smallest, 0.1, -0.1]), dtype)
    assert stored.tolist() == [1, 1, smallest, 3 * smallest, *torch.tensor([0.1, -0.1]).to(dtype).tolist()]


@pytest.mark.parametrize("bits, largest", [(4, 4e-4), (8, 6e-3), (8, 2e-4)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quiet_groups_of_fp16_are_not_lost(symmetric, bits, largest):
    """Their scale lies below the smallest normal fp16 (6.1e-5); whether it is stored as it is or rounded up, no group is lost."""
    scheme = Scheme(bits, 32, symmetric)
    w = torch.rand(16, 32, generator=generator()) * 2 - 1
    w = w / w.abs().amax(-1, keepdim=True) * largest
    _, scale, zero = plain(w, scheme, torch.float16)
    again = from_codes(to_codes(w, scale, zero, scheme, torch.float16))
    assert float((again - w).abs().max()) <= torch.finfo(torch.float16).tiny * 0.51


# -- codes -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_decode_as_compressed_tensors_decompresses(scheme):
    """Their decompressor on our packed tensors gives our weight: in fp32 to the bit, in bf16 as a rounding of it."""
    w = hard_weight(24, 256)
    _, scale, zero = plain(w, scheme, torch.bfloat16)
    codes = to_codes(w, scale, zero, scheme, torch.bfloat16)
    assert codes.scale.dtype == torch.bfloat16
    stored = {"weight_packed": codes.packed, "weight_shape": torch.tensor(w.shape)}
    if codes.zero is not None:
        stored["weight_zero_point"] = pack_rows(codes.zero, scheme.bits)
    asked = QuantizationScheme(targets=["Linear"], weights=theirs(scheme))
    ours = from_codes(codes)
    for dtype in (torch.float32, torch.bfloat16):
        opened = PackedQuantizationCompressor.decompress({**stored, "weight_scale": codes.scale.to(dtype)}, asked)["weight"]
        assert opened.dtype == dtype
        assert torch.equal(opened, ours.to(dtype))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_are_those_that_compressed_tensors_packs(scheme):
    """Given our scales and zero points, their compressor rounds a weight to the same words."""
    w = hard_weight(24, 256)
    _, scale, zero = plain(w, scheme, torch.float32)
    codes = to_codes(w, scale, zero, scheme, torch.float32)
    state = {"weight": w, "weight_scale": scale}
    if codes.zero is not None:
        state["weight_zero_point"] = codes.zero
    packed = PackedQuantizationCompressor.compress(state, QuantizationScheme(targets=["Linear"], weights=theirs(scheme)))
    assert torch.equal(packed["weight_packed"], codes.packed)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_code_is_nearer(bits, symmetric, dtype):
    """Against every code of the grid; so the error is at most half a step wherever the grid reaches, and no code leaves it."""
    scheme = Scheme(bits, 32, symmetric)
    grouped, scale, zero = plain(hard_weight(12, 32), scheme, dtype)
    codes = encode(grouped, scale, zero, bits)
    bottom, top = limits(bits)
    assert bottom <= codes.min()
    assert codes.max() <= top
    assert torch.equal(codes, codes.round())
    values = torch.arange(bottom, top + 1.0).expand(*scale.shape, -1)
    grid = decode(values, scale, zero)
    error = (decode(codes, scale, zero) - grouped).abs()
    nearest = (grid[..., None, :] - grouped[..., None]).abs().amin(-1)
    assert (error <= nearest + 1e-6 * grouped.abs()).all()
    reached = (grouped >= grid.amin(-1, keepdim=True)) & (grouped <= grid.amax(-1, keepdim=True))
    half = scale[..., None].expand_as(error) / 2
    assert (error[reached] <= half[reached] * (1 + 1e-5)).all()
    assert reached.float().mean() > 0.5


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_plain_ranges_lose_at_most_half_a_step(symmetric, bits):
    """Also at the extremes: the grid is laid so that they fall at most half a step beyond its ends (fp32 scales)."""
    scheme = Scheme(bits, 32, symmetric)
    grouped, scale, zero = plain(hard_weight(24, 64), scheme, torch.float32)
    error = (decode(encode(grouped, scale, zero, bits), scale, zero) - grouped).abs()
    assert (error <= scale[..., None] * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizing_twice_changes_nothing(scheme, dtype):
    w = hard_weight(16, 256)
    _, scale, zero = plain(w, scheme, dtype)
    once = to_codes(w, scale, zero, scheme, dtype)
    twice = to_codes(from_codes(once), once.scale.float(), None if zero is None else once.zero.float(), scheme, dtype)
    assert torch.equal(once.packed, twice.packed)
    assert torch.equal(from_codes(once), from_codes(twice))


@pytest.mark.parametrize("symmetric", [True, False])
def test_special_groups(symmetric):
    """Zeros stay zeros, a constant is met within half a step, one outlier keeps its size and silences the rest."""
    scheme = Scheme(4, 32, symmetric)
    w = hard_weight(4, 32)
    _, scale, zero = plain(w, scheme, torch.bfloat16)
    again = from_codes(to_codes(w, scale, zero, scheme, torch.bfloat16))
    zeros, outlier, constant, negative_constant, negative, positive = again[-8:-2]
    assert scale[-8] == 1
    assert (zeros == 0).all()
    assert outlier[16] == pytest.approx(1e4, rel=0.07)
    assert (outlier[torch.arange(32) != 16] == 0).all()
    assert (constant == constant[0]).all()
    assert float(constant[0]) == pytest.approx(0.3, rel=0.07)
    assert torch.equal(negative_constant, -constant) or not symmetric
    assert float(negative_constant[0]) == pytest.approx(-0.3, rel=0.07 if symmetric else 0.004)
    assert negative.max() <= 0
    assert positive.min() >= 0
    if zero is not None:
        assert zero[-4] == 7  # all 16 levels below zero
        assert zero[-3] == -8


# -- shapes ------------------------------------------------------------------------------------------------------------------------


def test_shapes_are_checked():
    """pyproject's pytest options put beartype behind every signature of quantkit.grid, solve and types."""
    codes = random_codes(4, 32, 4)
    with pytest.raises(jaxtyping.TypeCheckError):
        pack(codes[0], 4)
    with pytest.raises(jaxtyping.TypeCheckError):
        pack(codes.int(), 4)
    with pytest.raises(jaxtyping.TypeCheckError):
        encode(torch.zeros(4, 2, 16), torch.ones(4, 3), None, 4)
    with pytest.raises(jaxtyping.TypeCheckError):
        to_codes(torch.zeros(4, 32), torch.ones(3, 1), None, Scheme(4, 32, True), torch.bfloat16)
    with pytest.raises(jaxtyping.TypeCheckError):
        InputStats(1, torch.zeros(8), torch.zeros(8), torch.zeros(8, 9))
    with pytest.raises(jaxtyping.TypeCheckError):
        Codes(pack(codes, 4), torch.ones(4, 1), torch.zeros(4, 2, dtype=torch.int8), Scheme(4, 32, False), 32)
