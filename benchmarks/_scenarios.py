"""Scenarios that systems are compared on: routing, arrivals at a share of what static expert parallelism can serve."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from moeless.core.arrays import FloatArray
from moeless.planning.profiles import builtin_profiles
from moeless.simulate.forecasts import PredictedRouting
from moeless.simulate.generator import MadeUpRouting, make_routing
from moeless.simulate.offline_forecast import predicted_routing, recorded_LE
from moeless.simulate.routing import SequenceRouting
from moeless.simulate.scenario import Scenario
from moeless.simulate.settings import ScenarioSettings, make_scenario
from moeless.simulate.simulation import simulate
from moeless.simulate.systems import make_systems
from moeless.simulate.workload import cut, made_up_arrivals
from moeless_predictors.fitting import FitConfig, fit_predictors
from moeless_predictors.traces import ArrivalTrace, ImportOptions, RoutingTrace, concat, import_trace

LEVELS = {"low": 0.2, "middle": 0.5, "high": 0.8, "all at once": 1e6}
"""Shares of the requests a second that static expert parallelism serves when they are all there at once."""
_SATURATING = 400
"""Requests that tell that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Shape of requests: mean tokens, which vary by half an order of magnitude."""

    name: str
    prompt_tokens: int
    output_tokens: int
    length_cv: float = 1.0


SHAPES = (
    Shape(name="prefill-heavy", prompt_tokens=2000, output_tokens=50),
    Shape(name="decode-heavy", prompt_tokens=200, output_tokens=400),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """A model on workers."""

    name: str
    routing: SequenceRouting
    settings: ScenarioSettings
    prior_LE: FloatArray
    """Load of other sequences known before: those that predictors are fitted on, or earlier ones."""
    before: RoutingTrace | None = None
    """These sequences, where predictors can be fitted on them in seconds."""

    def scenario(self, arrivals: ArrivalTrace) -> Scenario:
        return make_scenario(self.settings, self.routing, arrivals)


def recorded(name: str, profile: str, paths: list[Path]) -> Setting:
    """8 workers of A6000 class; of the files' sequences those that predictors are not fitted on, or made up ones of the
    profile's shape where there are no files."""
    if paths:
        traces = [import_trace(path, ImportOptions(model=name)).trace for path in paths]
        whole = concat([trace for trace in traces if isinstance(trace, RoutingTrace)])
        before, trace = whole.split(test_share=0.2, seed=0)
    else:
        before, trace = _made_up(profile)
        name = f"{name} (made up)"
    settings = ScenarioSettings(profile=profile, memory_per_worker="200%")
    return Setting(
        name=name, routing=SequenceRouting(trace), settings=settings, prior_LE=recorded_LE(before), before=before
    )


def large() -> Setting:
    """58 layers of 256 experts, top-8, on 64 H800-class workers in nodes of 8; skew and drift as measured."""
    settings = ScenarioSettings(
        profile="h800-deepseek-v3",
        workers=64,
        workers_per_node=8,
        local_gb_s=160.0,
        remote_gb_s=50.0,
        batch_tokens=16384,
        max_running=4096,
        in_order=True,
    )
    before, trace = _first_apart(make_routing(MadeUpRouting(num_sequences=40)), 8)
    return Setting(
        name="58 x 256, top-8, 64 workers",
        routing=SequenceRouting(trace),
        settings=settings,
        prior_LE=recorded_LE(before),
    )


def paper(profile: str) -> Setting:
    """The MoEless paper's: 8 A6000s; routing made up, for the paper's traces are not published."""
    before, trace = _made_up(profile)
    settings = ScenarioSettings(profile=profile, memory_per_worker="300%")
    return Setting(name=profile, routing=SequenceRouting(trace), settings=settings, prior_LE=recorded_LE(before))


@cache
def _made_up(profile: str) -> tuple[RoutingTrace, RoutingTrace]:
    """Generate the earlier recording and the one that is replayed."""
    model = builtin_profiles()[profile].model
    trace = make_routing(
        MadeUpRouting(
            num_sequences=80,
            tokens_per_sequence=256,
            num_layers=model.num_layers,
            num_experts=model.num_experts,
            top_k=model.top_k,
            group_size=max(2, model.num_experts // 8),
            block_size=max(1, model.num_experts // 16),
        )
    )
    return _first_apart(trace, 16)


def _first_apart(trace: RoutingTrace, num_first: int) -> tuple[RoutingTrace, RoutingTrace]:
    return trace.take_sequences(range(num_first)), trace.take_sequences(range(num_first, trace.num_sequences))


def predicted_for(setting: Setting) -> PredictedRouting | None:
    """Forecast the simulated sequences one layer ahead, with predictors fitted on the earlier ones."""
    if setting.before is None:
        return None
    predictors = fit_predictors(setting.before, FitConfig(distances=(1,), kinds=("popularity", "transition")))
    return predicted_routing(predictors, setting.routing.trace)


def saturation_per_s(setting: Setting, shape: Shape, *, quick: bool = False) -> float:
    """Requests a second that static expert parallelism serves, with as many waiting as it likes."""
    arrivals = made_up_arrivals(
        rate_per_s=1e6,
        num_requests=_SATURATING // (8 if quick else 1),
        prompt_tokens=shape.prompt_tokens,
        output_tokens=shape.output_tokens,
    )
    scenario = setting.scenario(arrivals)
    result = simulate(scenario, make_systems(scenario, names=["static"])[0])
    return arrivals.num_requests / result.duration_s


def arrivals_of(shape: Shape, *, rate_per_s: float, num_requests: int, gap_cv: float = 1.0) -> ArrivalTrace:
    """Requests of the shape; by default a Poisson process."""
    return made_up_arrivals(
        rate_per_s=rate_per_s,
        num_requests=num_requests,
        prompt_tokens=shape.prompt_tokens,
        output_tokens=shape.output_tokens,
        length_cv=shape.length_cv,
        gap_cv=gap_cv,
        seed=1,
    )


def by_the_second(arrivals: ArrivalTrace, *, num_requests: int) -> ArrivalTrace:
    """The first requests, each at the beginning of the second after the one it came in: the paper's batches."""
    first = cut(arrivals, num_requests=num_requests)
    return ArrivalTrace.from_arrays(
        arrival_s=first.arrival_s // 1 + 1,
        prompt_tokens=first.prompt_tokens,
        output_tokens=first.output_tokens,
        source=f"{first.source} in batches of a second".strip(),
    )


def with_settings(setting: Setting, **changes: object) -> Setting:
    """The same with other settings."""
    return replace(setting, settings=replace(setting.settings, **changes))  # type: ignore[arg-type]
