"""Runs in children that are stopped from outside: killed, starved of disk, watched from beside. Each is compared with a run undisturbed.

Job(folder, recipe).finish(out)      "ended", or one line of an error
kill, starve, creep, limits          what `make torture` prints of them
"""

import builtins
import copy
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import stub_hub
import tiny
import torch

from quantkit import pipeline, store
from quantkit.errors import QuantkitError, StoreError

CREEP = 1.05
REPO, COMMIT = "someone/tiny", "0" * 40
OF_THE_PROCESS = ("seconds", "seconds_by_block", "memory", "peak_memory", "spilled")  # of run.json: a process, not its result
QUICK = (
    "description: x\ncalibration: {samples: 4, sequence_length: 64}\nscore: {samples: 2, sequence_length: 64}\n"
    "search: {exponents: 2, rows: 16, shrinks: 2, sweeps: 1}\n"
)
TWO = QUICK + "formats: [compressed-tensors, gguf]\n"
THREE = QUICK + "formats: [compressed-tensors, gguf, onnx]\n"


class Moment(NamedTuple):
    """Something that a run tells or does: a phase of a block, or one touch of a file in its folder."""

    kind: str  # "phase", "file", "end"
    name: str  # of the phase; of what is done and the file; how it ended
    block: int | None = None

    @property
    def group(self) -> str:
        """What kills are spread over."""
        if self.kind != "file":
            return self.name
        path = self.name.partition(" ")[2].replace("/.", "/").removeprefix(".").removesuffix(".part")
        folder, _, file = path.partition("/")
        if file in ("README.md", "quantkit.json") or path == "run.json":
            return "card and manifest"
        if folder == "solved":
            return "storing" if file.startswith("block-") else "beginning"
        return f"writing {folder}" if file else "lock and folder"


class Job:
    """One tiny model and a recipe, run in forked children."""

    def __init__(self, folder: Path, recipe: str, family: str = "llama", **build: Any):
        self.folder = folder
        self.model: str = str(tiny.build(family, folder / "model", **build))
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(recipe)
        self.options: dict[str, Any] = {}
        self.prepare: Callable[[], None] = lambda: None  # in the child

    def asking(self, recipe: str) -> "Job":
        """The same model under another recipe."""
        other = copy.copy(self)
        other.recipe = self.folder / f"recipe-{hashlib.sha256(recipe.encode()).hexdigest()[:6]}.yaml"
        other.recipe.write_text(recipe)
        return other

    def start(
        self, out: Path, before: Callable[[], None] = lambda: None, touch: int | None = None, act: Callable[[], None] = lambda: None
    ) -> tuple[int, Iterator[Moment]]:
        """A child at work and its moments as they come; the last is its end, if it came to one.

        Args:
            before: called in the child first.
            touch, act: at this touch of a file (counted from 0) `act` is called in the child, before what it was about to do is done.
        """
        hears, says = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(hears)
            code = 9
            tell = lambda *moment: os.write(says, (json.dumps(moment) + "\n").encode())  # noqa: E731
            try:
                torch.set_num_threads(1)
                self.prepare()
                before()
                _tell_files(out, tell, touch, act)
                pipeline.quantize(
                    self.model,
                    recipe=str(self.recipe),
                    output=out,
                    tell=lambda event: tell("phase", event.phase, event.block) and None,
                    **self.options,
                )
                tell("end", "ended")
                code = 0
            except QuantkitError as problem:
                tell("end", f"{type(problem).__name__}: {problem}")
            except BaseException as problem:
                tell("end", f"traceback {type(problem).__name__}: {problem}")
            os._exit(code)
        os.close(says)

        def moments() -> Iterator[Moment]:
            with open(hears, encoding="utf-8") as lines:
                for line in lines:
                    if line.endswith("\n"):
                        yield Moment(*json.loads(line))

        return child, moments()

    def finish(self, out: Path) -> tuple[str, list[Moment]]:
        """Run to the end: how it ended, and what it did."""
        child, moments = self.start(out)
        seen = list(moments)
        os.waitpid(child, 0)
        return (seen[-1].name if seen and seen[-1].kind == "end" else "died"), seen


