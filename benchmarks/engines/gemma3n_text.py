"""Give vLLM's text-only Gemma 3n its per-layer token embeddings.

`Gemma3nForCausalLM` in vLLM 0.32 leaves them out: only the multimodal class computes them, and the text-only forward goes on with none.
Its logits are then those of a model whose `embed_tokens_per_layer` is zero, for every checkpoint, quantized or not. With this small
addition the rest of the class can be compared; published checkpoints are multimodal and do not meet the gap.
"""

from vllm.model_executor.models.gemma3n import Gemma3nForCausalLM

USED: list[str] = []


def install() -> None:
    """Compute what `forward` is not given."""
    forward = Gemma3nForCausalLM.forward

    def with_per_layer_inputs(self, input_ids, positions, *, per_layer_inputs=None, **others):
        if per_layer_inputs is None and input_ids is not None:
            shape = (-1, self.config.num_hidden_layers, self.config.hidden_size_per_layer_input)
            per_layer_inputs = self.model.get_per_layer_input_embeddings(input_ids).reshape(shape)
            USED[:] = ["vLLM's text-only class leaves out the per-layer token embeddings; given here"]
        return forward(self, input_ids, positions, per_layer_inputs=per_layer_inputs, **others)

    Gemma3nForCausalLM.forward = with_per_layer_inputs
