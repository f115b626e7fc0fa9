"""From what a user types to a folder: a local path, or a Hub id that is downloaded once (huggingface_hub caches it)."""

import re
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError

# Weights as safetensors, and what lies beside them: never a pickle, never code.
WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "README.md")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def find_folder(model: str) -> Path:
    """The folder of a model: MODEL itself, or the Hub's snapshot of `owner/name` (`owner/name@revision` for a certain one).

    Raises:
        CheckpointError: neither a folder nor a Hub id, or the Hub cannot be reached or says no. The message never holds a token.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{model}: a file; give the model's folder")
    if not _HUB_ID.fullmatch(model) or model.startswith((".", "/")):
        raise CheckpointError(f"{model}: no such folder, and not a Hub id (owner/name)")
    import huggingface_hub

    repo, _, revision = model.partition("@")
    arguments: dict[str, Any] = {"repo_id": repo, "revision": revision or None, "allow_patterns": list(WANTED)}
    try:
        return Path(huggingface_hub.snapshot_download(**arguments))
    except Exception as problem:  # network, rights, names: the library raises a score of kinds
        try:
            return Path(huggingface_hub.snapshot_download(**arguments, local_files_only=True))
        except Exception:
            raise CheckpointError(
                f"{model}: not a folder here, not in the local Hub cache, and the Hub gave no snapshot ({type(problem).__name__}); "
                "check the name, your connection (HF_HUB_OFFLINE?) and, for a gated model, your login"
            ) from None
