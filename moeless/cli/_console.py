"""Shared by the commands: the two consoles, printing, progress bars, and user mistakes as one-line errors."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

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
    except ValueError as error:
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

    def __enter__(self) -> Callable[[int, int, str], None]:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=stderr,
            transient=True,
            disable=not stderr.is_terminal,
        )
        self._task: TaskID | None = None

        def on_progress(done: int, total: int, label: str) -> None:
            if self._task is None:
                self._bar.start()
                self._task = self._bar.add_task(label, total=total)
            self._bar.update(self._task, completed=done, total=total, description=label)

        return on_progress

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._bar.stop()


class ReservedTerminal:
    """Keeps the terminal for moeless's own lines: `stdout` and `stderr` of this module stay on it.

    Everything else that this process writes, Python's and C++ libraries' lines alike, goes to a file: a temporary one,
    and from `move_to` on the one named there.
    """

    def __enter__(self) -> Self:
        self._file = tempfile.TemporaryFile("w+b")  # lives as long as the block
        sys.stdout.flush()
        sys.stderr.flush()
        self._kept = [os.dup(1), os.dup(2)]
        self._streams = (sys.stdout, sys.stderr)
        for console, descriptor in zip((stdout, stderr), self._kept, strict=True):
            console.file = os.fdopen(descriptor, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
        for number in (1, 2):
            os.dup2(self._file.fileno(), number)
        return self

    def move_to(self, path: Path) -> None:
        """Write to `path` from now on, after what was written until now. Does nothing if it cannot be written."""
        try:
            file = path.open("a+b")
        except OSError:
            return  # on a joined cluster the folder may be another user's; the lines stay in the temporary file
        sys.stdout.flush()
        sys.stderr.flush()
        self._file.seek(0)
        shutil.copyfileobj(self._file, file)
        file.flush()
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        self._file.close()
        self._file = file

    def __exit__(self, *_: object) -> None:
        for stream in (*self._streams, stdout.file, stderr.file):
            stream.flush()
        for number, descriptor in zip((1, 2), self._kept, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        stdout.file, stderr.file = self._streams
        self._file.close()


@contextmanager
def waiting() -> Iterator[Callable[[str], None]]:
    """Say what is being waited for: a spinner on a terminal, elsewhere a line for each."""
    if not stderr.is_terminal:
        yield lambda what: say(f"{what} ...")
        return
    with stderr.status("") as status:
        yield lambda what: status.update(what)
