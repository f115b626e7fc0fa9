"""Mixtral (8x7B, 8x22B): experts are published as block_sparse_moe.experts.N.w1 (gate), w3 (up) and w2 (down)."""

from quantkit.families.family import (
    ATTENTION,
    ENDS,
    GGUF_EXPERTS,
    GGUF_LLAMA_NAMES,
    PLAIN_RESIDUAL,
    QKV,
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
    experts = {"expert_count": config["num_local_experts"], "expert_used_count": config["num_experts_per_tok"]}
    return {**gguf_metadata(config), **full_attention_only(config), **experts}


FAMILY = Family(
    name="mixtral",
    model_types=("mixtral",),
    linears=(*ATTENTION, *EXPERT_GATE_UP, "mlp.experts.*.down_proj"),
    fused={"mlp.experts.gate_up_proj": EXPERT_GATE_UP, "mlp.experts.down_proj": ("mlp.experts.*.down_proj",)},
    on_disk={
        "mlp.experts.*.gate_proj": "block_sparse_moe.experts.*.w1",
        "mlp.experts.*.up_proj": "block_sparse_moe.experts.*.w3",
        "mlp.experts.*.down_proj": "block_sparse_moe.experts.*.w2",
        "mlp.gate": "block_sparse_moe.gate",
    },
    folds=(
        Fold("input_layernorm", QKV),
        VALUES_TO_OUTPUT,
        # The router reads the same norm: it must take the scale too, or routing changes.
        Fold("post_attention_layernorm", ("mlp.gate", *EXPERT_GATE_UP)),
        Fold("mlp.experts.*.up_proj", ("mlp.experts.*.down_proj",)),
    ),
    kept=("input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate.weight"),
    outside=ENDS,
    ignore=("lm_head", r"re:.*\.(mlp|block_sparse_moe)\.gate$"),
    residual=PLAIN_RESIDUAL,
    gguf={"mixtral": Gguf("llama", {**GGUF_LLAMA_NAMES, **GGUF_EXPERTS}, _gguf, permuted=("self_attn.q_proj", "self_attn.k_proj"))},
)
