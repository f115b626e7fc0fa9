"""What all commands share: a line of progress, errors as one line and an exit code, options."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from quantkit.report import Event, Listener

ADAPTER = click.option("--adapter", metavar="DIR", help="A PEFT LoRA adapter, merged tensor by tensor as the checkpoint is read.")
JSON = click.option("--json", "as_json", is_flag=True, help="The result as JSON on stdout.")


@contextmanager
def progress() -> "Iterator[Listener]":
    """A rich line on stderr while it is a terminal; nothing where it is not."""
    from quantkit.report import silent

    if not sys.stderr.isatty():
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
    try:
        yield
    except QuantkitError as error:
        click.echo(f"quantkit: {' '.join(str(error).split())}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `quantkit plan | head`
        raise
    except OSError as error:  # a full disk, a folder that may not be written, a name too long
        click.echo(f"quantkit: {error.filename or 'system'}: {error.strerror or error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo(f"quantkit: interrupted; {interrupted}", err=True)
        sys.exit(130)


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
