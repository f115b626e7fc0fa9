"""A safetensors checkpoint as a dictionary of tensors: headers at once, data when asked for.

Headers are read by us and checked before anything runs (format page: github.com/huggingface/safetensors, "Format"): a truncated
shard, an index that leaves the folder, overlapping tensors or a pickle-only folder are each one sentence, never a crash in hour two.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from quantkit.errors import CheckpointError
from quantkit.types import Entry

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
WEIGHTS = (torch.bfloat16, torch.float16, torch.float32)  # what a checkpoint to be quantized may hold
HEADER_LIMIT = 100 << 20  # the safetensors library's own limit
WHOLE_DIGEST = 256 << 20


class TensorSource(Protocol):
    """What the rest of the house needs of a checkpoint; `Checkpoint` and `Adapted` (a LoRA merged on the way) are two."""

    folder: Path
    config: dict[str, Any]

    @property
    def entries(self) -> Mapping[str, Entry]: ...

    def read(self, name: str) -> Tensor:
        """A copy in memory of its own, safe to edit."""
        ...

    def view(self, name: str) -> Tensor:
        """Mapped pages that come as they are touched; edits stay private to this process."""
        ...


@dataclass(frozen=True, slots=True)
class _Place:
    path: Path
    start: int
    entry: Entry


class Checkpoint:
    """A folder with config.json and safetensors shards, sharded or not. Only headers are read here.

    Raises:
        CheckpointError: no folder, no config, no safetensors (pickles are never opened), a shard that is missing or shorter than
            its header says, an index that names a file outside the folder or tensors that its shards do not hold.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        _check_links(self.folder)
        self.config = read_json(self.folder / "config.json")
        self._places: dict[str, _Place] = {}
        for path, expected in self._shards().items():
            found = _header(path)
            if expected is not None and (lost := sorted(expected - set(found))):
                raise CheckpointError(f"{path}: the index says that {lost[0]} is in this shard, and it is not; download the shard again")
            for name, place in found.items():
                if expected is not None and name not in expected:
                    continue
                if name in self._places:
                    raise CheckpointError(f"{path}: {name} is in {self._places[name].path.name} too; the folder holds two checkpoints")
                self._places[name] = place
        self.entries: dict[str, Entry] = {name: place.entry for name, place in self._places.items()}

    def _shards(self) -> dict[Path, set[str] | None]:
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index}: no weight_map; download the index again")
            shards: dict[Path, set[str] | None] = {}
            for name, file in sorted(weight_map.items()):
                if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
                    raise CheckpointError(f"{index}: {name} is said to be in {file!r}, outside the folder; not followed")
                shards.setdefault(self.folder / file, set()).add(name)  # type: ignore[union-attr]
            for path in shards:
                if not path.is_file():
                    raise CheckpointError(f"{path}: this shard is named by the index and missing; download it again")
            return shards
        if single.is_file():
            return {single: None}
        pickles = [*self.folder.glob("*.bin"), *self.folder.glob("*.pt"), *self.folder.glob("*.pth"), *self.folder.glob("*.ckpt")]
        if pickles:
            raise CheckpointError(
                f"{self.folder}: only pickled weights ({pickles[0].name}), which can run code when opened; convert to safetensors first"
            )
        raise CheckpointError(f"{self.folder}: no model.safetensors and no model.safetensors.index.json; is this a model folder?")

    def read(self, name: str) -> Tensor:
        place = self._places[name]
        raw = torch.empty(place.entry.bytes, dtype=torch.uint8)
        with open(place.path, "rb", buffering=0) as file:
            file.seek(place.start)
            view, done = raw.numpy().data, 0
            while done < len(view):  # one call stops at 2 GiB
                got = file.readinto(view[done:])
                if not got:
                    raise CheckpointError(f"{place.path}: ended inside {name}; the file changed while it was read")
                done += got
        return raw.view(place.entry.dtype).view(place.entry.shape)

    def view(self, name: str) -> Tensor:
        place = self._places[name]
        if not place.entry.bytes or place.start % place.entry.dtype.itemsize:
            return self.read(name)
        # "c": private copy-on-write pages; torch wants memory that may be written
        pages = np.memmap(place.path, np.uint8, "c", place.start, place.entry.bytes)
        return torch.from_numpy(pages).view(place.entry.dtype).view(place.entry.shape)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder, or one sentence."""
    if not path.parent.is_dir():
        raise CheckpointError(f"{path.parent}: no such folder")
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; a model folder holds one")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({str(error)[:80]})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value


def file_digest(path: Path) -> str:
    """SHA-256 of a file up to 256 MiB; of a larger one its size, its first MiB (the header) and 256 spread samples of 64 KiB.

    The samples tell any two trainings apart without reading 52 GB twice; the prefix says which kind it is.
    """
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        if size <= WHOLE_DIGEST:
            while part := file.read(1 << 20):
                digest.update(part)
            return f"sha256:{digest.hexdigest()}"
        digest.update(str(size).encode() + file.read(1 << 20))
        for sample in range(256):
            file.seek((size - (1 << 16)) * sample // 255)
            digest.update(file.read(1 << 16))
    return f"sha256-sampled:{digest.hexdigest()}"


def _check_links(folder: Path) -> None:
    """Texts beside the weights go into artefacts and cards, so no link may bring in a file from elsewhere; the Hub's cache links to its
    own `blobs`. Weights may lie where they like.

    Raises:
        CheckpointError: there is such a link.
    """
    home = folder.resolve()
    homes = (home, home.parent.parent / "blobs")
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_symlink() and path.suffix != ".safetensors" and not any(path.resolve().is_relative_to(one) for one in homes):
            raise CheckpointError(f"{path}: a link that leads out of the folder, to {path.resolve()}; put the file itself there")


def _count(value: Any) -> int:
    """An integer as it stands; 2.5, "2" and true are none."""
    if type(value) is not int:
        raise TypeError(f"{value!r} is no count")
    return value


def _header(path: Path) -> dict[str, _Place]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise CheckpointError(f"{path}: not a whole safetensors file ({size} bytes); download it again")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        tensors = {name: t for name, t in header.items() if name != "__metadata__"}
        spans = {name: (_count(t["data_offsets"][0]), _count(t["data_offsets"][1])) for name, t in tensors.items()}
        shapes = {name: tuple(map(_count, t["shape"])) for name, t in tensors.items()}
        kinds = {name: str(t["dtype"]) for name, t in tensors.items()}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError):
        raise CheckpointError(f"{path}: its header is not a safetensors header; download it again") from None
    data, places, reached = size - 8 - length, {}, 0
    for name in sorted(tensors, key=lambda n: spans[n]):
        begin, end = spans[name]
        if kinds[name] not in DTYPES:
            raise CheckpointError(f"{path}: {name} has the type {kinds[name]}; quantkit starts from bf16, fp16 or fp32 weights")
        entry = Entry(DTYPES[kinds[name]], shapes[name])
        if min(entry.shape, default=0) < 0 or entry.bytes != end - begin or begin < reached:
            raise CheckpointError(f"{path}: the header places {name} wrongly (bytes {begin} to {end}); download it again")
        if end > data:
            raise CheckpointError(f"{path}: truncated, {name} ends {end - data} bytes after the file does; download it again")
        places[name], reached = _Place(path, 8 + length + begin, entry), end
    return places
