"""Runs that start behind what earlier ones saw: the same sums to the bit on every family, with attention run once."""

import pytest
import tiny
import torch
from test_observe import opened
from test_streaming import one_thread, root  # noqa: F401
from torch import nn

from quantkit.calibrate.kept import Kept
from quantkit.calibrate.observe import observe
from quantkit.model.experts import replace_weight, weight_of
from quantkit.model.memory import Memory

STAGES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def linears_of(block: nn.Module) -> list[str]:
    dense = [name for name, module in block.named_modules() if isinstance(module, nn.Linear) and name.endswith("_proj")]
    experts = [(name, len(module.down_proj)) for name, module in block.named_modules() if hasattr(module, "_apply_gate")]
    return dense + [f"{name}.{e}.{leaf}" for name, count in experts for e in range(count) for leaf in ("gate_proj", "up_proj", "down_proj")]


def in_stages(name: str, root, memory: Memory | None):  # noqa: F811
    """Statistics of every stage, each stage's weights halved behind it, the runs of q_proj, and where the original's stream ends."""
    stream, calibrated = opened(name, root)
    reference, found, runs = calibrated.fork(), [], []
    with stream.skeleton.block(0) as block:
        wanted = linears_of(block)
        of_block = Kept(memory) if memory else None
        found.append(observe(stream, block, reference, set(wanted), grams=False, kept=of_block))
        twin, of_twin = stream.skeleton.twin(block), Kept(memory, like=of_block) if memory else None
        for one in (block, twin):
            one.get_submodule("self_attn.q_proj").register_forward_hook(lambda *_: runs.append(1))
        for number, leaves in enumerate(STAGES):
            stage = [local for local in wanted if local.rpartition(".")[2] in leaves]
            beside, last = (block, reference), number == len(STAGES) - 1
            found.append(
                observe(stream, twin, calibrated, set(stage), held=True, beside=beside, move=last, kept=of_twin, kept_beside=of_block)
            )
            for local in stage:
                replace_weight(twin, local, weight_of(block, local) * 0.5)
        inputs = of_block._inputs if of_block else {}
    return found, len(runs) / len(stream.batches), list(reference.hidden), inputs


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_what_is_kept_gives_the_same_sums_to_the_bit(name, root):  # noqa: F811
    plain, often, ends, _ = in_stages(name, root, None)
    kept, once, kept_ends, inputs = in_stages(name, root, Memory())
    for one, other in zip(plain, kept, strict=True):
        assert one.keys() == other.keys()
        for local, stats in one.items():
            for part in ("tokens", "abs", "square", "gram", "drift"):
                before, after = getattr(stats, part), getattr(other[local], part)
                assert torch.equal(torch.as_tensor(before), torch.as_tensor(after)) if before is not None else after is None, (local, part)
    assert all(torch.equal(one, other) for one, other in zip(ends, kept_ends, strict=True))
    assert {name for name, _ in inputs} >= {"self_attn"}
    assert once <= often - 4, "attention ran again where its last input was known"


def test_what_is_kept_obeys_the_budget(root):  # noqa: F811
    memory = Memory(limit=0)
    _, _, ends, _ = in_stages("llama", root, memory)
    assert memory.held == 0
    assert memory.spilled > 0
    _, _, plain, _ = in_stages("llama", root, None)
    assert all(torch.equal(one, other) for one, other in zip(ends, plain, strict=True))
