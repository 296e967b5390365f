"""Report why a replica cannot start, from its process to the one that deploys.

Serve tries a constructor that raised several times, some ten seconds each, and says why at the end. Where another try
cannot help (a damaged package, a bad setting), the replica leaves the reason in Ray's key-value store, where
application.running finds it within a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ray import serve
from ray.experimental import internal_kv
from ray.serve.schema import ApplicationStatus

from moeless.core.errors import CheckpointError, ConfigError, MoelessError, PackageError
from moeless.deployments.ray_session import last_error

_NAMESPACE = b"moeless"
_POLL_S = 0.2

LASTING = (PackageError, CheckpointError, ConfigError)
"""Errors that another try meets again."""


def report_failure(error: Exception) -> None:
    """Leave the reason of a replica's failed start, if it lasts. Called in the replica, which then raises `error`."""
    if isinstance(error, LASTING):
        key = _key(serve.get_replica_context().app_name)
        internal_kv._internal_kv_put(key, str(error).encode(), overwrite=False, namespace=_NAMESPACE)


def forget_failures(app_name: str) -> None:
    """Remove what an earlier application of this name left."""
    internal_kv._internal_kv_del(_key(app_name), namespace=_NAMESPACE)


def wait_until_running(app_name: str, *, wait: Callable[[float], object] = time.sleep) -> None:
    """Return once every deployment of the application runs.

    Raises: MoelessError with the reason as soon as a replica has reported one, or Serve has given up.
    """
    while True:
        reason: bytes | None = internal_kv._internal_kv_get(_key(app_name), namespace=_NAMESPACE)
        if reason is not None:
            raise PackageError(f"the application did not start: {reason.decode()}")
        application = serve.status().applications.get(app_name)
        if application is None:
            raise MoelessError("the application did not start: it was deleted meanwhile")
        if application.status == ApplicationStatus.RUNNING:
            return
        if application.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            messages = [deployment.message for deployment in application.deployments.values()]
            raise MoelessError(
                f"the application did not start: {last_error(' '.join([application.message, *messages]))}"
            )
        wait(_POLL_S)


def _key(app_name: str) -> bytes:
    return f"start-failure:{app_name}".encode()
