"""Choosing the engine for a model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from moeless.engine.base import Engine, OnStep
from moeless.engine.config import EngineConfig
from moeless.engine.continuous import ContinuousEngine


def build_engine(
    model: PreTrainedModel, tokenizer: Any, config: EngineConfig, on_step: OnStep | None = None
) -> Engine:
    return ContinuousEngine(model, tokenizer, config, on_step)
