"""ONNX folders: their bytes, and a few families in onnxruntime and onnxruntime-genai. All of them: benchmarks/engines/verify_onnx.py."""

import json
import re
from pathlib import Path

import numpy as np
import onnx_runs
import pytest
import tiny
import torch
import transformers
import yaml
from safetensors.torch import load_file

from quantkit import pipeline
from quantkit.errors import CheckpointError, WriteError
from quantkit.families.family import TOWERS, matches, outside_block
from quantkit.grid.integer import pack, unpack
from quantkit.recipe import load_recipe
from quantkit.write.onnx import artefact
from quantkit.write.onnx.layout import ALIGNMENT, LARGE, PAGE, pack_zeros

onnx = pytest.importorskip("onnx", reason="the onnx packages are not installed: pip install 'quantkit[onnx]'")
pytest.importorskip("onnxscript", reason="the onnx packages are not installed: pip install 'quantkit[onnx]'")

QUICK = {"calibration": {"samples": 8, "sequence_length": 48}, "score": {"samples": 0}, "search": {"exponents": 4, "shrinks": 3}}
BOTH = ["compressed-tensors", "onnx"]
CLOSE = 2e-4
ASYMMETRIC = {"bits": 4, "group": 32, "symmetric": False}


def recipe_file(folder: Path, base: str = "rtn-w4", **changes) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**load_recipe(base).model_dump(mode="json", exclude={"name"}), **QUICK, **changes}))
    return str(path)


def write(tmp_path: Path, name: str, base: str = "rtn-w4", build: dict | None = None, **changes):
    """(source folder, recipe, result)."""
    source = tiny.build(name, tmp_path / "model", **(build or {}))
    if name == "llama":
        tiny.train(source, "layers.1.(mlp.up|self_attn.q)_proj")
    recipe = recipe_file(tmp_path, base, **changes)
    return source, recipe, pipeline.quantize(str(source), recipe=recipe, output=tmp_path / "out")


@pytest.fixture
def no_graph(monkeypatch):
    """Data only: a graph takes ten seconds."""
    monkeypatch.setattr(artefact.OnnxFolder, "finish", lambda self: None)


def initialisers(tmp_path: Path, name: str, result, recipe: str) -> dict[str, np.ndarray]:
    """Every piece of the data file, read back from where a graph will say it is."""
    source = tmp_path / "model"
    plan, _ = pipeline.plan(str(source), recipe)
    settings = load_recipe(recipe).onnx
    config = json.loads((source / "config.json").read_text())
    layout = artefact.OnnxFolder(plan, config, settings.accuracy_level, settings.embeddings).layout
    data = (result.artefacts["onnx"] / artefact.DATA).read_bytes()
    found, end = {}, 0
    for offset, piece in layout.data():
        assert offset % (PAGE if piece.bytes >= LARGE else ALIGNMENT) == 0
        assert offset >= end
        end = offset + piece.bytes
        raw = torch.frombuffer(bytearray(data[offset:end]), dtype=torch.uint8)
        found[piece.name] = raw.view(piece.dtype).view(piece.shape)
    assert end == len(data)
    return found


