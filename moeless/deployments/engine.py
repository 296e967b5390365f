"""The engine as a Serve deployment: backbone, dispatcher, generation thread, channels to workers and gateways."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import torch
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from moeless import __version__
from moeless.core.errors import EngineStoppedError, MoelessError, TransportError, WorkerTimeoutError
from moeless.core.generation import GenerationDelta, GenerationRequest, ModelInfo
from moeless.deployments.application import initial_table
from moeless.deployments.rpc import Pulse, SubmitReply, answer_recording
from moeless.deployments.runtime import bind_to
from moeless.deployments.settings import ServeSettings
from moeless.deployments.status import EngineStatus
from moeless.deployments.token_channel import TokenSender
from moeless.deployments.worker import MAX_ROWS
from moeless.deployments.worker_connections import WorkerConnections
from moeless.dispatch.call import CallChannel
from moeless.dispatch.channel import Channel, WorkerEndpoint
from moeless.dispatch.connect import connect
from moeless.dispatch.dispatcher import DispatchConfig
from moeless.engine.assemble import AssembledEngine, Assembly, assemble_engine
from moeless.engine.config import EngineConfig
from moeless.engine.prediction import PredictionObserver, load_live_predictor
from moeless.engine.recording_service import LocalRecordings, Recordings, trace_metadata
from moeless.packages.packed_model import PackedModel
from moeless.packages.tensor_files import dtype_of_name
from moeless.text.tokenizer import Tokenizer
from moeless_predictors.live import LiveConfig
from moeless_predictors.threads import keep_to_one_blas_thread

logger = logging.getLogger(__name__)

_ENDPOINT_TIMEOUT_S = 10.0
_GATEWAY_SILENCE_S = 30.0
"""A gateway that has not asked for the engine's pulse (each second) for this long is gone; its requests end."""

_KV_MEMORY_SHARE = 0.8
"""Of the GPU memory that is free once the backbone is loaded, times the engine's share of the GPU."""
_COPIES_SHARE = 8
"""On a GPU the engine's own copies, for functions that no worker can compute, take at most this part (an eighth) of
what all experts would."""

_Response = DeploymentResponse[Any] | DeploymentResponseGenerator[Any]


