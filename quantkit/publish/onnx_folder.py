"""An ONNX folder read as a stranger, by onnx_ir: the graph, and tensors that lie outside it, one at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

from quantkit.errors import PublishError
from quantkit.publish.artefact import read_json

GRAPH, GENAI = "model.onnx", "genai_config.json"
PART = 1 << 24  # elements that are looked at together


class OnnxFolder:
    """The graph of one folder.

    Raises:
        PublishError: onnx_ir is not installed, or the graph cannot be read.
    """

    def __init__(self, folder: Path):
        try:
            import onnx_ir
        except ImportError:
            raise PublishError("an ONNX graph is read by onnx_ir; pip install 'quantkit[onnx]'") from None
        self.folder = folder
        try:
            self.model: Any = onnx_ir.load(folder / GRAPH)
        except Exception as problem:  # protobuf has errors of its own
            raise PublishError(f"{GRAPH}: not a whole ONNX graph ({type(problem).__name__}: {str(problem)[:80]})") from None
        self.tensors = {name: value.const_value for name, value in self.model.graph.initializers.items()}

    def sizes(self) -> Iterator[tuple[str, str, int]]:
        """Name, type and bytes of every tensor."""
        return ((name, tensor.dtype.name.lower(), int(tensor.nbytes)) for name, tensor in self.tensors.items() if tensor is not None)

    def quantized(self) -> list[tuple[str, int, int]]:
        """Name, bits and block of every multiply with packed weights."""
        nodes = [node for node in self.model.graph if node.op_type == "MatMulNBits"]
        return [(node.name, node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()) for node in nodes]

    def problems(self) -> Iterator[str]:
        """What does not fit, one line each."""
        if not self.tensors:  # no bytes at all are a whole graph too
            yield f"{GRAPH}: holds no tensor"
        for name, tensor in self.tensors.items():
            if tensor is None:
                yield f"{name}: an initialiser without a value"
            elif (place := getattr(tensor, "path", None)) is not None:
                outside: Any = tensor  # onnx_ir.ExternalTensor
                end = (outside.offset or 0) + (outside.length or outside.nbytes)
                there = Path(place).stat().st_size if Path(place).is_file() else -1
                if there < end:
                    told = "is not there" if there < 0 else f"has {there:,}"
                    yield f"{name}: lies up to byte {end:,} of {Path(place).name}, which {told}"
                    return
        for name, bits, block in self.quantized():
            if bits not in (4, 8) or block < 16 or block & (block - 1):
                yield f"{name}: MatMulNBits in {bits} bits, blocks of {block}; onnxruntime takes 4 or 8 bits and powers of two from 16 on"
        if not (self.folder / GENAI).is_file():
            yield f"{GENAI}: missing; onnxruntime-genai would not open the folder"
        else:
            read_json(self.folder / GENAI)

    def not_numbers(self) -> Iterator[str]:
        """Tensors that hold NaN (infinity is how a mask says never). Reads every float once."""
        for name, tensor in self.tensors.items():
            if tensor is None or not tensor.dtype.is_floating_point():
                continue
            values = tensor.numpy().reshape(-1)
            for start in range(0, len(values), PART):
                part = values[start : start + PART].astype(numpy.float32)
                if numpy.isnan(part).any():
                    yield f"{name}: holds NaN"
                    break
