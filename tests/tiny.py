"""Tiny random-weight checkpoints of every family, with a tokenizer trained in a fraction of a second.

    build("gemma4_moe", folder)                              # config.json, model.safetensors, tokenizer, processor files
    build("llama", folder, num_hidden_layers=2)              # any key of the (text) config
    build("qwen3_moe", folder, max_shard_size="300KB")       # sharded, with an index

What makes them useful in spite of random weights:

- every norm weight is off its neutral value, every bias is set, every `layer_scalar` is .9: a value that is dropped, doubled or left
  at its default shows in the logits;
- a few input channels are far louder than the others, so a fold has something to gain;
- widths are multiples of 32 and not of much else (experts are 96 wide), layers with a sliding window stand beside full ones;
- the same arguments give the same bytes.

Attention logits of Gemma 4 are not divided by anything, so a random net is chaotic; its q_norm and k_norm are lowered by .6.
"""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

VOCABULARY = 384
WINDOW = 24

SPECIAL = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>",
    "<|image>", "<|image|>", "<image|>", "<|video|>", "<|audio>", "<|audio|>", "<audio|>",
    "<start_of_image>", "<end_of_image>", "<image_soft_token>", "<start_of_audio>", "<end_of_audio>", "<audio_soft_token>",
)  # fmt: skip
IDS = {token: number for number, token in enumerate(SPECIAL)}

SENTENCES = (
    "A small model learns to count from one to ten, and then it counts back again.",
    "Weights are rounded to a grid, and the rounding that hurts least is the one that we keep.",
    "def mean(values): return sum(values) / len(values)  # the mean of a list",
    "Question: how many apples are left when three of seven are eaten? Answer: four apples are left.",
    "The user asks, the assistant answers, and a tool is called when a number is needed.",
    "Der Fluss ist lang und das Wasser ist kalt. La rivière est longue et l'eau est froide.",
    "Río, montaña y mar; rivier, berg en zee; река, гора и море; 河流、山和大海。",
)

CHAT = (
    "{%- set names = {'system': 'system', 'user': 'user', 'assistant': 'model', 'tool': 'tool'} -%}"
    "{{- bos_token if bos_token else '' -}}"
    "{%- for message in messages -%}"
    "{{- '<|turn>' + names[message['role']] + '\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] | trim -}}"
    "{%- elif message['content'] -%}{%- for part in message['content'] -%}"
    "{{- (part['text'] | trim) if part['type'] == 'text' else '<|' + part['type'] + '|>' -}}{%- endfor -%}{%- endif -%}"
    "{%- for call in message['tool_calls'] or [] -%}{{- '\ncall ' + (call['function'] | tojson) -}}{%- endfor -%}"
    "{{- '<turn|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|turn>model\n' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class Family:
    """How one family is built: `make(changes)` gives the random model; the rest is what lies beside the weights."""

    make: Callable[[dict[str, Any]], nn.Module]
    bos: bool = True  # the tokenizer opens every text with <bos>
    tokens: dict[str, str] = field(default_factory=dict)  # names that a multimodal processor asks the tokenizer for
    processor: dict[str, Any] = field(default_factory=dict)  # file name -> its JSON
    calm: float = 0.0  # taken off q_norm and k_norm
    finish: Callable[[dict[str, Tensor], dict[str, Any]], tuple[dict[str, Tensor], dict[str, Any]]] | None = None


def build(
    name: str,
    folder: Path | str,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    max_shard_size: int | str = "5GB",
    **config_changes: Any,
) -> Path:
    """Write the tiny checkpoint `name` (a key of `FAMILIES`) into `folder`.

    Args:
        seed: of the weights; the tokenizer is always the same.
        dtype: "bfloat16", "float16" or "float32", of every floating point tensor.
        max_shard_size: a size as huggingface_hub reads it; a small one gives several shards and an index.
        config_changes: keys of the text config, changed before the model is made.

    Returns:
        The folder.
    """
    family, folder = FAMILIES[name], Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch_dtype = getattr(torch, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family.make(config_changes)
    _fill(model, seed, family.calm)
    model = model.to(torch_dtype).eval()
    model.generation_config.update(pad_token_id=IDS["<pad>"], eos_token_id=[IDS["<eos>"], IDS["<turn|>"]])
    model.generation_config.bos_token_id = IDS["<bos>"] if family.bos else None
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if family.finish:
        _finish(family, model, folder, max_shard_size)
    _gemma4_config(folder / "config.json")
    save_tokenizer(folder, bos=family.bos, tokens=family.tokens)
    for file, content in family.processor.items():
        _write_json(folder / file, content)
    return folder


def trained(weight: Tensor, stored: torch.dtype = torch.float16, signed: bool = True) -> Tensor:
    """A weight as quantization-aware training in 4 bits and groups of 32 leaves it: the far end of every group at code -8."""
    grouped = weight.float().unflatten(1, (-1, 32))
    far = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
    scale = (far / -7.98 if signed else far.abs() / 7.98).to(stored).float()  # an 8th of bf16 would be bf16
    return ((grouped / scale).round().clamp(-8, 7) * scale).flatten(1).to(weight.dtype)


def train(folder: Path, pattern: str) -> dict[str, Tensor]:
    """Leave the weights of a checkpoint that match a pattern as training does; what the file then holds."""
    state = load_file(folder / "model.safetensors")
    state |= {name: trained(weight) for name, weight in state.items() if re.search(pattern, name)}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return state


def save_tokenizer(folder: Path, *, bos: bool = True, tokens: dict[str, str] | None = None) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja: byte-level BPE, so every text can be encoded and comes back whole."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe(bos)),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>" if bos else None,
        unk_token="<unk>",
        model_max_length=512,
        extra_special_tokens=tokens or {},
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)


@functools.cache
def _bpe(bos: bool) -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a set: its order changes from run to run
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", IDS["<bos>"])]
        )
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise AssertionError(f"the sentences give {tokenizer.get_vocab_size()} tokens, not {VOCABULARY}; write a longer one")
    return tokenizer.to_str()


