"""Gemma 3n: E2B, E4B."""

from quantkit.families.family import (
    ATTENTION,
    ENDS,
    GATE_UP,
    GEMMA_NORMS,
    IGNORE_PER_LAYER,
    IGNORE_TOWERS,
    MLP,
    PER_LAYER_EMBEDDINGS,
    PER_LAYER_INPUTS,
    TOWERS,
    UP_TO_DOWN,
    VALUE_NORM,
    Family,
    Fold,
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
)
