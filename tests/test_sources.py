"""Samples from JSONL, Parquet, text, folders and the Hub; whatever cannot be read or reached is one line."""

import builtins
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from quantkit.calibrate.samples import Sample
from quantkit.calibrate.sources import PIECE, read_source
from quantkit.cli import main
from quantkit.errors import CalibrationError
from quantkit.recipe import Columns, MixSource, load_mix

TALK = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]


def read(*paths: Path, **fields: Any) -> list[Sample]:
    return [sample for path in paths for sample in read_source(MixSource(path=str(path), **fields))]


# --- Columns ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, columns",
    [
        ({"messages": TALK}, {}),
        ({"talk": TALK}, {"messages": "talk"}),
        ({"conversations": [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "two"}]}, {}),
        ({"turns": [{"from": "user", "value": "one?"}, {"from": "model", "value": "two"}]}, {"conversations": "turns"}),
        ({"prompt": "one?", "response": "two"}, {}),
        ({"question": "one?", "answer": "two"}, {"prompt": "question", "response": "answer"}),
        ({"messages": [{**turn, "name": None, "tool_calls": None} for turn in TALK], "text": None}, {}),
    ],
)
def test_columns_of_every_kind_become_messages(row, columns, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (sample,) = read(tmp_path / "a.jsonl", columns=Columns(**columns), language="en", domain="sums")
    assert sample.messages == tuple(TALK)
    assert sample.labels == {"id": "a.jsonl:1", "language": "en", "domain": "sums"}


def test_a_rows_own_labels_come_first(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "een", "lang": "nl", "topic": "stem", "key": 7}))
    (sample,) = read(tmp_path / "a.jsonl", columns=Columns(language="lang", domain="topic", id="key"), language="en")
    assert sample.labels == {"id": "7", "language": "nl", "domain": "stem"}


def test_columns_that_are_not_there_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "x"}))
    with pytest.raises(CalibrationError, match=r"a.jsonl:1: .*looked for messages \(a list\), conversations, content, or prompt"):
        read(tmp_path / "a.jsonl", columns=Columns(text="content"))


# --- Files ------------------------------------------------------------------------------------------------------------------------


def test_a_long_text_comes_in_pieces_and_whole(tmp_path):
    text = "".join(f"line {n} of a long text\n" for n in range(2000)) + "x" * 3 * PIECE + "\n\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    samples = read(tmp_path / "a.txt")
    assert "".join(sample.text for sample in samples) in (text, text.rstrip("\n"), text[:-1])
    assert all(PIECE <= len(sample.text) < 2 * PIECE for sample in samples[:-1])
    assert len({sample.id for sample in samples}) == len(samples)


def test_blank_text_is_no_sample(tmp_path):
    (tmp_path / "a.txt").write_text("\n \n" * 5000)
    assert read(tmp_path / "a.txt") == []


