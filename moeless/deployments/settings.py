"""Settings of a run of `moeless serve`, checked once and handed to every deployment."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from typing import Literal

from moeless.core.errors import ConfigError

Isolation = Literal["shared", "function"]
DTYPES = ("float32", "bfloat16", "float16")
MAX_ISOLATED_FUNCTIONS = 64
"""Serve's controller slows with the number of deployments: 64 cost 11 % of a core idle, 1,024 take 12 s to scale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeSettings:
    """Raises ConfigError for a value out of range."""

    packed_path: str
    """The packed folder; every node must see it under this path."""
    model_id: str
    run_secret: str = field(repr=False)
    """Shared by the processes of a run: both ends of the data plane and of the token channel must prove it."""
    num_workers: int = 0
    """0 keeps the experts in the engine's process."""
    isolation: Isolation = "shared"
    dtype: str | None = None
    """None: the checkpoint's own."""
    device: str = "cpu"
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_model_len: int | None = None
    max_running: int = 64
    max_waiting: int = 256
    max_batch_tokens: int = 512
    kv_cache_bytes: int | None = None
    worker_memory_bytes: int | None = None
    """Most bytes of instances on one worker (or in the engine's process when there is none). None: no limit."""
    num_threads: int | None = None
    """torch threads of the engine and of each worker; None shares the machine's cores out."""
    cores: tuple[int, ...] = ()
    """Cores to give the engine and each worker a share of, for workers that all run on this machine's CPU. Empty:
    nothing is bound, and each process counts the cores it finds."""
    gpu_share: float = 1.0
    """GPUs that each process books: less than one where there are fewer GPUs than processes."""
    cors_allow_origins: tuple[str, ...] = ()
    predictors_path: str | None = None
    """A file of `moeless predict fit` for this model; the engine's node must see it. None: nothing is predicted."""
    predict_distance: int = 1
    """How many MoE layers ahead."""
    predict_overhead: float = 0.015
    """Most of the steps' time that forecasting may take."""
    allow_recording: bool | None = None
    """Whether clients may record what the engine routes, for all its requests. None: where only this machine can call,
    that is, where `host` is a loopback address."""
    call_timeout_s: float = 5.0
    keep_alive_s: float = 30.0
    """How long the engine keeps a function that it started because no worker could compute it."""
    function_max_replicas: int = 4
    """`isolation: function`: most replicas of one function."""
    function_idle_s: float = 60.0
    """`isolation: function`: idle time after which a function goes to zero replicas."""
    app_name: str = "moeless"
    """Name of the Serve application; on a cluster, no other may have it."""
    route_prefix: str = "/"
    """Where the API begins; applications of one cluster must differ in it."""

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
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError("api-key must be printable ASCII without spaces and not empty")
        if self.max_waiting < 0:
            raise ConfigError(f"max_waiting must be at least 0, got {self.max_waiting}")
        for name in (
            "max_running",
            "max_batch_tokens",
            "function_max_replicas",
            "num_threads",
            "max_model_len",
            "predict_distance",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not 0 < self.predict_overhead <= 1:
            raise ConfigError(f"predict_overhead must be above 0 and at most 1, got {self.predict_overhead}")
        for name in ("call_timeout_s", "keep_alive_s", "function_idle_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0 seconds, got {getattr(self, name)}")

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
