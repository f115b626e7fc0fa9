"""Gemma 3n: E2B, E4B."""

from quantkit.families.family import ATTENTION, ENDS, GATE_UP, IGNORE_TOWERS, MLP, TOWERS, UP_TO_DOWN, Family, Fold

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
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
        "self_attn.v_norm.weight",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "pre_feedforward_layernorm.weight",
        "post_feedforward_layernorm.weight",
        "altup.correct_output_scale",
        "altup.correction_coefs.weight",
        "altup.prediction_coefs.weight",
        "altup.modality_router.weight",
        "altup.router_norm.weight",
        "laurel.linear_left.weight",
        "laurel.linear_right.weight",
        "laurel.post_laurel_norm.weight",
        "per_layer_input_gate.weight",
        "per_layer_projection.weight",
        "post_per_layer_input_norm.weight",
    ),
    outside=(
        *ENDS,
        *TOWERS,
        "embed_tokens_per_layer.weight",
        "per_layer_model_projection.weight",
        "per_layer_projection_norm.weight",
        "altup_projections.*.weight",
        "altup_unembed_projections.*.weight",
    ),
    # patterns, not names: vLLM's module paths differ from the checkpoint's here
    ignore=(
        "lm_head",
        IGNORE_TOWERS,
        r"re:.*\.?per_layer_(input_gate|projection|model_projection)$",
        r"re:.*altup.*",
        r"re:.*\.laurel\..*",
    ),
)