class EngineDeployment:
    """Args:
    settings: of the run.
    workers: worker (or function) name → its Serve handle.
    """

    def __init__(self, settings: ServeSettings, workers: dict[str, DeploymentHandle[Any]]) -> None:
        bind_to(settings.engine_cores)
        torch.set_num_threads(1)  # the generation thread alone computes, with its own number
        self._settings = settings
        self._workers = workers
        self._incarnation = secrets.token_hex(8)
        started_s = time.perf_counter()
        packed = PackedModel.open(settings.packed_path)
        self._manifest = packed.manifest
        by_call = settings.isolation == "function"
        assembled = assemble_engine(packed, Tokenizer.load(packed.backbone_path), _assembly(packed, settings))
        self._engine, self._dispatcher = assembled.engine, assembled.dispatcher
        if by_call:
            self._dispatcher.set_channels(
                {
                    name: CallChannel(partial(_call_function, handle), max_rows=MAX_ROWS)
                    for name, handle in workers.items()
                }
            )
        connectors = {} if by_call else self._connectors(assembled.dtype)
        self._connections = WorkerConnections(
            self._dispatcher, connectors, keep_alive_s=settings.keep_alive_s if workers else None
        )
        self._sender = TokenSender(settings.run_secret)
        self._gateway_of: dict[str, str] = {}
        self._gateway_seen_s: dict[str, float] = {}
        self._gateway_lock = threading.Lock()
        self._swept_s = time.monotonic()
        self._cancelled_early: deque[str] = deque(maxlen=1024)
        self._engine.set_on_step(self._send_step)
        self._prediction: PredictionObserver | None = None
        if settings.predictors_path is not None:
            live_config = LiveConfig(distance=settings.predict_distance, max_share=settings.predict_overhead)
            live = load_live_predictor(settings.predictors_path, live_config, packed.manifest)
            keep_to_one_blas_thread()
            self._prediction = PredictionObserver(live)
            self._engine.observers.add(self._prediction)
        self._engine.start()
        self._connections.start()
        self._model_info = self._describe(assembled, packed)
        self._status = EngineStatus(settings, packed.manifest, self._dispatcher, self._connections, workers)
        self._recordings = Recordings(
            self._engine.observers, trace_metadata(self._model_info, source=f"recorded by moeless {__version__}")
        )
        logger.info("engine started seconds=%.2f", time.perf_counter() - started_s)

    def _connectors(self, dtype: torch.dtype) -> dict[str, Callable[[], Channel]]:
        def open_channel(handle: DeploymentHandle[Any]) -> Channel:
            asked = _ServeCall(handle.endpoint.remote())
            try:
                endpoint = msgspec.json.decode(asked.result(_ENDPOINT_TIMEOUT_S), type=WorkerEndpoint)
            except WorkerTimeoutError:
                asked.cancel()
                raise
            return connect(
                endpoint,
                run_secret=self._settings.run_secret,
                engine=f"engine-{os.getpid()}",
                hidden_size=self._manifest.layers[0].layout.hidden_size,
                top_k=self._manifest.top_k,
                dtype=dtype,
                max_rows=MAX_ROWS,
                device=self._settings.device,
            )

        return {name: partial(open_channel, handle) for name, handle in self._workers.items()}

    def _describe(self, assembled: AssembledEngine, packed: PackedModel) -> ModelInfo:
        return ModelInfo(
            model_id=self._settings.model_id,
            created_unix_s=int((packed.path / "manifest.json").stat().st_mtime),
            max_context_tokens=self._engine.max_context_tokens,
            vocab_size=assembled.vocab_size,
            tokenizer_path=str(packed.backbone_path),
            num_layers=self._manifest.num_moe_layers,
            num_experts=self._manifest.num_experts,
            top_k=self._manifest.top_k,
            hidden_size=self._manifest.layers[0].layout.hidden_size,
            dtype=str(assembled.dtype).removeprefix("torch."),
            device=self._settings.device,
        )

    # ---- what gateways call -----------------------------------------------------------------------------------

    async def model_info(self) -> bytes:
        return msgspec.msgpack.encode(self._model_info)

    async def submit(self, request: bytes, gateway: str) -> bytes:
        """Queue a GenerationRequest whose deltas go to the token channel at `gateway`. Answers a SubmitReply."""
        decoded = msgspec.msgpack.decode(request, type=GenerationRequest)
        with self._gateway_lock:
            self._gateway_of[decoded.request_id] = gateway
            self._gateway_seen_s.setdefault(gateway, time.monotonic())
        try:
            if decoded.request_id in self._cancelled_early:
                raise EngineStoppedError("the request was cancelled before it arrived")
            if not self._connections.were_all_connected:
                raise EngineStoppedError("the engine is starting: not every worker is connected yet")
            self._engine.submit(decoded)
        except MoelessError as error:
            with self._gateway_lock:
                self._gateway_of.pop(decoded.request_id, None)
            return msgspec.msgpack.encode(SubmitReply.of_error(error, incarnation=self._incarnation))
        return msgspec.msgpack.encode(SubmitReply(incarnation=self._incarnation))

    async def cancel(self, request_id: str) -> None:
        if request_id not in self._gateway_of:
            self._cancelled_early.append(request_id)  # it may have overtaken its submit
        self._engine.cancel(request_id)

    async def pulse(self, gateway: str) -> bytes:
        """Asked by every gateway once a second. Answers a Pulse."""
        with self._gateway_lock:
            self._gateway_seen_s[gateway] = time.monotonic()
        is_ready = self._engine.is_alive and self._connections.were_all_connected
        return msgspec.msgpack.encode(Pulse(incarnation=self._incarnation, is_ready=is_ready))

    async def recording(self, call: bytes) -> bytes:
        """A RecordingCall; answers a RecordingReply."""
        return await answer_recording(LocalRecordings(self._recordings), call)

    async def stats(self) -> bytes:
        predictions = [] if self._prediction is None else self._prediction.status()
        return msgspec.msgpack.encode(await self._status.stats(self._engine.counters(), predictions))

    async def functions(self) -> bytes:
        return msgspec.msgpack.encode(await self._status.functions())

    def check_health(self) -> None:
        """Asked by Serve; an engine whose generation thread died is replaced."""
        if not self._engine.is_alive:
            raise EngineStoppedError("the generation thread ended")
        if not self._connections.is_alive:
            raise EngineStoppedError("the thread that keeps the worker connections ended")

    # ---- inside -----------------------------------------------------------------------------------------------

    def _send_step(self, deltas: list[GenerationDelta]) -> None:
        """In the generation thread: one message for each gateway that this step concerns."""
        by_gateway: dict[str, list[GenerationDelta]] = {}
        with self._gateway_lock:
            for delta in deltas:
                gateway = self._gateway_of.get(delta.request_id)
                if gateway is None:
                    continue
                by_gateway.setdefault(gateway, []).append(delta)
                if delta.finish_reason is not None:
                    del self._gateway_of[delta.request_id]
        for gateway, theirs in by_gateway.items():
            if not self._sender.send(gateway, theirs):
                self._end_requests_of(gateway)  # their streams have a hole now
        if time.monotonic() - self._swept_s > 1.0:
            self._sweep_gateways()

    def _sweep_gateways(self) -> None:
        """In the generation thread: end the requests of gateways that fell silent, and close the channels to them."""
        self._swept_s = now_s = time.monotonic()
        with self._gateway_lock:
            silent = [g for g, seen_s in self._gateway_seen_s.items() if now_s - seen_s > _GATEWAY_SILENCE_S]
            for gateway in silent:
                del self._gateway_seen_s[gateway]
        for gateway in silent:
            self._end_requests_of(gateway)
            self._sender.forget(gateway)

    def _end_requests_of(self, gateway: str) -> None:
        with self._gateway_lock:
            orphans = [request_id for request_id, owner in self._gateway_of.items() if owner == gateway]
        logger.warning("gateway does not take its tokens address=%s requests=%d", gateway, len(orphans))
        for request_id in orphans:
            self._engine.cancel(request_id)

    def close(self) -> None:
        """End every request and hang up on workers and gateways."""
        self._connections.stop()
        self._engine.stop()
        self._recordings.close()
        self._dispatcher.close()
        self._sender.close()


