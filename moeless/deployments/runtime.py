"""Environment of a run's processes: Ray's settings, the node's address, cores, and the class a replica defers to."""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import socket
from typing import Any

from moeless.deployments.run_log import set_up_logging

logger = logging.getLogger(__name__)

STARTING_RAY = "starting Ray"
STOPPING = "stopping"
"""The first and the last phase of a run (deployments/application.py)."""


_LOOPBACK = "127.0.0.1"


def prepare_environment(ray_address: str | None = None) -> None:
    """Set Ray up: no usage reports, authentication, Serve's HTTP proxy, and for a Ray started here loopback alone.

    What the user has set of the first three stays. ray.init would turn token authentication on by itself but not pass
    the token to its own processes.

    Args:
        ray_address: of a cluster to join, whose nodes have addresses of their own.
    """
    if ray_address is None:
        # Despite its name the only switch with which Ray takes 127.0.0.1 for its node's address, on Linux too; all its
        # processes then listen there alone. A loopback address given to ray.init is replaced by the network's.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "moeless.deployments.http_proxy:configure_http_proxy"
    )
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def free_port() -> int:
    """A port that nobody listens on now, below the system's ephemeral ports: Ray takes dozens of those as it starts."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def node_address() -> str:
    """Address of the node that this Ray process runs on."""
    import ray.util

    return str(ray.util.get_node_ip_address())


def keep_serve_to_loopback() -> None:
    """In a replica whose node has a loopback address: have Serve's server for other replicas listen there alone.

    Serve binds it to every interface, whatever the node's address, and has no setting for it.
    """
    if node_address() != _LOOPBACK:
        return
    replica: Any = importlib.import_module("ray.serve._private.replica")
    if not hasattr(replica, "add_port_to_grpc_server"):
        logger.warning("this version of Ray Serve may listen beyond loopback")
        return
    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", _LOOPBACK))


def bind_to(cores: frozenset[int] | None) -> None:
    """Bind this process, threads it has already started included, to `cores`; None leaves it as it is."""
    if cores is not None:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), cores)


class DeferredReplica:
    """A deployment whose class, `import_path` ("module:Class"), is imported in the replica only.

    Ray ships a deployment's class by reference, so the process that deploys it must import its module. With this one
    in between, the process that deploys loads neither transformers nor the engine: seconds on a small machine.
    """

    def __init__(self, import_path: str, *arguments: Any) -> None:
        set_up_logging()
        keep_serve_to_loopback()
        module_name, _, class_name = import_path.partition(":")
        try:
            self._replica: Any = getattr(importlib.import_module(module_name), class_name)(*arguments)
        except Exception as error:
            start_failures: Any = importlib.import_module("moeless.deployments.start_failures")
            start_failures.report_failure(error)
            raise

    def __call__(self, *arguments: Any) -> Any:
        return self._replica(*arguments)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._replica, name)

    def check_health(self) -> None:
        """Called by Serve."""
        if hasattr(self._replica, "check_health"):
            self._replica.check_health()

    def __del__(self) -> None:
        """Called by Serve when the replica stops, and once more by Python."""
        replica = self.__dict__.pop("_replica", None)
        if hasattr(replica, "close"):
            replica.close()
