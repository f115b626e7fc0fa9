"""Gemma 4: dense (31B), experts (26B-A4B), and per-layer embeddings with shared keys and values (E2B, E4B)."""

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
    QKV,
    TOWERS,
    UP_TO_DOWN,
    VALUE_NORM,
    Family,
    Fold,
)

EXPERT_GATE_UP = ("experts.*.gate_proj", "experts.*.up_proj")

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
)
