"""The gateway's end of its text processes: from a request's body to what the engine is asked, off the event loop.

GatewayService owns the pool. What the processes do, and why, is in text_process.py. A large body goes to one of all but
one of the processes at most, so that small requests never wait for large ones.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

import moeless
from moeless.core.errors import (
    ConfigError,
    ContextLengthError,
    ModelNotFoundError,
    MoelessError,
    QueueFullError,
    RequestError,
)
from moeless.core.generation import ModelInfo
from moeless.gateway.admission import AdmittedRequest
from moeless.gateway.config import GatewayConfig
from moeless.gateway.process_limits import RENDER_BYTES, RENDER_S
from moeless.gateway.text_protocol import (
    HEADER,
    Admit,
    Answer,
    Command,
    Done,
    Endpoint,
    Failure,
    Fork,
    Job,
    Load,
    Probe,
    Reap,
    SetTraits,
)
from moeless.text.template_probe import TemplateTraits

logger = logging.getLogger(__name__)

LARGE_BYTES = 64 * 1024
_JOB_TIMEOUT_S = 300.0
"""For a process that the kernel does not run; one that computes has a limit of its own (process_limits.py)."""
_END_TIMEOUT_S = 10.0
_ERRORS: dict[str, type[RequestError]] = {
    error.__name__: error for error in (RequestError, ContextLengthError, ModelNotFoundError)
}


class TextProcessError(MoelessError):
    """A text process ended, or failed, for a reason that is not the request's."""


class _PeerEndedError(Exception):
    """The process at the other end of a socket is gone."""


