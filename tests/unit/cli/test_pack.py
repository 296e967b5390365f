"""`moeless pack` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from moeless.cli.app import app
from moeless.core.errors import MoelessError
from tests.families import make_checkpoint


def pack(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["pack", *map(str, arguments)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("checkpoint") / "mixtral")


def test_every_function_is_written_and_counted(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    result = pack(checkpoint, out)
    assert result.exit_code == 0, result.output
    manifest = json.loads((out / "manifest.json").read_text())
    assert f"{len(manifest['functions'])} functions" in result.stdout
    assert result.stderr == ""
    assert len(list((out / "functions").iterdir())) == len(manifest["functions"]) > 0


def test_a_checkpoint_or_out_that_cannot_be_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for arguments in ((tmp_path / "none", tmp_path / "out"), (file, tmp_path / "out"), (checkpoint, file)):
        error = pack(*arguments).exception
        assert isinstance(error, MoelessError), arguments
        assert str(arguments[0] if arguments[1] != file else file) in str(error)
