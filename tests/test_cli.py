"""The command line: light to start, results on stdout, progress on stderr only for a person, exit codes that scripts can trust."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny
import transformers
from click.testing import CliRunner, Result

import quantkit
from quantkit import pipeline
from quantkit.cli import main
from quantkit.families import FAMILIES
from quantkit.recipe import load_recipe, shipped_recipes

HEAVY = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "quantkit.pipeline"}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(quantkit.__file__).parents[1]), "OMP_NUM_THREADS": "1", "TERM": "xterm"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny.build("gemma4_moe", tmp_path_factory.mktemp("model"), num_experts=4, num_hidden_layers=2))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "quick.yaml"
    path.write_text(
        "description: x\ncalibration: {samples: 4, sequence_length: 64}\nscore: {samples: 2, sequence_length: 64}\n"
        "search: {exponents: 2, rows: 16, shrinks: 2}\n"
    )
    return str(path)


def run(*arguments: str) -> Result:
    """In this process, with stdout and stderr apart and neither a terminal."""
    return CliRunner().invoke(main, arguments)


def good(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == "", "only progress, and that only in a terminal"
    return result.stdout


def imported_by(*arguments: str) -> tuple[set[str], str]:
    """Every module that a command loads, and what it prints."""
    command = [sys.executable, "-X", "importtime", "-m", "quantkit", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=True)
    modules = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines() if line.startswith("import time:")}
    assert "quantkit.cli" in modules, "the list is not empty by mistake"
    return modules, ran.stdout


# --- Light ------------------------------------------------------------------------------------------------------------------------


def test_help_is_light_and_lists_the_commands():
    modules, text = imported_by("--help")
    assert not modules & HEAVY
    for command in main.commands:
        assert re.search(rf"^  {command} ", text, re.MULTILINE)
    assert {"quantize", "plan", "recipes", "families"} <= set(main.commands)


def test_help_loads_little():
    """What makes --help quick, without a clock: nothing of ours but the command line, and of libraries click alone."""
    modules, _ = imported_by("--help")
    assert not modules & HEAVY
    assert not modules & {"numpy", "pydantic", "rich", "jinja2", "yaml", "huggingface_hub", "safetensors"}


@pytest.mark.parametrize("arguments", [("quantize", "--help"), ("recipes",), ("families",), ("--version",)])
def test_light_commands_do_not_load_torch(arguments):
    modules, _ = imported_by(*arguments)
    assert not modules & HEAVY


def test_importing_the_package_is_light():
    code = "import quantkit, sys; print(sorted(m for m in sys.modules if m.partition('.')[0] in ('torch', 'transformers', 'click')))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert ran.stdout == "[]\n"


# --- What is shipped --------------------------------------------------------------------------------------------------------------


def test_version():
    assert good("--version").split() == ["quantkit,", "version", quantkit.__version__]


def test_recipes_are_listed_with_what_they_do():
    lines = good("recipes").splitlines()
    assert [line.split()[0] for line in lines] == shipped_recipes()
    for line in lines:
        name, _, description = line.partition(" ")
        assert description.strip() == load_recipe(name).description


def test_families_are_listed_with_their_folds():
    text = good("families")
    for family in FAMILIES:
        assert family.name in text
        for model_type in family.model_types:
            assert model_type in text
        for fold in family.folds:
            assert f"{fold.producer} -> {', '.join(fold.consumers)}" in text
    for name in ("gemma4", "gemma3", "gemma3n", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral"):
        assert re.search(rf"\b{name}\b", text)


# --- plan -------------------------------------------------------------------------------------------------------------------------


def test_plan_for_people(model):
    text = good("plan", model, "--recipe", "awq-w4-g128")
    size = pipeline.plan(model, "awq-w4-g128")[1]["compressed-tensors"]
    assert "family gemma4 (gemma4), 2 blocks" in text.splitlines()[0]
    assert re.search(r"experts\.\*\.gate_proj +96 x 128 +w4 sym g32 .*128 does not divide.* 8 in 2 blocks", text)
    assert re.search(r"self_attn\.q_proj +128 x 128 +w4 sym g128", text)
    assert re.search(r"model\.vision_tower\.\S+ +kept, \d+ tensors?, [\d,]+ bytes", text)
    assert f"compressed-tensors: {size:,} bytes" in text
    assert len(text.splitlines()) < 100, "equal fates share a line"


def test_plan_as_json(model):
    made = json.loads(good("plan", model, "--json"))
    plan, sizes = pipeline.plan(model)
    assert made["bytes"] == sizes
    assert (made["family"], made["model_type"], made["blocks"]) == ("gemma4", "gemma4", 2)
    assert [one["name"] for one in made["linears"]] == [linear.name for linear in plan.linears()]
    assert {one["scheme"] for one in made["linears"]} == {"w4 sym g32 signed"}
    kept = {name for name in made["kept"] if name in plan.entries}
    assert len(kept) == len(made["kept"]), "every kept tensor by its own name"
    assert kept | {linear.source.tensor for linear in plan.linears()} == set(plan.entries)
    assert made["parameters"] == sum(entry.bytes // entry.dtype.itemsize for entry in plan.entries.values())


def test_plan_of_a_config_alone(model, tmp_path):
    (tmp_path / "config.json").write_bytes((Path(model) / "config.json").read_bytes())
    alone, whole = (json.loads(good("plan", where, "--json")) for where in (str(tmp_path / "config.json"), model))
    assert alone.pop("kept").sort() == whole.pop("kept").sort()
    assert alone.pop("other_formats").keys() == {"gguf without its tokenizer", "onnx"}
    assert whole.pop("other_formats")["gguf"]["bytes"] > 0
    assert alone == whole


def test_a_dry_run_is_the_plan(model, tmp_path):
    out = tmp_path / "out"
    for options in ((), ("--json",), ("--recipe", "awq-w8")):
        assert good("quantize", model, "--dry-run", "--output", str(out), *options) == good("plan", model, *options)
    assert not out.exists()


@pytest.mark.parametrize("arguments", [("plan",), ("quantize", "--dry-run")])
def test_libraries_are_told_to_be_quiet(arguments, model):
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    good(*arguments, model)
    assert transformers.logging.get_verbosity() == transformers.logging.ERROR, "their warnings would stand beside our one line"
    transformers.logging.set_verbosity(before)


def test_the_embedded_model_is_the_default():
    made = json.loads(good("plan", "--json"))
    assert made["family"] == "gemma4"
    assert made["bytes"]["compressed-tensors"] < 4_000_000


def test_plan_of_an_unknown_architecture_names_the_nearest(model, tmp_path):
    config = json.loads((Path(model) / "config.json").read_text())
    config |= {"model_type": "gemma5", "architectures": ["Gemma5ForConditionalGeneration"], "text_config": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("plan", str(tmp_path / "config.json"))
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "'gemma5' is not known; the nearest known is 'gemma" in result.stderr


# --- quantize ---------------------------------------------------------------------------------------------------------------------


def test_quantize_tells_what_it_made(model, recipe, tmp_path):
    text = good("quantize", model, "--recipe", recipe, "--output", str(tmp_path), "--threads", "1")
    report = json.loads((tmp_path / "run.json").read_text())
    folder = tmp_path / "compressed-tensors"
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    first, other, onnx, scores, errors, experts, *_, last = text.splitlines()
    assert onnx.startswith("the same recipe as onnx: "), "its size, or why it cannot be told"
    bits = report["bits_per_weight"]["compressed-tensors"]
    assert first == f"compressed-tensors: {folder}  {size:,} bytes = {size / 1e6:.2f} MB, {bits:.3f} bits per weight"
    assert other == f"the same recipe as gguf: {report['sizes']['gguf']['bytes'] / 1e6:.2f} MB" + other.partition(" MB")[2]
    assert f"KL to the original {report['heldout']['kl']:.5f}, perplexity {report['heldout']['perplexity']:.4f}" in scores
    assert f"{report['heldout']['tokens']:,} tokens" in scores
    assert f"{report['summary']['mean_error']:.3e}" in errors
    assert f"the least fed saw {report['summary']['fewest_expert_tokens']} tokens" in experts
    assert str(tmp_path / "run.json") in text
    assert last == f"serve: vllm serve {folder}"


def test_quantize_as_json(model, recipe, tmp_path):
    made: dict[str, Any] = json.loads(good("quantize", model, "--recipe", recipe, "--output", str(tmp_path), "--json"))
    report = json.loads((tmp_path / "run.json").read_text())
    assert report.pop("blocks")
    assert report.pop("samples")
    assert (report.pop("base_card"), report.pop("adapter_card")) == (None, None)
    assert made.pop("output") == str(tmp_path)
    assert made.pop("artefacts") == {"compressed-tensors": str(tmp_path / "compressed-tensors")}
    assert made == report
    assert made["bytes"] == {"compressed-tensors": (tmp_path / "compressed-tensors" / "model.safetensors").stat().st_size}


def test_the_default_output_is_named_for_model_and_recipe(model, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good("quantize", model, "--recipe", recipe)
    assert [path.name for path in tmp_path.iterdir()] == [f"{Path(model).name}-quick"]


def test_another_calibration_set(model, recipe, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"text": "one and two and three and four", "language": "en", "domain": "sums"}\n')
    options = ("--calibration", str(tmp_path / "mine.jsonl"), "--json")
    made = json.loads(good("quantize", model, "--recipe", recipe, "--output", str(tmp_path / "out"), *options))
    assert list(made["calibration"]["by_language_and_domain"]) == ["en"]
    assert list(made["calibration"]["by_language_and_domain"]["en"]) == ["sums"]
    assert made["calibration"]["rows"] == 1
    assert made["recipe"]["calibration"]["mix"] == str(tmp_path / "mine.jsonl")


@pytest.fixture
def hub(model, tmp_path, monkeypatch) -> str:
    """The Hub id of a model that was downloaded before the network went away."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--someone--tiny-model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(model, repo / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return "someone/tiny-model"


