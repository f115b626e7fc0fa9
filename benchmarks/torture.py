"""Kill it, starve it, watch it grow, feed it garbage; prints what was tried and what went wrong. Exit code 1 where anything did.

    python benchmarks/torture.py [--minutes 10] [--kills 40] [--faults 20] [--seed 0] [--only kill starve creep fuzz] [--folder DIR]

kill    SIGKILL at random moments of every phase; the command again, until it ends; all bytes of all formats are those of an undisturbed
        run, and no block that was stored is solved twice
starve  the disk is full after a random number of bytes (a shim below Python's files, since mounting a small disk needs rights)
creep   resident memory, read from outside, at block 40 of 48 beside block 8
fuzz    mutations of every kind of input (benchmarks/mutations.py), in what is left of the minutes
"""

import argparse
import builtins
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", SOURCE_DATE_EPOCH="1700000000")

import mutations  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from mutations import Door  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from quantkit import pipeline, recipe, release, store  # noqa: E402
from quantkit.calibrate.draw import draw, make_row  # noqa: E402
from quantkit.calibrate.render import load_tokenizer  # noqa: E402
from quantkit.calibrate.sources import read_samples  # noqa: E402
from quantkit.cli.common import quiet  # noqa: E402
from quantkit.errors import QuantkitError, StoreError  # noqa: E402

CREEP = 1.05
QUICK = (
    "description: x\ncalibration: {samples: 4, sequence_length: 64}\nscore: {samples: 2, sequence_length: 64}\n"
    "search: {exponents: 2, rows: 16, shrinks: 2, sweeps: 1}\n"
)
THREE = QUICK + "formats: [compressed-tensors, gguf, onnx]\n"
RTN = "description: x\nmethod: rtn\nscore: {samples: 0}\nformats: [compressed-tensors, gguf]\n"


# --- Runs in a child, stopped from outside ----------------------------------------------------------------------------------------


class Job:
    """One tiny model and a recipe, run in forked children."""

    def __init__(self, folder: Path, recipe: str, **build: Any):
        self.folder = folder
        self.model = tiny.build("llama", folder / "model", **build)
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(recipe)

    def start(self, out: Path, before: Callable[[], None] = lambda: None) -> tuple[int, Iterator[tuple[float, str, int | None]]]:
        """A child at work, and its events (seconds, phase, block) as they come; the last is "ended" or one line of an error."""
        hears, says = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(hears)
            code = 9
            try:
                torch.set_num_threads(1)
                before()
                tell = lambda event: os.write(says, (json.dumps([event.phase, event.block]) + "\n").encode())  # noqa: E731
                pipeline.quantize(str(self.model), recipe=str(self.recipe), output=out, tell=tell)
                os.write(says, b'["ended", null]\n')
                code = 0
            except QuantkitError as problem:
                os.write(says, (json.dumps([f"{type(problem).__name__}: {problem}", None]) + "\n").encode())
            except BaseException as problem:
                os.write(says, (json.dumps([f"traceback {type(problem).__name__}: {problem}", None]) + "\n").encode())
            os._exit(code)
        os.close(says)

        def events() -> Iterator[tuple[float, str, int | None]]:
            with open(hears, encoding="utf-8") as lines:
                for line in lines:
                    phase, block = json.loads(line)
                    yield time.monotonic(), phase, block

        return child, events()

    def finish(self, out: Path) -> str:
        """Run to the end; how it ended."""
        child, events = self.start(out)
        last = [phase for _, phase, _ in events][-1:]
        os.waitpid(child, 0)
        return last[0] if last else "died"


