"""From what a user types to a folder: a local path, or a Hub id that is downloaded once (huggingface_hub caches it)."""

import re
from pathlib import Path
from typing import Any

import huggingface_hub

from quantkit.errors import CheckpointError
from quantkit.model.checkpoint import DTYPES, Checkpoint, read_json
from quantkit.types import Entry, Json

# Weights as safetensors, and what lies beside them: never a pickle, never code.
WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "README.md")
UNWANTED = ("*/*", "consolidated*")  # second copies of the weights that some repositories hold
LARGEST_CARD = 1 << 20  # bytes
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def find_folder(model: str) -> Path:
    """The folder of a model: MODEL itself, or the Hub's snapshot of `owner/name` (`owner/name@revision` for a certain one).

    Raises:
        CheckpointError: neither a folder nor a Hub id, or the Hub cannot be reached or says no. The message never holds a token.
    """
    if is_folder(model):
        return Path(model)
    try:
        return Path(huggingface_hub.snapshot_download(**_arguments(model)))
    except Exception as problem:  # network, rights, names: the library raises a score of kinds
        return _cached(model, problem)


def _arguments(model: str) -> dict[str, Any]:
    repo, _, revision = model.partition("@")
    return {"repo_id": repo, "revision": revision or None, "allow_patterns": list(WANTED), "ignore_patterns": list(UNWANTED)}


def _cached(model: str, problem: Exception) -> Path:
    """The local cache's snapshot, where the Hub gave none because of `problem`."""
    try:
        return Path(huggingface_hub.snapshot_download(**_arguments(model), local_files_only=True))
    except Exception:
        raise _unreachable(model, problem) from None


def is_folder(model: str) -> bool:
    """True of a local model folder, False of a Hub id.

    Raises:
        CheckpointError: it is neither.
    """
    path = Path(model)
    if path.is_dir():
        return True
    if path.exists():
        raise CheckpointError(f"{model}: a file; give the model's folder")
    if not _HUB_ID.fullmatch(model) or model.startswith((".", "/")):
        raise CheckpointError(f"{model}: no such folder, and not a Hub id (owner/name)")
    return False


def config_of(model: str) -> Json:
    """A model's config.json and nothing else: of a folder, of a Hub id, or the file itself.

    Raises:
        CheckpointError: there is none, or the Hub cannot be reached or says no.
    """
    if Path(model).is_file():
        return read_json(Path(model))
    if is_folder(model):
        return read_json(Path(model) / "config.json")
    repo, _, revision = model.partition("@")
    try:
        return read_json(Path(huggingface_hub.hf_hub_download(repo, "config.json", revision=revision or None)))
    except CheckpointError:
        raise
    except Exception as problem:
        return read_json(_cached(model, problem) / "config.json")


def remote_headers(model: str) -> tuple[Json, dict[str, Entry]]:
    """config.json and every tensor's dtype and shape of a Hub id, without a single weight.

    Raises:
        CheckpointError: the Hub cannot be reached, says no, or holds no safetensors.
    """
    repo, _, revision = model.partition("@")
    try:
        metadata = huggingface_hub.get_safetensors_metadata(repo, revision=revision or None)
        config = huggingface_hub.hf_hub_download(repo, "config.json", revision=revision or None)
    except Exception as problem:
        local = Checkpoint(_cached(model, problem))  # what is in the cache can be planned offline
        return local.config, local.entries
    tensors = {name: info for file in metadata.files_metadata.values() for name, info in file.tensors.items()}
    for name, info in tensors.items():
        if info.dtype not in DTYPES:
            raise CheckpointError(f"{model}: {name} has the type {info.dtype}; quantkit starts from bf16, fp16 or fp32 weights")
    return read_json(Path(config)), {name: Entry(DTYPES[info.dtype], tuple(info.shape)) for name, info in tensors.items()}


def card_of(folder: Path) -> str | None:
    """The model card beside a folder's weights, where there is one that is text."""
    path = folder / "README.md"
    try:
        return path.read_text(encoding="utf-8") if path.is_file() and path.stat().st_size <= LARGEST_CARD else None
    except (OSError, UnicodeDecodeError):
        return None


def fetch_card(model: str) -> str:
    """The card of a folder, of a file, or of a Hub id, of which nothing else is downloaded.

    Raises:
        CheckpointError: there is none, or the Hub does not give it.
    """
    path = Path(model)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise CheckpointError(f"{model}: not a card that can be read ({type(problem).__name__})") from None
    if is_folder(model):
        text = card_of(path)
        if text is None:
            raise CheckpointError(f"{model}: no README.md that can be read")
        return text
    repo, _, revision = model.partition("@")
    try:
        return Path(huggingface_hub.hf_hub_download(repo, "README.md", revision=revision or None)).read_text(encoding="utf-8")
    except Exception as problem:
        raise _unreachable(model, problem) from None


def _unreachable(model: str, problem: Exception) -> CheckpointError:
    return CheckpointError(
        f"{model}: not a folder here, not in the local Hub cache, and the Hub did not give it ({type(problem).__name__}); "
        "check the name, your connection (HF_HUB_OFFLINE?) and, for a gated model, your login"
    )
