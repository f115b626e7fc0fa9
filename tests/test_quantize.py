"""The main job on every family: the command, the files, and transformers opening them with the very weights that were solved."""

import json
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
import transformers
import yaml
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file

import quantkit.hf
from quantkit import pipeline
from quantkit.errors import CheckpointError, FamilyError, WriteError
from quantkit.recipe import load_recipe

ROOT = Path(__file__).parents[1]
SMALL = {
    "calibration": {"samples": 20, "sequence_length": 64},
    "score": {"samples": 4, "sequence_length": 64},
    "search": {"exponents": 6, "shrinks": 4},
}


def recipe_file(folder: Path, base: str, **changes) -> str:
    """A shipped recipe, made quick."""
    path = folder / f"{base}-{abs(hash(json.dumps(changes, sort_keys=True)))}.yaml"
    path.write_text(yaml.safe_dump({**load_recipe(base).model_dump(mode="json", exclude={"name"}), **SMALL, **changes}))
    return str(path)


def run(tmp_path: Path, name: str, base: str = "awq-w4", build: dict | None = None, **changes) -> tuple[Path, pipeline.Result]:
    source = tiny.build(name, tmp_path / "model", **(build or {}))
    return source, pipeline.quantize(str(source), recipe=recipe_file(tmp_path, base, **changes), output=tmp_path / "out")


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """Every linear of an artefact by compressed-tensors' own decoder, fused experts stacked again; all else as it is."""
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    groups = list(config.config_groups.values())

    def scheme_of(module: str):
        by_name = [g for g in groups if any(t.startswith("re:") and re.match(t[3:], module) for t in g.targets)]
        return (by_name or [g for g in groups if "Linear" in g.targets])[0]

    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors, out = read(folder), {}
    for name, tensor in tensors.items():
        stem, dot, part = name.rpartition(".")
        if part == "weight_packed":
            state = {
                k: tensors[f"{stem}.{k}"]
                for k in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
                if f"{stem}.{k}" in tensors
            }
            out[stem] = compressor.decompress(state, scheme_of(stem))["weight"]
        elif not part.startswith("weight_") or dot == "":
            out[name] = tensor
    return out


