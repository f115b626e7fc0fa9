"""The guard: what serves tokens worse that no search saw gives way, and nothing else does."""

import pytest
import torch
from test_rounding import SIGNED, W4, randn
from torch import Tensor

from quantkit.errors import WriteError
from quantkit.grid.decoded import decoded
from quantkit.solve.block import solve_linears
from quantkit.solve.folds import Folding, plainly_rounded
from quantkit.solve.pooling import Pooled
from quantkit.types import Effort, InputStats, Linear, Scheme, Solved, Source

SHAPE = (128, 64)


def sums(x: Tensor, held: Tensor | None = None, drift: Tensor | None = None) -> InputStats:
    beside = None if held is None else sums(held)
    return InputStats(len(x), x.abs().sum(0), x.square().sum(0), x.T @ x, None if drift is None else drift.T @ x, None, beside)


def solved(weight: Tensor, fed: InputStats, scheme: Scheme = SIGNED, **effort) -> Solved:
    linear = Linear("o", "o", Source("o"), SHAPE, scheme)
    return solve_linears([linear], {"o": weight}, Folding(), Pooled({"o": fed}, 0), Effort(folds=False, compensate=True, **effort))["o"]


def cost(weight: Tensor, rounded: Tensor, x: Tensor) -> float:
    return float(((weight.float() - rounded) @ x.T).square().sum())


@pytest.mark.parametrize("shrinks", [1, 2, 10])
def test_what_was_fitted_to_four_tokens_gives_way(shrinks):
    weight, few, many = randn(*SHAPE).bfloat16(), randn(4, 64, seed=1), randn(400, 64, seed=2)
    plain = cost(weight, plainly_rounded(weight.float(), SIGNED, weight.dtype), many)
    fitted = solved(weight, sums(few), shrinks=shrinks)
    assert not fitted.fell_back
    assert cost(weight, decoded(fitted.codes), many) > 1.1 * plain, "these tokens do not mislead: the test shows nothing"
    judged = solved(weight, sums(few, held=many), shrinks=shrinks)
    assert judged.fell_back
    assert cost(weight, decoded(judged.codes), many) <= plain * 1.0001


def test_what_holds_on_other_tokens_stays():
    weight, mixed = randn(*SHAPE).bfloat16(), randn(64, 64, seed=3)
    x, other = randn(800, 64, seed=1) @ mixed, randn(40, 64, seed=2) @ mixed
    free, judged = solved(weight, sums(x), shrinks=4), solved(weight, sums(x, held=other), shrinks=4)
    assert not judged.fell_back
    assert torch.equal(judged.codes.packed, free.codes.packed)


def test_what_no_number_can_judge_is_refused():
    weight, x = randn(*SHAPE).bfloat16() * 1e4, randn(80, 64) * 1e17
    with pytest.raises(WriteError, match="o: its outputs are beyond fp32; keep it with an override"):
        solved(weight, sums(x), W4, shrinks=4)
