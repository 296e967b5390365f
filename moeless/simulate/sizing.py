"""The minimal number of workers on which a system keeps an SLO, by simulating some sizes. docs/capacity.md.

Called by `moeless plan`. Deterministic: the same case gives the same sizes tried and the same figures.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from moeless.core.errors import ConfigError
from moeless.core.policy.values import MEMORY_PATTERN, memory_bytes
from moeless.planning.cost import CostProfile
from moeless.planning.place import InfeasiblePlacementError
from moeless.simulate.report.results import BOUNDS, SystemResult
from moeless.simulate.routing import SequenceRouting
from moeless.simulate.scenario import Scenario, TransferConfig
from moeless.simulate.settings import ScenarioSettings, make_scenario
from moeless.simulate.simulation import OnProgress, simulate
from moeless.simulate.systems import SYSTEMS, SystemConfig, spare_choices
from moeless_predictors.traces import ArrivalTrace

BUYABLE = tuple(name for name in SYSTEMS if name not in BOUNDS)
"""Systems that exist or could: bounds cannot be bought."""
USUAL = tuple(name for name in BUYABLE if not name.startswith("moeless-"))
"""Without the paper's system, and moeless with other forecasts than it would have."""
EXPERTS_SHARE = 0.6
"""Share of a device's memory for experts by default; the backbone, KV caches and activations have the rest."""
_NEAR = 0.05
"""A share of requests that misses the required one by less than this may be made up for by a worker more or less."""

