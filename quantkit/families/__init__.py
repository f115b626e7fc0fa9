"""The families that quantkit knows: one table each, proven on random twins by tests/test_families.py."""

import difflib
from collections.abc import Mapping
from typing import Any

from quantkit.errors import FamilyError
from quantkit.families import gemma3, gemma3n, gemma4, llama, mixtral, qwen3_moe
from quantkit.families.family import Family

FAMILIES: tuple[Family, ...] = tuple(module.FAMILY for module in (gemma4, gemma3, gemma3n, llama, qwen3_moe, mixtral))


def find(config: Mapping[str, Any]) -> tuple[Family, str]:
    """The table of a config.json and the model_type that named it; a nested text_config speaks for the text model.

    Raises:
        FamilyError: no table knows the architecture; names the nearest one that is known and the folder to edit.
    """
    text = config.get("text_config")
    types = [config.get("model_type"), text.get("model_type") if isinstance(text, Mapping) else None]
    for model_type in types:
        for family in FAMILIES:
            if model_type in family.model_types:
                return family, str(model_type)
    if config.get("auto_map"):
        raise FamilyError(
            f"config.json: {config.get('model_type')!r} is run by code that the model brings (auto_map), and quantkit "
            "runs no code of models: trust_remote_code stays off"
        )
    known = [t for family in FAMILIES for t in family.model_types]
    asked = str(next((t for t in types if t), config.get("architectures") or "nothing"))
    near = difflib.get_close_matches(asked, known, n=1, cutoff=0.0)[0]
    raise FamilyError(
        f"config.json: the architecture {asked!r} is not known; the nearest known is {near!r} "
        f"(known: {', '.join(known)}); add a table to quantkit/families/ and list it in quantkit/families/__init__.py"
    )
