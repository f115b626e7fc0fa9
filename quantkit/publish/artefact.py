"""An artefact folder as a stranger meets it: its files, its manifest, and the report of the run that made it."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import PublishError
from quantkit.publish.manifest import NAME
from quantkit.types import Json

WEIGHTS = {
    "compressed-tensors": ("*.safetensors",),
    "gguf": ("*.gguf",),
    "onnx": ("*.onnx.data",),
}  # of ONNX the graph itself is not counted
RUN, EVALUATIONS, PAGE = "run.json", "eval*.json", "report.html"
JUDGED = (".safetensors", ".gguf", ".onnx", ".data", ".json", ".jinja", ".model")  # files whose bytes an evaluation's digest is of
# What looks like an access token of the Hub, wherever it may have slipped in.
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


@dataclass(frozen=True, slots=True)
class Artefact:
    """One publishable folder, and what its run said of it (None where run.json is not beside it: a folder that was moved)."""

    folder: Path
    format: str
    manifest: Json
    run: Json | None

    @property
    def weights(self) -> list[Path]:
        return sorted(path for pattern in WEIGHTS[self.format] for path in self.folder.glob(pattern))

    @property
    def bytes(self) -> int:
        """The sum of the weight files: what a card calls the model's size."""
        return sum(path.stat().st_size for path in self.weights)

    @property
    def judged(self) -> list[Json]:
        """What evaluations of these very files found: every eval*.json in the run's folder whose digest is theirs, in order of names."""
        found = [read_json(path) for path in sorted(self.folder.parent.glob(EVALUATIONS))]
        return [one for one in found if isinstance(one.get("digests"), dict) and one["digests"].get("artefact") == self.digest]

    @property
    def evaluations(self) -> list[Json]:
        """Of those the ones beside the weights that were quantized: beside another model, or itself, any artefact looks as one likes."""
        inputs = self.manifest.get("inputs") or {}
        weights = [(one, one["digests"].get("weights")) for one in self.judged]
        return [one for one, told in weights if isinstance(told, dict) and told and told.items() <= inputs.items()]

    @property
    def digest(self) -> str:
        """As `quantkit eval` digests what it judges: names and SHA-256 of weights, config and tokenizer; of a GGUF the file alone."""
        files = {name: row["sha256"] for name, row in self.manifest["files"].items() if name.endswith(JUDGED)}
        if self.format == "gguf":
            files = {name: digest for name, digest in files.items() if name.endswith(".gguf")}
        return hashlib.sha256(json.dumps([sorted(files.items())]).encode()).hexdigest()[:40]


def open_artefact(folder: Path | str) -> Artefact:
    """An artefact's folder, or a run's that holds a single one.

    Raises:
        PublishError: no such folder, none or several artefacts in it, or a manifest that cannot be read.
    """
    artefacts = open_artefacts(folder)
    if len(artefacts) > 1:
        names = " or ".join(str(one.folder) for one in artefacts)
        raise PublishError(f"{folder}: a run with {len(artefacts)} artefacts; give one of them: {names}")
    return artefacts[0]


def open_artefacts(folder: Path | str) -> list[Artefact]:
    """The artefacts of a run's folder in the order of their formats' names, or the one that `folder` is.

    Raises:
        PublishError: as for `open_artefact`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PublishError(f"{folder}: no such folder; give a run's folder, or an artefact in it")
    if (folder / NAME).is_file():
        return [_open(folder)]
    found = [_open(inner) for name in WEIGHTS if (inner := folder / name / NAME).is_file() and (inner := inner.parent)]
    if not found:
        raise PublishError(f"{folder}: no {NAME} here, nor in {', '.join(WEIGHTS)} below; not an artefact, or one that was never finished")
    return found


def _open(folder: Path) -> Artefact:
    manifest = read_json(folder / NAME)
    if not isinstance(manifest.get("files"), dict):
        raise PublishError(f"{folder / NAME}: lists no files; not a manifest of quantkit")
    _check_manifest(folder, manifest)
    format = manifest.get("format") or next((name for name in WEIGHTS if any(True for _ in _weights(folder, name))), "")
    if not isinstance(format, str) or format not in WEIGHTS:
        raise PublishError(f"{folder / NAME}: format {format!r}; known: {', '.join(WEIGHTS)}")
    run = folder.parent / RUN
    return Artefact(folder, format, manifest, read_json(run) if run.is_file() else None)


def _check_manifest(folder: Path, manifest: Json) -> None:
    """What all that follows reads of it is there."""

    def need(true: bool, what: str) -> None:
        if not true:
            raise PublishError(f"{folder / NAME}: {what}; not a manifest of quantkit, or one that was changed")

    for name, told in manifest["files"].items():
        need(name not in ("", ".", "..") and Path(name).name == name, f"the file {name!r} lies outside the folder")
        whole = isinstance(told, dict) and isinstance(told.get("bytes"), int) and isinstance(told.get("sha256"), str)
        need(whole, f"no size and SHA-256 of {name}")
    recipe, bits = manifest.get("recipe"), manifest.get("bits_per_weight")
    need(isinstance(recipe, dict) and {"name", "description"} <= recipe.keys(), "no recipe")
    need(isinstance(bits, (int, float)) and not isinstance(bits, bool), "no bits_per_weight")
    need(isinstance(manifest.get("model"), str), "no model")
    need(all(isinstance(manifest.get(key, {}), dict) for key in ("inputs", "sizes")), "inputs and sizes are tables")


def _weights(folder: Path, format: str) -> Iterator[Path]:
    for pattern in WEIGHTS[format]:
        yield from folder.glob(pattern)


def read_json(path: Path) -> Json:
    """A JSON object, or one line.

    Raises:
        PublishError: it is not one.
    """
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise PublishError(f"{path}: cannot be read ({problem.strerror})") from None
    except (ValueError, RecursionError) as problem:
        raise PublishError(f"{path}: not JSON ({str(problem)[:80]})") from None
    if not isinstance(value, dict):
        raise PublishError(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value
