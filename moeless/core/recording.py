"""What a gateway asks of an engine about recording its routing: plain data that crosses processes, and the protocol."""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

RecordingState = Literal["none", "recording", "full", "stopped", "failed"]


class RecordingOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to record. The engine checks it against its model."""

    max_tokens: int = 200_000
    """Rows that memory is kept for; when they are taken the recording ends by itself."""
    hidden_layers: tuple[int, ...] = ()
    """MoE layers whose experts' input is recorded too, in float16."""
    token_ids: bool = False
    """Whether to record what the tokens are: with it the prompts and answers can be read from the trace."""


class RecordingStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How the engine's recording stands. `full` and `stopped` ones can be downloaded."""

    state: RecordingState
    num_tokens: int = 0
    num_steps: int = 0
    max_tokens: int = 0
    hidden_layers: tuple[int, ...] = ()
    token_ids: bool = False
    reserved_bytes: int = 0
    """The most that the recording's rows take in memory."""
    error: str | None = None
    """Why it failed."""


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
