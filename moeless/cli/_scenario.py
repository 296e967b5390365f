"""Shared parts of `moeless simulate` and `moeless plan`: scenario options, reading their files, showing results.

The options are the fields of ScenarioOptions, each of which says its own help and default; `with_scenario_options` puts
them behind a command's own.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec, get_type_hints

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from moeless.cli._console import progress_of, say_aside, stdout
from moeless.cli._options import from_to, input_file, options_for
from moeless.core.errors import ConfigError

if TYPE_CHECKING:
    from moeless.simulate.report.tables import TextTable
    from moeless.simulate.settings import ScenarioSettings
    from moeless.simulate.systems import SystemConfig
    from moeless_predictors.traces import ArrivalTrace, RoutingTrace

_DEFAULT_DURATION_S = 60.0
_RENAMED = {
    "arrivals.rate_per_s": "--rate",
    "arrivals.gap_cv": "--gap-cv",
    "arrivals.length_cv": "--length-cv",
    "arrivals.prompt_tokens": "--prompt-tokens",
    "arrivals.output_tokens": "--output-tokens",
    "arrivals.share": "--thin",
    "arrivals.speed": "--speed-up",
    "arrivals.duration_s": "--duration",
    "arrivals.num_requests": "--requests",
    "engine.max_running": "--max-running",
    "engine.max_batch_tokens": "--batch-tokens",
    "transfers.transfer_share": "--transfer-share",
    "transfers.worker_idle_s": "--worker-idle",
    "forecast.recall": "--recall",
    "routing.num_layers": "--generate: layers",
    "routing.num_experts": "--generate: experts",
    "routing.top_k": "--generate: top-k",
    "routing.num_sequences": "--sequences",
    "routing.tokens_per_sequence": "--tokens-per-sequence",
}
_FIELDS = (
    *("workers", "workers_per_node", "memory_per_worker", "local_gb_s", "remote_gb_s", "fetch_gb_s", "profile"),
    *("device", "hidden_size", "expert_mb", "engines", "predictors", "eplb_spare_replicas", "prefetch_layers"),
    *("systems", "attainment", "max_workers", "worker_hour_cost", "json"),
)
_OPTIONS = _RENAMED | {name: f"--{name.replace('_', '-')}" for name in _FIELDS}

Own = ParamSpec("Own")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScenarioOptions:
    """Requests, routing, cluster and costs, but for how many workers there are and what each of them holds."""

    trace: Annotated[
        Path | None,
        typer.Argument(callback=input_file, help="Routing trace that `moeless trace` wrote; or give --generate."),
    ] = None
    generate: Annotated[
        str | None, typer.Option(help="Make routing up: layers x experts x top-k, as 58x256x8, instead of TRACE.")
    ] = None
    sequences: Annotated[int, typer.Option(help="Sequences of made-up routing.")] = 32
    tokens_per_sequence: Annotated[int, typer.Option(help="Tokens of each of them.")] = 512
    arrivals: Annotated[
        Path | None,
        typer.Option(
            callback=input_file,
            help="Arrival trace, Azure CSV or Mooncake JSON lines; default: made up, by the options below.",
        ),
    ] = None
    rate: Annotated[float, typer.Option(help="Requests a second.")] = 2.0
    prompt_tokens: Annotated[int, typer.Option(help="Mean tokens of a prompt.")] = 512
    output_tokens: Annotated[int, typer.Option(help="Mean tokens of an answer.")] = 128
    gap_cv: Annotated[float, typer.Option(help="Burstiness: coefficient of variation of the gaps; Poisson: 1.")] = 1.0
    length_cv: Annotated[float, typer.Option(help="Coefficient of variation of the lengths.")] = 1.0
    duration: Annotated[
        float | None, typer.Option(help="Seconds of arrivals; default: 60 of made-up ones, all of a file's.")
    ] = None
    requests: Annotated[int | None, typer.Option(help="Most requests.")] = None
    thin: Annotated[float, typer.Option(help="Keep this share of the requests, drawn at random.")] = 1.0
    speed_up: Annotated[float, typer.Option(help="Factor by which the requests arrive faster.")] = 1.0
    in_order: Annotated[
        bool, typer.Option(help="Requests follow the trace's sequences in their order: for routing that drifts.")
    ] = False
    workers_per_node: Annotated[int | None, typer.Option(help="Workers on each node; default: all on one.")] = None
    local_gb_s: Annotated[float, typer.Option(help="GB/s between workers of a node, each way.")] = 56.0
    remote_gb_s: Annotated[float, typer.Option(help="GB/s between nodes, for each worker.")] = 25.0
    fetch_gb_s: Annotated[float, typer.Option(help="GB/s from host memory to a worker: cold starts.")] = 24.8
    transfer_share: Annotated[
        float, typer.Option(help="Most of a worker's link that loads take from hidden states; 0: none.")
    ] = 0.5
    worker_idle: Annotated[
        float | None, typer.Option(help="Seconds after which a worker that hosts nothing stops; default: never.")
    ] = None
    profile: Annotated[
        str | None, typer.Option(help="Cost profile; default: the built-in one of the trace's shape, or a roofline.")
    ] = None
    device: Annotated[str, typer.Option(help="Of the roofline: a6000 or h800.")] = "a6000"
    hidden_size: Annotated[int | None, typer.Option(help="Of the roofline's model, if the trace does not tell.")] = None
    expert_mb: Annotated[float | None, typer.Option(help="Of one expert of the roofline's model, in BF16.")] = None
    engines: Annotated[int, typer.Option(help="Engines that share the workers.")] = 1
    batch_tokens: Annotated[int, typer.Option(help="Most tokens of an engine's step.")] = 2048
    max_running: Annotated[int, typer.Option(help="Requests that an engine decodes together.")] = 256
    policy: Annotated[
        Path | None,
        typer.Option(callback=input_file, help="Policy file (docs/policy.md) that moeless and foresight follow."),
    ] = None
    predictors: Annotated[
        Path | None,
        typer.Option(callback=input_file, help="moeless forecasts with the predictors of `moeless predict fit`."),
    ] = None
    prior: Annotated[
        Path | None,
        typer.Option(
            callback=input_file,
            help="Routing trace recorded earlier, for the first plans; default: by --predictors, or even.",
        ),
    ] = None
    recall: Annotated[
        float | None,
        typer.Option(
            help="Assume a forecast of the very tokens to come with this recall, instead of one that could be had."
        ),
    ] = None
    eplb_spare_replicas: Annotated[
        int | None,
        typer.Option(help="Spare instances of EPLB on each worker and layer; default: the better of 0 and 1."),
    ] = None
    seed: Annotated[int, typer.Option(callback=from_to(0), help="Of everything that is drawn at random.")] = 0


def with_scenario_options(command: Callable[Concatenate[ScenarioOptions, Own], None]) -> Callable[..., None]:
    """The command as typer takes it: its own options, then those of ScenarioOptions, which come as one argument."""
    names = [field.name for field in fields(ScenarioOptions)]
    called: Callable[..., None] = command

    @wraps(command)
    def run(**values: Any) -> None:
        called(ScenarioOptions(**{name: values.pop(name) for name in names}), **values)

    of_options = get_type_hints(ScenarioOptions, include_extras=True)
    of_command = get_type_hints(command, include_extras=True)
    _, *own = inspect.signature(command).parameters.values()
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    parameters += [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default)
        for field in fields(ScenarioOptions)
    ]
    hints = of_command | of_options
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # what inspect.signature looks for
        [parameter.replace(annotation=hints[parameter.name]) for parameter in parameters]
    )
    run.__annotations__ = {parameter.name: hints[parameter.name] for parameter in parameters}
    return run


def settings_of(options: ScenarioOptions, *, workers: int, memory_per_worker: str) -> ScenarioSettings:
    """Make the scenario's settings on `workers` workers."""
    from moeless.simulate.settings import ScenarioSettings

    return ScenarioSettings(
        workers=workers,
        workers_per_node=options.workers_per_node,
        memory_per_worker=memory_per_worker,
        local_gb_s=options.local_gb_s,
        remote_gb_s=options.remote_gb_s,
        fetch_gb_s=options.fetch_gb_s,
        transfer_share=options.transfer_share,
        worker_idle_s=options.worker_idle,
        profile=options.profile,
        device=options.device,
        hidden_size=options.hidden_size,
        expert_mb=options.expert_mb,
        engines=options.engines,
        batch_tokens=options.batch_tokens,
        max_running=options.max_running,
        in_order=options.in_order,
        seed=options.seed,
    )


