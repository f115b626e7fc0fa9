"""Calibration and evaluation tokens that every contender gets alike. Runs with quantkit's environment; the same bytes every time.

    python benchmarks/rivals/tokens.py MODEL CALIBRATION.safetensors EVALUATION.safetensors --stories FOLDER
    python benchmarks/rivals/tokens.py MODEL CALIBRATION.safetensors EVALUATION.safetensors --calibration FOLDER --heldout FOLDER

`ids` is (rows, tokens) int64 without padding. A row starts where a document starts, with the tokens that the tokenizer puts there; short
documents follow one another, and what goes beyond a row's end is left out. Evaluation rows have a label: `language` (rows) int64, whose
names are a JSON list in the file's metadata. Files are named by language: `fr_docs.jsonl`, one {"text": ...} a line.
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

SEED = 0
STORIES, MIXED = (48, 192), (24, 256)  # calibration rows, tokens of a row
ROWS_OF_A_LANGUAGE = 10  # evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration_ids", type=Path)
    parser.add_argument("evaluation_ids", type=Path)
    parser.add_argument("--stories", type=Path, help="a folder with samples.json, a list of stories that the model told")
    parser.add_argument("--calibration", type=Path, help="a folder of .jsonl files to calibrate on, evenly over the files")
    parser.add_argument("--heldout", type=Path, help="a folder of .jsonl files to evaluate on, evenly over the languages")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if arguments.stories:
        count, length = STORIES
        told = shuffled(json.loads((arguments.stories / "samples.json").read_text(encoding="utf-8")))
        every = list(rows(tokenizer, told, length))
        calibration, evaluation = every[:count], [(row, "en") for row in every[count:]]
    elif arguments.calibration and arguments.heldout:
        count, length = MIXED
        calibration = list(evenly([rows(tokenizer, file, length) for file in shuffled(files(arguments.calibration))], count))
        languages: dict[str, list[Iterator[list[int]]]] = {}
        for path in sorted(arguments.heldout.glob("*.jsonl")):
            languages.setdefault(path.stem.partition("_")[0], []).append(rows(tokenizer, texts(path), length))
        evaluation = [(row, name) for name, sources in languages.items() for row in evenly(sources, ROWS_OF_A_LANGUAGE)]
    else:
        parser.error("either --stories, or --calibration and --heldout")
    names = sorted({name for _, name in evaluation})
    labels = torch.tensor([names.index(name) for _, name in evaluation])
    save_file({"ids": torch.tensor(calibration)}, arguments.calibration_ids)
    ids = torch.tensor([row for row, _ in evaluation])
    save_file({"ids": ids, "language": labels}, arguments.evaluation_ids, metadata={"languages": json.dumps(names)})
    print(f"{arguments.model.name}: calibration {len(calibration)} x {length}, evaluation {len(ids)} x {length}, {names}")


def shuffled(items: Iterable[Any]) -> list[Any]:
    items = list(items)
    random.Random(SEED).shuffle(items)
    return items


def files(folder: Path) -> list[list[str]]:
    return [texts(path) for path in sorted(folder.glob("*.jsonl"))]


def texts(path: Path) -> list[str]:
    return shuffled(json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines())


def rows(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], length: int) -> Iterator[list[int]]:
    """Full rows of `length` tokens, each from a document's start on."""
    row: list[int] = []
    for document in documents:
        row += tokenizer(document, truncation=True, max_length=length)["input_ids"]
        if len(row) >= length:
            yield row[:length]
            row = []


def evenly(sources: list[Iterator[list[int]]], count: int) -> Iterator[list[int]]:
    """`count` rows, one of each source in turn; a source that is used up is passed over."""
    missing = object()
    turns = itertools.chain.from_iterable(itertools.zip_longest(*sources, fillvalue=missing))
    found = list(itertools.islice((row for row in turns if row is not missing), count))
    if len(found) < count:
        raise SystemExit(f"the sources hold {len(found)} rows, {count} are wanted")
    return iter(found)


if __name__ == "__main__":
    main()
