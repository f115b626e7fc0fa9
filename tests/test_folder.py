"""A run's folder: one process at a time, an end when it is asked for, room on the disk, nothing for everybody to write."""

import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

import quantkit
from quantkit import pipeline, store
from quantkit.errors import StoreError
from quantkit.store import LOCK, check_room, clear, held

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(quantkit.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
HOLDS = (
    "import sys, time; from pathlib import Path; from quantkit.store import held\nwith held(Path(sys.argv[1])):\n    print(flush=True); "
)


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A process of its own that has printed a line, so it is where the code says."""
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None
    process.stdout.readline()
    return process


# --- The lock ---------------------------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_and_told_who_holds_the_folder(tmp_path):
    out = tmp_path / "out"
    with held(out), pytest.raises(StoreError) as caught, held(out):
        pytest.fail("two runs in one folder")
    assert f"process {os.getpid()} on " in str(caught.value)
    assert str(out) in str(caught.value)
    with held(out):
        pass
    assert not out.exists(), "a folder that a run made and left empty"


def test_a_lock_ends_with_its_process_however_it_ends(tmp_path):
    process = python(HOLDS + "time.sleep(60)", str(tmp_path))
    try:
        with pytest.raises(StoreError, match=f"process {process.pid} on "), held(tmp_path):
            pytest.fail("two runs in one folder")
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert (tmp_path / LOCK).read_text().startswith(f"process {process.pid} "), "what kill -9 leaves"
    with held(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} ")
    assert not (tmp_path / LOCK).exists()


def test_a_lock_whose_name_is_taken_away_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    """Between opening the file and locking it, its holder ends and deletes it: two runs must not hold two files of one name."""
    flock, calls = store.fcntl.flock, []

    def late(lock: int, how: int) -> None:
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(lock)
        flock(lock, how)

    monkeypatch.setattr(store.fcntl, "flock", late)
    with held(tmp_path):
        assert len(calls) == 2
        with pytest.raises(StoreError), held(tmp_path):
            pytest.fail("two runs in one folder")


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "letter").write_text("dear reader")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).symlink_to(tmp_path / "letter")
    with pytest.raises(OSError), held(tmp_path / "out"):  # noqa: PT011
        pytest.fail("it was followed")
    assert (tmp_path / "letter").read_text() == "dear reader"


def test_nothing_for_everybody_to_write(tmp_path):
    before = os.umask(0)
    try:
        with held(tmp_path / "out"):
            (tmp_path / "out" / "file").touch()
        modes = [(tmp_path / "out" / name).stat().st_mode for name in ("", "file")]
        assert not any(mode & stat.S_IWOTH for mode in modes)
        assert all(mode & stat.S_IWGRP for mode in modes), "what the group may do is the user's own affair"
        assert os.umask(0) == 0
    finally:
        os.umask(before)


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------------------

BUSY = """
import hashlib, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and what they start, ignore it
from quantkit.cli.common import one_line_errors
with one_line_errors():
    print(flush=True)
    {work}
"""


@pytest.mark.parametrize("work", ["import time; time.sleep(600)", "hashlib.pbkdf2_hmac('sha256', b'x', b'y', 2_000_000_000)"])
def test_an_interrupt_ends_a_call_of_ten_minutes(work):
    """Also one inside a library, which no signal reaches. Two seconds are meant; how long a busy machine takes is no fault of ours."""
    process = python(BUSY.format(work=work))
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error == "quantkit: interrupted; the same command goes on where it stopped\n"


# --- Clearing ---------------------------------------------------------------------------------------------------------------------


def test_clearing_does_not_follow_links(tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    for folder in (out / "solved", elsewhere):
        folder.mkdir(parents=True)
    (elsewhere / "letter").write_text("dear reader")
    (out / "run.json").write_text("{}")
    (out / "gguf").symlink_to(elsewhere)
    with held(out):
        clear(out, ("solved", "gguf", "run.json"))
        assert [path.name for path in out.iterdir()] == [LOCK]
    assert (elsewhere / "letter").read_text() == "dear reader"


# --- Room -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def free(monkeypatch):
    """A function that says how many bytes the disk has free."""

    def say(count: int) -> None:
        monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=count))

    return say


def test_bytes_that_are_missing_are_told_before_anything_is_written(free, tmp_path):
    (tmp_path / "half").write_bytes(bytes(300))
    free(700)
    check_room(tmp_path, 1000)  # 300 are there already
    free(650)
    with pytest.raises(StoreError, match="50 bytes of disk are missing: the run writes 700 and 650 are free"):
        check_room(tmp_path, 1000)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A tiny model and a quick recipe: the arguments of a run but its folder."""
    folder = tmp_path_factory.mktemp("job")
    tiny.build("llama", folder / "model", num_hidden_layers=2)
    quick = "calibration: {samples: 4, sequence_length: 64}\nscore: {samples: 2, sequence_length: 64}\nsearch: {exponents: 2, rows: 16}\n"
    (folder / "quick.yaml").write_text("description: x\nformats: [compressed-tensors, gguf]\n" + quick)
    return {"model": str(folder / "model"), "recipe": str(folder / "quick.yaml")}


def test_a_run_that_the_disk_cannot_hold_writes_and_deletes_nothing(free, job, tmp_path):
    free(10_000)
    with pytest.raises(StoreError, match="bytes of disk are missing"):
        pipeline.quantize(**job, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def artefacts(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file() and path.name != "run.json"}


def test_a_disk_that_becomes_full_is_one_line_and_the_run_goes_on(job, tmp_path, monkeypatch):
    """Every fsync in turn finds the disk full: the solved blocks', the shards', the GGUF's."""
    pipeline.quantize(**job, output=tmp_path / "whole")
    fsync, allowed, lines = os.fsync, [0], list[str]()

    def full(file: int) -> None:
        allowed[0] -= 1
        if allowed[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    for count in range(1, 200, 2):
        allowed[0] = count
        try:
            pipeline.quantize(**job, output=tmp_path / "out")
        except StoreError as problem:
            lines.append(str(problem))
            told = tmp_path / "out" / "run.json"  # its name may be there where only the folder could not be brought to the disk
            assert not told.exists() or json.loads(told.read_text())["blocks"]
            assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part") or path.name == LOCK]
        else:
            break
    assert len(lines) > 2
    for line in lines:
        assert re.fullmatch(r".*/out: the disk is full \([\d,]+ bytes are free\); what is done is kept: free some .*", line)
    assert artefacts(tmp_path / "out") == artefacts(tmp_path / "whole")


# --- Whose folder it is -----------------------------------------------------------------------------------------------------------


def test_another_seed_calibration_or_revision_is_refused(job, tmp_path):
    pipeline.quantize(**job, output=tmp_path / "out")
    before = artefacts(tmp_path / "out")
    text = Path(job["recipe"]).read_text()
    revision = Path(shutil.copytree(job["model"], tmp_path / "revision"))
    (revision / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    (tmp_path / "seed").mkdir()
    (tmp_path / "seed" / "quick.yaml").write_text(text.replace("samples: 4,", "samples: 4, seed: 7,"))
    (tmp_path / "set.jsonl").write_text('{"text": "a line of text that is long enough to be a sample of its own"}\n' * 8)
    others = ({"recipe": str(tmp_path / "seed" / "quick.yaml")}, {"calibration": str(tmp_path / "set.jsonl")}, {"model": str(revision)})
    for other in others:
        with pytest.raises(StoreError, match="holds another run"):
            pipeline.quantize(**{**job, **other}, output=tmp_path / "out")
        assert artefacts(tmp_path / "out") == before
