"""`core.generation.EngineClient` over an engine in the same process: tests and small set-ups."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import msgspec

from moeless.core.errors import MoelessError, RequestError
from moeless.core.generation import EngineStats, FunctionStatus, GenerationDelta, GenerationRequest, ModelInfo
from moeless.engine.protocol import Engine
from moeless.engine.recording_service import LocalRecordings, Recordings, trace_metadata

logger = logging.getLogger(__name__)


class LocalEngineClient:
    """Streams deltas from the generation thread into one asyncio loop, one wake-up a step for all streams."""

    def __init__(
        self,
        engine: Engine,
        model_info: ModelInfo,
        *,
        dispatch_stats: Callable[[], EngineStats] | None = None,
        functions: Callable[[], list[FunctionStatus]] | None = None,
    ) -> None:
        """Args:
        engine: not started yet; becomes the engine's receiver of deltas.
        dispatch_stats: the dispatcher's and the workers' numbers; the engine's own are filled in here.
        functions: rows of `GET /v1/experts`.
        """
        self._engine = engine
        self._model_info = model_info
        self._dispatch_stats = dispatch_stats
        self._functions = functions
        self.recordings = LocalRecordings(
            Recordings(engine.observers, trace_metadata(model_info, source="recorded in process"))
        )
        self._streams: dict[str, asyncio.Queue[GenerationDelta]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        engine.set_on_step(self._on_step)

    async def model_info(self) -> ModelInfo:
        return self._model_info

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        loop = asyncio.get_running_loop()
        if self._loop is not None and self._loop is not loop and self._streams:
            raise MoelessError("a LocalEngineClient serves one event loop at a time")
        self._loop = loop
        request_id = request.request_id
        queue: asyncio.Queue[GenerationDelta] = asyncio.Queue()
        ended = True
        if request_id in self._streams:
            raise RequestError(f"request_id must be new, {request_id!r} is being streamed")
        self._streams[request_id] = queue
        try:
            self._engine.submit(request)
            ended = False
            while not ended:
                delta = await queue.get()
                ended = delta.finish_reason is not None
                yield delta
        finally:
            del self._streams[request_id]
            if not ended:
                self._engine.cancel(request_id)

    async def cancel(self, request_id: str) -> None:
        self._engine.cancel(request_id)

    async def stats(self) -> EngineStats:
        counters = self._engine.counters()
        stats = _NO_DISPATCH if self._dispatch_stats is None else self._dispatch_stats()
        return msgspec.structs.replace(
            stats,
            requests_running=counters.requests_running,
            requests_waiting=counters.requests_waiting,
            kv_cache_usage=counters.kv_cache_usage,
        )

    async def functions(self) -> list[FunctionStatus]:
        return [] if self._functions is None else self._functions()

    async def is_ready(self) -> bool:
        return self._engine.is_alive

    async def close(self) -> None:
        """Cancel what is being streamed and drop what is recorded. The engine is its owner's to stop."""
        for request_id in list(self._streams):
            self._engine.cancel(request_id)
        await self.recordings.close()

    def _on_step(self, deltas: list[GenerationDelta]) -> None:
        """In the generation thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._spread, deltas)

    def _spread(self, deltas: list[GenerationDelta]) -> None:
        for delta in deltas:
            queue = self._streams.get(delta.request_id)
            if queue is not None:
                queue.put_nowait(delta)


_NO_DISPATCH = EngineStats(
    requests_running=0,
    requests_waiting=0,
    kv_cache_usage=0.0,
    cold_starts=0,
    evictions=0,
    warm_starts=0,
    dispatch_seconds_sum=0.0,
    dispatch_seconds_count=0,
    dispatch_seconds_buckets=[],
    dispatch_retries=0,
    dispatch_fallbacks=0,
    tokens_per_worker={},
    workers=[],
)
