"""Do the engines open what quantkit writes, and compute what its weights say?

    python benchmarks/engines/verify.py --engine-python .venv-engines/bin/python

Every family is built tiny, quantized through the command line, and opened

- unquantized, from weights decoded by the format's description alone (decode.py): the yardstick, in float32; the same in bfloat16 is
  the noise floor that any engine running bfloat16 shows;
- in transformers through `quantkit.hf`, in bfloat16: the weights must be equal bit for bit;
- in vLLM on the CPU (generate.py, in the engines' own environment), in bfloat16: names, config matching, loaders and kernels are its own.

vLLM has no CPU kernel for packed experts in groups of 32, so there the multiply is ours (reference_experts.py) and the weights that
its loaders filled in are compared exactly. Its text-only Gemma 3n misses a part, which is given to it (gemma3n_text.py). What it
refuses on a CPU by design stands in the table with its own words. Exit code 1 if any row is not as expected.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import decode
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import tiny  # noqa: E402

PROMPTS, LENGTH = 2, 60  # longer than the tiny models' sliding window
FAR = 0.5  # KL; rounding gives .05 to .2 here, another random net about 1
STUBS = {"torchvision": "torchvision_ops", "torchaudio": "audio", "torchcodec": "codec"}
EXPERTS = ("gemma4_moe", "qwen3_moe", "mixtral")


@dataclass(frozen=True)
class Case:
    """One artefact. `refused`: a part of vLLM's message where it cannot run this on a CPU, and we know it."""

    family: str
    recipe: str = "awq-w4"
    refused: str | None = None


CASES = [
    *(Case(family) for family in tiny.FAMILIES),
    Case("llama", "awq-w4-asym"),
    Case("gemma4_dense", "awq-w4-asym"),
    Case("gemma4_moe", "awq-w4-asym"),
    Case("llama", "awq-w8", refused="CPUWNA16LinearKernel cannot implement"),
]


@dataclass
class Row:
    """One line of the table."""

    family: str
    recipe: str
    engine: str
    verdict: str = ""
    good: bool = False
    why: str = ""
    max: float | None = None
    mean: float | None = None
    floor_max: float | None = None
    floor_mean: float | None = None
    greedy: str = ""
    loss: float | None = None  # KL of the artefact to the model it was made from, by the yardstick


@dataclass
class Yardstick:
    """What the artefact's weights say."""

    logprobs: torch.Tensor  # (prompts, length - 1, vocabulary), float32
    greedy: np.ndarray
    floor: tuple[float, float]  # max and mean
    loss: float


