"""The systems that are compared: what others do, moeless, and bounds. docs/simulator.md.

Every planner remembers what it saw, so that systems are made anew for each simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from moeless.core.arrays import FloatArray
from moeless.core.cluster import Cluster
from moeless.core.errors import ConfigError
from moeless.core.policy import AffinityPlacer, Policy, ResolvedPolicy, resolve
from moeless.planning.affinity.statistics import AffinityStatistics, gather_statistics
from moeless.planning.baselines.eplb import EplbPlanner
from moeless.planning.baselines.paper import PaperPlanner
from moeless.planning.baselines.static import StaticPlanner
from moeless.planning.cost import CostProfile
from moeless.planning.load_check import check_load
from moeless.planning.place import InfeasiblePlacementError
from moeless.planning.planner import MoelessPlanner, PlanningContext
from moeless.simulate.forecasts import ForecastConfig, PredictedRouting
from moeless.simulate.routing import SequenceRouting
from moeless.simulate.scenario import Scenario, System

EPLB_WINDOW_STEPS = 1000
VLLM_INTERVAL_STEPS = 3000
SGLANG_INTERVAL_STEPS = 1000
PAPER_CV = 0.2
"""V in the MoEless paper."""
AFFINITY_TOKENS = 20_000
"""Tokens, evenly spaced in the routing, that the placer affinity learns from: its search takes longer with more."""
PAPER_RECALL = 0.84
"""Assumed recall of the paper's predictor, which starts functions a layer ahead and whose recall is not published:
that of moeless's on gpt-oss-20b. (The paper fine-tunes predictors below 0.8.)"""
LP_SPLIT_S = 150e-6
"""Time of LPLB's linear programme for a layer on the GPU, where 100 to 200 µs are published."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class SystemConfig:
    """Assumptions about the systems beyond their definitions."""

    policy: Policy = field(default_factory=Policy)
    """Policy of moeless and foresight."""
    model_id: str = ""
    """By which the policy's rules choose."""
    eplb_spare_replicas: int | None = None
    """Instances of each layer and worker that EPLB and lp have beyond one for each expert. None: 1, and for EPLB the
    better of 0 and 1 where `spare_choices` is followed."""
    recall: float | None = None
    """Forecast the tokens that will come, with this share of them at the right expert, instead of by what moeless and
    the paper's system could know: an assumption, not a system."""
    predicted: PredictedRouting | None = None
    """Forecasts of fitted predictors for the routing, which moeless and the paper's system then use."""
    prior_LE: FloatArray | None = None
    """Mean tokens of each function for a token, as was recorded before, shape (L, E): what moeless, foresight, the
    paper's system and SGLang's EPLB plan for at first. None: all are expected to get the same."""
    affinity: AffinityStatistics | None = None
    """Statistics of the routing for the policy's placer affinity; None: computed where the policy names that placer."""
    prefetch_layers: int = 3
    """Layers ahead that moeless starts functions that predictors say are needed; without predictors it starts none."""
    paper_prefetch_layers: int = 1
    """The same of the paper's."""
    paper_interval_s: float = 1.0
    """Between the paper's plans: it groups arrivals by the second."""
    paper_keep_alive_s: float = 30.0
    """The paper keeps instances alive and does not say for how long: as moeless's default."""

    def __post_init__(self) -> None:
        if self.recall is not None and not 0 <= self.recall <= 1:
            raise ConfigError(f"forecast.recall must be from 0 to 1, got {self.recall}")
        if self.recall is not None and self.predicted is not None:
            raise ConfigError("forecast.recall must not be given with predictors, which have their own")
        if self.eplb_spare_replicas is not None and self.eplb_spare_replicas < 0:
            raise ConfigError(f"eplb_spare_replicas must be at least 0, got {self.eplb_spare_replicas}")
        for name in ("prefetch_layers", "paper_prefetch_layers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")


def static(scenario: Scenario, config: SystemConfig) -> System:
    """Static expert parallelism: every expert once, contiguous ones on a worker, tokens exchanged all to all."""
    del config
    planner = StaticPlanner(cluster=scenario.cluster, model=scenario.profile.model)
    return System(name="static", planner=planner, topology="all_to_all")


def eplb_vllm(scenario: Scenario, config: SystemConfig) -> System:
    """EPLB as vLLM runs it: a plan every 3000 steps from the load of the last 1000, engines wait while weights move.

    Global balancing, tokens exchanged all to all, `eplb_spare_replicas` on each worker and layer. Weights come from
    other workers, over the links between them.
    """
    return _eplb(scenario, config, "eplb-vllm", VLLM_INTERVAL_STEPS)


def eplb_sglang(scenario: Scenario, config: SystemConfig) -> System:
    """EPLB as SGLang runs it: the same every 1000 steps, and it can begin with a placement for what was recorded."""
    system = _eplb(scenario, config, "eplb-sglang", SGLANG_INTERVAL_STEPS)
    return replace(system, prior_LE=config.prior_LE)


