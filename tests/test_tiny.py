"""The tiny checkpoints are what they say: whole, finite, the same each time."""

import json
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from safetensors import safe_open

WITHOUT_TOWERS = "gemma3n"  # its vision tower needs timm, so its text model is opened alone


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A function from a family's name to its folder, built once."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = tiny.build(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return get


def opened(folder: Path, name: str, dtype=torch.float32):
    if name == WITHOUT_TOWERS:
        config = transformers.Gemma3nTextConfig(**json.loads((folder / "config.json").read_text())["text_config"])
        return transformers.Gemma3nForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, key_mapping={r"^model\.language_model": "model"}, output_loading_info=True
        )
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    return kind.from_pretrained(folder, dtype=dtype, output_loading_info=True)


def names_in(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names |= set(tensors.keys())
    return names


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_opens_whole_and_gives_finite_logits(built, name):
    model, info = opened(built(name), name)
    unexpected = {key for key in info["unexpected_keys"] if name != WITHOUT_TOWERS or "language_model" in key}
    assert not info["missing_keys"]
    assert not unexpected
    assert not info["mismatched_keys"]
    tokens = torch.randint(len(tiny.SPECIAL), tiny.VOCABULARY, (2, 2 * tiny.WINDOW + 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        changed = tokens.clone()
        changed[:, 0] = (changed[:, 0] + 1) % tiny.VOCABULARY
        other = model(input_ids=changed).logits
    assert logits.shape == (*tokens.shape, tiny.VOCABULARY)
    assert logits.isfinite().all()
    assert logits.std() > 0.1, "the logits say nothing"
    assert not torch.equal(logits[:, 1:], other[:, 1:]), "attention does not look back"


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_same_bytes_each_time(built, name, tmp_path):
    again = tiny.build(name, tmp_path)
    files = sorted(file.name for file in again.iterdir())
    assert files == sorted(file.name for file in built(name).iterdir())
    for file in files:
        assert (again / file).read_bytes() == (built(name) / file).read_bytes(), file


def test_another_seed_gives_other_weights(built, tmp_path):
    other = tiny.build("llama", tmp_path, seed=1)
    assert (other / "model.safetensors").read_bytes() != (built("llama") / "model.safetensors").read_bytes()


def test_window_of_mistral_is_one(built):
    """A token further back than the window times the depth is not seen by the last one."""
    model, _ = opened(built("mistral"), "mistral")
    reach = tiny.WINDOW * model.config.num_hidden_layers
    tokens = torch.randint(len(tiny.SPECIAL), tiny.VOCABULARY, (1, reach + 10), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 0] = tiny.VOCABULARY - 1 - changed[0, 0]
    with torch.no_grad():
        first, second = model(input_ids=tokens).logits, model(input_ids=changed).logits
    assert torch.equal(first[0, -1], second[0, -1])
    assert not torch.equal(first[0, 1], second[0, 1])


def test_names_on_disk_are_the_published_ones(built):
    assert "model.layers.0.mlp.experts.7.gate_proj.weight" in names_in(built("qwen3_moe"))
    assert "model.layers.0.block_sparse_moe.experts.10.w1.weight" in names_in(built("mixtral"))
    moe = names_in(built("gemma4_moe"))
    assert "model.language_model.layers.0.experts.gate_up_proj" in moe
    assert "model.language_model.layers.0.self_attn.v_proj.weight" in moe
    assert "model.language_model.layers.2.self_attn.v_proj.weight" not in moe, "full layers have k = v"
    shared = names_in(built("gemma4_e"))
    assert "model.language_model.layers.1.self_attn.k_proj.weight" in shared
    assert "model.language_model.layers.2.self_attn.k_proj.weight" not in shared, "the last two layers share keys and values"
    published = names_in(built("gemma3n"))
    assert {name.split(".")[1] for name in published} == {"language_model", "vision_tower", "embed_vision", "audio_tower", "embed_audio"}
    assert "model.layers.0.self_attn.q_proj.bias" in names_in(built("qwen2"))
    assert "lm_head.weight" not in names_in(built("qwen2")), "tied"


@pytest.mark.parametrize("name", ["gemma4_moe", "gemma4_dense", "gemma4_e", "gemma4_text"])
def test_gemma4_config_has_the_published_keys(built, name):
    config = json.loads((built(name) / "config.json").read_text())
    text = config.get("text_config", config)
    assert text["global_head_dim"] == 64
    assert "num_global_key_value_heads" in text
    assert "per_layer_config" not in text


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_tokenizer_and_chat_template(built, name):
    tokenizer = transformers.AutoTokenizer.from_pretrained(built(name))
    bos = tiny.FAMILIES[name].bos
    text = "A river, 山 и море.\n  def f(x): return x"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tiny.IDS["<bos>"]) == bos
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    messages = [
        {"role": "system", "content": "You count."},
        {"role": "user", "content": [{"type": "text", "text": "one and two?"}]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    ]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat.startswith("<bos>") == bos
    assert [turn.split("\n")[0] for turn in chat.split("<|turn>")[1:]] == ["system", "user", "model", "tool", "model"]
    assert "one and two?" in chat
    assert '"name": "add"' in chat
    assert tokenizer(chat, add_special_tokens=False)["input_ids"].count(tiny.IDS["<turn|>"]) == 4


def test_changes_dtype_and_shards(tmp_path):
    folder = tiny.build("gemma4_moe", tmp_path / "a", dtype="float32", max_shard_size="400KB", num_hidden_layers=2, hidden_size=64)
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 2
    assert config["dtype"] == "float32"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    assert set(index) == names_in(folder)
    model, info = opened(folder, "gemma4_moe")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.get_input_embeddings().weight.shape == (tiny.VOCABULARY, 64)
    folder = tiny.build("gemma3n", tmp_path / "b", max_shard_size="300KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
