"""The application as Serve gets it, before anything runs."""

from __future__ import annotations

import json
import warnings
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from moeless.core.errors import ConfigError
from moeless.deployments.run_secrets import RunSecrets, read_secrets
from moeless.deployments.settings import ServeSettings
from moeless.packages.source import resolve_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # importing Ray Serve uses what pydantic has deprecated
    from ray import cloudpickle
    from ray.serve.schema import ServeDeploySchema

    from moeless.deployments.application import (
        IMPORT_PATH,
        _secrets_in_place,
        _write_secrets,
        build_application,
        serve_config,
    )

SECRETS = RunSecrets(run_secret="run-very-private", api_keys=("sk-very-private",))


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> ServeSettings:
    for name, value in SECRETS.to_environment().items():
        monkeypatch.setenv(name, value)
    return ServeSettings(packed_path=str(resolve_model("moeless-mini").path), model_id="mini", num_workers=2)


def test_no_secret_stands_in_the_rendered_config(settings: ServeSettings) -> None:
    rendered = serve_config(settings).model_dump_json()
    assert "very-private" not in rendered
    (application,) = json.loads(rendered)["applications"]
    assert ServeSettings.from_dict(application["args"]) == settings


def test_no_secret_stands_in_the_arguments_of_a_deployment(settings: ServeSettings) -> None:
    pickled = cloudpickle.dumps(build_application(settings.to_dict()))
    assert b"worker-1" in pickled
    assert b"very-private" not in pickled


def test_the_import_path_is_the_one_that_was_fixed() -> None:
    """Another one restarts every deployed application."""
    assert IMPORT_PATH == "moeless.deployments.application:build_application"
    assert f"{build_application.__module__}:{build_application.__name__}" == IMPORT_PATH


def test_the_config_of_the_docs_is_one() -> None:
    page = (Path(__file__).parents[3] / "docs" / "cluster.md").read_text(encoding="utf-8")
    document = page.partition('```yaml title="serve.yaml"\n')[2].partition("```")[0]
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(document)).applications
    assert application.import_path == IMPORT_PATH
    settings = ServeSettings.from_dict(application.args)
    assert (settings.num_workers, settings.engine.max_running) == (4, 32)


def test_settings_that_cannot_be_are_refused(settings: ServeSettings) -> None:
    with pytest.raises(ConfigError, match="settings.replicas is unknown"):
        build_application({**settings.to_dict(), "replicas": 3})
    with pytest.raises(ConfigError, match="isolation function takes at most 64 functions"):
        build_application({**settings.to_dict(), "num_workers": 0, "isolation": "function"})


def test_the_secrets_of_a_run_on_a_cluster_are_for_their_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOELESS_CACHE", str(tmp_path))
    path = _write_secrets(SECRETS, "a/b")
    assert path.parent == tmp_path / "runs"
    assert path.name.startswith("a%2Fb-")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o077 == 0


def test_the_secrets_of_a_run_on_a_cluster_are_deleted_even_if_stopping_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOELESS_CACHE", str(tmp_path))
    settings = ServeSettings(packed_path="p", model_id="m")
    run = ExitStack()
    named = run.enter_context(_secrets_in_place(settings, SECRETS, "head:6379"))
    assert named.secrets_file is not None
    assert read_secrets(named.secrets_file, {}) == SECRETS
    run.callback(Path.rmdir, tmp_path)  # it is not empty
    with pytest.raises(OSError, match="not empty"):
        run.close()
    assert not list((tmp_path / "runs").iterdir())


def test_a_cache_that_cannot_be_written_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOELESS_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="MOELESS_CACHE must be a folder to write .* or set --secrets-file"):
        _write_secrets(SECRETS, "a")
