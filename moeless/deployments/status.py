"""State of an engine's workers and functions: the figures behind GET /metrics and GET /v1/experts.

Called by deployments/engine.py. Workers are asked for theirs; where functions are deployments of their own, Serve is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from moeless.core.expert import FunctionId
from moeless.core.generation import EngineStats, FunctionStatus, PredictionStatus, WorkerStatus
from moeless.core.routing_table import LOCAL_WORKER
from moeless.deployments.settings import ServeSettings
from moeless.deployments.worker import WorkerReport
from moeless.deployments.worker_connections import WorkerConnections
from moeless.dispatch.dispatcher import Dispatcher
from moeless.engine.protocol import EngineCounters
from moeless.packages.manifest import Manifest
from moeless.packages.tensor_files import dtype_of_name

logger = logging.getLogger(__name__)

_REPORT_TIMEOUT_S = 2.0


class EngineStatus:
    """Args:
    workers: worker (or function) name → its Serve handle.
    """

    def __init__(
        self,
        settings: ServeSettings,
        manifest: Manifest,
        dispatcher: Dispatcher,
        connections: WorkerConnections,
        workers: Mapping[str, DeploymentHandle[Any]],
    ) -> None:
        self._settings = settings
        self._manifest = manifest
        self._dispatcher = dispatcher
        self._connections = connections
        self._workers = workers
        self._pool = dispatcher.local.pool
        growth = self._pool.dtype.itemsize / dtype_of_name(manifest.dtype).itemsize
        self._isolated_bytes = {entry.name: int(entry.bytes * growth) for entry in manifest.functions}
        self._reports: tuple[float, dict[str, WorkerReport]] = (0.0, {})

    async def stats(self, counters: EngineCounters, predictions: list[PredictionStatus]) -> EngineStats:
        """`counters` and `predictions`: the engine's own."""
        metrics, local = self._dispatcher.metrics, self._pool.stats()
        reports, replicas = await self._worker_reports(), await self._isolated_replicas()
        return EngineStats(
            requests_running=counters.requests_running,
            requests_waiting=counters.requests_waiting,
            kv_cache_usage=counters.kv_cache_usage,
            cold_starts=local.cold_starts + sum(report.cold_starts for report in reports.values()),
            evictions=local.evictions + sum(report.evictions for report in reports.values()),
            warm_starts=local.warm_starts + sum(report.warm_starts for report in reports.values()),
            dispatch_seconds_sum=metrics.layer_seconds_sum,
            dispatch_seconds_count=sum(metrics.layer_seconds_counts),
            dispatch_seconds_buckets=metrics.cumulative_buckets(),
            dispatch_retries=metrics.retries,
            dispatch_fallbacks=metrics.fallbacks,
            tokens_per_worker=dict(metrics.tokens_per_worker),
            workers=self._worker_statuses(reports, replicas),
            predictions=predictions,
        )

    async def functions(self) -> list[FunctionStatus]:
        """One for each expert function of the model, in order."""
        reports, replicas = await self._worker_reports(), await self._isolated_replicas()
        return self._function_statuses(reports, replicas)

    async def _worker_reports(self) -> dict[str, WorkerReport]:
        """The workers' own reports, at most half a second old. A function at zero replicas is not woken."""
        taken_s, reports = self._reports
        if self._settings.isolation == "function" or time.monotonic() - taken_s < 0.5:
            return reports

        async def ask(name: str, handle: DeploymentHandle[Any]) -> WorkerReport | None:
            try:
                report = await asyncio.wait_for(_response(handle.report.remote()), _REPORT_TIMEOUT_S)
            except (RayError, RayServeException, TimeoutError) as error:
                logger.warning("no report worker=%s reason=%s", name, error)
                return None
            return msgspec.json.decode(report, type=WorkerReport)

        found = await asyncio.gather(*(ask(name, handle) for name, handle in self._workers.items()))
        reports = {report.worker: report for report in found if report is not None}
        self._reports = (time.monotonic(), reports)
        return reports

    async def _isolated_replicas(self) -> Mapping[str, int]:
        """`isolation: function`: running replicas of each function, as Serve counts them; else empty."""
        if self._settings.isolation != "function":
            return {}
        return await asyncio.to_thread(_running_replicas, self._settings.app_name)

    def _worker_statuses(self, reports: Mapping[str, WorkerReport], replicas: Mapping[str, int]) -> list[WorkerStatus]:
        tokens = self._dispatcher.metrics.tokens_per_worker
        local = self._pool.stats()
        statuses = [
            WorkerStatus(
                name=LOCAL_WORKER,
                alive=True,
                transport="in-process",
                instances=local.num_instances,
                resident_bytes=local.resident_bytes,
                tokens_served=tokens.get(LOCAL_WORKER, 0),
            )
        ]
        for name in self._workers:
            report, channel = reports.get(name), self._dispatcher.channels.get(name)
            own = replicas.get(name, 0)
            instances, resident_bytes = own, own * self._isolated_bytes.get(name, 0)
            if report is not None:
                instances, resident_bytes = len(report.states), report.resident_bytes
            statuses.append(
                WorkerStatus(
                    name=name,
                    alive=own > 0 if self._settings.isolation == "function" else self._connections.is_connected(name),
                    transport="none" if channel is None else channel.kind,
                    instances=instances,
                    resident_bytes=resident_bytes,
                    tokens_served=tokens.get(name, 0),
                )
            )
        return statuses

    def _function_statuses(
        self, reports: Mapping[str, WorkerReport], replicas: Mapping[str, int]
    ) -> list[FunctionStatus]:
        """`replicas`: of functions that are deployments of their own, as Serve counts them."""
        tokens: Counter[str] = Counter()
        for layer, tokens_E in enumerate(self._dispatcher.metrics.remote_tokens_LE):
            local_E = self._pool.tokens_served(layer)
            for expert, count in enumerate((tokens_E + local_E).tolist()):
                tokens[str(FunctionId(layer, expert))] = count
        states: dict[str, list[tuple[str, str]]] = {}
        num_bytes: Counter[str] = Counter()
        for function, state in self._pool.states().items():
            states.setdefault(str(function), []).append((LOCAL_WORKER, state.value))
            num_bytes[str(function)] += self._pool.instance_bytes(function.layer)
        for name, report in reports.items():
            for function_name, remote_state in report.states.items():
                states.setdefault(function_name, []).append((name, remote_state))
                num_bytes[function_name] += report.instance_bytes[function_name]
        rows = []
        for entry in self._manifest.functions:
            own = replicas.get(entry.name, 0)
            found = [*states.get(entry.name, []), *[(entry.name, "warm")] * own]
            num_bytes[entry.name] += own * self._isolated_bytes[entry.name]
            kinds = {state for _, state in found}
            shown = next((s for s in ("warm", "draining", "starting") if s in kinds), "cold")
            rows.append(
                FunctionStatus(
                    name=entry.name,
                    layer=entry.layer,
                    expert=entry.expert,
                    state=shown,
                    replicas=len(found),
                    workers=sorted({worker for worker, _ in found}),
                    bytes=num_bytes[entry.name],
                    tokens_served=tokens[entry.name],
                )
            )
        return rows


def _running_replicas(app_name: str) -> dict[str, int]:
    """Deployment → running replicas. Asks Serve's controller and waits."""
    application = serve.status().applications.get(app_name)
    if application is None:  # it is being replaced
        return {}
    return {
        name: sum(count for state, count in deployment.replica_states.items() if state == "RUNNING")
        for name, deployment in application.deployments.items()
    }


async def _response(response: DeploymentResponse[Any] | DeploymentResponseGenerator[Any]) -> bytes:
    answer: Any = response
    return bytes(await answer)