def test_a_hub_id_in_the_cache_is_planned_while_offline(hub, model):
    there, here = (json.loads(good("plan", where, "--json")) for where in (hub, model))
    assert there.pop("other_formats").keys() == {"gguf without its tokenizer", "onnx"}
    assert here.pop("other_formats").keys() == {"gguf", "onnx"}
    assert there == here
    lines = [good(*words).splitlines() for words in (("quantize", hub, "--dry-run"), ("plan", model))]
    told = [[line for line in one if not line.startswith("the same recipe as gguf")] for one in lines]
    assert told[0] == told[1]


@pytest.mark.parametrize("revision", ["", "@main"])
def test_a_hub_id_in_the_cache_is_quantized_while_offline(revision, hub, recipe, tmp_path):
    made = json.loads(good("quantize", hub + revision, "--recipe", recipe, "--output", str(tmp_path / "out"), "--json"))
    assert made["model"] == "tiny-model"
    assert made["base_model"] == hub, "the Hub knows no owner/name@revision"
    assert f"base_model: {hub}\n" in (tmp_path / "out" / "compressed-tensors" / "README.md").read_text()


def in_a_process(model: str, recipe: str, out: Path, stderr: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quantkit", "quantize", model, "--recipe", recipe, "--output", str(out)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=ENVIRONMENT, check=False)


def test_a_pipe_gets_results_alone(model, recipe, tmp_path):
    ran = in_a_process(model, recipe, tmp_path / "out", subprocess.PIPE)
    assert ran.returncode == 0
    assert ran.stderr == ""
    assert ran.stdout.startswith("compressed-tensors: ")


def test_a_terminal_gets_progress_on_stderr(model, recipe, tmp_path):
    ours, theirs = pty.openpty()
    ran = in_a_process(model, recipe, tmp_path / "out", theirs)
    os.close(theirs)
    drawn = b""
    try:
        while part := os.read(ours, 1 << 16):
            drawn += part
    except OSError:  # Linux says so at the end of a pty
        pass
    os.close(ours)
    assert ran.returncode == 0, drawn.decode()
    assert ran.stdout.startswith("compressed-tensors: ")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())
    assert "block 2/2" in text
    assert "GiB" in text
    assert "Traceback" not in text


