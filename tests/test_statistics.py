"""Statistics on disk: what is read is what was written, and nothing that is damaged, foreign or impossible is read at all."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantkit import pipeline
from quantkit.calibrate.statistics import FORMAT, read_statistics, save_statistics
from quantkit.cli import main
from quantkit.errors import CalibrationError
from quantkit.types import Statistics

RECIPE = "description: x\ncalibration: {tokens: 1500, sequence_length: 64, expert_tokens: 60, reserve: 1.0}\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path, dict]:
    """(model, file, report) of a run with experts, a reserve and Grams."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny.build("gemma4_moe", folder / "model", num_hidden_layers=2)
    (folder / "r.yaml").write_text(RECIPE)
    about = pipeline.calibrate(str(model), output=folder / "s.safetensors", recipe=str(folder / "r.yaml"), grams=True)
    return model, folder / "s.safetensors", about


def assert_equal(one: Statistics, other: Statistics) -> None:
    assert one.cells == other.cells
    assert one.about == other.about
    for a, b in zip(one.blocks, other.blocks, strict=True):
        for kind in ("inputs", "reserve"):
            ours, theirs = getattr(a, kind), getattr(b, kind)
            assert ours.keys() == theirs.keys()
            for local, stats in ours.items():
                assert stats.tokens == theirs[local].tokens
                for part in ("abs", "square", "gram"):
                    x, y = getattr(stats, part), getattr(theirs[local], part)
                    assert (x is None) == (y is None)
                    assert x is None or torch.equal(x, y)
        for kind in ("routing", "topped_up"):
            ours, theirs = getattr(a, kind), getattr(b, kind)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_is_read_is_what_was_written(made, tmp_path):
    _, file, about = made
    first = read_statistics(file)
    save_statistics(tmp_path / "again.safetensors", first)
    assert_equal(read_statistics(tmp_path / "again.safetensors"), first)
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    assert first.about["calibration"] == about["calibration"]
    assert [path.name for path in tmp_path.iterdir()] == ["again.safetensors"]


def test_the_file_holds_what_the_model_was_fed(made):
    statistics = read_statistics(made[1])
    total = statistics.about["calibration"]["tokens"]
    assert total == pytest.approx(1500, rel=0.05)
    for block in statistics.blocks:
        assert block.inputs["self_attn.q_proj"].tokens == total
        assert torch.allclose(block.inputs["self_attn.q_proj"].gram.diagonal(), block.inputs["self_attn.q_proj"].square, rtol=1e-4)
        routing = block.routing["experts"]
        assert routing.sum() == total * 2, "two experts a token"
        assert routing.shape == (len(statistics.cells), 8)
        for expert in range(8):
            for leaf in ("gate_proj", "up_proj", "down_proj"):
                assert block.inputs[f"experts.{expert}.{leaf}"].tokens == routing[:, expert].sum()
    assert len(statistics.cells) == 20
    assert len(statistics.about["samples"]) == statistics.about["calibration"]["rows"]


def test_shared_inputs_stand_once(made):
    with safe_open(made[1], "pt") as file:
        names = set(file.keys())
        inputs = json.loads(file.metadata()["quantkit.statistics"])["inputs"]
    assert "blocks.0.self_attn.q_proj.square" in names
    assert "blocks.0.self_attn.k_proj.square" not in names
    assert inputs["blocks.0.self_attn.k_proj"] == "blocks.0.self_attn.q_proj"
    assert inputs["blocks.0.experts.up_proj"] == "blocks.0.experts.gate_proj"
    assert load_file(made[1])["blocks.0.experts.down_proj.square"].shape == (8, 96)


