"""What a model family must tell us. Plain data: no torch, no transformers.

Names in a table are local to a decoder block and are the module paths of transformers; "*" stands for one expert's number.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache


@dataclass(frozen=True, slots=True)
class Fold:
    """A scale per channel may leave `producer` and enter `consumers` (those that a block has); the block computes the same."""

    producer: str
    consumers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """One table: all that quantkit knows of a family. tests/test_families.py proves it on random twins."""

    name: str
    model_types: tuple[str, ...]  # of config.json, nested text_config included
    linears: tuple[str, ...]  # what may be quantized
    kept: tuple[str, ...]  # tensors of a block that stay as they are
    outside: tuple[str, ...]  # tensors outside the blocks, all kept; a trailing "**" takes everything below
    folds: tuple[Fold, ...]
    ignore: tuple[str, ...]  # what an engine must not expect quantized, as compressed-tensors patterns
    norm_offset: float = 0.0  # a norm multiplies by (offset + weight)
    on_disk: Mapping[str, str] = field(default_factory=dict)  # local name -> name in the published files, where they differ
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # 3-D tensor -> the linears in its rows, in order
    # linear whose output is added to the residual as it is -> the norm that reads the residual at that point
    residual: Mapping[str, str] = field(default_factory=dict)


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION = (*QKV, "self_attn.o_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
MLP = (*GATE_UP, "mlp.down_proj")
VALUES_TO_OUTPUT = Fold("self_attn.v_proj", ("self_attn.o_proj",))  # legal only where nothing stands between them
UP_TO_DOWN = Fold("mlp.up_proj", ("mlp.down_proj",))
ENDS = ("embed_tokens.weight", "norm.weight", "lm_head.weight")
TOWERS = ("vision_tower.**", "audio_tower.**", "vision_model.**", "multi_modal_projector.**", "embed_vision.**", "embed_audio.**")
GEMMA_NORMS = (
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "pre_feedforward_layernorm.weight",
    "post_feedforward_layernorm.weight",
)
VALUE_NORM = "self_attn.v_norm.weight"  # has no weight in transformers, which is told to expect it from files all the same
PER_LAYER_INPUTS = ("per_layer_input_gate.weight", "per_layer_projection.weight", "post_per_layer_input_norm.weight")
PER_LAYER_EMBEDDINGS = ("embed_tokens_per_layer.weight", "per_layer_model_projection.weight", "per_layer_projection_norm.weight")
IGNORE_PER_LAYER = r"re:.*\.?per_layer_(input_gate|projection|model_projection)$"
IGNORE_TOWERS = r"re:.*(vision_tower|audio_tower|vision_model|multi_modal_projector|embed_vision|embed_audio)\b.*"

# The order of computation inside a block, by leaf name: linears of one stage do not see each other's outputs.
STAGES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
PLAIN_RESIDUAL = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}

# Linears that serving engines store as one matrix: they must share a scheme (contract: vLLM refuses a mixed q, k, v).
SERVED_AS_ONE = (QKV, GATE_UP)

_BLOCK = re.compile(r"(?P<prefix>(?:(?:model|language_model|text_model)\.)*layers\.(?P<index>\d+)\.)(?P<local>.+)")
_OUTSIDE = re.compile(r"(?:(?:model|language_model|text_model)\.)*(?P<rest>.+)")


def in_block(name: str) -> tuple[str, int, str] | None:
    """("model.layers.3.", 3, "mlp.up_proj.weight") of a decoder block's tensor, None for any other tensor."""
    match = _BLOCK.fullmatch(name)
    return (match["prefix"], int(match["index"]), match["local"]) if match else None


def outside_block(name: str) -> str:
    """The name of a tensor outside the blocks without the prefixes in which published checkpoints differ."""
    match = _OUTSIDE.fullmatch(name)
    return match["rest"] if match else name


def matches(pattern: str, name: str) -> bool:
    """Does a table's pattern stand for this name? "*" is one number, a trailing "**" everything below."""
    return _compiled(pattern).fullmatch(name) is not None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*\*", ".+").replace(r"\*", r"\d+"))


def rename(table: Mapping[str, str], name: str) -> str:
    """`name` by a table of patterns whose "*" carries one number over; unchanged where no pattern fits."""
    for pattern, replacement in table.items():
        match = re.fullmatch(re.escape(pattern).replace(r"\*", r"(\d+)"), name)
        if match:
            return replacement.replace("*", match[1]) if match.groups() else replacement
    return name
