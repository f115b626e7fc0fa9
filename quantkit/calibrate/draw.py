"""How much of what: a mix's shares as token quotas, rows drawn until they are full, and a manifest that says what was fed.

The order is the seed's and the samples' own (hashes), so the same recipe gives the same token ids on every machine.
"""

import hashlib
import math
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from quantkit.calibrate.render import AS_SERVED, PLAIN, SPEAKERS, render, special_tokens
from quantkit.calibrate.samples import SHUFFLED, Sample, choose, in_seeds_order
from quantkit.calibrate.sources import empty, read_source
from quantkit.errors import CalibrationError
from quantkit.recipe import Calibration, Mix, MixSource
from quantkit.types import Json

TOLERANCE = 0.02  # of a quota: a whole sample that ends so near is not cut
LOOKED_AT = 20_000  # rows of a Hub's data set in search of one language and domain, before it counts as holding no more
Key = tuple[str, str]  # language, domain; "*" where the mix gives no shares of them
EVERYTHING = ("*", "*")


@dataclass(frozen=True, slots=True)
class Row:
    """One sample as it is fed."""

    ids: list[int]
    speakers: bytes
    labels: dict[str, str]
    digest: str  # of the sample
    source: str = ""
    how: str = PLAIN
    dropped: tuple[str, ...] = ()
    cut: bool = False  # its end is not fed

    def until(self, tokens: int) -> "Row":
        if tokens >= len(self.ids):
            return self
        return Row(self.ids[:tokens], self.speakers[:tokens], self.labels, self.digest, self.source, self.how, self.dropped, True)


def make_row(sample: Sample, tokenizer: Any, length: int, thinking: bool | None = None, source: str = "") -> Row:
    made = render(sample, tokenizer, thinking)
    return Row(made.ids, made.speakers, sample.labels, sample.digest, source, made.how, made.dropped).until(length)


@dataclass(frozen=True, slots=True)
class Drawn:
    """What is fed, and where more of it is."""

    rows: list[Row]
    reserve: Iterator[Row]  # rendered as it is taken; the samples that the quotas left over, every language and domain in turn
    asked: int | None  # tokens
    limited_by: str | None  # the language and domain that holds the least of what the quotas ask for, where the budget was lowered


def draw(mix: Mix, settings: Calibration, tokenizer: Any) -> Drawn:
    """Rows of a mix: every language and domain to its share of the budget, within 2%.

    Where one of them holds less than its quota, the budget is lowered for all, so that the shares hold, and `limited_by` names it.

    Raises:
        CalibrationError: a source that cannot be read, a share that no source can fill, no sample at all, or no end (a Hub's set and
            no budget).
    """
    feeds = [_Feed(source, mix, settings, tokenizer) for source in mix.sources]
    names = ", ".join(source.name for source in mix.sources)
    if settings.samples is not None:
        rows = _some(mix, settings, tokenizer, feeds)
        if not rows:
            raise CalibrationError(f"{empty(names)}; no sample is longer than one token")
        return Drawn(rows, iter(()), None, None)
    asked = settings.tokens or mix.tokens
    if asked is None and (endless := next((source for source in mix.sources if source.hub), None)):
        raise CalibrationError(f"the data set {endless.name} has no end that is worth waiting for; give calibration.tokens")
    cells = [_Cell(key, share, feeds) for key, share in _shares(mix).items()]
    for cell in cells:
        cell.grow(math.inf if asked is None else asked * cell.share)
        if not cell.tokens and cell.key != EVERYTHING:
            raise CalibrationError(f"{names}: nothing of {' / '.join(cell.key)}, which has a share of the mix")
        if not cell.tokens:
            raise CalibrationError(f"{empty(names)}; no sample is longer than one token")
    poorest = min(cells, key=lambda cell: cell.tokens / cell.share)
    budget = poorest.tokens / poorest.share
    lowered = asked is None or budget < asked
    budget = budget if lowered else asked or 0
    rows = []
    for cell in cells:
        taken = fill([len(row.ids) for row in cell.rows], round(budget * cell.share))
        rows += [cell.rows[index].until(tokens) for index, tokens in taken]
        left = {index for index, _ in taken}
        cell.left = deque(row for index, row in enumerate(cell.rows) if index not in left)
    return Drawn(rows, _reserve(cells), asked, " / ".join(poorest.key) if lowered and len(cells) > 1 else None)


