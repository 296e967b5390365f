from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless.core.errors import ConfigError
from moeless.core.expert import FunctionId
from moeless.core.plan import Plan
from moeless.core.policy import parse_policy
from moeless.planning.profiles import builtin_profiles
from moeless.simulate.recommend import Recommendation, alternative_of, assumptions, chosen, recommended
from moeless.simulate.routing import SequenceRouting
from moeless.simulate.settings import ScenarioSettings
from moeless.simulate.simulation import OnProgress, simulate
from moeless.simulate.sizing import (
    BUYABLE,
    Candidate,
    Sized,
    SizingCase,
    SizingConfig,
    checked_systems,
    min_workers,
    sized,
    worker_memory,
)
from moeless.simulate.systems import SYSTEMS, SystemConfig, routing_statistics
from moeless.simulate.workload import made_up_arrivals
from moeless_predictors.traces import synthetic_trace

EXPERT_MB = 100
ROUTING = SequenceRouting(
    synthetic_trace(num_sequences=8, tokens_per_sequence=30, num_layers=3, num_experts=8, top_k=2, seed=0)
)
ARRIVALS = made_up_arrivals(rate_per_s=20, num_requests=30, prompt_tokens=40, output_tokens=8, length_cv=0.5)


def make_case(
    *, tpot_s: float = 1.5e-3, max_workers: int = 8, attainment: float = 0.9, room: int = 30, **standard: Any
) -> SizingCase:
    """Experts that take 168 µs each, so that a step of one worker takes some 4 ms."""
    return SizingCase(
        settings=ScenarioSettings(
            hidden_size=64, expert_mb=EXPERT_MB, memory_per_worker=str(room * EXPERT_MB * 10**6), batch_tokens=256
        ),
        routing=ROUTING,
        arrivals=ARRIVALS,
        systems=SystemConfig(**standard),
        sizing=SizingConfig(slo=(0.1, tpot_s), attainment=attainment, max_workers=max_workers),
    )


def shares_by_brute_force(case: SizingCase, name: str) -> list[float]:
    """Of 1, 2, ... workers."""
    shares = []
    for workers in range(1, case.sizing.max_workers + 1):
        scenario = case.scenario(workers)
        result = simulate(scenario, SYSTEMS[name](scenario, case.systems), slo=case.sizing.slo)
        assert result.slo_share is not None
        shares.append(result.slo_share)
    return shares


@pytest.mark.parametrize("name", ["static", "eplb-sglang", "moeless"])
def test_the_fewest_workers_are_those_that_trying_every_size_finds(name: str) -> None:
    case = make_case(eplb_spare_replicas=1)
    shares = shares_by_brute_force(case, name)
    expected = next(workers for workers, share in enumerate(shares, start=1) if share >= 0.9)
    assert 1 < expected < 8, "a case that says nothing"
    found = sized(case, Candidate(system=name))
    assert found.workers == found.best == expected
    assert found.result is not None
    assert found.result.slo_share == shares[expected - 1]
    assert found.one_fewer is not None
    assert found.one_fewer.slo_share == shares[expected - 2] < 0.9
    assert {size: probe.slo_share for size, probe in found.probes.items()} == {
        size: shares[size - 1] for size in found.probes
    }


@pytest.mark.parametrize("name", ["static", "moeless"])
def test_a_tighter_slo_never_needs_fewer_workers(name: str) -> None:
    needed = [
        sized(make_case(tpot_s=tpot_s), Candidate(system=name)).workers for tpot_s in (4e-3, 2e-3, 1.5e-3, 1.2e-3)
    ]
    sizes = [99 if workers is None else workers for workers in needed]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 2


def test_the_same_case_gives_the_same_sizes_and_figures() -> None:
    one, again = (sized(make_case(), Candidate(system="moeless")) for _ in range(2))
    assert alternative_of(one) == alternative_of(again)


