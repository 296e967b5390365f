"""State that the routes share: the engine once it is there, its model, admission and metrics.

Built by app.create_app; `run` lives as long as the app.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from moeless.core.generation import EngineClient, ModelInfo
from moeless.gateway.config import GatewayConfig
from moeless.gateway.errors import EngineStartingError
from moeless.gateway.memory import return_large_blocks
from moeless.gateway.metrics import GatewayMetrics, ModelMetrics
from moeless.gateway.streams import WritePacer
from moeless.gateway.text_pool import TextPool

logger = logging.getLogger(__name__)

EngineSource = EngineClient | Callable[[], Awaitable[EngineClient]]
"""An engine, or how to reach one; the latter is called until it has succeeded once."""


class GatewayService:
    """Answers health checks before the engine is up; `model` and `client` raise until then."""

    def __init__(self, source: EngineSource, config: GatewayConfig) -> None:
        self.config = config
        self.metrics = GatewayMetrics()
        self.pacer = WritePacer(config.max_writes_per_s)
        self._source = source
        self.texts = TextPool(config)
        self._client: EngineClient | None = None
        self._model: ModelInfo | None = None
        self._model_metrics: ModelMetrics | None = None

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Look for the engine in the background while the app answers."""
        return_large_blocks()
        connecting = asyncio.create_task(self._connect())
        try:
            yield
        finally:
            connecting.cancel()
            with suppress(asyncio.CancelledError):
                await connecting
            if self._client is not None:
                await self._client.close()
            await self.texts.close()

    async def _connect(self) -> None:
        last_error = ""
        client: EngineClient | None = None if callable(self._source) else self._source
        while self._model is None:
            try:
                await self.texts.start()
                if client is None:
                    assert callable(self._source)
                    client = await self._source()
                info = await client.model_info()
                await self.texts.load(info)
            except Exception as error:
                # The engine may be starting for minutes: one line for each new reason, not for each try.
                if repr(error) != last_error:
                    last_error = repr(error)
                    logger.warning("engine not reached reason=%s retry_s=%s", error, self.config.engine_retry_s)
                await asyncio.sleep(self.config.engine_retry_s)
                continue
            self._client = client
            self._model_metrics = ModelMetrics(self.metrics, info.model_id)
            self._model = info
            logger.info("engine reached model=%s context=%d", info.model_id, info.max_context_tokens)

    def known_model(self) -> ModelInfo | None:
        """The model, or None while the engine has not been reached."""
        return self._model

    def model(self) -> ModelInfo:
        """Raises: EngineStartingError (503) while the engine has not been reached."""
        if self._model is None:
            raise self._starting()
        return self._model

    def client(self) -> EngineClient:
        """Raises: EngineStartingError (503) while the engine has not been reached."""
        if self._client is None:
            raise self._starting()
        return self._client

    def model_metrics(self) -> ModelMetrics:
        """Raises: EngineStartingError (503) while the engine has not been reached."""
        if self._model_metrics is None:
            raise self._starting()
        return self._model_metrics

    async def is_ready(self) -> bool:
        """Whether a request sent now could be answered."""
        if self._model is None or self._client is None:
            return False
        try:
            return await self._client.is_ready()
        except Exception:
            logger.warning("engine did not say whether it is ready", exc_info=True)
            return False

    async def expose_metrics(self) -> bytes:
        """The Prometheus text, with the engine's figures if it answers."""
        if self._model is not None and self._client is not None:
            stats = None
            try:
                stats = await self._client.stats()
            except Exception:
                logger.warning("engine gave no stats", exc_info=True)
            self.metrics.show_engine(self._model.model_id, stats)
        return self.metrics.expose()

    def _starting(self) -> EngineStartingError:
        return EngineStartingError(
            "The engine is still starting; try again soon.", retry_after_s=self.config.retry_after_s
        )
