"""`moeless simulate`: replay requests under several systems in virtual time. docs/simulator.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeless.cli._console import one_line_errors, progress_of, say
from moeless.cli._extras import require_extra
from moeless.cli._options import output_file
from moeless.cli._scenario import (
    ScenarioOptions,
    checked_slo,
    options_named,
    read_arrivals,
    read_config,
    read_routing,
    settings_of,
    show_table,
    with_scenario_options,
)
from moeless.core.errors import ConfigError

if TYPE_CHECKING:
    from moeless.simulate.report.results import SimulationReport, SystemResult
    from moeless.simulate.scenario import Scenario
    from moeless.simulate.systems import SystemConfig


@with_scenario_options
def simulate_command(
    options: ScenarioOptions,
    workers: Annotated[int, typer.Option(help="Workers that host experts.")] = 8,
    memory_per_worker: Annotated[
        str, typer.Option(help="For instances: bytes, 24Gi, or a share of an even part of all experts.")
    ] = "200%",
    systems: Annotated[
        str | None, typer.Option(help="Systems to compare, as static,eplb-vllm,moeless; default: all.")
    ] = None,
    ttft_slo: Annotated[float | None, typer.Option(help="SLO: most seconds to the first token.")] = None,
    tpot_slo: Annotated[float | None, typer.Option(help="SLO: most seconds for each token after it.")] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", callback=output_file, help="Write the results to this file.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(callback=output_file, help="Write an HTML page with plots to this file.")
    ] = None,
) -> None:
    """Compare systems on the same requests and routing, in virtual time."""
    require_extra("plan", "moeless simulate")
    if report is not None:
        require_extra("plot", "--report")
    from moeless.simulate.report.results import SimulationReport
    from moeless.simulate.report.tables import comparison_tables, result_sentence
    from moeless.simulate.routing import SequenceRouting
    from moeless.simulate.settings import described, make_scenario
    from moeless.simulate.systems import described_systems, make_systems, usual_systems

    with one_line_errors(), options_named():
        slo = _slo(ttft_slo, tpot_slo)
        settings = settings_of(options, workers=workers, memory_per_worker=memory_per_worker)
        asked = read_arrivals(options)
        routing = SequenceRouting(read_routing(options))
        scenario = make_scenario(settings, routing, asked)
        config = read_config(options, routing.trace)
        names = usual_systems(has_predictors=config.predicted is not None)
        if systems is not None:
            names = [name.strip() for name in systems.split(",")]
        # Errors of one system are reported before the first runs.
        made = make_systems(scenario, names=names, config=config)
        assumed = described(scenario) | described_systems(made, config)
        for word, text in assumed.items():
            say(f"{word}: {text}")
        results = _simulated(scenario, names, config, slo)
        say(result_sentence(results))
        for table in comparison_tables(results):
            show_table(table)
        found = SimulationReport(
            scenario=assumed,
            settings=asdict(settings)
            | {"systems": names, "recall": _recall(config), "eplb_spare_replicas": config.eplb_spare_replicas},
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
    return checked_slo(ttft_s, tpot_s)


def _recall(config: SystemConfig) -> float | None:
    """Assumed, or measured of the predictors; None: neither."""
    return config.recall if config.predicted is None else config.predicted.recall


def _simulated(
    scenario: Scenario, names: Sequence[str], config: SystemConfig, slo: tuple[float, float] | None
) -> list[SystemResult]:
    """Each system once; EPLB without and with a spare replica, where their number is not given."""
    from moeless.planning.place import InfeasiblePlacementError
    from moeless.simulate.simulation import simulate
    from moeless.simulate.systems import SYSTEMS, spare_choices

    results = []
    for number, name in enumerate(names, start=1):
        found: dict[int | None, SystemResult] = {}
        for choice in spare_choices(name, config):
            try:
                system = SYSTEMS[name](scenario, choice)
            except InfeasiblePlacementError:
                if not found:
                    raise
                continue  # one more does not fit
            with progress_of(f"{name} ({number} of {len(names)})") as on_progress:
                found[choice.eplb_spare_replicas] = simulate(scenario, system, slo=slo, on_progress=on_progress)
        best = min(found, key=lambda spare: found[spare].request_s.mean)
        if len(found) > 1:
            say(
                f"{name}: serves better with {best} spare replicas on each worker and layer than with {1 - (best or 0)}"
            )
        results.append(found[best])
    return results


def _write(found: SimulationReport, json_path: Path | None, report_path: Path | None) -> None:
    import msgspec

    if json_path is not None:
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
        say(f"figures: {json_path}")
    if report_path is not None:
        from moeless.simulate.report.html import report_html

        report_path.write_text(report_html(found), encoding="utf-8")
        say(f"report: {report_path}")
