"""Several ranks by torchrun, gloo on the CPU: the bytes are those of one, whatever is shared out; one that dies is one line."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from quantkit import pipeline
from quantkit.errors import RankError
from quantkit.ranks import Ranks
from quantkit.recipe import load_recipe
from quantkit.types import InputStats

FIELDS = {
    "score": {"samples": 3, "sequence_length": 64},
    "search": {"exponents": 2, "rows": 16, "shrinks": 2},
}


def recipe_file(folder: Path, base: str, **calibration) -> str:
    fields = load_recipe(base).model_dump(mode="json", exclude={"name"})
    fields["search"] |= FIELDS["search"]
    fields["calibration"] |= {"tokens": 1500, "sequence_length": 128, **calibration}
    path = folder / f"{base}.yaml"
    path.write_text(yaml.safe_dump({**fields, "score": FIELDS["score"]}))
    return str(path)


def command(ranks: int, *options: str) -> list[str]:
    if ranks == 1:
        return [sys.executable, "-m", "quantkit", "quantize", *options]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*torchrun, "-m", "quantkit", "quantize", *options]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def run(ranks: int, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(ranks, *options), capture_output=True, text=True, env=environment(), check=False)


def digests(out: Path) -> dict[str, str]:
    files = sorted([*out.rglob("solved/*.safetensors"), *out.rglob("compressed-tensors/*.safetensors")])
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def scores(out: Path) -> dict:
    about = json.loads((out / "run.json").read_text())
    return {key: about[key] for key in ("heldout", "coverage", "blocks", "bytes")}


@pytest.mark.parametrize(
    ("family", "base", "ranks", "calibration"),
    [
        ("gemma4_moe", "awq-w4", 2, {"expert_tokens": 200, "reserve": 1.0, "batch_tokens": 256}),  # folds, stages, experts and a reserve
        ("llama", "fast", 3, {"batch_tokens": 512}),  # one stage; more ranks than there is to solve; weights that are copied
    ],
)
def test_ranks_write_the_bytes_of_one(family, base, ranks, calibration, tmp_path):
    model = tiny.build(family, tmp_path / "model", num_hidden_layers=2)
    if family == "llama":
        tiny.train(model, "layers.1.mlp")
    recipe = recipe_file(tmp_path, base, **calibration)
    for count, name in ((1, "one"), (ranks, "several")):
        done = run(count, str(model), "--recipe", recipe, "--output", str(tmp_path / name))
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("held-out") == 1, "one rank speaks"
    assert digests(tmp_path / "one") == digests(tmp_path / "several")
    assert scores(tmp_path / "one") == scores(tmp_path / "several")
    assert json.loads((tmp_path / "several" / "run.json").read_text())["ranks"] == ranks
    if "reserve" in calibration:
        assert any(sum(block["reserve_tokens"]) for block in scores(tmp_path / "one")["coverage"])


def test_a_rank_that_dies_is_one_line_and_the_run_goes_on_with_another_number_of_ranks(tmp_path):
    model = tiny.build("qwen3_moe", tmp_path / "model", num_hidden_layers=3)
    recipe = recipe_file(tmp_path, "awq-w4", batch_tokens=256)
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    with subprocess.Popen(
        command(2, str(model), "--recipe", recipe, "--output", str(torn)),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        while process.poll() is None and not list(torn.glob("solved/block-*.safetensors")):
            time.sleep(0.02)
        assert process.poll() is None, "it ended before a block was solved"
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        victim = next(int(pid) for pid in children if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes())
        os.kill(victim, signal.SIGKILL)
        _, said = process.communicate()
    assert process.returncode != 0
    assert not (torn / "run.json").exists()
    ours = [line for line in said.splitlines() if line.startswith("quantkit: ")]
    assert ours == ["quantkit: another rank of this run is gone; the same command goes on where it stopped"]
    assert run(1, str(model), "--recipe", recipe, "--output", str(torn)).returncode == 0
    assert run(1, str(model), "--recipe", recipe, "--output", str(whole)).returncode == 0
    assert digests(whole) == digests(torn)


def test_what_all_ranks_refuse_is_said_once(tmp_path):
    done = run(2, str(tmp_path / "no model"), "--output", str(tmp_path / "out"))
    assert done.returncode != 0
    assert sum(line.startswith("quantkit: ") for line in done.stderr.splitlines()) == 1


def test_ranks_that_would_calibrate_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RankError, match="without torchrun"):
        pipeline.calibrate(output=tmp_path / "stats.safetensors")
    assert not list(tmp_path.iterdir())


def test_machines_that_read_other_files_are_refused(monkeypatch):
    heard = [{"a.safetensors": "1", "b.json": "2"}, None, {"a.safetensors": "1", "b.json": "3"}]
    monkeypatch.setattr(Ranks, "told", lambda self, mine: heard)
    with pytest.raises(RankError, match=r"b\.json: differs"):
        Ranks(0, 3).agreed(heard[0])
    heard[2] = heard[0]
    assert Ranks(0, 3).agreed(heard[0]) == heard[0]


def test_one_process_is_a_rank_of_one():
    with Ranks.join("cpu") as ranks:
        assert (ranks.rank, ranks.size, ranks.first) == (0, 1, True)
        assert list(ranks.share([1, 2, 3])) == [1, 2, 3]
        assert ranks.told({"a": 1}) == [{"a": 1}]
        sums = {"q": InputStats(1, torch.ones(2), torch.ones(2), None)}
        assert ranks.swap().gathered(sums)["q"] is sums["q"]
