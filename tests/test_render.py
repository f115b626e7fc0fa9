"""A sample as the model meets it: its own template, a stated fallback where that loses something, BOS once, whose turn each token is of."""

from typing import Any

import pytest
import tiny

from quantkit.calibrate.render import AS_SERVED, PLAIN, SPEAKERS, TOOLS_AS_TEXT, TWO_ROLES, load_tokenizer, render, special_tokens
from quantkit.calibrate.samples import Sample, parse
from quantkit.errors import CalibrationError

BOS = tiny.IDS["<bos>"]
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds numbers.", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TALK = (
    {"role": "system", "content": "You count apples."},
    {"role": "user", "content": "one and two?"},
    {"role": "assistant", "content": "I call.", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "tool_call_id": "c1", "content": "it is 3"},
    {"role": "assistant", "content": "three apples"},
)
AGENT = Sample("agent", "en", "agentic", TALK, (TOOL,))
CHAT = Sample("chat", "en", "stem", TALK[:2] + TALK[4:])

LOOP = "{%- for message in messages -%}"
TAKES_ALL = tiny.CHAT.replace(LOOP, "{%- for tool in tools or [] -%}{{- '<tool>' + (tool | tojson) -}}{%- endfor -%}" + LOOP, 1)
TURN = "{{- '<|turn>' + message['role'] + '\n' + message['content'] + '<turn|>\n' -}}"
SILENT = "{{- bos_token -}}" + LOOP + TURN + "{%- endfor -%}"  # knows neither tools nor calls, and says nothing
ALTERNATING = (  # user and assistant in turn, nothing else
    "{{- bos_token -}}" + LOOP + "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('roles must alternate') -}}{%- endif -%}" + TURN + "{%- endfor -%}"
)
SYSTEM_AND_TWO = (  # a system text in front, then user and assistant in turn
    "{{- bos_token -}}{%- set first = 1 if messages[0]['role'] == 'system' else 0 -%}" + LOOP
    + "{%- if loop.index0 >= first and (message['role'] == 'user') != ((loop.index0 - first) % 2 == 0) -%}"
    "{{- raise_exception('roles must alternate') -}}{%- endif -%}" + TURN + "{%- endfor -%}"
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folders = {bos: tmp_path_factory.mktemp("tokenizer") for bos in (True, False)}
    for bos, folder in folders.items():
        tiny.save_tokenizer(folder, bos=bos)

    def get(template: str | None, bos: bool = True) -> Any:
        made = load_tokenizer(folders[bos])
        made.chat_template = template
        return made

    return get


# --- Fallbacks --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sample, template, how",
    [
        (AGENT, TAKES_ALL, AS_SERVED),
        (CHAT, TAKES_ALL, AS_SERVED),
        (AGENT, SILENT, TOOLS_AS_TEXT),
        (CHAT, SILENT, AS_SERVED),
        (AGENT, SYSTEM_AND_TWO, TOOLS_AS_TEXT),
        (CHAT, SYSTEM_AND_TWO, AS_SERVED),
        (AGENT, ALTERNATING, TWO_ROLES),
        (CHAT, ALTERNATING, TWO_ROLES),
        (AGENT, None, PLAIN),
    ],
)
def test_a_fallback_is_named_and_loses_nothing(sample, template, how, tokenizer):
    chat = tokenizer(template)
    made = render(sample, chat)
    assert (made.how, made.dropped) == (how, ())
    text = chat.decode(made.ids)
    parts = [str(message["content"]) for message in sample.messages]
    for part in (*parts, *(("Adds numbers.", '"a": 1') if sample.tools and template else ())):
        assert part in text, f"{part!r} is lost"


def test_what_a_template_cannot_hold_in_any_form_is_said(tokenizer):
    half = LOOP + "{{- message['role'] + message['content'][:5] -}}{%- endfor -%}"
    made = render(CHAT, tokenizer(half))
    assert made.how == AS_SERVED
    assert "part of the text" in made.dropped
    thinks = Sample("t", "en", "stem", (TALK[1], {"role": "assistant", "content": "three", "reasoning_content": "a sum is asked"}))
    assert render(thinks, tokenizer(SILENT)).dropped == ("reasoning",)
    shows = LOOP + "{{- message['role'] + (message['reasoning_content'] or '') + message['content'] -}}{%- endfor -%}"
    assert render(thinks, tokenizer(shows)).dropped == ()


def test_a_template_that_takes_nothing_is_refused_by_name(tokenizer):
    with pytest.raises(CalibrationError, match=r"^agent: .*refuses this sample \(never\)"):
        render(AGENT, tokenizer("{{- raise_exception('never') -}}"))


def test_results_inside_json_are_not_lost(tokenizer):
    quoting = LOOP + "{{- message['role'] + (message['content'] | tojson) -}}{%- endfor -%}"
    talk = ({"role": "user", "content": 'a "b"\n\tça'}, {"role": "assistant", "content": "c"})
    assert render(Sample("q", "en", "stem", talk), tokenizer(quoting)).how == AS_SERVED


