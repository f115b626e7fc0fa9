"""Where samples come from: .jsonl, .parquet and .txt files, and data sets of the Hub, row after row, never a whole source in memory."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from quantkit.calibrate.samples import Sample, parse
from quantkit.errors import CalibrationError
from quantkit.recipe import MixSource

PIECE = 4000  # characters of a long text that make a sample: about a thousand tokens
BLOWN_UP, SMALL = 100, 1 << 28  # rows or bytes for each byte of a Parquet file that no text packs into; a row group that hurts nobody
EXTRA = "pip install 'quantkit[datasets]'"


def read_source(source: MixSource) -> Iterator[Sample]:
    """A source's samples, in the order of its files and rows.

    Raises:
        CalibrationError: a file that cannot be read, a row that is no sample (both are named), a data set that cannot be reached.
    """
    rows = _hub(source) if source.hub is not None else (row for path in source.files() for row in _file(path, source.join))
    if source.join:
        text = ((row.get(source.columns.text) if isinstance(row, dict) else None, where) for row, where in rows)
        rows = (({"text": piece}, f"{source.name}#{number}") for number, piece in enumerate(_pieces(_texts(text)), 1))
    for row, where in rows:
        yield parse(row, where, source.columns if not source.join else None, source.language, source.domain)


def read_samples(files: Iterable[Path]) -> list[Sample]:
    """Every sample of some local files.

    Raises:
        CalibrationError: as `read_source`, or no sample at all.
    """
    files = list(files)
    samples = [sample for path in files for sample in read_source(MixSource(path=str(path)))]
    if not samples:
        raise CalibrationError(f"{empty(', '.join(str(path) for path in files) or 'no file')}; give a .jsonl file with a sample a line")
    return samples


def empty(names: str) -> str:
    return f"the calibration set is empty ({names})"


def _file(path: Path, lines: bool) -> Iterator[tuple[Any, str]]:
    """A local file's rows, each with the place that an error names."""
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path)
            return
        with path.open(encoding="utf-8", newline="\n") as file:  # a line ends there only: text may hold other separators
            if path.suffix == ".txt":
                texts = file if lines else _pieces(file)
                yield from (({"text": text}, f"{path}#{number}") for number, text in enumerate(texts, 1))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _json(line, f"{path}:{number}"), f"{path}:{number}"
    except (OSError, UnicodeDecodeError) as problem:
        raise CalibrationError(f"{path}: cannot be read ({problem})") from None


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise CalibrationError(f"{where}: not a JSON line") from None


def _parquet(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise CalibrationError(f"{path}: reading Parquet needs pyarrow; {EXTRA}, or give a .jsonl file") from None
    try:
        number = 0
        table, size = pyarrow.parquet.ParquetFile(path), path.stat().st_size
        groups = [table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)]
        largest = max((group.total_byte_size for group in groups), default=0)
        if table.metadata.num_rows > BLOWN_UP * size or largest > max(BLOWN_UP * size, SMALL):
            raise CalibrationError(
                f"{path}: {size:,} bytes that say they hold {table.metadata.num_rows:,} rows, {largest:,} bytes in one row group: "
                "not opened"
            )
        for batch in table.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield row, f"{path}:{number}"
    except (pyarrow.ArrowException, OSError) as problem:
        raise CalibrationError(f"{path}: not a Parquet file that can be read ({_line(problem)})") from None


def _hub(source: MixSource) -> Iterator[tuple[Any, str]]:
    try:
        import datasets
    except ImportError:
        raise CalibrationError(f"the data set {source.hub} of the Hub needs the datasets library; {EXTRA}, or give a local file") from None
    try:
        rows = datasets.load_dataset(source.hub, source.subset, split=source.split, revision=source.revision, streaming=True)
        for number, row in enumerate(rows, 1):
            yield row, f"{source.name}#{number}"
    except Exception as problem:  # the library, the network and the data set each fail in ways of their own
        raise CalibrationError(
            f"the data set {source.name} cannot be read ({_line(problem)}); is the network there, and the name right? "
            "A local copy works as --calibration FILE"
        ) from None


def _texts(rows: Iterable[tuple[Any, str]]) -> Iterator[str]:
    for text, where in rows:
        if not isinstance(text, str):
            raise CalibrationError(f"{where}: a source with join: true has rows of text; name their column with columns: {{text: ...}}")
        yield text if text.endswith("\n") else text + "\n"


def _pieces(lines: Iterable[str]) -> Iterator[str]:
    """A long text in pieces that end with a line, or inside one that is longer than a piece."""
    held = ""
    for line in lines:
        held += line
        while len(held) >= PIECE:
            end = len(held) if len(held) < 2 * PIECE else PIECE
            if held[:end].strip():
                yield held[:end]
            held = held[end:]
    if held.strip():
        yield held


def _line(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:120]}"
