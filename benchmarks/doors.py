"""Every way into quantkit, with a good input behind each, and what a damaged one means where it is taken.

Meanings are computed here from the damaged files by readers of a few lines that share nothing with the package.
"""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mutations
import tiny
import torch
from mutations import Door, Silent
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
        {f"{name}.lora_A.weight": torch.randn(4, columns), f"{name}.lora_B.weight": torch.randn(rows, 4)},
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

    judged = _prepared(model, folder / "asked", made)

    def quantized(copy: Path, work: Path) -> list[str]:
        return ["quantize", str(copy), "--recipe", str(texts / "rtn.yaml"), "--output", str(work / "out"), "--threads", "1"]

    def verified(format: str) -> Door:
        listed = [f"out/{format}/{name}" for name in json.loads((made / "out" / format / "quantkit.json").read_text())["files"]]
        return Door(f"verify {format}", made, listed, lambda copy, work: ["verify", str(copy / "out" / format)], must_fail=True)

    def loaded(load: Callable[[str], Any], name: str) -> Callable[[Path, Path], Callable[[], None]]:
        def command(copy: Path, work: Path) -> Callable[[], None]:
            def call() -> None:
                found = load(str(copy / name)).model_dump(mode="json")
                _same(found, mutations.yaml.safe_load((copy / name).read_text()), name)

            return call

        return command

    def planned(copy: Path, work: Path) -> list[str]:
        return ["plan", str(model), "--recipe", str(copy / "recipe.yaml")]

    plain = [
        Door("recipe", texts, ["recipe.yaml"], planned, 4),
        Door("recipe's meaning", texts, ["recipe.yaml"], loaded(recipe.load_recipe, "recipe.yaml"), 3),
        Door("mix", texts, ["mix.yaml", "data.jsonl"], mix, 4),
        Door("samples", texts, ["data.jsonl"], lambda copy, work: lambda: _samples(copy / "data.jsonl", _lines), 3),
        Door("suite", texts, ["suites.yaml"], loaded(recipe.load_suite, "suites.yaml"), 2),
        Door("gate", texts, ["gates.yaml"], loaded(recipe.load_gate, "gates.yaml"), 2),
        Door("header", model, ["model.safetensors"], lambda copy, work: ["plan", str(copy)], 4),
        Door("index", sharded, ["*.index.json", "*.safetensors"], lambda copy, work: ["plan", str(copy)], 4),
        Door("config", model, ["config.json"], lambda copy, work: ["plan", str(copy), "--format", "onnx", "--format", "gguf"], 4),
        Door("config alone", model, ["config.json"], lambda copy, work: ["plan", str(copy / "config.json")], 2),
        Door("tokenizer", model, ["tokenizer*.json", "*.jinja"], tokenizer, 4),
        Door("tokenizer of a GGUF", model, ["tokenizer*.json"], lambda copy, work: ["plan", str(copy), "--format", "gguf"], 2),
        Door("adapter", adapter, ["*"], lambda copy, work: ["plan", str(model), "--adapter", str(copy)], 2),
        Door("adapter's meaning", adapter, ["*"], lambda copy, work: lambda: _merged(model, copy, "up_proj"), 3),
        Door("quantize", model, ["*"], quantized, 3, meant=_quantized),
        Door("quantize shards", sharded, ["*.index.json", "*.safetensors"], quantized, 2, meant=_quantized),
        Door("base card", made, ["card.md"], lambda copy, work: ["card", str(copy / "out"), "--base-card", str(copy / "card.md")], 3),
        Door("run.json", made, ["out/run.json"], lambda copy, work: ["card", str(copy / "out")], 2),
        Door("manifest", made, ["out/*/quantkit.json"], lambda copy, work: ["verify", str(copy / "out")], 2),
        *(verified(format) for format in ("compressed-tensors", "gguf", "onnx")),
        Door("solved blocks", made, ["out/solved/*"], resumed, 1),
        Door(
            "eval",
            judged.folder,
            ["out/compressed-tensors/*.json", "out/compressed-tensors/*.safetensors"],
            judged("compressed-tensors"),
            2,
        ),
        Door("eval of GGUF", judged.folder, ["out/gguf/*.gguf"], judged("gguf"), 2),
        Door("eval of ONNX", judged.folder, ["out/onnx/*"], judged("onnx"), 2),
        Door("eval's documents", judged.folder, ["documents.jsonl", "suite.yaml"], judged("gguf"), 1),
        Door(
            "eval against a stored run", judged.folder, ["stored.json"], judged("gguf", "--gate", "default", "--against", "stored.json"), 1
        ),
        Door("eval's baseline from the cache", judged.folder, ["cache/*"], judged("gguf"), 1),
        Door("importance matrix", judged.folder, ["matrix.gguf"], judged.imported, 2),
    ]
    return plain + ([_parquet(folder / "parquet")] if find_spec("pyarrow") else [])


