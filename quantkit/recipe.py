"""The YAML that people write, read strictly: recipes (what to do), calibration mixes (what to feed), suites (what to ask an artefact),
gates (what it must reach) and tables of families that are not shipped. Nothing else reads YAML."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from quantkit.errors import CalibrationError, EvaluationError, FamilyError, QuantkitError, RecipeError
from quantkit.suites import Gate, Harness, Suite

HERE = Path(__file__).parent
UNITS = {"": 1, "b": 1} | {f"{unit}{'i' * (step == 1024)}b": step**n for step in (1000, 1024) for n, unit in enumerate("kmgt", 1)}
GROUPS = (32, 64, 128)
DATA_FILES = (".jsonl", ".parquet", ".txt")
_DATA = " or ".join((", ".join(DATA_FILES[:-1]), DATA_FILES[-1]))
M = TypeVar("M", bound=BaseModel)


def size_in_bytes(text: str) -> int:
    """8GiB, 14.4 GB, 1000.

    Raises:
        ValueError: no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-zA-Z]*)", text)
    if match is None or match[2].lower() not in UNITS:
        raise ValueError(f"{text!r} is no size; give one such as 8GiB")
    return round(float(match[1]) * UNITS[match[2].lower()])


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Weights(_Strict):
    """A storage scheme: 4 or 8 bits, a scale for every `group` columns ("row": one for the whole row); or a K-quant of GGUF.

    q4_k_m and q4_k_s are llama.cpp's mixes: q4_k, with more bits for values and down projections of some layers.
    """

    bits: Literal[2, 3, 4, 5, 6, 7, 8] = 4
    group: Literal[32, 64, 128, "row"] = 32
    symmetric: bool = True
    signed: bool = False  # symmetric scales may be negative, so that a group uses all 2^bits codes; plain rounding ignores it
    grid: Literal["integer", "q4_k", "q5_k", "q6_k", "iq4_nl", "q4_k_m", "q4_k_s"] = "integer"

    @model_validator(mode="after")
    def _says_it_once(self) -> "Weights":
        if self.grid != "integer" and (self.bits, self.group, self.symmetric) != (4, 32, True):  # the defaults: left out
            raise ValueError(f"grid {self.grid} has its own bits, group and symmetry; leave them out")
        return self


class Override(_Strict):
    """Another scheme for some linears, or none: `match` is one or more patterns of local names, "*" takes anything."""

    match: str | Annotated[list[str], Field(min_length=1)]
    layers: Annotated[list[int], Field(min_length=1)] | None = None  # only in these decoder blocks
    weights: Weights | None = None
    keep: bool = False  # leave them in the checkpoint's own precision

    @model_validator(mode="after")
    def _says_one_thing(self) -> "Override":
        if self.keep and self.weights is not None:
            raise ValueError("give either weights or keep: true")
        return self

    def patterns(self) -> list[str]:
        return [self.match] if isinstance(self.match, str) else self.match


class Search(_Strict):
    """How hard the solver tries, and what it lets the next block see. Every step can be switched off."""

    folds: bool = True  # AWQ scales
    exponents: Annotated[int, Field(ge=2, le=100)] = 20  # steps of the scale grid; identity is always a candidate too
    rows: Annotated[int, Field(ge=16)] = 512  # rows of a matrix that a candidate is judged on
    sensitivity: bool = True  # rows count by how much they move the block's output: a random probe backwards
    shrinks: Annotated[int, Field(ge=1, le=40)] = 10  # clip candidates of a group's range, 1.0 downwards
    expert_floor: Annotated[int, Field(ge=0)] = 128  # an expert with so many tokens weighs its own statistics and the pool alike
    compensate: bool = True  # columns make good the rounding errors of the columns before them (LDLQ, GPTQ)
    damping: Annotated[float, Field(gt=0, le=10)] = 0.01  # of the Gram for that, in mean diagonals
    output_grams: bool = (
        True  # with stages: rows of attention's heads make good the errors of the rows before them, as attention reads them
    )
    sweeps: Annotated[int, Field(ge=0, le=20)] = 0  # of coordinate descent over groups after that
    stages: bool = True  # solve in the order of computation, each stage on inputs that carry the rounding before it; False: block by block
    retarget: Annotated[float, Field(ge=0, le=1)] = 1.0  # with stages: how much of the inputs' drift from the original is made good
    retarget_damping: Annotated[float, Field(gt=0, le=100)] = 0.2  # in mean diagonals
    residual: bool = True  # with retarget: outputs that are added to the residual make good what it lacks
    hold_out: bool = True  # judge by every twentieth token, which no search sees
    propagate: Literal["quantized", "original"] = "quantized"  # without stages: what the blocks behind a solved one see


