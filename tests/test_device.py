"""The path of a GPU: on one where there is one, else on a second device that refuses what a GPU would (second_device.py)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_streaming import batches, checkpoint, one_thread, root  # noqa: F401

from quantkit.cli import main
from quantkit.model.blocks import Skeleton
from quantkit.model.memory import Memory
from quantkit.model.streams import Stream

HERE = Path(__file__).parent


def test_another_device_solves_the_same_and_runs_as_well():
    done = subprocess.run([sys.executable, str(HERE / "device_run.py")], capture_output=True, text=True, check=False, cwd=HERE)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout[done.stdout.index('{"device"') :])
    if not told["device"].startswith("cuda"):  # a GPU's products add in another order
        assert told["blocks"] == {key: [] for key in told["blocks"]}
    assert set(told["runs"]) == {"llama", "gemma4_moe"}
    for family, run in told["runs"].items():
        assert run["device"] == told["device"].partition(":")[0] != "cpu"
        assert len(run["guarded"]) <= (9 if family == "gemma4_moe" else 0), run["guarded"]
        here, there = run["error"]
        assert abs(there - here) < 0.05 * here, family
        here, there = run["kl"]
        assert abs(there - here) < 0.3 * here, family


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "nonsense"])
def test_a_device_that_is_not_there_is_one_line(device, tmp_path):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is there")
    done = CliRunner().invoke(main, ["quantize", "--device", device, "--output", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"quantkit: --device {device}: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama", "gemma4_moe", "gemma3n_text"])
def test_blocks_made_ahead_are_the_same(name, root):  # noqa: F811
    found = []
    for ahead in (False, True):
        stream = Stream(Skeleton(checkpoint(name, "float32", root), torch.float32, ahead=ahead), batches(60))
        state = stream.start()
        for index in (0, 1, 2):
            with stream.skeleton.block(index) as block:
                stream.advance(block, state)
            stream.close()
        found.append(torch.stack(list(state.hidden[:1])))
    assert torch.equal(*found)


def test_a_block_that_was_not_made_ahead_is_made(root):  # noqa: F811
    skeleton = Skeleton(checkpoint("llama", "float32", root), torch.float32, ahead=True)
    with skeleton.block(0):
        pass
    with skeleton.block(2) as block:
        weight = block.self_attn.q_proj.weight.clone()
    with Skeleton(checkpoint("llama", "float32", root), torch.float32).block(2) as block:
        assert torch.equal(block.self_attn.q_proj.weight, weight)


def test_what_the_device_has_no_room_for_waits_in_memory(monkeypatch):
    class Far(torch.Tensor):
        device = torch.device("meta")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    memory = Memory(there=8 * 4)
    first, second = (memory.keep(torch.zeros(8).as_subclass(Far)) for _ in range(2))
    assert type(first) is Far
    assert type(second) is torch.Tensor
    assert memory.held_there == 32
    del first
    assert memory.held_there == 0
