"""Every tensor's fate: nothing lost, nothing twice, groups that divide, bytes that are the files' own, the public 26B-A4B shape."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml

from quantkit import pipeline
from quantkit.errors import FamilyError, RecipeError
from quantkit.model.blocks import published_entries
from quantkit.model.checkpoint import Checkpoint
from quantkit.plan import make_plan
from quantkit.recipe import Recipe, load_recipe, shipped
from quantkit.types import Entry, Plan, Scheme
from quantkit.write import compressed_tensors
from quantkit.write.compressed_tensors import CompressedTensors

NO_CLASS_HERE = "gemma3n"  # its vision tower needs timm
W4 = Scheme(4, 32, True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A function from a family's name to its tiny checkpoint, built once."""
    built: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in built:
            built[name] = Checkpoint(tiny.build(name, tmp_path_factory.mktemp(name)))
        return built[name]

    return get


def recipe(**fields: Any) -> Recipe:
    return Recipe.model_validate({"name": "mine", "description": "a test's", **fields})


def llama_config(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 128, "intermediate_size": 224,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, **changes,
    }  # fmt: skip


def moe_config(**changes: Any) -> dict[str, Any]:
    return {
        **llama_config(), "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": 32, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 96, "decoder_sparse_step": 1, "mlp_only_layers": [], **changes,
    }  # fmt: skip


def planned(config: dict[str, Any], **fields: Any) -> Plan:
    return make_plan(recipe(**fields), config, published_entries(config))


def fates(plan: Plan, block: int = 0) -> dict[str, tuple[Scheme | None, str]]:
    return {linear.local: (linear.scheme, linear.why) for linear in plan.blocks[block].linears}


def refused(config: dict[str, Any], *words: str, error: type[Exception] = RecipeError, **fields: Any) -> None:
    with pytest.raises(error) as caught:
        planned(config, **fields)
    for word in words:
        assert word in str(caught.value)


# --- Every tensor once ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_tensor_has_one_fate(name, checkpoint):
    source = checkpoint(name)
    plan = make_plan(load_recipe("awq-w4"), source.config, source.entries)
    kept = Counter([*plan.kept, *(tensor for block in plan.blocks for tensor in block.kept.values())])
    taken = {name: torch.zeros(entry.shape, dtype=torch.int8) for name, entry in source.entries.items()}
    for linear in plan.linears():
        whole = taken[linear.source.tensor]
        part = whole if linear.source.expert is None else whole[linear.source.expert]
        part = part if linear.source.rows is None else part[slice(*linear.source.rows)]
        assert tuple(part.shape) == linear.shape
        part += 1
    for tensor, count in kept.items():
        taken[tensor] += count
    for tensor, count in taken.items():
        assert bool((count == 1).all()), f"{tensor} has {int(count.min())} to {int(count.max())} fates"
    assert max(Counter(linear.name for linear in plan.linears()).values()) == 1
    assert all(linear.scheme == W4 for linear in plan.linears()), "all text linears of the tiny models divide by 32"


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_towers_and_ends_are_kept(name, checkpoint):
    source = checkpoint(name)
    plan = make_plan(load_recipe("awq-w4"), source.config, source.entries)
    for tensor in source.entries:
        if "tower" in tensor or "embed" in tensor or "lm_head" in tensor:
            assert tensor in plan.kept
    local = {name for block in plan.blocks for name in block.kept}
    assert any("layernorm" in name for name in local)
    assert not any(name.endswith("_proj.weight") and ("self_attn" in name or "mlp" in name) for name in local)


def test_names_of_fused_experts(checkpoint):
    source = checkpoint("gemma4_moe")
    plan = make_plan(load_recipe("awq-w4"), source.config, source.entries)
    by_local = {linear.local: linear for linear in plan.blocks[1].linears}
    prefix = "model.language_model.layers.1."
    for local, tensor, rows, shape in [
        ("experts.7.gate_proj", "experts.gate_up_proj", (0, 96), (96, 128)),
        ("experts.7.up_proj", "experts.gate_up_proj", (96, 192), (96, 128)),
        ("experts.7.down_proj", "experts.down_proj", None, (128, 96)),
    ]:
        linear = by_local[local]
        assert linear.name == prefix + local
        assert (linear.source.tensor, linear.source.expert, linear.source.rows) == (prefix + tensor, 7, rows)
        assert linear.shape == shape


