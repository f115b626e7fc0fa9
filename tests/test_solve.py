"""The solver on small matrices whose answer is known: by brute force, by hand, or by running the block before and after."""

from collections.abc import Mapping
from dataclasses import replace

import jaxtyping
import pytest
import tiny
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import repeat_kv

from quantkit.grid.integer import decode, encode, from_codes, limits, storable, to_codes
from quantkit.solve import awq, ranges
from quantkit.solve.block import solve_block, solve_linears
from quantkit.solve.folds import Folding
from quantkit.solve.pooling import Pooled, kind
from quantkit.types import BlockPlan, Codes, Effort, Fold, InputStats, Linear, Scheme, SolvedBlock, Source

W4, W4_ASYM, W8 = Scheme(4, 32, True), Scheme(4, 32, False), Scheme(8, 32, True)
SIGNED = Scheme(4, 32, True, signed=True)
LOUD = (3, 40)  # input channels that are far louder than the others, one in each group of 32
SEARCH = Effort(exponents=9, shrinks=7, expert_floor=0)
COMPENSATED = replace(SEARCH, compensate=True)
PLAIN = Effort(folds=False, shrinks=1)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stats_of(x: Tensor, gram: bool = True) -> InputStats:
    return InputStats(len(x), x.abs().sum(0), x.square().sum(0), x.T @ x if gram else None)


def bytes_of(codes: Codes) -> bytes:
    parts = [codes.packed, codes.scale.view(torch.uint8), codes.zero]
    return b"".join(part.numpy().tobytes() for part in parts if part is not None)


# -- ranges ------------------------------------------------------------------------------------------------------------------------


