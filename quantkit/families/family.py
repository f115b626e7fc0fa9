"""What a model family must tell us. Plain data: no torch, no transformers.

Names in a table are local to a decoder block and are the module paths of transformers; "*" stands for one expert's number.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from quantkit.errors import FamilyError

Config = Mapping[str, Any]  # the text part of a config.json, every default filled in
Metadata = dict[str, Any]  # GGUF keys behind the architecture's name; int is stored as uint32, float as float32

# The order of computation inside a block, by leaf name: linears of one stage do not see each other's outputs.
STAGES: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True, slots=True)
class Fold:
    """A scale per channel may leave `producer` and enter `consumers` (those that a block has); the block computes the same."""

    producer: str
    consumers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Gguf:
    """A family as llama.cpp loads it (src/models/ARCHITECTURE.cpp there).

    `names` leads from modules, or from whole tensors where the leaf changes, to names without "blk.N."; "" is not written. What has a
    "*" on the left and none on the right is stacked, one behind the other, in the order of its numbers and then of the table.
    """

    architecture: str
    names: Mapping[str, str]
    metadata: Callable[[Config], Metadata]
    rope_factors: Callable[[Config], list[float]] = lambda config: []  # frequencies are divided by these; [] = no such tensor
    permuted: tuple[str, ...] = ()  # linears whose rows rotate in pairs side by side there, in two halves here
    float32: tuple[str, ...] = ()  # its names that must be F32, beyond what always must
    made_up: Mapping[str, float] = field(default_factory=dict)  # what blocks without it get as well, and filled with what
    first_row: tuple[str, ...] = ()  # tables shorter than the vocabulary: ids behind their end read row 0
    visible: tuple[str, ...] = ()  # special tokens that a chat parser must see in the text

    def called(self, tensor: str) -> str | None:
        """A module's or a tensor's name in the file; "" of one that is not written, None of one that the table does not place."""
        module, _, leaf = tensor.rpartition(".")
        for pattern, target in self.names.items():
            if matches(pattern, tensor):
                return target
            if matches(pattern, module):
                return f"{target}.{leaf}" if target else ""
        return None


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
    gguf: Mapping[str, Gguf] = field(default_factory=dict)  # model_type -> how llama.cpp loads it
    stages: tuple[tuple[str, ...], ...] = STAGES  # patterns, or leaf names
    origin: str = ""  # of a table that is not shipped: "discovered", or its file's name

    @property
    def place(self) -> str:
        """Where a missing line would be added."""
        return self.origin or f"quantkit/families/{self.name}.py"


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

PLAIN_RESIDUAL = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}
GGUF_LLAMA_NAMES = {**GGUF_NAMES, "post_attention_layernorm": "ffn_norm"}
GGUF_EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.*.gate_proj": "ffn_gate_exps",
    "mlp.experts.*.up_proj": "ffn_up_exps",
    "mlp.experts.*.down_proj": "ffn_down_exps",
}
GGUF_GEMMA_NAMES = {
    **GGUF_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    **dict.fromkeys(TOWERS, ""),  # GGUF keeps towers in a file of their own (mmproj)
}
GGUF_PER_LAYER_NAMES = {
    "self_attn.v_norm": "",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
    "embed_tokens_per_layer": "per_layer_token_embd",
    "per_layer_model_projection": "per_layer_model_proj",
    "per_layer_projection_norm": "per_layer_proj_norm",
}

# Linears that serving engines store as one matrix: they must share a scheme (contract: vLLM refuses a mixed q, k, v).
SERVED_AS_ONE = (QKV, GATE_UP)

_ABOVE = r"(?:(?:model|language_model|text_model|backbone|decoder|llm|gpt_neox)\.)*"  # no tower is called so
_BLOCK = re.compile(rf"(?P<prefix>{_ABOVE}layers\.(?P<index>\d+)\.)(?P<local>.+)")
_OUTSIDE = re.compile(rf"{_ABOVE}(?P<rest>.+)")


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


def gguf_metadata(config: Config) -> Metadata:
    """What llama.cpp asks of every architecture."""
    heads, head = config["num_attention_heads"], config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": head,
        "vocab_size": config["vocab_size"],
        **gguf_rope(config),
    }


def gguf_rope(config: Config) -> Metadata:
    """Frequency base and scaling; "llama3" scaling is in `rope_factors`.

    Raises:
        FamilyError: a scaling that llama.cpp computes otherwise, or not at all.
    """
    rope = config["rope_parameters"]
    full, sliding = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    keys: Metadata = {"rope.freq_base": float(full["rope_theta"])}
    if sliding:
        keys["rope.freq_base_swa"] = float(sliding["rope_theta"])
    kind = full.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(full["factor"])}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = full["original_max_position_embeddings"]
    strange = {k: v for k, v in full.items() if kind == "yarn" and k.startswith(("beta", "mscale", "attention_factor", "truncate")) and v}
    if kind not in ("default", "linear", "yarn", "llama3", "proportional") or strange:
        raise FamilyError(f"config.json: rope_parameters {kind} {strange or ''}: not known to be the same in llama.cpp; no GGUF is written")
    return keys


def full_attention_only(config: Config) -> Metadata:
    """Architectures that llama.cpp computes without a sliding window: the same up to the window, so the context ends there."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return {"context_length": min(config["max_position_embeddings"], window)} if window else {}


def sliding_layers(config: Config) -> list[bool]:
    return [kind == "sliding_attention" for kind in config["layer_types"]]


def llama3_factors(config: Config) -> list[float]:
    """Llama 3.1's scaling (transformers' modeling_rope_utils): long waves are stretched, short ones stay, those between are blended."""
    rope = config["rope_parameters"]
    if rope.get("rope_type") != "llama3":
        return []
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    low, high, factor = (float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))

    def one(turn: float) -> float:
        turns = rope["original_max_position_embeddings"] / turn  # of this wave in the original context
        blend = min(max((turns - low) / (high - low), 0.0), 1.0)
        return 1 / ((1 - blend) / factor + blend)

    return [one(2 * math.pi * rope["rope_theta"] ** (2 * i / head)) for i in range(head // 2)]


def same(what: str, found: Any, known: Sequence[Any]) -> None:
    """Refuse a setting that llama.cpp has built in otherwise.

    Raises:
        FamilyError: `found` is none of the `known`.
    """
    if found not in known:
        raise FamilyError(
            f"config.json: {what} is {found!r}; llama.cpp computes this architecture with {known[0]!r} only, so no GGUF is written"
        )
