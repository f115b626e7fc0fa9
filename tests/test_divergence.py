"""KL, likelihoods and agreement against sums by hand."""

import json
import math

import pytest
import torch
from torch import Tensor

from quantkit.evaluate.divergence import Score, Scores, compare

NEVER = -math.inf


def all_of(tokens: int) -> Tensor:
    return torch.ones(tokens, dtype=torch.bool)


def logits_of(*rows: list[float]) -> Tensor:
    """Logits whose softmax is those probabilities; a constant is added, which must not matter."""
    return torch.tensor(rows).log() + 3.0


def random_logits(tokens: int = 40, vocabulary: int = 200, seed: int = 0) -> Tensor:
    return 3 * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))


def random_tokens(tokens: int = 40, vocabulary: int = 200) -> Tensor:
    return torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(9))


def test_by_hand():
    base = logits_of([0.5, 0.25, 0.25], [0.1, 0.1, 0.8])
    other = logits_of([0.25, 0.5, 0.25], [0.2, 0.2, 0.6])
    score = compare(base, other, torch.tensor([1, 2]), all_of(2))
    first = 0.5 * math.log(2) - 0.25 * math.log(2)
    second = 2 * 0.1 * math.log(0.5) + 0.8 * math.log(0.8 / 0.6)
    assert score.tokens == 2
    assert score.kl == pytest.approx(first + second, rel=1e-5)
    assert score.nll_base == pytest.approx(-math.log(0.25) - math.log(0.8), rel=1e-5)
    assert score.nll == pytest.approx(-math.log(0.5) - math.log(0.6), rel=1e-5)
    assert score.same_top == 1


