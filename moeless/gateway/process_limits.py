"""Limits of time and memory for a process's work on what strangers sent. Used by text_process.py.

Time is processor time: a busy machine takes none of it from a request.
"""

from __future__ import annotations

import math
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moeless.text.chat_template import RenderLimitError

RENDER_S = 0.85
"""For rendering a chat template; the error is to come within a second."""
RENDER_BYTES = 150 * 2**20
_GRACE_S = 0.1
"""After which a template that the exception does not stop (it is within a single long operation) is killed."""
_JOB_S = 5.0
_JOB_S_PER_BYTE = 20 / 2**20
"""A job's time grows with its body: 2 MB of the worst text take a tokenizer some ten seconds."""
_JOB_BYTES = 2 * 2**30


class RenderTimer:
    """Limits what runs in `limited`, by an exception and then by killing the process with SIGVTALRM."""

    def __init__(self) -> None:
        self.was_exceeded = False
        signal.signal(signal.SIGPROF, self._on_signal)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)

    @contextmanager
    def limited(self, seconds: float = RENDER_S, memory_bytes: int = RENDER_BYTES) -> Iterator[None]:
        """Raises: RenderLimitError, MemoryError."""
        job_limit = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_within(job_limit[0], _data_bytes() + memory_bytes), job_limit[1]))
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds + _GRACE_S)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            resource.setrlimit(resource.RLIMIT_DATA, job_limit)

    def _on_signal(self, *_: object) -> None:
        self.was_exceeded = True
        raise RenderLimitError


def limit_job(body_bytes: int) -> None:
    """Have the kernel end this process with SIGXCPU or refuse it memory if its next job is beyond all measure."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = usage.ru_utime + usage.ru_stime + _JOB_S + _JOB_S_PER_BYTE * body_bytes
    _set_soft(resource.RLIMIT_CPU, math.ceil(cpu_s))
    _set_soft(resource.RLIMIT_DATA, _data_bytes() + _JOB_BYTES)


def _set_soft(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (_within(hard, value), hard))


def _within(limit: int, value: int) -> int:
    return value if limit == resource.RLIM_INFINITY else min(limit, value)


def _data_bytes() -> int:
    """Return the bytes that the kernel counts against RLIMIT_DATA."""
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    return pages * resource.getpagesize()
