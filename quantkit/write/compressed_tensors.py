"""compressed-tensors checkpoints, as vLLM and transformers load them (format page: github.com/vllm-project/compressed-tensors).

A quantized linear L (out, in) becomes, in the dtype that engines expect:

    L.weight_packed      int32 (out, in x bits / 32)          codes + 2^(bits-1), the first in the lowest bits
    L.weight_scale       bf16  (out, in / group)              (out, 1) where a row has one scale
    L.weight_shape       int64 (2)                            out, in
    L.weight_zero_point  int32 (out x bits / 32, in / group)  packed along the rows; asymmetric only

Names are the source's. Fused experts are split, experts.3.gate_proj and so on, the layout that vLLM loads since 0.32; or stay fused as
experts.gate_up_proj_packed (experts, rows, words), without shape tensors (experts_layout: fused). All else is copied bit for bit.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantkit.disk import replacing, write_whole
from quantkit.errors import CheckpointError, WriteError
from quantkit.families.family import SERVED_AS_ONE
from quantkit.grid.integer import pack
from quantkit.model.checkpoint import TensorSource
from quantkit.store import Piece, Store, safetensors_header, write_safetensors
from quantkit.types import BlockPlan, Entry, Json, Linear, Plan, Scheme, expert_of

FORMAT = "compressed-tensors"
SHARD_BYTES = 4_000_000_000  # a shard closes at the first block that reaches this; the Hub takes up to 50 GB, downloads like smaller ones
BITS = (4, 8)
VERSION = "0.20.0"  # of the compressed-tensors layout that this file writes
METADATA = {"format": "pt"}
# What lies beside the weights and is worth passing on; never code, never other weights.
PASSED_ON = (".json", ".jinja", ".model", ".txt", ".tiktoken")
MADE_HERE = ("config.json", "model.safetensors.index.json", "quantkit.json", "README.md")


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file: its tensors, and the blocks that must be solved before it can be written."""

    name: str
    pieces: list[Piece]
    blocks: frozenset[int]

    @property
    def bytes(self) -> int:
        pieces = sorted(self.pieces, key=lambda piece: -piece.dtype.itemsize)
        return len(safetensors_header(pieces, METADATA)) + sum(piece.bytes for piece in pieces)


