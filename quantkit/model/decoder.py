"""The text model as one function of tokens and cache, on weights that take no memory: what a graph is traced from.

    decoder = Decoder(config)
    logits, *present = decoder(ids, attention_mask, position_ids, past)     # past, present: key, value of each layer that owns a cache

Weights are stride-0 tensors: a graph's tracer wants every shape and device to be real and reads no value. Masks are those that
transformers itself makes for each type of layer, from the 2-D attention mask and the cache.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from types import MethodType
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from quantkit.errors import FamilyError
from quantkit.model import experts
from quantkit.model.blocks import fill_buffers, hollow_text_model
from quantkit.types import Json


class Decoder(nn.Module):
    """A causal LM in fp32 with eager attention, hollow.

    Raises:
        CheckpointError: transformers cannot build it.
        FamilyError: experts of a layout that nobody here knows.
    """

    def __init__(self, config: Json):
        super().__init__()
        self.model: Any = hollow_text_model(config, torch.float32, attn_implementation="eager")
        layers = self.model.get_decoder().layers
        if said := next((why for layer in layers for why in experts.unreadable(layer)), None):
            raise FamilyError(f"{said}; no graph is made of them, so leave onnx out of --format")
        fill_buffers(self.model)
        _fill_hollow(self.model)
        self.model.tie_weights()
        for module in self.model.modules():
            if hasattr(module, "_gaussian_topk"):
                module._gaussian_topk = MethodType(_gaussian_topk, module)
        attentions = [layer.self_attn for layer in layers]
        self.owners = [index for index, attention in enumerate(attentions) if not getattr(attention, "is_kv_shared_layer", False)]
        widths = [attentions[index].head_dim for index in self.owners]
        keys = [attentions[index].k_proj.out_features for index in self.owners]
        self.cache_shapes = [(out // width, width) for out, width in zip(keys, widths, strict=True)]  # (heads, width), layer by layer

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """
        Args:
            input_ids, position_ids: (batch, new).
            attention_mask: (batch, past + new), 0 for padding.
            past: keys and values in turn, (batch, heads, past, width) each.

        Returns:
            The logits (batch, new, vocabulary), then keys and values over past + new.
        """
        cache: Any = transformers.DynamicCache()  # without a config: no layer's cache is cropped to its window, masks see to that
        for number, index in enumerate(self.owners):
            cache.update(past[2 * number], past[2 * number + 1], index)
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache, use_cache=True
        )
        present = [tensor for index in self.owners for tensor in (cache.layers[index].keys, cache.layers[index].values)]
        return (out.logits, *present)


@lru_cache(maxsize=2)
def text_shapes(config: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the text model's own tensors (buffers that no checkpoint holds left out) by name, from a config.json's text.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    model = hollow_text_model(json.loads(config), torch.float32)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _fill_hollow(model: nn.Module) -> None:
    """Every meta tensor as one zero seen as its whole shape: "cpu" to all who ask, and four bytes."""
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and tensor.is_meta:
                hollow = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                setattr(module, name, hollow if name in module._buffers else nn.Parameter(hollow, requires_grad=False))


def _gaussian_topk(module: Any, x: Tensor) -> Tensor:
    """Gemma 3n's activation sparsity. Its own asks a distribution for a quantile, by an operator that no graph has; it is a constant."""
    quantile = NormalDist().inv_cdf(module.activation_sparsity)
    return nn.functional.relu(x - (x.mean(-1, keepdim=True) + quantile * x.std(-1, keepdim=True, unbiased=False)))
