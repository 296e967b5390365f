"""Puts an engine together: the backbone, the experts of this process, the dispatcher, and the engine around them.

Called by deployments/engine.py for a served model, and by offline_recording.py for one without Ray or workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from moeless.core.routing_table import LOCAL_WORKER, RoutingTable, spread_evenly
from moeless.dispatch.config import DispatchConfig
from moeless.dispatch.dispatcher import Dispatcher
from moeless.engine.config import EngineConfig
from moeless.engine.protocol import Engine
from moeless.engine.transformers.build import build_engine
from moeless.engine.transformers.experts import attach_dispatcher, register_experts
from moeless.functions.feed_forward import FeedForward
from moeless.functions.pool import InstancePool
from moeless.packages.backbone import load_backbone
from moeless.packages.manifest import Manifest
from moeless.packages.packed_model import PackedModel
from moeless.packages.tensor_files import dtype_of_name


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembly:
    """Settings of the parts of one engine."""

    engine: EngineConfig
    table: RoutingTable | None = None
    """Routing table with each function's instances. None: every function has one in this process."""
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    dtype: str | None = None
    """Name of a torch data type. None: the checkpoint's own."""
    device: str = "cpu"
    pool_capacity_bytes: int | None = None
    """Maximum bytes of instances in this process. None: no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AssembledEngine:
    """An engine that is not started, and the dispatcher that computes its experts."""

    engine: Engine
    dispatcher: Dispatcher
    dtype: torch.dtype
    vocab_size: int


def assemble_engine(packed: PackedModel, tokenizer: Any, assembly: Assembly) -> AssembledEngine:
    """Build every part, connect them, and start the functions that the table places in this process.

    Channels to workers, further observers and the receiver of deltas are the caller's to set before it starts the
    engine.
    """
    register_experts()
    dtype = dtype_of_name(assembly.dtype or packed.manifest.dtype)
    model = load_backbone(packed, dtype=dtype, device=assembly.device)
    pool = InstancePool(packed, device=assembly.device, dtype=dtype, capacity_bytes=assembly.pool_capacity_bytes)
    table = local_table(packed.manifest) if assembly.table is None else assembly.table
    dispatcher = Dispatcher(FeedForward(pool), table, assembly.dispatch)
    attach_dispatcher(model, dispatcher)
    pool.start_many(
        function
        for function in packed.functions
        if any(instance.worker == LOCAL_WORKER for instance in table.instances.get(function, ()))
    )
    engine = build_engine(model, tokenizer, assembly.engine)
    dispatcher.set_observer(engine.observers)
    vocab_size: int = model.config.get_text_config().vocab_size
    return AssembledEngine(engine=engine, dispatcher=dispatcher, dtype=model.dtype, vocab_size=vocab_size)


@contextmanager
def engine_in_process(packed: PackedModel, tokenizer: Any, config: EngineConfig) -> Iterator[Engine]:
    """An engine with every expert in this process, on the CPU in the checkpoint's own data type.

    It is not started, so that a receiver of its deltas can be set. It is stopped when the block is left.
    """
    assembled = assemble_engine(packed, tokenizer, Assembly(engine=config))
    try:
        yield assembled.engine
    finally:
        assembled.engine.stop()


def local_table(manifest: Manifest) -> RoutingTable:
    """One instance of every function, in the engine's own process."""
    return spread_evenly(num_layers=manifest.num_moe_layers, num_experts=manifest.num_experts, workers=(LOCAL_WORKER,))
