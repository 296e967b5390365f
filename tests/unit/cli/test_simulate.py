"""`moeless simulate` as a user meets it."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner, Result

from moeless.cli.app import app
from moeless.core.errors import ConfigError
from moeless.simulate.report.results import SimulationReport
from moeless.simulate.report.tables import comparison_tables
from moeless.simulate.workload import made_up_arrivals
from moeless_predictors.fitting import FitConfig, fit_predictors
from moeless_predictors.traces.synthetic import synthetic_trace

ROOT = Path(__file__).parents[3]
SIZES = ("--hidden-size", 64, "--expert-mb", 1)
SMALL = (*SIZES, "--workers", 4, "--requests", 30, "--rate", 20, "--prompt-tokens", 40, "--output-tokens", 8)


def moeless_simulate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


def assert_refused(result: Result, *words: str) -> None:
    assert isinstance(result.exception, ConfigError), result.output
    for word in words:
        assert word in str(result.exception)


def read(path: Path) -> SimulationReport:
    return msgspec.json.decode(path.read_bytes(), type=SimulationReport)


@pytest.fixture(name="trace", scope="module")
def trace_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "routing.trace"
    synthetic_trace(num_sequences=8, tokens_per_sequence=30, num_layers=3, num_experts=8, top_k=2, seed=0).save(path)
    return path


def test_the_table_shows_what_the_json_file_holds(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = moeless_simulate(trace, *SMALL, "--json", out, "--ttft-slo", 0.5, "--tpot-slo", 0.05)
    assert result.exit_code == 0, result.output
    found = read(out)
    assert [r.system for r in found.results] == [
        *("static", "eplb-vllm", "eplb-sglang", "lp", "moeless-paper", "moeless", "moeless-window"),
        *("foresight", "exact-load", "whole-experts", "limit"),
    ]
    lines = {line.strip() for line in re.sub(" +", " ", result.output).splitlines()}
    for table in comparison_tables(found.results):
        for row in table.rows:
            assert " ".join(row) in lines
    assert {r.num_requests for r in found.results} == {30}
    assert found.slo_s == (0.5, 0.05)
    assert all(r.goodput_per_s is not None for r in found.results)
    assert all(f"{word}: {text}" in result.output for word, text in found.scenario.items())


def test_tables_fit_a_terminal_of_80_columns(trace: Path) -> None:
    result = moeless_simulate(trace, *SMALL, "--ttft-slo", 0.5, "--tpot-slo", 0.05, "--systems", "moeless-paper")
    assert result.exit_code == 0, result.output
    assert "…" not in result.output


def test_the_same_seed_gives_the_same_file(trace: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        moeless_simulate(trace, *SMALL, "--systems", "moeless", "--seed", seed, "--json", tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "again").read_bytes()
    assert (tmp_path / "one").read_bytes() != (tmp_path / "other").read_bytes()


def test_a_report_is_written(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    result = moeless_simulate(trace, *SMALL, "--systems", "static,limit", "--report", out)
    assert result.exit_code == 0, result.output
    assert out.read_text().startswith("<!doctype html>")


def test_routing_can_be_made_up(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = moeless_simulate(
        *("--generate", "2x16x4", "--sequences", 4, "--tokens-per-sequence", 20, "--in-order"),
        *(*SMALL, "--systems", "static", "--json", out, "--engines", 2),
    )
    assert result.exit_code == 0, result.output
    assert "2 MoE layers x 16 experts, top-4" in read(out).scenario["model"]
    assert read(out).scenario["engines"].startswith("2,")


def test_a_shape_that_is_known_brings_its_costs(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = moeless_simulate(
        *("--generate", "24x32x4", "--sequences", 2, "--tokens-per-sequence", 30, "--requests", 3),
        *("--systems", "static", "--json", out),
    )
    assert result.exit_code == 0, result.output
    assert "a6000-gpt-oss-20b" in read(out).scenario["costs"]


def test_arrivals_come_from_a_trace_or_the_files_others_publish(trace: Path, tmp_path: Path) -> None:
    own, azure = tmp_path / "arrivals.trace", tmp_path / "azure.csv"
    made_up_arrivals(rate_per_s=50, num_requests=40, prompt_tokens=9, output_tokens=3).save(own)
    with azure.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["TIMESTAMP", "ContextTokens", "GeneratedTokens"])
        rows.writerows([f"2023-11-16 18:15:{second:02}.5000000", 20, 4] for second in range(10, 50))
    for path, options, expected in (
        (own, (), 40),
        (own, ("--requests", 7), 7),
        (azure, (), 40),
        (azure, ("--duration", 9.5), 10),
        (azure, ("--speed-up", 1000, "--thin", 0.5, "--seed", 3), None),
    ):
        out = tmp_path / "out.json"
        options = (*SIZES, "--workers", 4, "--systems", "static", "--arrivals", path, *options)
        result = moeless_simulate(trace, *options, "--json", out)
        assert result.exit_code == 0, result.output
        (found,) = read(out).results
        if expected is None:
            assert 5 < found.num_requests < 35
            assert found.duration_s < 1
        else:
            assert found.num_requests == expected


def test_moeless_follows_a_policy_file_and_fitted_predictors(trace: Path, tmp_path: Path) -> None:
    policy, predictors = tmp_path / "policy.yaml", tmp_path / "predictors"
    policy.write_text("tickSeconds: 0.2\ndefaults: {minReplicas: 2}\n")
    fitted_on = synthetic_trace(num_sequences=20, tokens_per_sequence=30, num_layers=3, num_experts=8, top_k=2, seed=0)
    fit_predictors(fitted_on, FitConfig(kinds=("transition",), distances=(1,))).save(predictors)
    out = tmp_path / "out.json"
    result = moeless_simulate(
        trace, *SMALL, "--systems", "moeless", "--policy", policy, "--predictors", predictors, "--json", out
    )
    assert result.exit_code == 0, result.output
    found = read(out)
    assert found.results[0].peak_instances >= 48
    assert "every 0.2 s" in found.scenario["system moeless"]
    assert "the predictors given" in found.scenario["system moeless"]
    assert "begins with a plan for the load recorded before" in found.scenario["system moeless"]
    assert 0.3 < float(str(found.settings["recall"])) < 1


def test_a_recall_is_assumed_only_where_it_is_given(trace: Path, tmp_path: Path) -> None:
    words = {}
    for options in ((), ("--recall", 0.7)):
        out = tmp_path / "out.json"
        result = moeless_simulate(trace, *SMALL, "--systems", "moeless", *options, "--json", out)
        assert result.exit_code == 0, result.output
        words[options] = read(out).scenario["system moeless"]
    assert "forecasts by popularity (half-life 60 s); no function started ahead" in words[()]
    assert "ASSUMED to know the tokens to come with a recall of 70%" in words["--recall", 0.7]


def test_a_recall_beside_predictors_is_refused(trace: Path, tmp_path: Path) -> None:
    predictors = tmp_path / "predictors.npz"
    predictors.touch()
    result = moeless_simulate(trace, *SMALL, "--recall", 0.7, "--predictors", predictors)
    assert_refused(result, "--recall must not be given with --predictors, whose recall is measured")


def test_eplb_is_shown_with_the_number_of_spare_replicas_that_serves_better(trace: Path, tmp_path: Path) -> None:
    found = {}
    for spare in ((), (0,), (1,)):
        out, option = tmp_path / "out.json", ("--eplb-spare-replicas", *spare) if spare else ()
        result = moeless_simulate(trace, *SMALL, "--systems", "eplb-sglang", *option, "--json", out)
        assert result.exit_code == 0, result.output
        found[spare] = read(out).results[0]
        assert ("serves better with" in result.output) == (not spare)
    assert found[()] == min(found[0,], found[1,], key=lambda result: result.request_s.mean)
    assert found[0,].request_s.mean != found[1,].request_s.mean


def test_first_plans_are_for_a_trace_that_was_recorded_earlier(trace: Path, tmp_path: Path) -> None:
    prior, other, arrivals = tmp_path / "prior.trace", tmp_path / "other.trace", tmp_path / "arrivals.trace"
    synthetic_trace(num_sequences=8, tokens_per_sequence=30, num_layers=3, num_experts=8, top_k=2, seed=1).save(prior)
    synthetic_trace(num_sequences=2, tokens_per_sequence=9, num_layers=3, num_experts=16, top_k=2).save(other)
    made_up_arrivals(rate_per_s=9, num_requests=9, prompt_tokens=9, output_tokens=9).save(arrivals)
    found = []
    for options in ((), ("--prior", prior)):
        out = tmp_path / "out.json"
        result = moeless_simulate(trace, *SMALL, "--systems", "moeless,eplb-vllm", *options, "--json", out)
        assert result.exit_code == 0, result.output
        found.append(read(out))
    without, knowing = found
    assert "for equal loads" in without.scenario["system moeless"]
    assert "for the load recorded before" in knowing.scenario["system moeless"]
    assert "for equal loads" in knowing.scenario["system eplb-vllm"]
    assert knowing.results[0].layer_s != without.results[0].layer_s
    assert knowing.results[1] == without.results[1]
    refused = moeless_simulate(trace, *SMALL, "--prior", other)
    assert_refused(refused, "--prior: num_experts must be 8 as of the routing that is simulated, got 16")
    assert_refused(moeless_simulate(trace, *SMALL, "--prior", arrivals), "--prior must hold routing", "holds arrivals")
    assert_refused(
        moeless_simulate(trace, *SMALL, "--prior", trace), "--prior must be another trace than the one that is"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--systems", "static,best"), ("--systems must be among static", "got best")),
        (("--workers", 0), ("--workers must be at least 1, got 0",)),
        (("--memory-per-worker", "lots"), ("--memory-per-worker must be bytes, with a unit", "'lots'")),
        (
            ("--memory-per-worker", "99999999Ti"),
            ("worker-0: memory_bytes must be from 0 to", "got 109951161678088372224"),
        ),
        (("--memory-per-worker", "100%"), ("--eplb-spare-replicas must leave room",)),
        (("--memory-per-worker", "2M", "--systems", "static"), ("worker-0", "fit its memory")),
        (("--rate", 0, "--duration", 5), ("--rate must be above 0, got 0",)),
        (("--prompt-tokens", 0), ("--prompt-tokens must be at least 1, got 0",)),
        (("--gap-cv", -1), ("--gap-cv must be at least 0",)),
        (("--thin", 0), ("--thin must be above 0 and at most 1, got 0",)),
        (("--speed-up", -2), ("--speed-up must be above 0, got -2",)),
        (("--duration", 0), ("--duration must be above 0, got 0",)),
        (("--requests", 0), ("--requests must be at least 1, got 0",)),
        (("--batch-tokens", 8), ("--batch-tokens must be at least max_running (256), got 8",)),
        (("--max-running", 0), ("--max-running must be at least 1, got 0",)),
        (("--engines", 0), ("--engines must be at least 1, got 0",)),
        (("--local-gb-s", 0), ("--local-gb-s must be above 0, got 0",)),
        (("--transfer-share", 1), ("--transfer-share must be from 0 to below 1, got 1",)),
        (("--worker-idle", -1), ("--worker-idle must be at least 0, got -1",)),
        (("--recall", 1.5), ("--recall must be from 0 to 1, got 1.5",)),
        (("--eplb-spare-replicas", -1), ("--eplb-spare-replicas must be at least 0, got -1",)),
        (("--ttft-slo", 1), ("--ttft-slo and --tpot-slo must be given together",)),
        (("--ttft-slo", 1, "--tpot-slo", 0), ("--tpot-slo must be above 0, got 0",)),
        (("--device", "tpu"), ("--device must be one of a6000, h800, got 'tpu'",)),
        (("--profile", "fast"), ("--profile must be one of h800-deepseek-v3", "got 'fast'")),
        (("--profile", "a6000-mixtral-8x7b"), ("32 layers x 8 experts", "got 3 x 8, top-2")),
        (("--generate", "2x8x2"), ("one of TRACE and --generate must be given, got both",)),
        (("--arrivals", "nowhere.csv"), ("nowhere.csv",)),
        (("--policy", "nowhere.yaml"), ("nowhere.yaml",)),
        (("--predictors", "nowhere.set"), ("nowhere.set",)),
        (("--prior", "nowhere.trace"), ("nowhere.trace",)),
    ],
)
def test_what_is_wrong_is_told_with_option_rule_and_value(
    options: tuple[object, ...], words: tuple[str, ...], trace: Path
) -> None:
    assert_refused(moeless_simulate(trace, *SMALL, *options), *words)


def test_sizes_that_nobody_knows_are_asked_for(trace: Path) -> None:
    assert_refused(moeless_simulate(trace), "--hidden-size must be given: no built-in profile is of 3 layers")
    assert_refused(moeless_simulate(trace, "--hidden-size", 64), "--expert-mb must be given")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("58x256", "--generate must be layers x experts x top-k such as 58x256x8, got '58x256'"),
        ("0x8x2", "--generate: layers must be at least 1, got 0"),
        ("2x8x9", "--generate: top-k must be from 1 to the number of experts (8), got 9"),
    ],
)
def test_made_up_routing_needs_a_shape(shape: str, message: str) -> None:
    assert_refused(moeless_simulate("--generate", shape, *SMALL), message)


def test_traces_of_the_other_kind_are_refused(trace: Path, tmp_path: Path) -> None:
    arrivals = tmp_path / "arrivals.trace"
    made_up_arrivals(rate_per_s=1, num_requests=2, prompt_tokens=9, output_tokens=3).save(arrivals)
    assert_refused(moeless_simulate(arrivals), "TRACE must hold routing", "holds arrivals")
    assert_refused(moeless_simulate(trace, *SIZES, "--arrivals", trace), "--arrivals must hold arrivals")
    assert_refused(moeless_simulate(), "one of TRACE and --generate must be given, got neither")


def test_an_error_is_one_line_and_code_2(trace: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moeless.cli", "simulate", str(trace), "--rate", "0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
    assert done.stderr.startswith("moeless: --rate must be above 0, got 0")


def test_simulating_needs_neither_torch_nor_ray(trace: Path) -> None:
    program = f"""
import sys
from typer.testing import CliRunner
from moeless.cli.app import app
done = CliRunner().invoke(app, {["simulate", str(trace), *map(str, SMALL), "--systems", "static,moeless"]!r})
assert done.exit_code == 0, done.output
print(*sorted({{"torch", "ray", "transformers", "matplotlib"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_the_page_on_the_simulator_names_every_option() -> None:
    page = (ROOT / "docs" / "simulator.md").read_text()
    shown = CliRunner().invoke(app, ["simulate", "--help"], terminal_width=200, env={"COLUMNS": "200"}).output
    options = set(re.findall(r"--[a-z][a-z-]+", shown)) - {"--help", "--no-in-order"}
    assert len(options) > 30
    assert {option for option in options if f"`{option}" not in page} == set()


@pytest.mark.parametrize("command", ["simulate", "plan"])
@pytest.mark.parametrize(
    ("old", "new"),
    [("--policies", "--systems"), ("--load-gb-s", "--fetch-gb-s"), ("--eplb-redundant", "--eplb-spare-replicas")],
)
@pytest.mark.parametrize("form", ["{}=1", "{}"])
def test_an_option_by_its_old_name_is_refused_with_the_new_one(command: str, old: str, new: str, form: str) -> None:
    result = CliRunner().invoke(app, [command, form.format(old), "1"])
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == f"{old} must not be given: the option is now {new}"
