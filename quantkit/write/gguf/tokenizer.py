"""tokenizer.json as llama.cpp's tokenizer keys.

Three kinds, told apart by how the file itself works, not by who made it:

    byte-level BPE (GPT-2's alphabet of bytes)    "gpt2", and the pre-tokenizer that splits by the same pattern
    BPE over text with "▁", bytes as fallback     "gemma4" where the family's name is that, else "llama" (SPM): the same merges told by
                                                  scores, a piece's score falling with the rank of the merge that makes it
    anything else                                 refused

The pre-tokenizer is found by the pattern in the file, which survives retraining and pruning; converters that hash the tokens of a test
string refuse those.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.errors import WriteError
from quantkit.model.checkpoint import read_json
from quantkit.types import Json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}*{_CASED[1]}+|[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}+{_CASED[1]}*|"
PRE_TOKENIZERS = {  # the pattern of tokenizer.json -> the name of llama.cpp's
    "": "gpt-2",  # ByteLevel's own
    rf"{_WORDS}\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    rf"{_WORDS}\p{{N}}{_REST}": "qwen2",
    rf"{_CASED_WORDS}\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
UNREACHED = -1e6  # the score of a piece that no merge makes
SPECIAL = ("bos", "eos", "unk", "pad", "mask")
KEYS = {"unk": "unknown", "pad": "padding"}


def tokenizer_keys(folder: Path, rows: int, architecture: str, visible: Sequence[str], pre: str | None) -> Json:
    """All keys below "tokenizer.".

    Args:
        folder: holds tokenizer.json; tokenizer_config.json, generation_config.json and chat_template.jinja if there are any.
        rows: of the embedding: as many tokens are told, those that the tokenizer has no name for as unused.
        architecture: llama.cpp's name of it.
        visible: special tokens that are told as text.
        pre: a pre-tokenizer of llama.cpp in place of the one that the file's pattern leads to.

    Raises:
        WriteError: no tokenizer.json, or one that llama.cpp cannot be told.
    """
    try:
        keys = _tokenizer_keys(folder, rows, architecture, visible, pre)
        pieces = [keys["ggml.tokens"], keys.get("ggml.merges", []), [keys.get("chat_template", "")]]
        if not all(isinstance(text, str) for texts in pieces for text in texts):
            raise TypeError("a token, a merge or the chat template is no text")
        json.dumps(pieces, ensure_ascii=False).encode()  # halves of a surrogate pair are no UTF-8
        return keys
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as problem:
        line = f"{type(problem).__name__}: {' '.join(str(problem).split())[:120]}"
        raise WriteError(f"{folder}: its tokenizer files contradict themselves ({line}); download them again") from None


def _tokenizer_keys(folder: Path, rows: int, architecture: str, visible: Sequence[str], pre: str | None) -> Json:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise WriteError(f"{path}: missing; a GGUF carries its tokenizer, and only this form of it is read")
    tokenizer, config = read_json(path), _maybe_json(folder / "tokenizer_config.json")
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise WriteError(f"{path}: a {model.get('type')} tokenizer; only BPE is known here")
    kind, pre = _kind(path, tokenizer, architecture, pre)
    tokens, types = _tokens(path, tokenizer, rows, visible)
    keys: Json = {"ggml.model": kind, "ggml.tokens": tokens, "ggml.token_type": types}
    if pre:
        keys["ggml.pre"] = pre
    merges = [merge if isinstance(merge, list) else merge.split(" ", 1) for merge in model["merges"]]
    if kind == "llama":
        keys["ggml.scores"] = _scores(tokens, merges)
        keys["ggml.add_space_prefix"] = '"Prepend"' in json.dumps(tokenizer.get("normalizer"))
    else:
        if kind == "gemma4":
            keys["ggml.scores"] = [-1000.0] * rows  # asked for, not read
        # a space parts the two halves, so one inside of them is told as the letter that byte-level BPE has for it
        keys["ggml.merges"] = [" ".join(half.replace(" ", "Ġ") for half in merge) for merge in merges]
        keys["ggml.add_space_prefix"] = False
    keys |= _special(tokenizer, config, _maybe_json(folder / "generation_config.json"), tokens)
    if template := _chat_template(folder, config):
        keys["chat_template"] = template
    return keys


def _maybe_json(path: Path) -> Json:
    return read_json(path) if path.is_file() else {}


def _kind(path: Path, tokenizer: Json, architecture: str, pre: str | None) -> tuple[str, str | None]:
    """llama.cpp's tokenizer model, and its pre-tokenizer where that model has one."""
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if any(step["type"] == "ByteLevel" for step in steps):
        if pre:
            return "gpt2", pre
        patterns = [step["pattern"].get("Regex", step["pattern"].get("String", "")) for step in steps if step["type"] == "Split"]
        own = any(step["type"] == "ByteLevel" and step.get("use_regex", True) for step in steps)
        pattern = patterns[0] if patterns else "" if own else None
        odd = len(patterns) > 1 or any(step["type"] not in ("Split", "ByteLevel") for step in steps)
        if pattern not in PRE_TOKENIZERS or odd:
            raise WriteError(
                f"{path}: splits text by a pattern that is not known here; set `gguf: pre_tokenizer:` in the recipe to the name of "
                "llama.cpp's pre-tokenizer that does the same (src/llama-vocab.cpp)"
            )
        return "gpt2", PRE_TOKENIZERS[pattern]
    if tokenizer["model"].get("byte_fallback") and "▁" in json.dumps(tokenizer.get("normalizer"), ensure_ascii=False):
        return ("gemma4", None) if architecture == "gemma4" else ("llama", pre or "default")
    raise WriteError(f"{path}: neither byte-level BPE nor BPE with bytes as fallback; llama.cpp cannot be told this tokenizer")


