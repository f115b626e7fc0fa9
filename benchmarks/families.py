"""A census of the causal language models of the installed transformers, each built small from its config on a CPU.

    python benchmarks/families.py                    # every model type; goes on where it stopped
    python benchmarks/families.py --types olmo2,phi3 # some
    python benchmarks/families.py --table            # what is known so far, as Markdown

For each: does it stream (relative change of the logits against the whole model), which folds are found, does it quantize (KL of AWQ with
the discovered table and of plain rounding, 4 bits, a scale a row), and do the files open again with no tensor missing.
Each type runs in a process of its own with a time limit; a line of JSON each is appended to the file of results.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SECONDS = 120  # for one type
STREAMS = 1e-4
RECIPE = """description: census
method: {method}
weights: {{bits: 4, group: row}}
calibration: {{mix: smoke, samples: 6, sequence_length: 96}}
score: {{samples: 6, sequence_length: 96}}
"""


def measure(model_type: str) -> dict[str, Any]:
    """One row of the census; what fails says so in the place of its figure."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import tiny
    import torch
    import transformers

    from quantkit.discover import discover
    from quantkit.hf import load_model
    from quantkit.model.blocks import Skeleton, Stream
    from quantkit.model.checkpoint import Checkpoint
    from quantkit.model.twin import build_twin
    from quantkit.pipeline import quantize
    from quantkit.types import Batch

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    row: dict[str, Any] = {"model_type": model_type, "transformers": transformers.__version__}

    def tried(key: str, step: Any) -> Any:
        try:
            row[key] = step()
        except Exception as problem:
            row[key] = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
            return None
        return row[key]

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "model")

        def build() -> bool:
            model = build_twin(transformers.AutoConfig.for_model(model_type).to_dict(), torch.float32)
            model.save_pretrained(folder)
            tiny.save_tokenizer(folder)
            return True

        def stream() -> float:
            ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
            source = Checkpoint(folder)
            skeleton = Skeleton(source, torch.float32)
            flow = Stream(skeleton, [Batch(ids, torch.ones_like(ids, dtype=torch.bool))])
            state = flow.start()
            for index in range(len(skeleton.blocks)):
                with skeleton.block(index) as block, torch.no_grad():
                    flow.advance(block, state)
            cls = getattr(transformers, source.config["architectures"][0])
            with torch.no_grad():
                whole = cls.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids, use_cache=False).logits
            change = float((flow.logits(state, 0, slice(None)) - whole).abs().max() / whole.abs().max())
            if not change < STREAMS:
                raise AssertionError(f"logits moved by {change:.1e}")
            return change

        def folds() -> list[str]:
            found = discover(Checkpoint(folder).config)
            return [f"{fold.producer} -> {', '.join(fold.consumers)}" for fold in found.family.folds]

        def kl(method: str) -> float:
            recipe = Path(place, f"{method}.yaml")
            recipe.write_text(RECIPE.format(method=method))
            return float(quantize(str(folder), recipe=str(recipe), output=Path(place, method), family="discovered").scores["kl"])

        if tried("builds", build) and tried("streams", stream) is not None and tried("folds", folds) is not None:
            tried("kl_rounded", lambda: kl("rtn"))
            if isinstance(tried("kl", lambda: kl("awq")), float):
                tried("opens", lambda: load_model(Path(place, "awq", "compressed-tensors")) is not None)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row for each model type, totals first."""
    streams = sum(isinstance(row.get("streams"), float) for row in rows)
    done = sum(row.get("opens") is True for row in rows)
    lines = [f"{len(rows)} model types: {streams} stream with equal logits, {done} quantize and open again.", ""]
    lines += ["| model type | logits move by | folds | KL | plain rounding | opens | what fails |", "|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda one: one["model_type"]):
        wrong = next((row[key] for key in ("builds", "streams", "folds", "kl_rounded", "kl", "opens") if isinstance(row.get(key), str)), "")
        cells = [f"{row[key]:.1e}" if isinstance(row.get(key), float) else "" for key in ("streams", "kl", "kl_rounded")]
        count = str(len(row["folds"])) if isinstance(row.get("folds"), list) else ""
        opens, said = "yes" if row.get("opens") is True else "", wrong.replace("|", "/")
        lines.append(f"| {row['model_type']} | {cells[0]} | {count} | {cells[1]} | {cells[2]} | {opens} | {said} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", help="comma-separated; default: all causal language models of transformers")
    parser.add_argument("--results", type=Path, default=Path("families.jsonl"))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    rows = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    if not options.table:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        known = {row["model_type"] for row in rows}
        wanted = options.types.split(",") if options.types else list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        for model_type in (one for one in wanted if one not in known):
            command = [sys.executable, __file__, "--one", model_type]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
                said = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
                row = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"model_type": model_type, "builds": said}
            except subprocess.TimeoutExpired:
                row = {"model_type": model_type, "builds": f"more than {SECONDS} s"}
            rows.append(row)
            with options.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
