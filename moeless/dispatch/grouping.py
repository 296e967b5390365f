"""Group a layer's (token, expert) pairs by worker: arrays in, arrays out.

Shapes: T tokens, k experts per token, E experts, n pairs, R rows (distinct tokens) of one worker.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless.core.arrays import Float64Array, Int64Array
from moeless.core.call_cost import CallCost
from moeless.core.expert import FunctionId
from moeless.core.routing_table import LOCAL_WORKER, RoutingTable
from moeless.planning.step_balance import Replicas, ShareTurns, add_call_costs, balanced_split


@dataclass(frozen=True, slots=True)
class CompiledLayer:
    """One layer of a routing table, ready for array look-ups. Workers are numbered in the table's sorted order."""

    workers: tuple[str, ...]
    worker_of_E: Int64Array
    """The expert's first worker."""
    shares_of: dict[int, tuple[Int64Array, Float64Array]]
    """Only experts with replicas: their workers and the cumulative shares."""
    step_cost: CallCost | None = None
    """Step cost of the routing table."""
    replicas_F: Replicas | None = None
    """Replicas of the experts in `shares_of`, in its order; None where there are none."""
    turns: ShareTurns | None = None
    """The same, to split by their shares; without a step cost."""

    def replicas(self, expert: int) -> Int64Array:
        """Numbers of the workers that hold an instance of `expert`."""
        if expert in self.shares_of:
            return self.shares_of[expert][0]
        return self.worker_of_E[expert : expert + 1]


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """Pairs of one layer for one worker, sorted by expert."""

    worker: int
    tokens_R: Int64Array
    """Tokens, among the T, that are its rows."""
    rows_n: Int64Array
    """Row of each pair, into tokens_R."""
    experts_n: Int64Array
    pairs_n: Int64Array
    """Position of each pair in the flattened (T, k) routing."""


def compile_layer(
    table: RoutingTable, layer: int, num_experts: int, *, known: frozenset[str] | None = None
) -> CompiledLayer:
    """Look-up arrays for `layer`. A function without an instance goes to the engine's own process.

    Args:
        known: workers that can be reached; instances elsewhere are left out and their shares spread over the rest.
    """
    kept: dict[int, list[tuple[str, float]]] = {}
    for expert in range(num_experts):
        instances = table.instances.get(FunctionId(layer, expert), ())
        reachable = [(i.worker, i.share) for i in instances if known is None or i.worker in known]
        kept[expert] = reachable or [(LOCAL_WORKER, 1.0)]
    workers = tuple(sorted({worker for instances in kept.values() for worker, _ in instances}))
    number = {worker: index for index, worker in enumerate(workers)}
    shares_of: dict[int, tuple[Int64Array, Float64Array]] = {}
    for expert, found in kept.items():
        if len(found) > 1:
            found.sort()
            shares = np.array([share for _, share in found])
            if not shares.any():  # of what can be reached
                shares[:] = 1.0
            shares_of[expert] = (
                np.array([number[worker] for worker, _ in found]),
                np.cumsum(shares / shares.sum()),
            )
    worker_of_E = np.array([number[kept[expert][0][0]] for expert in range(num_experts)], dtype=np.int64)
    replicas = turns = None
    if shares_of:
        replicas = Replicas.of_one_layer(
            [replicas.tolist() for replicas, _ in shares_of.values()],
            [np.diff(cumulative, prepend=0.0).tolist() for _, cumulative in shares_of.values()],
        )
        turns = None if table.step_cost is not None else ShareTurns.of(replicas)
    return CompiledLayer(
        workers=workers,
        worker_of_E=worker_of_E,
        shares_of=shares_of,
        step_cost=table.step_cost,
        replicas_F=replicas,
        turns=turns,
    )


