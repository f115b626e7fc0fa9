"""The model class on hollow weights -> a graph. Every multiply with a matrix of the layout is a placeholder that knows its name.

    quantkit::Linear(x)           {name}    a linear
    quantkit::Grouped(x, counts)  {name}    rows sorted by expert, counts of each: every expert's matrix on its own rows

The model itself is traced, so whatever a family does between its matrices comes from transformers; what the exporter leaves loose is
folded, without a look at any weight.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.model.decoder import Decoder
from quantkit.write.onnx.layout import Layout

OPSET = 21
DOMAIN = "quantkit"
PREFIX = "decoder.model."  # of the names of the model's own tensors in a traced graph
BATCH, NEW, PAST = 2, 3, 4  # of the example that is traced: unlike one another, and neither 0 nor 1


class Linear(nn.Module):
    """A linear whose weight is the layout's."""

    def __init__(self, name: str, linear: nn.Linear):
        super().__init__()
        self.name, self.out_features, self.bias = name, linear.out_features, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        shape = [*x.shape[:-1], self.out_features]
        out = torch.onnx.ops.symbolic(f"{DOMAIN}::Linear", [x], {"name": self.name}, dtype=x.dtype, shape=shape, version=1)
        return out if self.bias is None else out + self.bias


class Experts(nn.Module):
    """Fused experts: rows sorted by expert, a grouped multiply, the family's activation, another, and the sum of a token's experts."""

    def __init__(self, name: str, experts: Any):
        super().__init__()
        self.name, self.activate = name, experts._apply_gate
        self.count, self.wide, self.hidden = experts.gate_up_proj.shape

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        tokens, slots = index.shape
        flat = index.reshape(-1)
        order = torch.argsort(flat)
        token = torch.arange(tokens)[:, None].expand(tokens, slots).reshape(-1)[order]
        counts = (torch.arange(self.count)[:, None] == flat).sum(-1)
        inner = self.activate(self._grouped("gate_up_proj", hidden[token], counts, self.wide))
        out = self._grouped("down_proj", inner, counts, self.hidden) * weights.reshape(-1)[order, None]
        return torch.zeros_like(hidden).index_put((token,), out, accumulate=True)

    def _grouped(self, leaf: str, x: Tensor, counts: Tensor, width: int) -> Tensor:
        name, shape = f"{self.name}.{leaf}", [x.shape[0], width]
        return torch.onnx.ops.symbolic(f"{DOMAIN}::Grouped", [x, counts], {"name": name}, dtype=x.dtype, shape=shape, version=1)


class _Traced(nn.Module):
    """Gives the model's tensors their prefix."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        return self.decoder(input_ids, attention_mask, position_ids, past)


def cache_names(layers: int) -> list[str]:
    """What keys and values are called: 0.key, 0.value, 1.key and so on."""
    return [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def trace(decoder: Decoder, layout: Layout) -> Any:
    """The graph as an onnx_ir Model. Its weights are inputs of the graph still, named as the model names them behind PREFIX."""
    _put_placeholders(decoder.model, layout)
    past = [torch.zeros(BATCH, heads, PAST, width) for heads, width in decoder.cache_shapes for _ in range(2)]
    ids, positions = torch.zeros(BATCH, NEW, dtype=torch.int64), torch.arange(PAST, PAST + NEW).expand(BATCH, NEW).contiguous()
    names = cache_names(len(decoder.cache_shapes))
    new = {0: "batch_size", 1: "sequence_length"}
    with _quiet(), torch.no_grad():
        program: Any = torch.onnx.export(
            _Traced(decoder).eval(),
            (ids, torch.ones(BATCH, PAST + NEW, dtype=torch.int64), positions, past),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in names)],
            output_names=["logits", *(f"present.{name}" for name in names)],
            dynamic_shapes={
                "input_ids": new,
                "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
                "position_ids": new,
                "past": [{0: "batch_size", 2: "past_sequence_length"} for _ in past],
            },
        )
    model = program.model
    weights = {f"{PREFIX}{name}" for name in (*layout.floats, *layout.tables)}
    hollow = {f"{PREFIX}{name}" for name in decoder.model.state_dict()} & set(model.graph.initializers)
    if hollow - weights:
        raise AssertionError(f"{min(hollow - weights)} would stay a zero in the graph")
    _tidy(model, hollow)
    return model


def _put_placeholders(model: nn.Module, layout: Layout) -> None:
    for name, module in list(model.named_modules()):
        if name in layout.matrices:
            assert isinstance(module, nn.Linear)
            model.set_submodule(name, Linear(name, module))
        elif f"{name}.gate_up_proj" in layout.experts:
            model.set_submodule(name, Experts(name, module))


def _tidy(model: Any, weights: set[str]) -> None:
    """Fold and merge what the exporter leaves loose. Weights are made inputs first: their zeros are nobody's to fold.

    Not the exporter's own optimizer: one of its rules compares every pair of nodes. Its remarks go too, which hold paths of this machine.
    """
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    graph = model.graph
    for name in sorted(weights):
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    with _quiet():
        optimizer.fold_constants(model)
        for tidy in (
            passes.RemoveUnusedNodesPass(),
            passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            passes.DeduplicateInitializersPass(),
            passes.CommonSubexpressionEliminationPass(),
            passes.RemoveUnusedNodesPass(),
            passes.ClearMetadataAndDocStringPass(),
        ):
            tidy(model)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's remarks are for those who write models."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels: list[tuple[Callable[[int], None], int]] = [(logger.setLevel, logger.level) for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for restore, level in levels:
                restore(level)
