from __future__ import annotations

import numpy as np
import pytest

from moeless.core.errors import ConfigError
from moeless.simulate.generator import MadeUpRouting, make_routing
from moeless_predictors.traces.statistics import expert_loads


def worker_max_to_mean(load_LE: np.ndarray, worker_LE: np.ndarray, num_workers: int) -> float:
    load_LW = np.stack(
        [np.bincount(w, weights=x, minlength=num_workers) for x, w in zip(load_LE, worker_LE, strict=True)]
    )
    return float((load_LW.max(axis=1) / load_LW.mean(axis=1)).mean())


def replicated(load_E: np.ndarray, num_workers: int, num_extra: int) -> tuple[np.ndarray, np.ndarray]:
    """Experts of the instances and their workers: greedy replicas, then heaviest first into workers of equal counts."""
    counts = np.ones(len(load_E), dtype=int)
    for _ in range(num_extra):
        counts[np.argmax(load_E / counts)] += 1
    experts = np.repeat(np.arange(len(load_E)), counts)
    share = (load_E / counts)[experts]
    workers, loads, free = (
        np.empty(len(experts), dtype=int),
        np.zeros(num_workers),
        np.full(num_workers, len(experts) // num_workers),
    )
    for instance in np.argsort(-share, kind="stable"):  # unstable ones differ by processor
        worker = int(np.argmin(np.where(free > 0, loads, np.inf)))
        workers[instance] = worker
        loads[worker] += share[instance]
        free[worker] -= 1
    return experts, workers


def replicated_max_to_mean(fitted_LE: np.ndarray, met_LE: np.ndarray, num_workers: int) -> float:
    values = []
    for fitted_E, met_E in zip(fitted_LE[::6], met_LE[::6], strict=True):
        experts, workers = replicated(fitted_E, num_workers, 32)
        load = np.bincount(workers, weights=(met_E / np.bincount(experts))[experts], minlength=num_workers)
        values.append(load.max() / load.mean())
    return float(np.mean(values))


@pytest.fixture(scope="module")
def windows() -> tuple[np.ndarray, np.ndarray]:
    """Loads of the first workload and of the last."""
    trace = make_routing(MadeUpRouting(num_sequences=2, tokens_per_sequence=2048))
    first, last = (expert_loads(trace.take_sequences([sequence])).astype(float) for sequence in (0, 1))
    return first, last


@pytest.mark.parametrize(("num_workers", "measured"), [(8, 2.07), (32, 3.04)])
def test_contiguous_experts_are_as_uneven_as_was_measured(
    windows: tuple[np.ndarray, np.ndarray], num_workers: int, measured: float
) -> None:
    worker_LE = np.tile(np.arange(256) * num_workers // 256, (58, 1))
    assert worker_max_to_mean(windows[0], worker_LE, num_workers) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("num_workers", "same", "other"), [(8, 1.001, 1.13), (32, 1.006, 1.425)])
def test_replicas_fitted_to_a_window_lose_as_much_balance_in_another_as_was_measured(
    windows: tuple[np.ndarray, np.ndarray], num_workers: int, same: float, other: float
) -> None:
    assert replicated_max_to_mean(windows[0], windows[0], num_workers) == pytest.approx(same, abs=0.003)
    assert replicated_max_to_mean(windows[0], windows[1], num_workers) == pytest.approx(other, abs=0.04)


def test_a_token_chooses_different_experts() -> None:
    trace = make_routing(MadeUpRouting(num_sequences=2, tokens_per_sequence=16, num_layers=2, num_experts=16, top_k=4))
    assert all(len(set(choice)) == 4 for choice in np.asarray(trace.experts_TLk).reshape(-1, 4).tolist())


def test_the_same_seed_gives_the_same_routing() -> None:
    config = MadeUpRouting(num_sequences=2, tokens_per_sequence=8, num_layers=2, num_experts=16, top_k=2, seed=5)
    assert (make_routing(config).experts_TLk == make_routing(config).experts_TLk).all()


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("top_k", 0, "from 1 to the number of experts"),
        ("drift", 1.5, "from 0 to 1"),
        ("expert_spread", -1, "at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(field: str, value: float, rule: str) -> None:
    with pytest.raises(ConfigError, match=f"routing.{field} must be {rule}.*, got {value}"):
        MadeUpRouting(**{field: value})  # type: ignore[arg-type]