# --- Evaluation -------------------------------------------------------------------------------------------------------------------


class _prepared:
    """A folder to judge: artefacts, a suite of one document, a stored run, the baseline's answers."""

    def __init__(self, model: Path, folder: Path, made: Path):
        self.folder, self.model = folder, model
        shutil.copytree(made, folder)
        shutil.rmtree(folder / "out" / "solved")
        (folder / "documents.jsonl").write_text(json.dumps({"text": " ".join(tiny.SENTENCES[:2])}) + "\n")
        (folder / "suite.yaml").write_text("description: x\ndocuments: documents.jsonl\nwindow: 64\n")
        pipeline.calibrate(
            str(model), output=folder / "statistics.safetensors", recipe=str(made / "three.yaml"), imatrix=folder / "matrix.gguf"
        )
        about = pipeline.evaluate(
            folder / "out" / "gguf", baseline=model, suite=str(folder / "suite.yaml"), engine="dequantized", cache=folder / "cache"
        )
        (folder / "stored.json").write_text(json.dumps(about.report["stored"]))

    def __call__(self, format: str, *options: str) -> Callable[[Path, Path], list[str]]:
        engine = {"compressed-tensors": "transformers", "gguf": "dequantized", "onnx": "onnxruntime"}[format]

        def command(copy: Path, work: Path) -> list[str]:
            asked = ["--suite", str(copy / "suite.yaml"), "--engine", engine, "--threads", "1", "--cache", str(copy / "cache")]
            more = [str(copy / one) if one.endswith(".json") else one for one in options]
            return ["eval", str(copy / "out" / format), "--baseline", str(self.model), *asked, *more]

        return command

    def imported(self, copy: Path, work: Path) -> list[str]:
        return ["calibrate", str(self.model), "--from", str(copy / "matrix.gguf"), "--output", str(work / "out.safetensors")]


# --- Meanings ---------------------------------------------------------------------------------------------------------------------


def _same(loaded: Any, given: Any, where: str) -> None:
    """Every key that was given stands in what was loaded, with its value."""
    if isinstance(given, dict) and isinstance(loaded, dict):
        for key, value in given.items():
            if key not in loaded:
                raise Silent(f"{where}: {key!r} is gone")
            _same(loaded[key], value, f"{where}: {key}")
    elif isinstance(given, list) and isinstance(loaded, list) and len(given) == len(loaded):
        for number, (one, other) in enumerate(zip(loaded, given, strict=True)):
            _same(one, other, f"{where}[{number}]")
    elif given is not None and loaded != given and str(loaded) != str(given):
        raise Silent(f"{where}: {given!r} became {loaded!r}"[:300])


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _samples(path: Path, rows: Callable[[Path], list[Any]]) -> None:
    """Every row is a sample, with its own text."""
    found = read_samples([path])
    given = rows(path)
    if len(found) != len(given):
        raise Silent(f"{len(given)} rows became {len(found)} samples")
    for sample, row in zip(found, given, strict=True):
        texts = [row["text"]] if not sample.messages else [str(turn.get("content") or "") for turn in row["messages"]]
        ours = [sample.text] if not sample.messages else [str(turn["content"] or "") for turn in sample.messages]
        if texts != ours:
            raise Silent(f"{texts} became {ours}"[:300])


