"""A process with a backbone whose experts run elsewhere: loads it, computes, and says what memory it holds.

`python -m tests.support.backbone_process`: the task as JSON on stdin, the figures as JSON on stdout.
"""

from __future__ import annotations

import json
import resource
import sys

import msgspec
import psutil
import torch

from moeless.core.routing_table import spread_evenly
from moeless.dispatch.channel import WorkerEndpoint
from moeless.dispatch.connect import connect
from moeless.dispatch.dispatcher import Dispatcher
from moeless.engine.transformers.experts import attach_dispatcher, register_experts
from moeless.functions.feed_forward import FeedForward
from moeless.functions.pool import InstancePool
from moeless.packages.backbone import experts_modules, load_backbone
from moeless.packages.packed_model import PackedModel
from tests.support.workers import MAX_ROWS, RUN_SECRET


def main() -> None:
    """Do the task on stdin."""
    task = json.loads(sys.stdin.read())
    endpoints = {name: msgspec.convert(found, WorkerEndpoint) for name, found in task["endpoints"].items()}
    torch.set_num_threads(1)
    register_experts()
    _compute_something()
    before, peak_before = _unique_bytes(), _peak_bytes()
    packed = PackedModel.open(task["packed"])
    manifest = packed.manifest
    model = load_backbone(packed, dtype=torch.float32)
    table = spread_evenly(
        num_layers=manifest.num_moe_layers, num_experts=manifest.num_experts, workers=tuple(sorted(endpoints))
    )
    pool = InstancePool(packed, dtype=torch.float32)
    dispatcher = Dispatcher(FeedForward(pool), table)
    dispatcher.set_channels(
        {
            name: connect(
                endpoint,
                run_secret=RUN_SECRET,
                engine="memory",
                hidden_size=manifest.layers[0].layout.hidden_size,
                top_k=manifest.top_k,
                dtype=torch.float32,
                max_rows=MAX_ROWS,
            )
            for name, endpoint in endpoints.items()
        }
    )
    attach_dispatcher(model, dispatcher)
    with torch.inference_mode():
        for length in (64, 1, 128):
            model(torch.arange(length)[None] % model.config.vocab_size, use_cache=False)
    experts = {id(p) for module in experts_modules(model) for p in module.parameters()}
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    figures = {
        "backbone_bytes": sum(p.nbytes for p in model.parameters() if not p.is_meta),
        "expert_bytes_in_model": sum(t.nbytes for key, t in tensors.items() if key in experts and not t.is_meta),
        "pool_resident_bytes": pool.stats().resident_bytes,
        "tokens_per_worker": dispatcher.metrics.tokens_per_worker,
        "fallbacks": dispatcher.metrics.fallbacks,
        "unique_bytes_before": before,
        "unique_bytes_after": _unique_bytes(),
        "peak_growth_bytes": _peak_bytes() - peak_before,
    }
    dispatcher.close()
    json.dump(figures, sys.stdout)


def _compute_something() -> None:
    """Let torch's libraries allocate what they allocate once."""
    with torch.inference_mode():
        torch.mm(torch.ones(64, 64), torch.ones(64, 64))


def _unique_bytes() -> int:
    return int(psutil.Process().memory_full_info().uss)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