class CompressedTensors:
    """One artefact folder. Shards are written as soon as their blocks are in the store; the manifest of names comes last.

    Args:
        plan: what happens to every tensor.
        experts_layout: "per-expert" or "fused".
        checkpoint, store, folder: left out where only sizes are asked for.

    Raises:
        WriteError: a bit width that engines do not load, zero points in a mix of schemes, or a fused layout for experts that the
            source keeps apart.
    """

    def __init__(
        self,
        plan: Plan,
        experts_layout: str = "per-expert",
        checkpoint: TensorSource | None = None,
        store: Store | None = None,
        folder: Path | None = None,
    ):
        self.plan, self.fused, self.folder = plan, experts_layout == "fused", folder
        self._checkpoint, self._store = checkpoint, store
        for linear in plan.linears():
            if linear.scheme and linear.scheme.bits not in BITS:
                raise WriteError(
                    f"{FORMAT} in {linear.scheme.bits} bits ({linear.name}): vLLM has kernels for 4 and 8 bits only, and the packing of "
                    "other widths changed between compressed-tensors 0.17 and 0.19; use 4 or 8"
                )
        schemes = {linear.scheme for linear in plan.linears() if linear.scheme}
        if len(schemes) > 1 and not all(scheme.symmetric for scheme in schemes):
            raise WriteError(
                f"{FORMAT} with zero points in a mix of schemes ({', '.join(sorted(map(str, schemes)))}): transformers 5.23 decodes "
                "such a checkpoint by one scheme only and fails; use one scheme for all linears (a group that fell back is another), or "
                "symmetric ones"
            )
        self._check_experts()
        self.shards = self._layout()

    def _check_experts(self) -> None:
        """Experts that the source keeps apart are decoded by transformers, by one scheme and without zero points; others by quantkit.hf."""
        experts = [linear for linear in self.plan.linears() if expert_of(linear.local) is not None]
        schemes = {linear.scheme for linear in experts}
        if any(linear.source.expert is not None for linear in experts) or schemes <= {None}:
            return
        zero_points = any(scheme and not scheme.symmetric for scheme in schemes)
        if len(schemes) > 1 or zero_points:
            what = "zero points in experts" if zero_points else "experts of several schemes"
            raise WriteError(
                f"{FORMAT} with {what} ({experts[0].name}): transformers 5.23 cannot decode that for {self.plan.model_type}; "
                "use one symmetric scheme for all experts"
            )

    @property
    def bytes(self) -> int:
        """Exact bytes of the weight files."""
        return sum(shard.bytes for shard in self.shards)

    def write_ready(self) -> list[Path]:
        """Write every shard whose blocks are all in the store and that is not written yet."""
        assert self._store is not None
        assert self.folder is not None
        written = []
        for shard in self.shards:
            path = self.folder / shard.name
            whole = path.exists() and path.stat().st_size == shard.bytes
            if not whole and all(index in self._store for index in shard.blocks):
                write_safetensors(path, shard.pieces, METADATA)
                written.append(path)
        return written

    def finish(self) -> None:
        """Index, config and the files that pass on from the source. All shards must be written."""
        assert self._checkpoint is not None
        assert self.folder is not None
        if len(self.shards) > 1:
            weight_map = {piece.name: shard.name for shard in self.shards for piece in shard.pieces}
            total = sum(piece.bytes for shard in self.shards for piece in shard.pieces)
            _write_json(self.folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
        for source in sorted(self._checkpoint.folder.iterdir()):
            if source.is_file() and source.suffix in PASSED_ON and source.name not in MADE_HERE:
                with replacing(self.folder / source.name) as temporary:
                    shutil.copyfile(source, temporary)
        # the source's own JSON with one key more: saving through transformers rewrites keys that older engines know
        _write_json(self.folder / "config.json", {**self._checkpoint.config, "quantization_config": quantization_config(self.plan)})

    def _layout(self) -> list[Shard]:
        groups: list[tuple[list[Piece], set[int]]] = []
        pieces: list[Piece] = []
        blocks: set[int] = set()
        size = 0
        for block in self.plan.blocks:
            own = list(self._block(block))
            pieces, size = pieces + own, size + sum(piece.bytes for piece in own)
            blocks.add(block.index)
            if size >= SHARD_BYTES:
                groups.append((pieces, blocks))
                pieces, blocks, size = [], set(), 0
        for name in self.plan.kept:
            entry = self.plan.entries[name]
            if pieces and size + entry.bytes >= SHARD_BYTES:
                groups.append((pieces, blocks))
                pieces, blocks, size = [], set(), 0
            pieces.append(self._copied(name, entry))
            size += entry.bytes
        groups.append((pieces, blocks))
        groups = [group for group in groups if group[0]]
        count = len(groups)
        names = ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        return [Shard(name, group, frozenset(needed)) for name, (group, needed) in zip(names, groups, strict=True)]

    def _block(self, block: BlockPlan) -> Iterator[Piece]:
        copied: set[str] = set()
        fused: dict[str, list[Linear]] = {}
        for linear in block.linears:
            if linear.scheme is None:
                if linear.source.tensor not in copied:  # a fused tensor holds many linears
                    copied.add(linear.source.tensor)
                    yield self._copied(linear.source.tensor, self.plan.entries[linear.source.tensor])
            elif self.fused and expert_of(linear.local) is not None:
                if linear.source.expert is None:
                    raise WriteError(f"{linear.name}: the source keeps its experts apart; experts_layout must be per-expert")
                fused.setdefault(linear.source.tensor, []).append(linear)
            else:
                yield from self._quantized(block, linear)
        for tensor, linears in fused.items():
            yield from self._fused(block, tensor, linears)
        for local, name in block.kept.items():
            entry = self.plan.entries[name]
            yield Piece(name, entry.dtype, entry.shape, self._maybe_folded(block.index, local, name))

    def _quantized(self, block: BlockPlan, linear: Linear) -> Iterator[Piece]:
        scheme = linear.scheme
        assert scheme is not None
        out, columns = linear.shape
        groups = columns // scheme.width(columns)
        words, packed_rows = _words(columns, scheme), _words(out, scheme)
        read = self._stored
        yield Piece(f"{linear.name}.weight_packed", torch.int32, (out, words), read(block.index, linear.local, "packed"))
        scale = _then(read(block.index, linear.local, "scale"), lambda s: s.to(self.plan.dtype))
        yield Piece(f"{linear.name}.weight_scale", self.plan.dtype, (out, groups), scale)
        yield Piece(f"{linear.name}.weight_shape", torch.int64, (2,), lambda: torch.tensor([out, columns]))
        if not scheme.symmetric:
            zero = read(block.index, linear.local, "zero")
            packed = _then(zero, lambda z: pack_rows(z, scheme.bits))
            yield Piece(f"{linear.name}.weight_zero_point", torch.int32, (packed_rows, groups), packed)

    def _fused(self, block: BlockPlan, tensor: str, linears: list[Linear]) -> Iterator[Piece]:
        """All experts' matrices of one fused tensor in one piece each: (experts, rows, words)."""
        scheme = linears[0].scheme
        assert scheme is not None
        experts, out, columns = self.plan.entries[tensor].shape
        linears = sorted(linears, key=lambda linear: (linear.source.expert or 0, linear.source.rows or (0, 0)))
        groups = columns // scheme.width(columns)

        def stacked(part: str) -> Callable[[], Tensor]:
            reads = [self._stored(block.index, linear.local, part) for linear in linears]
            return lambda: torch.cat([read() for read in reads]).view(experts, out, -1)

        yield Piece(f"{tensor}_packed", torch.int32, (experts, out, _words(columns, scheme)), stacked("packed"))
        scale = _then(stacked("scale"), lambda s: s.to(self.plan.dtype))
        yield Piece(f"{tensor}_scale", self.plan.dtype, (experts, out, groups), scale)
        if not scheme.symmetric:
            packed = _then(stacked("zero"), lambda z: torch.stack([pack_rows(zero, scheme.bits) for zero in z]))
            yield Piece(f"{tensor}_zero_point", torch.int32, (experts, _words(out, scheme), groups), packed)

    def _copied(self, name: str, entry: Entry) -> Piece:
        return Piece(name, entry.dtype, entry.shape, lambda: _a_number(self._source.view(name), name))

    def _maybe_folded(self, index: int, local: str, name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            store = self._solved
            if local in store.folded(index):
                return store.read(index, f"folded/{local}").to(self.plan.entries[name].dtype)
            return _a_number(self._source.view(name), name)

        return read

    def _stored(self, index: int, local: str, part: str) -> Callable[[], Tensor]:
        return lambda: self._solved.read(index, f"{local}/{part}")

    @property
    def _source(self) -> TensorSource:
        assert self._checkpoint is not None
        return self._checkpoint

    @property
    def _solved(self) -> Store:
        assert self._store is not None
        return self._store


def pack_rows(zero: Tensor, bits: int) -> Tensor:
    """Zero points (out, groups) int8 packed along the rows: (out x bits / 32, groups) int32."""
    return pack(zero.T.contiguous(), bits).T.contiguous()


def quantization_config(plan: Plan) -> Json:
    """The block of config.json that engines read: the commonest scheme targets every Linear, others go by pattern, the rest is ignored."""
    by_scheme: dict[Scheme, list[tuple[int, Linear]]] = {}
    kept: list[tuple[int, Linear]] = []
    for block in plan.blocks:
        for linear in block.linears:
            (by_scheme.setdefault(linear.scheme, []) if linear.scheme else kept).append((block.index, linear))
    schemes = sorted(by_scheme, key=lambda scheme: -len(by_scheme[scheme]))
    all_layers = _layers((block.index, linear) for block in plan.blocks for linear in block.linears)
    groups = {}
    for number, scheme in enumerate(schemes):
        targets = ["Linear"] if number == 0 else _patterns(by_scheme[scheme], all_layers)
        groups[f"group_{number}"] = _config_group(scheme, targets)
    config: Json = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": VERSION,
        "config_groups": groups,
        "ignore": [*plan.ignore, *_patterns(kept, all_layers)],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }
    if any(not scheme.symmetric for scheme in schemes):
        config["dequantize"] = True  # transformers 5.23 cannot keep packed zero points; vLLM ignores the key
    return config


def _config_group(scheme: Scheme, targets: list[str]) -> Json:
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group else "channel",
        "group_size": scheme.group or None,
        "dynamic": False,
        "observer": "minmax",
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }


def _layers(linears: Iterable[tuple[int, Linear]]) -> dict[str, set[int]]:
    """Where each kind of linear occurs. Linears served as one matrix count together: engines match all of them in every layer,
    also where a checkpoint has none (Gemma 4's v_proj where keys serve as values)."""
    layers: dict[str, set[int]] = {}
    for index, linear in linears:
        for name in {_generic(linear.local), _generic(linear.name.partition(f"layers.{index}.")[2])}:
            for one in next((names for names in SERVED_AS_ONE if name in names), (name,)):
                layers.setdefault(one, set()).add(index)
    return layers


def _generic(local: str) -> str:
    return re.sub(r"\b\d+\b", "*", local)


def _patterns(linears: list[tuple[int, Linear]], all_layers: dict[str, set[int]]) -> list[str]:
    """Regular expressions for some linears, as short as the layers allow; they hold for module paths with any prefix."""
    patterns = []
    for name, layers in sorted(_layers(linears).items()):
        which = r"\d+" if layers == all_layers[name] else f"({'|'.join(str(i) for i in sorted(layers))})"
        patterns.append(rf"re:.*layers\.{which}\." + re.escape(name).replace(r"\*", r"\d+") + "$")
    return patterns


def _words(count: int, scheme: Scheme) -> int:
    return -(-count * scheme.bits // 32)


def _then(read: Callable[[], Tensor], change: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    return lambda: change(read())


def _a_number(tensor: Tensor, name: str) -> Tensor:
    """A tensor that is copied; infinity is legal in it (the bounds of Gemma 4's clipped towers), NaN is not."""
    if tensor.is_floating_point() and any(bool(part.isnan().any()) for part in tensor.view(-1).split(1 << 24)):
        raise CheckpointError(f"{name}: holds NaN; the checkpoint is damaged")
    return tensor


def _write_json(path: Path, value: Json) -> None:
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
