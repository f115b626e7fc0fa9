"""The gate: verdicts of single checks, groups, what is demanded and what is missing, and the files that say so."""

import json
import math

import numpy as np
import pytest

from quantkit.errors import EvaluationError
from quantkit.evaluate import gate, judge
from quantkit.evaluate.gate import FAIL, INCONCLUSIVE, PASS, Check, Pairs
from quantkit.evaluate.metrics import Tokens
from quantkit.recipe import load_benchmarks, load_gate, load_suite, shipped_evaluations
from quantkit.suites import Gate, Suite


def tokens(kl: float, documents: int = 20, spread: float = 0.2, finite: bool = True) -> Tokens:
    """Documents of 50 tokens in two languages, whose mean KL varies."""
    random = np.random.default_rng(0)
    means = kl * (1 + spread * random.standard_normal(documents))
    values = np.maximum(means[:, None] * random.exponential(size=(documents, 50)), 0).ravel()
    none, every = np.zeros(len(values)), np.ones(len(values), dtype=bool)
    right = random.uniform(size=len(values)) < 0.4
    return Tokens(
        values, none, none + 2.0, none + 2.01, random.uniform(size=len(values)) < 0.9, right, right, every, every if finite else ~every,
        np.repeat(np.arange(documents), 50), np.full(documents, 200), tuple(f"d{n}" for n in range(documents)),
        tuple({"language": "en" if n % 2 else "hi", "domain": "stem"} for n in range(documents)),
    )  # fmt: skip


def items(count: int, lost: int, won: int, **labels: str) -> tuple[list, list]:
    """Items of which the baseline has half right."""
    base = [n % 2 == 0 for n in range(count)]
    rights = [n for n in range(count) if base[n]][:lost]
    wrongs = [n for n in range(count) if not base[n]][:won]
    other = [(b and n not in rights) or n in wrongs for n, b in enumerate(base)]
    row = lambda n, right: {"id": f"{labels}-{n}", "right": right, **labels}  # noqa: E731
    return [row(n, b) for n, b in enumerate(base)], [row(n, o) for n, o in enumerate(other)]


ALL = Gate(name="g", description="", divergence={"kl_mean": 0.05, "kl_99": 0.4, "same_top": 0.8}, items={"margin": 0.01})  # type: ignore[arg-type]


@pytest.mark.parametrize("kl, verdict", [(0.02, PASS), (0.05, INCONCLUSIVE), (0.15, FAIL)])
def test_a_budget_is_kept_missed_or_open(kl, verdict):
    check = judge.of_tokens(ALL, tokens(kl))[1]
    assert (check.name, check.verdict) == ("mean KL", verdict)
    assert check.bounds[0] < check.found < check.bounds[1]
    assert (check.needed is not None) == (verdict == INCONCLUSIVE)


def test_more_documents_decide_what_few_leave_open():
    few = judge.of_tokens(ALL, tokens(0.035, documents=6, spread=0.9))[1]
    assert few.verdict == INCONCLUSIVE
    assert 6 < few.needed < 100
    many = judge.of_tokens(ALL, tokens(0.035, documents=few.needed * 2, spread=0.9))[1]
    assert many.verdict == PASS


def test_numbers_that_are_none_fail():
    checks = judge.of_tokens(ALL, tokens(0.001, finite=False))
    assert gate.verdict_of(checks) == FAIL
    assert "no numbers" in checks[0].line()


def test_what_the_stored_baseline_left_out_counts_against_the_artefact():
    whole = tokens(0.03)
    cut = Tokens(*(getattr(whole, name) if name != "bound" else np.full(len(whole.kl), 0.03) for name in Tokens.__dataclass_fields__))
    assert judge.of_tokens(ALL, whole)[1].verdict == PASS
    assert judge.of_tokens(ALL, cut)[1].verdict == INCONCLUSIVE


@pytest.mark.parametrize(
    "count, lost, won, verdict", [(100, 2, 2, INCONCLUSIVE), (4000, 90, 95, PASS), (4000, 300, 100, FAIL), (20, 0, 0, INCONCLUSIVE)]
)
def test_items_pass_fail_or_are_too_few(count, lost, won, verdict):
    check = judge.of_items(ALL, *items(count, lost, won))[0]
    assert check.verdict == verdict
    if verdict == INCONCLUSIVE:
        assert check.needed > count
        assert "items would decide" in check.line()


