"""The plan as the dispatcher uses it: which instances a function has and the share of tokens each gets.

Built by whoever plans (an even spread by deployments/application.py today, control/apply.py later), read by dispatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moeless.core.call_cost import CallCost
from moeless.core.errors import ConfigError
from moeless.core.expert import FunctionId

LOCAL_WORKER = "engine"
"""Name of the worker that is the engine's own process."""


@dataclass(frozen=True, slots=True)
class InstanceShare:
    """One instance of a function and the share of its tokens that it gets, 0 < share <= 1; 0 in tables with a step
    cost, where it may get tokens all the same."""

    worker: str
    share: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingTable:
    """Function → instances. Immutable; a newer table has a higher version and replaces it whole.

    A function without an entry has no instance: the engine computes it from its own cold copy.
    """

    version: int
    instances: Mapping[FunctionId, tuple[InstanceShare, ...]] = field(default_factory=dict)
    step_cost: CallCost | None = None
    """By which each step's tokens are shared out among replicas anew, beginning with their shares (core.balancing).
    None: always by the shares."""

    def __post_init__(self) -> None:
        for function, shares in self.instances.items():
            total = sum(instance.share for instance in shares)
            is_low = any(i.share < 0 or (i.share == 0 and self.step_cost is None) for i in shares)
            if is_low or abs(total - 1.0) > 1e-6:
                rule = "> 0" if self.step_cost is None else ">= 0"
                raise ConfigError(f"routing table: shares of {function} must be {rule} and sum to 1, got {shares}")
            if len({instance.worker for instance in shares}) != len(shares):
                raise ConfigError(f"routing table: {function} names a worker twice: {shares}")

    @property
    def workers(self) -> tuple[str, ...]:
        """Every worker that the table names, sorted: the order in which partial sums are added."""
        return tuple(sorted({i.worker for shares in self.instances.values() for i in shares}))


def spread_evenly(*, num_layers: int, num_experts: int, workers: tuple[str, ...], version: int = 1) -> RoutingTable:
    """One instance for each function, experts dealt to the workers in turn within every layer.

    The start of every layer is rotated so that a number of experts that the workers do not divide loads none
    of them in every layer.
    """
    if not workers:
        raise ConfigError("workers must name at least one worker, got none")
    return RoutingTable(
        version=version,
        instances={
            FunctionId(layer, expert): (InstanceShare(workers[(expert + layer) % len(workers)]),)
            for layer in range(num_layers)
            for expert in range(num_experts)
        },
    )
