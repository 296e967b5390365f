"""The plan that a run begins with."""

from __future__ import annotations

from moeless.core.expert import FunctionId
from moeless.core.routing_table import LOCAL_WORKER, InstanceShare, RoutingTable, spread_evenly
from moeless.deployments.settings import ServeSettings
from moeless.packages.manifest import Manifest


def initial_table(manifest: Manifest, settings: ServeSettings) -> RoutingTable:
    """Every function once: spread evenly over the workers, in the engine if there is none, or on its own."""
    if settings.isolation == "function":
        instances = {
            FunctionId(entry.layer, entry.expert): (InstanceShare(entry.name),) for entry in manifest.functions
        }
        return RoutingTable(version=1, instances=instances)
    return spread_evenly(
        num_layers=manifest.num_moe_layers,
        num_experts=manifest.num_experts,
        workers=settings.worker_names or (LOCAL_WORKER,),
    )