def test_sizes_without_room_are_left_out_with_the_reason() -> None:
    found = sized(make_case(room=9), Candidate(system="static"))
    assert [size for size, probe in found.probes.items() if probe.slo_share is None] == [1, 2]
    assert found.probes[1].why_not == "the routing uses 24 functions, and 9 fit the workers' memory"
    assert found.workers == 3
    assert found.one_fewer == found.probes[2]
    spare = sized(make_case(room=9, eplb_spare_replicas=1), Candidate(system="eplb-vllm"))
    assert "with 1 on each worker and layer a worker holds 12 instances, and 9" in str(spare.probes[3].why_not)
    assert spare.workers == 4


def test_eplb_has_no_spare_replicas_where_none_keeps_the_slo_better() -> None:
    with_one, with_none, unset = (
        sized(make_case(eplb_spare_replicas=spare), Candidate(system="eplb-sglang")) for spare in (1, 0, None)
    )
    assert unset.workers == min(with_one.workers or 9, with_none.workers or 9)
    assert unset.workers is not None
    probe = unset.probes[unset.workers]
    assert probe.eplb_spare_replicas in (0, 1)
    better = with_none if probe.eplb_spare_replicas == 0 else with_one
    assert probe == better.probes[unset.workers]
    told = recommended(make_case(), unset, "because", routing_statistics(ROUTING))
    spare = probe.eplb_spare_replicas * unset.workers
    assert told.instances == ROUTING.num_layers * (ROUTING.num_experts + spare)


def test_what_keeps_the_slo_at_no_size_shows_the_best_that_it_reached() -> None:
    case = make_case(tpot_s=0.3e-3, max_workers=6)
    found = sized(case, Candidate(system="static"))
    assert (found.workers, found.one_fewer, sorted(found.probes)) == (None, None, [1, 2, 4, 6])
    assert found.best is not None
    assert found.result is not None
    assert found.result.slo_share == max(probe.slo_share or 0 for probe in found.probes.values()) < 0.9
    nowhere = sized(make_case(room=2), Candidate(system="static"))
    assert (nowhere.workers, nowhere.best, nowhere.result) == (None, None, None)
    assert chosen([found, nowhere]) is None


@given(st.lists(st.floats(0, 1) | st.none(), min_size=1, max_size=70), st.floats(0.01, 1))
def test_what_is_found_is_enough_and_one_fewer_was_tried_and_is_not(
    shares: list[float | None], attainment: float
) -> None:
    asked = set()

    def share(workers: int) -> float | None:
        asked.add(workers)
        return shares[workers - 1]

    found = min_workers(share, attainment=attainment, max_workers=len(shares))
    if found is None:
        assert all((shares[size - 1] or 0) < attainment for size in asked)
        assert len(shares) in asked
    else:
        assert (shares[found - 1] or 0) >= attainment
        assert found == 1 or (found - 1 in asked and (shares[found - 2] or 0) < attainment)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=70), st.floats(0.01, 1))
def test_where_shares_rise_the_fewest_are_found_in_few_tries(shares: list[float], attainment: float) -> None:
    shares.sort()
    found = min_workers(lambda size: shares[size - 1], attainment=attainment, max_workers=len(shares))
    assert found == next((size for size, share in enumerate(shares, start=1) if share >= attainment), None)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([0.1, 0.2, 0.99, 0.97, 1.0, 1.0, 1.0, 1.0], 3),  # behind a dip that is near enough
        ([0.1, 0.99, 0.97, 0.96, 0.98, 1.0, 1.0, 1.0], 2),
        ([0.1, 0.2, 0.3, 0.97, 0.98, 0.99, 0.98, 0.97], 6),  # between the sizes of doubling
        ([0.99], 1),
        ([0.2, 0.4, 0.98], None),
    ],
)
def test_shares_that_do_not_rise_with_every_worker_are_followed(shares: list[float], expected: int | None) -> None:
    assert min_workers(lambda size: shares[size - 1], attainment=0.99, max_workers=len(shares)) == expected


