"""A LoRA adapter merged on the way: every feature against a sum written out by hand, every refusal, every way of naming."""

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from quantkit.errors import AdapterError
from quantkit.model.adapter import Adapted, AdapterInfo, canonical
from quantkit.model.checkpoint import Checkpoint, TensorSource

OUT, IN, VOCAB, R = 6, 8, 10, 2
Q = "model.layers.0.self_attn.q_proj"
EMBED = "model.embed_tokens"


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Checkpoint:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3_text", **config}))
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder)


def adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": R, "lora_alpha": 3, "base_model_name_or_path": "/nowhere/at/all", **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def lora(module: str, out: int = OUT, width: int = IN, r: int = R, **dtype: Any) -> dict[str, torch.Tensor]:
    key = f"base_model.model.{module}"
    return {f"{key}.lora_A.weight": rand(r, width, seed=1, **dtype), f"{key}.lora_B.weight": rand(out, r, seed=2, **dtype)}


def embedding_lora(module: str) -> dict[str, torch.Tensor]:
    key = f"base_model.model.{module}"
    return {f"{key}.lora_embedding_A": rand(R, VOCAB, seed=3), f"{key}.lora_embedding_B": rand(IN, R, seed=4)}


def by_hand(weight: torch.Tensor, parts: dict[str, torch.Tensor], scale: float = 1.5) -> torch.Tensor:
    """W + scale B A, every element a sum written out in float64."""
    a, b = (value.double() for value in parts.values())
    if "embedding" in next(iter(parts)):
        return weight.double() + scale * (b @ a).T
    delta = torch.tensor([[sum(float(b[o, k] * a[k, i]) for k in range(len(a))) for i in range(a.shape[1])] for o in range(len(b))])
    return weight.double() + scale * delta.double()


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-6, atol=1e-6)


