"""Run a transformers 5 causal LM one decoder block at a time, straight from its safetensors shards. No family is named here.

    skeleton = Skeleton(checkpoint, torch.bfloat16) # the model on the meta device; embeddings, norm and head as mapped pages
    stream = Stream(skeleton, batches)
    state = stream.start()                          # hidden states before block 0; state.fork() for a second stream
    for i in range(len(skeleton.blocks)):
        with skeleton.block(i) as block:            # filled from the shards, emptied on exit
            stream.advance(block, state)
    logits = stream.logits(state, batch, part)      # the model's own tail on the streamed hidden states

How: the real model runs its own forward with `block.forward` replaced on the instance, so that every family's arguments (positions,
masks, per-layer inputs, shared keys and values) come from transformers itself; so do the names, from its conversion rules.
"""

import copy
from collections import UserDict
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key, revert_weight_conversion
from transformers.initialization import meta_device_safe_creation_ops

from quantkit.errors import CheckpointError, FamilyError
from quantkit.model import experts
from quantkit.model.checkpoint import TensorSource
from quantkit.model.config import parse_config, said
from quantkit.model.memory import Activations, Memory
from quantkit.types import Batch, Entry, Json


class _Captured(Exception):
    """Leaves the model's forward once the wanted block's arguments are known."""


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


@dataclass(slots=True)
class State:
    """Where a stream stands, per batch: the hidden states and what blocks hand to later blocks (shared keys and values)."""

    hidden: MutableSequence[Tensor]
    shared: list[dict[str, Any]]
    beside: list[tuple[Any, ...] | None]  # what the last block returned behind the hidden states; None of one that returns them alone
    ahead: dict[int, tuple[Any, ...] | None] = field(default_factory=dict)  # the same, of a block that was run and not yet passed

    def fork(self) -> "State":
        """An independent stream from here: the tensors are shared until one of the two moves on."""
        hidden = self.hidden.fork() if isinstance(self.hidden, Activations) else list(self.hidden)
        return State(hidden, [{k: copy.copy(v) for k, v in s.items()} for s in self.shared], list(self.beside))

    def pass_on(self, batch: int, hidden: Tensor) -> None:
        """The block that was run last on this batch lies behind; `hidden`: what it returned."""
        self.hidden[batch], self.beside[batch] = hidden, self.ahead.pop(batch, None)

    def check(self, what: str) -> None:
        """Refuse to go on with activations that are no numbers; `what` made them.

        Raises:
            CheckpointError: NaN or infinity in a hidden state.
        """
        if not all(bool(hidden.isfinite().all()) for hidden in self.hidden):
            raise CheckpointError(f"{what}: NaN or infinity in the activations: a damaged weight, or fp16 that overflows (convert to bf16)")


