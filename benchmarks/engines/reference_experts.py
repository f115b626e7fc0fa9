"""A plain multiply for packed experts that vLLM has no CPU kernel for.

Everything that this check is about stays vLLM's own: which layers its config matching calls quantized, the parameters that it creates,
the mapping of names, the loaders that fill slices of fused parameters. Only where its choice of a kernel ends in "no backend" do we
take over, after the weights have been loaded: they are unpacked here, by the format's description and not by vLLM's helpers, kept for an
exact comparison, and multiplied expert by expert. Where vLLM does have a kernel, it multiplies, and we only look at the weights.
"""

import re

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import compressed_tensors_moe_wna16 as wna16

LOADED: dict[str, Tensor] = {}  # "layer 3 gate_up" -> (experts, rows, columns), as vLLM loaded it
REFUSALS: set[str] = set()  # why vLLM itself does not run these experts here

ACTIVATIONS = {
    MoEActivation.SILU: torch.nn.functional.silu,
    MoEActivation.GELU: torch.nn.functional.gelu,
    MoEActivation.GELU_TANH: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


class ReferenceExperts(wna16.CompressedTensorsWNA16MoEMethod):
    """vLLM's method, with our multiply where it finds no kernel."""

    def __init__(self, weight_quant, input_quant, moe, layer_name=None):
        try:
            super().__init__(weight_quant, input_quant, moe, layer_name)
            self.ours = False
        except NotImplementedError as refusal:
            REFUSALS.add(str(refusal))
            self.ours = True
            self.wna16_backend = self.experts_cls = None
            self.is_marlin = self.is_transposed = False

    def process_weights_after_loading(self, layer):
        number = re.search(r"layers\.(\d+)\.", layer.layer_name)[1]
        weights = {"gate_up": self.unpacked(layer, "w13"), "down": self.unpacked(layer, "w2")}
        LOADED.update({f"layer {number} {name}": weight for name, weight in weights.items()})
        if self.ours:
            layer.reference = weights
        else:
            super().process_weights_after_loading(layer)

    def unpacked(self, layer, which: str) -> Tensor:
        """(experts, rows, columns) in bfloat16: (code - zero point) * scale, the codes little end first in each int32."""
        scale = getattr(layer, f"{which}_weight_scale").data.float()
        codes = _bits(getattr(layer, f"{which}_weight_packed").data, self.num_bits)
        zero = float(1 << (self.num_bits - 1))
        if not self.symmetric:  # packed along the rows
            packed = getattr(layer, f"{which}_weight_zero_point").data
            zero = _bits(packed.transpose(1, 2), self.num_bits).transpose(1, 2).float().unsqueeze(-1)
        grouped = codes.float().unflatten(-1, (scale.shape[-1], -1))
        return ((grouped - zero) * scale.unsqueeze(-1)).flatten(-2).bfloat16()

    def get_fused_moe_quant_config(self, layer):
        return None if self.ours else super().get_fused_moe_quant_config(layer)

    @property
    def is_monolithic(self):
        return False if self.ours else super().is_monolithic

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input):
        if not self.ours:
            return super().apply(layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)
        total = torch.zeros(x.shape, dtype=torch.float32)
        activation = ACTIVATIONS[layer.activation]
        for expert, (gate_up, down) in enumerate(zip(layer.reference["gate_up"], layer.reference["down"], strict=True)):
            token, choice = (topk_ids == expert).nonzero(as_tuple=True)
            if len(token):
                gate, up = (x[token] @ gate_up.T).chunk(2, -1)
                out = (activation(gate) * up) @ down.T
                total.index_add_(0, token, out.float() * topk_weights[token, choice, None].float())
        return total.to(x.dtype)


def _bits(packed: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def install() -> None:
    """Let vLLM build this class. Its loaders look at the class's name, so the name stays."""
    ReferenceExperts.__name__ = wna16.CompressedTensorsWNA16MoEMethod.__name__
    wna16.CompressedTensorsWNA16MoEMethod = ReferenceExperts
