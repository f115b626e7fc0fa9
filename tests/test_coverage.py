"""Experts by language and domain are counted as the router chose; the reserve is drawn on as far as it must, and kept apart."""

import pytest
import tiny
import torch
from torch import Tensor

from quantkit.calibrate.batches import make_batches, reserve_batches
from quantkit.calibrate.collect import Reserve, added, collect
from quantkit.calibrate.coverage import cells_of, coverage_report, hungry, top_up, watch_routing
from quantkit.calibrate.draw import Row
from quantkit.calibrate.observe import observe
from quantkit.model.blocks import Skeleton
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.streams import State, Stream
from quantkit.types import Batch, BlockStatistics, InputStats

MOE = ("gemma4_moe", "qwen3_moe", "mixtral")


def rows(count: int, seed: int, languages: tuple[str, ...] = ("en", "zh"), length: int = 30) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = torch.randint(20, 300, (length - number % 7,), generator=generator).tolist()
        labels = {"id": f"{seed}-{number}", "language": languages[number % len(languages)], "domain": ("stem", "agentic")[number // 2 % 2]}
        made.append(Row(ids, bytes([2]) * len(ids), labels, ""))
    return made


@pytest.fixture(scope="module", params=MOE)
def skeleton(request, tmp_path_factory) -> Skeleton:
    folder = tiny.build(request.param, tmp_path_factory.mktemp("model") / request.param, dtype="float32", num_hidden_layers=2)
    return Skeleton(Checkpoint(folder), torch.float32)


# --- Pure functions ---------------------------------------------------------------------------------------------------------------


def counts(*tokens: int) -> dict[str, Tensor]:
    return {"experts": torch.tensor(tokens)}


def drawing(*fed: tuple[int, ...]) -> tuple[list[int], object]:
    taken: list[int] = []

    def draw() -> dict[str, Tensor] | None:
        if len(taken) == len(fed):
            return None
        taken.append(len(taken))
        return counts(*fed[len(taken) - 1])

    return taken, draw


def test_nothing_is_drawn_where_all_are_fed():
    taken, draw = drawing((5, 5, 5))
    assert top_up(counts(10, 12, 10), 10, draw)["experts"].tolist() == [0, 0, 0]
    assert taken == []


def test_drawing_stops_at_the_floor():
    natural = counts(10, 2, 30)
    taken, draw = drawing((5, 3, 0), (0, 4, 0), (1, 1, 1), (9, 9, 9))
    more = top_up(natural, 10, draw)
    assert taken == [0, 1, 2], "2 + 3 + 4 + 1 = 10"
    assert more["experts"].tolist() == [6, 8, 1]
    assert natural["experts"].tolist() == [10, 2, 30], "the set's own counts are not touched"


def test_drawing_stops_when_the_reserve_is_spent():
    taken, draw = drawing((5, 0), (5, 0))
    more = top_up(counts(0, 0), 3, draw)
    assert taken == [0, 1]
    assert hungry({"experts": more["experts"]}, 3) == 1


def test_no_floor_draws_nothing():
    taken, draw = drawing((5, 0))
    top_up(counts(0, 0), 0, draw)
    assert taken == []


def test_the_report_names_the_least_fed_and_who_feeds_them():
    cells = [("en", "stem"), ("zh", "stem")]
    table = torch.tensor([[10, 0, 40, 50], [0, 3, 60, 37]])
    block = BlockStatistics({}, {}, {"experts": table}, counts(0, 0, 0, 0) | {"experts": torch.tensor([0, 9, 4, 4])})
    (said,) = coverage_report([block], cells, floor=12, pooled=11)
    assert said["tokens"] == [10, 3, 100, 87]
    assert (said["below_floor"], said["below_floor_with_reserve"]) == (2, 1)
    assert (said["shrunk"], said["fell_back"]) == (1, 0)
    first, second, _ = said["least_fed"]
    assert first == {"expert": 1, "tokens": 3, "reserve_tokens": 9, "of_even_share": 0.06, "by": {"zh / stem": 3}}
    assert second["by"] == {"en / stem": 10}
    assert said["used"]["language"] == {"en": {"experts": 3, "most": [3, 2, 0, 1]}, "zh": {"experts": 2, "most": [2, 3, 1, 0]}}
    assert said["used"]["domain"]["stem"]["experts"] == 2, "a quarter of an even share is what counts as using"


def test_a_dense_block_has_no_coverage():
    assert coverage_report([BlockStatistics({}, {}, {}, {})], [("en", "stem")], 10, 128) == []


# --- Through a model --------------------------------------------------------------------------------------------------------------


def test_routing_is_counted_beside_the_statistics(skeleton):
    """By cell it adds up to what each expert was fed, padding left out; a cell's share is that of its rows alone."""
    batches = make_batches(rows(12, seed=1), batch_tokens=100)
    assert len(batches) > 2
    cells = cells_of(batches)
    assert len(cells) == 4
    stream = Stream(skeleton, batches)
    state = stream.start()
    with skeleton.block(0) as block:
        with watch_routing(block, batches, cells) as routing:
            stats = observe(stream, block, state)
        (local,) = routing
        for expert in range(routing[local].shape[1]):
            assert routing[local][:, expert].sum() == stats[f"{local}.{expert}.down_proj"].tokens
        one = cells.index(("zh", "stem"))
        own = make_batches([row for row in rows(12, seed=1) if (row.labels["language"], row.labels["domain"]) == ("zh", "stem")], 100)
        alone = Stream(skeleton, own)
        with watch_routing(block, own, cells) as only:
            observe(alone, block, alone.start())
    assert torch.equal(only[local][one], routing[local][one])
    assert only[local].sum() == only[local][one].sum()


def test_prompts_that_are_ignored_feed_nobody(skeleton):
    (batch,) = make_batches(rows(2, seed=1), batch_tokens=100)
    without = Batch(batch.ids, batch.real, batch.labels, torch.ones_like(batch.real))
    stream = Stream(skeleton, [without])
    with skeleton.block(0) as block, watch_routing(block, [without], cells_of([without])) as routing:
        stream.advance(block, stream.start())
    assert not next(iter(routing.values())).any()


def fed(block: torch.nn.Module, batches: list[Batch], stream: Stream, state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of every linear (padding left out), and of all experts with their routing, by hooks of this test's own."""
    seen: dict[str, list[Tensor]] = {}
    real = torch.empty(0)

    def keep(name: str):
        def hook(module: torch.nn.Module, args: tuple) -> None:
            seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1])[real])
            if hasattr(module, "_apply_gate"):
                seen.setdefault(f"{name} index", []).append(args[1].reshape(len(real), -1)[real])

        return hook

    modules = [(n, m) for n, m in block.named_modules() if isinstance(m, torch.nn.Linear) or hasattr(m, "_apply_gate")]
    handles = [module.register_forward_pre_hook(keep(name)) for name, module in modules]
    for number, batch in enumerate(batches):
        real = batch.real.reshape(-1)
        stream.run(block, state, number)
    for handle in handles:
        handle.remove()
    together = {name: torch.cat(parts) for name, parts in seen.items()}
    return {n: x for n, x in together.items() if "experts" not in n}, {n: x for n, x in together.items() if "experts" in n}


