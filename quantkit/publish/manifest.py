"""quantkit.json: what an artefact folder holds and how it was made. Written last: a folder without it is not whole."""

import hashlib
from pathlib import Path

from quantkit.report import write_json
from quantkit.types import Json

NAME, CARD = "quantkit.json", "README.md"
# Of the run's report; its tables of linears and samples stay in run.json.
PROVENANCE = ("model", "base_model", "date", "recipe", "family", "parameters", "sizes", "calibration", "heldout", "versions", "inputs")


def listed(folder: Path) -> Json:
    """Size and SHA-256 of every file of a folder but the manifest itself."""
    return {path.name: _entry(path) for path in sorted(folder.iterdir()) if _counts(path)}


def write_manifest(folder: Path, about: Json, format: str, files: Json | None = None) -> None:
    """Every file's size and SHA-256, and the run's provenance.

    Args:
        files: what `listed` gave before the card was written; only the card is read again then, not weights of many gigabytes.
    """
    files = listed(folder) if files is None else {**files, CARD: _entry(folder / CARD)}
    bits = about["bits_per_weight"][format]
    told = {key: about[key] for key in PROVENANCE if key in about}
    told["recipe"] = _without_folders(about["recipe"])
    write_json(folder / NAME, {"files": dict(sorted(files.items())), "format": format, "bits_per_weight": bits, **told})


def _without_folders(recipe: Json) -> Json:
    """A mix that is a file of this machine by its name alone."""
    calibration = recipe["calibration"]
    return {**recipe, "calibration": {**calibration, "mix": Path(calibration["mix"]).name}}


def _counts(path: Path) -> bool:
    return path.is_file() and path.name != NAME and not path.name.startswith(".")


def _entry(path: Path) -> Json:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    """Of a whole file, in parts of a MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