class Calibration(_Strict):
    """What is fed: a mix, how much of it, and how it is laid out."""

    mix: str = "stem-agentic"  # a shipped mix by name, a mix's YAML, or data: a .jsonl, .parquet or .txt file, a folder of them
    tokens: Annotated[int, Field(ge=64)] | None = None  # of the whole set; None: the mix's own budget, or all that its quotas leave
    samples: Annotated[int, Field(ge=1)] | None = None  # at most so many, in turn from every language and domain: for quick runs
    sequence_length: Annotated[int, Field(ge=16, le=131072)] = 1024
    batch_tokens: Annotated[int, Field(ge=16)] = 2048  # tokens of a batch, padding counted
    packing: Literal["whole", "fixed"] = "whole"  # a sample a row, like lengths together; or rows filled to sequence_length
    thinking: bool | None = None  # the chat template's own switch (enable_thinking), where it has one; None leaves it alone
    ignore_prompts: bool = False  # statistics over the assistant's turns only; the rest is read, not counted
    expert_tokens: Annotated[int, Field(ge=0)] = 0  # an expert with fewer gets more from the reserve, kept apart; 0: no reserve
    reserve: Annotated[float, Field(gt=0, le=4)] = 0.5  # of the reserve at most: its share of the set's tokens
    seed: int = 0

    @model_validator(mode="after")
    def _one_measure(self) -> "Calibration":
        if self.tokens is not None and self.samples is not None:
            raise ValueError("give either tokens or samples")
        return self


class Score(_Strict):
    """Held-out samples that run beside the calibration set, through original and quantized blocks; 0 samples: no score."""

    samples: Annotated[int, Field(ge=0)] | None = None  # None: all that we ship
    sequence_length: Annotated[int, Field(ge=16, le=131072)] = 512


GgmlType = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "iq4_nl", "q4_1", "q4_0"]


class Gguf(_Strict):
    """What only a GGUF asks: types of tensors that are not quantized, by patterns of llama.cpp's names; how its tokenizer splits."""

    # "token_embd": [q6_k, q8_0]: the last pattern that matches; of several types the first whose blocks divide the rows
    types: dict[str, GgmlType | Annotated[list[GgmlType], Field(min_length=1)]] = {}
    pre_tokenizer: str | None = None  # llama.cpp's name; None: found by the pattern in tokenizer.json


class Onnx(_Strict):
    """What only an ONNX folder asks."""

    accuracy_level: Literal[0, 4] = 0  # of the multiplies: fp32 activations, or activations rounded to 8 bits (faster, less exact)
    embeddings: Literal[4, 8, 16] = 16  # bits of embedding tables and head, by plain rounding; 16: as the checkpoint has them


