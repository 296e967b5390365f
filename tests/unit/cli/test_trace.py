"""`moeless trace` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from moeless.cli.app import trace_app
from moeless.core.errors import ConfigError
from moeless_predictors.traces import PREFILL, RoutingTrace, synthetic_trace


def moeless_trace(*arguments: object) -> Result:
    return CliRunner().invoke(trace_app, [str(argument) for argument in arguments])


def assert_refused(result: Result, *words: str) -> None:
    assert isinstance(result.exception, ConfigError)
    for word in words:
        assert word in str(result.exception)


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    trace = synthetic_trace(num_sequences=3, tokens_per_sequence=7, num_layers=3, num_experts=8)
    path = tmp_path / "routing.npz"
    np.savez(path, ids=trace.experts_TLk, weights=trace.weights_TLk, seq_len=np.full(3, 7))
    return path


@pytest.fixture
def arrivals(tmp_path: Path) -> Path:
    path = tmp_path / "arrivals.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,1\n1,20,2\n4,30,3\n")
    return path


def test_a_routing_file_becomes_a_trace(npz: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.trace"
    result = moeless_trace(
        "import", npz, out, "--model", "mine", "--phase", "prefill", "--num-experts", 16, "--origin", "lab"
    )
    assert result.exit_code == 0, result.output
    assert "mine, 3 MoE layers x 16 experts, top-2; 21 tokens in 3 sequences" in result.output
    trace = RoutingTrace.open(out)
    assert (trace.metadata.model, trace.metadata.source, trace.num_experts) == ("mine", "lab", 16)
    assert set(trace.phase_T) == {PREFILL}


def test_what_was_assumed_is_said(npz: Path, tmp_path: Path) -> None:
    assert (
        "note: the file does not say how many experts there are: 8"
        in moeless_trace("import", npz, tmp_path / "o").output
    )


def test_a_file_is_only_written_over_when_asked(npz: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.trace"
    out.write_text("precious")
    assert_refused(moeless_trace("import", npz, out), "--overwrite", str(out))
    assert out.read_text() == "precious"
    assert moeless_trace("import", npz, out, "--overwrite").exit_code == 0
    assert RoutingTrace.open(out).num_tokens == 21


def test_info_shows_every_layer_and_writes_figures_and_heat_map(npz: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, figures, picture = tmp_path / "t", tmp_path / "f.json", tmp_path / "m.png"
    moeless_trace("import", npz, out)
    result = moeless_trace("info", out, "--json", figures, "--heatmap", picture)
    assert result.exit_code == 0, result.output
    assert "0 prefill and 21 decode tokens; sequences of 7 to 7, median 7; with no optional columns" in result.output
    for word in ("max/mean", "Gini", "overlap", "mean"):
        assert word in result.output
    written = json.loads(figures.read_text())
    assert (written["kind"], written["model"], written["num_tokens"], len(written["layers"])) == (
        "routing",
        "routing",
        21,
        3,
    )
    assert {"max_to_mean", "cv", "gini", "adjacent_overlap", "next_layer_dependency"} <= written["layers"][0].keys()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_info_of_arrivals_shows_rate_burstiness_and_lengths(arrivals: Path, tmp_path: Path) -> None:
    out, figures = tmp_path / "t", tmp_path / "f.json"
    assert "3 requests in 4.0 s" in moeless_trace("import", arrivals, out).output
    result = moeless_trace("info", out, "--json", figures)
    assert result.exit_code == 0, result.output
    for word in ("requests a second", "0.500", "CV of gaps", "p50 20"):
        assert word in result.output
    assert json.loads(figures.read_text())["requests_per_s"] == 0.5
    assert_refused(moeless_trace("info", out, "--heatmap", tmp_path / "m.png"), "--heatmap needs a routing trace")


def test_a_damaged_trace_is_refused_with_the_place(npz: Path, tmp_path: Path) -> None:
    out = tmp_path / "t"
    moeless_trace("import", npz, out)
    raw = out.read_bytes()
    out.write_bytes(raw[:-5])
    assert_refused(
        moeless_trace("info", out), str(out), f"ends at byte {len(raw) - 5}", f"should end at byte {len(raw)}"
    )
    out.write_bytes(raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:])
    assert_refused(moeless_trace("info", out), "damaged column", "rows")


def test_files_that_are_not_there_or_no_trace_are_refused(npz: Path, tmp_path: Path) -> None:
    assert_refused(moeless_trace("info", tmp_path / "nothing"), "TRACE must be a file that exists", "nothing")
    assert_refused(
        moeless_trace("import", tmp_path / "nothing", tmp_path / "o"), "SOURCE must be a file that exists", "nothing"
    )
    assert_refused(moeless_trace("info", npz), "not a trace")
    assert_refused(
        moeless_trace("import", npz, tmp_path / "nowhere" / "out"), "OUT must be in a folder that exists", "nowhere/out"
    )
