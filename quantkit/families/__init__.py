"""The families that quantkit knows: one table each, proven on random twins by tests/test_families.py."""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantkit.errors import FamilyError
from quantkit.families import gemma3, gemma3n, gemma4, llama, mixtral, qwen3_moe
from quantkit.families.family import Family, Fold, Gguf

FAMILIES: tuple[Family, ...] = tuple(module.FAMILY for module in (gemma4, gemma3, gemma3n, llama, qwen3_moe, mixtral))


def find(config: Mapping[str, Any]) -> tuple[Family, str]:
    """The table of a config.json and the model_type that named it; a nested text_config speaks for the text model.

    Raises:
        FamilyError: no table knows the architecture; names the nearest one that is known and the folder to edit.
    """
    types = _types(config)
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
        f"(known: {', '.join(known)}); `quantkit families discover` finds its table, and `--family discovered` quantizes with it (tables "
        "that ship are listed in quantkit/families/__init__.py)"
    )


def _types(config: Mapping[str, Any]) -> list[Any]:
    text = config.get("text_config")
    return [config.get("model_type"), text.get("model_type") if isinstance(text, Mapping) else None]


def named_by(family: Family, config: Mapping[str, Any]) -> str:
    """The model_type by which a table knows a config.json.

    Raises:
        FamilyError: the table speaks of others.
    """
    for model_type in _types(config):
        if model_type in family.model_types:
            return str(model_type)
    raise FamilyError(f"{family.place}: a table of {', '.join(family.model_types)}; config.json says {config.get('model_type')!r}")


def from_table(table: Mapping[str, Any], origin: str) -> Family:
    """A family from plain data, a YAML file's."""
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    fields["folds"] = tuple(Fold(fold["producer"], tuple(fold["consumers"])) for fold in table["folds"])
    fields["fused"] = {tensor: tuple(parts) for tensor, parts in table["fused"].items()}
    fields["stages"] = tuple(tuple(stage) for stage in table["stages"])
    return replace(Family(**fields), origin=origin)


def gguf_of(family: str, model_type: str) -> Gguf | None:
    """How llama.cpp loads a shipped family's model; None where no shipped table tells."""
    return next((one.gguf.get(model_type) for one in FAMILIES if one.name == family), None)
