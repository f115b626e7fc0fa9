"""Kept distributions: exact where everything is kept, and elsewhere never wrong by more than the bound that they state."""

import math

import pytest
import torch

from quantkit.evaluate import cache
from quantkit.evaluate.distributions import Kept, difference, joined, keep

POSITIONS, VOCABULARY = 30, 200


def distributions(seed: int, sharp: float = 3.0) -> torch.Tensor:
    return (torch.randn(POSITIONS, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * sharp).log_softmax(-1)


@pytest.fixture(scope="module")
def following() -> torch.Tensor:
    return torch.randint(VOCABULARY, (POSITIONS,), generator=torch.Generator().manual_seed(9))


def true_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    p, q = p.double(), q.double()
    return (p.exp() * (p - q)).sum(-1)


def test_whole_distributions_are_exact(following):
    p, q = distributions(0), distributions(1)
    found = difference(keep(p, following, tail=0.0, most=VOCABULARY), q, following)
    assert torch.allclose(found.kl, true_kl(p, q), atol=1e-5)
    assert float(found.bound.max()) == 0.0
    assert torch.allclose(found.nll, -q.gather(1, following[:, None])[:, 0].double())
    assert torch.equal(found.same_top, p.argmax(-1) == q.argmax(-1))
    assert torch.equal(found.right, q.argmax(-1) == following)
    assert torch.equal(found.right_base, p.argmax(-1) == following)


@pytest.mark.parametrize("tail, most", [(1e-2, VOCABULARY), (1e-3, VOCABULARY), (0.0, 5), (1e-4, 3), (0.1, VOCABULARY)])
@pytest.mark.parametrize("sharp", [0.3, 2.0, 6.0])
def test_the_bound_holds(following, tail, most, sharp):
    """The lumped KL is never above the true one, and never further below it than it says."""
    for seed in range(4):
        p = distributions(seed, sharp)
        q = (p + 0.5 * distributions(seed + 10)).log_softmax(-1)
        kept = keep(p, following, tail, most)
        found = difference(kept, q, following)
        true = true_kl(p, q)
        assert bool((found.kl <= true + 1e-5).all())
        assert bool((true <= found.kl + found.bound + 1e-5).all())
        if most == VOCABULARY:
            left = 1 - torch.stack([part.double().exp().sum() for part in kept.log_p.split(kept.counts.tolist())])
            assert bool((left <= tail + 1e-6).all())
        assert int(kept.counts.max()) <= most


@pytest.mark.parametrize("tail, most", [(0.0, VOCABULARY), (1e-3, VOCABULARY), (1e-2, 7)])
def test_an_identical_model_differs_by_exactly_nothing(following, tail, most):
    p = distributions(3)
    found = difference(keep(p, following, tail, most), p.clone(), following)
    assert float(found.kl.abs().max()) == 0.0
    assert bool(found.same_top.all())
    assert torch.equal(found.nll, found.nll_base)


def test_what_is_no_number_is_counted_and_costs_no_infinity(following):
    p, q = distributions(0), distributions(1)
    q[3], q[4, 7], q[5] = math.nan, math.inf, -math.inf
    q[6, 11] = -math.inf  # one token that a model excludes is no error
    found = difference(keep(p, following), q, following)
    assert found.finite.tolist() == [n not in (3, 4, 5) for n in range(POSITIONS)]
    assert bool(found.kl.isfinite().all())
    assert bool(found.nll.isfinite().all())
    assert bool(found.finite_base.all())
    broken = keep(q, following)
    assert int((~broken.finite).sum()) == 3


def test_kept_distributions_survive_the_disk(tmp_path, following):
    rows = [keep(distributions(seed)[: 10 + seed], following[: 10 + seed], 1e-3, 50) for seed in range(3)]
    cache.save_kept(tmp_path / "deep" / "k.safetensors", rows)
    again = cache.load_kept(tmp_path / "deep" / "k.safetensors")
    q = distributions(7)
    for one, two in zip(rows, again, strict=True):
        n = len(one.counts)
        assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in Kept.__dataclass_fields__)
        assert torch.equal(difference(one, q[:n], following[:n]).kl, difference(two, q[:n], following[:n]).kl)


def test_a_rest_beyond_a_double_is_far_and_not_infinitely(following):
    base = torch.zeros(len(following), 64)
    base[:, :4] = 3.0  # these are kept
    base = base.log_softmax(-1)
    other = torch.full((len(following), 64), -2000.0)
    other[:, 0] = 0.0  # e^-2000 is no double
    found, whole = (difference(keep(base, following % 64, tail, most), other, following % 64) for tail, most in ((1e-4, 4), (0.0, 64)))
    assert bool((found.kl > 1000).all())
    assert bool((found.kl <= whole.kl + 1e-3).all())
    assert bool((whole.kl <= found.kl + found.bound + 1e-3).all())


def test_a_damaged_or_older_cache_is_no_cache(tmp_path, following, monkeypatch):
    path = tmp_path / "k.safetensors"
    assert cache.load_kept(path) is None
    cache.save_kept(path, [keep(distributions(0), following)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert cache.load_kept(path) is None
    path.write_bytes(whole)
    monkeypatch.setattr(cache, "LAYOUT", 99)
    assert cache.load_kept(path) is None
    (tmp_path / "r.json").write_text("{")
    assert cache.load_results(tmp_path / "r.json") is None


def test_a_models_digest_is_that_of_its_bytes(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    first = cache.model_digest(tmp_path)
    (tmp_path / "README.md").write_text("a card changes no weight")
    assert cache.model_digest(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    assert cache.model_digest(tmp_path) != first


def test_rows_are_joined_in_order(following):
    p, q = distributions(0), distributions(1)
    found = difference(keep(p, following), q, following)
    twice = joined([found, found])
    assert torch.equal(twice.kl[POSITIONS:], found.kl)
