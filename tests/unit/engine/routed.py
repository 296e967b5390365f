"""Models served by a real dispatcher, their routing by transformers, and engines that somebody watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moeless.core.routing_table import LOCAL_WORKER, spread_evenly
from moeless.dispatch.dispatcher import Dispatcher
from moeless.engine.transformers.experts import attach_dispatcher, register_experts
from moeless.engine.transformers.threaded_engine import ThreadedEngine
from moeless.functions.feed_forward import FeedForward
from moeless.functions.pool import InstancePool
from moeless.packages.backbone import experts_modules, load_backbone
from moeless.packages.pack import pack_checkpoint
from moeless.packages.packed_model import PackedModel
from moeless_predictors.traces import TraceMetadata
from tests.families import make_checkpoint
from tests.unit.engine.support import Recorder, running

PAGED, STATIC = "mixtral", "deepseek_v3"
"""Families that the paged cache holds, and that it does not."""

Routing = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Experts, weights and input of one row in one layer."""


@dataclass(frozen=True)
class Family:
    packed: PackedModel
    reference: PreTrainedModel
    backbone: PreTrainedModel
    dispatcher: Dispatcher
    metadata: TraceMetadata


LoadFamily = Callable[[str], Family]


def family_loader(folder: Path) -> LoadFamily:
    """Makes a family's model under `folder` when it is first asked for."""
    register_experts()

    @cache
    def load(name: str) -> Family:
        checkpoint = make_checkpoint(name, folder / name / "checkpoint")
        pack_checkpoint(checkpoint, folder / name / "packed")
        packed = PackedModel.open(folder / name / "packed")
        backbone = load_backbone(packed, dtype=torch.float32)
        table = spread_evenly(
            num_layers=packed.manifest.num_moe_layers, num_experts=packed.manifest.num_experts, workers=(LOCAL_WORKER,)
        )
        dispatcher = Dispatcher(FeedForward(InstancePool(packed, dtype=torch.float32)), table)
        attach_dispatcher(backbone, dispatcher)
        reference = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager")
        found = packed.manifest
        metadata = TraceMetadata(
            model=name,
            num_experts=found.num_experts,
            top_k=found.top_k,
            num_layers=found.num_moe_layers,
            hidden_size=found.layers[0].layout.hidden_size,
        )
        return Family(packed, reference, backbone, dispatcher, metadata)

    return load


@contextmanager
def dispatched(family: Family, recorder: Recorder, **settings: Any) -> Iterator[ThreadedEngine]:
    """An engine whose observers the family's dispatcher tells."""
    with running(family.backbone, recorder, **settings) as engine:
        family.dispatcher.set_observer(engine.observers)
        try:
            yield engine
        finally:
            family.dispatcher.set_observer(None)


@torch.inference_mode()
def reference_routing(model: PreTrainedModel, token_ids: list[int]) -> list[list[Routing]]:
    """For each position, each layer's routing in one forward pass without a cache."""
    layers: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def keep(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        hidden, experts, weights = (*args, *kwargs.values())
        layers.append((experts.numpy().copy(), weights.numpy().copy(), hidden.numpy().copy()))

    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in experts_modules(model)]
    model(torch.tensor([token_ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return [
        [(experts[position], weights[position], hidden[position]) for experts, weights, hidden in layers]
        for position in range(len(token_ids))
    ]
