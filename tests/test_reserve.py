"""quantize with a reserve: experts below the floor are solved from more, everything else from what it was; memory changes no byte."""

import hashlib
from pathlib import Path

import pytest
import tiny
import yaml

from quantkit import pipeline
from quantkit.errors import RecipeError
from quantkit.recipe import load_recipe

SMALL = {"search": {"exponents": 2, "rows": 16, "shrinks": 2, "hold_out": False}, "score": {"samples": 2, "sequence_length": 64}}


def run(tmp_path: Path, name: str, max_memory: int | None = None, **calibration) -> tuple[dict, dict[str, str]]:
    recipe = tmp_path / f"{name}.yaml"
    fields = {**load_recipe("awq-w4").model_dump(mode="json", exclude={"name"}), **SMALL}
    fields["calibration"] |= {"tokens": 1200, "sequence_length": 128, **calibration}
    recipe.write_text(yaml.safe_dump(fields))
    result = pipeline.quantize(str(tmp_path / "model"), recipe=str(recipe), output=tmp_path / name, max_memory=max_memory)
    files = sorted(result.artefacts["compressed-tensors"].glob("*.safetensors"))
    return result.report, {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(params=["gemma4_moe", "qwen3_moe"])
def model(request, tmp_path) -> Path:
    tiny.build(request.param, tmp_path / "model", num_hidden_layers=2)
    return tmp_path


def test_hungry_experts_get_more_and_others_do_not(model):
    plain, _ = run(model, "plain")
    fed, _ = run(model, "fed", expert_tokens=200, reserve=1.0)
    floor_was_met = False
    for before, after, coverage in zip(plain["blocks"], fed["blocks"], fed["coverage"], strict=True):
        assert coverage["tokens"] == before["experts"] or coverage["block"] > 0, "later blocks see other roundings"
        for expert, natural in enumerate(coverage["tokens"]):
            if natural >= 200:
                assert after["experts"][expert] == natural
            else:
                assert after["experts"][expert] == natural + coverage["reserve_tokens"][expert]
                floor_was_met |= after["experts"][expert] >= 200
    assert floor_was_met


def test_a_reserve_that_nothing_would_draw_is_refused(tmp_path):
    source = str(tiny.build("qwen3_moe", tmp_path / "model", num_hidden_layers=1))
    (tmp_path / "r.yaml").write_text(
        "description: x\nsearch: {stages: false}\ncalibration: {tokens: 1200, sequence_length: 64, expert_tokens: 200, reserve: 1.0}\n"
    )
    for job in (pipeline.plan, pipeline.quantize):
        with pytest.raises(RecipeError, match=r"r: calibration\.expert_tokens 200 needs search\.stages"):
            job(source, recipe=str(tmp_path / "r.yaml"))
    about = pipeline.calibrate(source, recipe=str(tmp_path / "r.yaml"), output=tmp_path / "s.safetensors")
    assert about["calibration"]["reserve_tokens"] > 0, "statistics of their own draw from it whatever the solver does"
    assert max(about["coverage"][0]["reserve_tokens"]) > 0


def test_memory_changes_no_byte(model, monkeypatch):
    monkeypatch.setattr("quantkit.pipeline.left_for_activations", lambda plan, limit, staged: limit)
    free, files = run(model, "free", expert_tokens=200)
    tight, same = run(model, "tight", max_memory=1, expert_tokens=200)
    assert (free["spilled"], tight["spilled"] > 0) == (0, True)
    assert files == same


def test_prompts_that_are_ignored_are_not_solved_for(model):
    whole, files = run(model, "whole", tokens=5000, sequence_length=512)
    answers, others = run(model, "answers", tokens=5000, sequence_length=512, ignore_prompts=True)
    assert answers["blocks"][0]["linears"]["self_attn.q_proj"]["tokens"] < whole["blocks"][0]["linears"]["self_attn.q_proj"]["tokens"]
    assert files != others