def test_groups_share_their_level():
    """One language of ten that loses 15 of 200 against a margin of 3 points: shown, whatever the others; by chance alone: not."""
    asked = Gate(name="g", description="", items={"group_margin": 0.03})  # type: ignore[arg-type]
    rows = [items(200, 22 if number == 3 else 2, 2, language=f"l{number}") for number in range(10)]
    base, other = ([item for row in rows for item in row[side]] for side in (0, 1))
    check = judge.of_items(asked, base, other)[0]
    assert check.verdict == FAIL
    assert "language l3" in check.note
    calm = [items(200, 6 if number == 3 else 2, 2, language=f"l{number}") for number in range(10)]
    base, other = ([item for row in calm for item in row[side]] for side in (0, 1))
    assert judge.of_items(asked, base, other)[0].verdict == PASS


def test_a_languages_budget():
    asked = Gate(name="g", description="", divergence={"kl_mean_group": 0.1})  # type: ignore[arg-type]
    calm = tokens(0.05)
    hurt = Tokens(*(getattr(calm, n) if n != "kl" else calm.kl * np.where(calm.owner % 2, 1, 8) for n in Tokens.__dataclass_fields__))
    assert gate.verdict_of(judge.of_tokens(asked, calm)) == PASS
    failed = judge.of_tokens(asked, hurt)[-1]
    assert failed.verdict == FAIL
    assert "language hi" in failed.note
    assert "language en" not in failed.note.partition("exceed")[2]


def test_tool_calls_that_are_no_longer_valid_fail():
    asked = Gate(name="g", description="", items={"call_margin": 0.02})  # type: ignore[arg-type]
    base = [{"id": f"c{n}", "right": False, "valid": True} for n in range(120)]
    broken = [{**row, "valid": n > 30} for n, row in enumerate(base)]
    assert judge.of_items(asked, base, base)[-1].verdict == INCONCLUSIVE, "120 without a flip bound the loss by 2.2 points"
    assert judge.of_items(asked, base * 2, base * 2)[-1].verdict == PASS
    assert judge.of_items(asked, base, broken)[-1].verdict == FAIL


def test_flips_count_both_ways():
    asked = Gate(name="g", description="", items={"flips": 0.05})  # type: ignore[arg-type]
    equal = judge.of_items(asked, *items(2000, 200, 200))
    assert equal[-1].verdict == FAIL, "as accurate as before, and another model"
    assert judge.of_items(asked, *items(2000, 20, 20))[-1].verdict == PASS


@pytest.mark.parametrize(
    "verdicts, whole", [([PASS, PASS], PASS), ([PASS, INCONCLUSIVE], INCONCLUSIVE), ([INCONCLUSIVE, FAIL], FAIL), ([], INCONCLUSIVE)]
)
def test_the_worst_check_decides(verdicts, whole):
    assert gate.verdict_of([Check("c", verdict, 0.0, 0.0) for verdict in verdicts]) == whole
    assert gate.EXIT_CODES[whole] in (0, 3, 4)


def test_a_check_survives_json():
    check = gate.at_most("x", 0.1, 0.2, (-math.inf, math.inf), 1)
    assert check.verdict == INCONCLUSIVE
    assert json.loads(json.dumps(check.as_json(), allow_nan=False))["bounds"] == [None, None]


def test_pairs_say_what_moved():
    about = Pairs.of([True, True, False, False], [True, False, True, False]).as_json()
    assert (about["right_to_wrong"], about["wrong_to_right"], about["difference"]) == (1, 1, 0.0)
    assert about["accuracy_base"] == about["accuracy"] == 0.5
    assert about["mcnemar"] == 1.0


def test_other_items_do_not_pair():
    base, _ = items(4, 0, 0)
    with pytest.raises(EvaluationError, match="do not pair"):
        judge.of_items(ALL, base, [{**row, "id": "x"} for row in base])


