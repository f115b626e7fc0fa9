"""Two streams in step, tokens that are held back, what rows matter: sums against the tokens themselves, on every family."""

import pytest
import tiny
import torch
from test_streaming import batches, checkpoint, one_thread, root  # noqa: F401

from quantkit.calibrate.observe import HELD, observe
from quantkit.calibrate.probe import TOKENS_OF_A_ROW, apart, batches_for, heads_of, probe, sensitivity, summed
from quantkit.model import proof
from quantkit.model.blocks import Skeleton
from quantkit.model.experts import is_experts, replace_weight, weight_of
from quantkit.model.streams import State, Stream
from quantkit.types import Batch


def opened(name: str, root: str, work: list[Batch] | None = None) -> tuple[Stream, State]:  # noqa: F811
    stream = Stream(Skeleton(checkpoint(name, "float32", root), torch.float32), work or batches(300))
    return stream, stream.start()


def inputs_of(stream: Stream, block: torch.nn.Module, state: State, local: str) -> torch.Tensor:
    """What a linear is fed, real tokens only, by a hook of the test's own."""
    seen = []
    handle = block.get_submodule(local).register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    for number in range(len(stream.batches)):
        stream.run(block, state, number)
    handle.remove()
    return torch.cat([x[batch.real.reshape(-1)] for x, batch in zip(seen, stream.batches, strict=True)])


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_drift_is_the_originals_inputs_less_ours(name, root):  # noqa: F811
    stream, state = opened(name, root)
    with stream.skeleton.block(0) as block:
        twin = stream.skeleton.twin(block)
        weight = weight_of(block, "self_attn.q_proj")
        before = weight.clone()
        replace_weight(twin, "self_attn.q_proj", weight * 0.5)
        assert torch.equal(weight_of(block, "self_attn.q_proj"), before), "the original was written to"
        stats = observe(stream, twin, state, {"self_attn.o_proj"}, beside=(block, state.fork()))["self_attn.o_proj"]
        ours, theirs = (inputs_of(stream, one, state, "self_attn.o_proj") for one in (twin, block))
    assert not torch.allclose(ours, theirs)
    assert torch.allclose(stats.gram, ours.T @ ours, rtol=1e-3, atol=1e-3)
    assert torch.allclose(stats.drift, (theirs - ours).T @ ours, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["gemma4_moe", "qwen3_moe", "mixtral"])
def test_experts_are_paired_by_the_originals_routing_and_weighted_by_its_square(name, root):  # noqa: F811
    stream, state = opened(name, root)
    with stream.skeleton.block(0) as block:
        twin = stream.skeleton.twin(block)
        experts = next(n for n, m in twin.named_modules() if hasattr(m, "_apply_gate"))
        replace_weight(twin, f"{experts}.0.up_proj", weight_of(block, f"{experts}.0.up_proj") * 0.5)
        calls = []
        module = block.get_submodule(experts)
        handle = module.register_forward_pre_hook(lambda m, args: calls.append(args))
        wanted = {f"{experts}.{e}.{leaf}" for e in range(len(module.down_proj)) for leaf in ("gate_proj", "up_proj", "down_proj")}
        stats = observe(stream, twin, state, wanted, beside=(block, state.fork()))
        handle.remove()
    real = [batch.real.reshape(-1) for batch in stream.batches]
    x = torch.cat([hidden[keep] for (hidden, _, _), keep in zip(calls, real, strict=True)])
    index = torch.cat([i[keep] for (_, i, _), keep in zip(calls, real, strict=True)])
    weight = torch.cat([w[keep] for (_, _, w), keep in zip(calls, real, strict=True)])
    together = stats[f"{experts}.*.gate_proj"]
    assert torch.allclose(together.gram, x.T @ (x * weight.square().sum(-1)[:, None]), rtol=1e-3, atol=1e-3)
    token, slot = torch.where(index == 0)
    own = stats[f"{experts}.0.gate_proj"]
    assert own.tokens == len(token)
    assert torch.allclose(own.square, (x[token].square() * weight[token, slot, None].square()).sum(0), rtol=1e-3, atol=1e-4)
    down = stats[f"{experts}.0.down_proj"]
    assert down.tokens == len(token)
    assert torch.allclose(down.drift, down.gram, rtol=1e-3, atol=1e-4)  # half the input is there: as much is missing
    if len(module.down_proj) > 1:
        other = stats[f"{experts}.1.down_proj"]
        assert other.drift is None or float(other.drift.abs().max()) < 1e-5


