"""Needs of Ray are checked before it starts; its failures are one line with the remedy."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from moeless.core.errors import ConfigError, MoelessError
from moeless.deployments import ray_session
from moeless.deployments.ray_session import (
    check_address,
    check_memory,
    check_temporary_folder,
    first_line,
    keep_stop_signals,
    last_error,
    start_ray,
)


def test_a_folder_that_cannot_be_made_names_the_variable_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
    with pytest.raises(ConfigError, match="RAY_TMPDIR=/proc/nowhere must be writable.*set RAY_TMPDIR to one that is"):
        check_temporary_folder()


def test_a_file_in_the_place_of_the_folder_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.touch()
    monkeypatch.setenv("RAY_TMPDIR", str(file))
    with pytest.raises(ConfigError, match="RAY_TMPDIR=.* must be writable"):
        check_temporary_folder()


def test_a_path_that_is_too_long_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 60)))
    with pytest.raises(ConfigError, match=r"at most \d+ characters.*set RAY_TMPDIR to a shorter one"):
        check_temporary_folder()


def test_a_full_disk_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setattr(ray_session.shutil, "disk_usage", lambda _: SimpleNamespace(free=5 << 20))
    with pytest.raises(ConfigError, match="must have 200 MiB free, got 5 MiB"):
        check_temporary_folder()


def test_too_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 << 20))
    with pytest.raises(ConfigError, match="1024 MiB of memory to start, 100 MiB are available"):
        check_memory()


@pytest.mark.parametrize("address", ["", "nonsense", "host:", ":6379", "host:0", "host:port", "host:99999"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="--ray-address must be HOST:PORT") as raised:
        check_address(address)
    assert repr(address) in str(raised.value)


def test_an_address_where_nobody_listens_says_how_to_start_a_cluster() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        check_address(f"127.0.0.1:{port}")
    with pytest.raises(ConfigError, match=f"nobody answers at 127.0.0.1:{port}.*ray start --head"):
        check_address(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("The configured object store size (9 GB) exceeds /dev/shm"), ("--shm-size",)),
        (RuntimeError("Version mismatch: The cluster was started with:\n Ray: 2.1"), ("Version mismatch", "install")),
        (RuntimeError("\x1b[33mThe node died.\x1b[0m\nstack"), ("Ray did not start: The node died;", "logs")),
    ],
)
def test_a_failure_of_ray_is_one_line(
    error: Exception, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(ray_session, "check_memory", lambda: None)
    monkeypatch.setattr(ray_session.ray, "init", fail)
    with pytest.raises(MoelessError) as raised:
        start_ray(None)
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


def test_the_handlers_of_stop_signals_survive_a_library_that_sets_its_own() -> None:
    def ours(*_: object) -> None: ...

    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGTERM, ours)
        with keep_stop_signals():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            assert signal.getsignal(signal.SIGTERM) is ours
        assert signal.getsignal(signal.SIGTERM) is ours
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def test_the_reason_of_a_deployment_that_failed_is_its_last_exception() -> None:
    text = """Deployment engine failed to start. Error:
ray::ServeReplica:moeless:engine.initialize() (pid=1)
  File "x.py", line 1, in __init__
ValueError: inner

The above exception was the direct cause of the following exception:

moeless.core.errors.ChecksumError: L00.E001.safetensors must have the checksum 12ab, got 34cd
"""
    assert last_error(text) == "L00.E001.safetensors must have the checksum 12ab, got 34cd"
    assert last_error("Nothing. More\nlines") == first_line("Nothing. More\nlines") == "Nothing. More"
