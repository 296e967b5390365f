"""What `moeless serve` refuses, and how it shares the cores out."""

from __future__ import annotations

import pytest

from moeless.core.errors import (
    ConfigError,
    ContextLengthError,
    EngineStoppedError,
    QueueFullError,
    RecordingError,
    RequestError,
)
from moeless.deployments.rpc import SubmitReply
from moeless.deployments.settings import ServeSettings


def settings(**changes: object) -> ServeSettings:
    return ServeSettings(packed_path="/p", model_id="m", run_secret="secret", **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("isolation", "process", "isolation"),
        ("dtype", "int8", "dtype"),
        ("num_workers", -1, "workers"),
        ("port", 70000, "port"),
        ("port", 0, "port"),
        ("device", "cuda:1", "device"),
        ("num_threads", 0, "num_threads"),
        ("max_waiting", -1, "max_waiting"),
        ("max_model_len", 0, "max_model_len"),
        ("max_running", 0, "max_running"),
        ("call_timeout_s", 0.0, "call_timeout_s"),
        ("function_idle_s", -1.0, "function_idle_s"),
    ],
)
def test_a_value_out_of_range_is_refused_by_field_and_value(field: str, value: object, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        settings(**{field: value})
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("host", "asked", "is_allowed"),
    [
        ("127.0.0.1", None, True),
        ("127.9.9.9", None, True),
        ("::1", None, True),
        ("localhost", None, True),
        ("0.0.0.0", None, False),
        ("::", None, False),
        ("10.0.0.7", None, False),
        ("localhost.example.org", None, False),
        ("0.0.0.0", True, True),
        ("127.0.0.1", False, False),
    ],
)
def test_recording_is_allowed_where_only_this_machine_can_call_or_the_operator_says_so(
    host: str, asked: bool | None, is_allowed: bool
) -> None:
    assert settings(host=host, allow_recording=asked).recording_is_allowed is is_allowed


def test_keys_and_run_secret_are_not_shown() -> None:
    shown = repr(settings(api_keys=("sk-very-private",)))
    assert "secret" not in shown
    assert "sk-very-private" not in shown


@pytest.mark.parametrize("cores", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("num_workers", [0, 1, 2, 7])
def test_threads_times_processes_stay_within_the_cores(
    cores: int, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})  # what a process that is bound already would find
    asked = settings(num_workers=num_workers, cores=tuple(range(10, 10 + cores)))
    assert asked.engine_threads >= 1
    assert asked.worker_threads >= 1
    if cores > num_workers:
        assert asked.engine_threads + num_workers * asked.worker_threads <= cores
    shares = [asked.engine_cores, *(asked.worker_cores(name) for name in asked.worker_names)]
    if None in shares:
        assert set(shares) == {None}
        assert num_workers == 0 or cores < num_workers + 1
    else:
        bound = [core for share in shares if share is not None for core in share]
        assert len(bound) == len(set(bound)), "no core belongs to two processes"
        assert asked.engine_threads == len(shares[0] or ())


@pytest.mark.parametrize("key", ["", "two words", "schlüssel", "tab\t"])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ConfigError, match="api-key") as caught:
        settings(api_keys=("fine", key))
    assert not key or key not in str(caught.value)


def test_workers_beside_isolated_functions_are_refused() -> None:
    with pytest.raises(ConfigError, match="workers"):
        settings(isolation="function", num_workers=2)


def test_cores_are_not_bound_unless_asked() -> None:
    assert settings(num_workers=1).engine_cores is None
    assert settings(num_workers=1).worker_cores("worker-0") is None


def test_a_number_of_threads_that_was_asked_for_is_used() -> None:
    asked = settings(num_threads=3, num_workers=2)
    assert (asked.engine_threads, asked.worker_threads) == (3, 3)


@pytest.mark.parametrize(
    "error",
    [
        ContextLengthError("1 and 2", param="max_tokens", code="context_length_exceeded"),
        RequestError("bad", param="prompt"),
        RecordingError("stop it first", code="recording_running"),
        QueueFullError("full", retry_after_s=7.0),
        EngineStoppedError("gone"),
    ],
)
def test_an_engines_refusal_is_the_same_error_at_the_gateway(error: Exception) -> None:
    reply = SubmitReply.of_error(error, incarnation="life")  # type: ignore[arg-type]
    with pytest.raises(type(error)) as caught:
        reply.raise_error()
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)


def test_an_accepted_request_raises_nothing() -> None:
    SubmitReply(incarnation="life").raise_error()