def artefacts(out: Path) -> dict[str, bytes]:
    """All bytes of a run's formats and solved blocks; run.json tells seconds, so it is compared without them."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file() and path.suffix != ".part"}
    told = json.loads(found.pop("run.json")) if "run.json" in found else {}
    for key in ("seconds", "memory", "peak_memory", "threads"):
        told.pop(key, None)
    return {**found, "run.json": json.dumps(told, sort_keys=True).encode()} if told else found


def looks_whole(out: Path, whole: dict[str, bytes]) -> list[str]:
    """Files of a run that was stopped which bear their last name and not their last bytes."""
    return [name for name, data in artefacts(out).items() if not name.endswith((store.LOCK, "run.json")) and whole.get(name) != data]


def stored(out: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (out / "solved").glob("block-*.safetensors")}


def kill(folder: Path, kills: int, seed: int, ends: float) -> dict[str, Any]:
    """SIGKILL in every phase in turn, at a random moment of it."""
    job, chance, out = Job(folder, THREE, num_hidden_layers=2), random.Random(seed), folder / "out"
    seen: list[tuple[float, str, int | None]] = []
    child, events = job.start(folder / "whole")
    seen.extend(events)
    os.waitpid(child, 0)
    if seen[-1][1] != "ended":
        raise SystemExit(f"an undisturbed run ended with {seen[-1][1]}")
    whole = artefacts(folder / "whole")
    moments = [(phase, block, seen[number + 1][0] - at) for number, (at, phase, block) in enumerate(seen[:-1])]
    by_phase: dict[str, list[tuple[str, int | None, float]]] = {}
    for moment in moments:
        by_phase.setdefault(moment[0], []).append(moment)
    phases, found, wrong, finished, compared = list(by_phase), Counter[str](), list[str](), 0, 0

    def compare() -> None:
        nonlocal finished, compared
        ended = job.finish(out)
        ours = artefacts(out)
        finished += 1
        compared += sum(map(len, whole.values()))
        differing = sorted(name for name in ours.keys() | whole.keys() if ours.get(name) != whole.get(name))
        if ended != "ended" or differing:
            wrong.append(f"{ended}: {differing[:4]}")
        shutil.rmtree(out, ignore_errors=True)

    while found.total() < kills and time.monotonic() < ends:
        phase, block, seconds = chance.choice(by_phase[phases[found.total() % len(phases)]])
        blocks = stored(out)
        child, events = job.start(out)
        for _, now, at in events:
            if (now, at) == (phase, block):
                time.sleep(chance.random() * min(seconds, 5))
                os.kill(child, signal.SIGKILL)
                found[phase] += 1
                break
            if now.startswith(("traceback", "StoreError")):
                wrong.append(now)
        os.waitpid(child, 0)
        if half := looks_whole(out, whole):
            wrong.append(f"killed in {phase}: looks whole: {half[:3]}")
        if again := [name for name, mark in blocks.items() if stored(out).get(name) != mark]:
            wrong.append(f"killed in {phase}: solved twice: {again}")
        if chance.random() < 0.4 or (out / "run.json").exists():
            compare()
    compare()
    return {"kills": found.total(), "by phase": dict(found), "runs compared": finished, "bytes compared": compared, "wrong": wrong}


# --- A full disk ------------------------------------------------------------------------------------------------------------------


class _Quota(io.FileIO):
    """A file on a disk that has so many bytes left; as on a real one, the first part of a write may still fit."""

    left = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        fits = min(len(view), _Quota.left)
        if len(view) and not fits:
            raise OSError(28, "No space left on device", None)
        _Quota.left -= fits
        return super().write(view[:fits])


def _starved(left: int, inside: Path) -> Callable[[], None]:
    """What makes every file that is opened for writing below a folder share `left` bytes, in this process."""
    plain = builtins.open

    def opened(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None, *a: Any
    ) -> Any:
        if not isinstance(file, (str, os.PathLike)) or not set(mode) & set("wax+") or not str(file).startswith(str(inside)):
            return plain(file, mode, buffering, encoding, errors, newline, *a)
        raw = _Quota(file, mode.replace("b", "").replace("t", ""))
        buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def begin() -> None:
        _Quota.left = left
        builtins.open = io.open = opened
        shutil._USE_CP_SENDFILE = False  # type: ignore[attr-defined]

    return begin


def starve(folder: Path, faults: int, seed: int, ends: float) -> dict[str, Any]:
    """A disk that fills at random moments, freed again: one line each time, and in the end the bytes of an undisturbed run."""
    job, chance, out = Job(folder, THREE, num_hidden_layers=2), random.Random(seed), folder / "out"
    job.finish(folder / "whole")
    whole = artefacts(folder / "whole")
    total, done, compared, wrong = sum(map(len, whole.values())), 0, 0, list[str]()
    while done < faults and time.monotonic() < ends:
        child, events = job.start(out, _starved(chance.randrange(total // (1 + done % 3)), out))
        last = [phase for _, phase, _ in events][-1:]
        os.waitpid(child, 0)
        if last != ["ended"]:
            done += 1
            if not last or not last[0].startswith(StoreError.__name__) or "the disk is full" not in last[0]:
                wrong.append(f"no line of a full disk: {last}")
            if half := looks_whole(out, whole):
                wrong.append(f"looks whole: {half[:3]}")
            if parts := list(out.rglob("*.part")):
                wrong.append(f"left: {parts[0].name}")
        if last == ["ended"] or chance.random() < 0.3:
            ended, ours = job.finish(out), artefacts(out)
            compared += total
            if ended != "ended" or ours != whole:
                wrong.append(f"after space was freed: {ended}, {[name for name in whole if ours.get(name) != whole[name]][:3]}")
            shutil.rmtree(out)
    return {"faults": done, "bytes compared": compared, "wrong": wrong}


# --- Memory -----------------------------------------------------------------------------------------------------------------------


def creep(folder: Path, blocks: int = 48, early: int = 8, late: int = 40) -> dict[str, Any]:
    """Resident bytes of a run as the system counts them, when a block begins."""
    job, seen = Job(folder, QUICK, num_hidden_layers=blocks), dict[int, int]()
    child, events = job.start(folder / "out")
    last = ""
    for _, last, block in events:
        if last == "running held-out samples" and block is not None:
            seen[block] = int(Path(f"/proc/{child}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    os.waitpid(child, 0)
    ratio = seen[late] / seen[early] if last == "ended" else float("nan")
    wrong = [] if ratio <= CREEP else [f"{last}: {ratio:.3f} times as much"]
    return {f"block {early}": seen.get(early), f"block {late}": seen.get(late), "ratio": round(ratio, 4), "wrong": wrong}


# --- Garbage ----------------------------------------------------------------------------------------------------------------------


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


def torture(
    folder: Path, minutes: float, kills: int, faults: int, seed: int, only: list[str], blocks: int = 48
) -> tuple[dict[str, Any], int]:
    """Every part within the minutes; what was found, and how many things were wrong."""
    ends, found, wrong = time.monotonic() + minutes * 60, dict[str, Any](), 0
    quiet()
    torch.set_num_threads(1)
    release.__name__  # loaded before the first fork  # noqa: B018
    for part in only:
        (folder / part).mkdir()
        began = time.monotonic()
        if part == "kill":
            told = kill(folder / part, kills, seed, began + (ends - began) * 0.5)
        elif part == "starve":
            told = starve(folder / part, faults, seed, began + (ends - began) * 0.4)
        elif part == "creep":
            told = creep(folder / part, blocks, blocks // 6, blocks * 5 // 6)
        else:
            ways = doors(folder / part)
            warm(ways, folder / part)
            counts = mutations.fuzz(ways, folder / part, ends - time.monotonic(), seed)
            told = {"mutations": counts.tried.total(), "refused": counts.refused.total(), "by door": dict(counts.tried)}
            told |= {"kinds of defect": dict(counts.kinds), "wrong": [f"{key} | {what}" for key, what in counts.examples.items()]}
        found[part] = {**told, "seconds": round(time.monotonic() - began, 1)}
        wrong += len(told["wrong"])
    return found, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--folder", type=Path, help="A folder to work in, kept. [default: a temporary one]")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = asked.folder or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        found, wrong = torture(folder.resolve(), asked.minutes, asked.kills, asked.faults, asked.seed, asked.only)
    for part, told in found.items():
        print(part)
        for key, value in told.items():
            for line in value if isinstance(value, list) else [value]:
                print(f"  {key}: {f'{line:,}' if isinstance(line, int) else line}")
    print(f"{wrong} things wrong")
    sys.exit(1 if wrong else 0)


PARTS = ["kill", "starve", "creep", "fuzz"]

if __name__ == "__main__":
    main()
