"""The order in which one plan replaces another: start, publish, acknowledge, drain, evict.

The simulator follows it, and so does whoever applies plans to a live cluster. Pure: it is given what happened, says
what is due and refuses what comes too early; no clock, no I/O.

1. Start: instances that only the next plan has are started and warmed beside those in force.
2. Publish: once all of them are warm, the table goes to every engine under its (epoch, version).
3. Acknowledge: an engine does once it uses the table and its calls under older tables have ended.
4. Drain: once every engine has, nothing is sent any more to instances that the new table leaves out: those that only
   the old plan has, and those that were started but are not in it after all.
5. Evict: their rows in the workers' memory are freed.

At every moment each function of the plan in force has its instances warm, and no call meets one that was evicted.

Shapes: N instances, named by their keys as in `Plan.keys_N`.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from moeless.core.arrays import IntArray
from moeless.core.errors import MoelessError
from moeless.core.expert import FunctionId
from moeless.core.plan import Plan


class RolloutOrderError(MoelessError):
    """A step of a rollout came before the one that it rests on."""


class TableVersion(NamedTuple):
    """Orders routing tables: those of a later controller's life come after all of an earlier one's."""

    epoch: int
    version: int


class Phase(StrEnum):
    """The step of a rollout that is under way."""

    START = "start"
    PUBLISH = "publish"
    ACKNOWLEDGE = "acknowledge"
    DRAIN = "drain"
    DONE = "done"


class Step(NamedTuple):
    """One step of a rollout."""

    phase: Phase
    keys: IntArray
    """Instances that it concerns."""


def rollout_steps(before: Plan, after: Plan) -> tuple[Step, ...]:
    """The steps from one plan to the next, in their order, if nothing else changes meanwhile."""
    dropped_keys = before.keys_N[~after.has(before.keys_N)]
    return (
        Step(Phase.START, after.keys_N[after.started_since(before)]),
        Step(Phase.PUBLISH, after.keys_N),
        Step(Phase.ACKNOWLEDGE, after.keys_N),
        Step(Phase.DRAIN, dropped_keys),
        Step(Phase.DONE, dropped_keys),
    )


class Rollout:
    """One plan on its way into force.

    Args:
        before: in force when the rollout begins.
        after: to come into force.
        epoch: of the controller that rolls out.
    """

    def __init__(self, before: Plan, after: Plan, *, epoch: int) -> None:
        self.after = after
        self.table = TableVersion(epoch, after.version)
        self.start_keys: IntArray = after.keys_N[after.started_since(before)]
        """Instances to start; all of them, warm ones too."""
        self._warm_keys: IntArray = self.start_keys[:0]
        self._silent: set[int | str] | None = None
        """Engines that have not acknowledged; None before the table is published."""
        self._drain_keys: IntArray = self.start_keys[:0]

    @property
    def phase(self) -> Phase:
        """The first step that is not over."""
        if self._silent is None:
            return Phase.START if len(self._warm_keys) < len(self.start_keys) else Phase.PUBLISH
        if self._silent:
            return Phase.ACKNOWLEDGE
        return Phase.DRAIN if len(self._drain_keys) else Phase.DONE

    def mark_warm(self, keys: IntArray) -> None:
        """Instances of `start_keys` that have started and are warm."""
        self._warm_keys = np.union1d(self._warm_keys, np.intersect1d(keys, self.start_keys))

    def publish(self, engines: Iterable[int | str], *, in_force: Plan, plan: Plan | None = None) -> TableVersion:
        """Publish the table to the engines that are alive. Returns what they have to acknowledge.

        Args:
            engines: those with calls under an older table, or that may still make some.
            in_force: what has served until now: `before`, with what was started or evicted meanwhile for calls that
                could not wait.
            plan: what serves from now on; default: `after`. It differs where something was started or evicted
                meanwhile.
        Raises: RolloutOrderError if an instance of the plan is not warm, or the table has been published.
        """
        if self._silent is not None:
            raise RolloutOrderError(f"rollout: table {tuple(self.table)} must be published once, got a second time")
        plan = plan or self.after
        is_warm_N = in_force.has(plan.keys_N) | np.isin(plan.keys_N, self._warm_keys)
        if not is_warm_N.all():
            first = int(np.argmin(is_warm_N))
            function = FunctionId(int(plan.layer_N[first]), int(plan.expert_N[first]))
            raise RolloutOrderError(
                f"rollout: every instance must be warm before table {tuple(self.table)} is published, got {function} "
                f"cold on worker {plan.worker_N[first]} and {int((~is_warm_N).sum()) - 1} others"
            )
        held_keys = np.union1d(in_force.keys_N, self.start_keys)
        self._drain_keys = held_keys[~plan.has(held_keys)]
        self._silent = set(engines)
        return self.table

    def acknowledge(self, engine: int | str, table: TableVersion) -> None:
        """An engine uses a table and has ended its calls under older ones. Tables before this one do not count.

        Raises: RolloutOrderError before the table is published.
        """
        if self._silent is None:
            raise RolloutOrderError(f"rollout: table {tuple(self.table)} must be published before it is acknowledged")
        if table >= self.table:
            self._silent.discard(engine)

    def remove_engine(self, engine: int | str) -> None:
        """An engine died: its calls died with it."""
        if self._silent is not None:
            self._silent.discard(engine)

    @property
    def drain_keys(self) -> IntArray:
        """Instances to drain now: none before every engine has acknowledged."""
        return self._drain_keys if self.phase is Phase.DRAIN else self._drain_keys[:0]

    def evict(self, keys: IntArray) -> None:
        """Instances that have no call left are evicted.

        Raises: RolloutOrderError if one is not to be drained yet, or not at all.
        """
        early = np.setdiff1d(keys, self.drain_keys)
        if len(early):
            raise RolloutOrderError(
                f"rollout: instances must be drained before they are evicted, got {len(early)} in phase {self.phase}"
            )
        self._drain_keys = np.setdiff1d(self._drain_keys, keys)