def test_kl_looks_from_the_base():
    """KL(base || other) is not KL(other || base)."""
    one, other = logits_of([0.9, 0.1]), logits_of([0.5, 0.5])
    following = torch.tensor([0])
    there, back = compare(one, other, following, all_of(1)).kl, compare(other, one, following, all_of(1)).kl
    assert there == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-5)
    assert back == pytest.approx(0.5 * math.log(5 / 9) + 0.5 * math.log(5), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_logits_do_not_diverge(dtype):
    logits = random_logits().to(dtype)
    score = compare(logits, logits.clone(), random_tokens(), all_of(40))
    assert score.kl == 0
    assert score.tokens == score.same_top == 40
    assert score.nll == score.nll_base > 0
    report = score.as_json()
    assert report["kl"] == 0
    assert report["same_top"] == 1
    assert report["perplexity"] == report["perplexity_base"] > 1


def test_against_torch_in_double():
    base, other = random_logits(), random_logits(seed=1)
    following = random_tokens()
    score = compare(base, other, following, all_of(40))
    log_p, log_q = base.double().log_softmax(-1), other.double().log_softmax(-1)
    assert score.kl == pytest.approx(float(torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")), rel=1e-5)
    assert score.nll == pytest.approx(float(torch.nn.functional.nll_loss(log_q, following, reduction="sum")), rel=1e-5)
    assert score.nll_base == pytest.approx(float(torch.nn.functional.nll_loss(log_p, following, reduction="sum")), rel=1e-5)
    assert score.same_top == int((log_p.argmax(-1) == log_q.argmax(-1)).sum()) < 40


@pytest.mark.parametrize("noise", [1e-3, 1e-2, 0.1, 1.0])
def test_kl_is_positive_and_grows_with_the_noise(noise):
    """Half the variance of the noise under the distribution, where the noise is small."""
    base, disturbed = random_logits(), torch.randn(40, 200, generator=torch.Generator().manual_seed(3))
    kl = compare(base, base + noise * disturbed, random_tokens(), all_of(40)).kl
    assert kl > 0
    assert compare(base, base + 2 * noise * disturbed, random_tokens(), all_of(40)).kl > 2 * kl
    if noise <= 1e-2:
        p = base.double().softmax(-1)
        d = noise * disturbed.double()
        variance = (p * d.square()).sum(-1) - (p * d).sum(-1).square()
        assert kl == pytest.approx(float(variance.sum()) / 2, rel=0.1)


def test_next_to_nothing_is_no_less_than_nothing():
    """Where two models all but agree, rounding may leave a trace of a KL, far below any that a quantizer causes."""
    base = random_logits(400)
    for seed in range(5):
        noise = 1e-6 * torch.randn(400, 200, generator=torch.Generator().manual_seed(seed))
        score = compare(base, base + noise, random_tokens(400), all_of(400))
        assert abs(score.as_json()["kl"]) < 1e-7


def test_tokens_that_cannot_be():
    """Logits of -inf (masked tokens): no NaN. What the base never says costs nothing, what the other never says is infinite."""
    same = torch.tensor([[1.0, 2.0, NEVER]])
    score = compare(same, same.clone(), torch.tensor([1]), all_of(1))
    assert (score.kl, score.same_top) == (0, 1)
    assert score.nll == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-5)
    allowed = torch.tensor([[1.0, 2.0, 0.0]])
    score = compare(same, allowed, torch.tensor([1]), all_of(1))
    q = allowed[0].double().softmax(-1)
    assert score.kl == pytest.approx(-math.log(float(q[0] + q[1])), rel=1e-5)
    score = compare(allowed, same, torch.tensor([2]), all_of(1))
    assert score.kl == math.inf
    assert score.nll == math.inf
    assert score.nll_base == pytest.approx(-math.log(float(q[2])), rel=1e-5)
    report = score.as_json()
    assert not any(math.isnan(value) for value in report.values())
    assert 1e300 < report["perplexity"] < math.inf  # JSON knows no infinity


def test_only_counted_tokens_count():
    base, other, following = random_logits(6), random_logits(6, seed=1), random_tokens(6)
    counted = torch.tensor([True, False, True, True, False, False])
    some = compare(base, other, following, counted)
    assert some.tokens == 3
    assert some == compare(base[counted], other[counted], following[counted], all_of(3))
    one_by_one = Score()
    for t in (0, 2, 3):
        one_by_one.add(compare(base[t : t + 1], other[t : t + 1], following[t : t + 1], all_of(1)))
    assert one_by_one.tokens == some.tokens
    assert one_by_one.same_top == some.same_top
    for key in ("kl", "nll", "nll_base"):
        assert getattr(one_by_one, key) == pytest.approx(getattr(some, key), rel=1e-6)
    base[1], other[4], following[5] = math.nan, math.inf, -1  # padding may hold anything
    assert compare(base, other, following, counted) == some


def test_nothing_counted_is_nothing():
    score = compare(random_logits(3), random_logits(3, seed=1), random_tokens(3), torch.zeros(3, dtype=torch.bool))
    assert score == Score()
    assert score.as_json() == {"tokens": 0, "kl": 0, "perplexity_base": 1, "perplexity": 1, "same_top": 0}


def test_languages_and_domains_sum_up_to_the_total():
    rows = [("en", "code"), ("en", "maths"), ("zh", "maths"), ("ja", "code"), ("zh", "code")]
    scores, parts = Scores(), []
    for number, (language, domain) in enumerate(rows):
        length = 3 + number
        part = compare(random_logits(length, seed=number), random_logits(length, seed=50 + number), random_tokens(length), all_of(length))
        scores.add(part, {"language": language, "domain": domain, "id": str(number)})
        parts.append(part)
    assert {kind: set(table) for kind, table in scores.by.items()} == {"language": {"en", "zh", "ja"}, "domain": {"code", "maths"}}
    assert scores.total.tokens == 3 + 4 + 5 + 6 + 7
    for table in scores.by.values():
        for key in ("tokens", "kl", "nll", "nll_base", "same_top"):
            assert sum(getattr(score, key) for score in table.values()) == pytest.approx(getattr(scores.total, key), rel=1e-12)
    assert scores.by["language"]["zh"].kl == parts[2].kl + parts[4].kl
    assert scores.by["domain"]["maths"].tokens == parts[1].tokens + parts[2].tokens
    report = json.loads(json.dumps(scores.as_json()))
    assert report["tokens"] == 25
    assert report["kl"] == pytest.approx(sum(part.kl for part in parts) / 25)
    assert report["perplexity"] == pytest.approx(math.exp(sum(part.nll for part in parts) / 25))
    assert list(report["by_language"]) == ["en", "ja", "zh"]
    assert report["by_language"]["ja"] == parts[3].as_json()
    assert report["by_domain"]["maths"]["tokens"] == 4 + 5


def test_a_row_without_labels_is_unknown_and_not_lost():
    scores = Scores()
    scores.add(Score(tokens=2, kl=1.0), {"language": "en"})
    scores.add(Score(tokens=3, kl=2.0), {})
    assert {name: score.tokens for name, score in scores.by["language"].items()} == {"en": 2, "unknown": 3}
    assert scores.by["domain"]["unknown"].kl == scores.total.kl == 3


def test_two_scorings_share_nothing():
    one, other = Scores(), Scores()
    one.add(Score(tokens=2), {"language": "en", "domain": "code"})
    assert other.total.tokens == 0
    assert not other.by["language"]
