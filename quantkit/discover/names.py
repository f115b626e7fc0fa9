"""A table from the names and shapes of a checkpoint's tensors, where no class of transformers tells more: nothing is proven by it.

Matrices called *.weight inside the decoder blocks are linears; embeddings, norms, convolutions, routers and whatever is narrow stay. No
scale may move, so plain rounding is all that it serves.
"""

import re
from collections.abc import Mapping

from quantkit.discover.calls import starred
from quantkit.discover.table import NARROW
from quantkit.errors import FamilyError
from quantkit.families.family import ENDS, IGNORE_TOWERS, TOWERS, Family, in_block, outside_block
from quantkit.types import Entry, Json

NAMES = "names"
NO_LINEAR = re.compile(r"norm($|\.)|(^|[._])(ln|embed\w*|conv\w*)($|[._\d])|(^|\.)(gate|router)($|\.)")  # gate_proj is a linear


def by_names(config: Json, entries: Mapping[str, Entry]) -> Family:
    """The table; a matrix that is a linear in one block and none in another stays in all.

    Raises:
        FamilyError: config.json names no model type, or no tensor looks like a decoder block's linear.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise FamilyError("config.json: no model_type; is it the config of a language model?")
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for name, entry in entries.items():
        if (place := in_block(name)) is not None:
            shapes.setdefault(starred(place[2]), []).append(entry.shape if entry.dtype.is_floating_point else ())
    linears = [
        tensor.removesuffix(".weight")
        for tensor, found in shapes.items()
        if tensor.endswith(".weight")
        and NO_LINEAR.search(tensor.removesuffix(".weight")) is None
        and all(len(shape) == 2 and min(shape) >= NARROW for shape in found)
    ]
    if not linears:
        raise FamilyError("the checkpoint holds no matrix called (model.)layers.N.….weight; use a tool that knows its layout")
    kept = [tensor for tensor in shapes if tensor.removesuffix(".weight") not in linears]
    matrices = [tensor.removesuffix(".weight") for tensor in kept if any(len(shape) >= 2 for shape in shapes[tensor])]
    patterns = (rf"re:.*\b{re.escape(name)}$".replace(r"\*", r"\d+") for name in matrices)
    nested = isinstance(config.get("text_config"), Mapping)
    outside = (starred(outside_block(name)) for name in entries if in_block(name) is None)
    return Family(
        name=kind,
        model_types=(kind,),
        linears=tuple(linears),
        kept=tuple(kept),
        outside=tuple(dict.fromkeys((*ENDS, *outside, *(TOWERS if nested else ())))),
        folds=(),
        ignore=("lm_head", *patterns, *((IGNORE_TOWERS,) if nested else ())),
        stages=(tuple(linears),),
        origin=NAMES,
    )
