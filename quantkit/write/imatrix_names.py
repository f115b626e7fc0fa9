"""What llama.cpp calls the linears of a block. The only file that an importance matrix needs of a family."""

import re
from functools import cache
from typing import Any

import gguf

from quantkit.errors import WriteError

ARCHITECTURES = {
    "gemma4": gguf.MODEL_ARCH.GEMMA4,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
    "gemma3n": gguf.MODEL_ARCH.GEMMA3N,
    "llama": gguf.MODEL_ARCH.LLAMA,  # Mistral, Qwen2 and Qwen3 have other architectures there, and the same names
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
}
ONE_TENSOR = {"gemma4": ("gate_proj", "up_proj")}  # experts' gate and up in one tensor there, as gate_up_proj
_EXPERT = re.compile(r"(.*experts)\.(\d+)\.(\w+)")


def split_expert(local: str) -> tuple[str, int | None]:
    """("mlp.experts.down_proj", 17) of an expert's linear; any other is itself."""
    match = _EXPERT.fullmatch(local)
    return (f"{match[1]}.{match[3]}", int(match[2])) if match else (local, None)


def gguf_name(family: str, index: int, module: str) -> str | None:
    """blk.3.ffn_down_exps.weight of "mlp.experts.down_proj"; None of a linear that llama.cpp does not have.

    Raises:
        WriteError: a family that llama.cpp does not know.
    """
    parent, _, leaf = module.rpartition(".")
    if parent.endswith("experts") and leaf in ONE_TENSOR.get(family, ()):
        module = f"{parent}.gate_up_proj"
    found = _map(family, index + 1).get_name(f"model.layers.{index}.{module}.weight", try_suffixes=(".weight",))
    return str(found) if found else None


@cache
def _map(family: str, blocks: int) -> Any:
    if family not in ARCHITECTURES:
        raise WriteError(
            f"{family}: no importance matrix for this family; llama.cpp's name of it is not known ({', '.join(ARCHITECTURES)})"
        )
    return gguf.get_tensor_name_map(ARCHITECTURES[family], blocks)
