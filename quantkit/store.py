"""What a run writes to: one process at a time, with room; and solved blocks on disk, one safetensors file a block, written beside and
renamed, with a digest of all its bytes. A killed run goes on behind the last one.

OUT/.lock                         who writes here; the system lets go of it with the process
OUT/solved/plan.json              the fingerprint of the plan whose blocks these are
OUT/solved/block-00012.safetensors
    experts.17.up_proj/packed     (out, words) int32, see types.Codes
    experts.17.up_proj/scale      (out, groups)
    experts.17.up_proj/zero       (out, groups) int8, asymmetric only
    experts.17.up_proj/rows       (out, bytes) uint8, in place of those three, of K-quants
    folded/input_layernorm.weight a kept tensor that a fold changed
    __metadata__.solved           errors, tokens, folds as JSON
    __metadata__.sha256           of the file with zeros in this place
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import struct
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
LOCK = ".lock"
FULL = (errno.ENOSPC, errno.EDQUOT)
NO_DIGEST, SEAL, SEAL_WITHIN = "0" * 64, re.compile(rb'"sha256":"([0-9a-f]{64})"'), 1 << 10
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what file systems without locks answer


@contextmanager
def held(out: Path) -> Iterator[None]:
    """The folder for this run alone, made where there is none, and nothing in it that everybody may write.

    The lock is the system's (flock), so it ends with its process, `kill -9` included; the file only says who holds it. Where a file
    system has no locks, the run goes on without one.

    Raises:
        StoreError: another run writes here, or the disk became full in the middle.
    """
    made, mask = not out.exists(), os.umask(0o077)
    os.umask(mask | 0o002)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = _locked(out / LOCK)
        try:
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)  # before it is let go: whoever comes next makes a file of their own
            os.close(lock)
            if made:
                with suppress(OSError):
                    out.rmdir()  # a run that was refused leaves nothing
    except OSError as problem:
        if problem.errno not in FULL:
            raise
        free = shutil.disk_usage(out if out.is_dir() else out.absolute().parent).free
        raise StoreError(
            f"{out}: the disk is full ({free:,} bytes are free); what is done is kept: free some and run the same command again, it goes on"
        ) from None
    finally:
        os.umask(mask)


def _locked(path: Path) -> int:
    """An open lock file that is ours and still the one of that name."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(lock)
            raise StoreError(f"{path.parent}: {holder} writes here; wait until it is done, or give another --output") from None
        except OSError as problem:
            if problem.errno not in NO_LOCKS:
                os.close(lock)
                raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(lock)):
                break
        os.close(lock)  # its holder ended, and took the name away, between our two calls
    os.ftruncate(lock, 0)
    with suppress(OSError):  # a full disk has its own line later
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return lock


def clear(out: Path, ours: Container[str]) -> None:
    """Delete an earlier run: what has one of the names `ours`.

    Raises:
        StoreError: the folder is no run's, or holds something beside it; nothing is deleted.
    """
    there = [path for path in out.iterdir() if path.name != LOCK]
    if there and not (out / "solved" / "plan.json").exists() and not (out / "run.json").exists():
        raise StoreError(f"{out}: not a run of quantkit; --fresh deletes only those; give another --output")
    if foreign := [path.name for path in there if path.name not in ours and not path.name.endswith(".part")]:
        raise StoreError(f"{out}: holds {foreign[0]!r}, which is not of a run; --fresh deletes nothing beside it; move it away")
    for path in there:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_room(out: Path, size: int) -> None:
    """Refuse a run whose files, `size` bytes, do not fit on the disk. What the folder holds already need not be written again.

    Raises:
        StoreError: with the bytes that are missing.
    """
    there = sum(path.lstat().st_size for path in out.rglob("*") if path.is_file())
    free = shutil.disk_usage(out).free
    if (missing := size - there - free) > 0:
        raise StoreError(
            f"{out}: {missing:,} bytes of disk are missing: the run writes {max(size - there, 0):,} and {free:,} are free; "
            "free some, or give an --output on another disk"
        )


