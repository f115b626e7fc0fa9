"""Every way into quantkit, with a good input behind each and a judge of what comes out of a damaged one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mutations
import tiny
import torch
from mutations import Door
from runs import THREE, artefacts
from safetensors.torch import save_file

from quantkit import pipeline, recipe
from quantkit.calibrate.draw import draw, make_row
from quantkit.calibrate.render import load_tokenizer
from quantkit.calibrate.sources import read_samples

RTN = "description: x\nmethod: rtn\nscore: {samples: 0}\nformats: [compressed-tensors, gguf]\n"


def doors(folder: Path) -> list[Door]:
    """Every way in, with a good input behind each."""
    model = tiny.build("llama", folder / "model", num_hidden_layers=1)
    sharded = tiny.build("qwen3_moe", folder / "sharded", num_hidden_layers=1, max_shard_size="100KB")
    texts = folder / "texts"
    texts.mkdir()
    base = recipe.load_recipe("awq-w4").model_dump(mode="json", exclude={"name"})
    override = {"match": "self_attn.*", "layers": [0], "weights": {"bits": 8, "group": 32, "symmetric": True}}
    (texts / "recipe.yaml").write_text(mutations.yaml.safe_dump({**base, "overrides": [override]}))
    (texts / "rtn.yaml").write_text(RTN)
    for kind, name in (("suites", "quick"), ("gates", "strict")):
        shutil.copy(recipe._evaluation(kind, name), texts / f"{kind}.yaml")
    (texts / "data.jsonl").write_text(
        '{"text": "one line of text that is long enough"}\n'
        '{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}], "language": "en"}\n' * 4
    )
    (texts / "mix.yaml").write_text("description: x\nsources: [{path: data.jsonl, weight: 2}, {path: data.jsonl, language: de}]\n")
    adapter = folder / "adapter"
    adapter.mkdir()
    name = "base_model.model.model.layers.0.mlp.up_proj"
    rows, columns = 96, 64
    for tensor, shape in pipeline.open_checkpoint(str(model)).entries.items():
        if tensor.endswith("layers.0.mlp.up_proj.weight"):
            rows, columns = shape.shape
    save_file(
        {f"{name}.lora_A.weight": torch.ones(4, columns), f"{name}.lora_B.weight": torch.ones(rows, 4)},
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"]}))
    made = folder / "made"
    made.mkdir()
    (made / "three.yaml").write_text(THREE)
    pipeline.quantize(str(model), recipe=str(made / "three.yaml"), output=made / "out")
    whole = artefacts(made / "out")
    (made / "card.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [en, de]\ntags: [a]\n---\n# Base\n\nText, `code`.\n\n```py\n1\n```\n"
    )
    settings = recipe.load_recipe(str(made / "three.yaml")).calibration
    sample = next(iter(read_samples(recipe.heldout_files())))

    def mix(copy: Path, work: Path) -> Callable[[], None]:
        return lambda: draw(recipe.load_mix(str(copy / "mix.yaml")), settings, load_tokenizer(model)) and None

    def tokenizer(copy: Path, work: Path) -> Callable[[], None]:
        return lambda: make_row(sample, load_tokenizer(copy), 64) and None

    def resumed(copy: Path, work: Path) -> Callable[[], None]:
        def call() -> None:
            for name in ("compressed-tensors", "gguf", "onnx"):
                shutil.rmtree(copy / "out" / name, ignore_errors=True)
            try:
                pipeline.quantize(str(model), recipe=str(made / "three.yaml"), output=copy / "out")
            finally:
                ours = artefacts(copy / "out")
                shutil.rmtree(copy)
                shutil.copytree(made, copy)
            weights = [name for name in whole if name.endswith((".safetensors", ".gguf", ".data")) and name.partition("/")[0] != "solved"]
            if any(ours.get(name) != whole[name] for name in weights):
                raise AssertionError("other weights from damaged blocks")

        return call

    def quantized(copy: Path, work: Path) -> list[str]:
        return ["quantize", str(copy), "--recipe", str(texts / "rtn.yaml"), "--output", str(work / "out"), "--threads", "1"]

    def verified(format: str) -> Door:
        listed = [f"out/{format}/{name}" for name in json.loads((made / "out" / format / "quantkit.json").read_text())["files"]]
        return Door(f"verify {format}", made, listed, lambda copy, work: ["verify", str(copy / "out" / format)], must_fail=True)

    return [
        Door("recipe", texts, ["recipe.yaml"], lambda copy, work: ["plan", str(model), "--recipe", str(copy / "recipe.yaml")], 4),
        Door("mix", texts, ["mix.yaml", "data.jsonl"], mix, 4),
        Door("suite", texts, ["suites.yaml"], lambda copy, work: lambda: recipe.load_suite(str(copy / "suites.yaml")) and None, 2),
        Door("gate", texts, ["gates.yaml"], lambda copy, work: lambda: recipe.load_gate(str(copy / "gates.yaml")) and None, 2),
        Door("header", model, ["model.safetensors"], lambda copy, work: ["plan", str(copy)], 4),
        Door("index", sharded, ["*.index.json", "*.safetensors"], lambda copy, work: ["plan", str(copy)], 4),
        Door("config", model, ["config.json"], lambda copy, work: ["plan", str(copy), "--format", "onnx", "--format", "gguf"], 4),
        Door("config alone", model, ["config.json"], lambda copy, work: ["plan", str(copy / "config.json")], 2),
        Door("tokenizer", model, ["tokenizer*.json", "*.jinja"], tokenizer, 4),
        Door("tokenizer of a GGUF", model, ["tokenizer*.json"], lambda copy, work: ["plan", str(copy), "--format", "gguf"], 2),
        Door("adapter", adapter, ["*"], lambda copy, work: ["plan", str(model), "--adapter", str(copy)], 3),
        Door("quantize", model, ["*"], quantized, 3),
        Door("base card", made, ["card.md"], lambda copy, work: ["card", str(copy / "out"), "--base-card", str(copy / "card.md")], 3),
        Door("run.json", made, ["out/run.json"], lambda copy, work: ["card", str(copy / "out")], 2),
        Door("manifest", made, ["out/*/quantkit.json"], lambda copy, work: ["verify", str(copy / "out")], 2),
        *(verified(format) for format in ("compressed-tensors", "gguf", "onnx")),
        Door("solved blocks", made, ["out/solved/*"], resumed, 1),
        Door("eval", made, ["out/compressed-tensors/*.json", "out/compressed-tensors/*.safetensors"], _judged(model, "compressed-tensors")),
        Door("eval of ONNX", made, ["out/onnx/*"], _judged(model, "onnx")),
    ]


def _judged(model: Path, format: str) -> Callable[[Path, Path], list[str]]:
    def command(copy: Path, work: Path) -> list[str]:
        engine = "onnxruntime" if format == "onnx" else "dequantized"
        chosen = ["--suite", "divergence", "--limit", "1", "--engine", engine, "--threads", "1", "--cache", str(work / "cache")]
        return ["eval", str(copy / "out" / format), "--baseline", str(model), *chosen]

    return command


def warm(doors: list[Door], folder: Path) -> None:
    """Each command once on what is good: it must end well, and what it loads need not be loaded in every child."""
    from click.testing import CliRunner

    from quantkit.cli import main

    for door in doors:
        if door.name.startswith(("eval", "quantize", "solved")):
            continue  # engines keep threads, which a fork loses
        copy = folder / "good"
        shutil.copytree(door.source, copy)
        command = door.command(copy, folder)
        if callable(command):
            command()
        else:
            result = CliRunner().invoke(main, command)
            if result.exit_code:
                raise SystemExit(f"{door.name}: good input is refused: {result.output}") from result.exception
        shutil.rmtree(copy)
