"""Placeholders -> operators that onnxruntime has, weights -> initialisers that point into the data file.

    Linear    MatMulNBits (com.microsoft), or MatMul where the matrix is kept
    Grouped   one Split of the sorted rows (experts without a token get none), a multiply each, one Concat

A tensor of half the width is cast where it is used; onnxruntime does that once, when it loads. Embeddings are gathered first.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from quantkit.store import Piece
from quantkit.write.onnx.layout import Layout, Matrix
from quantkit.write.onnx.trace import DOMAIN, PREFIX

MICROSOFT = "com.microsoft"
DTYPES = {
    torch.uint8: ir.DataType.UINT8,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float16: ir.DataType.FLOAT16,
    torch.float32: ir.DataType.FLOAT,
}


class Expander:
    """Finishes one traced graph.

    Args:
        model: from `trace`.
        layout: the initialisers.
        data: name of the data file beside the graph.
        accuracy_level: of MatMulNBits; 0 computes in fp32, 4 rounds activations to 8 bits.
    """

    def __init__(self, model: Any, layout: Layout, data: str, accuracy_level: int):
        self.model, self.layout, self.data, self.accuracy_level = model, layout, data, accuracy_level
        self._nodes: list[Any] = []  # what is being built, in front of the node at hand
        self._at = ""  # the module path that names them
        self._number = itertools.count()
        self._initialisers: dict[str, Any] = {}
        self._casts: dict[str, Any] = {}

    def run(self) -> Any:
        graph = self.model.graph
        for node in [node for node in graph if node.domain == DOMAIN]:
            self._at = node.attributes["name"].as_string()
            self._replace(node, self._linear(node) if node.op_type == "Linear" else self._grouped(node))
        for value in [value for value in graph.inputs if value.name.startswith(PREFIX)]:
            self._weight(value, value.name.removeprefix(PREFIX))
            graph.inputs.remove(value)
        self.model.opset_imports.pop(DOMAIN, None)
        self.model.opset_imports[MICROSOFT] = 1
        graph.name = "decoder"
        return self.model

    # -- placeholders -------------------------------------------------------------------------------------------------------------

    def _linear(self, node: Any) -> Any:
        return self._multiply(node.inputs[0], self.layout.matrices[self._at])

    def _grouped(self, node: Any) -> Any:
        matrices = self.layout.experts[self._at]
        rows, counts = node.inputs
        parts = self._op("Split", [rows, counts], len(matrices), axis=0)
        return self._op("Concat", [self._multiply(part, one) for part, one in zip(parts, matrices, strict=True)], axis=0)

    def _multiply(self, x: Any, matrix: Matrix) -> Any:
        out, columns = matrix.shape
        if matrix.scheme is None:
            weight = self._op("Transpose", [self._float(matrix.pieces[0])], perm=[1, 0])
            return self._op("MatMul", [x, weight])
        codes, scales, *zeros = matrix.pieces
        initialisers = [self._initialiser(codes), self._float(scales), *(self._initialiser(name) for name in zeros)]
        about = {
            "K": columns,
            "N": out,
            "bits": matrix.scheme.bits,
            "block_size": matrix.block,
            "accuracy_level": self.accuracy_level,
        }
        return self._op("MatMulNBits", [x, *initialisers], domain=MICROSOFT, **about)

    # -- weights ------------------------------------------------------------------------------------------------------------------

    def _weight(self, value: Any, name: str) -> None:
        """Everything that reads a tensor of the model reads its initialiser instead."""
        self._at = name
        for user, number in list(value.uses()):
            if user.op_type == "Gather" and number == 0:
                self._replace(user, self._gathered(name, user))
            else:
                user.replace_input_with(number, self._float(self.layout.floats[name]))

    def _gathered(self, name: str, node: Any) -> Any:
        indices = node.inputs[1]
        if name in self.layout.tables:
            table = self.layout.tables[name]
            codes, scales = self._initialiser(table.pieces[0]), self._float(table.pieces[1])
            rows = self._op("Reshape", [codes, self._constant([table.shape[0], -1])])
            about = {"gather_axis": 0, "quantize_axis": 1, "bits": table.scheme.bits, "block_size": table.block}  # type: ignore[union-attr]
            return self._op("GatherBlockQuantized", [rows, indices, scales], domain=MICROSOFT, **about)
        piece = self.layout.pieces[self.layout.floats[name]]
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        return self._cast(self._op("Gather", [self._initialiser(piece.name), indices], axis=axis), piece)

    def _float(self, name: str) -> Any:
        """A float initialiser as fp32; cast once for all its users, at the head of the graph."""
        if name not in self._casts:
            held, self._nodes = self._nodes, []
            self._casts[name] = self._cast(self._initialiser(name), self.layout.pieces[name])
            self.model.graph.insert_before(self.model.graph[0], self._nodes)
            self._nodes = held
        return self._casts[name]

    def _cast(self, value: Any, piece: Piece) -> Any:
        return value if piece.dtype == torch.float32 else self._op("Cast", [value], to=ir.DataType.FLOAT.value)

    def _initialiser(self, name: str) -> Any:
        if name not in self._initialisers:
            piece = self.layout.pieces[name]
            dtype, shape = DTYPES[piece.dtype], ir.Shape(piece.shape)
            tensor = ir.ExternalTensor(self.data, self.layout.offsets[name], piece.bytes, dtype, shape=shape, name=name)
            value = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=tensor)
            self.model.graph.register_initializer(value)
            self._initialisers[name] = value
        return self._initialisers[name]

    # -- nodes --------------------------------------------------------------------------------------------------------------------

    def _op(self, kind: str, inputs: Sequence[Any], outputs: int = 0, domain: str = "", **attributes: Any) -> Any:
        """One node; its output, or as many as are asked for."""
        name = f"{self._at}/{kind}_{next(self._number)}"
        node = ir.node(kind, inputs, attributes=attributes, domain=domain, num_outputs=outputs or 1, name=name)
        for number, output in enumerate(node.outputs):
            output.name = f"{name}:{number}"
        self._nodes.append(node)
        return list(node.outputs) if outputs else node.outputs[0]

    def _constant(self, numbers: list[int]) -> Any:
        return self._op("Constant", [], value=ir.tensor(numbers, dtype=ir.DataType.INT64))

    def _replace(self, node: Any, made: Any) -> None:
        old = node.outputs[0]
        made.name, made.shape, made.dtype = old.name, old.shape, old.dtype
        graph = self.model.graph
        graph.insert_before(node, self._nodes)
        self._nodes = []
        ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
        graph.remove(node, safe=True)
