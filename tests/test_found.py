"""Weights that are on a grid already come back to the bit; those that are not are never taken for it."""

import pytest
import torch

from quantkit.grid.found import find_scale, on_grid
from quantkit.grid.integer import from_codes, to_codes
from quantkit.types import Scheme

Q4 = Scheme(4, 32, True, signed=True)


def on_a_grid(stored: torch.dtype, dtype: torch.dtype, bits: int = 4, rows: int = 40, seed: int = 0, signed: bool = True) -> torch.Tensor:
    """Random codes, one of each group at the far end, times a random scale."""
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, 4, 32), generator=generator).float()
    codes[..., 5] = -half
    scale = (torch.rand(rows, 4, 1, generator=generator) * 0.01 + 1e-4).to(stored).float()
    if signed:
        scale *= torch.where(torch.rand(scale.shape, generator=generator) < 0.5, -1.0, 1.0)
    codes[3, 1] = 0
    return (codes * scale).view(rows, -1).to(dtype)


@pytest.mark.parametrize("bits", [3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_trained_grid_of_fp16_scales_is_found_to_the_bit(dtype, bits):
    weight = on_a_grid(torch.float16, dtype, bits)
    scheme = Scheme(bits, 32, True, signed=True)
    scale = find_scale(weight, scheme, torch.float16)
    assert scale is not None
    assert torch.equal(scale.half().float(), scale)
    codes = to_codes(weight.float(), scale, None, scheme, torch.float16)
    assert torch.equal(from_codes(codes).to(dtype), weight)


def test_bf16_scales_too_where_they_suffice():
    weight = on_a_grid(torch.bfloat16, torch.bfloat16)
    scale = find_scale(weight, Q4, torch.bfloat16)
    assert scale is not None
    assert torch.equal(from_codes(to_codes(weight.float(), scale, None, Q4, torch.bfloat16)).bfloat16(), weight)
    wide = on_a_grid(torch.float16, torch.float32)  # scales of 11 bits, products not rounded: no bf16 scale gives them
    assert find_scale(wide, Q4, torch.bfloat16) is None


def test_groups_without_the_far_end_are_found():
    weight = on_a_grid(torch.float16, torch.bfloat16)
    weight = torch.where(weight.abs() > weight.abs().amax(1, keepdim=True) * 0.3, torch.zeros_like(weight), weight)
    assert find_scale(weight, Q4, torch.float16) is not None


def test_ordinary_weights_are_not_taken_for_a_grid():
    weight = (torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()
    assert find_scale(weight, Q4, torch.float16) is None
    nearly = on_a_grid(torch.float16, torch.bfloat16)
    nearly[37, 70] *= 1.02
    assert find_scale(nearly, Q4, torch.float16) is None


def test_another_group_is_another_grid():
    weight = on_a_grid(torch.float16, torch.bfloat16)
    assert find_scale(weight, Scheme(4, 64, True), torch.float16) is None
    assert find_scale(weight, Scheme(8, 32, True), torch.float16) is None


def test_zeros_have_the_scale_1():
    assert torch.equal(find_scale(torch.zeros(3, 64), Q4, torch.float16), torch.ones(3, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [Q4, Scheme(4, 32, False)], ids=str)
def test_codes_of_a_trained_grid(scheme, stored, dtype):
    """Scales of the dtype that every format stores, where they suffice, else of fp16; beside zero points they are positive."""
    weight = on_a_grid(stored, dtype)
    codes = on_grid(weight, scheme)
    assert codes is not None
    assert codes.scale.dtype == (torch.bfloat16 if stored == dtype == torch.bfloat16 else torch.float16)
    assert scheme.signed or bool((codes.scale > 0).all())
    assert torch.equal(from_codes(codes).to(dtype), weight)
    assert on_grid((torch.randn(8, 64) * 0.02).to(dtype), scheme) is None


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_unsigned_scales_are_positive_or_not_found(stored):
    """Every group's far end is at code -8: with a positive scale it is negative, and one that is positive has no positive scale."""
    unsigned = Scheme(4, 32, True)
    codes = on_grid(on_a_grid(stored, torch.bfloat16, signed=False), unsigned)
    assert codes is not None
    assert bool((codes.scale > 0).all())
    assert on_grid(on_a_grid(stored, torch.bfloat16), unsigned) is None
    assert find_scale(on_a_grid(stored, torch.bfloat16), unsigned, stored) is None


def test_zeros_alone_are_no_trained_grid():
    """They are on any, and would keep folds from those that share their input."""
    assert on_grid(torch.zeros(8, 64).bfloat16(), Q4) is None


def test_zero_points_are_found_too():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (8, 2, 32), generator=generator).float()
    codes[..., 0], codes[..., 1] = 0, 15
    weight = ((codes - 3) * 0.0078125).view(8, 64).bfloat16()
    found = on_grid(weight, Scheme(4, 32, False))
    assert found is not None
    assert torch.equal(from_codes(found).bfloat16(), weight)