def _parquet(folder: Path) -> Door:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    rows = [{"text": f"line {number} of some text", "messages": None} for number in range(40)] + [{"text": None, "messages": turns}] * 8
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data.parquet")
    read = lambda path: pyarrow.parquet.read_table(path).to_pylist()  # noqa: E731
    return Door("Parquet", folder, ["data.parquet"], lambda copy, work: lambda: _samples(copy / "data.parquet", read), 2)


KINDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I32": torch.int32, "I64": torch.int64, "I8": torch.int8}


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors that a folder of safetensors means: header, offsets, bytes."""
    index, found = folder / "model.safetensors.index.json", dict[str, torch.Tensor]()
    names = json.loads(index.read_text())["weight_map"] if index.exists() else None
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        for name, about in json.loads(data[8:end]).items():
            if name == "__metadata__" or (names is not None and names.get(name) != path.name):
                continue
            first, last = about["data_offsets"]
            raw = torch.tensor(list(data[end + first : end + last]), dtype=torch.uint8)
            found[name] = raw.view(KINDS[about["dtype"]]).view(about["shape"])
    return found


def _quantized(copy: Path, work: Path) -> None:
    """Every weight is within half a step of what the damaged checkpoint says, every other tensor is its own; so is the config."""
    source, made = _tensors(copy), _tensors(work / "out" / "compressed-tensors")
    for name, tensor in source.items():
        stem = name.removesuffix("weight")
        if name in made:
            if not torch.equal(made[name].view(torch.uint8), tensor.view(torch.uint8)):
                raise Silent(f"{name} is another tensor")
            continue
        if f"{stem}weight_packed" not in made:
            raise Silent(f"{name} is lost")
        words, scale = made[f"{stem}weight_packed"], made[f"{stem}weight_scale"].float()
        codes = torch.stack([(words >> 4 * place) & 15 for place in range(8)], -1).flatten(1)[:, : tensor.shape[1]] - 8
        step = scale.repeat_interleave(tensor.shape[1] // scale.shape[1], 1)
        if bool(((tensor.float() - codes * step).abs() > 0.55 * step.abs()).any()):
            raise Silent(f"{name} is further than half a step (and its rounding to bf16) from what was given")
    told = json.loads((work / "out" / "compressed-tensors" / "config.json").read_text())
    if {key: value for key, value in told.items() if key != "quantization_config"} != json.loads((copy / "config.json").read_text()):
        raise Silent("config.json says other things")


def _merged(model: Path, adapter: Path, leaf: str) -> None:
    """W + alpha / r B A in fp32, as the PEFT paper and library have it; configs that scale otherwise are left to the tests of adapters."""
    checkpoint = pipeline.open_checkpoint(str(model), str(adapter))
    name = next(name for name in checkpoint.entries if name.endswith(f"{leaf}.weight"))
    made = checkpoint.view(name).float()
    about, halves = json.loads((adapter / "adapter_config.json").read_text()), _adapter_tensors(adapter)
    if any(about.get(key) for key in ("alpha_pattern", "rank_pattern", "use_dora", "fan_in_fan_out", "use_rslora", "layers_to_transform")):
        return
    (down,), (up,) = ([tensor for key, tensor in halves.items() if f".lora_{half}." in key] for half in "AB")
    wanted = _tensors(model)[name].float() + float(about.get("lora_alpha", 8)) / float(about.get("r", 8)) * up.float() @ down.float()
    if float((made - wanted).abs().max()) > 0.01 * float(wanted.abs().max()) + 1e-6:
        raise Silent("the merged weight is not the adapter's")


def _adapter_tensors(adapter: Path) -> dict[str, torch.Tensor]:
    data = (adapter / "adapter_model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, about in json.loads(data[8:end]).items():
        if name != "__metadata__":
            first, last = about["data_offsets"]
            raw = torch.tensor(list(data[end + first : end + last]), dtype=torch.uint8)
            found[name] = raw.view(KINDS[about["dtype"]]).view(about["shape"])
    return found


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