def test_two_runs_leave_the_same_bytes(made, tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    pipeline.calibrate(str(made[0]), output=tmp_path / "s.safetensors", recipe=str(tmp_path / "r.yaml"), grams=True)
    assert (tmp_path / "s.safetensors").read_bytes() == made[1].read_bytes()


# --- Refused ----------------------------------------------------------------------------------------------------------------------


def rewritten(source: Path, target: Path, change) -> Path:
    """The file with tensors or metadata changed and everything else, the digest too, as it was."""
    with safe_open(source, "pt") as file:
        header = json.loads(file.metadata()[FORMAT])
    tensors = load_file(source)
    change(tensors, header)
    save_file(tensors, target, {FORMAT: json.dumps(header)} if header else {"format": "pt"})
    return target


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t, m: t["blocks.0.self_attn.q_proj.square"].mul_(2), "damaged"),
        (lambda t, m: t.pop("routing.1.experts"), "damaged"),
        (lambda t, m: m.update(about="{}"), "damaged"),
        (lambda t, m: m.pop("sha256"), "damaged"),
        (lambda t, m: m.update(version=2), "of version 2, this quantkit reads 1"),
        (lambda t, m: m.pop("version"), "cannot be read"),
        (lambda t, m: m.clear(), "not a file of statistics"),
    ],
)
def test_a_changed_file_is_refused(change, words, made, tmp_path):
    path = rewritten(made[1], tmp_path / "s.safetensors", change)
    with pytest.raises(CalibrationError, match=words):
        read_statistics(path)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_one_flipped_bit_is_refused(place, made, tmp_path):
    data = bytearray(made[1].read_bytes())
    header = 8 + struct.unpack("<Q", data[:8])[0]
    data[header + int((len(data) - header) * place)] ^= 16
    (tmp_path / "s.safetensors").write_bytes(data)
    with pytest.raises(CalibrationError, match="damaged"):
        read_statistics(tmp_path / "s.safetensors")


@pytest.mark.parametrize("keep", [0, 7, 100, 5000])
def test_a_cut_file_is_refused(keep, made, tmp_path):
    (tmp_path / "s.safetensors").write_bytes(made[1].read_bytes()[:keep])
    with pytest.raises(CalibrationError, match=r"s.safetensors: cannot be read"):
        read_statistics(tmp_path / "s.safetensors")
    with pytest.raises(CalibrationError, match=r"none: cannot be read"):
        read_statistics(tmp_path / "none")


def test_impossible_sums_are_refused(made, tmp_path):
    statistics = read_statistics(made[1])
    statistics.blocks[0].inputs["self_attn.q_proj"].square[0] = -1.0
    save_statistics(tmp_path / "s.safetensors", statistics)
    with pytest.raises(CalibrationError, match=r"blocks.0.self_attn.q_proj.square holds negative"):
        read_statistics(tmp_path / "s.safetensors")


# --- The command ------------------------------------------------------------------------------------------------------------------


def test_the_command_prints_what_was_fed_and_who_was_reached(made, tmp_path):
    shutil.copy(made[1].parent / "r.yaml", tmp_path)
    options = ["--output", str(tmp_path / "s.safetensors"), "--recipe", str(tmp_path / "r.yaml")]
    ran = CliRunner().invoke(main, ["calibrate", str(made[0]), *options])
    assert ran.exit_code == 0, ran.output
    lines = ran.stdout.splitlines()
    assert lines[0].split() == ["language", "agentic", "stem", "tokens", "experts"]
    assert [line.split()[0] for line in lines[1:11]] == ["ar", "en", "es", "fr", "hi", "ja", "ko", "nl", "ru", "zh"]
    assert lines[11].split()[0] == "all"
    assert any(line.startswith("block 1: of 8 experts the least fed is ") for line in lines)
    assert any(line.startswith("reserve: ") for line in lines)
    assert any(line == f"digest of all token ids: {made[2]['calibration']['digest']}" for line in lines)
    assert lines[-1] == str(tmp_path / "s.safetensors")
    with_json = CliRunner().invoke(main, ["calibrate", str(made[0]), *options, "--json"])
    assert json.loads(with_json.stdout)["calibration"]["digest"] == made[2]["calibration"]["digest"]


def test_a_folder_that_is_not_there_is_told_before_the_run(made, tmp_path):
    ran = CliRunner().invoke(main, ["calibrate", str(made[0]), "--output", str(tmp_path / "no" / "s.safetensors")])
    assert ran.exit_code == 1
    assert "there is no such folder" in ran.stderr