def lp(scenario: Scenario, config: SystemConfig) -> System:
    """SGLang's LPLB: its EPLB's plans, and each step's tokens split over replicas anew, by linear programme."""
    system = eplb_sglang(scenario, config)
    return replace(system, name="lp", split="lp", split_s=LP_SPLIT_S)


def moeless_paper(scenario: Scenario, config: SystemConfig) -> System:
    """The MoEless paper's system (arXiv 2603.06350) as far as its text describes it.

    `planning.baselines.paper.PaperPlanner` with V = 0.2, tokens of a function split evenly, instances kept alive, the
    forecast that moeless has, functions without an instance started a layer ahead. In moeless's topology, the hub,
    since the functions are reached from where attention is computed.
    """
    recall = _prefetch_recall(config)
    planner = PaperPlanner(
        _system(scenario, config.paper_interval_s), max_cv=PAPER_CV, keep_alive_s=config.paper_keep_alive_s
    )
    return System(
        name="moeless-paper",
        planner=planner,
        forecast=_forecast(config),
        predicted=config.predicted,
        interval_s=config.paper_interval_s,
        prefetch_layers=config.paper_prefetch_layers,
        prefetch_recall=PAPER_RECALL if recall is None else recall,
        prior_LE=config.prior_LE,
    )


def moeless(scenario: Scenario, config: SystemConfig) -> System:
    """moeless by the policy: plans each tick, in the background, from the forecast of fitted predictors, or without
    any from popularity.
    """
    resolved = _resolved(scenario, config)
    recall, exchange = _prefetch_recall(config), scenario.profile.exchange
    affinity = None
    if isinstance(resolved.placer, AffinityPlacer):
        affinity = config.affinity or routing_statistics(scenario.routing)
    return System(
        name="moeless",
        planner=MoelessPlanner(resolved, replace(_system(scenario, resolved.tick_s), affinity=affinity)),
        forecast=_forecast(config, quantile=_quantile(resolved)),
        predicted=config.predicted,
        split="balanced",
        split_s=exchange.split_s,
        split_token_s=exchange.split_token_s,
        interval_s=resolved.tick_s,
        prefetch_layers=0 if recall is None else config.prefetch_layers,
        prefetch_recall=recall or 0.0,
        prior_LE=config.prior_LE,
        num_known_tokens=affinity.num_tokens if affinity else 0,
    )


def moeless_window(scenario: Scenario, config: SystemConfig) -> System:
    """moeless with the load of the last seconds for its forecast, without predictors."""
    system = moeless(scenario, replace(config, predicted=None, recall=None))
    return replace(system, name="moeless-window", forecast=replace(system.forecast, kind="window"))


def moeless_popularity(scenario: Scenario, config: SystemConfig) -> System:
    """moeless with the popularity of each function for its forecast, without predictors."""
    system = moeless(scenario, replace(config, predicted=None, recall=None))
    return replace(system, name="moeless-popularity")


def _forecast(config: SystemConfig, *, quantile: float = 0.9) -> ForecastConfig:
    if config.recall is not None:
        return ForecastConfig(kind="foresight", recall=config.recall, quantile=quantile)
    return ForecastConfig(kind="popularity" if config.predicted is None else "predictor", quantile=quantile)


def _prefetch_recall(config: SystemConfig) -> float | None:
    """Share of the functions without an instance that predictors see layers ahead; None: there are no predictors."""
    return config.recall if config.predicted is None else config.predicted.recall


def routing_statistics(routing: SequenceRouting) -> AffinityStatistics:
    """Compute the statistics that the placer affinity gets: those of the very routing that is simulated."""
    return gather_statistics(routing.trace.experts_TLk, num_experts=routing.num_experts, max_tokens=AFFINITY_TOKENS)


def foresight(scenario: Scenario, config: SystemConfig) -> System:
    """The bound of every predictor: moeless with the very tokens that will come; functions are started in time."""
    known = moeless(scenario, replace(config, predicted=None, recall=1.0))
    assert known.forecast.kind == "foresight"
    return replace(known, name="foresight", is_prefetch_in_time=True)


def exact_load(scenario: Scenario, config: SystemConfig) -> System:
    """Exact load, free moves, every step: whole experts placed anew for the tokens of each layer of each step.

    With as many instances of a layer as the policy lets moeless have and memory holds. What UltraEP comes near.
    """
    model = scenario.profile.model
    share = float(getattr(_resolved(scenario, config).scaler, "max_extra_share", np.inf))
    room = int(scenario.cluster.capacity_W(model).sum()) // model.num_layers
    instances = min(room, model.num_experts * scenario.cluster.num_workers, (1 + share) * model.num_experts)
    return replace(static(scenario, config), name="exact-load", bound="exact", bound_instances=int(instances))