@pytest.mark.parametrize(
    "name, local, written",
    [
        ("qwen3_moe", "mlp.experts.7.up_proj", "mlp.experts.7.up_proj"),
        ("mixtral", "mlp.experts.11.gate_proj", "block_sparse_moe.experts.11.w1"),
        ("mixtral", "mlp.experts.11.up_proj", "block_sparse_moe.experts.11.w3"),
        ("mixtral", "mlp.experts.11.down_proj", "block_sparse_moe.experts.11.w2"),
    ],
)
def test_names_of_experts_apart(name, local, written, checkpoint):
    source = checkpoint(name)
    plan = make_plan(load_recipe("awq-w4"), source.config, source.entries)
    linear = {linear.local: linear for linear in plan.blocks[2].linears}[local]
    assert linear.name == f"model.layers.2.{written}"
    assert linear.source.tensor == f"model.layers.2.{written}.weight"
    assert linear.source.expert is linear.source.rows is None


# --- From a config alone ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in tiny.FAMILIES if name != NO_CLASS_HERE])
def test_a_config_alone_gives_the_plan_of_the_headers(name, checkpoint):
    source, chosen = checkpoint(name), load_recipe("awq-w4-g128")
    from_headers = make_plan(chosen, source.config, source.entries)
    from_config = make_plan(chosen, source.config, published_entries(source.config))
    assert from_config.blocks == from_headers.blocks
    assert sorted(from_config.kept) == sorted(from_headers.kept)
    assert from_config.entries == from_headers.entries
    assert from_config.fingerprint == from_headers.fingerprint
    assert CompressedTensors(from_config).bytes == CompressedTensors(from_headers).bytes


def test_the_order_of_the_headers_does_not_matter(checkpoint):
    source, chosen = checkpoint("gemma4_e"), load_recipe("awq-w4")
    names = list(source.entries)
    random.Random(1).shuffle(names)
    first = CompressedTensors(make_plan(chosen, source.config, source.entries))
    other = CompressedTensors(make_plan(chosen, source.config, {name: source.entries[name] for name in names}))
    order = lambda made: [[piece.name for piece in shard.pieces] for shard in made.shards]  # noqa: E731
    assert order(other) == order(first)
    assert other.bytes == first.bytes


def test_a_config_file_alone_is_planned(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(checkpoint("llama").config))
    plan, sizes = pipeline.plan(str(tmp_path / "config.json"), "awq-w4")
    assert sizes == pipeline.plan(str(checkpoint("llama").folder), "awq-w4")[1]
    assert len(plan.blocks) == 3


def test_the_fingerprint_tells_runs_apart(checkpoint):
    source, chosen = checkpoint("llama"), load_recipe("awq-w4")
    plan = make_plan(chosen, source.config, source.entries, "inputs")
    assert make_plan(chosen, source.config, source.entries, "inputs").fingerprint == plan.fingerprint
    wider = {**source.entries, "lm_head.weight": Entry(torch.float32, (384, 128))}
    for other in (
        make_plan(chosen, source.config, source.entries, "other inputs"),
        make_plan(load_recipe("awq-w4-asym"), source.config, source.entries, "inputs"),
        make_plan(chosen, source.config, wider, "inputs"),
    ):
        assert other.fingerprint != plan.fingerprint


# --- Groups -----------------------------------------------------------------------------------------------------------------------


def test_a_group_that_does_not_divide_falls_back_and_says_why():
    plan = fates(planned(llama_config(intermediate_size=192), weights={"bits": 4, "group": 128}))
    assert plan["mlp.gate_proj"] == (Scheme(4, 128, True), "")
    assert plan["mlp.down_proj"] == (Scheme(4, 64, True), "group 64: 128 does not divide 192")
    plan = fates(planned(llama_config(), weights={"bits": 4, "group": 64}))
    assert plan["mlp.down_proj"] == (Scheme(4, 32, True), "group 32: 64 does not divide 224")


def test_experts_of_a_layer_share_a_group():
    plan = fates(planned(moe_config(), weights={"bits": 4, "group": 128}))
    experts = {local: fate for local, fate in plan.items() if ".experts." in local}
    assert len(experts) == 4 * 3
    assert {scheme for scheme, _ in experts.values()} == {W4}
    for local, (_, why) in experts.items():
        assert "group 32: 128 does not divide 96" in why, f"{local}: the width at fault is 96, the columns of down_proj"
    assert plan["self_attn.q_proj"] == (Scheme(4, 128, True), "")