def assert_opens_exactly(folder: Path) -> torch.nn.Module:
    """Every quantized weight in the opened model equals what compressed-tensors decodes from the file."""
    model = quantkit.hf.load_model(folder, dtype="auto")
    with torch.no_grad():  # the first forward decompresses what was not decompressed while loading
        logits = model(input_ids=torch.arange(20, 60)[None], use_cache=False).logits
    assert bool(logits.isfinite().all())
    state = {name.replace("model.language_model.", "").replace("model.", ""): t for name, t in model.state_dict().items()}
    checked = 0
    for name, weight in decoded(folder).items():
        short = name.replace("model.language_model.", "").replace("language_model.model.", "").replace("model.", "")
        short = (
            short.replace("block_sparse_moe", "mlp").replace(".w1", ".gate_proj").replace(".w3", ".up_proj").replace(".w2", ".down_proj")
        )
        if ".experts." in short and f"{short}.weight" not in state:
            prefix, _, rest = short.partition(".experts.")
            expert, _, leaf = rest.partition(".")
            if not expert.isdigit():  # a layer whose experts are kept, fused as they were
                continue
            down = leaf == "down_proj"
            fused = state[f"{prefix}.experts.{'down_proj' if down else 'gate_up_proj'}"][int(expert)]
            width = len(fused) // 2
            mine = fused if down else fused[:width] if leaf == "gate_proj" else fused[width:]
            assert torch.equal(mine, weight.to(mine.dtype)), name
            checked += 1
        elif f"{short}.weight" in state and weight.ndim == 2:
            assert torch.equal(state[f"{short}.weight"], weight), name
            checked += 1
    assert checked
    return model


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_family_opens_in_transformers(name, tmp_path):
    source, result = run(tmp_path, name)
    folder = result.artefacts["compressed-tensors"]
    assert_opens_exactly(folder)
    before, after = read(source), read(folder)
    plan, sizes = pipeline.plan(str(source))
    assert sizes["compressed-tensors"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    for kept in plan.kept:
        assert torch.equal(before[kept], after[kept]), f"{kept} is not copied bit for bit"
    assert not any(".weight_zero_point" in tensor for tensor in after)
    assert result.scores["tokens"] > 0
    assert not (folder.parent / "compressed-tensors" / ".README.md.part").exists()


OTHER_EXPERTS = ("qwen3_moe", "mixtral")  # whose experts transformers decodes itself


@pytest.mark.parametrize("name", [name for name in tiny.FAMILIES if name not in OTHER_EXPERTS])
def test_asymmetric_opens_exactly(name, tmp_path):
    _, result = run(tmp_path, name, "awq-w4-asym")
    folder = result.artefacts["compressed-tensors"]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["dequantize"] is True
    assert_opens_exactly(folder)


@pytest.mark.parametrize("symmetric", [True, False])
def test_fused_experts_layout(symmetric, tmp_path):
    weights = {"bits": 4, "group": 32, "symmetric": symmetric}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    _, fused = run(tmp_path / "a", "gemma4_moe", "rtn-w4", experts_layout="fused", weights=weights)
    _, split = run(tmp_path / "b", "gemma4_moe", "rtn-w4", weights=weights)
    names = read(fused.artefacts["compressed-tensors"])
    assert any(name.endswith("experts.gate_up_proj_packed") for name in names)
    assert not any("experts" in name and "shape" in name for name in names)
    one = quantkit.hf.load_model(fused.artefacts["compressed-tensors"], dtype="auto")
    two = quantkit.hf.load_model(split.artefacts["compressed-tensors"], dtype="auto")
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_eight_bits_and_whole_rows(tmp_path):
    _, result = run(tmp_path, "llama", "awq-w8", weights={"bits": 8, "group": "row", "symmetric": True})
    assert_opens_exactly(result.artefacts["compressed-tensors"])
    assert result.scores["kl"] < 0.01


def test_other_widths_are_refused_with_the_reason(tmp_path):
    with pytest.raises(WriteError, match=r"3 bits.*4 and 8"):
        run(tmp_path, "llama", weights={"bits": 3, "group": 32, "symmetric": True})
    assert not (tmp_path / "out").exists()


def test_mixed_schemes(tmp_path):
    """Attention in 8 bits, one layer's MLP kept: the config tells engines so, and transformers decodes each by its own group."""
    overrides = [{"match": "self_attn.*", "weights": {"bits": 8}}, {"match": "mlp.*", "layers": [1], "keep": True}]
    _, result = run(tmp_path, "gemma4_dense", overrides=overrides)
    folder = result.artefacts["compressed-tensors"]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    widths = {group["weights"]["num_bits"]: group["targets"] for group in config["config_groups"].values()}
    assert set(widths) == {4, 8}
    assert any("v_proj" in target for target in [*widths[4], *widths[8]] if target.startswith("re:")) or "Linear" in widths[8]
    assert r"re:.*layers\.(1)\.mlp\.down_proj$" in config["ignore"]
    assert_opens_exactly(folder)


@contextmanager
def unregistered():
    """transformers as it is without quantkit.hf."""
    cache = transformers.conversion_mapping._checkpoint_conversion_mapping_cache
    known = {name: cache.pop(name) for name in quantkit.hf.MODEL_TYPES}
    try:
        yield
    finally:
        cache.update(known)


def test_plain_transformers_needs_our_import(tmp_path):
    """What `import quantkit.hf` is for: without the conversion, experts of Gemma 4 are random and load_model says so."""
    _, result = run(tmp_path, "gemma4_moe", "rtn-w4")
    folder = result.artefacts["compressed-tensors"]
    with unregistered():
        with pytest.raises(CheckpointError, match=r"missing keys|unexpected keys"):
            quantkit.hf.load_model(folder, dtype="auto")
        quantkit.hf._taught.clear()  # as in a process that never imported it
        assert quantkit.hf.register() is True
        assert quantkit.hf.register() is False, "an existing entry is never overwritten"
        quantkit.hf.load_model(folder, dtype="auto")


MOE = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 96}


@pytest.mark.parametrize("name, build", [("gemma4_moe", {}), ("gemma4_text", MOE)], ids=["with towers", "text alone"])
def test_the_snippet_on_the_card_is_right(name, build, tmp_path):
    _, result = run(tmp_path, name, build=build)
    folder = result.artefacts["compressed-tensors"]
    card = (folder / "README.md").read_text()
    snippet = next(part for part in card.split("```python\n")[1:] if "WeightConverter(" in part).split("```")[0]
    ours = assert_opens_exactly(folder).state_dict()
    with unregistered():
        exec(compile(snippet, "card", "exec"), {})
        theirs = quantkit.hf.load_model(folder, dtype="auto")
        with torch.no_grad():
            theirs(input_ids=torch.arange(20, 60)[None], use_cache=False)
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(tensor, ours[name]), name


