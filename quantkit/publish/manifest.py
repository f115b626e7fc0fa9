"""quantkit.json: what an artefact folder holds and how it was made. Written last: a folder without it is not whole."""

import hashlib
from pathlib import Path

from quantkit.report import write_json
from quantkit.types import Json

NAME = "quantkit.json"


def write_manifest(folder: Path, about: Json, format: str) -> None:
    """SHA-256 and size of every file of the folder, and the run's provenance without its per-linear tables."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != NAME and not path.name.startswith("."):
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    wanted = ("model", "recipe", "family", "parameters", "calibration", "heldout", "versions", "inputs")
    bits = about["bits_per_weight"][format]
    write_json(folder / NAME, {"files": files, "format": format, "bits_per_weight": bits, **{key: about[key] for key in wanted}})


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