def _some(mix: Mix, settings: Calibration, tokenizer: Any, feeds: Sequence["_Feed"]) -> list[Row]:
    """`settings.samples` of them, in turn from every language and domain: no quotas, for quick runs."""
    found = (sample for feed in feeds for sample in islice(feed.samples(), SHUFFLED if feed.source.hub else None))
    chosen = choose((sample for sample in found if mix_share(mix, _key(mix, sample))), settings.samples, settings.seed)
    rows = [make_row(sample, tokenizer, _longest(settings), settings.thinking) for sample in chosen]
    return [row for row in rows if len(row.ids) > 1]


def fill(lengths: Sequence[int], quota: int) -> list[tuple[int, int]]:
    """(index, tokens taken of it): whole samples in their order while they fit, and one cut where none ends near the quota."""
    if sum(lengths) <= quota:
        return list(enumerate(lengths))
    taken: list[tuple[int, int]] = []
    total = 0
    for index, length in enumerate(lengths):
        if total >= quota * (1 - TOLERANCE):
            return taken
        if total + length <= quota * (1 + TOLERANCE):
            taken.append((index, length))
            total += length
    gap, whole = quota - total, {index for index, _ in taken}
    longer = next((index for index, length in enumerate(lengths) if index not in whole and length > gap), None)
    if total < quota * (1 - TOLERANCE) and longer is not None and gap > 1:
        taken.append((longer, gap))
    return taken


def _longest(settings: Calibration) -> int:
    """Tokens of a row at most; packing cuts by itself, and loses nothing."""
    return settings.sequence_length if settings.packing == "whole" else 1 << 30


def mix_share(mix: Mix, key: Key) -> float:
    """A language's and domain's share of the mix before it is normalised; zero where it is not drawn."""
    return (mix.languages.get(key[0], 0.0) if mix.languages else 1.0) * (mix.domains.get(key[1], 0.0) if mix.domains else 1.0)


def _shares(mix: Mix) -> dict[Key, float]:
    keys = [(language, domain) for language in mix.languages or ("*",) for domain in mix.domains or ("*",)]
    total = sum(mix_share(mix, key) for key in keys)
    return {key: mix_share(mix, key) / total for key in sorted(keys)}


def _key(mix: Mix, sample: Sample) -> Key:
    return (sample.language if mix.languages else "*", sample.domain if mix.domains else "*")


class _Feed:
    """One source, read as far as it is asked for; samples of another language or domain wait until theirs is."""

    def __init__(self, source: MixSource, mix: Mix, settings: Calibration, tokenizer: Any):
        self.source, self.mix, self.settings, self.tokenizer = source, mix, settings, tokenizer
        self._stream = self.samples()
        self._waiting: dict[Key, deque[Sample]] = {}
        self._seen: set[str] = set()

    def samples(self) -> Iterator[Sample]:
        return in_seeds_order(read_source(self.source), self.settings.seed)

    def next(self, key: Key) -> Row | None:
        """The next row of a cell; None where the source holds no more of it."""
        while sample := self._next(key):
            if sample.digest in self._seen:  # the same words twice weigh twice
                continue
            self._seen.add(sample.digest)
            row = make_row(sample, self.tokenizer, _longest(self.settings), self.settings.thinking, self.source.name)
            if len(row.ids) > 1:
                return row
        return None

    def _next(self, key: Key) -> Sample | None:
        waiting = self._waiting.setdefault(key, deque())
        if waiting:
            return waiting.popleft()
        for sample in islice(self._stream, LOOKED_AT if self.source.hub else None):
            found = _key(self.mix, sample)
            if found == key:
                return sample
            if mix_share(self.mix, found):
                self._waiting.setdefault(found, deque()).append(sample)
        return None


