"""Where a process stands: Ray's settings, which must be set before ray is imported, and the node's address."""

from __future__ import annotations

import os
import secrets
import socket


def prepare_environment() -> None:
    """Token authentication for a Ray that is started here, no usage reports. What the user has set stays.

    ray.init would turn token authentication on by itself but not tell its own processes the token.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
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


def bind_to(cores: frozenset[int] | None) -> None:
    """Bind this process, threads it has already started included, to `cores`; None leaves it as it is."""
    if cores is not None:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), cores)
