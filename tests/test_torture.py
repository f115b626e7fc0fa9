"""The short form of `make torture`: a few kills, full disks, memory, and some garbage for the doors that are quick."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture(scope="module")
def torture():
    sys.path.insert(0, BENCHMARKS)
    try:
        return importlib.import_module("torture")
    finally:
        sys.path.remove(BENCHMARKS)


def test_garbage_is_refused_in_one_line(torture, tmp_path):
    ways = [door for door in torture.doors.doors(tmp_path) if door.weight > 1 and door.name != "quantize"]
    counts = torture.mutations.fuzz(ways, tmp_path, 9, seed=1, most=400)
    assert counts.tried.total() >= 100
    assert counts.refused.total() > counts.tried.total() / 4, "damage that nobody notices"
    assert counts.examples == {}


def test_a_defect_is_found(torture, tmp_path):
    """A door without a guard: the harness must see a traceback, a write outside and damage that is called good."""
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "a.json").write_text('{"a": {"b": 1}}')

    def careless(copy: Path, work: Path):
        return lambda: json.loads((copy / "a.json").read_bytes())["a"]["b"] + 1 and (tmp_path / "outside").touch()

    silent = torture.mutations.Door("silent", tmp_path / "good", ["a.json"], lambda copy, work: ["recipes"], must_fail=True)
    counts = torture.mutations.fuzz(
        [torture.mutations.Door("careless", tmp_path / "good", ["a.json"], careless), silent], tmp_path, 20, most=80
    )
    assert counts.kinds["traceback"] > 0
    assert counts.kinds["outside"] > 0
    assert counts.kinds["silent"] > 30


def test_killed_runs_end_in_the_same_bytes(torture, tmp_path):
    found = torture.runs.kill(tmp_path, 4, 3, torture.time.monotonic() + 60, onnx=False)
    assert found["kills survived"] >= 2
    assert found["bytes compared"] > 0
    assert found["wrong"] == []


def test_a_full_disk_is_one_line_and_leaves_nothing_half(torture, tmp_path):
    found = torture.runs.starve(tmp_path, 3, 2, torture.time.monotonic() + 60, mount=False)
    assert found["faults injected"] == 3
    assert found["wrong"] == []


def test_memory_does_not_creep(torture, tmp_path):
    assert torture.runs.creep(tmp_path, 24, 4, 20)["wrong"] == []


def test_a_limit_of_memory_is_kept(torture, tmp_path):
    found = torture.runs.limits(tmp_path, torture.runs.QUICK)
    assert found["wrong"] == []
    assert found["most"] > found["limit"] / 3, "the figure that is asked for has to do with what is needed"