class Recipe(_Strict):
    """What to do with a checkpoint. Order of precedence: overrides (the last that matches), ignore, targets."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # names the output folder where none is given
    description: str
    method: Literal["awq", "rtn"] = "awq"
    weights: Weights = Weights()
    # Bits where they pay: each linear's scheme is picked among `choices` by what it costs, so that the whole stays within one of these.
    target_bits: Annotated[float, Field(ge=2, le=16)] | None = None  # a weight of what is quantized, scales and zero points counted
    target_size: Annotated[int, Field(gt=0)] | None = None  # bytes of the weight files, or a size such as 14GB; of the first format
    choices: list[Weights] = []  # none: what the engines of the formats load
    targets: list[str] = ["*"]
    ignore: list[str] = []
    overrides: list[Override] = []
    formats: Annotated[list[Literal["compressed-tensors", "gguf", "onnx"]], Field(min_length=1)] = ["compressed-tensors"]
    experts_layout: Literal["per-expert", "fused"] = "per-expert"
    gguf: Gguf = Gguf()
    onnx: Onnx = Onnx()
    calibration: Calibration = Calibration()
    search: Search = Search()
    score: Score = Score()

    @field_validator("target_size", mode="before")
    @classmethod
    def _in_bytes(cls, value: Any) -> Any:
        return size_in_bytes(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_target(self) -> "Recipe":
        if self.target_bits is not None and self.target_size is not None:
            raise ValueError("give either target_bits or target_size")
        if self.has_target and self.method == "rtn":
            raise ValueError("a target needs the method awq: plain rounding sees no data that could tell where bits pay")
        if self.choices and not self.has_target:
            raise ValueError("choices are for target_bits or target_size")
        if any(choice.grid in ("q4_k_m", "q4_k_s") for choice in self.choices):
            raise ValueError("a mix is no choice for one linear; name q4_k, q5_k, q6_k")
        return self

    @property
    def has_target(self) -> bool:
        return self.target_bits is not None or self.target_size is not None


class Columns(_Strict):
    """Names of a source's columns, where they are not the field's own. A row is a conversation, a text, or a prompt with its response."""

    messages: str = "messages"  # a list of {"role", "content"}
    conversations: str = "conversations"  # ShareGPT's: a list of {"from", "value"}
    text: str = "text"
    prompt: str = "prompt"
    response: str = "response"
    tools: str = "tools"  # a list of JSON schemas, or one as a JSON string
    language: str = "language"
    domain: str = "domain"
    id: str = "id"


Share = Annotated[float, Field(gt=0)]


class MixSource(_Strict):
    """Where samples come from: local data, or a data set of the Hub that is streamed."""

    path: str | None = None  # beside the mix's YAML: a .jsonl, .parquet or .txt file, or a folder of them
    hub: str | None = None  # a data set's id, owner/name
    subset: str | None = None  # of the Hub's data set: its configuration
    split: str = "train"
    revision: str | None = None  # a commit, so that the same rows come next year
    columns: Columns = Columns()
    language: str | None = None  # of rows that do not say theirs
    domain: str | None = None
    join: bool = False  # rows are lines of one long text, as in WikiText
    weight: Share = 1.0  # beside the other sources of a language and domain

    @model_validator(mode="after")
    def _one_place(self) -> "MixSource":
        if (self.path is None) == (self.hub is None):
            raise ValueError("a source has either a path or a hub id")
        return self

    @property
    def name(self) -> str:
        """What a report calls it: without folders, which are another machine's business."""
        return Path(self.path).name if self.path is not None else f"{self.hub}{f'/{self.subset}' if self.subset else ''}:{self.split}"

    def files(self) -> list[Path]:
        """Its local files, in an order that no file system decides; none of a Hub source."""
        place = Path(self.path) if self.path is not None else None
        if place is None:
            return []
        found = [path for path in place.glob("*") if path.is_file()] if place.is_dir() else [place]
        return sorted((path for path in found if path.suffix in DATA_FILES), key=lambda path: path.as_posix())


class Mix(_Strict):
    """A calibration mix: where samples come from, and how the tokens are divided.

    A language's and a domain's shares are relative; a cell's (language, domain) is their product. What has no share is not drawn.
    Without shares the sources' own distribution is left as it is.
    """

    description: str
    languages: dict[str, Share] = {}
    domains: dict[str, Share] = {}
    tokens: Annotated[int, Field(ge=64)] | None = None  # the budget where the recipe names none
    sources: Annotated[list[MixSource], Field(min_length=1)]

    def files(self) -> list[Path]:
        return [path for source in self.sources for path in source.files()]


def shipped(kind: str) -> Path:
    """The folder of one kind of data that we ship: inside the package in a wheel, beside it in a checkout."""
    packed = HERE / "shipped_data" / kind
    return packed if packed.is_dir() else HERE.parent / kind


