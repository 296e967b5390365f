"""Static expert parallelism, EPLB, LPLB, the MoEless paper's system and moeless on the same requests: latency and cost.

`python -m benchmarks --all systems` simulates prefill-heavy and decode-heavy requests at four loads (shares of what
static expert parallelism can serve, and all at once) on the routing of models: recorded ones where their files are
given, made up ones of the same shapes otherwise; then arrivals thinned to 5 %; then the MoEless paper's setting.
docs/simulator.md says what is assumed. Tables are in Markdown; every figure is a ratio of two simulations of the same
requests, over static expert parallelism's where nothing else is said:

- systems: the mean request's time. EPLB is the best of four: vLLM's and SGLang's, without and with one spare replica on
  each worker and layer. moeless forecasts by popularity, by the last window, and by predictors fitted on other
  sequences; foresight is what a perfect forecast would give. With a `free split` splitting takes no time. The
  bounds are the exact load with free moves, whole experts, and the physical limit;
- equal memory: the same at the memory of static expert parallelism, of EPLB with one spare replica, and of moeless's
  default policy, with the resident memory x time beside it;
- traffic with gaps: resident and billed memory x time, and tails.

First plans of moeless, the paper's system and SGLang's EPLB are for the load of other sequences: those that predictors
are fitted on, or (made-up routing) that came earlier. vLLM's EPLB begins with equal loads, as it does.

Besides moeless's default policy: `once` makes no replicas; `at EPLB's memory` as many as EPLB with one spare; `twice`
keeps two instances of every function; `lean` is for traffic with gaps: instances go half a second after their
last token, but for the first layers', behind whose work the other layers' cold starts hide.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks._scenarios import (
    LEVELS,
    SHAPES,
    Setting,
    Shape,
    arrivals_of,
    by_the_second,
    large,
    paper,
    predicted_for,
    recorded,
    saturation_per_s,
)
from moeless.core.policy import parse_policy
from moeless.simulate.report.results import SystemResult
from moeless.simulate.scenario import Scenario
from moeless.simulate.simulation import simulate
from moeless.simulate.systems import SystemConfig, make_systems
from moeless.simulate.workload import thinned
from moeless_predictors.traces import ArrivalTrace, import_trace

THINNED = 0.05
FORECASTS = ("moeless-popularity", "moeless-window", "moeless")
BOUNDS = ("foresight", "exact-load", "whole-experts", "limit")
EPLBS = ("eplb-vllm", "eplb-sglang")
LEAN: dict[str, object] = {
    "defaults": {
        "keepAliveSeconds": 0.5,
        "scaleDownStabilizationSeconds": 0.5,
        "scaler": {"name": "minMax", "maxExtraShare": 0.0},
    },
    "rules": [{"layers": "0-3", "scaleToZero": False}],
}
TWICE: dict[str, object] = {"defaults": {"minReplicas": 2}}
PAPER_MODELS = ("a6000-mixtral-8x7b", "a6000-phi-3.5-moe", "a6000-llama-4-scout")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One system on one scenario. Ratios are over static expert parallelism on the same requests."""

    setting: str
    shape: str
    level: str
    system: str
    layer_us: float
    request: float
    """Mean request time, as a ratio."""
    resident: float
    billed: float
    ttft_p99: float
    tpot_p99: float
    imbalance: float
    """Busiest worker over the mean, not a ratio."""
    cold_starts: int


