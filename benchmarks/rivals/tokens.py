"""Calibration and evaluation tokens that every contender gets alike. Runs with quantkit's environment; the same bytes every time.

    python benchmarks/rivals/tokens.py MODEL CALIBRATION.safetensors EVALUATION.safetensors --stories FOLDER
    python benchmarks/rivals/tokens.py MODEL CALIBRATION.safetensors EVALUATION.safetensors --calibration FOLDER --heldout FOLDER

`ids` is (rows, tokens) int64 without padding. A row starts where a piece of a document starts, with the tokens that the tokenizer puts
there; pieces follow one another, and what goes beyond a row's end is left out. Evaluation rows have a label: `language` (rows) int64,
whose names are a JSON list in the file's metadata. Files are named by language: `fr_docs.jsonl`, one {"text": ...} a line. Of such a file
only lines that are in its language are taken (translations of manuals are half untranslated): by script, or where that is Latin by the
commonest words. Calibration rows are drawn evenly over files, evaluation rows over languages and over the files of each.
"""

import argparse
import itertools
import json
import random
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

SEED = 0
STORIES, MIXED = (48, 192), (54, 256)  # calibration rows, tokens of a row
ROWS_OF_A_LANGUAGE = 16  # evaluation
PIECE = 200  # characters, at least, of a piece of a document; it ends with a line
SCRIPTS = {
    "ar": ("ARABIC",),
    "hi": ("DEVANAGARI",),
    "ja": ("HIRAGANA", "KATAKANA", "CJK"),
    "ko": ("HANGUL",),
    "ru": ("CYRILLIC",),
    "zh": ("CJK",),
}
WORDS = {
    "en": "the of and to in is that for with are this be on you it",
    "es": "el la de los las que en y un una por con para se del",
    "fr": "le la les de des et un une du en que pour dans est vous",
    "nl": "de het een van en in te op dat is voor met u zijn niet",
}


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
        files = shuffled(sorted(arguments.calibration.glob("*.jsonl")))
        calibration = evenly([rows(tokenizer, pieces(path), length) for path in files], count, "calibration")
        languages: dict[str, list[Iterator[list[int]]]] = {}
        for path in sorted(arguments.heldout.glob("*.jsonl")):
            languages.setdefault(language_of(path), []).append(rows(tokenizer, pieces(path), length))
        evaluation = [(row, name) for name, own in languages.items() for row in evenly(own, ROWS_OF_A_LANGUAGE, f"held-out {name}")]
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


def language_of(path: Path) -> str:
    return path.stem.partition("_")[0]


def pieces(path: Path) -> list[str]:
    """Parts of the file's documents, each some lines of the file's language."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        piece = ""
        for part in json.loads(line)["text"].splitlines(keepends=True):
            piece += part if spoken(part, language_of(path)) else ""
            if len(piece) >= PIECE:
                found.append(piece)
                piece = ""
        found += [piece] if piece else []
    return shuffled(found)


def spoken(line: str, language: str) -> bool:
    """Whether a line is in a language: most of its letters in its script, or, in Latin script, no other language's words more often."""
    if language in SCRIPTS:
        letters = [unicodedata.name(letter, "") for letter in line if letter.isalpha()]
        return 2 * sum(name.startswith(SCRIPTS[language]) for name in letters) > len(letters)
    words = line.lower().split()
    counts = {name: sum(word in common.split() for word in words) for name, common in WORDS.items()}
    return counts[language] == max(counts.values())


def rows(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], length: int) -> Iterator[list[int]]:
    """Full rows of `length` tokens, each from a document's start on."""
    row: list[int] = []
    for document in documents:
        row += tokenizer(document, truncation=True, max_length=length)["input_ids"]
        if len(row) >= length:
            yield row[:length]
            row = []


def evenly(sources: list[Iterator[list[int]]], count: int, of: str) -> list[list[int]]:
    """`count` rows, one of each source in turn; a source that is used up is passed over."""
    missing = object()
    turns = itertools.chain.from_iterable(itertools.zip_longest(*sources, fillvalue=missing))
    found = list(itertools.islice((row for row in turns if row is not missing), count))
    if len(found) < count:
        raise SystemExit(f"{of}: the sources hold {len(found)} rows, {count} are wanted")
    return found


if __name__ == "__main__":
    main()
