"""Garbage for every door: one file of a good input is damaged, a command of ours is run on it, and what comes back is judged.

    fuzz(folder, seconds, seed) -> Counts     on tiny models that it makes; every command runs in a forked child with a limit of memory

A command may do its work, or end with exit code 1 and one line. Counted as defects: a traceback, a hang, a process that dies, a write
outside the work folder, a connection, a program that is started, a pickle that is opened, and damage to an artefact that `verify`
calls good. An audit hook of the interpreter (PEP 578) sees what is written and called, whoever does it.
"""

import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

LIMIT = 20  # seconds that one command may take
MEMORY = 12 << 30  # address space of a child
BATCH = 40  # mutations that one child tries
NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 1 << 31, 1 << 63, 1 << 200, -(1 << 63), 0.5, -0.5, 1e308, float("nan"), float("inf"), "",
    " ", "x" * 5000,
    "..", "/", "../../outside", "/etc/passwd", "a/b", "\x00", "\ud800", "{{ 7 * 7 }}", "!!python/object/apply:os.system [id]",
    "null", "bfloat16",
    [], {}, [[]], [None], [0, 0], [0, -1], {"": ""}, [[[[[[[[]]]]]]]], "F32", "I64", "🦙", list(range(50)), "default", "-inf",
]  # fmt: skip
TEXTS = [
    b"", b"\n", b"\x00", b"{", b"[]", b"null", b'"', b"\xff\xfe", b"a: &a [1]\n<<: *a\n", b"--- 1\n--- 2\n", b"[" * 100_000,
    b"{'a':" * 5000,
    b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(8)),
    b"a: !!python/object/apply:os.system ['id']\n", b"? ? ?\n", b"1e999999", b"&a *a",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    b"9" * 10_000, b'{"a": ' + b"9" * 5000 + b"}", b"\xef\xbb\xbf{}", b"%YAML 9.9\n---\n{}", b"a: 2026-99-99\n", b"? {a: b}\n: c\n",
]  # fmt: skip


# --- Damage -----------------------------------------------------------------------------------------------------------------------