@dataclass(kw_only=True)
class Runs:
    """Simulates systems on one scenario; each once."""

    setting: Setting
    scenario: Scenario
    config: SystemConfig
    found: dict[str, SystemResult]

    def run(
        self, name: str, *, label: str | None = None, is_split_free: bool = False, **changes: object
    ) -> SystemResult:
        """The system of that name with a changed configuration, under a label of its own.

        Args:
            is_split_free: splitting a layer's tokens takes no time.
        """
        label = label or name
        if label not in self.found:
            config = replace(self.config, **changes)  # type: ignore[arg-type]
            (system,) = make_systems(self.scenario, names=[name], config=config)
            if is_split_free:
                system = replace(system, split_s=0.0, split_token_s=0.0)
            self.found[label] = simulate(self.scenario, replace(system, name=label))
        return self.found[label]

    def best(self, labels: list[str], label: str) -> SystemResult:
        """The fastest of them, under a label of its own."""
        self.found[label] = min((self.found[one] for one in labels), key=lambda result: result.request_s.mean)
        return self.found[label]

    def eplb(self, spares: tuple[int, ...], label: str) -> SystemResult:
        """The best of both EPLBs with these numbers of spare replicas."""
        labels = [f"{name}, {spare} spare" for spare in spares for name in EPLBS]
        for one in labels:
            name, spare = one.removesuffix(" spare").split(", ")
            self.run(name, label=one, eplb_spare_replicas=int(spare))
        return self.best(labels, label)

    def rows(self, shape: str, level: str) -> list[Row]:
        """All that were run."""
        static = self.run("static")
        return [
            Row(
                setting=self.setting.name,
                shape=shape,
                level=level,
                system=label,
                layer_us=result.layer_s.mean * 1e6,
                request=result.request_s.mean / static.request_s.mean,
                resident=result.resident_byte_s / static.resident_byte_s,
                billed=result.billed_byte_s / static.billed_byte_s,
                ttft_p99=result.ttft_s.p99 / static.ttft_s.p99,
                tpot_p99=result.tpot_s.p99 / static.tpot_s.p99,
                imbalance=result.imbalance,
                cold_starts=result.num_cold_starts,
            )
            for label, result in self.found.items()
        ]