def solved_bytes(plan: Plan) -> int:
    """What the solved blocks of a plan take at least: codes, scales of 16 bits, zero points; headers and folded tensors come to little."""
    total = 0
    for linear in plan.linears():
        if (scheme := linear.scheme) is None:
            continue
        rows, columns = linear.shape
        groups = columns // scheme.width(columns) if scheme.grid == "integer" else 0
        total += rows * (columns * scheme.bits // 8 + groups * (2 if scheme.symmetric else 3))
    return total


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
    pieces = _aligned(pieces)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(safetensors_header(pieces, metadata))
        for piece in pieces:
            tensor = piece.read()
            if tensor.dtype != piece.dtype or tuple(tensor.shape) != piece.shape:
                raise AssertionError(f"{piece.name}: planned {piece.dtype} {piece.shape}, made {tensor.dtype} {tuple(tensor.shape)}")
            file.write(_raw(tensor))
        file.flush()
        os.fsync(file.fileno())


def _aligned(pieces: Iterable[Piece]) -> list[Piece]:
    """Wide types first: every tensor then starts at a multiple of its element size (format page of safetensors, "Alignment")."""
    return sorted(pieces, key=lambda piece: -piece.dtype.itemsize)


def _raw(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")


def _sealed(pieces: Iterable[Piece], metadata: dict[str, str]) -> dict[str, str]:
    """The metadata with the digest of the very file that they give, taken while zeros stand in the digest's place."""
    pieces, metadata = _aligned(pieces), {"sha256": NO_DIGEST, **metadata}
    digest = hashlib.sha256(safetensors_header(pieces, metadata))
    for piece in pieces:
        digest.update(_raw(piece.read()))
    return {**metadata, "sha256": digest.hexdigest()}


def _check_seal(path: Path) -> None:
    """Read a file whole and compare its digest.

    Raises:
        ValueError: it says none, or another than its bytes have.
    """
    with open(path, "rb") as file:
        first = file.read(SEAL_WITHIN)
        told = SEAL.search(first)
        if told is None:
            raise ValueError("it says no sha256")
        digest = hashlib.sha256(first.replace(told[1], NO_DIGEST.encode(), 1))
        while part := file.read(1 << 20):
            digest.update(part)
    if digest.hexdigest().encode() != told[1]:
        raise ValueError("its bytes are not those that were written")


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
        self._whole: set[int] = set()  # blocks whose bytes were looked at
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
        elif folder.parent.exists() and any(path.name not in (folder.name, LOCK) for path in folder.parent.iterdir()):
            raise StoreError(f"{folder.parent}: not empty and not a run of quantkit; give another --output")
        with replacing(note) as temporary:
            temporary.write_text(json.dumps({"fingerprint": plan.fingerprint, **describe}, indent=1) + "\n", encoding="utf-8")

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def __contains__(self, index: int) -> bool:
        return self._path(index).exists()

    def put(self, solved: SolvedBlock) -> None:
        """One solved block, whole or not at all."""
        tensors, about = taken_apart(solved)
        pieces = [_piece(name, tensor.cpu()) for name, tensor in tensors.items()]
        self._open = None
        self._whole.discard(solved.index)
        write_safetensors(self._path(solved.index), pieces, _sealed(pieces, {"solved": json.dumps(about)}))

    def read(self, index: int, key: str) -> Tensor:
        """One stored tensor of a block: "experts.17.up_proj/packed", "folded/input_layernorm.weight"."""
        return self._file(index).get_tensor(key)

    def codes(self, index: int, linear: Linear) -> Codes | Blocks:
        """What a block's file holds of one linear that has a scheme."""
        return _codes(linear, lambda part: self.read(index, f"{linear.local}/{part}"))

    def folded(self, index: int) -> set[str]:
        """Local names of the kept tensors that folds changed in a block."""
        return {key.removeprefix("folded/") for key in self._file(index).keys() if key.startswith("folded/")}  # noqa: SIM118

    def _file(self, index: int) -> Any:
        if self._open is None or self._open[0] != index:
            try:
                if index not in self._whole:
                    _check_seal(self._path(index))
                    self._whole.add(index)
                self._open = (index, safe_open(self._path(index), "pt"))
            except (SafetensorError, OSError, ValueError) as problem:
                raise StoreError(f"{self._path(index)}: damaged ({problem}); delete this file and run again") from None
        return self._open[1]

    def get(self, plan: BlockPlan) -> SolvedBlock:
        """A stored block, its tensors read into memory.

        Raises:
            StoreError: its file is damaged or lacks a tensor of the plan.
        """
        try:
            about = json.loads(self._file(plan.index).metadata()["solved"])
            keys = sorted(self._file(plan.index).keys())
            return put_together(plan, {key: self.read(plan.index, key) for key in keys}, about)
        except (SafetensorError, KeyError, ValueError, TypeError) as problem:
            raise StoreError(f"{self._path(plan.index)}: damaged ({problem}); delete this file and run again") from None


def taken_apart(solved: SolvedBlock) -> tuple[dict[str, Tensor], Json]:
    """A solved block, or some of its linears, as named tensors and JSON."""
    tensors: dict[str, Tensor] = {}
    for local, linear in solved.linears.items():
        codes = linear.codes
        if isinstance(codes, Blocks):
            parts: dict[str, Tensor | None] = {"rows": codes.rows}
        else:
            parts = {"packed": codes.packed, "scale": codes.scale, "zero": codes.zero}
        tensors |= {f"{local}/{part}": tensor for part, tensor in parts.items() if tensor is not None}
    tensors |= {f"folded/{name}": tensor for name, tensor in solved.folded.items()}
    about = {
        "linears": {
            name: {"rounded": one.error_rounded, "error": one.error, "tokens": one.tokens, "fell_back": one.fell_back}
            for name, one in solved.linears.items()
        },
        "folds": [asdict(fold) for fold in solved.folds],
        "proof": solved.proof,
    }
    return tensors, about


def put_together(plan: BlockPlan, tensors: Mapping[str, Tensor], about: Json) -> SolvedBlock:
    """The inverse, in the plan's order; `tensors` holds all that were taken apart.

    Raises:
        KeyError, TypeError: something is not there.
    """
    linears = {}
    for linear in plan.linears:
        if linear.scheme is not None:
            numbers = about["linears"][linear.local]
            codes = _codes(linear, lambda part, local=linear.local: tensors[f"{local}/{part}"])  # type: ignore[misc]
            linears[linear.local] = Solved(codes, numbers["rounded"], numbers["error"], numbers["tokens"], numbers["fell_back"])
    folded = {name.removeprefix("folded/"): tensors[name] for name in sorted(tensors) if name.startswith("folded/")}
    return SolvedBlock(plan.index, linears, folded, tuple(map(fold_report, about["folds"])), about["proof"])


def fold_report(about: Json) -> FoldReport:
    """A fold's report of its JSON."""
    exponents = tuple(about["exponents"]) if about["exponents"] else None
    return FoldReport(about["producer"], exponents, tuple(about["scale_range"]), about["loss_ratio"])


def _codes(linear: Linear, read: Callable[[str], Tensor]) -> Codes | Blocks:
    scheme, columns = linear.scheme, linear.shape[1]
    assert scheme is not None
    if scheme.grid != "integer":
        return Blocks(read("rows"), scheme, columns)
    return Codes(read("packed"), read("scale"), None if scheme.symmetric else read("zero"), scheme, columns)


def _piece(name: str, tensor: Tensor) -> Piece:
    return Piece(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)