def test_streamed_score_is_that_of_the_files(tmp_path):
    """The KL that the run reports, measured while streaming, against the published folder opened in transformers."""
    from quantkit.calibrate.batches import make_batches
    from quantkit.calibrate.draw import make_row
    from quantkit.calibrate.render import load_tokenizer
    from quantkit.calibrate.samples import choose
    from quantkit.calibrate.sources import read_samples
    from quantkit.evaluate.divergence import Scores, compare
    from quantkit.recipe import heldout_files

    source, result = run(tmp_path, "llama", build={"dtype": "float32"})
    base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ours = quantkit.hf.load_model(result.artefacts["compressed-tensors"], dtype="auto")
    assert next(ours.parameters()).dtype == torch.float32
    samples = choose(read_samples(heldout_files()), 4, 0)
    scores = Scores()
    for batch in make_batches([make_row(one, load_tokenizer(source), 64) for one in samples], 2048):
        with torch.no_grad():
            p, q = base(input_ids=batch.ids).logits, ours(input_ids=batch.ids).logits
        for row, labels in enumerate(batch.labels):
            scores.add(compare(p[row, :-1], q[row, :-1], batch.ids[row, 1:], batch.real[row, 1:]), labels)
    assert scores.total.tokens == result.scores["tokens"]
    assert scores.as_json()["kl"] == pytest.approx(result.scores["kl"], rel=1e-3)
    assert scores.as_json()["perplexity"] == pytest.approx(result.scores["perplexity"], rel=1e-4)


