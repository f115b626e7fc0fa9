"""Questions with one right answer, one JSON object a line (docs/eval.md has the format), read strictly and asked the same way everywhere.

choice    four full answers; the model's is the one whose tokens it gives the highest probability per byte, behind the chat template
answer    generated greedily; a number is compared as a number in any digits and separators, a text without case and punctuation
call      generated greedily with the tools in the template; valid: known names, arguments that their JSON schema takes;
          right: the expected calls, in any order
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.errors import EvaluationError
from quantkit.evaluate.answers import same_calls, same_number, same_text
from quantkit.evaluate.documents import find_files, json_lines
from quantkit.types import Json

KINDS = ("choice", "answer", "call")
_ID = re.compile(r"[\w.-]+")
_KEYS = {
    "choice": {"choices", "correct"},
    "answer": {"answer", "extract"},
    "call": {"calls", "tools"},
}
_OPTIONAL = {"choice": {"tools"}, "answer": {"also", "tools"}, "call": {"accept"}}
_ALWAYS = {"id", "language", "domain", "kind", "messages"}


@dataclass(frozen=True, slots=True)
class Item:
    """One question."""

    id: str
    kind: str
    labels: Mapping[str, str]  # language, domain
    messages: tuple[Json, ...]
    tools: tuple[Json, ...] = ()
    choices: tuple[str, ...] = ()
    correct: int = 0
    answer: str = ""
    also: tuple[str, ...] = ()
    extract: str = "text"
    calls: tuple[Json, ...] = ()
    accept: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def judge(self, text: str) -> bool:
        """Whether what was generated is right."""
        if self.kind == "call":
            return same_calls(text, self.calls, self.accept, self.tools)
        same = same_number if self.extract == "number" else same_text
        return same(text, (self.answer, *self.also))


def read_items(place: Path, counts: Mapping[str, int | None]) -> list[Item]:
    """Items of a file or folder, at most so many of each kind and language (None: all), in the files' order.

    Raises:
        EvaluationError: a line that is no item (named, with what is wrong), an id that stands twice, or nothing at all.
    """
    items: list[Item] = []
    seen: set[str] = set()
    taken: dict[tuple[str, str], int] = {}
    for path in find_files(place):
        for where, row in json_lines(path):
            item = parse(row, where)
            if item.id in seen:
                raise EvaluationError(f"{where}: the id {item.id!r} stands twice")
            seen.add(item.id)
            cell, most = (item.kind, item.labels["language"]), counts.get(item.kind)
            if most is None or taken.get(cell, 0) < most:
                taken[cell] = taken.get(cell, 0) + 1
                items.append(item)
    if not items:
        raise EvaluationError(f"{place}: no items of the kinds that the suite asks for")
    return items


def parse(row: Json, where: str) -> Item:
    """One item, with every key checked.

    Raises:
        EvaluationError: what is wrong with it.
    """

    def need(true: Any, what: str) -> None:
        if not true:
            raise EvaluationError(f"{where}: {what}")

    kind = row.get("kind")
    need(kind in KINDS, f"kind {kind!r} is none of {', '.join(KINDS)}")
    assert isinstance(kind, str)
    missing = sorted((_ALWAYS | _KEYS[kind]) - row.keys())
    need(not missing, f"lacks {', '.join(missing)}")
    strange = sorted(row.keys() - _ALWAYS - _KEYS[kind] - _OPTIONAL[kind] - {"license"})
    need(not strange, f"unknown key {', '.join(strange)}")
    need(isinstance(row["id"], str) and _ID.fullmatch(row["id"]), f"id {row['id']!r} is no plain name")
    need(all(isinstance(row[key], str) and row[key] for key in ("language", "domain")), "language and domain are names")
    messages = row["messages"]
    need(isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages), "messages are turns")
    need(messages[-1]["role"] in ("user", "tool"), "the last message is not a user's or a tool's")
    if kind == "choice":
        choices, correct = row["choices"], row["correct"]
        need(isinstance(choices, list) and len(choices) >= 2 and all(isinstance(c, str) and c for c in choices), "choices are texts")
        need(len(set(choices)) == len(choices), "a choice stands twice")
        need(isinstance(correct, int) and not isinstance(correct, bool) and 0 <= correct < len(choices), "correct is no choice's index")
    if kind == "answer":
        need(isinstance(row["answer"], str) and row["answer"], "answer is a text")
        need(row["extract"] in ("number", "text"), "extract is number or text")
        need(all(isinstance(one, str) for one in row.get("also", [])), "also is a list of texts")
        same = same_number if row["extract"] == "number" else same_text
        need(same(row["answer"], (row["answer"],)), f"its answer {row['answer']!r} cannot be extracted")
    if kind == "call":
        tools = row["tools"]
        need(isinstance(tools, list) and tools and all("name" in t.get("function", {}) for t in tools), "tools are function schemas")
        calls = row["calls"]
        need(isinstance(calls, list) and calls and all({"name", "arguments"} == c.keys() for c in calls), "calls have name and arguments")
        names = {tool["function"]["name"] for tool in tools}
        need(all(call["name"] in names for call in calls), "a call of a tool that is not there")
    return Item(
        id=row["id"],
        kind=kind,
        labels={"language": row["language"], "domain": row["domain"]},
        messages=tuple(messages),
        tools=tuple(row.get("tools") or ()),
        choices=tuple(row.get("choices", ())),
        correct=row.get("correct", 0),
        answer=row.get("answer", ""),
        also=tuple(row.get("also", ())),
        extract=row.get("extract", "text"),
        calls=tuple(row.get("calls", ())),
        accept=row.get("accept") or {},
    )