def _fill(model: nn.Module, seed: int, calm: float) -> None:
    """Random weights in the order of the modules; parameters that transformers starts at a constant stay near it."""
    generator = torch.Generator().manual_seed(seed)

    def noise(parameter: Tensor, scale: float) -> Tensor:
        return torch.randn(parameter.shape, generator=generator) * scale

    width = model.config.get_text_config().hidden_size
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            path, _, leaf = name.rpartition(".")
            if parameter.ndim == 1:  # norms, biases, scales: transformers starts each at its neutral value
                value = (torch.zeros_like(parameter) if leaf == "bias" else parameter) + noise(parameter, 0.1)
                if path.endswith(("q_norm", "k_norm")):
                    value -= calm
                elif "layernorm" in path and len(value) == width:
                    value[5::61] += 2.0
            elif "embed" in path and "proj" not in path:
                value = noise(parameter, parameter.shape[-1] ** -0.5)  # louder, and a tied head would only repeat its input
            else:
                value = noise(parameter, parameter[0].numel() ** -0.5 if parameter.ndim != 3 else parameter.shape[-1] ** -0.5)
                value[..., 3::37] *= 2.0
            parameter.copy_(value)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.9)


def _finish(family: Family, model: nn.Module, folder: Path, max_shard_size: int | str) -> None:
    """Rename and add tensors, for a checkpoint whose class cannot be made here."""
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    config = json.loads((folder / "config.json").read_text())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in (model._tied_weights_keys or {})}
    state, config = family.finish(state, config)
    save_torch_state_dict(state, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
    _write_json(folder / "config.json", config)


def _gemma4_config(file: Path) -> None:
    """Write the two keys that Gemma 4 is published with; transformers 5.23 rewrites them, and older readers know only these."""
    config = json.loads(file.read_text())
    text = config.get("text_config", config)
    layers = text.pop("per_layer_config", None)
    if layers:
        full = next(iter(layers.values()))
        text["global_head_dim"] = full.get("head_dim", text["head_dim"])
        text["num_global_key_value_heads"] = full.get("num_key_value_heads")
        _write_json(file, config)


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


# -- the families ------------------------------------------------------------------------------------------------------------------


def _text(changes: dict[str, Any], **own: Any) -> dict[str, Any]:
    """Keys that every text config shares, then the family's own, then the caller's."""
    shared = {
        "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 224, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512,
        "pad_token_id": IDS["<pad>"], "eos_token_id": IDS["<eos>"], "bos_token_id": IDS["<bos>"],
    }  # fmt: skip
    return {**shared, **own, **changes}


def _mixed(config: dict[str, Any], pattern: str) -> dict[str, Any]:
    """Repeat a pattern of s(liding) and f(ull) layers over the depth; the last layer is full, as Gemma 4 wants it."""
    if "layer_types" not in config:
        names = {"s": "sliding_attention", "f": "full_attention"}
        depth = config["num_hidden_layers"]
        types = [names[pattern[layer % len(pattern)]] for layer in range(depth)]
        config["layer_types"] = [*types[:-1], "full_attention"]
    return config


def _gemma4_text(changes: dict[str, Any], pattern: str = "ssf", **own: Any) -> dict[str, Any]:
    gemma4 = {
        "head_dim": 32, "global_head_dim": 64, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "sliding_window": WINDOW,
        "final_logit_softcapping": 30.0, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCABULARY,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return _mixed(_text(changes, **{**gemma4, **own}), pattern)


def _gemma4(changes: dict[str, Any], *, audio: bool = False, **own: Any) -> nn.Module:
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    vision = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 32, "patch_size": 16, "position_embedding_size": 64, "standardize": True,
    }  # fmt: skip
    hearing = {
        "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "subsampling_conv_channels": [16, 8],
        "output_proj_dims": 96,
    }  # fmt: skip
    config = Gemma4Config(
        text_config=_gemma4_text(changes, **own),
        vision_config=vision,
        audio_config=hearing if audio else None,
        boi_token_id=IDS["<|image>"],
        eoi_token_id=IDS["<image|>"],
        image_token_id=IDS["<|image|>"],
        video_token_id=IDS["<|video|>"],
        boa_token_id=IDS["<|audio>"],
        eoa_token_index=IDS["<audio|>"],
        audio_token_id=IDS["<|audio|>"],
    )
    return Gemma4ForConditionalGeneration(config)


def _gemma4_moe(changes: dict[str, Any]) -> nn.Module:
    return _gemma4(changes, enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=96)


def _gemma4_e(changes: dict[str, Any]) -> nn.Module:
    return _gemma4(
        changes, audio=True, pattern="sf", attention_k_eq_v=False, num_global_key_value_heads=None, num_key_value_heads=1,
        hidden_size_per_layer_input=32, num_kv_shared_layers=2, use_double_wide_mlp=True,
    )  # fmt: skip


def _gemma4_text_only(changes: dict[str, Any]) -> nn.Module:
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    return Gemma4ForCausalLM(Gemma4TextConfig(**_gemma4_text(changes, num_hidden_layers=3)))


def _gemma3_text(changes: dict[str, Any], **own: Any) -> dict[str, Any]:
    gemma3 = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": WINDOW}
    return _mixed(_text(changes, **{**gemma3, **own}), "ssf")


def _gemma3(changes: dict[str, Any]) -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(Gemma3TextConfig(**_gemma3_text(changes, num_hidden_layers=3, num_key_value_heads=1)))


def _gemma3_vision(changes: dict[str, Any]) -> nn.Module:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
        "num_attention_heads": 2, "patch_size": 14, "image_size": 56, "vision_use_head": False,
    }  # fmt: skip
    config = Gemma3Config(
        text_config=_gemma3_text(changes),
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=IDS["<start_of_image>"],
        eoi_token_index=IDS["<end_of_image>"],
        image_token_index=IDS["<image_soft_token>"],
    )
    return Gemma3ForConditionalGeneration(config)


