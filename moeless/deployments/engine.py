"""The engine as a Serve deployment: backbone, dispatcher, generation thread, channels to workers and gateways."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import torch
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from moeless import __version__
from moeless.core.errors import EngineStoppedError, MoelessError, TransportError, WorkerTimeoutError
from moeless.core.generation import ModelInfo
from moeless.deployments.application import initial_table
from moeless.deployments.gateways import Gateways
from moeless.deployments.rpc import CancelCall, Pulse, PulseCall, SubmitCall, SubmitReply, answer_recording
from moeless.deployments.run_secrets import read_secrets
from moeless.deployments.runtime import bind_to
from moeless.deployments.settings import ServeSettings
from moeless.deployments.status import EngineStatus
from moeless.deployments.token_channel import TokenSender
from moeless.deployments.worker import MAX_ROWS
from moeless.deployments.worker_connections import WorkerConnections
from moeless.dispatch.call import CallChannel
from moeless.dispatch.channel import Channel, WorkerEndpoint
from moeless.dispatch.connect import connect
from moeless.engine.assemble import AssembledEngine, Assembly, assemble_engine
from moeless.engine.prediction import PredictionObserver, load_live_predictor
from moeless.engine.recording_service import LocalRecordings, Recordings, trace_metadata
from moeless.packages.packed_model import PackedModel
from moeless.packages.tensor_files import dtype_of_name
from moeless.text.tokenizer import Tokenizer
from moeless_predictors.live import LiveConfig
from moeless_predictors.threads import keep_to_one_blas_thread

logger = logging.getLogger(__name__)

_ENDPOINT_TIMEOUT_S = 10.0
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
        self._is_stopping = False
        self._run_secret = read_secrets(settings.secrets_file).run_secret
        self._incarnation = secrets.token_hex(8)
        started_s = time.perf_counter()
        packed = PackedModel.open(settings.packed_path)
        packed.verify_backbone()  # the tokenizer too is read from it
        self._manifest = packed.manifest
        by_call = settings.isolation == "function"
        assembled = assemble_engine(
            packed, Tokenizer.load(packed.backbone_path, with_template=False), _assembly(packed, settings)
        )
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
        self._sender = TokenSender(self._run_secret)
        self._gateways = Gateways(self._sender, self._engine.cancel)
        self._engine.set_on_step(self._gateways.send_step)
        self._prediction: PredictionObserver | None = None
        if settings.prediction.path is not None:
            live_config = LiveConfig(**settings.prediction.overrides())
            live = load_live_predictor(settings.prediction.path, live_config, packed.manifest)
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
                run_secret=self._run_secret,
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

    async def submit(self, call: bytes) -> bytes:
        """A SubmitCall; returns a SubmitReply."""
        decoded = msgspec.msgpack.decode(call, type=SubmitCall)
        try:
            if not self._connections.were_all_connected:
                raise EngineStoppedError("the engine is starting: not every worker is connected yet")
            self._gateways.admit(decoded)
            try:
                self._engine.submit(decoded.request)
            except MoelessError:
                self._gateways.release(decoded.request.request_id)
                raise
        except MoelessError as error:
            return msgspec.msgpack.encode(SubmitReply.of_error(error, incarnation=self._incarnation))
        return msgspec.msgpack.encode(SubmitReply(incarnation=self._incarnation))

    async def cancel(self, call: bytes) -> None:
        """A CancelCall."""
        self._gateways.cancel(msgspec.msgpack.decode(call, type=CancelCall))

    async def pulse(self, call: bytes) -> bytes:
        """A PulseCall, from every gateway once a second; returns a Pulse."""
        unknown = self._gateways.hear(msgspec.msgpack.decode(call, type=PulseCall))
        is_ready = self._engine.is_alive and self._connections.were_all_connected
        return msgspec.msgpack.encode(Pulse(incarnation=self._incarnation, is_ready=is_ready, unknown=unknown))

    async def recording(self, call: bytes) -> bytes:
        """A RecordingCall; answers a RecordingReply."""
        return await answer_recording(LocalRecordings(self._recordings), call)

    async def stats(self) -> bytes:
        predictions = [] if self._prediction is None else self._prediction.status()
        return msgspec.msgpack.encode(await self._status.stats(self._engine.counters(), predictions))

    async def functions(self) -> bytes:
        return msgspec.msgpack.encode(await self._status.functions())

    def check_health(self) -> None:
        """Called by Serve; an engine whose generation thread died is replaced."""
        if self._is_stopping:
            return
        if not self._engine.is_alive:
            raise EngineStoppedError("the generation thread ended")
        if not self._connections.is_alive:
            raise EngineStoppedError("the thread that keeps the worker connections ended")

    async def stop(self) -> None:
        """End every request with an error and take no more: the run ends, and Serve stops the replicas next."""
        self._is_stopping = True
        await asyncio.to_thread(self._engine.stop)

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
        engine=replace(
            settings.engine,
            kv_memory_share=settings.engine.kv_memory_share * settings.gpu_share,
            num_threads=settings.engine.num_threads or settings.engine_threads,
        ),
        table=initial_table(packed.manifest, settings),
        dispatch=settings.dispatch,
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
