"""A model served in this process alone, without Ray or workers: what `moeless trace record --prompts` runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moeless.core.routing_table import LOCAL_WORKER, spread_evenly
from moeless.dispatch.dispatcher import Dispatcher
from moeless.engine.base import Engine
from moeless.engine.build import build_engine
from moeless.engine.config import EngineConfig
from moeless.engine.experts import attach_dispatcher, register_experts
from moeless.functions.feed_forward import FeedForward
from moeless.functions.pool import InstancePool
from moeless.packages.backbone import load_backbone
from moeless.packages.files import dtype_of_name
from moeless.packages.packed_model import PackedModel


@contextmanager
def engine_in_process(packed: PackedModel, tokenizer: Any, config: EngineConfig) -> Iterator[Engine]:
    """An engine with every expert in this process, on the CPU in the checkpoint's own data type.

    It is not started, so that a receiver of its deltas can be set; its observers are told once it is. It is stopped
    when the block is left.
    """
    register_experts()
    manifest = packed.manifest
    dtype = dtype_of_name(manifest.dtype)
    model = load_backbone(packed, dtype=dtype)
    pool = InstancePool(packed, dtype=dtype)
    pool.start_many(packed.functions)
    table = spread_evenly(num_layers=manifest.num_moe_layers, num_experts=manifest.num_experts, workers=(LOCAL_WORKER,))
    dispatcher = Dispatcher(FeedForward(pool), table)
    attach_dispatcher(model, dispatcher)
    engine = build_engine(model, tokenizer, config)
    dispatcher.set_observer(engine.observers)
    try:
        yield engine
    finally:
        engine.stop()
