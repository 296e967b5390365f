"""The gateway's application: OpenAI's API over an engine client. deployments/gateway.py and the tests call create_app.

A request passes RequestIdMiddleware, ErrorMiddleware, UrlLimitMiddleware, CORS (if configured), the key check (if there
are keys) and the body limit, then its route: completions.py (admission.py, streams.py, responses.py), info.py or
recording.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from moeless import __version__
from moeless.gateway.api_document import install_document
from moeless.gateway.body_limits import write_limits
from moeless.gateway.completions import completions_router
from moeless.gateway.config import GatewayConfig
from moeless.gateway.errors import install_handlers
from moeless.gateway.info import info_router
from moeless.gateway.middleware import (
    OPEN_PATHS,
    ApiKeyMiddleware,
    BodyLimitMiddleware,
    ErrorMiddleware,
    UrlLimitMiddleware,
)
from moeless.gateway.recording import RecordingRequest, recording_router
from moeless.gateway.request_id import RequestIdMiddleware
from moeless.gateway.schemas import ChatCompletionRequest, CompletionRequest
from moeless.gateway.service import EngineSource, GatewayService


def create_app(engine: EngineSource, config: GatewayConfig) -> FastAPI:
    """The ASGI application. It answers /health at once and everything else once `engine` does.

    Args:
        engine: a client, or an async function that returns one; it is called until it has succeeded once.
    """
    service = GatewayService(engine, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.run():
            yield

    app = FastAPI(title="moeless", version=__version__, lifespan=lifespan, redirect_slashes=False)
    routers = [completions_router(service), info_router(service), recording_router(service)]
    install_handlers(app, routers)
    for router in routers:
        app.include_router(router)
    install_document(
        app,
        [ChatCompletionRequest, CompletionRequest, RecordingRequest],
        limits=lambda schemas: write_limits(schemas, config, service.known_model()),
        open_paths=OPEN_PATHS if config.api_keys else None,
    )
    # The last one added is the outermost.
    app.add_middleware(BodyLimitMiddleware, max_bytes=config.max_body_bytes)
    if config.api_keys:
        app.add_middleware(ApiKeyMiddleware, api_keys=config.api_keys)
    if config.cors_allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_allow_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type"],
        )
    app.add_middleware(UrlLimitMiddleware, max_bytes=config.max_url_bytes)
    app.add_middleware(ErrorMiddleware)
    app.add_middleware(RequestIdMiddleware, sent_by_proxy=config.request_id_sent_by_proxy)
    return app
