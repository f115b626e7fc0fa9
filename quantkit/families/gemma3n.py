"""Gemma 3n: E2B, E4B."""

import math
from statistics import NormalDist

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


def _gguf(config: Config) -> Metadata:
    same("hidden_activation", config["hidden_activation"], ["gelu_pytorch_tanh"])
    # llama.cpp has these in its code, not in the file
    same("altup_num_inputs", config["altup_num_inputs"], [4])
    same("altup_active_idx", config["altup_active_idx"], [0])
    same("laurel_rank", config["laurel_rank"], [64])
    same("hidden_size_per_layer_input", config["hidden_size_per_layer_input"], [256])
    same("num_hidden_layers - num_kv_shared_layers", config["num_hidden_layers"] - config["num_kv_shared_layers"], [20])
    sparsity = list(config["activation_sparsity_pattern"])
    same("activation_sparsity_pattern", sparsity, [[0.95] * 10 + [0.0] * (len(sparsity) - 10)])
    wide = set(config["intermediate_size"])
    same("intermediate_size", wide, [{max(wide)}])
    keys = {
        **gguf_metadata({**config, "intermediate_size": max(wide)}),
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": sliding_layers(config),
        "attention.shared_kv_layers": config["num_kv_shared_layers"],
        "altup.active_idx": config["altup_active_idx"],
        "altup.num_inputs": config["altup_num_inputs"],
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"],
        "activation_sparsity_scale": [NormalDist().inv_cdf(share) if share else -math.inf for share in sparsity],
    }
    if cap := config.get("final_logit_softcapping"):
        keys["final_logit_softcapping"] = float(cap)
    return keys


GGUF = Gguf(
    "gemma3n",
    {
        **GGUF_GEMMA_NAMES,
        **GGUF_PER_LAYER_NAMES,
        "altup_projections.*": "altup_proj",
        "altup_unembed_projections.*": "altup_unembd_proj",
        "altup.correct_output_scale": "altup_correct_scale.weight",
        "altup.correction_coefs": "altup_correct_coef",
        "altup.prediction_coefs": "altup_predict_coef",
        "altup.modality_router": "altup_router",
        "altup.router_norm": "altup_router_norm",
        "laurel.linear_left": "laurel_l",
        "laurel.linear_right": "laurel_r",
        "laurel.post_laurel_norm": "laurel_post_norm",
    },
    _gguf,
    float32=("altup_correct_coef.weight", "altup_predict_coef.weight"),
    made_up={"self_attn.k_proj.weight": 0.0, "self_attn.v_proj.weight": 0.0, "self_attn.k_norm.weight": 1.0},  # read, never used
    first_row=("per_layer_token_embd.weight",),
)

FAMILY = Family(
    name="gemma3n",
    model_types=("gemma3n", "gemma3n_text"),
    linears=(*ATTENTION, *MLP),
    folds=(
        # Not input_layernorm -> q, k, v: LAuReL adds the normed input itself to the residual.
        # Not v_proj -> o_proj: v_norm stands between them.
        Fold("pre_feedforward_layernorm", GATE_UP),
        UP_TO_DOWN,
    ),
    kept=(
        *GEMMA_NORMS,
        VALUE_NORM,
        "altup.correct_output_scale",
        "altup.correction_coefs.weight",
        "altup.prediction_coefs.weight",
        "altup.modality_router.weight",
        "altup.router_norm.weight",
        "laurel.linear_left.weight",
        "laurel.linear_right.weight",
        "laurel.post_laurel_norm.weight",
        *PER_LAYER_INPUTS,
    ),
    outside=(
        *ENDS,
        *TOWERS,
        *PER_LAYER_EMBEDDINGS,
        "altup_projections.*.weight",
        "altup_unembed_projections.*.weight",
    ),
    # patterns, not names: vLLM's module paths differ from the checkpoint's here
    ignore=(
        "lm_head",
        IGNORE_TOWERS,
        IGNORE_PER_LAYER,
        r"re:.*altup.*",
        r"re:.*\.laurel\..*",
    ),
    gguf={"gemma3n": GGUF, "gemma3n_text": GGUF},
)
