"""The seconds of one engine step's layers.

Shapes: L MoE layers, C = L x E cells, W workers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeless.planning.cost import all_to_all_seconds, hub_seconds
from moeless.simulate.batching import Step
from moeless.simulate.hosting import WorkerLoad, balanced_load
from moeless.simulate.residency import ColdStart, Residency
from moeless.simulate.scenario import Policy, Scenario

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]


@dataclass(slots=True)
class StepTimes:
    """Of one step, whose layers follow each other: backbone, dispatch, the busiest worker, combine."""

    step: Step
    backbone_s: float
    """Of each MoE layer: an even part of the step's."""
    load: WorkerLoad
    dispatch_L: FloatArray
    combine_L: FloatArray
    cold: dict[int, list[ColdStart]] = field(default_factory=dict)
    """By layer, the functions that have to be loaded first."""


class StepCosts:
    """Computes steps of one policy on one scenario."""

    def __init__(self, scenario: Scenario, policy: Policy, residency: Residency) -> None:
        self._scenario, self._policy, self._residency = scenario, policy, residency
        # Every policy has as many devices for the backbone as for the experts.
        self._devices = scenario.cluster.num_workers / scenario.num_engines
        self._num_nodes = int(scenario.cluster.node_W.max()) + 1

    def times(self, step: Step, counts_C: IntArray, *, engine: int, number: int, now_s: float) -> StepTimes:
        """Of the step, if the workers have nothing else to do; functions without an instance are not counted."""
        scenario, profile = self._scenario, self._scenario.profile
        backbone_s = profile.backbone.seconds(
            num_tokens=step.num_tokens,
            decode_context=step.decode_context,
            prefill_context=step.prefill_context,
            devices=self._devices,
        )
        model = profile.model
        if self._policy.bound is not None:
            load = balanced_load(
                counts_C,
                scenario.cluster,
                profile.expert_time,
                num_layers=model.num_layers,
                top_k=model.top_k,
                num_tokens=step.num_tokens,
                are_calls_whole=self._policy.bound == "whole",
            )
        else:
            load = self._residency.hosting.load(counts_C, num_tokens=step.num_tokens, step=number)
        free_link_W = self._residency.free_link_W(now_s)
        dispatch_L = self._exchange(load.tokens_LW, model.hidden_bytes, engine, free_link_W)
        ratio = profile.exchange.combine_ratio
        combine_L = dispatch_L
        if ratio != 1:
            combine_L = self._exchange(load.tokens_LW, model.hidden_bytes * ratio, engine, free_link_W)
        return StepTimes(step, backbone_s / model.num_layers, load, dispatch_L, combine_L)

    def _exchange(
        self, tokens_LW: FloatArray, token_bytes: float, engine: int, free_link_W: FloatArray | None
    ) -> FloatArray:
        scenario = self._scenario
        cluster, exchange = scenario.cluster, scenario.profile.exchange
        hub_L = all_to_all_L = np.full(len(tokens_LW), np.inf)
        if self._policy.topology == "hub" or self._policy.bound is not None:
            hub_L = hub_seconds(
                tokens_LW,
                cluster,
                exchange,
                token_bytes=token_bytes,
                engine_node=engine % self._num_nodes,
                engine_links=self._devices,
                free_link_W=free_link_W,
            )
        if self._policy.topology == "all_to_all" or self._policy.bound is not None:
            all_to_all_L = all_to_all_seconds(
                tokens_LW, cluster, exchange, token_bytes=token_bytes, free_link_W=free_link_W
            )
        fastest_L: FloatArray = np.minimum(hub_L, all_to_all_L)
        return fastest_L