class TextPool:
    """Processes that turn bodies into admitted requests. Everything here runs on the event loop that `start` ran on."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = dataclasses.replace(config, api_keys=())
        self._parent: _Parent | None = None
        self._load: Load | None = None
        self._traits = TemplateTraits()
        self._slots = asyncio.Semaphore(config.max_text_processes)
        self._large_slots = asyncio.Semaphore(max(1, config.max_text_processes - 1))
        self._idle: list[_Child] = []
        self._forking = asyncio.Lock()
        self._num_jobs = 0
        self._commands: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Start the parent process if there is none. It takes a while to import what it needs; `load` waits for it."""
        if self._parent is None:
            # A process that is being started must not be forgotten where its starter is cancelled.
            await asyncio.shield(self._keep(asyncio.create_task(self._start_parent())))

    async def load(self, info: ModelInfo) -> None:
        """Read the model's tokenizer and find out how its chat template reads messages.

        Raises: ConfigError if a file cannot be read; TextProcessError.
        """
        self._load = Load(info=info, config=self._config)
        try:
            await self.start()
            await self._command(self._load)
            self._traits = await self._probe()
            await self._command(SetTraits(traits=self._traits))
        except _PeerEndedError:
            await self._end_parent()
            raise TextProcessError(
                "The text processes' parent ended while it read the tokenizer and the chat template; compiling the "
                f"template may take {RENDER_S:g} s and {RENDER_BYTES >> 20} MB."
            ) from None

    async def admit(self, endpoint: Endpoint, body: bytes, request_id: str) -> AdmittedRequest:
        """Raises: RequestError or one of its kind for what the body says; QueueFullError; TextProcessError."""
        if self._num_jobs >= self._config.max_waiting_texts:
            raise QueueFullError(f"The gateway reads {self._num_jobs} requests already, its limit (max_waiting_texts).")
        job = Admit(endpoint, request_id, body, len(body) > LARGE_BYTES)
        self._num_jobs += 1
        try:
            if job.is_large:
                async with self._large_slots:
                    return await self._admit(job)
            return await self._admit(job)
        finally:
            self._num_jobs -= 1

    async def close(self) -> None:
        """End all processes."""
        for child in self._idle:
            child.channel.close()
        self._idle.clear()
        while self._commands:
            await asyncio.wait(self._commands)
        await self._end_parent()

    async def _start_parent(self) -> None:
        self._parent = await asyncio.to_thread(_Parent)

    async def _end_parent(self) -> None:
        parent, self._parent = self._parent, None
        if parent is not None:
            await asyncio.to_thread(parent.end)

    async def _admit(self, job: Admit) -> AdmittedRequest:
        async with self._slots:
            answer, prompts = await self._run(job)
        if answer.failure is not None:
            raise _error_of(answer.failure)
        assert answer.admitted is not None
        sequences = [
            msgspec.structs.replace(sequence, prompt_token_ids=prompts[index])
            for sequence, index in zip(answer.admitted.sequences, answer.prompt_of, strict=True)
        ]
        return dataclasses.replace(answer.admitted, sequences=sequences)

    async def _probe(self) -> TemplateTraits:
        try:
            answer, _ = await self._run(Probe())
        except MoelessError as error:
            logger.warning("chat template not probed reason=%s", error)
            return TemplateTraits()
        if answer.failure is not None and answer.failure.code != "no_chat_template":
            logger.warning("chat template not probed reason=%s", answer.failure.message)
        traits = answer.traits or TemplateTraits()
        if not traits.shows_user:
            logger.warning("chat template leaves out what the user says; chats will be refused")
        return traits

    async def _run(self, job: Job) -> tuple[Answer, list[list[int]]]:
        child = self._idle.pop() if self._idle else await self._new_child()
        is_usable = False
        try:
            async with asyncio.timeout(_JOB_TIMEOUT_S):
                answer, prompts = await child.ask(job)
            is_usable = not answer.is_last
        except _PeerEndedError:
            raise _error_of_signal(await self._reap(child), job) from None
        except TimeoutError:
            raise TextProcessError(f"The request's text was not read within {_JOB_TIMEOUT_S:g} s.") from None
        finally:
            if is_usable:
                self._idle.append(child)
            else:
                # Also where the client is gone: what a child has begun cannot be ended but with the child.
                self._keep(asyncio.create_task(self._reap(child)))
        return answer, prompts

    async def _new_child(self) -> _Child:
        # Cancelling whoever needs a child does not cancel the fork: its command may be on its way with the socket.
        forking = self._keep(asyncio.create_task(self._fork()))
        try:
            return await asyncio.shield(forking)
        except asyncio.CancelledError:
            self._keep(asyncio.create_task(self._reap_forked(forking)))
            raise

    async def _reap_forked(self, forking: asyncio.Task[_Child]) -> None:
        await self._reap(await forking)

    async def _fork(self) -> _Child:
        async with self._forking:  # one at a time, so that a parent that ended is started again once, and completely
            ours, theirs = socket.socketpair()
            try:
                pid = await self._fork_with(theirs.fileno())
            except BaseException:
                ours.close()
                raise
            finally:
                theirs.close()
        return _Child(pid, _Channel(ours))

    async def _fork_with(self, descriptor: int) -> int:
        try:
            return await self._command(Fork(), descriptor)
        except _PeerEndedError:
            logger.warning("the text processes' parent ended; starting it again")
        try:
            await self._restart_parent()
            return await self._command(Fork(), descriptor)
        except _PeerEndedError:
            raise TextProcessError("The text processes' parent does not stay alive.") from None

    async def _reap(self, child: _Child) -> int:
        """The signal that ended the child, 0 if none did; it is killed if it still runs."""
        child.channel.close()
        if child.is_reaped:
            return 0
        child.is_reaped = True
        try:
            return await self._command(Reap(child.pid))
        except _PeerEndedError:
            return 0

    async def _restart_parent(self) -> None:
        """Raises: ConfigError, _PeerEndedError."""
        assert self._load is not None
        await self._end_parent()
        await self.start()
        await self._command(self._load)
        await self._command(SetTraits(traits=self._traits))

    async def _command(self, command: Command, descriptor: int | None = None) -> int:
        if self._parent is None:
            raise _PeerEndedError
        return await asyncio.shield(self._kept(self._parent.command(command, descriptor)))

    def _kept(self, work: Any) -> asyncio.Task[Any]:
        """A command must be answered before the next one, though whoever gave it be cancelled."""
        return self._keep(asyncio.create_task(work))

    def _keep(self, task: asyncio.Task[Any]) -> asyncio.Task[Any]:
        self._commands.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._commands.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.debug("command to a text process failed reason=%s", error)