def _tell_files(out: Path, tell: Callable[..., Any], touch: int | None, act: Callable[[], None]) -> None:
    """Every touch of a file below `out` that changes something, in the words of the interpreter's audit events (PEP 578)."""
    inside, count = str(out), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            flags = arguments[2]
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                return
        elif event not in ("os.rename", "os.remove", "os.mkdir"):
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
        if not path.startswith(f"{inside}{os.sep}"):
            return
        count += 1
        if count - 1 == touch:
            act()
        tell("file", f"{event} {path[len(inside) + 1 :]}")

    sys.addaudithook(hook)


def artefacts(out: Path) -> dict[str, bytes]:
    """All bytes of a run's formats and solved blocks; run.json without the keys that tell of the process."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file() and path.suffix != ".part"}
    told = json.loads(found.pop("run.json")) if "run.json" in found else {}
    for key in OF_THE_PROCESS:
        told.pop(key, None)
    return {**found, "run.json": json.dumps(told, sort_keys=True).encode()} if told else found


def differing(ours: dict[str, bytes], whole: dict[str, bytes]) -> list[str]:
    return sorted(name for name in ours.keys() | whole.keys() if ours.get(name) != whole.get(name))


def looks_whole(out: Path, whole: dict[str, bytes]) -> list[str]:
    """Files of a run that was stopped which bear their last name and not their last bytes."""
    return [name for name, data in artefacts(out).items() if not name.endswith(store.LOCK) and whole.get(name) != data]


def warm(folder: Path) -> None:
    """What a run imports, imported once: a child then takes a second, not ten."""
    folder.mkdir(parents=True, exist_ok=True)
    Job(folder, THREE, num_hidden_layers=1)
    pipeline.quantize(str(folder / "model"), recipe=str(folder / "recipe.yaml"), output=folder / "out")


# --- Kills ------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _on_the_hub(job: Job) -> Iterator[stub_hub.Hub]:
    """The job's model behind a Hub id: children download it from the loopback address into a cache of the job's own."""
    files = {path.name: path.read_bytes() for path in Path(job.model).iterdir()}
    with stub_hub.Server() as hub:
        hub.repos[REPO] = {"main": files, COMMIT: files}

        def prepare() -> None:
            about = huggingface_hub.constants
            about.ENDPOINT, about.HF_HUB_OFFLINE = hub.url, False
            about.HUGGINGFACE_CO_URL_TEMPLATE = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
            about.HF_HUB_CACHE, about.HF_HUB_DISABLE_XET = str(job.folder / "cache"), True

        job.model, job.prepare = REPO, prepare
        yield hub


class Whole:
    """A run undisturbed: its bytes, its moments, and their numbers by group."""

    def __init__(self, job: Job, out: Path):
        ended, self.moments = job.finish(out)
        if ended != "ended":
            raise SystemExit(f"an undisturbed run ended with {ended}")
        self.job, self.bytes, self.groups = job, artefacts(out), dict[str, list[int]]()
        for number, moment in enumerate(self.moments[:-1]):
            self.groups.setdefault(moment.group, []).append(number)


def kill(folder: Path, kills: int, seed: int, ends: float, onnx: bool = True) -> dict[str, Any]:
    """SIGKILL in every phase in turn, from outside at a random moment of it or exactly before a file is touched.

    After each kill the same command runs to its end, and now and then is killed once more on its way. ONNX is asked for where a kill
    shall meet its writer and now and then: its graph takes longer than all else.
    """
    chance, out = random.Random(seed), folder / "out"
    found, wrong, compared, finished, repeated = Counter[str](), list[str](), 0, 0, 0
    job = Job(folder, TWO, num_hidden_layers=2)
    with _on_the_hub(job) as hub:
        two = Whole(job, folder / "two")
        three = Whole(job.asking(THREE), folder / "three") if onnx else two
        gets = [path for method, path in hub.asked if method == "GET" and "/resolve/" in path]
        names = ["download", *three.groups]
        while finished < kills and time.monotonic() < ends:
            group, begun = names[(finished + seed) % len(names)], set[int]()
            whole = three if (group not in two.groups and group != "download") or chance.random() < 0.1 else two
            while True:
                if group == "download":
                    shutil.rmtree(folder / "cache", ignore_errors=True)
                    was_killed, solved = _killed_while_it_downloads(whole.job, hub, out, chance.choice(gets)), set[int]()
                else:
                    was_killed, solved = _killed(whole, group, chance, out)
                found[group] += was_killed
                repeated = max(repeated, len(begun & solved))
                begun |= solved
                if half := looks_whole(out, whole.bytes) if out.exists() else []:
                    wrong.append(f"killed in {group}: looks whole: {half[:3]}")
                if chance.random() < 0.8:
                    break
                group = chance.choice(list(whole.groups))
            ended, moments = whole.job.finish(out)
            repeated = max(repeated, len(begun & _solved(moments)))
            if ended != "ended" or differing(artefacts(out), whole.bytes):
                wrong.append(f"after a kill in {group}: {ended}: {differing(artefacts(out), whole.bytes)[:4]}")
            if left := [str(path.relative_to(out)) for path in out.rglob("*") if path.name.endswith((".part", store.LOCK))]:
                wrong.append(f"after a kill in {group}: left: {left[:3]}")
            finished, compared = finished + 1, compared + sum(map(len, whole.bytes.values()))
            shutil.rmtree(out)
    if repeated > 1:
        wrong.append(f"a resumed run solved {repeated} blocks again")
    counts = {"kills survived": found.total(), "by phase": dict(found), "restarted and compared": finished}
    return {**counts, "blocks solved again at most": repeated, "bytes compared": compared, "wrong": wrong}


def _solved(moments: list[Moment]) -> set[int]:
    """Blocks that a run began to solve."""
    return {moment.block for moment in moments if moment.name == "solving" and moment.block is not None}


def _killed(whole: Whole, group: str, chance: random.Random, out: Path) -> tuple[bool, set[int]]:
    """Start, and kill in this group's time. Was it met, and which blocks did the run begin to solve?"""
    number = chance.choice(whole.groups[group])
    moment, exactly = whole.moments[number], chance.random() < 0.6
    touch = sum(one.kind == "file" for one in whole.moments[:number]) if moment.kind == "file" and exactly else None
    child, moments = whole.job.start(out, touch=touch, act=lambda: os.kill(os.getpid(), signal.SIGKILL))
    seen = []
    for now in moments:
        seen.append(now)
        if touch is None and now == moment:
            time.sleep(chance.random() * 0.02)
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, _solved(seen)


