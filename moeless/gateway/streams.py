"""Run the sequences of one request and hand over what they produce; stop them when the client goes away.

Called by completions.py. Every sequence has a task that reads the engine's stream, so that whoever writes to the
client takes at once whatever has come since it last looked: a slow client costs fewer, larger writes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from starlette.types import Receive

from moeless.core.errors import EngineStoppedError, QueueFullError, RequestError
from moeless.core.generation import EngineClient, GenerationDelta, GenerationRequest
from moeless.gateway.errors import GenerationFailedError
from moeless.gateway.metrics import SequenceObserver
from moeless.gateway.request_id import current_request_id

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Batch = list[tuple[int, GenerationDelta]]
"""(index of the sequence, delta), in the order of arrival."""

_UNPACED_STREAMS = 4


class ClientGoneError(Exception):
    """The client hung up before its answer was complete."""


class WritePacer:
    """Spaces the writes of many streams.

    A write costs the same however little it carries: some 0.4 ms of the cores between here and the client, which are
    also the engine's. A few streams are written to at every token; beyond that the writes per second are bounded, and
    each carries the tokens that have come meanwhile. The first token never waits.
    """

    def __init__(self, max_writes_per_s: float) -> None:
        self._max_writes_per_s = max_writes_per_s
        self._num_streams = 0

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Count a stream while it is open."""
        self._num_streams += 1
        try:
            yield
        finally:
            self._num_streams -= 1

    def pause_s(self) -> float:
        """Time that a stream should rest after a write."""
        return max(0, self._num_streams - _UNPACED_STREAMS) / self._max_writes_per_s


class SequenceStreams:
    """The running sequences of one request, as an async context: leaving it cancels those that still run."""

    def __init__(
        self,
        client: EngineClient,
        requests: Sequence[GenerationRequest],
        observers: Sequence[SequenceObserver],
    ) -> None:
        self._client = client
        self._requests = requests
        self._observers = observers
        self._tasks: list[asyncio.Task[None]] = []
        self._buffer: Batch = []
        self._num_running = len(requests)
        self._error: Exception | None = None
        self._news = asyncio.Event()
        self._ended = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._follow(index)) for index in range(len(self._requests))]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def wait(self, timeout_s: float) -> None:
        """Until something came or `timeout_s` passed. Raises what made a sequence fail."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return
        if self._error is not None:
            raise self._error

    async def rest(self, pause_s: float) -> None:
        """Let deltas gather for `pause_s` seconds, or until no sequence runs any more."""
        if pause_s <= 0 or self._ended.is_set():
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._ended.wait()

    async def take(self) -> Batch:
        """Everything that came since the last call, at least one delta; empty when all sequences are at their end.

        Raises: what made a sequence fail; the others are of no use to the client then.
        """
        while not self._buffer and self._num_running and self._error is None:
            self._news.clear()
            await self._news.wait()
        if self._error is not None:
            raise self._error
        batch, self._buffer = self._buffer, []
        return batch

    async def _follow(self, index: int) -> None:
        request, observer = self._requests[index], self._observers[index]
        is_complete = False
        deltas = cast(AsyncGenerator[GenerationDelta, None], self._client.generate(request))
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    _raise_if_failed(delta)
                    observer.on_delta(delta)
                    self._buffer.append((index, delta))
                    if delta.finish_reason == "stop" or delta.finish_reason == "length":
                        is_complete = True
                        observer.on_end(delta.finish_reason)
                        self._num_running -= 1
                        if self._num_running == 0:
                            self._ended.set()
                    self._news.set()
            if not is_complete:
                raise EngineStoppedError("The engine ended the stream before the sequence was complete.")
        except asyncio.CancelledError:
            if not is_complete:
                observer.on_end("abort")
            raise
        except Exception as error:
            if is_complete:
                logger.warning(
                    "engine stream failed after its end request=%s sequence=%s",
                    current_request_id(),
                    request.request_id,
                    exc_info=True,
                )
                return
            if not isinstance(error, RequestError | QueueFullError):
                observer.on_end("error")
            self._error = self._error or error
            self._news.set()
            self._ended.set()


def _raise_if_failed(delta: GenerationDelta) -> None:
    if delta.error is not None or delta.finish_reason == "error":
        raise GenerationFailedError(delta.error or "The engine could not complete this sequence.")
    if delta.finish_reason == "cancelled":
        raise EngineStoppedError("The engine cancelled this sequence.")


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work` to its end, or cancel it as soon as the client hangs up. The body must have been read.

    Raises: ClientGoneError.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.wait({working, watching})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
