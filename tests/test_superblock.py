"""K-quants: their bytes as the gguf package reads them, and a search that is worth its time."""

import pytest
import torch

from quantkit.grid import integer, superblock
from quantkit.grid.superblock import LIMITS, SIZES, decode, fit, grid_of, nearest, pack, unpack, with_codes
from quantkit.solve import ranges
from quantkit.solve.rounding import compensated_superblocks, factor
from quantkit.types import Scheme

gguf = pytest.importorskip("gguf")
KINDS = sorted(SIZES)


def weights(rows: int = 12, columns: int = 512, seed: int = 0, tails: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    if tails:
        weight = weight / torch.rand(rows, columns, generator=generator).clamp(min=0.02)
    return weight * 0.02


def uneven(columns: int = 512, seed: int = 5) -> torch.Tensor:
    return torch.exp(1.5 * torch.randn(columns, generator=torch.Generator().manual_seed(seed)))


def read_back(rows: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[kind]).copy())


def error(made: torch.Tensor, weight: torch.Tensor, importance: torch.Tensor) -> float:
    return float((importance * (made - weight).square()).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_the_packages(kind):
    assert SIZES[kind] == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = fit(weights(tails=True), kind, uneven())
    rows = pack(blocks)
    assert rows.shape == (12, 512 // SIZES[kind][0] * SIZES[kind][1])
    assert torch.equal(read_back(rows, kind), decode(blocks))
    again = unpack(rows, kind)
    for part in ("d", "e", "s", "m", "q"):
        assert torch.equal(getattr(again, part), getattr(blocks, part)), part
    assert torch.equal(pack(again), rows)


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_and_small_scale_survives(kind):
    """Bytes at random are all legal; each comes back as itself."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (64, SIZES[kind][1] * 2), generator=generator, dtype=torch.uint8)
    view = rows.view(-1, SIZES[kind][1])
    at = [208] if kind == "Q6_K" else [0, 2]
    for place in at:
        view[:, place : place + 2] = (torch.rand(len(view), 1, generator=generator) * 0.1).half().view(torch.uint8)
    assert torch.equal(pack(unpack(rows, kind)), rows)
    assert torch.equal(decode(unpack(rows, kind)), read_back(rows, kind))


@pytest.mark.parametrize("tails", [False, True], ids=["normal", "tails"])
@pytest.mark.parametrize("kind", KINDS)
def test_refits_and_importance_pay(kind, tails):
    weight, importance = weights(48, seed=3, tails=tails), uneven()
    searched = error(decode(fit(weight, kind, importance)), weight, importance)
    once = error(decode(fit(weight, kind, importance, rounds=0)), weight, importance)
    blind = error(decode(fit(weight, kind)), weight, importance)
    assert searched < (1.0 if kind == "IQ4_NL" else 0.99) * once  # without small scales there is little left to refit
    assert searched < 0.95 * blind


@pytest.mark.parametrize("kind, least", [("Q4_K", 0.9), ("Q5_K", 0.9)])
def test_a_superblock_beats_one_range_a_group(kind, least):
    """Against asymmetric groups of 32 with exact scales from their extremes: smaller scales of 6 bits must not eat the gain."""
    weight = weights(48, seed=4)
    grouped = weight.view(48, -1, 32)
    low, top = grouped.amin(-1, keepdim=True), LIMITS[kind][1]
    step = (grouped.amax(-1, keepdim=True) - low) / top
    plain = ((grouped - low) / step).round() * step + low
    assert error(decode(fit(weight, kind)), weight, torch.ones(512)) < least * error(plain.view_as(weight), weight, torch.ones(512))


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_is_an_affine_grid_of_its_own(kind):
    """What a solver that compensates errors needs: nearest codes by `grid_of` are those of the fit, other codes decode as told."""
    weight = weights()
    blocks = fit(weight, kind)
    scale, minimum = grid_of(blocks)
    width = superblock.GROUP[kind]
    assert scale.shape == minimum.shape == (12, 512 // width)
    grouped = weight.view(12, -1, width)
    assert torch.equal(nearest(grouped, scale[..., None], minimum[..., None], kind).view_as(weight), blocks.q)
    if kind == "IQ4_NL":  # the next level is not one step away
        assert blocks.q.unique().tolist() == superblock.LEVELS.tolist()
        return
    other = with_codes(blocks, blocks.q + 1)
    moved = (decode(other) - decode(blocks)).view(12, -1, width)
    inside = (blocks.q < LIMITS[kind][1]).view_as(moved)
    assert torch.allclose(moved[inside], scale[..., None].expand_as(moved)[inside], atol=1e-7)
    assert bool((moved[~inside] == 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_columns_that_were_never_fed(kind):
    weight, importance = weights(), uneven()
    weight[3] = 0
    weight[4, :256] = 0
    importance[100:140] = 0
    made = decode(fit(weight, kind, importance))
    assert bool((made[3] == 0).all() & (made[4, :256] == 0).all() & made.isfinite().all())
    apart = (made - weight)[:, 100:140]
    assert float(apart.square().mean()) < 0.05 * float(weight[:, 100:140].square().mean())
    assert torch.equal(decode(fit(weight, kind, torch.zeros(512))), decode(fit(weight, kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_one_sign(kind):
    weight = weights().abs() + 0.05
    for sign in (1, -1):
        made = decode(fit(weight * sign, kind))
        assert float((made - weight * sign).square().mean()) < (0.12 if kind == "IQ4_NL" else 2e-2) * float(weight.var())


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="whole superblocks"):
        fit(weights(2, 96), "Q4_K")
    with pytest.raises(ValueError, match="beyond Q6_K"):
        fit(weights() * 1e12, "Q6_K")
    assert fit(weights(2, 96), "IQ4_NL").d.shape == (2, 3)


def test_levels_beat_even_steps_on_bell_shaped_weights():
    """What IQ4_NL is for, at the same 4.5 bits as Q4_0."""
    weight, importance = weights(64), torch.ones(512)
    scheme = Scheme(4, 32, True, signed=True)
    grouped = weight.view(-1, 32)
    scale, zero, _ = ranges.search(grouped[:, None], torch.ones(1, 1, 32), scheme, torch.float16, 10)
    even = integer.decode(integer.encode(grouped[:, None], scale, zero, 4), scale, zero).view_as(weight)
    assert error(decode(fit(weight, "IQ4_NL")), weight, importance) < 0.95 * error(even, weight, importance)


# --- Rounding that compensates (solve/rounding.py) -------------------------------------------------------------------------------


def gram_of(columns: int, seed: int = 7) -> torch.Tensor:
    """Of inputs with a few strong directions."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3 * columns, columns, generator=generator)
    inputs += torch.randn(3 * columns, 6, generator=generator) @ torch.randn(6, columns, generator=generator) * 2
    return inputs.T @ inputs


def loss(made: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor) -> float:
    apart = made - weight
    return float(((apart @ gram) * apart).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_columns_make_good_what_earlier_ones_lost(kind):
    weight, gram = weights(24), gram_of(512)
    (blocks,) = compensated_superblocks(weight[None], factor(gram[None], 0.01), kind)
    nearest = loss(decode(fit(weight, kind, gram.diagonal())), weight, gram)
    assert loss(decode(blocks), weight, gram) < 0.7 * nearest
    assert torch.equal(decode(unpack(pack(blocks), kind)), decode(blocks))


def test_a_stack_of_experts_each_by_its_own_gram():
    weight = torch.stack([weights(8, seed=1), weights(8, seed=2)])
    grams = torch.stack([gram_of(512, 3), gram_of(512, 4)])
    both = compensated_superblocks(weight, factor(grams, 0.01), "Q4_K")
    for i, blocks in enumerate(both):
        (alone,) = compensated_superblocks(weight[i : i + 1], factor(grams[i : i + 1], 0.01), "Q4_K")
        assert torch.allclose(decode(blocks), decode(alone), atol=2e-3)
        assert loss(decode(blocks), weight[i], grams[i]) < 0.75 * loss(
            decode(fit(weight[i], "Q4_K", grams[i].diagonal())), weight[i], grams[i]
        )


def test_without_correlations_it_is_the_nearest_code():
    weight = weights(8)
    (blocks,) = compensated_superblocks(weight[None], factor(torch.eye(512)[None], 0.01), "Q4_K")
    assert torch.equal(decode(blocks), decode(fit(weight, "Q4_K")))