def _killed_while_it_downloads(job: Job, hub: stub_hub.Hub, out: Path, path: str) -> bool:
    """SIGKILL when half of one file is sent."""
    child = 0

    def halfway(asked: str) -> None:
        if asked.partition("?")[0] == path and child:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    hub.halfway = halfway
    child, moments = job.start(out)
    for _ in moments:
        pass
    _, status = os.waitpid(child, 0)
    child, hub.halfway = 0, lambda path: None
    return os.WIFSIGNALED(status)


# --- A full disk ------------------------------------------------------------------------------------------------------------------


class _Quota(io.FileIO):
    """A file on a disk that has so many bytes left; as on a real one, the first part of a write may still fit."""

    left = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        fits = min(len(view), _Quota.left)
        if len(view) and not fits:
            raise OSError(28, "No space left on device", None)
        _Quota.left -= fits
        return super().write(view[:fits])


def _shim(inside: Path) -> None:
    """From now on every file that is opened for writing below a folder shares `_Quota.left`, in this process."""
    plain = builtins.open

    def opened(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None, *a: Any
    ) -> Any:
        if not isinstance(file, (str, os.PathLike)) or not set(mode) & set("wax+") or not str(file).startswith(str(inside)):
            return plain(file, mode, buffering, encoding, errors, newline, *a)
        raw = _Quota(file, mode.replace("b", "").replace("t", ""))
        buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    builtins.open = io.open = opened
    shutil._USE_CP_SENDFILE = False  # type: ignore[attr-defined]


