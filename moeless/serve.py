"""The Ray Serve application: which deployments there are and how they know each other. Called by the command line.

gateway (ingress) → engine → worker-0, worker-1, ... (or one deployment for each function).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions, ProxyLocation
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from moeless.core.errors import ConfigError, MoelessError
from moeless.deployments.deferred import DeferredReplica
from moeless.deployments.gateway import ENGINE, GATEWAY, gateway_deployment
from moeless.deployments.plan import initial_table
from moeless.deployments.settings import MAX_ISOLATED_FUNCTIONS, ServeSettings
from moeless.packages.manifest import Manifest

_ENGINE_CLASS = "moeless.deployments.engine:EngineDeployment"
_WORKER_CLASS = "moeless.deployments.worker:WorkerDeployment"
_FUNCTION_CLASS = "moeless.deployments.worker:FunctionDeployment"
_MANY_CALLS = 100_000
"""Calls that an engine or gateway may have under way: admission is the engine's own queue, not Serve's."""
_LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)
_CPU_SHARE = 0.001
"""CPUs that a deployment books with Ray. Threads are shared out by ServeSettings; booking whole CPUs would keep a
small machine from running the parts side by side."""


def build_application(manifest: Manifest, settings: ServeSettings) -> Any:
    """The application of one model. Raises ConfigError if `isolation: function` would deploy too many functions."""
    if settings.isolation == "function":
        workers = _function_deployments(manifest, settings)
    else:
        workers = _worker_deployments(manifest, settings)
    engine = (
        _deployment()
        .options(
            name=ENGINE,
            num_replicas=1,
            max_ongoing_requests=_MANY_CALLS,
            graceful_shutdown_timeout_s=5,
            logging_config=_LOGGING,
            health_check_period_s=2,
            ray_actor_options=_resources(settings, holds_model=True),
        )
        .bind(_ENGINE_CLASS, settings, workers)
    )
    gateway = gateway_deployment(settings)
    return gateway.options(
        name=GATEWAY,
        num_replicas=1,
        max_ongoing_requests=_MANY_CALLS,
        graceful_shutdown_timeout_s=5,
        logging_config=_LOGGING,
        ray_actor_options={"num_cpus": _CPU_SHARE},
    ).bind(engine)


def _worker_deployments(manifest: Manifest, settings: ServeSettings) -> dict[str, Any]:
    """One deployment with one replica for each worker: then the plan, not Serve, says which worker leaves."""
    table = initial_table(manifest, settings)
    return {
        name: _deployment()
        .options(
            name=name,
            num_replicas=1,
            graceful_shutdown_timeout_s=5,
            logging_config=_LOGGING,
            health_check_period_s=2,
            ray_actor_options=_resources(settings, holds_model=True),
        )
        .bind(
            _WORKER_CLASS,
            settings,
            name,
            [str(f) for f, shares in table.instances.items() if any(i.worker == name for i in shares)],
        )
        for name in settings.worker_names
    }


def _function_deployments(manifest: Manifest, settings: ServeSettings) -> dict[str, Any]:
    if len(manifest.functions) > MAX_ISOLATED_FUNCTIONS:
        raise ConfigError(
            f"isolation function takes at most {MAX_ISOLATED_FUNCTIONS} functions, {manifest.model_id} has "
            f"{len(manifest.functions)}; use isolation shared"
        )
    return {
        entry.name: _deployment()
        .options(
            name=entry.name,
            max_ongoing_requests=2,
            graceful_shutdown_timeout_s=5,
            logging_config=_LOGGING,
            autoscaling_config=AutoscalingConfig(
                min_replicas=0,
                initial_replicas=0,
                max_replicas=settings.function_max_replicas,
                target_ongoing_requests=1,
                upscale_delay_s=0.5,
                downscale_delay_s=settings.function_idle_s,
                metrics_interval_s=0.5,
                look_back_period_s=2.0,
            ),
            ray_actor_options=_resources(settings, holds_model=False),
        )
        .bind(_FUNCTION_CLASS, settings, entry.name)
        for entry in manifest.functions
    }


def _deployment() -> Any:
    # serve.deployment is annotated as a decorator factory only
    return serve.deployment(DeferredReplica)


def _resources(settings: ServeSettings, *, holds_model: bool) -> dict[str, float]:
    resources: dict[str, float] = {"num_cpus": _CPU_SHARE}
    if settings.device.startswith("cuda"):
        resources["num_gpus"] = 1.0 if holds_model else 0.05
    return resources


@contextmanager
def running(
    manifest: Manifest,
    settings: ServeSettings,
    *,
    ray_address: str | None = None,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> Iterator[DeploymentHandle[Any]]:
    """Run the application until the block is left; nothing is left running then.

    Args:
        ray_address: a cluster to join; None starts Ray on this machine.
        on_phase: told what begins now, in a few words.
    Yields: the engine's handle, once every deployment runs.
    Raises: MoelessError if a deployment does not start, with the reason.
    """
    on_phase("starting Ray")
    _start_ray(ray_address)
    try:
        on_phase("starting Ray Serve")
        serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(host=settings.host, port=settings.port),
            logging_config=_LOGGING,
        )
        on_phase("starting engine, workers and gateway")
        try:
            serve.run(build_application(manifest, settings), name=settings.app_name, route_prefix="/")
        except RuntimeError as error:
            raise MoelessError(f"the application did not start: {error}") from error
        yield serve.get_deployment_handle(ENGINE, app_name=settings.app_name)
    finally:
        serve.shutdown()
        ray.shutdown()


def _start_ray(address: str | None) -> None:
    ray.init(
        address=address or "local",
        include_dashboard=False,
        log_to_driver=address is None,
        logging_level=logging.WARNING,
        configure_logging=True,
    )
