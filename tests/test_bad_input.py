"""Bad input through the real command line: exit 1, one line on stderr, and nothing half-written that looks whole. And a killed run."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantkit
from quantkit import pipeline
from quantkit.cli import main
from quantkit.report import Event
from quantkit.write import compressed_tensors

SECRET = "hf_" + "Zq7" * 11
RTN = "description: x\nmethod: rtn\nscore: {samples: 2, sequence_length: 64}\n"
FAST = "calibration: {samples: 4, sequence_length: 64}\nsearch: {exponents: 2, rows: 16, shrinks: 2}\n"
AWQ = "description: x\nscore: {samples: 2, sequence_length: 64}\n" + FAST
AWQ_UNSCORED = "description: x\nscore: {samples: 0}\n" + FAST
WHOLE = ("config.json", "quantkit.json", "README.md", "run.json", "model.safetensors.index.json")  # what openers and people look for


@pytest.fixture(autouse=True)
def secrets(monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, SECRET)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    made: dict[str, Path] = {}

    def get(name: str, **changes: Any) -> Path:
        key = f"{name}{sorted(changes.items())}"
        if key not in made:
            made[key] = tiny.build(name, tmp_path_factory.mktemp(name), **changes)
        return made[key]

    return get


@pytest.fixture
def model(built, tmp_path):
    """A function from a family's name to a copy of its checkpoint that may be damaged; keywords are for tiny.build."""

    def get(name: str = "llama", **changes: Any) -> Path:
        return Path(shutil.copytree(built(name, **changes), tmp_path / "models" / name, dirs_exist_ok=True))

    return get


@pytest.fixture
def quantize(tmp_path):
    """A function that runs `quantkit quantize` on a model with a recipe's text; the output folder is tmp_path/out."""

    def run(model: Path | str, *options: str, recipe: str = RTN) -> Result:
        path = tmp_path / "mine.yaml"
        path.write_text(recipe)
        arguments = ["quantize", str(model), "--recipe", str(path), "--output", str(tmp_path / "out"), *options]
        return CliRunner().invoke(main, arguments)

    return run


@pytest.fixture
def refused(quantize, tmp_path):
    """A function that does the same, demands the one line and an output folder that looks like nothing, and gives the line."""

    def run(model: Path | str, *words: str, options: tuple[str, ...] = (), recipe: str = RTN) -> str:
        result = quantize(model, *options, recipe=recipe)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise AssertionError("a traceback for the user") from result.exception
        line = one_line(result.exit_code, result.stdout, result.stderr)
        for word in words:
            assert word in line
        not_whole(tmp_path / "out")
        return line

    return run


def one_line(code: int, stdout: str, stderr: str) -> str:
    assert code == 1, f"exit {code}: {stdout}{stderr}"
    assert stdout == ""
    assert stderr.startswith("quantkit: ")
    assert stderr.count("\n") == 1, stderr
    assert stderr.endswith("\n")
    assert "Traceback" not in stderr
    assert SECRET not in stderr
    assert len(stderr) < 1000
    return stderr


