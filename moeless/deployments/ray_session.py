"""Ray for one run: checks what it needs, starts or joins it, and turns its failures into one line with the remedy.

Called by deployments/application.py. Ray's own log lines stay in its files; `start_ray` returns their folder.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from moeless.core.errors import ConfigError, MoelessError

_PROXY_READY_S = 20
"""Serve's HTTP proxy is killed after three times this long. Its own 5 s are too few for two cores that are busy."""
_CONNECT_TIMEOUT_S = 5.0
_MIN_FREE_BYTES = 200 << 20
"""In Ray's folder, for its logs and sockets; a start with less fails late and says little."""
_MIN_MEMORY_BYTES = 1 << 30
_MAX_SOCKET_PATH = 107
_SOCKET_PATH = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""Shape of the longest socket path that Ray makes in its folder."""


def start_ray(address: str | None) -> Path | None:
    """Start Ray on this machine, or join the cluster at `address`.

    Returns: the folder of Ray's logs on this machine; None if Ray names none.
    Raises: MoelessError, one line with the remedy.
    """
    if address is None:  # Ray's processes inherit it
        os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", str(_PROXY_READY_S))
    try:
        with keep_stop_signals():
            context = ray.init(
                address=address or "local",
                include_dashboard=False if address is None else None,
                log_to_driver=False,
                logging_level=logging.WARNING,
                configure_logging=True,
            )
    except Exception as error:  # Ray raises a dozen kinds, plain Exception among them
        raise _explained(error, address) from error
    folder = getattr(context, "address_info", {}).get("session_dir")
    return Path(folder) / "logs" if folder else None


def check_before_start(address: str | None) -> None:
    """Raise ConfigError for an address where no cluster is, or a folder or machine that Ray cannot start on."""
    if address is None:
        check_temporary_folder()
        check_memory()
    else:
        check_address(address)


def check_address(address: str) -> None:
    """Raise ConfigError unless somebody listens at the address of a Ray cluster."""
    if address == "auto":
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"--ray-address must be HOST:PORT of a running Ray cluster, or auto, got {address!r}; without it, Ray is "
            "started here"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S):
            pass
    except OSError as error:
        raise ConfigError(
            f"--ray-address must be the address of a running Ray cluster, but nobody answers at {address} "
            f"({error.strerror or error}); start one with `ray start --head`, or leave the option out to start Ray here"
        ) from error


def check_temporary_folder() -> None:
    """Raise ConfigError unless Ray's folder can be made and written to, has space, and a path that sockets can have."""
    variable = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR" if os.environ.get("TMPDIR") else None
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    named = f"{variable}={folder}" if variable else folder
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"Ray's folder {named} must be writable, got: {error.strerror}; set RAY_TMPDIR to one that is"
        ) from error
    length = len(os.path.abspath(folder)) + len(_SOCKET_PATH)
    if length > _MAX_SOCKET_PATH:
        most = _MAX_SOCKET_PATH - len(_SOCKET_PATH)
        raise ConfigError(
            f"Ray's folder {named} must have a path of at most {most} characters, for Ray's sockets in it; set "
            "RAY_TMPDIR to a shorter one"
        )
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < _MIN_FREE_BYTES:
        raise ConfigError(
            f"Ray's folder {named} must have {_MIN_FREE_BYTES >> 20} MiB free, got {free_bytes >> 20} MiB; free some, "
            "or set RAY_TMPDIR to another folder"
        )


def check_memory() -> None:
    """Raise ConfigError if this machine has too little memory left for Ray's processes and object store."""
    import psutil

    available_bytes = int(psutil.virtual_memory().available)
    if available_bytes < _MIN_MEMORY_BYTES:
        raise ConfigError(
            f"Ray needs {_MIN_MEMORY_BYTES >> 20} MiB of memory to start, {available_bytes >> 20} MiB are available; "
            "end other programs, or join a cluster elsewhere with --ray-address"
        )


def _explained(error: Exception, address: str | None) -> MoelessError:
    reason = first_line(str(error)) or type(error).__name__
    where = "did not start" if address is None else f"at {address} cannot be joined"
    text = f"{reason} {error}".lower()
    if "shm" in text or "object store" in text or "object_store" in text:
        remedy = "give it more shared memory (docker: --shm-size=1g) or memory"
    elif "unauthenticated" in text or "token" in text:
        remedy = "set RAY_AUTH_MODE and RAY_AUTH_TOKEN as they are set for the cluster"
    elif "version mismatch" in text:
        remedy = "install the Ray and Python versions of the cluster"
    elif address is not None:
        remedy = "check with `ray status` that the cluster runs, or leave --ray-address out to start Ray here"
    else:
        folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
        remedy = f"see {folder}/ray/session_latest/logs, and docs/troubleshooting.md"
    return MoelessError(f"Ray {where}: {reason}; {remedy}")


def first_line(text: str) -> str:
    """The first line that says something, without colours and a full stop."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return next((line.strip().rstrip(".") for line in plain.splitlines() if line.strip()), "")


def last_error(text: str) -> str:
    """The message of the innermost exception in a text that may hold tracebacks; the first line where it has none."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    found = re.findall(r"^\s*(?:[A-Za-z_]\w*\.)*\w*(?:Error|Exception|Interrupt|Exit)\w*: (.+)$", plain, re.MULTILINE)
    return str(found[-1]).strip() if found else first_line(text)


@contextmanager
def keep_stop_signals() -> Iterator[None]:
    """Keep the handlers of SIGINT, SIGTERM and SIGHUP while Ray starts.

    ray.init sets a SIGTERM handler that ends the process without stopping Serve, and at once: even a signal that comes
    while Ray starts would meet it. So for as long as Ray starts, nothing in this process can set these handlers.
    """
    real: Any = signal.signal
    kept = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ours = {number: signal.getsignal(number) for number in kept}

    def set_others(number: int, handler: Any) -> Any:
        # Ray defers SIGINT in some moments of starting, and gives it back.
        if number in kept and number != signal.SIGINT:
            return signal.getsignal(number)
        return real(number, handler)

    signal.signal = set_others  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = real
        for number, handler in ours.items():
            if handler is not None:
                real(number, handler)  # anew, also where Python knows no other: Ray's C++ has put its own beneath