def test_a_folder_of_files_in_the_order_of_their_names(tmp_path):
    for name in ("b.txt", "a.jsonl", "c.md", "10.txt"):
        (tmp_path / name).write_text('{"text": "said in a"}' if name.endswith("jsonl") else f"said in {name}")
    assert [sample.text for sample in read(tmp_path)] == ["said in 10.txt", "said in a", "said in b.txt"]
    assert [path.name for path in load_mix(str(tmp_path)).files()] == ["10.txt", "a.jsonl", "b.txt"]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs the extra quantkit[datasets]")
    pytest.importorskip("pyarrow.parquet")
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "one?", "tool_calls": None},
                {"role": "assistant", "content": None, "tool_calls": [call]},
            ]
        },
        {"messages": [{"role": "user", "content": "two?", "tool_calls": None}]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = read(tmp_path / "a.parquet")
    assert first.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert second.messages == ({"role": "user", "content": "two?"},), "a table's nulls are no keys"
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(CalibrationError, match=r"b.parquet: not a Parquet file"):
        read(tmp_path / "b.parquet")


def without(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = builtins.__import__

    def import_(module: str, *rest: Any) -> Any:
        if module.partition(".")[0] == name:
            raise ImportError(module)
        return real(module, *rest)

    monkeypatch.setattr(builtins, "__import__", import_)


def test_parquet_without_its_library(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    without(monkeypatch, "pyarrow")
    with pytest.raises(CalibrationError, match=r"a.parquet: .*pip install 'quantkit\[datasets\]'"):
        read(tmp_path / "a.parquet")


# --- The Hub ----------------------------------------------------------------------------------------------------------------------


def library(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    """`datasets` as far as we use it: the tests have no network."""
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_a_data_set_is_streamed_and_read_no_further_than_needed(monkeypatch):
    asked, read_rows = [], []

    def load(name: str, subset: str | None, **options: Any) -> Iterator[dict[str, Any]]:
        asked.append((name, subset, options))
        for number in range(10**9):
            read_rows.append(number)
            yield {"messages": TALK}

    library(monkeypatch, load)
    source = MixSource(hub="owner/name", subset="part", split="test", revision="abc", language="en")
    stream = read_source(source)
    first = next(stream)
    assert first.messages == tuple(TALK)
    assert first.labels["language"] == "en"
    assert asked == [("owner/name", "part", {"split": "test", "revision": "abc", "streaming": True})]
    assert len(read_rows) < 10


def test_lines_of_a_long_text_are_joined(monkeypatch):
    library(monkeypatch, lambda *_, **__: iter([{"text": f"line {n} " * 20} for n in range(200)]))
    samples = list(read_source(MixSource(hub="a/b", join=True)))
    assert 1 < len(samples) < 20
    assert "line 0 " in samples[0].text
    assert "line 1 " in samples[0].text


@pytest.mark.parametrize("problem", [ConnectionError("no route"), FileNotFoundError("no such data set"), ValueError("bad split")])
def test_a_data_set_that_cannot_be_reached_is_one_line(problem, monkeypatch):
    def load(*_: Any, **__: Any) -> Any:
        raise problem

    library(monkeypatch, load)
    with pytest.raises(CalibrationError) as caught:
        list(read_source(MixSource(hub="owner/name")))
    assert "owner/name" in str(caught.value)
    assert str(problem) in str(caught.value)
    assert "--calibration FILE" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_hub_without_its_library(monkeypatch):
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    without(monkeypatch, "datasets")
    with pytest.raises(CalibrationError, match=r"owner/name .*pip install 'quantkit\[datasets\]'"):
        list(read_source(MixSource(hub="owner/name")))


def test_the_real_library_without_a_network(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the extra quantkit[datasets] is not installed")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(CalibrationError, match=r"wikitext.* cannot be read"):
        list(read_source(load_mix("wikitext-like").sources[0]))


# --- From the command line --------------------------------------------------------------------------------------------------------


def test_a_source_says_either_path_or_hub(tmp_path):
    path = tmp_path / "mix.yaml"
    for sources in ("[{path: a, hub: b}]", "[{weight: 2}]"):
        path.write_text(f"description: x\nsources: {sources}")
        with pytest.raises(CalibrationError, match="either a path or a hub id"):
            load_mix(str(path))


@pytest.mark.parametrize("name", ["set.jsonl", "set.txt", "folder"])
def test_any_data_can_be_named_where_a_mix_can(name, tmp_path):
    import tiny

    model = tiny.build("llama", tmp_path / "model", num_hidden_layers=1)
    recipe = tmp_path / "quick.yaml"
    recipe.write_text(
        "description: x\ncalibration: {sequence_length: 64}\nscore: {samples: 0}\nsearch: {exponents: 2, rows: 16, shrinks: 2}\n"
    )
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "set.jsonl", tmp_path / "folder" / "a.jsonl"):
        path.write_text(json.dumps({"text": "one and two and three apples"}))
    (tmp_path / "set.txt").write_text("one and two and three apples")
    options = ["--recipe", str(recipe), "--calibration", str(tmp_path / name), "--output", str(tmp_path / "out"), "--json"]
    ran = CliRunner().invoke(main, ["quantize", str(model), *options])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["calibration"]["rows"] == 1
