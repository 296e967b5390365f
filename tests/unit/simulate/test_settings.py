from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moeless.core.errors import ConfigError
from moeless.simulate.routing import SequenceRouting
from moeless.simulate.settings import ScenarioSettings, described, make_scenario
from moeless.simulate.workload import made_up_arrivals
from moeless_predictors.traces import ArrivalTrace, synthetic_trace

ARRIVALS = made_up_arrivals(rate_per_s=1, num_requests=3, prompt_tokens=5, output_tokens=2)


def routing(num_layers: int = 2, num_experts: int = 8, top_k: int = 2, **changes: Any) -> SequenceRouting:
    return SequenceRouting(
        synthetic_trace(
            num_sequences=2,
            tokens_per_sequence=5,
            num_layers=num_layers,
            num_experts=num_experts,
            top_k=top_k,
            **changes,
        )
    )


SIZED = ScenarioSettings(hidden_size=100, expert_mb=2.0, workers=3)


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        ("100%", 3 * 2 * 2_000_000),  # three of eight experts, of two layers
        ("50%", 3 * 2_000_000),
        ("5000000", 5_000_000),
        ("2Mi", 2 << 20),
    ],
)
def test_memory_is_an_amount_or_a_share_of_an_even_part(amount: str, expected: int) -> None:
    scenario = make_scenario(replace(SIZED, memory_per_worker=amount), routing(), ARRIVALS)
    assert {worker.memory_bytes for worker in scenario.cluster.workers} == {expected}


def test_workers_stand_on_nodes_and_have_the_links_given() -> None:
    settings = replace(SIZED, workers=4, workers_per_node=2, local_gb_s=160, remote_gb_s=40, fetch_gb_s=10)
    cluster = make_scenario(settings, routing(), ARRIVALS).cluster
    assert cluster.node_W.tolist() == [0, 0, 1, 1]
    assert (cluster.local_bytes_per_s, cluster.remote_bytes_per_s, cluster.fetch_bytes_per_s) == (160e9, 40e9, 10e9)


def test_a_known_shape_has_its_profile_unless_sizes_or_a_name_are_given() -> None:
    known = routing(24, 32, 4)
    settings = ScenarioSettings()
    assert make_scenario(settings, known, ARRIVALS).profile.name == "a6000-gpt-oss-20b"
    sized = make_scenario(replace(settings, hidden_size=64, expert_mb=1, device="h800"), known, ARRIVALS).profile
    assert (sized.name, sized.model.expert_bytes, sized.model.hidden_bytes) == ("h800-24x32x4", 1_000_000, 128)
    named = make_scenario(replace(settings, profile="a6000-gpt-oss-20b", hidden_size=64), known, ARRIVALS).profile
    assert named.name == "a6000-gpt-oss-20b"


def test_the_hidden_size_may_come_from_the_trace() -> None:
    told = routing(hidden_size=48)
    scenario = make_scenario(ScenarioSettings(expert_mb=1), told, ARRIVALS)
    assert scenario.profile.model.hidden_bytes == 96


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"workers_per_node": 0}, "workers_per_node must be at least 1, got 0"),
        ({"remote_gb_s": -1}, "remote_gb_s must be above 0, got -1"),
        ({"expert_mb": 0}, "expert_mb must be above 0, got 0"),
        ({"device": "abacus"}, "device must be one of a6000, h800, got 'abacus'"),
        ({"profile": "free"}, "profile must be one of .*, got 'free'"),
    ],
)
def test_values_out_of_bounds_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScenarioSettings(**changes)


def test_every_assumption_is_told_in_words() -> None:
    settings = replace(SIZED, workers_per_node=2, worker_idle_s=5.0, transfer_share=0, in_order=True, engines=2)
    arrivals = ArrivalTrace.from_arrays(arrival_s=[0.0, 2.0], prompt_tokens=[5, 6], output_tokens=[1, 2], source="here")
    told = described(make_scenario(settings, routing(), arrivals))
    for word, fragment in {
        "arrivals": "2 requests in 2.0 s, 11 prompt and 3 output tokens; source: here",
        "workers": "3 on 2 nodes",
        "engines": "2, each at most 2,048 tokens",
        "routing": "in their order",
        "loading": "over a path of its own",
        "worker start-up": "that host nothing for 5 s are stopped",
        "costs": "roofline",
    }.items():
        assert fragment in told[word]