def model(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {
        f"{EMBED}.weight": rand(VOCAB, IN, dtype=dtype),
        f"{Q}.weight": rand(OUT, IN, dtype=dtype),
        f"{Q}.bias": rand(OUT, dtype=dtype),
        "model.layers.0.self_attn.v_proj.weight": rand(OUT, IN, dtype=dtype, seed=9),
        "model.norm.weight": rand(IN, dtype=dtype),
    }


@pytest.fixture
def base(tmp_path) -> Checkpoint:
    return checkpoint(tmp_path / "base", model())


def read_all(source: TensorSource, folder: Path) -> None:
    adapted = Adapted(source, folder)
    for name in adapted.entries:
        adapted.read(name)


def refused(source: TensorSource, folder: Path, *words: str) -> str:
    """The one line that the adapter is refused with."""
    with pytest.raises(AdapterError) as caught:
        read_all(source, folder)
    line = str(caught.value)
    assert "\n" not in line
    assert str(folder) in line
    for word in words:
        assert word in line
    return line


# what is merged


def test_linear_and_what_is_left_alone(base, tmp_path):
    parts = lora(Q)
    source: TensorSource = Adapted(base, adapter(tmp_path / "mine", parts))
    exact = by_hand(base.read(f"{Q}.weight"), parts)
    close(source.read(f"{Q}.weight"), exact)
    close(source.view(f"{Q}.weight"), exact)
    assert source.entries == base.entries
    assert source.config is base.config
    assert source.folder == base.folder
    assert Adapted(base, tmp_path / "mine").adapter == AdapterInfo("mine", rank=R, alpha=3, merged=1)
    for name in base.entries.keys() - {f"{Q}.weight"}:
        assert torch.equal(source.read(name), base.read(name))
    ours, theirs = source.read(f"{Q}.weight"), source.read(f"{Q}.weight")
    ours.zero_()
    assert theirs.any(), "a read is safe to edit"
    assert torch.equal(source.read(f"{Q}.weight"), theirs)


def test_views_of_the_rest_stay_mapped(base, tmp_path, monkeypatch):
    source = Adapted(base, adapter(tmp_path / "a", lora(Q)))
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a view copied"))
    mapped = []
    memmap = np.memmap
    monkeypatch.setattr(np, "memmap", lambda *args: mapped.append(args) or memmap(*args))
    source.view("model.norm.weight")
    assert len(mapped) == 1


def test_construction_reads_no_tensor(base, tmp_path, monkeypatch):
    folder = adapter(tmp_path / "a", lora(Q) | {"base_model.model.model.norm.weight": torch.full((IN,), math.nan)})
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(Checkpoint, "view", lambda *_: pytest.fail("view"))
    Adapted(base, folder)  # nor the NaN of the adapter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_once(tmp_path, dtype):
    base = checkpoint(tmp_path / "base", model(dtype))
    parts = lora(Q, dtype=torch.bfloat16)
    merged = Adapted(base, adapter(tmp_path / "a", parts)).read(f"{Q}.weight")
    weight, (a, b) = base.read(f"{Q}.weight").float(), (part.float() for part in parts.values())
    assert merged.dtype == dtype
    assert torch.equal(merged, torch.addmm(weight, b, a, alpha=1.5).to(dtype))


def test_rslora_and_patterns_match_as_in_peft(tmp_path):
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]
    base = checkpoint(tmp_path / "base", {f"{name}.weight": rand(OUT, IN) for name in names})
    ranks = dict(zip(names, (4, 2, 4, 3), strict=True))
    alphas = dict(zip(names, (5, 3, 3, 7), strict=True))
    parts = {name: lora(name, r=ranks[name]) for name in names}
    folder = adapter(
        tmp_path / "a",
        {key: value for part in parts.values() for key, value in part.items()},
        use_rslora=True,
        rank_pattern={"q_proj": 4, "^model.layers.1.self_attn.v_proj": 3, r".*\.v_proj": 2},
        alpha_pattern={"0.self_attn.q_proj": 5, "1.self_attn.v_proj": 7, "proj": 100},  # "proj" is no whole segment
    )
    source = Adapted(base, folder)
    for name in names:
        close(source.read(f"{name}.weight"), by_hand(base.read(f"{name}.weight"), parts[name], alphas[name] / math.sqrt(ranks[name])))


def test_dora_is_per_row_of_a_linear_and_per_column_of_an_embedding(tmp_path):
    base = checkpoint(tmp_path / "base", model(), tie_word_embeddings=False)
    linear, embedding = lora(Q), embedding_lora(EMBED)
    m_linear, m_embedding = rand(OUT).abs(), rand(IN).abs()
    magnitudes = {
        f"base_model.model.{Q}.lora_magnitude_vector": m_linear,
        f"base_model.model.{EMBED}.lora_magnitude_vector.default.weight": m_embedding,
    }
    source = Adapted(base, adapter(tmp_path / "a", linear | embedding | magnitudes, use_dora=True))
    plain = by_hand(base.read(f"{Q}.weight"), linear)
    close(source.read(f"{Q}.weight"), torch.stack([m * row / row.square().sum().sqrt() for m, row in zip(m_linear, plain, strict=True)]))
    plain = by_hand(base.read(f"{EMBED}.weight"), embedding)
    columns = [m * column / column.square().sum().sqrt() for m, column in zip(m_embedding, plain.T, strict=True)]
    close(source.read(f"{EMBED}.weight"), torch.stack(columns).T)


