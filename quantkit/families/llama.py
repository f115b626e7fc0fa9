"""Llama and Mistral; Qwen2 (with biases) and Qwen3 (with norms on queries and keys): one block, one table."""

from quantkit.families.family import (
    ATTENTION,
    ENDS,
    GATE_UP,
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
    llama3_factors,
    same,
)


def _gguf(config: Config) -> Metadata:
    same("hidden_act", config["hidden_act"], ["silu"])
    return {**gguf_metadata(config), **full_attention_only(config)}


NAMES = {**GGUF_LLAMA_NAMES, "self_attn.rotary_emb.inv_freq": ""}
LLAMA = Gguf("llama", NAMES, _gguf, llama3_factors, permuted=("self_attn.q_proj", "self_attn.k_proj"))

FAMILY = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    linears=(*ATTENTION, *MLP),
    folds=(
        Fold("input_layernorm", QKV),
        VALUES_TO_OUTPUT,
        Fold("post_attention_layernorm", GATE_UP),
        UP_TO_DOWN,
    ),
    kept=(
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
        "self_attn.rotary_emb.inv_freq",  # old exports of Llama carry it; no model reads it
        *(f"{name}.bias" for name in (*ATTENTION, *MLP)),
    ),
    outside=ENDS,
    ignore=("lm_head",),
    residual=PLAIN_RESIDUAL,
    gguf={
        "llama": LLAMA,
        "mistral": LLAMA,
        "qwen2": Gguf("qwen2", NAMES, _gguf, llama3_factors),
        "qwen3": Gguf("qwen3", NAMES, _gguf, llama3_factors),
    },
)
