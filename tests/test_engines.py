"""Engines: a GGUF written tensor by tensor with the gguf library, graphs with a cache, vLLM's log-probabilities as they come."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from quantkit import pipeline
from quantkit.errors import EvaluationError
from quantkit.evaluate.engines import find_artefact, open_engine
from quantkit.evaluate.engines.in_vllm import Vllm

ROWS = [[2, 40, 41, 42, 43, 44], [2, 50, 51], list(range(2, 150))]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return tiny.build("llama", tmp_path_factory.mktemp("llama"))


def write_gguf(source: Path, file: Path, kind: str = "F32", leave_out: str = "") -> Path:
    """A llama as its GGUF: names of the format, rows of q and k interleaved, the tokenizer as byte-level BPE."""
    import json

    import gguf

    config, words = (json.loads((source / name).read_text()) for name in ("config.json", "tokenizer.json"))
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base((config.get("rope_parameters") or {}).get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    added = {token["id"]: token for token in words["added_tokens"]}
    names = {number: token for token, number in words["model"]["vocab"].items()} | {n: token["content"] for n, token in added.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names.get(n, f"[unused{n}]") for n in range(config["vocab_size"])])
    control, plain, unused = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED
    writer.add_token_types([control if n in added else plain if n in names else unused for n in range(config["vocab_size"])])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in words["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(source / "model.safetensors").items():
        if leave_out and leave_out in name:
            continue
        value = tensor.float().numpy()
        for part, count in (("q_proj", heads), ("k_proj", key_heads)):
            if part in name:
                value = value.reshape(count, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        stem = table.get_name(name.removesuffix(".weight"))
        as_type = gguf.GGMLQuantizationType[kind if value.ndim > 1 and "embed" not in name else "F32"]
        data = gguf.quantize(value, as_type) if as_type != gguf.GGMLQuantizationType.F32 else value
        writer.add_tensor(f"{stem}.weight", data, raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def apart(one, two) -> float:
    """The largest KL between two engines on ROWS."""
    first, second = dict(one.log_probs(ROWS)), dict(two.log_probs(ROWS))
    assert sorted(first) == sorted(second) == list(range(len(ROWS)))
    kl = [(first[n].double().exp() * (first[n].double() - second[n].double())).sum(-1).max() for n in first]
    assert all(first[n].shape == second[n].shape == (len(ROWS[n]), one.vocabulary) for n in first)
    return float(max(kl))


# --- GGUF --------------------------------------------------------------------------------------------------------------------------


def test_a_decoded_gguf_is_the_model_itself(llama, tmp_path):
    pytest.importorskip("gguf")
    file = write_gguf(llama, tmp_path / "m.gguf")
    decoded, original = open_engine("dequantized", file, llama), open_engine("transformers", llama, llama)
    weights = original.model.state_dict()
    for name, value in decoded.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert apart(original, decoded) < 1e-9


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gemma3_vision", "gemma4_e"])
def test_every_layout_that_we_write_is_decoded_exactly(family, tmp_path):
    """Through our own writer in F32: stacked experts, norms with 1 added, towers left out, per-layer embeddings."""
    pytest.importorskip("gguf")
    source = tiny.build(family, tmp_path / "source")
    recipe = tmp_path / "f32.yaml"
    recipe.write_text("description: x\nmethod: rtn\ntargets: []\nformats: [gguf]\ngguf: {types: {'*': f32}}\nscore: {samples: 0}\n")
    made = pipeline.quantize(str(source), recipe=str(recipe), output=tmp_path / "out")
    file = find_artefact(made.output)
    assert apart(open_engine("transformers", source, source), open_engine("dequantized", file, source)) == 0.0


def test_a_decoded_gguf_holds_what_its_blocks_hold(llama, tmp_path):
    gguf = pytest.importorskip("gguf")
    decoded = open_engine("dequantized", write_gguf(llama, tmp_path / "m.gguf", "Q8_0"), llama)
    name = "model.layers.0.mlp.up_proj.weight"
    source = load_file(llama / "model.safetensors")[name].float().numpy()
    expected = gguf.dequantize(gguf.quantize(source, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(decoded.model.state_dict()[name].numpy(), expected)
    assert not np.array_equal(source, expected)


def test_a_gguf_that_does_not_fill_the_model_is_refused(llama, tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(EvaluationError, match=r"holds no tensor for .*up_proj"):
        open_engine("dequantized", write_gguf(llama, tmp_path / "m.gguf", leave_out="layers.1.mlp.up_proj"), llama)
    (tmp_path / "text.gguf").write_bytes(b"no model at all, and long enough to be read as one")
    with pytest.raises(EvaluationError, match="no GGUF"):
        open_engine("dequantized", tmp_path / "text.gguf", llama)


def test_llama_cpp_computes_what_transformers_computes(llama, tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    pytest.importorskip("gguf")
    engine, original = open_engine("llama.cpp", write_gguf(llama, tmp_path / "m.gguf"), llama, 1), open_engine("transformers", llama, llama)
    assert apart(original, engine) < 1e-6
    assert engine.generate(ROWS[:2], 6) == original.generate(ROWS[:2], 6)
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    text = "<|turn>user\nThe river is twelve kilometres long.<turn|>\n"
    assert engine.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    long = [[2] + [40 + n % 60 for n in range(1500)]]
    assert next(iter(engine.log_probs(long)))[1].shape == (1501, engine.vocabulary), "its context grows with the rows"
    engine.close()


def test_llama_cpp_with_structures_of_another_version_is_refused(monkeypatch):
    llama_cpp = pytest.importorskip("llama_cpp.llama_cpp", reason="llama-cpp-python is not installed")
    from quantkit.evaluate.engines.in_llama_cpp import check_layouts

    check_layouts()
    real = llama_cpp.llama_context_default_params()
    real.n_batch = 0  # what a field read from the wrong place looks like
    monkeypatch.setattr(llama_cpp, "llama_context_default_params", lambda: real)
    with pytest.raises(EvaluationError, match="does not fit"):
        check_layouts()


# --- onnxruntime -------------------------------------------------------------------------------------------------------------------


class Session:
    """A graph as ONNX exports of decoders name things: one layer whose cache it truly needs (a running mean of embeddings)."""

    def __init__(self, inputs=("input_ids", "attention_mask", "position_ids", "past_key_values.0.key", "past_key_values.0.value")):
        random = np.random.default_rng(0)
        self.table, self.head = random.normal(size=(200, 2, 4)).astype(np.float32), random.normal(size=(8, 200)).astype(np.float32)
        self.names = inputs

    def get_inputs(self):
        kind = lambda name: "tensor(float)" if "past" in name else "tensor(int64)"  # noqa: E731
        return [SimpleNamespace(name=n, type=kind(n), shape=["batch", 2, "past", 4]) for n in self.names]

    def get_outputs(self):
        shapes = {"logits": ["batch", "sequence", 200]}
        return [SimpleNamespace(name=n, shape=shapes.get(n)) for n in ("logits", "present.0.key", "present.0.value")]

    def run(self, _, feed):
        ids, past = feed["input_ids"], feed["past_key_values.0.key"]
        before = past.shape[2]
        assert feed["attention_mask"].shape == (ids.shape[0], before + ids.shape[1])
        assert np.array_equal(feed["position_ids"][0], np.arange(before, before + ids.shape[1]))
        keys = np.concatenate([past, self.table[ids].transpose(0, 2, 1, 3)], axis=2)
        mean = keys.cumsum(2) / np.arange(1, keys.shape[2] + 1)[None, None, :, None]
        hidden = mean[:, :, before:].transpose(0, 2, 1, 3).reshape(*ids.shape, 8)
        return [hidden @ self.head * 4, keys, keys]


def test_a_graphs_cache_goes_round():
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from quantkit.evaluate.engines.in_onnxruntime import OnnxRuntime

    engine = OnnxRuntime(Session(), frozenset(), {})
    assert engine.vocabulary == 200
    found = dict(engine.log_probs(ROWS))
    for number, row in enumerate(ROWS):
        alone = next(iter(engine.log_probs([row])))[1]
        assert torch.allclose(found[number], alone, atol=1e-5), "padding behind a row changes nothing"
    prompt, answer = ROWS[0], engine.generate([ROWS[0]], 5)[0]
    for token in answer:  # each token is what the whole row so far, without a cache, puts first
        assert token == int(next(iter(engine.log_probs([prompt])))[1][-1].argmax())
        prompt = [*prompt, token]
    assert OnnxRuntime(Session(), frozenset({answer[2]}), {}).generate([ROWS[0]], 5)[0] == answer[:2]


def test_a_strange_graph_is_refused():
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from quantkit.evaluate.engines.in_onnxruntime import OnnxRuntime

    with pytest.raises(EvaluationError, match="no decoder that is known"):
        OnnxRuntime(Session(("pixel_values",)), frozenset(), {})


# --- vLLM --------------------------------------------------------------------------------------------------------------------------


class Llm:
    """Answers as vLLM gives them: a dict a position, the first of a prompt None, the next token's beside the one generated."""

    def __init__(self, vocabulary: int, top: int):
        self.table = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
        self.top = top

    def position(self, token: int) -> dict:
        values, ids = self.table[token].topk(self.top)
        return {int(i): SimpleNamespace(logprob=float(v)) for i, v in zip(ids, values, strict=True)}

    def generate(self, prompts, settings, use_tqdm):
        assert use_tqdm is False
        for prompt in (one["prompt_token_ids"] for one in prompts):
            given = [None, *(self.position(token) for token in prompt[:-1])]
            best = int(self.table[prompt[-1]].argmax())
            yield SimpleNamespace(
                prompt_logprobs=given, outputs=[SimpleNamespace(logprobs=[self.position(prompt[-1])], token_ids=[best, 7, 3, 9])]
            )


