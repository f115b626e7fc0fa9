"""What a calibration set is worth, language by language: one recipe, sets of one size, KL to the original on text of none of them.

    python benchmarks/calibration.py MODEL HELDOUT --sets stem-agentic english.txt [--recipe awq-w4] [--tokens 65536] [--seeds 0 1]

HELDOUT is a folder of LANGUAGE_KIND.jsonl files ({"text": ...} a line) that none of the sets has a line of. Each set gets the same budget
and row length. The artefact is opened in transformers; KL in nats a token over `--positions` tokens of every file, windows of 256.
"""

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
import yaml

import quantkit.hf
from quantkit import pipeline
from quantkit.calibrate.batches import make_batches
from quantkit.calibrate.draw import Row
from quantkit.calibrate.render import load_tokenizer
from quantkit.calibrate.sources import read_samples
from quantkit.evaluate.divergence import Score, compare
from quantkit.recipe import load_recipe
from quantkit.types import Batch

WINDOW = 256


def windows(folder: Path, model: Path, positions: int) -> list[Batch]:
    """Text of every file, without BOS in the middle of it: each window begins with the tokenizer's own."""
    tokenizer = load_tokenizer(model)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = []
    for path in sorted(folder.glob("*_*.jsonl")):
        language, _, kind = path.stem.partition("_")
        ids: list[int] = []
        for sample in read_samples([path]):
            ids += tokenizer(sample.text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= positions:
                break
        step = WINDOW - len(bos)
        for start in range(0, min(len(ids), positions), step):
            part = bos + ids[start : start + step]
            rows.append(Row(part, bytes(len(part)), {"id": path.stem, "language": language, "domain": kind}, ""))
    return make_batches(rows, 8 * WINDOW)


@torch.no_grad()
def divergence(folder: Path, base: torch.nn.Module, work: list[Batch]) -> dict[str, Score]:
    ours = quantkit.hf.load_model(folder, dtype="auto")
    scores: dict[str, Score] = defaultdict(Score)
    for batch in work:
        p, q = base(input_ids=batch.ids).logits, ours(input_ids=batch.ids).logits
        for row, labels in enumerate(batch.labels):
            score = compare(p[row, :-1], q[row, :-1], batch.ids[row, 1:], batch.real[row, 1:])
            scores[labels["language"]].add(score)
            scores["all"].add(score)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--sets", nargs="+", required=True)
    parser.add_argument("--recipe", default="awq-w4")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--positions", type=int, default=6_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = windows(arguments.heldout, arguments.model, arguments.positions)
    base = quantkit.hf.load_model(arguments.model, dtype="auto")
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name in arguments.sets:
        for seed in arguments.seeds:
            with tempfile.TemporaryDirectory() as folder:
                fields = load_recipe(arguments.recipe).model_dump(mode="json", exclude={"name"})
                fields["calibration"] |= {"mix": name, "tokens": arguments.tokens, "sequence_length": arguments.length, "seed": seed}
                fields["score"] = {"samples": 0}
                path = Path(folder) / f"{arguments.recipe}.yaml"
                path.write_text(yaml.safe_dump(fields))
                result = pipeline.quantize(str(arguments.model), recipe=str(path), output=Path(folder) / "out")
                print(f"{name}, seed {seed}: {result.report['calibration']['tokens']:,} tokens", flush=True)
                for language, score in divergence(result.artefacts["compressed-tensors"], base, work).items():
                    found[language][name].append(score.kl / score.tokens)
    first = arguments.sets[0]
    print(f"{'language':10}" + "".join(f"{Path(name).name[:20]:>22}" for name in arguments.sets) + f"{'first of last':>16}")
    for language in sorted(found, key=lambda name: (name == "all", name)):
        means = {name: sum(values) / len(values) for name, values in found[language].items()}
        spread = {name: max(values) - min(values) for name, values in found[language].items()}
        cells = "".join(f"{means[name]:>14.5f} ±{spread[name] / 2:.5f}" for name in arguments.sets)
        print(f"{language:10}{cells}{means[first] / means[arguments.sets[-1]]:>16.3f}")


if __name__ == "__main__":
    main()
