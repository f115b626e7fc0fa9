"""A config.json as transformers understands it."""

import re
from typing import Any

import transformers

from quantkit.errors import CheckpointError
from quantkit.types import Json

MOST = 10_000  # layers, experts, heads


def parse_config(config: Json) -> Any:
    """transformers' own object; raises whatever transformers raises, and ValueError where it would build modules without end."""
    _check_counts(config)
    fields = {k: _number(v) for k, v in config.items() if k not in ("quantization_config", "auto_map")}
    return transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)


def _check_counts(config: Json) -> None:
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value)
        elif isinstance(value, int) and value > MOST and re.search(r"(layers?|experts|blocks|heads)$", key):
            raise ValueError(f"{key} is {str(value)[:20]}, and no model has more than {MOST:,}")


def _number(value: Any) -> Any:
    """transformers writes an infinite float as {"__float__": "Infinity"}, for JSON has none, and reads it back in from_pretrained only."""
    if isinstance(value, dict):
        return float(value["__float__"]) if value.keys() == {"__float__"} else {key: _number(one) for key, one in value.items()}
    return [_number(one) for one in value] if isinstance(value, list) else value


def text_defaults(config: Json) -> Json:
    """The text part of a config.json with the defaults that its transformers class fills in: published ones leave many out.

    Raises:
        CheckpointError: transformers cannot read it.
    """
    try:
        return dict(parse_config(config).get_text_config().to_dict())
    except Exception as problem:
        raise CheckpointError(f"config.json: transformers cannot read it ({said(problem)})") from None


def said(problem: BaseException) -> str:
    """Another library's exception in one line."""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:160]}"
