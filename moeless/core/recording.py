"""Calls of a gateway about recording an engine's routing: plain data that crosses processes, and the protocol."""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

MAX_RECORDING_BYTES = 1 << 30
"""Bound of the memory for a recording's rows."""

RecordingState = Literal["none", "recording", "full", "stopped", "failed"]


def recorded_row_bytes(
    *, num_layers: int, num_experts: int, top_k: int, hidden_size: int, num_hidden_layers: int, token_ids: bool
) -> int:
    """Bytes that one recorded row takes in memory."""
    per_choice = (1 if num_experts <= 256 else 2) + 4
    span_and_token = 4 * 4 + (4 if token_ids else 0)  # at most as many spans as rows
    return num_layers * top_k * per_choice + 2 * num_hidden_layers * hidden_size + span_and_token


class RecordingOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of a recording. The engine checks them against its model."""

    max_tokens: int = 200_000
    """Rows for which memory is reserved; the recording ends by itself when they are full."""
    hidden_layers: tuple[int, ...] = ()
    """MoE layers whose experts' input is recorded too, in float16."""
    token_ids: bool = False
    """Record the tokens' ids too: prompts and answers can then be read from the trace."""


class RecordingStatus(msgspec.Struct, frozen=True, kw_only=True):
    """State of the engine's recording. `full` and `stopped` ones can be downloaded."""

    state: RecordingState
    num_tokens: int = 0
    num_steps: int = 0
    max_tokens: int = 0
    hidden_layers: tuple[int, ...] = ()
    token_ids: bool = False
    reserved_bytes: int = 0
    """Memory that the recording's rows take at most."""
    error: str | None = None
    """Reason for a failure."""


class RecordedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A finished recording as a trace file, kept by the engine until the next one begins."""

    file_id: str
    num_bytes: int


class RecordingClient(Protocol):
    """An engine's recordings as the gateway sees them: one at a time, from its start to its file.

    Every method raises RecordingError if the recording is not in the state that it needs, and EngineStoppedError if
    the engine cannot be reached.
    """

    async def start(self, options: RecordingOptions) -> RecordingStatus:
        """Record from now on; what was recorded before is dropped. Raises RequestError for an option out of range."""
        ...

    async def status(self) -> RecordingStatus: ...

    async def stop(self) -> RecordingStatus: ...

    async def discard(self) -> RecordingStatus:
        """Stop and drop the recording."""
        ...

    async def finish(self) -> RecordedFile:
        """Make the file of a recording that has ended, which may take seconds, or tell of the one that was made."""
        ...

    async def read(self, file_id: str, offset: int) -> bytes:
        """The next bytes of the file, some of them or all that are left; none at its end."""
        ...
