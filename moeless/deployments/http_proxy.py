"""Settings of Serve's HTTP proxy that Serve has no options for.

Serve calls `configure_http_proxy` in the proxy's process; runtime.prepare_environment names it to Serve.
"""

from __future__ import annotations

import uvicorn.config
from starlette.middleware import Middleware


def configure_http_proxy() -> list[Middleware]:
    """Serve no WebSockets, and return the middlewares that the proxy shall run: none.

    With a WebSocket library installed, uvicorn hands every request with `Upgrade: websocket` to it. That library
    reads no request with a body and never answers one, so the client waits for ever. Without it, uvicorn ignores the
    header, as HTTP allows.
    """
    uvicorn.config.WS_PROTOCOLS["auto"] = None
    return []