def test_tensors_in_full(tmp_path):
    """modules_to_save, biases, and the base layer that PEFT saves beside an embedding or a head that is a target."""
    base = checkpoint(tmp_path / "base", model() | {"lm_head.weight": rand(VOCAB, IN)}, tie_word_embeddings=False)
    head, norm, bias, table = rand(VOCAB, IN, seed=20).bfloat16(), rand(IN, seed=21), rand(OUT, seed=22), rand(VOCAB, IN, seed=23)
    parts = embedding_lora(EMBED)
    full = {
        "base_model.model.lm_head.weight": head,
        "base_model.model.model.norm.modules_to_save.default.weight": norm,
        f"base_model.model.{Q}.base_layer.bias": bias,
        f"base_model.model.{EMBED}.base_layer.weight": table,
    }
    source = Adapted(base, adapter(tmp_path / "a", lora(Q) | parts | full, bias="all", modules_to_save=["lm_head", "norm"]))
    assert torch.equal(source.read("lm_head.weight"), head.float())
    assert torch.equal(source.read("model.norm.weight"), norm)
    assert torch.equal(source.read(f"{Q}.bias"), bias)
    close(source.read(f"{EMBED}.weight"), by_hand(table, parts))
    assert source.adapter.merged == 5


def test_goes_to_another_process_and_stacks(base, tmp_path):
    parts = lora(Q)
    once = Adapted(base, adapter(tmp_path / "a", parts))
    again = pickle.loads(pickle.dumps(Adapted(once, tmp_path / "a")))
    close(again.read(f"{Q}.weight"), by_hand(base.read(f"{Q}.weight"), parts, 3.0))


def test_what_does_not_touch_the_merge_is_taken(base, tmp_path):
    for init in (True, False, "gaussian", "eva", "orthogonal", "mica"):
        config = {"init_lora_weights": init, "loftq_config": {}, "megatron_core": "megatron.core", "qalora_group_size": 16}
        Adapted(base, adapter(tmp_path / "a", lora(Q), runtime_config={"ephemeral_gpu_offload": False}, new_one=None, **config))


# a tied head


TIED = [  # prefix of the checkpoint's embedding, the head as that family calls it, what the adapter's modules are called
    ("model.", "lm_head.weight", "model.", "lm_head"),
    ("language_model.model.", "language_model.lm_head.weight", "model.language_model.", "lm_head"),
    ("language_model.model.", "language_model.lm_head.weight", "language_model.model.", "language_model.lm_head"),
    ("model.language_model.", "lm_head.weight", "model.language_model.", "lm_head"),
    ("model.language_model.", "lm_head.weight", "language_model.model.", "language_model.lm_head"),
    ("", "lm_head.weight", "model.", "lm_head"),
]