def not_whole(out: Path) -> None:
    if out.is_dir():
        looks = [str(path.relative_to(out)) for path in out.rglob("*") if path.name in WHOLE]
        assert not looks, "a folder that looks whole"
        assert not list(out.rglob("*.part")), "temporary files are left"


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def configure(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_vision", "qwen3_moe"])
def test_without_damage_all_is_well(name, model, quantize, tmp_path):
    """The models of this file are fine as they are: whatever is refused below is refused for its damage."""
    result = quantize(model(name), recipe=AWQ)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert {"config.json", "quantkit.json", "README.md"} <= {path.name for path in (tmp_path / "out" / "compressed-tensors").iterdir()}


# --- The checkpoint ---------------------------------------------------------------------------------------------------------------


def test_missing_shard(model, refused):
    folder = model(max_shard_size="300KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(folder, shard.name, "missing")


def test_truncated_shard(model, refused):
    folder = model(max_shard_size="300KB")
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(folder, shard.name, "truncated")
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(folder, shard.name, "not a whole safetensors file")


@pytest.mark.parametrize("file", ["../llama-elsewhere/model.safetensors", "/etc/hostname"])
def test_an_index_that_leaves_the_folder(file, model, refused):
    folder = model(max_shard_size="300KB")
    shutil.copytree(folder, folder.parent / "llama-elsewhere")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, file, "outside the folder")


def test_a_shard_whose_name_no_disk_takes(model, refused):
    folder = model()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x" * 300}}))
    refused(folder)


@pytest.mark.parametrize(
    "name, tensor, recipe",
    [
        ("llama", "model.layers.1.mlp.up_proj.weight", RTN),
        ("llama", "model.layers.1.mlp.up_proj.weight", AWQ_UNSCORED),
        ("llama", "model.embed_tokens.weight", RTN),
        ("llama", "model.embed_tokens.weight", AWQ_UNSCORED),
        ("llama", "lm_head.weight", AWQ),
        ("llama", "model.norm.weight", AWQ_UNSCORED),
        ("llama", "model.layers.1.post_attention_layernorm.weight", RTN),
        ("llama", "model.layers.1.post_attention_layernorm.weight", AWQ_UNSCORED),
        ("qwen3_moe", "model.layers.1.mlp.gate.weight", RTN),
        ("qwen3_moe", "model.layers.1.mlp.gate.weight", AWQ_UNSCORED),
        ("qwen3_moe", "model.layers.2.mlp.experts.5.down_proj.weight", RTN),
        ("gemma3_vision", "vision_tower.encoder.layers.0.mlp.fc1.weight", RTN),
        ("gemma3_vision", "vision_tower.post_layernorm.bias", AWQ),
    ],
)
def test_nan(name, tensor, recipe, model, refused):
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[tensor].view(-1)[700 if tensor == "model.embed_tokens.weight" else 7] = torch.nan  # row 5: a token that no text holds

    refused(edit(model(name), spoil), "NaN", recipe=recipe)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"model_type": "lama", "architectures": ["LamaForCausalLM"]}, ("'lama' is not known", "'llama'", "quantkit/families/")),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, ("'gpt2' is not known", "quantkit/families/")),
        ({"model_type": None}, ("is not known",)),
        ({"architectures": ["LlamaForCausalLN"]}, ("'LlamaForCausalLN'",)),
        ({"architectures": None}, ("architectures",)),
        ({"architectures": 5}, ()),
        ({"text_config": "llama"}, ()),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("quantized already",)),
        ({"num_hidden_layers": 4}, ("3",)),
        ({"num_hidden_layers": 2}, ("2",)),
        ({"hidden_size": 256}, ("128", "256")),
        ({"vocab_size": 100}, ("vocabulary",)),
        ({"num_attention_heads": "four"}, ("num_attention_heads",)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config(config, words, model, refused):
    refused(configure(model(), **config), *words)


def test_an_unexpected_tensor(model, refused):
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_prj.weight"] = torch.zeros(4, 4)

    line = refused(edit(model(), add), "model.layers.1.mlp.up_prj.weight", "mlp.up_proj", "quantkit/families/llama.py")
    assert "model.layers.1.mlp.up_proj.weight" not in line


@pytest.mark.parametrize("name, tensor", [("llama", "model.layers.1.mlp.up_proj.weight"), ("qwen2", "model.embed_tokens.weight")])
def test_a_tensor_that_is_not_there(name, tensor, model, refused):
    refused(edit(model(name), lambda tensors: tensors.pop(tensor)), tensor)


def test_a_block_that_is_not_there(model, refused):
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            del tensors[name]

    refused(edit(model(), drop), "block 1")


def test_pickles_only(model, refused):
    folder = model()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "pytorch_model.bin", "can run code")


