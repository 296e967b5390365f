"""OpenAI's API over HTTP, for an engine that lives elsewhere. Imports neither torch nor ray nor transformers."""

from moeless.gateway.app import create_app
from moeless.gateway.config import GatewayConfig

__all__ = ["GatewayConfig", "create_app"]
