"""Plan + the text model's own tensors -> the initialisers: name, dtype, shape, place in the data file, and where their bytes come from.

A quantized linear of (out, in), groups of G columns, b bits is stored as com.microsoft::MatMulNBits reads it:

    L.qweight  uint8 (out, in / G, G x b / 8)   codes + 2^(b-1), the first in the lowest bits: compressed-tensors' bytes
    L.scales   bf16  (out, in / G)              the graph casts them; onnxruntime folds that when it loads
    L.qzeros   uint8 (out, in / G x b / 8)      zero points + 2^(b-1), two to a byte in 4 bits; none where the scheme is symmetric

An expert's gate and up are one matrix, gate over up. All else has the dtype of the checkpoint and is cast in the graph. Every tensor
starts at a multiple of 64 bytes, one of a MiB or more at a whole page, so that a runtime can map it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantkit.errors import CheckpointError, WriteError
from quantkit.families.family import in_block, outside_block
from quantkit.grid.integer import extremes_to_params, to_codes
from quantkit.model.checkpoint import TensorSource
from quantkit.store import Piece, Store
from quantkit.types import BlockPlan, Codes, Linear, Plan, Scheme

BITS = (4, 8)
BLOCKS = (128, 64, 32, 16)  # widths of a group that the operator takes
ALIGNMENT, PAGE, LARGE = 64, 4096, 1 << 20
TABLE_GROUP = 32  # of embeddings, where a recipe quantizes them
TABLE_ROWS = 1 << 14  # that are rounded at a time
HEAD = "lm_head"
TABLES = ("embed_tokens.weight", "embed_tokens_per_layer.weight", f"{HEAD}.weight")  # what a recipe's `embeddings` is about


@dataclass(frozen=True, slots=True)
class Matrix:
    """One multiply of the graph: an (out, in) matrix and the initialisers that it reads."""

    name: str
    shape: tuple[int, int]
    scheme: Scheme | None  # None: one float tensor, `pieces` holds it
    pieces: tuple[str, ...]  # qweight, scales, qzeros where there are zero points

    @property
    def block(self) -> int:
        """Columns of a group, as the operator counts them."""
        assert self.scheme is not None
        return _block(self.scheme, self.shape[1], self.name)


class Layout:
    """All initialisers that come from the checkpoint or the store, in the order of the file.

    Args:
        plan: what happens to every tensor.
        shapes: of the text model's own tensors by name, as the graph will read them (`text_shapes`).
        embeddings: bits of the embedding tables and the head; 16 leaves them as they are.
        checkpoint, store: left out where only sizes are asked for.

    Raises:
        WriteError: a scheme that the operator does not know.
        CheckpointError: a tensor of the model that the plan has no source for, or has in another shape.
    """

    def __init__(
        self,
        plan: Plan,
        shapes: Mapping[str, tuple[int, ...]],
        embeddings: int = 16,
        checkpoint: TensorSource | None = None,
        store: Store | None = None,
    ):
        self.plan, self.embeddings = plan, embeddings
        self._checkpoint, self._store = checkpoint, store
        self.pieces: dict[str, Piece] = {}
        self.matrices: dict[str, Matrix] = {}  # a linear's module path -> what it multiplies by
        self.experts: dict[str, list[Matrix]] = {}  # the model's tensor of all experts -> each one's
        self.floats: dict[str, str] = {}  # the model's tensor -> the initialiser that is used as it is
        self.tables: dict[str, Matrix] = {}  # the model's tensor -> quantized embeddings
        self._outside = {outside_block(name): name for name in plan.kept}
        for name, shape in shapes.items():
            self._place(name, shape)
        self.offsets, self.bytes = _offsets(list(self.pieces.values()))

    def _place(self, name: str, shape: tuple[int, ...]) -> None:
        inside = in_block(name)
        if inside is None:
            self._place_outside(name, shape)
            return
        _, index, local = inside
        if index >= len(self.plan.blocks):
            raise self._absent(name)
        block, module = self.plan.blocks[index], local.removesuffix(".weight")
        linears = {linear.local: linear for linear in block.linears}
        if len(shape) == 3:
            self._place_experts(name, shape, block, linears)
        elif module in linears:
            path = name.removesuffix(".weight")
            self.matrices[path] = self._matrix(block, path, [linears[module]])
            self._check(name, shape, self.matrices[path].shape)
        elif local in block.kept:
            source = block.kept[local]
            self._check(name, shape, self.plan.entries[source].shape)
            self._add(name, self.plan.entries[source].dtype, shape, partial(self._kept, index, local, source))
            self.floats[name] = name
        else:
            raise self._absent(name)

    def _place_experts(self, name: str, shape: tuple[int, ...], block: BlockPlan, linears: Mapping[str, Linear]) -> None:
        """A fused tensor (experts, out, in) of the model: a matrix for each expert."""
        path, _, leaf = name.rpartition(".")
        stem = path.partition(f"layers.{block.index}.")[2]
        parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        self.experts[name] = []
        for expert in range(shape[0]):
            locals_ = [f"{stem}.{expert}.{part}" for part in parts]
            if not linears.keys() >= set(locals_):
                raise self._absent(name)
            matrix = self._matrix(block, f"{path}.{expert}.{leaf}", [linears[local] for local in locals_])
            self._check(name, shape[1:], matrix.shape)
            self.experts[name].append(matrix)

    def _place_outside(self, name: str, shape: tuple[int, ...]) -> None:
        rest = outside_block(name)
        if rest == f"{HEAD}.weight" and rest not in self._outside:
            rest = TABLES[0]  # a head without weights of its own is tied to the embeddings
        source = self._outside.get(rest)
        if source is None:
            raise self._absent(name)
        self._check(name, shape, self.plan.entries[source].shape)
        if self.embeddings != 16 and rest in TABLES:
            stem = rest.removesuffix(".weight")
            table = next((one for one in self.tables.values() if one.name == stem), None) or self._table(stem, source)
            self.tables[name] = table
        else:
            if rest not in self.pieces:
                self._add(rest, self.plan.entries[source].dtype, shape, partial(self._copied, source))
            self.floats[name] = rest
            table = Matrix(rest, (shape[0], shape[-1]), None, (rest,))
        if name == f"{HEAD}.weight":
            self.matrices[HEAD] = table

    def _matrix(self, block: BlockPlan, name: str, linears: Sequence[Linear]) -> Matrix:
        """One linear, or the linears whose rows stand over each other in one multiply."""
        schemes = {linear.scheme for linear in linears}
        out, columns = sum(linear.shape[0] for linear in linears), linears[0].shape[1]
        if len(schemes) > 1:
            raise WriteError(f"onnx: {linears[0].name} and {linears[1].name} are one matrix of the graph; give both the same scheme")
        scheme = linears[0].scheme
        if scheme is None:
            dtype = self.plan.entries[linears[0].source.tensor].dtype
            self._add(f"{name}.weight", dtype, (out, columns), lambda: torch.cat([self._source_matrix(linear) for linear in linears]))
            return Matrix(name, (out, columns), None, (f"{name}.weight",))
        width = _block(scheme, columns, linears[0].name)
        read = partial(self._codes, block.index, linears)
        return self._quantized(name, (out, columns), scheme, width, self.plan.dtype, read)

    def _quantized(
        self, name: str, shape: tuple[int, int], scheme: Scheme, width: int, dtype: torch.dtype, codes: Callable[[str], Tensor]
    ) -> Matrix:
        """Initialisers of one quantized matrix. `codes`: "packed", "scale", "zero" -> that part, as the store has it."""
        (out, columns), bits = shape, scheme.bits
        groups, repeats = columns // width, scheme.width(columns) // width
        packed = (out, groups, width * bits // 8)
        self._add(f"{name}.qweight", torch.uint8, packed, lambda: codes("packed").contiguous().view(torch.uint8).view(packed))
        self._add(f"{name}.scales", dtype, (out, groups), lambda: codes("scale").to(dtype).repeat_interleave(repeats, 1))
        names = [f"{name}.qweight", f"{name}.scales"]
        if not scheme.symmetric:
            zeros = (out, -(-groups * bits // 8))
            self._add(f"{name}.qzeros", torch.uint8, zeros, lambda: pack_zeros(codes("zero").repeat_interleave(repeats, 1), bits))
            names.append(f"{name}.qzeros")
        return Matrix(name, shape, scheme, tuple(names))

    def _table(self, name: str, source: str) -> Matrix:
        """Embeddings by plain rounding: a token reads one row, so no statistics could weigh its columns."""
        rows, columns = self.plan.entries[source].shape
        scheme = Scheme(self.embeddings, TABLE_GROUP, True)
        _block(scheme, columns, source)
        parts = {"packed": 0, "scale": 1}

        def read(part: str) -> Tensor:
            found = [_rounded(chunk, scheme, self.plan.dtype) for chunk in self._copied(source).split(TABLE_ROWS)]
            return torch.cat([codes[parts[part]] for codes in found])

        return self._quantized(name, (rows, columns), scheme, TABLE_GROUP, self.plan.dtype, read)

    def _add(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], read: Callable[[], Tensor]) -> None:
        self.pieces[name] = Piece(name, dtype, shape, read)

    def data(self) -> Iterator[tuple[int, Piece]]:
        """Every piece and its place, in the order of the file."""
        return ((self.offsets[name], piece) for name, piece in self.pieces.items())

    # -- where bytes come from ----------------------------------------------------------------------------------------------------

    def _codes(self, index: int, linears: Sequence[Linear], part: str) -> Tensor:
        assert self._store is not None
        return torch.cat([self._store.read(index, f"{linear.local}/{part}") for linear in linears])

    def _kept(self, index: int, local: str, source: str) -> Tensor:
        """A block's own tensor, folded where a fold changed it."""
        assert self._store is not None
        if local in self._store.folded(index):
            return self._store.read(index, f"folded/{local}").to(self.plan.entries[source].dtype)
        return self._copied(source)

    def _source_matrix(self, linear: Linear) -> Tensor:
        tensor = self._copied(linear.source.tensor)
        tensor = tensor if linear.source.expert is None else tensor[linear.source.expert]
        return tensor if linear.source.rows is None else tensor[slice(*linear.source.rows)]

    def _copied(self, source: str) -> Tensor:
        assert self._checkpoint is not None
        return self._checkpoint.view(source)

    # -- what is refused ----------------------------------------------------------------------------------------------------------

    def _absent(self, name: str) -> CheckpointError:
        return CheckpointError(f"the model needs {name}, which no tensor of the checkpoint makes; is a shard missing?")

    @staticmethod
    def _check(name: str, wanted: tuple[int, ...], found: tuple[int, ...]) -> None:
        if wanted != found:
            raise CheckpointError(f"{name} is {found} in the checkpoint, {wanted} by config.json")


