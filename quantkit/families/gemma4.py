"""Gemma 4: dense (31B), experts (26B-A4B), and per-layer embeddings with shared keys and values (E2B, E4B)."""

from quantkit.families.family import (
    ATTENTION,
    ENDS,
    GATE_UP,
    GEMMA_NORMS,
    GGUF_GEMMA_NAMES,
    GGUF_PER_LAYER_NAMES,
    IGNORE_PER_LAYER,
    IGNORE_TOWERS,
    MLP,
    PER_LAYER_EMBEDDINGS,
    PER_LAYER_INPUTS,
    QKV,
    TOWERS,
    UP_TO_DOWN,
    VALUE_NORM,
    Config,
    Family,
    Fold,
    Gguf,
    Metadata,
    gguf_metadata,
    same,
    sliding_layers,
)

EXPERT_GATE_UP = ("experts.*.gate_proj", "experts.*.up_proj")


def _of_layer(config: Config, layer: int, key: str) -> int:
    """Full-attention layers have head widths and key-value heads of their own; transformers says so layer by layer."""
    return int(config.get("per_layer_config", {}).get(str(layer), {}).get(key, config[key]))


def _gguf(config: Config) -> Metadata:
    same("hidden_activation", config["hidden_activation"], ["gelu_pytorch_tanh"])
    layers, sliding = range(config["num_hidden_layers"]), sliding_layers(config)
    full = next(layer for layer in layers if not sliding[layer])
    head, head_full = config["head_dim"], _of_layer(config, full, "head_dim")
    rope, shared = config["rope_parameters"]["sliding_attention"], config["num_kv_shared_layers"]
    wide = [config["intermediate_size"] * (2 if layer >= len(layers) - shared else 1) for layer in layers]
    keys = {
        **gguf_metadata(config),
        "attention.head_count_kv": [_of_layer(config, layer, "num_key_value_heads") for layer in layers],
        "attention.key_length": head_full,
        "attention.value_length": head_full,
        "attention.key_length_swa": head,
        "attention.value_length_swa": head,
        "rope.dimension_count": head_full,
        "rope.dimension_count_swa": int(head * rope.get("partial_rotary_factor", 1.0)),
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": sliding,
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"] or 0,
    }
    if config["use_double_wide_mlp"]:
        keys["feed_forward_length"] = wide
    if cap := config.get("final_logit_softcapping"):
        keys["final_logit_softcapping"] = float(cap)
    if config["enable_moe_block"]:
        keys |= {
            "expert_count": config["num_experts"],
            "expert_used_count": config["top_k_experts"],
            "expert_feed_forward_length": config["moe_intermediate_size"],
        }
    return keys


def _factors(config: Config) -> list[float]:
    """Full-attention layers rotate only the first share of a head's pairs; a factor this large stops the others."""
    layers = config["layer_types"]
    full = next(layer for layer in range(len(layers)) if layers[layer] == "full_attention")
    pairs = _of_layer(config, full, "head_dim") // 2
    turning = int(config["rope_parameters"]["full_attention"].get("partial_rotary_factor", 1.0) * pairs)
    return [1.0] * turning + [1e30] * (pairs - turning)


GGUF = Gguf(
    "gemma4",
    {
        **GGUF_GEMMA_NAMES,
        **GGUF_PER_LAYER_NAMES,
        "layer_scalar": "layer_output_scale.weight",
        "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
        "post_feedforward_layernorm_1": "post_ffw_norm_1",
        "post_feedforward_layernorm_2": "post_ffw_norm_2",
        "router.proj": "ffn_gate_inp",
        "router.scale": "ffn_gate_inp.scale",
        "router.per_expert_scale": "ffn_down_exps.scale",
        "experts.*.gate_proj": "ffn_gate_up_exps",
        "experts.*.up_proj": "ffn_gate_up_exps",
        "experts.*.down_proj": "ffn_down_exps",
    },
    _gguf,
    _factors,
    visible=("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
)

FAMILY = Family(
    name="gemma4",
    model_types=("gemma4", "gemma4_text"),
    linears=(*ATTENTION, *MLP, *EXPERT_GATE_UP, "experts.*.down_proj"),
    fused={"experts.gate_up_proj": EXPERT_GATE_UP, "experts.down_proj": ("experts.*.down_proj",)},
    folds=(
        Fold("input_layernorm", QKV),  # layers where keys serve as values have no v_proj, layers that borrow them only q_proj
        Fold("pre_feedforward_layernorm", GATE_UP),
        UP_TO_DOWN,
        # The router reads the residual through a norm of its own, so this scale never reaches it.
        Fold("pre_feedforward_layernorm_2", EXPERT_GATE_UP),
        Fold("experts.*.up_proj", ("experts.*.down_proj",)),
        # Not v_proj -> o_proj: v_norm stands between them.
    ),
    kept=(
        "layer_scalar",
        *GEMMA_NORMS,
        VALUE_NORM,
        "pre_feedforward_layernorm_2.weight",
        "post_feedforward_layernorm_1.weight",
        "post_feedforward_layernorm_2.weight",
        "router.proj.weight",
        "router.scale",
        "router.per_expert_scale",
        *PER_LAYER_INPUTS,
    ),
    outside=(
        *ENDS,
        *TOWERS,
        *PER_LAYER_EMBEDDINGS,
    ),
    ignore=("lm_head", IGNORE_TOWERS, r"re:.*\.router\.proj$", IGNORE_PER_LAYER),
    gguf={"gemma4": GGUF, "gemma4_text": GGUF},
)
