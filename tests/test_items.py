"""Items and answers: what is read from a file, what is found in what a model said, and our own set."""

import json
from collections import Counter
from pathlib import Path

import jsonschema
import pytest

from quantkit.errors import EvaluationError
from quantkit.evaluate.answers import find_calls, same_calls, same_number, same_text, valid_calls
from quantkit.evaluate.items import parse, read_items
from quantkit.recipe import items_folder, shipped

TOOL = {
    "type": "function",
    "function": {
        "name": "book",
        "parameters": {
            "type": "object",
            "properties": {"day": {"type": "string", "enum": ["mon", "tue"]}, "seats": {"type": "integer", "minimum": 1}},
            "required": ["day", "seats"],
            "additionalProperties": False,
        },
    },
}
CHOICE = {
    "id": "en-choice-01", "language": "en", "domain": "stem", "kind": "choice", "messages": [{"role": "user", "content": "2 + 2?"}],
    "choices": ["3", "4", "5", "6"], "correct": 1, "license": "Apache-2.0",
}  # fmt: skip
ANSWER = {
    **{k: v for k, v in CHOICE.items() if k not in ("choices", "correct")},
    "id": "en-answer-01",
    "kind": "answer",
    "answer": "4",
    "extract": "number",
}
CALL = {
    **{k: v for k, v in CHOICE.items() if k not in ("choices", "correct")},
    "id": "en-call-01", "kind": "call", "tools": [TOOL], "calls": [{"name": "book", "arguments": {"day": "mon", "seats": 2}}],
}  # fmt: skip


@pytest.mark.parametrize(
    "said, accepted, right",
    [
        ("Answer: 42", ["42"], True),
        ("2 + 2 = 4, so\n**Answer: 4.**", ["4"], True),
        ("That makes 1,234.5 metres.", ["1234.5"], True),
        ("Das sind 1.234,5 Meter.", ["1234.5"], True),
        ("soit 12,5", ["12.5"], True),
        ("1 000 000", ["1000000"], True),
        ("1.234", ["1234"], True),
        ("1.234", ["1.234"], True),
        ("12.34", ["1234"], False),
        ("الجواب: ١٢٣", ["123"], True),
        ("उत्तर: १२", ["12"], True),
        ("答え：４２", ["42"], True),
        ("−3", ["-3"], True),
        ("-3", ["3"], False),
        ("3/4", ["0.75"], True),
        ("no number at all", ["1"], False),
        ("41\nAnswer: 42", ["41"], False),
        ("<|channel>thought\n42?<channel|>Answer: 41<turn|>", ["42"], False),
        ("<think>42</think>7", ["7"], True),
        ("", ["1"], False),
    ],
)
def test_numbers_in_any_writing(said, accepted, right):
    assert same_number(said, accepted) is right


@pytest.mark.parametrize(
    "said, accepted, right",
    [
        ("Answer: **Copper**.", ["copper"], True),
        ("Well.\nMercury", ["Venus", "mercury"], True),
        ("réponse : l'hydrogène", ["L’hydrogène"], True),
        ("答案：氧气。", ["氧气"], True),
        ("उत्तर: मंगल।", ["मंगल"], True),
        ("Straße", ["STRASSE"], True),
        ("copper wire", ["copper"], False),
        ("...", ["copper"], False),
        ("", [""], False),
    ],
)
def test_words_without_case_and_punctuation(said, accepted, right):
    assert same_text(said, accepted) is right


@pytest.mark.parametrize(
    "said",
    [
        '<|tool_call>call:book{"day": "mon", "seats": 2}<tool_call|>',
        '<|tool_call>call:book{day:<|"|>mon<|"|>,seats:2}<tool_call|>',
        '<tool_call>\n{"name": "book", "arguments": {"day": "mon", "seats": 2}}\n</tool_call>',
        '{"name": "book", "parameters": {"day": "mon", "seats": 2}}',
        '[TOOL_CALLS][{"name": "book", "arguments": {"day": "mon", "seats": 2}}]',
        '[TOOL_CALLS]book{"day": "mon", "seats": 2}',
        '{"type": "function", "function": {"name": "book", "arguments": "{\\"day\\": \\"mon\\", \\"seats\\": 2.0}"}}',
    ],
)
def test_calls_in_every_templates_form(said):
    assert find_calls(said)[0]["name"] == "book"
    assert valid_calls(said, [TOOL])
    assert same_calls(said, CALL["calls"], {}, [TOOL])


@pytest.mark.parametrize(
    "said, valid",
    [
        ("I would book it.", False),
        ('{"name": "book", "arguments": {"day": "sun", "seats": 2}}', False),
        ('{"name": "book", "arguments": {"day": "mon", "seats": "2"}}', False),
        ('{"name": "cancel", "arguments": {}}', False),
        ('{"name": "book", "arguments": {"day": "mon", "seats": 3}}', True),
        ('{"name": "book", "arguments": {"day": "mon", "seats": 2}} {"name": "book", "arguments": {"day": "mon", "seats": 2}}', True),
        ('{"name": "book", "arguments": {"day": "mon"', False),
        ("{" * 3000, False),
    ],
)
def test_wrong_calls_are_wrong_and_only_some_invalid(said, valid):
    assert valid_calls(said, [TOOL]) is valid
    assert same_calls(said, CALL["calls"], {}, [TOOL]) is False


