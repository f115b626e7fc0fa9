"""A family's table is right when random scales, folded as it says, leave the logits as they were. Wrong tables must show."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from compressed_tensors.utils.match import is_match
from torch import Tensor, nn

from quantkit import families
from quantkit.errors import FamilyError
from quantkit.families.family import in_block, matches, outside_block, rename
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.experts import weight_of
from quantkit.plan import make_plan
from quantkit.recipe import load_recipe
from quantkit.types import BlockPlan, Entry, Fold, Plan

SAME = 1e-5  # relative; the norms compute in fp32, whatever the model's dtype
WRONG = 1e-3

# What is proven: every tiny family, and shapes of a family that its tiny one does not have.
TWINS: dict[str, tuple[str, dict]] = {
    **{name: (name, {}) for name in tiny.FAMILIES},
    "llama, every bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, a value head for each query head": ("llama", {"num_key_value_heads": 4}),
    "qwen3_moe, a dense layer and biases": ("qwen3_moe", {"mlp_only_layers": [1], "attention_bias": True}),
}

# -- what each is expected to fold, written without a look at the tables -----------------------------------------------------------

Folds = dict[str, set[str]]  # producer -> consumers


def mlp(norm: str) -> Folds:
    return {norm: {"mlp.gate_proj", "mlp.up_proj"}, "mlp.up_proj": {"mlp.down_proj"}}


def experts(norm: str, path: str, count: int, *beside: str) -> Folds:
    gate_up = {f"{path}.{e}.{leaf}" for e in range(count) for leaf in ("gate_proj", "up_proj")}
    return {norm: gate_up | set(beside), **{f"{path}.{e}.up_proj": {f"{path}.{e}.down_proj"} for e in range(count)}}


QUERIES: Folds = {"input_layernorm": {"self_attn.q_proj"}}
QUERIES_KEYS: Folds = {"input_layernorm": {"self_attn.q_proj", "self_attn.k_proj"}}
ATTENTION: Folds = {"input_layernorm": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}}
VALUES: Folds = {"self_attn.v_proj": {"self_attn.o_proj"}}

LLAMA = ATTENTION | VALUES | mlp("post_attention_layernorm")
GEMMA3 = ATTENTION | VALUES | mlp("pre_feedforward_layernorm")
GEMMA3N = mlp("pre_feedforward_layernorm")
GEMMA4 = ATTENTION | mlp("pre_feedforward_layernorm")
GEMMA4_KEYS_AS_VALUES = QUERIES_KEYS | mlp("pre_feedforward_layernorm")
GEMMA4_BORROWED = QUERIES | mlp("pre_feedforward_layernorm")
GEMMA4_EXPERTS = experts("pre_feedforward_layernorm_2", "experts", 8)
QWEN3_MOE = ATTENTION | VALUES | experts("post_attention_layernorm", "mlp.experts", 8, "mlp.gate")
MIXTRAL = ATTENTION | VALUES | experts("post_attention_layernorm", "mlp.experts", 12, "mlp.gate")

EXPECTED: dict[str, list[Folds]] = {  # block after block
    "gemma4_moe": [GEMMA4 | GEMMA4_EXPERTS] * 2 + [GEMMA4_KEYS_AS_VALUES | GEMMA4_EXPERTS] * 2,
    "gemma4_dense": [GEMMA4] * 2 + [GEMMA4_KEYS_AS_VALUES] * 2,
    "gemma4_e": [GEMMA4] * 2 + [GEMMA4_BORROWED] * 2,
    "gemma4_text": [GEMMA4] * 2 + [GEMMA4_KEYS_AS_VALUES],
    "gemma3_text": [GEMMA3] * 3,
    "gemma3_vision": [GEMMA3] * 4,
    "gemma3n_text": [GEMMA3N] * 4,
    "gemma3n": [GEMMA3N] * 4,
    "llama": [LLAMA] * 3,
    "mistral": [LLAMA] * 3,
    "qwen2": [LLAMA] * 3,
    "qwen3": [LLAMA] * 3,
    "qwen3_moe": [QWEN3_MOE] * 3,
    "mixtral": [MIXTRAL] * 3,
    "llama, every bias": [LLAMA] * 3,
    "llama, a value head for each query head": [LLAMA] * 3,
    "qwen3_moe, a dense layer and biases": [QWEN3_MOE, LLAMA, QWEN3_MOE],
}

# Patterns of the tables that no tiny checkpoint has, and why they stand there.
SEEN_NOWHERE: dict[tuple[str, str], str] = {
    ("gemma3", "outside: audio_tower.**"): "one list of towers serves every Gemma",
    ("gemma3", "outside: embed_audio.**"): "one list of towers serves every Gemma",
    ("gemma3", "outside: embed_vision.**"): "one list of towers serves every Gemma",
    ("gemma3", "outside: vision_model.**"): "one list of towers serves every Gemma",
    ("gemma3n", "outside: multi_modal_projector.**"): "one list of towers serves every Gemma",
    ("gemma3n", "outside: vision_model.**"): "one list of towers serves every Gemma",
    ("gemma4", "outside: multi_modal_projector.**"): "one list of towers serves every Gemma",
    ("gemma4", "outside: vision_model.**"): "one list of towers serves every Gemma",
    ("gemma3n", "kept: self_attn.v_norm.weight"): "transformers' v_norm has no weight; an export that writes its ones is not refused",
    ("gemma4", "kept: self_attn.v_norm.weight"): "transformers' v_norm has no weight; an export that writes its ones is not refused",
    ("llama", "kept: self_attn.rotary_emb.inv_freq"): "exports of Llama of 2023 carry it; no model reads it",
}


# -- twins -------------------------------------------------------------------------------------------------------------------------


@dataclass
class Twin:
    """A random model of a family, its plan, and the weights to return to."""

    model: nn.Module
    plan: Plan
    pristine: dict[str, Tensor]
    logits: Tensor

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.get_decoder().layers)

    @torch.no_grad()
    def run(self) -> Tensor:
        ids = torch.randint(20, 300, (2, 2 * tiny.WINDOW - 8), generator=torch.Generator().manual_seed(0))
        return self.model(input_ids=ids, use_cache=False).logits

    def moved(self) -> float:
        """How far the logits are from those of the pristine weights, relative to the largest."""
        return float((self.run() - self.logits).abs().max() / self.logits.abs().max())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Callable[[str], Checkpoint]:
    root, built = tmp_path_factory.mktemp("twins"), dict[str, Checkpoint]()

    def get(name: str) -> Checkpoint:
        if name not in built:
            family, changes = TWINS[name]
            built[name] = Checkpoint(tiny.build(family, root / str(len(built)), dtype="float32", **changes))
        return built[name]

    return get


@pytest.fixture(scope="module")
def opened(checkpoints) -> Callable[[str], Twin]:
    made: dict[str, Twin] = {}

    def get(name: str) -> Twin:
        if name not in made:
            source = checkpoints(name)
            model = _open(source.folder)
            pristine = {n: t.clone() for n, t in model.state_dict().items()}
            made[name] = Twin(model, make_plan(load_recipe("awq-w4"), source.config, source.entries), pristine, torch.empty(0))
            made[name].logits = made[name].run()
        made[name].model.load_state_dict(made[name].pristine)
        return made[name]

    return get


def _open(folder: Path) -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    if config.model_type == "gemma3n":  # its towers need timm: the text model reads the same files
        cls = transformers.Gemma3nForCausalLM
    return cls.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()


# -- folding, straight from the definition -----------------------------------------------------------------------------------------


def scale_like(channels: int, seed: int = 0) -> Tensor:
    """1/2 to 2, log-uniform."""
    return torch.exp2(2 * torch.rand(channels, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 1)


def tensor_of(block: nn.Module, local: str) -> Tensor | None:
    """The weight of a linear, an expert, a router or a norm; None where the block has none of the name."""
    weight = weight_of(block, local)
    if weight is not None:
        return weight
    try:
        return block.get_submodule(local).weight.data
    except AttributeError:
        return None


def repeated(scale: Tensor, columns: int, head: int) -> Tensor:
    """As repeat_kv lays the heads out: each value head `columns / len(scale)` times in a row."""
    return scale if len(scale) == columns else scale.view(-1, head).repeat_interleave(columns // len(scale), 0).reshape(-1)


def leave(block: nn.Module, producer: str, scale: Tensor, offset: float, bias: bool = True) -> None:
    """The scale leaves a norm's gain, or a linear's rows and bias."""
    weight = tensor_of(block, producer)
    if weight.ndim == 1:
        weight.copy_((offset + weight) / scale - offset)
        return
    weight.div_(scale[:, None])
    if "experts" not in producer and bias and block.get_submodule(producer).bias is not None:
        block.get_submodule(producer).bias.data.div_(scale)


def enter(block: nn.Module, fold: Fold, scale: Tensor) -> int:
    """The scale enters the consumers' columns. Returns how many of them the block has."""
    weights = [w for w in (tensor_of(block, consumer) for consumer in fold.consumers) if w is not None]
    for weight in weights:
        weight.mul_(repeated(scale, weight.shape[1], fold.head))
    return len(weights)