@contextmanager
def _small_disk(folder: Path, mount: bool) -> Iterator[Callable[[int], None] | None]:
    """A disk in memory at `folder`, and what fills it up to so many bytes; None where nobody may mount one."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64m", "quantkit"]
    if not mount or subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode:
        yield None
        return

    def fill(left: int) -> None:
        with open(folder / "ballast", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(folder).free - left))

    try:
        yield fill
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def starve(folder: Path, faults: int, seed: int, ends: float, mount: bool = True) -> dict[str, Any]:
    """A disk that is filled from elsewhere at random moments of a run, and freed again: one line each time, nothing half, and in the
    end the bytes of an undisturbed run. The disk is a real one where one may be mounted, and a shim below Python's files elsewhere."""
    chance = random.Random(seed)
    done, compared, wrong, names = 0, 0, list[str](), Counter[str]()
    job = Job(folder, TWO, num_hidden_layers=2)
    whole = Whole(job, folder / "whole")
    touches = [moment for moment in whole.moments if moment.kind == "file"]
    with _small_disk(folder / "disk", mount) as fill:
        out = folder / "disk" / "out"
        while done < faults and time.monotonic() < ends:
            left, touch = chance.choice((0, 0, chance.randrange(100_000))), chance.randrange(1, len(touches))
            if fill is not None:
                child, moments = job.start(out, touch=touch, act=partial(fill, left))
            else:
                _Quota.left = 1 << 60
                child, moments = job.start(out, partial(_shim, out), touch, partial(setattr, _Quota, "left", left))
            last = [moment.name for moment in moments][-1:]
            os.waitpid(child, 0)
            (folder / "disk" / "ballast").unlink(missing_ok=True)
            if last != ["ended"]:
                done += 1
                names[touches[touch].group] += 1
                if not last or not last[0].startswith(StoreError.__name__) or "the disk is full" not in last[0]:
                    wrong.append(f"no line of a full disk: {last}")
                if half := looks_whole(out, whole.bytes) if out.exists() else []:
                    wrong.append(f"looks whole: {half[:3]}")
                if parts := list(out.rglob("*.part")):
                    wrong.append(f"left: {parts[0].name}")
            if last == ["ended"] or chance.random() < 0.6:
                (ended, _), ours = job.finish(out), artefacts(out)
                compared += sum(map(len, whole.bytes.values()))
                if ended != "ended" or ours != whole.bytes:
                    wrong.append(f"after space was freed: {ended}, {differing(ours, whole.bytes)[:3]}")
                shutil.rmtree(out)
    kind = "mounted" if fill is not None else "a shim"
    return {"faults injected": done, "disk": kind, "by phase": dict(names), "bytes compared": compared, "wrong": wrong}


# --- Memory -----------------------------------------------------------------------------------------------------------------------


def _resident(child: int) -> int:
    """Bytes that a process holds, as the system counts them."""
    return int(Path(f"/proc/{child}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def creep(folder: Path, blocks: int = 48, early: int = 8, late: int = 40) -> dict[str, Any]:
    """Resident bytes of a run, read from outside when a block begins."""
    job, seen = Job(folder, QUICK, num_hidden_layers=blocks), dict[int, int]()
    child, moments = job.start(folder / "out")
    last = ""
    for _, last, block in moments:
        if last == "running held-out samples" and block is not None:
            seen.setdefault(block, _resident(child))
    os.waitpid(child, 0)
    ratio = seen[late] / seen[early] if last == "ended" else float("nan")
    wrong = [] if ratio <= CREEP else [f"{last}: {ratio:.3f} times as much"]
    return {f"block {early}": seen.get(early), f"block {late}": seen.get(late), "ratio": round(ratio, 4), "wrong": wrong}


def limits(folder: Path, recipe: str = THREE) -> dict[str, Any]:
    """`--max-memory`: what is too little is refused with the figure that is needed; under that figure the run stays below it, as read
    from outside all the while, and leaves the same bytes."""
    job, wrong = Job(folder, recipe, num_hidden_layers=4), list[str]()
    _, whole = job.finish(folder / "whole"), artefacts(folder / "whole")
    job.options["max_memory"] = 1
    refused, _ = job.finish(folder / "out")
    told = re.search(r"at least ([\d,]+) are needed", refused)
    if told is None:
        return {"wrong": [f"1 byte of memory was not refused with a figure: {refused}"]}
    job.options["max_memory"] = limit = int(told[1].replace(",", "")) + (1 << 20)  # pages that a fork counts or does not
    child, moments = job.start(folder / "out")
    most = 0
    for moment in moments:
        if moment.kind != "end":
            most = max(most, _resident(child))
    os.waitpid(child, 0)
    if moment.name != "ended" or differing(artefacts(folder / "out"), whole):
        wrong.append(f"under {limit:,} bytes: {moment.name}: {differing(artefacts(folder / 'out'), whole)[:3]}")
    if most > limit:
        wrong.append(f"{most:,} bytes under a limit of {limit:,}")
    return {"limit": limit, "most": most, "bytes compared": sum(map(len, whole.values())), "wrong": wrong}
