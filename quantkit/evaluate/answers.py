"""What a model said, found in what it generated: a number in any script, a word, tool calls in the forms that templates use.

Tool calls are read in the forms of Gemma 4 (call:name{...}, JSON or <|"|>-quoted), Hermes and Qwen (<tool_call>{...}</tool_call>),
Llama 3 (a bare object with name and parameters), Mistral ([TOOL_CALLS] and a list, or name{...}) and OpenAI (a function inside).
"""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from quantkit.errors import EvaluationError
from quantkit.types import Json

_THOUGHTS = re.compile(r"<\|channel>thought.*?<channel\|>|<think>.*?</think>", re.DOTALL)
_SPECIAL = re.compile(r"<\|?[a-z_/]+\|?>|<turn\|>")
_NUMBER = re.compile(r"[-+−]?\d[\d\s.,'’٫٬_]*(?:/\d+)?")
_GEMMA = re.compile(r"call:\s*([\w.-]+)\s*(?=\{)")
_MISTRAL = re.compile(r"\[TOOL_CALLS\]\s*([\w.-]+)\s*(?:\[ARGS\]\s*)?(?=\{)")
_KEY = re.compile(r"([{,]\s*)([A-Za-z_][\w-]*)\s*:")


def said(text: str) -> str:
    """What was said aloud: without thoughts and marks of the template."""
    return _SPECIAL.sub(" ", _THOUGHTS.sub(" ", text)).strip()


def same_number(text: str, accepted: Sequence[str]) -> bool:
    """Whether the last number of the last line that has one equals an accepted one, in some reading of its separators."""
    lines = [line for line in said(text).splitlines() if _NUMBER.search(_digits(line))]
    if not lines:
        return False
    last = _NUMBER.findall(_digits(lines[-1]))[-1]
    wanted = {value for answer in accepted for found in _NUMBER.findall(_digits(answer))[-1:] for value in _readings(found)}
    return bool(_readings(last) & wanted)


def same_text(text: str, accepted: Sequence[str]) -> bool:
    """Whether the last line, or what stands behind its last colon, is an accepted answer, without case and punctuation."""
    lines = [line for line in said(text).splitlines() if _plain(line)]
    if not lines:
        return False
    found = {_plain(lines[-1]), _plain(re.split(r"[:：]", lines[-1])[-1])}
    return bool(found & ({_plain(answer) for answer in accepted} - {""}))


def find_calls(text: str) -> list[Json]:
    """The tool calls in a text: [{"name": ..., "arguments": {...}}]; what no parser takes is not one."""
    text, calls = _THOUGHTS.sub(" ", text), []
    for named in (*_GEMMA.finditer(text), *_MISTRAL.finditer(text)):
        arguments = _object(text[named.end() :])
        if arguments is not None:
            calls.append({"name": named[1], "arguments": arguments})
    if calls:
        return calls
    decoder, at = json.JSONDecoder(), 0
    while match := re.compile(r"[{\[]").search(text, at):
        try:
            value, at = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            at = match.start() + 1
            continue
        calls += [call for one in (value if isinstance(value, list) else [value]) if (call := _call(one)) is not None]
    return calls


def valid_calls(text: str, tools: Sequence[Json]) -> bool:
    """At least one call, and every one of a known tool with arguments that its schema takes."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    calls = find_calls(text)
    return bool(calls) and all(call["name"] in schemas and _takes(schemas[call["name"]], call["arguments"]) for call in calls)


def same_calls(text: str, expected: Sequence[Json], accept: Mapping[str, Sequence[Any]], tools: Sequence[Json]) -> bool:
    """Valid, and the expected calls in any order."""
    found = find_calls(text)
    if len(found) != len(expected) or not valid_calls(text, tools):
        return False
    left = list(expected)
    for call in found:
        match = next((one for one in left if _same_call(call, one, accept)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_call(call: Json, wanted: Json, accept: Mapping[str, Sequence[Any]]) -> bool:
    given, arguments = call["arguments"], wanted["arguments"]
    return (
        call["name"] == wanted["name"]
        and given.keys() == arguments.keys()
        and all(any(_same(given[key], value) for value in (arguments[key], *accept.get(key, ()))) for key in arguments)
    )


def _same(one: Any, two: Any) -> bool:
    """JSON's equality: 1 is 1.0, and true is no 1."""
    if isinstance(one, bool) or isinstance(two, bool):
        return one is two
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(_same, one, two))
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    return bool(one == two)


def _takes(schema: Json, arguments: Json) -> bool:
    try:
        import jsonschema
    except ImportError:
        raise EvaluationError("tool calls are judged by jsonschema; pip install jsonschema") from None
    try:
        jsonschema.Draft202012Validator(schema).validate(arguments)
    except (jsonschema.ValidationError, jsonschema.SchemaError):
        return False
    return True


def _call(value: Any) -> Json | None:
    if not isinstance(value, dict):
        return None
    value = value.get("function") if isinstance(value.get("function"), dict) else value
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value.get("name"), str) or not isinstance(arguments, dict):
        return None
    return {"name": value["name"], "arguments": arguments}


def _object(text: str) -> Json | None:
    """The object that a text begins with: JSON, or Gemma's form of it with bare keys and strings in <|"|>."""
    for form in (text, _json_of(text)):
        try:
            value, _ = json.JSONDecoder().raw_decode(form)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return None


def _json_of(text: str) -> str:
    parts = text.split('<|"|>')  # every second part is a string
    bare = [_KEY.sub(r'\1"\2":', part) for part in parts[::2]]
    strings = [json.dumps(part, ensure_ascii=False) for part in parts[1::2]]
    return "".join(piece for pair in zip(bare, [*strings, ""], strict=False) for piece in pair)


def _digits(text: str) -> str:
    """Every script's decimal digits as 0-9."""
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in unicodedata.normalize("NFKC", text))


def _readings(number: str) -> set[Fraction]:
    """The values that a written number can have: its last separator may group thousands or begin the decimals."""
    sign = -1 if number[0] in "-−" else 1
    number, _, below = number.lstrip("-+−").strip().rstrip(".,'’٫٬_ ").partition("/")
    whole = re.sub(r"\D", "", number)
    values = {Fraction(int(whole))}
    marks = re.findall(r"[.,٫٬]", number)
    if marks:
        decimals = re.sub(r"\D", "", number[number.rindex(marks[-1]) + 1 :])
        grouped = len(decimals) == 3 and marks[-1] != "٫"
        values = {Fraction(int(whole), 10 ** len(decimals))} | (values if grouped else set())
        if marks.count(marks[-1]) > 1:  # a mark that stands twice groups
            values = {Fraction(int(whole))}
    if below:
        values = {value / int(below) for value in values if int(below)}
    return {sign * value for value in values}


def _plain(text: str) -> str:
    kept = (c if unicodedata.category(c)[0] not in "PSZC" else " " for c in unicodedata.normalize("NFKC", said(text)).casefold())
    return " ".join("".join(kept).split())