def apply(block: nn.Module, fold: Fold, offset: float = 0.0, seed: int = 0, bias: bool = True) -> bool:
    """One fold; False where the block has not got its modules."""
    produced = tensor_of(block, fold.producer)
    if produced is None or all(tensor_of(block, c) is None for c in fold.consumers):
        return False
    scale = scale_like(len(produced), seed)
    leave(block, fold.producer, scale, offset, bias)
    enter(block, fold, scale)
    return True


# -- the proof ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TWINS)
def test_folds_leave_the_logits_as_they_were(name, opened):
    twin = opened(name)
    applied = 0
    for block, plan in zip(twin.blocks, twin.plan.blocks, strict=True):
        for fold in plan.folds:
            applied += 1
            assert apply(block, fold, twin.plan.norm_offset, seed=applied), fold
    assert applied
    assert twin.moved() < SAME


@pytest.mark.parametrize("name", TWINS)
def test_every_family_has_the_folds_that_it_should(name, opened):
    blocks = opened(name).plan.blocks
    found = [{fold.producer: set(fold.consumers) for fold in block.folds} for block in blocks]
    assert found == EXPECTED[name]
    assert [len(block.folds) for block in blocks] == [len(folds) for folds in found]  # none twice
    heads = {(fold.producer, fold.head) for block in blocks for fold in block.folds if fold.head}
    grouped = name != "llama, a value head for each query head" and any("self_attn.v_proj" in folds for folds in found)
    assert heads == ({("self_attn.v_proj", 32)} if grouped else set())


