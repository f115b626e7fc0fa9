"""Solved blocks on disk: back to the bit, never another plan's, never half a file."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quantkit.errors import StoreError
from quantkit.grid.integer import pack
from quantkit.model.blocks import published_entries
from quantkit.plan import make_plan
from quantkit.recipe import Recipe
from quantkit.store import Piece, Store, safetensors_header, solved_bytes, write_safetensors
from quantkit.types import Codes, FoldReport, Plan, Solved, SolvedBlock

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
}  # fmt: skip
ABOUT = {"model": "tiny", "recipe": "mine", "calibration": "stem", "adapter": None}


def plan_of(symmetric: bool = True, inputs: str = "") -> Plan:
    overrides = [{"match": "self_attn.o_proj", "keep": True}, {"match": "mlp.*", "weights": {"bits": 8, "symmetric": symmetric}}]
    recipe = Recipe.model_validate({"name": "mine", "description": "x", "weights": {"symmetric": symmetric}, "overrides": overrides})
    return make_plan(recipe, CONFIG, published_entries(CONFIG), inputs)


def solved_block(plan: Plan, index: int) -> SolvedBlock:
    generator = torch.Generator().manual_seed(index)
    linears = {}
    for linear in plan.blocks[index].linears:
        if linear.scheme is None:
            continue
        (out, columns), bits = linear.shape, linear.scheme.bits
        half, groups = 1 << (bits - 1), columns // linear.scheme.group
        codes = torch.randint(-half, half, (out, columns), generator=generator).to(torch.int8)
        scale = torch.rand(out, groups, generator=generator).to(torch.bfloat16) + 0.01
        zero = None if linear.scheme.symmetric else torch.randint(-half, half, (out, groups), generator=generator).to(torch.int8)
        linears[linear.local] = Solved(Codes(pack(codes, bits), scale, zero, linear.scheme, columns), 0.1 + index / 3, 1 / 3, 1234567)
    folded = {
        "input_layernorm.weight": torch.rand(64, generator=generator).to(torch.bfloat16),
        "post_attention_layernorm.weight": torch.rand(64, generator=generator),
    }
    folds = (FoldReport("input_layernorm", (0.1, 0.7), (0.5, 2 / 3), 0.9), FoldReport("mlp.up_proj", None, (1.0, 1.0), 1.0))
    return SolvedBlock(index, linears, folded, folds)


def same(a: SolvedBlock, b: SolvedBlock) -> None:
    assert (a.index, a.folds) == (b.index, b.folds)
    assert a.linears.keys() == b.linears.keys()
    for local, one in a.linears.items():
        other = b.linears[local]
        assert (one.error_rounded, one.error, one.tokens) == (other.error_rounded, other.error, other.tokens)
        assert (one.codes.scheme, one.codes.columns) == (other.codes.scheme, other.codes.columns)
        assert torch.equal(one.codes.packed, other.codes.packed)
        assert one.codes.scale.dtype == other.codes.scale.dtype
        assert torch.equal(one.codes.scale, other.codes.scale)
        assert (one.codes.zero is None) == (other.codes.zero is None)
        assert one.codes.zero is None or torch.equal(one.codes.zero, other.codes.zero)
    assert a.folded.keys() == b.folded.keys()
    for name, tensor in a.folded.items():
        assert tensor.dtype == b.folded[name].dtype
        assert torch.equal(tensor, b.folded[name])


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- Put and get ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_block_comes_back_to_the_bit(symmetric, tmp_path):
    plan = plan_of(symmetric)
    store = Store(tmp_path / "solved", plan, ABOUT)
    assert 0 not in store
    blocks = [solved_block(plan, index) for index in range(2)]
    for block in reversed(blocks):
        store.put(block)
    again = Store(tmp_path / "solved", plan, ABOUT)
    for index, block in enumerate(blocks):
        assert index in again
        same(again.get(plan.blocks[index]), block)
        assert again.folded(index) == set(block.folded)
        assert torch.equal(again.read(index, "mlp.up_proj/packed"), block.linears["mlp.up_proj"].codes.packed)
    assert 2 not in again
    assert "self_attn.o_proj" not in again.get(plan.blocks[0]).linears, "it is kept"
    assert files(tmp_path) == ["solved/block-00000.safetensors", "solved/block-00001.safetensors", "solved/plan.json"]


def test_a_block_that_is_put_again_replaces_the_first(tmp_path):
    plan = plan_of()
    store = Store(tmp_path / "solved", plan, ABOUT)
    first, second = solved_block(plan, 0), replace(solved_block(plan, 1), index=0)
    store.put(first)
    same(store.get(plan.blocks[0]), first)
    store.put(second)
    same(store.get(plan.blocks[0]), second)


def test_the_same_block_is_the_same_bytes(tmp_path):
    plan = plan_of(False)
    for name in ("a", "b"):
        Store(tmp_path / name / "solved", plan, ABOUT).put(solved_block(plan, 1))
    first, second = (tmp_path / name / "solved" / "block-00001.safetensors" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


# --- Whose folder it is -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "about, words",
    [
        ({**ABOUT, "recipe": "awq-w8"}, "recipe 'mine'"),
        ({**ABOUT, "model": "gemma", "calibration": "other"}, "model 'tiny', calibration 'stem'"),
        ({**ABOUT, "adapter": "lora"}, "adapter None"),
        (ABOUT, "other inputs or versions"),
    ],
)
def test_another_plan_is_refused_and_told_apart(about, words, tmp_path):
    out = tmp_path / "out"
    store = Store(out / "solved", plan_of(), ABOUT)
    store.put(solved_block(plan_of(), 0))
    before = {name: (out / name).read_bytes() for name in files(out)}
    with pytest.raises(StoreError) as caught:
        Store(out / "solved", plan_of(inputs="others"), about)
    for word in (str(out), "holds another run", words, "--fresh"):
        assert word in str(caught.value)
    assert {name: (out / name).read_bytes() for name in files(out)} == before


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("dear reader")
    with pytest.raises(StoreError, match="not empty and not a run of quantkit"):
        Store(tmp_path / "solved", plan_of(), ABOUT)
    assert files(tmp_path) == ["thesis.txt"]
    (tmp_path / "out").mkdir()
    Store(tmp_path / "out" / "solved", plan_of(), ABOUT)


@pytest.mark.parametrize("note", ["", "{", "[]", "{}", "5", '{"model": "tiny"}'])
def test_a_damaged_note_is_one_sentence(note, tmp_path):
    Store(tmp_path / "solved", plan_of(), ABOUT)
    (tmp_path / "solved" / "plan.json").write_text(note)
    Store(tmp_path / "solved", plan_of(), ABOUT)  # nothing is solved yet, so nothing can be mixed up
    (tmp_path / "solved" / "plan.json").write_text(note)
    (tmp_path / "solved" / "block-00000.safetensors").touch()
    with pytest.raises(StoreError, match=r"plan\.json: damaged; delete"):
        Store(tmp_path / "solved", plan_of(), ABOUT)


# --- Damage -----------------------------------------------------------------------------------------------------------------------


def test_a_damaged_block_is_one_sentence(tmp_path):
    plan = plan_of(False)
    store = Store(tmp_path / "solved", plan, ABOUT)
    store.put(solved_block(plan, 0))
    path = tmp_path / "solved" / "block-00000.safetensors"
    whole = path.read_bytes()
    tensors, note = load_file(path), json.loads(safe_open(path, "pt").metadata()["solved"])

    def lost(name: str) -> None:
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, path, metadata={"solved": json.dumps(note)})

    damages = {
        "empty": lambda: path.write_bytes(b""),
        "cut in the header": lambda: path.write_bytes(whole[:300]),
        "cut in the data": lambda: path.write_bytes(whole[:-1]),
        "noise": lambda: path.write_bytes(os.urandom(len(whole))),
        "no note": lambda: save_file(tensors, path),
        "note is no JSON": lambda: save_file(tensors, path, metadata={"solved": "{"}),
        "note is a list": lambda: save_file(tensors, path, metadata={"solved": "[]"}),
        "note lacks a linear": lambda: save_file(tensors, path, metadata={"solved": json.dumps({**note, "linears": {}})}),
        "no scale": lambda: lost("mlp.up_proj/scale"),
        "no zero": lambda: lost("self_attn.q_proj/zero"),
    }
    for damage, do in damages.items():
        do()
        with pytest.raises(StoreError) as caught:
            Store(tmp_path / "solved", plan, ABOUT).get(plan.blocks[0])
        assert str(path) in str(caught.value), damage
        assert "delete this file and run again" in str(caught.value), damage
    path.write_bytes(whole)
    same(Store(tmp_path / "solved", plan, ABOUT).get(plan.blocks[0]), solved_block(plan, 0))


def test_every_flipped_bit_of_a_block_is_found(tmp_path):
    """In the data, where any bytes are a legal tensor, as in the header and in the note beside it."""
    plan = plan_of(False)
    Store(tmp_path / "solved", plan, ABOUT).put(solved_block(plan, 0))
    path = tmp_path / "solved" / "block-00000.safetensors"
    whole = path.read_bytes()
    for place in (*range(8, 1200, 13), *range(1200, len(whole), len(whole) // 200), len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(StoreError, match=r"block-00000\.safetensors: damaged .*; delete this file and run again"):
            Store(tmp_path / "solved", plan, ABOUT).get(plan.blocks[0])
    path.write_bytes(whole)
    store = Store(tmp_path / "solved", plan, ABOUT)
    same(store.get(plan.blocks[0]), solved_block(plan, 0))
    store.put(replace(solved_block(plan, 1), index=0))
    same(store.get(plan.blocks[0]), replace(solved_block(plan, 1), index=0))


def test_the_digest_is_of_the_file_with_zeros_in_its_place(tmp_path):
    plan = plan_of()
    Store(tmp_path / "solved", plan, ABOUT).put(solved_block(plan, 0))
    path = tmp_path / "solved" / "block-00000.safetensors"
    told = safe_open(path, "pt").metadata()["sha256"]
    assert hashlib.sha256(path.read_bytes().replace(told.encode(), b"0" * 64)).hexdigest() == told


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_bytes_of_solved_blocks_are_known_beforehand(symmetric, tmp_path):
    plan = plan_of(symmetric)
    store = Store(tmp_path / "solved", plan, ABOUT)
    told = 0
    for index in range(2):
        store.put(solved_block(plan, index))
        names = safe_open(store._path(index), "pt").keys()
        told += sum(store.read(index, name).nbytes for name in names if not name.startswith("folded/"))
    assert solved_bytes(plan) == told


# --- Files ------------------------------------------------------------------------------------------------------------------------


def piece(name: str, tensor: torch.Tensor) -> Piece:
    return Piece(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def test_files_are_safetensors(tmp_path):
    tensors = {
        "flag": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "bf16": torch.randn(3, 5).to(torch.bfloat16),
        "ünïcode/名": torch.randn(7),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "strided": torch.arange(12, dtype=torch.int32).view(3, 4).T,
        "double": torch.randn(2, dtype=torch.float64),
    }
    pieces = [piece(name, tensor) for name, tensor in tensors.items()]
    path = tmp_path / "new" / "folder" / "a.safetensors"
    write_safetensors(path, pieces, {"format": "pt", "note": '{"a": 1}'})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": '{"a": 1}'}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert file.get_tensor(name).dtype == tensor.dtype
            assert torch.equal(file.get_tensor(name), tensor)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__")
    for name, place in header.items():
        begin = start + place["data_offsets"][0]
        assert begin % tensors[name].dtype.itemsize == 0, f"{name} is not aligned in the file"
    predicted = safetensors_header(sorted(pieces, key=lambda p: -p.dtype.itemsize), {"format": "pt", "note": '{"a": 1}'})
    assert content.startswith(predicted)
    assert len(content) == len(predicted) + sum(p.bytes for p in pieces) == len(predicted) + sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("length", range(8))
def test_tensors_lie_aligned_whatever_the_header(length, tmp_path):
    write_safetensors(tmp_path / "a", [piece("a", torch.ones(1, dtype=torch.float64))], {"note": "x" * length})
    assert (tmp_path / "a").stat().st_size % 8 == 0


def test_tensors_are_read_one_at_a_time_when_their_turn_comes(tmp_path):
    turns: list[str] = []

    def late(name: str) -> Piece:
        return Piece(name, torch.float32, (2,), lambda: turns.append(name) or torch.ones(2))

    pieces = [late(name) for name in "cab"]
    safetensors_header(pieces, {})
    assert not turns
    write_safetensors(tmp_path / "a", pieces, {})
    assert turns == list("cab")


@pytest.mark.parametrize("existed", [True, False])
def test_a_read_that_fails_leaves_nothing(existed, tmp_path):
    path = tmp_path / "a.safetensors"
    if existed:
        path.write_bytes(b"before")

    def fails() -> torch.Tensor:
        assert len(list(tmp_path.iterdir())) == 1 + existed, "the file grows under another name"
        raise StoreError("damaged")

    with pytest.raises(StoreError):
        write_safetensors(path, [piece("a", torch.ones(4)), Piece("b", torch.float32, (2,), fails)], {})
    assert files(tmp_path) == (["a.safetensors"] if existed else [])
    assert not existed or path.read_bytes() == b"before"


@pytest.mark.parametrize("made", [torch.ones(3), torch.ones(2, dtype=torch.float64), torch.ones(2, 1)])
def test_a_tensor_that_is_not_as_planned_is_caught(made, tmp_path):
    with pytest.raises(AssertionError, match="a: planned"):
        write_safetensors(tmp_path / "a", [Piece("a", torch.float32, (2,), lambda: made)], {})
    assert files(tmp_path) == []
