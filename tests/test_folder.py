"""A run's folder: one process at a time, an end within two seconds, room on the disk, nothing for everybody to write."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import quantkit
from quantkit import store
from quantkit.errors import StoreError
from quantkit.store import LOCK, clear, held

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
import hashlib
from quantkit.cli.common import one_line_errors
with one_line_errors():
    print(flush=True)
    {work}
"""


@pytest.mark.parametrize("work", ["import time; time.sleep(60)", "hashlib.pbkdf2_hmac('sha256', b'x', b'y', 2_000_000_000)"])
def test_an_interrupt_ends_within_two_seconds(work):
    """Also inside one long call of a library, which no signal reaches."""
    process = python(BUSY.format(work=work))
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, error = process.communicate(timeout=20)
    assert time.monotonic() - began < 2.5, "two seconds, and a busy machine"
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
