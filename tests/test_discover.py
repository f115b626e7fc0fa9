"""A table that is found on a random twin says what the shipped one says; known-wrong folds are not among what it finds."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
import transformers
from test_families import TWINS, WRONG_FOLDS

from quantkit.discover import Discovery, as_yaml, discover, family_for
from quantkit.errors import FamilyError, QuantkitError, RecipeError
from quantkit.hf import load_model
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.twin import logits_of
from quantkit.pipeline import quantize
from quantkit.plan import make_plan
from quantkit.publish.artefact import open_artefact
from quantkit.publish.verify import verify
from quantkit.recipe import load_recipe
from quantkit.types import BlockPlan


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Callable[[str], Checkpoint]:
    root, built = tmp_path_factory.mktemp("published"), dict[str, Checkpoint]()

    def get(name: str) -> Checkpoint:
        if name not in built:
            family, changes = TWINS[name]
            built[name] = Checkpoint(tiny.build(family, root / str(len(built)), **changes))
        return built[name]

    return get


@pytest.fixture(scope="module")
def discovered(checkpoints) -> Callable[[str], Discovery]:
    made: dict[str, Discovery] = {}

    def get(name: str) -> Discovery:
        if name not in made:
            made[name] = discover(checkpoints(name).config)
        return made[name]

    return get


@pytest.mark.parametrize("name", TWINS)
def test_what_is_found_is_what_ships(name, discovered, checkpoints):
    source = checkpoints(name)
    shipped = make_plan(load_recipe("awq-w4"), source.config, source.entries)
    found = make_plan(load_recipe("awq-w4"), source.config, source.entries, family=discovered(name).family)
    assert (found.norm_offset, found.kept) == (shipped.norm_offset, shipped.kept)
    for ours, theirs in zip(shipped.blocks, found.blocks, strict=True):
        assert {linear.local: linear for linear in theirs.linears} == {linear.local: linear for linear in ours.linears}
        assert {fold.producer: (set(fold.consumers), fold.head) for fold in theirs.folds} == {
            fold.producer: (set(fold.consumers), fold.head) for fold in ours.folds
        }
        assert theirs.kept == ours.kept
        assert theirs.residual == ours.residual
        assert {local for stage in theirs.stages for local in stage} == {linear.local for linear in ours.linears if linear.scheme}


@pytest.mark.parametrize("name", TWINS)
def test_every_linear_is_solved_once_and_after_what_it_reads(name, discovered, checkpoints):
    source = checkpoints(name)
    found = make_plan(load_recipe("awq-w4"), source.config, source.entries, family=discovered(name).family)
    for block in found.blocks:
        order = [local for stage in block.stages for local in stage]
        assert sorted(order) == sorted(linear.local for linear in block.linears if linear.scheme)
        place = {local: number for number, stage in enumerate(block.stages) for local in stage}
        for fold in block.folds:
            if fold.producer in place:
                assert all(place[fold.producer] < place[consumer] for consumer in fold.consumers)
        assert place["self_attn.q_proj"] < place["self_attn.o_proj"]


@pytest.mark.parametrize("case", WRONG_FOLDS)
def test_known_wrong_folds_are_not_found(case, discovered, checkpoints):
    name, folds = WRONG_FOLDS[case]
    source = checkpoints(name)
    found = make_plan(load_recipe("awq-w4"), source.config, source.entries, family=discovered(name).family)
    for block in found.blocks:
        for wrong in folds:
            for fold in block.folds:
                assert fold.producer != wrong.producer or set(fold.consumers) != set(wrong.consumers) & _modules(block)
                assert fold.producer not in ("self_attn.k_proj", "mlp.gate_proj")


def _modules(block: BlockPlan) -> set[str]:
    return {linear.local for linear in block.linears} | {local.removesuffix(".weight") for local in block.kept}


def test_a_rejected_fold_is_told_with_how_far_it_went(discovered):
    rejected = discovered("gemma3n_text").rejected
    line = next(line for line in rejected if line.startswith("input_layernorm -> "))
    assert "laurel.linear_left" in line  # LAuReL adds the normed input itself: even with all its readers it breaks
    assert float(line.rpartition(" ")[2]) > 1e-2


def test_a_table_comes_back_from_its_file(discovered, checkpoints, tmp_path):
    for name in ("mixtral", "gemma3_vision", "gemma4_moe"):
        found, config = discovered(name), checkpoints(name).config
        text = as_yaml(found)
        (tmp_path / "table.yaml").write_text(text)
        read = family_for(config, str(tmp_path / "table.yaml"))
        assert replace(read, origin="discovered") == found.family
        for fold in found.family.folds:  # the evidence stands beside its line
            assert re.search(rf'- producer: "{re.escape(fold.producer)}"  # logits moved by \S+, by \S+ with half of it', text)


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda text: text.replace("folds:", "fold:"), ("unknown key 'fold'", "'folds'")),
        (lambda text: text.replace('- "mixtral"', '- "mixtrel"'), ("a table of mixtrel", "'mixtral'")),
        (lambda text: text + "gguf: {}\n", ("unknown key 'gguf'",)),
        (lambda text: text.replace("norm_offset: 0.0", "norm_offset: one"), ("norm_offset", "'one'")),
        (lambda text: "!!python/object/apply:os.system [exit]", ("not YAML",)),
        (lambda text: "- a list", ("a mapping of keys",)),
    ],
)
def test_a_table_that_is_none_is_refused(edit, words, discovered, checkpoints, tmp_path):
    path = tmp_path / "table.yaml"
    path.write_text(edit(as_yaml(discovered("mixtral"))))
    source = checkpoints("mixtral")
    with pytest.raises(FamilyError) as refused:
        make_plan(load_recipe("awq-w4"), source.config, source.entries, family=family_for(source.config, str(path)))
    assert all(word in str(refused.value) for word in words), refused.value
    assert "\n" not in str(refused.value)


def test_the_refusal_of_an_unknown_model_type_names_the_command():
    with pytest.raises(FamilyError, match="quantkit families discover"):
        family_for({"model_type": "olmo2"}, None)
    with pytest.raises(FamilyError, match=r"give 'discovered', 'names', or the .yaml file"):
        family_for({"model_type": "olmo2"}, "llama")


def made(model_type: str) -> dict[str, Any]:
    config = transformers.AutoConfig.for_model(model_type).to_dict()
    return {**config, "architectures": ["of no matter here"]}


# -- families that do not ship -----------------------------------------------------------------------------------------------------


def test_latent_attention_and_shared_experts():
    family = discover(made("deepseek_v3")).family
    folds = {fold.producer: set(fold.consumers) for fold in family.folds}
    assert folds["self_attn.q_a_layernorm"] == {"self_attn.q_b_proj"}
    assert folds["self_attn.kv_a_layernorm"] == {"self_attn.kv_b_proj"}
    assert folds["post_attention_layernorm"] >= {"mlp.gate", "mlp.experts.*.up_proj", "mlp.shared_experts.up_proj", "mlp.gate_proj"}
    assert not {"self_attn.kv_b_proj", "self_attn.q_a_proj", "self_attn.q_b_proj"} & folds.keys()
    assert "mlp.gate" not in family.linears
    assert {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"} <= set(family.kept)


def test_norms_behind_the_sublayers_have_no_readers():
    family = discover(made("olmo2")).family
    assert {fold.producer for fold in family.folds} == {"self_attn.v_proj", "mlp.up_proj"}
    assert family.residual == {}


def test_gated_norms_and_modules_around_linears_are_no_obstacle():
    folds = {fold.producer: set(fold.consumers) for fold in discover(made("qwen3_next")).family.folds}
    mixers = {"linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
    assert folds["input_layernorm"] == mixers


@pytest.mark.parametrize(
    "config, words",
    [
        (made("gpt_oss"), "mlp.experts (GptOssExperts): experts of this layout (biases, transposed, interleaved or ungated), which stay"),
        (made("jetmoe"), "outside transformers' experts interface, which stay"),
        (made("jamba"), "mamba.dt_proj: nothing called it"),
        (made("phimoe"), None),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_what_is_not_quantized_is_said(config, words):
    notes = discover(config).notes
    assert any(words in note for note in notes) if words else not notes


@pytest.mark.parametrize(
    "config, words",
    [
        (made("bart"), "an encoder and a decoder"),
        (made("gpt2"), "transformer.h.N, where quantkit does not look"),
        ({"model_type": "nobody_knows_it"}, "transformers cannot read"),
        ({"model_type": "own", "auto_map": {"AutoModel": "own.Model"}}, "code of its own"),
        (made("clip"), "no causal language model"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_what_cannot_be_found_is_one_sentence(config, words):
    with pytest.raises(QuantkitError, match=words) as refused:
        discover(config)
    assert "\n" not in str(refused.value)


# -- from a config to a folder -----------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": tiny.VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256}
HEADS = {"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
NEW = {
    "olmo2": HEADS,
    "phi3": {**HEADS, "original_max_position_embeddings": 256},
    "deepseek_v3": {
        **HEADS, "num_key_value_heads": 4, "moe_intermediate_size": 32, "kv_lora_rank": 32, "q_lora_rank": 64, "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("model_type", NEW)
def test_a_family_that_does_not_ship_goes_from_config_to_folder(model_type, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
        config = transformers.AutoConfig.for_model(model_type, **SIZES, **NEW[model_type], **ids)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    tiny.save_tokenizer(tmp_path / "model")
    (tmp_path / "quick.yaml").write_text(
        "description: quick\ncalibration: {mix: smoke, samples: 3, sequence_length: 64}\nscore: {samples: 1, sequence_length: 64}\n"
    )
    with pytest.raises(FamilyError, match="--family discovered"):
        quantize(str(tmp_path / "model"), recipe=str(tmp_path / "quick.yaml"), output=tmp_path / "refused")
    made = quantize(str(tmp_path / "model"), recipe=str(tmp_path / "quick.yaml"), output=tmp_path / "out", family="discovered")
    assert made.report["family"] == f"{model_type} (discovered)"
    for block in made.report["blocks"]:  # proven on the real weights
        assert block["folds"]
        assert block["proof"] is None or block["proof"] < 1e-4
    folder = made.artefacts["compressed-tensors"]
    card = (folder / "README.md").read_text()
    assert "discovered" in card
    opened, original = load_model(folder, dtype=torch.float32), load_model(tmp_path / "model", dtype=torch.float32)
    tokens = torch.randint(20, 300, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [one(input_ids=tokens, use_cache=False).logits for one in (original, opened)]
    error = (logits[1] - logits[0]).norm() / (logits[0] - logits[0].mean(-1, keepdim=True)).norm()
    assert 0 < error < 0.3  # solved on some 190 tokens of text, tried on tokens by chance


# -- what cannot be run --------------------------------------------------------------------------------------------------------------


def renamed(source: Path, kind: str) -> Path:
    """A model folder as a publisher's whose class no transformers has."""
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": kind, "architectures": [f"{kind}ForCausalLM"]}))
    return source


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_model_without_a_class_is_rounded_by_names_alone(name, tmp_path):
    known = quantize(str(tiny.build(name, tmp_path / "known")), recipe="rtn-w4", output=tmp_path / "one")
    source = renamed(tiny.build(name, tmp_path / "model"), "brandnew")
    with pytest.raises(FamilyError, match="the architecture 'brandnew' is not known"):
        quantize(str(source), recipe="rtn-w4", output=tmp_path / "two")
    with pytest.raises(QuantkitError, match="transformers cannot read it"):
        quantize(str(source), recipe="rtn-w4", output=tmp_path / "two", family="discovered")
    with pytest.raises(RecipeError, match="nothing is run, so only plain rounding is possible; use --recipe rtn-w4"):
        quantize(str(source), output=tmp_path / "two", family="names")
    made = quantize(str(source), recipe="rtn-w4", output=tmp_path / "two", family="names")
    assert made.report["family"] == "brandnew (names)"
    assert made.scores["tokens"] == 0
    folder = made.artefacts["compressed-tensors"]
    ours, theirs = (safetensors.torch.load_file(one / "model.safetensors") for one in (folder, known.artefacts["compressed-tensors"]))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert name == "llama" or "model.layers.0.block_sparse_moe.gate.weight" in ours
    assert "rounded without proof of function, not streamed" in (folder / "README.md").read_text()
    assert verify(open_artefact(folder)).good


