"""The endpoints that tell about the server: models, experts, health, version, metrics. Registered by create_app."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from moeless import __version__
from moeless.core.errors import ModelNotFoundError
from moeless.core.generation import FunctionStatus, ModelInfo, WorkerStatus
from moeless.gateway.api_document import describes
from moeless.gateway.service import GatewayService


def info_router(service: GatewayService) -> APIRouter:
    """Everything but the generating endpoints."""
    router = APIRouter()

    @router.get("/health", openapi_extra=describes(_json_of("Status")))
    async def health() -> Response:
        """200 as long as the gateway's process answers."""
        return _json({"status": "ok"})

    @router.get("/ready", openapi_extra=describes(_json_of("Status"), more={503: _json_of("Status")}))
    async def ready() -> Response:
        """200 if a request sent now could be answered, else 503."""
        if await service.is_ready():
            return _json({"status": "ready"})
        return _json({"status": "not ready"}, status=503)

    @router.get("/version", openapi_extra=describes(_json_of("Version")))
    async def version() -> Response:
        return _json({"version": __version__})

    @router.get("/metrics", openapi_extra=describes({CONTENT_TYPE_PLAIN_0_0_4: "Text"}, 500))
    async def metrics() -> Response:
        return Response(await service.expose_metrics(), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})

    @router.get("/v1/models", openapi_extra=describes(_json_of("Models"), 503))
    async def list_models() -> Response:
        return _json({"object": "list", "data": [_model(service.model())]})

    @router.get("/v1/models/{model_id:path}", openapi_extra=describes(_json_of("Model"), 404, 503))
    async def retrieve_model(model_id: str) -> Response:
        info = service.model()
        if model_id != info.model_id:
            raise ModelNotFoundError(
                f"The model {model_id[:200]!r} does not exist here; this server has {info.model_id!r}.",
                param="model",
                code="model_not_found",
            )
        return _json(_model(info))

    @router.get("/v1/experts", openapi_extra=describes(_json_of("Experts"), 500, 503))
    async def list_experts() -> Response:
        """Each expert function as it stands now."""
        client = service.client()
        functions = await client.functions()
        stats = await client.stats()
        return _json(
            {
                "object": "list",
                "model": service.model().model_id,
                "data": functions,
                "totals": _totals(functions, stats.workers),
                "workers": stats.workers,
            }
        )

    @router.get("/v1/predictors", openapi_extra=describes(_json_of("Predictors"), 500, 503))
    async def list_predictors() -> Response:
        """List each layer's predictor and its accuracy."""
        stats = await service.client().stats()
        return _json({"object": "list", "model": service.model().model_id, "data": stats.predictions})

    return router


def _json_of(schema: str) -> dict[str, str]:
    return {"application/json": schema}


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status_code=status, media_type="application/json")


def _model(info: ModelInfo) -> dict[str, Any]:
    return {
        "id": info.model_id,
        "object": "model",
        "created": info.created_unix_s,
        "owned_by": "moeless",
        # vLLM's name; benchmark clients read it.
        "max_model_len": info.max_context_tokens,
    }


def _totals(functions: list[FunctionStatus], workers: list[WorkerStatus]) -> dict[str, Any]:
    return {
        "functions": len(functions),
        "by_state": dict(Counter(function.state for function in functions)),
        "replicas": sum(function.replicas for function in functions),
        "bytes": sum(function.bytes for function in functions),
        "resident_bytes": sum(worker.resident_bytes for worker in workers),
        "tokens_served": sum(function.tokens_served for function in functions),
    }
