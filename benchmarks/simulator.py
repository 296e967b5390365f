"""Speed of the simulator: served tokens a minute on one core, and whether its cost is linear in them.

`python -m benchmarks simulator` replays made-up routing in the shape of gpt-oss-20b (24 layers x 32 experts, top-4, 8
workers) under requests as long and as frequent as the Azure conversation trace's (5.4 a second in bursts, prompts of
1,155 and answers of 211 tokens on average), and the same requests over twice and four times the time. Times are the
processor's, so that other processes count little; systems run in turns, and the least of the repeats is taken.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from moeless.simulate.routing import SequenceRouting
from moeless.simulate.settings import ScenarioSettings, make_scenario
from moeless.simulate.simulation import simulate
from moeless.simulate.systems import SYSTEMS, make_systems
from moeless.simulate.workload import made_up_arrivals
from moeless_predictors.traces import synthetic_trace

POLICIES = ("static", "eplb-vllm", "moeless")
FACTORS = (1, 2, 4)
REQUESTS_PER_S = 19366 / 3600
PROMPT_TOKENS, OUTPUT_TOKENS = 1155, 211
GAP_CV = 1.3


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One system and one number of requests."""

    system: str
    requests: int
    tokens: int
    steps: int
    seconds: float
    """Time of one core."""

    @property
    def tokens_per_minute(self) -> float:
        return 60 * self.tokens / self.seconds


def measure(systems: list[str], *, requests: int, factors: tuple[int, ...], repeats: int) -> list[Figure]:
    """A figure for each system and size."""
    routing = SequenceRouting(
        synthetic_trace(num_sequences=64, tokens_per_sequence=512, num_layers=24, num_experts=32, top_k=4)
    )
    figures: dict[tuple[str, int], Figure] = {}
    for _ in range(repeats):
        for factor in factors:
            arrivals = made_up_arrivals(
                rate_per_s=REQUESTS_PER_S,
                num_requests=factor * requests,
                prompt_tokens=PROMPT_TOKENS,
                output_tokens=OUTPUT_TOKENS,
                gap_cv=GAP_CV,
                length_cv=1.0,
            )
            scenario = make_scenario(ScenarioSettings(), routing, arrivals)
            for name in systems:
                (system,) = make_systems(scenario, names=[name])
                began_s = time.process_time()
                result = simulate(scenario, system)
                seconds = time.process_time() - began_s
                before = figures.get((name, factor))
                if before is None or seconds < before.seconds:
                    figures[name, factor] = Figure(
                        system=name,
                        requests=factor * requests,
                        tokens=result.num_tokens,
                        steps=result.num_steps,
                        seconds=seconds,
                    )
    return [figures[name, factor] for name in systems for factor in factors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests, once")
    parser.add_argument("--systems", default=",".join(POLICIES), help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--requests", type=int, default=1500, help="of the smallest size")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    requests, repeats = (150, 1) if arguments.quick else (arguments.requests, arguments.repeats)
    factors = FACTORS[:2] if arguments.quick else FACTORS
    with threadpool_limits(1):
        figures = measure(arguments.systems.split(","), requests=requests, factors=factors, repeats=repeats)
    show(figures)
    if arguments.json is not None:
        document = [asdict(figure) | {"tokens_per_minute": figure.tokens_per_minute} for figure in figures]
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


def show(figures: list[Figure]) -> None:
    """A row for each system and size."""
    table = Table(title="simulated tokens on one core")
    for header in ("system", "requests", "tokens", "steps", "seconds", "tokens a minute", "time per token"):
        table.add_column(header, justify="left" if header == "system" else "right")
    for figure in figures:
        first = next(other for other in figures if other.system == figure.system)
        ratio = figure.seconds / figure.tokens / (first.seconds / first.tokens)
        table.add_row(
            figure.system,
            f"{figure.requests:,}",
            f"{figure.tokens:,}",
            f"{figure.steps:,}",
            f"{figure.seconds:.1f}",
            f"{figure.tokens_per_minute / 1e6:.1f} M",
            f"x {ratio:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
