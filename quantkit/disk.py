"""Files that are whole or not there: written beside under a hidden name, brought to the disk, renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, several: bool = False) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` when the body ends well, and is gone when it does not.

    The body closes what it wrote; its bytes and the new name are on the disk when this returns, so not even a loss of power leaves half
    a file under the name that people look for. `several` processes may write the same file: each beside in its own name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part" if several else f".{path.name}.part")
    try:
        yield temporary
        _to_the_disk(temporary)
        os.replace(temporary, path)
        _to_the_disk(path.parent)  # the rename itself
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """A text, as `replacing` writes."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _to_the_disk(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
