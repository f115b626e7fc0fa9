"""Gemma 3: text (270M, 1B), and text with vision (4B, 12B, 27B)."""

from quantkit.families.family import (
    ATTENTION,
    ENDS,
    GATE_UP,
    GEMMA_NORMS,
    GGUF_GEMMA_NAMES,
    IGNORE_TOWERS,
    MLP,
    QKV,
    TOWERS,
    UP_TO_DOWN,
    VALUES_TO_OUTPUT,
    Config,
    Family,
    Fold,
    Gguf,
    Metadata,
    gguf_metadata,
    same,
    sliding_layers,
)


def _gguf(config: Config) -> Metadata:
    same("hidden_activation", config["hidden_activation"], ["gelu_pytorch_tanh"])
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    # llama.cpp knows the 27B by its depth; all others divide by the root of the head's width
    width = config["hidden_size"] // heads if layers == 62 else config["head_dim"]
    same("query_pre_attn_scalar", config["query_pre_attn_scalar"], [width])
    same("attn_logit_softcapping", config.get("attn_logit_softcapping"), [None])
    keys = {
        **gguf_metadata(config),
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": sliding_layers(config),
    }
    if cap := config.get("final_logit_softcapping"):
        keys["final_logit_softcapping"] = float(cap)
    return keys


GGUF = Gguf("gemma3", GGUF_GEMMA_NAMES, _gguf)

FAMILY = Family(
    name="gemma3",
    model_types=("gemma3", "gemma3_text"),
    norm_offset=1.0,
    linears=(*ATTENTION, *MLP),
    folds=(
        Fold("input_layernorm", QKV),
        VALUES_TO_OUTPUT,  # no v_norm here, unlike Gemma 3n and 4
        Fold("pre_feedforward_layernorm", GATE_UP),
        UP_TO_DOWN,
    ),
    kept=(*GEMMA_NORMS,),
    outside=(*ENDS, *TOWERS),
    ignore=("lm_head", IGNORE_TOWERS),
    gguf={"gemma3": GGUF, "gemma3_text": GGUF},
)