def _kinds(plan: BlockPlan) -> dict[str, list[Fold]]:
    kinds: dict[str, list[Fold]] = {}
    for fold in plan.folds:
        kinds.setdefault(re.sub(r"\d+", "*", fold.producer) if "experts" in fold.producer else fold.producer, []).append(fold)
    return kinds


@pytest.mark.parametrize("name", TWINS)
def test_half_of_any_fold_shows(name, opened):
    """The proof above sees every fold of every block: entered without leaving, or left without entering, it moves the logits."""
    for index, plan in enumerate(opened(name).plan.blocks):
        for kind, folds in _kinds(plan).items():
            for half in ("leave", "enter"):
                twin = opened(name)
                block = twin.blocks[index]
                for fold in folds:
                    scale = scale_like(len(tensor_of(block, fold.producer)))
                    if half == "leave":
                        leave(block, fold.producer, scale, twin.plan.norm_offset)
                    else:
                        assert enter(block, fold, scale) == len(fold.consumers)
                assert twin.moved() > WRONG, (index, kind, half)


# -- wrong tables ------------------------------------------------------------------------------------------------------------------

QUERY, KEY, VALUE, OUTPUT = (f"self_attn.{x}_proj" for x in "qkvo")
GATE, UP, DOWN = (f"mlp.{x}_proj" for x in ("gate", "up", "down"))


