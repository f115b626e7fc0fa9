"""A transformers 5 causal LM without its blocks' weights, filled one decoder block at a time from safetensors shards. No family is named.

Names of tensors are the model's own, made from the checkpoint's by transformers' conversion rules. `streams` runs batches through it.
"""

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key, revert_weight_conversion
from transformers.initialization import meta_device_safe_creation_ops

from quantkit.errors import CheckpointError, FamilyError
from quantkit.model import experts
from quantkit.model.checkpoint import TensorSource
from quantkit.model.config import parse_config, said
from quantkit.model.memory import Memory
from quantkit.types import Entry, Json


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How one tensor of the model is made from the checkpoint: one tensor as it is, or several by a conversion rule."""

    rule: WeightConverter | None
    parts: list[tuple[str, str]]  # (pattern of the rule, name in the checkpoint)


def hollow_model(config: Json, folder: Path | None, dtype: torch.dtype) -> Any:
    """The class that config.json names, on the meta device: shapes, no weights.

    A class whose towers need packages that are not installed (Gemma 3n's needs timm) is built as its text model.

    Raises:
        FamilyError: transformers knows no such class, or the folder wants to run code of its own.
    """
    if config.get("auto_map") and not config.get("model_type"):
        raise FamilyError(f"{folder}: the model brings its own code (auto_map), which quantkit does not run")
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    cls: Any = getattr(transformers, str(name), None)
    if cls is None:
        raise FamilyError(f"config.json: transformers {transformers.__version__} has no class {name!r}; is `architectures` right?")
    try:
        parsed = parse_config(config)
    except Exception as problem:  # transformers raises anything on a config that contradicts itself
        raise CheckpointError(f"{folder or 'config'}: transformers cannot read this config.json ({said(problem)})") from None
    options: dict[str, Any] = {"dtype": dtype, "experts_implementation": experts.IMPLEMENTATION}
    with torch.device("meta"), meta_device_safe_creation_ops():
        try:
            model = cls._from_config(parsed, **options)
        except ImportError:
            text = parsed.get_text_config()
            text_cls: Any = transformers.AutoModelForCausalLM._model_mapping[type(text)]
            model = text_cls._from_config(text, **options)
        except Exception as problem:
            raise CheckpointError(f"{folder or 'config'}: {name} cannot be built from this config.json ({said(problem)})") from None
    return model.eval().requires_grad_(False)


def published_entries(config: Json, dtype: torch.dtype = torch.bfloat16) -> dict[str, Entry]:
    """Names and shapes that a checkpoint of this config has when transformers saves it: enough to plan without a single weight."""
    model = hollow_model(config, None, dtype)
    if type(model).__name__ != config["architectures"][0]:
        raise FamilyError(
            f"config.json: {config['architectures'][0]} needs packages that are not installed (timm?), so a config alone does not tell its "
            "towers; install them, or give the model's folder"
        )
    tied = set(model.all_tied_weights_keys) if hasattr(model, "all_tied_weights_keys") else set()
    state = {name: t for name, t in model.state_dict().items() if name not in tied}
    return {name: Entry(t.dtype, tuple(t.shape)) for name, t in revert_weight_conversion(model, state).items()}


def hollow_text_model(config: Json, dtype: torch.dtype, **options: Any) -> Any:
    """The text model by itself of any config.json, on the meta device: the causal LM that transformers has for its text config.

    Raises:
        CheckpointError: transformers cannot read the config or build the model.
    """
    try:
        text = parse_config(config).get_text_config()
        cls: Any = transformers.AutoModelForCausalLM._model_mapping[type(text)]
        with torch.device("meta"), meta_device_safe_creation_ops():
            model = cls._from_config(text, dtype=dtype, **options)
    except Exception as problem:
        raise CheckpointError(f"config.json: transformers cannot build its text model ({said(problem)})") from None
    return model.eval().requires_grad_(False)


def decoder_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """The decoder's blocks and where they hang in the model: "model.layers".

    Raises:
        FamilyError: no list of modules is as long as the model is deep, or several are.
    """
    named = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    layers = getattr(model.get_decoder(), "layers", None)
    found = [name for name, module in named.items() if module is layers]
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = found or [name for name, module in named.items() if len(module) == depth]
    if len(found) != 1:
        raise FamilyError(
            f"config.json: quantkit does not find the decoder blocks of {type(model).__name__} (one list of {depth} layers), so it cannot "
            "stream them"
        )
    return found[0], named[found[0]]


def fill_buffers(model: Any, device: torch.device | None = None) -> None:
    """inv_freq, embed_scale ... are in no checkpoint: the model's own initialisation makes them, all else flagged as loaded.

    They are made on the CPU wherever they are wanted: two devices' powers may differ in a last bit.
    """
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    model.initialize_weights()
    if device is not None and device.type != "cpu":
        for module in model.modules():
            for leaf, tensor in module._buffers.items():
                if tensor is not None and not tensor.is_meta:
                    module._buffers[leaf] = tensor.to(device)


class Skeleton:
    """The model without its blocks' weights. `block(i)` fills one from the checkpoint and empties it again.

    Args:
        memory: the budget of the activations of every stream through it; None is no limit.
        device: where it computes; None is the CPU.
        ahead: make the next block while one is open; None: on a GPU, where copies run beside the work. Mapped pages need no copy.

    Raises:
        CheckpointError: a block's tensor has no source in the checkpoint or another shape than the model's.
        FamilyError: the model's blocks are not found.
    """

    def __init__(
        self,
        checkpoint: TensorSource,
        dtype: torch.dtype,
        memory: Memory | None = None,
        device: torch.device | None = None,
        ahead: bool | None = None,
    ):
        self.checkpoint, self.memory, self.device = checkpoint, memory or Memory(), device or torch.device("cpu")
        self._reader = ThreadPoolExecutor(1) if (self.device.type == "cuda" if ahead is None else ahead) else None
        self._next: tuple[int, Future[dict[str, Tensor]]] | None = None
        self.model = hollow_model(checkpoint.config, checkpoint.folder, dtype)
        place, blocks = decoder_blocks(self.model)
        self.blocks: list[nn.Module] = list(blocks)
        self.open = 0  # the block that is filled
        self._prefix, decoder = place + ".", self.model.get_submodule(place.rpartition(".")[0])
        self._sources = self._find_sources()
        fill_buffers(self.model, self.device)
        head = self.model.get_output_embeddings()
        text = tuple(name + "." for name, m in self.model.named_modules() if m is decoder or (head is not None and m is head))
        outside = [t for t in self._sources if t.startswith(text) and not t.startswith(self._prefix)]
        self._fill(outside)  # vision and audio towers stay on meta: text never touches them
        # the head holds embed_tokens' old meta parameter until it is tied again; the argument keeps an untied head untied
        self.model.tie_weights(missing_keys=set(self._missing))
        left = [n for n, t in self.model.state_dict().items() if t.is_meta and n.startswith(text) and not n.startswith(self._prefix)]
        if left:
            raise CheckpointError(f"{checkpoint.folder}: {left[0]} is neither in the checkpoint nor tied to another tensor")

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """One decoder block with its weights: mapped pages where the file's dtype is the model's. Edits stay in memory."""
        prefix, self.open = f"{self._prefix}{index}.", index
        empty = {n: torch.empty_like(t, device="meta") for n, t in self.model.state_dict().items() if n.startswith(prefix)}
        try:
            for name, tensor in self._taken(index).items():
                self._put(name, tensor)
            if self._reader is not None and index + 1 < len(self.blocks):
                self._next = index + 1, self._reader.submit(self._made, index + 1)
            yield self.blocks[index]
        finally:
            for name, tensor in empty.items():
                self._put(name, tensor)

    @staticmethod
    def twin(block: nn.Module) -> nn.Module:
        """The open block a second time, its weights shared until one of the two is given others (a parameter set, not written)."""
        return copy.deepcopy(block, {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())})

    def _find_sources(self) -> dict[str, _Recipe]:
        """Which checkpoint tensors make each tensor of the model: the loop of from_pretrained, on names alone."""
        rules, have = get_model_conversion_mapping(self.model), self.model.state_dict()
        renames = [r for r in rules if isinstance(r, WeightRenaming)]
        converters = [r for r in rules if isinstance(r, WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        plan: dict[str, _Recipe] = {}
        for name in sorted(self.checkpoint.entries, key=dot_natural_key):  # expert 2 before expert 10
            target, pattern = rename_source_key(name, renames, converters, self.model.base_model_prefix, have)
            if target not in have and name in have:
                target, pattern = name, None
            if target in have:
                rule = by_pattern.get(pattern) if pattern else None
                plan.setdefault(target, _Recipe(rule, [])).parts.append((pattern or name, name))
        made = {
            target.replace(recipe.rule.target_patterns[0], pattern) if recipe.rule else target
            for target, recipe in plan.items()
            for pattern in (recipe.rule.target_patterns if recipe.rule else [""])
        }
        self._missing = sorted(set(have) - made)
        absent = [name for name in self._missing if name.startswith(self._prefix)]
        if absent:
            raise CheckpointError(
                f"{self.checkpoint.folder}: the model needs {absent[0]}"
                + (f" and {len(absent) - 1} more" if len(absent) > 1 else "")
                + ", which no tensor of the checkpoint makes; is a shard missing, or config.json of another model?"
            )
        return plan

    def _taken(self, index: int) -> dict[str, Tensor]:
        """A block's tensors: those that were made ahead, or made now."""
        if self._next is None or self._next[0] != index:
            return self._made(index)
        made, self._next = self._next[1].result(), None
        if self.device.type == "cuda":
            for tensor in made.values():  # of the reader's stream: not to be given away while this one still uses it
                tensor.record_stream(torch.cuda.current_stream(self.device))
        return made

    def _made(self, index: int) -> dict[str, Tensor]:
        prefix = f"{self._prefix}{index}."
        targets = [target for target in self._sources if target.startswith(prefix)]
        if self.device.type != "cuda":
            return dict(self._tensors(targets))
        with torch.cuda.stream(torch.cuda.Stream(self.device)):
            made = {name: tensor.to(self.device, non_blocking=True) for name, tensor in self._tensors(targets)}
            torch.cuda.current_stream(self.device).synchronize()
        return made

    def _fill(self, targets: Sequence[str]) -> None:
        for name, tensor in self._tensors(targets):
            self._put(name, tensor)

    def _tensors(self, targets: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The model's tensors, made of the checkpoint's: views of its pages, or fused from several."""
        for target in targets:
            recipe = self._sources[target]
            if recipe.rule is None:
                yield target, self.checkpoint.view(recipe.parts[0][1])
                continue
            names = {p: [n for q, n in recipe.parts if q == p] for p in recipe.rule.source_patterns}
            old: Tensor = self.model.get_parameter(target)
            operations = [(type(op).__name__, getattr(op, "dim", None)) for op in recipe.rule.operations]
            if operations in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
                fused = torch.empty(old.shape, dtype=old.dtype)
                if any(len(n) != len(fused) for n in names.values()):
                    raise CheckpointError(f"{self.checkpoint.folder}: {target} needs {len(fused)} experts, the checkpoint has others")
                experts.fuse(fused, [[lambda n=n: self.checkpoint.view(n) for n in group] for group in names.values()])  # type: ignore[misc]
                yield target, fused
                continue
            rule: Any = copy.deepcopy(recipe.rule)  # any other rule: transformers' own operations
            for pattern, name in recipe.parts:
                rule.add_tensor(target, name, pattern, lambda name=name: self.checkpoint.view(name))
            for name, made in rule.convert(target, model=self.model, config=self.model.config).items():
                yield name, made[0] if isinstance(made, list) else made

    def _put(self, name: str, tensor: Tensor) -> None:
        owner_name, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        old = getattr(owner, leaf)
        if tensor.shape != old.shape:
            shapes = f"{tuple(tensor.shape)} in the checkpoint, {tuple(old.shape)} by config.json"
            raise CheckpointError(f"{self.checkpoint.folder}: {name} is {shapes}")
        value = tensor if tensor.is_meta else tensor.to(self.device, old.dtype)
        setattr(owner, leaf, value if leaf in owner._buffers else nn.Parameter(value, requires_grad=False))