def read_arrivals(options: ScenarioOptions) -> ArrivalTrace:
    """Requests of a file, or made up: as many as are expected in the time, or a given number."""
    from moeless.simulate.workload import sped_up, thinned

    found = _made_up(options) if options.arrivals is None else _recorded(options, options.arrivals)
    return sped_up(thinned(found, options.thin, seed=options.seed), options.speed_up)


def _made_up(options: ScenarioOptions) -> ArrivalTrace:
    from moeless.simulate.workload import cut, made_up_arrivals

    is_bounded = options.duration is not None or options.requests is not None
    duration_s = options.duration if is_bounded else _DEFAULT_DURATION_S
    expected = max(1, round(options.rate * (duration_s or 0)))
    made = made_up_arrivals(
        rate_per_s=options.rate,
        num_requests=expected if options.requests is None else options.requests,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        gap_cv=options.gap_cv,
        length_cv=options.length_cv,
        seed=options.seed,
    )
    return cut(made, duration_s=duration_s)


def _recorded(options: ScenarioOptions, path: Path) -> ArrivalTrace:
    from moeless.simulate.workload import cut
    from moeless_predictors.traces import ArrivalTrace, import_trace, kind_of

    found = ArrivalTrace.open(path) if kind_of(path) == "arrivals" else None
    if found is None:
        if kind_of(path) is not None:
            raise ConfigError(f"--arrivals must hold arrivals, but {path} holds {kind_of(path)}")
        imported = import_trace(path)
        for notice in imported.notices:
            say_aside(f"note: {notice}")
        if not isinstance(imported.trace, ArrivalTrace):
            raise ConfigError(f"--arrivals must hold arrivals, but {path} holds routing")
        found = imported.trace
    return cut(found, duration_s=options.duration, num_requests=options.requests)