Watch = Callable[[str], AbstractContextManager[OnProgress | None]]
"""Shows how far the simulation goes that is named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SizingConfig:
    """SLO to keep, and the sizes to try."""

    slo: tuple[float, float]
    """Most seconds to a request's first token, and for each token after it."""
    attainment: float = 0.99
    """Share of the requests that must keep both."""
    max_workers: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.attainment <= 1:
            raise ConfigError(f"attainment must be above 0 and at most 1, got {self.attainment}")
        if self.max_workers < 1:
            raise ConfigError(f"max_workers must be at least 1, got {self.max_workers}")


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class SizingCase:
    """Settings that are alike at every size."""

    settings: ScenarioSettings
    """Their `workers` are not looked at; their memory is in bytes, and a worker is not stopped."""
    routing: SequenceRouting
    arrivals: ArrivalTrace
    systems: SystemConfig
    sizing: SizingConfig

    def scenario(self, workers: int, *, worker_idle_s: float | None = None) -> Scenario:
        """Return the scenario on `workers` workers."""
        made = make_scenario(replace(self.settings, workers=workers), self.routing, self.arrivals)
        transfers = TransferConfig(transfer_share=self.settings.transfer_share, worker_idle_s=worker_idle_s)
        return replace(made, transfers=transfers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One that is sized: a system's name, and after how long its idle workers stop (None: never)."""

    system: str
    worker_idle_s: float | None = None

    @property
    def name(self) -> str:
        return self.system if self.worker_idle_s is None else f"{self.system}-idle"


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """One size that was tried."""

    workers: int
    slo_share: float | None = None
    """Share of the requests that kept the SLO; None where the size is impossible."""
    why_not: str | None = None
    ttft_p50_s: float | None = None
    ttft_p99_s: float | None = None
    tpot_p50_s: float | None = None
    tpot_p99_s: float | None = None
    mean_workers: float | None = None
    resident_byte_s: float | None = None
    eplb_spare_replicas: int | None = None
    """Spare replicas of EPLB on each worker and layer; None: another system."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Sized:
    """Results of one system at all sizes tried."""

    candidate: Candidate
    workers: int | None
    """Fewest that keep the SLO; None: no size that was tried does."""
    probes: dict[int, Probe]
    """By number of workers, ascending."""
    best: int | None
    """`workers`, or else the size that came nearest; None: the experts fit none."""
    result: SystemResult | None
    """At the best size."""

    @property
    def one_fewer(self) -> Probe | None:
        """Shown not to do; None where there is none, or no size does."""
        return None if self.workers is None else self.probes.get(self.workers - 1)


def sized(case: SizingCase, candidate: Candidate, *, watch: Watch | None = None) -> Sized:
    """Find the minimal number of the system's workers.

    Raises: ConfigError for what is wrong whatever the size.
    """
    tried: dict[int, tuple[Probe, SystemResult | None]] = {}

    def share(workers: int) -> float | None:
        if workers not in tried:
            tried[workers] = _tried(case, candidate, workers, watch or (lambda _: nullcontext()))
        return tried[workers][0].slo_share

    config = case.sizing
    workers = min_workers(share, attainment=config.attainment, max_workers=config.max_workers)
    possible = [size for size, (probe, _) in sorted(tried.items()) if probe.slo_share is not None]
    best = workers or max(possible, key=lambda size: (share(size), -size), default=None)
    result = tried[best][1] if best else None
    probes = {size: tried[size][0] for size in sorted(tried)}
    return Sized(candidate=candidate, workers=workers, probes=probes, best=best, result=result)


def min_workers(share: Callable[[int], float | None], *, attainment: float, max_workers: int) -> int | None:
    """Fewest workers found whose share of requests is enough, one fewer having been tried and being too few.

    1. Double from 1 on until it is enough. 2. Halve the gap to the size before. 3. The share need not rise with every
    worker (experts divide by some numbers only), so go on downwards while it is near enough. Where doubling finds
    nothing but comes near, sizes around the best are tried.

    Args:
        share: returns the share of requests that keep the SLO on a number of workers; None for an impossible size. May
            be called for a size more than once.
    """
    sizes = [1 << power for power in range(max_workers.bit_length()) if 1 << power < max_workers] + [max_workers]

    def reached(workers: int) -> float:
        return share(workers) or 0.0

    enough = next((size for size in sizes if reached(size) >= attainment), None)
    known = {size for size in sizes if enough is None or size <= enough}
    while enough is None:
        best = max(sorted(known), key=reached)
        if reached(best) < attainment - _NEAR:
            return None
        below = max((size for size in known if size < best), default=0)
        above = min((size for size in known if size > best), default=best)
        between = {(best + below) // 2, (best + above) // 2} - known - {0}
        if not between:
            return None
        known |= between
        enough = next((size for size in sorted(between) if reached(size) >= attainment), None)
    short = max((size for size in known if size < enough), default=0)
    while enough - short > 1:
        middle = (short + enough) // 2
        if reached(middle) >= attainment:
            enough = middle
        else:
            short = middle
    size = enough
    while size > 1 and reached(size) >= attainment - _NEAR:
        size -= 1
        if reached(size) >= attainment:
            enough = size
    return enough


def worker_memory(amount: str | None, profile: CostProfile) -> int:
    """Bytes for instances on a worker: those given, or a part of the device's.

    Raises: ConfigError, also for a share: what a worker's even part of the experts is depends on how many there are.
    """
    if amount is None:
        if profile.device_bytes is None:
            raise ConfigError(
                f"memory_per_worker must be given: profile {profile.name} does not tell a device's memory"
            )
        found = int(EXPERTS_SHARE * profile.device_bytes)
    elif re.match(MEMORY_PATTERN, amount) is None or amount.endswith("%"):
        raise ConfigError(
            "memory_per_worker must be bytes or have a unit (24Gi, 500M), and no share, since how many workers share "
            f"the experts is what is looked for, got {amount!r}"
        )
    else:
        found = memory_bytes(int(amount) if amount.isdigit() else amount, whole_bytes=0)
    if found < profile.model.expert_bytes:
        raise ConfigError(
            f"memory_per_worker must have room for an expert of {profile.model.expert_bytes:,} bytes, got {found:,}"
        )
    return found


def checked_systems(names: Sequence[str], worker_idle_s: float | None) -> list[Candidate]:
    """Systems of these names; moeless a second time with workers that stop, where such are required."""
    unknown = [name for name in names if name not in BUYABLE]
    if unknown or not names:
        raise ConfigError(f"systems must be among {', '.join(BUYABLE)}, got {', '.join(unknown) or 'none'}")
    if len(set(names)) < len(names):
        raise ConfigError(f"systems must differ, got {', '.join(names)}")
    candidates = [Candidate(system=name) for name in names]
    if worker_idle_s is not None:
        TransferConfig(worker_idle_s=worker_idle_s)
        if "moeless" not in names:
            raise ConfigError(f"systems must have moeless, whose idle workers stop, got {', '.join(names)}")
        candidates.append(Candidate(system="moeless", worker_idle_s=worker_idle_s))
    return candidates


def _tried(case: SizingCase, candidate: Candidate, workers: int, watch: Watch) -> tuple[Probe, SystemResult | None]:
    """With the number of EPLB's spare replicas that serves more requests within the SLO, where none is given."""
    tried = [
        _tried_with(case, candidate, workers, watch, config) for config in spare_choices(candidate.system, case.systems)
    ]
    return max(tried, key=lambda one: -1.0 if one[0].slo_share is None else one[0].slo_share)


def _tried_with(
    case: SizingCase, candidate: Candidate, workers: int, watch: Watch, config: SystemConfig
) -> tuple[Probe, SystemResult | None]:
    scenario = case.scenario(workers, worker_idle_s=candidate.worker_idle_s)
    try:
        _check_room(scenario)
        system = SYSTEMS[candidate.system](scenario, config)
        with watch(f"{candidate.name} on {workers} workers") as on_progress:
            result = simulate(scenario, system, slo=case.sizing.slo, on_progress=on_progress)
    except InfeasiblePlacementError as error:
        return Probe(workers=workers, why_not=str(error)), None
    result = msgspec.structs.replace(result, system=candidate.name)
    probe = Probe(
        workers=workers,
        slo_share=result.slo_share,
        ttft_p50_s=result.ttft_s.p50,
        ttft_p99_s=result.ttft_s.p99,
        tpot_p50_s=result.tpot_s.p50,
        tpot_p99_s=result.tpot_s.p99,
        mean_workers=mean_workers(result),
        resident_byte_s=result.resident_byte_s,
        eplb_spare_replicas=config.eplb_spare_replicas,
    )
    return probe, result


def mean_workers(result: SystemResult) -> float:
    """Workers that were not stopped, on average."""
    return round(result.worker_s / result.duration_s, 9)


def _check_room(scenario: Scenario) -> None:
    """A system that starts functions on demand could run with less memory, and would do little else."""
    used = int(np.count_nonzero(scenario.routing.per_token_LE()))
    room = int(scenario.cluster.capacity_W(scenario.profile.model).sum())
    if used > room:
        raise InfeasiblePlacementError(f"the routing uses {used:,} functions, and {room:,} fit the workers' memory")