class _ServeCall:
    """A Serve call whose errors are ours."""

    def __init__(self, response: _Response) -> None:
        self._response: Any = response

    def result(self, timeout_s: float) -> bytes:
        try:
            return bytes(self._response.result(timeout_s=timeout_s))
        except TimeoutError as error:
            raise WorkerTimeoutError(f"no answer within {timeout_s:g} s") from error
        except (RayError, RayServeException) as error:
            raise TransportError(f"call failed: {type(error).__name__}: {error}") from error

    def cancel(self) -> None:
        try:
            self._response.cancel()
        except (RayError, RayServeException) as error:
            logger.info("a call that was cancelled had failed reason=%s", error)


def _assembly(packed: PackedModel, settings: ServeSettings) -> Assembly:
    return Assembly(
        engine=EngineConfig(
            kv_cache_bytes=settings.kv_cache_bytes,
            kv_memory_share=_KV_MEMORY_SHARE * settings.gpu_share,
            max_batch_tokens=max(settings.max_batch_tokens, settings.max_running),
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            max_model_len=settings.max_model_len,
            num_threads=settings.engine_threads,
        ),
        table=initial_table(packed.manifest, settings),
        dispatch=DispatchConfig(call_timeout_s=settings.call_timeout_s),
        dtype=settings.dtype,
        device=settings.device,
        pool_capacity_bytes=_pool_capacity_bytes(packed, settings),
    )


def _pool_capacity_bytes(packed: PackedModel, settings: ServeSettings) -> int | None:
    """Maximum bytes of instances in the engine's own process; None for no limit."""
    if settings.isolation == "shared" and settings.num_workers == 0:
        return settings.worker_memory_bytes
    if settings.device == "cpu":
        return None
    dtype = dtype_of_name(settings.dtype or packed.manifest.dtype)
    growth = dtype.itemsize / dtype_of_name(packed.manifest.dtype).itemsize
    return int(packed.manifest.function_bytes * growth) // _COPIES_SHARE


def _call_function(handle: DeploymentHandle[Any], frame: bytes) -> _ServeCall:
    return _ServeCall(handle.remote(frame))
