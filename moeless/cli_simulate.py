"""`moeless simulate`: replay requests under several policies in virtual time. docs/simulator.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from moeless.cli_errors import told_in_one_line
from moeless.core.errors import ConfigError

if TYPE_CHECKING:
    from moeless.simulate.results import PolicyResult, SimulationReport
    from moeless.simulate.scenario import Policy, Scenario
    from moeless.simulate.standard import StandardConfig
    from moeless.simulate.tables import TextTable
    from moeless_predictors.traces import ArrivalTrace, RoutingTrace

_stdout = Console()
_stderr = Console(stderr=True)

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
    *("workers", "workers_per_node", "memory_per_worker", "local_gb_s", "remote_gb_s", "load_gb_s", "profile"),
    *("device", "hidden_size", "expert_mb", "engines", "policies", "predictors", "eplb_redundant", "prefetch_layers"),
)
_OPTIONS = _RENAMED | {name: f"--{name.replace('_', '-')}" for name in _FIELDS}


def simulate_command(
    trace: Annotated[
        Path | None, typer.Argument(help="Routing trace that `moeless trace` wrote; or give --generate.")
    ] = None,
    generate: Annotated[
        str | None, typer.Option(help="Make routing up: layers x experts x top-k, as 58x256x8, instead of TRACE.")
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences of made-up routing.")] = 32,
    tokens_per_sequence: Annotated[int, typer.Option(help="Tokens of each of them.")] = 512,
    arrivals: Annotated[
        Path | None,
        typer.Option(help="Arrival trace, Azure CSV or Mooncake JSON lines; default: made up, by the options below."),
    ] = None,
    rate: Annotated[float, typer.Option(help="Requests a second.")] = 2.0,
    prompt_tokens: Annotated[int, typer.Option(help="Mean tokens of a prompt.")] = 512,
    output_tokens: Annotated[int, typer.Option(help="Mean tokens of an answer.")] = 128,
    gap_cv: Annotated[float, typer.Option(help="Burstiness: coefficient of variation of the gaps; Poisson: 1.")] = 1.0,
    length_cv: Annotated[float, typer.Option(help="Coefficient of variation of the lengths.")] = 1.0,
    duration: Annotated[
        float | None, typer.Option(help="Seconds of arrivals; default: 60 of made-up ones, all of a file's.")
    ] = None,
    requests: Annotated[int | None, typer.Option(help="Most requests.")] = None,
    thin: Annotated[float, typer.Option(help="Keep this share of the requests, drawn at random.")] = 1.0,
    speed_up: Annotated[float, typer.Option(help="The same requests, so many times as fast.")] = 1.0,
    in_order: Annotated[
        bool, typer.Option(help="Requests follow the trace's sequences in their order: for routing that drifts.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Workers that host experts.")] = 8,
    workers_per_node: Annotated[int | None, typer.Option(help="Workers on each node; default: all on one.")] = None,
    memory_per_worker: Annotated[
        str, typer.Option(help="For instances: bytes, 24Gi, or a share of an even part of all experts.")
    ] = "200%",
    local_gb_s: Annotated[float, typer.Option(help="GB/s between workers of a node, each way.")] = 56.0,
    remote_gb_s: Annotated[float, typer.Option(help="GB/s between nodes, for each worker.")] = 25.0,
    load_gb_s: Annotated[float, typer.Option(help="GB/s from host memory to a worker: cold starts.")] = 24.8,
    transfer_share: Annotated[
        float, typer.Option(help="Most of a worker's link that loads take from hidden states; 0: none.")
    ] = 0.5,
    worker_idle: Annotated[
        float | None, typer.Option(help="Seconds after which a worker that hosts nothing stops; default: never.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Cost profile; default: the built-in one of the trace's shape, or a roofline.")
    ] = None,
    device: Annotated[str, typer.Option(help="Of the roofline: a6000 or h800.")] = "a6000",
    hidden_size: Annotated[
        int | None, typer.Option(help="Of the roofline's model, if the trace does not tell.")
    ] = None,
    expert_mb: Annotated[float | None, typer.Option(help="Of one expert of the roofline's model, in BF16.")] = None,
    engines: Annotated[int, typer.Option(help="Engines that share the workers.")] = 1,
    batch_tokens: Annotated[int, typer.Option(help="Most tokens of an engine's step.")] = 2048,
    max_running: Annotated[int, typer.Option(help="Requests that an engine decodes together.")] = 256,
    policies: Annotated[
        str | None, typer.Option(help="Policies to compare, as static,eplb-vllm,moeless; default: all.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Policy file (docs/policy.md) that moeless and foresight follow.")
    ] = None,
    predictors: Annotated[
        Path | None, typer.Option(help="moeless forecasts with the predictors of `moeless predict fit`.")
    ] = None,
    recall: Annotated[
        float, typer.Option(help="Recall of the predictors that are assumed without --predictors.")
    ] = 0.84,
    eplb_redundant: Annotated[int, typer.Option(help="Spare instances of EPLB on each worker and layer.")] = 1,
    ttft_slo: Annotated[float | None, typer.Option(help="SLO: most seconds to the first token.")] = None,
    tpot_slo: Annotated[float | None, typer.Option(help="SLO: most seconds for each token after it.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn at random.")] = 0,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page with plots to this file.")] = None,
) -> None:
    """Compare policies on the same requests and routing, in virtual time."""
    from moeless.simulate.results import SimulationReport
    from moeless.simulate.routing import SequenceRouting
    from moeless.simulate.settings import ScenarioSettings, described, make_scenario
    from moeless.simulate.standard import STANDARD, described_policies, standard_policies
    from moeless.simulate.tables import comparison_tables
    from moeless.simulate.workload import made_up_arrivals, sped_up, thinned

    with told_in_one_line(), _options_named():
        slo = _slo(ttft_slo, tpot_slo)
        settings = ScenarioSettings(
            workers=workers,
            workers_per_node=workers_per_node,
            memory_per_worker=memory_per_worker,
            local_gb_s=local_gb_s,
            remote_gb_s=remote_gb_s,
            load_gb_s=load_gb_s,
            transfer_share=transfer_share,
            worker_idle_s=worker_idle,
            profile=profile,
            device=device,
            hidden_size=hidden_size,
            expert_mb=expert_mb,
            engines=engines,
            batch_tokens=batch_tokens,
            max_running=max_running,
            in_order=in_order,
            seed=seed,
        )
        names = list(STANDARD) if policies is None else [name.strip() for name in policies.split(",")]

        def make_arrivals(num_requests: int) -> ArrivalTrace:
            return made_up_arrivals(
                rate_per_s=rate,
                num_requests=num_requests,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                gap_cv=gap_cv,
                length_cv=length_cv,
                seed=seed,
            )

        asked = _asked(arrivals, make_arrivals, rate, duration, requests)
        asked = sped_up(thinned(asked, thin, seed=seed), speed_up)
        routing = SequenceRouting(_routing(trace, generate, sequences, tokens_per_sequence, seed))
        scenario = make_scenario(settings, routing, asked)
        config = _standard_config(policy, predictors, recall, eplb_redundant, scenario)
        # What is wrong with one policy is told before the first runs.
        made = standard_policies(scenario, names=names, config=config)
        assumed = described(scenario) | described_policies(made, config)
        for word, text in assumed.items():
            _say(f"{word}: {text}")
        results = _simulated(scenario, made, slo)
        for table in comparison_tables(results):
            _stdout.print(_rich(table))
        found = SimulationReport(
            scenario=assumed,
            settings=asdict(settings) | {"policies": names, "recall": config.recall, "eplb_redundant": eplb_redundant},
            slo_s=slo,
            expert_bytes=scenario.profile.model.expert_bytes,
            capacity_instances=int(scenario.cluster.capacity_W(scenario.profile.model).sum()),
            results=results,
        )
        _write(found, json_, report)


def _slo(ttft_s: float | None, tpot_s: float | None) -> tuple[float, float] | None:
    if ttft_s is None and tpot_s is None:
        return None
    if ttft_s is None or tpot_s is None:
        raise ConfigError("--ttft-slo and --tpot-slo must be given together")
    for option, value in (("--ttft-slo", ttft_s), ("--tpot-slo", tpot_s)):
        if not value > 0:
            raise ConfigError(f"{option} must be above 0, got {value}")
    return ttft_s, tpot_s


def _asked(
    path: Path | None,
    make: Callable[[int], ArrivalTrace],
    rate: float,
    duration_s: float | None,
    num_requests: int | None,
) -> ArrivalTrace:
    """Requests of a file, or made up: as many as are expected in the time, or as are asked for."""
    from moeless.simulate.workload import cut
    from moeless_predictors.traces import ArrivalTrace, import_trace, kind_of

    if path is None:
        asked_s = _DEFAULT_DURATION_S if duration_s is None and num_requests is None else duration_s
        expected = max(1, round(rate * (asked_s or 0)))
        return cut(make(expected if num_requests is None else num_requests), duration_s=asked_s)
    found = ArrivalTrace.open(path) if kind_of(path) == "arrivals" else None
    if found is None:
        if kind_of(path) is not None:
            raise ConfigError(f"--arrivals must hold arrivals, but {path} holds {kind_of(path)}")
        imported = import_trace(path)
        for notice in imported.notices:
            _stderr.print(f"note: {notice}", highlight=False, markup=False, soft_wrap=True)
        if not isinstance(imported.trace, ArrivalTrace):
            raise ConfigError(f"--arrivals must hold arrivals, but {path} holds routing")
        found = imported.trace
    return cut(found, duration_s=duration_s, num_requests=num_requests)


def _routing(
    path: Path | None, generate: str | None, num_sequences: int, tokens_per_sequence: int, seed: int
) -> RoutingTrace:
    from moeless.simulate.generator import MadeUpRouting, make_routing
    from moeless_predictors.traces import RoutingTrace, kind_of

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
            num_sequences=num_sequences,
            tokens_per_sequence=tokens_per_sequence,
            seed=seed,
        )
    )


def _standard_config(
    policy: Path | None, predictors: Path | None, recall: float, eplb_redundant: int, scenario: Scenario
) -> StandardConfig:
    from moeless.core.policy import load_policy
    from moeless.simulate.predicted import predicted_routing
    from moeless.simulate.standard import StandardConfig
    from moeless_predictors.predictor_set import PredictorSet

    routing = scenario.routing.trace
    config = StandardConfig(model_id=routing.metadata.model, recall=recall, eplb_redundant=eplb_redundant)
    if policy is not None:
        config = replace(config, document=load_policy(policy))
    if predictors is not None:
        with _progress("predicting") as on_progress:
            predicted, measured = predicted_routing(PredictorSet.load(predictors), routing, on_progress=on_progress)
        config = replace(config, predicted=predicted, recall=measured)
    return config


def _simulated(scenario: Scenario, policies: Sequence[Policy], slo: tuple[float, float] | None) -> list[PolicyResult]:
    from moeless.simulate.simulation import simulate

    results = []
    for number, policy in enumerate(policies, start=1):
        with _progress(f"{policy.name} ({number} of {len(policies)})") as on_progress:
            results.append(simulate(scenario, policy, slo=slo, on_progress=on_progress))
    return results


def _write(found: SimulationReport, json_path: Path | None, report_path: Path | None) -> None:
    import msgspec

    if json_path is not None:
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
        _say(f"figures: {json_path}")
    if report_path is not None:
        from moeless.simulate.report import report_html

        report_path.write_text(report_html(found), encoding="utf-8")
        _say(f"report: {report_path}")


def _rich(table: TextTable) -> Table:
    shown = Table(title=table.title, caption=table.note, box=SIMPLE_HEAD, padding=0, show_edge=False)
    for header in table.headers:
        shown.add_column(header, justify="left" if header == table.headers[0] else "right", no_wrap=True)
    for row in table.rows:
        shown.add_row(*row)
    return shown


@contextmanager
def _options_named() -> Iterator[None]:
    """Settings that an error begins with become the options that set them."""
    try:
        yield
    except ConfigError as error:
        name, space, rest = str(error).partition(" ")
        stem, colon, _ = name.partition(":")
        if stem not in _OPTIONS:
            raise
        raise ConfigError(f"{_OPTIONS[stem]}{colon}{space}{rest}") from error


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_stderr, transient=True, disable=not _stderr.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _say(text: str) -> None:
    _stdout.print(text, highlight=False, markup=False, soft_wrap=True)
