"""A checkpoint of the 26B-A4B's real width with as many blocks as asked, written tensor by tensor: it is never whole in memory.

    python benchmarks/wide.py FOLDER --blocks 2

Public shape: hidden 2816, every 6th layer full attention with keys that serve as values, 128 experts of 704 with 8 at work, a shared
MLP of 2112. Weights are seeded noise, three input channels of each matrix eight times louder; the vocabulary is the reference
tokenizer's, so that text can be fed. With 2 blocks the last is a full-attention one, whose o_proj has the largest Gram (8192 x 8192).
"""

import argparse
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from quantkit.recipe import reference_model
from quantkit.store import Piece, write_safetensors

HIDDEN, EXPERTS, ACTIVE, EXPERT_WIDTH, MLP_WIDTH = 2816, 128, 8, 704, 2112
HEADS, HEAD, KV, FULL_HEAD, FULL_KV = 16, 256, 8, 512, 2


def config(blocks: int, vocabulary: int) -> dict:
    """config.json of a text-only model of that shape; the last block is always a full-attention one."""
    full = {i for i in range(blocks) if i % 6 == 5} | {blocks - 1}
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "dtype": "bfloat16",
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "final_logit_softcapping": 30.0,
        "global_head_dim": FULL_HEAD,
        "head_dim": HEAD,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": HIDDEN,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": MLP_WIDTH,
        "layer_types": ["full_attention" if i in full else "sliding_attention" for i in range(blocks)],
        "max_position_embeddings": 8192,
        "moe_intermediate_size": EXPERT_WIDTH,
        "num_attention_heads": HEADS,
        "num_experts": EXPERTS,
        "num_global_key_value_heads": FULL_KV,
        "num_hidden_layers": blocks,
        "num_key_value_heads": KV,
        "num_kv_shared_layers": 0,
        "rms_norm_eps": 1e-6,
        "sliding_window": 1024,
        "tie_word_embeddings": True,
        "top_k_experts": ACTIVE,
        "vocab_size": vocabulary,
    }


def block_shapes(index: int, full: bool) -> dict[str, tuple[int, ...]]:
    """Tensors of one block; 1-D ones are norms and scalars."""
    head, kv = (FULL_HEAD, FULL_KV) if full else (HEAD, KV)
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (HEADS * head, HIDDEN),
        "self_attn.k_proj.weight": (kv * head, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HEADS * head),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        "mlp.gate_proj.weight": (MLP_WIDTH, HIDDEN),
        "mlp.up_proj.weight": (MLP_WIDTH, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, MLP_WIDTH),
        "experts.gate_up_proj": (EXPERTS, 2 * EXPERT_WIDTH, HIDDEN),
        "experts.down_proj": (EXPERTS, HIDDEN, EXPERT_WIDTH),
        "router.proj.weight": (EXPERTS, HIDDEN),
        "router.scale": (HIDDEN,),
        "router.per_expert_scale": (EXPERTS,),
        "layer_scalar": (1,),
    }
    if not full:
        shapes["self_attn.v_proj.weight"] = (kv * head, HIDDEN)
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        shapes[f"{norm}_layernorm.weight"] = (HIDDEN,)
    for norm in ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2"):
        shapes[f"{norm}.weight"] = (HIDDEN,)
    return {f"model.layers.{index}.{name}": shape for name, shape in shapes.items()}


def tensor(seed: int, shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
    """Seeded noise, made when it is written: norms near 1, matrices of unit gain with three loud input channels."""

    def make() -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        if len(shape) == 1:
            return (1 + 0.1 * torch.randn(shape, generator=generator)).bfloat16()
        out = torch.empty(shape, dtype=torch.bfloat16)
        for part in out.view(-1, *shape[-2:]):
            noise = torch.randn(part.shape, generator=generator) / math.sqrt(shape[-1])
            noise[:, :: shape[-1] // 3] *= 8
            part.copy_(noise)
        return out

    return make


def make(folder: Path, blocks: int) -> int:
    """Write the checkpoint, a shard a block; returns the bytes of its largest block."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(reference_model() / name, folder / name)
    vocabulary = 4096
    about = config(blocks, vocabulary)
    (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n")
    weight_map: dict[str, str] = {}
    largest = seed = 0
    ends = {"model.embed_tokens.weight": (vocabulary, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for index in range(-1, blocks):
        shapes = ends if index < 0 else block_shapes(index, about["layer_types"][index] == "full_attention")
        pieces = []
        for name, shape in shapes.items():
            pieces.append(Piece(name, torch.bfloat16, shape, tensor(seed, shape)))
            seed += 1
        shard = f"model-{index + 2:05d}-of-{blocks + 1:05d}.safetensors"
        write_safetensors(folder / shard, pieces, {"format": "pt"})
        weight_map |= dict.fromkeys(shapes, shard)
        largest = max(largest, sum(piece.bytes for piece in pieces) if index >= 0 else 0)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}) + "\n")
    return largest


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=2)
    arguments = parser.parse_args()
    print(f"largest block: {make(arguments.folder, arguments.blocks):,} bytes")
