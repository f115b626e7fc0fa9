"""The one test of activations and weights: NaN and infinity are seen wherever they stand."""

import pytest
import torch

from quantkit.finite import finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 65), (2048, 96)])
def test_every_place_is_seen(dtype, shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor.view(-1)[-1] = torch.finfo(dtype).max  # large, and a number
    assert finite(tensor)
    for place in torch.linspace(0, tensor.numel() - 1, 13).long().unique():
        for wrong in (torch.nan, torch.inf, -torch.inf):
            spoilt = tensor.clone()
            spoilt.view(-1)[place] = wrong
            assert not finite(spoilt)
            assert not finite(spoilt.movedim(0, -1))


def test_what_is_empty_or_whole_numbers_is_finite():
    assert finite(torch.empty(0, 8))
    assert finite(torch.arange(5))
    assert finite(torch.tensor([True, False]))
