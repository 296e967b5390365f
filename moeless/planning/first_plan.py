"""The plan that a run begins with, before any load is seen.

Called by the simulator and by control.

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from moeless.core.arrays import FloatArray
from moeless.core.cluster import ModelShape
from moeless.core.plan import Plan
from moeless.planning.load_check import check_load
from moeless.planning.observation import Observation, Planner


def make_first_plan(
    planner: Planner, model: ModelShape, *, step_tokens: int, prior_LE: FloatArray | None = None
) -> Plan:
    """The planner's plan for full steps.

    Args:
        step_tokens: of a full step.
        prior_LE: mean tokens of each function for a token, as recorded before. None: all experts are expected to get
            the same.
    """
    shape = (model.num_layers, model.num_experts)
    if prior_LE is None:
        prior_LE = np.full(shape, model.top_k / model.num_experts)
    check_load("prior_LE", prior_LE, shape)
    load_LE = step_tokens * prior_LE
    observation = Observation(
        time_s=0.0,
        mean_LE=load_LE,
        upper_LE=load_LE,
        window_LE=load_LE,
        last_used_s_LE=np.full(shape, -np.inf),
        num_steps=0,
    )
    return planner.plan(observation, None)


def steady_observation(load_LE: FloatArray, *, quantile: float) -> Observation:
    """The observation of a load that was there before and stays, of tokens that come independently."""
    return Observation(
        time_s=0.0,
        mean_LE=load_LE,
        upper_LE=load_LE + NormalDist().inv_cdf(quantile) * np.sqrt(load_LE),
        window_LE=load_LE,
        last_used_s_LE=np.where(load_LE > 0, 0.0, -np.inf),
        num_steps=1,
    )
