"""Plan + the family's table -> the tensors of the file: name, type, shape, and where their bytes come from.

Shapes are written (experts, out, in), as here; the file tells them the other way round. What the solver left alone keeps the precision
of the checkpoint, or takes the type that the recipe names by a pattern; vectors, norms and routers are F32, as llama.cpp needs them.
"""

import difflib
import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantkit.errors import CheckpointError, WriteError
from quantkit.families.family import Gguf, matches, outside_block
from quantkit.grid import ggml
from quantkit.model.checkpoint import TensorSource
from quantkit.store import Store
from quantkit.types import BlockPlan, Blocks, Json, Linear, Plan

ALIGNMENT = 32  # every tensor starts at a multiple of this
FLOAT_TYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
CHUNK = 1 << 22  # weights that are rounded at a time
OPTIONAL = ("output", "per_layer_token_embd")  # a recipe may name these for models that have them
Rows = Callable[[], Iterator[Tensor]]  # rows of bytes (uint8), piece by piece


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of the file."""

    name: str
    kind: str  # Q4_0, BF16 ...
    shape: tuple[int, ...]
    read: Rows
    solved: bool = False

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.weights // max(self.shape[-1], 1) * ggml.row_bytes(self.kind, self.shape[-1])


@dataclass(slots=True)
class Rounded:
    """Groups whose numbers fp16 could not hold to the last bit (see grid/ggml.py), counted while the file is written."""

    groups: int = 0
    scales: int = 0
    minima: int = 0


class Layout:
    """All tensors of one file, in its order.

    Args:
        types: pattern of a name in the file -> type, or several of which the first that fits counts, for tensors without a scheme; the
            last pattern that matches counts.
        checkpoint, store: left out where only sizes are asked for.

    Raises:
        WriteError: a tensor that the family's table does not place, a scheme that no type holds, a pattern that matches nothing.
    """

    def __init__(
        self,
        plan: Plan,
        table: Gguf,
        config: Json,
        types: Mapping[str, str | Sequence[str]],
        checkpoint: TensorSource | None = None,
        store: Store | None = None,
    ):
        self.plan, self.table, self.config, self.types = plan, table, config, types
        self._checkpoint, self._store = checkpoint, store
        self.rounded = Rounded()
        embedding = next((name for name in plan.kept if outside_block(name) == "embed_tokens.weight"), None)
        if embedding is None:
            raise WriteError("gguf: the checkpoint has no embed_tokens.weight, which llama.cpp needs; is it whole?")
        self.rows = plan.entries[embedding].shape[0]
        self._shapes = {local: plan.entries[name].shape for block in plan.blocks for local, name in self._tensors(block).items()}
        self._matched: set[str] = set()
        self.slots = [*self._outside(), *(slot for block in plan.blocks for slot in self._block(block))]
        self._check(types)

    def _check(self, types: Mapping[str, str | Sequence[str]]) -> None:
        for pattern in types:
            if pattern not in self._matched and not fnmatch.filter(OPTIONAL, pattern):
                free = [
                    slot.name.removesuffix(".weight") for slot in self.slots if not slot.solved and self._takes_types(slot.name, slot.shape)
                ]
                near = difflib.get_close_matches(pattern, free, n=1, cutoff=0.0)[0]
                raise WriteError(
                    f"gguf: types: {pattern!r} matches no matrix that the recipe leaves unquantized; the nearest is {near!r} "
                    "(what it quantizes has its type from its scheme; vectors, norms and routers are F32)"
                )
        names = [slot.name for slot in self.slots]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise WriteError(f"{twice}: two tensors of the checkpoint lead there; quantkit/families/{self.plan.family}.py is wrong")

    def _name(self, tensor: str) -> str:
        """A tensor's name in the file, "" where it is not written."""
        if (name := self.table.called(tensor)) is None:
            raise WriteError(f"{tensor}: quantkit/families/{self.plan.family}.py does not say what llama.cpp calls it")
        return name

    def _outside(self) -> Iterator[Slot]:
        """The vocabulary's tables, the last norm, and whatever else stands outside the blocks."""
        stacks: dict[str, list[str]] = {}
        for name in self.plan.kept:
            local = outside_block(name)
            if local == "lm_head.weight" and self.config.get("tie_word_embeddings"):
                self._check_tied(name)
            elif target := self._name(local):
                stacks.setdefault(target, []).append(name)
        for target, names in stacks.items():
            yield self._floats(target, names, [partial(self._copied, name) for name in names])
        if factors := self.table.rope_factors(self.config):
            values = ggml.round_rows(torch.tensor([factors]), "F32")
            yield Slot("rope_freqs.weight", "F32", (len(factors),), lambda: iter([values]))

    def _check_tied(self, head: str) -> None:
        """A head that is tied is not written; transformers unties one whose weights differ, whatever config.json says."""
        embeddings = next(name for name in self.plan.kept if outside_block(name) == "embed_tokens.weight")
        if self._checkpoint is not None and not torch.equal(self._source.view(head), self._source.view(embeddings)):
            raise WriteError(
                f"{head}: differs from {embeddings}, though config.json ties the two; set tie_word_embeddings to false there (or drop the "
                "head, if it is a leftover)"
            )

    def _tensors(self, block: BlockPlan) -> dict[str, str]:
        whole = {f"{linear.local}.weight": linear.source.tensor for linear in block.linears if linear.source.expert is None}
        return {**whole, **block.kept}

    def _block(self, block: BlockPlan) -> Iterator[Slot]:
        stacks: dict[str, list[Linear]] = {}
        for linear in block.linears:
            if target := self._name(f"{linear.local}.weight"):
                stacks.setdefault(target, []).append(linear)
        for target, linears in stacks.items():
            yield self._matrices(block, f"blk.{block.index}.{target}", self._ordered(target, linears))
        for local, name in block.kept.items():
            if target := self._name(local):
                yield self._floats(f"blk.{block.index}.{target}", [name], [partial(self._kept, block.index, local, name)])
        present = self._tensors(block)
        for local, value in self.table.made_up.items():
            if local not in present:
                shape = self._shapes[local]
                kind = "F32" if len(shape) == 1 else "F16"
                yield Slot(f"blk.{block.index}.{self._name(local)}", kind, shape, partial(_filled, shape, value, kind))

    def _ordered(self, target: str, linears: list[Linear]) -> list[Linear]:
        """Experts by their numbers; the parts of each in the table's order."""
        if len(linears) == 1:
            return linears
        patterns = [pattern for pattern, name in self.table.names.items() if f"{name}.weight" == target]

        def key(linear: Linear) -> tuple[int, int]:
            part = next(i for i, pattern in enumerate(patterns) if matches(pattern, linear.local))
            return (next(int(piece) for piece in linear.local.split(".") if piece.isdigit()), part)

        return sorted(linears, key=key)

    def _matrices(self, block: BlockPlan, name: str, linears: list[Linear]) -> Slot:
        """A linear, or all experts' of one kind."""
        schemes = {linear.scheme for linear in linears}
        out, columns = linears[0].shape
        experts = len({linear.local.split("experts.")[-1].split(".")[0] for linear in linears}) if "experts." in linears[0].local else 0
        shape = (experts, out * len(linears) // experts, columns) if experts else (out, columns)
        if schemes == {None}:
            readers = [partial(self._matrix, linear) for linear in linears]
            return self._floats(name, [linear.source.tensor for linear in linears[:1]], readers, shape)
        if len(schemes) > 1:
            raise WriteError(
                f"{name}: its parts have different schemes ({', '.join(sorted(map(str, schemes)))}); a GGUF tensor has one type"
            )
        scheme = linears[0].scheme
        assert scheme is not None
        kind = ggml.type_of(scheme, columns)
        if kind is None:
            raise WriteError(
                f"GGUF of {scheme} ({linears[0].name}, {columns} columns): its types hold 4 or 5 bits, or 8 bits symmetric, with a scale "
                "for 32 columns or a multiple; give this linear such a scheme, or keep it with an override"
            )

        def read() -> Iterator[Tensor]:
            for linear in linears:
                yield self._permuted(linear.local, self._transcoded(block.index, linear))

        return Slot(name, kind, shape, read, True)

    def _floats(self, name: str, sources: list[str], readers: Sequence[Callable[[], Tensor]], shape: tuple[int, ...] | None = None) -> Slot:
        """Tensors that no solver touched, stacked where there are several."""
        first = self.plan.entries[sources[0]]
        if shape is None:
            shape = (len(sources), *first.shape) if len(sources) > 1 else first.shape or (1,)
        extra = self.rows - shape[0] if name in self.table.first_row else 0
        shape = (shape[0] + extra, *shape[1:])
        kind = self._float_type(name, shape, FLOAT_TYPES[str(first.dtype)])
        offset = self.plan.norm_offset if name.endswith("norm.weight") else 0.0

        def read() -> Iterator[Tensor]:
            for reader in readers:
                tensor = reader()
                rows = tensor.reshape(-1, shape[-1])
                for part in rows.split(max(1, CHUNK // shape[-1])):
                    yield self._rounded(name, part.float() + offset if offset else part, kind)
                if extra:
                    yield self._rounded(name, rows[:1], kind).expand(extra, -1)

        return Slot(name, kind, shape, read)

    def _float_type(self, name: str, shape: tuple[int, ...], own: str) -> str:
        if not self._takes_types(name, shape):
            return "F32"
        for pattern in reversed(list(self.types)):
            if fnmatch.fnmatchcase(name.removesuffix(".weight"), pattern):
                self._matched |= {p for p in self.types if fnmatch.fnmatchcase(name.removesuffix(".weight"), p)}
                asked = self.types[pattern]
                choice = [kind.upper() for kind in ([asked] if isinstance(asked, str) else asked)]
                wanted = next((kind for kind in choice if shape[-1] % ggml.SIZES[kind][0] == 0), choice[-1])
                if shape[-1] % ggml.SIZES[wanted][0]:
                    raise WriteError(
                        f"{name}: {wanted} needs rows of whole {ggml.SIZES[wanted][0]}s, this has {shape[-1]} columns; name another type"
                    )
                return wanted
        return own

    def _takes_types(self, name: str, shape: tuple[int, ...]) -> bool:
        """Is it a matrix that llama.cpp reads in other types than F32?"""
        weights = name.endswith(".weight") and not name.endswith(("norm.weight", "ffn_gate_inp.weight"))
        return len(shape) > 1 and weights and not name.endswith(self.table.float32)

    def _rounded(self, name: str, rows: Tensor, kind: str) -> Tensor:
        if bool(rows.isnan().any()):
            raise CheckpointError(f"{name}: holds NaN; the checkpoint is damaged")
        try:
            return ggml.round_rows(rows, kind)
        except ValueError as problem:
            raise WriteError(f"{name}: {problem}; name another type for it in the recipe (gguf: types:)") from None

    def _transcoded(self, index: int, linear: Linear) -> Tensor:
        assert self._store is not None
        codes = self._store.codes(index, linear)
        if isinstance(codes, Blocks):
            return codes.rows
        try:
            made = ggml.transcode(codes)
        except ValueError as problem:
            raise WriteError(f"{linear.name}: {problem}; keep it with an override") from None
        self.rounded.groups += codes.scale.numel()
        self.rounded.scales += made.scales_rounded
        self.rounded.minima += made.minima_rounded
        return made.rows

    def _permuted(self, module: str, rows: Tensor) -> Tensor:
        """Rows in the order of the file: llama.cpp rotates neighbours, transformers the two halves of a head."""
        if module not in self.table.permuted:
            return rows
        heads = self.config["num_attention_heads" if module.endswith("q_proj") else "num_key_value_heads"]
        return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def _matrix(self, linear: Linear) -> Tensor:
        tensor = self._source.view(linear.source.tensor)
        if linear.source.expert is not None:
            tensor = tensor[linear.source.expert]
        if linear.source.rows is not None:
            tensor = tensor[slice(*linear.source.rows)]
        return self._permuted(linear.local, tensor)

    def _kept(self, index: int, local: str, name: str) -> Tensor:
        """A block's own tensor, folded where a fold changed it."""
        store = self._store
        assert store is not None
        folded = local in store.folded(index)
        tensor = store.read(index, f"folded/{local}").to(self.plan.entries[name].dtype) if folded else self._source.view(name)
        return self._permuted(local.rpartition(".")[0], tensor)

    def _copied(self, name: str) -> Tensor:
        return self._source.view(name)

    @property
    def _source(self) -> TensorSource:
        assert self._checkpoint is not None
        return self._checkpoint


def _filled(shape: tuple[int, ...], value: float, kind: str) -> Iterator[Tensor]:
    yield ggml.round_rows(torch.full((1, shape[-1]), value), kind).expand(math.prod(shape[:-1]), -1)