def test_sums_are_those_of_what_the_linears_were_given(skeleton):
    batches = make_batches(rows(8, seed=5), 64)
    stream = Stream(skeleton, batches)
    state = stream.start()
    with skeleton.block(0) as block:
        dense, experts = fed(block, batches, stream, state)
        got = collect(stream, block, state, Reserve([], []), cells_of(batches), floor=0, grams=True)
    assert dense.keys() == {local for local in got.inputs if "experts." not in local}
    for local, x in dense.items():
        stats = got.inputs[local]
        assert stats.tokens == len(x) == sum(int(batch.real.sum()) for batch in batches)
        assert torch.allclose(stats.square, x.square().sum(0), rtol=1e-4)
        assert torch.allclose(stats.abs, x.abs().sum(0), rtol=1e-4)
        assert torch.allclose(stats.gram, x.T @ x, rtol=1e-3, atol=1e-3)
    (local,) = got.routing
    x, index = experts[local], experts[f"{local} index"]
    for expert in range(got.routing[local].shape[1]):
        own = x[(index == expert).any(1)]
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            assert got.inputs[f"{local}.{expert}.{leaf}"].tokens == len(own)
        assert torch.allclose(got.inputs[f"{local}.{expert}.gate_proj"].square, own.square().sum(0), rtol=1e-4, atol=1e-5)
        assert got.inputs[f"{local}.{expert}.gate_proj"].gram is None
        assert got.inputs[f"{local}.{expert}.down_proj"].gram is not None
    assert not any("watcher" in module.__dict__ for module in block.modules())


