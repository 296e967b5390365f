"""Shared by the commands: the two consoles, printing, progress bars, and user mistakes as one-line errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from moeless.core.errors import ConfigError, MoelessError

stdout = Console()
stderr = Console(stderr=True)


def say(text: str) -> None:
    """Print a line to stdout as it is, however long."""
    stdout.print(text, highlight=False, markup=False, soft_wrap=True)


def say_aside(text: str) -> None:
    """Print a line to stderr as it is, however long."""
    stderr.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the errors of reading and checking a user's files into ConfigError, which is printed as one line.

    ValueError is one of them: moeless_predictors, which does not import moeless, raises it for bad files and settings.
    """
    try:
        yield
    except MoelessError:
        raise
    except (ValueError, ModuleNotFoundError) as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from error


@contextmanager
def progress_of(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, moved by calls with (done, total); hidden where stderr is no terminal."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class PackingProgress:
    """A progress bar that a packing callback moves; hidden until something is packed."""

    def __enter__(self) -> tuple[Progress, Callable[[int, int, str], None]]:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=stderr,
            transient=True,
        )
        self._task: TaskID | None = None

        def on_progress(done: int, total: int, label: str) -> None:
            if self._task is None:
                self._bar.start()
                self._task = self._bar.add_task(label, total=total)
            self._bar.update(self._task, completed=done, total=total, description=label)

        return self._bar, on_progress

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
