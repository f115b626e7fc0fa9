"""A GGUF read as a stranger, by the gguf library: header, keys and tensors beside one another."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

from quantkit.errors import PublishError

PART = 1 << 12  # rows that are decoded together


class GgufFolder:
    """The one file of a folder, mapped.

    Raises:
        PublishError: the gguf library is not installed, there is not one file, or it cannot be read.
    """

    def __init__(self, folder: Path):
        try:
            import gguf
        except ImportError:
            raise PublishError("a GGUF is read by the gguf library; pip install 'quantkit[gguf]'") from None
        files = sorted(folder.glob("*.gguf"))
        if len(files) != 1:
            raise PublishError(f"{folder}: {len(files)} .gguf files; one is expected")
        self.path, self._dequantize = files[0], gguf.dequantize
        try:
            self.reader: Any = gguf.GGUFReader(str(self.path))
        except Exception as problem:  # a header that lies makes the library fail in many ways
            raise PublishError(f"{self.path.name}: not a whole GGUF ({type(problem).__name__}: {str(problem)[:80]})") from None
        self.architecture = str(self._value("general.architecture") or "")
        self.types = {tensor.tensor_type.name for tensor in self.reader.tensors}

    def _value(self, key: str) -> Any:
        field = self.reader.get_field(key)
        return None if field is None else field.contents()

    def problems(self) -> Iterator[str]:
        """What does not fit, one line each."""
        shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in self.reader.tensors}
        arch, name = self.architecture, self.path.name
        depth = len({match[1] for one in shapes if (match := re.match(r"blk\.(\d+)\.", one))})
        if self._value(f"{arch}.block_count") != depth:
            yield f"{name}: {arch}.block_count {self._value(f'{arch}.block_count')}, the file holds {depth} blocks"
        embedding = shapes.get("token_embd.weight")
        if embedding is None:
            yield f"{name}: no token_embd.weight"
            return
        if embedding[1] != self._value(f"{arch}.embedding_length"):
            yield f"{name}: {arch}.embedding_length {self._value(f'{arch}.embedding_length')}, token_embd.weight is {embedding[1]} wide"
        tokens = self.reader.get_field("tokenizer.ggml.tokens")
        if tokens is None:
            yield f"{name}: no tokenizer"
        elif len(tokens.data) != embedding[0]:
            yield f"{name}: {len(tokens.data)} tokens, token_embd.weight has {embedding[0]} rows"

    def not_numbers(self) -> Iterator[str]:
        """Tensors that decode to NaN or infinity. Reads every byte once."""
        for tensor in self.reader.tensors:
            data = tensor.data.reshape(-1, tensor.data.shape[-1])
            for start in range(0, len(data), PART):
                decoded = self._dequantize(data[start : start + PART], tensor.tensor_type)
                if not bool(numpy.isfinite(decoded).all()) and tensor.name != "rope_freqs.weight":
                    yield f"{tensor.name}: holds NaN or infinity once decoded"
                    break