class _Channel:
    """Frames on a socket, for the event loop."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock

    async def send(self, payload: bytes) -> None:
        """Raises: _PeerEndedError."""
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(self.sock, HEADER.pack(len(payload)))
            await loop.sock_sendall(self.sock, payload)
        except OSError as error:
            raise _PeerEndedError from error

    async def receive(self) -> bytearray:
        """Raises: _PeerEndedError."""
        (size,) = HEADER.unpack(await self._exactly(HEADER.size))
        return await self._exactly(size)

    async def _exactly(self, size: int) -> bytearray:
        loop = asyncio.get_running_loop()
        data = bytearray(size)
        left = memoryview(data)
        while left:
            try:
                num_received = await loop.sock_recv_into(self.sock, left)
            except OSError as error:
                raise _PeerEndedError from error
            if num_received == 0:
                raise _PeerEndedError
            left = left[num_received:]
        return data

    def close(self) -> None:
        self.sock.close()


class _Child:
    """A forked process that works on one job at a time."""

    def __init__(self, pid: int, channel: _Channel) -> None:
        self.pid = pid
        self.channel = channel
        self.is_reaped = False

    async def ask(self, job: Job) -> tuple[Answer, list[list[int]]]:
        """The answer and its prompts. Raises: _PeerEndedError."""
        await self.channel.send(msgspec.msgpack.encode(job))
        answer = msgspec.msgpack.decode(await self.channel.receive(), type=Answer)
        prompts = []
        for _ in range(answer.num_prompts):
            prompts.append(msgspec.msgpack.decode(await self.channel.receive(), type=list[int]))
            await asyncio.sleep(0)  # a long prompt takes a millisecond, and data that has arrived is no pause
        return answer, prompts


class _Parent:
    """The process that children are forked from. Constructor and `end` block."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moeless.gateway.text_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment(),
            )
        finally:
            theirs.close()
        self._channel = _Channel(ours)
        self._lock = asyncio.Lock()

    async def command(self, command: Command, descriptor: int | None) -> int:
        """Raises: ConfigError with the parent's words; _PeerEndedError."""
        async with self._lock:
            payload = msgspec.msgpack.encode(command)
            if descriptor is None:
                await self._channel.send(payload)
            else:
                try:
                    socket.send_fds(self._channel.sock, [HEADER.pack(len(payload)) + payload], [descriptor])
                except OSError as error:
                    raise _PeerEndedError from error
            done = msgspec.msgpack.decode(await self._channel.receive(), type=Done)
        if done.error is not None:
            raise ConfigError(done.error)
        return done.number

    def end(self) -> None:
        """Hang up and wait for the process, which ends its children first."""
        self._channel.close()
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _environment() -> dict[str, str]:
    """Return a text process's environment: it renders strangers' templates, and gets none of the run's secrets.

    All variables of moeless and Ray are left out; nothing there reads them.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MOELESS_", "RAY_"))}
    paths = [str(Path(moeless.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    # One thread each: there are as many processes as this work may have cores.
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}


def _error_of(failure: Failure) -> MoelessError:
    if failure.traceback is not None:
        logger.error("text process failed traceback=%s", failure.traceback)
        return TextProcessError(f"{failure.kind} while the request's text was read; the log has the details.")
    return _ERRORS.get(failure.kind, RequestError)(failure.message, param=failure.param, code=failure.code)


def _error_of_signal(number: int, job: Job) -> MoelessError:
    param = "messages" if isinstance(job, Probe) or job.endpoint == "chat" else "prompt"
    if number == signal.SIGVTALRM:
        return RequestError(
            f"The model's chat template takes more than {RENDER_S:g} s for these messages, its limit.",
            param="messages",
            code="chat_template_limit",
        )
    if number == signal.SIGXCPU:
        return RequestError("Tokenizing takes too long for this text.", param=param, code="text_time_limit")
    if number == signal.SIGABRT:
        return RequestError("Tokenizing takes too much memory for this text.", param=param, code="text_memory_limit")
    return TextProcessError(f"The process that read the request's text ended (signal {number}); try again.")
