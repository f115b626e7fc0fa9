"""The house rules: who may import whom. Read with `ast`, so nothing is imported and nothing is slow."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "quantkit"

# A room may import every floor below its own, and nothing beside or above it.
FLOORS = (
    {"cli"},
    {"release"},  # what becomes of a run that is done
    {"pipeline"},
    {"target"},
    {"run", "formats", "inputs"},
    {"plan", "discover", "calibrate", "solve", "write", "evaluate", "publish"},  # stages: strangers to one another
    {"recipe", "families", "model", "grid", "store", "report", "hf", "ranks"},  # shelves: strangers to one another too
    {"types", "errors", "suites", "disk", "finite"},  # nouns, and how a file is written
)
SHELVES = FLOORS[-2]
SEES = {  # of the shelves; cli, pipeline and run see all of them
    "plan": {"recipe", "families"},
    "discover": {"recipe", "families", "model"},  # recipe: to read a table's file
    "calibrate": {"recipe", "model"},
    "solve": {"grid"},
    "write": {"families", "model", "grid", "store"},
    "evaluate": {"recipe", "report", "hf"},  # never model, solve, write: a stranger to what made the files
    "publish": {"report", "hf"},  # hf: to say what transformers opens by itself
}
EVERYWHERE = {"torch", "numpy", "safetensors", "jaxtyping"}
ONLY = {  # every other library has its rooms
    "yaml": {"recipe", "publish"},  # publish: the front matter of model cards, under rules of its own
    "pydantic": {"recipe", "suites"},
    "click": {"cli"},
    "rich": {"cli"},
    "tqdm": {"cli"},  # to keep it quiet
    "transformers": {"model", "calibrate", "evaluate", "hf", "cli"},  # cli: to keep it quiet
    "huggingface_hub": {"model", "publish"},  # down here, up there
    "jinja2": {"publish"},
    "matplotlib": {"publish"},
    "markdown_it": {"publish"},  # to tell a card's text from its code
    "compressed_tensors": {"hf", "publish"},  # publish: verify decodes as engines do, not as we wrote
    "datasets": {"calibrate"},
    "pyarrow": {"calibrate"},
    "onnx_ir": {"write", "publish"},
    "onnxscript": {"write"},
    "gguf": {"write", "evaluate", "publish"},  # publish: verify reads what write wrote
    "lm_eval": {"evaluate"},
    "vllm": {"evaluate"},
    "llama_cpp": {"evaluate"},
    "onnxruntime": {"evaluate"},
    "jsonschema": {"evaluate"},
}
NOT_EVEN = {  # of what all others may use
    "families": EVERYWHERE,  # tables are plain data
    "recipe": EVERYWHERE,
    "errors": EVERYWHERE,
    "suites": EVERYWHERE,
    "disk": EVERYWHERE,
    "solve": {"safetensors", "pathlib", "json", "os"},  # tensors in, tensors out
    "grid": {"safetensors", "pathlib", "json", "os"},
}
HELP_LOADS = (
    "quantkit",
    "quantkit.cli",
    "quantkit.cli.common",
    "quantkit.cli.families",
    "quantkit.cli.release",
    "quantkit.__main__",
)  # when imported: no library but click
LONGEST = 500

FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def module_name(path: Path) -> str:
    return ".".join(("quantkit", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
ENTRIES = ("quantkit", "quantkit.__main__")  # stand before the house


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Every imported name in full, and whether it is imported with the module (not inside a function, not for the type checker)."""
    tree = ast.parse(source)
    later = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.Lambda)) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in later) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            yield from ((f"{dots}{node.module or ''}.{alias.name}", id(node) not in later) for alias in node.names)


def violations(module: str, source: str) -> list[str]:
    """What a module's imports break, in words."""
    here, found = module.partition(".")[2].partition(".")[0], []
    for name, at_once in imports(source):
        top, _, rest = name.partition(".")
        there = rest.split(".")[0]
        if not top:
            found.append(f"{name}: write the import in full")
        elif top in NOT_EVEN.get(here, ()):
            found.append(f"{here} must not know {top}")
        elif top in sys.stdlib_module_names:
            continue
        elif top != "quantkit":
            if top not in EVERYWHERE and here not in ONLY.get(top, ()):
                found.append(f"only {sorted(ONLY.get(top, ()))} may import {top}")
            if module in HELP_LOADS and at_once and top != "click":
                found.append(f"{top} would be loaded by --help")
        elif module in ENTRIES or there in ("", "__version__"):
            continue
        elif there == here:
            if here == "families" and module != "quantkit.families" and not rest.startswith("families.family."):
                found.append(f"{module} copies from {rest}; share it in families/family.py")
        elif there not in FLOOR or here not in FLOOR:
            found.append(f"{here} or {there} stands on no floor")
        elif FLOOR[there] <= FLOOR[here]:
            found.append(f"{here} imports {there}, which is beside or above it")
        elif there in SHELVES and there not in SEES.get(here, SHELVES):
            found.append(f"{here} is not meant to know {there}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_keep_the_rules(module):
    assert violations(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    "module, line",
    [
        ("quantkit.solve.awq", "from quantkit.write.compressed_tensors import FORMAT"),
        ("quantkit.solve.awq", "from quantkit import model"),
        ("quantkit.solve.awq", "from quantkit.pipeline import quantize"),
        ("quantkit.solve.awq", "from pathlib import Path"),
        ("quantkit.write.gguf", "from quantkit.report import write_json"),
        ("quantkit.store", "import quantkit.report"),
        ("quantkit.model.hub", "from quantkit.recipe import load_recipe"),
        ("quantkit.model.hub", "def late():\n    import yaml"),
        ("quantkit.types", "from quantkit.errors import StoreError"),
        ("quantkit.families.llama", "from quantkit.families.gemma3 import FAMILY"),
        ("quantkit.families.llama", "from quantkit.families import gemma3"),
        ("quantkit.families.llama", "import torch"),
        ("quantkit.publish.card", "from transformers import AutoModel"),
        ("quantkit.evaluate.session", "from quantkit.model.blocks import Stream"),
        ("quantkit.evaluate.session", "from quantkit.store import Store"),
        ("quantkit.evaluate.items", "import requests"),
        ("quantkit.discover.folds", "from quantkit.plan import make_plan"),
        ("quantkit.discover.folds", "import transformers"),
        ("quantkit.model.hub", "from .checkpoint import Checkpoint"),
        ("quantkit.model.hub", "from . import checkpoint"),
        ("quantkit.cli", "import torch"),
        ("quantkit.odds_and_ends", "from quantkit.types import Plan"),
    ],
)
def test_the_rules_catch(module, line):
    assert len(violations(module, line)) == 1


def test_every_room_has_a_floor():
    assert {module.split(".")[1] for module in MODULES if module not in ENTRIES} == set(FLOOR)


def test_no_import_goes_round():
    graph: dict[str, set[str]] = {}
    for module in MODULES.keys() - set(ENTRIES):
        for name, _ in imports(MODULES[module].read_text()):
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name and name not in ENTRIES:
                graph.setdefault(module, set()).add(name)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_too_long(module):
    assert len(MODULES[module].read_text().splitlines()) <= LONGEST