def test_a_table_of_a_file_is_proven_to_stream_too(discovered, checkpoints, tmp_path, monkeypatch):
    path = tmp_path / "table.yaml"
    path.write_text(as_yaml(discovered("mixtral")))
    config = checkpoints("mixtral").config
    assert family_for(config, str(path)).origin == "table.yaml"
    monkeypatch.setattr("quantkit.discover.streamed", lambda model: 1.01 * logits_of(model))
    for asked in (str(path), "discovered"):
        with pytest.raises(FamilyError, match=r"one block at a time, mixtral computes other logits .*--recipe rtn-w4 --family names"):
            family_for(config, asked)


# -- the census ----------------------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "docs" / "families.md").read_text()


def test_the_page_tells_the_totals_of_its_rows():
    told = re.search(r"(\d+) model types: (\d+) stream .*?found for (\d+), (\d+) quantize and open again .*?, (\d+) are wrong", PAGE)
    assert told is not None
    rows = [line.split("|")[1:-1] for line in PAGE.splitlines() if re.match(r"\| [\w.-]+ \| *(\S*e[-+]\d+)? *\|", line)]
    figures = [[cell.strip() for cell in row] for row in rows]
    streams, folds, opens = (sum(bool(row[column]) for row in figures) for column in (1, 2, 5))
    assert [int(number) for number in told.groups()] == [len(figures), streams, folds, opens, 0]
    assert (streams >= 60, opens >= 50) == (True, True)
    shipped = {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma3_text", "gemma3n_text", "gemma4_text"}
    assert shipped <= {row[0] for row in figures if row[5]}


@pytest.mark.parametrize("model_type", ["olmo2", "granitemoe"])
def test_rows_of_the_census_come_out_again(model_type, tmp_path):
    census = Path(__file__).parents[1] / "benchmarks" / "families.py"
    asked = [sys.executable, str(census), "--types", model_type, "--results", str(tmp_path / "census")]
    done = subprocess.run(asked, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(census.parents[1])})
    assert done.stdout.splitlines()[0] == f"{model_type}: good", done.stdout + done.stderr[-2000:]
    row = json.loads((tmp_path / "census" / f"{model_type}.json").read_text())
    told = re.search(rf"^\| {model_type} \| \S+ \| (\d+) \| (\S+) \| (\S+) \|", PAGE, re.MULTILINE)
    assert told is not None
    assert row["folds"] == int(told[1])
    assert [row["kl"], row["kl_rounded"]] == pytest.approx([float(told[2]), float(told[3])], rel=0.1)
