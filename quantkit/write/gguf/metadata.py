"""The keys of a file: what llama.cpp must know to load it. Values go to GGUFWriter by their Python type."""

import math
from collections.abc import Sequence
from typing import Any

from quantkit import families
from quantkit.errors import WriteError
from quantkit.families.family import Gguf
from quantkit.types import Json, Plan

FILE_TYPES = {  # llama.cpp's llama_ftype: what most of a file's weights are
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16,
    "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25, "BF16": 32,
}  # fmt: skip
LARGEST_FLOAT = 3.4028234663852886e38  # of 32 bits
QUANTIZATION_VERSION = 2  # of ggml's block layouts


def family_table(plan: Plan) -> Gguf:
    """How llama.cpp loads the plan's model.

    Raises:
        WriteError: it does not, as far as the family's table knows.
    """
    table = families.gguf_of(plan.family, plan.model_type)
    if table is None:
        raise WriteError(f"GGUF of {plan.model_type}: no shipped table says how llama.cpp loads the family {plan.family}")
    return table


def keys_of(table: Gguf, config: Json, name: str, label: str, tokenizer: Json | None) -> dict[str, Any]:
    """Every key in the order of the file.

    Args:
        config: the text model's, every default filled in.
        label: the type of most weights: Q4_0.
        tokenizer: see `tokenizer_keys`; None where only the rest is known.

    Raises:
        WriteError: a config that no key can be made of.
    """
    general = {
        "general.type": "model",
        "general.name": name,
        "general.quantized_by": "quantkit",
        "general.file_type": FILE_TYPES[label],
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    try:
        own = {f"{table.architecture}.{key}": value for key, value in table.metadata(config).items()}
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as problem:
        line = f"{type(problem).__name__}: {' '.join(str(problem).split())[:80]}"
        raise WriteError(f"the model's config.json gives no keys for GGUF ({line}); is it damaged?") from None
    return {**general, **own, **{f"tokenizer.{key}": value for key, value in (tokenizer or {}).items()}}


def add_keys(writer: Any, keys: dict[str, Any]) -> None:
    """Put keys into a GGUFWriter; arrays are typed by their first element.

    Raises:
        WriteError: a number of the config that 32 bits do not hold.
    """
    for key, value in keys.items():
        numbers, whole = (value, range(-(1 << 31), 1 << 31)) if isinstance(value, (list, tuple)) else ([value], range(1 << 32))
        for number in numbers:
            if key.endswith(".activation_sparsity_scale") and number == -math.inf:
                continue  # llama.cpp's word for a layer without sparsity
            if (isinstance(number, int) and number not in whole) or (isinstance(number, float) and not abs(number) <= LARGEST_FLOAT):
                raise WriteError(f"{key}: {str(number)[:40]} is more than GGUF holds there; is the model's config.json damaged?")
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def label_of(sizes: Sequence[tuple[str, int]]) -> str:
    """What a file is called by, from (type, weights) of its matrices: the type of most weights; Q4_K and Q5_K with an M where others have
    more bits, as llama.cpp's own mixes."""
    total: dict[str, int] = {}
    for kind, count in sizes:
        total[kind] = total.get(kind, 0) + count
    most = max(total, key=lambda kind: total[kind], default="F32")
    if most in ("Q4_K", "Q5_K"):
        return f"{most}_{'M' if 'Q6_K' in total else 'S'}"
    return most