def main() -> int:
    options = _options()
    os.environ.update(HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    cases = [case for case in CASES if not options.only or case.family in options.only]
    environment = _engine_environment(options.engine_python) if "vllm" in options.engines else {}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        work = options.keep or Path(scratch)
        for case in cases:
            for row in check(case, work, options, environment):
                print(f"{row.family} {row.recipe} {row.engine}: {row.verdict} {row.why}", file=sys.stderr, flush=True)
                rows.append(row)
    _print(rows)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0 if rows and all(row.good for row in rows) else 1


def _path(text: str) -> Path:
    return Path(text).absolute()  # commands run elsewhere; a virtual environment's python must stay the link that it is


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine-python", type=_path, default=ROOT / ".venv-engines/bin/python", help="the Python that has vLLM")
    parser.add_argument("--engines", nargs="+", choices=("transformers", "vllm"), default=("transformers", "vllm"))
    parser.add_argument("--only", nargs="+", choices=tiny.FAMILIES, help="these families, not all")
    parser.add_argument("--artefacts", type=_path, help="folders FAMILY-RECIPE written before, instead of quantizing now")
    parser.add_argument("--keep", type=_path, help="a folder for the models, artefacts and logs; a temporary one otherwise")
    parser.add_argument("--json", type=_path, help="write the rows here too")
    return parser.parse_args()


def check(case: Case, work: Path, options: argparse.Namespace, environment: dict[str, str]) -> list[Row]:
    """One row for each engine."""
    name = f"{case.family}-{case.recipe}"
    home = work / name
    source = tiny.build(case.family, home / "source")
    try:
        artefact = options.artefacts / name if options.artefacts else quantize(source, case.recipe, home)
        tokens = np.random.default_rng(0).integers(len(tiny.SPECIAL), tiny.VOCABULARY, (PROMPTS, LENGTH))
        np.save(home / "tokens.npy", tokens)
        yardstick = measure(source, artefact, home, tokens)
    except Exception as error:
        return [Row(case.family, case.recipe, "quantkit", "no artefact", why=_sentence(error))]
    rows = []
    for engine in options.engines:
        row = Row(case.family, case.recipe, engine, floor_max=yardstick.floor[0], floor_mean=yardstick.floor[1], loss=yardstick.loss)
        if engine == "transformers":
            in_transformers(row, artefact, home, tokens, yardstick)
        else:
            in_vllm(row, case, artefact, home, yardstick, options.engine_python, environment)
        rows.append(row)
    return rows


def quantize(source: Path, recipe: str, home: Path) -> Path:
    """Through the command line, as a user does."""
    command = [sys.executable, "-m", "quantkit", "quantize", str(source), "--recipe", recipe, "--output", str(home / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    (home / "quantize.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(f"quantize ended with {done.returncode}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return home / "out" / "compressed-tensors"


def measure(source: Path, artefact: Path, home: Path, tokens: np.ndarray) -> Yardstick:
    """The artefact's weights in float32 and bfloat16, and how far they are from the source's."""
    if not decode.plain(artefact, home / "plain"):
        raise RuntimeError("the artefact holds no packed weights")
    model = open_plain(home / "plain", torch.float32)
    logprobs, greedy = logprobs_of(model, tokens), greedy_of(model, tokens)
    rough = logprobs_of(open_plain(home / "plain", torch.bfloat16), tokens)
    if json.loads((source / "config.json").read_text())["model_type"] == "gemma3n":
        source = decode.text_part(source, home / "source text part")
    before = logprobs_of(open_plain(source, torch.float32), tokens)
    loss = (before.exp() * (before - logprobs)).sum(-1).mean().item()
    if not loss < FAR:
        raise RuntimeError(f"the decoded weights are {loss:.2f} nats from the source; these are not its weights")
    return Yardstick(logprobs, greedy, _distance(rough, logprobs), loss)


def open_plain(folder: Path, dtype: torch.dtype):
    """An unquantized checkpoint in transformers, whole or not at all."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, architecture).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if lost := {kind: sorted(keys)[:3] for kind, keys in info.items() if keys and kind.endswith("_keys")}:
        raise RuntimeError(f"{folder.name}: {lost}")
    return model.eval()


def logprobs_of(model, tokens: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens)).logits[:, :-1].float().log_softmax(-1)


def greedy_of(model, tokens: np.ndarray, count: int = 8) -> np.ndarray:
    """Plain greedy decoding without a cache."""
    ids = torch.from_numpy(tokens)
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return ids[:, tokens.shape[1] :].numpy()


def in_transformers(row: Row, artefact: Path, home: Path, tokens: np.ndarray, yardstick: Yardstick) -> None:
    """Through the door that quantkit gives its users."""
    try:
        from quantkit.hf import load_model

        model = load_model(artefact, dtype=torch.bfloat16)
        logprobs = logprobs_of(model, tokens)  # some weights are unpacked by the first forward
        held, expected = model.state_dict(), open_plain(home / "plain", torch.bfloat16).state_dict()
        wrong = [name for name in expected if name not in held or not torch.equal(expected[name].float(), held[name].float())]
        row.greedy = _agreement(greedy_of(model, tokens), yardstick.greedy)
    except Exception as error:
        row.verdict, row.why = "fails", _sentence(error)
        return
    row.max, row.mean = _distance(logprobs, yardstick.logprobs)
    row.good = not wrong and _near(row)
    row.verdict = "ok" if row.good else "wrong weights" if wrong else "loads only"
    row.why = f"{len(wrong)} of {len(expected)} tensors, first {wrong[0]}" if wrong else ""


def in_vllm(row: Row, case: Case, artefact: Path, home: Path, yardstick: Yardstick, python: Path, environment: dict[str, str]) -> None:
    """generate.py in the engines' environment; its answer is judged here."""
    if case.family == "gemma3n":
        artefact = decode.text_part(artefact, home / "text part")
    output = home / "vllm"
    command = [str(python), str(HERE / "generate.py"), str(artefact), str(home / "tokens.npy"), str(output)]
    with open(home / "vllm.log", "w") as log:
        done = subprocess.run(command, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT, timeout=600)
    if not output.with_suffix(".json").exists():
        row.verdict, row.why = "fails", f"the engine's process ended with {done.returncode}; see vllm.log (--keep)"
        return
    facts = json.loads(output.with_suffix(".json").read_text())
    if "error" in facts:
        row.good = case.refused is not None and case.refused in facts["error"]
        said = facts["error"][facts["error"].index(case.refused) :] if row.good else facts["error"]
        row.verdict, row.why = "refused" if row.good else "fails", _shorter(said)
        return
    arrays = np.load(output.with_suffix(".npz"))
    logprobs = torch.from_numpy(arrays["logprobs"])
    if not logprobs.isfinite().all():
        row.verdict, row.why = "loads only", "a log-probability is missing or not finite"
        return
    row.max, row.mean = _distance(logprobs, yardstick.logprobs)
    row.greedy = _agreement(arrays["greedy"], yardstick.greedy)
    if case.family in EXPERTS:
        _judge_experts(row, artefact, arrays, facts)
    else:
        row.good = _near(row)
        row.verdict = "ok" if row.good else "loads only"
        row.why = "; ".join(facts["added"])


def _near(row: Row) -> bool:
    """As far from the yardstick as bfloat16 alone explains."""
    return row.mean <= 2 * row.floor_mean + 0.002 and row.max <= 3 * row.floor_max + 0.02


def _judge_experts(row: Row, artefact: Path, arrays, facts: dict) -> None:
    """Routing is discrete: noise sends a token to another expert, so log-probabilities only show that nothing is far off."""
    expected = decode.experts(artefact)
    loaded = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name.startswith("layer ")}
    wrong = [name for name in expected if name not in loaded or not torch.equal(expected[name].float(), loaded[name])]
    ours = bool(facts["experts_refused"])
    row.good = bool(expected) and not wrong and row.mean <= 3 * row.floor_mean + 0.05
    if wrong:
        row.verdict, row.why = "wrong weights", f"{len(wrong)} of {len(expected)} expert tensors, first {wrong[0]}"
    elif not expected:
        row.verdict, row.why = "loads only", "no packed experts in the artefact"
    else:
        row.verdict = "weights exact, multiply ours" if ours else "weights exact"
        row.why = f"all {len(expected)} expert tensors equal" + (f"; alone vLLM says: {facts['experts_refused'][0]}" if ours else "")


def _engine_environment(python: Path) -> dict[str, str]:
    """PYTHONPATH with a stand-in for each optional library that is there and does not load beside this torch."""
    if not python.exists():
        raise SystemExit(f"{python}: no such Python; `make engines` makes it, or name another with --engine-python")
    probe = "import importlib.util, sys\nif importlib.util.find_spec(sys.argv[1]): __import__(sys.argv[1])"
    broken = [library for library in STUBS if subprocess.run([str(python), "-c", probe, library], capture_output=True).returncode]
    if broken:
        print(f"stand-ins for {', '.join(broken)}, which do not load beside this torch", file=sys.stderr)
    paths = [str(HERE / "stubs" / STUBS[library]) for library in broken]
    return {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}


def _distance(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    difference = (one - other).abs()
    return difference.max().item(), difference.mean().item()


def _agreement(one: np.ndarray, other: np.ndarray) -> str:
    """How many tokens of the greedy continuations come before the first difference."""
    same = [int(np.cumprod(a == b).sum()) for a, b in zip(one, other, strict=True)]
    return f"{sum(same)}/{other.size}"


def _sentence(error: Exception) -> str:
    return _shorter(f"{type(error).__name__}: {error}")


def _shorter(text: str, limit: int = 240) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _print(rows: list[Row]) -> None:
    table = Table(title="|dlogprob| to the decoded weights in float32; floor: the same weights in bfloat16; loss: KL to the source")
    for heading in ("family", "recipe", "engine", "verdict", "max", "mean", "floor max", "floor mean", "greedy", "loss"):
        table.add_column(heading, justify="left" if heading in ("family", "recipe", "engine", "verdict") else "right")

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    for row in rows:
        figures = [number(value) for value in (row.max, row.mean, row.floor_max, row.floor_mean)]
        verdict = row.verdict if row.good else f"[red]{row.verdict}[/red]"
        table.add_row(row.family, row.recipe, row.engine, verdict, *figures, row.greedy, number(row.loss))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for why in dict.fromkeys(f"{row.family} {row.recipe} {row.engine}: {row.why}" for row in rows if row.why):
        console.print(why, markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