# Families whose experts transformers decodes itself take no zero points in compressed-tensors
@pytest.mark.parametrize(
    "name, weights",
    [
        *((name, ASYMMETRIC) for name in tiny.FAMILIES if name not in ("qwen3_moe", "mixtral")),
        ("qwen3_moe", {}),
        ("mixtral", {"bits": 8}),
        ("gemma4_moe", {"signed": True, "group": 128}),
        ("llama", {"signed": True, "group": 32}),  # some of its weights are copied, with fp16 scales
    ],
)
def test_integers_are_those_of_compressed_tensors(name, weights, tmp_path, no_graph):
    """Byte for byte; scales and all that is kept too; and `plan` knows the file's size."""
    _, recipe, result = write(tmp_path, name, "awq-w4" if "signed" in weights else "rtn-w4", formats=BOTH, weights=weights)
    _, sizes = pipeline.plan(str(tmp_path / "model"), recipe)
    assert sizes["onnx"] == result.bytes["onnx"] == (result.artefacts["onnx"] / artefact.DATA).stat().st_size
    ours = initialisers(tmp_path, name, result, recipe)
    theirs = {n: t for path in result.artefacts["compressed-tensors"].glob("*.safetensors") for n, t in load_file(path).items()}
    read = set()
    for full, tensor in theirs.items():
        local, _, part = full.rpartition(".")
        local = re.sub(r"^(model|language_model)\.(language_model\.|model\.)?", "model.", local)
        local = re.sub(r"block_sparse_moe\.experts\.(\d+)\.w", r"mlp.experts.\1.w", local).replace("block_sparse_moe", "mlp")
        for old, new in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            local = re.sub(rf"(experts\.\d+)\.{old}$", rf"\1.{new}", local)
        expert = re.fullmatch(r"(.*experts\.\d+)\.(gate|up)_proj", local)
        stem = f"{expert[1]}.gate_up_proj" if expert else local
        half = None if expert is None else 0 if expert[2] == "gate" else 1
        key = {"weight_packed": "qweight", "weight_scale": "scales", "weight_zero_point": "qzeros"}.get(part)
        if part == "weight_shape" or (key and f"{stem}.{key}" not in ours):
            assert part == "weight_shape" or "shared" in local or _borrows(tmp_path, local), full  # keys that no layer reads
            continue
        if key is None:
            whole = f"{local}.{part}" if local else part
            if any(matches(pattern, outside_block(full)) for pattern in TOWERS):
                continue
            written = next(n for n in (whole, outside_block(full)) if n in ours)
            assert torch.equal(ours[written], tensor), full
            read.add(written)
            continue
        made = ours[f"{stem}.{key}"]
        made = made if half is None else made.chunk(2)[half]
        if part == "weight_packed":
            assert torch.equal(made.contiguous().view(len(tensor), -1).view(torch.int32), tensor), full
        elif part == "weight_scale":
            assert torch.equal(made, tensor), full
        else:
            zero = unpack(tensor.T.contiguous(), 4, made.shape[0]).T
            low, high = made & 15, made >> 4
            nibbles = torch.stack([low, high], -1).view(len(made), -1)[:, : zero.shape[1]].to(torch.int16) - 8
            assert torch.equal(nibbles, zero.to(torch.int16)), full
        read.add(f"{stem}.{key}")
    assert read == set(ours)


def _borrows(tmp_path: Path, local: str) -> bool:
    text = json.loads((tmp_path / "model" / "config.json").read_text())
    text = text.get("text_config", text)
    layer = int(re.search(r"layers\.(\d+)\.", local)[1])
    return layer >= text["num_hidden_layers"] - text.get("num_kv_shared_layers", 0) and local.endswith(("k_proj", "v_proj"))