def test_every_simulation_is_watched() -> None:
    seen: list[str] = []

    @contextmanager
    def watch(what: str) -> Iterator[OnProgress]:
        seen.append(what)
        yield lambda done, total: seen.append(f"{done} of {total}") if done == total else None

    sized(make_case(max_workers=1), Candidate(system="static"), watch=watch)
    assert seen == ["static on 1 workers", "30 of 30"]


def plan_of(found: Recommendation, workers: list[str]) -> Plan:
    """Checked as every plan is: shares of a function sum to 1, no function is twice on a worker."""
    held = [
        (FunctionId.parse(name), workers.index(worker.name), share)
        for worker in found.plan
        for name, share in worker.functions.items()
    ]
    return Plan.from_instances(
        version=1,
        num_layers=3,
        num_experts=8,
        num_workers=len(workers),
        layer_N=np.array([function.layer for function, *_ in held]),
        expert_N=np.array([function.expert for function, *_ in held]),
        worker_N=np.array([worker for _, worker, _ in held]),
        share_N=np.array([share for *_, share in held]),
    )


@pytest.mark.parametrize("name", BUYABLE)
def test_the_plan_is_one_that_can_be_had(name: str) -> None:
    case = make_case(tpot_s=4e-3, room=12)
    found = sized(case, Candidate(system=name))
    assert found.workers is not None
    told = recommended(case, found, "because", routing_statistics(ROUTING))
    plan = plan_of(told, [f"worker-{index}" for index in range(found.workers)])
    assert plan.num_instances == told.instances == sum(layer.instances for layer in told.layers)
    assert plan.counts_LE.tolist() == [layer.replicas for layer in told.layers]
    assert max(worker.instance_bytes for worker in told.plan) <= 12 * EXPERT_MB * 10**6
    assert all(worker.instances == len(worker.functions) for worker in told.plan)
    assert sum(worker.load_share for worker in told.plan) == pytest.approx(1)
    assert plan.counts_LE.min() >= 1
    assert told.num_without_instance == 0
    assert 1 <= told.workers_touched <= 2
    assert told.imbalance >= 1
    assert told.step_tokens > 1


def test_moeless_places_by_affinity_where_the_policy_says_so() -> None:
    placers = {"minimalMoves": {}, "affinity": {"maxImbalance": 1.5}}
    touched = {}
    for name, settings in placers.items():
        policy = parse_policy({"defaults": {"placer": {"name": name, **settings}, "maxReplicas": 1}})
        case = make_case(policy=policy, affinity=routing_statistics(ROUTING))
        found = sized(case, Candidate(system="moeless"))
        assert found.workers is not None
        touched[name] = recommended(case, found, "because", routing_statistics(ROUTING)).workers_touched
    assert touched["affinity"] < touched["minimalMoves"]


def test_idle_workers_that_stop_are_not_paid_for() -> None:
    arrivals = made_up_arrivals(rate_per_s=1, num_requests=4, prompt_tokens=20, output_tokens=4, gap_cv=0)
    policy = parse_policy({"tickSeconds": 0.1, "defaults": {"keepAliveSeconds": 0, "scaleDownStabilizationSeconds": 0}})
    case = replace(make_case(tpot_s=1.0, attainment=0.2, room=90, policy=policy, recall=1.0), arrivals=arrivals)
    always, stopping = (sized(case, Candidate(system="moeless", worker_idle_s=idle_s)) for idle_s in (None, 0.05))
    costs = [alternative_of(found, worker_hour_cost=2.0).cost for found in (always, stopping)]
    assert costs[0] is not None
    assert costs[1] is not None
    assert always.workers == stopping.workers == 1
    assert (costs[0].mean_workers, costs[0].dollars_per_hour) == (1, 2)
    assert costs[1].mean_workers < 1
    assert chosen([always, stopping])[0] is stopping  # type: ignore[index]
    assert "stop after 0.05 s" in assumptions(case, [stopping.candidate], is_memory_given=True)["system moeless-idle"]