def _gemma3n(changes: dict[str, Any]) -> nn.Module:
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    config = _text(
        changes, head_dim=32, num_key_value_heads=1, sliding_window=WINDOW, num_kv_shared_layers=2, laurel_rank=32,
        altup_num_inputs=4, hidden_size_per_layer_input=32, vocab_size_per_layer_input=VOCABULARY,
    )  # fmt: skip
    if "activation_sparsity_pattern" not in config:
        config["activation_sparsity_pattern"] = [0.9, *[0.0] * (config["num_hidden_layers"] - 1)]
    return Gemma3nForCausalLM(Gemma3nTextConfig(**_mixed(config, "sf")))


def _publish_gemma3n(state: dict[str, Tensor], text: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The names and the config of the multimodal checkpoint as it is published; its towers are stood in for by a few tensors each."""
    generator = torch.Generator().manual_seed(1)
    kind = next(iter(state.values())).dtype
    towers = {
        "model.vision_tower.timm_model.conv_stem.conv.weight": (16, 3, 3, 3),
        "model.vision_tower.timm_model.blocks.0.0.conv_exp.weight": (32, 16, 3, 3),
        "model.vision_tower.timm_model.msfa.norm.weight": (64,),
        "model.embed_vision.embedding.weight": (32, 64),
        "model.embed_vision.hard_embedding_norm.weight": (64,),
        "model.embed_vision.embedding_projection.weight": (text["hidden_size"], 64),
        "model.audio_tower.subsample_conv_projection.conv_0.conv.weight": (16, 1, 3, 3),
        "model.audio_tower.conformer.0.attention.attn.q_proj.weight": (64, 64),
        "model.audio_tower.conformer.0.ffw_layer_start.ffw_layer_1.weight": (256, 64),
        "model.audio_tower.conformer.0.norm.weight": (64,),
        "model.embed_audio.embedding.weight": (32, 64),
        "model.embed_audio.embedding_projection.weight": (text["hidden_size"], 64),
    }
    named = {"model.language_model." + name.removeprefix("model."): tensor for name, tensor in state.items()}
    named |= {name: torch.randn(shape, generator=generator).to(kind) * 0.1 for name, shape in towers.items()}
    config = {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "model_type": "gemma3n",
        "dtype": text["dtype"],
        "text_config": {key: value for key, value in text.items() if key not in ("architectures", "transformers_version")},
        "vision_config": {
            "model_type": "gemma3n_vision", "architecture": "mobilenetv5_300m_enc", "hidden_size": 64, "vocab_size": 32,
            "vocab_offset": VOCABULARY, "do_pooling": False, "num_classes": 2, "label_names": ["LABEL_0", "LABEL_1"],
        },
        "audio_config": {
            "model_type": "gemma3n_audio", "hidden_size": 64, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 2,
            "sscp_conv_channel_size": [16, 8], "vocab_size": 32, "vocab_offset": VOCABULARY + 32,
        },
        "boi_token_id": IDS["<start_of_image>"], "eoi_token_id": IDS["<end_of_image>"], "image_token_id": IDS["<image_soft_token>"],
        "boa_token_id": IDS["<start_of_audio>"], "eoa_token_id": IDS["<end_of_audio>"], "audio_token_id": IDS["<audio_soft_token>"],
        "vision_soft_tokens_per_image": 4, "audio_soft_tokens_per_image": 4,
        "tie_word_embeddings": True, "transformers_version": text["transformers_version"],
    }  # fmt: skip
    return named, config


def _llama(changes: dict[str, Any]) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_text(changes, num_hidden_layers=3, tie_word_embeddings=False)))


def _mistral(changes: dict[str, Any]) -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    config = _text(changes, num_hidden_layers=3, head_dim=32, sliding_window=WINDOW, tie_word_embeddings=False)
    return MistralForCausalLM(MistralConfig(**config))


def _qwen2(changes: dict[str, Any]) -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = _text(changes, num_hidden_layers=3, tie_word_embeddings=True, use_sliding_window=False)
    return Qwen2ForCausalLM(Qwen2Config(**config))


def _qwen3(changes: dict[str, Any]) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = _text(changes, num_hidden_layers=3, head_dim=32, tie_word_embeddings=True, use_sliding_window=False)
    return Qwen3ForCausalLM(Qwen3Config(**config))


def _qwen3_moe(changes: dict[str, Any]) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = _text(
        changes, num_hidden_layers=3, head_dim=32, moe_intermediate_size=96, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
        decoder_sparse_step=1, mlp_only_layers=[], tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**config))


def _mixtral(changes: dict[str, Any]) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = _text(
        changes, num_hidden_layers=3, head_dim=32, intermediate_size=96, num_local_experts=12, num_experts_per_tok=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    return MixtralForCausalLM(MixtralConfig(**config))


_GEMMA4_TOKENS = {
    "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>",
    "audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>",
}  # fmt: skip
_GEMMA3_TOKENS = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
_GEMMA3N_TOKENS = {
    **_GEMMA3_TOKENS, "audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>",
}  # fmt: skip

_GEMMA4_PROCESSOR = {
    "processor_config.json": {
        "processor_class": "Gemma4Processor",
        "image_seq_length": 280,
        "audio_seq_length": 750,
        "image_processor": {"image_processor_type": "Gemma4ImageProcessor", "patch_size": 16, "pooling_kernel_size": 3},
        "video_processor": {"video_processor_type": "Gemma4VideoProcessor", "patch_size": 16, "pooling_kernel_size": 3},
        "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"},
    }
}
_GEMMA3_PROCESSOR = {
    "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
    "preprocessor_config.json": {
        "processor_class": "Gemma3Processor",
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": 56, "width": 56},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
}

FAMILIES: dict[str, Family] = {
    "gemma4_moe": Family(_gemma4_moe, tokens=_GEMMA4_TOKENS, processor=_GEMMA4_PROCESSOR, calm=0.6),
    "gemma4_dense": Family(_gemma4, tokens=_GEMMA4_TOKENS, processor=_GEMMA4_PROCESSOR, calm=0.6),
    "gemma4_e": Family(_gemma4_e, tokens=_GEMMA4_TOKENS, processor=_GEMMA4_PROCESSOR, calm=0.6),
    "gemma4_text": Family(_gemma4_text_only, calm=0.6),
    "gemma3_text": Family(_gemma3),
    "gemma3_vision": Family(_gemma3_vision, tokens=_GEMMA3_TOKENS, processor=_GEMMA3_PROCESSOR),
    "gemma3n_text": Family(_gemma3n),
    "gemma3n": Family(_gemma3n, tokens=_GEMMA3N_TOKENS, finish=_publish_gemma3n),
    "llama": Family(_llama),
    "mistral": Family(_mistral),
    "qwen2": Family(_qwen2, bos=False),
    "qwen3": Family(_qwen3, bos=False),
    "qwen3_moe": Family(_qwen3_moe, bos=False),
    "mixtral": Family(_mixtral),
}