def test_calls_in_any_order_with_alternatives():
    wanted = [{"name": "book", "arguments": {"day": "mon", "seats": 2}}, {"name": "book", "arguments": {"day": "tue", "seats": 1}}]
    said = json.dumps(
        [{"name": "book", "arguments": {"day": "tue", "seats": 1}}, {"name": "book", "arguments": {"day": "tue", "seats": 2}}]
    )
    assert same_calls(said, wanted, {"day": ["tue"]}, [TOOL])
    assert not same_calls(said, wanted, {}, [TOOL])


@pytest.mark.parametrize("row", [CHOICE, ANSWER, CALL])
def test_items_of_each_kind_are_read(row):
    item = parse(row, "x:1")
    assert (item.id, item.kind, item.labels["language"]) == (row["id"], row["kind"], "en")


@pytest.mark.parametrize(
    "row, message",
    [
        ({**CHOICE, "kind": "essay"}, "kind 'essay'"),
        ({**CHOICE, "correct": 4}, "no choice's index"),
        ({**CHOICE, "correct": True}, "no choice's index"),
        ({**CHOICE, "choices": ["4", "4"]}, "stands twice"),
        ({**CHOICE, "hint": "x"}, "unknown key hint"),
        ({k: v for k, v in CHOICE.items() if k != "correct"}, "lacks correct"),
        ({**CHOICE, "messages": [{"role": "assistant", "content": "x"}]}, "last message"),
        ({**CHOICE, "id": "a b"}, "no plain name"),
        ({**ANSWER, "extract": "regex"}, "number or text"),
        ({**ANSWER, "answer": "four"}, "cannot be extracted"),
        ({**CALL, "calls": [{"name": "fly", "arguments": {}}]}, "not there"),
        ({**CALL, "calls": [{"name": "book"}]}, "name and arguments"),
    ],
)
def test_bad_items_are_one_line(row, message):
    with pytest.raises(EvaluationError, match=message):
        parse(row, "x.jsonl:3")


def test_items_are_taken_evenly_and_once(tmp_path):
    rows = [{**CHOICE, "id": f"{language}-{n}", "language": language} for language in ("en", "fr") for n in range(5)]
    path = tmp_path / "i.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*rows, ANSWER]))
    assert Counter(item.labels["language"] for item in read_items(path, {"choice": 2, "answer": 0, "call": None})) == {"en": 2, "fr": 2}
    path.write_text("\n".join(json.dumps(row) for row in [CHOICE, CHOICE]))
    with pytest.raises(EvaluationError, match="stands twice"):
        read_items(path, {})
    path.write_text(json.dumps(CHOICE))
    with pytest.raises(EvaluationError, match="no items"):
        read_items(path, {"choice": 0})


# --- Our own set -------------------------------------------------------------------------------------------------------------------

LANGUAGES = ["ar", "en", "es", "fr", "hi", "ja", "ko", "nl", "ru", "zh"]
FILES = [items_folder() / f"{language}.jsonl" for language in LANGUAGES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_our_items_are_many_and_can_be_scored(path: Path):
    """At least 40 of each language; every answer is found in itself, every expected call is taken by its schema."""
    items = read_items(path, {})
    assert len(items) >= 40
    assert {item.labels["language"] for item in items} == {path.stem}
    assert set(Counter(item.kind for item in items)) == {"choice", "answer", "call"}
    places = Counter(item.correct for item in items if item.kind == "choice")
    assert len(places) == 4
    assert max(places.values()) <= 2 * min(places.values()) + 2, "the right answer's place must give nothing away"
    for item in items:
        if item.kind == "call":
            said = json.dumps(list(item.calls), ensure_ascii=False)
            for tool in item.tools:
                jsonschema.Draft202012Validator.check_schema(tool["function"].get("parameters") or {})
            assert item.judge(said), item.id
        elif item.kind == "answer":
            assert item.judge(f"…\n{item.answer}"), item.id


def test_our_items_are_not_what_we_calibrate_on():
    """No question stands in a calibration or held-out sample: not even twelve words (or forty letters) in a row."""
    seen: set[str] = set()
    for path in [*shipped("calibration").glob("samples/*.jsonl"), *shipped("eval").glob("heldout/*.jsonl")]:
        for line in path.read_text(encoding="utf-8").splitlines():
            for message in json.loads(line)["messages"]:
                seen |= _shingles(str(message.get("content") or ""))
    for path in FILES:
        for item in read_items(path, {}):
            for message in item.messages:
                if message["role"] == "user":
                    assert not _shingles(str(message.get("content") or "")) & seen, item.id


def _shingles(text: str, letters: int = 40) -> set[str]:
    plain = "".join(text.split()).casefold()
    return {plain[at : at + letters] for at in range(len(plain) - letters + 1)}