@pytest.mark.parametrize("top", [60, 10])
def test_vllms_log_probabilities_stand_where_they_belong(top):
    llm = Llm(60, top)
    engine = Vllm(llm, lambda **options: options, frozenset({3}), 60, {})
    rows = [[5, 6, 7], [8]] * 12
    found = dict(engine.log_probs(rows))
    assert sorted(found) == list(range(24))
    for number, row in enumerate(rows):
        assert found[number].shape == (len(row), 60)
        assert torch.allclose(found[number].exp().sum(-1), torch.ones(len(row)), atol=1e-5)
        for place, token in enumerate(row):
            ids = llm.table[token].topk(top).indices
            assert torch.allclose(found[number][place, ids], llm.table[token, ids], atol=1e-4)
    left = 1 - llm.table[5].topk(top).values.exp().sum()
    if top < 60:
        assert float(found[0][0].min()) == pytest.approx(math.log(float(left) / (60 - top)), abs=1e-3)
    assert engine.generate([[5]], 4)[0][1:] == [7], "cut at its end"


def test_a_tiny_gguf_can_be_changed_on_disk(llama, tmp_path):
    """The writer above is no mirror of the reader: another weight is another file."""
    pytest.importorskip("gguf")
    weights = load_file(llama / "model.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    for path in llama.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    save_file({n: w * 2 if "q_proj" in n else w for n, w in weights.items()}, other / "model.safetensors", {"format": "pt"})
    decoded, original = open_engine("dequantized", write_gguf(other, tmp_path / "m.gguf"), llama), open_engine("transformers", llama, llama)
    assert apart(original, decoded) > 1e-6
