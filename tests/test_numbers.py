"""Numbers that are none, and numbers that are hard: named where they appear, or carried through every format exactly."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit import pipeline
from quantkit.errors import CheckpointError, WriteError
from quantkit.model.blocks import Skeleton
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.streams import Stream
from quantkit.publish.packed import Packed
from quantkit.types import Batch

QUICK = "description: x\nscore: {samples: 2, sequence_length: 64}\ncalibration: {samples: 4, sequence_length: 64}\n"
QUICK += "search: {exponents: 2, rows: 16, shrinks: 2, sweeps: 1}\n"
UNSCORED = QUICK.replace("samples: 2, sequence_length: 64", "samples: 0")
ONCE = UNSCORED.replace("sweeps: 1", "sweeps: 1, stages: false")


def edited(folder: Path, change: Any) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def quantize(tmp_path: Path, recipe: str, calibration: Path | None = None) -> pipeline.Result:
    (tmp_path / "mine.yaml").write_text(recipe)
    chosen = str(calibration) if calibration else None
    return pipeline.quantize(str(tmp_path / "model"), recipe=str(tmp_path / "mine.yaml"), output=tmp_path / "out", calibration=chosen)


def two_samples(tmp_path: Path) -> tuple[Path, int]:
    """A set whose second sample alone holds a letter, and that letter's token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    (only,) = tokenizer.encode("~", add_special_tokens=False)
    path = tmp_path / "set.jsonl"
    rows = [{"id": "calm", "text": "one two three four five six", "language": "en", "domain": "code"}]
    rows.append({"id": "wild", "text": "a tilde ~ here", "language": "de", "domain": "stem"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, only


# --- NaN and infinity -------------------------------------------------------------------------------------------------------------


def batches() -> list[Batch]:
    ids = torch.randint(20, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = tuple({"id": f"sample-{row}", "language": "en", "domain": "stem"} for row in range(2))
    return [Batch(ids, torch.ones_like(ids, dtype=torch.bool), labels)]


def through(folder: Path, batches: list[Batch], dtype: torch.dtype = torch.bfloat16) -> None:
    stream = Stream(Skeleton(Checkpoint(folder), dtype), batches)
    state = stream.start()
    for index in range(2):
        with stream.skeleton.block(index) as block:
            stream.advance(block, state)
        stream.close()


def test_a_weight_that_is_no_number_is_named(tmp_path):
    """A norm's: no solver ever looks at it."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.post_attention_layernorm.weight"][7] = torch.inf

    folder = edited(tiny.build("llama", tmp_path / "model", num_hidden_layers=2), spoil)
    with pytest.raises(CheckpointError, match=r"block 1: post_attention_layernorm\.weight holds NaN or infinity .* sample-0 \(en, stem\)"):
        through(folder, batches())


def test_an_activation_that_overflows_is_named_with_its_token_and_sample(tmp_path):
    """One token's value is beyond fp16 behind the gate; every weight is a number."""
    work = batches()
    token = int(work[0].ids[1, 5])
    assert token not in work[0].ids[0]
    first = work[0].ids[1].tolist().index(token)

    def spoil(tensors: dict[str, Tensor]) -> None:
        table, value = tensors["model.embed_tokens.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        table[:, 0], tensors["model.layers.0.self_attn.o_proj.weight"][0] = 0, 0
        tensors["model.layers.0.mlp.down_proj.weight"][0] = 0
        tensors["model.layers.1.self_attn.o_proj.weight"][0] = 0  # channel 0 tells this token from all others
        table[token, 0] = 100
        value[:, 0] = 60000

    folder = edited(tiny.build("llama", tmp_path / "model", num_hidden_layers=2, dtype="float16"), spoil)
    with pytest.raises(
        CheckpointError, match=rf"block 1: mlp\.up_proj: NaN or infinity .* at token {first} of sample sample-1 \(en, stem\)"
    ):
        through(folder, work, torch.float16)


@pytest.mark.parametrize("recipe", [QUICK, UNSCORED, ONCE, QUICK + "method: rtn\n"], ids=["scored", "unscored", "at once", "rtn"])
def test_a_run_names_the_sample_that_met_it(recipe, tmp_path):
    tiny.build("llama", tmp_path / "model", num_hidden_layers=2)
    calibration, token = two_samples(tmp_path)

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"][token, 3] = torch.nan

    edited(tmp_path / "model", spoil)
    words = r"the embeddings: NaN or infinity at token \d+ of sample .*wild \(de, stem\)" if "rtn" not in recipe else "NaN"
    with pytest.raises(CheckpointError, match=words) as refusal:
        quantize(tmp_path, recipe, None if "rtn" in recipe else calibration)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("recipe", [UNSCORED, ONCE], ids=["in stages", "at once"])
def test_a_linear_that_is_fed_infinity_is_named(recipe, tmp_path):
    """By whichever comes first: its statistics, or the output of its block."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.input_layernorm.weight"].fill_(torch.nan)

    edited(tiny.build("llama", tmp_path / "model", num_hidden_layers=2), spoil)
    words = r"block 1: (self_attn\.q_proj: NaN or infinity .* at|input_layernorm\.weight holds NaN .* at) token 0 of sample "
    with pytest.raises(CheckpointError, match=words):
        quantize(tmp_path, recipe)


# --- Zeros ------------------------------------------------------------------------------------------------------------------------


def zeroed(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"].zero_()
    tensors["model.layers.0.self_attn.o_proj.weight"][3:9] = 0
    tensors["model.layers.1.mlp.down_proj.weight"][:, 32:96] = 0
    tensors["model.layers.1.input_layernorm.weight"][::7] = 0  # gains of exactly 0, and with them dead channels
    tensors["model.layers.0.post_attention_layernorm.weight"][:64] = 0
    tensors["model.embed_tokens.weight"][:, 11] = 0


def check_zeros(weights: dict[str, Tensor], prefix: str, rounded: bool) -> None:
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    assert not weights[f"{prefix}0.mlp.up_proj"].any()
    assert not weights[f"{prefix}0.self_attn.o_proj"][3:9].any()
    assert weights[f"{prefix}0.self_attn.o_proj"][9:].any(1).all()
    if rounded:  # what compensates puts other columns' errors there, rightly
        assert not weights[f"{prefix}1.mlp.down_proj"][:, 32:96].any()


@pytest.mark.parametrize(
    "scheme",
    ["{}", "{symmetric: false}", "{bits: 8}", "{group: 128}", "{group: row}", "{signed: true}", "{bits: 8, symmetric: false}"],
)
@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_zeros_stay_zeros_in_compressed_tensors(method, scheme, tmp_path):
    source = edited(tiny.build("llama", tmp_path / "model", num_hidden_layers=2, hidden_size=128, intermediate_size=256), zeroed)
    result = quantize(tmp_path, f"{UNSCORED}method: {method}\nweights: {scheme}\n")
    folder = Packed(result.artefacts["compressed-tensors"])
    check_zeros({one.name: folder.decode(one) for one in folder.stored}, "model.layers.", method == "rtn")
    kept, original = load_file(folder.folder / "model.safetensors"), load_file(source / "model.safetensors")
    for name in original:
        if name.endswith("layernorm.weight"):
            assert torch.equal(kept[name] == 0, original[name] == 0), "a gain of 0 stays 0, and no other becomes it"


@pytest.mark.parametrize("method", ["rtn", "awq"])
@pytest.mark.parametrize(
    "weights, kind",
    [
        ("{}", "Q4_0"),
        ("{bits: 8}", "Q8_0"),
        ("{symmetric: false}", "Q4_1"),
        ("{grid: q4_k}", "Q4_K"),
        ("{grid: q6_k}", "Q6_K"),
        ("{grid: iq4_nl}", "IQ4_NL"),
    ],
)
def test_zeros_stay_zeros_in_gguf(weights, kind, method, tmp_path):
    gguf = pytest.importorskip("gguf")
    edited(tiny.build("llama", tmp_path / "model", num_hidden_layers=2, hidden_size=256, intermediate_size=512), zeroed)
    result = quantize(tmp_path, f"{UNSCORED}method: {method}\nformats: [gguf]\nweights: {weights}\n")
    (file,) = result.artefacts["gguf"].glob("*.gguf")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    names = {"0.mlp.up_proj": "blk.0.ffn_up", "0.self_attn.o_proj": "blk.0.attn_output", "1.mlp.down_proj": "blk.1.ffn_down"}
    decoded = {}
    for ours, theirs in names.items():
        tensor = found[f"{theirs}.weight"]
        assert tensor.tensor_type.name == kind
        rows = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        decoded[ours] = rows.view([int(n) for n in reversed(tensor.shape)])
    check_zeros(decoded, "", method == "rtn")


# --- What 16 bits cannot hold -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["{}", "{symmetric: false}", "{grid: q4_k}"])
def test_scales_beyond_fp16_are_refused_by_the_name_of_their_linear(weights, tmp_path):
    """bf16 holds them, GGUF's fp16 does not."""
    pytest.importorskip("gguf")

    def loud(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][5] *= 1e10

    edited(tiny.build("llama", tmp_path / "model", num_hidden_layers=2, hidden_size=256, intermediate_size=512), loud)
    with pytest.raises((WriteError, CheckpointError), match=r"layers\.1\.mlp\.down_proj") as refusal:
        quantize(tmp_path, f"{UNSCORED}method: rtn\nformats: [gguf]\nweights: {weights}\n")
    assert "\n" not in str(refusal.value)
    assert not list((tmp_path / "out").rglob("*.gguf"))


# --- Experts ----------------------------------------------------------------------------------------------------------------------


def test_an_expert_that_no_token_reaches_is_solved_and_told(tmp_path):
    def shun(tensors: dict[str, Tensor]) -> None:
        gate = tensors["model.layers.0.mlp.gate.weight"]
        gate[3] = gate[[0, 1, 2, 4, 5, 6, 7]].mean(0)  # in the midst of the others: among the two likeliest of no token

    edited(tiny.build("qwen3_moe", tmp_path / "model", num_hidden_layers=2), shun)
    result = quantize(tmp_path, QUICK.replace("search: {", "search: {folds: false, "))
    assert result.report["blocks"][0]["experts"][3] == 0
    assert result.report["summary"]["experts_without_tokens"] >= 1
    mine = {name: row for name, row in result.report["blocks"][0]["linears"].items() if ".experts.3." in name}
    assert len(mine) == 3
    assert all(row["tokens"] == 0 for row in mine.values())
    folder = Packed(result.artefacts["compressed-tensors"])
    original = load_file(tmp_path / "model" / "model.safetensors")
    for one in folder.stored:
        if ".layers.0.mlp.experts.3." in one.name and one.name.endswith("down_proj"):
            weight = original[f"{one.name}.weight"].float()
            assert float((folder.decode(one) - weight).norm() / weight.norm()) < 0.2, "it is no worse served for that"
    assert (result.artefacts["compressed-tensors"] / "README.md").read_text().count("saw none.") == 1
