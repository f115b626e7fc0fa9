"""Where activations lie: in memory up to a limit, beyond it in files that the system maps, which nobody ever sees by name."""

import ctypes
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, MutableSequence
from contextlib import suppress
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from quantkit.types import Plan

# Largest blocks that a budget keeps for weights, statistics and the solver's work (docs/measured.md): in one stage, and in several,
# which hold a twin of the block as it is solved so far and twice the sums.
BESIDE_ACTIVATIONS = {False: 2.2, True: 4.0}


def left_for_activations(plan: Plan, max_memory: int | None, staged: bool) -> int | None:
    """Bytes that a budget leaves beside the largest block; None where there is no budget."""
    if max_memory is None:
        return None
    return max(0, max_memory - round(BESIDE_ACTIVATIONS[staged] * _largest(plan)))


def left_on_device(plan: Plan, device: torch.device, staged: bool) -> int | None:
    """Bytes of a GPU's free memory that its activations may take; None where there is no GPU. The next block comes in beside this one."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return left_for_activations(plan, free - _largest(plan), staged)


def _largest(plan: Plan) -> int:
    return max(sum(entry.bytes for name, entry in plan.entries.items() if name.startswith(block.prefix)) for block in plan.blocks)


def give_back_memory() -> None:
    """Hand freed memory back to the system: glibc keeps up to a gigabyte of a block's small allocations for the next one's peak."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Memory:
    """A budget that the activations of all streams share. What does not fit is written to a mapped file, bit for bit.

    Args:
        limit: bytes that may stay in memory; None is no limit.
        folder: for the files (a disk, not a file system in memory); None is the system's place for temporary files.
        there: bytes that may stay on the device that they were made on, where that is not the CPU; None is no limit.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None, there: int | None = None):
        self.limit, self.folder, self.there = limit, folder, there
        self.held = 0  # bytes in memory now
        self.held_there = 0  # bytes on the device now
        self.spilled = 0  # bytes that were written in all

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, or its copy in a mapped file. Neither is written to afterwards: a new state is a new tensor."""
        if tensor.device.type != "cpu":
            if self.there is None:
                return tensor
            if self.held_there + tensor.nbytes <= self.there:
                self.held_there += tensor.nbytes
                weakref.finalize(tensor, self._release_there, tensor.nbytes)
                return tensor
            tensor = tensor.cpu()
        if self.limit is None:
            return tensor
        if self.held + tensor.nbytes <= self.limit:
            self.held += tensor.nbytes
            weakref.finalize(tensor, self._release, tensor.nbytes)
            return tensor
        return self._spill(tensor)

    def _release(self, size: int) -> None:
        self.held -= size

    def _release_there(self, size: int) -> None:
        self.held_there -= size

    def _spill(self, tensor: Tensor) -> Tensor:
        if not tensor.nbytes:
            return tensor
        with tempfile.TemporaryFile(dir=self.folder) as file:  # has no name: its space is free again when the last tensor on it goes
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, tensor.nbytes)  # a full disk is an error here; later it would be a dead process
            else:
                file.truncate(tensor.nbytes)
            pages = mmap.mmap(file.fileno(), tensor.nbytes)
        copy = torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape)
        copy.copy_(tensor)
        if hasattr(pages, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)  # the file's from now on, no longer this process's; they come back as they are read
        self.spilled += tensor.nbytes
        return copy


class Activations(MutableSequence[Tensor]):
    """A stream's hidden states, a tensor a batch, within a budget. Setting one replaces it; forks share what neither has replaced."""

    def __init__(self, tensors: Iterable[Tensor], memory: Memory):
        self.memory = memory
        self._tensors = [memory.keep(tensor) for tensor in tensors]

    def fork(self) -> "Activations":
        other = Activations((), self.memory)
        other._tensors = list(self._tensors)
        return other

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> "Activations": ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            part = self.fork()
            part._tensors = part._tensors[index]
            return part
        return self._tensors[index]

    def __setitem__(self, index: Any, tensor: Any) -> None:
        self._tensors[index] = None  # type: ignore[call-overload]  # what it replaces makes room for it
        self._tensors[index] = self.memory.keep(tensor)

    def __delitem__(self, index: int | slice) -> None:
        del self._tensors[index]

    def __len__(self) -> int:
        return len(self._tensors)

    def insert(self, index: int, value: Tensor) -> None:
        self._tensors.insert(index, self.memory.keep(value))
