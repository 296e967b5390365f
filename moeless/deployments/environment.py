"""Ray's settings that must stand in the environment before ray is imported."""

from __future__ import annotations

import os
import secrets


def prepare_environment() -> None:
    """Token authentication for a Ray that is started here, no usage reports. What the user has set stays.

    ray.init would turn token authentication on by itself but not tell its own processes the token.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
