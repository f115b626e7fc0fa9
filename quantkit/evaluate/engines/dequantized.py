"""GGUF without llama.cpp: every tensor is decoded by the gguf library and put into the baseline's architecture in transformers.

What differs from the baseline is then the weights alone: llama.cpp also rounds activations to 8 bits on a CPU. It is always available,
and where llama.cpp runs too, the two together tell a file's error from an engine's.

A GGUF names and lays out tensors its own way. Names come from the gguf library; the rest is undone here: llama's interleaved rows of q and
k, Gemma 3's norms with 1 added, experts stacked. Whatever does not fill the model exactly is refused.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from quantkit.errors import EvaluationError
from quantkit.evaluate.engines.engine import end_tokens, versions
from quantkit.evaluate.engines.in_transformers import Transformers
from quantkit.hf import load_model

PLUS_ONE = {"gemma3"}  # architectures whose norms multiply by 1 + w: the file holds the sum
INTERLEAVED = {"llama"}  # rows of q and k in pairs, as their rotary embedding takes them
# of Gemma 4's router, which the library's table does not name
ROUTER = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}
FUSED = {"gate_up_proj": ("ffn_gate_up_exps", ("ffn_gate_exps", "ffn_up_exps")), "down_proj": ("ffn_down_exps", ())}


class Gguf:
    """A file's tensors by name, decoded one at a time."""

    def __init__(self, file: Path):
        try:
            reader = gguf.GGUFReader(file)
        except Exception as problem:  # a file that is none
            raise EvaluationError(f"{file}: no GGUF that can be read ({' '.join(str(problem).split())[:120]})") from None
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.fields = {name: field.contents() for name, field in reader.fields.items() if field.types[:1] != [gguf.GGUFValueType.ARRAY]}
        self.architecture = str(self.fields["general.architecture"])
        names = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
        if self.architecture not in names:
            raise EvaluationError(f"{file}: the gguf library knows no architecture {self.architecture!r}")
        self.table = gguf.get_tensor_name_map(names[self.architecture], int(self.fields[f"{self.architecture}.block_count"]))

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        # shapes are written innermost first; a decoded tensor has them as numpy does
        return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))

    def weight(self, parameter: str) -> tuple[list[str], Tensor] | None:
        """(its names in the file, its value as transformers holds it); None where the file has no such tensor."""
        plain = parameter.replace("model.language_model.", "model.")
        layer, _, local = plain.removeprefix("model.layers.").partition(".")
        experts = local.rpartition("experts.")[2] if "experts." in local else ""
        if experts in FUSED and plain.startswith("model.layers."):
            whole, parts = FUSED[experts]
            names = [f"blk.{layer}.{name}.weight" for name in ((whole,) if f"blk.{layer}.{whole}.weight" in self.tensors else parts)]
            if not names or not all(name in self.tensors for name in names):
                return None
            return names, torch.cat([self[name] for name in names], 1)
        name = f"blk.{layer}.{ROUTER[local]}" if local in ROUTER else self._name(plain)
        if name not in self.tensors:
            return None
        value = self[name]
        if self.architecture in PLUS_ONE and name.endswith("_norm.weight"):
            value = value - 1
        if self.architecture in INTERLEAVED and name.endswith((".attn_q.weight", ".attn_k.weight")):
            heads = self.fields[f"llama.attention.head_count{'_kv' if '.attn_k.' in name else ''}"]
            value = value.reshape(int(heads), -1, 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
        return [name], value

    def _name(self, parameter: str) -> str:
        stem, dot, suffix = parameter.rpartition(".") if parameter.endswith((".weight", ".bias")) else (parameter, "", "")
        found = self.table.get_name(stem)
        return f"{found}{dot or '.'}{suffix or 'weight'}" if found else ""


def fill(model: Any, file: Gguf) -> None:
    """Every parameter of the text model from the file.

    Raises:
        EvaluationError: a parameter that the file does not hold, or holds in another shape, or a matrix that nothing took.
    """
    taken: set[str] = set()
    for name, parameter in _text_parameters(model):
        found = file.weight(name)
        if found is None:
            raise EvaluationError(f"the GGUF holds no tensor for {name}; `dequantized` does not know this layout, use llama.cpp")
        sources, value = found
        if sources == ["token_embd.weight"] and value.shape[0] < parameter.shape[0]:  # cut to the real vocabulary
            value = torch.cat([value, parameter.data[value.shape[0] :].float()])
        if value.numel() != parameter.numel() or value.shape[-1:] != parameter.shape[-1:]:
            raise EvaluationError(f"{sources[0]} is {tuple(value.shape)} in the GGUF, {name} is {tuple(parameter.shape)}")
        parameter.data.copy_(value.reshape(parameter.shape))
        taken |= set(sources)
    left = sorted(
        name for name, tensor in file.tensors.items()
        if name not in taken and len(tensor.shape) > 1 and not any(t.startswith(name.rpartition(".")[0]) for t in taken)
    )  # fmt: skip
    if left:
        raise EvaluationError(f"the GGUF holds {len(left)} matrices that no parameter took ({left[0]}); `dequantized` does not know them")


def _text_parameters(model: Any) -> Iterator[tuple[str, Any]]:
    towers = ("vision_tower", "audio_tower", "embed_vision", "embed_audio", "multi_modal_projector")
    for name, parameter in model.named_parameters():
        if not any(f".{tower}." in f".{name}" for tower in towers):
            yield name, parameter
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            yield name, buffer


class Dequantized(Transformers):
    """The baseline's architecture with a GGUF's weights."""

    name = "dequantized"


def open_artefact(artefact: Path, like: Path, threads: int | None = None) -> Dequantized:
    """A .gguf file in the architecture of the folder `like`."""
    if "quantization_config" in json.loads((like / "config.json").read_text(encoding="utf-8")):
        raise EvaluationError(f"{like}: is quantized itself; `dequantized` needs the original's folder as baseline")
    model = load_model(like, dtype=torch.float32)
    try:
        fill(model, file := Gguf(artefact))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as problem:
        line = f"{type(problem).__name__}: {' '.join(str(problem).split())[:120]}"
        raise EvaluationError(f"{artefact}: its keys and tensors contradict one another ({line})") from None
    about = {"precision": "float32, the file's weights alone", "architecture": file.architecture, **versions("gguf")}
    return Dequantized(model, end_tokens(like), about)
