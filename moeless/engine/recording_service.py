"""Recording on request: one recording of an engine at a time, from its start to the file that it becomes.

Used by deployments/engine.py and local_client.py. The file has no name from the moment it is whole, so that it is
gone with the process, and it is read piece by piece.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import tempfile
import threading
from pathlib import Path
from typing import BinaryIO

from moeless.core.errors import RecordingError, RequestError
from moeless.core.generation import ModelInfo
from moeless.core.recording import (
    MAX_RECORDING_BYTES,
    RecordedFile,
    RecordingOptions,
    RecordingState,
    RecordingStatus,
)
from moeless.engine.observing import StepObservers
from moeless.engine.routing_recorder import RoutingRecorder, check_options, row_bytes
from moeless_predictors.traces import RoutingTrace, TraceMetadata

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
"""Bytes that `read` returns at a time."""


class Recordings:
    """Every method may be called from any thread; `finish` may take seconds, the others return at once.

    Args:
        observers: of the engine to record.
        metadata: of the traces, with `hidden_size`.
        max_bytes: most memory for one recording's rows. Becoming a file takes as much again, for that time.
    """

    def __init__(
        self, observers: StepObservers, metadata: TraceMetadata, *, max_bytes: int = MAX_RECORDING_BYTES
    ) -> None:
        self._observers = observers
        self._metadata = metadata
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._recorder: RoutingRecorder | None = None
        self._options = RecordingOptions()
        self._is_stopped = False
        self._trace: RoutingTrace | None = None
        self._file: BinaryIO | None = None
        self._file_id = ""

    def status(self) -> RecordingStatus:
        recorder, options = self._recorder, self._options
        if recorder is None:
            return RecordingStatus(state="none")
        state: RecordingState = "stopped" if self._is_stopped else "recording"
        if recorder.is_full:
            state = "full"
        if recorder.error is not None:
            state = "failed"
        return RecordingStatus(
            state=state,
            num_tokens=recorder.num_tokens,
            num_steps=recorder.num_steps,
            max_tokens=options.max_tokens,
            hidden_layers=options.hidden_layers,
            token_ids=options.token_ids,
            reserved_bytes=options.max_tokens * row_bytes(self._metadata, options),
            error=recorder.error,
        )

    def start(self, options: RecordingOptions) -> RecordingStatus:
        """Record from the next step on; a recording that has ended makes room.

        Raises: RecordingError if one is running, RequestError that names the option that breaks a rule.
        """
        self._check(options)
        with self._lock:
            if self.status().state == "recording":
                raise RecordingError("a recording is running already; stop it first", code="recording_running")
            self._forget()
            recorder = RoutingRecorder(self._observers, self._metadata, options)
            self._recorder, self._options, self._is_stopped = recorder, options, False
            recorder.start()
        logger.info(
            "recording started max_tokens=%d hidden_layers=%s token_ids=%s",
            options.max_tokens,
            list(options.hidden_layers),
            options.token_ids,
        )
        return self.status()

    def stop(self) -> RecordingStatus:
        """Stop recording; stopping twice is no error. Raises RecordingError if there is no recording."""
        with self._lock:
            self._existing().stop()
            self._is_stopped = True
        status = self.status()
        logger.info("recording stopped tokens=%d steps=%d", status.num_tokens, status.num_steps)
        return status

    def discard(self) -> RecordingStatus:
        """Stop and forget the recording, and free its memory and its file."""
        with self._lock:
            self._existing()
            self._forget()
        return self.status()

    def finish(self) -> RecordedFile:
        """Make the trace file of the recording that has ended, once; asked again, tell of the same file.

        Raises: RecordingError if there is none, it still runs, it failed, it is empty or cannot be written.
        """
        with self._lock:
            recorder, state = self._existing(), self.status().state
            if state == "recording":
                raise RecordingError("the recording is still running; stop it first", code="recording_running")
            if state == "failed":
                raise RecordingError(f"the recording failed: {recorder.error}", code="recording_failed")
            if not recorder.num_tokens:
                raise RecordingError("the recording has no tokens: nothing was computed", code="recording_empty")
            if self._file is None:
                if self._trace is None:
                    self._trace = _take_trace(recorder)
                try:
                    self._file = _write_nameless(self._trace)
                except OSError as error:  # the disk is full, say; it may be tried again
                    raise RecordingError(
                        f"the recording's file cannot be written: {error.strerror}", code="recording_not_written"
                    ) from error
                self._file_id, self._trace = secrets.token_hex(8), None
            return RecordedFile(file_id=self._file_id, num_bytes=os.fstat(self._file.fileno()).st_size)

    def read(self, file_id: str, offset: int) -> bytes:
        """Up to CHUNK_BYTES of the file from `offset` on. Raises RecordingError if it has made room for another."""
        with self._lock:
            if self._file is None or file_id != self._file_id:
                raise RecordingError("the recording's file is gone: another was started", code="recording_gone")
            return os.pread(self._file.fileno(), CHUNK_BYTES, offset)

    def close(self) -> None:
        """Free everything."""
        with self._lock:
            self._forget()

    def _check(self, options: RecordingOptions) -> None:
        check_options(options, self._metadata)
        per_row = row_bytes(self._metadata, options)
        if options.max_tokens * per_row > self._max_bytes:
            raise RequestError(
                f"max_tokens must be at most {self._max_bytes // per_row} with rows of {per_row} bytes, "
                f"got {options.max_tokens}",
                param="max_tokens",
            )

    def _existing(self) -> RoutingRecorder:
        if self._recorder is None:
            raise RecordingError("there is no recording; start one first", code="no_recording")
        return self._recorder

    def _forget(self) -> None:
        if self._recorder is not None:
            self._recorder.stop()
        if self._file is not None:
            self._file.close()
        self._recorder, self._trace, self._file, self._file_id = None, None, None, ""


def _take_trace(recorder: RoutingRecorder) -> RoutingTrace:
    try:
        return recorder.take_trace()
    except ValueError as error:  # what was recorded breaks a rule of traces; it will not get better
        recorder.error = str(error)
        raise RecordingError(f"the recording failed: {error}", code="recording_failed") from error


class LocalRecordings:
    """core.recording.RecordingClient over Recordings in the same process, which are kept off the event loop."""

    def __init__(self, recordings: Recordings) -> None:
        self._recordings = recordings

    async def start(self, options: RecordingOptions) -> RecordingStatus:
        return await asyncio.to_thread(self._recordings.start, options)

    async def status(self) -> RecordingStatus:
        return self._recordings.status()

    async def stop(self) -> RecordingStatus:
        return await asyncio.to_thread(self._recordings.stop)

    async def discard(self) -> RecordingStatus:
        return await asyncio.to_thread(self._recordings.discard)

    async def finish(self) -> RecordedFile:
        return await asyncio.to_thread(self._recordings.finish)

    async def read(self, file_id: str, offset: int) -> bytes:
        return await asyncio.to_thread(self._recordings.read, file_id, offset)

    async def close(self) -> None:
        """Free everything."""
        await asyncio.to_thread(self._recordings.close)


def trace_metadata(info: ModelInfo, *, source: str) -> TraceMetadata:
    """Make a trace's metadata about the served model."""
    return TraceMetadata(
        model=info.model_id,
        num_experts=info.num_experts,
        top_k=info.top_k,
        num_layers=info.num_layers,
        source=source,
        hidden_size=info.hidden_size,
    )


def _write_nameless(trace: RoutingTrace) -> BinaryIO:
    """The trace in a temporary file that only the returned object holds."""
    with tempfile.TemporaryDirectory(prefix="moeless-trace-") as folder:
        path = Path(folder) / "routing.safetensors"
        trace.save(path)
        return path.open("rb")