def limit(scenario: Scenario, config: SystemConfig) -> System:
    """The physical limit: perfect balance whatever the plan, no weights moved, the faster of the two topologies.

    It holds what static expert parallelism holds.
    """
    return replace(static(scenario, config), name="limit", bound="fluid")


def whole_experts(scenario: Scenario, config: SystemConfig) -> System:
    """The limit of every placement: as `limit`, but a call of an expert takes the time of reading its weights at least,
    so that five calls take four workers two rounds."""
    return replace(static(scenario, config), name="whole-experts", bound="integral")


SYSTEMS: dict[str, Callable[[Scenario, SystemConfig], System]] = {
    "static": static,
    "eplb-vllm": eplb_vllm,
    "eplb-sglang": eplb_sglang,
    "lp": lp,
    "moeless-paper": moeless_paper,
    "moeless": moeless,
    "moeless-window": moeless_window,
    "moeless-popularity": moeless_popularity,
    "foresight": foresight,
    "exact-load": exact_load,
    "whole-experts": whole_experts,
    "limit": limit,
}
"""By name, in the order of the tables."""


def usual_systems(*, has_predictors: bool) -> list[str]:
    """All of them; with predictors moeless is also run without, which it is anyway where there are none."""
    return [name for name in SYSTEMS if has_predictors or name != "moeless-popularity"]


def make_systems(
    scenario: Scenario, *, names: Sequence[str] | None = None, config: SystemConfig | None = None
) -> list[System]:
    """The systems of these names (default: all), made for one simulation each.

    Raises: ConfigError for a name that is not known or given twice, and what does not fit the scenario.
    """
    chosen = list(SYSTEMS) if names is None else list(names)
    unknown = [name for name in chosen if name not in SYSTEMS]
    if unknown or not chosen:
        raise ConfigError(f"systems must be among {', '.join(SYSTEMS)}, got {', '.join(unknown) or 'none'}")
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"systems must differ, got {', '.join(chosen)}")
    config = config or SystemConfig()
    if config.prior_LE is not None:
        model = scenario.profile.model
        check_load("prior_LE", config.prior_LE, (model.num_layers, model.num_experts))
    return [SYSTEMS[name](scenario, config) for name in chosen]


def spare_choices(name: str, config: SystemConfig) -> list[SystemConfig]:
    """Configurations to try for a system, of which the better counts: EPLB without spare replicas, and with one."""
    if not name.startswith("eplb") or config.eplb_spare_replicas is not None:
        return [config]
    return [replace(config, eplb_spare_replicas=spare) for spare in (0, 1)]


def described_systems(systems: Sequence[System], config: SystemConfig) -> dict[str, str]:
    """Describe the assumptions about each system, in words."""
    return {f"system {system.name}": _DESCRIBED[system.name](system, config) for system in systems}


def _described_first(system: System) -> str:
    return f"begins with a plan for {'equal loads' if system.prior_LE is None else 'the load recorded before'}"


def _described_eplb(system: System, config: SystemConfig) -> str:
    unset = "1" if system.name == "lp" else "0 or 1, whichever serves better"
    spare_words = unset if config.eplb_spare_replicas is None else str(config.eplb_spare_replicas)
    return (
        f"EPLB's global form every {system.interval_steps:,} engine steps from the load of the last "
        f"{system.window_steps:,}, spare replicas on each worker and layer: {spare_words}; engines "
        f"wait while weights move from worker to worker, tokens all to all; {_described_first(system)}"
    )


def _described_paper(system: System, config: SystemConfig) -> str:
    return (
        f"the MoEless paper's scaling (V = {PAPER_CV:g}) and placement every {system.interval_s:g} s, instances kept "
        f"alive for {config.paper_keep_alive_s:g} s; {_described_forecast(system)}; functions started "
        f"{system.prefetch_layers} layer ahead with a recall of {system.prefetch_recall:.0%}, tokens from a hub; "
        + _described_first(system)
    )


def _described_moeless(system: System, config: SystemConfig) -> str:
    del config
    known = system.num_known_tokens
    by_affinity = f"; placed by the affinity of {known:,} tokens of the very routing that is simulated" if known else ""
    return (
        f"plans every {system.interval_s:g} s in the background; {_described_forecast(system)}; "
        + (
            f"functions started {system.prefetch_layers} layers ahead with a recall of {system.prefetch_recall:.0%}"
            if system.prefetch_layers
            else "no function started ahead of its layer"
        )
        + ", tokens from a hub, which shares out each step's tokens among replicas anew; "
        + _described_first(system)
        + by_affinity
    )