def _block(scheme: Scheme, columns: int, name: str) -> int:
    """The operator's group: the scheme's, or for one scale a row the widest that divides it, its scale repeated."""
    if scheme.bits not in BITS:
        raise WriteError(f"onnx in {scheme} ({name}): MatMulNBits is written in 4 and 8 bits with groups of 16 to 128; give such a scheme")
    width = scheme.group or next((block for block in BLOCKS if columns % block == 0), 0)
    if width not in BLOCKS or columns % width:
        raise WriteError(f"onnx of {columns} columns in {scheme} ({name}): no group of 16 to 128 divides them; keep it with an override")
    return width


def pack_zeros(zero: Tensor, bits: int) -> Tensor:
    """Zero points (out, groups) int8 -> (out, bytes) uint8 with 2^(bits-1) added, the first in the lowest bits."""
    unsigned = (zero.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    if bits == 8:
        return unsigned
    if unsigned.shape[1] % 2:
        unsigned = torch.nn.functional.pad(unsigned, (0, 1))
    return unsigned[:, ::2] | (unsigned[:, 1::2] << 4)


def _rounded(rows: Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Packed codes and scales of some rows of a table."""
    weight = rows.float()
    grouped = weight.view(len(weight), -1, TABLE_GROUP)
    scale, zero = extremes_to_params(grouped.amin(-1), grouped.amax(-1), scheme, dtype)
    codes: Codes = to_codes(weight, scale, zero, scheme, dtype)
    return codes.packed, codes.scale


def _offsets(pieces: list[Piece]) -> tuple[dict[str, int], int]:
    """Where each piece starts, and where the last one ends."""
    offsets, end = {}, 0
    for piece in pieces:
        step = PAGE if piece.bytes >= LARGE else ALIGNMENT
        offsets[piece.name] = start = -(-end // step) * step
        end = start + piece.bytes
    return offsets, end
