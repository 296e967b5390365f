"""The Ray Serve application: its deployments and how they reach each other. Called by the command line.

gateway (ingress) → engine → worker-0, worker-1, ... (or one deployment for each function).
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.api import RunTarget
from ray.serve.config import AutoscalingConfig, HTTPOptions, ProxyLocation
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import HTTPOptionsSchema, LoggingConfig, ServeApplicationSchema, ServeDeploySchema

from moeless.core.errors import ConfigError, MoelessError
from moeless.core.expert import FunctionId
from moeless.core.routing_table import LOCAL_WORKER, InstanceShare, RoutingTable, spread_evenly
from moeless.deployments.gateway import ENGINE, GATEWAY, gateway_deployment
from moeless.deployments.ray_session import check_before_start, first_line, last_error, start_ray
from moeless.deployments.run_secrets import RunSecrets
from moeless.deployments.runtime import STARTING_RAY, STOPPING, DeferredReplica
from moeless.deployments.settings import MAX_ISOLATED_FUNCTIONS, ServeSettings
from moeless.deployments.start_failures import forget_failures, wait_until_running
from moeless.packages.cache import cache_dir
from moeless.packages.manifest import Manifest, read_manifest

logger = logging.getLogger(__name__)

IMPORT_PATH = "moeless.deployments.application:build_application"
_ENGINE_CLASS = "moeless.deployments.engine:EngineDeployment"
_WORKER_CLASS = "moeless.deployments.worker:WorkerDeployment"
_FUNCTION_CLASS = "moeless.deployments.worker:FunctionDeployment"
_MANY_CALLS = 100_000
"""Calls that an engine or gateway may have under way: admission is the engine's own queue, not Serve's."""
_LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)
_DRAIN_POLL_S = 0.1
"""Interval at which a stopping replica checks whether its requests have ended; it waits at least this long."""
_STOP_TIMEOUT_S = 5.0
"""For the engine to end the requests that are running."""
_CPU_SHARE = 0.001
"""CPUs that a deployment books with Ray. Threads are shared out by ServeSettings; booking whole CPUs would keep a
small machine from running the parts side by side."""


def build_application(settings: dict[str, Any]) -> Application:
    """The application of one model, from its settings as a plain dict (settings.ServeSettings).

    This is the import path of a declarative Serve config, `moeless.deployments.application:build_application`, with
    the settings for its `args`. Another path, or other settings, restart a deployed application.

    Raises: ConfigError for settings that cannot be, or if `isolation: function` would deploy too many functions.
    """
    checked = ServeSettings.from_dict(settings)
    return _application(read_manifest(Path(checked.packed_path)), checked)


def serve_config(settings: ServeSettings) -> ServeDeploySchema:
    """The declarative config that deploys this application, and no other, on a cluster."""
    return ServeDeploySchema(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptionsSchema(host=settings.host, port=settings.port),
        applications=[
            ServeApplicationSchema(
                name=settings.app_name,
                route_prefix=settings.route_prefix,
                import_path=IMPORT_PATH,
                args=settings.to_dict(),
            )
        ],
    )


def _application(manifest: Manifest, settings: ServeSettings) -> Application:
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
            graceful_shutdown_wait_loop_s=_DRAIN_POLL_S,
            logging_config=_LOGGING,
            health_check_period_s=2,
            ray_actor_options=_resources(settings),
        )
        .bind(_ENGINE_CLASS, settings, workers)
    )
    gateway = gateway_deployment(settings)
    application: Application = gateway.options(
        name=GATEWAY,
        num_replicas=1,
        max_ongoing_requests=_MANY_CALLS,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=_DRAIN_POLL_S,
        logging_config=_LOGGING,
        ray_actor_options={"num_cpus": _CPU_SHARE},
    ).bind(engine)
    return application


def initial_table(manifest: Manifest, settings: ServeSettings) -> RoutingTable:
    """The routing table that a run begins with: every function once.

    Spread evenly over the workers, in the engine if there are none, or each in a deployment of its own.
    """
    if settings.isolation == "function":
        instances = {
            FunctionId(entry.layer, entry.expert): (InstanceShare(entry.name),) for entry in manifest.functions
        }
        return RoutingTable(version=1, instances=instances)
    return spread_evenly(
        num_layers=manifest.num_moe_layers,
        num_experts=manifest.num_experts,
        workers=settings.worker_names or (LOCAL_WORKER,),
    )


def _worker_deployments(manifest: Manifest, settings: ServeSettings) -> dict[str, Any]:
    """One deployment with one replica for each worker: then the plan, not Serve, says which worker leaves."""
    table = initial_table(manifest, settings)
    return {
        name: _deployment()
        .options(
            name=name,
            num_replicas=1,
            graceful_shutdown_timeout_s=5,
            graceful_shutdown_wait_loop_s=_DRAIN_POLL_S,
            logging_config=_LOGGING,
            health_check_period_s=2,
            ray_actor_options=_resources(settings),
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
            graceful_shutdown_wait_loop_s=_DRAIN_POLL_S,
            logging_config=_LOGGING,
            autoscaling_config=AutoscalingConfig(
                min_replicas=0,
                initial_replicas=0,
                max_replicas=settings.functions.max_replicas,
                target_ongoing_requests=1,
                upscale_delay_s=0.5,
                downscale_delay_s=settings.functions.idle_s,
                metrics_interval_s=0.5,
                look_back_period_s=2.0,
            ),
            ray_actor_options=_resources(settings),
        )
        .bind(_FUNCTION_CLASS, settings, entry.name)
        for entry in manifest.functions
    }


def _deployment() -> Any:
    # serve.deployment is annotated as a decorator factory only
    return serve.deployment(DeferredReplica)


def _resources(settings: ServeSettings) -> dict[str, float]:
    resources = {"num_cpus": _CPU_SHARE}
    if settings.device == "cuda":
        resources["num_gpus"] = settings.gpu_share
    return resources


def _share_gpus(manifest: Manifest, settings: ServeSettings) -> ServeSettings:
    """Let the processes of a run share GPUs where there are fewer of them. Raises ConfigError if there is none."""
    if settings.device != "cuda":
        return settings
    by_function = settings.isolation == "function"
    max_processes = len(manifest.functions) * settings.functions.max_replicas if by_function else settings.num_workers
    num_gpus = float(ray.cluster_resources().get("GPU", 0.0))
    if num_gpus < 1:
        raise ConfigError(f"device cuda: {max_processes + 1} processes need at least one GPU, Ray sees {num_gpus:g}")
    return replace(settings, gpu_share=min(1.0, math.floor(num_gpus / (max_processes + 1) * 1000) / 1000))


@contextmanager
def running(
    manifest: Manifest,
    settings: ServeSettings,
    run_secrets: RunSecrets,
    *,
    ray_address: str | None = None,
    on_phase: Callable[[str], None] = lambda _: None,
    on_logs: Callable[[Path], None] = lambda _: None,
    on_failure: Callable[[MoelessError], None] = lambda _: None,
) -> Iterator[DeploymentHandle[Any]]:
    """Run the application until the block is left; nothing of it is left running then.

    Args:
        run_secrets: for every process of the run; not used where `settings` names a file of them.
        ray_address: a cluster to join; None starts Ray on this machine, and stops it at the end.
        on_phase: called with what begins now, in a few words; STOPPING is the last.
        on_logs: called with the folder of Ray's logs, once Ray runs.
        on_failure: called with what is raised then, before Ray is stopped, which takes seconds.
    Yields: the engine's handle, once every deployment runs.
    Raises: MoelessError if a deployment does not start, with the reason; ConfigError if the application's name is
        taken on the cluster, or the port on this machine.
    """
    if ray_address is None:
        _check_port(settings)
    check_before_start(ray_address)
    is_deployed = is_running = False
    secrets_in_place = ExitStack()
    try:
        settings = secrets_in_place.enter_context(_secrets_in_place(settings, run_secrets, ray_address))
        on_phase(STARTING_RAY)
        logs = start_ray(ray_address)
        if logs is not None:
            on_logs(logs)
        settings = _share_gpus(manifest, settings)
        on_phase("starting Ray Serve")
        try:
            serve.start(
                proxy_location=ProxyLocation.HeadOnly,
                http_options=HTTPOptions(host=settings.host, port=settings.port),
                logging_config=_LOGGING,
            )
            if settings.app_name in serve.status().applications:
                raise ConfigError(f"app-name must be new on this cluster, {settings.app_name!r} is deployed already")
            on_phase("starting engine, workers and gateway")
            is_deployed = True
            forget_failures(settings.app_name)
            target = RunTarget(
                build_application(settings.to_dict()), name=settings.app_name, route_prefix=settings.route_prefix
            )
            serve.run_many([target], wait_for_applications_running=False)
            wait_until_running(settings.app_name)
            is_running = True
        except MoelessError as error:
            on_failure(error)
            raise
        except (RuntimeError, TimeoutError, RayError) as error:
            failure = MoelessError(f"the application did not start: {last_error(str(error))}")
            on_failure(failure)
            raise failure from error
        yield serve.get_deployment_handle(ENGINE, app_name=settings.app_name)
    finally:
        with secrets_in_place:  # until the end, also if one of these fails
            on_phase(STOPPING)
            if ray.is_initialized():
                if is_running:
                    _end_requests(settings.app_name)
                if is_running or (is_deployed and ray_address is not None):
                    serve.delete(settings.app_name)  # lets each replica send what it still has to send
                if ray_address is None:
                    serve.shutdown()  # on a cluster, others may have applications
            ray.shutdown()


@contextmanager
def _secrets_in_place(
    settings: ServeSettings, run_secrets: RunSecrets, ray_address: str | None
) -> Iterator[ServeSettings]:
    """Put the secrets where every process of the run finds them: a file on a cluster, else the environment.

    Yields: the settings, which name the file; it is deleted at the end.
    """
    if settings.secrets_file is not None:
        yield settings
    elif ray_address is None:
        os.environ.update(run_secrets.to_environment())  # Ray's processes inherit it
        yield settings
    else:
        path = _write_secrets(run_secrets, settings.app_name)
        try:
            yield replace(settings, secrets_file=str(path))
        finally:
            path.unlink(missing_ok=True)


def _write_secrets(run_secrets: RunSecrets, app_name: str) -> Path:
    """A file for the processes on all nodes, in the cache that they share."""
    folder = cache_dir() / "runs"
    path = folder / f"{quote(app_name, safe='')}-{secrets.token_hex(8)}.json"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        run_secrets.write(path)
    except OSError as error:
        raise ConfigError(
            f"MOELESS_CACHE must be a folder to write the run's secrets to, for every node to read, got {folder}: "
            f"{error.strerror}; or set --secrets-file"
        ) from error
    return path


def _end_requests(app_name: str) -> None:
    """End what is generated with an error, while gateway and proxy still run: each stream gets its error event."""
    try:
        serve.get_deployment_handle(ENGINE, app_name=app_name).stop.remote().result(timeout_s=_STOP_TIMEOUT_S)
    except (RayError, RayServeException, TimeoutError) as error:
        logger.warning("engine did not end its requests reason=%s", first_line(str(error)))


def _check_port(settings: ServeSettings) -> None:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            where = f"{settings.host} port {settings.port}"
            raise ConfigError(f"host and port must be free to listen on, got {where}: {error.strerror}") from error
