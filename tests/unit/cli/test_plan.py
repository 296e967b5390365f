"""`moeless plan` as a user meets it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from typer.testing import CliRunner, Result

from moeless.cli.app import app
from moeless.core.errors import ConfigError
from moeless.simulate.recommend import CapacityReport
from moeless.simulate.report.tables import capacity_notes, capacity_tables, plan_notes
from moeless.simulate.workload import made_up_arrivals
from moeless_predictors.traces.synthetic import synthetic_trace

ROOT = Path(__file__).parents[3]
SIZES = ("--hidden-size", 64, "--expert-mb", 100)
SMALL = (*SIZES, "--requests", 30, "--rate", 20, "--prompt-tokens", 40, "--output-tokens", 8, "--max-workers", 8)
SLO = ("--ttft-slo", 0.1, "--tpot-slo", 1.5e-3, "--attainment", 0.9)


def moeless_plan(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def assert_refused(result: Result, *words: str) -> None:
    assert isinstance(result.exception, ConfigError), result.output
    for word in words:
        assert word in str(result.exception)


def read(path: Path) -> CapacityReport:
    return msgspec.json.decode(path.read_bytes(), type=CapacityReport)


@pytest.fixture(name="trace", scope="module")
def trace_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "routing.trace"
    synthetic_trace(num_sequences=8, tokens_per_sequence=30, num_layers=3, num_experts=8, top_k=2, seed=0).save(path)
    return path


def test_systems_stand_side_by_side_with_what_was_tried_and_the_cheapest_with_its_plan(
    trace: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    result = moeless_plan(trace, *SMALL, *SLO, "--worker-hour-cost", 2.5, "--json", out)
    assert result.exit_code == 0, result.output
    found = read(out)
    assert [one.system for one in found.alternatives] == ["static", "eplb-vllm", "eplb-sglang", "lp", "moeless"]
    for one in found.alternatives:
        assert one.workers is not None
        assert one.one_fewer is not None
        assert one.one_fewer.workers == one.workers - 1
        shares = {probe.workers: probe.slo_share for probe in one.probes}
        assert (shares[one.workers] or 0) >= 0.9 > (shares[one.workers - 1] or 0)
        assert one.cost is not None
        assert one.cost.dollars_per_hour == pytest.approx(2.5 * one.workers)
    lines = {line.strip() for line in re.sub(" +", " ", result.output).splitlines()}
    for table in capacity_tables(found):
        for row in table.rows:
            assert " ".join(row) in lines
    assert all(f"{word}: {text}" in result.output for word, text in found.assumptions.items())
    best = found.recommendation
    assert best is not None
    assert best.workers == min(one.workers or 99 for one in found.alternatives)
    assert f"recommended: {best.system} on {best.workers} workers: {best.why}" in result.output
    assert all(note in result.output for note in plan_notes(best, top_k=2))
    assert [worker.name for worker in best.plan] == [f"worker-{index}" for index in range(best.workers)]
    shares_of: dict[str, float] = {}
    for worker in best.plan:
        assert worker.instance_bytes <= found.memory_per_worker
        for name, share in worker.functions.items():
            shares_of[name] = shares_of.get(name, 0) + share
    assert sorted(shares_of) == [f"L{layer:02}.E{expert:03}" for layer in range(3) for expert in range(8)]
    assert list(shares_of.values()) == pytest.approx([1] * 24)


def test_memory_is_a_stated_part_of_the_device_or_as_given(trace: Path, tmp_path: Path) -> None:
    for options, expected, words in (
        ((), 28_800_000_000, "60% of the device's 48 GB; the rest is for the backbone"),
        (("--device", "h800"), 48_000_000_000, "60% of the device's 80 GB"),
        (("--memory-per-worker", "1200M"), 1_200_000_000, "1.20 GB for instances on each worker: 12 instances"),
    ):
        out = tmp_path / "out.json"
        result = moeless_plan(trace, *SMALL, *SLO, *options, "--systems", "static", "--json", out)
        assert result.exit_code == 0, result.output
        assert read(out).memory_per_worker == expected
        assert words in read(out).assumptions["memory"]


def test_an_slo_that_nothing_keeps_is_told_with_the_best_there_is(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = moeless_plan(
        *(trace, *SMALL, "--ttft-slo", 0.1, "--tpot-slo", 3e-4, "--systems", "static,moeless", "--json", out),
        *("--max-workers", 4),
    )
    assert result.exit_code == 0, result.output
    assert read(out).recommendation is None
    assert "static: keeps the SLO at no size of 1, 2, 4; nearest is" in result.output
    assert "no system keeps the SLO for 0.99 of the requests at a size that was tried" in result.output
    small = moeless_plan(trace, *SMALL, *SLO, "--systems", "static", "--memory-per-worker", "100M")
    assert small.exit_code == 0, small.output
    assert "static: the experts fit no size of 1, 2, 4, 8: the routing uses 24 functions, and 8 fit" in small.output


def test_a_size_that_falls_just_short_is_pointed_out(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    moeless_plan(trace, *SMALL, *SLO, "--systems", "static", "--json", out)
    found = read(out)
    (one,) = found.alternatives
    assert one.one_fewer is not None
    assert one.result is not None
    for share, notes in ((0.898, ["static: 3 workers fall short by 2 of 1,000 requests"]), (0.88, [])):
        close = replace(
            one,
            one_fewer=replace(one.one_fewer, workers=3, slo_share=share),
            result=replace(one.result, num_requests=1000),
        )
        told = capacity_notes(replace(found, alternatives=[close]))
        assert [note.partition(";")[0] for note in told] == notes


def test_moeless_is_shown_with_idle_workers_that_stop_where_asked(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = moeless_plan(trace, *SMALL, *SLO, "--systems", "moeless", "--worker-idle", 30, "--json", out)
    assert result.exit_code == 0, result.output
    assert [one.system for one in read(out).alternatives] == ["moeless", "moeless-idle"]
    assert "workers without instances stop after 30 s" in read(out).assumptions["system moeless-idle"]


def test_a_policy_that_places_by_affinity_makes_the_plan(trace: Path, tmp_path: Path) -> None:
    policy, touched, sizes = tmp_path / "policy.yaml", [], []
    for placer in ("{name: minimalMoves}", "{name: affinity, maxImbalance: 1.5}"):
        policy.write_text(f"defaults: {{maxReplicas: 1, placer: {placer}}}\n")
        out = tmp_path / "out.json"
        slo = ("--ttft-slo", 0.1, "--tpot-slo", 1.7e-3)  # that both keep on as many workers
        result = moeless_plan(trace, *SMALL, *slo, "--systems", "moeless", "--policy", policy, "--json", out)
        assert result.exit_code == 0, result.output
        best = read(out).recommendation
        assert best is not None
        sizes.append(best.workers)
        touched.append(best.workers_touched)
    assert sizes[0] == sizes[1] > 1
    assert touched[1] < touched[0]


def test_the_same_seed_gives_the_same_file(trace: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        moeless_plan(trace, *SMALL, *SLO, "--systems", "moeless", "--seed", seed, "--json", tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "again").read_bytes()
    assert (tmp_path / "one").read_bytes() != (tmp_path / "other").read_bytes()


def test_tables_fit_a_terminal_of_80_columns(trace: Path) -> None:
    result = moeless_plan(
        *(trace, *SMALL, "--ttft-slo", 1, "--tpot-slo", 1, "--systems", "moeless-paper,eplb-sglang"),
        *("--worker-hour-cost", 2),
    )
    assert result.exit_code == 0, result.output
    assert "…" not in result.output


def test_routing_can_be_made_up_and_a_shape_that_is_known_brings_its_costs(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = moeless_plan(
        *("--generate", "24x32x4", "--sequences", 2, "--tokens-per-sequence", 30, "--requests", 3),
        *("--ttft-slo", 1, "--tpot-slo", 0.1, "--systems", "static", "--json", out, "--max-workers", 2),
    )
    assert result.exit_code == 0, result.output
    assert "a6000-gpt-oss-20b" in read(out).assumptions["costs"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--memory-per-worker", "200%"), ("--memory-per-worker must be bytes or have a unit", "got '200%'")),
        (("--memory-per-worker", "lots"), ("--memory-per-worker must be bytes or have a unit", "got 'lots'")),
        (("--memory-per-worker", "1M"), ("--memory-per-worker must have room for an expert", "got 1,000,000")),
        (("--ttft-slo", 0), ("--ttft-slo must be above 0, got 0",)),
        (("--tpot-slo", "nan"), ("--tpot-slo must be above 0, got nan",)),
        (("--attainment", 99), ("--attainment must be above 0 and at most 1, got 99",)),
        (("--max-workers", 0), ("--max-workers must be at least 1, got 0",)),
        (("--worker-hour-cost", 0), ("--worker-hour-cost must be above 0 and finite, got 0",)),
        (("--ttft-slo", "inf"), ("--ttft-slo must be finite, got inf",)),
        (("--json", "nowhere/out.json"), ("--json must be in a folder that exists, got nowhere/out.json",)),
        (("--systems", "static,limit"), ("--systems must be among static", "got limit")),
        (("--systems", "static", "--worker-idle", 5), ("--systems must have moeless", "got static")),
        (("--worker-idle", -1), ("--worker-idle must be at least 0, got -1",)),
        (("--eplb-spare-replicas", -1), ("--eplb-spare-replicas must be at least 0, got -1",)),
        (("--recall", 1.5), ("--recall must be from 0 to 1, got 1.5",)),
        (("--workers-per-node", 0), ("--workers-per-node must be at least 1, got 0",)),
        (("--device", "tpu"), ("--device must be one of a6000, h800, got 'tpu'",)),
        (("--profile", "cpu-moeless-mini"), ("--memory-per-worker must be given: profile cpu-moeless-mini",)),
        (("--generate", "2x8x2"), ("one of TRACE and --generate must be given, got both",)),
        (("--arrivals", "nowhere.csv"), ("nowhere.csv",)),
        (("--policy", "nowhere.yaml"), ("nowhere.yaml",)),
    ],
)
def test_what_is_wrong_is_told_with_option_rule_and_value(
    options: tuple[object, ...], words: tuple[str, ...], trace: Path
) -> None:
    assert_refused(moeless_plan(trace, *SMALL, *SLO, *options), *words)


def test_an_slo_must_be_given(trace: Path) -> None:
    result = moeless_plan(trace, *SMALL, "--ttft-slo", 1)
    assert result.exit_code == 2
    assert "--tpot-slo" in result.output


def test_traces_of_the_other_kind_are_refused(tmp_path: Path) -> None:
    arrivals = tmp_path / "arrivals.trace"
    made_up_arrivals(rate_per_s=1, num_requests=2, prompt_tokens=9, output_tokens=3).save(arrivals)
    assert_refused(moeless_plan(arrivals, *SLO), "TRACE must hold routing", "holds arrivals")


def test_an_error_is_one_line_and_code_2(trace: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moeless.cli", "plan", str(trace), *map(str, SLO), "--memory-per-worker", "200%"]
        + [str(option) for option in SIZES],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
    assert done.stderr.startswith("moeless: --memory-per-worker must be bytes or have a unit")


def test_planning_needs_neither_torch_nor_ray(trace: Path) -> None:
    program = f"""
