"""Small models and clusters to plan for, by hand and for hypothesis, and what is true of every plan.

Shapes: L layers, E experts, W workers, X ways to place.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from hypothesis import strategies as st

from moeless.core.arrays import FloatArray, IntArray
from moeless.core.cluster import Cluster, ModelShape, WorkerSpec
from moeless.core.plan import Plan


def model_of(num_layers: int, num_experts: int, *, expert_bytes: int = 1) -> ModelShape:
    return ModelShape(
        num_layers=num_layers, num_experts=num_experts, top_k=1, expert_bytes=expert_bytes, hidden_bytes=1
    )


def cluster_of(
    memory: Sequence[int], *, speeds: Sequence[float] | None = None, nodes: Sequence[str] | None = None
) -> Cluster:
    """Make workers w0, w1, ... with memory for a number of instances of one byte each."""
    return Cluster(
        workers=tuple(
            WorkerSpec(
                name=f"w{i}",
                memory_bytes=num,
                speed=1.0 if speeds is None else speeds[i],
                node="node-0" if nodes is None else nodes[i],
            )
            for i, num in enumerate(memory)
        )
    )


@st.composite
def clusters(draw: st.DrawFn, *, min_memory: int, max_memory: int, max_workers: int = 4) -> Cluster:
    """Workers of different memory, speed and node."""
    specs = draw(
        st.lists(
            st.tuples(
                st.integers(min_memory, max_memory),
                st.sampled_from([1.0, 0.5, 1.7, 3.0]),
                st.sampled_from(["a", "b"]),
            ),
            min_size=1,
            max_size=max_workers,
        )
    )
    memory, speeds, nodes = zip(*specs, strict=True)
    return cluster_of(memory, speeds=speeds, nodes=nodes)


def plan_of(num_workers: int, *layers: list[dict[int, float]], version: int = 1) -> Plan:
    """Make a plan from each layer's shares of each expert by worker."""
    has_LEW = np.zeros((len(layers), len(layers[0]), num_workers), dtype=np.bool_)
    shares_LEW = np.zeros(has_LEW.shape)
    for layer, experts in enumerate(layers):
        for expert, shares in enumerate(experts):
            for worker, share in shares.items():
                has_LEW[layer, expert, worker], shares_LEW[layer, expert, worker] = True, share
    return Plan.from_dense(has_LEW, shares_LEW, version=version)


def fits(counts_LE: IntArray, capacity_W: IntArray) -> bool:
    """Return whether all instances fit, no two of a function on one worker: the theorem of Gale and Ryser."""
    sorted_W = np.sort(capacity_W)
    return all(
        sorted_W[: len(sorted_W) - num].sum() + np.minimum(counts_LE, num).sum() >= counts_LE.sum()
        for num in range(len(sorted_W) + 1)
    )


def busiest_of(plan: Plan, load_LE: FloatArray, speed_W: FloatArray) -> list[float]:
    """Load over speed of each layer's busiest worker."""
    busiest: list[float] = (plan.worker_load_LW(load_LE) / speed_W).max(axis=1).tolist()
    return busiest


def min_busiest(load_E: FloatArray, speed_W: FloatArray) -> float:
    """Load over speed of the busiest worker at best, if every function has one instance: by trying all ways."""
    ways = np.array(list(product(range(len(speed_W)), repeat=len(load_E))))
    load_XW = np.zeros((len(ways), len(speed_W)))
    for expert, load in enumerate(load_E):
        load_XW[np.arange(len(ways)), ways[:, expert]] += load
    return float((load_XW / speed_W).max(axis=1).min())


def workers_of(plan: Plan) -> dict[tuple[int, int], list[int]]:
    """The workers of each function that has any."""
    workers: dict[tuple[int, int], list[int]] = {}
    for layer, expert, worker in zip(
        plan.layer_N.tolist(), plan.expert_N.tolist(), plan.worker_N.tolist(), strict=True
    ):
        workers.setdefault((layer, expert), []).append(worker)
    return workers


def counts_of(plan: Plan) -> list[list[int]]:
    """Replica count of each function, layer by layer."""
    result: list[list[int]] = plan.counts_LE.tolist()
    return result


def assert_whole(plan: Plan, cluster: Cluster, model: ModelShape) -> None:
    """No worker hosts more than fits; shares are >= 0 and sum to 1 over each function; a function is nowhere twice."""
    assert (np.bincount(plan.worker_N, minlength=cluster.num_workers) <= cluster.capacity_W(model)).all()
    assert (np.diff(plan.keys_N) > 0).all()
    assert (plan.share_N >= 0).all()
    has_LEW, shares_LEW = plan.dense()
    np.testing.assert_allclose(shares_LEW.sum(axis=2), has_LEW.any(axis=2), atol=1e-9)
