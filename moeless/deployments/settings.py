"""Settings of a run of `moeless serve`: one tree, checked once and handed to every deployment. It holds no secret.

As a plain dict (`to_dict`, `from_dict`) it is the argument of Serve's declarative application.
"""

from __future__ import annotations

import ipaddress
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, Self, get_type_hints

import msgspec

from moeless.core.errors import ConfigError
from moeless.dispatch.config import DispatchConfig
from moeless.engine.config import EngineConfig
from moeless.gateway.config import GatewayConfig

Isolation = Literal["shared", "function"]
DTYPES = ("float32", "bfloat16", "float16")
MAX_ISOLATED_FUNCTIONS = 64
"""Serve's controller slows with the number of deployments: 64 cost 11 % of a core idle, 1,024 take 12 s to scale."""
_MOVED = {
    "token": "the environment's MOELESS_RUN_SECRET or secrets_file",
    "run_secret": "the environment's MOELESS_RUN_SECRET or secrets_file",
    "api_keys": "the environment's MOELESS_API_KEY or secrets_file",
    "max_model_len": "engine.max_model_len",
    "max_context_tokens": "engine.max_model_len",
    "max_running": "engine.max_running",
    "max_waiting": "engine.max_waiting",
    "max_batch_tokens": "engine.max_batch_tokens",
    "kv_cache_bytes": "engine.kv_cache_bytes",
    "cors_allow_origins": "gateway.cors_allow_origins",
    "call_timeout_s": "dispatch.call_timeout_s",
    "function_max_replicas": "functions.max_replicas",
    "function_idle_s": "functions.idle_s",
    "predictors_path": "prediction.path",
    "predict_distance": "prediction.distance",
    "predict_overhead": "prediction.max_share",
    "allow_tracing": "allow_recording",
}
"""Fields of earlier versions, and where their values belong now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionScaling:
    """Serve's scaling of the functions of `isolation: function`. Raises ConfigError for values out of range."""

    max_replicas: int = 4
    """Maximum replicas of one function."""
    idle_s: float = 60.0
    """Idle time after which a function goes to zero replicas."""

    def __post_init__(self) -> None:
        if self.max_replicas < 1:
            raise ConfigError(f"functions.max_replicas must be at least 1, got {self.max_replicas}")
        if not 0 < self.idle_s < math.inf:
            raise ConfigError(f"functions.idle_s must be above 0 seconds and finite, got {self.idle_s}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionSettings:
    """Forecasts of the load beside serving; None leaves moeless_predictors.live.LiveConfig's default."""

    path: str | None = None
    """A file of `moeless predict fit` for this model; the engine's node must see it. None: nothing is predicted."""
    distance: int | None = None
    """MoE layers ahead."""
    max_share: float | None = None
    """Maximum share of the steps' time that forecasting may take."""

    def __post_init__(self) -> None:
        if self.distance is not None and self.distance < 1:
            raise ConfigError(f"prediction.distance must be at least 1, got {self.distance}")
        if self.max_share is not None and not 0 < self.max_share <= 1:
            raise ConfigError(f"prediction.max_share must be above 0 and at most 1, got {self.max_share}")

    def overrides(self) -> dict[str, Any]:
        """Values that differ from LiveConfig's defaults."""
        values = {"distance": self.distance, "max_share": self.max_share}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeSettings:
    """Raises ConfigError for a value out of range."""

    packed_path: str
    """The packed folder; every node must see it under this path."""
    model_id: str
    secrets_file: str | None = None
    """Holds the run secret and the API keys (run_secrets.py); every node must see it. None: the environment does."""
    num_workers: int = 0
    """0 keeps the experts in the engine's process."""
    isolation: Isolation = "shared"
    dtype: str | None = None
    """None: the checkpoint's own."""
    device: str = "cpu"
    host: str = "127.0.0.1"
    port: int = 8000
    worker_memory_bytes: int | None = None
    """Maximum bytes of instances on one worker (or in the engine's process when there is none). None: no limit."""
    num_threads: int | None = None
    """torch threads of the engine and of each worker; None shares the machine's cores out."""
    cores: tuple[int, ...] = ()
    """Cores to give the engine and each worker a share of, for workers that all run on this machine's CPU. Empty:
    nothing is bound, and each process counts the cores it finds."""
    gpu_share: float = 1.0
    """GPUs that each process books: less than one where there are fewer GPUs than processes."""
    allow_recording: bool | None = None
    """Whether clients may record what the engine routes, for all its requests. None: where only this machine can call,
    that is, where `host` is a loopback address."""
    keep_alive_s: float = 30.0
    """Time that the engine keeps a function that it started because no worker could compute it."""
    app_name: str = "moeless"
    """Name of the Serve application; on a cluster, no other may have it."""
    route_prefix: str = "/"
    """Prefix of the API's paths; applications of one cluster must differ in it."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    functions: FunctionScaling = field(default_factory=FunctionScaling)
    prediction: PredictionSettings = field(default_factory=PredictionSettings)

    def __post_init__(self) -> None:
        if self.isolation not in ("shared", "function"):
            raise ConfigError(f"isolation must be shared or function, got {self.isolation!r}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not self.app_name:
            raise ConfigError("app-name must not be empty")
        if not self.route_prefix.startswith("/"):
            raise ConfigError(f"route-prefix must begin with /, got {self.route_prefix!r}")
        if self.num_workers < 0:
            raise ConfigError(f"workers must be at least 0, got {self.num_workers}")
        if self.num_workers and self.isolation == "function":
            raise ConfigError(f"workers must be 0 with isolation function, got {self.num_workers}")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device must be cpu or cuda, got {self.device!r}")
        if not 0 < self.port < 65536:
            raise ConfigError(f"port must be from 1 to 65535, got {self.port}")
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"num_threads must be at least 1, got {self.num_threads}")
        if not 0 < self.gpu_share <= 1:
            raise ConfigError(f"gpu_share must be above 0 and at most 1, got {self.gpu_share}")
        if not 0 < self.keep_alive_s < math.inf:
            raise ConfigError(f"keep_alive_s must be above 0 seconds and finite, got {self.keep_alive_s}")
        if self.gateway.api_keys:
            raise ConfigError("gateway.api_keys must be empty here: keys come from MOELESS_API_KEY or secrets_file")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises ConfigError for an unknown field, a wrong type or a value out of range, by the field's path."""
        _check_names(cls, values, "")
        try:
            return msgspec.convert(dict(values), type=cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"settings: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as JSON-able values: later versions' defaults must not change a deployed application."""
        tree: dict[str, Any] = msgspec.to_builtins(self)
        del tree["gateway"]["api_keys"]  # always empty
        return tree

    def gateway_config(self, api_keys: tuple[str, ...]) -> GatewayConfig:
        """The gateway's, in a process that knows the keys; behind Ray Serve's proxy."""
        return replace(
            self.gateway,
            api_keys=api_keys,
            allow_recording=self.recording_is_allowed,
            request_id_sent_by_proxy=True,
        )

    @property
    def recording_is_allowed(self) -> bool:
        """Whether the gateway has the endpoints that record traces."""
        return _is_loopback(self.host) if self.allow_recording is None else self.allow_recording

    @property
    def worker_names(self) -> tuple[str, ...]:
        return tuple(f"worker-{index}" for index in range(self.num_workers))

    @property
    def engine_threads(self) -> int:
        """torch threads of the engine's compute thread.

        Without cores of its own beside remote experts it takes one: engine and workers compute in turns, and a
        spinning OpenMP pool would take the workers' cores from them. With its experts in process it leaves one
        core to the gateway.
        """
        if self.num_threads is not None:
            return self.num_threads
        if self.num_workers == 0 and self.isolation == "shared":
            return max(1, len(self._cores()) - 1)
        return max(1, len(self.engine_cores or ()))

    @property
    def worker_threads(self) -> int:
        """torch threads of one worker."""
        return self.num_threads or max(1, len(self._cores()) // max(1, self.num_workers + 1))

    @property
    def engine_cores(self) -> frozenset[int] | None:
        """The cores that the engine is bound to; None leaves it all of them."""
        return self._share(0)

    def worker_cores(self, name: str) -> frozenset[int] | None:
        """The cores that the worker `name` is bound to; None where there are not enough to give each its own."""
        return self._share(self.worker_names.index(name) + 1)

    def _share(self, index: int) -> frozenset[int] | None:
        """Equal parts of this machine's cores for the engine (0) and each worker."""
        cores = self._cores()
        size = len(cores) // (self.num_workers + 1)
        if not self.cores or self.num_workers == 0 or size == 0:
            return None
        return frozenset(cores[index * size : (index + 1) * size])

    def _cores(self) -> tuple[int, ...]:
        return self.cores or tuple(sorted(os.sched_getaffinity(0)))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def _check_names(kind: type[Any], values: Mapping[str, Any], path: str) -> None:
    """Raise ConfigError for a name that `kind`, a dataclass, does not have; nested ones too."""
    types = get_type_hints(kind)
    known = {entry.name for entry in fields(kind)}
    for name, value in values.items():
        if not path and name in _MOVED:
            raise ConfigError(f"settings.{name} is no longer read; use {_MOVED[name]} instead")
        if name not in known:
            raise ConfigError(f"settings.{path}{name} is unknown; known are {', '.join(sorted(known))}")
        if is_dataclass(types[name]) and isinstance(value, Mapping):
            _check_names(types[name], value, f"{path}{name}.")