def main(argv: list[str] | None = None) -> None:
    """Print tables for each setting; with --json, write all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpt-oss", type=Path, nargs="*", default=[], help="recorded routing of gpt-oss-20b")
    parser.add_argument("--deepseek", type=Path, nargs="*", default=[], help="recorded routing of DeepSeek-V2-Lite")
    parser.add_argument("--arrivals", type=Path, help="conversation arrivals, for the paper's setting")
    parser.add_argument("--requests", type=int, default=400, help="of each scenario")
    parser.add_argument("--only", nargs="*", choices=("gpt-oss", "deepseek", "large", "paper"), default=None)
    parser.add_argument("--levels", nargs="*", choices=list(LEVELS), default=None, help="loads; default: all")
    parser.add_argument("--shapes", nargs="*", choices=[shape.name for shape in SHAPES], default=None)
    parser.add_argument("--no-gaps", action="store_true", help="without the traffic with gaps")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="few requests, one load, the two smaller models")
    arguments = parser.parse_args(argv)
    num_requests = 60 if arguments.quick else arguments.requests
    wanted = arguments.only or (("gpt-oss", "paper") if arguments.quick else ("gpt-oss", "deepseek", "large", "paper"))
    levels = arguments.levels or (["middle"] if arguments.quick else list(LEVELS))
    shapes = [shape for shape in SHAPES if arguments.shapes is None or shape.name in arguments.shapes]
    rows: list[Row] = []
    makers = {
        "gpt-oss": lambda: recorded("gpt-oss-20b", "a6000-gpt-oss-20b", arguments.gpt_oss),
        "deepseek": lambda: recorded("DeepSeek-V2-Lite", "a6000-deepseek-v2-lite", arguments.deepseek),
        "large": large,
    }
    for name, make in makers.items():
        if name in wanted:
            setting = make()
            rows += compare(
                setting, shapes, levels, num_requests, quick=arguments.quick, has_gaps=not arguments.no_gaps
            )
    if "paper" in wanted:
        arrivals = arrivals_file(arguments.arrivals)
        for model in PAPER_MODELS[: 1 if arguments.quick else None]:
            rows += compare_in_paper(paper(model), arrivals, num_requests)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))


def compare(
    setting: Setting, shapes: list[Shape], levels: list[str], num_requests: int, *, quick: bool, has_gaps: bool
) -> list[Row]:
    """Every shape at every load, and the lowest load thinned."""
    config = SystemConfig(prior_LE=setting.prior_LE, predicted=predicted_for(setting))
    if config.predicted is not None:
        print(f"\n{setting.name}: fitted predictors find {config.predicted.recall:.0%} of the experts a layer ahead")
    rows: list[Row] = []
    gaps: list[Row] = []
    for shape in shapes:
        saturated = saturation_per_s(setting, shape, quick=quick)
        for level in levels:
            arrivals = arrivals_of(shape, rate_per_s=LEVELS[level] * saturated, num_requests=num_requests)
            runs = Runs(setting=setting, scenario=setting.scenario(arrivals), config=config, found={})
            rows += _compared(runs, shape.name, level)
        if has_gaps:
            rate_per_s = LEVELS["low"] * saturated
            arrivals = arrivals_of(shape, rate_per_s=rate_per_s, num_requests=4 * num_requests)
            scenario = setting.scenario(thinned(arrivals, THINNED, seed=1))
            gaps += _with_gaps(Runs(setting=setting, scenario=scenario, config=config, found={}), shape.name)
    show_systems(setting.name, rows)
    show_equal_memory(setting.name, rows)
    if gaps:
        show_gaps(setting.name, gaps)
    return rows + gaps


def _compared(runs: Runs, shape: str, level: str) -> list[Row]:
    model, cluster = runs.scenario.profile.model, runs.scenario.cluster
    num_experts, num_workers = model.num_experts, cluster.num_workers
    static = runs.run("static")
    runs.eplb((0, 1), "eplb")
    runs.run("lp")
    for name in ("lp", "moeless-popularity"):
        runs.run(name, label=f"{name}, free split", is_split_free=True)
    for name in FORECASTS if runs.config.predicted is not None else FORECASTS[:2]:
        runs.run(name)
    for name in BOUNDS:
        runs.run(name)
    # moeless with the forecast that needs nothing, at the memory of the others; they at its memory.
    runs.run("moeless-popularity", label="moeless, once", policy=with_extras(0.0))
    runs.run("moeless-popularity", label="moeless, at EPLB's memory", policy=with_extras(num_workers / num_experts))
    used = runs.found["moeless-popularity"].resident_byte_s * static.duration_s
    used /= static.resident_byte_s * runs.found["moeless-popularity"].duration_s
    spare = max(1, round((used - 1) * num_experts / num_workers))
    runs.eplb((spare,), "eplb, at moeless's memory")
    runs.run("lp", label="lp, at moeless's memory", eplb_spare_replicas=spare)
    return runs.rows(shape, level)


def with_extras(share: float) -> object:
    """The default policy with at most this share of extra instances."""
    return parse_policy({"defaults": {"scaler": {"name": "minMax", "maxExtraShare": share}}})


def _with_gaps(runs: Runs, shape: str) -> list[Row]:
    for name in ("static", "moeless-paper", "moeless-popularity"):
        runs.run(name)
    runs.run("moeless-popularity", label="moeless, lean", policy=parse_policy(LEAN))
    return runs.rows(shape, f"{THINNED:.0%} of low")


def compare_in_paper(setting: Setting, arrivals: ArrivalTrace | None, num_requests: int) -> list[Row]:
    """The MoEless paper's: conversation arrivals in batches of a second."""
    if arrivals is None:
        arrivals = arrivals_of(
            Shape(name="conversation", prompt_tokens=1150, output_tokens=210), rate_per_s=5.4, num_requests=num_requests
        )
    scenario = setting.scenario(by_the_second(arrivals, num_requests=num_requests))
    runs = Runs(setting=setting, scenario=scenario, config=SystemConfig(prior_LE=setting.prior_LE), found={})
    runs.run("static")
    runs.eplb((0, 1), "eplb")
    for name in ("lp", "moeless-paper", "moeless"):
        runs.run(name)
    runs.run("moeless", label="moeless, twice", policy=parse_policy(TWICE))
    for name in BOUNDS:
        runs.run(name)
    show_paper(setting.name, runs, num_layers=scenario.profile.model.num_layers)
    return runs.rows("conversation", "1 s batches")


