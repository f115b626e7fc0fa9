"""Activations beyond the budget lie in files; no bit changes, forks stay apart, and what is let go is given back."""

import gc
import os
import re
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner

from quantkit import pipeline
from quantkit.calibrate.observe import observe
from quantkit.cli import main
from quantkit.errors import CheckpointError
from quantkit.model.blocks import Skeleton
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.memory import Activations, Memory, resident
from quantkit.model.streams import Stream
from quantkit.types import Batch

KIB = 1024


def tensor(seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)  # 2 KiB in bf16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_spilled_comes_back_to_the_bit(dtype, tmp_path):
    memory = Memory(0, tmp_path)
    held = Activations((tensor(n, dtype) for n in range(5)), memory)
    assert memory.spilled == 5 * tensor(0, dtype).nbytes
    assert memory.held == 0
    for number, one in enumerate(held):
        assert one.dtype == dtype
        assert torch.equal(one, tensor(number, dtype))
    assert list(tmp_path.iterdir()) == [], "the files have no names"


def test_the_limit_is_kept_and_room_is_given_back(tmp_path):
    memory = Memory(5 * KIB, tmp_path)
    held = Activations((tensor(n) for n in range(4)), memory)
    assert (memory.held, memory.spilled) == (4 * KIB, 4 * KIB), "two in memory, two not"
    held[0] = tensor(7)
    assert memory.held == 4 * KIB, "what it replaces made room"
    assert memory.spilled == 4 * KIB
    assert [torch.equal(held[n], tensor(n)) for n in range(1, 4)] == [True] * 3
    assert torch.equal(held[0], tensor(7))
    del held
    gc.collect()
    assert memory.held == 0


@pytest.mark.parametrize("limit", [0, 3 * KIB, None])
def test_forks_share_until_one_moves(limit, tmp_path):
    one = Activations((tensor(n) for n in range(3)), Memory(limit, tmp_path))
    other = one.fork()
    before = one.memory.spilled
    assert other[0] is one[0], "nothing is copied"
    one[0] = tensor(10)
    other[1] = tensor(11)
    assert [torch.equal(t, tensor(n)) for t, n in zip(one, (10, 1, 2), strict=True)] == [True] * 3
    assert [torch.equal(t, tensor(n)) for t, n in zip(other, (0, 11, 2), strict=True)] == [True] * 3
    assert one.memory.spilled - before <= 2 * 2 * KIB


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells a process its mappings")
def test_files_go_with_their_tensors(tmp_path):
    memory = Memory(0, tmp_path)
    name = f"{tmp_path}/"
    count = lambda: sum(name in line for line in Path("/proc/self/maps").read_text().splitlines())  # noqa: E731
    held = Activations((tensor(n) for n in range(4)), memory)
    assert count() == 4
    for turn in range(20):
        held[turn % 4] = tensor(turn)
    assert count() == 4
    del held
    gc.collect()
    assert count() == 0
    assert len(os.listdir("/proc/self/fd")) < 200


def test_no_limit_touches_no_disk(tmp_path):
    memory = Memory(None, tmp_path / "not there")
    assert Activations([tensor(0)], memory)[0] is not None
    assert memory.spilled == 0


@pytest.mark.parametrize("name", ["gemma4_moe", "gemma4_e", "gemma3n_text", "llama"])
def test_a_model_streams_the_same_with_and_without_room(name, tmp_path):
    """Hidden states behind every block, two streams of which one is edited, statistics and logits."""
    source = Checkpoint(tiny.build(name, tmp_path / "model"))
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(20, 300, (2, length), generator=generator) for length in (48, 40, 33)]
    work = [Batch(one, torch.ones_like(one, dtype=torch.bool)) for one in ids]
    seen = []
    for limit in (None, 0, 30 * KIB):
        memory = Memory(limit, tmp_path)
        stream = Stream(Skeleton(source, torch.bfloat16, memory), work)
        state = stream.start()
        other = state.fork()
        found = []
        for index in range(len(stream.skeleton.blocks)):
            with stream.skeleton.block(index) as block:
                found += [stats.square for stats in observe(stream, block, state, move=True).values()]
                block.mlp.down_proj.weight.data.mul_(1.1) if hasattr(block.mlp, "down_proj") else None
                stream.advance(block, other)
            stream.close()
            found += [hidden.clone() for hidden in (*state.hidden, *other.hidden)]
        found += [stream.logits(one, 1, slice(3, 20)) for one in (state, other)]
        seen.append(found)
        assert bool(memory.spilled) == (limit is not None)
    for found in seen[1:]:
        assert len(found) == len(seen[0])
        assert all(torch.equal(a, b) for a, b in zip(found, seen[0], strict=True))


def test_a_small_budget_leaves_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("quantkit.pipeline.left_for_activations", lambda plan, limit, staged: limit)
    model = tiny.build("gemma4_moe", tmp_path / "model", num_hidden_layers=3)
    (tmp_path / "r.yaml").write_text("description: x\ncalibration: {tokens: 2000, sequence_length: 64, expert_tokens: 200}\n")
    about = {}
    for name, limit in (("free", None), ("tight", 1)):
        about[name] = pipeline.calibrate(
            str(model), output=tmp_path / f"{name}.safetensors", recipe=str(tmp_path / "r.yaml"), max_memory=limit
        )
    assert about["free"]["spilled"] == 0
    assert about["tight"]["spilled"] > 2000 * 128 * 2 * 3
    assert (tmp_path / "free.safetensors").read_bytes() == (tmp_path / "tight.safetensors").read_bytes()


def test_a_budget_that_cannot_be_kept_is_refused_with_the_figure_that_can(tmp_path):
    model = tiny.build("llama", tmp_path / "model", num_hidden_layers=1)
    (tmp_path / "r.yaml").write_text("description: x\ncalibration: {samples: 4, sequence_length: 64}\nscore: {samples: 0}\n")
    recipe = str(tmp_path / "r.yaml")
    with pytest.raises(CheckpointError, match="a memory of 1,000 bytes is too small: at least ") as refusal:
        pipeline.quantize(str(model), recipe=recipe, output=tmp_path / "out", max_memory=1000)
    needed = int(re.search(r"at least ([\d,]+) are", str(refusal.value))[1].replace(",", ""))
    assert needed > resident()
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    result = pipeline.quantize(str(model), recipe=recipe, output=tmp_path / "out", max_memory=needed + (64 << 20))  # this process may grow
    assert result.report["spilled"] == 0


def test_the_command_takes_sizes_as_people_write_them(tmp_path, monkeypatch):
    monkeypatch.setattr("quantkit.model.memory.resident", lambda: 0)
    monkeypatch.setattr("quantkit.model.memory.LOADED_LATER", 0)
    monkeypatch.setattr("quantkit.model.memory.BESIDE_ACTIVATIONS", {False: 0, True: 0})
    model = tiny.build("llama", tmp_path / "model", num_hidden_layers=1)
    (tmp_path / "r.yaml").write_text("description: x\ncalibration: {samples: 4, sequence_length: 64}\n")
    options = ["calibrate", str(model), "--recipe", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "s.safetensors")]
    for size, spills in (("1kb", True), ("0.5 GiB", False), ("100000000000", False)):
        ran = CliRunner().invoke(main, [*options, "--max-memory", size])
        assert ran.exit_code == 0, ran.output
        assert ("bytes spilled" in ran.stdout) == spills
    ran = CliRunner().invoke(main, [*options, "--max-memory", "much"])
    assert ran.exit_code == 2
    assert "such as 8GiB" in ran.stderr