def test_leftovers_that_no_module_reads(tmp_path):
    """Published E-type checkpoints hold keys and values of layers that borrow them: rounded plainly, so that engines find them."""
    source = tiny.build("gemma4_e", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    borrowed = [n for n in tensors if n.endswith("self_attn.k_proj.weight")]
    last = max(int(n.split("layers.")[1].split(".")[0]) for n in tensors if "language_model.layers" in n)
    name = borrowed[0].replace("layers.0.", f"layers.{last}.")
    assert name not in tensors
    from safetensors.torch import save_file

    tensors[name] = tensors[borrowed[0]].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    result = pipeline.quantize(str(source), recipe=recipe_file(tmp_path, "awq-w4"), output=tmp_path / "out")
    row = result.report["blocks"][last]["linears"]["self_attn.k_proj"]
    assert row["tokens"] == 0
    assert row["error"] == row["error_rounded"]


def test_sharded_source_and_several_shards_out(tmp_path, monkeypatch):
    monkeypatch.setattr("quantkit.write.compressed_tensors.SHARD_BYTES", 40_000)
    _, result = run(tmp_path, "qwen3_moe", build={"max_shard_size": "100KB"})
    folder = result.artefacts["compressed-tensors"]
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    assert_opens_exactly(folder)


def test_an_adapter_is_merged_on_the_way(tmp_path):
    from safetensors.torch import save_file

    source = tiny.build("llama", tmp_path / "model")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    weight = load_file(source / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, weight.shape[1], generator=generator), torch.randn(weight.shape[0], 4, generator=generator)
    prefix = "base_model.model.model.layers.0.mlp.up_proj"
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"], "base_model_name_or_path": "gone/away"}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    result = pipeline.quantize(str(source), recipe=recipe_file(tmp_path, "awq-w8"), output=tmp_path / "out", adapter=str(adapter))
    ours = decoded(result.artefacts["compressed-tensors"])["model.layers.0.mlp.up_proj"].float()
    merged = weight.float() + 2 * b @ a
    columns = (ours * merged).sum(0) / merged.square().sum(0)  # the fold's scales, recovered
    rows = (ours / columns * merged).sum(1) / merged.square().sum(1)
    assert float((ours / columns / rows[:, None] - merged).norm() / merged.norm()) < 0.05
    assert result.report["adapter"]["merged"] == 1


def test_the_search_beats_plain_rounding(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    _, awq = run(tmp_path / "a", "llama", calibration={"sequence_length": 256}, search={})
    _, rtn = run(tmp_path / "b", "llama", "rtn-w4")
    assert awq.report["summary"]["mean_error"] < 0.7 * awq.report["summary"]["mean_error_rounded"]
    assert awq.scores["kl"] < rtn.scores["kl"]


def test_a_model_can_be_saved_after_our_import(tmp_path):
    source = tiny.build("gemma4_moe", tmp_path / "model")
    model = quantkit.hf.load_model(source)
    model.save_pretrained(tmp_path / "again")
    again = quantkit.hf.load_model(tmp_path / "again")
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_zero_points_in_a_mix_of_schemes_are_refused(tmp_path):
    overrides = [{"match": "self_attn.*", "weights": {"bits": 8}}]
    with pytest.raises(WriteError, match="one scheme"):
        run(tmp_path, "llama", "rtn-w4", weights={"bits": 4, "group": 32, "symmetric": False}, overrides=overrides)


@pytest.mark.parametrize("name", OTHER_EXPERTS)
@pytest.mark.parametrize(
    "changes",
    [
        {"weights": {"bits": 4, "group": 32, "symmetric": False}},
        {"overrides": [{"match": "mlp.experts.*", "layers": [0], "weights": {"bits": 8}}]},
        {"overrides": [{"match": "mlp.experts.*", "layers": [0], "keep": True}]},
    ],
    ids=["zero points", "two widths", "one layer kept"],
)
def test_experts_that_transformers_cannot_decode_are_refused(name, changes, tmp_path):
    with pytest.raises(WriteError, match="one symmetric scheme for all experts"):
        run(tmp_path, name, "rtn-w4", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
@pytest.mark.parametrize("layer", [{"weights": {"bits": 8}}, {"weights": {"group": "row"}}, {"keep": True}], ids=["8 bits", "row", "kept"])
def test_experts_of_gemma4_may_differ_by_layer(layer, layout, tmp_path):
    overrides = [{"match": "experts.*", "layers": [0], **layer}]
    _, result = run(tmp_path, "gemma4_moe", "rtn-w4", overrides=overrides, experts_layout=layout)
    folder = result.artefacts["compressed-tensors"]
    if layout == "per-expert":
        assert_opens_exactly(folder)
    else:
        quantkit.hf.load_model(folder, dtype="auto")
    snippet = "register_checkpoint_conversion_mapping" in (folder / "README.md").read_text()
    assert snippet == (layout == "per-expert" and "keep" in layer)


def test_an_override_leaves_the_rest_to_the_recipe(tmp_path):
    source = tiny.build("llama", tmp_path / "model")
    text = "description: x\nweights: {bits: 4, group: 64, symmetric: true}\noverrides: [{match: 'self_attn.*', weights: {bits: 8}}]\n"
    (tmp_path / "mine.yaml").write_text(text)
    plan, _ = pipeline.plan(str(source), str(tmp_path / "mine.yaml"))
    attention = next(linear for linear in plan.linears() if linear.local == "self_attn.q_proj")
    assert str(attention.scheme) == "w8 sym g64"


def mixed_precision(tmp_path: Path, name: str, dtype: torch.dtype) -> Path:
    from safetensors.torch import save_file

    source = tiny.build("llama", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors = {n: t.to(dtype) if n.endswith(name) else t for n, t in tensors.items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


def test_a_linear_of_another_precision(tmp_path):
    source = mixed_precision(tmp_path, "o_proj.weight", torch.float32)
    result = pipeline.quantize(str(source), recipe=recipe_file(tmp_path, "awq-w4"), output=tmp_path / "out")
    assert_opens_exactly(result.artefacts["compressed-tensors"])


def test_norms_of_another_precision_are_folded_as_the_model_reads_them(tmp_path):
    """fp32 norms in a bf16 checkpoint: what is stored must survive the model's own rounding to bf16."""
    source = mixed_precision(tmp_path, "layernorm.weight", torch.float32)
    result = pipeline.quantize(str(source), recipe=recipe_file(tmp_path, "awq-w4"), output=tmp_path / "out")
    before, after = read(source), read(result.artefacts["compressed-tensors"])
    folded = [name for name in before if name.endswith("layernorm.weight") and not torch.equal(before[name], after[name])]
    assert folded
    for name in folded:
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], after[name].bfloat16().float()), name


def test_integers_in_place_of_weights_are_refused(tmp_path):
    source = mixed_precision(tmp_path, "o_proj.weight", torch.int8)
    with pytest.raises(FamilyError, match=r"holds torch\.int8"):
        pipeline.plan(str(source))


def test_a_shard_that_was_cut_is_written_again(tmp_path):
    source, result = run(tmp_path, "llama")
    shard = result.artefacts["compressed-tensors"] / "model.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5000])
    pipeline.quantize(str(source), recipe=recipe_file(tmp_path, "awq-w4"), output=tmp_path / "out")
    assert shard.read_bytes() == whole


def test_the_sizes_page_says_what_plan_says():
    page = (ROOT / "docs" / "sizes.md").read_text()
    for recipe in ("awq-w4", "awq-w4-asym", "awq-w4-g128", "awq-w8"):
        _, sizes = pipeline.plan(str(ROOT / "docs" / "gemma-4-26b-a4b.json"), recipe)
        assert f"{sizes['compressed-tensors']:,}" in page, recipe


def test_the_card_warns_of_signed_scales_where_there_are_any(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    _, signed = run(tmp_path / "one", "llama")
    _, zeros = run(tmp_path / "two", "llama", "awq-w4-asym")
    cards = [(one.artefacts["compressed-tensors"] / "README.md").read_text() for one in (signed, zeros)]
    assert ["VLLM_MARLIN_INPUT_DTYPE=int8" in card for card in cards] == [True, False]
    scales = [tensor for name, tensor in read(signed.artefacts["compressed-tensors"]).items() if name.endswith("weight_scale")]
    assert any(bool((scale < 0).any()) for scale in scales)
    assert any(bool((scale > 0).any()) for scale in scales)


def test_folds_that_are_not_proven_are_undone(tmp_path, monkeypatch):
    monkeypatch.setattr("quantkit.run.PROVEN", -1.0)
    source = tiny.build("llama", tmp_path / "model")
    tiny.train(source, "layers.1.self_attn.*_proj")  # what is copied is copied all the same
    result = pipeline.quantize(str(source), recipe=recipe_file(tmp_path, "awq-w4"), output=tmp_path / "out")
    (block,) = (tmp_path / "out" / "solved").glob("*1.safetensors")
    halves = {name for name, tensor in load_file(block).items() if tensor.dtype == torch.float16}
    assert halves == {f"self_attn.{one}_proj/scale" for one in "qkvo"}
    assert all(block["folds"] == [] and block["proof"] is not None for block in result.report["blocks"])
    assert result.report["summary"]["folds_undone"] == 3
    assert "those of 3 blocks were undone" in (result.artefacts["compressed-tensors"] / "README.md").read_text()
    written, original = read(result.artefacts["compressed-tensors"]), read(source)
    norms = [name for name in original if "layernorm" in name]
    assert norms
    assert all(torch.equal(written[name], original[name]) for name in norms)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A function from changes of the search to the run that they make, once for all tests."""
    done: dict[str, pipeline.Result] = {}

    def result(changes: dict) -> pipeline.Result:
        key = json.dumps(changes, sort_keys=True)
        if key not in done:
            search = {**SMALL["search"], "sweeps": 1, **changes}
            _, done[key] = run(tmp_path_factory.mktemp("searched"), "gemma4_moe", search=search)
        return done[key]

    return result


@pytest.mark.parametrize(
    "off, beside",
    [
        ({"stages": False}, {}),
        ({"stages": False, "compensate": False}, {"stages": False}),
        ({"compensate": False}, {}),
        ({"retarget": 0.0}, {}),
        ({"folds": False}, {}),
    ],
    ids=["stages", "compensate without stages", "compensate", "retarget", "folds"],
)
def test_every_step_can_be_switched_off_and_the_solution_is_another(off, beside, searched):
    """What a step is worth is for trained models to say (docs/solver.md)."""
    full, less = searched(beside), searched(off)
    assert full.report["summary"]["worse_than_rounded"] == less.report["summary"]["worse_than_rounded"] == 0
    before, after = read(full.artefacts["compressed-tensors"]), read(less.artefacts["compressed-tensors"])
    assert before.keys() == after.keys()
    assert full.bytes == less.bytes
    packed = [name for name in before if name.endswith("weight_packed")]
    assert packed
    assert any(not torch.equal(before[name], after[name]) for name in packed)
