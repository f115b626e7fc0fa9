"""What is fed: chosen evenly, rendered as it will be served, padded on the right; and the set that we ship is what it says."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import transformers

from quantkit.calibrate.batches import make_batches
from quantkit.calibrate.draw import make_row
from quantkit.calibrate.render import load_tokenizer
from quantkit.calibrate.samples import Sample, choose
from quantkit.calibrate.sources import read_samples
from quantkit.errors import CalibrationError
from quantkit.recipe import heldout_files, load_mix

LANGUAGES = {"ar", "en", "es", "fr", "hi", "ja", "ko", "nl", "ru", "zh"}
DOMAINS = {"stem", "agentic"}
BOS = tiny.IDS["<bos>"]


def tokenize(sample: Sample, tokenizer: Any, length: int) -> list[int]:
    return make_row(sample, tokenizer, length).ids


def batches_of(samples: list[Sample], tokenizer: Any, length: int, batch_tokens: int) -> list[Any]:
    return make_batches([make_row(one, tokenizer, length) for one in samples], batch_tokens)


TOOL = {"type": "function", "function": {"name": "add", "description": "Adds numbers.", "parameters": {"type": "object"}}}
CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
AGENT = Sample(
    "agent", "en", "agentic",
    messages=(
        {"role": "system", "content": "You count apples."},
        {"role": "user", "content": "one and two?"},
        {"role": "assistant", "content": "I call.", "reasoning_content": "a sum is asked", "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "tool_call_id": "c1", "content": "it is 3"},
        {"role": "assistant", "content": "three apples"},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": "welcome"},
    ),
    tools=(TOOL,),
)  # fmt: skip
PARTS = (
    "You count apples.", "one and two?", "I call.", "a sum is asked", "it is 3", "three apples", "thanks", "welcome", '"name": "add"',
    "Adds numbers.", '"a": 1',
)  # fmt: skip
LOOP = "{%- for message in messages -%}"
TAKES_ALL = tiny.CHAT.replace(LOOP, "{%- for tool in tools or [] -%}{{- '<tool>' + (tool | tojson) -}}{%- endfor -%}" + LOOP, 1)
TWO_ROLES = (  # as Gemma 3's: user and model in turn, nothing else
    "{{- bos_token -}}{%- for message in messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('roles must alternate') -}}{%- endif -%}"
    "{%- if tools -%}{{- raise_exception('no tools here') -}}{%- endif -%}"
    "{{- '<|turn>' + message['role'] + '\n' + message['content'] + '<turn|>\n' -}}{%- endfor -%}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A function from a chat template (None: without one) to a tokenizer that opens every text with <bos>."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)

    def get(template: str | None, bos: bool = True) -> Any:
        if not bos:
            tiny.save_tokenizer(folder.parent / "without", bos=False)
        made = load_tokenizer(folder if bos else folder.parent / "without")
        made.chat_template = template
        return made

    return get


def sample(number: int = 0, language: str = "en", domain: str = "stem", text: str = "") -> Sample:
    messages = ({"role": "user", "content": "question " * (number + 1)}, {"role": "assistant", "content": "answer"})
    return Sample(f"{language}-{domain}-{number}", language, domain, () if text else messages, text=text)


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    return path


# --- Reading ----------------------------------------------------------------------------------------------------------------------


def test_lines_become_samples(tmp_path):
    talk = {
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [TOOL],
        "id": "x",
        "language": "nl",
        "domain": "stem",
        "license": "CC0",
    }
    path = write(tmp_path / "a.jsonl", talk, "", "  ", {"text": "plain"}, {"messages": [], "text": "also plain", "tools": None})
    first, second, third = read_samples([path])
    assert first == Sample("x", "nl", "stem", ({"role": "user", "content": "hi"},), (TOOL,))
    assert first.labels == {"id": "x", "language": "nl", "domain": "stem"}
    assert second == Sample("a.jsonl:4", "unknown", "unknown", (), text="plain")
    assert third.text == "also plain"


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_line_feed_ends_a_line(odd, tmp_path):
    """JSON may hold any of these unescaped, but for control characters; str.splitlines would cut a sample in two."""
    text = json.dumps({"text": f"a{odd}b"}, ensure_ascii=False)
    path = write(tmp_path / "a.jsonl", text, {"text": "c"})
    assert [one.text for one in read_samples([path])] == [f"a{odd}b", "c"]


def test_carriage_returns_are_no_part_of_a_sample(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    assert [one.text for one in read_samples([tmp_path / "a.jsonl"])] == ["a", "b"]


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "not a JSON line"),
        ("[" * 100_000, "not a JSON line"),
        ("[1]", "messages or text"),
        ("{}", "messages (a list) or text"),
        ('{"text": "  "}', "messages (a list) or text"),
        ('{"text": 5}', "messages (a list) or text"),
        ('{"messages": "hi"}', "messages (a list) or text"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": "add"}', "tools is a list of JSON schemas"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": [3]}', "tools"),
        ('{"messages": [{"role": "user", "content": 5}]}', "content"),
        ('{"messages": [{"role": "assistant", "content": "a", "tool_calls": 5}]}', "tool_calls"),
        ('{"messages": [{"role": "assistant", "content": "a", "tool_calls": ["add"]}]}', "tool_calls"),
        ('{"messages": [{"role": "user", "content": "half a pair: \\ud800"}]}', "surrogate"),
        ('{"text": "half a pair: \\ud800"}', "surrogate"),
        ('{"messages": ["hi"]}', "a role of system, user, assistant, tool"),
        ('{"messages": [{"content": "a"}]}', "a role of system, user, assistant, tool"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "a role of system, user, assistant, tool"),
    ],
)
def test_a_malformed_line_is_named(line, words, tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "fine"}, line)
    with pytest.raises(CalibrationError) as caught:
        read_samples([path])
    assert str(caught.value).startswith(f"{path}:2: ")
    assert words in str(caught.value)


def test_nothing_to_read_is_refused(tmp_path):
    empty = write(tmp_path / "a.jsonl", "", "  ")
    for files in ([], [empty]):
        with pytest.raises(CalibrationError, match="calibration set is empty"):
            read_samples(files)
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_samples([tmp_path / "none.jsonl"])
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_samples([tmp_path / "b.jsonl"])


# --- Choosing ---------------------------------------------------------------------------------------------------------------------


def test_a_choice_is_even_over_languages_and_domains():
    samples = [sample(n, language, domain) for language in ("en", "zh", "nl") for domain in DOMAINS for n in range(10)]
    samples += [sample(n, "fr", "stem") for n in range(2)]
    counts = Counter((one.language, one.domain) for one in choose(samples, 21, seed=0))
    assert counts.pop(("fr", "stem")) == 2, "all that there are"
    assert sorted(counts.values()) == [3, 3, 3, 3, 3, 4]
    assert len({one.id for one in choose(samples, 21, seed=0)}) == 21
    seven = choose(samples, 7, seed=0)
    assert len({(one.language, one.domain) for one in seven}) == 7, "everyone once before anyone twice"


def test_a_choice_is_seeded_and_a_larger_one_begins_with_it():
    samples = [sample(n, language) for language in ("en", "zh") for n in range(20)]
    ids = lambda *how: [one.id for one in choose(samples, *how)]  # noqa: E731
    assert ids(10, 0) == ids(10, 0)
    assert ids(10, 0) != ids(10, 1)
    assert ids(30, 0)[:10] == ids(10, 0)
    assert sorted(ids(None, 3)) == sorted(one.id for one in samples)
    assert sorted(ids(1000, 3)) == sorted(one.id for one in samples)
    assert [one.id for one in samples] == [f"{language}-stem-{n}" for language in ("en", "zh") for n in range(20)], (
        "the list is the caller's"
    )


# --- Tokens -----------------------------------------------------------------------------------------------------------------------


def test_a_template_that_takes_everything_gets_everything(tokenizer):
    chat = tokenizer(TAKES_ALL)
    ids = tokenize(AGENT, chat, 4096)
    expected = chat.apply_chat_template(list(AGENT.messages), tools=[TOOL], tokenize=False)
    assert chat.decode(ids) == expected
    assert expected.startswith("<bos><tool>")
    assert ids.count(BOS) == 1
    roles = [chat.decode(ids[place + 1 :]).split("\n")[0] for place, token in enumerate(ids) if token == tiny.IDS["<|turn>"]]
    assert roles == ["system", "user", "model", "tool", "model", "user", "model"]


def test_a_template_that_takes_two_roles_gets_all_the_text(tokenizer):
    chat = tokenizer(TWO_ROLES)
    text = chat.decode(tokenize(AGENT, chat, 4096))
    assert [turn.split("\n")[0] for turn in text.split("<|turn>")[1:]] == ["user", "assistant"] * 3
    for part in PARTS:
        assert part in text, f"{part!r} is lost"
    assert text.count("<bos>") == 1
    places = [text.index(part) for part in ("Adds numbers.", "You count", "one and two?", "I call.", "it is 3", "three apples", "thanks")]
    assert places == sorted(places)


def test_a_conversation_that_the_assistant_opens(tokenizer):
    opened = Sample("a", "en", "stem", ({"role": "assistant", "content": "hello"}, {"role": "user", "content": "hi"}), tools=(TOOL,))
    text = tokenizer(TWO_ROLES).decode(tokenize(opened, tokenizer(TWO_ROLES), 4096))
    assert [turn.split("\n")[0] for turn in text.split("<|turn>")[1:]] == ["user", "assistant", "user"]
    assert "Adds numbers." in text


def test_a_model_without_a_template_gets_plain_text(tokenizer):
    plain = tokenizer(None)
    ids = tokenize(AGENT, plain, 4096)
    assert ids.count(BOS) == 1
    assert ids[0] == BOS
    text = plain.decode(ids, skip_special_tokens=True)
    for part in ("You count apples.", "one and two?", "I call.", "it is 3", "three apples", "welcome", '"a": 1'):
        assert part in text


@pytest.mark.parametrize("template", [TAKES_ALL, None])
def test_plain_text_is_never_a_chat(template, tokenizer):
    chat = tokenizer(template)
    ids = tokenize(sample(text="a river, 山 и море"), chat, 4096)
    assert ids == [BOS, *chat("a river, 山 и море", add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("template", [TAKES_ALL.replace("{{- bos_token if bos_token else '' -}}", ""), None])
def test_bos_is_as_the_model_sets_it(template, tokenizer):
    without = tokenizer(template, bos=False)
    for one in (AGENT, sample(text="plain")):
        assert BOS not in tokenize(one, without, 4096)


@pytest.mark.parametrize("one", [AGENT, sample(text="word " * 500)], ids=["chat", "text"])
def test_a_row_is_cut_at_its_end(one, tokenizer):
    chat = tokenizer(TAKES_ALL)
    whole = tokenize(one, chat, 4096)
    assert len(whole) > 64
    assert tokenize(one, chat, 64) == whole[:64]


def test_a_sample_that_no_template_takes_is_named(tokenizer):
    refuses = tokenizer("{{- raise_exception('never') -}}")
    with pytest.raises(CalibrationError, match=r"^agent: the model's chat template refuses this sample \(never\)"):
        tokenize(AGENT, refuses, 64)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(CalibrationError, match="tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CalibrationError, match="tokenizer"):
        load_tokenizer(tmp_path)


# --- Batches ----------------------------------------------------------------------------------------------------------------------


def test_batches_hold_every_row_once_and_stay_in_the_budget(tokenizer):
    chat = tokenizer(TAKES_ALL)
    samples = [sample(n, text="word " * (2 + 7 * n % 11)) for n in range(40)] + [sample(99, text="word " * 300)]
    batches = batches_of(samples, chat, length=256, batch_tokens=200)
    seen: dict[str, list[int]] = {}
    for batch in batches:
        rows, width = batch.ids.shape
        assert rows * width <= 200 or rows == 1
        assert batch.real.shape == batch.ids.shape
        assert len(batch.labels) == rows
        lengths = batch.real.sum(1).tolist()
        assert max(lengths) == width, "no column is padding alone"
        for row, labels in enumerate(batch.labels):
            assert batch.real[row].tolist() == [True] * lengths[row] + [False] * (width - lengths[row]), "padding is on the right"
            assert not batch.ids[row, lengths[row] :].any()
            assert labels["id"] not in seen
            seen[labels["id"]] = batch.ids[row, : lengths[row]].tolist()
    assert seen == {one.id: tokenize(one, chat, 256) for one in samples}
    assert max(map(len, seen.values())) == 256, "one row was cut"
    assert len(batches) < len(samples) / 2, "rows of like length lie together"
    padding = sum(int((~batch.real).sum()) for batch in batches)
    assert padding < 0.2 * sum(map(len, seen.values()))


def test_a_row_longer_than_the_budget_stands_alone(tokenizer):
    batches = batches_of([sample(n, text="word " * 100) for n in range(3)], tokenizer(None), length=1000, batch_tokens=16)
    assert [len(batch.labels) for batch in batches] == [1, 1, 1]


def test_a_set_without_two_tokens_in_a_row_is_refused(tokenizer):
    plain = tokenizer(None, bos=False)
    for samples in ([], [sample(text="a")]):
        with pytest.raises(CalibrationError, match="no sample is longer than one token"):
            batches_of(samples, plain, 64, 64)
    assert len(batches_of([sample(text="a"), sample(1, text="a b c")], plain, 64, 64)) == 1, "a row of one token teaches nothing"


# --- The set that we ship ---------------------------------------------------------------------------------------------------------


def lines(files: list[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


@pytest.fixture(scope="module")
def calibration() -> list[dict[str, Any]]:
    return lines(load_mix("stem-agentic").files())


@pytest.fixture(scope="module")
def heldout() -> list[dict[str, Any]]:
    return lines(heldout_files())


def test_the_shipped_set_is_even(calibration, heldout):
    counts = Counter((one["language"], one["domain"]) for one in calibration)
    assert set(counts) == {(language, domain) for language in LANGUAGES for domain in DOMAINS}
    for language in LANGUAGES:
        assert sum(counts[language, domain] for domain in DOMAINS) >= 4
    assert {(one["language"], one["domain"]) for one in heldout} == set(counts)
    assert max(Counter(one["id"] for one in [*calibration, *heldout]).values()) == 1, "an id stands twice"
    for files in (load_mix("stem-agentic").files(), heldout_files()):
        for file in files:
            assert {one["language"] for one in lines([file])} == {file.stem}


def test_the_shipped_set_keeps_the_schema(calibration, heldout):
    for one in [*calibration, *heldout]:
        where = one["id"]
        assert set(one) == {"id", "language", "domain", "license", "messages", "tools"}, where
        assert one["id"].startswith(f"{one['language']}-"), where
        roles = [message["role"] for message in one["messages"]]
        assert roles[-1] == "assistant", where
        assert "system" not in roles[1:], where
        assert roles[: roles.index("user")] in ([], ["system"]), where
        assert (one["domain"] == "agentic") == ("tool" in roles) == bool(one["tools"]), where
        names = {tool["function"]["name"] for tool in one["tools"]}
        assert len(names) == len(one["tools"]), where
        for tool in one["tools"]:
            assert tool["type"] == "function", where
            assert tool["function"]["description"], where
            assert tool["function"]["parameters"]["type"] == "object", where
        waiting: list[tuple[str, str]] = []
        for message in one["messages"]:
            assert isinstance(message["content"], str), where
            if message["role"] == "tool":
                assert (message["tool_call_id"], message["name"]) == waiting.pop(0), where
                continue
            assert not waiting, f"{where}: a call without an answer"
            for call in message.get("tool_calls", []):
                assert message["role"] == "assistant", where
                assert call["function"]["name"] in names, where
                assert isinstance(call["function"]["arguments"], dict), where
                known = next(tool["function"] for tool in one["tools"] if tool["function"]["name"] == call["function"]["name"])
                assert set(call["function"]["arguments"]) <= set(known["parameters"].get("properties", {})), where
                assert set(known["parameters"].get("required", [])) <= set(call["function"]["arguments"]), where
                waiting.append((call["id"], call["function"]["name"]))
            assert message["content"] or message.get("tool_calls"), where
        assert not waiting, where


SCRIPTS = {
    "ar": "\u0600-\u06ff",
    "hi": "\u0900-\u097f",
    "ja": "\u3040-\u30ff\u4e00-\u9fff",
    "ko": "\uac00-\ud7af",
    "ru": "\u0400-\u04ff",
    "zh": "\u4e00-\u9fff",
}


def test_samples_are_written_in_their_language(calibration, heldout):
    for one in [*calibration, *heldout]:
        prose = " ".join(message["content"] for message in one["messages"] if message["role"] == "user")
        prose = re.sub(r"```.*?```", " ", prose, flags=re.DOTALL)  # code is English
        letters = re.findall(r"[^\W\d_]", prose)
        own = re.findall(f"[{SCRIPTS.get(one['language'], 'a-zA-ZÀ-ÿœŒ')}]", prose)
        assert len(own) > 0.3 * len(letters), f"{one['id']}"


def passages(one: dict[str, Any], length: int = 60) -> set[str]:
    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, (dict, list)):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from strings(inner)

    found: set[str] = set()
    for text in strings([one["messages"], one["tools"]]):
        text = re.sub(r"\s+", " ", text).casefold()
        found |= {text[start : start + length] for start in range(len(text) - length + 1)}
    return found


def test_nothing_that_is_scored_was_calibrated_on(calibration, heldout):
    seen = {passage: one["id"] for one in calibration for passage in passages(one)}
    assert len(seen) > 50_000
    for one in heldout:
        shared = [passage for passage in passages(one) if passage in seen]
        assert not shared, f"{one['id']} and {seen[shared[0]]} share {shared[0]!r}"


@pytest.mark.parametrize("template", [TAKES_ALL, TWO_ROLES, None], ids=["takes all", "two roles", "none"])
def test_every_shipped_sample_can_be_fed_to_any_model(template, tokenizer):
    transformers.logging.set_verbosity_error()  # rows longer than the model are cut, not warned of
    fed = tokenizer(template)
    for one in read_samples([*load_mix("stem-agentic").files(), *heldout_files()]):
        ids = tokenize(one, fed, 128)
        assert ids[0] == BOS
        assert ids.count(BOS) == 1
        assert len(ids) == 128
