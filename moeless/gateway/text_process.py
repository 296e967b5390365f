"""The text processes: a parent that has read the tokenizer, and children that it forks to work on requests.

`python -m moeless.gateway.text_process FD` is started by text_pool.py. A child turns a body into what the engine needs:
JSON, schema, chat template, tokens. All of that holds Python's interpreter lock for as long as it takes, templates and
tokenizers come from strangers, and so it happens neither on the gateway's event loop nor in its process. A fork takes
milliseconds, so a child that has exceeded a limit, or has used much memory, is replaced.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import resource
import signal
import socket
import sys
import traceback
from pathlib import Path

import msgspec

from moeless.core.errors import ConfigError, MoelessError, RequestError
from moeless.gateway.admission import Admission, AdmittedRequest, ServedModel
from moeless.gateway.body import parse_body
from moeless.gateway.process_limits import RENDER_BYTES, RENDER_S, RenderTimer, limit_job
from moeless.gateway.schemas import ChatCompletionRequest, CompletionRequest
from moeless.gateway.text_protocol import (
    Admit,
    Answer,
    Command,
    Done,
    Failure,
    Fork,
    Job,
    Load,
    Probe,
    Reap,
    SetTraits,
    receive_frame,
    send_frame,
)
from moeless.text.chat_template import RenderLimitError
from moeless.text.template_probe import TemplateTraits
from moeless.text.tokenizer import Tokenizer

_LARGE_NICENESS = 10
_PROBE_S = 3.0
"""For the dozen chats that are rendered to find out how a template reads messages."""


class Parent:
    """Obeys the gateway's commands until it hangs up, and then ends with its children."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: set[int] = set()
        self._model: ServedModel | None = None
        self._admission: Admission | None = None

    def run(self) -> None:
        """Returns when the gateway has hung up."""
        try:
            while (frame := receive_frame(self._control)) is not None:
                payload, descriptors = frame
                done = self._obey(msgspec.msgpack.decode(payload, type=Command), descriptors)
                send_frame(self._control, msgspec.msgpack.encode(done))
        finally:
            for pid in list(self._children):
                self._reap(pid)

    def _obey(self, command: Command, descriptors: list[int]) -> Done:
        match command:
            case Load():
                try:
                    self._load(command)
                except MoelessError as error:
                    return Done(error=str(error))
            case SetTraits(traits=traits):
                assert self._model is not None
                self._model = dataclasses.replace(self._model, traits=traits)
            case Fork():
                return Done(number=self._fork(descriptors[0]))
            case Reap(pid=pid):
                return Done(number=self._reap(pid))
        return Done()

    def _load(self, command: Load) -> None:
        folder = Path(command.info.tokenizer_path)
        tokenizer = Tokenizer.load(folder, with_template=False)
        try:
            with RenderTimer().limited():  # what is constant in a template is computed when it is compiled
                tokenizer.load_template(folder)
        except (RenderLimitError, MemoryError):
            raise ConfigError(
                f"the chat template takes more than {RENDER_S:g} s or {RENDER_BYTES >> 20} MB to compile"
            ) from None
        tokenizer.length_bound()
        self._model = ServedModel(info=command.info, tokenizer=tokenizer, traits=TemplateTraits())
        self._admission = Admission(command.config)
        gc.collect()
        gc.freeze()  # so that a child's collector does not write to, and so copy, every page

    def _fork(self, descriptor: int) -> int:
        assert self._model is not None
        assert self._admission is not None
        pid = os.fork()
        if pid:
            os.close(descriptor)
            self._children.add(pid)
            return pid
        status = 1
        try:
            self._control.close()
            Child(socket.socket(fileno=descriptor), self._model, self._admission).run()
            status = 0
        finally:
            os._exit(status)

    def _reap(self, pid: int) -> int:
        if pid not in self._children:
            return 0
        self._children.remove(pid)
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


class Child:
    """Works on one job after another, until the gateway hangs up or a job has used too much."""

    def __init__(self, sock: socket.socket, model: ServedModel, admission: Admission) -> None:
        self._sock = sock
        self._model = model
        self._admission = admission
        self._timer = RenderTimer()
        # Where Rust describes a panic before it becomes an error that is answered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def run(self) -> None:
        """Returns when this process should end."""
        while (frame := receive_frame(self._sock)) is not None:
            payload, _ = frame
            job = msgspec.msgpack.decode(payload, type=Job)
            del frame, payload
            answer, prompts = self._work(job)
            send_frame(self._sock, msgspec.msgpack.encode(answer))
            for prompt in prompts:
                send_frame(self._sock, msgspec.msgpack.encode(prompt))
            if answer.is_last:
                return

    def _work(self, job: Job) -> tuple[Answer, list[list[int]]]:
        try:
            if isinstance(job, Probe):
                with self._timer.limited(_PROBE_S):
                    return Answer(traits=self._model.tokenizer.probe_template(), is_last=True), []
            if job.is_large:
                os.nice(_LARGE_NICENESS)
            limit_job(len(job.body))
            return _without_prompts(self._admit(job), is_last=job.is_large)
        except Exception as error:
            is_spent = self._timer.was_exceeded or isinstance(error, MemoryError | RenderLimitError)
            is_last = is_spent or isinstance(job, Probe) or job.is_large
            return Answer(failure=_failure(error), is_last=is_last), []

    def _admit(self, job: Admit) -> AdmittedRequest:
        if job.endpoint == "chat":
            chat = parse_body(job.body, ChatCompletionRequest)
            return self._admission.admit_chat(chat, self._model, job.request_id, self._timer.limited)
        completion = parse_body(job.body, CompletionRequest)
        return self._admission.admit_completion(completion, self._model, job.request_id)


def _without_prompts(admitted: AdmittedRequest, *, is_last: bool) -> tuple[Answer, list[list[int]]]:
    """The choices of a prompt share one list, which is sent once."""
    prompts: dict[int, list[int]] = {}
    prompt_of: list[int] = []
    for sequence in admitted.sequences:
        prompt = sequence.prompt_token_ids
        prompts.setdefault(id(prompt), prompt)
        prompt_of.append(list(prompts).index(id(prompt)))
    bare = [msgspec.structs.replace(sequence, prompt_token_ids=[]) for sequence in admitted.sequences]
    admitted = dataclasses.replace(admitted, sequences=bare)
    answer = Answer(admitted=admitted, prompt_of=prompt_of, num_prompts=len(prompts), is_last=is_last)
    return answer, list(prompts.values())


def _failure(error: Exception) -> Failure:
    if isinstance(error, RenderLimitError):
        error = RequestError(
            f"The model's chat template takes more than {RENDER_S:g} s for these messages, its limit.",
            param="messages",
            code="chat_template_limit",
        )
    if isinstance(error, MemoryError):
        error = RequestError(
            f"The text of this request takes more memory than its limit ({RENDER_BYTES >> 20} MB for a chat template).",
            code="text_memory_limit",
        )
    if isinstance(error, RequestError):
        return Failure(kind=type(error).__name__, message=str(error), param=error.param, code=error.code)
    return Failure(
        kind=type(error).__name__, message=str(error), traceback="".join(traceback.format_exception(error))[-10_000:]
    )


def main() -> None:
    """Serve the control socket whose descriptor is the only argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the gateway, whose end ends this
    # Signals that end a job beyond its limits dump core by default: gigabytes, with what clients wrote in them.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Parent(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