def test_no_tokenizer(model, refused):
    folder = model()
    for file in [*folder.glob("tokenizer*"), *folder.glob("chat_template*")]:
        file.unlink()
    refused(folder, "tokenizer", str(folder))


def test_paths_that_are_no_model(refused, tmp_path):
    refused(tmp_path / "nowhere", "no such folder")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "a file")
    refused("a/b/c", "no such folder")
    refused("x" * 300)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json: missing")


# --- The recipe, the calibration set, the adapter ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe, words",
    [
        ("descripton: x", ("unknown key 'descripton'", "did you mean 'description'?")),
        (RTN + "wieghts: {bits: 4}", ("unknown key 'wieghts'", "did you mean 'weights'?")),
        (RTN + "weights: {bits: 4, grp: 32}", ("unknown key 'weights.grp'",)),
        (RTN + "weights: {bits: 3}", ("3 bits", "4 or 8")),
        (RTN + "ignore: [lm_head]", ("'lm_head' matches no linear",)),
        (RTN + "method: awq", ("stands twice",)),
        (RTN + "experts_layout: [a", ("not YAML",)),
        (RTN + "ignore: ['*']", ("nothing to quantize",)),
        ("description: 2024-13-45", ("not YAML",)),
    ],
)
def test_recipes(recipe, words, model, refused):
    refused(model(), *words, recipe=recipe)


def test_a_group_that_divides_nothing(model, refused):
    refused(model(intermediate_size=200), "mlp.down_proj", "200", "group: row")


def test_a_fused_layout_for_experts_that_lie_apart(model, refused):
    refused(model("qwen3_moe"), "experts_layout", recipe=RTN + "experts_layout: fused")


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ("calibration set is empty",)),
        ("\n  \n", ("calibration set is empty",)),
        ('{"text": "fine"}\n{"text": ', ("set.jsonl:2: not a JSON line",)),
        ('{"text": "fine"}\n\n{"messages": [{"role": "robot"}]}', ("set.jsonl:3: ", "role")),
        ('{"text": "half a pair: \\ud800"}', ("set.jsonl:1",)),
    ],
)
def test_calibration_sets(text, words, model, refused, tmp_path):
    (tmp_path / "set.jsonl").write_text(text)
    refused(model(), *words, options=("--calibration", str(tmp_path / "set.jsonl")), recipe=AWQ)


@pytest.mark.parametrize("mix", ["stem-agentik", "none.jsonl", "/"])
def test_a_calibration_set_that_is_not_there(mix, model, refused):
    refused(model(), mix, options=("--calibration", mix), recipe=AWQ)


def test_adapters(model, refused, tmp_path):
    folder = tmp_path / "lora"
    options = ("--adapter", str(folder))
    refused(model(), str(folder), "adapter_config.json: missing", options=options)
    folder.mkdir()
    for text, words in (
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ('{"peft_type": "LOHA"}', "only LORA"),
        ('{"peft_type": "LORA", "r": "many"}', "must be numbers"),
        ('{"peft_type": "LORA", "use_bdlora": true}', "use_bdlora"),
        ('{"peft_type": "LORA", "lora_bais": true}', "'lora_bais' is unknown"),
        ('{"peft_type": "LORA"}', "adapter_model.safetensors: missing"),
    ):
        (folder / "adapter_config.json").write_text(text)
        refused(model(), str(folder), words, options=options)
    save_file({"base_model.model.elsewhere.lora_A.weight": torch.zeros(8, 4)}, folder / "adapter_model.safetensors")
    refused(model(), "elsewhere", "no place in the checkpoint", options=options)


# --- The output folder ------------------------------------------------------------------------------------------------------------


def unharmed(result: Result, out: Path, before: dict[str, bytes], *words: str) -> None:
    line = one_line(result.exit_code, result.stdout, result.stderr)
    for word in words:
        assert word in line
    assert contents(out) == before


