"""A size or bits a weight as a target: what may differ, what it costs, what is picked, and that it is kept."""

import itertools
import json
import random
from dataclasses import replace

import pytest
import tiny
import yaml
from click.testing import CliRunner

from quantkit import pipeline, target
from quantkit.cli import main
from quantkit.errors import RecipeError, StoreError, WriteError
from quantkit.formats import writer_of
from quantkit.plan import make_plan
from quantkit.recipe import Weights, load_recipe, size_in_bytes
from quantkit.solve.budget import allocate
from quantkit.target import Tie, extremes, pick, scheme_bytes, ties
from quantkit.types import Scheme

QUICK = {
    "calibration": {"samples": 12, "sequence_length": 64},
    "score": {"samples": 2, "sequence_length": 64},
    "search": {"exponents": 4, "shrinks": 4, "stages": False, "compensate": False},
}


def recipe_file(folder, base="awq-w4", **changes) -> str:
    path = folder / f"{base}-{abs(hash(json.dumps(changes, sort_keys=True)))}.yaml"
    path.write_text(yaml.safe_dump({**load_recipe(base).model_dump(mode="json", exclude={"name"}), **QUICK, **changes}))
    return str(path)


# --- The knapsack ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_within_the_budget_loses_less(seed):
    dice = random.Random(seed)
    options = [[(dice.randint(1, 60), dice.random()) for _ in range(dice.randint(1, 4))] for _ in range(5)]
    least, most = (sum(end(size for size, _ in of) for of in options) for end in (min, max))
    budget = dice.randint(least, most)
    every = [list(zip(options, pick, strict=True)) for pick in itertools.product(*(range(len(of)) for of in options))]
    sums = [(sum(of[i][0] for of, i in one), sum(of[i][1] for of, i in one)) for one in every]
    best = min(loss for size, loss in sums if size <= budget)
    picked = allocate(options, budget)
    assert sum(of[i][0] for of, i in zip(options, picked, strict=True)) <= budget
    assert sum(of[i][1] for of, i in zip(options, picked, strict=True)) == pytest.approx(best)


def test_large_budgets_are_filled_to_half_a_percent():
    dice = random.Random(1)
    options = [[(size := dice.randint(10**7, 10**8), 1.0), (2 * size, dice.random())] for _ in range(200)]
    budget = round(1.5 * sum(of[0][0] for of in options))
    taken = sum(of[i][0] for of, i in zip(options, allocate(options, budget), strict=True))
    assert 0.995 * budget < taken <= budget


def test_a_budget_below_everything_is_refused():
    with pytest.raises(ValueError, match="30 bytes are the least"):
        allocate([[(10, 1.0), (20, 0.5)], [(20, 1.0)]], 29)


@pytest.mark.parametrize("loss", [float("inf"), float("nan")])
def test_a_loss_that_is_no_number_is_refused(loss):
    with pytest.raises(ValueError, match="NaN or infinite"):
        allocate([[(10, loss), (12, 1.0)], [(10, 1.0), (12, 0.5)]], 30)


# --- What goes together ----------------------------------------------------------------------------------------------------------


def plan_of(tmp_path, name: str, **changes):
    recipe = load_recipe(recipe_file(tmp_path, target_bits=5.0, **changes))
    checkpoint = pipeline.open_checkpoint(str(tiny.build(name, tmp_path / name)))
    return recipe, make_plan(recipe, checkpoint.config, checkpoint.entries)


def leaves(tie) -> set[str]:
    return {linear.local.rpartition(".")[2] for _, linear in tie.linears}


def test_ties_are_what_engines_serve_as_one_matrix(tmp_path):
    sets = ties(*plan_of(tmp_path, "gemma4_moe"))
    by_block = [tie for tie in sets if {index for index, _ in tie.linears} == {0}]
    assert {"q_proj", "k_proj", "v_proj"} in map(leaves, by_block)
    assert {"o_proj"} in map(leaves, by_block)
    experts = [tie for tie in by_block if "experts." in tie.linears[0][1].local]
    assert [leaves(tie) for tie in experts] == [{"gate_proj", "up_proj", "down_proj"}]
    assert {choice.group for choice in experts[0].choices} == {32}  # 96 columns: 64 and 128 do not divide them


def test_in_gguf_each_matrix_and_each_kind_of_experts_stands_alone(tmp_path):
    sets = ties(*plan_of(tmp_path, "gemma4_moe", formats=["gguf"]))
    kinds = [leaves(tie) for tie in sets if "experts." in tie.linears[0][1].local and tie.linears[0][0] == 0]
    assert sorted(map(sorted, kinds)) == [["down_proj"], ["gate_proj", "up_proj"]]
    assert {"q_proj"} in map(leaves, sets)