# --- Exit codes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantise",),
        ("quantize", "--recipe"),
        ("quantize", "a", "b"),
        ("quantize", "--threads", "0"),
        ("quantize", "--threads", "two"),
        ("plan", "--output", "x"),
        ("recipes", "awq-w4"),
        ("--nonsense",),
    ],
)
def test_wrong_usage_exits_2(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error: " in result.stderr


@pytest.mark.parametrize("arguments", [("plan", "/nowhere"), ("quantize", "/nowhere"), ("quantize", "/nowhere", "--dry-run")])
def test_bad_input_exits_1(arguments):
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "quantkit: /nowhere: no such folder, and not a Hub id (owner/name)\n"


def test_an_interrupted_run_exits_130(model, monkeypatch):
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "quantize", interrupted)
    result = run("quantize", model)
    assert result.exit_code == 130
    assert result.stdout == ""
    assert re.fullmatch(r"quantkit: interrupted; .*\n", result.stderr)


def test_a_full_disk_is_one_line(model, monkeypatch):
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device", "/mnt/out/model.safetensors")

    monkeypatch.setattr(pipeline, "quantize", full)
    result = run("quantize", model)
    assert result.exit_code == 1
    assert result.stderr == "quantkit: /mnt/out/model.safetensors: No space left on device\n"


def test_the_python_door_is_the_same(model, recipe, tmp_path):
    (tmp_path / "mine.yaml").write_text("description: x\nmethod: rtn\nscore: {samples: 0}\n")
    result = quantkit.quantize(model, recipe=str(tmp_path / "mine.yaml"), output=tmp_path / "out")
    assert result.output == tmp_path / "out"
    assert (result.artefacts["compressed-tensors"] / "quantkit.json").is_file()
    assert result.scores["tokens"] == 0
