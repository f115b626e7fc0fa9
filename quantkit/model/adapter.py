"""A PEFT LoRA adapter merged tensor by tensor while the checkpoint is read: nothing is merged until it is asked for.

Source of the format and of every rule here: github.com/huggingface/peft, `tuners/lora` (config, layer, dora, variants), 0.21.
An adapter that cannot be merged exactly is refused in one sentence; a setting that is unknown here counts as such.
"""

import copy
import difflib
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantkit.errors import AdapterError, CheckpointError
from quantkit.finite import finite
from quantkit.model.checkpoint import WEIGHTS, TensorSource, read_json
from quantkit.types import Entry

ELSEWHERE = "merge it with PEFT on the model it was trained on, and quantize the result"
REFUSED = {
    "alora_invocation_tokens": "an activated LoRA acts only after its invocation tokens and merged it would always act; serve it unmerged",
    "arrow_config": "Arrow picks among several adapters for every token; merge one of those instead",
    "fan_in_fan_out": f"its weights are stored transposed, or only said to be; {ELSEWHERE}",
    "kasa_config": f"KaSA cuts singular values out of the base weights; {ELSEWHERE}",
    "layer_replication": f"it was trained on a model with repeated layers; {ELSEWHERE}",
    "lora_bias": f"its B matrices have a bias, for which most models have no place; {ELSEWHERE}",
    "megatron_config": "it was trained on Megatron's parallel layers; convert it to plain PEFT LoRA",
    "monteclora_config": f"MonteCLoRA samples its weights, so no one merge is exact; {ELSEWHERE}",
    "target_parameters": f"it adapts bare parameters such as fused 3-D experts, not linears; {ELSEWHERE}",
    "trainable_token_indices": f"it also trained single rows of the embedding; {ELSEWHERE}",
    "use_bdlora": f"its A or B is block diagonal; {ELSEWHERE}",
    "use_qalora": f"QALoRA's A reads pooled inputs; {ELSEWHERE}",
}
KNOWN = {  # read below, or without a say in the merge
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora", "velora_config",
}  # fmt: skip
# PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA begin by taking something out of the base weights; these do not
HARMLESS_INITS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
FLOATS = ("F64", "F32", "F16", "BF16")
PREFIX = "base_model.model."  # PEFT's own wrappers
# <module>.lora_A[.<adapter>].weight, <module>.lora_embedding_A[.<adapter>], <module>.lora_magnitude_vector[.<adapter>][.weight]
LORA_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_\w+)(\.(?!(weight|bias)$)[^.]+)?(\.(?P<leaf>weight|bias))?$")
NO_PART_OF_THE_NAME = ("model", "language_model", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """For the report. `rank` and `alpha` are the adapter's defaults; its patterns may say otherwise for some modules."""

    name: str
    rank: int
    alpha: float
    merged: int  # tensors merged or replaced


@dataclass(frozen=True, slots=True)
class _Settings:
    """What the merge reads of adapter_config.json."""

    rank: int
    alpha: float
    rank_pattern: list[tuple[re.Pattern[str], float]]
    alpha_pattern: list[tuple[re.Pattern[str], float]]
    rslora: bool
    dora: bool


@dataclass(frozen=True, slots=True)
class _Merge:
    """How one tensor is made; strings are keys of the adapter's file."""

    start: str | None  # in place of the checkpoint's tensor: modules_to_save, a trained bias, a saved base layer
    a: str | None = None
    b: str | None = None
    magnitude: str | None = None
    scale: float = 1.0
    embedding: bool = False


class Adapted:
    """A checkpoint with a LoRA adapter in it, which reads like a checkpoint. Only headers are read here.

        linear      W (out, in)      V = W + scale B A        A (r, in), B (out, r)
        embedding   W (vocab, dim)   V = W + scale (B A)^T    A (r, vocab), B (dim, r)
        DoRA        m V / |V|        m and |V| per row of a linear (out), per column of an embedding (dim)

    scale = alpha / r, or alpha / sqrt(r) for rsLoRA. Everything in fp32, rounded once to the checkpoint's type.

    PEFT trains a tied head and its embedding apart, even where only one of them is a target (peft issue 2777). So when the adapter
    holds either, the head gets a tensor of its own and `config` says that they are not tied.

    Raises:
        AdapterError: no adapter, or only a pickled one; a kind or a setting that cannot be merged exactly; a tensor that finds no
            place or more than one, does not fit or is not a float; when it is read, a NaN or an infinity.
    """

    def __init__(self, checkpoint: TensorSource, folder: Path | str):
        folder = Path(folder)
        self.checkpoint, self.folder, self.config = checkpoint, checkpoint.folder, checkpoint.config
        self._file = folder / "adapter_model.safetensors"
        settings, shapes = _settings(folder / "adapter_config.json"), _shapes(self._file)
        embedding, head = _tied_pair(checkpoint)
        untied = {head: checkpoint.entries[embedding], **checkpoint.entries} if embedding else checkpoint.entries
        parts = self._places(shapes, untied)
        touched = bool(parts.keys() & {embedding, head})
        self.entries: Mapping[str, Entry] = dict(untied if touched else checkpoint.entries)
        self._origin = {name: embedding for name in self.entries if name not in checkpoint.entries}  # what a new head starts from
        if touched:
            self.config = copy.deepcopy(checkpoint.config)
            for part in _configs(self.config):
                part["tie_word_embeddings"] = False
        self._merges = {name: self._plan(name, parts[name], shapes, settings) for name in parts}
        self.adapter = AdapterInfo(folder.resolve().name, settings.rank, settings.alpha, len(parts))

    def read(self, name: str) -> Tensor:
        return self._merged(name) if name in self._merges else self.checkpoint.read(self._origin.get(name, name))

    def view(self, name: str) -> Tensor:
        return self._merged(name) if name in self._merges else self.checkpoint.view(self._origin.get(name, name))

    def _merged(self, name: str) -> Tensor:
        merge, dtype = self._merges[name], self.entries[name].dtype
        start = self._tensor(merge.start) if merge.start else self.checkpoint.view(self._origin.get(name, name))
        weight = start.to(torch.float32, copy=True)
        if merge.a and merge.b:
            a, b = self._tensor(merge.a).float(), self._tensor(merge.b).float()
            weight.addmm_(*((a.T, b.T) if merge.embedding else (b, a)), alpha=merge.scale)
        if merge.magnitude:
            norm = torch.linalg.vector_norm(weight, dim=0 if merge.embedding else 1, keepdim=True)
            weight *= self._tensor(merge.magnitude).float().view_as(norm) / norm
        weight = weight.to(dtype)
        if not finite(weight):
            raise AdapterError(f"{self._file}: {name} is not finite once merged; the base is damaged, or the adapter for another model")
        return weight

    def _tensor(self, key: str) -> Tensor:
        with safe_open(self._file, "pt") as file:  # opened anew, so that this object can be sent to worker processes
            tensor: Tensor = file.get_tensor(key)
        if not finite(tensor):
            raise AdapterError(f"{self._file}: {key} holds a NaN or an infinity; train again, or take an earlier save")
        return tensor

    def _places(self, shapes: Shapes, entries: Mapping[str, Entry]) -> dict[str, dict[str, str]]:
        """{tensor of the checkpoint: {part: key of the adapter}}; a part is lora_something, or "start" for a tensor in full."""
        index, parts = defaultdict(list), defaultdict[str, dict[str, str]](dict)
        for name in entries:
            index[canonical(name)].append(name)
        for key in shapes:
            lora = LORA_KEY.match(key)
            if lora and lora["leaf"] == "bias":
                raise AdapterError(f"{self._file}: {key}: {REFUSED['lora_bias']}")
            part = lora["part"] if lora else "start"
            wanted = f"{lora['module']}.weight" if lora else re.sub(r"\.(base_layer|modules_to_save\.[^.]+)\.", ".", key)
            wanted = wanted.removeprefix(PREFIX)
            found = [wanted] if wanted in entries else index.get(canonical(wanted), [])
            if len(found) > 1:
                raise AdapterError(f"{self._file}: {key} could be {found[0]} or {found[1]}; rename it to the one that is meant")
            if not found and "experts" in wanted.split(".") and any(len(entry.shape) == 3 for entry in entries.values()):
                raise AdapterError(f"{self._file}: {key} adapts experts, which this checkpoint holds as fused 3-D tensors; {ELSEWHERE}")
            if not found:
                near = difflib.get_close_matches(canonical(wanted), index, 1, 0.0)
                hint = f"the nearest is {index[near[0]][0]}" if near else "which is empty"
                raise AdapterError(f"{self._file}: {key} has no place in the checkpoint, {hint}; is the adapter for another model?")
            if other := parts[found[0]].get(part):
                raise AdapterError(f"{self._file}: {other} and {key} both belong to {found[0]}; leave one adapter in the file")
            parts[found[0]][part] = key
        return dict(parts)

    def _plan(self, name: str, parts: dict[str, str], shapes: Shapes, settings: _Settings) -> _Merge:
        """Checks that the parts are whole and fit the tensor."""
        entry, start, lora = self.entries[name], parts.get("start"), parts.keys() - {"start"}
        fit: Shapes = {start: entry.shape} if start else {}
        merge = _Merge(start)
        if entry.dtype not in WEIGHTS:
            raise AdapterError(f"{self._file}: {name} is {entry.dtype} in the checkpoint; an adapter needs bf16, fp16 or fp32 there")
        if lora:
            embedding = "lora_embedding_A" in lora
            needed = ["lora_embedding_A", "lora_embedding_B"] if embedding else ["lora_A", "lora_B"]
            needed += ["lora_magnitude_vector"] if settings.dora else []
            if lora != set(needed):
                has = ", ".join(sorted(lora))
                raise AdapterError(f"{self._file}: {name} has {has}, not {', '.join(needed)}; the file and adapter_config.json disagree")
            if len(entry.shape) != 2:
                raise AdapterError(f"{self._file}: {name} has the shape {entry.shape} and only matrices are merged here; {ELSEWHERE}")
            a, b, magnitude = parts[needed[0]], parts[needed[1]], parts.get("lora_magnitude_vector")
            module = a[: a.rindex(".lora_")].removeprefix(PREFIX)  # PEFT matches patterns against the name at training
            rank = next((value for key, value in settings.rank_pattern if key.match(module)), settings.rank)
            alpha = next((value for key, value in settings.alpha_pattern if key.match(module)), settings.alpha)
            width = (shapes[a] or (0,))[0]
            if rank != width:
                raise AdapterError(
                    f"{self._file}: {a} has the rank {width} and adapter_config.json says {rank}; correct its r or rank_pattern"
                )
            rows, columns = entry.shape[::-1] if embedding else entry.shape
            fit |= {a: (width, columns), b: (rows, width)}
            fit |= {magnitude: (rows,)} if magnitude else {}
            merge = _Merge(start, a, b, magnitude, alpha / (rank**0.5 if settings.rslora else rank), embedding)
        for key, shape in fit.items():
            if shapes[key] != shape:
                raise AdapterError(
                    f"{self._file}: {key} has the shape {shapes[key]}, {name} takes {shape}; is it for another model or vocabulary?"
                )
        return merge


def canonical(name: str) -> str:
    """The name that tensors share across the naming of transformers versions, hub checkpoints and text-only twins.

    Dropped are every segment `model` or `language_model`, `vision_model` right below `vision_tower`, `linear` just before the last
    segment (Gemma 4 wraps the linears of its towers) and the wrappers of training. Whole names are compared, never tails: the vision
    layer `vision_tower.encoder.layers.0.x` is not the text layer `layers.0.x`.
    """
    segments: list[str] = []
    for segment in name.split("."):
        if segment not in NO_PART_OF_THE_NAME and not (segment == "vision_model" and segments[-1:] == ["vision_tower"]):
            segments.append(segment)
    if segments[-2:-1] == ["linear"]:
        del segments[-2]
    return ".".join(segments)


def _tied_pair(checkpoint: TensorSource) -> tuple[str, str]:
    """The input embedding and the head that shares its weight (as the checkpoint calls it or would); empty names if none does."""
    names = {canonical(name): name for name in checkpoint.entries}
    embedding, head = names.get("embed_tokens.weight"), names.get("lm_head.weight")
    said = [part["tie_word_embeddings"] for part in _configs(checkpoint.config) if part.get("tie_word_embeddings") is not None]
    # a config leaves it out where it is the default; then a checkpoint without a head tells that the default is to tie
    if embedding is None or not (any(said) if said else head is None):
        return "", ""
    above = embedding.split(".")[:-2]  # [], [model], [language_model, model], [model, language_model]
    return embedding, head or ".".join([*(above[:-1] if above[-1:] == ["model"] else []), "lm_head.weight"])


def _configs(config: dict[str, Any]) -> list[dict[str, Any]]:
    text = config.get("text_config")
    return [config, text] if isinstance(text, dict) else [config]


def _settings(path: Path) -> _Settings:
    if not path.is_file():
        raise AdapterError(f"{path}: missing; is {path.parent} the folder of a PEFT adapter?")
    try:
        config = {"r": 8, "lora_alpha": 8, "init_lora_weights": True, **read_json(path)}  # PEFT's defaults
    except CheckpointError as error:
        raise AdapterError(str(error)) from None
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type {config.get('peft_type')!r}; only LORA is merged here, so {ELSEWHERE}")
    for key, value in sorted(config.items()):
        if value and key in REFUSED:
            raise AdapterError(f"{path}: {key}: {REFUSED[key]}")
        if value and key not in KNOWN:
            raise AdapterError(f"{path}: {key!r} is unknown here and may change the merge; remove it if it does not")
    if str(config["init_lora_weights"]).lower() not in HARMLESS_INITS:
        raise AdapterError(
            f"{path}: init_lora_weights {config['init_lora_weights']!r} changed the base weights before training, and the adapter does "
            "not tell how; save it with PEFT's path_initial_model_for_weight_conversion, which makes it plain LoRA"
        )
    try:
        ranks, alphas = (
            [(re.compile(rf"(.*\.)?({key})$"), float(value)) for key, value in (config.get(pattern) or {}).items()]
            for pattern in ("rank_pattern", "alpha_pattern")
        )
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (re.error, ValueError, TypeError, AttributeError, OverflowError):
        raise AdapterError(
            f"{path}: r and lora_alpha must be numbers, their patterns map names to numbers; save the adapter again"
        ) from None
    return _Settings(rank, alpha, ranks, alphas, bool(config.get("use_rslora")), bool(config.get("use_dora")))


def _shapes(path: Path) -> Shapes:
    if not path.is_file() and (pickles := sorted(path.parent.glob("*.bin"))):
        raise AdapterError(f"{pickles[0]}: a pickle can run code when opened; save the adapter as {path.name}")
    if not path.is_file():
        raise AdapterError(f"{path}: missing; is {path.parent} the folder of a PEFT adapter?")
    try:
        with safe_open(path, "pt") as file:
            headers = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            types = {key: header.get_dtype() for key, header in headers.items()}
            shapes = {key: tuple(header.get_shape()) for key, header in headers.items()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a whole safetensors file ({' '.join(str(error).split())[:80]}); download it again") from None
    if not shapes or min(min(shape, default=1) for shape in shapes.values()) < 1:
        raise AdapterError(f"{path}: holds no tensor, or an empty one; gather the shards of training and save the adapter again")
    if odd := next((key for key in types if types[key] not in FLOATS), None):
        raise AdapterError(f"{path}: {odd} is {types[odd]}, not fp32, fp16 or bf16; save the adapter without quantizing it")
    return shapes
