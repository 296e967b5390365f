"""An engine's account of its gateways: what nobody reads is ended, whichever message says so and in whatever order."""

from __future__ import annotations

import pytest

from moeless.core.errors import EngineStoppedError, RequestError
from moeless.core.generation import GenerationDelta, GenerationRequest, SamplingParams
from moeless.deployments.gateways import GATEWAY_SILENCE_S, Gateways
from moeless.deployments.rpc import CancelCall, GatewayName, PulseCall, SubmitCall

HERE = GatewayName(address="tcp://10.0.0.1:1", life="a")
THERE = GatewayName(address="tcp://10.0.0.2:1", life="b")


class World:
    """A token channel, an engine and a clock around a Gateways."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.sent: list[tuple[str, list[str]]] = []
        self.forgotten: list[str] = []
        self.full: set[str] = set()
        self.cancelled: list[str] = []
        self.gateways = Gateways(self, self.cancelled.append, clock=lambda: self.now_s)

    def send(self, address: str, deltas: list[GenerationDelta]) -> bool:
        self.sent.append((address, [delta.request_id for delta in deltas]))
        return address not in self.full

    def forget(self, address: str) -> None:
        self.forgotten.append(address)

    def submit(self, number: int, *, gateway: GatewayName = HERE, request_id: str = "") -> None:
        request = GenerationRequest(
            request_id=request_id or f"{gateway.life}{number}",
            prompt_token_ids=[1],
            sampling=SamplingParams(max_tokens=1),
        )
        self.gateways.admit(SubmitCall(gateway=gateway, number=number, request=request))

    def pulse(self, last_number: int, live: list[int], *, gateway: GatewayName = HERE) -> list[int]:
        return self.gateways.hear(PulseCall(gateway=gateway, last_number=last_number, live=live))

    def step(self, *request_ids: str, is_last: bool = False) -> None:
        self.gateways.send_step(
            [GenerationDelta(request_id=i, finish_reason="stop" if is_last else None) for i in request_ids]
        )


def test_deltas_go_to_the_gateway_of_their_request_until_its_end() -> None:
    world = World()
    world.submit(1)
    world.submit(2)
    world.submit(1, gateway=THERE)
    world.step("a1", "b1", "a2", "nobodys")
    assert world.sent == [(HERE.address, ["a1", "a2"]), (THERE.address, ["b1"])]
    world.step("a1", is_last=True)
    world.step("a1")
    assert len(world.sent) == 3


def test_a_cancel_ends_its_requests_alone() -> None:
    world = World()
    for number in (1, 2, 3):
        world.submit(number)
    world.submit(2, gateway=THERE)
    world.gateways.cancel(CancelCall(gateway=HERE, numbers=[2, 3]))
    assert world.cancelled == ["a2", "a3"]


def test_a_request_is_refused_whose_cancel_overtook_it() -> None:
    world = World()
    world.gateways.cancel(CancelCall(gateway=HERE, numbers=[2000, 7]))
    for number in range(8, 2000):  # however much comes between
        world.submit(number)
        world.gateways.cancel(CancelCall(gateway=HERE, numbers=[number]))
    for number in (7, 2000):
        with pytest.raises(EngineStoppedError, match="cancelled before it arrived"):
            world.submit(number)


def test_an_early_cancel_is_remembered_past_a_pulse() -> None:
    world = World()
    world.gateways.cancel(CancelCall(gateway=HERE, numbers=[2, 5]))
    world.pulse(3, [1, 3])
    for number in (2, 5):
        with pytest.raises(EngineStoppedError, match="cancelled before it arrived"):
            world.submit(number)
    world.submit(1)
    world.submit(4)


def test_a_request_that_its_gateway_does_not_name_is_ended() -> None:
    world = World()
    for number in (1, 2, 3, 4):
        world.submit(number)
    world.submit(1, gateway=THERE)
    world.pulse(3, [2])
    assert world.cancelled == ["a1", "a3"]  # 4 was submitted after the gateway wrote this pulse


def test_a_pulse_that_a_newer_one_overtook_is_ignored() -> None:
    world = World()
    for number in (1, 2):
        world.submit(number)
    world.pulse(2, [1, 2])
    world.pulse(1, [])
    assert world.cancelled == []


def test_a_pulse_is_answered_with_the_requests_that_the_engine_does_not_hold() -> None:
    world = World()
    for number in (1, 2):
        world.submit(number)
    world.step("a2", is_last=True)
    assert world.pulse(3, [1, 2, 3]) == [2, 3]


def test_the_requests_of_a_silent_gateway_are_ended_and_its_channel_is_closed() -> None:
    world = World()
    world.submit(1)
    world.submit(1, gateway=THERE)
    world.now_s += GATEWAY_SILENCE_S - 1
    world.pulse(1, [1], gateway=THERE)
    world.step("b1")
    assert world.cancelled == []
    world.now_s += 2
    world.step("b1")
    assert world.cancelled == ["a1"]
    assert world.forgotten == []  # the request's end goes out first
    world.step("a1", is_last=True)
    world.now_s += 2
    world.step("b1")
    assert world.forgotten == [HERE.address]


def test_the_channel_to_a_gateway_that_came_back_at_its_address_stays_open() -> None:
    world = World()
    world.pulse(0, [])
    world.now_s += GATEWAY_SILENCE_S + 1
    later = GatewayName(address=HERE.address, life="c")
    world.submit(1, gateway=later)
    world.step("c1")
    assert world.forgotten == []
    assert world.cancelled == []


def test_the_requests_of_a_gateway_that_takes_no_more_tokens_are_ended() -> None:
    world = World()
    world.submit(1)
    world.submit(1, gateway=THERE)
    world.full.add(HERE.address)
    world.step("a1", "b1")
    assert world.cancelled == ["a1"]


def test_a_request_that_the_engine_refused_is_forgotten() -> None:
    world = World()
    world.submit(1)
    world.gateways.release("a1")
    world.step("a1")
    assert world.sent == []
    assert world.pulse(1, [1]) == [1]


def test_an_id_that_is_taken_is_refused_and_the_first_request_keeps_its_gateway() -> None:
    world = World()
    world.submit(1, request_id="same")
    with pytest.raises(RequestError, match="request_id must be new, 'same' is being generated"):
        world.submit(1, gateway=THERE, request_id="same")
    world.step("same")
    assert world.sent == [(HERE.address, ["same"])]
