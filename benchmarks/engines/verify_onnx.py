"""Do onnxruntime and onnxruntime-genai compute what the integers of an ONNX folder say?

    python benchmarks/engines/verify_onnx.py [--only llama gemma4_moe] [--json FILE]

Every family is built tiny, quantized in the format onnx, symmetric and asymmetric, and

- onnx's checker reads the graph;
- onnxruntime is fed in pieces through the cache, one row padded on the left, past the sliding window; its logits stand beside those of
  transformers' own class in fp32 with every solved weight decoded from the run's store;
- onnxruntime-genai opens the folder by its genai_config.json and picks 40 tokens greedily, beside transformers' generate;
- the recipe's choices stand at the end: accuracy level 4, embeddings in 8 and 4 bits, 8-bit weights, signed scales.

Exit code 1 if a row is not as expected. Level 4 rounds activations: its error is shown, not judged.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
import yaml
from rich.console import Console
from rich.table import Table

from quantkit import pipeline
from quantkit.recipe import load_recipe

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import onnx_runs  # noqa: E402
import tiny  # noqa: E402

CLOSE, TOKENS = 2e-4, 40
PROMPT = list(range(30, 42))
QUICK = {"calibration": {"samples": 8, "sequence_length": 48}, "score": {"samples": 0}, "search": {"exponents": 4, "shrinks": 3}}
LEVEL4 = {"onnx": {"accuracy_level": 4}}


@dataclass(frozen=True)
class Case:
    family: str
    label: str
    base: str = "awq-w4"
    changes: dict = field(default_factory=dict)
    exact: bool = True


FAMILIES = (  # all of tests/tiny.py; first one of each
    "llama", "gemma4_moe", "gemma3_text", "gemma4_dense", "qwen3_moe", "gemma4_e", "gemma3n", "qwen3", "qwen2", "mistral", "mixtral",
    "gemma4_text", "gemma3_vision", "gemma3n_text",
)  # fmt: skip
CASES = [
    *(Case(family, kind, base) for family in FAMILIES for kind, base in (("sym", "awq-w4"), ("asym", "awq-w4-asym"))),
    Case("llama", "w8 g128", "awq-w8", {"weights": {"bits": 8, "group": 128}}),
    Case("gemma4_moe", "w8 row", "rtn-w4", {"weights": {"bits": 8, "group": "row"}}),
    Case("qwen2", "embeddings 8", changes={"onnx": {"embeddings": 8}}),
    Case("gemma4_e", "embeddings 4", changes={"onnx": {"embeddings": 4}}),
    Case("llama", "level 4", changes=LEVEL4, exact=False),
    Case("gemma4_moe", "level 4", changes=LEVEL4, exact=False),
]


@dataclass
class Row:
    """One line of the table."""

    family: str
    label: str
    good: bool = False
    far: float = float("nan")  # of the logits
    same: float = float("nan")  # share of positions with the same argmax
    greedy: int = 0  # tokens that are the reference's, from the first
    nodes: int = 0
    seconds: float = 0.0
    why: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=tiny.FAMILIES, help="these families, not all")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    rows = []
    for case in CASES:
        if options.only and case.family not in options.only:
            continue
        began, row = time.perf_counter(), Row(case.family, case.label)
        with tempfile.TemporaryDirectory() as work:
            try:
                check(case, Path(work), row)
            except Exception as error:
                row.good, row.why = False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        row.seconds = round(time.perf_counter() - began, 1)
        verdict = "ok" if row.good else "NOT AS EXPECTED"
        print(f"{row.family} {row.label}: {verdict}, max {row.far:.1e} {row.why}", file=sys.stderr, flush=True)
        rows.append(row)
    show(rows)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0 if rows and all(row.good for row in rows) else 1


def check(case: Case, work: Path, row: Row) -> None:
    import onnx

    source, recipe = tiny.build(case.family, work / "source"), work / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**load_recipe(case.base).model_dump(mode="json", exclude={"name"}), **QUICK, **case.changes}))
    folder = pipeline.quantize(str(source), recipe=str(recipe), output=work / "out", formats=["onnx"]).artefacts["onnx"]
    plan, sizes = pipeline.plan(str(source), str(recipe), formats=["onnx"])
    if sizes["onnx"] != (folder / "model.onnx.data").stat().st_size:
        raise RuntimeError("plan and file differ in size")
    onnx.checker.check_model(str(folder / "model.onnx"))
    row.nodes = len(onnx.load(folder / "model.onnx", load_external_data=False).graph.node)
    model = onnx_runs.reference(source, onnx_runs.solved_store(work / "out", plan), plan, load_recipe(str(recipe)).onnx.embeddings)
    row.far, row.same = onnx_runs.distance(folder, model)
    ours, theirs = onnx_runs.greedy(folder, PROMPT, TOKENS), onnx_runs.greedy_torch(model, PROMPT, TOKENS)
    agree = [a == b for a, b in zip(ours, theirs, strict=False)]
    row.greedy = (agree.index(False) if False in agree else len(agree)) - len(PROMPT)
    row.good = not case.exact or (row.far < CLOSE and row.same == 1 and ours == theirs)


def show(rows: list[Row]) -> None:
    table = Table("family", "", "max |d| logits", "same argmax", "greedy tokens", "nodes", "seconds", "verdict")
    for row in rows:
        verdict = "as expected" if row.good else f"NOT AS EXPECTED {row.why}"
        numbers = f"{row.far:.1e}", f"{row.same:.4f}", str(row.greedy), str(row.nodes), f"{row.seconds:.0f}"
        table.add_row(row.family, row.label, *numbers, verdict)
    Console(width=140).print(table)


if __name__ == "__main__":
    sys.exit(main())
