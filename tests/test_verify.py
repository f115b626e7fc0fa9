"""verify finds what is wrong with a folder and says so in one line, and finds nothing wrong with a good one."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import published
import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from quantkit import pipeline, release
from quantkit.cli import main
from quantkit.publish.artefact import open_artefact
from quantkit.publish.loaders import parallel_sizes, verdicts
from quantkit.publish.manifest import write_manifest
from quantkit.publish.packed import Packed, Stored, distance, rounded
from quantkit.publish.verify import verify

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path) -> Path:
    return published.run(tmp_path) / "compressed-tensors"


def off(folder: Path, **options) -> list[str]:
    """What is off, as people read it."""
    ((_, found),) = release.verify(folder, **options)
    return [f"{one.check}: {one.text}" for one in found.findings if one.state == "off"]


def listed_anew(folder: Path) -> None:
    """The manifest lists the files as they are now: only what lies in them is wrong."""
    write_manifest(folder, published.report(), folder.name)


def shard_of(folder: Path, part: str) -> Path:
    return next(path for path in sorted(folder.glob("*.safetensors")) if any(part in name for name in load_file(path)))


def changed(folder: Path, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """One tensor whose name holds `part`, replaced; its name."""
    path = shard_of(folder, part)
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if part in name)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path, {"format": "pt"})
    return name


# --- A good folder ----------------------------------------------------------------------------------------------------------------


def test_a_good_run(tmp_path):
    result = CliRunner().invoke(main, ["verify", str(published.run(tmp_path)), "--base-model", str(published.model())])
    assert result.exit_code == 0, result.output
    assert "off " not in result.output
    unexplained, plain = (float(n) for n in re.findall(r"([\d.]+)%", re.search(r"ok +base .*", result.output)[0]))
    assert 0.3 < unexplained / plain < 3
    for engine in ("vLLM, NVIDIA GPUs", "vLLM, CPU", "transformers", "llama.cpp", "onnxruntime"):
        assert f" {engine}: " in result.output


def test_as_json(folder):
    result = CliRunner().invoke(main, ["verify", str(folder), "--json"])
    found = json.loads(result.stdout)[str(folder)]
    assert found["good"] is True
    assert {one["state"] for one in found["findings"]} == {"ok", "skipped"}


def test_errors_of_plain_rounding_are_the_report_s(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("description: x\nmethod: rtn\nscore: {samples: 0}\n")
    model = tiny.build("llama", tmp_path / "model", num_hidden_layers=2)
    pipeline.quantize(str(model), recipe=str(recipe), output=tmp_path / "out")
    artefact = open_artefact(tmp_path / "out")
    ((_, found),) = release.verify(tmp_path / "out", base_model=str(model))
    base = next(one for one in found.findings if one.check == "base")
    assert re.search(r"; (\d+) errors near the report's", base.text)
    artefact.run["blocks"][0]["linears"]["mlp.down_proj"]["error"] *= 1.5
    checkpoint = pipeline.open_checkpoint(str(model))
    lies = verify(artefact, release._weights(checkpoint, artefact), sample=100)
    assert [one.text.partition(":")[0] for one in lies.findings if one.state == "off"] == ["model.layers.0.mlp.down_proj"]


# --- Spoilt ones ------------------------------------------------------------------------------------------------------------------


def a_byte(folder: Path) -> str:
    path = shard_of(folder, "experts.0.down_proj.weight_packed")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return f"files: {path.name}: another SHA-256"


def cut_short(folder: Path) -> str:
    path = shard_of(folder, "experts.0.down_proj.weight_packed")
    path.write_bytes(path.read_bytes()[:-100])
    listed_anew(folder)
    return f"tensors: {path.name}: not a whole safetensors file"


def missing_file(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "files: tokenizer.json: listed in quantkit.json, and not there"


def foreign_code(folder: Path) -> str:
    (folder / "modeling.py").write_text("print(1)")
    return "files: modeling.py: code or a pickle"


def a_token(folder: Path) -> str:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "x": "hf_" + "a1B2" * 9}))
    listed_anew(folder)
    return "files: tokenizer_config.json: holds what looks like an access token"


def nan_scale(folder: Path) -> str:
    name = changed(folder, "q_proj.weight_scale", lambda t: t.index_fill(1, torch.tensor([0]), float("nan")))
    listed_anew(folder)
    return f"numbers: {name}: holds NaN"


def zero_scale(folder: Path) -> str:
    name = changed(folder, "up_proj.weight_scale", lambda t: t.index_fill(1, torch.tensor([1]), 0.0))
    listed_anew(folder)
    return f"numbers: {name}: a scale of 0"


def infinite_norm(folder: Path) -> str:
    name = changed(folder, "input_layernorm.weight", lambda t: t + float("inf"))
    listed_anew(folder)
    return f"numbers: {name}: holds infinity"


def wrong_shape(folder: Path) -> str:
    name = changed(folder, "o_proj.weight_scale", lambda t: t[:, :-1])
    listed_anew(folder)
    return f"tensors: {name}: shape 128 x"


def other_group(folder: Path) -> str:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"group_size": 32', '"group_size": 64'))
    listed_anew(folder)
    return "tensors: model.language_model.layers.0"


def ignored(folder: Path) -> str:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"].append("re:.*self_attn.*")
    path.write_text(json.dumps(config))
    listed_anew(folder)
    return "self_attn.q_proj: packed, and config.json leaves it out"


def deeper(folder: Path) -> str:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["num_hidden_layers"] = 3
    path.write_text(json.dumps(config))
    listed_anew(folder)
    return "tensors: config.json: num_hidden_layers 3, the files hold 2 layers"


def lost_in_the_index(folder: Path) -> str:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = sorted(index["weight_map"])[0]
    del index["weight_map"][name]
    path.write_text(json.dumps(index))
    listed_anew(folder)
    return f"tensors: model.safetensors.index.json: {name} is not in it"


def boasting_card(folder: Path) -> str:
    path = folder / "README.md"
    text = path.read_text()
    size = re.search(r"<b>Model Size</b></td>\s*<td[^>]*>([^<]+)<", text)[1]
    path.write_text(text.replace(size, "0.10 MB"))
    listed_anew(folder)
    return f"card: README.md: says size 0.10 MB, the weight files give {size}"


def scheme_without_bits(folder: Path) -> str:
    return _config(folder, lambda group: group["weights"].pop("num_bits"))


def scheme_without_targets(folder: Path) -> str:
    return _config(folder, lambda group: group.pop("targets"))


def _config(folder: Path, change: Callable[[dict[str, Any]], object]) -> str:
    config = json.loads((folder / "config.json").read_text())
    change(next(iter(config["quantization_config"]["config_groups"].values())))
    (folder / "config.json").write_text(json.dumps(config))
    listed_anew(folder)
    return "tensors: config.json: quantization_config cannot be read"


def hidden_below(folder: Path) -> str:
    (folder / "more").mkdir()
    (folder / "more" / "config.json").write_text("{}")
    return "files: more/config.json: not listed in quantkit.json"


SPOILS = (
    a_byte, cut_short, missing_file, foreign_code, a_token, nan_scale, zero_scale, infinite_norm, wrong_shape, other_group, ignored, deeper,
    lost_in_the_index, boasting_card, scheme_without_bits, scheme_without_targets, hidden_below,
)  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
def test_a_spoilt_folder_is_named(spoil, folder):
    says = spoil(folder)
    found = CliRunner().invoke(main, ["verify", str(folder)])
    assert found.exit_code == 1
    assert found.stderr == ""
    lines = [re.sub(r"^ *off +(\S+) +", r"\1: ", line) for line in found.stdout.splitlines() if line.startswith("  off")]
    assert any(says in line for line in lines), lines
    assert len(lines) <= 3 or spoil in (other_group, ignored), "what is wrong with many tensors has a line for each"


def test_another_model_s_weights(folder, tmp_path):
    other = tiny.build("gemma4_moe", tmp_path / "other", seed=1, num_experts=4, num_hidden_layers=2)
    found = off(folder, base_model=str(other))
    assert any("not the file that was quantized" in line for line in found)
    assert any("not explained by its codes; another base model?" in line for line in found)


def test_swapped_experts_are_found_though_every_hash_is_right(folder):
    path = shard_of(folder, "layers.1.experts.0.gate_proj.weight_packed")
    tensors = load_file(path)
    mine, yours = (f"model.language_model.layers.1.experts.{n}.gate_proj.weight_packed" for n in (0, 1))
    tensors[mine], tensors[yours] = tensors[yours], tensors[mine]
    save_file(tensors, path, {"format": "pt"})
    listed_anew(folder)
    run = {**published.report(), "bytes": {"compressed-tensors": sum(p.stat().st_size for p in folder.glob("*.safetensors"))}}
    (folder.parent / "run.json").write_text(json.dumps(run))
    assert off(folder) == []
    base = str(published.model())
    artefact = open_artefact(folder)
    found = verify(artefact, release._weights(pipeline.open_checkpoint(base), artefact), sample=1000)
    assert any("experts.0.gate_proj" in one.text for one in found.findings if one.state == "off")


@pytest.mark.parametrize("what", ["cut", "byte"])
def test_a_spoilt_gguf(what, tmp_path):
    folder = published.run(tmp_path) / "gguf"
    (path,) = folder.glob("*.gguf")
    content = path.read_bytes()
    if what == "cut":
        path.write_bytes(content[: len(content) // 2])
        listed_anew(folder)
        assert any("not a whole GGUF" in line for line in off(folder))
    else:  # a scale of the last tensor that is quantized: NaN in fp16
        import gguf

        last = [tensor for tensor in gguf.GGUFReader(str(path)).tensors if tensor.tensor_type.name == "Q4_0"][-1]
        spoilt = bytearray(content)
        spoilt[last.data_offset : last.data_offset + 2] = b"\x00\x7e"
        path.write_bytes(spoilt)
        listed_anew(folder)
        assert off(folder) == [f"numbers: {last.name}: holds NaN or infinity once decoded"]


@pytest.mark.parametrize("what", ["nothing", "a file", "an empty folder", "no manifest", "a broken manifest", "another format"])
def test_no_artefact_is_one_line(what, tmp_path, folder):
    place = tmp_path / "x"
    if what == "a file":
        place.write_text("x")
    elif what == "an empty folder":
        place.mkdir()
    elif what != "nothing":
        place = folder
        broken = {"no manifest": None, "a broken manifest": "[", "another format": '{"files": {}, "format": "exl3"}'}[what]
        (folder / "quantkit.json").unlink() if broken is None else (folder / "quantkit.json").write_text(broken)
    result = CliRunner().invoke(main, ["verify", str(place)])
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda m: m.pop("bits_per_weight"), "no bits_per_weight"),
        (lambda m: m.pop("recipe"), "no recipe"),
        (lambda m: m["files"].update({"config.json": "x"}), "no size and SHA-256 of config.json"),
        (lambda m: m["files"].update({"../run.json": {"bytes": 1, "sha256": "0"}}), "'../run.json' lies outside"),
    ],
)
def test_a_manifest_that_was_changed_is_one_line(change, says, folder):
    manifest = json.loads((folder / "quantkit.json").read_text())
    change(manifest)
    (folder / "quantkit.json").write_text(json.dumps(manifest))
    for command in (["verify", str(folder)], ["publish", str(folder), "--repo-id", "a/b", "--dry-run"]):
        result = CliRunner().invoke(main, command)
        assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1), result.output
        assert says in result.stderr


# --- Who loads it -----------------------------------------------------------------------------------------------------------------


def linear(kind: str, out: int, columns: int, group: int = 32, bits: int = 4, symmetric: bool = True) -> Stored:
    return Stored(f"model.layers.0.{kind}", 1, (out, columns), bits, group, symmetric, False)


def test_the_shape_of_a_26b_a4b_is_split_over_two_gpus():
    config = json.loads((ROOT / "docs" / "gemma-4-26b-a4b.json").read_text())["text_config"]
    linears = [linear("experts.0.gate_proj", 704, 2816), linear("experts.0.down_proj", 2816, 704), linear("mlp.down_proj", 2816, 2112)]
    sizes = parallel_sizes(config, linears)
    assert (sizes[1], sizes[2]) == ("", ""), "704/2 = 352 = 11 groups of 32"
    assert "704/4 = 176" in sizes[4]
    wider = parallel_sizes(config, [linear("experts.0.down_proj", 2816, 704, group=64)])
    assert wider[1] == ""
    assert "704/2 = 352 columns are no whole groups of 64" in wider[2]


class Known:
    """A folder of which only headers are known."""

    def __init__(self, linears, config=None, quantization=None, signed=False):
        self.stored, self.text_config, self.quantization = linears, config or {"hidden_size": 256}, quantization or {}
        self._signed = signed

    def signed(self):
        return self._signed


@pytest.mark.parametrize(
    "linears, config, engine, loads, why",
    [
        ([linear("mlp.down_proj", 64, 64, group=16)], {}, "vLLM, NVIDIA GPUs", "no", "groups of 16"),
        ([linear("mlp.down_proj", 64, 64, bits=8, symmetric=False)], {}, "vLLM, NVIDIA GPUs", "no", "8 bits with zero points"),
        ([linear("mlp.down_proj", 64, 64, bits=3)], {}, "vLLM, NVIDIA GPUs", "no", "3 bits"),
        ([linear("mlp.down_proj", 64, 64)], {}, "vLLM, CPU", "yes", "one process"),
        ([linear("mlp.down_proj", 64, 64, bits=8)], {}, "vLLM, CPU", "no", "takes 4"),
        ([linear("mlp.down_proj", 48, 64)], {}, "vLLM, CPU", "no", "48 x 64"),
        ([linear("experts.0.down_proj", 64, 64)], {}, "vLLM, CPU", "no", "no kernel"),
        ([linear("experts.0.down_proj", 64, 64)], {"model_type": "gemma4_text"}, "transformers", "if", "quantkit.hf.load_model"),
        ([linear("experts.0.down_proj", 64, 64, symmetric=False)], {"model_type": "qwen3_moe"}, "transformers", "no", "zero points"),
        ([linear("mlp.down_proj", 64, 64, symmetric=False)], {}, "transformers", "no", "dequantize"),
        ([linear("mlp.down_proj", 64, 64)], {}, "transformers", "yes", ""),
        ([linear("experts.0.gate_proj", 64, 160, group=64)], {"hidden_size": 160}, "vLLM, NVIDIA GPUs", "no", "160 is no whole number"),
        ([linear("experts.0.gate_proj", 64, 160)], {"hidden_size": 160}, "vLLM, NVIDIA GPUs", "yes", "no multiple of 128"),
    ],
)
def test_the_rules_of_engines(linears, config, engine, loads, why):
    verdict = next(one for one in verdicts(Known(linears, config)) if one.engine == engine)
    assert (verdict.loads, why in verdict.why) == (loads, True), verdict


@pytest.mark.parametrize("count, config", [(2, {"num_attention_heads": 9}), (8, {"num_key_value_heads": 3})])
def test_heads_are_split_too(count, config):
    assert "heads" in parallel_sizes(config, [])[count]
    assert parallel_sizes({"num_attention_heads": 8, "num_key_value_heads": 2}, [])[8] == "", "keys and values may repeat"


@pytest.mark.parametrize("name", ["gemma3n", "gemma4_e", "qwen3_moe", "gemma3_vision"])
def test_other_families_fit_their_config(name, tmp_path):
    (tmp_path / "r.yaml").write_text("description: x\nmethod: rtn\nscore: {samples: 0}\n")
    model = tiny.build(name, tmp_path / "model")
    pipeline.quantize(str(model), recipe=str(tmp_path / "r.yaml"), output=tmp_path / "out")
    assert off(tmp_path / "out", base_model=str(model)) == []
    assert len(Packed(tmp_path / "out" / "compressed-tensors").stored) > 4


# --- The measure ------------------------------------------------------------------------------------------------------------------


def test_a_distance_does_not_see_folds_and_sees_all_else():
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    columns, rows = torch.rand(128) + 0.5, torch.rand(64, 1) + 0.5
    folded = weight * columns * rows
    assert distance(weight, folded) < 1e-8
    plain = distance(weight, rounded(weight, 4, 32))
    assert plain < distance(weight, rounded(folded, 4, 32)) < 3 * plain, "folds make other groups, not another weight"
    assert distance(weight, folded.roll(1, 0)) > 0.9
    assert distance(weight, -folded.abs()) > 0.3
    halves = rounded(weight, 4, 32)
    halves[:, 64:] = 0
    assert distance(weight, halves) == pytest.approx(0.5, abs=0.05)


# --- ONNX, which another room will write -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["good", "cut", "a NaN", "a block of 24", "no genai", "no graph"])
def test_an_onnx_folder(what, tmp_path):
    onnx = pytest.importorskip("onnx", reason="the extra onnx")
    pytest.importorskip("onnx_ir", reason="the extra onnx")
    import numpy
    from onnx import helper, numpy_helper

    folder = tmp_path / "run" / "onnx"
    folder.mkdir(parents=True)
    scale = numpy.full((8, 2), numpy.nan if what == "a NaN" else 0.5, numpy.float32)
    tensors = [numpy_helper.from_array(numpy.zeros((8, 2, 16), numpy.uint8), "codes"), numpy_helper.from_array(scale, "scale")]
    block = 24 if what == "a block of 24" else 32
    multiply = helper.make_node(
        "MatMulNBits", ["x", "codes", "scale"], ["y"], "multiply", domain="com.microsoft", K=64, N=8, bits=4, block_size=block
    )
    ends = [helper.make_tensor_value_info(name, 1, ["rows", width]) for name, width in (("x", 64), ("y", 8))]
    graph = helper.make_graph([multiply], "g", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)])
    place = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 0}
    onnx.save_model(model, folder / "model.onnx", **place)
    if what != "no genai":
        (folder / "genai_config.json").write_text("{}")
    if what == "no graph":
        (folder / "model.onnx").write_bytes(b"")
    if what == "cut":
        (folder / "model.onnx.data").write_bytes((folder / "model.onnx.data").read_bytes()[:-1])
    size = (folder / "model.onnx.data").stat().st_size
    bits = round(size * 8 / 512, 4)
    run = {**published.report(), "bytes": {"onnx": size}, "bits_per_weight": {"onnx": bits}, "parameters": 512}
    (folder.parent / "run.json").write_text(json.dumps(run))
    write_manifest(folder, run, "onnx")
    assert CliRunner().invoke(main, ["card", str(folder)]).exit_code == 0
    wrong = {
        "cut": "lies up to byte",
        "a NaN": "scale: holds NaN",
        "a block of 24": "blocks of 24",
        "no genai": "genai_config.json: missing",
        "no graph": "model.onnx: holds no tensor",
    }
    found = off(folder)
    assert [wrong.get(what, "?") in line for line in found] == [True] * (what != "good")
