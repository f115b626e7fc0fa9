"""Solved blocks on disk: one safetensors file a block, written beside and renamed. A killed run goes on behind the last one.

OUT/solved/plan.json              the fingerprint of the plan whose blocks these are
OUT/solved/block-00012.safetensors
    experts.17.up_proj/packed     (out, words) int32, see types.Codes
    experts.17.up_proj/scale      (out, groups)
    experts.17.up_proj/zero       (out, groups) int8, asymmetric only
    experts.17.up_proj/rows       (out, bytes) uint8, in place of those three, of K-quants
    folded/input_layernorm.weight a kept tensor that a fold changed
    __metadata__.solved           errors, tokens, folds as JSON
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantkit.errors import StoreError
from quantkit.types import BlockPlan, Blocks, Codes, Entry, FoldReport, Json, Linear, Plan, Solved, SolvedBlock

SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a file to be written: its name and shape at once, its data when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return Entry(self.dtype, self.shape).bytes


def safetensors_header(pieces: Iterable[Piece], metadata: dict[str, str]) -> bytes:
    """The 8-byte length and the JSON header, padded with spaces to a multiple of 8 so that tensors lie aligned."""
    header: Json = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for piece in pieces:
        span = [offset, offset + piece.bytes]
        header[piece.name] = {"dtype": SAFETENSORS_NAMES[piece.dtype], "shape": list(piece.shape), "data_offsets": span}
        offset = span[1]
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def write_safetensors(path: Path, pieces: list[Piece], metadata: dict[str, str]) -> None:
    """One tensor at a time, so that memory does not grow with the file; under a temporary name until it is whole and on the disk."""
    # wide types first: every tensor then starts at a multiple of its element size (format page of safetensors, "Alignment")
    pieces = sorted(pieces, key=lambda piece: -piece.dtype.itemsize)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(safetensors_header(pieces, metadata))
        for piece in pieces:
            tensor = piece.read()
            if tensor.dtype != piece.dtype or tuple(tensor.shape) != piece.shape:
                raise AssertionError(f"{piece.name}: planned {piece.dtype} {piece.shape}, made {tensor.dtype} {tuple(tensor.shape)}")
            if tensor.numel():
                file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` when the body ends well, and is gone when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


class Store:
    """The solved blocks of one plan.

    Raises:
        StoreError: the folder holds another plan's blocks, or files that are none of ours.
    """

    def __init__(self, folder: Path, plan: Plan, describe: Json):
        self.folder = folder
        self._open: tuple[int, Any] | None = None
        note = folder / "plan.json"
        if note.exists() and any(folder.glob("block-*.safetensors")):  # a run that solved nothing yet may be begun anew
            try:
                held = json.loads(note.read_text(encoding="utf-8"))
                fingerprint = held["fingerprint"]
            except (ValueError, KeyError, TypeError):
                raise StoreError(f"{note}: damaged; delete {folder.parent} or give another --output") from None
            if fingerprint != plan.fingerprint:
                other = ", ".join(f"{k} {held.get(k)!r}" for k, v in describe.items() if held.get(k) != v) or "other inputs or versions"
                raise StoreError(f"{folder.parent}: holds another run ({other}); give another --output, or --fresh to start anew there")
        elif folder.parent.exists() and any(path != folder for path in folder.parent.iterdir()):
            raise StoreError(f"{folder.parent}: not empty and not a run of quantkit; give another --output")
        with replacing(note) as temporary:
            temporary.write_text(json.dumps({"fingerprint": plan.fingerprint, **describe}, indent=1) + "\n", encoding="utf-8")

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def __contains__(self, index: int) -> bool:
        return self._path(index).exists()

    def put(self, solved: SolvedBlock) -> None:
        """One solved block, whole or not at all."""
        pieces = []
        for local, linear in solved.linears.items():
            codes = linear.codes
            if isinstance(codes, Blocks):
                parts: dict[str, Tensor | None] = {"rows": codes.rows}
            else:
                parts = {"packed": codes.packed, "scale": codes.scale, "zero": codes.zero}
            pieces += [_piece(f"{local}/{part}", tensor) for part, tensor in parts.items() if tensor is not None]
        pieces += [_piece(f"folded/{name}", tensor) for name, tensor in solved.folded.items()]
        about = {
            "linears": {
                name: {"rounded": one.error_rounded, "error": one.error, "tokens": one.tokens, "fell_back": one.fell_back}
                for name, one in solved.linears.items()
            },
            "folds": [asdict(fold) for fold in solved.folds],
            "proof": solved.proof,
        }
        self._open = None
        write_safetensors(self._path(solved.index), pieces, {"solved": json.dumps(about)})

    def read(self, index: int, key: str) -> Tensor:
        """One stored tensor of a block: "experts.17.up_proj/packed", "folded/input_layernorm.weight"."""
        return self._file(index).get_tensor(key)

    def codes(self, index: int, linear: Linear) -> Codes | Blocks:
        """What a block's file holds of one linear that has a scheme."""
        scheme, local, columns = linear.scheme, linear.local, linear.shape[1]
        assert scheme is not None
        if scheme.grid != "integer":
            return Blocks(self.read(index, f"{local}/rows"), scheme, columns)
        zero = None if scheme.symmetric else self.read(index, f"{local}/zero")
        return Codes(self.read(index, f"{local}/packed"), self.read(index, f"{local}/scale"), zero, scheme, columns)

    def folded(self, index: int) -> set[str]:
        """Local names of the kept tensors that folds changed in a block."""
        return {key.removeprefix("folded/") for key in self._file(index).keys() if key.startswith("folded/")}  # noqa: SIM118

    def _file(self, index: int) -> Any:
        if self._open is None or self._open[0] != index:
            try:
                self._open = (index, safe_open(self._path(index), "pt"))
            except (SafetensorError, OSError) as problem:
                raise StoreError(f"{self._path(index)}: damaged ({problem}); delete this file and run again") from None
        return self._open[1]

    def get(self, plan: BlockPlan) -> SolvedBlock:
        """A stored block, its tensors read into memory.

        Raises:
            StoreError: its file is damaged or lacks a tensor of the plan.
        """
        try:
            about = json.loads(self._file(plan.index).metadata()["solved"])
            linears = {}
            for linear in plan.linears:
                if linear.scheme is None:
                    continue
                local, numbers = linear.local, about["linears"][linear.local]
                codes = self.codes(plan.index, linear)
                linears[local] = Solved(codes, numbers["rounded"], numbers["error"], numbers["tokens"], numbers["fell_back"])
            folded = {name: self.read(plan.index, f"folded/{name}") for name in sorted(self.folded(plan.index))}
            folds = tuple(
                FoldReport(f["producer"], tuple(f["exponents"]) if f["exponents"] else None, tuple(f["scale_range"]), f["loss_ratio"])
                for f in about["folds"]
            )
        except (SafetensorError, KeyError, ValueError, TypeError) as problem:
            raise StoreError(f"{self._path(plan.index)}: damaged ({problem}); delete this file and run again") from None
        return SolvedBlock(plan.index, linears, folded, folds, about["proof"])


def _piece(name: str, tensor: Tensor) -> Piece:
    return Piece(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)
