"""The declarative form: the application deployed from a config as KubeRay does it, and deployed again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from moeless.deployments.runtime import free_port
from moeless.packages.source import resolve_model

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

_DEPLOY_TWICE = """
import json, sys, warnings
from moeless.deployments.runtime import prepare_environment
prepare_environment()
import httpx, ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from moeless.deployments.application import serve_config
from moeless.deployments.settings import ServeSettings

settings = ServeSettings.from_dict(json.loads(sys.argv[1]))
url = f"http://127.0.0.1:{settings.port}"
ray.init(address="local", include_dashboard=False, log_to_driver=False)
serve.start(http_options=HTTPOptions(host=settings.host, port=settings.port))
client = _get_global_client()

def deploy():
    config = serve_config(settings)
    client.deploy_apps(config, _blocking=True)
    details = client.get_serve_details()
    (application,) = details["applications"].values()
    pids = {
        name: [replica["pid"] for replica in deployment["replicas"]]
        for name, deployment in application["deployments"].items()
    }
    shown = {"config": config.json(), "details": json.dumps(details, default=str)}
    return {"status": application["status"], "pids": pids, **shown}

def ask(key):
    while httpx.get(f"{url}/ready", timeout=10).status_code != 200:
        pass
    body = {"model": settings.model_id, "prompt": "def", "max_tokens": 4}
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60).status_code

rounds = [deploy(), deploy()]
answers = [ask("sk-very-private"), ask("a guess")]
serve.shutdown()
ray.shutdown()
print("RESULT " + json.dumps({"rounds": rounds, "answers": answers}))
"""


@pytest.fixture(scope="module")
def deployed() -> dict[str, Any]:
    """Two deployments of the same config in a process of their own, and the answers in between."""
    settings = {
        "packed_path": str(resolve_model("moeless-mini").path),
        "model_id": "mini",
        "num_workers": 1,
        "port": free_port(),
    }
    environment = os.environ | {"MOELESS_RUN_SECRET": "run-very-private", "MOELESS_API_KEY": "sk-very-private sk-other"}
    done = subprocess.run(
        [sys.executable, "-c", _DEPLOY_TWICE, json.dumps(settings)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    return result


def test_a_config_deploys_the_application_and_the_keys_come_from_the_environment(deployed: dict[str, Any]) -> None:
    first = deployed["rounds"][0]
    assert first["status"] == "RUNNING"
    assert set(first["pids"]) == {"gateway", "engine", "worker-0"}
    assert deployed["answers"] == [200, 401]


def test_the_same_config_again_restarts_nothing(deployed: dict[str, Any]) -> None:
    first, second = deployed["rounds"]
    assert second["status"] == "RUNNING"
    assert second["pids"] == first["pids"]


def test_no_secret_stands_in_the_config_or_in_what_serve_shows_of_it(deployed: dict[str, Any]) -> None:
    for each in deployed["rounds"]:
        for shown in (each["config"], each["details"]):
            assert "mini" in shown
            assert "very-private" not in shown
            assert "sk-other" not in shown


def test_the_import_path_is_as_it_was_fixed(deployed: dict[str, Any]) -> None:
    """Another one restarts every deployed application."""
    (application,) = json.loads(deployed["rounds"][0]["config"])["applications"]
    assert application["import_path"] == "moeless.deployments.application:build_application"