def test_a_group_that_divides_nothing_names_the_linear():
    refused(llama_config(intermediate_size=100), "mlp.down_proj", "100", "group: row")
    attention = [{"match": "self_attn.*", "keep": True}]
    refused(moe_config(hidden_size=80), "80 columns of mlp.experts.0.gate_proj", overrides=attention)
    refused(moe_config(moe_intermediate_size=80), "80 columns of mlp.experts.0.down_proj")


def test_whole_rows_need_no_divisor():
    plan = planned(llama_config(intermediate_size=100), weights={"bits": 8, "group": "row"})
    assert {linear.scheme for linear in plan.linears()} == {Scheme(8, 0, True)}


# --- Targets, ignore, overrides ---------------------------------------------------------------------------------------------------


def test_overrides():
    overrides = [{"match": "self_attn.*", "weights": {"bits": 8}}, {"match": ["mlp.*"], "keep": True, "layers": [0, 2]}]
    plan = planned(llama_config(), overrides=overrides)
    for block in range(3):
        for local, (scheme, why) in fates(plan, block).items():
            if local.startswith("self_attn."):
                assert scheme == Scheme(8, 32, True)
            elif block == 1:
                assert scheme == W4
            else:
                assert scheme is None
                assert "override" in why
    ignored = planned(llama_config(), ignore=["*.down_proj"])
    assert fates(ignored)["mlp.down_proj"] == (None, "ignored by the recipe")
    taken_back = planned(llama_config(), ignore=["*.down_proj"], overrides=[{"match": "mlp.*", "layers": [1]}])
    assert [fates(taken_back, block)["mlp.down_proj"][0] for block in range(3)] == [None, W4, None]
    only = planned(llama_config(), targets=["mlp.*"])
    assert fates(only)["self_attn.o_proj"] == (None, "not a target of the recipe")
    last = planned(llama_config(), overrides=[{"match": "mlp.*", "keep": True}, {"match": "mlp.*", "weights": {"bits": 8}}])
    assert fates(last)["mlp.up_proj"][0] == Scheme(8, 32, True)