def weighted_error(w: Tensor, h: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    return ((decode(encode(w, scale, zero, bits), scale, zero) - w).square() * h).sum(-1)


def groups_and_importance(rows: int = 256) -> tuple[Tensor, Tensor]:
    """Groups of 32 with a few large weights, input channels of very different power."""
    return randn(rows, 1, 32) * 0.05 * torch.exp(0.4 * randn(rows, 1, 32, seed=1)), torch.exp(randn(1, 1, 32, seed=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_searched_ranges_are_never_worse_than_plain_ones(bits, symmetric, dtype):
    w, h = groups_and_importance()
    scheme = Scheme(bits, 32, symmetric)
    plain = weighted_error(w, h, *ranges.plain(w, scheme, dtype), bits)
    for shrinks in (1, 2, 10):
        scale, zero, error = ranges.search(w, h, scheme, dtype, shrinks)
        assert torch.equal(scale, scale.to(dtype).float())
        assert (scale > 0).all()
        assert torch.allclose(error, weighted_error(w, h, scale, zero, bits), rtol=1e-5)
        assert (error <= plain).all()
        if shrinks == 1:
            assert torch.equal(error, plain)
        else:
            assert error.sum() < plain.sum()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_searched_ranges_are_close_to_the_best_there_are(bits, symmetric):
    """Against a dense scan of scales, with every zero point."""
    w, h = groups_and_importance(64)
    scheme = Scheme(bits, 32, symmetric)
    plain, _ = ranges.plain(w, scheme, torch.float32)
    bottom, top = limits(bits)
    least = torch.full_like(plain, torch.inf)
    for factor in torch.linspace(0.3, 1.1, 120):
        for zero in [None] if symmetric else range(bottom, top + 1):
            z = None if zero is None else torch.full_like(plain, float(zero))
            least = torch.minimum(least, weighted_error(w, h, plain * factor, z, bits))
    *_, error = ranges.search(w, h, scheme, torch.float32, 10)
    rounded = weighted_error(w, h, *ranges.plain(w, scheme, torch.float32), bits)
    assert rounded.sum() > 1.12 * least.sum()  # there is something to find
    assert error.sum() < 1.08 * least.sum()


def test_an_unimportant_outlier_is_clipped_and_an_important_one_is_not():
    w = randn(64, 1, 32) * 0.02
    w[..., 7] = 0.15
    silent, loud = torch.ones(1, 1, 32), torch.ones(1, 1, 32)
    silent[..., 7], loud[..., 7] = 1e-6, 1e6
    plain, _ = ranges.plain(w, W4, torch.float32)
    clipped, _, _ = ranges.search(w, silent, W4, torch.float32, 10)
    kept, _, _ = ranges.search(w, loud, W4, torch.float32, 10)
    assert (clipped < 0.8 * plain).all()
    assert (kept > 0.9 * plain).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "symmetric, lowest, highest",
    [(True, -8, 7), (True, -8, 5), (True, -7, 7), (True, -5, 7), (False, -8, 7)],
)
def test_weights_that_lie_on_a_grid_are_found_there(symmetric, lowest, highest, dtype):
    """Codes times a step, as quantization-aware training and requantized checkpoints leave them: nothing need be lost."""
    codes = torch.randint(lowest, highest + 1, (200, 1, 32), generator=torch.Generator().manual_seed(0)).float()
    codes[..., 0], codes[..., 1] = lowest, highest
    w = codes * 1.25 * torch.exp2(torch.randint(-9, -3, (200, 1, 1), generator=torch.Generator().manual_seed(1)).float())
    *_, error = ranges.search(w, torch.ones(1, 1, 32), Scheme(4, 32, symmetric), dtype, 10)
    assert (error <= 1e-12 * w.square().sum(-1)).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_zeros_and_channels_without_power_are_no_trouble(symmetric):
    scheme = Scheme(4, 32, symmetric)
    w = randn(4, 3, 32)
    w[:, 0] = 0
    h = torch.ones(1, 3, 32)
    h[:, 1] = 0
    scale, zero, error = ranges.search(w, h, scheme, torch.bfloat16, 10)
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert (error[:, :2] == 0).all()
    first = None if zero is None else zero[:, 0]
    assert (decode(encode(w[:, 0], scale[:, 0], first, 4), scale[:, 0], first) == 0).all()


# -- scales ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_folded_norm_times_its_scale_is_the_norm(offset, dtype):
    """(offset + stored) x s = offset + w to fp32 rounding, whatever the dtype rounds away."""
    w = (randn(4096) * 0.3 + (1 - offset)).to(dtype)
    wished = torch.exp(randn(4096, seed=1))
    stored, real = awq.norm_fold(w, offset, wished)
    assert stored.dtype == dtype
    assert torch.allclose((offset + stored.float()) * real, offset + w.float(), rtol=3e-7, atol=0)
    close = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}[dtype]
    moved = ((offset + w.float()) / wished - offset).abs() * close + 1e-7  # half a step of what is stored
    assert (((offset + stored.float()) - (offset + w.float()) / wished).abs() <= moved).all()
    assert not torch.equal(stored, w)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_dead_channels_and_wild_scales_leave_the_norm_alone(offset):
    gain = torch.tensor([0.0, 1.0, 1.0, 1.0, -2.0, 1.0])
    w = (gain - offset).bfloat16()
    wished = torch.tensor([4.0, 1e30, 1e-30, 1e-45, 0.5, 2.0])
    stored, real = awq.norm_fold(w, offset, wished)
    assert stored.isfinite().all()
    assert real.isfinite().all()
    assert (real != 0).all()
    assert torch.allclose((offset + stored.float()) * real, gain, rtol=3e-7, atol=0)
    assert (stored[0], real[0]) == (w[0], 1)  # no gain: nothing to divide
    assert (stored[3], real[3]) == (w[3], 1)  # would be infinite
    if offset:
        assert (stored[1], real[1]) == (w[1], 1)  # 1e-30 - 1 is -1: the channel would be gone
    assert torch.equal(real[4:], wished[4:])


def consumer(w: Tensor, h: Tensor, scheme: Scheme = W4) -> awq.Consumer:
    return awq.Consumer(w, h[None], scheme, torch.bfloat16)


def choose(consumers: list[awq.Consumer], mean_abs: Tensor, channels: int | None = None, head: int = 0, exponents: int = 20) -> awq.Choice:
    return awq.choose_scale("norm", consumers, mean_abs, channels or len(mean_abs), head, exponents, lambda scale: scale)


def loud_inputs(tokens: int = 256, columns: int = 64, times: float = 50.0, channels: tuple[int, ...] = LOUD, seed: int = 5) -> Tensor:
    x = randn(tokens, columns, seed=seed)
    x[:, list(channels)] *= times
    return x


@pytest.mark.parametrize("scheme", [W4, W4_ASYM, Scheme(3, 0, True)], ids=str)
def test_loud_channels_are_scaled_up(scheme):
    x, w = loud_inputs(), randn(128, 64)
    choice = choose([consumer(w, x.square().sum(0), scheme)], x.abs().mean(0))
    assert choice.report.loss_ratio < (0.75 if scheme.group == 0 else 0.4)
    assert choice.report.exponents is not None
    assert sum(choice.report.exponents) == pytest.approx(1)
    quiet = torch.ones(64, dtype=torch.bool)
    quiet[list(LOUD)] = False
    assert choice.scale[~quiet].min() > 1.5 * choice.scale[quiet].max()
    assert choice.report.scale_range == (float(choice.scale.min()), float(choice.scale.max()))


def test_the_loss_ratio_is_that_of_the_output():
    """By the definition: sum of h (Q(W s)/s - W)^2, ranges searched as coarsely as the search does."""
    x, w = loud_inputs(), randn(128, 64)
    h = x.square().sum(0)

    def loss(s: Tensor) -> Tensor:
        grouped = (w * s).view(128, 2, 32)
        scale, zero, _ = ranges.search(grouped, (h / s.square()).view(1, 2, 32), W4, torch.bfloat16, awq.CLIPS_IN_SEARCH, 1)
        decoded = from_codes(to_codes((w * s), scale, zero, W4, torch.bfloat16))
        return (h * (decoded / s - w).square()).sum()

    choice = choose([consumer(w, h)], x.abs().mean(0))
    assert choice.report.loss_ratio == pytest.approx(float(loss(choice.scale) / loss(torch.ones(64))), rel=1e-4)


def test_identity_wins_where_scales_cannot_help():
    codes = torch.randint(-8, 8, (32, 64), generator=torch.Generator().manual_seed(0)).float()
    codes[:, [0, 32]], codes[:, [1, 33]] = -8, 7
    on_grid = codes * 2**-6
    choice = choose([consumer(on_grid, torch.ones(64), W4_ASYM)], randn(64).abs() + 0.1)
    assert choice.report.exponents is None
    assert choice.report.loss_ratio == 1
    assert torch.equal(choice.scale, torch.ones(64))


@pytest.mark.parametrize("seed", range(3))
def test_where_all_channels_are_alike_next_to_nothing_is_won(seed):
    choice = choose([consumer(randn(512, 64, seed=seed), torch.ones(64))], torch.ones(64))
    assert 0.97 < choice.report.loss_ratio <= 1
    assert choice.scale.min() > 0.8
    assert choice.scale.max() < 1.25


def wished_scales(consumers: list[awq.Consumer], mean_abs: Tensor, channels: int | None = None, head: int = 0) -> list[Tensor]:
    """Every candidate, as the search asks a producer for it."""
    seen: list[Tensor] = []

    def realize(scale: Tensor) -> Tensor:
        seen.append(scale.clone())
        return scale

    awq.choose_scale("norm", consumers, mean_abs, channels or len(mean_abs), head, 5, realize)
    return seen


def test_candidates_by_hand():
    """s = a^alpha / m^(1-alpha) over its median; m is the mean of |w| relative to the largest of its group."""
    w = torch.tensor([[4.0, 2.0, 1.0, 4.0], [1.0, 1.0, 2.0, 2.0]])  # rows relative to their largest: 1 .5 .25 1 and .5 .5 1 1
    a, m = torch.tensor([1.0, 2.0, 3.0, 8.0]), torch.tensor([0.75, 0.5, 0.625, 1.0])
    seen = wished_scales([consumer(w, torch.ones(4), Scheme(4, 0, True))], a)
    assert len(seen) == 5
    for alpha, scale in zip((0, 0.25, 0.5, 0.75, 1), seen, strict=True):
        wanted = a**alpha / m ** (1 - alpha)
        assert torch.allclose(scale, wanted / wanted.median(), rtol=1e-5)


def test_scales_stay_in_bounds():
    a = torch.ones(64)
    a[0], a[1] = 1e9, 1e-9
    for scale in wished_scales([consumer(randn(8, 64), torch.ones(64))], a):
        assert scale.max() <= 2**10
        assert scale.min() >= 2**-10


def test_dead_channels_do_not_move_the_others():
    """Whether they get no input or have no weight, alone in a group or among the living."""
    x, w = loud_inputs(columns=64), randn(128, 64)
    alone = choose([consumer(w, x.square().sum(0))], x.abs().mean(0))
    silent = torch.cat([x, torch.zeros(len(x), 32)], 1)
    wide = torch.cat([w, randn(128, 32, seed=9)], 1)
    choice = choose([consumer(wide, silent.square().sum(0))], silent.abs().mean(0))
    assert torch.equal(choice.scale[:64], alone.scale)
    assert torch.equal(choice.scale[64:], torch.ones(32))
    weightless = torch.cat([w, torch.zeros(128, 32)], 1)
    choice = choose([consumer(weightless, torch.cat([x, x[:, :32]], 1).square().sum(0))], torch.cat([x, x[:, :32]], 1).abs().mean(0))
    assert torch.equal(choice.scale[:64], alone.scale)
    assert torch.equal(choice.scale[64:], torch.ones(32))
    among = x.clone()
    among[:, 10] = 0
    living = torch.arange(64) != 10
    without = wished_scales([consumer(w[:, living], among[:, living].square().sum(0), Scheme(4, 0, True))], among[:, living].abs().mean(0))
    w[:, 10] = 0.01 * w[:, 10]  # small: never the largest of a row
    beside = wished_scales([consumer(w, among.square().sum(0), Scheme(4, 0, True))], among.abs().mean(0))
    for one, other in zip(without, beside, strict=True):
        assert torch.allclose(one, other[living], rtol=1e-6)
        assert other[10] == 1


def test_all_channels_dead_is_identity():
    choice = choose([consumer(randn(8, 64), torch.zeros(64))], torch.zeros(64))
    assert choice.report.exponents is None
    assert choice.report.loss_ratio == 1


def test_one_scale_serves_all_consumers_by_their_loss():
    """Two readers that want different scales: the one whose errors weigh a million times more gets its own choice."""
    w, alike = randn(64, 64), torch.ones(64)
    loud = loud_inputs().square().mean(0)
    a = loud.sqrt()

    def scale(*importance: Tensor) -> Tensor:
        return choose([consumer(w, h) for h in importance], a).scale

    assert not torch.equal(scale(loud), scale(alike))
    assert torch.equal(scale(1e6 * loud, alike), scale(loud))
    assert torch.equal(scale(loud, 1e6 * alike), scale(alike))
    between = scale(loud, 30 * alike)
    assert not torch.equal(between, scale(loud))
    assert not torch.equal(between, scale(alike))


@pytest.mark.parametrize("values, repeats, head", [(2, 2, 16), (1, 4, 32), (4, 1, 16), (3, 5, 8)])
def test_a_value_heads_scale_lands_where_repeat_kv_puts_its_channels(values, repeats, head):
    scale = torch.exp(randn(values * head))
    v = randn(7, values * head, seed=1)

    def repeated(x: Tensor) -> Tensor:
        """transformers' own: (batch, value heads, tokens, head) to query heads, then side by side."""
        return repeat_kv(x.view(1, 7, values, head).transpose(1, 2), repeats).transpose(1, 2).reshape(7, -1)

    columns = awq.over_columns(scale, values * repeats * head, head)
    assert torch.equal(repeated(v * scale), repeated(v) * columns)


def test_columns_that_share_a_channel_are_averaged():
    """Two value heads of two channels, each read by two query heads: columns 0 1 | 0 1 | 2 3 | 2 3."""
    a = torch.tensor([1.0, 2.0, 3.0, 4.0, 8.0, 6.0, 16.0, 10.0])
    w = torch.ones(1, 8)
    last = wished_scales([consumer(w, torch.ones(8), Scheme(4, 0, True))], a, channels=4, head=2)[-1]  # alpha = 1: mean |x| alone
    assert torch.allclose(last, torch.tensor([2.0, 3.0, 12.0, 8.0]) / 3.0)


def test_judged_rows_are_spread_evenly():
    w = torch.arange(1000.0)[:, None].bfloat16()
    assert awq.every_nth(w, 1000).shape == (1000, 1)
    few = awq.every_nth(w, 5)
    assert few.dtype == torch.float32
    assert few[:, 0].tolist() == [0, 250, 500, 748, 1000]  # in bf16's steps of 4 near a thousand


# -- experts' statistics -----------------------------------------------------------------------------------------------------------


def flat(tokens: int, value: float, gram: bool = True) -> InputStats:
    """Sums over that many tokens whose |x| is `value` and x^2 `value` + 1."""
    return InputStats(
        tokens, torch.full((4,), tokens * value), torch.full((4,), tokens * (value + 1)), torch.eye(4) * tokens if gram else None
    )


def test_kinds_of_experts():
    assert kind("experts.17.down_proj") == "experts.*.down_proj"
    assert kind("mlp.experts.3.up_proj") == "mlp.experts.*.up_proj"
    assert kind("mlp.down_proj") is None
    assert kind("mlp.shared_experts.down_proj") is None


def test_pooled_statistics_by_hand():
    stats = {
        "experts.0.down_proj": flat(30, 2.0),
        "experts.1.down_proj": flat(10, 6.0),
        "experts.0.up_proj": flat(8, 100.0),  # another kind: its own pool
        "mlp.down_proj": flat(5, 7.0),
    }
    pooled = Pooled(stats, 10)
    mean = (30 * 2 + 10 * 6) / 40  # of the pool: 3
    own = pooled["experts.1.down_proj"]  # as many tokens as the floor: half its own, half the pool's
    assert own.tokens == 10
    assert torch.allclose(own.abs, torch.full((4,), 10 * (6 + mean) / 2))
    assert torch.allclose(own.square, torch.full((4,), 10 * (7 + mean + 1) / 2))
    assert torch.allclose(own.gram, torch.eye(4) * 10)
    rich = pooled["experts.0.down_proj"]
    assert rich.tokens == 30
    assert torch.allclose(rich.abs, torch.full((4,), 30 * (30 * 2 + 10 * mean) / 40))
    assert torch.allclose(rich.gram, torch.eye(4) * 30)
    assert pooled["mlp.down_proj"] is stats["mlp.down_proj"]
    assert torch.allclose(pooled["experts.0.up_proj"].abs, stats["experts.0.up_proj"].abs)
    assert "experts.1.up_proj" not in pooled
    assert "experts.0.up_proj" in pooled


def test_pooling_keeps_every_experts_tokens():
    counts = (0, 1, 7, 200)
    stats = {f"experts.{e}.down_proj": stats_of(randn(n, 8, seed=e)) for e, n in enumerate(counts)}
    for floor in (0, 16, 1000):
        pooled = Pooled(stats, floor)
        assert tuple(pooled.tokens(name) for name in stats) == counts
        assert tuple(pooled[name].tokens for name in stats) == (1, *counts[1:])


def test_a_floor_of_zero_takes_every_expert_at_its_word():
    stats = {f"experts.{e}.down_proj": stats_of(randn(n, 8, seed=e)) for e, n in enumerate((3, 40))}
    pooled = Pooled(stats, 0)
    for name, own in stats.items():
        assert torch.equal(pooled[name].square, own.square)
        assert torch.equal(pooled[name].abs, own.abs)
        assert torch.equal(pooled[name].gram, own.gram)


@pytest.mark.parametrize("floor", [0, 1, 128])
def test_an_expert_without_tokens_takes_the_pools_word(floor):
    """The mean of the pool, with the weight of one token."""
    x = randn(50, 8)
    stats = {
        "experts.0.down_proj": stats_of(x[:20]),
        "experts.1.down_proj": stats_of(x[20:]),
        "experts.2.down_proj": InputStats(0, torch.zeros(8), torch.zeros(8), torch.zeros(8, 8)),
    }
    own = Pooled(stats, floor)["experts.2.down_proj"]
    assert own.tokens == 1
    assert torch.allclose(own.abs, x.abs().mean(0), rtol=1e-5)
    assert torch.allclose(own.square, x.square().mean(0), rtol=1e-5)
    assert torch.allclose(own.gram, x.T @ x / 50, rtol=1e-4, atol=1e-6)


def test_where_no_expert_saw_a_token_every_channel_counts_the_same():
    def empty(gram: torch.Tensor | None) -> InputStats:
        return InputStats(0, torch.zeros(8), torch.zeros(8), gram)

    pooled = Pooled({"experts.0.down_proj": empty(torch.zeros(8, 8)), "experts.0.up_proj": empty(None)}, 128)
    own = pooled["experts.0.down_proj"]
    assert torch.equal(own.square, torch.ones(8))
    assert torch.equal(own.gram, torch.eye(8))
    assert pooled["experts.0.up_proj"].gram is None
    expert = Linear("experts.0.down_proj", "experts.0.down_proj", Source("experts.0.down_proj"), (6, 8), Scheme(4, 8, True))
    weights = {"experts.0.down_proj": randn(6, 8).bfloat16()}
    found = solve_linears([expert], weights, Folding(), pooled, Effort(folds=False, compensate=True))["experts.0.down_proj"]
    assert found.error <= found.error_rounded


@pytest.mark.parametrize("poor", [0, 2])
def test_an_expert_without_tokens_takes_no_word_from_the_others(poor):
    """Whichever it is: the pool's drift and its held tokens stay, and it gets the pool's drift with the pool's Gram."""
    x = [randn(60, 8, seed=e) for e in range(3)]
    drift = [0.1 * randn(8, 8, seed=9 + e) for e in range(3)]
    names = [f"experts.{e}.down_proj" for e in range(3)]
    rich = [replace(stats_of(one), drift=moved, held=stats_of(one[:3])) for one, moved in zip(x, drift, strict=True)]
    stats = dict(zip(names, rich, strict=True))
    stats[names[poor]] = InputStats(0, torch.zeros(8), torch.zeros(8), torch.zeros(8, 8))
    others = [e for e in range(3) if e != poor]
    pooled = Pooled(stats, 20)
    for e in others:
        own = pooled[names[e]]
        pool = sum(drift[other] for other in others) * 20 / 120
        assert torch.allclose(own.drift, (drift[e] + pool) * 60 / 80, rtol=1e-4, atol=1e-6)
        assert own.held is not None
    assert torch.allclose(pooled[names[poor]].drift, sum(drift[other] for other in others) / 120, rtol=1e-4, atol=1e-6)


def test_an_expert_that_held_nothing_back_leaves_the_others_theirs():
    names = [f"experts.{e}.down_proj" for e in range(2)]
    fed, judged = stats_of(randn(15, 8)), replace(stats_of(randn(60, 8, seed=1)), held=stats_of(randn(3, 8, seed=2)))
    pooled = Pooled(dict(zip(names, (fed, judged), strict=True)), 20)
    assert pooled[names[0]].held is None
    assert pooled[names[1]].held is not None


def test_pooling_leaves_its_inputs_alone():
    stats = {f"experts.{e}.down_proj": stats_of(randn(n, 8, seed=e)) for e, n in enumerate((3, 40))}
    before = {name: s.gram.clone() for name, s in stats.items()}
    pooled = Pooled(stats, 16)
    _ = [pooled[name] for name in stats]
    assert all(torch.equal(stats[name].gram, before[name]) for name in stats)


# -- a whole block -----------------------------------------------------------------------------------------------------------------

HIDDEN, VALUES, HEAD, WIDTH, EXPERTS = 64, 32, 16, 96, 4
FOLDS = (
    Fold("input_layernorm", ("self_attn.q_proj", "self_attn.v_proj")),
    Fold("self_attn.v_proj", ("self_attn.o_proj",), HEAD),
    Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Fold("mlp.up_proj", ("mlp.down_proj",)),
)
SHAPES = {
    "self_attn.q_proj": (64, HIDDEN),
    "self_attn.v_proj": (VALUES, HIDDEN),
    "self_attn.o_proj": (HIDDEN, 64),
    "mlp.gate_proj": (WIDTH, HIDDEN),
    "mlp.up_proj": (WIDTH, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDTH),
}


def plan_of(
    shapes: Mapping[str, tuple[int, int]], folds: tuple[Fold, ...], kept: Mapping[str, Tensor], schemes: Mapping[str, Scheme]
) -> BlockPlan:
    linears = tuple(Linear(f"model.layers.0.{n}", n, Source(f"{n}.weight"), shape, schemes.get(n, W4)) for n, shape in shapes.items())
    return BlockPlan(0, "model.layers.0.", linears, folds, {name: f"model.layers.0.{name}" for name in kept})


class Block:
    """Attention without its mixing (each token reads its own values) and an MLP, both with loud channels."""

    def __init__(self, offset: float = 0.0, dtype: torch.dtype = torch.bfloat16, bias: bool = False, norm_bias: bool = False):
        self.offset = offset
        self.weights = {n: (randn(*shape, seed=i) * shape[1] ** -0.5).to(dtype) for i, (n, shape) in enumerate(SHAPES.items())}
        gain = 1 + 0.1 * randn(2, HIDDEN, seed=20)
        gain[0, list(LOUD)] *= 40
        gain[1, [c + 1 for c in LOUD]] *= 40
        names = ("input_layernorm.weight", "post_attention_layernorm.weight")
        self.kept = {name: (g - offset).to(dtype) for name, g in zip(names, gain, strict=True)}
        # channels that are loud for o and down, one in each of their groups
        self.kept["mlp.gate_proj.bias"] = torch.zeros(WIDTH).index_fill(0, torch.tensor([9, 50, 80]), 40.0).to(dtype)
        if norm_bias:
            self.kept |= {name.replace("weight", "bias"): randn(HIDDEN, seed=32 + i).to(dtype) for i, name in enumerate(names)}
        if bias:
            self.kept["self_attn.q_proj.bias"] = randn(64, seed=31).to(dtype)
            self.kept["self_attn.v_proj.bias"] = randn(VALUES, seed=30).index_fill(0, torch.tensor([5, 20]), 40.0).to(dtype)
        else:
            self.weights["self_attn.v_proj"][[5, 20]] *= 6
        self.x = randn(200, HIDDEN, seed=40)

    def run(self, weights: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Every linear's inputs and outputs, in fp32; outputs before the bias, which passes on all the same."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def linear(name: str, x: Tensor) -> Tensor:
            inputs[name], outputs[name] = x, x @ weights[name].float().T
            return outputs[name] + kept.get(f"{name}.bias", torch.zeros(())).float()

        x = self.x / self.x.square().mean(-1, keepdim=True).sqrt()

        def norm(name: str) -> Tensor:
            bias = kept.get(f"{name}.bias", torch.zeros(()))
            return x * (self.offset + kept[f"{name}.weight"].float()) + bias.float()

        normed = norm("input_layernorm")
        linear("self_attn.q_proj", normed)
        v = linear("self_attn.v_proj", normed).view(len(x), -1, HEAD)
        linear("self_attn.o_proj", v.repeat_interleave(2, 1).reshape(len(x), -1))
        normed = norm("post_attention_layernorm")
        gated = torch.nn.functional.silu(linear("mlp.gate_proj", normed)) * linear("mlp.up_proj", normed)
        linear("mlp.down_proj", gated)
        return inputs, outputs

    def stats(self) -> dict[str, InputStats]:
        return {name: stats_of(x) for name, x in self.run(self.weights, self.kept)[0].items()}

    def solve(self, schemes: Mapping[str, Scheme] | None = None, effort: Effort = SEARCH) -> SolvedBlock:
        plan = plan_of(SHAPES, FOLDS, self.kept, schemes or {})
        return solve_block(plan, self.weights, self.kept, self.stats(), self.offset, effort)

    def solved_run(self, solved: SolvedBlock) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        decoded = {name: from_codes(linear.codes) for name, linear in solved.linears.items()}
        return self.run(decoded, {**self.kept, **solved.folded})


def relative(ours: Tensor, wanted: Tensor) -> float:
    return float((ours - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("scheme", [W4, W4_ASYM, Scheme(4, 0, True)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_with_loud_channels_every_linear_beats_plain_rounding(offset, scheme):
    solved = Block(offset).solve(dict.fromkeys(SHAPES, scheme))
    assert set(solved.linears) == set(SHAPES)
    for name, linear in solved.linears.items():
        assert linear.error < 0.9 * linear.error_rounded, name
        assert linear.tokens == 200
        assert linear.codes.scheme == scheme
    assert set(solved.folded) == {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert [report.producer for report in solved.folds] == [fold.producer for fold in FOLDS]
    assert all(report.loss_ratio <= 1 for report in solved.folds)
    assert all(tensor.dtype == torch.bfloat16 for tensor in solved.folded.values())


def test_correlated_inputs_lose_nothing_to_plain_rounding():
    """Inputs with a mean and three strong directions: the diagonal knows neither, the error that is reported knows both."""
    shapes = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64)}
    fold, kept = Fold("input_layernorm", tuple(sorted(shapes))), {"input_layernorm.weight": torch.ones(64).bfloat16()}
    for seed in range(12):
        mixed = 3 * randn(256, 3, seed=seed) @ randn(3, 64, seed=100 + seed) + 2 * randn(64, seed=200 + seed)
        x = (mixed + 0.3 * randn(256, 64, seed=300 + seed)) * torch.exp(0.3 * randn(64, seed=400 + seed))
        weights = {name: randn(*shape, seed=500 + 3 * seed + i).bfloat16() for i, (name, shape) in enumerate(shapes.items())}
        solved = solve_block(plan_of(shapes, (fold,), kept, {}), weights, kept, dict.fromkeys(shapes, stats_of(x)), 0.0, SEARCH)
        for name, linear in solved.linears.items():
            assert linear.error <= linear.error_rounded, (seed, name)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_errors_are_those_of_the_running_block(offset):
    """What the report says of q, v, gate and up is what comes out of the folded norm and the decoded weights."""
    block = Block(offset)
    solved = block.solve()
    rounded = block.solve(effort=PLAIN)
    _, wanted = block.run(block.weights, block.kept)
    _, ours = block.solved_run(solved)
    _, plainly = block.solved_run(rounded)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        scale = solved.linears[name]
        rows = torch.ones(SHAPES[name][0])
        if name in ("self_attn.v_proj", "mlp.up_proj"):  # their rows carry a scale that o and down take back
            rows = (wanted[name] * ours[name]).sum(0) / ours[name].square().sum(0)
            assert scale.error == pytest.approx(relative(ours[name] * rows, wanted[name]), rel=0.1)
        else:
            assert scale.error == pytest.approx(relative(ours[name], wanted[name]), rel=1e-3)
        assert scale.error_rounded == pytest.approx(relative(plainly[name], wanted[name]), rel=1e-3)


@pytest.mark.parametrize(
    "offset, bias, norm_bias", [(0.0, False, False), (1.0, False, False), (0.0, True, False), (0.0, False, True), (1.0, True, True)]
)
def test_the_folded_block_computes_what_the_block_computes(offset, bias, norm_bias):
    """At 8 bits rounding is small beside any scale that enters the wrong channel, or leaves and does not enter."""
    block = Block(offset, bias=bias, norm_bias=norm_bias)
    solved = block.solve(dict.fromkeys(SHAPES, W8))
    assert all(report.exponents is not None and report.scale_range[1] > 1.5 * report.scale_range[0] for report in solved.folds)
    _, wanted = block.run(block.weights, block.kept)
    _, ours = block.solved_run(solved)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert relative(ours[name], wanted[name]) < 3e-4, name
    assert relative(ours["self_attn.v_proj"], wanted["self_attn.v_proj"]) > 0.01  # o's share of the fold
    assert relative(ours["mlp.up_proj"], wanted["mlp.up_proj"]) > 0.01


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_folded_norm_and_decoded_weights_are_the_norm_and_the_weights_taken_back(offset, dtype):
    block = Block(offset, dtype)
    solved = block.solve()
    x, norm = block.x, block.kept["input_layernorm.weight"].float() + offset
    stored = solved.folded["input_layernorm.weight"]
    assert stored.dtype == dtype
    decoded = from_codes(solved.linears["self_attn.q_proj"].codes)
    taken_back = decoded * ((offset + stored.float()) / norm)
    folded, unfolded = x * (offset + stored.float()) @ decoded.T, x * norm @ taken_back.T
    assert torch.allclose(folded, unfolded, rtol=1e-5, atol=1e-5 * float(unfolded.abs().max()))
    original = block.weights["self_attn.q_proj"].float()
    assert relative(taken_back, original) < 0.3 * relative(decoded, original)


def test_ranges_are_searched_for_the_folded_weight_and_its_inputs():
    """The codes by hand: W s on the grid that is best for inputs of power h / s^2."""
    block = Block()
    solved = block.solve()
    norm = "input_layernorm.weight"
    scale = block.kept[norm].float() / solved.folded[norm].float()
    folded = block.weights["self_attn.q_proj"].float() * scale
    power = block.stats()["self_attn.q_proj"].square / scale.square()
    best, zero, _ = ranges.search(folded.view(64, 2, 32), power.view(1, 2, 32), W4, torch.bfloat16, SEARCH.shrinks)
    by_hand = to_codes(folded, best, zero, W4, torch.bfloat16)
    assert bytes_of(solved.linears["self_attn.q_proj"].codes) == bytes_of(by_hand)


@pytest.mark.parametrize("observed", [True, False])
def test_plain_rounding_folds_nothing(observed):
    """It needs no statistics; without them every channel counts the same."""
    block = Block()
    stats = block.stats() if observed else {}
    solved = solve_block(plan_of(SHAPES, FOLDS, block.kept, {}), block.weights, block.kept, stats, 0.0, PLAIN)
    assert not solved.folded
    assert not solved.folds
    for name, linear in solved.linears.items():
        plain = rounded_plainly(block.weights[name], W4)
        assert bytes_of(linear.codes) == bytes_of(plain)
        assert linear.error == linear.error_rounded
        assert linear.tokens == (200 if observed else 0)
        if not observed:
            w = block.weights[name].float()
            assert linear.error == pytest.approx(relative(from_codes(plain), w), rel=1e-4)


def rounded_plainly(weight: Tensor, scheme: Scheme) -> Codes:
    w = weight.float()
    return to_codes(w, *ranges.plain(w.view(len(w), -1, scheme.width(w.shape[1])), scheme, weight.dtype), scheme, weight.dtype)


def test_the_same_inputs_give_the_same_bytes():
    one, other = Block(bias=True).solve(), Block(bias=True).solve()
    assert {n: bytes_of(x.codes) for n, x in one.linears.items()} == {n: bytes_of(x.codes) for n, x in other.linears.items()}
    assert [(x.error, x.error_rounded) for x in one.linears.values()] == [(x.error, x.error_rounded) for x in other.linears.values()]
    assert one.folds == other.folds
    assert one.folded.keys() == other.folded.keys()
    assert all(torch.equal(tensor, other.folded[name]) for name, tensor in one.folded.items())


def test_inputs_are_not_changed_and_statistics_are_given_back():
    block = Block(bias=True)
    stats = {**block.stats(), "per_layer_input_gate": stats_of(randn(4, 4))}
    tensors = [*block.weights.values(), *block.kept.values(), *(t for s in stats.values() for t in (s.abs, s.square, s.gram))]
    before = [tensor.clone() for tensor in tensors]
    solved = solve_block(plan_of(SHAPES, FOLDS, block.kept, {}), block.weights, block.kept, stats, 0.0, SEARCH)
    assert solved.folded
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))
    assert set(stats) == {"per_layer_input_gate"}  # a solved linear's Gram makes room for its codes


def test_a_linear_that_nothing_reads_is_rounded_plainly_and_pulls_no_scale():
    """Published leftovers (keys of layers that borrow others') have no statistics."""
    block = Block()
    leftover = (randn(32, HIDDEN, seed=50) * 5).bfloat16()
    leftover[:, 3] *= 100
    fold = Fold("input_layernorm", ("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"))
    plan = plan_of({**SHAPES, "self_attn.k_proj": (32, HIDDEN)}, (fold, *FOLDS[1:]), block.kept, {})
    weights = {**block.weights, "self_attn.k_proj": leftover}
    solved = solve_block(plan, weights, block.kept, block.stats(), 0.0, SEARCH)
    alone = block.solve()
    assert bytes_of(solved.linears["self_attn.k_proj"].codes) == bytes_of(rounded_plainly(leftover, W4))
    assert solved.linears["self_attn.k_proj"].tokens == 0
    assert bytes_of(solved.linears["self_attn.q_proj"].codes) == bytes_of(alone.linears["self_attn.q_proj"].codes)
    assert torch.equal(solved.folded["input_layernorm.weight"], alone.folded["input_layernorm.weight"])


def test_a_kept_linear_is_neither_solved_nor_missed():
    block = Block()
    plan = plan_of(SHAPES, FOLDS[2:], block.kept, {})
    linears = tuple(Linear(x.name, x.local, x.source, x.shape, None if "self_attn" in x.local else x.scheme) for x in plan.linears)
    weights = {name: w for name, w in block.weights.items() if "mlp" in name}
    kept_plan = BlockPlan(0, plan.prefix, linears, plan.folds, plan.kept)
    solved = solve_block(kept_plan, weights, block.kept, block.stats(), 0.0, SEARCH)
    assert set(solved.linears) == set(weights)
    assert set(solved.folded) == {"post_attention_layernorm.weight"}


@pytest.mark.parametrize("effort", [SEARCH, COMPENSATED], ids=["searched", "compensated"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [SIGNED, W4_ASYM], ids=str)
def test_weights_that_were_trained_on_a_grid_are_copied_though_a_fold_would_pay(scheme, stored, effort):
    block, schemes = Block(), dict.fromkeys(SHAPES, scheme)
    for gain in block.kept.values():
        gain[gain.abs() > 10] *= 1.25  # the loud channels: 50 times the others
    assert set(block.solve(schemes, effort).folded) == {"input_layernorm.weight", "post_attention_layernorm.weight"}
    block.weights = {name: tiny.trained(weight, stored, scheme.signed) for name, weight in block.weights.items()}
    solved = block.solve(schemes, effort)
    assert not solved.folded
    for name, linear in solved.linears.items():
        assert torch.equal(from_codes(linear.codes).bfloat16(), block.weights[name]), name
        assert linear.codes.scale.dtype == stored
        assert not linear.fell_back


@pytest.mark.parametrize("on_its_grid", ["self_attn.v_proj", "self_attn.o_proj"])
def test_no_fold_has_a_trained_weight_at_either_end_and_the_others_are_made(on_its_grid):
    block, schemes = Block(), dict.fromkeys(SHAPES, SIGNED)
    block.weights[on_its_grid] = tiny.trained(block.weights[on_its_grid])
    solved = block.solve(schemes)
    made = [report.producer for report in solved.folds if report.exponents]
    spared = {"self_attn.v_proj": FOLDS[2:], "self_attn.o_proj": (FOLDS[0], *FOLDS[2:])}[on_its_grid]
    assert made == [fold.producer for fold in spared]
    assert torch.equal(from_codes(solved.linears[on_its_grid].codes).bfloat16(), block.weights[on_its_grid])


@pytest.mark.parametrize("effort", [SEARCH, COMPENSATED], ids=["searched", "compensated"])
@pytest.mark.parametrize("first", ["q", "k"])
def test_an_unsigned_linear_beside_signed_ones_stays_unsigned(first, effort):
    """They share an input, so a Gram, and schemes that differ in signs alone compare as the same."""
    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj"}
    order = [names[first], *(name for key, name in names.items() if key != first)]
    weights = {name: randn(64, HIDDEN, seed=i).bfloat16() for i, name in enumerate(order)}
    kept = {"input_layernorm.weight": torch.ones(HIDDEN).bfloat16()}
    schemes = {names["q"]: W4, names["k"]: SIGNED}
    fold = Fold("input_layernorm", tuple(order))
    plan = plan_of(dict.fromkeys(order, (64, HIDDEN)), (fold,), kept, schemes)
    solved = solve_block(plan, weights, kept, dict.fromkeys(order, stats_of(randn(200, HIDDEN, seed=9))), 0.0, effort)
    for name, scheme in schemes.items():
        codes = solved.linears[name].codes
        assert codes.scheme.signed == scheme.signed
        assert bool((codes.scale < 0).any()) == scheme.signed, name


def powers_of_two(ratio: Tensor) -> bool:
    return bool((torch.frexp(ratio).mantissa.abs() == 0.5).all())


def test_a_bias_takes_powers_of_two_and_loses_nothing():
    block = Block(bias=True)
    solved = block.solve(dict.fromkeys(SHAPES, W4_ASYM))
    old, new = block.kept["self_attn.v_proj.bias"], solved.folded["self_attn.v_proj.bias"]
    ratio = old.float() / new.float()
    assert powers_of_two(ratio)
    assert len(ratio.unique()) > 1
    assert torch.equal((new.float() * ratio).bfloat16(), old)
    assert "self_attn.q_proj.bias" not in solved.folded  # its rows take no scale


# -- experts -----------------------------------------------------------------------------------------------------------------------


def expert_names(leaf: str) -> list[str]:
    return [f"mlp.experts.{e}.{leaf}_proj" for e in range(EXPERTS)]


class Routed:
    """Experts behind one norm and a router that reads it too; expert e's tokens are loud in channel 8 e."""

    def __init__(self, tokens: tuple[int, ...]):
        self.tokens = tokens
        self.shapes = {
            name: (HIDDEN, 32) if leaf == "down" else (32, HIDDEN) for leaf in ("gate", "up", "down") for name in expert_names(leaf)
        }
        self.weights = {n: (randn(*shape, seed=i) * shape[1] ** -0.5).bfloat16() for i, (n, shape) in enumerate(self.shapes.items())}
        self.kept = {
            "post_attention_layernorm.weight": (1 + 0.1 * randn(HIDDEN, seed=90)).bfloat16(),
            "mlp.gate.weight": randn(EXPERTS, HIDDEN, seed=91).bfloat16(),
        }
        self.inputs = [loud_inputs(n, HIDDEN, 50.0, (8 * e,), seed=60 + e) for e, n in enumerate(tokens)]

    def stats(self) -> dict[str, InputStats]:
        stats = {}
        for e, x in enumerate(self.inputs):
            shared = stats_of(x, gram=False)
            stats[f"mlp.experts.{e}.gate_proj"] = stats[f"mlp.experts.{e}.up_proj"] = shared
            gate, up = (x @ self.weights[f"mlp.experts.{e}.{leaf}_proj"].float().T for leaf in ("gate", "up"))
            stats[f"mlp.experts.{e}.down_proj"] = stats_of(torch.nn.functional.silu(gate) * up)
        return stats

    def solve(self, schemes: Mapping[str, Scheme] | None = None, effort: Effort = SEARCH) -> SolvedBlock:
        readers = sorted((*expert_names("gate"), *expert_names("up")))
        folds = (
            Fold("post_attention_layernorm", ("mlp.gate", *readers)),
            *(Fold(up, (down,)) for up, down in zip(expert_names("up"), expert_names("down"), strict=True)),
        )
        plan = plan_of(self.shapes, folds, self.kept, schemes or {})
        return solve_block(plan, self.weights, self.kept, self.stats(), 0.0, effort)

    def scale(self, solved: SolvedBlock) -> Tensor:
        name = "post_attention_layernorm.weight"
        return self.kept[name].float() / solved.folded[name].float()


def test_a_router_takes_powers_of_two_and_loses_nothing():
    block = Routed((100, 80, 60, 40))
    solved = block.solve()
    scale = block.scale(solved)
    assert powers_of_two(scale)
    assert len(scale.unique()) > 1
    old, new = block.kept["mlp.gate.weight"], solved.folded["mlp.gate.weight"]
    assert new.dtype == torch.bfloat16
    assert torch.equal(new.float(), old.float() * scale)  # fp32 product: nothing was rounded
    x = randn(50, HIDDEN, seed=3)
    before = x * block.kept["post_attention_layernorm.weight"].float() @ old.float().T
    after = x * solved.folded["post_attention_layernorm.weight"].float() @ new.float().T
    assert torch.equal(before, after)


@pytest.mark.parametrize("heavy", range(EXPERTS))
def test_the_expert_with_the_tokens_decides(heavy):
    """All share the norm's scale; the channel in which the busiest expert's tokens are loud gets the largest."""
    solved = Routed(tuple(2000 if e == heavy else 20 for e in range(EXPERTS))).solve()
    scale = Routed((1, 1, 1, 1)).scale(solved)
    others = [8 * e for e in range(EXPERTS) if e != heavy]
    assert int(scale.argmax()) == 8 * heavy
    assert scale[8 * heavy] >= 2 * scale[others].max()
    gain = {e: solved.linears[f"mlp.experts.{e}.gate_proj"] for e in range(EXPERTS)}
    assert gain[heavy].error < 0.7 * gain[heavy].error_rounded
    assert gain[heavy].error / gain[heavy].error_rounded < min(gain[e].error / gain[e].error_rounded for e in gain if e != heavy)


@pytest.mark.parametrize("floor", [0, 128])
def test_an_expert_without_tokens_is_folded_like_the_others(floor):
    """It reads the same norm: were it left out, the first token that reaches it in use would meet a wrong scale."""
    block = Routed((100, 80, 60, 0))
    solved = block.solve(dict.fromkeys(block.shapes, W8), replace(SEARCH, expert_floor=floor))
    scale = block.scale(solved)
    assert len(scale.unique()) > 1
    for leaf in ("gate", "up"):
        lonely = solved.linears[f"mlp.experts.3.{leaf}_proj"]
        assert lonely.tokens == 0
        original = block.weights[f"mlp.experts.3.{leaf}_proj"].float()
        rows = torch.ones(32, 1)
        decoded = from_codes(lonely.codes) / scale
        if leaf == "up":  # its rows carry the scale that down takes back
            rows = (original * decoded).sum(1, keepdim=True) / decoded.square().sum(1, keepdim=True)
        assert relative(decoded * rows, original) < 3e-4
    x = randn(40, HIDDEN, seed=8)

    def run(weights: Mapping[str, Tensor], norm: Tensor) -> Tensor:
        gate, up = (x * norm.float() @ weights[f"mlp.experts.3.{leaf}_proj"].float().T for leaf in ("gate", "up"))
        return torch.nn.functional.silu(gate) * up @ weights["mlp.experts.3.down_proj"].float().T

    decoded = {name: from_codes(linear.codes) for name, linear in solved.linears.items()}
    norm = "post_attention_layernorm.weight"
    assert relative(run(decoded, solved.folded[norm]), run(block.weights, block.kept[norm])) < 1e-3


def test_experts_errors_without_a_gram_are_the_diagonals():
    block = Routed((100, 80, 60, 40))
    solved = block.solve()
    scale = block.scale(solved)
    for e in range(EXPERTS):
        name = f"mlp.experts.{e}.gate_proj"
        w, h = block.weights[name].float(), block.stats()[name].square
        ours = from_codes(solved.linears[name].codes) / scale
        assert solved.linears[name].error == pytest.approx(float(((ours - w).square() @ h).sum() / (w.square() @ h).sum()), rel=1e-4)


# -- shapes ------------------------------------------------------------------------------------------------------------------------


def test_shapes_are_checked():
    """pyproject's pytest options put beartype behind every signature."""
    with pytest.raises(jaxtyping.TypeCheckError):
        ranges.search(torch.ones(4, 2, 32), torch.ones(1, 3, 32), W4, torch.bfloat16, 4)
    with pytest.raises(jaxtyping.TypeCheckError):
        awq.norm_fold(torch.ones(8), 0.0, torch.ones(9))
    with pytest.raises(jaxtyping.TypeCheckError):
        awq.every_nth(torch.ones(8), 4)
    with pytest.raises(jaxtyping.TypeCheckError):
        awq.Consumer(torch.ones(4, 32), torch.ones(31), W4, torch.bfloat16)
    assert storable(torch.ones(3), torch.bfloat16).shape == (3,)


def test_scales_that_are_searched_side_by_side_are_those_of_each_by_itself():
    consumers = [consumer(randn(24, 64, seed=seed) * torch.linspace(0.2, 3, 64), randn(64, seed=50 + seed).square()) for seed in range(5)]
    consumers[2] = replace(consumers[2], importance=torch.zeros_like(consumers[2].importance))  # an expert that nothing reaches
    means = [randn(64, seed=90 + seed).abs() for seed in range(5)]
    means[3] = torch.zeros(64)
    together = awq.choose_alike([f"up.{n}" for n in range(5)], consumers, means, 8, lambda scale: scale)
    for number, choice in enumerate(together):
        alone = awq.choose_scale(f"up.{number}", [consumers[number]], means[number], 64, 0, 8, lambda scale: scale)
        assert torch.equal(choice.scale, alone.scale)
        assert choice.report.exponents == alone.report.exponents
        assert choice.report.loss_ratio == pytest.approx(alone.report.loss_ratio)
    assert any(choice.report.exponents for choice in together)
    assert together[3].report.exponents is None