def arrivals_file(path: Path | None) -> ArrivalTrace | None:
    """Raises SystemExit if it holds something else."""
    if path is None:
        return None
    trace = import_trace(path).trace
    if not isinstance(trace, ArrivalTrace):
        raise SystemExit(f"--arrivals must be a file of arrivals, got {path}")
    return trace


def show_systems(title: str, rows: list[Row]) -> None:
    """Mean request time over static's."""
    names = ["eplb", "lp", "lp, free split", *FORECASTS, "moeless-popularity, free split", *BOUNDS]
    _print_markdown(
        f"{title}: mean request time over static expert parallelism's",
        ["requests", "load", *names, "popularity over foresight", "limit's gap closed"],
        [
            [
                *key,
                *(f"{of[name].request:.3f}" if name in of else "" for name in names),
                f"{of['moeless-popularity'].request / of['foresight'].request - 1:+.1%}",
                f"{(1 - of['moeless-popularity'].request) / (1 - of['limit'].request):.0%}",
            ]
            for key, of in _by_case(rows)
        ],
    )


def show_equal_memory(title: str, rows: list[Row]) -> None:
    """Mean request time over static's, and in brackets resident memory x time over static's."""
    groups = {
        "static's memory": ("eplb, 0", "moeless, once"),
        "EPLB's, one spare": ("eplb, 1", "lp", "moeless, at EPLB's memory"),
        "moeless's": ("eplb, at moeless's memory", "lp, at moeless's memory", "moeless-popularity"),
    }
    headers = [f"{group}: {name.split(',')[0]}" for group, names in groups.items() for name in names]

    def cell(of: dict[str, Row], name: str) -> str:
        spare = name.removeprefix("eplb, ")
        found = (
            min((of[f"{one}, {spare} spare"] for one in EPLBS), key=lambda row: row.request)
            if spare in ("0", "1")
            else of[name]
        )
        return f"{found.request:.3f} ({found.resident:.2f})"

    _print_markdown(
        f"{title}: at equal memory, request time over static's (resident memory x time)",
        ["requests", "load", *headers],
        [[*key, *(cell(of, name) for names in groups.values() for name in names)] for key, of in _by_case(rows)],
    )


def show_gaps(title: str, rows: list[Row]) -> None:
    """Memory and tails where seconds pass between requests."""
    _print_markdown(
        f"{title}: traffic with gaps, over static's",
        ["requests", "system", "resident", "billed", "TTFT p99", "TPOT p99", "cold starts"],
        [
            [
                row.shape,
                row.system,
                *(f"{value:.2f}" for value in (row.resident, row.billed, row.ttft_p99, row.tpot_p99)),
                f"{row.cold_starts}",
            ]
            for row in rows
            if row.system != "static"
        ],
    )


def show_paper(title: str, runs: Runs, *, num_layers: int) -> None:
    """Reductions of layer time and of billed memory x time, against static and the best EPLB."""
    table = []
    for name in ("eplb", "lp", "moeless-paper", "moeless", "moeless, twice", *BOUNDS):
        cells = [name]
        for other in ("static", "eplb"):
            before, after = runs.found[other], runs.found[name]
            cells.append(f"{after.layer_s.mean / before.layer_s.mean - 1:+.0%}")
            # A system that is not serverless holds every layer's experts while one of them runs.
            cost = f"{after.billed_byte_s / (num_layers * before.billed_byte_s) - 1:+.0%}"
            cells.append(cost if name.startswith("moeless") else "")
        table.append(cells)
    _print_markdown(
        f"{title}: layer time, and cost with the others billed for all layers at once",
        ["system", "layer, static", "cost, static", "layer, EPLB", "cost, EPLB"],
        table,
    )


def _by_case(rows: list[Row]) -> list[tuple[tuple[str, str], dict[str, Row]]]:
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row.shape, row.level), {})[row.system] = row
    return list(found.items())


def _print_markdown(title: str, headers: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n")
    for cells in (headers, ["---"] * len(headers), *rows):
        print(f"| {' | '.join(cells)} |")
    print(flush=True)


if __name__ == "__main__":
    main()