@pytest.mark.parametrize("match", ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj"])
def test_what_engines_serve_as_one_matrix_shares_a_scheme(match):
    refused(llama_config(), match, "one matrix", overrides=[{"match": match, "weights": {"bits": 8}}])
    refused(llama_config(), match, "block 2", overrides=[{"match": match, "keep": True, "layers": [2]}])


def test_experts_share_a_scheme():
    refused(moe_config(), "one matrix", overrides=[{"match": "mlp.experts.3.*", "weights": {"bits": 8}}])
    refused(moe_config(), "one matrix", overrides=[{"match": "*.experts.*.down_proj", "keep": True}])
    plan = planned(moe_config(), overrides=[{"match": "mlp.experts.*", "weights": {"bits": 8}}])
    assert {fate[0] for local, fate in fates(plan).items() if "experts" in local} == {Scheme(8, 32, True)}


@pytest.mark.parametrize(
    "fields, nearest",
    [
        ({"targets": ["*", "mlp.gate"]}, "mlp.gate_proj"),
        ({"ignore": ["self_attn.o_prj"]}, "self_attn.o_proj"),
        ({"overrides": [{"match": "lm_head", "keep": True}]}, "."),
        ({"overrides": [{"match": ["mlp.*", "moe.*"], "keep": True}]}, "."),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(fields, nearest):
    refused(llama_config(), "matches no linear", nearest, **fields)


@pytest.mark.parametrize(
    "override",
    [{"match": "mlp.*", "layers": [99], "keep": True}, {"match": "mlp.*", "layers": [], "keep": True}, {"match": [], "keep": True}],
    ids=["no such layer", "no layer", "no pattern"],
)
def test_an_override_that_says_nothing_is_refused(override):
    with pytest.raises((RecipeError, ValueError)):
        planned(llama_config(), overrides=[override])


def test_nothing_left_to_quantize():
    refused(llama_config(), "nothing to quantize", ignore=["*"])
    refused(llama_config(), "nothing to quantize", targets=[])


# --- Refused checkpoints ----------------------------------------------------------------------------------------------------------


def test_a_quantized_source_is_refused(checkpoint):
    source = checkpoint("llama")
    with pytest.raises(RecipeError, match="quantized already"):
        make_plan(recipe(), {**source.config, "quantization_config": {"quant_method": "gptq"}}, source.entries)
    assert make_plan(recipe(), {**source.config, "quantization_config": None}, source.entries), "null is no quantization"


def test_a_missing_block_is_refused(checkpoint):
    source = checkpoint("llama")
    for block in (0, 1):
        holed = {name: entry for name, entry in source.entries.items() if f".layers.{block}." not in name}
        with pytest.raises(FamilyError, match=f"decoder block {block}"):
            make_plan(recipe(), source.config, holed)
    with pytest.raises(FamilyError, match="no decoder block"):
        make_plan(recipe(), source.config, {"lm_head.weight": source.entries["lm_head.weight"]})


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("model.layers.0.mlp.gate_up_proj.weight", "mlp.gate_proj"),
        ("model.layers.0.self_attn.k_norms.weight", "self_attn.k_norm"),
        ("model.embed_token.weight", "embed_tokens.weight"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "self_attn."),
    ],
)
def test_an_unexpected_tensor_is_named_with_its_nearest(name, nearest, checkpoint):
    source = checkpoint("llama")
    entries = {**source.entries, name: Entry(torch.bfloat16, (128, 128))}
    with pytest.raises(FamilyError) as caught:
        make_plan(recipe(), source.config, entries)
    for word in (name, nearest, "quantkit/families/llama.py"):
        assert word in str(caught.value)


def test_a_linear_that_is_no_matrix_is_unexpected(checkpoint):
    source = checkpoint("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(FamilyError, match=r"up_proj"):
        make_plan(recipe(), source.config, {**source.entries, name: Entry(torch.bfloat16, (128,))})


def test_an_unknown_architecture_names_the_nearest(checkpoint):
    source = checkpoint("llama")
    with pytest.raises(FamilyError, match=r"'qwen4' is not known; the nearest known is 'qwen\d'.*quantkit/families/"):
        make_plan(recipe(), {**source.config, "model_type": "qwen4"}, source.entries)


# --- Exact bytes ------------------------------------------------------------------------------------------------------------------


def rounded(name: str, folder: Path, **changes: Any) -> Path:
    """A shipped recipe without its search and its score: the same files in a fraction of the time."""
    fields = yaml.safe_load((shipped("recipes") / f"{name}.yaml").read_text())
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**fields, "method": "rtn", "score": {"samples": 0}, **changes}))
    return path


KEEP_MLP = {"overrides": [{"match": "mlp.*", "keep": True}]}


@pytest.mark.parametrize(
    "model, name, changes, shards",
    [
        ("llama", "awq-w4", {}, 1),
        ("llama", "awq-w4-asym", {}, 3),
        ("llama", "awq-w4-g128", {}, 1),
        ("llama", "awq-w8", {}, 3),
        ("llama", "awq-w4-asym", {"weights": {"bits": 4, "group": "row", "symmetric": False}}, 1),
        ("gemma4_moe", "awq-w4", {}, 1),
        ("gemma4_moe", "awq-w4-asym", {}, 3),
        ("gemma4_moe", "awq-w4-g128", {}, 3),
        ("gemma4_moe", "awq-w4", {"experts_layout": "fused"}, 3),
        ("gemma4_moe", "awq-w4-asym", {"experts_layout": "fused", **KEEP_MLP}, 1),
        ("gemma4_e", "awq-w4", {}, 3),
    ],
)
def test_predicted_bytes_are_the_files_bytes(model, name, changes, shards, checkpoint, tmp_path, monkeypatch):
    source, path = checkpoint(model), rounded(name, tmp_path, **changes)
    if shards > 1:
        monkeypatch.setattr(compressed_tensors, "SHARD_BYTES", 150_000)
    plan, sizes = pipeline.plan(str(source.folder), str(path))
    result = pipeline.quantize(str(source.folder), recipe=str(path), output=tmp_path / "out")
    files = sorted(result.artefacts["compressed-tensors"].glob("*.safetensors"))
    assert len(files) >= shards
    assert sizes == result.bytes == {"compressed-tensors": sum(file.stat().st_size for file in files)}
    layout = CompressedTensors(plan, changes.get("experts_layout", "per-expert"))
    assert {shard.name: shard.bytes for shard in layout.shards} == {file.name: file.stat().st_size for file in files}