def test_experts_that_checkpoints_keep_apart_share_one_scheme_everywhere(tmp_path):
    sets = ties(*plan_of(tmp_path, "qwen3_moe"))
    (experts,) = [tie for tie in sets if "experts." in tie.linears[0][1].local]
    assert len({index for index, _ in experts.linears}) > 1


def test_what_an_override_names_is_left_alone(tmp_path):
    override = [{"match": "mlp.down_proj", "weights": {"bits": 8}}]
    recipe, plan = plan_of(tmp_path, "llama", overrides=override)
    assert not any("down_proj" in leaves(tie) for tie in ties(recipe, plan))


def test_what_is_served_with_a_linear_that_an_override_names_keeps_its_scheme_too(tmp_path):
    recipe, plan = plan_of(tmp_path, "llama", overrides=[{"match": "self_attn.v_proj", "layers": [1], "weights": {"group": 32}}])
    sets = [{(index, linear.local) for index, linear in tie.linears} for tie in ties(recipe, plan)]
    assert any((0, "self_attn.q_proj") in one for one in sets)
    assert not any((1, "self_attn.q_proj") in one for one in sets)


def test_overrides_that_leave_nothing_to_pick(tmp_path):
    recipe, plan = plan_of(tmp_path, "llama", overrides=[{"match": "*", "weights": {"bits": 8}}])
    with pytest.raises(RecipeError, match="leave nothing to pick"):
        ties(recipe, plan)


@pytest.mark.parametrize("form", ["compressed-tensors", "gguf"])
@pytest.mark.parametrize("name", ["llama", "gemma4_moe"])
def test_bytes_of_choices_are_the_files(tmp_path, name, form):
    """The difference of two plans' files is that of their schemes, but for headers."""
    recipe, plan = plan_of(tmp_path, name, formats=[form])
    checkpoint = pipeline.open_checkpoint(str(tmp_path / name))
    sizes = {}
    for end, chosen in extremes(recipe, plan).items():
        made = make_plan(recipe, checkpoint.config, checkpoint.entries, chosen=chosen)
        sizes[end] = writer_of(form, recipe, made, name, checkpoint.config, checkpoint.folder).bytes
    told = {end: sum(best(tie.bytes) for tie in ties(recipe, plan)) for end, best in (("smallest", min), ("largest", max))}
    assert abs((sizes["largest"] - sizes["smallest"]) - (told["largest"] - told["smallest"])) < 64 + 0.001 * sizes["largest"]


@pytest.mark.parametrize(
    "scheme, form, bits",
    [
        (Scheme(4, 32, True), "compressed-tensors", 4.5),
        (Scheme(4, 128, False), "compressed-tensors", 4 + 20 / 128),
        (Scheme(4, 128, True), "gguf", 4.5),
        (Scheme(4, 32, False), "gguf", 5.0),
        (Scheme(4, 32, False, grid="q4_k"), "gguf", 4.5),
        (Scheme(6, 16, True, grid="q6_k"), "gguf", 6.5625),
    ],
)
def test_bytes_of_a_scheme(scheme, form, bits):
    assert scheme_bytes(scheme, (64, 256), form) == 64 * 256 * bits / 8


# --- Runs ------------------------------------------------------------------------------------------------------------------------


def quantized(tmp_path, source, name="out", **options):
    return pipeline.quantize(str(source), recipe=recipe_file(tmp_path), output=tmp_path / name, **options)


def test_bits_are_kept_and_go_where_they_pay(tmp_path):
    source = tiny.build("llama", tmp_path / "model")
    result = quantized(tmp_path, source, target_bits=6.0)
    target = result.report["target"]
    assert 5.5 < target["picked_bits"] <= 6.0
    assert len({row["picked"] for row in target["sets"]}) > 1
    budget = sum(row["costs"][row["picked"]][0] for row in target["sets"])
    spent = sum(row["costs"][row["picked"]][1] for row in target["sets"])
    options = [list(map(tuple, row["costs"].values())) for row in target["sets"]]
    # no single set could change hands for less loss at no more bytes
    for row, of in zip(target["sets"], options, strict=True):
        size, loss = row["costs"][row["picked"]]
        assert not any(other <= size and less < loss for other, less in of)
    uniform = sum(min(of)[1] for of in options)
    assert spent < uniform
    assert budget == sum(row["costs"][row["picked"]][0] for row in target["sets"])
    schemes = {row["scheme"] for block in result.report["blocks"] for row in block["linears"].values()}
    assert schemes == {row["picked"] for row in target["sets"]}