def test_a_twentieth_of_every_rows_tokens_is_held_back(root):  # noqa: F811
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(20, 300, (45, 12), generator=generator).split(7)
    work = [Batch(ids, torch.ones_like(ids, dtype=torch.bool), row=7 * number) for number, ids in enumerate(rows)]
    stream, state = opened("llama", root, work)
    with stream.skeleton.block(0) as block:
        stats = observe(stream, block, state, {"mlp.down_proj"}, held=True)["mlp.down_proj"]
        x = inputs_of(stream, block, state, "mlp.down_proj").view(45, 12, -1)
    back = torch.tensor([[(row + token) % HELD == HELD - 1 for token in range(12)] for row in range(45)])
    for sums, rows in ((stats, x[~back]), (stats.held, x[back])):
        flat = rows.reshape(-1, rows.shape[-1])
        assert sums.tokens == len(flat)
        assert torch.allclose(sums.gram, flat.T @ flat, rtol=1e-3, atol=1e-3)


def test_the_residual_is_what_the_stream_lacks(root):  # noqa: F811
    stream, state = opened("llama", root)
    behind = state.fork()
    for number in range(len(stream.batches)):
        behind.hidden[number] = behind.hidden[number] * 0.9
    with stream.skeleton.block(0) as block:
        twin = stream.skeleton.twin(block)
        stats = observe(
            stream, twin, behind, {"self_attn.o_proj"}, beside=(block, state), residual={"self_attn.o_proj": "input_layernorm"}
        )["self_attn.o_proj"]
        x = inputs_of(stream, block, behind, "self_attn.o_proj")
    lacking = torch.cat([h[b.real] for h, b in zip(state.hidden, stream.batches, strict=True)]) * 0.1
    assert torch.allclose(stats.residual, lacking.T @ x, rtol=1e-3, atol=1e-3)


def test_rows_that_go_straight_to_the_output_matter_alike_and_dead_ends_not_at_all(root):  # noqa: F811
    stream, state = opened("llama", root)
    with stream.skeleton.block(0) as block:
        block.mlp.down_proj.weight.data[:, :16] = 0  # nothing reads the first rows of gate and up
        matter = sensitivity(probe(stream, block, state, {"mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"}, 0, {}))
    assert set(matter) == {"mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"}
    assert torch.allclose(matter["mlp.down_proj"], matter["mlp.down_proj"].mean().expand(len(matter["mlp.down_proj"])), rtol=1e-4)
    assert (matter["mlp.up_proj"][:16] == 0).all()
    assert (matter["mlp.up_proj"][16:] > 0).all()


@pytest.mark.parametrize("local", ["self_attn.k_proj", "self_attn.v_proj"])
def test_probes_tell_how_the_rows_of_a_head_move_the_block(local, root):  # noqa: F811
    """Their mean over many probes is the Jacobian's own Gram, by autograd one output at a time."""
    ids = torch.randint(20, 300, (1, 5), generator=torch.Generator().manual_seed(0))
    stream, state = opened("llama", root, [Batch(ids, torch.ones_like(ids, dtype=torch.bool))])
    with stream.skeleton.block(0) as block:
        heads, linear, outs = heads_of(block, [local, "mlp.up_proj", "experts.0.up_proj"]), block.get_submodule(local), []
        handle = linear.register_forward_hook(lambda m, args, out: outs.append(out.requires_grad_(True)) or out)
        moved = stream.run(block, state, 0, grad=True)
        handle.remove()
        jacobian = torch.stack(
            [torch.autograd.grad(one, outs[0], retain_graph=True)[0][0] for one in moved.flatten()]
        )  # (moved, tokens, out)
        probes = [probe(stream, block, state, {local}, 0, heads, seed=seed)[local] for seed in range(700)]
    assert heads == {local: block.self_attn.head_dim}
    by_head = jacobian.flatten(0, 1).unflatten(-1, (-1, heads[local])).transpose(0, 1)
    exact = by_head.mT @ by_head
    mean = torch.stack([one.gram for one in probes]).mean(0)
    assert float((mean - exact).norm()) < 0.2 * float(exact.norm())
    for one in probes[:3]:
        assert torch.allclose(one.gram.diagonal(dim1=1, dim2=2).flatten(), one.square, rtol=1e-4, atol=1e-8)
        assert int(one.tokens) == 5