class Stream:
    """Batches on their way through a skeleton's blocks."""

    def __init__(self, skeleton: Skeleton, batches: Sequence[Batch]):
        self.skeleton, self.device = skeleton, skeleton.device
        self.batches = [batch.to(skeleton.device) for batch in batches]
        self._cache: dict[tuple[int, int], Any] = {}

    @torch.no_grad()
    def start(self) -> State:
        """The hidden states in front of block 0."""
        hidden = (self._arguments(b, 0, None)[0] for b in range(len(self.batches)))
        return State(Activations(hidden, self.skeleton.memory), [{} for _ in self.batches], [None for _ in self.batches])

    def run(self, block: nn.Module, state: State, batch: int, grad: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """The open block's (or its twin's) output for one batch; the hidden states do not move. Running twice is safe.

        `dtype`: of all that the block is given, where it computes in another precision than the model.
        """
        with torch.no_grad():
            _, args, kwargs = self._arguments(batch, self.skeleton.open, state.beside[batch])
        # dict arguments (shared keys and values) are written by some blocks and read by later ones: one dict for each batch and state
        shared = state.shared[batch]
        kwargs = {k: shared.setdefault(k, copy.copy(v)) if isinstance(v, (dict, UserDict)) else v for k, v in kwargs.items()}
        hidden = state.hidden[batch].to(self.device)  # where the device has no room for all of them they wait in memory
        if dtype is not None:
            hidden, args, kwargs = _cast((hidden, args, kwargs), dtype)
        with torch.set_grad_enabled(grad):
            made = block(hidden, *args, **kwargs)
        out, beside = (made[0], made[1:]) if isinstance(made, tuple) and made else (made, None)
        if not torch.is_tensor(out) or out.shape != state.hidden[batch].shape:
            raise FamilyError(f"{type(block).__name__} returns no hidden states of the shape it was given, so it cannot be streamed")
        state.ahead[batch] = beside
        return out

    def advance(self, block: nn.Module, state: State) -> None:
        """Every batch through the open block."""
        for batch in range(len(self.batches)):
            state.pass_on(batch, self.run(block, state, batch))

    @cached_property
    def rows_at(self) -> int:
        """Where hidden states count rows, tokens behind: 0 of (rows, tokens, hidden), 1 of AltUp's (streams, rows, tokens, hidden)."""
        ids, shapes = self.batches[0].ids[:1, :1], []
        for tokens in (2, 3):
            (hidden, _, _), _ = self._captured(ids.expand(1, tokens), 0, None)
            shapes.append(hidden.shape)
        return next(dim for dim, sizes in enumerate(zip(*shapes, strict=True)) if sizes[0] != sizes[1]) - 1

    def by_token(self, hidden: Tensor, features: int = 1) -> Tensor:
        """(*streams, rows, tokens, *features) of hidden states, or of figures of each, wherever the model counts its streams."""
        at = self.rows_at
        return hidden.movedim((at, at + 1), (-2 - features, -1 - features))

    def close(self) -> None:
        """Forget the arguments of the block that was open."""
        self._cache.clear()

    @torch.no_grad()
    def logits(self, state: State, batch: int, part: slice) -> Float[Tensor, "rows tokens vocabulary"]:
        """The model's own tail (norm, head, softcap) on some positions of the streamed hidden states; cut, for vocabularies are large."""
        last = len(self.skeleton.blocks) - 1
        whole, dim = state.hidden[batch].shape, self.rows_at + 1
        hidden = state.hidden[batch].narrow(dim, *_bounds(part, whole[dim])).to(self.device)

        def cut(value: Any) -> Any:  # a second residual stream, say
            alike = torch.is_tensor(value) and value.shape[: dim + 1] == whole[: dim + 1]
            return value.narrow(dim, *_bounds(part, whole[dim])) if alike else value

        beside = state.beside[batch]
        beside = None if beside is None else tuple(cut(value) for value in beside)

        def make(k: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: _returned(hidden if k == last else _hidden_of(args, kwargs), beside)

        with self._stand_ins(make):
            return self.skeleton.model(input_ids=self.batches[batch].ids[:, part], use_cache=False).logits

    def _arguments(self, batch: int, index: int, beside: tuple[Any, ...] | None) -> Any:
        """(hidden states, args, kwargs) that block `index` gets: the model's own forward, blocks before it passing through.

        `beside`: what the block before it returned behind the hidden states; the model's own loop hands it on.
        """
        if (batch, index) in self._cache:
            return self._cache[batch, index]
        got, costly = self._captured(self.batches[batch].ids, index, beside)
        if (
            costly and not beside
        ):  # per-layer inputs take a third of a block's forward to make; masks and positions are cheaper made than kept
            self._cache[batch, index] = got
        return got

    @torch.no_grad()
    def _captured(self, ids: Tensor, index: int, beside: tuple[Any, ...] | None) -> tuple[Any, bool]:
        """What block `index` gets of some rows of tokens, and whether it is dear to make."""
        call: dict[str, Any] = {}
        costly = False

        def own(value: Any) -> Any:
            # per_layer_inputs[:, :, i] is a view that would keep every layer's inputs alive
            nonlocal costly
            if torch.is_tensor(value) and value.untyped_storage().nbytes() > 2 * value.nbytes:
                costly = True
                return value.clone()
            return value

        def make(k: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = _hidden_of(args, kwargs)
                if k < index:
                    return _returned(hidden, beside)
                kwargs.pop("hidden_states", None)
                call["got"] = hidden if index == 0 else None, [own(v) for v in args[1:]], {n: own(v) for n, v in kwargs.items()}
                raise _Captured

            return forward

        with self._stand_ins(make), suppress(_Captured):
            self.skeleton.model(input_ids=ids, use_cache=False)
        return call["got"], costly

    @contextmanager
    def _stand_ins(self, make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        blocks = self.skeleton.blocks
        for k, block in enumerate(blocks):
            block.forward = make(k)  # type: ignore[method-assign]  # on the instance: everything else of the block stays visible
        try:
            yield
        finally:
            for block in blocks:
                del block.forward


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Every float tensor within, in another precision."""
    if torch.is_tensor(value):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(one, dtype) for one in value)
    if isinstance(value, (dict, UserDict)):
        return type(value)({key: _cast(one, dtype) for key, one in value.items()})
    return value


def _returned(hidden: Tensor, beside: tuple[Any, ...] | None) -> Any:
    """As the blocks of this model return it."""
    return hidden if beside is None else (hidden, *beside)


def _hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _bounds(part: slice, length: int) -> tuple[int, int]:
    start, stop, _ = part.indices(length)
    return start, stop - start
