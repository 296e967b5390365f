"""`moeless predict` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from moeless.cli.app import predict_app
from moeless.core.errors import ConfigError
from moeless_predictors.predictor_set import PredictorSet
from moeless_predictors.traces.synthetic import synthetic_trace


def moeless_predict(*arguments: object) -> Result:
    return CliRunner().invoke(predict_app, [str(argument) for argument in arguments])


def assert_refused(result: Result, *words: str) -> None:
    assert isinstance(result.exception, ConfigError), result.output
    for word in words:
        assert word in str(result.exception)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "routing.trace"
    synthetic_trace(num_sequences=30, tokens_per_sequence=20, num_layers=3, num_experts=8, top_k=2, seed=0).save(path)
    return path


def test_kinds_are_measured_side_by_side(trace: Path, tmp_path: Path) -> None:
    result = moeless_predict(
        *("eval", trace, "--kinds", "popularity,transition", "--distances", "1-2", "--batches", 10),
        *("--json", tmp_path / "figures.json", "--plot", tmp_path / "plot.png"),
    )
    assert result.exit_code == 0, result.output
    assert "480 tokens" not in result.output
    assert "120 tokens in 6 sequences tested" in result.output
    assert "transition" in result.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {(m["layer"], m["distance"]) for m in figures["measures"]} == {(0, 1), (1, 1), (0, 2)}
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_fitted_can_be_looked_at_and_measured(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "predictors"
    fitted = moeless_predict("fit", trace, out, "--kinds", "transition", "--distances", 1)
    assert fitted.exit_code == 0, fitted.output
    assert "chosen: transition 2 times" in fitted.output
    assert PredictorSet.load(out).distances == (1,)
    assert "0 to 1" in moeless_predict("info", out).output
    measured = moeless_predict("eval", trace, "--predictors", out, "--batches", 5, "--by-layer")
    assert measured.exit_code == 0, measured.output
    assert "600 tokens in 30 sequences tested" in measured.output
    assert_refused(moeless_predict("fit", trace, out), "OUT must not exist unless --overwrite is given")


def test_bad_options_are_named(trace: Path, tmp_path: Path) -> None:
    assert_refused(moeless_predict("eval", trace, "--distances", "one"), "--distances", "'one'")
    assert_refused(moeless_predict("eval", trace, "--kinds", "magic"), "kinds must be among", "magic")
    assert_refused(moeless_predict("eval", trace, "--layers", "7"), "layers must be from 0 to 2, got (7,)")
    assert_refused(moeless_predict("eval", trace, "--test-share", 2), "test_share must be between 0 and 1, got 2.0")
    assert_refused(moeless_predict("eval", tmp_path / "none"), "TRACE must be a file that exists, got", "none")
    assert_refused(moeless_predict("info", trace), "format must be 'moeless-predictor-set'")
