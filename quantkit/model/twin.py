"""A random model of the same structure as a config's text model, small enough to run in milliseconds.

What is kept: kinds of layers, how heads are shared, experts and how they are routed, shared keys and values, biases, norms. What
shrinks: widths, counts, the vocabulary, and layers, of which one of each kind stays. Widths are told apart where the config leaves it free.
"""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from quantkit.errors import CheckpointError, FamilyError
from quantkit.model.blocks import parse_config
from quantkit.types import Json

HEADS, EXPERTS = 4, 6
SIZES = {  # the config's own names -> at most so much
    "vocab_size": 384, "vocab_size_per_layer_input": 384, "max_position_embeddings": 128, "sliding_window": 8,
    "hidden_size": 96, "intermediate_size": 112, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80,
    "head_dim": 32, "query_pre_attn_scalar": 32, "hidden_size_per_layer_input": 40, "laurel_rank": 20,
    "kv_lora_rank": 44, "q_lora_rank": 56, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "qk_head_dim": 40, "v_head_dim": 36,
    "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "moe_num_experts": EXPERTS,
    "num_experts_per_tok": 2, "top_k_experts": 2, "moe_k": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 20,
    "num_nextn_predict_layers": 0,
}  # fmt: skip
INDICES = ("mlp_only_layers",)  # lists of layers' numbers
TOKENS = 40


def small_config(config: Json) -> Any:
    """The text config of a config.json, small.

    Raises:
        CheckpointError: transformers cannot read it.
        FamilyError: it says how many layers there are under a name that is not `num_hidden_layers`.
    """
    try:
        text = parse_config(config).get_text_config()
    except Exception as problem:  # transformers raises anything
        if config.get("auto_map"):
            raise FamilyError("config.json: the model brings code of its own (auto_map), which quantkit does not run") from None
        said = f"{type(problem).__name__}: {' '.join(str(problem).split())[:160]}"
        raise CheckpointError(f"config.json: transformers cannot read it ({said}); upgrade transformers, or correct it") from None
    fields = {key: value for key, value in text.to_dict().items() if key not in ("architectures", "dtype", "transformers_version")}
    depth = fields.get("num_hidden_layers")
    if not isinstance(depth, int) or depth < 1:
        raise FamilyError(f"config.json: {text.model_type} has no num_hidden_layers, so no twin can be built; write its table by hand")
    picked = _layers(fields, depth)
    small = {key: _small(key, value, fields, depth, picked) for key, value in fields.items()}
    small["num_hidden_layers"] = len(picked)
    if shared := fields.get("num_kv_shared_layers"):
        small["num_kv_shared_layers"] = sum(layer >= depth - shared for layer in picked)
    if "first_k_dense_replace" in fields:
        small["first_k_dense_replace"] = sum(layer < fields["first_k_dense_replace"] for layer in picked)
    if fields.get("kv_lora_rank") and "head_dim" in fields:
        small["head_dim"] = small["qk_rope_head_dim"]
    for key in [key for key in small if key.endswith("token_id")]:
        small[key] = None
    return type(text)(**{key: value for key, value in small.items() if key != "model_type"})


def _layers(fields: Json, depth: int) -> list[int]:
    """One layer of each kind, two at least: everything that the config says layer by layer tells them apart."""
    lists = [value for value in fields.values() if isinstance(value, list) and len(value) == depth]
    own = {int(layer): repr(value) for layer, value in (fields.get("per_layer_config") or {}).items()}
    indices = [set(fields.get(key) or ()) for key in INDICES]
    shared, dense = depth - (fields.get("num_kv_shared_layers") or 0), fields.get("first_k_dense_replace") or 0
    kinds: dict[str, int] = {}
    for layer in range(depth):
        said = [repr(each[layer]) for each in lists]
        kinds.setdefault(repr([said, own.get(layer), [layer in each for each in indices], layer >= shared, layer < dense]), layer)
    picked = sorted(kinds.values())
    return picked if len(picked) > 1 else list(range(min(depth, 2)))


def _small(key: str, value: Any, fields: Json, depth: int, picked: list[int]) -> Any:
    if isinstance(value, list) and len(value) == depth:
        largest = max(value) if all(isinstance(one, int) for one in value) else 0
        few = [value[layer] for layer in picked]
        return [_small(key, largest, fields, depth, picked) * one // largest for one in few] if key in SIZES and largest else few
    if key in INDICES and isinstance(value, list):
        return [place for place, layer in enumerate(picked) if layer in value]
    if key == "per_layer_config" and isinstance(value, Mapping):
        by_layer = {int(layer): own for layer, own in value.items()}
        return {
            str(place): {name: _relative(name, one, fields) for name, one in by_layer[layer].items()}
            for place, layer in enumerate(picked)
            if layer in by_layer
        }
    if key == "rope_parameters" and isinstance(value, Mapping):  # its kind has no say in what folds; its lists would fit no other width
        return {name: _rope(one) for name, one in value.items()} if any(isinstance(v, Mapping) for v in value.values()) else _rope(value)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return value
    if key == "num_attention_heads":
        return HEADS
    if key.endswith("key_value_heads"):
        return 1 if value == 1 else HEADS if value == fields.get("num_attention_heads") else HEADS // 2
    return min(value, SIZES.get(key, value))


def _relative(key: str, value: Any, fields: Json) -> Any:
    """A layer's own value, as much more or less as it is of the model's."""
    base = fields.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not isinstance(base, int) or base <= 0:
        return value
    return max(1, _small(key, base, fields, 0, []) * value // base)


def _rope(value: Any) -> Any:
    if not isinstance(value, Mapping) or not any(isinstance(one, list) for one in value.values()):
        return value
    return {"rope_type": "default", **{k: v for k, v in value.items() if k in ("rope_theta", "partial_rotary_factor")}}


def build_twin(config: Json, dtype: torch.dtype, seed: int = 0, experts: str = "eager") -> Any:
    """The small model with random weights, none of them neutral: a value that is dropped or doubled shows.

    Raises:
        CheckpointError: transformers cannot read the config.
        FamilyError: transformers has no causal language model for it, or cannot build it small.
    """
    small = small_config(config)
    cls: Any = transformers.AutoModelForCausalLM._model_mapping.get(type(small), None)
    if cls is None:
        raise FamilyError(
            f"config.json: transformers {transformers.__version__} has no causal language model for {small.model_type}; upgrade it"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls._from_config(small, dtype=dtype, attn_implementation="eager", experts_implementation=experts)
    except Exception as problem:  # transformers raises anything
        said = f"{type(problem).__name__}: {' '.join(str(problem).split())[:160]}"
        raise FamilyError(f"config.json: a small {small.model_type} cannot be built ({said}); write its table by hand") from None
    _fill(model, seed)
    return model.eval().requires_grad_(False)


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
    size = min(model.config.vocab_size, SIZES["vocab_size"])
    ids = torch.randint(0, size, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.double()


def published(model: Any) -> dict[str, Tensor]:
    """The model's tensors as a published checkpoint names and splits them."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return dict(revert_weight_conversion(model, state))