def test_a_checkpoint_in_fp32_keeps_what_is_kept_in_fp32(tmp_path):
    folder = tiny.build("llama", tmp_path / "model", dtype="float32", num_hidden_layers=1)
    path = rounded("awq-w4", tmp_path)
    predicted = pipeline.plan(str(folder), str(path))[1]
    assert predicted == pipeline.quantize(str(folder), recipe=str(path), output=tmp_path / "out").bytes


# --- The public 26B-A4B shape -----------------------------------------------------------------------------------------------------

HIDDEN, LAYERS, EXPERTS, WIDTH, SHARED = 2816, 30, 128, 704, 2112
PUBLIC_26B = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "model_type": "gemma4",
    "tie_word_embeddings": True,
    "audio_config": None,
    "text_config": {
        "model_type": "gemma4_text", "vocab_size": 262144, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "intermediate_size": SHARED,
        "layer_types": ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(LAYERS)],
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "num_global_key_value_heads": 2, "global_head_dim": 512,
        "attention_k_eq_v": True, "enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": 8, "moe_intermediate_size": WIDTH,
        "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "tie_word_embeddings": True, "sliding_window": 1024,
    },
    "vision_config": {
        "model_type": "gemma4_vision", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_key_value_heads": 16, "head_dim": 72, "patch_size": 16, "position_embedding_size": 10240, "standardize": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def entries_26b() -> dict[str, Entry]:
    return published_entries(PUBLIC_26B)


def figure(entries: dict[str, Entry], **fields: Any) -> tuple[CompressedTensors, str]:
    chosen = Recipe.model_validate({**load_recipe("awq-w4").model_dump(), **fields})
    made = CompressedTensors(make_plan(chosen, PUBLIC_26B, entries))
    return made, f"{made.bytes / 1e9:.2f} GB = {made.bytes / 2**30:.2f} GiB"


def test_26b_all_text_linears_in_w4(entries_26b):
    made, size = figure(entries_26b)
    assert size == "16.42 GB = 15.29 GiB"
    parts: Counter[str] = Counter()
    for piece in (piece for shard in made.shards for piece in shard.pieces):
        kind = next((k for k in ("vision", "embed_tokens", ".experts.", ".self_attn.", ".mlp.") if k in piece.name), "rest")
        kind = "rest" if kind == ".self_attn." and "norm" in piece.name else kind
        parts[kind] += piece.bytes
    linear = lambda out, columns: out * columns // 2 + out * columns // 32 * 2 + 2 * 8  # codes, scales, shape # noqa: E731
    sliding = linear(16 * 256, HIDDEN) + 2 * linear(8 * 256, HIDDEN) + linear(HIDDEN, 16 * 256)
    full = linear(16 * 512, HIDDEN) + linear(2 * 512, HIDDEN) + linear(HIDDEN, 16 * 512)
    assert parts[".self_attn."] == 25 * sliding + 5 * full
    assert parts[".mlp."] == LAYERS * (2 * linear(SHARED, HIDDEN) + linear(HIDDEN, SHARED))
    assert parts[".experts."] == LAYERS * EXPERTS * (2 * linear(WIDTH, HIDDEN) + linear(HIDDEN, WIDTH))
    assert parts["embed_tokens"] == 2 * 262144 * HIDDEN
    assert parts["vision"] == sum(entry.bytes for name, entry in entries_26b.items() if "vision" in name)
    assert parts["rest"] < 25e6, "norms, routers, layer scalars"
    headers = made.bytes - parts.total()
    assert 0 < headers < 5e6


def test_26b_with_the_shared_mlp_kept(entries_26b):
    assert figure(entries_26b, overrides=[{"match": "mlp.*", "keep": True}])[1] == "17.19 GB = 16.01 GiB"


def test_26b_group_128_falls_back_for_the_experts():
    text = PUBLIC_26B["text_config"]
    one_layer = {**PUBLIC_26B, "text_config": {**text, "num_hidden_layers": 1, "layer_types": text["layer_types"][:1]}}
    by_local = fates(make_plan(load_recipe("awq-w4-g128"), one_layer, published_entries(one_layer)))
    assert by_local["experts.127.down_proj"] == (Scheme(4, 64, True), "group 64: 128 does not divide 704")
    assert by_local["experts.0.gate_proj"][0] == Scheme(4, 64, True)
    assert by_local["self_attn.q_proj"] == (Scheme(4, 128, True), "")
    assert by_local["mlp.down_proj"] == (Scheme(4, 64, True), "group 64: 128 does not divide 2112")