def read_routing(options: ScenarioOptions) -> RoutingTrace:
    """Read the routing from TRACE, or generate it."""
    from moeless.simulate.generator import MadeUpRouting, make_routing
    from moeless_predictors.traces import RoutingTrace, kind_of

    path, generate = options.trace, options.generate
    if (path is None) == (generate is None):
        raise ConfigError("one of TRACE and --generate must be given, got " + ("neither" if path is None else "both"))
    if path is not None:
        if kind_of(path) == "arrivals":
            raise ConfigError(f"TRACE must hold routing, but {path} holds arrivals")
        return RoutingTrace.open(path)
    shape = re.fullmatch(r"(\d+)x(\d+)x(\d+)", generate or "")
    if shape is None:
        raise ConfigError(f"--generate must be layers x experts x top-k such as 58x256x8, got {generate!r}")
    num_layers, num_experts, top_k = map(int, shape.groups())
    return make_routing(
        MadeUpRouting(
            num_layers=num_layers,
            num_experts=num_experts,
            top_k=top_k,
            num_sequences=options.sequences,
            tokens_per_sequence=options.tokens_per_sequence,
            seed=options.seed,
        )
    )


def read_config(options: ScenarioOptions, routing: RoutingTrace) -> SystemConfig:
    """Make the systems' assumptions from their options, the policy file and the predictors' forecasts."""
    from moeless.core.policy import load_policy, unapplied_settings
    from moeless.simulate.offline_forecast import popularity_LE, predicted_routing, recorded_LE
    from moeless.simulate.systems import SystemConfig
    from moeless_predictors.predictor_set import PredictorSet

    if options.recall is not None and options.predictors is not None:
        raise ConfigError("--recall must not be given with --predictors, whose recall is measured")
    config = SystemConfig(
        model_id=routing.metadata.model, recall=options.recall, eplb_spare_replicas=options.eplb_spare_replicas
    )
    if options.policy is not None:
        policy = load_policy(options.policy)
        for notice in unapplied_settings(policy):
            say_aside(f"note: {options.policy}: {notice}")
        config = replace(config, policy=policy)
    prior = None if options.prior is None else recorded_LE(_prior(options.prior, options.trace, routing))
    if options.predictors is not None:
        predictors = PredictorSet.load(options.predictors)
        with progress_of("predicting") as on_progress:
            predicted = predicted_routing(predictors, routing, on_progress=on_progress)
        config = replace(config, predicted=predicted, prior_LE=popularity_LE(predictors))
    return config if prior is None else replace(config, prior_LE=prior)


def _prior(path: Path, trace: Path | None, routing: RoutingTrace) -> RoutingTrace:
    """Raises ConfigError if it is not of the model of the routing that is simulated, or is that very routing."""
    from moeless_predictors.traces import RoutingTrace, kind_of

    if kind_of(path) == "arrivals":
        raise ConfigError(f"--prior must hold routing, but {path} holds arrivals")
    if trace is not None and path.exists() and path.samefile(trace):
        raise ConfigError(f"--prior must be another trace than the one that is simulated, got {path} for both")
    prior = RoutingTrace.open(path)
    for name in ("num_layers", "num_experts", "top_k"):
        if getattr(prior, name) != getattr(routing, name):
            raise ConfigError(
                f"--prior: {name} must be {getattr(routing, name)} as of the routing that is simulated, got "
                f"{getattr(prior, name)}"
            )
    return prior


def checked_slo(ttft_s: float, tpot_s: float) -> tuple[float, float]:
    """Most seconds to the first token and for each after it. Raises ConfigError that names the option."""
    for option, value in (("--ttft-slo", ttft_s), ("--tpot-slo", tpot_s)):
        if not value > 0:
            raise ConfigError(f"{option} must be above 0, got {value}")
        if math.isinf(value):
            raise ConfigError(f"{option} must be finite, got {value}")
    return ttft_s, tpot_s


@contextmanager
def options_named() -> Iterator[None]:
    """Put options in place of the settings that errors begin with."""
    with options_for(_OPTIONS):
        yield


def show_table(table: TextTable) -> None:
    """Print it, the first column to the left and the others to the right."""
    shown = Table(title=table.title, caption=table.note, box=SIMPLE_HEAD, padding=0, show_edge=False)
    for header in table.headers:
        shown.add_column(header, justify="left" if header == table.headers[0] else "right", no_wrap=True)
    for row in table.rows:
        shown.add_row(*row)
    stdout.print(shown)
