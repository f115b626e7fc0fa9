"""The embedded reference model: small, shaped like the large ones, and really trained."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors import safe_open  # noqa: E402

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "reference"
SAMPLES = ROOT / "calibration" / "samples"
LANGUAGES = {"ar", "en", "es", "fr", "hi", "ja", "ko", "nl", "ru", "zh"}


def begins_with_its_only_bos(tokenizer, ids: list[int]) -> bool:
    return ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "scripts" / "make_reference.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


script = load_script()


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((REFERENCE / "config.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(REFERENCE)


@pytest.fixture(scope="module")
def model():
    return transformers.Gemma4ForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def held_out(tokenizer) -> dict:
    return script.held_out_documents(tokenizer, longest=512)


# --- The folder -----------------------------------------------------------------------------------


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in REFERENCE.rglob("*") if path.is_file()) <= 4_000_000


def test_the_config_has_the_awkward_shapes(config):
    assert config["architectures"] == ["Gemma4ForCausalLM"]
    assert config["model_type"] == "gemma4_text"
    assert config["moe_intermediate_size"] % 32 == 0
    assert config["moe_intermediate_size"] % 64 != 0
    assert config["hidden_size"] % 64 == config["intermediate_size"] % 64 == 0
    assert config["enable_moe_block"] is config["attention_k_eq_v"] is config["tie_word_embeddings"] is True
    assert config["final_logit_softcapping"] == 30.0
    assert config["hidden_size_per_layer_input"] == config["num_kv_shared_layers"] == 0
    assert set(config["layer_types"]) == {"sliding_attention", "full_attention"}


def test_the_config_says_the_full_layers_heads_as_every_consumer_reads_them(config):
    assert config["global_head_dim"] != config["head_dim"]
    assert config["num_global_key_value_heads"] > 0


def test_the_tensors_have_the_shapes_that_the_config_promises(config):
    with safe_open(REFERENCE / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (the file is no dict)
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        dtypes = {part.get_dtype() for part in slices.values()}
    assert dtypes == {"BF16"}
    assert "lm_head.weight" not in shapes
    experts, width, hidden = (config[name] for name in ("num_experts", "moe_intermediate_size", "hidden_size"))
    for index, kind in enumerate(config["layer_types"]):
        layer = f"model.layers.{index}"
        assert shapes[f"{layer}.experts.gate_up_proj"] == (experts, 2 * width, hidden)
        assert shapes[f"{layer}.experts.down_proj"] == (experts, hidden, width)
        assert shapes[f"{layer}.router.proj.weight"] == (experts, hidden)
        assert shapes[f"{layer}.mlp.down_proj.weight"] == (hidden, config["intermediate_size"])
        assert (f"{layer}.self_attn.v_proj.weight" in shapes) == (kind == "sliding_attention")
        assert shapes[f"{layer}.self_attn.o_proj.weight"][1] % 64 == 0
        assert shapes[f"{layer}.self_attn.k_proj.weight"][0] % 32 == 0


def test_generation_stops_at_the_end_of_a_turn(tokenizer):
    generation = json.loads((REFERENCE / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids([script.EOS, script.END_OF_TURN])
    assert generation["bos_token_id"] == tokenizer.bos_token_id
    assert generation["pad_token_id"] == tokenizer.pad_token_id


# --- The tokenizer --------------------------------------------------------------------------------


def test_the_special_tokens_come_first(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>", "<unk>"]) == [0, 1, 2, 3]


@pytest.mark.parametrize("language", sorted(LANGUAGES))
def test_text_comes_back_from_the_tokenizer_in_every_language(tokenizer, language):
    for sample in script.read_conversations(SAMPLES)[language]:
        for text in script.strings(sample):
            ids = tokenizer(text).input_ids
            assert begins_with_its_only_bos(tokenizer, ids)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_character_never_seen_is_spelled_in_bytes(tokenizer):
    text = "ᚠᚢᚦ 🦕  \t\n"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


# --- The chat template ----------------------------------------------------------------------------


def test_a_sample_with_tools_renders_with_bos_once(tokenizer):
    conversations = [sample for samples in script.read_conversations(SAMPLES).values() for sample in samples]
    with_tools = [sample for sample in conversations if sample.get("tools")]
    assert with_tools
    for sample in with_tools:
        ids = tokenizer.apply_chat_template(sample["messages"], tools=sample["tools"], return_dict=False)
        assert begins_with_its_only_bos(tokenizer, ids)
        rendered = script.render(tokenizer, sample)
        for tool in sample["tools"]:
            assert f'"name": "{tool["function"]["name"]}"' in rendered
        calls = sum(len(message.get("tool_calls") or []) for message in sample["messages"])
        assert rendered.count("<|tool_call>") == rendered.count("<tool_call|>") == calls


def test_the_template_renders_every_kind_of_message(tokenizer):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "unit": "né"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]},
        {"role": "assistant", "content": None, "reasoning_content": "A sum.", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tools=[{"name": "add"}], tokenize=False, add_generation_prompt=True)
    assert rendered == (
        '<bos><|turn>system\nBe brief.<|tool>{"name": "add"}<tool|><turn|>\n'
        "<|turn>user\n1 + 1?<turn|>\n"
        '<|turn>model\n<|channel>thought\nA sum.<channel|><|tool_call>call:add{"a": 1, "unit": "né"}<tool_call|><turn|>\n'
        "<|turn>tool\n<|tool_response>2<tool_response|><turn|>\n"
        "<|turn>model\n"
    )


# --- The training ---------------------------------------------------------------------------------


def test_the_model_reads_code_that_it_never_saw(model, held_out):
    judged = script.perplexities(model, held_out["code"])
    assert judged["model"] < judged["unigram"] / 3 < judged["uniform"] / 3


def test_the_model_reads_ten_languages(model, held_out):
    assert set(held_out) - {"code"} == LANGUAGES
    for language in LANGUAGES:
        judged = script.perplexities(model, held_out[language])
        assert judged["model"] < judged["unigram"] / 2 < judged["uniform"] / 2, language


def test_every_expert_is_used(model, held_out):
    watch = script.RouterWatch(model)
    script.perplexities(model, [document[:256] for documents in held_out.values() for document in documents])
    share = watch.load / watch.load.sum(1, keepdim=True)
    assert share.min() > 0.1 / script.CONFIG["num_experts"]