@pytest.mark.parametrize("family", ["llama", "gemma3n_text"])
def test_padding_moves_no_probe(family, root):  # noqa: F811
    """A row alone, and padded to eight times its length: what its tokens' keys and values are worth is the same."""
    ids = torch.randint(20, 300, (1, 8), generator=torch.Generator().manual_seed(0))
    padded = torch.zeros(1, 64, dtype=torch.long)
    padded[:, :8] = ids
    found, wanted = [], ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"]
    for batch in (Batch(ids, torch.ones_like(ids, dtype=torch.bool)), Batch(padded, torch.arange(64)[None] < 8)):
        stream, state = opened(family, root, [batch])
        with stream.skeleton.block(0) as block:
            probes = [probe(stream, block, state, set(wanted), 0, {}, seed=seed) for seed in range(100)]
        found.append(torch.stack([sum(one[local].square.sum() for one in probes) for local in wanted]))
    assert torch.allclose(found[0], found[1], rtol=0.25)  # padding counted: k 3.7 times, v 2.1 times on the first


def test_an_experts_probe_is_of_what_it_computes_itself(root):  # noqa: F811
    """Its router's weight is in the sums of its inputs: down's rows go straight to the output, so there all experts matter alike."""
    stream, state = opened("mixtral", root)
    with stream.skeleton.block(0) as block:
        experts = next(name for name, module in block.named_modules() if is_experts(module))
        wanted = {f"{experts}.{number}.down_proj" for number in range(len(block.get_submodule(experts).down_proj))}
        found = probe(stream, block, state, wanted, 0, {})
    assert len(found) > 1
    for one in found.values():
        assert torch.allclose(one.square / one.tokens, torch.ones_like(one.square), rtol=1e-3)


def test_probes_add_up_in_the_batches_order_whoever_sends_them(root):  # noqa: F811
    stream, state = opened("llama", root)
    local = "self_attn.q_proj"
    with stream.skeleton.block(0) as block:
        parts = [apart(probe(stream, block, state, {local}, number, heads_of(block, [local])), number) for number in (0, 1)]
    one, other = summed(parts[0] | parts[1])[local], summed(parts[1] | parts[0])[local]
    for mine, theirs, name in ((one.square, other.square, "square"), (one.gram, other.gram, "gram"), (one.tokens, other.tokens, "tokens")):
        assert torch.equal(mine, theirs)
        assert torch.equal(mine, parts[0][f"0/{name}/{local}"] + parts[1][f"1/{name}/{local}"])


def test_as_many_batches_are_probed_as_a_head_has_rows():
    assert list(batches_for({}, [100] * 9)) == [4]
    assert list(batches_for({"q": 64, "k": 2}, [100 * TOKENS_OF_A_ROW] * 9)) == [4]
    assert list(batches_for({"q": 64}, [20 * TOKENS_OF_A_ROW] * 9)) == [4, 5, 6, 7]
    assert list(batches_for({"q": 64}, [10 * TOKENS_OF_A_ROW] * 9)) == [2, 3, 4, 5, 6, 7, 8]
    assert list(batches_for({"q": 512}, [10])) == [0]


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_fold_is_proven_and_a_wrong_one_is_caught(name, root):  # noqa: F811
    stream, state = opened(name, root)
    with stream.skeleton.block(0) as block:
        width = block.mlp.down_proj.in_features if hasattr(block.mlp, "down_proj") else 0
        if not width:
            return
        scale = torch.exp2(torch.randn(width, generator=torch.Generator().manual_seed(0)))
        right = proof.fold_change(stream, block, state, {"mlp.down_proj": scale}, {"mlp.up_proj": scale}, {}, 0)
        wrong = proof.fold_change(stream, block, state, {"mlp.down_proj": scale}, {}, {}, 0)
        gain = block.input_layernorm.weight.data
        norm = {"input_layernorm.weight": gain * torch.exp2(torch.randn(len(gain), generator=torch.Generator().manual_seed(1)))}
        moved = proof.fold_change(stream, block, state, {}, {}, norm, 0)
        assert all(module.forward.__func__ is torch.nn.Linear.forward for module in block.modules() if type(module) is torch.nn.Linear)
    assert right < proof.PROVEN / 10
    assert wrong > 10 * proof.PROVEN
    assert moved > 10 * proof.PROVEN
