"""GGUF files of every family, read back by the gguf package. llama.cpp itself: benchmarks/engines/verify_gguf.py."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file

from quantkit import pipeline
from quantkit.errors import FamilyError, RecipeError, WriteError
from quantkit.families.family import in_block, outside_block
from quantkit.grid.decoded import decoded
from quantkit.grid.integer import from_codes
from quantkit.recipe import load_recipe
from quantkit.store import Store
from quantkit.types import Codes, Scheme
from quantkit.write.gguf.tokenizer import PRE_TOKENIZERS, tokenizer_keys

gguf = pytest.importorskip("gguf")

ROOT = Path(__file__).parents[1]
QUICK = {"calibration": {"samples": 8, "sequence_length": 48}, "score": {"samples": 0}, "search": {"exponents": 4, "shrinks": 3}}
PLAIN = {"method": "rtn", "targets": [], "formats": ["gguf"], **QUICK}
# llama.cpp has these numbers of Gemma 3n in its code
GEMMA3N = {
    "num_hidden_layers": 21, "num_kv_shared_layers": 1, "laurel_rank": 64, "hidden_size_per_layer_input": 256, "hidden_size": 64,
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 11,
}  # fmt: skip
CHANGES = {"gemma3n_text": GEMMA3N, "gemma3n": GEMMA3N}
ARCHITECTURES = {
    "gemma4": "gemma4", "gemma3": "gemma3", "gemma3n": "gemma3n", "llama": "llama", "mistral": "llama", "mixtral": "llama",
    "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe",
}  # fmt: skip


def recipe_file(folder: Path, base: str = "awq-w4", **changes) -> str:
    path = folder / f"{base}-{len(list(folder.glob('*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump({**load_recipe(base).model_dump(mode="json", exclude={"name"}), **QUICK, **changes}))
    return str(path)


def write(tmp_path: Path, name: str, base: str = "awq-w4", build: dict | None = None, **changes) -> tuple[Path, Path]:
    """(source folder, file)."""
    source = tmp_path / "model"
    if not source.exists():
        tiny.build(name, source, **{**CHANGES.get(name, {}), **(build or {})})
    result = pipeline.quantize(str(source), recipe=recipe_file(tmp_path, base, **changes), output=tmp_path / "out", fresh=True)
    (file,) = result.artefacts["gguf"].glob("*.gguf")
    return source, file


def sample_file(folder: Path) -> Path:
    path = folder / "few.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny.SENTENCES))
    return path


def tensors(file: Path) -> dict[str, torch.Tensor]:
    """Every tensor, decoded to fp32 by the package, in our order of dimensions."""
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        found[tensor.name] = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type))).view(shape)
    return found


def kinds(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


def keys(file: Path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def source_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_family_unquantized(name, tmp_path):
    """Names are those of the package's own table, data is the source's but for what the family's page in llama.cpp asks."""
    source, file = write(tmp_path, name, **PLAIN)
    made, before = tensors(file), source_tensors(source)
    config = json.loads((source / "config.json").read_text())
    text = config.get("text_config", config)
    architecture = keys(file)["general.architecture"]
    assert architecture == ARCHITECTURES[text["model_type"].removesuffix("_text")]
    number = next(n for n, a in gguf.MODEL_ARCH_NAMES.items() if a == architecture)
    table = gguf.get_tensor_name_map(number, text["num_hidden_layers"])
    left = dict(made)
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for full, tensor in before.items():
        local = outside_block(full)
        if any(tower in full for tower in ("vision_tower", "audio_tower", "embed_vision", "embed_audio", "multi_modal_projector")):
            continue
        if numbered := re.fullmatch(r"(.*(?:experts|altup_\w+))\.(\d+)(.*)\.weight", full):
            stacks.setdefault(numbered[1] + numbered[3], {})[int(numbered[2])] = tensor
            continue
        theirs = _their_name(table, full, local)
        assert theirs in made, full
        ours = left.pop(theirs)
        if name in ("llama", "mistral", "mixtral") and local.endswith(("q_proj.weight", "k_proj.weight")):
            heads = text["num_attention_heads" if "q_proj" in local else "num_key_value_heads"]
            tensor = interleaved(tensor, heads)
        if architecture == "gemma3" and local.endswith("norm.weight"):
            tensor = tensor + 1
        assert torch.equal(ours, tensor.view(ours.shape)), full
    for stem, parts in stacks.items():
        known = re.sub(r"model\.(layers.*)block_sparse_moe", r"\1feed_forward", stem)  # the package knows another old spelling
        theirs = _their_name(table, known, stem)
        expected = torch.stack([parts[key] for key in sorted(parts)])
        assert torch.equal(left.pop(theirs), expected), stem
    assert set(left) <= {"rope_freqs.weight", *(f"blk.20.{made_up}.weight" for made_up in ("attn_k", "attn_v", "attn_k_norm"))}
    for dummy, tensor in left.items():
        if dummy.startswith("blk"):
            assert bool((tensor == (1 if "norm" in dummy else 0)).all())
    assert {kind for tensor, kind in kinds(file).items() if made[tensor].ndim == 1 or "norm" in tensor or "ffn_gate_inp" in tensor} == {
        "F32"
    }