def test_pictures_are_left_out_and_said(tokenizer):
    parts = [{"type": "image", "url": "x.png"}, {"type": "text", "text": "what is it?"}]
    made = render(Sample("i", "en", "stem", ({"role": "user", "content": parts}, TALK[4])), tokenizer(TAKES_ALL))
    assert made.dropped == ("images and sound",)
    assert not {tiny.IDS["<|image|>"]} & set(made.ids)
    assert "what is it?" in tokenizer(TAKES_ALL).decode(made.ids)


def test_the_thinking_switch_is_the_templates_own(tokenizer):
    switch = "{{- '<|turn>' if enable_thinking is not defined else ('<turn|>' if enable_thinking else '<|image|>') -}}" + SILENT
    chat = tokenizer(switch)
    first = [render(CHAT, chat, thinking).ids[1] for thinking in (None, True, False)]
    assert first == [tiny.IDS["<|turn>"], tiny.IDS["<turn|>"], tiny.IDS["<|image|>"]]


# --- BOS --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template, bos, times",
    [
        (SILENT, True, 1),
        (SILENT.replace("{{- bos_token -}}", ""), True, 1),  # a template that forgets it, a tokenizer that sets it
        ("{{- bos_token -}}" + SILENT, True, 1),
        (None, True, 1),
        (SILENT.replace("{{- bos_token -}}", ""), False, 0),
        (None, False, 0),
    ],
)
def test_bos_stands_once_or_not_at_all(template, bos, times, tokenizer):
    for sample in (CHAT, AGENT, Sample("t", "en", "text", (), text="one and two")):
        made = render(sample, tokenizer(template, bos))
        if sample.text and times:
            assert made.ids[0] == BOS
        assert made.ids.count(BOS) == times
        assert made.ids[:times] == [BOS] * times
        assert len(made.speakers) == len(made.ids)


def test_ready_made_text_may_bring_its_own(tokenizer):
    made = render(Sample("t", "en", "text", (), text="<bos>one and two"), tokenizer(None))
    assert made.ids.count(BOS) == 1
    assert len(made.speakers) == len(made.ids)


# --- Whose turn -------------------------------------------------------------------------------------------------------------------


def said_by(made: Any, tokenizer: Any) -> dict[str, str]:
    roles = {SPEAKERS[index] for index in made.speakers}
    return {
        role: tokenizer.decode([token for token, index in zip(made.ids, made.speakers, strict=True) if SPEAKERS[index] == role])
        for role in roles
    }


def test_every_token_has_its_speaker(tokenizer):
    chat = tokenizer(TAKES_ALL)
    said = said_by(render(AGENT, chat), chat)
    assert set(said) == {"system", "user", "assistant", "tool"}
    assert said["system"].startswith("<bos><tool>")
    assert said["system"].endswith("You count apples.<turn|>\n")
    assert said["user"] == "<|turn>user\none and two?<turn|>\n"
    assert said["tool"] == "<|turn>tool\nit is 3<turn|>\n"
    assert said["assistant"].startswith("<|turn>model\nI call.\ncall ")
    assert said["assistant"].endswith("<|turn>model\nthree apples<turn|>\n")


def test_text_outside_ascii_keeps_its_speakers(tokenizer):
    talk = ({"role": "user", "content": "река и 山, कितने 사과?"}, {"role": "assistant", "content": "三个苹果 🍎"})
    chat = tokenizer(TAKES_ALL)
    said = said_by(render(Sample("u", "zh", "stem", talk), chat), chat)
    assert said["user"] == "<bos><|turn>user\nрека и 山, कितने 사과?<turn|>\n"
    assert said["assistant"] == "<|turn>model\n三个苹果 🍎<turn|>\n"


def test_turns_that_cannot_be_told_apart_are_nobodys(tokenizer):
    """A template that marks its last message: no beginning of the text is a shorter conversation's."""
    marks = LOOP + "{{- message['role'] + (' last ' if loop.last else ' ') + message['content'] -}}{%- endfor -%}"
    chat = tokenizer(marks)
    assert set(said_by(render(CHAT, chat), chat)) == {"several"}


# --- Special tokens ---------------------------------------------------------------------------------------------------------------


def test_special_tokens_are_counted_and_missing_ones_named(tokenizer):
    chat = tokenizer(TAKES_ALL + "{%- if False -%}<|audio>{%- endif -%}")
    rows = [render(AGENT, chat).ids, render(CHAT, chat).ids]
    counts = special_tokens(rows, chat)
    assert counts["<|turn>"] == len(AGENT.messages) + len(CHAT.messages)
    assert counts["<|audio>"] == 0, "the template names it, the set never has it"
    assert counts["<bos>"] == 2
    assert "<start_of_image>" not in counts


# --- Rows of other shapes ---------------------------------------------------------------------------------------------------------


def test_calls_as_apis_send_them(tokenizer):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    row = {"messages": [TALK[1], {"role": "assistant", "content": None, "tool_calls": [call]}, TALK[4]], "tools": '[{"name": "add"}]'}
    sample = parse(row, "x:1")
    assert sample.messages[1] == {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "1"}]}
    assert sample.tools == ({"type": "function", "function": {"name": "add"}},)
    assert render(sample, tokenizer(TAKES_ALL)).how == AS_SERVED
