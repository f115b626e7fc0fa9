"""Importance matrices: what llama-quantize asks of one, ours read back, and llama.cpp's own where its tools are at hand."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner

from quantkit import pipeline
from quantkit.calibrate.statistics import read_statistics
from quantkit.cli import main

gguf = pytest.importorskip("gguf", reason="importance matrices need the extra quantkit[gguf]")
from quantkit.write.gguf.metadata import family_table  # noqa: E402
from quantkit.write.imatrix import entry_of  # noqa: E402

RECIPE = "description: x\ncalibration: {tokens: 1500, sequence_length: 64, expert_tokens: 250, reserve: 1.0}\n"
MODELS = ("gemma4_moe", "gemma4_e", "gemma3_vision", "gemma3n", "llama", "qwen3_moe", "mixtral")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function from a tiny model's name to (model, statistics, importance matrix)."""
    root = tmp_path_factory.mktemp("runs")
    known: dict[str, tuple[Path, Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path, Path]:
        if name not in known:
            folder = root / name
            model = tiny.build(name, folder / "model", **({} if name in ("gemma4_e", "gemma3n") else {"num_hidden_layers": 2}))
            (folder / "r.yaml").write_text(RECIPE)
            known[name] = model, folder / "s.safetensors", folder / "i.gguf"
            pipeline.calibrate(str(model), output=known[name][1], imatrix=known[name][2], recipe=str(folder / "r.yaml"))
        return known[name]

    return get


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_that_is_quantized_has_an_entry(name, made):
    model, file, imatrix = made(name)
    statistics, found = read_statistics(file), tensors(imatrix)
    plan, _ = pipeline.plan(str(model))
    asked = {(block.index, linear.local) for block in plan.blocks for linear in block.linears if linear.scheme}
    fed = {(index, local) for index, block in enumerate(statistics.blocks) for local in block.inputs}
    missing = {local for index, local in asked - fed}
    assert all("k_proj" in local or "v_proj" in local for local in missing), "only layers that borrow keys and values have none"
    for index, local in asked & fed:
        entry, _ = entry_of(family_table(plan), index, local)
        assert f"{entry}.in_sum2" in found, local
        assert f"{entry}.counts" in found, local


def test_the_file_is_as_llama_quantize_reads_it(made):
    _, file, imatrix = made("gemma4_moe")
    reader = gguf.GGUFReader(imatrix)
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == ["quantkit:stem-agentic"]
    assert reader.get_field("imatrix.chunk_size").contents() == 64
    assert reader.get_field("imatrix.chunk_count").contents() >= 1
    found = tensors(imatrix)
    assert found["blk.0.ffn_gate_up_exps.weight.in_sum2"].shape == (8, 128), "gate and up are one tensor there"
    assert found["blk.0.ffn_down_exps.weight.in_sum2"].shape == (8, 96)
    assert found["blk.0.ffn_down_exps.weight.counts"].shape == (8, 1)
    assert found["blk.0.attn_q.weight.in_sum2"].shape == (128,)
    assert found["blk.0.attn_q.weight.counts"].shape == (1,)
    assert {array.dtype for array in found.values()} == {np.dtype("float32")}
    block = read_statistics(file).blocks[0]
    for expert in range(8):
        own, more = block.inputs[f"experts.{expert}.down_proj"], block.reserve.get(f"experts.{expert}.down_proj")
        square = own.square + more.square if more else own.square
        assert np.array_equal(found["blk.0.ffn_down_exps.weight.in_sum2"][expert], square.numpy())
        assert found["blk.0.ffn_down_exps.weight.counts"][expert] == own.tokens + (more.tokens if more else 0)
    assert block.reserve, "or the reserve's part is not seen"


def test_separate_gate_and_up_where_llama_cpp_has_them(made):
    for name in ("qwen3_moe", "mixtral"):
        found = tensors(made(name)[2])
        for part in ("gate", "up", "down"):
            assert found[f"blk.1.ffn_{part}_exps.weight.in_sum2"].ndim == 2


@pytest.mark.parametrize("name", ["gemma4_moe", "llama"])
def test_an_importance_matrix_becomes_statistics(name, made, tmp_path):
    model, file, imatrix = made(name)
    ran = CliRunner().invoke(main, ["calibrate", str(model), "--from", str(imatrix), "--output", str(tmp_path / "s.safetensors")])
    assert ran.exit_code == 0, ran.output
    assert "quantkit:stem-agentic" in ran.stdout
    read, own = read_statistics(tmp_path / "s.safetensors"), read_statistics(file)
    plan, _ = pipeline.plan(str(model))
    for index, block in enumerate(read.blocks):
        assert block.inputs.keys() == {linear.local for linear in plan.blocks[index].linears}
        for local, stats in block.inputs.items():
            if local not in own.blocks[index].reserve:
                assert stats.tokens == own.blocks[index].inputs[local].tokens
                assert torch.equal(stats.square, own.blocks[index].inputs[local].square)


def refused(model: Path, file: Path, tmp_path: Path) -> str:
    ran = CliRunner().invoke(main, ["calibrate", str(model), "--from", str(file), "--output", str(tmp_path / "s.safetensors")])
    assert ran.exit_code == 1, ran.output
    assert len(ran.stderr.splitlines()) == 1
    assert not (tmp_path / "s.safetensors").exists()
    return ran.stderr


def test_what_is_no_importance_matrix_is_refused(made, tmp_path):
    model, _, imatrix = made("gemma4_moe")
    (tmp_path / "a.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    (tmp_path / "b.gguf").write_bytes(b"something else")
    writer = gguf.GGUFWriter(tmp_path / "c.gguf", "llama")
    writer.add_type("model")
    writer.add_tensor("x", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "cannot be read" in refused(model, tmp_path / "none.gguf", tmp_path)
    for name in ("a.gguf", "b.gguf"):
        assert "cannot be read as GGUF" in refused(model, tmp_path / name, tmp_path)
    assert "not an importance matrix" in refused(model, tmp_path / "c.gguf", tmp_path)
    (tmp_path / "cut.gguf").write_bytes(imatrix.read_bytes()[:-3000])
    assert "cannot be read" in refused(model, tmp_path / "cut.gguf", tmp_path)


def test_another_models_matrix_is_refused(made, tmp_path):
    wide = tiny.build("llama", tmp_path / "wide", num_hidden_layers=2, hidden_size=192)
    assert "of another model?" in refused(wide, made("llama")[2], tmp_path)


def test_without_the_library_it_is_one_line(made, tmp_path, monkeypatch):
    import builtins

    real = builtins.__import__

    def import_(name, globals_=None, locals_=None, fromlist=(), level=0):
        if name == "quantkit.write" and "imatrix" in (fromlist or ()):
            raise ImportError("gguf")
        return real(name, globals_, locals_, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", import_)
    assert "pip install 'quantkit[gguf]'" in refused(made("llama")[0], made("llama")[2], tmp_path)


# --- llama.cpp --------------------------------------------------------------------------------------------------------------------

TOOL = shutil.which("llama-quantize") or os.environ.get("LLAMA_QUANTIZE")
MODEL = os.environ.get("LLAMA_QUANTIZE_MODEL")  # a GGUF of the model in LLAMA_QUANTIZE_SOURCE
SOURCE = os.environ.get("LLAMA_QUANTIZE_SOURCE")


@pytest.mark.skipif(
    not (TOOL and MODEL and SOURCE), reason="LLAMA_QUANTIZE, _MODEL and _SOURCE name llama.cpp's tool, a GGUF, its checkpoint"
)
@pytest.mark.parametrize("kind", ["Q4_K_M", "IQ4_NL"])
def test_stock_llama_quantize_takes_it(kind, tmp_path):
    (tmp_path / "r.yaml").write_text("description: x\ncalibration: {tokens: 4000, sequence_length: 256}\n")
    pipeline.calibrate(SOURCE, output=tmp_path / "s.safetensors", imatrix=tmp_path / "i.gguf", recipe=str(tmp_path / "r.yaml"))
    command = [TOOL, "--imatrix", str(tmp_path / "i.gguf"), MODEL, str(tmp_path / "q.gguf"), kind, "1"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    said = ran.stdout + ran.stderr
    entries = len(tensors(tmp_path / "i.gguf")) // 2
    assert f"loaded {entries} importance matrix entries" in said
    unweighted = [line for line in said.splitlines() if "did not find weights for" in line]
    assert all("token_embd" in line or "output" in line for line in unweighted), unweighted
