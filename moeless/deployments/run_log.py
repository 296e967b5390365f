"""A run's own log lines: each process writes them to its file among Ray's, and warnings to the terminal of `serve`.

Ray would copy everything its processes print to the terminal, so that is off (deployments/ray_session.py). Processes
send moeless's warnings to a Unix socket of the process that started the run; its path is in an environment variable.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

SOCKET_VARIABLE = "MOELESS_LOG_SOCKET"
_MAX_BYTES = 8192
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class LogLine(msgspec.Struct, frozen=True, kw_only=True):
    """A log line on its way to the terminal."""

    level: str
    part: str
    """The deployment that wrote it."""
    text: str

    def __str__(self) -> str:
        return f"{self.level.lower()}: {self.part}: {self.text}"


def set_up_logging() -> None:
    """In a replica: moeless's events go to stderr, which Ray keeps in a file, and its warnings to the terminal too.

    Elsewhere logging stays as it is.
    """
    if "ray.serve" not in sys.modules:
        return
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        part = str(serve.get_replica_context().deployment)
    except RayServeException:
        return
    logger = logging.getLogger("moeless")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    to_file = logging.StreamHandler(sys.stderr)
    to_file.setFormatter(logging.Formatter(_FORMAT))
    logger.addHandler(to_file)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    path = os.environ.get(SOCKET_VARIABLE)
    if path:
        logger.addHandler(TerminalHandler(path, part))


class TerminalHandler(logging.Handler):
    """Sends warnings to the socket at `path`. Never blocks: what the terminal cannot take is in the file."""

    def __init__(self, path: str, part: str) -> None:
        super().__init__(logging.WARNING)
        self._path, self._part = path, part
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one line: the message, and the exception's type and words without its traceback."""
        try:
            data = self._encode(record)
        except Exception:  # as every handler does: a line that cannot be formatted is no error of who logs it
            self.handleError(record)
            return
        with suppress(OSError):  # the run's first process has ended, or lags behind: the line is in the file
            self._socket.sendto(data, self._path)

    def _encode(self, record: logging.LogRecord) -> bytes:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += f" ({type(record.exc_info[1]).__name__}: {record.exc_info[1]})"
        text = " ".join(text.split())[: _MAX_BYTES // 8].encode(errors="backslashreplace").decode()
        return msgspec.json.encode(LogLine(level=record.levelname, part=self._part, text=text))

    def close(self) -> None:
        self._socket.close()
        super().close()


@contextmanager
def lines_of_run(show: Callable[[LogLine], None]) -> Iterator[None]:
    """Take the warnings of processes that are started in this block, in a thread of its own.

    Args:
        show: called with each line, in that thread.
    """
    with tempfile.TemporaryDirectory(prefix="moeless-") as folder:  # only this user can enter it
        path = str(Path(folder) / "log")
        receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        receiver.bind(path)
        before = os.environ.get(SOCKET_VARIABLE)
        os.environ[SOCKET_VARIABLE] = path
        thread = threading.Thread(target=_receive, args=(receiver, show), name="run-log", daemon=True)
        thread.start()
        try:
            yield
        finally:
            if before is None:
                del os.environ[SOCKET_VARIABLE]
            else:
                os.environ[SOCKET_VARIABLE] = before
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"", path)
            thread.join()
            receiver.close()


def _receive(receiver: socket.socket, show: Callable[[LogLine], None]) -> None:
    while data := receiver.recv(_MAX_BYTES):
        try:
            line = msgspec.json.decode(data, type=LogLine)
        except msgspec.DecodeError:
            continue  # not one of ours: only this user's processes reach the socket
        show(line)