@pytest.mark.parametrize("said", [{}, {"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True, "deep": [1]}}])
@pytest.mark.parametrize(("prefix", "head", "trained", "trained_head"), TIED)
def test_a_tied_head_is_untied(tmp_path, prefix, head, trained, trained_head, said):
    base = checkpoint(tmp_path / "base", {f"{prefix}embed_tokens.weight": rand(VOCAB, IN)}, **said)
    before = copy.deepcopy(base.config)
    on_head, on_embedding = lora(trained_head, VOCAB), embedding_lora(f"{trained}embed_tokens")
    table = base.read(f"{prefix}embed_tokens.weight")
    for parts in (on_head, on_embedding, on_head | on_embedding):
        source = Adapted(base, adapter(tmp_path / "a", parts))
        assert source.entries.keys() == {f"{prefix}embed_tokens.weight", head}
        assert source.entries[head] == base.entries[f"{prefix}embed_tokens.weight"]
        close(source.read(head), by_hand(table, on_head) if parts is not on_embedding else table)
        close(source.view(head), by_hand(table, on_head) if parts is not on_embedding else table)
        close(source.read(f"{prefix}embed_tokens.weight"), by_hand(table, on_embedding) if parts is not on_head else table)
        assert source.config["tie_word_embeddings"] is False
        assert source.config.get("text_config", {}).get("tie_word_embeddings", False) is False
        assert base.config == before
        assert base.entries.keys() == {f"{prefix}embed_tokens.weight"}


def test_a_tied_head_in_full(tmp_path):
    base = checkpoint(tmp_path / "base", model())
    head = rand(VOCAB, IN, seed=30)
    source = Adapted(base, adapter(tmp_path / "a", {"base_model.model.lm_head.weight": head}, modules_to_save=["lm_head"]))
    assert torch.equal(source.read("lm_head.weight"), head)
    assert torch.equal(source.read(f"{EMBED}.weight"), base.read(f"{EMBED}.weight"))
    assert source.config["tie_word_embeddings"] is False


def test_a_tied_head_that_is_stored_all_the_same(tmp_path):
    stored = rand(VOCAB, IN)
    base = checkpoint(tmp_path / "base", model() | {"lm_head.weight": stored}, tie_word_embeddings=True)
    parts = embedding_lora(EMBED)
    source = Adapted(base, adapter(tmp_path / "a", parts))
    assert torch.equal(source.read("lm_head.weight"), stored)
    assert source.config["tie_word_embeddings"] is False


def test_a_head_that_is_neither_stored_nor_tied(tmp_path):
    base = checkpoint(tmp_path / "base", model(), tie_word_embeddings=False)
    refused(base, adapter(tmp_path / "a", lora("lm_head", VOCAB)), "lm_head", "no place")


def test_a_tied_model_stays_tied_where_the_adapter_has_neither(base, tmp_path):
    source = Adapted(base, adapter(tmp_path / "a", lora(Q)))
    assert source.config is base.config
    assert "lm_head.weight" not in source.entries


# names


TEXT = "layers.0.self_attn.q_proj"
VISION = "encoder.layers.0.self_attn.q_proj"
CHECKPOINTS = {  # a text and a vision layer of the same tail, a projector
    "hub": (f"language_model.model.{TEXT}", f"vision_tower.vision_model.{VISION}", "multi_modal_projector.linear_1"),
    "transformers 5": (f"model.language_model.{TEXT}", f"model.vision_tower.vision_model.{VISION}", "model.multi_modal_projector.linear_1"),
    "short tower": (f"model.language_model.{TEXT}", f"model.vision_tower.{VISION}", "model.multi_modal_projector.linear_1"),
    "clipped": (f"model.language_model.{TEXT}", f"model.vision_tower.{VISION}.linear", "model.multi_modal_projector.linear_1"),
}
TRAINED = {
    **CHECKPOINTS,
    "bare tower": (f"language_model.model.{TEXT}", f"vision_tower.{VISION}", "multi_modal_projector.linear_1"),
    "compiled": (
        f"_orig_mod.model.language_model.{TEXT}",
        f"_orig_mod.model.vision_tower.{VISION}",
        "model.multi_modal_projector.linear_1",
    ),
}


@pytest.mark.parametrize("infix", ["", ".default"])
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("stored", CHECKPOINTS)
def test_every_naming_finds_every_other(tmp_path, stored, trained, infix):
    names = CHECKPOINTS[stored]
    base = checkpoint(tmp_path / "base", {f"{name}.weight": rand(OUT, IN, seed=i) for i, name in enumerate(names)})
    for i, module in enumerate(TRAINED[trained]):
        parts = {key.replace(".weight", f"{infix}.weight"): value for key, value in lora(module).items()}
        source = Adapted(base, adapter(tmp_path / "a", parts))
        for j, name in enumerate(names):
            weight = base.read(f"{name}.weight")
            close(source.read(f"{name}.weight"), by_hand(weight, parts) if i == j else weight)


def test_text_only_and_multimodal_find_each_other(tmp_path):
    for stored, trained in ((f"model.{TEXT}", f"model.language_model.{TEXT}"), (f"language_model.model.{TEXT}", f"model.{TEXT}")):
        base = checkpoint(tmp_path / "base", {f"{stored}.weight": rand(OUT, IN)})
        assert Adapted(base, adapter(tmp_path / "a", lora(trained))).adapter.merged == 1


def test_a_vision_layer_is_never_a_text_layer(tmp_path):
    base = checkpoint(tmp_path / "base", {f"model.{TEXT}.weight": rand(OUT, IN)})
    for module in (f"model.vision_tower.{VISION}", f"vision_model.{VISION}", VISION):
        refused(base, adapter(tmp_path / "a", lora(module)), "no place", f"model.{TEXT}.weight")
    base = checkpoint(tmp_path / "base", {f"vision_tower.vision_model.{VISION}.weight": rand(OUT, IN)})
    refused(base, adapter(tmp_path / "a", lora(f"model.{TEXT}")), "no place")


def test_canonical():
    assert canonical("model.language_model.layers.0.mlp.up_proj.weight") == "layers.0.mlp.up_proj.weight"
    assert canonical("vision_tower.vision_model.encoder.layers.0.q_proj.linear.weight") == "vision_tower.encoder.layers.0.q_proj.weight"
    assert canonical("vision_model.encoder.linear.fc.weight") == "vision_model.encoder.linear.fc.weight"


def test_two_places_are_refused_and_the_exact_one_is_taken(tmp_path):
    names = [f"model.{TEXT}", f"language_model.model.{TEXT}"]
    base = checkpoint(tmp_path / "base", {f"{name}.weight": rand(OUT, IN) for name in names})
    refused(base, adapter(tmp_path / "a", lora(f"model.language_model.{TEXT}")), *names, "rename")
    source = Adapted(base, adapter(tmp_path / "a", lora(names[0])))
    assert torch.equal(source.read(f"{names[1]}.weight"), base.read(f"{names[1]}.weight"))


def test_two_adapters_for_one_place_are_refused(base, tmp_path):
    twice = lora(Q) | {key.replace(".weight", ".other.weight"): value for key, value in lora(Q).items()}
    refused(base, adapter(tmp_path / "a", twice), "both belong", Q)


# refusals


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        *[("peft_type", kind, ["peft_type", repr(kind)]) for kind in ("ADALORA", "LOHA", "IA3", None)],
        *[
            ("init_lora_weights", init, ["init_lora_weights", init, "path_initial_model_for_weight_conversion"])
            for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "what_comes_next")
        ],
        ("fan_in_fan_out", True, ["transposed"]),
        ("lora_bias", True, ["bias"]),
        ("target_parameters", ["mlp.experts.gate_up_proj"], ["3-D"]),
        ("layer_replication", [[0, 1]], ["repeated"]),
        ("trainable_token_indices", [1, 2], ["rows"]),
        ("megatron_config", {"x": 1}, ["Megatron"]),
        ("use_qalora", True, ["QALoRA"]),
        ("alora_invocation_tokens", [5], ["activated"]),
        ("arrow_config", {"top_k": 3}, ["Arrow"]),
        ("use_bdlora", {"nblocks": 2}, ["block diagonal"]),
        ("kasa_config", {"beta": 1}, ["singular"]),
        ("monteclora_config", {"num_samples": 2}, ["samples"]),
        ("new_kind_of_lora", True, ["new_kind_of_lora", "unknown"]),
        ("rank_pattern", {"(": 2}, ["pattern"]),
        ("rank_pattern", [1], ["pattern"]),
        ("alpha_pattern", {"q_proj": "much"}, ["numbers"]),
        ("r", "two", ["numbers"]),
        ("lora_alpha", None, ["numbers"]),
        ("r", 4, ["rank 2", "says 4"]),
        ("rank_pattern", {"q_proj": 1}, ["rank 2", "says 1"]),
        ("use_dora", True, ["lora_magnitude_vector"]),
    ],
)
def test_a_setting_that_cannot_be_merged(base, tmp_path, key, value, words):
    refused(base, adapter(tmp_path / "a", lora(Q), **{key: value}), *words)


