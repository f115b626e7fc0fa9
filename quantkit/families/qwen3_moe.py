"""Qwen3 with experts (30B-A3B, 235B-A22B); layers of mlp_only_layers are dense."""

from quantkit.families.family import (
    ATTENTION,
    ENDS,
    GATE_UP,
    GGUF_EXPERTS,
    GGUF_LLAMA_NAMES,
    MLP,
    PLAIN_RESIDUAL,
    QKV,
    UP_TO_DOWN,
    VALUES_TO_OUTPUT,
    Config,
    Family,
    Fold,
    Gguf,
    Metadata,
    full_attention_only,
    gguf_metadata,
    same,
)

EXPERT_GATE_UP = ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")


def _gguf(config: Config) -> Metadata:
    same("hidden_act", config["hidden_act"], ["silu"])
    same("norm_topk_prob", config.get("norm_topk_prob"), [True])
    same("mlp_only_layers", config.get("mlp_only_layers") or [], [[]])
    same("decoder_sparse_step", config.get("decoder_sparse_step", 1), [1])
    experts = {
        "expert_count": config["num_experts"] if "num_experts" in config else config["num_local_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
    }
    return {**gguf_metadata(config), **full_attention_only(config), **experts}


FAMILY = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    linears=(*ATTENTION, *MLP, *EXPERT_GATE_UP, "mlp.experts.*.down_proj"),
    fused={"mlp.experts.gate_up_proj": EXPERT_GATE_UP, "mlp.experts.down_proj": ("mlp.experts.*.down_proj",)},
    folds=(
        Fold("input_layernorm", QKV),
        VALUES_TO_OUTPUT,
        # The router (mlp.gate) reads the same norm: it must take the scale too, or routing changes.
        Fold("post_attention_layernorm", ("mlp.gate", *EXPERT_GATE_UP, *GATE_UP)),
        UP_TO_DOWN,
        Fold("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
    ),
    kept=(
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
        "mlp.gate.weight",
        *(f"{name}.bias" for name in ATTENTION),
    ),
    outside=ENDS,
    ignore=("lm_head", r"re:.*\.mlp\.gate$"),
    residual=PLAIN_RESIDUAL,
    gguf={"qwen3_moe": Gguf("qwen3moe", {**GGUF_LLAMA_NAMES, **GGUF_EXPERTS}, _gguf)},
)
