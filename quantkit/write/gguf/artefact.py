"""The folder of one GGUF: a file that llama.cpp, Ollama and LM Studio open by itself."""

import builtins
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch

from quantkit.disk import replacing
from quantkit.errors import WriteError
from quantkit.model.checkpoint import TensorSource
from quantkit.store import Store
from quantkit.types import Json, Plan
from quantkit.write.gguf.layout import ALIGNMENT, Layout, Slot
from quantkit.write.gguf.metadata import add_keys, family_table, keys_of, label_of
from quantkit.write.gguf.tokenizer import tokenizer_keys


class GgufFile:
    """One artefact folder with one file, written when the last block is solved.

    Args:
        plan: what happens to every tensor.
        config: the text model's, every default filled in.
        name: the model's, for the file and its metadata.
        types: pattern of a tensor's name in the file -> type, where the recipe quantizes nothing.
        pre_tokenizer: llama.cpp's, in place of the one that tokenizer.json leads to.
        tokenizer: a folder with tokenizer.json; None where only a config is known, and the size then lacks it.
        checkpoint, store, folder: left out where only sizes are asked for.

    Raises:
        WriteError: the plan, a tensor or the tokenizer cannot be told to llama.cpp, or the gguf package is not installed.
    """

    def __init__(
        self,
        plan: Plan,
        config: Json,
        name: str,
        types: Mapping[str, str | Sequence[str]],
        pre_tokenizer: str | None = None,
        tokenizer: Path | None = None,
        checkpoint: TensorSource | None = None,
        store: Store | None = None,
        folder: Path | None = None,
    ):
        self.plan, self.folder, self._store = plan, folder, store
        self._table = family_table(plan)
        self.layout = Layout(plan, self._table, config, types, checkpoint, store)
        solved = [(slot.kind, slot.weights) for slot in self.layout.slots if slot.solved]
        matrices = [(slot.kind, slot.weights) for slot in self.layout.slots if len(slot.shape) > 1]
        self.label = label_of(solved or matrices)
        told = (
            tokenizer_keys(tokenizer, self.layout.rows, self._table.architecture, self._table.visible, pre_tokenizer) if tokenizer else None
        )
        self._keys = keys_of(self._table, config, name, self.label, told)
        self.file = f"{name}-{self.label}.gguf"
        self._counted = False
        self._library()

    @cached_property
    def bytes(self) -> int:
        """Exact bytes of the file."""
        return _aligned(len(self._head)) + sum(_aligned(slot.bytes) for slot in self.layout.slots)

    @cached_property
    def _head(self) -> builtins.bytes:
        """All that stands in front of the tensors."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "head.gguf"
            self._begun(path).close()
            return path.read_bytes()

    def write_ready(self) -> list[Path]:
        """Write the file if every block is in the store and it is not written yet."""
        assert self._store is not None
        assert self.folder is not None
        path = self.folder / self.file
        if not all(block.index in self._store for block in self.plan.blocks) or self._written(path):
            return []
        with replacing(path) as temporary:
            writer = self._begun(temporary)
            for slot in self.layout.slots:
                writer.write_tensor_data(_bytes(slot).numpy())
            writer.close()
        self._counted = True
        return [path]

    def _written(self, path: Path) -> bool:
        """Is this the file? Types and keys may have changed since, in no more and no fewer bytes; they all stand in its head."""
        if not path.exists() or path.stat().st_size != self.bytes:
            return False
        with open(path, "rb") as file:
            return file.read(len(self._head)) == self._head

    def finish(self) -> None:
        """Nothing stands beside the file that is not in it. Where an earlier run wrote it, what it rounded is counted again."""
        for slot in self.layout.slots if not self._counted else ():
            for _ in slot.read() if slot.solved else ():
                pass
        self._counted = True

    def _begun(self, path: Path) -> Any:
        """A GGUFWriter whose file has its keys and all tensor infos: types and sizes are known before any data."""
        library = self._library()
        writer = library.GGUFWriter(path, self._table.architecture)
        add_keys(writer, self._keys)
        for slot in self.layout.slots:
            rows = (*slot.shape[:-1], slot.bytes // (slot.weights // slot.shape[-1]))
            kind = library.GGMLQuantizationType[slot.kind]
            writer.add_tensor_info(slot.name, rows, numpy.dtype(numpy.uint8), slot.bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        return writer

    @staticmethod
    def _library() -> Any:
        try:
            import gguf
        except ImportError:
            raise WriteError("the format gguf needs the gguf package: pip install 'quantkit[gguf]'") from None
        return gguf


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _bytes(slot: Slot) -> torch.Tensor:
    """A tensor's bytes, the one that is in memory."""
    whole, at = torch.empty(slot.bytes, dtype=torch.uint8), 0
    for part in slot.read():
        flat = part.reshape(-1)
        whole[at : at + len(flat)] = flat
        at += len(flat)
    if at != slot.bytes:
        raise AssertionError(f"{slot.name}: planned {slot.bytes} bytes, made {at}")
    return whole