def test_dollars_are_those_of_the_workers_hours() -> None:
    found = sized(make_case(), Candidate(system="static"))
    cost, result = alternative_of(found, worker_hour_cost=3.6).cost, found.result
    assert cost is not None
    assert result is not None
    assert cost.worker_hours == pytest.approx(cost.mean_workers * result.duration_s / 3600)
    assert cost.dollars_per_hour == pytest.approx(3.6 * cost.mean_workers)
    assert cost.dollars_per_million_tokens == pytest.approx(1e-3 * result.worker_s / (result.num_tokens / 1e6))
    without = alternative_of(found).cost
    assert without is not None
    assert without.dollars_per_hour is None


def test_the_cheapest_has_the_fewest_workers_and_then_the_least_memory(make_sized: Callable[..., Sized]) -> None:
    three, four, large = make_sized("a", 3), make_sized("b", 4), make_sized("c", 3, resident=2.0)
    none = make_sized("d", None)
    assert chosen([none, four, large, three]) == (
        three,
        "it and c need 3 workers, and it holds 1.0 GB of experts on average, the next (c) 2.0",
    )
    assert chosen([three, make_sized("e", 3)]) == (
        three,
        "it and e need 3 workers, and no other holds fewer experts on average",
    )
    assert chosen([four, three]) == (three, "it needs 3 workers, the next (b) 4")
    assert chosen([four, none]) == (four, "it is the only one that keeps the SLO")
    assert chosen([none]) is None


@pytest.fixture(name="make_sized")
def make_sized_fixture() -> Callable[..., Sized]:
    result = sized(make_case(max_workers=1, tpot_s=1.0), Candidate(system="static")).result

    def make(name: str, workers: int | None, *, resident: float = 1.0) -> Sized:
        import msgspec

        assert result is not None
        changed = msgspec.structs.replace(
            result, duration_s=10.0, worker_s=10.0 * (workers or 1), resident_byte_s=resident * 1e10
        )
        return Sized(candidate=Candidate(system=name), workers=workers, probes={}, best=workers, result=changed)

    return make


@pytest.mark.parametrize(
    ("amount", "expected"),
    [(None, 28_800_000_000), ("24Gi", 24 << 30), ("500M", 500_000_000), ("49800000", 49_800_000)],
)
def test_memory_is_bytes_or_a_part_of_the_device(amount: str | None, expected: int) -> None:
    assert worker_memory(amount, builtin_profiles()["a6000-gpt-oss-20b"]) == expected


@pytest.mark.parametrize(
    ("amount", "profile", "message"),
    [
        ("200%", "a6000-gpt-oss-20b", "memory_per_worker must be bytes or have a unit .*, and no share.*got '200%'"),
        ("much", "a6000-gpt-oss-20b", "memory_per_worker must be bytes or have a unit .*got 'much'"),
        ("49M", "a6000-gpt-oss-20b", "must have room for an expert of 49,800,000 bytes, got 49,000,000"),
        (None, "cpu-moeless-mini", "memory_per_worker must be given: profile cpu-moeless-mini does not tell"),
    ],
)
def test_memory_that_says_nothing_is_refused(amount: str | None, profile: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        worker_memory(amount, builtin_profiles()[profile])


@pytest.mark.parametrize(
    ("names", "idle_s", "message"),
    [
        (["static", "limit"], None, "systems must be among static, eplb-vllm, .*, got limit"),
        ([], None, "systems must be among .*, got none"),
        (["static", "static"], None, "systems must differ, got static, static"),
        (["static"], 5.0, "systems must have moeless, whose idle workers stop, got static"),
        (["moeless"], -1.0, "transfers.worker_idle_s must be at least 0, got -1"),
    ],
)
def test_systems_that_cannot_be_sized_are_refused(names: list[str], idle_s: float | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked_systems(names, idle_s)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attainment": 0}, "attainment must be above 0 and at most 1, got 0"),
        ({"attainment": 99}, "attainment must be above 0 and at most 1, got 99"),
        ({"max_workers": 0}, "max_workers must be at least 1, got 0"),
    ],
)
def test_bounds_of_the_search_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SizingConfig(slo=(1.0, 1.0), **changes)
