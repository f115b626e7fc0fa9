"""Checkpoints of a real width with as many blocks as asked, written shard by shard: never whole in memory.

    python benchmarks/wide.py FOLDER --blocks 2 [--shape 26b-a4b|dense-512|experts-128] [--vocabulary 262144]

26b-a4b is the public shape of Gemma 4's: hidden 2816, every 6th layer full attention with keys that serve as values, 128 experts of 704
with 8 at work, a shared MLP of 2112, a vocabulary of 262,144 with the head tied to it. dense-512 is a Llama of width 512; experts-128 has
the experts and layers of the first at a width of 256, where a rival that sends every token to every expert ends in minutes. The tokenizer
is the reference model's, whose ids are the first of the vocabulary, so that text can be fed. With 2 blocks of 26b-a4b the last is a
full-attention one, whose o_proj has the largest Gram (8192 x 8192).

Weights are seeded and structured as trained ones are: a part of low rank, noise with heavy tails, rows of unequal size, and a few
channels of the residual stream that embeddings and projections write ten times louder. Attention is neither flat nor a single token's,
and a router sends every expert some tokens: `python benchmarks/scale.py` prints how many.
"""

import argparse
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from quantkit.recipe import reference_model
from quantkit.store import Piece, write_safetensors

VOCABULARY = 262144
RANK, LOW_RANK = 16, 0.5  # of the part of low rank: its rank, its share of a matrix's power
TAIL = 0.1  # x + TAIL x^3 of a normal x: kurtosis 9
LOUD, LOUDER = 5, 10.0  # channels of the residual stream, how much louder they are written
PART = 4096  # rows of an embedding that are made at a time


@dataclass(frozen=True, slots=True)
class Shape:
    """The widths of a model; the default is the 26B-A4B's."""

    hidden: int = 2816
    experts: int = 128  # 0: a Llama, of `heads` heads of `head`, and an MLP of `mlp`
    active: int = 8
    expert: int = 704
    mlp: int = 2112
    heads: int = 16
    head: int = 256
    kv: int = 8
    full_head: int = 512
    full_kv: int = 2
    every: int = 6  # so many blocks make a full-attention one
    vocabulary: int = VOCABULARY


SHAPES = {
    "26b-a4b": Shape(),
    "dense-512": Shape(hidden=512, experts=0, mlp=1408, heads=8, head=64, kv=4, vocabulary=4096),
    "experts-128": Shape(hidden=256, expert=96, mlp=256, heads=8, head=32, kv=4, full_head=64, full_kv=2, vocabulary=4096),
}


def config(blocks: int, vocabulary: int = VOCABULARY, shape: Shape = SHAPES["26b-a4b"]) -> dict:
    """config.json of a text-only model of a shape; of Gemma 4 the last block is always a full-attention one."""
    if not shape.experts:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "head_dim": shape.head,
            "hidden_act": "silu",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp,
            "max_position_embeddings": 8192,
            "num_attention_heads": shape.heads,
            "num_hidden_layers": blocks,
            "num_key_value_heads": shape.kv,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "vocab_size": vocabulary,
        }
    full = {i for i in range(blocks) if i % shape.every == shape.every - 1} | {blocks - 1}
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "dtype": "bfloat16",
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "final_logit_softcapping": 30.0,
        "global_head_dim": shape.full_head,
        "head_dim": shape.head,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": shape.hidden,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": shape.mlp,
        "layer_types": ["full_attention" if i in full else "sliding_attention" for i in range(blocks)],
        "max_position_embeddings": 8192,
        "moe_intermediate_size": shape.expert,
        "num_attention_heads": shape.heads,
        "num_experts": shape.experts,
        "num_global_key_value_heads": shape.full_kv,
        "num_hidden_layers": blocks,
        "num_key_value_heads": shape.kv,
        "num_kv_shared_layers": 0,
        "rms_norm_eps": 1e-6,
        "sliding_window": 1024,
        "tie_word_embeddings": True,
        "top_k_experts": shape.active,
        "vocab_size": vocabulary,
    }