def test_the_reserve_feeds_the_hungry_and_moves_on_with_the_rest(skeleton):
    natural, more = make_batches(rows(4, seed=1), 64), reserve_batches(rows(30, seed=2), 600, 64)
    cells = cells_of([*natural, *more])
    stream, plain = Stream(skeleton, natural), Stream(skeleton, natural)
    state, plain_state = stream.start(), plain.start()
    reserve = Reserve.start(skeleton, more)
    floor = 25
    for index in range(2):
        with skeleton.block(index) as block:
            expected = collect(plain, block, plain_state, Reserve([], []), cells, floor=0)
            got = collect(stream, block, state, reserve, cells, floor)
        for local, one in expected.inputs.items():
            assert got.inputs[local].tokens == one.tokens
            assert torch.equal(got.inputs[local].square, one.square), "the natural stream does not know of the reserve"
            assert got.inputs[local].gram is None
        assert all(not tokens.any() for tokens in expected.topped_up.values())
        (local,) = got.routing
        own = got.routing[local].sum(0)
        assert (own < floor).any(), "or the test shows nothing"
        for expert, tokens in enumerate(own.tolist()):
            name = f"{local}.{expert}.down_proj"
            if tokens >= floor:
                assert name not in got.reserve
            elif got.topped_up[local][expert]:
                assert got.reserve[name].tokens == got.topped_up[local][expert]
                assert got.reserve[name].square.any()
    whole = Stream(skeleton, more)
    passed = whole.start()
    for index in range(2):
        with skeleton.block(index) as block:
            whole.advance(block, passed)
    for number, one in enumerate(reserve.states):
        assert torch.equal(one.hidden[0], passed.hidden[number]), "used or not, every batch stands behind the last block"


def test_prompts_that_are_ignored_are_in_no_sum(skeleton):
    (batch,) = make_batches(rows(2, seed=1), batch_tokens=100)
    prompt = torch.zeros_like(batch.real)
    prompt[:, :10] = True
    stream = Stream(skeleton, [Batch(batch.ids, batch.real, batch.labels, prompt)])
    with skeleton.block(0) as block:
        got = collect(stream, block, stream.start(), Reserve([], []), cells_of([batch]), floor=0)
    assert got.inputs["self_attn.q_proj"].tokens == int(batch.real.sum()) - 20


def test_a_reserve_keeps_its_order_and_its_budget():
    source = iter(rows(1000, seed=3))
    batches = reserve_batches(source, 400, 64)
    ids = [labels["id"] for batch in batches for labels in batch.labels]
    assert 300 < sum(int(batch.real.sum()) for batch in batches) <= 400
    assert set(ids) == {f"3-{number}" for number in range(len(ids))}
    assert next(source).labels["id"] < "3-30", "no further than needed"
    assert reserve_batches(iter(()), 100, 64) == []


def test_what_the_reserve_alone_fed_keeps_its_drift():
    none, some = InputStats(0, torch.zeros(4), torch.zeros(4), torch.zeros(4, 4)), torch.full((4,), 9.0)
    drifted = InputStats(9, some, some, torch.eye(4), drift=torch.eye(4))
    for mine, more in ((none, drifted), (drifted, none)):
        sums = added({"experts.0.down_proj": mine}, {"experts.0.down_proj": more})["experts.0.down_proj"]
        assert sums.tokens == 9
        assert torch.equal(sums.drift, torch.eye(4))
    both = added({"one": drifted}, {"one": drifted})["one"]
    assert (both.tokens, float(both.drift.sum())) == (18, 8.0)
