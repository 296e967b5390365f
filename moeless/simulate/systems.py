"""The systems that are compared: what others do, moeless, and two bounds. docs/simulator.md.

Every planner remembers what it saw, so that systems are made anew for each simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

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
from moeless.simulate.forecasts import ForecastConfig, SpanCounts
from moeless.simulate.routing import SequenceRouting
from moeless.simulate.scenario import Scenario, System

EPLB_WINDOW_STEPS = 1000
VLLM_INTERVAL_STEPS = 3000
SGLANG_INTERVAL_STEPS = 1000
PAPER_CV = 0.2
"""V in the MoEless paper."""
AFFINITY_TOKENS = 20_000
"""Of the routing, evenly spaced, that the placer affinity goes by: the time of its search grows with them."""
MEASURED_RECALL = 0.84
"""Share of a token's experts that our predictor finds one layer ahead on gpt-oss-20b (docs/predictors.md)."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class SystemConfig:
    """What is assumed of the systems beyond what defines them."""

    policy: Policy = field(default_factory=Policy)
    """Of moeless and foresight."""
    model_id: str = ""
    """By which the policy's rules choose."""
    eplb_spare_replicas: int = 1
    """Instances of each layer and worker that EPLB has beyond one for each expert."""
    recall: float = MEASURED_RECALL
    """Of moeless's predictor, and of the paper's, which does not publish a figure: what is compared is what is made of
    the forecast. (The paper fine-tunes what falls below 0.8.)"""
    predicted: SpanCounts | None = None
    """What fitted predictors say of the routing; moeless then forecasts by them."""
    prior_LE: FloatArray | None = None
    """Mean tokens of each function for a token, as was recorded before, shape (L, E): what moeless, foresight, the
    paper's system and SGLang's EPLB plan for at first. None: all are expected to get the same."""
    affinity: AffinityStatistics | None = None
    """Of the routing, for the policy's placer affinity; None: gathered where that is asked for."""
    prefetch_layers: int = 3
    """How many layers ahead moeless's predictor tells which functions are needed."""
    paper_prefetch_layers: int = 1
    """The same of the paper's."""
    paper_interval_s: float = 1.0
    """Between the paper's plans: it groups arrivals by the second."""
    paper_keep_alive_s: float = 30.0
    """The paper keeps instances alive and does not say for how long: as moeless's default."""

    def __post_init__(self) -> None:
        if self.eplb_spare_replicas < 0:
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


def moeless_paper(scenario: Scenario, config: SystemConfig) -> System:
    """The MoEless paper's system (arXiv 2603.06350) as far as its text tells: `planning.paper.PaperPlanner`.

    V = 0.2, tokens of a function split evenly, instances kept alive, a forecast of the tokens that will come with the
    recall assumed, functions without an instance loaded a layer ahead. In moeless's topology, the hub, since the
    functions are reached from where attention is computed.
    """
    planner = PaperPlanner(
        _system(scenario, config.paper_interval_s), max_cv=PAPER_CV, keep_alive_s=config.paper_keep_alive_s
    )
    return System(
        name="moeless-paper",
        planner=planner,
        forecast=ForecastConfig(kind="foresight", recall=config.recall),
        interval_s=config.paper_interval_s,
        prefetch_layers=config.paper_prefetch_layers,
        prefetch_recall=config.recall,
        prior_LE=config.prior_LE,
    )


def moeless(scenario: Scenario, config: SystemConfig) -> System:
    """moeless by the policy policy: plans each tick, in the background, from its predictors' forecast.

    Without fitted predictors the forecast is of the tokens that will come, with the recall assumed.
    """
    resolved = _resolved(scenario, config)
    quantile = _quantile(resolved)
    affinity = None
    if isinstance(resolved.placer, AffinityPlacer):
        affinity = config.affinity or routing_statistics(scenario.routing)
    return System(
        name="moeless",
        planner=MoelessPlanner(resolved, replace(_system(scenario, resolved.tick_s), affinity=affinity)),
        forecast=ForecastConfig(kind="foresight", recall=config.recall, quantile=quantile)
        if config.predicted is None
        else ForecastConfig(kind="predictor", quantile=quantile),
        predicted=config.predicted,
        balances_steps=True,
        interval_s=resolved.tick_s,
        prefetch_layers=config.prefetch_layers,
        prefetch_recall=config.recall,
        prior_LE=config.prior_LE,
        num_known_tokens=affinity.num_tokens if affinity else 0,
    )


