"""Safetensors folders read by us: equal to what the library reads, and every lie of a header or an index is one sentence."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantkit.errors import CheckpointError
from quantkit.model import checkpoint as module
from quantkit.model.checkpoint import Checkpoint, file_digest, read_json
from quantkit.types import Entry


def spec(begin: int, end: int, shape: tuple[Any, ...] = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def raw_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def refused(folder: Path, *words: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    line = str(caught.value)
    assert str(folder) in line
    for word in words:
        assert word in line
    assert len(line) < 600
    return line


def with_header(folder: Path, content: bytes) -> Path:
    (folder / "model.safetensors").write_bytes(content)
    return folder


def with_index(folder: Path, weight_map: Any) -> Path:
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


# --- Read -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["5GB", "200KB"])
def test_read_and_view_are_what_the_library_reads(shard, tmp_path):
    folder = tiny.build("gemma4_moe", tmp_path, max_shard_size=shard, num_hidden_layers=2)
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 2) == (shard != "5GB")
    source = Checkpoint(folder)
    seen = 0
    for file in files:
        with safe_open(file, "pt") as theirs:
            for name in theirs.keys():  # noqa: SIM118 (the file is no dict)
                tensor = theirs.get_tensor(name)
                assert source.entries[name] == Entry(tensor.dtype, tuple(tensor.shape))
                assert source.entries[name].bytes == tensor.nbytes
                assert torch.equal(source.read(name), tensor)
                assert torch.equal(source.view(name), tensor)
                seen += 1
    assert seen == len(source.entries)
    assert source.config == json.loads((folder / "config.json").read_text())


def test_edits_stay_here(folder):
    save_file({"a": torch.arange(4.0)}, folder / "model.safetensors")
    source, before = Checkpoint(folder), (folder / "model.safetensors").read_bytes()
    source.view("a").fill_(7)
    source.read("a").fill_(8)
    assert torch.equal(source.view("a"), torch.arange(4.0))
    assert torch.equal(source.read("a"), torch.arange(4.0))
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
)
def test_every_type(dtype, folder):
    tensor = torch.arange(-6, 6).abs().view(3, 4).to(dtype)
    save_file({"a": tensor, "flag": tensor > 2}, folder / "model.safetensors")
    source = Checkpoint(folder)
    assert source.entries["a"] == Entry(dtype, (3, 4))
    assert torch.equal(source.read("a"), tensor)
    assert torch.equal(source.view("a"), tensor)
    assert torch.equal(source.view("flag"), tensor > 2)


def test_empty_tensors_and_scalars(folder):
    tensors = {"empty": torch.zeros(0, 3), "one": torch.tensor(2.5), "none": torch.zeros(2, 0, dtype=torch.bfloat16)}
    save_file(tensors, folder / "model.safetensors")
    source = Checkpoint(folder)
    for name, tensor in tensors.items():
        for read in (source.read, source.view):
            assert read(name).dtype == tensor.dtype
            assert read(name).shape == tensor.shape
            assert torch.equal(read(name), tensor)


def test_a_misaligned_tensor(folder):
    """The format allows a tensor at any byte; memory of that address cannot be viewed as fp32."""
    values = torch.arange(3.0)
    header = {"odd": spec(0, 1, (1,), "U8"), "a": spec(1, 13, (3,))}
    content = raw_file(header, b"\x05" + values.numpy().tobytes())
    with_header(folder, content)
    source = Checkpoint(folder)
    for tensor in (source.view("a"), source.read("a")):
        assert torch.equal(tensor, values)
        assert tensor.data_ptr() % 4 == 0
    assert source.view("odd").item() == 5


def test_a_file_that_shrinks_while_it_is_read(folder):
    save_file({"a": torch.arange(64.0)}, folder / "model.safetensors")
    source = Checkpoint(folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match="changed while it was read"):
        source.read("a")


def test_tensors_that_the_index_does_not_name_are_left_out(folder):
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    source = Checkpoint(folder)
    assert sorted(source.entries) == ["a", "b"]
    assert torch.equal(source.read("b"), torch.zeros(3))


# --- Lies of a header -------------------------------------------------------------------------------------------------------------


LIES = {
    "empty file": (b"", "not a whole safetensors file (0 bytes)"),
    "seven bytes": (b"1234567", "not a whole safetensors file (7 bytes)"),
    "length 0": (raw_file({}, length=0), "not a whole safetensors file"),
    "length 2^62": (raw_file({"a": spec(0, 8)}, bytes(8), length=1 << 62), "not a whole safetensors file"),
    "length 2^64 - 1": (raw_file({"a": spec(0, 8)}, bytes(8), length=(1 << 64) - 1), "not a whole safetensors file"),
    "no JSON": (raw_file(b"this is not JSON"), "not a safetensors header"),
    "no text": (raw_file(b"\xff\xfe\x00{}"), "not a safetensors header"),
    "a list": (raw_file([1, 2]), "not a safetensors header"),
    "nested deep": (raw_file(b"[" * 100_000 + b"]" * 100_000), "not a safetensors header"),
    "tensor is a list": (raw_file({"a": [1]}), "not a safetensors header"),
    "no offsets": (raw_file({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "not a safetensors header"),
    "one offset": (raw_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, bytes(8)), "not a safetensors header"),
    "shape of letters": (raw_file({"a": spec(0, 8, ("x",))}, bytes(8)), "not a safetensors header"),
    "infinite shape": (raw_file(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}', bytes(8)), "not a safetensors header"),
    "infinite offset": (raw_file(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}', bytes(8)), "not a safetensors header"),
    "shape of half": (raw_file(b'{"a":{"dtype":"F32","shape":[2.5],"data_offsets":[0,8]}}', bytes(8)), "not a safetensors header"),
    "offset of letters": (raw_file(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":["0",8]}}', bytes(8)), "not a safetensors header"),
    "true for 1": (raw_file(b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', bytes(4)), "not a safetensors header"),
    "length 100 MB + 1": (raw_file({"a": spec(0, 8)}, bytes(8), length=(100 << 20) + 1), "not a whole safetensors file"),
    "5000 digits": (
        raw_file(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', bytes(8)),
        "not a safetensors header",
    ),
    "overlap": (raw_file({"a": spec(0, 8), "b": spec(4, 12)}, bytes(16)), "places b wrongly (bytes 4 to 12)"),
    "same place": (raw_file({"a": spec(0, 8), "b": spec(0, 8)}, bytes(16)), "places b wrongly"),
    "negative offset": (raw_file({"a": spec(-8, 0)}, bytes(16)), "places a wrongly"),
    "backwards": (raw_file({"a": spec(8, 0)}, bytes(16)), "places a wrongly"),
    "negative shape": (raw_file({"a": spec(0, 8, (-1, -2))}, bytes(16)), "places a wrongly"),
    "wrong size": (raw_file({"a": spec(0, 12)}, bytes(16)), "places a wrongly"),
    "truncated": (raw_file({"a": spec(0, 8), "b": spec(8, 16)}, bytes(15)), "truncated, b ends 1 bytes after the file does"),
    "far beyond the end": (raw_file({"a": spec(1 << 40, (1 << 40) + 8)}, bytes(8)), "truncated, a ends"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(lie, folder):
    content, words = LIES[lie]
    refused(with_header(folder, content), "model.safetensors", words)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4", "U32", "C64", "bf16", 5])
def test_types_that_are_no_weights_are_refused(dtype, folder):
    refused(with_header(folder, raw_file({"a": spec(0, 8, (2,), dtype)}, bytes(8))), f"a has the type {dtype}", "bf16, fp16 or fp32")


# --- Lies of an index -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["/etc/passwd", "../one.safetensors", "sub/one.safetensors", "./one.safetensors", "..", ".", "", 5, None])
def test_an_index_does_not_lead_out_of_the_folder(file, folder):
    (folder / "sub").mkdir()
    save_file({"a": torch.ones(2)}, folder / "sub" / "one.safetensors")
    refused(with_index(folder, {"a": file}), "a is said to be in", repr(file), "outside the folder")


@pytest.mark.parametrize("file", ["two.safetensors", "sub", "one\0.safetensors"])
def test_a_shard_that_is_not_there(file, folder):
    (folder / "sub").mkdir()
    refused(with_index(folder, {"a": file}), "missing")


@pytest.mark.parametrize("weight_map", [{}, None, [["a", "one.safetensors"]], "one.safetensors"])
def test_an_index_without_a_map(weight_map, folder):
    refused(with_index(folder, weight_map), "index.json: no weight_map")


def test_an_index_that_names_what_its_shard_lacks(folder):
    refused(with_index(folder, {"a": "one.safetensors", "b": "one.safetensors"}), "one.safetensors", "b is in this shard")


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"null", b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_none(text, name, folder):
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    (folder / name).write_bytes(text)
    assert "\n" not in refused(folder, name)


# --- Folders ----------------------------------------------------------------------------------------------------------------------


def test_folders_that_are_no_checkpoint(tmp_path):
    refused(tmp_path / "nowhere", "no such folder")
    refused(tmp_path, "config.json: missing")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "is this a model folder?")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    refused(tmp_path, "config.json: missing")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "last.ckpt"])
def test_pickles_are_never_opened(name, folder):
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    refused(folder, name, "can run code when opened", "safetensors")


def test_read_json_is_an_object(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": [1]}


# --- Digests ----------------------------------------------------------------------------------------------------------------------


def test_the_digest_of_a_file(tmp_path):
    path = tmp_path / "a"
    for content in (b"", b"x", bytes(range(256)) * 5000):
        path.write_bytes(content)
        assert file_digest(path) == f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_the_digest_of_a_large_file_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WHOLE_DIGEST", 1 << 20)
    path, content = tmp_path / "a", bytearray(24 << 20)
    path.write_bytes(content)
    first = file_digest(path)
    assert first.startswith("sha256-sampled:")
    assert file_digest(path) == first
    seen = {first}
    for place in (0, (1 << 20) - 1, len(content) // 2, len(content) - 1):  # 256 samples of 64 KiB leave few holes in 24 MiB
        changed = bytearray(content)
        changed[place : place + 100_000] = b"\x01" * len(changed[place : place + 100_000])
        path.write_bytes(changed)
        seen.add(file_digest(path))
    path.write_bytes(content + b"\0")
    seen.add(file_digest(path))
    assert len(seen) == 6, "every change shows"