RUNS = {
    # biases, tied embeddings in 8 bits, a linear that is kept, a whole layer in 8 bits
    "qwen2": {
        "build": {"num_hidden_layers": 2},
        "onnx": {"embeddings": 8},
        "overrides": [{"match": "*o_proj", "keep": True}, {"match": "mlp*", "layers": [1], "weights": {"bits": 8}}],
    },
    # experts (one layer's are kept), sliding and full layers with other head widths, keys that serve as values, a tower that stays behind
    "gemma4_moe": {
        "build": {"num_hidden_layers": 3},
        "base": "awq-w4",
        "overrides": [{"match": "experts*", "layers": [1], "keep": True}],
    },
    # AltUp, per-layer embeddings, layers that borrow keys and values, sparse activations
    "gemma3n": {"weights": ASYMMETRIC},
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_in_its_engines(name, tmp_path):
    """The whole folder: onnx's checker, onnxruntime in pieces through the cache, genai's greedy tokens, nothing of this machine."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'quantkit[onnx]'")
    source, recipe, result = write(tmp_path, name, formats=["onnx"], **RUNS[name])
    folder = result.artefacts["onnx"]
    plan, sizes = pipeline.plan(str(source), recipe)
    assert sizes == {"onnx": (folder / "model.onnx.data").stat().st_size}
    onnx.checker.check_model(str(folder / "model.onnx"))
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    assert {one.domain: one.version for one in graph.opset_import} == {"": 21, "com.microsoft": 1}
    assert not graph.functions
    raw = (folder / "model.onnx").read_bytes()
    assert not [trace for trace in (str(tmp_path), "site-packages", ".py") if trace.encode() in raw]
    stored = {value.name: value for value in graph.graph.initializer if value.external_data}
    layout = artefact.OnnxFolder(plan, json.loads((source / "config.json").read_text()), 0, load_recipe(recipe).onnx.embeddings).layout
    assert set(stored) == set(layout.pieces), "the data file holds what the graph reads, and nothing else"
    owners = {value.name.split(".")[1] for value in graph.graph.input if value.name.startswith("past_key_values.")}
    assert len(owners) == json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["num_hidden_layers"]
    store = onnx_runs.solved_store(tmp_path / "out", plan)
    model = onnx_runs.reference(source, store, plan, load_recipe(recipe).onnx.embeddings)
    far, same = onnx_runs.distance(folder, model)
    assert far < CLOSE
    assert same == 1
    card = (folder / "README.md").read_text()
    assert ("the text model of a multimodal checkpoint" in card) == (name != "qwen2")
    assert ("Embeddings and head are rounded to 8 bits" in card) == (name == "qwen2")
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed: pip install 'quantkit[onnx]'")
    prompt = list(range(30, 42))
    assert onnx_runs.greedy(folder, prompt, 40) == onnx_runs.greedy_torch(model, prompt, 40)
    text = tiny.SENTENCES[0]
    expected = transformers.AutoTokenizer.from_pretrained(source)(text, add_special_tokens=False).input_ids
    assert onnx_runs.encoded(folder, text)[-len(expected) :] == expected


def test_what_the_operator_does_not_hold_is_refused(tmp_path):
    source = str(tiny.build("llama", tmp_path / "model"))
    with pytest.raises(WriteError, match=r"onnx in w3 sym g32 \(model.layers.0.self_attn.q_proj\).*4 and 8 bits"):
        pipeline.plan(source, recipe_file(tmp_path, weights={"bits": 3}, formats=["onnx"]))


def test_frequencies_that_a_graph_cannot_hold_are_refused_before_anything_runs(tmp_path):
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    source = tiny.build("llama", tmp_path / "model", num_hidden_layers=1, rope_parameters=dynamic)
    with pytest.raises(WriteError, match="rope_parameters dynamic"):
        pipeline.quantize(str(source), recipe=recipe_file(tmp_path, formats=["onnx"]), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_told_with_its_line(tmp_path, monkeypatch):
    source = str(tiny.build("llama", tmp_path / "model"))
    monkeypatch.setattr(artefact, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(WriteError, match=r"pip install 'quantkit\[onnx\]'"):
        pipeline.plan(source, formats=["onnx"])


def test_a_tensor_that_the_plan_lacks_is_named(tmp_path):
    source = tiny.build("llama", tmp_path / "model")
    plan, _ = pipeline.plan(str(source))
    config = json.loads((source / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"needs model\.layers\.0\.self_attn\.q_norm\.weight"):
        artefact.OnnxFolder(plan, {**config, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]})
    with pytest.raises(CheckpointError, match=r"by config\.json"):
        artefact.OnnxFolder(plan, {**config, "intermediate_size": 256})


@pytest.mark.parametrize("columns, width", [(224, 32), (128, 128), (192, 64)])
def test_one_scale_a_row_is_repeated(columns, width, tmp_path, no_graph):
    """The operator has no group as wide as a row: the widest that divides it, its scale repeated, computes the same."""
    weights = {"bits": 8, "group": "row"}
    _, recipe, result = write(tmp_path, "llama", build={"intermediate_size": columns}, weights=weights, formats=BOTH)
    ours = initialisers(tmp_path, "llama", result, recipe)
    scales = ours["model.layers.0.mlp.down_proj.scales"]
    assert scales.shape == (128, columns // width)
    theirs = load_file(next(result.artefacts["compressed-tensors"].glob("*.safetensors")))["model.layers.0.mlp.down_proj.weight_scale"]
    assert torch.equal(scales, theirs.expand_as(scales))


@pytest.mark.parametrize("groups", [1, 4, 7])
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_are_packed_along_a_row(groups, bits):
    zero = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (5, groups), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    expected = pack(zero, bits).view(torch.uint8).view(5, -1)[:, : -(-groups * bits // 8)].clone()
    if bits == 4 and groups % 2:
        expected[:, -1] &= 15
    assert torch.equal(pack_zeros(zero, bits), expected)


def test_level_four_and_embeddings_are_told_by_the_recipe(tmp_path, no_graph):
    """They change the graph and the tables, not what is solved: a folder can be written again from a finished run."""
    source, _, result = write(tmp_path, "llama", formats=["onnx"])
    again = pipeline.quantize(
        str(source), recipe=recipe_file(tmp_path, formats=["onnx"], onnx={"accuracy_level": 4, "embeddings": 4}), output=tmp_path / "out"
    )
    assert again.bytes["onnx"] < result.bytes["onnx"]
    assert again.report["onnx"] == {"accuracy_level": 4, "embeddings": 4, "text_only": False}
    card = (again.artefacts["onnx"] / "README.md").read_text()
    assert "accuracy level 4" in card
    assert "rounded to 4 bits" in card
