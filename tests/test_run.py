"""Streams of a run, block by block: they stay in step whatever of a block is solved, recalled or left alone."""

import hashlib

import pytest
import tiny
import torch
import yaml

from quantkit import pipeline
from quantkit.recipe import load_recipe
from quantkit.run import Run

SMALL = {"exponents": 2, "rows": 16, "shrinks": 2}
FIRST_KEPT = [{"match": "*", "layers": [0], "keep": True}]


def quantized(tmp_path, name, recipe="awq-w4", search=None, **fields):
    path = tmp_path / "recipe.yaml"
    given = load_recipe(recipe).model_dump(mode="json", exclude={"name"})
    given["search"] |= SMALL | (search or {})
    given["calibration"] |= {"samples": 4, "sequence_length": 64}
    path.write_text(yaml.safe_dump(given | {"score": {"samples": 2, "sequence_length": 64}} | fields))
    result = pipeline.quantize(str(tmp_path / "model"), recipe=str(path), output=tmp_path / name)
    files = sorted(result.artefacts["compressed-tensors"].glob("*.safetensors"))
    return result.report, [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


@pytest.mark.parametrize("search", [{}, {"output_grams": False}, {"output_grams": False, "sensitivity": False}, {"retarget": 0.0}])
@pytest.mark.parametrize("family", ["llama", "gemma4_moe"])
def test_a_block_that_is_kept_whole_is_passed_by_all_streams(family, search, tmp_path, monkeypatch):
    tiny.build(family, tmp_path / "model", num_hidden_layers=2)
    behind, block = [], Run.block

    def watched(self, plan):
        about = block(self, plan)
        behind.append([torch.cat([hidden.flatten() for hidden in state.hidden]) for state in (self.calibrated, self.reference)])
        return about

    monkeypatch.setattr(Run, "block", watched)
    report, _ = quantized(tmp_path, "out", search=search, overrides=FIRST_KEPT)
    assert not report["blocks"][0]["linears"]
    assert report["blocks"][1]["linears"]
    assert torch.equal(*behind[0])
    assert not torch.equal(*behind[1])


@pytest.mark.parametrize("recipe", ["fast", "rtn-w4"])
def test_so_it_is_without_stages(recipe, tmp_path):
    tiny.build("llama", tmp_path / "model", num_hidden_layers=2)
    report, _ = quantized(tmp_path, "out", recipe, overrides=FIRST_KEPT)
    assert [bool(block["linears"]) for block in report["blocks"]] == [False, True]


def test_a_run_killed_behind_it_ends_in_the_same_bytes(tmp_path, monkeypatch):
    tiny.build("llama", tmp_path / "model", num_hidden_layers=3)
    _, whole = quantized(tmp_path, "whole", overrides=FIRST_KEPT)
    block = Run.block

    def killed(self, plan):
        if plan.index == 2:
            raise KeyboardInterrupt
        return block(self, plan)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "block", killed)
        with pytest.raises(KeyboardInterrupt):
            quantized(tmp_path, "out", overrides=FIRST_KEPT)
    assert quantized(tmp_path, "out", overrides=FIRST_KEPT)[1] == whole
