"""Log lines that strangers can cause, at a bounded rate."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

_EVERY_S = 10.0
_MAX_TEMPLATES = 64


class RateLimitedLog:
    """Writes each kind of line at once, and then at most every ten seconds, with the number left out since.

    A kind is a template, whatever its arguments. Safe to use from several threads.
    """

    def __init__(
        self,
        logger: logging.Logger,
        level: int,
        *,
        every_s: float = _EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._level = level
        self._every_s = every_s
        self._clock = clock
        self._lock = threading.Lock()
        self._next_s: dict[str, float] = {}
        self._num_left_out: dict[str, int] = {}

    def log(self, template: str, *arguments: object) -> None:
        now_s = self._clock()
        with self._lock:
            if now_s < self._next_s.get(template, now_s):
                self._num_left_out[template] = self._num_left_out.get(template, 0) + 1
                return
            assert template in self._next_s or len(self._next_s) < _MAX_TEMPLATES, "templates are written in the code"
            self._next_s[template] = now_s + self._every_s
            num_left_out = self._num_left_out.pop(template, 0)
        if num_left_out:
            self._logger.log(self._level, f"{template} similar_lines_left_out=%d", *arguments, num_left_out)
        else:
            self._logger.log(self._level, template, *arguments)
