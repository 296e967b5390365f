"""The engine: batching, sampling, detokenising and streaming around a model whose experts are elsewhere.

`protocol.py` defines what an engine offers, `transformers/` is the one there is, `assemble.py` puts it together with
its experts. Importing this package loads neither torch nor transformers.
"""

from moeless.engine.config import EngineConfig
from moeless.engine.protocol import Engine, EngineCounters, OnStep

__all__ = ["Engine", "EngineConfig", "EngineCounters", "OnStep"]