def group_by_worker(compiled: CompiledLayer, experts_Tk: Int64Array, *, step: int) -> list[WorkerGroup]:
    """Split a layer's pairs over the workers, in worker order.

    Args:
        experts_Tk: the router's choice.
        step: counts the layer's calls; without a step cost, replicas take turns by it when a call has few tokens for
            them.
    """
    num_tokens, top_k = experts_Tk.shape
    experts_n = experts_Tk.reshape(-1)
    workers_n = compiled.worker_of_E[experts_n]
    if compiled.replicas_F is not None:
        _share_out(compiled, compiled.replicas_F, experts_n, workers_n, step)
    order_n = np.argsort(workers_n * len(compiled.worker_of_E) + experts_n, kind="stable")
    sorted_workers = workers_n[order_n]
    starts = np.searchsorted(sorted_workers, np.arange(len(compiled.workers) + 1))
    groups = []
    for worker in range(len(compiled.workers)):
        pairs_n = order_n[starts[worker] : starts[worker + 1]]
        if len(pairs_n):
            groups.append(_group(worker, pairs_n, experts_n, num_tokens, top_k))
    return groups


def _share_out(
    compiled: CompiledLayer, replicas: Replicas, experts_n: Int64Array, workers_n: Int64Array, step: int
) -> None:
    """Split the pairs of experts with replicas: by the step's real counts with a step cost, else by their shares."""
    counts_E = np.bincount(experts_n, minlength=len(compiled.worker_of_E))
    functions = np.fromiter(compiled.shares_of, dtype=np.int64)
    if compiled.step_cost is None:
        assert compiled.turns is not None  # made with the replicas
        split_N = compiled.turns.split(counts_E[functions], step=step)
    else:
        alone_E = counts_E.copy()
        alone_E[functions] = 0
        busy_W = np.zeros(len(compiled.workers))
        add_call_costs(alone_E, compiled.worker_of_E, compiled.step_cost, busy_W)
        split_N = balanced_split(counts_E[functions], replicas, busy_W[np.newaxis], compiled.step_cost)
    for number, expert in enumerate(functions.tolist()):
        if counts_E[expert]:
            held = slice(replicas.instance_F[number], replicas.instance_F[number + 1])
            workers_n[experts_n == expert] = np.repeat(replicas.worker_N[held], split_N[held])


def regroup_elsewhere(
    compiled: CompiledLayer, failed: WorkerGroup, experts_Tk: Int64Array, *, dead: set[int]
) -> tuple[list[WorkerGroup], WorkerGroup | None]:
    """Give a failed worker's pairs to other instances of their functions.

    Args:
        dead: numbers of the workers not to use, the failed one among them.
    Returns: groups for other workers, and the group of pairs that no other worker can take (or None).
    """
    num_tokens, top_k = experts_Tk.shape
    target_n = np.full(len(failed.pairs_n), -1, dtype=np.int64)
    for expert in np.unique(failed.experts_n).tolist():
        others = [worker for worker in compiled.replicas(expert).tolist() if worker not in dead]
        if others:
            positions = np.flatnonzero(failed.experts_n == expert)
            target_n[positions] = np.array(others)[np.arange(len(positions)) % len(others)]
    experts_n = experts_Tk.reshape(-1)
    groups = [
        _group(worker, failed.pairs_n[target_n == worker], experts_n, num_tokens, top_k)
        for worker in sorted(set(target_n.tolist()) - {-1})
    ]
    left_n = failed.pairs_n[target_n == -1]
    left = _group(-1, left_n, experts_n, num_tokens, top_k) if len(left_n) else None
    return groups, left


def _group(worker: int, pairs_n: Int64Array, experts_n: Int64Array, num_tokens: int, top_k: int) -> WorkerGroup:
    tokens_n = pairs_n // top_k
    if num_tokens == 1:
        tokens_R, rows_n = np.zeros(1, dtype=np.int64), tokens_n
    else:
        mask_T = np.zeros(num_tokens, dtype=bool)
        mask_T[tokens_n] = True
        tokens_R = np.flatnonzero(mask_T)
        rows_n = (np.cumsum(mask_T) - 1)[tokens_n]
    return WorkerGroup(worker=worker, tokens_R=tokens_R, rows_n=rows_n, experts_n=experts_n[pairs_n], pairs_n=pairs_n)
