"""The secrets of a run: where they are read, what is refused, and that they are not shown."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from moeless.core.errors import ConfigError
from moeless.deployments.run_secrets import RunSecrets, read_secrets

SECRETS = RunSecrets(run_secret="very-private", api_keys=("sk-one", "sk-two"))


def test_what_is_written_is_read_again_and_for_its_owner_alone(tmp_path: Path) -> None:
    SECRETS.write(tmp_path / "secrets.json")
    assert (tmp_path / "secrets.json").stat().st_mode & 0o777 == 0o600
    assert read_secrets(str(tmp_path / "secrets.json"), {}) == SECRETS


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "secrets.json").touch()
    with pytest.raises(FileExistsError):
        SECRETS.write(tmp_path / "secrets.json")


def test_a_file_that_cannot_be_completed_is_deleted(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            SECRETS.write(tmp_path / "secrets.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secrets.json"
    SECRETS.write(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"secrets.json must have mode 0600 \(chmod 600\), has {mode:04o}"):
        read_secrets(str(path), {})


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"run_secret": 1}', '{"run_secret": ""}', "\xff"])
def test_a_file_without_a_run_secret_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "secrets.json"
    path.write_bytes(content.encode("latin-1"))
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="run.secret|JSON"):
        read_secrets(str(path), {})


def test_a_misspelt_field_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "secrets.json"
    path.write_text('{"run_secret": "s", "api-keys": ["sk-very-private"]}')
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"secrets.json must be JSON .*`api-keys`") as caught:
        read_secrets(str(path), {})
    assert "very-private" not in str(caught.value)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.json must be readable on every node: No such file"):
        read_secrets(str(tmp_path / "nowhere.json"), {"MOELESS_RUN_SECRET": "s"})


def test_without_a_file_the_environment_holds_them() -> None:
    assert read_secrets(None, SECRETS.to_environment()) == SECRETS
    assert read_secrets(None, {"MOELESS_RUN_SECRET": "s"}) == RunSecrets(run_secret="s")
    with pytest.raises(ConfigError, match="MOELESS_RUN_SECRET must be set on every node"):
        read_secrets(None, {})


def test_secrets_are_not_shown() -> None:
    for secret in ("very-private", "sk-one", "sk-two"):
        assert secret not in repr(SECRETS)


@pytest.mark.parametrize("key", ["", "two words", "schlüssel", "tab\t"])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ConfigError, match="api-key") as caught:
        RunSecrets(run_secret="s", api_keys=("fine", key))
    assert not key or key not in str(caught.value)
