"""The scale benchmark as far as it runs in seconds: a tiny checkpoint of the public structure, phases that add up, figures on paper."""

import importlib
import json
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantkit.model.blocks import Skeleton, published_entries
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.streams import Stream
from quantkit.types import Batch

ROOT = Path(__file__).parents[1]
NAMES = ("wide", "operations", "scale")


@pytest.fixture(scope="module")
def benchmarks():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    modules = {name: importlib.import_module(name) for name in NAMES}
    yield Namespace(**modules)
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in NAMES:
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def tiny_shape(benchmarks):
    narrow = {"hidden": 128, "experts": 16, "active": 4, "expert": 64, "mlp": 96, "heads": 4, "head": 32, "kv": 2}
    return replace(benchmarks.wide.Shape(), **narrow, full_head=64, full_kv=1, vocabulary=8192)


def test_the_generator_makes_what_its_config_says_and_it_streams(benchmarks, tiny_shape, tmp_path):
    wide = benchmarks.wide
    largest = wide.make(tmp_path, 3, tiny_shape)
    checkpoint = Checkpoint(tmp_path)
    said = published_entries(checkpoint.config)
    assert {name: entry.shape for name, entry in checkpoint.entries.items()} == {name: entry.shape for name, entry in said.items()}
    assert largest == max(sum(e.bytes for n, e in said.items() if n.startswith(f"model.layers.{i}.")) for i in range(3))
    again = tmp_path / "again"
    wide.make(again, 3, tiny_shape)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) == 4
    assert all((tmp_path / name).read_bytes() == (again / name).read_bytes() for name in shards), "not the same weights twice"
    ids = torch.randint(0, tiny_shape.vocabulary, (8, 64), generator=torch.Generator().manual_seed(0))
    stream = Stream(Skeleton(checkpoint, torch.bfloat16), [Batch(ids, torch.ones_like(ids, dtype=torch.bool))])
    state, loads = stream.start(), []
    for index in range(3):
        with stream.skeleton.block(index) as block:
            block.experts.register_forward_pre_hook(lambda m, args: loads.append(torch.bincount(args[1].reshape(-1), minlength=16)))
            stream.advance(block, state)
        state.check(f"block {index}")
        hidden = state.hidden[0].float()
        assert 0.3 < float(hidden.square().mean().sqrt()) < 30
        loud = hidden.square().mean((0, 1)).sqrt().sort().values
        assert float(loud[-1] / loud.median()) > 4, "no channel is louder than others"
    assert all(int((load > 0).sum()) == 16 for load in loads), "an expert that no token reaches"
    assert all(float(load.max()) < 0.5 * 8 * 64 * 4 for load in loads), "one expert takes most of what is routed"
    logits = stream.logits(state, 0, slice(0, 8))
    assert bool(logits.isfinite().all())
    assert float(logits.std()) > 0.1


def test_phases_of_blocks_add_up_to_the_run(benchmarks, tmp_path):
    arguments = Namespace(shape="narrow", blocks=2, samples=2, length=64, recipe="awq-w4", threads=1, whole=30)
    narrow = replace(benchmarks.wide.SHAPES["dense-512"], hidden=64, mlp=96, heads=2, head=32, kv=1)
    benchmarks.wide.SHAPES["narrow"] = narrow
    lines = benchmarks.scale.measured(arguments, tmp_path)
    del benchmarks.wide.SHAPES["narrow"]
    rows = {line[:28].strip(): [float(word) for word in line[28:].split()] for line in lines if line[28:].replace(".", "").split() and
            all(word.replace(".", "").isdigit() for word in line[28:].split())}  # fmt: skip
    for phase in ("observing", "solving", "running the quantized block"):
        *blocks, whole = rows[phase]
        assert len(blocks) == 2
        assert whole == pytest.approx(sum(blocks), abs=0.11)
    floor = next(line for line in lines if line.startswith("the floor"))
    assert "times; blocks alone" in floor
    assert next(line for line in lines if "peak" in line).split("peak ")[1].split(" GiB")[0] > "0"


def test_figures_on_paper_follow_from_the_config(benchmarks):
    about = json.loads((ROOT / "docs" / "gemma-4-26b-a4b.json").read_text())
    blocks = benchmarks.operations.count(about, published_entries(about), 512)
    assert len(blocks) == 30
    assert [block.kind for block in blocks].count("full_attention") == 5
    hidden, expert, mlp = 2816, 704, 2112
    attention = hidden * (16 * 256 * 2 + 8 * 256 * 2)
    assert blocks[0].active == attention + 3 * hidden * mlp + 8 * 3 * hidden * expert
    assert blocks[5].active == hidden * (16 * 512 * 2 + 2 * 512) + 3 * hidden * mlp + 8 * 3 * hidden * expert  # its keys are its values
    assert blocks[0].forward == 2 * blocks[0].active + 2 * 128 * hidden + 4 * 16 * 256 * 512
    assert blocks[0].bytes == 1_628_189_954
    once, twice = (benchmarks.scale.paper(blocks, about, tokens) for tokens in (65536, 131072))

    def row(lines, name):
        return [float(word) for word in next(line for line in lines if line.startswith(name))[28:].split() if word != "s"]

    assert row(twice, "the quantized pass")[2] == pytest.approx(2 * row(once, "the quantized pass")[2], rel=0.01)
    assert row(twice, "solving") == row(once, "solving")
    assert row(once, "the quantized pass")[2] == pytest.approx(65536 * sum(b.forward for b in blocks) / 8e11, rel=0.01)
    assert "computed, not measured" in once[0]
