"""OpenAI's API over HTTP, for an engine that lives elsewhere. Imports neither torch nor ray nor transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeless.gateway.app import create_app
    from moeless.gateway.config import GatewayConfig

__all__ = ["GatewayConfig", "create_app"]


def __getattr__(name: str) -> Any:
    """Import at first use: text processes (text_process.py) need no application."""
    if name == "create_app":
        from moeless.gateway.app import create_app

        return create_app
    if name == "GatewayConfig":
        from moeless.gateway.config import GatewayConfig

        return GatewayConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
