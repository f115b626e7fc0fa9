"""The YAML that people write: what is shipped says what it should, and every slip of the pen is one sentence that names it."""

import re
from pathlib import Path

import pytest
import yaml

from quantkit.errors import CalibrationError, RecipeError
from quantkit.recipe import (
    Calibration,
    Gguf,
    Mix,
    MixSource,
    Onnx,
    Override,
    Recipe,
    Score,
    Weights,
    heldout_files,
    load_mix,
    load_recipe,
    shipped_recipes,
)
from quantkit.suites import DivergenceGate, Gate, Harness, Items, ItemsGate, Suite

ROOT = Path(__file__).parents[1]
LANGUAGES = ["ar", "en", "es", "fr", "hi", "ja", "ko", "nl", "ru", "zh"]


@pytest.fixture
def write(tmp_path):
    """A function from YAML text to its file."""

    def put(text: str | bytes, name: str = "mine.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return put


def refused(path: str, *words: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    line = str(caught.value)
    for word in words:
        assert word in line
    assert len(line) < 500
    return line


# --- What documents say -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "document, models",
    [
        ("README.md", [Recipe, Weights, Override, Score, Gguf, Onnx]),
        ("docs/calibration.md", [Calibration, Mix, MixSource]),
        ("docs/eval.md", [Suite, Items, Harness, Gate, DivergenceGate, ItemsGate]),
    ],
)
def test_documents_name_every_key(document, models):
    """As code, or in an example of YAML."""
    text = (ROOT / document).read_text()
    code = " ".join(
        re.findall(r"```\w*\n.*?```", text, re.DOTALL) + re.findall(r"`[^`\n]+`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    )
    for model in models:
        missing = [key for key in model.model_fields if not re.search(rf"\b{key}\b", code)]
        assert not missing, f"{document} does not name {', '.join(missing)} of {model.__name__}"


# --- What is shipped --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, method, bits, group, symmetric",
    [
        ("awq-w4", "awq", 4, 32, True),
        ("awq-w4-asym", "awq", 4, 32, False),
        ("awq-w4-g128", "awq", 4, 128, True),
        ("awq-w8", "awq", 8, 32, True),
        ("rtn-w4", "rtn", 4, 32, True),
    ],
)
def test_shipped_recipes_say_what_their_names_do(name, method, bits, group, symmetric):
    recipe = load_recipe(name)
    assert (recipe.name, recipe.method) == (name, method)
    assert (recipe.weights.bits, recipe.weights.group, recipe.weights.symmetric) == (bits, group, symmetric)
    assert recipe.targets == ["*"]
    assert recipe.ignore == recipe.overrides == []
    assert recipe.formats == ["compressed-tensors"]
    assert recipe.experts_layout == "per-expert"
    assert (recipe.calibration.mix, recipe.calibration.seed) == ("stem-agentic", 0)
    assert recipe.search.propagate == "quantized"
    assert recipe.description.endswith(".")


def test_every_shipped_recipe_loads():
    assert {"awq-w4", "awq-w4-asym", "awq-w4-g128", "awq-w8", "rtn-w4"} <= set(shipped_recipes())
    assert shipped_recipes() == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    for name in shipped_recipes():
        assert load_recipe(name).name == name, "a recipe is called what its file is called"


def test_a_file_is_read_with_every_key(write):
    keys = """
name: house
description: Attention in 8 bits, the last MLP as it is.
method: awq
weights: {bits: 4, group: row, symmetric: false}
target_bits: 5.5
choices: [{bits: 4, group: 64}, {bits: 8, group: 64}]
targets: ["self_attn.*", "mlp.*"]
ignore: [self_attn.o_proj]
overrides:
  - {match: self_attn.*, weights: {bits: 8, group: 128}}
  - {match: [mlp.up_proj, mlp.gate_proj], layers: [3], keep: true}
formats: [compressed-tensors, gguf]
experts_layout: fused
gguf: {types: {token_embd: q8_0}, pre_tokenizer: tekken}
onnx: {accuracy_level: 4, embeddings: 8}
calibration: {mix: other.jsonl, samples: 7, sequence_length: 256, batch_tokens: 512, seed: 11}
search: {exponents: 10, rows: 64, shrinks: 5, expert_floor: 0, propagate: original}
score: {samples: 0, sequence_length: 64}
"""
    recipe = load_recipe(write(keys))
    assert {*yaml.safe_load(keys), "target_size"} == set(Recipe.model_fields), "this test reads every key there is, of two targets one"
    read = recipe.model_dump(exclude_unset=True)
    assert read == yaml.safe_load(keys)
    assert recipe.overrides[0].patterns() == ["self_attn.*"]
    assert recipe.overrides[1].patterns() == ["mlp.up_proj", "mlp.gate_proj"]


def test_the_name_of_a_file_is_its_recipes_name(write):
    assert load_recipe(write("description: x", "night-run.yaml")).name == "night-run"


def test_a_recipe_does_not_change(write):
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("awq-w4").method = "rtn"


# --- Slips of the pen -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, key, hint",
    [
        ("wieghts: {bits: 4}", "'wieghts'", "did you mean 'weights'?"),
        ("weights: {bit: 4}", "'weights.bit'", "did you mean 'bits'?"),
        ("calibration: {sample: 4}", "'calibration.sample'", "did you mean 'samples'?"),
        ("search: {exponent: 4}", "'search.exponent'", "did you mean 'exponents'?"),
        ("score: {zzz: 4}", "'score.zzz'", "known here: samples, sequence_length"),
        ("overrides: [{match: mlp.*, weigths: {bits: 8}}]", "'overrides.0.weigths'", "did you mean 'weights'?"),
        ("overrides: [{mach: a}]", "'overrides.0.mach'", "did you mean 'match'?"),
        ("overrides: [{match: a}, {match: b, weights: {symetric: false}}]", "'overrides.1.weights.symetric'", "did you mean 'symmetric'?"),
    ],
)
def test_an_unknown_key_is_named_with_its_place_and_the_nearest(text, key, hint, write):
    path = write(f"description: x\n{text}")
    refused(path, path, f"unknown key {key}", hint)


@pytest.mark.parametrize(
    "text, where",
    [
        ("method: gptq", "method"),
        ("weights: {bits: 16}", "weights.bits"),
        ("weights: {bits: four}", "weights.bits"),
        ("weights: {bits: true}", "weights.bits"),
        ("weights: {group: 48}", "weights.group"),
        ("weights: {group: 0}", "weights.group"),
        ("weights: {symmetric: perhaps}", "weights.symmetric"),
        ("weights: 4", "weights"),
        ("targets: mlp.*", "targets"),
        ("overrides: {match: a}", "overrides"),
        ("overrides: [{keep: true}]", "overrides.0.match"),
        ("formats: [gptq]", "formats.0"),
        ("gguf: {types: {output: q9_0}}", "gguf.types.output"),
        ("formats: []", "formats"),
        ("experts_layout: stacked", "experts_layout"),
        ("calibration: {samples: 0}", "calibration.samples"),
        ("calibration: {samples: -3}", "calibration.samples"),
        ("calibration: {sequence_length: 8}", "calibration.sequence_length"),
        ("calibration: {seed: [1]}", "calibration.seed"),
        ("search: {rows: 1}", "search.rows"),
        ("search: {propagate: both}", "search.propagate"),
        ("score: {samples: -1}", "score.samples"),
        ("name: 5", "name"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_place(text, where, write):
    path = write(f"description: x\n{text}")
    refused(path, path, f"{where}")


def test_a_description_is_asked_for(write):
    refused(write("method: rtn"), "description")


@pytest.mark.parametrize("text", ["weights: {bits: 4, bits: 8}", "method: awq\nmethod: rtn"])
def test_doubled_keys_are_refused(text, write):
    refused(write(f"description: x\n{text}"), "stands twice")


@pytest.mark.parametrize(
    "text",
    [
        "description: &a x\nname: *a",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
        "description: [x\nmethod: rtn",
        "description: !!python/object/apply:os.system [echo]",
        "description: 2024-13-45",
        "description: !!int twelve",
        "? [a]\n: b",
        "d: " + "[" * 5000 + "]" * 5000,
        b"description: \xff\xfe",
        b"description: \x00",
    ],
    ids=["alias", "bomb", "torn", "python", "date", "int", "list as key", "deep", "not utf-8", "nul"],
)
def test_what_is_no_plain_yaml_is_refused(text, write):
    path = write(text)
    assert "\n" not in refused(path, path, "not YAML that can be read")


@pytest.mark.parametrize("text", ["", "- a\n- b", "awq-w4", "5", "null"])
def test_what_is_no_mapping_is_refused(text, write):
    refused(write(text), "a mapping of keys is expected")


def test_a_huge_file_is_not_read(write):
    refused(write("description: " + "x" * (1 << 20)), "1 MiB")


@pytest.mark.parametrize("asked, nearest", [("awq-w44", "awq-w4"), ("aqw-w8", "awq-w8"), ("rtn_w4", "rtn-w4")])
def test_an_unknown_recipe_names_the_nearest_and_all(asked, nearest):
    refused(asked, f"recipe {asked!r}", f"did you mean {nearest!r}?", *shipped_recipes())


def test_a_folder_or_nothing_is_no_recipe(tmp_path):
    refused(str(tmp_path), "no such recipe")
    refused("", "no such recipe")


# --- Mixes ------------------------------------------------------------------------------------------------------------------------


def test_the_shipped_mix_has_ten_languages():
    assert [path.stem for path in load_mix("stem-agentic").files()] == LANGUAGES
    assert [path.stem for path in heldout_files()] == LANGUAGES
    assert {path.parent.name for path in heldout_files()} == {"heldout"}


def test_a_mix_of_folders_and_files(write, tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/two.jsonl", "a/one.jsonl", "a/readme.md", "three.jsonl"):
        (tmp_path / name).write_text("{}\n")
    path = write("description: x\nsources: [{path: a}, {path: three.jsonl}]", "mix.yaml")
    assert load_mix(path).files() == [tmp_path / name for name in ("a/one.jsonl", "a/two.jsonl", "three.jsonl")]
    assert load_mix(str(tmp_path / "three.jsonl")).files() == [tmp_path / "three.jsonl"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("description: x\nsources: []", "sources"),
        ("description: x\nsources: [{path: nowhere}]", "'nowhere' holds no .jsonl, .parquet or .txt file"),
        ("description: x\nsources: [{path: .}]", "'.' holds no .jsonl, .parquet or .txt file"),
        ("description: x\nsources: [{pth: a}]", "unknown key 'sources.0.pth'; did you mean 'path'?"),
        ("description: x", "sources"),
        ("[1]", "a mapping of keys is expected"),
        ("description: x: y", "not YAML"),
    ],
)
def test_a_mix_that_cannot_be_used_is_named(text, words, write):
    path = write(text, "mix.yaml")
    with pytest.raises(CalibrationError) as caught:
        load_mix(path)
    assert path in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["stem-agent", "none.jsonl", "none.yaml", "", "/"])
def test_an_unknown_mix_is_refused(name):
    with pytest.raises(CalibrationError, match=r"no such file|stem-agentic"):
        load_mix(name)