def test_another_run(model, quantize, tmp_path):
    folder, out = model(), tmp_path / "out"
    assert quantize(folder).exit_code == 0
    before = contents(out)
    unharmed(quantize(folder, recipe=RTN + "weights: {bits: 8}"), out, before, str(out), "holds another run", "--fresh")
    unharmed(quantize(model("qwen2")), out, before, "model 'llama'")
    edit(folder, lambda tensors: tensors["model.norm.weight"].mul_(2))
    unharmed(quantize(folder), out, before, "other inputs or versions")
    again = quantize(folder, "--fresh", recipe=RTN + "weights: {bits: 8}")
    assert again.exit_code == 0
    assert contents(out)["run.json"] != before["run.json"]


def test_foreign_files(model, quantize, tmp_path):
    folder, out = model(), tmp_path / "out"
    (out / "compressed-tensors").mkdir(parents=True)
    (out / "thesis.txt").write_text("dear reader")
    (out / "run.json").write_text("a diary of running")
    (out / "compressed-tensors" / "model.safetensors").write_text("a year of work")
    before = contents(out)
    unharmed(quantize(folder), out, before, str(out), "not empty and not a run of quantkit")
    unharmed(quantize(folder, "--fresh"), out, before, str(out))
    before = contents(folder)
    result = CliRunner().invoke(main, ["quantize", str(folder), "--recipe", "rtn-w4", "--fresh", "--output", str(folder)])
    unharmed(result, folder, before, str(folder))


def test_fresh_among_foreign_files(model, quantize, tmp_path):
    """Our run and somebody's file in one folder: the file stays, and the run is not deleted for nothing."""
    folder, out = model(), tmp_path / "out"
    assert quantize(folder).exit_code == 0
    (out / "thesis.txt").write_text("dear reader")
    before = contents(out)
    result = quantize(folder, "--fresh")
    assert (out / "thesis.txt").read_text() == "dear reader"
    if result.exit_code:
        unharmed(result, out, before, "thesis.txt")


def test_a_bad_run_with_fresh_deletes_nothing(model, quantize, tmp_path):
    folder, out = model(), tmp_path / "out"
    assert quantize(folder).exit_code == 0
    before = contents(out)
    unharmed(quantize(folder, "--fresh", recipe=RTN + "ignore: [lm_head]"), out, before, "matches no linear")
    shutil.copy(folder / "tokenizer.json", tmp_path / "kept")
    (folder / "tokenizer.json").write_text("{")
    unharmed(quantize(folder, "--fresh"), out, before, "tokenizer")


def test_an_output_that_is_a_file(model, refused, tmp_path):
    (tmp_path / "out").write_text("a letter")
    refused(model(), str(tmp_path / "out"))
    refused(model(), str(tmp_path / "out"), options=("--fresh",))
    assert (tmp_path / "out").read_text() == "a letter"


def test_a_damaged_block_of_an_earlier_run(model, quantize, tmp_path):
    folder, out = model(), tmp_path / "out"
    assert quantize(folder).exit_code == 0
    block = out / "solved" / "block-00001.safetensors"
    whole = contents(out)
    block.write_bytes(block.read_bytes()[:400])
    line = one_line(*(lambda r: (r.exit_code, r.stdout, r.stderr))(quantize(folder)))
    assert str(block) in line
    block.unlink()  # as the line says
    assert quantize(folder).exit_code == 0
    assert {name: data for name, data in contents(out).items() if name != "run.json"} == {
        name: data for name, data in whole.items() if name != "run.json"
    }


# --- In a process of its own ------------------------------------------------------------------------------------------------------


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    home = {"PYTHONPATH": str(Path(quantkit.__file__).parents[1]), "OMP_NUM_THREADS": "1", "HF_TOKEN": SECRET}
    return subprocess.run(
        [sys.executable, "-m", "quantkit", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **home, **environment},
        check=False,
    )


