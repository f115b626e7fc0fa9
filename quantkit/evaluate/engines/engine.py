"""The one interface that all engines have."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from quantkit.types import Json

Row = Sequence[int]
LOGITS = 1 << 28  # numbers of logits that a batch may make: 1 GiB in fp32
TOKENS = 4096  # of a batch, padding counted


class Engine(ABC):
    """A model behind an engine. Rows are token ids as they are: nothing is added, nothing templated."""

    name: str
    about: Json  # versions, precision, whatever decides the figures
    vocabulary: int
    whole: bool = True  # distributions cover the whole vocabulary; False: top tokens, the rest of probability spread evenly
    ends: frozenset[int] = frozenset()  # tokens that end an answer

    @abstractmethod
    def log_probs(self, rows: Sequence[Row]) -> Iterator[tuple[int, Float[Tensor, "tokens vocabulary"]]]:
        """(number of the row, log-probabilities of what follows each of its tokens, fp32), in any order."""

    @abstractmethod
    def generate(self, prompts: Sequence[Row], most: int) -> list[list[int]]:
        """What follows each prompt when the likeliest token is always taken, at most so many and without the token that ends it."""

    def tokenize(self, text: str) -> list[int] | None:
        """The engine's own tokens of a text (special tokens read as such, none added), where it brings a tokenizer in its files."""
        return None

    def close(self) -> None:  # noqa: B027 (nothing to give back is fine)
        """Give the memory back."""


def batches(rows: Sequence[Row], vocabulary: int, tokens: int = TOKENS) -> Iterator[list[int]]:
    """Numbers of rows of about one length, longest first, so that what does not fit fails at once."""
    room = max(1, min(tokens, LOGITS // max(vocabulary, 1)))
    batch: list[int] = []
    for number in sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i)):
        if batch and len(rows[batch[0]]) * (len(batch) + 1) > room:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def padded(rows: Sequence[Row], left: bool = False) -> tuple[Tensor, Tensor]:
    """(ids, 1 where one is real), int64."""
    width = max(map(len, rows))
    ids, real = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for number, row in enumerate(rows):
        part = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, part], real[number, part] = torch.tensor(list(row), dtype=torch.int64), 1
    return ids, real


def end_tokens(folder: Path) -> frozenset[int]:
    """The ids that end an answer, as generation_config.json and config.json say."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        try:
            value = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        found |= {one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)}
    return frozenset(found)


def cut(ids: Iterable[int], ends: frozenset[int]) -> list[int]:
    """Up to the first token that ends it."""
    found: list[int] = []
    for token in ids:
        if token in ends:
            break
        found.append(int(token))
    return found


def versions(*names: str) -> Json:
    """Of installed distributions."""
    found: Json = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