def routing_statistics(routing: SequenceRouting) -> AffinityStatistics:
    """What the placer affinity is told of the routing: that which is simulated, so that nothing of it is new."""
    return gather_statistics(routing.trace.experts_TLk, num_experts=routing.num_experts, max_tokens=AFFINITY_TOKENS)


def foresight(scenario: Scenario, config: SystemConfig) -> System:
    """The bound of every predictor: moeless, told of the very tokens that will come; functions are loaded in time."""
    known = moeless(scenario, replace(config, predicted=None, recall=1.0))
    return replace(known, name="foresight", is_prefetch_in_time=True)


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
    "moeless-paper": moeless_paper,
    "moeless": moeless,
    "foresight": foresight,
    "whole-experts": whole_experts,
    "limit": limit,
}
"""By name, in the order of the tables."""


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


def described_systems(systems: Sequence[System], config: SystemConfig) -> dict[str, str]:
    """What is assumed of each, in words."""
    return {f"system {system.name}": _DESCRIBED[system.name](system, config) for system in systems}


def _described_first(system: System) -> str:
    return f"begins with a plan for {'equal loads' if system.prior_LE is None else 'the load recorded before'}"


def _described_eplb(system: System, config: SystemConfig) -> str:
    return (
        f"EPLB's global form every {system.interval_steps:,} engine steps from the load of the last "
        f"{system.window_steps:,}, spare replicas on each worker and layer: {config.eplb_spare_replicas}, engines "
        f"wait while weights move from worker to worker, tokens all to all; {_described_first(system)}"
    )


def _described_paper(system: System, config: SystemConfig) -> str:
    return (
        f"the MoEless paper's scaling (V = {PAPER_CV:g}) and placement every {system.interval_s:g} s, instances kept "
        f"alive for {config.paper_keep_alive_s:g} s; told of the tokens to come with a recall of {config.recall:.0%} "
        f"(assumed; the paper gives none), functions loaded {system.prefetch_layers} layer ahead, tokens from a hub; "
        + _described_first(system)
    )


def _described_moeless(system: System, config: SystemConfig) -> str:
    forecast = "assumed predictors" if config.predicted is None else "the predictors given"
    known = system.num_known_tokens
    by_affinity = f"; placed by the affinity of {known:,} tokens of the very routing that is simulated" if known else ""
    return (
        f"plans every {system.interval_s:g} s in the background, told of the tokens of that time as {forecast} see "
        f"them (recall {config.recall:.0%}), functions loaded {system.prefetch_layers} layers ahead with the same "
        "recall, tokens from a hub, which shares out each step's tokens among replicas anew; "
        + _described_first(system)
        + by_affinity
    )


_DESCRIBED: dict[str, Callable[[System, SystemConfig], str]] = {
    "static": lambda *_: "every expert once, contiguous ones on a worker, tokens all to all",
    "eplb-vllm": _described_eplb,
    "eplb-sglang": _described_eplb,
    "moeless-paper": _described_paper,
    "moeless": _described_moeless,
    "foresight": lambda system, _: (
        f"moeless told of the very tokens that will come in the next {system.interval_s:g} s, and no function is ever "
        f"waited for; {_described_first(system)}: the bound of every predictor"
    ),
    "whole-experts": lambda *_: (
        "the bound of every placement of whole experts: perfect balance as far as calls that read all of an expert's "
        "weights allow, the faster of both topologies, nothing moved; it holds what static holds"
    ),
    "limit": lambda *_: (
        "the bound of every plan: work spread evenly like sand, the faster of both topologies, nothing moved; it holds "
        "what static holds"
    ),
}


def _eplb(scenario: Scenario, config: SystemConfig, name: str, interval_steps: int) -> System:
    cluster, model = scenario.cluster, scenario.profile.model
    spare = config.eplb_spare_replicas * cluster.num_workers
    hosted = -(-(model.num_experts + spare) // cluster.num_workers) * model.num_layers
    room = int(cluster.capacity_W(model).min())
    if hosted > room:
        raise InfeasiblePlacementError(
            f"eplb_spare_replicas must leave room: with {config.eplb_spare_replicas} on each worker and layer a worker "
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
