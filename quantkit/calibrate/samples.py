"""Conversations in, token batches out: read, chosen evenly over languages and domains, rendered by the model's own chat template."""

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from quantkit.errors import CalibrationError
from quantkit.types import Batch, Json

ROLES = ("system", "user", "assistant", "tool")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
UNLABELLED = {"id": "", "language": "unknown", "domain": "unknown"}


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation, in the form that apply_chat_template takes, or plain text."""

    id: str
    language: str
    domain: str
    messages: tuple[Json, ...]
    tools: tuple[Json, ...] = ()
    text: str = field(default="")

    @property
    def labels(self) -> dict[str, str]:
        return {"id": self.id, "language": self.language, "domain": self.domain}


def read_samples(files: Iterable[Path]) -> list[Sample]:
    """Every sample of some .jsonl files: a line is {"messages": [...], "tools": [...]} or {"text": "..."}, labelled where it can be.

    Raises:
        CalibrationError: a file that cannot be read, a line that is no sample (file and line are named), or no sample at all.
    """
    samples: list[Sample] = []
    files = list(files)
    for path in files:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")  # a line ends there only: text may hold other separators
        except (OSError, UnicodeDecodeError) as problem:
            raise CalibrationError(f"{path}: cannot be read ({problem})") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                samples.append(_parse(line, f"{path}:{number}"))
    if not samples:
        names = ", ".join(str(path) for path in files) or "no file"
        raise CalibrationError(f"the calibration set is empty ({names}); give a .jsonl file with a sample a line")
    return samples


def _parse(line: str, where: str) -> Sample:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise CalibrationError(f"{where}: not a JSON line") from None
    if not isinstance(value, dict):
        raise CalibrationError(f"{where}: a sample is an object with messages or text")
    if _LONE_SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise CalibrationError(f"{where}: holds half of a surrogate pair, which is no text")
    name, language, domain = (str(value.get(key) or default) for key, default in UNLABELLED.items())
    name = where if name == UNLABELLED["id"] else name
    text, messages, tools = value.get("text"), value.get("messages"), value.get("tools") or []
    if isinstance(text, str) and text.strip() and not messages:
        return Sample(name, language, domain, messages=(), text=text)
    if not isinstance(messages, list) or not messages or not isinstance(tools, list):
        raise CalibrationError(f"{where}: a sample needs messages (a list) or text")
    if not all(isinstance(tool, dict) for tool in tools):
        raise CalibrationError(f"{where}: tools is a list of JSON schemas")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise CalibrationError(f"{where}: every message is an object with a role of {', '.join(ROLES)}")
        if not isinstance(message.get("content") or "", (str, list)):
            raise CalibrationError(f"{where}: a message's content is text, or a list of parts")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise CalibrationError(f"{where}: tool_calls is a list of objects")
    return Sample(name, language, domain, messages=tuple(messages), tools=tuple(tools))


def choose(samples: Sequence[Sample], count: int | None, seed: int) -> list[Sample]:
    """`count` samples (None: all), taken in turn from every (language, domain), each shuffled by the seed. The order is the run's."""
    strata: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        strata.setdefault((sample.language, sample.domain), []).append(sample)
    shuffler = random.Random(seed)
    for key in sorted(strata):
        shuffler.shuffle(strata[key])
    queues = [strata[key] for key in sorted(strata)]
    chosen = [queue[turn] for turn in range(max(map(len, queues), default=0)) for queue in queues if turn < len(queue)]
    return chosen if count is None else chosen[:count]


def load_tokenizer(folder: Path) -> Any:
    """The model's own tokenizer.

    Raises:
        CalibrationError: the folder holds none, or one that needs code of its own.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as problem:  # tokenizer files fail in as many ways as there are kinds
        message = " ".join(str(problem).split())[:160]
        raise CalibrationError(
            f"{folder}: its tokenizer cannot be opened ({message}); the folder needs the model's tokenizer files"
        ) from None


def tokenize(sample: Sample, tokenizer: Any, length: int) -> list[int]:
    """Token ids of one sample, at most `length`, as the model meets them when it is served: its chat template, BOS as the template sets it.

    Templates that take no tools, no system or no tool role (Gemma 3's) get the conversation with those parts written into the turns
    that they do take; models without a template get plain text.
    """
    if sample.text or not getattr(tokenizer, "chat_template", None):
        text = sample.text or "\n\n".join(_as_text(message) for message in sample.messages)
        return list(tokenizer(text, truncation=True, max_length=length)["input_ids"])
    messages = [dict(message) for message in sample.messages]
    try:
        ids = _render(tokenizer, messages, list(sample.tools))
    except Exception:  # a template refuses by raising whatever it likes
        try:
            ids = _render(tokenizer, _plain_turns(sample), [])
        except Exception as problem:
            message = " ".join(str(problem).split())[:160]
            raise CalibrationError(f"{sample.id}: the model's chat template refuses this sample ({message})") from None
    return ids[:length]


def _render(tokenizer: Any, messages: list[Json], tools: list[Json]) -> list[int]:
    encoded = tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


def _as_text(message: Json) -> str:
    content = message.get("content") or ""
    parts = [message.get("reasoning_content") or ""]
    parts += [content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)]
    parts += [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls") or []]
    return "\n".join(part for part in parts if part)


def _plain_turns(sample: Sample) -> list[Json]:
    """user and assistant turns only, alternating, with tools, system text and results inside the user's."""
    head = [json.dumps(tool, ensure_ascii=False) for tool in sample.tools]
    turns: list[Json] = []
    for message in sample.messages:
        role = "assistant" if message["role"] == "assistant" else "user"
        text = _as_text(message)
        if not turns and role == "assistant":
            turns.append({"role": "user", "content": "\n".join(head) or "…"})
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + text
        else:
            turns.append({"role": role, "content": "\n".join([*head, text]) if not turns else text})
    return turns


def make_batches(samples: Sequence[Sample], tokenizer: Any, length: int, batch_tokens: int) -> list[Batch]:
    """Rows of about one length together, padded on the right, at most `batch_tokens` tokens each (a longer row stands alone).

    Raises:
        CalibrationError: no sample leaves two tokens.
    """
    rows = [(tokenize(sample, tokenizer, length), sample.labels) for sample in samples]
    rows = sorted((row for row in rows if len(row[0]) > 1), key=lambda row: -len(row[0]))
    if not rows:
        raise CalibrationError("the calibration set is empty: no sample is longer than one token")
    batches: list[Batch] = []
    start = 0
    while start < len(rows):
        width = len(rows[start][0])
        group = rows[start : start + max(1, batch_tokens // width)]
        ids = torch.zeros(len(group), width, dtype=torch.long)
        real = torch.zeros(len(group), width, dtype=torch.bool)
        for row, (tokens, _) in enumerate(group):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            real[row, : len(tokens)] = True
        batches.append(Batch(ids, real, tuple(labels for _, labels in group)))
        start += len(group)
    return batches
