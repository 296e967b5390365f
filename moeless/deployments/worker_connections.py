"""Maintains an engine's connections to its workers, and re-opens broken ones.

Runs beside the generation thread and never computes. A worker that is away is left out of the dispatcher's look-up,
so that other instances or the engine's own copies take its functions until it is back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from moeless.core.errors import DispatchError
from moeless.dispatch.channel import Channel
from moeless.dispatch.dispatcher import Dispatcher

logger = logging.getLogger(__name__)

_CHECK_EVERY_S = 0.2
"""Between checks of the channels: a killed worker is back after about 2 s, so this adds a tenth."""
_STEADY_S = 10.0
"""A channel that lasted this long was sound: the next one is opened without a delay."""
_MAX_DELAY_S = 30.0


class WorkerConnections:
    """Args:
    dispatcher: whose channels to set.
    connectors: worker → a function that opens a channel to it; may take seconds; raises DispatchError or OSError.
    keep_alive_s: how long idle functions that the engine itself started stay; None keeps them, for an engine whose
        experts are its own.
    clock: seconds.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        connectors: Mapping[str, Callable[[], Channel]],
        *,
        keep_alive_s: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._dispatcher = dispatcher
        self._connectors = connectors
        self._keep_alive_s = keep_alive_s
        self._connected_s: dict[str, float] = {}
        self._delay_s: dict[str, float] = {}
        self._not_before_s: dict[str, float] = {}
        self._stopping = threading.Event()
        self._all_connected = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moeless-connections", daemon=True)
        if not connectors:
            self._all_connected.set()

    def start(self) -> None:
        if self._connectors or self._keep_alive_s is not None:
            self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread that maintains the connections runs, if there is anything to maintain."""
        needed = bool(self._connectors) or self._keep_alive_s is not None
        return not needed or self._stopping.is_set() or self._thread.is_alive()

    @property
    def were_all_connected(self) -> bool:
        """Whether every worker has been reached at least once: the engine may answer from then on."""
        return self._all_connected.is_set()

    def is_connected(self, worker: str) -> bool:
        channel = self._dispatcher.channels.get(worker)
        return channel is not None and not channel.is_broken

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.check()
            if all(self.is_connected(worker) for worker in self._connectors):
                self._all_connected.set()
                if self._keep_alive_s is not None:
                    self._dispatcher.local.pool.evict_idle(keep_alive_s=self._keep_alive_s)
            self._stopping.wait(_CHECK_EVERY_S)

    def _back_off(self, worker: str) -> None:
        """Exponential backoff for a channel that broke soon after it was opened (a worker that accepts but hangs)."""
        now_s = self._clock()
        lasted_s = now_s - self._connected_s[worker]
        delay_s = 0.0 if lasted_s > _STEADY_S else min(_MAX_DELAY_S, max(1.0, 2 * self._delay_s.get(worker, 0.0)))
        self._delay_s[worker] = delay_s
        self._not_before_s[worker] = now_s + delay_s

    def check(self) -> None:
        """One round: drop broken channels, and open those that are missing and whose delay is over."""
        channels = dict(self._dispatcher.channels)
        for worker in [worker for worker in channels if channels[worker].is_broken]:
            logger.warning("lost a worker worker=%s", worker)
            del channels[worker]
            self._back_off(worker)
        if len(channels) < len(self._dispatcher.channels):
            self._dispatcher.set_channels(channels)
        for worker in self._connectors:
            if worker in channels or self._stopping.is_set() or self._clock() < self._not_before_s.get(worker, 0.0):
                continue
            try:
                channels[worker] = self._connectors[worker]()
            except (DispatchError, OSError) as error:
                logger.info("cannot reach a worker yet worker=%s reason=%s", worker, error)
                continue
            except Exception:  # one worker's fault must not keep the others from being reached
                logger.exception("connecting failed worker=%s", worker)
                continue
            self._connected_s[worker] = self._clock()
            logger.info("connected worker=%s transport=%s", worker, channels[worker].kind)
            self._dispatcher.set_channels(channels)