def all_experts(path: str, count: int, *leaves: str) -> tuple[str, ...]:
    return tuple(f"{path}.{e}.{leaf}_proj" for e in range(count) for leaf in leaves)


WRONG_FOLDS = {
    # v_norm stands between values and output
    "gemma4 values": ("gemma4_dense", [Fold(VALUE, (OUTPUT,), 32)]),
    "gemma4 moe values": ("gemma4_moe", [Fold(VALUE, (OUTPUT,), 32)]),
    "gemma4_e values": ("gemma4_e", [Fold(VALUE, (OUTPUT,), 32)]),
    "gemma3n values": ("gemma3n_text", [Fold(VALUE, (OUTPUT,), 32)]),
    # LAuReL adds the normed input itself to the residual
    "gemma3n input norm": ("gemma3n_text", [Fold("input_layernorm", (QUERY, KEY, VALUE))]),
    "gemma3n input norm and laurel": ("gemma3n_text", [Fold("input_layernorm", (QUERY, KEY, VALUE, "laurel.linear_left"))]),
    # Llama's default mapping: what it scales writes to the residual stream here
    "llama on gemma3": ("gemma3_text", [Fold("post_attention_layernorm", (GATE, UP))]),
    "llama on gemma3n": ("gemma3n_text", [Fold("post_attention_layernorm", (GATE, UP))]),
    "llama on gemma4": ("gemma4_dense", [Fold("post_attention_layernorm", (GATE, UP))]),
    "llama on gemma4 moe": ("gemma4_moe", [Fold("post_attention_layernorm", (GATE, UP))]),
    # readers of the same norm that are left out
    "qwen3_moe without the router": ("qwen3_moe", [Fold("post_attention_layernorm", all_experts("mlp.experts", 8, "gate", "up"))]),
    "mixtral without the router": ("mixtral", [Fold("post_attention_layernorm", all_experts("mlp.experts", 12, "gate", "up"))]),
    "mixtral without one expert": (
        "mixtral",
        [Fold("post_attention_layernorm", ("mlp.gate", *all_experts("mlp.experts", 11, "gate", "up")))],
    ),
    "llama without the keys": ("llama", [Fold("input_layernorm", (QUERY, VALUE))]),
    # readers of another norm that are taken in
    "gemma4 moe with the router": (
        "gemma4_moe",
        [Fold("pre_feedforward_layernorm_2", ("router.proj", *all_experts("experts", 8, "gate", "up")))],
    ),
    "gemma4 moe with the shared expert": (
        "gemma4_moe",
        [Fold("pre_feedforward_layernorm_2", (GATE, UP, *all_experts("experts", 8, "gate", "up")))],
    ),
    "gemma4_e with the per-layer gate": ("gemma4_e", [Fold("pre_feedforward_layernorm", (GATE, UP, "per_layer_input_gate"))]),
    # an activation stands between gate and down
    **{f"{name} gate": (name, [Fold(GATE, (DOWN,))]) for name in ("llama", "qwen2", "gemma3_text", "gemma3n_text", "gemma4_dense")},
    **{
        f"{name} experts' gate": (name, [Fold(f"{path}.{e}.gate_proj", (f"{path}.{e}.down_proj",)) for e in range(count)])
        for name, path, count in (("gemma4_moe", "experts", 8), ("qwen3_moe", "mlp.experts", 8), ("mixtral", "mlp.experts", 12))
    },
    # keys only choose what is mixed
    **{f"{name} keys": (name, [Fold(KEY, (OUTPUT,), 32)]) for name in ("llama", "qwen3", "gemma3_text", "gemma4_dense")},
    "llama keys, all heads": ("llama, a value head for each query head", [Fold(KEY, (OUTPUT,))]),
}


