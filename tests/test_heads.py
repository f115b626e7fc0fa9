"""Rows of a head that answer for one another, against the definition: tr(F E G E^T) over small matrices."""

from functools import partial

import pytest
import torch
from test_rounding import ASYM, SIGNED, W3, W4, gram_of, inputs, randn
from torch import Tensor

from quantkit.grid.decoded import decoded
from quantkit.solve import heads
from quantkit.solve.block import solve_linears
from quantkit.solve.folds import Folding
from quantkit.solve.heads import by_turns, metric
from quantkit.solve.pooling import Pooled
from quantkit.types import Effort, InputStats, Linear, OutputStats, Scheme, Solved, Source

COUNT, WIDTH = 3, 24  # heads, rows of each
EFFORT = Effort(folds=False, compensate=True, shrinks=8)


def answering(seed: int = 5) -> Tensor:
    """F of some heads: a few strong directions."""
    gradient = randn(COUNT, 500, 4, seed=seed) @ randn(COUNT, 4, WIDTH, seed=seed + 1) + 0.3 * randn(COUNT, 500, WIDTH, seed=seed + 2)
    return gradient.mT @ gradient


def cost(error: Tensor, gram: Tensor, output: Tensor) -> float:
    by_head = error.view(COUNT, WIDTH, -1)
    return float(((output @ by_head) * (by_head @ gram)).sum())


def linear(local: str, scheme: Scheme, columns: int) -> Linear:
    return Linear(local, local, Source(local), (COUNT * WIDTH, columns), scheme)


def solved(
    weights: dict[str, Tensor], x: Tensor, outputs: dict[str, Tensor], scheme: Scheme, rows: dict[str, Tensor] | None = None
) -> dict[str, Solved]:
    fed = InputStats(len(x), x.abs().sum(0), x.square().sum(0), x.T @ x)
    linears = [linear(local, scheme, x.shape[1]) for local in weights]
    found = {local: OutputStats(torch.tensor(500), gram.diagonal(dim1=1, dim2=2).flatten(), gram) for local, gram in outputs.items()}
    return solve_linears(linears, weights, Folding(rows=rows or {}), Pooled(dict.fromkeys(weights, fed), 0), EFFORT, outputs=found)


@pytest.mark.parametrize("scheme", [W4, W3, ASYM, SIGNED, Scheme(4, 32, True, grid="q4_k")], ids=str)
def test_rows_that_answer_for_one_another_cost_less_together(scheme):
    x, f = inputs(columns=256), answering()
    weight, gram = randn(COUNT * WIDTH, 256), gram_of(inputs(columns=256))[0]
    alone = decoded(solved({"q": weight}, x, {}, scheme)["q"].codes)
    together = decoded(solved({"q": weight}, x, {"q": f}, scheme)["q"].codes)
    assert cost(weight - together, gram, f) < 0.8 * cost(weight - alone, gram, f)


def test_rows_that_do_not_are_rounded_one_by_one():
    """Up to the order in which products of other shapes add up, which turns codes and hardly the loss."""
    x, weight, gram = inputs(), randn(COUNT * WIDTH, 128), gram_of(inputs())[0]
    even = torch.eye(WIDTH).expand(COUNT, -1, -1) * torch.tensor([1.0, 7.0, 0.1])[:, None, None]
    alone, together = (solved({"q": weight}, x, outputs, W4)["q"].codes for outputs in ({}, {"q": even}))
    errors = [weight - decoded(codes) for codes in (alone, together)]
    assert cost(errors[1], gram, even) == pytest.approx(cost(errors[0], gram, even), rel=0.01)


def test_two_rows_by_hand(monkeypatch):
    """Rows of which only the sum counts, .4 and .4: 0 and 0 by nearest codes; the second makes good what the first lacks."""
    monkeypatch.setattr(heads, "DAMPING", 1e-6)
    factored = metric([torch.ones(1, 2, 2)], [None])
    codes, seen = by_turns(torch.tensor([[0.4], [0.4]]), factored, lambda w: ((w.round(), w), w.round()))
    assert codes.flatten().tolist() == [0, 1]
    assert torch.allclose(seen.flatten(), torch.tensor([0.4, 0.8]), atol=1e-4)


def test_every_row_comes_back_in_its_place():
    weight = torch.arange(COUNT * WIDTH, dtype=torch.float32)[:, None].expand(-1, 2).contiguous()
    factored = metric([torch.eye(WIDTH).expand(COUNT, -1, -1)], [None])
    (made,) = by_turns(weight, factored, lambda w: ((w,), w))
    assert torch.equal(made, weight)


def test_a_fold_on_rows_is_seen_by_the_metric():
    f, scale = answering(), torch.exp(randn(COUNT * WIDTH, seed=9))
    several = metric([f, f[:1]], [scale, scale[:WIDTH]])  # queries have more heads than keys
    assert torch.allclose(several.upper[[0, COUNT]], metric([f], [scale]).upper[[0, 0]])
    spread = torch.diag_embed(scale.view(COUNT, WIDTH))
    plain, folded = metric([spread @ f @ spread], [None]), metric([f], [scale])
    assert torch.allclose(plain.upper, folded.upper, rtol=1e-3, atol=1e-4)
    x, weight, gram = inputs(), randn(COUNT * WIDTH, 128), gram_of(inputs())[0]
    undo = partial(torch.mul, scale[:, None])
    alone, together = (undo(decoded(solved({"v": weight}, x, o, W4, {"v": scale})["v"].codes)) for o in ({}, {"v": f}))
    assert cost(weight - together, gram, f) < 0.9 * cost(weight - alone, gram, f)


def test_linears_of_one_input_need_not_have_heads_alike():
    x, f = inputs(), answering()
    weights = {"q": randn(COUNT * WIDTH, 128), "k": randn(COUNT * WIDTH, 128, seed=1), "gate": randn(COUNT * WIDTH, 128, seed=2)}
    halves = torch.stack([f[:, :12, :12], f[:, 12:, 12:]], 1).flatten(0, 1)
    every = solved(weights, x, {"q": f, "k": halves}, W4)
    for local, outputs in (("q", {"q": f}), ("k", {"k": halves}), ("gate", {})):
        own = solved({local: weights[local]}, x, outputs, W4)[local].codes
        assert (decoded(every[local].codes) != decoded(own)).float().mean() < 0.01
