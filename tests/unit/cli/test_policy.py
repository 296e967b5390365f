"""`moeless policy` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from moeless.cli.app import policy_app
from moeless.core.errors import ConfigError
from moeless.core.policy import policy_schema


def moeless_policy(*arguments: object) -> Result:
    return CliRunner().invoke(policy_app, [str(argument) for argument in arguments])


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text("defaults: {scaleToZero: false, memoryBudget: 100M}\nrules: [{layers: '0-3', minReplicas: 2}]\n")
    return path


def test_a_valid_policy_is_said_to_be_one(policy: Path) -> None:
    result = moeless_policy("check", policy)
    assert result.exit_code == 0
    assert result.output == f"{policy}: a valid policy, 1 rule\n"


def test_a_wrong_policy_is_refused_with_file_and_path(policy: Path) -> None:
    policy.write_text("rules: [{minReplicas: 0}]")
    error = moeless_policy("check", policy).exception
    assert isinstance(error, ConfigError)
    assert str(error).startswith(f"{policy}: rules[0].minReplicas must be greater than or equal to 1")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    error = moeless_policy("check", tmp_path / "none.yaml").exception
    assert isinstance(error, ConfigError)
    assert "none.yaml" in str(error)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--num-layers", 2, "--num-experts", 8), "rules[0].layers must be below 2"),
        (
            ("--num-layers", 4, "--num-experts", 8, "--expert-bytes", 2_000_000),
            "memoryBudget must have room",
        ),
        (("--num-layers", 4), "--num-layers and --num-experts must be given together"),
    ],
)
def test_a_policy_that_does_not_fit_the_model_is_refused(policy: Path, options: tuple[object, ...], words: str) -> None:
    error = moeless_policy("check", policy, *options).exception
    assert isinstance(error, ConfigError)
    assert words in str(error)


@pytest.mark.parametrize(
    ("text", "where"), [("defaults: {L}", "defaults"), ("rules: [{models: ['*'], L}]", "rules[0]")]
)
def test_whoever_sets_overflow_reads_that_nothing_applies_it(policy: Path, text: str, where: str) -> None:
    policy.write_text(text.replace("L", "lossy: {capacityFactor: 1.25, overflow: reroute}"))
    result = moeless_policy("check", policy)
    assert result.exit_code == 0
    assert f"note: {where}.lossy (overflow: reroute) has no effect yet" in result.stderr


def test_a_policy_without_overflow_has_no_note(policy: Path) -> None:
    assert moeless_policy("check", policy).stderr == ""


def test_the_schema_is_printed_as_json() -> None:
    assert json.loads(moeless_policy("schema").output) == policy_schema()


def test_a_setting_by_its_old_name_is_refused_with_the_new_one(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text("defaults: {placer: {name: minimalMoves, goodEnough: 1.1}}\n")
    result = moeless_policy("check", file)
    assert str(result.exception) == (
        f"{file}: defaults.placer.goodEnough must not be given: the field is now maxImbalance"
    )