def test_a_run_beside_the_stored_one():
    now, rows = tokens(0.03), items(50, 0, 0)[1]
    about = {"artefact": "a", "baseline": "b", "suite": "s", "engine": {}, "versions": {}, "digests": {"baseline": "0"}}
    stored = json.loads(json.dumps(judge.stored_run(about, now, rows)))
    assert all(check.verdict == PASS for check in judge.beside_stored(ALL, stored, now, rows))
    worse = Tokens(*(getattr(now, name) if name != "kl" else now.kl * 1.3 for name in Tokens.__dataclass_fields__))
    assert judge.beside_stored(ALL, stored, worse, rows)[0].verdict == FAIL
    lost = [{**row, "right": False} for row in rows]
    assert judge.beside_stored(ALL, stored, now, lost)[1].verdict == FAIL
    with pytest.raises(EvaluationError, match="other documents"):
        judge.beside_stored(ALL, stored, tokens(0.03, documents=19), rows)
    with pytest.raises(EvaluationError, match="other items"):
        judge.beside_stored(ALL, stored, now, rows[1:])
    unread = {name: {**row, "kl": math.nan} for name, row in stored["documents"].items()}
    for documents, message in ((unread, "no numbers"), (None, "not what"), (dict.fromkeys(unread, 1), "not what")):
        with pytest.raises(EvaluationError, match=message):
            judge.beside_stored(ALL, {**stored, "documents": documents}, now, rows)
    with pytest.raises(EvaluationError, match="other items"):
        judge.beside_stored(ALL, {**stored, "items": None}, now, rows)


# --- The files ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "strict", "smoke"])
def test_shipped_gates_load(name):
    found = load_gate(name)
    assert found.divergence.kl_mean
    assert found.items.margin


def test_shipped_gates_are_ordered():
    smoke, default, strict = (load_gate(name) for name in ("smoke", "default", "strict"))
    for key in ("kl_mean", "kl_99", "kl_mean_group"):
        assert getattr(smoke.divergence, key) > getattr(default.divergence, key) > getattr(strict.divergence, key)
    for key in ("margin", "group_margin", "flips", "call_margin"):
        assert getattr(smoke.items, key) > getattr(default.items, key) > getattr(strict.items, key)


def test_every_shipped_suite_loads():
    assert {"quick", "full", "divergence"} <= set(shipped_evaluations("suites"))
    for name in shipped_evaluations("suites"):
        assert load_suite(name).name == name


def test_a_suite_of_the_harness_by_name():
    assert load_suite("lm-eval:hellaswag, arc_challenge").harness.tasks == ["hellaswag", "arc_challenge"]
    with pytest.raises(EvaluationError, match="names no task"):
        load_suite("lm-eval:")


@pytest.mark.parametrize(
    "text, message",
    [
        ("description: x\nmargin: 0.1", "unknown key 'margin'"),
        ("description: x", "an empty gate"),
        ("description: x\ndivergence: {kl_mean: null}", "an empty gate"),
        ("description: x\nitems: {margin: 2}", "less than or equal to 1"),
        ("description: x\ndivergence: {kl_meen: 1}", "did you mean 'kl_mean'"),
        ("- a\n- b", "a mapping of keys"),
    ],
)
def test_a_bad_gate_is_one_line(tmp_path, text, message):
    (tmp_path / "g.yaml").write_text(text)
    with pytest.raises(EvaluationError, match=message):
        load_gate(str(tmp_path / "g.yaml"))


def test_bad_suites(tmp_path):
    with pytest.raises(EvaluationError, match="neither a shipped one"):
        load_suite("nothing-of-the-kind")
    (tmp_path / "s.yaml").write_text("description: x\ndocuments: null\n")
    with pytest.raises(EvaluationError, match="an empty suite"):
        load_suite(str(tmp_path / "s.yaml"))
    with pytest.raises(ValueError, match="empty suite"):
        Suite(name="x", description="", documents=None)


def test_paths_of_a_suite_stand_beside_its_file(tmp_path):
    (tmp_path / "s.yaml").write_text("description: x\ndocuments: texts\nitems: {path: mine.jsonl}\nharness: {tasks: [a], include: tasks}\n")
    suite = load_suite(str(tmp_path / "s.yaml"))
    assert suite.documents == str(tmp_path / "texts")
    assert suite.items.path == str(tmp_path / "mine.jsonl")
    assert suite.harness.include == str(tmp_path / "tasks")


def test_every_benchmark_has_tasks_or_a_reason():
    found = load_benchmarks()
    names = "MMLU-Pro,GPQA Diamond,MMMLU,HellaSwag,BoolQ,PIQA,ARC,WinoGrande,BBH,DROP,GSM8K,MATH,HumanEval,MBPP,MGSM"
    for name in (*names.split(","), "Global-MMLU-Lite", "LiveCodeBench", "AIME"):
        assert found[name]
    for task in found.values():
        assert not task.startswith("-") or len(task) > 20
