"""A random model of the same structure as a config's text model, small enough to run in milliseconds.

What is kept: kinds of layers, how heads are shared, experts and how they are routed, shared keys and values, biases, norms. What
shrinks: widths, counts, the vocabulary, and layers, of which one of each kind stays. Widths are told apart where the config leaves it free;
where its class wants them in a proportion, all are divided by one number.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from quantkit.errors import CheckpointError, FamilyError
from quantkit.finite import finite
from quantkit.model.blocks import Skeleton
from quantkit.model.config import parse_config, said
from quantkit.model.streams import Stream
from quantkit.types import Batch, Entry, Json

HEADS, EXPERTS, WIDTH = 4, 6, 256
COUNTS = {  # the config's own names -> at most so much
    "vocab_size": 384, "vocab_size_per_layer_input": 384, "ngram_vocab_size_base": 384, "max_position_embeddings": 128,
    "sliding_window": 8, "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "moe_num_experts": EXPERTS,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "top_k_experts": 2, "moe_k": 2, "moe_topk": 2, "zero_expert_num": 2,
    "n_group": 2, "num_expert_group": 2, "topk_group": 1, "n_shared_experts": 1, "num_shared_experts": 1, "num_nextn_predict_layers": 0,
    "chunk_size": 16, "mamba_chunk_size": 16, "attention_chunk_size": 16,
}  # fmt: skip
WIDTHS = {
    "hidden_size": 96, "intermediate_size": 112, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80,
    "head_dim": 32, "query_pre_attn_scalar": 32, "hidden_size_per_layer_input": 40, "laurel_rank": 20,
    "kv_lora_rank": 44, "q_lora_rank": 56, "o_lora_rank": 52, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "qk_head_dim": 40,
    "v_head_dim": 36, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 20,
}  # fmt: skip
PROPORTIONAL = re.compile(r"(?!.*(vocab|chunk|conv|group|ngram|kernel)).*(_size|_dim|_rank|head_?dim|d_head|d_model|lowrank|_scalar)")
INDICES = re.compile(r".*(_layers|_layer_ids|_layer_indices)")  # lists of layers' numbers
ROWS, TOKENS = 2, 40  # that it is tried on


def small_config(config: Json, proportional: bool = False) -> Any:
    """The text config of a config.json, small: each width at most as in WIDTHS, or all in proportion.

    Raises:
        CheckpointError: transformers cannot read it.
        FamilyError: an encoder and a decoder, or it does not say how many decoder layers there are.
    """
    try:
        text = parse_config(config).get_text_config()
    except Exception as problem:  # transformers raises anything
        if config.get("auto_map"):
            raise FamilyError("config.json: the model brings code of its own (auto_map), which quantkit does not run") from None
        raise CheckpointError(f"config.json: transformers cannot read it ({said(problem)}); upgrade transformers, or correct it") from None
    own_names = {theirs: ours for ours, theirs in text.attribute_map.items()}  # n_embd -> hidden_size
    named = {
        key: value for key, value in text.to_dict().items() if key not in ("architectures", "dtype", "transformers_version", "model_type")
    }
    fields = {own_names.get(key, key): value for key, value in named.items()}
    if fields.get("is_encoder_decoder") or {"encoder_attention_heads", "decoder_attention_heads"} <= named.keys():
        raise FamilyError(
            f"config.json: {text.model_type} is an encoder and a decoder; quantkit quantizes decoders by themselves, so use a tool that "
            "loads the whole model"
        )
    depth = getattr(text, "num_hidden_layers", None)
    if not isinstance(depth, int) or depth < 1:
        raise FamilyError(f"config.json: {text.model_type} has no num_hidden_layers, so no twin can be built; write its table by hand")
    picked = _layers(fields, depth)
    divisor = 1 << (max(1, getattr(text, "hidden_size", WIDTH) // WIDTH).bit_length() - 1) if proportional else 0  # halves stay even
    shrink = _Shrink(fields, depth, picked, divisor)
    small = {key: shrink(own_names.get(key, key), value) for key, value in named.items()}
    theirs = {ours: key for key in named if (ours := own_names.get(key, key)) != key}

    def put(key: str, value: Any) -> None:
        small[theirs.get(key, key)] = value

    put("num_hidden_layers", len(picked))
    if shared := fields.get("num_kv_shared_layers"):
        put("num_kv_shared_layers", sum(layer >= depth - shared for layer in picked))
    if "first_k_dense_replace" in fields:
        put("first_k_dense_replace", sum(layer < fields["first_k_dense_replace"] for layer in picked))
    if fields.get("kv_lora_rank") and "head_dim" in fields:
        put("head_dim", small["qk_rope_head_dim"])
    # tokens that mean something are none of those that are drawn (logits_of)
    last = min(fields.get("vocab_size") or COUNTS["vocab_size"], COUNTS["vocab_size"]) - 1
    tokens = {key: last for key in small if key.endswith("token_id") and small[key] is not None}
    try:
        return type(text)(**small | dict.fromkeys(tokens))
    except Exception:  # some want a number
        return type(text)(**small | tokens)


def _layers(fields: Json, depth: int) -> list[int]:
    """One layer of each kind, two at least: everything that the config says layer by layer tells them apart."""
    lists = [
        value for key, value in fields.items() if isinstance(value, list) and len(value) == depth and not _are_indices(key, value, depth)
    ]
    own = {int(layer): repr(value) for layer, value in (fields.get("per_layer_config") or {}).items()}
    indices = [set(value) for key, value in fields.items() if _are_indices(key, value, depth)]
    shared, dense = depth - (fields.get("num_kv_shared_layers") or 0), fields.get("first_k_dense_replace") or 0
    kinds: dict[str, int] = {}
    for layer in range(depth):
        said = [repr(each[layer]) for each in lists]
        kinds.setdefault(repr([said, own.get(layer), [layer in each for each in indices], layer >= shared, layer < dense]), layer)
    picked = sorted(kinds.values())
    return picked if len(picked) > 1 else list(range(min(depth, 2)))


def _are_indices(key: str, value: Any, depth: int) -> bool:
    return (
        isinstance(value, list)
        and INDICES.fullmatch(key) is not None
        and all(isinstance(one, int) and 0 <= one < depth for one in value)
        and sorted(set(value)) == value
    )


class _Shrink:
    """A field's small value."""

    def __init__(self, fields: Json, depth: int, picked: list[int], divisor: int):
        self.fields, self.depth, self.picked, self.divisor = fields, depth, picked, divisor

    def __call__(self, key: str, value: Any) -> Any:
        if _are_indices(key, value, self.depth):
            return [place for place, layer in enumerate(self.picked) if layer in value]
        if isinstance(value, list) and len(value) == self.depth:
            few = [value[layer] for layer in self.picked]
            numbers = key in WIDTHS and all(isinstance(one, int) for one in value) and max(value) > 0
            return [self.number(key, max(value)) * one // max(value) for one in few] if numbers else few
        if key == "per_layer_config" and isinstance(value, Mapping):
            by_layer = {int(layer): own for layer, own in value.items()}
            return {
                str(place): {name: self.relative(name, one) for name, one in by_layer[layer].items()}
                for place, layer in enumerate(self.picked)
                if layer in by_layer
            }
        if key == "rope_parameters" and isinstance(value, Mapping):  # no say in what folds; its lists would fit no other width
            return (
                {name: _rope(one) for name, one in value.items()} if any(isinstance(v, Mapping) for v in value.values()) else _rope(value)
            )
        return self.number(key, value)

    def number(self, key: str, value: Any) -> Any:
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            return value
        if self.divisor:
            return max(1, value // self.divisor) if PROPORTIONAL.fullmatch(key) else min(value, COUNTS.get(key, value))
        if key == "num_attention_heads":
            return HEADS
        if key.endswith("key_value_heads"):
            return 1 if value == 1 else HEADS if value == self.fields.get("num_attention_heads") else HEADS // 2
        return min(value, COUNTS.get(key, value), WIDTHS.get(key, value))

    def relative(self, key: str, value: Any) -> Any:
        """A layer's own value, as much more or less as it is of the model's."""
        base = self.fields.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not isinstance(base, int) or base <= 0:
            return value
        return max(1, self.number(key, base) * value // base)


def _rope(value: Any) -> Any:
    if not isinstance(value, Mapping) or not any(isinstance(one, list) for one in value.values()):
        return value
    return {"rope_type": "default", **{k: v for k, v in value.items() if k in ("rope_theta", "partial_rotary_factor")}}


def build_twin(config: Json, dtype: torch.dtype, seed: int = 0, experts: str = "eager") -> tuple[Any, Tensor]:
    """The small model with random weights, none of them neutral (a value that is dropped or doubled shows), and its logits.

    Raises:
        CheckpointError: transformers cannot read the config.
        FamilyError: transformers has no causal language model for it, or none that can be built small and runs on a CPU.
    """
    first = ""
    for proportional in (False, True):
        kind = "model"
        try:
            small = small_config(config, proportional)
            kind = small.model_type
            cls: Any = transformers.AutoModelForCausalLM._model_mapping.get(type(small), None)
            if cls is None:
                raise FamilyError(
                    f"config.json: transformers {transformers.__version__} has no causal language model for {kind}; upgrade transformers"
                )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = cls._from_config(small, dtype=dtype, attn_implementation="eager", experts_implementation=experts)
            _fill(model, seed)
            model.eval().requires_grad_(False)
            logits = logits_of(model)
        except (CheckpointError, FamilyError):
            raise
        except Exception as problem:  # transformers raises anything
            first = first or said(problem)
            continue
        if not finite(logits):
            raise FamilyError(f"config.json: a small random {kind} computes no finite logits; write its table by hand")
        return model, logits
    raise FamilyError(f"config.json: a small {kind} cannot be built and run on a CPU ({first}); write its table by hand")


@torch.no_grad()
def _fill(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    buffers = dict(model.named_buffers())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
        if name in buffers:
            tensor.add_(0.1 * noise)
        elif tensor.ndim < 2:
            tensor.add_(0.2 * noise)
        elif isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding):
            tensor.copy_(noise)
        else:
            tensor.copy_(noise / tensor.shape[-1] ** 0.5)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """Of two rows of random tokens, longer than any window."""
    logits: Tensor = model(input_ids=twin_tokens(model), use_cache=False).logits
    return logits.double()


def twin_tokens(model: Any) -> Tensor:
    """Two rows of random tokens; not the last one of the vocabulary, which stands for all that mean something."""
    size = min(model.config.vocab_size, COUNTS["vocab_size"]) - 1
    return torch.randint(0, size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))


def published(model: Any) -> dict[str, Tensor]:
    """The model's tensors as a published checkpoint names and splits them."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return dict(revert_weight_conversion(model, state))


@dataclass(slots=True)
class TwinSource:
    """A twin as the checkpoint that it would be published as."""

    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    folder: Path = Path("twin")

    @property
    def entries(self) -> Mapping[str, Entry]:
        return {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name].clone()

    def view(self, name: str) -> Tensor:
        return self.tensors[name]


@torch.no_grad()
def streamed(model: Any) -> Tensor:
    """What `logits_of` gives, made as a run makes it: from the published tensors, one block after the other, the tail in parts."""
    ids = twin_tokens(model)
    source = TwinSource({**model.config.to_dict(), "architectures": [type(model).__name__]}, published(model))
    skeleton = Skeleton(source, model.dtype)
    stream = Stream(skeleton, [Batch(ids, torch.ones_like(ids, dtype=torch.bool))])
    state = stream.start()
    for index in range(len(skeleton.blocks)):
        with skeleton.block(index) as block:
            stream.advance(block, state)
        stream.close()
    parts = slice(0, TOKENS // 2), slice(TOKENS // 2, TOKENS)
    return torch.cat([stream.logits(state, 0, part) for part in parts], 1).double()
