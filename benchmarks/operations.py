"""What a run of the default recipe computes, holds and reads, counted from a config alone: a plan gives every linear's shape.

Counted are products of matrices (a multiplication and an addition are two operations) and factorizations; the search of ranges, which
multiplies nothing with anything, is counted in bytes that its passes over the weights read and write.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantkit.calibrate.observe import STRIPS, WIDE
from quantkit.plan import make_plan
from quantkit.recipe import load_recipe
from quantkit.types import BlockPlan, Entry, Json, Linear

CANDIDATES = 1 + 2 * 10 + 2  # plain, ten clips of either sign, two refits
PASSES = 8  # over the weights for a candidate: each reads and writes four bytes


@dataclass(frozen=True, slots=True)
class Block:
    """Operations and bytes of one decoder block."""

    kind: str  # "sliding_attention", "full_attention", or "" where a model has one kind
    bytes: int  # of its tensors in the checkpoint
    active: int  # parameters of linears that a token meets
    forward: float  # a token once through the block
    observe_forward: float  # a token through what the recipe's stages run of the original and of the twin
    grams: float  # a token into the sums: x x^T, the drift, what the residual lacks
    solve: float  # compensation and retargeting, fp32, whatever the tokens
    factor: float  # Choleskys and their solutions, fp64
    search: float  # bytes that the range search of all weights moves, where nothing of it stays in a cache
    gram_bytes: int  # of the largest stage's sums, held-back tokens' sums included
    handed: float  # bytes of a token's inputs on their way to the rank that sums them: both streams in bf16, what is lacking in fp32
    all_gram_bytes: int  # of all stages' sums: every rank gets all of them
    kept_width: int  # columns of what stages keep of a token beside its hidden states (both streams)


def count(config: Json, entries: Mapping[str, Entry], context: float) -> list[Block]:
    """Every block of a model; `context`: tokens that a token attends to, as the machine computes them (mask and all)."""
    plan = make_plan(load_recipe("awq-w4"), config, entries)
    text = config.get("text_config") or config
    share = text["top_k_experts"] / text["num_experts"] if text.get("num_experts") else 1.0
    kinds = text.get("layer_types") or [""] * len(plan.blocks)
    return [_block(block, kinds[block.index], entries, share, context) for block in plan.blocks]


def _block(plan: BlockPlan, kind: str, entries: Mapping[str, Entry], share: float, context: float) -> Block:
    linears = [linear for linear in plan.linears if linear.scheme]
    expert = lambda linear: ".experts." in f".{linear.local}"  # noqa: E731
    weight = lambda linear: share if expert(linear) else 1.0  # noqa: E731
    one = lambda some: sum(2.0 * linear.shape[0] * linear.shape[1] * weight(linear) for linear in some)  # noqa: E731
    leaf = lambda *names: [linear for linear in linears if linear.local.rpartition(".")[2] in names]  # noqa: E731
    dense, routed = [x for x in linears if not expert(x)], [x for x in linears if expert(x)]
    q, o = leaf("q_proj")[0], leaf("o_proj")[0]
    router = sum(2.0 * entries[name].shape[0] * entries[name].shape[1] for name in plan.kept.values() if len(entries[name].shape) == 2)
    attention = 4.0 * q.shape[0] * context
    forward = one(linears) + router + attention
    mlp = [linear for linear in dense if linear.local.startswith("mlp.")]
    before_o = one(leaf("q_proj", "k_proj", "v_proj")) + attention
    if routed:  # the MLP runs before the experts, whole, in both of the last stages; its down_proj alone where it was kept
        last = 2 * one([o]) + one([x for x in mlp if x in leaf("down_proj")]) + one(mlp) + 2 * (router + one(routed))
        stages = 2 * one([q]) + before_o + 2 * (one([o]) + one(mlp) + router) + last
    else:
        down = leaf("down_proj")
        stages = (
            2 * one([q]) + before_o + 2 * (one([o]) + one(leaf("gate_proj"))) + 2 * one([o]) + one(down) + one(leaf("gate_proj", "up_proj"))
        )
    grams = solve = factor = handed = 0.0
    held: Counter[int] = Counter()
    for number, stage in enumerate(plan.stages):
        for fed in _inputs([linear for linear in linears if linear.local in stage]):
            width, rows, times = fed[0].shape[1], sum(linear.shape[0] for linear in fed), 1
            own = expert(fed[0]) and fed[0].local.endswith("down_proj")
            lacking = next((linear.shape[0] for linear in fed if linear.local in plan.residual), 0)
            strips = (STRIPS + 1) / (2 * STRIPS) if width >= WIDE else 1.0
            tokens = share * len([x for x in routed if x.local.endswith("down_proj")]) if own else 1.0
            count = len([x for x in leaf("down_proj") if expert(x)]) if own else times
            grams += tokens * 2 * (width * width * (1 + strips) + lacking * width)
            handed += tokens * (2 * 2 * width + 4 * lacking)
            held[number] += 2 * 4 * count * (2 * width * width + lacking * width)  # twice: some tokens are held back
            solve += 3.0 * rows * width * width * count
            solved_for = rows if rows < width else width + lacking  # right-hand sides: the rows themselves, or a shift for all of them
            factor += count * (2 / 3 * width**3 + 2.0 * solved_for * width * width)
    search = sum(linear.shape[0] * linear.shape[1] for linear in linears) * CANDIDATES * PASSES * 8.0
    kept = 2 * o.shape[1] + sum(linear.shape[1] for linear in mlp if linear.local.endswith("down_proj"))
    active = round(sum(linear.shape[0] * linear.shape[1] * weight(linear) for linear in linears))
    size = sum(entry.bytes for name, entry in entries.items() if name.startswith(plan.prefix))
    return Block(
        kind, size, active, forward, forward + stages, grams, solve, factor, search, max(held.values()), handed, held.total(), kept
    )


def _inputs(linears: Sequence[Linear]) -> list[list[Linear]]:
    """The linears of a stage that one Gram serves; of experts' down_proj one stands for all, each of which has its own."""
    groups: dict[str, list[Linear]] = {}
    for linear in linears:
        stem, _, leaf = linear.local.rpartition(".")
        if ".experts." in f".{stem}.":
            if leaf == "down_proj" and groups.get("experts down"):
                continue
            groups.setdefault("experts down" if leaf == "down_proj" else "experts in", []).append(linear)
        else:
            groups.setdefault(stem + ("/" + leaf if leaf in ("o_proj", "down_proj") else ""), []).append(linear)
    return list(groups.values())