def block_shapes(index: int, full: bool, shape: Shape = SHAPES["26b-a4b"]) -> dict[str, tuple[int, ...]]:
    """Tensors of one block; 1-D ones are norms and scalars."""
    head, kv = (shape.full_head, shape.full_kv) if full else (shape.head, shape.kv)
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (shape.heads * head, shape.hidden),
        "self_attn.k_proj.weight": (kv * head, shape.hidden),
        "self_attn.o_proj.weight": (shape.hidden, shape.heads * head),
        "mlp.gate_proj.weight": (shape.mlp, shape.hidden),
        "mlp.up_proj.weight": (shape.mlp, shape.hidden),
        "mlp.down_proj.weight": (shape.hidden, shape.mlp),
    }
    if not full:
        shapes["self_attn.v_proj.weight"] = (kv * head, shape.hidden)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if shape.experts:
        shapes |= {
            "self_attn.q_norm.weight": (head,),
            "self_attn.k_norm.weight": (head,),
            "experts.gate_up_proj": (shape.experts, 2 * shape.expert, shape.hidden),
            "experts.down_proj": (shape.experts, shape.hidden, shape.expert),
            "router.proj.weight": (shape.experts, shape.hidden),
            "router.scale": (shape.hidden,),
            "router.per_expert_scale": (shape.experts,),
            "layer_scalar": (1,),
        }
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm", "pre_feedforward_layernorm_2"]
        norms += ["post_feedforward_layernorm_1", "post_feedforward_layernorm_2"]
    shapes |= {f"{norm}.weight": (shape.hidden,) for norm in norms}
    return {f"model.layers.{index}.{name}": shape for name, shape in shapes.items()}


def tensor(name: str, seed: int, shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
    """A tensor's data, made when it is written; its name says which role it has."""
    kind = vector if len(shape) == 1 else matrix
    return lambda: kind(name, torch.Generator().manual_seed(seed), shape)


def vector(name: str, generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Norms, log-normal around 1; those of queries and keys so small that attention's logits are a few units wide."""
    if name.endswith(("layer_scalar", "router.scale", "per_expert_scale")):
        return torch.ones(shape, dtype=torch.bfloat16)
    middle = 0.35 if name.endswith(("q_norm.weight", "k_norm.weight")) else 0.4 if ".post_" in name and "layernorm_" not in name else 1.0
    return (middle * torch.exp(0.3 * torch.randn(shape, generator=generator))).bfloat16()


def matrix(name: str, generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Matrices of unit gain (embeddings of unit rows, routers of logits a few units wide); what writes the residual has loud channels."""
    rows, columns = shape[-2:]
    embeds = name.endswith("embed_tokens.weight")
    writes = embeds or name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
    loud = torch.ones(columns if embeds else rows)
    if writes:
        loud[torch.randperm(len(loud), generator=torch.Generator().manual_seed(0))[:LOUD]] = LOUDER  # the same in every block
    shared = torch.randn(RANK, columns, generator=generator) * math.sqrt(LOW_RANK / RANK)
    gain = (1.5 if "router" in name else 1.0 / math.sqrt(columns)) / math.sqrt(1 + 6 * TAIL + 15 * TAIL**2)
    out = torch.empty(shape, dtype=torch.bfloat16)
    for part in out.view(-1, rows, columns) if len(shape) == 3 else out.split(PART):
        made = torch.randn(part.shape, generator=generator)
        made.addcmul_(made.square(), made, value=TAIL).mul_(math.sqrt(1 - LOW_RANK))
        made.addmm_(torch.randn(len(part), RANK, generator=generator), shared)
        size = torch.exp(0.3 * torch.randn(len(part), 1, generator=generator)) * gain
        part.copy_(made.mul_(size).mul_(loud if embeds else loud[:, None]) if writes else made.mul_(size))
    return out


def make(folder: Path, blocks: int, shape: Shape = SHAPES["26b-a4b"]) -> int:
    """Write the checkpoint, a shard a block; returns the bytes of its largest block."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(reference_model() / name, folder / name)
    about = config(blocks, shape.vocabulary, shape)
    (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n")
    layer_types = about.get("layer_types", [""] * blocks)
    weight_map: dict[str, str] = {}
    largest = seed = 0
    ends = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden), "model.norm.weight": (shape.hidden,)}
    for index in range(-1, blocks):
        shapes = ends if index < 0 else block_shapes(index, layer_types[index] == "full_attention", shape)
        pieces = []
        for name, of in shapes.items():
            pieces.append(Piece(name, torch.bfloat16, of, tensor(name, seed, of)))
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
    parser.add_argument("--shape", choices=SHAPES, default="26b-a4b")
    parser.add_argument("--vocabulary", type=int)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.vocabulary:
        shape = replace(shape, vocabulary=arguments.vocabulary)
    print(f"{asdict(shape)}\nlargest block: {make(arguments.folder, arguments.blocks, shape):,} bytes")
