"""What all commands share: a line of progress, errors as one line and an exit code, options."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from quantkit.errors import GONE, QuantkitError, RankError

if TYPE_CHECKING:
    from quantkit.report import Event, Listener

GRACE = 1.5  # seconds that a command has to end by itself when it is interrupted
ADAPTER = click.option("--adapter", metavar="DIR", help="A PEFT LoRA adapter, merged tensor by tensor as the checkpoint is read.")
JSON = click.option("--json", "as_json", is_flag=True, help="The result as JSON on stdout.")


@contextmanager
def progress() -> "Iterator[Listener]":
    """A rich line on stderr while it is a terminal; nothing where it is not."""
    from quantkit.report import silent

    if not sys.stderr.isatty() or not first():
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns: list[Any] = [TimeElapsedColumn(), BarColumn(bar_width=10), TextColumn("{task.description}: {task.fields[detail]}")]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None, detail="")

        def tell(event: "Event") -> None:
            left = "" if event.seconds_left is None else f"{duration(event.seconds_left)} left, "
            detail = "" if event.block is None else f"{event.unit} {min(event.block + 1, event.blocks)}/{event.blocks}, "
            detail += f"{event.tokens:,} tokens, " if event.tokens else ""
            detail += f"{left}peak {event.memory / 2**30:.1f} GiB"
            bar.update(task, description=event.phase, completed=event.block or 0, total=event.blocks or None, detail=detail)

        yield tell


@contextmanager
def one_line_errors(interrupted: str = "the same command goes on where it stopped") -> Iterator[None]:
    """Around a command: an error of ours, or of the system, ends it in one line."""
    line = f"quantkit: interrupted; {interrupted}"
    try:
        with _ends_soon(line), _ends_with_the_others():
            yield
    except QuantkitError as error:
        if not _told_already():
            click.echo(f"quantkit: {' '.join(str(error).split())}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `quantkit plan | head`
        raise
    except OSError as error:  # a full disk, a folder that may not be written, a name too long
        click.echo(f"quantkit: {error.filename or 'system'}: {error.strerror or error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo(line, err=True)
        sys.exit(130)


def first() -> bool:
    """Whether this process speaks for its run: of several ranks under torchrun the first."""
    return os.environ.get("RANK", "0") == "0"


def _told_already() -> bool:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    from quantkit.ranks import told_already

    return told_already()


@contextmanager
def _ends_with_the_others() -> Iterator[None]:
    """torchrun ends all ranks when one has ended: that is said as what it is."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def told(number: int, frame: object) -> None:
        raise RankError(GONE)

    before = signal.signal(signal.SIGTERM, told)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _ends_soon(line: str) -> Iterator[None]:
    """Ctrl-C inside one long operation of a library, where Python hears no signal until it returns: ended from beside after a grace.

    Nothing is lost by it that `kill -9` would not lose: what is written becomes visible when it is whole.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    done, (hears, says) = threading.Event(), os.pipe()
    os.set_blocking(says, False)

    def watch() -> None:
        while told := os.read(hears, 1):
            if told[0] == signal.SIGINT and not done.wait(GRACE):
                os.write(2, f"{line}\n".encode())
                os._exit(130)
        os.close(hears)

    before = signal.set_wakeup_fd(says, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(before)
        os.close(says)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def quiet() -> None:
    """Libraries' warnings would stand beside our one line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries
