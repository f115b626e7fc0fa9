"""Baselines on disk: computed once for a model, an engine, and what was asked, whichever artefact is judged by them.

KEY.safetensors     kept distributions of all windows one after the other (distributions.py)
KEY.json            results of items
The key is a digest of the model's files, of the engine's versions and settings, and of every token asked, so that nothing stale is ever
found. The folder is $QUANTKIT_CACHE, else `quantkit` in the user's cache folder; it may be deleted at any time.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantkit.disk import replacing
from quantkit.evaluate.distributions import Kept
from quantkit.report import write_json
from quantkit.types import Json

LAYOUT = 2  # of the files; another number makes all others stale
MODEL_FILES = (".safetensors", ".gguf", ".onnx", ".data", ".json", ".jinja", ".model")
_seen: dict[tuple[str, int, int], str] = {}  # digests of files within this process


def default_folder() -> Path:
    named = os.environ.get("QUANTKIT_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantkit" / "baselines"


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False, default=list).encode()).hexdigest()[:40]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    about = path.stat()
    key = (str(path.resolve()), about.st_size, about.st_mtime_ns)
    if key not in _seen:
        with open(path, "rb") as file:
            _seen[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _seen[key]


def model_digest(place: Path) -> str:
    """Of a model's files: weights, config, tokenizer. What describes them (cards, reports) changes nothing."""
    files = [place] if place.is_file() else sorted(p for p in place.iterdir() if p.suffix in MODEL_FILES and p.is_file())
    return digest([(path.name, file_digest(path)) for path in files if path.name != "quantkit.json"])


def save_kept(path: Path, rows: Sequence[Kept]) -> None:
    """Every window's distributions, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: torch.cat([getattr(row, name) for row in rows]).contiguous() for name in Kept.__dataclass_fields__}
    if len(whole["ids"]) and int(whole["ids"].max()) < 1 << 15:
        whole["ids"] = whole["ids"].short()  # half of them
    whole["lengths"] = torch.tensor([len(row.counts) for row in rows])
    with replacing(path, several=True) as temporary:
        save_file(whole, temporary, {"layout": str(LAYOUT), "sha256": _digest(whole)})


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Of every byte: a cache that was damaged is asked for anew, not believed."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def load_kept(path: Path) -> list[Kept] | None:
    """None where there is no such file, or not a whole one."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("layout") != str(LAYOUT):
                return None
            whole = {name: file.get_tensor(name) for name in (*Kept.__dataclass_fields__, "lengths")}
            if (file.metadata() or {}).get("sha256") != _digest(whole):
                return None
    except (OSError, SafetensorError):
        return None
    whole["ids"] = whole["ids"].int()
    lengths = whole.pop("lengths").tolist()
    sizes = [int(part.sum()) for part in whole["counts"].split(lengths)]
    parts = {name: value.split(sizes if name in ("ids", "log_p") else lengths) for name, value in whole.items()}
    return [Kept(**{name: part[number] for name, part in parts.items()}) for number in range(len(lengths))]


def save_results(path: Path, results: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"layout": LAYOUT, "sha256": _sealed(results), "results": results})


def load_results(path: Path) -> Json | None:
    found = load_json(path)
    if found is None or found.get("layout") != LAYOUT or not isinstance(results := found.get("results"), dict):
        return None
    return results if found.get("sha256") == _sealed(results) else None


def _sealed(results: Json) -> str:
    """Their digest as they will be read: tuples are lists then, and every key is text."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(results)), sort_keys=True).encode()).hexdigest()


def load_json(path: Path) -> Json | None:
    """An object; None where there is no such file, or not a whole one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
