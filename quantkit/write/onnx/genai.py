"""genai_config.json: what onnxruntime-genai must know to run the graph (format: its docs, `genai_config.json`)."""

from pathlib import Path
from typing import Any

from quantkit.model.checkpoint import read_json
from quantkit.model.config import text_defaults
from quantkit.types import Json

# Its own names for models; any other is run as what it is, a decoder. Each is a text model here.
TYPES = {
    "llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text", "gemma3_text": "gemma3_text",
    "gemma4": "gemma4_text", "gemma4_text": "gemma4_text",
}  # fmt: skip
INPUTS = ("input_ids", "attention_mask", "position_ids")


def genai_config(model_type: str, config: Json, source: Path, caches: int, graph: str) -> Json:
    """
    Args:
        model_type: the family's, from config.json.
        config: config.json.
        source: the checkpoint's folder; its generation_config.json says which tokens end a text and how to sample.
        caches: layers that own keys and values.
        graph: the graph's file name.
    """
    text = text_defaults(config)
    says = read_json(source / "generation_config.json") if (source / "generation_config.json").is_file() else {}

    def token(key: str) -> Any:
        return next((place[key] for place in (says, config, text) if place.get(key) is not None), None)

    ends = token("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    padding = token("pad_token_id")
    begin = token("bos_token_id")
    length = text["max_position_embeddings"]
    heads = text["num_attention_heads"]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": graph,
        "hidden_size": text["hidden_size"],
        "head_size": text.get("head_dim") or text["hidden_size"] // heads,
        "num_attention_heads": heads,
        "num_key_value_heads": text.get("num_key_value_heads") or heads,
        "num_hidden_layers": caches,  # it counts caches by this; layers that borrow theirs have none
        "inputs": {
            **{name: name for name in INPUTS},
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
    }
    return {
        "model": {
            "type": TYPES.get(model_type, "decoder"),
            "vocab_size": text["vocab_size"],
            "context_length": length,
            "bos_token_id": begin if begin is not None else (ends or [0])[0],
            "eos_token_id": ends,
            "pad_token_id": padding if padding is not None else (ends or [0])[0],
            "decoder": decoder,
        },
        "search": {
            "do_sample": bool(says.get("do_sample", False)),
            "temperature": says.get("temperature") or 1.0,
            "top_k": says.get("top_k") or 50,
            "top_p": says.get("top_p") or 1.0,
            "repetition_penalty": says.get("repetition_penalty") or 1.0,
            "max_length": length,
            "past_present_share_buffer": False,  # keys and values are concatenated, not written in place
        },
    }
