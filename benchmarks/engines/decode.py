"""An artefact's weights by the format's description alone: no compressed-tensors, no quantkit, no engine.

    L.weight_packed      int32 (rows, columns * bits / 32), the first code in the lowest bits, codes stored plus 2^(bits - 1)
    L.weight_scale       (rows, columns / group)
    L.weight_zero_point  int32 (rows * bits / 32, columns / group), packed along the rows; asymmetric only
    L.weight_shape       (rows, columns)
    weight = (code - zero point) * scale, rounded once to the scale's type

`plain` writes the artefact as an unquantized checkpoint, which transformers opens without a quantizer: the yardstick of verify.py.
"""

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
PUBLISHED_GEMMA3N = "model.language_model."


def tensors(folder: Path) -> dict[str, Tensor]:
    """Everything in a folder's shards."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def weights(folder: Path) -> tuple[dict[str, Tensor], int]:
    """The tensors as an unquantized checkpoint names them, and how many of them were packed."""
    plain, packed = {}, defaultdict(dict)
    for name, tensor in tensors(folder).items():
        module, _, leaf = name.rpartition(".")
        if leaf in PARTS:
            packed[module][leaf] = tensor
        else:
            plain[name] = tensor
    plain |= {f"{module}.weight": unpack(parts) for module, parts in packed.items()}
    return plain, len(packed)


def unpack(parts: dict[str, Tensor]) -> Tensor:
    """One matrix (rows, columns)."""
    rows, columns = parts["weight_shape"].tolist()
    scale = parts["weight_scale"]
    bits = parts["weight_packed"].shape[1] * 32 // columns
    codes = _bits(parts["weight_packed"], bits)[:, :columns].float()
    zero = torch.full_like(scale, 1 << (bits - 1), dtype=torch.float32)
    if "weight_zero_point" in parts:
        zero = _bits(parts["weight_zero_point"].T.contiguous(), bits)[:, :rows].T.float()
    grouped = codes.view(rows, scale.shape[1], -1)
    return ((grouped - zero.unsqueeze(-1)) * scale.float().unsqueeze(-1)).view(rows, columns).to(scale.dtype)


def _bits(packed: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 32, bits)
    return ((packed.long().unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def plain(folder: Path, out: Path) -> int:
    """Write the artefact unquantized into `out`; returns how many matrices were packed.

    Gemma 4 keeps all experts of a layer in two tensors, so they are put together here; a multimodal Gemma 3n becomes its text model.
    """
    state, count = weights(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    if config["model_type"].startswith("gemma4"):
        state = _fused_experts(state)
    if config["model_type"] == "gemma3n":
        state, config = _text_only(state, config)
    _write(state, config, folder, out)
    return count


def text_part(folder: Path, out: Path) -> Path:
    """A multimodal Gemma 3n folder as the text model that it contains, still packed if it was. Its tiny towers are invented, so no
    engine can build them."""
    config = json.loads((folder / "config.json").read_text())
    state, text = _text_only(tensors(folder), config)
    kept = {"quantization_config": config["quantization_config"]} if "quantization_config" in config else {}
    _write(state, text | kept, folder, out)
    return out


def experts(folder: Path) -> dict[str, Tensor]:
    """ "layer 3 gate_up" -> (experts, rows, columns), as engines hold them: gate above up."""
    state, _ = weights(folder)
    layers: dict[tuple[str, str], dict[int, Tensor]] = defaultdict(dict)
    for name, tensor in state.items():
        if match := re.search(r"layers\.(\d+)\..*experts\.(\d+)\.(gate_proj|up_proj|down_proj|w[123])\.weight$", name):
            kind = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(match[3], match[3])
            layers[match[1], kind][int(match[2])] = tensor
    stacked = {key: torch.stack([parts[expert] for expert in sorted(parts)]) for key, parts in layers.items()}
    found = {f"layer {layer} down": tensor for (layer, kind), tensor in stacked.items() if kind == "down_proj"}
    for (layer, kind), gate in stacked.items():
        if kind == "gate_proj":
            found[f"layer {layer} gate_up"] = torch.cat([gate, stacked[layer, "up_proj"]], 1)
    return found


def _fused_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    split: dict[str, dict[int, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    fused = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name):
            split[match[1]][int(match[2])][match[3]] = tensor
        else:
            fused[name] = tensor
    for prefix, parts in split.items():
        ordered = [parts[expert] for expert in sorted(parts)]
        fused[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat([expert["gate"], expert["up"]]) for expert in ordered])
        fused[f"{prefix}.down_proj"] = torch.stack([expert["down"] for expert in ordered])
    return fused


def _text_only(state: dict[str, Tensor], config: dict) -> tuple[dict[str, Tensor], dict]:
    inside = {name: tensor for name, tensor in state.items() if name.startswith(PUBLISHED_GEMMA3N)}
    renamed = {"model." + name.removeprefix(PUBLISHED_GEMMA3N): tensor for name, tensor in inside.items()}
    return renamed, {**config["text_config"], "architectures": ["Gemma3nForCausalLM"]}


def _write(state: dict[str, Tensor], config: dict, folder: Path, out: Path) -> None:
    """The other files of `folder` beside these weights and this config."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=1))
