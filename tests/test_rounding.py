"""Compensated rounding against its definition: the loss by the whole Gram, over small matrices."""

import pytest
import torch
from torch import Tensor

from quantkit.grid.integer import decode, from_codes, on_grid
from quantkit.solve import ranges
from quantkit.solve.rounding import Rounded, compensated, descend, factor
from quantkit.solve.targets import Target, lacking, loss
from quantkit.types import InputStats, Scheme

W4, W3, ASYM, SIGNED = Scheme(4, 32, True), Scheme(3, 32, True), Scheme(4, 32, False), Scheme(4, 32, True, signed=True)
SCHEMES = [W4, W3, ASYM, SIGNED, Scheme(4, 0, True), Scheme(4, 128, False)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int = 600, columns: int = 128, seed: int = 3) -> Tensor:
    """Correlated, of unequal power."""
    mix = randn(columns // 4, columns, seed=seed)
    return randn(tokens, columns // 4, seed=seed + 1) @ mix + 0.3 * randn(tokens, columns, seed=seed + 2)


def gram_of(x: Tensor) -> Tensor:
    return (x.T @ x)[None]


def decoded(rounded: Rounded, scheme: Scheme) -> Tensor:
    stack, rows, columns = rounded.codes.shape
    grouped = rounded.codes.float().view(stack, rows, -1, scheme.width(columns))
    return decode(grouped, rounded.scale, rounded.zero).view(stack, rows, columns)


def rows_loss(weight: Tensor, rounded: Tensor, gram: Tensor) -> Tensor:
    error = weight - rounded
    return ((error @ gram) * error).sum(-1)


def nearest(weight: Tensor, gram: Tensor, scheme: Scheme) -> Tensor:
    grouped = weight.view(*weight.shape[:2], -1, scheme.width(weight.shape[-1]))
    importance = gram.diagonal(dim1=1, dim2=2).view(len(gram), 1, -1, grouped.shape[-1])
    scale, zero, _ = ranges.search(grouped, importance, scheme, torch.bfloat16, 10)
    codes = (grouped / scale[..., None]).round()
    codes = codes if zero is None else codes + zero[..., None]
    half = 1 << (scheme.bits - 1)
    return decode(codes.clamp(-half, half - 1), scale, zero).view(weight.shape)


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_a_factor_multiplies_back(damping):
    gram = torch.stack([gram_of(inputs(seed=s))[0] for s in (0, 7)])
    made = factor(gram, damping)
    wanted = gram + damping * gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(gram.shape[-1])
    back = made.upper @ torch.diag_embed(made.diagonal) @ made.upper.mT
    assert torch.allclose(back, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert torch.equal(made.upper.tril(-1), torch.zeros_like(made.upper))
    assert torch.allclose(made.upper.diagonal(dim1=1, dim2=2), torch.ones(2, gram.shape[-1]))


def test_a_gram_of_few_tokens_or_none_still_has_a_factor():
    few = gram_of(inputs(tokens=5))
    made = factor(few, 0.0)  # of rank 5: damping grows until it holds
    assert made.upper.isfinite().all()
    assert (made.diagonal > 0).all()
    with pytest.raises(ValueError, match="NaN"):
        factor(few * torch.nan, 0.01)
    nothing = factor(torch.zeros(1, 8, 8), 0.01)
    assert torch.equal(nothing.upper[0], torch.eye(8))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_compensation_beats_nearest_codes_by_the_whole_gram(scheme):
    weight, gram = randn(1, 64, 128), gram_of(inputs())
    rounded = compensated(weight, factor(gram, 0.01), scheme, torch.bfloat16, 10)
    assert torch.equal(rounded.scale, rounded.scale.bfloat16().float())
    ours = rows_loss(weight, decoded(rounded, scheme), gram).sum()
    assert ours < 0.75 * rows_loss(weight, nearest(weight, gram, scheme), gram).sum()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_without_correlations_every_code_is_the_nearest(scheme):
    weight, power = randn(1, 16, 128), torch.exp(randn(128, seed=1))
    gram = torch.diag(power)[None]
    rounded = compensated(weight, factor(gram, 0.0), scheme, torch.bfloat16, 10)
    assert torch.equal(decoded(rounded, scheme), nearest(weight, gram, scheme))


def test_three_columns_by_hand():
    """Inputs that are all but one: 7.5 + 2.5 + 2.5 by nearest codes is 7 + 2 + 2; compensated 7 + 3 + 2, only half a step short."""
    gram = torch.full((1, 3, 3), 0.999) + 0.001 * torch.eye(3)
    weight = torch.tensor([[[7.5, 2.5, 2.5]]])
    scheme = Scheme(4, 0, True)
    rounded = compensated(weight, factor(gram, 0.0), scheme, torch.float32, 1)
    assert rounded.scale.item() == 1
    assert rounded.codes.tolist() == [[[7, 3, 2]]]


def test_a_stack_is_its_matrices_one_by_one():
    weight = randn(3, 16, 64)
    gram = torch.stack([gram_of(inputs(columns=64, seed=s))[0] for s in range(3)])
    together = compensated(weight, factor(gram, 0.01), SIGNED, torch.bfloat16, 5)
    for i in range(3):
        alone = compensated(weight[i : i + 1], factor(gram[i : i + 1], 0.01), SIGNED, torch.bfloat16, 5)
        assert (alone.codes[0] != together.codes[i]).float().mean() < 0.01  # products of other shapes round in another order
    shared = compensated(weight.view(1, 48, 64), factor(gram[:1], 0.01), SIGNED, torch.bfloat16, 5)
    first = compensated(weight[:1], factor(gram[:1], 0.01), SIGNED, torch.bfloat16, 5)
    assert (shared.codes[0, :16] != first.codes[0]).float().mean() < 0.01


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_descent_never_climbs_in_any_row(scheme):
    weight, gram = randn(1, 48, 128), gram_of(inputs())
    start = compensated(weight, factor(gram, 0.01), scheme, torch.bfloat16, 6)
    before = rows_loss(weight, decoded(start, scheme), gram + 0.01 * gram.diagonal(dim1=1, dim2=2).mean() * torch.eye(128))
    after = before
    for sweeps in (1, 2):
        better = descend(weight, gram, 0.01, start, scheme, torch.bfloat16, 6, sweeps)
        now = rows_loss(weight, decoded(better, scheme), gram + 0.01 * gram.diagonal(dim1=1, dim2=2).mean() * torch.eye(128))
        assert (now <= after * (1 + 1e-4)).all()
        after = now
    assert scheme.width(128) == 128 or after.sum() < 0.99 * before.sum()  # a row that is one group has nothing to descend over


@pytest.mark.parametrize("scheme", [W4, SIGNED, ASYM], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_of_quantization_aware_training_are_copied_to_the_bit(scheme, dtype):
    codes = torch.randint(-7, 8, (40, 4, 32), generator=torch.Generator().manual_seed(0)).float()
    codes[..., 0] = 7
    weight = (codes * (0.01 + 0.02 * randn(40, 4, 1).abs()).to(dtype).float()).to(dtype).view(40, 128)
    found = on_grid(weight, scheme, dtype)
    assert found is not None
    assert torch.equal(from_codes(found).to(dtype), weight)
    assert on_grid(randn(40, 128).to(dtype), scheme, dtype) is None
    spoilt = weight.clone()
    spoilt[39, 5] *= 1.3
    assert on_grid(spoilt, scheme, dtype) is None


def sums(x: Tensor, d: Tensor, e: Tensor | None) -> InputStats:
    return InputStats(len(x), x.abs().sum(0), x.square().sum(0), x.T @ x, d.T @ x, None if e is None else e.T @ x)


@pytest.mark.parametrize("rows_in_all", [24, 64])  # fewer than columns: each weight by itself; more: one shift for all
@pytest.mark.parametrize("residual", [True, False])
def test_a_target_is_the_least_squares_answer(residual, rows_in_all):
    x, weight = inputs(tokens=4000, columns=32), randn(24, 32)
    d, e = 0.2 * x @ randn(32, 32, seed=8) / 6 + 0.01 * randn(4000, 32, seed=9), randn(4000, 24, seed=10) + x[:, :24]
    wanted = (x + d) @ weight.T + (e if residual else 0)
    best = torch.linalg.lstsq(x.double(), wanted.double()).solution.T.float()
    target = Target(sums(x, d, e if residual else None), 1.0, 1e-9, rows_in_all)
    assert torch.allclose(target.of(weight), best, atol=1e-3)
    rows = torch.tensor([3, 20])
    assert torch.allclose(target.of(weight[rows], rows), best[rows], atol=1e-3)
    untouched = Target(sums(x, d, e), 0.0, 1e-9, rows_in_all)
    assert torch.equal(untouched.of(weight), weight)


def test_the_loss_is_that_of_the_tokens():
    """Differences of losses are those of squared distances to what the original model computes."""
    x, weight = inputs(tokens=500, columns=32), randn(24, 32)
    d, e = 0.3 * randn(500, 32, seed=8), 0.5 * randn(500, 24, seed=10)
    stats = sums(x, d, e)
    wanted = (x + d) @ weight.T + e

    def distance(rounded: Tensor) -> float:
        return float((wanted - x @ rounded.T).square().sum())

    one, other = weight + 0.1 * randn(24, 32, seed=1), weight + 0.2 * randn(24, 32, seed=2)
    lacks = lacking(weight, stats.drift, stats.residual)
    by_sums = loss(weight, one, stats, lacks) - loss(weight, other, stats, lacks)
    assert by_sums == pytest.approx(distance(one) - distance(other), rel=1e-3)


def test_signed_scales_use_every_code_and_lose_less():
    weight, h = randn(512, 1, 32) * 0.05, torch.ones(1, 1, 32)
    *_, plain = ranges.search(weight, h, W4, torch.bfloat16, 10)
    scale, _, signed = ranges.search(weight, h, SIGNED, torch.bfloat16, 10)
    assert (signed > plain * (1 + 1e-6)).float().mean() < 0.06  # a refit may end elsewhere
    assert signed.sum() < 0.93 * plain.sum()
    assert (scale < 0).any()
    assert (scale > 0).any()
