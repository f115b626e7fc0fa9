"""One block at a time gives what the whole model gives, for every family, and leaves nothing behind."""

from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
import transformers

from quantkit.calibrate.observe import observe
from quantkit.model.blocks import Skeleton
from quantkit.model.checkpoint import Checkpoint
from quantkit.model.streams import State, Stream
from quantkit.types import Batch

LONGER_THAN_THE_WINDOW = (48, 40, 48)


@cache
def checkpoint(name: str, dtype: str, root: str) -> Checkpoint:
    return Checkpoint(tiny.build(name, Path(root) / f"{name}-{dtype}", dtype=dtype))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batches(vocabulary: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in LONGER_THAN_THE_WINDOW:
        ids = torch.randint(20, vocabulary, (2, length), generator=generator)
        real = torch.ones_like(ids, dtype=torch.bool)
        real[1, length - 7 :] = False
        made.append(Batch(ids, real))
    return made


def whole_model(source: Checkpoint, dtype: torch.dtype, experts: str):
    config = transformers.AutoConfig.from_pretrained(source.folder)
    cls = getattr(transformers, config.architectures[0])
    if config.model_type == "gemma3n":  # its towers need timm: the text model reads the same files
        cls = transformers.Gemma3nForCausalLM
    options = {"experts_implementation": experts} if "moe" in str(source.folder) or "mixtral" in str(source.folder) else {}
    return cls.from_pretrained(source.folder, dtype=dtype, **options).eval()


def streamed(source: Checkpoint, dtype: torch.dtype, work: list[Batch]) -> tuple[Stream, State]:
    stream = Stream(Skeleton(source, dtype), work)
    state = stream.start()
    for index in range(len(stream.skeleton.blocks)):
        with stream.skeleton.block(index) as block:
            before = [hidden.clone() for hidden in state.hidden]
            stream.run(block, state, 0)
            assert all(torch.equal(x, y) for x, y in zip(before, state.hidden, strict=True)), "a block changed its input"
            stream.advance(block, state)
        assert all(p.is_meta for p in stream.skeleton.blocks[index].parameters())
    return stream, state


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("dtype, experts", [("float32", "eager"), ("bfloat16", "grouped_mm")])
def test_streamed_logits_are_the_models(name, dtype, experts, root):
    source = checkpoint(name, dtype, root)
    kind = getattr(torch, dtype)
    work = batches(300)
    stream, state = streamed(source, kind, work)
    model = whole_model(source, kind, experts)
    with torch.no_grad():
        for b, batch in enumerate(work):
            whole = model(input_ids=batch.ids, use_cache=False).logits
            assert torch.equal(stream.logits(state, b, slice(None)), whole)
            part = slice(5, 17)
            assert torch.allclose(
                stream.logits(state, b, part).float(), whole[:, part].float(), atol=1e-5 if kind == torch.float32 else 0.05
            )


def test_equality_is_not_vacuous(root):
    """Another batch's shared keys and values move the logits of the E-type."""
    source = checkpoint("gemma4_e", "float32", root)
    work = batches(300)
    stream, good = streamed(source, torch.float32, work)
    state = stream.start()
    for index in range(len(stream.skeleton.blocks)):
        with stream.skeleton.block(index) as block:
            if index == len(stream.skeleton.blocks) - 1:
                state.shared[0], state.shared[2] = state.shared[2], state.shared[0]
            stream.advance(block, state)
    assert not torch.allclose(stream.logits(state, 0, slice(None)), stream.logits(good, 0, slice(None)), atol=1e-3)


@pytest.mark.parametrize("name", ["gemma4_e", "gemma3n_text", "gemma4_moe", "llama"])
def test_two_streams_do_not_touch_each_other(name, root):
    """One stream through edited weights, one through the original: the original's logits stay to the bit."""
    source = checkpoint(name, "float32", root)
    work = batches(300)
    plain_stream, plain = streamed(source, torch.float32, work)
    stream = Stream(Skeleton(source, torch.float32), work)
    original = stream.start()
    edited = original.fork()
    for index in range(len(stream.skeleton.blocks)):
        with stream.skeleton.block(index) as block:
            stream.advance(block, original)
            block.self_attn.q_proj.weight.data.mul_(1.5)
            block.mlp.gate_proj.weight.data.mul_(1.5) if hasattr(block.mlp, "gate_proj") else None
            stream.advance(block, edited)
    assert torch.equal(stream.logits(original, 1, slice(None)), plain_stream.logits(plain, 1, slice(None)))
    assert not torch.equal(stream.logits(edited, 1, slice(None)), plain_stream.logits(plain, 1, slice(None)))
    assert torch.equal(source.view(next(n for n in source.entries if n.endswith("layers.0.self_attn.q_proj.weight"))),
                       source.read(next(n for n in source.entries if n.endswith("layers.0.self_attn.q_proj.weight"))))  # fmt: skip


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_statistics_are_those_of_the_whole_model(name, root):
    """Every linear's Gram against hooks on the whole model, padding left out; every expert's token count against its router."""
    source = checkpoint(name, "float32", root)
    work = batches(300)
    model = whole_model(source, torch.float32, "eager")
    decoder = model.get_decoder()
    grams: dict[tuple[int, str], torch.Tensor] = {}
    routed: dict[tuple[int, str, int], int] = {}
    rows = work[0].real

    def linear_hook(key):
        def hook(module, args):
            x = args[0].reshape(-1, args[0].shape[-1])
            x = x[rows.reshape(-1)] if len(x) == rows.numel() else x
            grams[key] = grams.get(key, 0) + x.T @ x

        return hook

    def experts_hook(key):
        def hook(module, args):
            kept = args[1][rows.reshape(-1)]
            for e in range(module.num_experts):
                routed[*key, e] = routed.get((*key, e), 0) + int((kept == e).sum())

        return hook

    for i, layer in enumerate(decoder.layers):
        for local, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(linear_hook((i, local)))
            if hasattr(module, "_apply_gate"):
                module.register_forward_pre_hook(experts_hook((i, local)))
    with torch.no_grad():
        for batch in work:
            rows = batch.real
            model(input_ids=batch.ids, use_cache=False)
    stream = Stream(Skeleton(source, torch.float32), work)
    state = stream.start()
    seen = 0
    for index in range(len(stream.skeleton.blocks)):
        with stream.skeleton.block(index) as block:
            stats = observe(stream, block, state)
            stream.advance(block, state)
        for local, gram in ((local, g) for (i, local), g in grams.items() if i == index):
            times = 2 if local == "altup.modality_router" else 1  # AltUp asks it when it predicts and when it corrects
            assert stats[local].tokens == times * sum(int(b.real.sum()) for b in work)
            assert torch.allclose(stats[local].gram, gram, rtol=1e-4, atol=1e-4 * float(gram.abs().max())), local
            assert torch.allclose(stats[local].gram.diagonal(), stats[local].square, rtol=1e-4, atol=1e-5)
            seen += 1
        for (i, local, e), count in routed.items():
            if i == index:
                for leaf in ("gate_proj", "up_proj", "down_proj"):
                    assert stats[f"{local}.{e}.{leaf}"].tokens == count
                seen += 1
    assert seen
