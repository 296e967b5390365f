"""The engine: the transformers model with its experts elsewhere, batching, sampling, detokenising, streaming.

Start reading at `build.build_engine`, which picks `ContinuousEngine` (paged KV cache) or `StaticBatchEngine`.
Importing this package imports torch.
"""

from moeless.engine.base import Engine, EngineCounters, OnStep
from moeless.engine.build import build_engine
from moeless.engine.config import EngineConfig
from moeless.engine.experts import attach_dispatcher, register_experts
from moeless.engine.local_client import LocalEngineClient

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineCounters",
    "LocalEngineClient",
    "OnStep",
    "attach_dispatcher",
    "build_engine",
    "register_experts",
]