def _described_forecast(system: System) -> str:
    forecast = system.forecast
    return {
        "window": "forecasts the load of the last seconds",
        "popularity": f"forecasts by popularity (half-life {forecast.half_life_s:g} s)",
        "predictor": "forecasts by what the predictors given said of the last tokens of each request, corrected for "
        "drift, and by popularity for requests without any",
        "foresight": f"ASSUMED to know the tokens to come with a recall of {forecast.recall:.0%}, requests that will "
        "arrive and the length of answers among them",
    }[forecast.kind]


_DESCRIBED: dict[str, Callable[[System, SystemConfig], str]] = {
    "static": lambda *_: "every expert once, contiguous ones on a worker, tokens all to all",
    "eplb-vllm": _described_eplb,
    "eplb-sglang": _described_eplb,
    "lp": lambda system, config: (
        f"{_described_eplb(system, config)}; each step's tokens split over replicas by linear programme, which takes "
        f"{LP_SPLIT_S * 1e6:g} µs a layer"
    ),
    "moeless-paper": _described_paper,
    "moeless": _described_moeless,
    "moeless-window": _described_moeless,
    "moeless-popularity": _described_moeless,
    "foresight": lambda system, _: (
        f"moeless told of the very tokens that will come in the next {system.interval_s:g} s, and no function is ever "
        f"waited for; {_described_first(system)}: the bound of every predictor"
    ),
    "exact-load": lambda system, _: (
        f"whole experts and replicas, at most {system.bound_instances} instances of a layer, placed for the exact load "
        "of each layer of each step and moved for free, the faster of both topologies; it holds what static holds"
    ),
    "whole-experts": lambda *_: (
        "the bound of every placement of whole experts: perfect balance as far as calls that read all of an expert's "
        "weights allow, the faster of both topologies, nothing moved; it holds what static holds"
    ),
    "limit": lambda *_: (
        "the bound of every plan: work that can be divided at will, the faster of both topologies, nothing moved; it "
        "holds what static holds"
    ),
}


def _eplb(scenario: Scenario, config: SystemConfig, name: str, interval_steps: int) -> System:
    cluster, model = scenario.cluster, scenario.profile.model
    per_worker = 1 if config.eplb_spare_replicas is None else config.eplb_spare_replicas
    spare = per_worker * cluster.num_workers
    hosted = -(-(model.num_experts + spare) // cluster.num_workers) * model.num_layers
    room = int(cluster.capacity_W(model).min())
    if hosted > room:
        raise InfeasiblePlacementError(
            f"eplb_spare_replicas must leave room: with {per_worker} on each worker and layer a worker "
            f"holds {hosted} instances, and {room} fit its memory"
        )
    # EPLB counts every expert's replicas up to the number of workers, so that more would stay empty.
    planner = EplbPlanner(
        cluster=cluster,
        model=model,
        spare_replicas=min(spare, model.num_experts * (cluster.num_workers - 1)),
        interval_steps=interval_steps,
        window_steps=EPLB_WINDOW_STEPS,
        name=name,
    )
    return System(
        name=name,
        planner=planner,
        topology="all_to_all",
        interval_steps=interval_steps,
        window_steps=EPLB_WINDOW_STEPS,
        is_blocking=True,
    )


def _resolved(scenario: Scenario, config: SystemConfig) -> ResolvedPolicy:
    return resolve(config.policy, scenario.profile.model, model_id=config.model_id)


def _quantile(policy: ResolvedPolicy) -> float:
    """The simulator forecasts one quantile for all functions: the highest that the policy has."""
    return float(policy.forecast_quantile_LE.max())


def _system(scenario: Scenario, interval_s: float) -> PlanningContext:
    profile = scenario.profile
    cost = profile.expert_time.call_cost(link_s=profile.link_s(scenario.cluster))
    return PlanningContext(
        model=profile.model,
        cluster=scenario.cluster,
        seconds=_worker_seconds(profile, scenario.cluster),
        floor_tokens=cost.floor_tokens / (1 + cost.link_tokens),
        horizon_steps=max(1.0, interval_s * scenario.num_engines / _step_s(scenario)),
        start_s=profile.start_s,
    )


def _worker_seconds(profile: CostProfile, cluster: Cluster) -> Callable[[FloatArray], FloatArray]:
    """Time of a worker for the tokens of one of its instances: computing them, and what their transport takes."""
    mean_s, link_s = profile.expert_time.averaged(), profile.link_s(cluster)
    return lambda tokens: mean_s(tokens) + link_s * tokens


def _step_s(scenario: Scenario) -> float:
    """Least time of an engine step: what a step of few tokens takes beside its exchange."""
    profile = scenario.profile
    devices = scenario.cluster.num_workers / scenario.num_engines
    backbone_s = profile.backbone.seconds(num_tokens=1, decode_context=0, prefill_context=0, devices=devices)
    return backbone_s + profile.model.num_layers * float(profile.expert_time(1.0))
