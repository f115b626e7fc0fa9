"""Samples as token ids, as the model meets them when it is served: its chat template, BOS once, and whose turn each token is of."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from quantkit.calibrate.samples import ROLES, Sample
from quantkit.errors import CalibrationError
from quantkit.types import Json

SPEAKERS = (*ROLES, "text", "several")  # `several`: turns that the template does not let us tell apart
TEXT, SEVERAL = SPEAKERS.index("text"), SPEAKERS.index("several")
ASSISTANT = SPEAKERS.index("assistant")
AS_SERVED, TOOLS_AS_TEXT, TWO_ROLES, PLAIN = (
    "chat template", "tools written as text", "system and tools written into the user's turns", "plain text, no template",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rendered:
    """A sample's tokens."""

    ids: list[int]
    speakers: bytes  # for each token, an index into SPEAKERS
    how: str  # AS_SERVED, or the fallback that the template needed
    dropped: tuple[str, ...] = ()  # what the template left out


def load_tokenizer(folder: Path) -> Any:
    """The model's own tokenizer.

    Raises:
        CalibrationError: the folder holds none, or one that needs code of its own.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokenizer("a probe", verbose=False)  # what contradicts itself often opens, and fails at the first text
        return tokenizer
    except Exception as problem:  # tokenizer files fail in as many ways as there are kinds
        message = " ".join(str(problem).split())[:160]
        if "trust_remote_code" in str(problem):
            message = "it is code that the model brings, and quantkit runs no code of models: trust_remote_code stays off"
        raise CalibrationError(
            f"{folder}: its tokenizer cannot be opened ({message}); the folder needs the model's tokenizer files"
        ) from None


def render(sample: Sample, tokenizer: Any, thinking: bool | None = None) -> Rendered:
    """A sample's tokens, whole.

    The chat template gets messages and tools as they are. Where it refuses or loses part of them, the tools are written out as text;
    where it has no system role either (Gemma 2's), all of it goes into the turns of user and assistant. Text, and conversations for a
    model without a template, are plain. BOS stands once, in front, where the tokenizer sets one.

    Args:
        thinking: the template's own switch (enable_thinking), where it has one; None leaves it alone.

    Raises:
        CalibrationError: a template that refuses the sample in every form.
    """
    if sample.text or not getattr(tokenizer, "chat_template", None):
        text = sample.text or "\n\n".join(_as_text(message) for message in sample.messages)
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        return _with_one_bos(Rendered(ids, bytes([TEXT]) * len(ids), PLAIN), tokenizer)
    options = {} if thinking is None else {"enable_thinking": thinking}
    attempts, refusal = [], ""
    for how, messages, tools in (
        (AS_SERVED, [_text_only(message) for message in sample.messages], list(sample.tools)),
        (TOOLS_AS_TEXT, _tools_as_text(sample), []),
        (TWO_ROLES, _two_roles(sample), []),
    ):
        try:
            text = _apply(tokenizer, messages, tools, options)
        except Exception as problem:  # a template refuses by raising whatever it likes
            refusal = " ".join(str(problem).split())[:160]
            continue
        attempts.append((not _holds_all(text, messages, tools), how, messages, tools, text))
        if not attempts[-1][0]:
            break
    if not attempts:
        raise CalibrationError(f"{sample.id}: the model's chat template refuses this sample ({refusal})")
    partly, how, messages, tools, text = min(attempts, key=lambda attempt: attempt[0])
    dropped = ["part of the text"] if partly else []
    thoughts = [str(message["reasoning_content"]) for message in sample.messages if message.get("reasoning_content")]
    dropped += ["reasoning"] if any(not _stands_in(thought, text) for thought in thoughts) else []
    dropped += ["images and sound"] if _has_media(sample) else []
    ids, speakers = _encode(text, tokenizer, _ends(text, tokenizer, messages, tools, options))
    return _with_one_bos(Rendered(ids, speakers, how, tuple(dropped)), tokenizer)


def _apply(tokenizer: Any, messages: list[Json], tools: list[Json], options: Json) -> str:
    return str(tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False, **options))


def _ends(text: str, tokenizer: Any, messages: list[Json], tools: list[Json], options: Json) -> list[tuple[int, int]]:
    """(where a stretch of the text ends, whose it is): the template on the first messages alone tells where each turn ends."""
    ends: list[tuple[int, int]] = []
    waiting: set[int] = set()
    for count, message in enumerate(messages, 1):
        waiting.add(SPEAKERS.index(message["role"]))
        part = text
        if count < len(messages):
            try:
                part = _apply(tokenizer, messages[:count], tools, options)
            except Exception:  # a template that wants a user's turn, or an answer, before it renders
                continue
            if not text.startswith(part):  # what came last is rendered otherwise: told apart further on
                continue
        ends.append((len(part), waiting.pop() if len(waiting) == 1 else SEVERAL))
        waiting.clear()
    return ends


def _encode(text: str, tokenizer: Any, ends: Sequence[tuple[int, int]]) -> tuple[list[int], bytes]:
    if not tokenizer.is_fast:  # no offsets: nobody knows which token came from where
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return ids, bytes([SEVERAL]) * len(ids)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    speakers, at = bytearray(), 0
    for start, end in encoded["offset_mapping"]:
        while at < len(ends) - 1 and max(start, end - 1) >= ends[at][0]:
            at += 1
        speakers.append(ends[at][1])
    return list(encoded["input_ids"]), bytes(speakers)


def _with_one_bos(row: Rendered, tokenizer: Any) -> Rendered:
    """BOS once in front: templates write it, tokenizers add it, and ready-made text may bring its own."""
    bos, ids, speakers = tokenizer.bos_token_id, row.ids, row.speakers
    if bos is None or not ids:
        return row
    while len(ids) > 1 and ids[0] == ids[1] == bos:
        ids, speakers = ids[1:], speakers[1:]
    if ids[0] != bos and list(tokenizer("a")["input_ids"])[:1] == [bos]:
        ids, speakers = [bos, *ids], speakers[:1] + speakers
    return Rendered(ids, speakers, row.how, row.dropped)


def special_tokens(rows: Iterable[Sequence[int]], tokenizer: Any) -> dict[str, int]:
    """How often each token with a meaning of its own occurs: those in the chat template, zero where it was never fed, and all that were."""
    counts = Counter(token for row in rows for token in row)
    template = str(getattr(tokenizer, "chat_template", None) or "")
    tokens = sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1])
    return {text: counts[token] for text, token in tokens if counts[token] or text in template}


# --- What a template may not lose --------------------------------------------------------------------------------------------------


def _holds_all(text: str, messages: Iterable[Json], tools: Iterable[Json]) -> bool:
    """Whether a rendering holds every message, every call and every tool: templates without tools drop them without a word."""
    names = [call["function"].get("name", "") for message in messages for call in message.get("tool_calls") or []]
    names += [tool["function"].get("name", "") for tool in tools]
    return all(name in text for name in names) and all(_stands_in(message["content"], text) for message in messages)


def _stands_in(part: str, text: str) -> bool:
    """As it is or inside JSON; templates trim and wrap, so spaces do not count."""
    squeezed = re.sub(r"\s+", "", text)
    forms = (part, *(json.dumps(part, ensure_ascii=ascii)[1:-1] for ascii in (False, True)))
    return any(re.sub(r"\s+", "", form) in squeezed for form in forms)


# --- Other forms of a conversation -------------------------------------------------------------------------------------------------


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text") or "" for part in content if isinstance(part, dict) and part.get("type", "text") == "text")


def _has_media(sample: Sample) -> bool:
    parts = [part for message in sample.messages if isinstance(message["content"], list) for part in message["content"]]
    return any(not isinstance(part, dict) or part.get("type", "text") != "text" for part in parts)


def _text_only(message: Json) -> Json:
    """A message whose content is a string: statistics are taken on text alone."""
    return {**message, "content": _text_of(message["content"])}


def _as_text(message: Json) -> str:
    parts = [message.get("reasoning_content") or "", _text_of(message["content"])]
    parts += [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls") or []]
    return "\n".join(part for part in parts if part)


def _merged(turns: Iterable[tuple[str, str]]) -> list[Json]:
    merged: list[Json] = []
    for role, text in turns:
        if merged and merged[-1]["role"] == role:
            merged[-1]["content"] += "\n\n" + text
        else:
            merged.append({"role": role, "content": text})
    return merged


def _tools_as_text(sample: Sample) -> list[Json]:
    """system, user and assistant only: tools in the system text, calls in the assistant's, results in the user's."""
    tools = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in sample.tools)
    turns = [("system", tools)] if tools else []
    turns += [("user" if m["role"] == "tool" else m["role"], _as_text(m)) for m in sample.messages]
    return _merged(turns)


def _two_roles(sample: Sample) -> list[Json]:
    """user and assistant in turn, the user first, with everything else inside the user's."""
    turns = [("user" if turn["role"] == "system" else turn["role"], turn["content"]) for turn in _tools_as_text(sample)]
    if turns and turns[0][0] == "assistant":
        turns.insert(0, ("user", "…"))
    return _merged(turns)
