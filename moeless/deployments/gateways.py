"""An engine's account of its gateways: whose request is whose, and which of them anybody still reads.

Called by deployments/engine.py. A gateway cancels what its clients have left, and names once a second what it still
reads; the engine ends everything else by itself, so that a lost cancel costs a second and not a whole generation.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from moeless.core.errors import EngineStoppedError, RequestError
from moeless.core.generation import GenerationDelta
from moeless.deployments.rpc import CancelCall, GatewayName, PulseCall, SubmitCall

logger = logging.getLogger(__name__)

GATEWAY_SILENCE_S = 30.0
"""A gateway without a pulse (each second) for this long is gone; its requests end."""
_SWEEP_EVERY_S = 1.0


class SendsTokens(Protocol):
    """The engine's end of the token channel (token_channel.TokenSender)."""

    def send(self, address: str, deltas: list[GenerationDelta]) -> bool:
        """False if the gateway at `address` takes no more."""
        ...

    def forget(self, address: str) -> None: ...


@dataclass(kw_only=True)
class _Gateway:
    heard_s: float
    last_number: int = 0
    """Last request that the newest pulse covers: it names which requests up to this one are still read."""
    live: frozenset[int] = frozenset()
    cancelled: set[int] = field(default_factory=set)
    """Cancelled after `last_number`: a cancel may overtake its submit. Emptied by each newer pulse."""
    running: dict[int, str] = field(default_factory=dict)
    """Number → id of the requests that the engine holds."""

    def reads(self, number: int) -> bool:
        return number not in self.cancelled and (number > self.last_number or number in self.live)


class Gateways:
    """Methods may be called from any thread, but those that send: they belong to the generation thread.

    Args:
        sender: carries deltas to gateways.
        cancel: ends a request of the engine's, by id.
        clock: seconds.
    """

    def __init__(
        self, sender: SendsTokens, cancel: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sender = sender
        self._cancel = cancel
        self._clock = clock
        self._lock = threading.Lock()
        self._gateways: dict[GatewayName, _Gateway] = {}
        self._owner_of: dict[str, tuple[GatewayName, int]] = {}
        self._swept_s = clock()

    def admit(self, call: SubmitCall) -> None:
        """Note whose request it is, before the engine gets it.

        Raises: EngineStoppedError if its gateway has cancelled it already; RequestError if its id is taken.
        """
        request_id = call.request.request_id
        with self._lock:
            gateway = self._gateway(call.gateway)
            if not gateway.reads(call.number):
                raise EngineStoppedError("the request was cancelled before it arrived")
            if request_id in self._owner_of:
                raise RequestError(f"request_id must be new, {request_id!r} is being generated")
            self._owner_of[request_id] = (call.gateway, call.number)
            gateway.running[call.number] = request_id

    def release(self, request_id: str) -> None:
        """Forget a request that was admitted and that the engine then refused."""
        with self._lock:
            self._forget_request(request_id)

    def cancel(self, call: CancelCall) -> None:
        """End the requests that a gateway's clients have left; those on their way are refused when they come."""
        with self._lock:
            gateway = self._gateway(call.gateway)
            gateway.cancelled.update(number for number in call.numbers if number > gateway.last_number)
            left = [gateway.running[number] for number in call.numbers if number in gateway.running]
        self._end(left)

    def hear(self, call: PulseCall) -> list[int]:
        """Take a gateway's pulse, and end those of its requests that it does not name.

        Returns: the numbers it names and the engine does not hold.
        """
        with self._lock:
            gateway = self._gateway(call.gateway)
            gateway.heard_s = self._clock()
            if call.last_number < gateway.last_number:
                return []  # an older pulse that was overtaken
            gateway.last_number, gateway.live = call.last_number, frozenset(call.live)
            gateway.cancelled = {number for number in gateway.cancelled if number > call.last_number}
            unread = [request_id for number, request_id in gateway.running.items() if not gateway.reads(number)]
            unknown = [number for number in call.live if number not in gateway.running]
        self._end(unread)
        return unknown

    def send_step(self, deltas: list[GenerationDelta]) -> None:
        """Send one message to each gateway that these deltas concern."""
        by_gateway: dict[GatewayName, list[GenerationDelta]] = {}
        with self._lock:
            for delta in deltas:
                owner = self._owner_of.get(delta.request_id)
                if owner is None:
                    continue
                by_gateway.setdefault(owner[0], []).append(delta)
                if delta.finish_reason is not None:
                    self._forget_request(delta.request_id)
        for name, theirs in by_gateway.items():
            if not self._sender.send(name.address, theirs):
                self._end_all_of(name, "takes no more of its tokens")  # their streams have a hole now
        if self._clock() - self._swept_s > _SWEEP_EVERY_S:
            self._sweep()

    def _sweep(self) -> None:
        """End the requests of gateways that fell silent, and close the channels to them."""
        self._swept_s = now_s = self._clock()
        with self._lock:
            silent = [n for n, gateway in self._gateways.items() if now_s - gateway.heard_s > GATEWAY_SILENCE_S]
        for name in silent:
            self._end_all_of(name, "fell silent")
            with self._lock:
                if not self._gateways[name].running:  # else its requests are on their way out: the next sweep
                    del self._gateways[name]
                    if all(other.address != name.address for other in self._gateways):
                        self._sender.forget(name.address)

    def _end_all_of(self, name: GatewayName, why: str) -> None:
        with self._lock:
            left = list(self._gateways[name].running.values())
        logger.warning("ending a gateway's requests address=%s requests=%d reason=%s", name.address, len(left), why)
        self._end(left)

    def _end(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._cancel(request_id)

    def _gateway(self, name: GatewayName) -> _Gateway:
        return self._gateways.setdefault(name, _Gateway(heard_s=self._clock()))

    def _forget_request(self, request_id: str) -> None:
        owner = self._owner_of.pop(request_id, None)
        if owner is not None:
            self._gateways[owner[0]].running.pop(owner[1], None)