def _steps(part: Any, key: str) -> list[Json]:
    if not part:
        return []
    return [step for inner in part[key] for step in _steps(inner, key)] if part["type"] == "Sequence" else [part]


def _tokens(path: Path, tokenizer: Json, rows: int, visible: Sequence[str]) -> tuple[list[str], list[int]]:
    """Token texts and types. Tokens behind the embedding's last row cannot be fed and are left out."""
    tokens, types = [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows
    bytes_too = bool(tokenizer["model"].get("byte_fallback"))
    for text, number in tokenizer["model"]["vocab"].items():
        if number < rows:
            tokens[number] = text
            types[number] = BYTE if bytes_too and re.fullmatch(r"<0x[0-9A-F]{2}>", text) else NORMAL
    for added in tokenizer.get("added_tokens") or []:
        if added["id"] < rows:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = CONTROL if added["special"] and added["content"] not in visible else USER_DEFINED
    if len(set(tokens)) != rows:
        twice = next(text for text in tokens if tokens.count(text) > 1)
        raise WriteError(f"{path}: the token {twice!r} stands for two ids; llama.cpp takes one")
    return tokens, types


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """SPM merges the pair whose piece scores highest: the rank of the first merge that makes a piece, negated."""
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        rank.setdefault(left + right, number)
    return [-float(rank[text]) if text in rank else UNREACHED for text in tokens]


def _special(tokenizer: Json, config: Json, generation: Json, tokens: Sequence[str]) -> Json:
    """Ids of the special tokens, and whether the tokenizer itself opens and closes a text with any."""
    ids = {text: number for number, text in enumerate(tokens)}
    keys: Json = {}
    for name in SPECIAL:
        entry = config.get(f"{name}_token")
        text = entry.get("content") if isinstance(entry, Mapping) else entry
        if text in ids:
            keys[f"ggml.{KEYS.get(name, name)}_token_id"] = ids[text]
    stops = generation.get("eos_token_id")
    stops = [stop for stop in (stops if isinstance(stops, list) else [stops]) if isinstance(stop, int) and stop < len(tokens)]
    if stops:
        keys.setdefault("ggml.eos_token_id", stops[0])
        others = [stop for stop in stops if stop != keys["ggml.eos_token_id"]]
        if others:
            keys["ggml.eot_token_id"] = others[-1]  # the end of a turn: published configs put it last
    templates = [step for step in _steps(tokenizer.get("post_processor"), "processors") if step["type"] == "TemplateProcessing"]
    single = templates[0]["single"] if templates else []
    for name, piece in (("bos", single[:1]), ("eos", single[-1:])):
        keys[f"ggml.add_{name}_token"] = bool(piece and "SpecialToken" in piece[0])
    if keys["ggml.add_bos_token"]:
        keys.setdefault("ggml.bos_token_id", ids[single[0]["SpecialToken"]["id"]])
    return keys


def _chat_template(folder: Path, config: Json) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else ""
