"""docs/policy.md is held to the code: examples are policies, commands print what is shown, no setting is missing."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic.alias_generators import to_camel
from typer.testing import CliRunner

from moeless.cli.app import policy_app
from moeless.core.errors import ConfigError
from moeless.core.policy import (
    AffinityPlacer,
    BenefitScaler,
    LossyOptions,
    MinimalMovesPlacer,
    MinMaxScaler,
    Rule,
    Settings,
)

PAGE = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
# Of each example, the command that is shown with what it prints.
EXAMPLES = re.findall(r"```yaml\n(.*?)```\n(?:\n```text\n(\$ .*?)```\n)?", PAGE, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(command: str) -> str:
    """By `moeless policy ...`."""
    result = CliRunner().invoke(policy_app, shlex.split(command)[2:])
    return f"moeless: {result.exception}\n" if isinstance(result.exception, ConfigError) else result.output


@pytest.mark.parametrize(("document", "shown"), EXAMPLES)
def test_an_example_is_a_policy_or_gives_the_error_that_is_shown(folder: Path, document: str, shown: str) -> None:
    (folder / "policy.yaml").write_text(document)
    command, _, output = shown.partition("\n")
    if command:
        assert printed(command.removeprefix("$ ")) == output
    else:
        assert "policy.yaml: a valid policy" in printed("moeless policy check policy.yaml").splitlines()[-1]


def test_every_example_and_command_of_the_page_is_tried() -> None:
    assert len(EXAMPLES) == PAGE.count("```yaml")
    assert sum(1 for _, shown in EXAMPLES if shown) == PAGE.count("$ moeless")


def test_no_setting_is_left_out_and_none_is_made_up() -> None:
    table = PAGE.split("## Settings")[1].split("\n\n- ")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
    assert sorted(named) == sorted(to_camel(name) for name in Settings.model_fields)


@pytest.mark.parametrize("of", [Rule, MinMaxScaler, BenefitScaler, MinimalMovesPlacer, AffinityPlacer, LossyOptions])
def test_every_selector_and_option_is_told(of: type[BaseModel]) -> None:
    assert [name for name in map(to_camel, of.model_fields) if f"`{name}`" not in PAGE] == []
