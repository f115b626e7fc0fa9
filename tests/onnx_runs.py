"""An ONNX folder in its engines, beside the model that its weights describe: for tests/test_onnx.py and benchmarks/engines/verify_onnx.py.

The reference is transformers' own class on the source checkpoint in fp32, every solved weight put in as its integers and scales say.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import tiny
import torch
import transformers

from quantkit.grid.decoded import decoded
from quantkit.grid.integer import extremes_to_params, to_codes
from quantkit.model.experts import weight_of
from quantkit.store import Store
from quantkit.types import Plan, Scheme

CHUNKS = (9, 1, 1, 20, 1, 28)  # prompt, single tokens, a long piece that leaves the sliding window behind
LENGTH, ROWS, PADDED = sum(CHUNKS), 3, 6  # row 1 is padded on the left by so many


def solved_store(out: Path, plan: Plan) -> Store:
    """The solved blocks of a run that is done."""
    fingerprint = json.loads((out / "solved" / "plan.json").read_text())["fingerprint"]
    return Store(out / "solved", replace(plan, fingerprint=fingerprint), {})


@torch.no_grad()
def reference(source: Path, store: Store, plan: Plan, embeddings: int = 16) -> torch.nn.Module:
    config = transformers.AutoConfig.from_pretrained(source)
    gemma3n = config.model_type == "gemma3n"  # its towers need timm: the text model reads the same files
    cls = transformers.Gemma3nForCausalLM if gemma3n else getattr(transformers, config.architectures[0])
    model = cls.from_pretrained(source, dtype=torch.float32).eval()
    layers = model.get_decoder().layers
    for block in plan.blocks:
        layer = layers[block.index]
        for linear in block.linears:
            weight = weight_of(layer, linear.local)
            if linear.scheme is not None and weight is not None:
                weight.copy_(decoded(store.codes(block.index, linear)))
        for local in store.folded(block.index):
            owner, _, leaf = local.rpartition(".")
            getattr(layer.get_submodule(owner), leaf).copy_(store.read(block.index, f"folded/{local}"))
    if embeddings != 16:
        for name, parameter in model.named_parameters():  # a tied head is the same parameter
            if name.endswith(("embed_tokens.weight", "embed_tokens_per_layer.weight", "lm_head.weight")):
                parameter.copy_(rounded(parameter, embeddings))
    return model


def rounded(table: torch.Tensor, bits: int) -> torch.Tensor:
    """Plain symmetric rounding in groups of 32."""
    scheme, grouped = Scheme(bits, 32, True), table.reshape(len(table), -1, 32)
    scale, _ = extremes_to_params(grouped.amin(-1), grouped.amax(-1), scheme, torch.bfloat16)
    return decoded(to_codes(table.clone(), scale, None, scheme, torch.bfloat16))


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and the attention mask of some rows, one of them padded on the left."""
    ids = torch.randint(len(tiny.SPECIAL), tiny.VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, :PADDED] = 0
    return ids, mask


def distance(folder: Path, model: torch.nn.Module) -> tuple[float, float]:
    """Largest difference of the logits, and the share of positions with the same argmax: in pieces through the cache against one go."""
    ids, mask = tokens()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.numpy()
    made = in_pieces(folder, ids.numpy(), mask.numpy(), positions.numpy())
    real = mask.bool().numpy()
    return float(np.abs(made - expected)[real].max()), float((made.argmax(-1) == expected.argmax(-1))[real].mean())


def session(folder: Path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def in_pieces(folder: Path, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Logits of onnxruntime; the cache starts empty and goes from call to call."""
    opened = session(folder)
    names = [value.name for value in opened.get_outputs()]
    past = {
        value.name: np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
        for value in opened.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    logits, at = [], 0
    for count in CHUNKS:
        piece = slice(at, at + count)
        at += count
        fed = {"input_ids": ids[:, piece], "attention_mask": mask[:, :at], "position_ids": positions[:, piece], **past}
        made = dict(zip(names, opened.run(None, fed), strict=True))
        logits.append(made["logits"])
        past = {name: made[name.replace("past_key_values", "present")] for name in past}
    return np.concatenate(logits, 1)


def greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    """Tokens that onnxruntime-genai picks, by its own reading of the folder."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


def encoded(folder: Path, text: str) -> list[int]:
    """Token ids of a text by onnxruntime-genai's own tokenizer."""
    import onnxruntime_genai as og

    return [int(token) for token in og.Tokenizer(og.Model(str(folder))).encode(text)]


def greedy_torch(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """The same of the reference, by transformers' generate."""
    with torch.no_grad():
        made = model.generate(torch.tensor([prompt]), max_length=len(prompt) + count, do_sample=False)
    return [int(token) for token in made[0]]
