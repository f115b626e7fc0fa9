"""One sample: a conversation as apply_chat_template takes it, or plain text. Rows of many shapes become it, or are refused by name."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from quantkit.errors import CalibrationError
from quantkit.recipe import Columns
from quantkit.types import Json

ROLES = ("system", "user", "assistant", "tool")
UNLABELLED = "unknown"
SHUFFLED = 4096  # samples that are put into the seed's order at a time: a source may be larger than memory
_ALIASES = {  # of ShareGPT and its kin
    "human": "user", "prompter": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "developer": "system", "function": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool",
    "ipython": "tool", "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


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

    @property
    def digest(self) -> str:
        """SHA-256 of what it says, whatever it is called and wherever it stood."""
        said = json.dumps([self.messages, self.tools, self.text], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()


def parse(row: Any, where: str, columns: Columns | None = None, language: str | None = None, domain: str | None = None) -> Sample:
    """A row of a source as a sample.

    Args:
        row: {"messages": [...], "tools": [...]}, {"conversations": [{"from", "value"}]}, {"text": "..."} or {"prompt", "response"}.
        where: names the row in errors; without its folders it is the id of a row that has none.
        columns: the row's own names of these.
        language, domain: of a row that does not say.

    Raises:
        CalibrationError: a row that is none of these.
    """
    columns = columns or Columns()
    if not isinstance(row, Mapping):
        raise CalibrationError(f"{where}: a sample is an object with messages or text")
    if _LONE_SURROGATE.search(json.dumps(row, ensure_ascii=False, default=str)):
        raise CalibrationError(f"{where}: holds half of a surrogate pair, which is no text")
    labels = (
        str(row.get(columns.id) or where.rpartition("/")[2]),
        str(row.get(columns.language) or language or UNLABELLED),
        str(row.get(columns.domain) or domain or UNLABELLED),
    )
    messages, text = row.get(columns.messages), row.get(columns.text)
    if not messages and isinstance(row.get(columns.conversations), list):
        messages = [_sharegpt(turn) for turn in row[columns.conversations]]
    if isinstance(text, str) and text.strip() and not messages:
        return Sample(*labels, messages=(), text=text)
    prompt, response = row.get(columns.prompt), row.get(columns.response)
    if not messages and isinstance(prompt, str) and isinstance(response, str) and prompt.strip():
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    tools = _tools(row.get(columns.tools), where)
    if not isinstance(messages, list) or not messages:
        names = f"{columns.messages} (a list), {columns.conversations}, {columns.text}, or {columns.prompt} and {columns.response}"
        raise CalibrationError(f"{where}: a sample needs messages (a list) or text; looked for {names}")
    return Sample(*labels, messages=tuple(_message(message, where) for message in messages), tools=tools)


def _sharegpt(turn: Any) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    return {"role": turn.get("from", turn.get("role")), "content": turn.get("value", turn.get("content"))}


def _message(message: Any, where: str) -> Json:
    role = message.get("role") if isinstance(message, Mapping) else None
    role = _ALIASES.get(str(role), role)
    if role not in ROLES:
        raise CalibrationError(f"{where}: every message is an object with a role of {', '.join(ROLES)}")
    if not isinstance(message.get("content") or "", (str, list)):
        raise CalibrationError(f"{where}: a message's content is text, or a list of parts")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise CalibrationError(f"{where}: tool_calls is a list of objects")
    kept = {key: value for key, value in message.items() if value is not None}  # tables fill what a row lacks with nulls
    kept |= {"role": role, "content": message.get("content") or ""}
    if calls:
        kept["tool_calls"] = [_call(call) for call in calls]
    else:
        kept.pop("tool_calls", None)
    return kept


def _call(call: Mapping[str, Any]) -> Json:
    """A call whose arguments are an object; APIs send them as a JSON string, templates want them whole."""
    function = dict(call["function"]) if isinstance(call.get("function"), Mapping) else dict(call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict):
            function["arguments"] = parsed
    return {"type": "function", **({"id": call["id"]} if call.get("id") else {}), "function": function}


def _tools(value: Any, where: str) -> tuple[Json, ...]:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise CalibrationError(f"{where}: tools is a list of JSON schemas, or one as a JSON string") from None
    value = value or []
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise CalibrationError(f"{where}: tools is a list of JSON schemas")
    return tuple(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in value)


def in_seeds_order(samples: Iterable[Sample], seed: int) -> Iterator[Sample]:
    """Samples in an order that only their text and the seed decide, some thousands at a time: no generator, file order or locale."""

    def place(sample: Sample) -> bytes:
        return hashlib.sha256(f"{seed} {sample.digest}".encode()).digest()

    stream = iter(samples)
    while some := list(islice(stream, SHUFFLED)):
        yield from sorted(some, key=place)


def choose(samples: Iterable[Sample], count: int | None, seed: int) -> list[Sample]:
    """`count` samples (None: all), taken in turn from every (language, domain), each in the seed's order. The order is the run's."""
    strata: dict[tuple[str, str], list[Sample]] = {}
    for sample in in_seeds_order(samples, seed):
        strata.setdefault((sample.language, sample.domain), []).append(sample)
    queues = [strata[key] for key in sorted(strata)]
    chosen = [queue[turn] for turn in range(max(map(len, queues), default=0)) for queue in queues if turn < len(queue)]
    return chosen if count is None else chosen[:count]