def test_a_size_is_kept_to_the_byte_and_used(tmp_path):
    source = tiny.build("gemma4_moe", tmp_path / "model")
    _, sizes = pipeline.plan(str(source), recipe_file(tmp_path), target_size=1 << 30)
    ends = sorted(sizes.values())
    wanted = sum(ends) // 2
    result = quantized(tmp_path, source, target_size=wanted)
    size = result.bytes["compressed-tensors"]
    assert size == sum(path.stat().st_size for path in result.artefacts["compressed-tensors"].glob("*.safetensors"))
    assert 0.9 * wanted < size <= wanted


def test_a_gguf_keeps_its_size(tmp_path):
    pytest.importorskip("gguf")
    source = tiny.build("llama", tmp_path / "model", hidden_size=256, intermediate_size=256, head_dim=64)
    _, sizes = pipeline.plan(str(source), recipe_file(tmp_path), formats=["gguf"], target_size=1 << 30)
    wanted = sum(sizes.values()) // 2
    result = quantized(tmp_path, source, formats=["gguf"], target_size=wanted)
    (file,) = result.artefacts["gguf"].glob("*.gguf")
    assert 0.9 * wanted < file.stat().st_size == result.bytes["gguf"] <= wanted
    assert len({row["picked"] for row in result.report["target"]["sets"]}) > 1


def test_a_killed_run_goes_on_with_the_same_schemes(tmp_path, monkeypatch):
    source = tiny.build("llama", tmp_path / "model")
    whole = quantized(tmp_path, source, target_bits=6.0)

    def killed(self, plan):
        if plan.index == 1:
            raise KeyboardInterrupt
        return before(self, plan)

    before = pipeline.Run.block
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Run, "block", killed)
        with pytest.raises(KeyboardInterrupt):
            quantized(tmp_path, source, "again", target_bits=6.0)
    resumed = quantized(tmp_path, source, "again", target_bits=6.0)
    assert "weighing schemes" not in resumed.report["seconds"] or resumed.report["seconds"]["weighing schemes"] == 0
    files = [sorted(run.artefacts["compressed-tensors"].glob("*.safetensors")) for run in (whole, resumed)]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_damaged_notes_are_measured_anew(tmp_path):
    source = tiny.build("llama", tmp_path / "model")
    first = quantized(tmp_path, source, target_bits=6.0)
    (tmp_path / "out" / "solved" / "target.json").write_text("{")
    assert quantized(tmp_path, source, target_bits=6.0).report["target"] == first.report["target"]


def test_a_format_is_added_only_where_it_has_the_same_schemes(tmp_path):
    """Other choices, or bytes counted in another file, are another run: its blocks are not read as if they had these schemes."""
    pytest.importorskip("gguf")
    source = tiny.build("llama", tmp_path / "model", num_hidden_layers=1)
    first = quantized(tmp_path, source, target_bits=6.0)
    with pytest.raises(StoreError, match=r"holds another run.*target '6\.0 in compressed-tensors'"):
        quantized(tmp_path, source, target_bits=6.0, formats=["gguf"])
    both = quantized(tmp_path, source, target_bits=6.0, formats=["compressed-tensors", "gguf"])
    assert both.report["target"] == first.report["target"]
    assert both.report["blocks"] == first.report["blocks"]
    size = first.bytes["compressed-tensors"]
    quantized(tmp_path, source, "other", target_size=size)
    with pytest.raises(StoreError, match=f"holds another run.*target '{size} in compressed-tensors'"):
        quantized(tmp_path, source, "other", target_size=size, formats=["gguf", "compressed-tensors"])


def test_the_card_tells_the_target_and_no_scheme_for_all(tmp_path):
    source = tiny.build("llama", tmp_path / "model", num_hidden_layers=1)
    card = (quantized(tmp_path, source, target_bits=6.0).artefacts["compressed-tensors"] / "README.md").read_text()
    assert "compressed-tensors, schemes picked for 6.0 bits a weight" in card
    assert "Schemes were picked for 6.0 bits a weight" in card
    assert "\n- 4-bit\n" not in card