import sys
from typer.testing import CliRunner
from moeless.cli.app import app
done = CliRunner().invoke(app, {["plan", str(trace), *map(str, (*SMALL, *SLO)), "--systems", "static,moeless"]!r})
assert done.exit_code == 0, done.output
print(*sorted({{"torch", "ray", "transformers", "matplotlib"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_the_page_on_capacity_and_that_on_the_simulator_name_every_option() -> None:
    pages = "".join((ROOT / "docs" / f"{name}.md").read_text() for name in ("capacity", "simulator"))
    shown = CliRunner().invoke(app, ["plan", "--help"], terminal_width=200, env={"COLUMNS": "200"}).output
    options = set(re.findall(r"--[a-z][a-z-]+", shown)) - {"--help", "--no-in-order"}
    assert len(options) > 30
    assert {option for option in options if f"`{option}" not in pages} == set()


def plan_with(trace: Path, tmp_path: Path, system: str, *options: object) -> CapacityReport:
    out, policy = tmp_path / "out.json", tmp_path / "policy.yaml"
    policy.write_text("defaults: {maxReplicas: 1}\n")
    result = moeless_plan(trace, *SMALL, *SLO, "--systems", system, "--policy", policy, "--json", out, *options)
    assert result.exit_code == 0, result.output
    assert ("exact: " in result.output) == ("--exact" in options)
    return read(out)


@pytest.mark.parametrize(("system", "objective"), [("moeless", "workers"), ("static", "hops")])
def test_an_exact_plan_is_no_worse_and_proves_it(trace: Path, tmp_path: Path, system: str, objective: str) -> None:
    usual = plan_with(trace, tmp_path, system).recommendation
    exact = plan_with(trace, tmp_path, system, "--exact").recommendation
    assert usual is not None
    assert exact is not None
    assert usual.exact is None
    assert exact.exact is not None
    assert (exact.exact.objective, exact.exact.layers) == (objective, 3)
    assert exact.exact.after < exact.exact.before
    assert exact.exact.gap <= 1e-6
    # The same instances, elsewhere; balance within the bound, or as it was.
    assert [layer.replicas for layer in exact.layers] == [layer.replicas for layer in usual.layers]
    assert [worker.functions for worker in exact.plan] != [worker.functions for worker in usual.plan]
    for after, before in zip(exact.layers, usual.layers, strict=True):
        assert after.imbalance <= max(1.05, before.imbalance) + 1e-6
    if objective == "workers":
        assert exact.exact.before == pytest.approx(usual.workers_touched)
        assert exact.exact.after == pytest.approx(exact.workers_touched)


@pytest.mark.parametrize("seconds", ["0", "-1", "inf", "nan"])
def test_a_solver_without_time_is_refused(trace: Path, seconds: str) -> None:
    result = moeless_plan(trace, *SMALL, *SLO, "--exact", "--exact-seconds", seconds)
    assert_refused(result, "--exact-seconds must be above 0 and finite", f"got {float(seconds)}")
