"""From the sizes of all systems to what to buy: costs, the recommended system, and its plan. docs/capacity.md.

Called by `moeless plan`, which writes what is here as JSON.

Shapes: L MoE layers, E experts, W workers, N instances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace

import msgspec
import numpy as np

from moeless.core.expert import FunctionId
from moeless.core.plan import Plan
from moeless.planning.affinity.metrics import balance_L, touched
from moeless.planning.affinity.statistics import AffinityStatistics
from moeless.planning.first_plan import steady_observation
from moeless.planning.place import InfeasiblePlacementError
from moeless.simulate.exact import ExactPlacement, placed_exactly
from moeless.simulate.report.results import SystemResult
from moeless.simulate.settings import described
from moeless.simulate.sizing import EXPERTS_SHARE, Candidate, Probe, Sized, SizingCase, mean_workers
from moeless.simulate.systems import SYSTEMS, described_systems


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Cost of the workers over the simulated time."""

    worker_hours: float
    """Hours of workers that were not stopped."""
    mean_workers: float
    dollars_per_hour: float | None = None
    dollars_per_million_tokens: float | None = None
    """Dollars per million tokens of prompts and outputs."""


class Alternative(msgspec.Struct, frozen=True, kw_only=True):
    """One system and what it needs."""

    system: str
    workers: int | None
    """Fewest that were found to keep the SLO; None: none of those tried do."""
    one_fewer: Probe | None
    """Result with one worker fewer, which misses the SLO."""
    probes: list[Probe]
    """Every size that was tried."""
    shown_workers: int | None
    """The size that `result` and `cost` are of: `workers`, or else the one that came nearest."""
    result: SystemResult | None
    cost: Cost | None


class PlannedWorker(msgspec.Struct, frozen=True, kw_only=True):
    """Instances on one worker."""

    name: str
    node: str
    instances: int
    instance_bytes: int
    load_share: float
    """Share of all layers' tokens; an even part is 1 / workers."""
    functions: dict[str, float]
    """By name, the share of the function's tokens that this instance gets."""


class PlannedLayer(msgspec.Struct, frozen=True, kw_only=True):
    """One MoE layer over all workers."""

    layer: int
    instances: int
    replicas: list[int]
    """Number of replicas of each expert."""
    imbalance: float
    """Busiest worker over the mean, by tokens."""
    workers_touched: float
    """By a token, on average, of at most top-k."""


class Recommendation(msgspec.Struct, frozen=True, kw_only=True):
    """Workers to buy, and a first placement: from then on the system plans by itself."""

    system: str
    workers: int
    why: str
    step_tokens: float
    """Tokens of a step that the plan is for: the token-weighted mean, spread over experts as in the routing trace."""
    instances: int
    imbalance: float
    """Mean over layers."""
    workers_touched: float
    num_without_instance: int
    """Functions that the trace uses and the plan starts only when they are needed."""
    exact: ExactPlacement | None = None
    """With --exact: what the integer programmes reached."""
    plan: list[PlannedWorker]
    layers: list[PlannedLayer]


class CapacityReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `moeless plan` found."""

    assumptions: dict[str, str]
    """In words."""
    settings: dict[str, object]
    """Settings as given, with the defaults filled in."""
    slo_s: tuple[float, float]
    attainment: float
    memory_per_worker: int
    expert_bytes: int
    alternatives: list[Alternative]
    recommendation: Recommendation | None
    """None: no system keeps the SLO."""


def assumptions(case: SizingCase, candidates: Sequence[Candidate], *, is_memory_given: bool) -> dict[str, str]:
    """The case and what is assumed of it, in words.

    Raises: ConfigError for what is wrong with a system whatever the size.
    """
    scenario = case.scenario(case.sizing.max_workers)
    model, memory = scenario.profile.model, scenario.cluster.workers[0].memory_bytes
    num_requests, (ttft_s, tpot_s), share = case.arrivals.num_requests, case.sizing.slo, case.sizing.attainment
    part = ""
    if not is_memory_given and scenario.profile.device_bytes is not None:
        part = (
            f", {EXPERTS_SHARE:.0%} of the device's {scenario.profile.device_bytes / 1e9:g} GB; the rest is for the "
            "backbone, KV caches and activations"
        )
    found = described(scenario)
    found["workers"] = (
        f"as few as keep the SLO, at most {case.sizing.max_workers}, each a device that attends and hosts experts"
        + (f", {case.settings.workers_per_node} on a node" if case.settings.workers_per_node else ", all on one node")
    )
    found["memory"] = (
        f"{memory / 1e9:.2f} GB for instances on each worker{part}: {memory // model.expert_bytes:,} instances; all "
        f"experts once are {model.num_layers * model.num_experts:,}; sizes that have no room for every function in use "
        "are left out"
    )
    found["SLO"] = (
        f"first token within {ttft_s:g} s and each after it within {tpot_s:g} s on average, for {share:.4g} of the "
        f"requests: {math.floor(num_requests * (1 - share) + 1e-9):,} of {num_requests:,} may miss it"
    )
    for candidate in candidates:
        if candidate.worker_idle_s is not None:
            found[f"system {candidate.name}"] = (
                f"moeless, and workers without instances stop after {candidate.worker_idle_s:g} s"
            )
            continue
        try:
            system = SYSTEMS[candidate.system](scenario, case.systems)
        except InfeasiblePlacementError:
            continue  # at the largest size, so at all of them
        found[f"system {candidate.name}"] = described_systems([system], case.systems)[f"system {candidate.name}"]
    return found


def settings_in(case: SizingCase, candidates: Sequence[Candidate]) -> dict[str, object]:
    """Return the settings under their names in the JSON file."""
    settings = asdict(case.settings)
    del settings["workers"]
    return settings | {
        "systems": [candidate.system for candidate in candidates if candidate.worker_idle_s is None],
        "max_workers": case.sizing.max_workers,
        "recall": case.systems.recall,
        "eplb_spare_replicas": case.systems.eplb_spare_replicas,
    }


def alternative_of(found: Sized, *, worker_hour_cost: float | None = None) -> Alternative:
    """Make the record that is written and shown. Args: worker_hour_cost: dollars for a worker and hour."""
    cost = None if found.result is None else cost_of(found.result, worker_hour_cost)
    return Alternative(
        system=found.candidate.name,
        workers=found.workers,
        one_fewer=found.one_fewer,
        probes=list(found.probes.values()),
        shown_workers=found.best,
        result=found.result,
        cost=cost,
    )


def cost_of(result: SystemResult, worker_hour_cost: float | None) -> Cost:
    """Compute the cost of the workers that were up."""
    hours, workers = result.worker_s / 3600, mean_workers(result)
    if worker_hour_cost is None:
        return Cost(worker_hours=hours, mean_workers=workers)
    return Cost(
        worker_hours=hours,
        mean_workers=workers,
        dollars_per_hour=workers * worker_hour_cost,
        dollars_per_million_tokens=hours * worker_hour_cost / (result.num_tokens / 1e6),
    )


def chosen(all_sized: Sequence[Sized]) -> tuple[Sized, str] | None:
    """The system with the lowest number of workers to pay for, of those the one with the least memory in use; and why.

    None if no system keeps the SLO.
    """
    ranked = sorted((found for found in all_sized if found.workers is not None), key=_rank)
    if not ranked:
        return None
    first, *others = ranked
    if not others:
        return first, "it is the only one that keeps the SLO"
    (workers, memory), (next_workers, next_memory) = _rank(first), _rank(others[0])
    if workers < next_workers:
        paid = "workers" if workers == first.workers else "workers up on average"
        return first, f"it needs {workers:.3g} {paid}, the next ({others[0].candidate.name}) {next_workers:.3g}"
    equal = ", ".join(found.candidate.name for found in others if _rank(found)[0] == workers)
    if next_memory <= memory * (1 + 1e-9):
        return first, f"it and {equal} need {workers:.3g} workers, and no other holds fewer experts on average"
    return first, (
        f"it and {equal} need {workers:.3g} workers, and it holds {memory / 1e9:,.1f} GB of experts on average, the "
        f"next ({others[0].candidate.name}) {next_memory / 1e9:,.1f}"
    )


def _rank(found: Sized) -> tuple[float, float]:
    assert found.result is not None
    return mean_workers(found.result), found.result.resident_byte_s / found.result.duration_s


def recommended(
    case: SizingCase,
    found: Sized,
    why: str,
    statistics: AffinityStatistics,
    *,
    exact_time_limit_s: float | None = None,
) -> Recommendation:
    """The plan that the system's own planner makes for the load that it met, with nothing placed before.

    The load is that of the step that the average token was in, spread over functions as in the routing; the forecast
    quantile is that of tokens that come independently.

    Args:
        statistics: of the routing: they count the workers that a token touches.
        exact_time_limit_s: improve the plan by integer programmes, with this time for a layer. None: do not.
    """
    assert found.workers is not None
    assert found.result is not None
    scenario = case.scenario(found.workers)
    config = case.systems
    if found.candidate.system.startswith("eplb"):
        config = replace(config, eplb_spare_replicas=found.probes[found.workers].eplb_spare_replicas)
    system = SYSTEMS[found.candidate.system](scenario, config)
    load_LE = case.routing.per_token_LE() * found.result.step_tokens
    plan = system.planner.plan(steady_observation(load_LE, quantile=system.forecast.quantile), None)
    cluster, model = scenario.cluster, scenario.profile.model
    exact = None
    if exact_time_limit_s is not None:
        plan, exact = placed_exactly(
            plan, statistics, load_LE, scenario, topology=system.topology, time_limit_s=exact_time_limit_s
        )
    imbalance_L = balance_L(plan, load_LE, cluster.speed_W)
    _, shares_LEW = plan.dense()
    touched_L = [touched(shares_EW, sets) for shares_EW, sets in zip(shares_LEW, statistics.sets, strict=True)]
    counts_LE = plan.counts_LE
    load_W = plan.worker_load_LW(load_LE).sum(axis=0)
    functions_W = _functions_W(plan)
    return Recommendation(
        system=found.candidate.name,
        workers=found.workers,
        why=why,
        step_tokens=found.result.step_tokens,
        instances=plan.num_instances,
        imbalance=float(np.mean(imbalance_L)),
        workers_touched=float(np.mean(touched_L)),
        exact=exact,
        num_without_instance=int(((counts_LE == 0) & (load_LE > 0)).sum()),
        plan=[
            PlannedWorker(
                name=worker.name,
                node=worker.node,
                instances=len(functions),
                instance_bytes=len(functions) * model.expert_bytes,
                load_share=float(load / load_W.sum()),
                functions=functions,
            )
            for worker, functions, load in zip(cluster.workers, functions_W, load_W, strict=True)
        ],
        layers=[
            PlannedLayer(
                layer=layer,
                instances=int(counts_LE[layer].sum()),
                replicas=counts_LE[layer].tolist(),
                imbalance=float(imbalance_L[layer]),
                workers_touched=touched_L[layer],
            )
            for layer in range(model.num_layers)
        ],
    )


def _functions_W(plan: Plan) -> list[dict[str, float]]:
    functions_W: list[dict[str, float]] = [{} for _ in range(plan.num_workers)]
    for layer, expert, worker, share in zip(
        plan.layer_N.tolist(), plan.expert_N.tolist(), plan.worker_N.tolist(), plan.share_N.tolist(), strict=True
    ):
        functions_W[worker][str(FunctionId(layer, expert))] = share
    return functions_W
