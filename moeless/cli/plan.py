"""`moeless plan`: how many workers each system needs to keep an SLO, and a plan to start with. docs/capacity.md."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeless.cli._console import one_line_errors, progress_of, say
from moeless.cli._extras import require_extra
from moeless.cli._options import above_zero, output_file
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
    from moeless.simulate.recommend import CapacityReport


@with_scenario_options
def plan_command(
    options: ScenarioOptions,
    ttft_slo: Annotated[float, typer.Option(help="SLO: most seconds to a request's first token.")],
    tpot_slo: Annotated[float, typer.Option(help="SLO: most seconds for each token after it.")],
    attainment: Annotated[float, typer.Option(help="Share of the requests that must keep both.")] = 0.99,
    systems: Annotated[
        str | None, typer.Option(help="Systems to size, as static,moeless; default: all but moeless-paper.")
    ] = None,
    max_workers: Annotated[int, typer.Option(help="Most workers to try.")] = 64,
    memory_per_worker: Annotated[
        str | None, typer.Option(help="For instances: bytes or 24Gi; default: 60 % of the device's memory.")
    ] = None,
    worker_hour_cost: Annotated[
        float | None, typer.Option(help="Dollars for a worker and hour: costs are shown in dollars too.")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Place the plan by integer programmes: slower, proved near the optimum.")
    ] = False,
    exact_seconds: Annotated[
        float, typer.Option(callback=above_zero, help="With --exact: time limit of the solver for a layer.")
    ] = 10.0,
    json_: Annotated[
        Path | None, typer.Option("--json", callback=output_file, help="Write everything to this file.")
    ] = None,
) -> None:
    """Find out what to buy: the minimal number of workers of each system that keep an SLO, and the cheapest's plan."""
    require_extra("plan", "moeless plan")
    import msgspec

    from moeless.simulate.recommend import (
        CapacityReport,
        alternative_of,
        assumptions,
        chosen,
        recommended,
        settings_in,
    )
    from moeless.simulate.routing import SequenceRouting
    from moeless.simulate.settings import profile_for
    from moeless.simulate.sizing import USUAL, SizingCase, SizingConfig, checked_systems, sized, worker_memory
    from moeless.simulate.systems import routing_statistics

    with one_line_errors(), options_named():
        config = SizingConfig(slo=checked_slo(ttft_slo, tpot_slo), attainment=attainment, max_workers=max_workers)
        if worker_hour_cost is not None and not 0 < worker_hour_cost < math.inf:
            raise ConfigError(f"worker_hour_cost must be above 0 and finite, got {worker_hour_cost}")
        names = list(USUAL) if systems is None else [name.strip() for name in systems.split(",")]
        asked = checked_systems(names, options.worker_idle)
        settings = settings_of(options, workers=max_workers, memory_per_worker="0")
        arrivals = read_arrivals(options)
        routing = SequenceRouting(read_routing(options))
        profile = profile_for(settings, routing)
        memory = worker_memory(memory_per_worker, profile)
        settings = replace(settings, memory_per_worker=str(memory))
        statistics = routing_statistics(routing)
        standard = replace(read_config(options, routing.trace), affinity=statistics)
        case = SizingCase(settings=settings, routing=routing, arrivals=arrivals, systems=standard, sizing=config)
        assumed = assumptions(case, asked, is_memory_given=memory_per_worker is not None)
        for word, text in assumed.items():
            say(f"{word}: {text}")
        all_sized = [sized(case, system, watch=progress_of) for system in asked]
        best = chosen(all_sized)
        found = CapacityReport(
            assumptions=assumed,
            settings=settings_in(case, asked) | {"worker_hour_cost": worker_hour_cost},
            slo_s=config.slo,
            attainment=attainment,
            memory_per_worker=memory,
            expert_bytes=profile.model.expert_bytes,
            alternatives=[alternative_of(one, worker_hour_cost=worker_hour_cost) for one in all_sized],
            recommendation=None
            if best is None
            else recommended(case, *best, statistics, exact_time_limit_s=exact_seconds if exact else None),
        )
        _show(found, top_k=routing.top_k)
        if json_ is not None:
            json_.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
            say(f"figures and plan: {json_}")


def _show(found: CapacityReport, *, top_k: int) -> None:
    from moeless.simulate.report.tables import capacity_notes, capacity_tables, plan_notes, plan_table

    for table in capacity_tables(found):
        show_table(table)
    for note in capacity_notes(found):
        say(note)
    best = found.recommendation
    if best is None:
        say(f"no system keeps the SLO for {found.attainment:.4g} of the requests at a size that was tried")
        return
    say(f"recommended: {best.system} on {best.workers} workers: {best.why}")
    show_table(plan_table(best, memory_per_worker=found.memory_per_worker))
    for note in plan_notes(best, top_k=top_k):
        say(note)