A, B = (f"base_model.model.{Q}.lora_{part}.weight" for part in "AB")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({A: None}, ["lora_A", "lora_B"]),
        ({B: None}, ["lora_A", "lora_B"]),
        ({A: rand(R, IN + 1)}, [A, f"({R}, {IN + 1})", f"({R}, {IN})"]),
        ({B: rand(OUT, R + 1)}, [B, "shape"]),
        ({B: rand(OUT * R)}, [B, "shape"]),
        ({A: torch.tensor(1.0)}, ["rank 0"]),
        ({A: rand(R, IN, 1, 1), B: rand(OUT, R, 1, 1)}, ["shape"]),
        ({A: rand(0, IN), B: rand(OUT, 0)}, ["empty"]),
        ({A: rand(R, IN).to(torch.int8)}, [A, "I8"]),
        ({A: rand(R, IN).to(torch.float8_e4m3fn)}, [A, "F8"]),
        ({A: torch.full((R, IN), math.nan)}, [A, "NaN"]),
        ({B: torch.full((OUT, R), math.inf)}, [B, "infinity"]),
        ({f"base_model.model.{Q}.lora_B.bias": rand(OUT)}, ["bias"]),
        ({f"base_model.model.{Q}.lora_magnitude_vector": rand(OUT)}, ["lora_magnitude_vector", "disagree"]),
        ({f"base_model.model.{Q}.lora_E": rand(R, 1)}, ["lora_E", "disagree"]),
        ({f"base_model.model.{Q}.lora_embedding_A": rand(R, OUT)}, ["lora_embedding_A", "disagree"]),
        ({f"base_model.model.{EMBED}.weight": rand(VOCAB + 2, IN)}, [EMBED, str(VOCAB + 2), "vocabulary"]),
        ({"base_model.model.model.layers.0.self_attn.v_proj.bias": rand(OUT)}, ["v_proj.bias", "no place"]),
        ({"base_model.model.score.weight": rand(2, IN)}, ["score.weight", "no place", "nearest"]),
        (lora("model.layers.0.self_attn.qq_proj"), ["qq_proj", "no place", f"nearest is {Q}.weight"]),
        (lora("model.norm"), ["model.norm", "matrices"]),
        (lora("model.layers.0.mlp.experts.0.up_proj"), ["experts", "3-D"]),
        (lora("model.layers.0.mlp.experts"), ["experts", "3-D"]),
        (lora("model.layers.0.stack"), ["stack", "matrices"]),
        (lora("model.layers.0.table"), ["table", "int8"]),
    ],
)
def test_a_tensor_that_cannot_be_merged(tmp_path, change, words):
    others = {
        "model.layers.0.mlp.experts.gate_up_proj": rand(2, OUT, IN),
        "model.layers.0.stack.weight": rand(2, OUT, IN),
        "model.layers.0.table.weight": rand(OUT, IN).to(torch.int8),
    }
    base = checkpoint(tmp_path / "base", model() | others)
    tensors = {key: value for key, value in (lora(Q) | change).items() if value is not None}
    refused(base, adapter(tmp_path / "a", tensors), *words)


def test_an_overflow_is_refused(tmp_path):
    base = checkpoint(tmp_path / "base", model(torch.float16))
    refused(base, adapter(tmp_path / "a", lora(Q), lora_alpha=10**7), Q, "not finite")
    refused(base, adapter(tmp_path / "a", lora(Q), lora_alpha=math.nan), Q, "not finite")


def test_files_that_are_no_adapter(base, tmp_path):
    folder = tmp_path / "a"
    refused(base, folder, "adapter_config.json", "missing")
    adapter(folder, lora(Q))
    (folder / "adapter_config.json").write_text("{")
    refused(base, folder, "not JSON")
    adapter(folder, lora(Q))
    (folder / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes()[:-4])
    refused(base, folder, "not a whole safetensors file")
    (folder / "adapter_model.safetensors").unlink()
    refused(base, folder, "adapter_model.safetensors", "missing")
    (folder / "adapter_model.bin").write_bytes(b"")
    refused(base, folder, "adapter_model.bin", "pickle")
    adapter(folder, {})
    refused(base, folder, "no tensor")