def _bytes(data: bytes, chance: random.Random) -> bytes:
    """A few bytes flipped, cut, doubled, replaced by a whole text, or the end lost."""
    how, size = chance.randrange(7), len(data)
    at = chance.randrange(size + 1)
    # headers and texts lie in front, so that is where half of the damage goes
    at = min(at, chance.randrange(1 << 10)) if chance.random() < 0.5 else at
    if how == 0 or not size:
        return chance.choice(TEXTS)
    if how == 1:
        return data[:at]
    if how == 2:
        return data[:at] + data[min(size, at + 1 + chance.randrange(64)) :]
    if how == 3:
        return data[:at] + chance.choice(TEXTS)[:200] + data[at:]
    if how == 4:
        return data[:at] + data[at // 2 : at] + data[at:]
    damaged = bytearray(data)
    for _ in range(1 + chance.randrange(4)):
        damaged[min(size - 1, max(0, at + chance.randrange(-40, 40)))] = chance.choice((0, 255, 32, 34, chance.randrange(256)))
    return bytes(damaged)


def _tree(value: Any, chance: random.Random) -> Any:
    """One node of a JSON value replaced, removed, doubled, renamed or wrapped."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(value)
    if not places:
        return chance.choice(NASTY)
    for _ in range(1 + (chance.random() < 0.2)):
        node, key = chance.choice(places)
        try:
            how = chance.randrange(6)
            if how == 0:
                del node[key]
            elif how == 1 and isinstance(node, dict):
                node[chance.choice(("", "x", "\x00", "../x", str(key) + "_", "trust_remote_code", "auto_map"))] = node.pop(key)
            elif how == 2:
                node[key] = [node[key]]
            elif how == 3 and isinstance(node[key], (int, float)):
                node[key] = chance.choice((-node[key], node[key] + 1, node[key] * 2, node[key] // 2, str(node[key]), float(node[key])))
            elif how == 4:
                other, place = chance.choice(places)
                node[key] = json.loads(json.dumps(other[place]))
            else:
                node[key] = chance.choice(NASTY)
        except (KeyError, IndexError, OverflowError, ValueError):
            continue  # the first damage took the second's place away
    return value


def _damaged(path: Path, chance: random.Random) -> bytes:
    data = path.read_bytes()
    if chance.random() < 0.7:
        try:
            if path.suffix == ".json":
                return json.dumps(_tree(json.loads(data), chance)).encode(errors="surrogatepass")
            if path.suffix == ".yaml":
                return yaml.safe_dump(_tree(yaml.safe_load(data), chance)).encode(errors="surrogatepass")
            if path.suffix == ".safetensors":
                length = struct.unpack("<Q", data[:8])[0]
                raw = json.dumps(_tree(json.loads(data[8 : 8 + length]), chance)).encode(errors="surrogatepass")
                told = len(raw) if chance.random() < 0.9 else chance.choice((0, 1, 100 << 20, (100 << 20) + 1, 1 << 63, (1 << 64) - 1))
                return struct.pack("<Q", told) + raw + data[8 + length :]
        except (ValueError, yaml.YAMLError, RecursionError):
            pass
    return _bytes(data, chance)


# --- Judgement --------------------------------------------------------------------------------------------------------------------


@dataclass
class Door:
    """A way in: files of a good input that are damaged in turn, and the command that meets the damage."""

    name: str
    source: Path  # a good folder, copied once a child
    files: Sequence[str]  # patterns in it
    command: Callable[[Path, Path], list[str] | Callable[[], None]]  # (damaged copy, work folder) -> arguments of quantkit, or a call
    weight: int = 1
    must_fail: bool = False  # exit code 0 is a silently wrong result
    meant: Callable[[Path, Path], None] | None = None  # looks at what was made of damage that was taken; raises Silent


class Silent(Exception):
    """What was made is not what the input means."""


@dataclass
class Counts:
    tried: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    defects: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)  # traceback, hang, death, outside, silent
    examples: dict[str, str] = field(default_factory=dict)


def _watch(allowed: Path, seen: list[str]) -> None:
    """Tell of every write outside a folder, and of what damaged input must never cause."""
    inside = str(allowed.resolve())

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
            if not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                return
            paths: tuple[Any, ...] = arguments[:1]
        elif event in ("os.rename", "os.link", "os.symlink"):
            paths = arguments[:2]
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "shutil.rmtree"):
            paths = arguments[:1]
            if event in ("os.remove", "os.rmdir") and isinstance(arguments[1], int) and arguments[1] >= 0:  # relative to an open folder
                paths = (os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), os.fsdecode(arguments[0])),)
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class"):
            seen.append(f"{event} {str(arguments)[:200]}")
            return
        else:
            return
        for path in paths:
            place = os.path.abspath(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else inside
            if not place.startswith((inside, "/dev/", "/proc/")) and not place.endswith((".pyc", "__pycache__")) and ".pyc." not in place:
                seen.append(f"{event} {place}")

    sys.addaudithook(hook)


def _child(door: Door, work: Path, seed: int, tell: int) -> None:
    """One batch. Each line told: index, the verdict ("done", "refused" or a defect), its words."""
    from click.testing import CliRunner

    from quantkit.cli import main

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    tempfile.tempdir = str(work)
    seen: list[str] = []
    copy = work / "input"
    shutil.copytree(door.source, copy, symlinks=True)
    _watch(work, seen)
    files = sorted({path for pattern in door.files for path in copy.glob(pattern) if path.is_file()})

    def say(*what: object) -> None:
        os.write(tell, (json.dumps([str(one)[:600] for one in what]) + "\n").encode())

    for index in range(BATCH):
        chance = random.Random(f"{door.name} {seed} {index}")
        path = chance.choice(files)
        good = path.read_bytes()
        path.write_bytes(damaged := _damaged(path, chance))
        say("start", f"{door.name} {seed}/{index} {path.relative_to(copy)}")
        command = door.command(copy, work)
        if callable(command):
            call = command
            verdict = _called(call)
        else:
            result = CliRunner().invoke(main, command)
            verdict = _judged(result, door, damaged != good)
        if verdict[0] == "done" and door.meant is not None:
            verdict = _called(lambda: door.meant(copy, work))
        if seen:
            verdict = ("outside", seen[0])
            seen.clear()
        say(*verdict)
        path.write_bytes(good)
        shutil.rmtree(work / "out", ignore_errors=True)


def _called(call: Callable[[], None]) -> tuple[str, str]:
    from quantkit.errors import QuantkitError

    try:
        call()
    except Silent as wrong:
        return "silent", str(wrong)
    except (QuantkitError, OSError) as refusal:
        return "refused", str(refusal)
    except BaseException as problem:
        return "traceback", _where(problem)
    return "done", ""


def _judged(result: Any, door: Door, changed: bool) -> tuple[str, str]:
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return "traceback", _where(result.exception)
    if result.exit_code == 0:
        return ("silent", "damage that was called good") if door.must_fail and changed else ("done", "")
    lines = result.stderr.splitlines()
    if result.exit_code not in (1, 3, 4) or (not result.stdout and (len(lines) != 1 or not lines[0].startswith("quantkit: "))):
        return "traceback", f"exit {result.exit_code}, no single line: {result.stderr[-300:]}"
    if "Traceback" in result.stderr + result.stdout:
        return "traceback", result.stderr[-300:]
    return "refused", result.stderr


def _where(problem: BaseException) -> str:
    """The kind, its words, and the deepest line of ours on the way."""
    places, trace = [], problem.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if f"{os.sep}quantkit{os.sep}" in file:
            places.append(f"{file.rpartition(f'{os.sep}quantkit{os.sep}')[2]}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{places[-1] if places else '?'} {type(problem).__name__}: {' '.join(str(problem).split())[:160]}"


def fuzz(doors: Sequence[Door], folder: Path, seconds: float, seed: int = 0, most: int | None = None) -> Counts:
    """Batches of mutations through the doors, by weight, until the time is up or `most` were tried."""
    counts, ends, chance = Counts(), time.monotonic() + seconds, random.Random(seed)
    order = [door for door in doors for _ in range(door.weight)]
    batch = 0
    while time.monotonic() < ends and (most is None or counts.tried.total() < most):
        door = order[batch] if batch < len(order) else chance.choice(order)  # every door once, whatever the time
        work = folder / f"batch-{batch}"
        work.mkdir()
        _batch(door, work, seed * 1_000_003 + batch, counts, ends)
        shutil.rmtree(work)
        batch += 1
    return counts


def _batch(door: Door, work: Path, seed: int, counts: Counts, ends: float) -> None:
    hears, says = os.pipe()
    gc.freeze()
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 2)
        os.close(hears)
        code = 0
        try:
            _child(door, work, seed, says)
        except BaseException as problem:
            code = 9
            os.write(says, (json.dumps(["harness", _where(problem)]) + "\n").encode())
        os._exit(code)
    os.close(says)
    what, kind, words, buffer, began = "", "", "", b"", time.monotonic()
    while True:
        ready, _, _ = select.select([hears], [], [], LIMIT)
        if not ready:
            kind, words = "hang", f"no answer in {LIMIT} s"
            break
        if not (part := os.read(hears, 1 << 16)):
            break
        *lines, buffer = (buffer + part).split(b"\n")
        for line in lines:
            kind, words = json.loads(line)
            if kind == "start":
                what = words
                continue
            _count(counts, door, kind, words, what)
            what = ""
        if time.monotonic() > ends and time.monotonic() - began > 1:
            what, kind = "", ""  # the time is up; what runs now is not counted
            break
    os.close(hears)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if what and kind in ("start", "hang"):
        _count(counts, door, "hang" if kind == "hang" else "death", words if kind == "hang" else f"status {status}", what)


def _count(counts: Counts, door: Door, kind: str, words: str, what: str) -> None:
    counts.tried[door.name] += 1
    if kind == "refused":
        counts.refused[door.name] += 1
    elif kind != "done":
        counts.defects[door.name] += 1
        counts.kinds[kind] += 1
        key = f"{kind}: {words.split(': ')[0] if kind == 'traceback' else words}"
        counts.examples.setdefault(f"{door.name}: {key}"[:200], f"{what}: {words}")