def test_a_hub_id_while_offline(tmp_path):
    out = tmp_path / "out"
    ran = command("quantize", "someone/some-model@main", "--output", str(out), HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    line = one_line(ran.returncode, ran.stdout, ran.stderr)
    for word in ("someone/some-model", "Hub", "offline" if "offline" in line else "HF_HUB_OFFLINE"):
        assert word in line
    assert not out.exists()


def test_one_line_from_a_real_process(model, tmp_path):
    folder, out = model(max_shard_size="300KB"), tmp_path / "out"
    sorted(folder.glob("model-*.safetensors"))[0].unlink()
    ran = command("quantize", str(folder), "--output", str(out))
    assert "missing" in one_line(ran.returncode, ran.stdout, ran.stderr)
    not_whole(out)


# --- A killed run -----------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def kill_at(phase: str, block: int) -> Callable[[Event], None]:
    def tell(event: Event) -> None:
        if (event.phase, event.block) == (phase, block):
            raise Killed

    return tell


@pytest.mark.parametrize(
    "name, kills, recipe", [("llama", 12, AWQ), ("gemma4_moe", 3, AWQ), ("gemma4_e", 3, RTN)], ids=["llama", "gemma4_moe", "gemma4_e"]
)
def test_a_killed_run_ends_in_the_same_bytes(name, kills, recipe, built, tmp_path, monkeypatch):
    monkeypatch.setattr(compressed_tensors, "SHARD_BYTES", 200_000)  # several shards, some written before the kill
    (tmp_path / "mine.yaml").write_text(recipe)
    folder, seen = str(built(name)), list[tuple[str, int]]()

    def run(out: str, tell: Callable[[Event], None]) -> pipeline.Result:
        return pipeline.quantize(folder, recipe=str(tmp_path / "mine.yaml"), output=tmp_path / out, tell=tell)

    whole = run("whole", lambda event: seen.append((event.phase, event.block)))
    assert len(list(whole.artefacts["compressed-tensors"].glob("*.safetensors"))) > 1
    out, first = tmp_path / "killed", tmp_path / "killed" / "solved" / "block-00000.safetensors"
    killed, stored = 0, None
    for phase, block in seen[2 :: max(1, len(seen) // kills)]:
        with pytest.raises(Killed):
            run("killed", kill_at(phase, block))
        killed += 1
        not_whole(out)
        if first.exists():
            stored = stored or first.stat().st_mtime_ns
            assert first.stat().st_mtime_ns == stored, "block 0 was solved again"
    assert killed >= min(kills, len(seen) - 2) - 1
    assert stored
    for half in ("solved/.block-00002.safetensors.part", "compressed-tensors/.config.json.part"):  # what a power cut leaves
        (out / half).parent.mkdir(exist_ok=True)
        (out / half).write_bytes(b"half")
    done = run("killed", lambda event: None)
    assert first.stat().st_mtime_ns == stored
    assert done.bytes == whole.bytes
    ours, theirs = contents(tmp_path / "killed"), contents(tmp_path / "whole")
    reports = [json.loads(files.pop("run.json")) for files in (ours, theirs)]
    ours.pop("solved/.block-00002.safetensors.part", None)
    assert sorted(ours) == sorted(theirs)
    for file in theirs:
        assert ours[file] == theirs[file], f"{file} differs"
    for report in reports:
        for key in ("seconds", "seconds_by_block", "peak_memory", "memory"):
            report.pop(key)
    assert reports[0] == reports[1]


# --- Code that a model brings -----------------------------------------------------------------------------------------------------


def test_code_of_a_model_is_refused_in_a_sentence(model, refused):
    refused(configure(model(), model_type="mine", auto_map={"AutoConfig": "mine.Config"}), "auto_map", "trust_remote_code stays off")


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", ".."])
def test_a_manifest_that_leaves_its_folder_is_not_followed(name, model, quantize, tmp_path):
    assert quantize(model()).exit_code == 0
    path = tmp_path / "out" / "compressed-tensors" / "quantkit.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = next(iter(manifest["files"].values()))
    path.write_text(json.dumps(manifest))
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "out")])
    assert "lies outside the folder" in one_line(result.exit_code, result.stdout, result.stderr)
