"""What of a model's bytes goes where: a tensor's name -> the part of the model that it belongs to."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from quantkit.errors import PublishError
from quantkit.publish.artefact import Artefact
from quantkit.publish.gguf_file import GgufFolder
from quantkit.publish.onnx_folder import OnnxFolder
from quantkit.publish.packed import Packed
from quantkit.types import Json

# In this order: the first that fits. Names of checkpoints on the left, of llama.cpp's files on the right.
KINDS: Mapping[str, re.Pattern[str]] = {
    "towers": re.compile(r"vision|audio|multi_modal|^v\.|^mm\.|^a\."),
    "routers": re.compile(r"router|\.gate\.weight$|block_sparse_moe\.gate|ffn_gate_inp"),
    "experts": re.compile(r"experts|_exps"),
    "embeddings and head": re.compile(r"embed|lm_head|^output\.weight|token_embd|per_layer_model_proj"),
    "norms and scalars": re.compile(r"norm|layer_scalar|layer_output_scale|rope_freqs|altup|laurel|per_layer|inp_gate|\.proj\."),
    "attention": re.compile(r"self_attn|attn_"),
    "MLP": re.compile(r"mlp|ffn_"),
}


def part_of(name: str) -> str:
    return next((part for part, pattern in KINDS.items() if pattern.search(name)), "other")


def bytes_by_part(artefact: Artefact) -> dict[str, int]:
    """Bytes of the weight files by part, headers counted; nothing where this format's files cannot be looked into."""
    found: dict[str, int] = {}
    for row in contents(artefact.folder, artefact.format):
        found[row["part"]] = found.get(row["part"], 0) + row["bytes"]
    if found:
        found["headers"] = artefact.bytes - sum(found.values())
    return found


def contents(folder: Path, format: str) -> list[Json]:
    """What lies in the weight files, read from their headers: part, how it is stored, tensors, bytes; largest first."""
    try:
        held = list(_held(folder, format))
    except PublishError:
        return []
    rows: dict[tuple[str, str], list[int]] = {}
    for name, stored, size in held:
        row = rows.setdefault((part_of(name), stored), [0, 0])
        row[0] += 1
        row[1] += size
    table = [{"part": part, "stored": stored, "tensors": count, "bytes": size} for (part, stored), (count, size) in rows.items()]
    return sorted(table, key=lambda row: -int(row["bytes"]))


def _held(folder: Path, format: str) -> Iterable[tuple[str, str, int]]:
    """Name, how it is stored, bytes."""
    if format == "compressed-tensors":
        packed = Packed(folder)
        schemes = {one.name: f"{one.bits} bits in {f'groups of {one.group}' if one.group else 'rows'}" for one in packed.stored}
        signed = ", signed scales" if packed.signed() else ""
        for name, size in packed.sizes():
            stem = re.sub(r"(\.weight)?_(packed|scale|zero_point|shape)$", "", name)
            stored = f"{schemes[stem]}{signed}" if stem in schemes else packed.dtypes[name].lower()
            yield name, stored, size
    elif format == "onnx":
        yield from OnnxFolder(folder).sizes()
    elif format == "gguf":
        for tensor in GgufFolder(folder).reader.tensors:
            yield tensor.name, tensor.tensor_type.name, int(tensor.n_bytes)