@pytest.mark.parametrize("more", range(0, 96, 8))
def test_the_smallest_size_that_can_be_kept_is(tmp_path, more, monkeypatch):
    """A few bytes above the least: what a choice adds to a header must not end in a refusal."""
    options = [[(100, 1.0), (104, 0.5)], [(100, 1.0), (140, 0.1)]]
    recipe = load_recipe(recipe_file(tmp_path, target_size=1000 + more))
    checkpoint = pipeline.open_checkpoint(str(tiny.build("llama", tmp_path / "model", num_hidden_layers=1)))
    plan = make_plan(recipe, checkpoint.config, checkpoint.entries)
    block = plan.blocks[0]
    choices, schemes = (Weights(), Weights(bits=8)), (Scheme(4, 32, True), Scheme(8, 32, True))
    sets = [Tie(((0, block.linears[i]),), choices, schemes, tuple(size for size, _ in of)) for i, of in enumerate(options)]
    monkeypatch.setattr(target, "ties", lambda *_: sets)
    monkeypatch.setattr(target, "_losses", lambda *_: [[loss for _, loss in of] for of in options])

    def remade(chosen):
        linears = tuple(replace(one, scheme=schemes[chosen.get((0, one.local), choices[0]).bits == 8]) for one in block.linears)
        return replace(plan, blocks=(replace(block, linears=linears),))

    def size_of(made):
        eight = [linear.scheme.bits == 8 for linear in made.blocks[0].linears]
        return 800 + sum(of[large][0] + 20 * large for of, large in zip(options, eight, strict=False))

    made, _ = pick(recipe, plan, remade, size_of, None, [], tmp_path / "notes.json", None)
    assert size_of(made) <= 1000 + more


# --- Refusals --------------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_kept_is_told_with_the_least(tmp_path):
    source = tiny.build("llama", tmp_path / "model")
    with pytest.raises(RecipeError, match=r"the smallest choices take 4\.\d+ bits a weight"):
        quantized(tmp_path, source, target_bits=3.0)
    with pytest.raises(RecipeError, match=r"target_size 1,000: the smallest choices take [\d,]+ bytes"):
        quantized(tmp_path, source, "other", target_size=1000)


def test_a_scheme_that_costs_no_number_is_told_with_its_linear(tmp_path, monkeypatch):
    source = tiny.build("llama", tmp_path / "model", num_hidden_layers=1)
    monkeypatch.setattr(target, "_change", lambda *_: float("nan"))
    with pytest.raises(RecipeError, match=r"layers\.0\.\S+ in w4 \S+ \S+ .*makes NaN or infinity"):
        quantized(tmp_path, source, target_bits=5.0)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"target_bits": 4.5, "target_size": 1000}, "either target_bits or target_size"),
        ({"target_bits": 4.5, "method": "rtn"}, "needs the method awq"),
        ({"choices": [{"bits": 4}]}, "choices are for"),
        ({"target_size": "many"}, "no size"),
        ({"target_bits": 4.5, "choices": [{"grid": "q4_k_m"}]}, "a mix is no choice"),
    ],
)
def test_recipes_that_contradict_themselves(tmp_path, changes, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(recipe_file(tmp_path, **changes))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"choices": [{"bits": 4}, {"grid": "iq4_nl"}]}, "that grid is GGUF's"),
        ({"choices": [{"bits": 3}, {"bits": 8}], "formats": ["gguf"]}, "GGUF of w3 sym g32"),
        ({"choices": [{"bits": 4, "symmetric": False}, {"bits": 8}]}, "zero points in a mix"),
    ],
)
def test_choices_that_no_file_holds_are_refused_before_anything_runs(tmp_path, changes, words, monkeypatch):
    source = tiny.build("llama", tmp_path / "model", num_hidden_layers=1)
    monkeypatch.setattr(pipeline, "Skeleton", None)
    with pytest.raises((RecipeError, WriteError), match=words):
        pipeline.quantize(str(source), recipe=recipe_file(tmp_path, target_bits=6.0, **changes), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_choice_that_fits_nothing(tmp_path):
    recipe, plan = plan_of(tmp_path, "gemma4_moe", choices=[{"bits": 4, "group": 128}])
    with pytest.raises(RecipeError, match="none of the choices fits the"):
        ties(recipe, plan)


@pytest.mark.parametrize("text, size", [("14GB", 14 * 10**9), ("1.5 GiB", 3 << 29), ("1000", 1000)])
def test_sizes(text, size):
    assert size_in_bytes(text) == size
    assert Weights().bits == 4


def test_the_command_line_tells_both_ends(tmp_path):
    source = tiny.build("llama", tmp_path / "model")
    done = CliRunner().invoke(main, ["plan", str(source), "--target-bits", "5"])
    assert done.exit_code == 0, done.output
    assert "smallest choices" in done.output
    assert "largest choices" in done.output
    assert CliRunner().invoke(main, ["plan", str(source), "--target-size", "5 apples"]).exit_code == 2