@dataclass(slots=True)
class _Cell:
    """A language and domain on its way to its quota; its sources in turn, by weight."""

    key: Key
    share: float
    feeds: Sequence[_Feed]
    rows: list[Row] = field(default_factory=list)
    tokens: int = 0
    left: deque[Row] = field(default_factory=deque)
    _fed: dict[int, int] = field(default_factory=dict)  # tokens by source; those that ran dry are not there
    _dry: set[int] = field(default_factory=set)

    def grow(self, tokens: float) -> None:
        while self.tokens < tokens and (row := self.next()):
            self.rows.append(row)
            self.tokens += len(row.ids)

    def next(self) -> Row | None:
        while open_ := [number for number in range(len(self.feeds)) if number not in self._dry]:
            number = min(open_, key=lambda n: self._fed.get(n, 0) / self.feeds[n].source.weight)
            if row := self.feeds[number].next(self.key):
                self._fed[number] = self._fed.get(number, 0) + len(row.ids)
                return row
            self._dry.add(number)
        return None


def _reserve(cells: Sequence[_Cell]) -> Iterator[Row]:
    """What was left over, then what the sources still hold; languages and domains in turn."""
    turn = deque(cells)
    while turn:
        cell = turn.popleft()
        row = cell.left.popleft() if cell.left else cell.next()
        if row:
            turn.append(cell)
            yield row


def digest(rows: Sequence[Row]) -> str:
    """SHA-256 of all token ids, row by row (little-endian, 32 bits, each row behind its length)."""
    total = hashlib.sha256()
    for row in rows:
        words = array("i", [len(row.ids), *row.ids])
        if words.itemsize != 4:
            raise AssertionError("a C int of other than 32 bits")
        total.update(b"".join(word.to_bytes(4, "little") for word in words))
    return total.hexdigest()


def report(drawn: Drawn, tokenizer: Any, thinking: bool | None = None) -> Json:
    """What was fed: tokens by language and domain, by source and by whose turn they are, templates' fallbacks, special tokens, digest."""
    rows = drawn.rows
    cells: dict[str, dict[str, int]] = {}
    speakers: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    for row in rows:
        table = cells.setdefault(row.labels["language"], {})
        table[row.labels["domain"]] = table.get(row.labels["domain"], 0) + len(row.ids)
        sources[row.source] += len(row.ids)
        speakers.update({SPEAKERS[index]: count for index, count in Counter(row.speakers).items()})
    fallbacks: dict[str, list[str]] = {}
    for row in rows:
        if row.how not in (AS_SERVED, PLAIN):
            fallbacks.setdefault(row.how, []).append(row.labels["id"])
        for what in row.dropped:
            fallbacks.setdefault(f"{what} left out by the template", []).append(row.labels["id"])
    return {
        "tokens": sum(len(row.ids) for row in rows),
        "rows": len(rows),
        "asked": drawn.asked,
        "limited_by": drawn.limited_by,
        "by_language_and_domain": {language: dict(sorted(cells[language].items())) for language in sorted(cells)},
        "by_role": {name: speakers[name] for name in SPEAKERS if speakers[name]},
        "by_source": dict(sorted(sources.items())),
        "rendered": dict(Counter(row.how for row in rows)),
        "fallbacks": fallbacks,
        "thinking": None if thinking is None else thinking if _has_switch(tokenizer) else "the chat template has no enable_thinking",
        "cut": sum(row.cut for row in rows),
        "special_tokens": special_tokens((row.ids for row in rows), tokenizer),
        "digest": digest(rows),
    }


def _has_switch(tokenizer: Any) -> bool:
    return "enable_thinking" in str(getattr(tokenizer, "chat_template", None) or "")


def manifest(rows: Sequence[Row]) -> list[Json]:
    """Every sample that was fed, with the SHA-256 of what it says."""
    return [{**row.labels, "source": row.source, "sha256": row.digest, "tokens": len(row.ids), "cut": row.cut} for row in rows]
