"""The formats that a run can be written in: which writer, and how large."""

from pathlib import Path

from quantkit import report
from quantkit.errors import QuantkitError
from quantkit.families.family import Family
from quantkit.model.checkpoint import TensorSource
from quantkit.model.config import text_defaults
from quantkit.plan import make_plan
from quantkit.recipe import Recipe
from quantkit.store import Store
from quantkit.types import Json, Plan
from quantkit.write import gguf, onnx
from quantkit.write.compressed_tensors import FORMAT, CompressedTensors
from quantkit.write.gguf.artefact import GgufFile
from quantkit.write.onnx.artefact import OnnxFolder

FORMATS = (FORMAT, gguf.FORMAT, onnx.FORMAT)
Writer = CompressedTensors | GgufFile | OnnxFolder


def told(name: str, tokenizer: Path | None) -> str:
    """What sizes of a format are told of: a GGUF carries its tokenizer, where one is at hand."""
    return name if name != gguf.FORMAT or tokenizer else f"{name} without its tokenizer"


def other_sizes(recipe: Recipe, plan: Plan, model: str, config: Json, tokenizer: Path | None, family: Family) -> Json:
    """Format that the recipe does not ask for -> its bytes, or why it refuses the recipe; with a target they are open."""
    found: Json = {}
    for name in () if recipe.has_target else FORMATS:
        if name not in recipe.formats:
            try:  # planned anew: what shares a scheme depends on who will read it
                alone = recipe.model_copy(update={"formats": [name]})
                made = make_plan(alone, config, plan.entries, family=family)
                found[told(name, tokenizer)] = writer_of(name, alone, made, model, config, tokenizer).bytes
            except QuantkitError as refusal:
                found[name] = str(refusal)
    return report.sizes_report(found, plan)


def writer_of(
    name: str,
    recipe: Recipe,
    plan: Plan,
    model: str,
    config: Json,
    tokenizer: Path | None,
    checkpoint: TensorSource | None = None,
    store: Store | None = None,
    out: Path | None = None,
) -> Writer:
    """The writer of one format; without checkpoint, store and folder it only knows sizes."""
    folder = out / name if out else None
    if name == FORMAT:
        return CompressedTensors(plan, recipe.experts_layout, checkpoint, store, folder)
    if name == onnx.FORMAT:
        return OnnxFolder(plan, config, recipe.onnx.accuracy_level, recipe.onnx.embeddings, checkpoint, store, folder)
    types, pre = recipe.gguf.types, recipe.gguf.pre_tokenizer
    return GgufFile(plan, text_defaults(config), model, types, pre, tokenizer, checkpoint, store, folder)
