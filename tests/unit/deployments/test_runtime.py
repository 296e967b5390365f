"""The stand-in that Serve holds for a replica's real class."""

from __future__ import annotations

import pytest

from moeless.deployments.runtime import DeferredReplica

closed: list[str] = []


class Replica:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, value: int) -> int:
        return value + 1

    def greet(self) -> str:
        return f"I am {self.name}"

    def check_health(self) -> None:
        raise RuntimeError("unwell")

    def close(self) -> None:
        closed.append(self.name)


def test_calls_reach_the_real_class_and_stopping_closes_it_once() -> None:
    deferred = DeferredReplica(f"{__name__}:Replica", "worker-0")
    assert (deferred(1), deferred.greet()) == (2, "I am worker-0")
    with pytest.raises(RuntimeError, match="unwell"):
        deferred.check_health()
    deferred.__del__()  # Serve calls it, and Python once more
    deferred.__del__()
    assert closed == ["worker-0"]