def shipped_recipes() -> list[str]:
    return sorted(path.stem for path in shipped("recipes").glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or a YAML file by path.

    Raises:
        RecipeError: no such recipe, not YAML, an unknown key (named, with its place) or a value out of range.
    """
    path = shipped("recipes") / f"{name}.yaml"
    if name not in shipped_recipes():
        path = Path(name)
        if not path.is_file():
            near = difflib.get_close_matches(name, shipped_recipes(), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise RecipeError(f"recipe {name!r}: no such recipe and no such file; {hint}shipped: {', '.join(shipped_recipes())}")
    return _validated(Recipe, {"name": path.stem, **_mapping(path, RecipeError)}, path, RecipeError)


def changed(recipe: Recipe, fields: dict[str, Any]) -> Recipe:
    """The recipe with some fields exchanged, held to the same rules.

    Raises:
        RecipeError: they do not go together with the rest.
    """
    return _validated(Recipe, recipe.model_dump() | fields, Path(f"recipe {recipe.name}"), RecipeError) if fields else recipe


class FamilyFold(_Strict):
    producer: str
    consumers: Annotated[tuple[str, ...], Field(min_length=1)]


class FamilyTable(_Strict):
    """A family's table as a file: families/family.py says what each key is."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    model_types: Annotated[tuple[str, ...], Field(min_length=1)]
    linears: Annotated[tuple[str, ...], Field(min_length=1)]
    kept: tuple[str, ...]
    outside: tuple[str, ...]
    folds: tuple[FamilyFold, ...]
    ignore: tuple[str, ...]
    norm_offset: float = 0.0
    on_disk: dict[str, str] = {}
    fused: dict[str, tuple[str, ...]] = {}
    residual: dict[str, str] = {}
    stages: Annotated[tuple[tuple[str, ...], ...], Field(min_length=1)]


def load_family_table(path: Path) -> dict[str, Any]:
    """A family's table in plain data, from the YAML that `quantkit families discover` writes.

    Raises:
        FamilyError: no such file, not YAML, an unknown key or a missing one.
    """
    return _validated(FamilyTable, _mapping(path, FamilyError), path, FamilyError).model_dump()


def shipped_mixes() -> list[str]:
    return sorted(path.stem for path in shipped("calibration").glob("*.yaml"))


def load_mix(name: str) -> Mix:
    """A shipped mix by name, a mix's YAML file, or data as it is: a .jsonl, .parquet or .txt file, or a folder of them.

    Sources come back with paths that stand for themselves, wherever the YAML lies.

    Raises:
        CalibrationError: no such mix or file, or a source of it is not there.
    """
    path = Path(name)
    if name in shipped_mixes():
        path = shipped("calibration") / f"{name}.yaml"
    elif name and (path.is_dir() or path.suffix in DATA_FILES):
        if not path.exists():
            raise CalibrationError(f"calibration {name!r}: no such file")
        mix = Mix(description=f"{name} as it is", sources=[MixSource(path=str(path))])
        if not mix.files():
            raise CalibrationError(f"calibration {name!r}: a folder without {_DATA} files, and no mix ({', '.join(shipped_mixes())})")
        return mix
    elif path.suffix not in (".yaml", ".yml") or not path.is_file():
        known = ", ".join(shipped_mixes())
        raise CalibrationError(f"calibration {name!r}: neither a mix ({known}) nor a .yaml file, a {_DATA} file or a folder that exists")
    mix = _validated(Mix, _mapping(path, CalibrationError), path, CalibrationError)
    sources = []
    for source in mix.sources:
        found = source if source.path is None else source.model_copy(update={"path": str(path.parent / source.path)})
        if source.path is not None and not all(file.is_file() for file in found.files() or [Path()]):
            raise CalibrationError(f"{path}: the source {source.path!r} holds no {_DATA} file")
        sources.append(found)
    return mix.model_copy(update={"sources": sources})


HARNESS = "lm-eval:"


def shipped_evaluations(kind: Literal["suites", "gates"]) -> list[str]:
    return sorted(path.stem for path in shipped("eval").joinpath(kind).glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """A shipped suite by name, a YAML file, or `lm-eval:task,task`: tasks of lm-evaluation-harness alone.

    Paths come back as they stand for themselves, wherever the YAML lies.

    Raises:
        EvaluationError: no such suite, or it asks for nothing.
    """
    if name.startswith(HARNESS):
        tasks = [task.strip() for task in name.removeprefix(HARNESS).split(",") if task.strip()]
        if not tasks:
            raise EvaluationError(f"suite {name!r}: names no task; write {HARNESS}hellaswag,arc_challenge")
        return Suite(name=name, description="tasks of lm-evaluation-harness", documents=None, harness=Harness(tasks=tasks))
    path = _evaluation("suites", name)
    suite = _validated(Suite, {"name": path.stem, **_mapping(path, EvaluationError)}, path, EvaluationError)
    update: dict[str, Any] = {}
    if suite.documents not in (None, "held-out"):
        update["documents"] = str(path.parent / str(suite.documents))
    if suite.items is not None and suite.items.path is not None:
        update["items"] = suite.items.model_copy(update={"path": str(path.parent / suite.items.path)})
    if suite.harness is not None and suite.harness.include is not None:
        update["harness"] = suite.harness.model_copy(update={"include": str(path.parent / suite.harness.include)})
    return suite.model_copy(update=update)


def load_gate(name: str) -> Gate:
    """A shipped gate by name, or a YAML file.

    Raises:
        EvaluationError: no such gate, or it demands nothing.
    """
    path = _evaluation("gates", name)
    return _validated(Gate, {"name": path.stem, **_mapping(path, EvaluationError)}, path, EvaluationError)


def _evaluation(kind: Literal["suites", "gates"], name: str) -> Path:
    if name in shipped_evaluations(kind):
        return shipped("eval") / kind / f"{name}.yaml"
    if not Path(name).is_file():
        known = ", ".join(shipped_evaluations(kind))
        raise EvaluationError(f"{kind[:-1]} {name!r}: neither a shipped one ({known}) nor a YAML file that exists")
    return Path(name)


def load_benchmarks() -> dict[str, str]:
    """Names on model cards -> tasks of lm-evaluation-harness, or "-" and the reason where it has none."""
    found = _mapping(shipped("eval") / "benchmarks.yaml", EvaluationError)
    return {str(name): str(task) for name, task in found.items()}


def heldout_files() -> list[Path]:
    """Our samples that are never calibrated on: what a run is scored with while it streams."""
    return sorted(shipped("eval").joinpath("heldout").glob("*.jsonl"))


def items_folder() -> Path:
    """Our questions with one right answer."""
    return shipped("eval") / "items"


def reference_model() -> Path:
    """The embedded reference model."""
    return shipped("reference")


def _mapping(path: Path, error: type[QuantkitError]) -> dict[str, Any]:
    try:
        if path.stat().st_size > 1 << 20:
            raise error(f"{path}: more than 1 MiB is not a recipe or a mix")
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as problem:
        raise error(f"{path}: not YAML that can be read ({' '.join(str(problem).split())[:120]})") from None
    if not isinstance(value, dict):
        raise error(f"{path}: a mapping of keys is expected")
    return value


class _PlainLoader(yaml.SafeLoader):
    """Safe YAML without aliases, which can explode, and without doubled keys, which hide each other."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not taken")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        doubled = {key for key in keys if isinstance(key, str) and keys.count(key) > 1}
        if doubled:
            raise yaml.YAMLError(f"the key {sorted(doubled)[0]!r} stands twice")
        return super().construct_mapping(node, deep)


def _validated(model: type[M], value: dict[str, Any], path: Path, error: type[QuantkitError]) -> M:
    try:
        return model.model_validate(value)
    except ValidationError as problems:
        errors = problems.errors()
        first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])  # a slip explains what seems to be missing
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = _fields(model, first["loc"][:-1])
            near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            raise error(f"{path}: unknown key {where!r}; {hint}") from None
        raise error(f"{path}: {where}: {first['msg']} (found {str(first['input'])[:60]!r})") from None


def _fields(model: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    for part in place:
        if isinstance(part, str) and part in model.model_fields:
            inner = model.model_fields[part].annotation
            options = [a for a in (inner, *getattr(inner, "__args__", ())) if isinstance(a, type) and issubclass(a, BaseModel)]
            if options:
                model = options[0]
    return sorted(model.model_fields)
