"""Gemma 3: text (270M, 1B), and text with vision (4B, 12B, 27B)."""

from quantkit.families.family import (
    ATTENTION,
    ENDS,
    GATE_UP,
    GEMMA_NORMS,
    IGNORE_TOWERS,
    MLP,
    QKV,
    TOWERS,
    UP_TO_DOWN,
    VALUES_TO_OUTPUT,
    Family,
    Fold,
)

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
)
