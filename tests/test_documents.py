"""Documents as windows: every token once, BOS once, bytes of what was scored, templates that drop nothing."""

import json

import pytest
import tiny
import transformers

from quantkit.errors import EvaluationError
from quantkit.evaluate import documents as docs
from quantkit.recipe import heldout_files, reference_model


@pytest.fixture(scope="module")
def tokenizer():
    return docs.load_tokenizer(reference_model())


@pytest.fixture(scope="module")
def without_bos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    tiny.save_tokenizer(folder, bos=False)
    return docs.load_tokenizer(folder)


TEXT = "Der Fluss ist 12 km lang — 今日は雨。 नमस्ते\n" * 9


@pytest.mark.parametrize("bos", ["window", "document"])
@pytest.mark.parametrize("window", [8, 13, 50, 10_000])
def test_every_token_is_scored_once(tokenizer, bos, window):
    document = docs.Document("d", TEXT, {})
    rows = docs.make_rows([document], tokenizer, window, bos)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    scored = [token for row in rows.windows for token in row.ids[row.first :]]
    assert scored == ids
    assert rows.tokens == (len(ids),)
    assert rows.bytes == (len(TEXT.encode()),)
    assert rows.windows[0].ids[0] == tokenizer.bos_token_id
    starts = [row.ids[0] == tokenizer.bos_token_id for row in rows.windows]
    assert all(starts) if bos == "window" else starts.count(True) == 1
    assert max(len(row.ids) for row in rows.windows) <= window + 1


def test_the_last_window_reaches_back_until_it_is_full(tokenizer):
    rows = docs.make_rows([docs.Document("d", TEXT, {})], tokenizer, 50, "document")
    last = rows.windows[-1]
    assert len(last.ids) == 51
    assert last.first > 1


def test_without_bos_the_first_token_is_context(without_bos):
    assert docs.begins_with(without_bos) is None
    ids = without_bos(TEXT, add_special_tokens=False)["input_ids"]
    rows = docs.make_rows([docs.Document("d", TEXT, {})], without_bos, 50)
    assert [token for row in rows.windows for token in row.ids[row.first :]] == ids[1:]
    assert rows.bytes[0] == len(TEXT.encode()) - len(without_bos.decode(ids[:1]).encode())


def test_the_bytes_of_a_cut_document_are_those_of_its_tokens(tokenizer):
    for most in (1, 7, 20):
        rows = docs.make_rows([docs.Document("d", TEXT, {})], tokenizer, 512, most=most)
        ids = rows.windows[0].ids[1:]
        assert len(ids) == most
        shown = tokenizer.decode(list(ids))
        assert abs(rows.bytes[0] - len(shown.encode())) <= 4, "a cut inside a character counts it once"


def test_a_templates_bos_is_not_doubled(tokenizer):
    found = docs.read_documents(heldout_files(), tokenizer)
    rows = docs.make_rows(found, tokenizer, 512, most=64)
    assert all(row.ids.count(tokenizer.bos_token_id) == 1 for row in rows.windows)
    assert {document.labels["language"] for document in found} == {"ar", "en", "es", "fr", "hi", "ja", "ko", "nl", "ru", "zh"}
    assert {document.how for document in found} == {docs.TEMPLATE}


def test_tools_that_a_template_drops_are_written_out(tokenizer, monkeypatch):
    refusing = "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = "{{ bos_token }}{% for m in messages %}" + refusing + "[{{ m.role }}]{{ m.content }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"}]
    tools = [{"type": "function", "function": {"name": "look_outside", "parameters": {}}}]
    text, how = docs.render(messages, tools, tokenizer, answer=True)
    assert how == docs.IN_USER
    assert "look_outside" in text
    assert "Be brief." in text
    assert "[system]" not in text
    monkeypatch.setattr(tokenizer, "chat_template", "{{ bos_token }}nothing of it")
    with pytest.raises(EvaluationError, match="drops part"):
        docs.render(messages, tools, tokenizer, answer=True)


def test_without_a_template_texts_follow_each_other(without_bos, monkeypatch):
    monkeypatch.setattr(without_bos, "chat_template", None)
    text, how = docs.render(
        [{"role": "user", "content": "One."}, {"role": "assistant", "content": "Two."}], None, without_bos, answer=False
    )
    assert (text, how) == ("One.\n\nTwo.", docs.PLAIN)


def test_two_documents_of_one_name_are_refused(tokenizer, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"id": "a", "text": "one"}\n{"id": "a", "text": "two"}\n')
    with pytest.raises(EvaluationError, match="'a' stands twice"):
        docs.read_documents([tmp_path / "d.jsonl"], tokenizer)


def test_other_tokenizers_are_refused(tokenizer, without_bos):
    rows = docs.make_rows([docs.Document("d", TEXT, {})], tokenizer, 64)
    docs.same_tokens(rows.documents, tokenizer, transformers.AutoTokenizer.from_pretrained(reference_model()))
    with pytest.raises(EvaluationError, match="different tokenizers"):
        docs.same_tokens(rows.documents, tokenizer, without_bos)


@pytest.mark.parametrize(
    "line, message",
    [("{", "no JSON"), ("[1]", "an object"), (json.dumps({"id": "x"}), "neither messages nor text"), ("", "no text to score")],
)
def test_bad_documents_are_one_line(tmp_path, tokenizer, line, message):
    (tmp_path / "d.jsonl").write_text(line + "\n")
    with pytest.raises(EvaluationError, match=message):
        docs.read_documents(docs.find_files(tmp_path), tokenizer)


def test_text_files_are_documents(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("plain text")
    (tmp_path / "b.jsonl").write_text(json.dumps({"id": "b", "text": "more", "language": "en"}) + "\n")
    found = docs.read_documents(docs.find_files(tmp_path), tokenizer)
    assert [(d.id, d.text, dict(d.labels)) for d in found] == [("a", "plain text", {}), ("b", "more", {"language": "en"})]
    with pytest.raises(EvaluationError, match=r"no \.jsonl or \.txt"):
        docs.find_files(tmp_path / "nothing")