def _their_name(table, full: str, local: str) -> str:
    if local.endswith("router.scale"):
        return f"blk.{in_block(full)[1]}.ffn_gate_inp.scale"
    if local.endswith("router.per_expert_scale"):
        return f"blk.{in_block(full)[1]}.ffn_down_exps.scale"
    name = full.replace("language_model.", "")
    if not name.endswith((".weight", ".bias")):
        name += ".weight"
    found = table.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found, f"the package's table does not know {name}"
    return found


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row 2i of a head is row i of its first half, row 2i + 1 row i of its second."""
    width = len(weight) // heads
    rows = [head * width + i + half * width // 2 for head in range(heads) for i in range(width // 2) for half in (0, 1)]
    return weight[rows]


@pytest.mark.parametrize(
    "base, changes, kind",
    [
        ("awq-w4", {}, "Q4_0"),
        ("awq-w4-asym", {}, "Q4_1"),
        ("awq-w8", {}, "Q8_0"),
        ("rtn-w4", {"weights": {"bits": 5, "group": 64}}, "Q5_0"),
        ("rtn-w4", {"weights": {"bits": 5, "group": 32, "symmetric": False}}, "Q5_1"),
    ],
    ids=["4", "4 asym", "8", "5", "5 asym"],
)
@pytest.mark.parametrize("name", ["llama", "gemma4_moe", "mixtral"])
def test_what_was_solved_is_what_is_written(name, base, changes, kind, tmp_path):
    source, file = write(tmp_path, name, base, formats=["gguf"], **changes)
    plan, sizes = pipeline.plan(str(source), recipe_file(tmp_path, base, formats=["gguf"], **changes))
    assert sizes == {"gguf": file.stat().st_size}
    assert file.name == f"model-{kind}.gguf"
    made, found = tensors(file), kinds(file)
    store = Store(tmp_path / "out" / "solved", _plan_of(tmp_path), {})
    table = {"experts.{}.gate_proj": "ffn_gate_exps", "experts.{}.up_proj": "ffn_up_exps", "experts.{}.down_proj": "ffn_down_exps"}
    checked = 0
    for block in plan.blocks:
        solved = store.get(block)
        for linear in block.linears:
            stood = from_codes(solved.linears[linear.local].codes)
            prefix, leaf = f"blk.{block.index}", linear.local.rpartition(".")[2]
            if "experts." in linear.local:
                expert = int(linear.local.split("experts.")[1].split(".")[0])
                if name == "gemma4_moe" and leaf != "down_proj":
                    target, width = f"{prefix}.ffn_gate_up_exps.weight", len(stood)
                    ours = made[target][expert][:width] if leaf == "gate_proj" else made[target][expert][width:]
                else:
                    target = f"{prefix}.{table[f'experts.{{}}.{leaf}']}.weight"
                    ours = made[target][expert]
            else:
                short = {"o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
                target = f"{prefix}.{short.get(leaf, f'attn_{leaf[0]}')}.weight"
                ours = made[target]
                if name != "gemma4_moe" and leaf in ("q_proj", "k_proj"):
                    stood = interleaved(stood, 4 if leaf == "q_proj" else 2)
            assert found[target] == kind
            if "asym" in base or kind == "Q5_1":
                assert float((ours - stood).abs().max()) <= float(stood.abs().max()) * 2**-9, target  # fp16 minima, see test_ggml.py
            else:
                assert torch.equal(ours, stood), target
            checked += 1
    assert checked == len(list(plan.linears()))
    report = json.loads((tmp_path / "out" / "run.json").read_text())
    assert report["gguf"]["scales"] == 0
    assert (report["gguf"]["minima"] > 0) == (kind in ("Q4_1", "Q5_1"))
    assert report["gguf"]["groups"] == sum(
        linear.shape[0] * linear.shape[1] // linear.scheme.width(linear.shape[1]) for linear in plan.linears()
    )


def _plan_of(tmp_path: Path):
    """A plan with the fingerprint of the run that is there."""
    from types import SimpleNamespace

    return SimpleNamespace(fingerprint=json.loads((tmp_path / "out" / "solved" / "plan.json").read_text())["fingerprint"])


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_plan_tells_the_files_size(name, tmp_path):
    source, file = write(tmp_path, name, "rtn-w4", formats=["gguf"])
    _, sizes = pipeline.plan(str(source), recipe_file(tmp_path, "rtn-w4"), formats=["gguf", "compressed-tensors"])
    assert sizes["gguf"] == file.stat().st_size
    _, alone = (
        pipeline.plan(str(source / "config.json"), recipe_file(tmp_path, "rtn-w4"), formats=["gguf"]) if name != "gemma3n" else (0, {})
    )
    for told, size in alone.items():
        assert told == "gguf without its tokenizer"
        assert size < sizes["gguf"] < size + 30_000


def test_folds_reach_norms_and_a_second_format_costs_no_second_solve(tmp_path):
    source = tiny.build("gemma3_text", tmp_path / "model")
    recipe = recipe_file(tmp_path)
    first = pipeline.quantize(str(source), recipe=recipe, output=tmp_path / "out")
    solved = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "solved").glob("block-*")}
    second = pipeline.quantize(str(source), recipe=recipe, output=tmp_path / "out", formats=["gguf"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "solved").glob("block-*")} == solved
    assert (tmp_path / "out" / "compressed-tensors" / "model.safetensors").exists()
    theirs = source_tensors(first.artefacts["compressed-tensors"])
    before = source_tensors(source)
    (file,) = second.artefacts["gguf"].glob("*.gguf")
    made, folded = tensors(file), 0
    for block in range(3):
        for ours, name in (("attn_norm", "input_layernorm"), ("ffn_norm", "pre_feedforward_layernorm")):
            full = f"model.layers.{block}.{name}.weight"
            assert torch.equal(made[f"blk.{block}.{ours}.weight"], theirs[full] + 1)
            folded += not torch.equal(theirs[full], before[full])
    assert folded


def test_the_folder(tmp_path):
    source = tiny.build("gemma4_moe", tmp_path / "model")
    result = pipeline.quantize(str(source), recipe="gguf-q4_0", output=tmp_path / "out", calibration=str(sample_file(tmp_path)))
    (file,) = result.artefacts["gguf"].glob("*.gguf")
    assert kinds(file)["token_embd.weight"] == "Q8_0"
    folder = file.parent
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model-Q4_0.gguf", "quantkit.json"]
    manifest = json.loads((folder / "quantkit.json").read_text())
    assert manifest["files"][file.name]["bytes"] == file.stat().st_size
    assert manifest["format"] == "gguf"
    card = (folder / "README.md").read_text()
    assert "llama-server -m model-Q4_0.gguf" in card
    assert "library_name: gguf" in card
    assert "vllm" not in card
    assert "from_pretrained" not in card


def test_a_file_that_was_cut_is_written_again_to_the_same_bytes(tmp_path):
    source = tiny.build("llama", tmp_path / "model")
    recipe = recipe_file(tmp_path, "rtn-w4", formats=["gguf"])
    result = pipeline.quantize(str(source), recipe=recipe, output=tmp_path / "out")
    (file,) = result.artefacts["gguf"].glob("*.gguf")
    whole = file.read_bytes()
    file.write_bytes(whole[:-5000])
    pipeline.quantize(str(source), recipe=recipe, output=tmp_path / "out")
    assert file.read_bytes() == whole
    assert list(file.parent.glob(".*")) == []


@pytest.mark.parametrize(
    "before, after", [({"types": {"token_embd": "f16"}}, {"types": {"token_embd": "bf16"}}), ({}, {"pre_tokenizer": "qwen2"})]
)
def test_a_file_of_other_types_or_keys_is_written_again_though_it_has_the_same_size(before, after, tmp_path):
    source = tiny.build("llama", tmp_path / "model", num_hidden_layers=1)
    sizes, files = [], []
    for folder, said in (("out", before), ("out", after), ("fresh", after)):
        recipe = Path(recipe_file(tmp_path, "rtn-w4", formats=["gguf"], gguf=said)).rename(tmp_path / "recipe.yaml")
        result = pipeline.quantize(str(source), recipe=str(recipe), output=tmp_path / folder)
        (file,) = result.artefacts["gguf"].glob("*.gguf")
        sizes.append(file.stat().st_size)
        files.append(file.read_bytes())
    assert len(set(sizes)) == 1
    assert files[0] != files[1] == files[2]


@pytest.mark.parametrize("off", [0, 1])
def test_a_tied_head_in_the_checkpoint_is_left_out_only_if_it_is_the_embeddings(off, tmp_path):
    """transformers computes with a head that differs, so a file without it would be another model."""
    source = tiny.build("qwen2", tmp_path / "model", num_hidden_layers=1)
    tensors_ = load_file(source / "model.safetensors")
    tensors_["lm_head.weight"] = tensors_["model.embed_tokens.weight"] + off
    save_file(tensors_, source / "model.safetensors", metadata={"format": "pt"})
    if off:
        with pytest.raises(WriteError, match=r"lm_head\.weight: differs.*tie_word_embeddings"):
            write(tmp_path, "qwen2", "rtn-w4", formats=["gguf"])
    else:
        assert "output.weight" not in kinds(write(tmp_path, "qwen2", "rtn-w4", formats=["gguf"])[1])


# --- Metadata --------------------------------------------------------------------------------------------------------------------


def test_metadata_of_gemma4_experts(tmp_path):
    _, file = write(tmp_path, "gemma4_moe", **PLAIN)
    found = keys(file)
    expected = {
        "general.type": "model", "general.file_type": 32, "general.quantization_version": 2, "gemma4.block_count": 4,
        "gemma4.embedding_length": 128, "gemma4.attention.key_length": 64, "gemma4.attention.key_length_swa": 32,
        "gemma4.attention.head_count_kv": [2, 2, 1, 1], "gemma4.attention.sliding_window_pattern": [True, True, False, False],
        "gemma4.attention.sliding_window": 24, "gemma4.expert_count": 8, "gemma4.expert_used_count": 2,
        "gemma4.expert_feed_forward_length": 96, "gemma4.rope.freq_base": 1e6, "gemma4.rope.freq_base_swa": 1e4,
        "gemma4.rope.dimension_count": 64, "gemma4.rope.dimension_count_swa": 32, "gemma4.final_logit_softcapping": 30.0,
        "gemma4.embedding_length_per_layer_input": 0, "gemma4.attention.shared_kv_layers": 0,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    factors = tensors(file)["rope_freqs.weight"]
    assert torch.equal(factors, torch.tensor([1.0] * 8 + [1e30] * 24))


def test_metadata_of_shared_keys_and_wide_mlps(tmp_path):
    _, file = write(tmp_path, "gemma4_e", **PLAIN)
    found = keys(file)
    assert found["gemma4.feed_forward_length"] == [224, 224, 448, 448]
    assert found["gemma4.attention.shared_kv_layers"] == 2
    assert found["gemma4.embedding_length_per_layer_input"] == 32
    assert "blk.3.attn_k.weight" not in kinds(file)
    assert kinds(file)["per_layer_token_embd.weight"] == "BF16"


def test_llama3_scaling_is_transformers_own(tmp_path):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    _, file = write(tmp_path, "llama", build={"rope_parameters": {**rope, "rope_theta": 10000.0}}, **PLAIN)
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig.from_pretrained(tmp_path / "model")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** (-torch.arange(0, 32, 2) / 32)
    assert torch.allclose(plain / tensors(file)["rope_freqs.weight"], scaled, rtol=1e-6)


def test_the_context_ends_at_a_window_that_llama_cpp_does_not_slide(tmp_path):
    _, file = write(tmp_path, "mistral", **PLAIN)
    assert keys(file)["llama.context_length"] == tiny.WINDOW


def test_per_layer_rows_behind_the_table_are_row_0(tmp_path):
    changes = {**GEMMA3N, "vocab_size_per_layer_input": tiny.VOCABULARY - 24}
    source, file = write(tmp_path, "gemma3n_text", build=changes, **PLAIN)
    table = tensors(file)["per_layer_token_embd.weight"]
    before = next(t for n, t in source_tensors(source).items() if "embed_tokens_per_layer" in n)
    assert table.shape[0] == tiny.VOCABULARY == len(before) + 24
    assert torch.equal(table[-24:], before[:1].expand(24, -1))


@pytest.mark.parametrize(
    "name, changes, said",
    [
        ("gemma3n_text", {"laurel_rank": 32}, "laurel_rank is 32"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False"),
        ("gemma3_text", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar is 100"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters dynamic"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(name, changes, said, tmp_path):
    with pytest.raises(FamilyError, match=said):
        write(tmp_path, name, build={**CHANGES.get(name, {}), **changes}, **PLAIN)
    assert not (tmp_path / "out").exists()


# --- Types -----------------------------------------------------------------------------------------------------------------------


def test_types_by_pattern_and_the_last_that_matches_counts(tmp_path):
    types = {"*": "f16", "token_embd": "q8_0", "blk.0.attn_*": "q4_0", "blk.0.attn_q": "q5_1"}
    source, file = write(tmp_path, "llama", **{**PLAIN, "gguf": {"types": types}})
    found = kinds(file)
    wanted = {
        "token_embd": "Q8_0",
        "output": "F16",
        "blk.0.attn_k": "Q4_0",
        "blk.0.attn_q": "Q5_1",
        "blk.1.attn_q": "F16",
        "blk.0.attn_norm": "F32",
    }
    assert {name: found[f"{name}.weight"] for name in wanted} == wanted
    before = source_tensors(source)["model.embed_tokens.weight"]
    assert float((tensors(file)["token_embd.weight"] - before).abs().max()) < float(before.abs().max()) / 250


@pytest.mark.parametrize(
    "types, said",
    [
        ({"token_embed": "q8_0"}, "'token_embed' matches no matrix.*the nearest is 'token_embd'"),
        ({"token_embd.weight": "q8_0"}, "'token_embd.weight' matches no matrix.*the nearest is 'token_embd'"),
        ({"blk.0.attn_norm": "f16"}, "norms and routers are F32"),
        ({"blk.*.attn_q": "q8_0"}, "matches no matrix that the recipe leaves unquantized"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(types, said, tmp_path):
    with pytest.raises(WriteError, match=said):
        write(tmp_path, "llama", "rtn-w4", formats=["gguf"], gguf={"types": types})


@pytest.mark.parametrize("weights", [{"bits": 8, "symmetric": False}, {"bits": 3}, {"bits": 6}], ids=["8 asym", "3", "6"])
def test_schemes_that_no_type_holds_are_refused(weights, tmp_path):
    with pytest.raises(WriteError, match="hold 4 or 5 bits, or 8 bits symmetric"):
        write(tmp_path, "llama", "rtn-w4", formats=["gguf"], weights={"group": 32, "symmetric": True, **weights})


def test_one_precision_a_tensor_but_not_a_file(tmp_path):
    overrides = [{"match": "mlp.*", "weights": {"bits": 8}}, {"match": "self_attn.o_proj", "keep": True}]
    _, file = write(tmp_path, "llama", "rtn-w4", formats=["gguf"], overrides=overrides)
    found = kinds(file)
    assert [found[f"blk.1.{name}.weight"] for name in ("attn_q", "ffn_up", "attn_output")] == ["Q4_0", "Q8_0", "BF16"]


def test_a_trained_grid_of_fp16_scales_is_copied_to_the_bit_and_elsewhere_its_codes_are(tmp_path):
    """Trained for Q4_0, published in bf16: the file gives the checkpoint back; compressed-tensors and ONNX store bf16 scales."""
    source = tiny.build("llama", tmp_path / "model", num_hidden_layers=1)
    state = tiny.train(source, "_proj.weight")
    recipe = recipe_file(tmp_path, "awq-w4", formats=["gguf", "compressed-tensors"])
    result = pipeline.quantize(str(source), recipe=recipe, output=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["gguf"]["scales"] == 0
    (file,) = result.artefacts["gguf"].glob("*.gguf")
    made, names = tensors(file), {"mlp.gate_proj": "ffn_gate", "mlp.down_proj": "ffn_down", "self_attn.o_proj": "attn_output"}
    packed = {n: t for path in result.artefacts["compressed-tensors"].glob("*.safetensors") for n, t in load_file(path).items()}
    for local, short in names.items():
        full = f"model.layers.0.{local}"
        weight = state[f"{full}.weight"]
        assert weight.dtype == torch.bfloat16
        assert torch.equal(made[f"blk.0.{short}.weight"].bfloat16(), weight)
        scale = packed[f"{full}.weight_scale"]
        assert scale.dtype == torch.bfloat16
        codes = Codes(packed[f"{full}.weight_packed"], scale, None, Scheme(4, 32, True), weight.shape[1])
        assert not torch.equal(from_codes(codes).bfloat16(), weight)
        assert torch.allclose(from_codes(codes), weight.float(), rtol=2**-7, atol=0)


def test_what_fp16_cannot_hold_is_told(tmp_path):
    source = tiny.build("llama", tmp_path / "model")
    state = load_file(source / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][:2] *= 1e-5
    save_file(state, source / "model.safetensors", {"format": "pt"})
    _, file = write(tmp_path, "llama", "rtn-w4", formats=["gguf"])
    report = json.loads((tmp_path / "out" / "run.json").read_text())
    assert report["gguf"]["scales"] == 2 * 128 // 32
    card = (file.parent / "README.md").read_text()
    assert "8 have a scale" in card
    (file.parent / "README.md").unlink()  # a run that was killed behind the weights counts again what they lost
    (recipe,) = tmp_path.glob("*.yaml")
    pipeline.quantize(str(source), recipe=str(recipe), output=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["gguf"] == report["gguf"]
    assert (file.parent / "README.md").read_text() == card


def test_a_nan_is_refused(tmp_path):
    source = tiny.build("llama", tmp_path / "model")
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"][3, 5] = float("nan")
    save_file(state, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(Exception, match=r"output\.weight: holds NaN"):
        write(tmp_path, "llama", "rtn-w4", formats=["gguf"])
    assert not list((tmp_path / "out" / "gguf").glob("*"))


# --- Tokenizers ------------------------------------------------------------------------------------------------------------------


def test_tokens_types_and_special_ids(tmp_path):
    _, file = write(tmp_path, "gemma4_moe", **PLAIN)
    found = keys(file)
    assert found["tokenizer.ggml.model"] == "gpt2"  # the tiny tokenizer is byte-level, whatever the family
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == tiny.VOCABULARY
    assert types[tokens.index("<|turn>")] == gguf.TokenType.CONTROL
    assert types[300] == gguf.TokenType.NORMAL
    assert found["tokenizer.ggml.bos_token_id"] == tiny.IDS["<bos>"]
    assert found["tokenizer.ggml.eos_token_id"] == tiny.IDS["<eos>"]
    assert found["tokenizer.ggml.eot_token_id"] == tiny.IDS["<turn|>"]
    assert found["tokenizer.ggml.padding_token_id"] == tiny.IDS["<pad>"]
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.chat_template"] == tiny.CHAT
    merges = json.loads((tmp_path / "model" / "tokenizer.json").read_text())["model"]["merges"]
    assert found["tokenizer.ggml.merges"] == [" ".join(merge) for merge in merges]


def test_gemmas_own_kind_of_tokenizer():
    found = tokenizer_keys(ROOT / "reference", 2600, "gemma4", ("<|channel>", "<channel|>"), None)
    assert found["ggml.model"] == "gemma4"
    types = dict(zip(found["ggml.tokens"], found["ggml.token_type"], strict=True))
    assert types["<|turn>"] == gguf.TokenType.CONTROL
    assert types["<|channel>"] == gguf.TokenType.USER_DEFINED
    assert types["<0x41>"] == gguf.TokenType.BYTE
    assert types["[PAD2599]"] == gguf.TokenType.UNUSED
    assert found["ggml.merges"][0] == "▁ ▁"


def test_the_same_tokenizer_as_spm_tells_merges_by_scores():
    found = tokenizer_keys(ROOT / "reference", 2560, "gemma3", (), None)
    assert (found["ggml.model"], found["ggml.pre"], found["ggml.add_space_prefix"]) == ("llama", "default", False)
    scores = dict(zip(found["ggml.tokens"], found["ggml.scores"], strict=True))
    merges = json.loads((ROOT / "reference" / "tokenizer.json").read_text())["model"]["merges"]
    made = ["".join(merge) for merge in merges]
    assert sorted(set(made), key=lambda piece: -scores[piece]) == list(dict.fromkeys(made))
    assert scores["<bos>"] < min(scores[piece] for piece in made)
    assert "ggml.merges" not in found


def tokenizer_with(tmp_path: Path, **changes) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tiny.save_tokenizer(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer.update(changes)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def split(pattern: str) -> dict:
    steps = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    return {"type": "Sequence", "pretokenizers": steps}


@pytest.mark.parametrize("pattern, name", [(pattern, name) for pattern, name in PRE_TOKENIZERS.items() if pattern])
def test_the_pre_tokenizer_is_found_by_its_pattern(pattern, name, tmp_path):
    folder = tokenizer_with(tmp_path, pre_tokenizer=split(pattern))
    assert tokenizer_keys(folder, tiny.VOCABULARY, "llama", (), None)["ggml.pre"] == name


def test_llama_3s_pattern_as_it_is_published():
    words, rest = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    pattern = words + r"|\p{N}{1,3}|" + rest
    assert PRE_TOKENIZERS[pattern] == "llama-bpe"


def test_an_unknown_pattern_is_refused_and_can_be_named(tmp_path):
    folder = tokenizer_with(tmp_path, pre_tokenizer=split(r"\p{L}+|\s"))
    with pytest.raises(WriteError, match="pre_tokenizer"):
        tokenizer_keys(folder, tiny.VOCABULARY, "llama", (), None)
    assert tokenizer_keys(folder, tiny.VOCABULARY, "llama", (), "smollm")["ggml.pre"] == "smollm"


def test_tokens_without_a_row_are_left_out(tmp_path):
    folder = tokenizer_with(tmp_path)
    found = tokenizer_keys(folder, tiny.VOCABULARY - 5, "llama", (), None)
    assert len(found["ggml.tokens"]) == tiny.VOCABULARY - 5


def test_a_tokenizer_that_cannot_be_told_is_refused(tmp_path):
    with pytest.raises(WriteError, match="Unigram"):
        tokenizer_keys(tokenizer_with(tmp_path, model={"type": "Unigram"}), 10, "llama", (), None)
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(WriteError, match="neither byte-level"):
        tokenizer_keys(tokenizer_with(tmp_path, pre_tokenizer=None), 10, "llama", (), None)
    with pytest.raises(WriteError, match=r"tokenizer\.json: missing"):
        tokenizer_keys(tmp_path, 10, "llama", (), None)


# --- The door --------------------------------------------------------------------------------------------------------------------


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    source = tiny.build("llama", tmp_path / "model")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(WriteError, match=r"pip install 'quantkit\[gguf\]'"):
        pipeline.plan(str(source), "awq-w4", formats=["gguf"])
    assert pipeline.plan(str(source), "awq-w4")[1]


def test_a_recipe_that_quantizes_nothing_is_for_gguf_only(tmp_path):
    with pytest.raises(RecipeError, match="nothing to quantize"):
        write(tmp_path, "llama", **{**PLAIN, "formats": ["compressed-tensors"]})


# --- K-quants --------------------------------------------------------------------------------------------------------------------

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "head_dim": 64}


@pytest.mark.parametrize("mix", ["q4_k_m", "q4_k_s"])
def test_mixes_are_llama_cpps(mix, tmp_path):
    """The types that llama-quantize gives an 8-layer model; the file decodes to what was solved."""
    changes = {"formats": ["gguf"], "weights": {"grid": mix}, "gguf": {"types": {"token_embd": ["q6_k", "q8_0"]}}}
    source, file = write(tmp_path, "llama", "rtn-w4", build=WIDE, **changes)
    found, made = kinds(file), tensors(file)
    rich = {"q4_k_m": [0, 3, 6, 7], "q4_k_s": [0]}[mix]  # i < n/8, i >= 7n/8, (i - n/8) % 3 == 2
    assert [i for i in range(8) if found[f"blk.{i}.ffn_down.weight"] == ("Q6_K" if mix == "q4_k_m" else "Q5_K")] == rich
    values = [i for i in range(8) if found[f"blk.{i}.attn_v.weight"] != "Q4_K"]
    assert values == (rich if mix == "q4_k_m" else [0, 1, 2, 3])
    assert found["token_embd.weight"] == "Q6_K"
    assert {found[f"blk.5.{name}.weight"] for name in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up")} == {"Q4_K"}
    assert file.name == f"model-{mix.upper()}.gguf"
    assert keys(file)["general.file_type"] == {"q4_k_m": 15, "q4_k_s": 14}[mix]
    recipe = recipe_file(tmp_path, "rtn-w4", **changes)
    plan, sizes = pipeline.plan(str(source), recipe)
    assert sizes == {"gguf": file.stat().st_size}
    store = Store(tmp_path / "out" / "solved", _plan_of(tmp_path), {})
    before = source_tensors(source)
    for linear in plan.blocks[3].linears:
        stood = decoded(store.codes(3, linear))
        leaf = linear.local.rpartition(".")[2]
        if leaf in ("q_proj", "k_proj"):
            stood = interleaved(stood, 4 if leaf == "q_proj" else 2)
        short = {"o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
        assert torch.equal(made[f"blk.3.{short.get(leaf, f'attn_{leaf[0]}')}.weight"], stood), leaf
    down = before["model.layers.3.mlp.down_proj.weight"]
    assert float((made["blk.3.ffn_down.weight"] - down).norm() / down.norm()) < (0.02 if mix == "q4_k_m" else 0.08)


def test_rows_that_256_does_not_divide_take_the_next_type(tmp_path):
    _, file = write(tmp_path, "gemma4_moe", "rtn-w4", build={"hidden_size": 256}, formats=["gguf"], weights={"grid": "q4_k_m"})
    found = kinds(file)
    assert found["blk.1.ffn_gate_up_exps.weight"] == "Q4_K"
    assert {found[f"blk.{i}.ffn_down_exps.weight"] for i in range(4)} == {"Q5_0", "Q8_0"}
    assert found["blk.0.attn_output.weight"] == "Q5_0"  # 128 columns


def test_k_quants_of_a_solved_model_beat_plain_ones(tmp_path):
    scored = {"score": {"samples": 4, "sequence_length": 64}, "formats": ["gguf"], "weights": {"grid": "q4_k"}}
    errors = {}
    for base in ("awq-w4", "rtn-w4"):
        (tmp_path / base).mkdir()
        write(tmp_path / base, "llama", base, build={**WIDE, "num_hidden_layers": 2}, **scored)
        errors[base] = json.loads((tmp_path / base / "out" / "run.json").read_text())
    assert errors["awq-w4"]["summary"]["mean_error"] < 0.95 * errors["awq-w4"]["summary"]["mean_error_rounded"]
    assert errors["awq-w4"]["heldout"]["kl"] < errors["rtn-w4"]["heldout"]["kl"]


def test_k_quants_are_ggufs_alone(tmp_path):
    with pytest.raises(RecipeError, match="compressed-tensors does not hold q4_k, that grid is GGUF's"):
        write(tmp_path, "llama", "rtn-w4", build=WIDE, formats=["gguf", "compressed-tensors"], weights={"grid": "q4_k"})
    with pytest.raises(RecipeError, match="has its own bits"):
        write(tmp_path, "llama", "rtn-w4", weights={"grid": "q4_k", "bits": 8})


@pytest.mark.parametrize("format", ["compressed-tensors", "onnx"])
@pytest.mark.parametrize("recipe, grid", [("gguf-q4_k_m", "q4_k_m"), ("override.yaml", "iq4_nl")])
def test_a_grid_of_gguf_in_another_format_is_refused_for_that(format, recipe, grid, tmp_path):
    """Not for what follows from it: a mix gives q, k and v different types, which other formats could not share."""
    source = tiny.build("llama", tmp_path / "model", **WIDE)
    (tmp_path / "override.yaml").write_text("description: x\noverrides: [{match: mlp.down_proj, weights: {grid: iq4_nl}}]\n")
    name = str(tmp_path / recipe) if recipe.endswith(".yaml") else recipe
    with pytest.raises(RecipeError, match=f"{format} does not hold {grid}, that grid is GGUF's; use --format gguf alone"):
        pipeline.plan(str(source), name, formats=[format])
    assert pipeline.plan(str(source), name, formats=["gguf"])[1]["gguf"] > 0


def test_the_command_takes_formats(tmp_path):
    from click.testing import CliRunner

    from quantkit.cli import main

    source = tiny.build("llama", tmp_path / "model")
    told = CliRunner().invoke(main, ["plan", str(source), "--format", "gguf", "--format", "compressed-tensors", "--json"])
    assert told.exit_code == 0
    _, sizes = pipeline.plan(str(source), formats=["gguf", "compressed-tensors"])
    assert json.loads(told.stdout)["bytes"] == sizes
    assert set(sizes) == {"gguf", "compressed-tensors"}
    assert CliRunner().invoke(main, ["plan", str(source), "--format", "gptq"]).exit_code == 2