@pytest.mark.parametrize("case", WRONG_FOLDS)
def test_a_wrong_fold_shows(case, opened):
    name, folds = WRONG_FOLDS[case]
    twin = opened(name)
    for fold in folds:
        assert any(all(tensor_of(block, c) is not None for c in fold.consumers) for block in twin.blocks)
        assert sum(apply(block, fold, twin.plan.norm_offset) for block in twin.blocks)
    assert twin.moved() > WRONG


@pytest.mark.parametrize("name, wrong", [("gemma3_text", 0.0), ("gemma3_vision", 0.0), ("gemma4_dense", 1.0), ("llama", 1.0)])
def test_a_wrong_norm_offset_shows(name, wrong, opened):
    twin = opened(name)
    assert twin.plan.norm_offset == 1 - wrong
    for block, plan in zip(twin.blocks, twin.plan.blocks, strict=True):
        for fold in plan.folds:
            apply(block, fold, wrong)
    assert twin.moved() > WRONG


def test_a_bias_that_is_left_behind_shows(opened):
    for name, fold in (("qwen2", Fold(VALUE, (OUTPUT,), 32)), ("llama, every bias", Fold(UP, (DOWN,)))):
        twin = opened(name)
        for block in twin.blocks:
            apply(block, fold, bias=False)
        assert twin.moved() > WRONG, name


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_value_heads_repeat_one_by_one(name, opened):
    """Heads tiled (0 1 0 1) instead of repeated (0 0 1 1) belong to other queries. One value head reads alike in both orders."""
    twin = opened(name)
    for block in twin.blocks:
        weight = tensor_of(block, OUTPUT)
        scale = scale_like(len(tensor_of(block, VALUE)))
        leave(block, VALUE, scale, 0.0)
        weight.mul_(scale.repeat(weight.shape[1] // len(scale)))
    assert twin.moved() < SAME if name == "gemma3_text" else twin.moved() > WRONG


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gemma4_dense", "gemma3n_text"])
def test_the_last_norm_folds_into_an_untied_head_only(name, opened):
    twin = opened(name)
    norm, head = twin.model.get_decoder().norm.weight.data, twin.model.get_output_embeddings().weight.data
    tied = head.data_ptr() == twin.model.get_input_embeddings().weight.data_ptr()
    assert tied == (name != "llama")
    scale, offset = scale_like(len(norm)), twin.plan.norm_offset
    norm.copy_((offset + norm) / scale - offset)
    head.mul_(scale)
    assert twin.moved() > WRONG if tied else twin.moved() < SAME


# -- the tables --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TWINS)
def test_an_engine_expects_no_codes_where_there_are_none(name, opened):
    """compressed-tensors asks every Linear: those that we quantize are not on the ignore list, all others are."""
    twin = opened(name)
    prefix = next(n for n, module in twin.model.named_modules() if module is twin.model.get_decoder().layers)
    quantized = {f"{prefix}.{block.index}.{linear.local}" for block in twin.plan.blocks for linear in block.linears if linear.scheme}
    assert not {n for n in quantized if is_match(n, nn.Linear(1, 1), twin.plan.ignore)}
    others = {n: module for n, module in twin.model.named_modules() if isinstance(module, nn.Linear) and n not in quantized}
    assert others
    assert not {n for n, module in others.items() if not is_match(n, module, twin.plan.ignore)}


def test_every_architecture_of_a_table_has_a_twin(opened):
    assert {opened(name).plan.model_type for name in TWINS} == {t for family in families.FAMILIES for t in family.model_types}


def test_every_pattern_of_a_table_is_used_or_excused(opened, checkpoints):
    """A pattern that nothing tries could be misspelt for ever. Exact: an excuse that is no longer needed must go, too."""
    unused: set[tuple[str, str]] = set()
    for family in families.FAMILIES:
        twins = [name for name in TWINS if opened(name).plan.family == family.name]
        names = {n for name in twins for n in (*checkpoints(name).entries, *opened(name).model.state_dict())}
        on_disk = {place[2] for n in names if (place := in_block(n))}
        from_disk = {disk: local for local, disk in family.on_disk.items()}
        inside = {_renamed(from_disk, local) for local in on_disk}
        modules = {local.removesuffix(".weight") for local in inside} | {x.local for name in twins for x in opened(name).plan.linears()}
        tried = {
            "linears": (family.linears, modules),
            "kept": (family.kept, inside),
            "outside": (family.outside, {outside_block(n) for n in names if not in_block(n)}),
            "folds": ([p for fold in family.folds for p in (fold.producer, *fold.consumers)], modules),
            "on_disk": (family.on_disk.values(), {local.removesuffix(".weight") for local in on_disk}),
            "fused": (family.fused, inside),
        }
        for kind, (patterns, seen) in tried.items():
            unused |= {(family.name, f"{kind}: {p}") for p in patterns if not any(matches(p, n) for n in seen)}
        seen = {n.removesuffix(".weight") for n in names}
        unused |= {(family.name, f"ignore: {p}") for p in family.ignore if not any(is_match(n, nn.Linear(1, 1), p) for n in seen)}
    assert unused == set(SEEN_NOWHERE)


def _renamed(table: dict[str, str], local: str) -> str:
    module, dot, leaf = local.rpartition(".")
    return rename(table, module) + dot + leaf


@pytest.mark.parametrize("name", ["gemma4_moe", "qwen3_moe", "qwen3_moe, a dense layer and biases", "mixtral"])
def test_fused_experts_are_the_same_linears(name, opened, checkpoints):
    """Published expert by expert or fused, as a plain state dict names them: the same matrices, rows and folds."""
    twin, config = opened(name), checkpoints(name).config
    fused = make_plan(load_recipe("awq-w4"), config, {n: Entry(torch.bfloat16, tuple(t.shape)) for n, t in twin.pristine.items()})
    for block, plan, published in zip(twin.blocks, fused.blocks, twin.plan.blocks, strict=True):
        assert plan.folds == published.folds
        assert [(x.local, x.shape, x.scheme) for x in plan.linears] == [(x.local, x.shape, x.scheme) for x in published.linears]
        for linear in (x for x in plan.linears if x.source.expert is not None):
            rows = twin.pristine[linear.source.tensor][linear.source.expert]
            rows = rows if linear.source.rows is None else rows[slice(*linear.source.rows)]
            assert torch.equal(rows, tensor_of(block, linear.local)), linear


def test_tables_need_no_torch():
    code = "import sys; from quantkit.families import FAMILIES; assert FAMILIES; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(families.__file__).parents[2])
    assert (done.stdout.strip(), done.stderr) == ("set()", "")


# -- refusals ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, asked, near",
    [
        ({"model_type": "lama"}, "lama", "llama"),
        ({"model_type": "gemma5"}, "gemma5", "gemma"),
        ({"model_type": "qwen3_moee"}, "qwen3_moee", "qwen3_moe"),
        ({"model_type": "paligemma", "text_config": {"model_type": "gemma2"}}, "paligemma", "gemma"),
        ({"model_type": None, "architectures": ["MixtralXForCausalLM"]}, "MixtralXForCausalLM", "mixtral"),
        ({}, "nothing", ""),
        ({"model_type": ["llama"], "text_config": "llama"}, "llama", "llama"),
    ],
)
def test_an_unknown_architecture_is_refused_by_name(config, asked, near):
    with pytest.raises(FamilyError) as refused:
        families.find(config)
    message = str(refused.value)
    assert asked in message
    nearest = re.search(r"the nearest known is '(\w+)'", message)
    assert nearest is not None
    assert nearest[1].startswith(near)
    assert "quantkit/families/__init__.py" in message
    assert "\n" not in message


def test_a_nested_text_config_speaks_for_the_text_model():
    family, model_type = families.find({"model_type": "wrapper", "text_config": {"model_type": "gemma3_text"}})
    assert (family.name, model_type) == ("gemma3", "gemma3_text")


PLACES = {
    "gemma4_moe": ("model.language_model.layers.1.", "model.language_model."),
    "gemma3n": ("model.language_model.layers.1.", "model.language_model."),
    "llama": ("model.layers.1.", "model."),
    "mixtral": ("model.layers.1.", "model."),
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize(
    "inside, tensor, shape, near",
    [
        (True, "self_attn.q_projj.weight", (128, 128), "self_attn.q_proj.weight"),
        (True, "self_attn.o_proj.weight_scale", (128,), "self_attn.o_proj.weight"),
        (True, "self_attn.o_proj.weight", (2, 128, 128), "self_attn.o_proj.weight"),  # a known name in an unknown shape
        (True, "post_attention_layer_norm.weight", (128,), "post_attention_layernorm.weight"),
        (False, "embed_tokenz.weight", (384, 128), "embed_tokens.weight"),
        (False, "norm.bias", (128,), "norm.weight"),
    ],
)
def test_an_unknown_tensor_is_refused_by_name(name, inside, tensor, shape, near, checkpoints):
    source = checkpoints(name)
    full = PLACES[name][not inside] + tensor
    make_plan(load_recipe("awq-w4"), source.config, source.entries)  # without it all is well
    with pytest.raises(FamilyError) as refused:
        make_plan(load_recipe("awq-w4"), source.config, {**source.entries, full: Entry(torch.float32, shape)})
    message = str(refused.value)
    family, _ = families.find(source.config)
    assert message.startswith(f"{full}: ")
    assert f"the nearest it knows is '{near}'" in message
    assert f"quantkit/families/{family.name}.py" in message
    assert (Path(families.__file__).parent / f"{family.name}.py").is_file()


# -- names -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, place",
    [
        ("model.layers.3.mlp.up_proj.weight", ("model.layers.3.", 3, "mlp.up_proj.weight")),
        ("layers.0.layer_scalar", ("layers.0.", 0, "layer_scalar")),
        ("model.language_model.layers.12.router.scale", ("model.language_model.layers.12.", 12, "router.scale")),
        ("language_model.model.layers.7.mlp.down_proj.weight", ("language_model.model.layers.7.", 7, "mlp.down_proj.weight")),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj.weight", None),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", None),
        ("mtp.layers.0.mlp.up_proj.weight", None),
        ("model.layers.norm.weight", None),
        ("model.norm.weight", None),
    ],
)
def test_only_the_decoders_blocks_are_blocks(name, place):
    assert in_block(name) == place


def test_a_star_is_one_number():
    assert matches("experts.*.up_proj", "experts.17.up_proj")
    assert not matches("experts.*.up_proj", "experts.1.2.up_proj")
    assert not matches("experts.*.up_proj", "experts.x.up_proj")
    assert not matches("experts.*.up_proj", "mlp.experts.1.up_proj")
    assert not matches("mlp.up_proj", "mlp_up_proj")
    assert matches("vision_tower.**", "vision_tower.layers.0.weight")
    assert not matches("vision_tower.**", "vision_tower_2.layers.0.weight")
    assert rename({"experts.*.w1": "mlp.experts.*.gate_proj"}, "experts.10.w1") == "mlp.experts.10.gate_proj"
    assert rename({"experts.*.w1": "mlp.experts.*.gate_proj"}, "experts.10.w2") == "experts.10.w2"
