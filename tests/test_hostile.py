"""Inputs that mean harm, each by its name: nothing is written or read elsewhere, nothing explodes, one line says why."""

import json
import struct
from pathlib import Path

import huggingface_hub
import pytest
import stub_hub
import tiny

from quantkit import pipeline
from quantkit.calibrate.sources import read_samples
from quantkit.errors import CalibrationError, CheckpointError, QuantkitError, RecipeError
from quantkit.evaluate.cache import load_json
from quantkit.model.checkpoint import HEADER_LIMIT, Checkpoint
from quantkit.recipe import load_recipe

RTN = "description: x\nmethod: rtn\nscore: {samples: 0}\n"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny.build("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=1)


@pytest.fixture
def model(llama, tmp_path) -> Path:
    (tmp_path / "model").mkdir()
    for path in llama.iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "model"


def refusal(kind: type[QuantkitError], call, *words: str) -> str:
    with pytest.raises(kind) as found:
        call()
    line = str(found.value)
    assert "\n" not in line
    assert len(line) < 500
    assert all(word in line for word in words)
    return line


# --- Names and links ----------------------------------------------------------------------------------------------------------------


LEADS_OUT = ["../../outside.json", "..%2F..%2Foutside.json", "sub/../../../outside.json", "/outside.json", "....//outside.json"]


@pytest.mark.parametrize("name", LEADS_OUT)
def test_a_file_of_a_repository_that_leads_out_of_the_cache(name, llama, tmp_path, monkeypatch):
    files = {path.name: path.read_bytes() for path in llama.iterdir()} | {name: b"{}"}
    constants, commit = huggingface_hub.constants, "0" * 40
    with stub_hub.Server() as hub:
        hub.repos["someone/tiny"] = {"main": files, commit: files}
        for key, value in (
            ("ENDPOINT", hub.url),
            ("HF_HUB_OFFLINE", False),
            ("HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_CACHE", str(tmp_path / "deep" / "down" / "cache")),
        ):
            monkeypatch.setattr(constants, key, value)
        (tmp_path / "rtn.yaml").write_text(RTN)
        try:
            pipeline.quantize("someone/tiny", recipe=str(tmp_path / "rtn.yaml"), output=tmp_path / "out")
        except QuantkitError as problem:
            assert "\n" not in str(problem)  # noqa: PT017  both are well: that it is refused and that it is left out
    assert {path.name for path in tmp_path.iterdir()} <= {"deep", "rtn.yaml", "out"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"down"}
    assert {path.name for path in (tmp_path / "deep" / "down").iterdir()} == {"cache"}
    assert not [path for path in tmp_path.rglob("*outside*") if "cache" not in path.relative_to(tmp_path).parts]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "README.md", "vocab.txt", "chat_template.jinja", "generation_config.json"])
def test_a_link_to_a_file_outside_the_folder(name, model, tmp_path):
    """Its text would go into the artefact, and from there to the Hub."""
    (tmp_path / "secret").write_text("{}")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(tmp_path / "secret")
    refusal(CheckpointError, lambda: Checkpoint(model), name, "leads out of the folder")
    (model / name).unlink()
    (model / name).symlink_to("../../../../../../../../etc/hostname")
    refusal(CheckpointError, lambda: Checkpoint(model), name, "leads out of the folder")


def test_links_of_the_hubs_cache_are_followed(model, tmp_path):
    """snapshots/COMMIT/config.json -> ../../blobs/DIGEST; and weights may lie on another disk."""
    snapshot, blobs, disk = tmp_path / "cache" / "snapshots" / "c0ffee", tmp_path / "cache" / "blobs", tmp_path / "disk"
    for folder in (snapshot, blobs, disk):
        folder.mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        place = disk / path.name if path.suffix == ".safetensors" else blobs / str(number)
        path.rename(place)
        (snapshot / path.name).symlink_to(place if path.suffix == ".safetensors" else Path("..") / ".." / "blobs" / str(number))
    assert Checkpoint(snapshot).entries


# --- Bombs --------------------------------------------------------------------------------------------------------------------------


def test_a_parquet_file_of_more_rows_than_its_bytes_hold(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    schema, one = pyarrow.schema([("text", pyarrow.string())]), pyarrow.array(["again and again"])
    rows = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 2_000_000, pyarrow.int32()), one).cast(pyarrow.string())
    with parquet.ParquetWriter(tmp_path / "bomb.parquet", schema, compression="zstd") as writer:
        writer.write_table(pyarrow.table({"text": rows}), row_group_size=2_000_000)
    path = tmp_path / "bomb.parquet"
    if 100 * path.stat().st_size >= 2_000_000:
        pytest.skip("this pyarrow packs less")
    refusal(CalibrationError, lambda: read_samples([path]), "2,000,000 rows", "not opened")


def test_a_parquet_file_whose_one_row_is_half_a_gigabyte(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "bomb.parquet"
    parquet.write_table(pyarrow.table({"text": ["z" * (1 << 29)]}), path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 1 << 20
    refusal(CalibrationError, lambda: read_samples([path]), "bytes in one row group", "not opened")


def test_yaml_whose_aliases_explode(tmp_path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]" for n in range(12)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    refusal(RecipeError, lambda: load_recipe(str(tmp_path / "bomb.yaml")), "aliases")


@pytest.mark.parametrize("length", [HEADER_LIMIT, HEADER_LIMIT + 1])
@pytest.mark.parametrize("filled", ["zeros", "spaces"])
def test_a_header_of_100_mb(filled, length, model):
    """As long as the library's own limit it is read, and beyond it is not."""
    path = model / "model.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", length))
        if filled == "spaces":
            file.write(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length))
        file.truncate(8 + length + 4)
    if filled == "spaces" and length == HEADER_LIMIT:
        assert list(Checkpoint(model).entries) == ["a"]
        return
    refusal(CheckpointError, lambda: Checkpoint(model), "model.safetensors")


def test_tensors_that_overlap(model):
    """One byte belongs to two tensors: whoever edits one edits the other."""
    path = model / "model.safetensors"
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    names = sorted((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][0])
    first, second = (header[name]["data_offsets"] for name in names[:2])
    second[0] -= 2
    second[1] -= 2
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[end:])
    assert first[1] > second[0]
    refusal(CheckpointError, lambda: Checkpoint(model), "places", names[1], "wrongly")


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads"])
def test_a_config_of_more_layers_than_there_is_time(key, model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, key: 1 << 200}))
    refusal(CheckpointError, lambda: pipeline.plan(str(model / "config.json")), key, "10,000")


def test_a_gguf_of_a_checkpoint_without_embeddings(model):
    raw = (model / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    del header["model.embed_tokens.weight"]
    new = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])
    refusal(QuantkitError, lambda: pipeline.plan(str(model), "gguf-q8_0"), "embed_tokens.weight")


def test_a_cached_baseline_of_brackets_is_none(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    assert load_json(tmp_path / "deep.json") is None
