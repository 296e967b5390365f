"""Settings that `moeless serve` refuses, and its division of the cores."""

from __future__ import annotations

import json
import math

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
from moeless.deployments.settings import PredictionSettings, ServeSettings
from moeless.engine.config import EngineConfig
from moeless.gateway.config import GatewayConfig


def settings(**changes: object) -> ServeSettings:
    return ServeSettings(packed_path="/p", model_id="m", **changes)  # type: ignore[arg-type]


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
        ("gpu_share", 1.5, "gpu_share"),
        ("keep_alive_s", 0.0, "keep_alive_s"),
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


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("engine", "max_waiting", -1),
        ("engine", "max_model_len", 0),
        ("engine", "max_running", 0),
        ("dispatch", "call_timeout_s", 0.0),
        ("functions", "idle_s", -1.0),
        ("functions", "max_replicas", 0),
        ("prediction", "distance", 0),
        ("prediction", "max_share", 2.0),
        ("gateway", "max_n", 0),
        ("gateway", "retry_after_s", math.nan),
        ("dispatch", "call_timeout_s", math.nan),
        ("dispatch", "call_timeout_per_row_s", math.inf),
        ("functions", "idle_s", math.nan),
    ],
)
def test_a_part_is_checked_by_the_component_it_belongs_to(part: str, field: str, value: object) -> None:
    tree = settings().to_dict()
    tree[part][field] = value
    with pytest.raises(ConfigError, match=f"{field} must be .*{value}"):
        ServeSettings.from_dict(tree)


def test_settings_survive_the_way_through_json() -> None:
    asked = settings(
        num_workers=2,
        cores=(3, 4),
        engine=EngineConfig(max_running=7),
        gateway=GatewayConfig(cors_allow_origins=("https://a.example",), max_n=3),
        prediction=PredictionSettings(path="/f", distance=2),
    )
    assert ServeSettings.from_dict(json.loads(json.dumps(asked.to_dict()))) == asked


def test_parts_that_are_left_out_have_their_defaults() -> None:
    tree = {"packed_path": "/p", "model_id": "m", "engine": {"max_running": 7}}
    assert ServeSettings.from_dict(tree) == settings(engine=EngineConfig(max_running=7))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"replicas": 2}, "settings.replicas is unknown"),
        ({"engine": {"page": 2}}, "settings.engine.page is unknown"),
        ({"engine": {"max_running": "7"}}, r"Expected `int`, got `str` - at `\$.engine.max_running`"),
        ({"port": 8000.5}, r"Expected `int`, got `float` - at `\$.port`"),
        ({"max_running": 7}, "settings.max_running is no longer read; use engine.max_running instead"),
        ({"run_secret": "x"}, "settings.run_secret is no longer read; use the environment's MOELESS_RUN_SECRET"),
        ({"gateway": {"api_keys": ["sk-1"]}}, "gateway.api_keys must be empty here: keys come from MOELESS_API_KEY"),
    ],
)
def test_a_tree_with_a_wrong_name_or_type_is_refused_by_its_path(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ServeSettings.from_dict({"packed_path": "/p", "model_id": "m", **tree})
    assert "sk-1" not in str(caught.value)


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
