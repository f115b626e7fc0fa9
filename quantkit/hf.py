"""One import that makes transformers read our checkpoints: `import quantkit.hf`.

Plain transformers (5.17 to 5.23) opens quantized experts with random weights and only a warning where the original's files hold them in
one tensor (Gemma 4's, Granite's ...), because its conversion table has no entry for the per-expert or fused packed names. Importing this
file adds Gemma 4's entry, `register` another type's; neither takes anything from what transformers brings. `load_model` opens a folder,
registers what it needs, and refuses whatever from_pretrained would only warn of.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open
from torch import Tensor
from transformers import conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from quantkit.errors import CheckpointError

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
FUSED_PARTS = ("packed", "scale", "zero_point")
_EXPERTS = re.compile(r".*\bexperts\.(\d+\.\w+_proj\.weight|\w+_proj)_packed")
_TOWER = re.compile(r".*\b(vision_tower|audio_tower|embed_vision|embed_audio)\.")


def _compressor(model: Any, parameter: str) -> tuple[Any, Any]:
    """The scheme of one layer's experts and the compressor that decodes it, found as vLLM finds it: by the name of expert 0."""
    config = model.config.quantization_config
    config = getattr(config, "quantization_config", config)
    if isinstance(config, dict):
        config = QuantizationConfig.model_validate(config)
    probe = f"{parameter.rpartition('.')[0]}.0.gate_proj"
    groups = list(config.config_groups.values())
    named = [g for g in groups if any(t.startswith("re:") and re.match(t[3:], probe) for t in g.targets)]
    scheme = (named or [g for g in groups if any(not t.startswith("re:") for t in g.targets)])[0]
    return BaseCompressor.get_value_from_registry(scheme.format or config.format), scheme


class _Decode(ConversionOps):
    """Packed experts -> the fused (experts, out, in) parameter of transformers, in the model's dtype."""

    def convert(self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any) -> dict[str, Any]:
        model, full_layer_name = kwargs["model"], kwargs["full_layer_name"]
        compressor, scheme = _compressor(model, full_layer_name)
        dtype = model.get_parameter_or_buffer(full_layer_name).dtype
        matrices: list[Tensor] = []
        for projection in ("gate_up_proj", "gate_proj", "up_proj", "down_proj"):
            parts = {_part(name): value for name, value in input_dict.items() if f".{projection}" in name}
            if parts:
                matrices.append(_decode_experts(parts, compressor, scheme, dtype))
        return {full_layer_name: torch.cat(matrices, dim=1) if len(matrices) > 1 else matrices[0]}

    @property
    def reverse_op(self) -> ConversionOps:
        return _KeepFused()


class _KeepFused(ConversionOps):
    """Saving: decoded experts go to disk as they are in memory, as an unquantized checkpoint holds them."""

    def convert(self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any) -> dict[str, Any]:
        prefix, experts, leaf = kwargs["full_layer_name"].partition("experts.")
        return {f"{prefix}{experts}{'gate_up_proj' if 'gate' in leaf else 'down_proj'}": next(iter(input_dict.values()))}


def _part(name: str) -> str:
    return next(part for part in (*FUSED_PARTS, "shape") if name.endswith(part))


def _decode_experts(parts: dict[str, Any], compressor: Any, scheme: Any, dtype: torch.dtype) -> Tensor:
    packed = _stack(parts["packed"])
    decoded = []
    for expert in range(len(packed)):
        scale = _stack(parts["scale"])[expert]
        columns = (
            scale.shape[1] * scheme.weights.group_size if scheme.weights.group_size else packed.shape[2] * 32 // scheme.weights.num_bits
        )
        state = {"weight_packed": packed[expert], "weight_scale": scale, "weight_shape": torch.tensor([packed.shape[1], columns])}
        if "zero_point" in parts:
            state["weight_zero_point"] = _stack(parts["zero_point"])[expert]
        decoded.append(compressor.decompress(state, scheme)["weight"].to(dtype))
    return torch.stack(decoded)


def _stack(value: Any) -> Tensor:
    """A list of one expert's matrices each, or one tensor that is fused already."""
    if isinstance(value, list):
        return value[0] if len(value) == 1 and value[0].ndim == 3 else torch.stack(list(value))
    return value


MODEL_TYPES = ("gemma4", "gemma4_text")  # with towers, and the text model by itself
_taught: set[str] = set()


def needed(model_type: str) -> bool:
    """Does transformers by itself know no name of one expert's own matrix for this type? Its files hold experts in one tensor then."""
    rules = conversion_mapping.get_checkpoint_conversion_mapping(model_type) or []
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    return model_type in _taught or not any("experts.*" in pattern for rule in converters for pattern in rule.source_patterns)


def register(model_types: Iterable[str] = MODEL_TYPES) -> bool:
    """Teach transformers the experts of our checkpoints of some types. False where it knows them already."""
    unknown = [name for name in model_types if name not in _taught and needed(name)]
    per_expert = [
        WeightConverter([f"experts.*.{p}.{part}" for p in ("gate_proj", "up_proj") for part in PARTS], "experts.gate_up_proj", [_Decode()]),
        WeightConverter([f"experts.*.down_proj.{part}" for part in PARTS], "experts.down_proj", [_Decode()]),
    ]
    fused = [
        WeightConverter([f"experts.{name}_{part}" for part in FUSED_PARTS], f"experts.{name}", [_Decode()])
        for name in ("gate_up_proj", "down_proj")
    ]
    for name in unknown:
        theirs = conversion_mapping.get_checkpoint_conversion_mapping(name) or []
        # saving looks from the end
        conversion_mapping.register_checkpoint_conversion_mapping(name, [*fused, *per_expert, *theirs], overwrite=True)
        _taught.add(name)
    return bool(unknown)


def _holds_experts(folder: Path) -> bool:
    """Packed experts, each under a name of its own or all in one tensor."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            if any(_EXPERTS.fullmatch(name) for name in tensors.keys()):  # noqa: SIM118 (not a dict)
                return True
    return False


def load_model(folder: str | Path, **options: Any) -> Any:
    """A checkpoint folder as the class that its config names, every weight where it belongs.

    Args:
        folder: a compressed-tensors artefact of ours, or any local model folder.
        options: for from_pretrained.

    Raises:
        CheckpointError: a key is missing, unexpected or of another shape: the model that transformers built is not the one on disk.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None and _holds_experts(Path(folder)):
        register({config.model_type, config.get_text_config().model_type})
    cls: Any = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)
    try:
        model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    except ImportError:  # towers that need packages which are not installed: the text model reads the same files
        text = config.get_text_config()
        text.quantization_config = config.quantization_config
        cls = transformers.AutoModelForCausalLM._model_mapping[type(text)]
        model, info = cls.from_pretrained(folder, config=text, output_loading_info=True, **options)
        info["unexpected_keys"] = {key for key in info.get("unexpected_keys", ()) if not _TOWER.match(key)}
    except RuntimeError as problem:
        raise CheckpointError(f"{folder}: transformers cannot open it ({' '.join(str(problem).split())[:160]})") from None
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        kind, keys = next(iter(wrong.items()))
        raise CheckpointError(f"{folder}: {len(keys)} {kind.replace('_', ' ')} when opened ({keys[0]}); the weights would be wrong")
    return model.eval()


register()
