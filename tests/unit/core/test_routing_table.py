"""The routing table's rules and the plan at start."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless.core.errors import ConfigError
from moeless.core.expert import FunctionId
from moeless.core.routing_table import InstanceShare, RoutingTable, spread_evenly


@given(layer=st.integers(0, 10_000), expert=st.integers(0, 100_000))
def test_a_function_name_reads_back(layer: int, expert: int) -> None:
    function = FunctionId(layer, expert)
    assert FunctionId.parse(str(function)) == function


@pytest.mark.parametrize("name", ["", "L1.E1", "L01.E1", "l01.e001", "L01.E001 ", "L01-E001", "L-1.E001"])
def test_a_malformed_function_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="L07.E003"):
        FunctionId.parse(name)


@pytest.mark.parametrize(
    "shares",
    [
        (InstanceShare("a", 0.5),),
        (InstanceShare("a", 0.7), InstanceShare("b", 0.7)),
        (InstanceShare("a", 1.5), InstanceShare("b", -0.5)),
        (InstanceShare("a", 0.5), InstanceShare("a", 0.5)),
    ],
)
def test_shares_that_break_a_rule_are_refused_with_the_functions_name(shares: tuple[InstanceShare, ...]) -> None:
    with pytest.raises(ConfigError, match=r"L03\.E002"):
        RoutingTable(version=1, instances={FunctionId(3, 2): shares})


@given(
    num_layers=st.integers(1, 6),
    num_experts=st.integers(1, 20),
    num_workers=st.integers(1, 7),
)
def test_an_even_spread_gives_each_function_one_worker_and_no_worker_more_than_its_part(
    num_layers: int, num_experts: int, num_workers: int
) -> None:
    workers = tuple(f"worker-{index}" for index in range(num_workers))
    table = spread_evenly(num_layers=num_layers, num_experts=num_experts, workers=workers)
    assert len(table.instances) == num_layers * num_experts
    for layer in range(num_layers):
        held = [table.instances[FunctionId(layer, expert)] for expert in range(num_experts)]
        assert all(len(shares) == 1 for shares in held)
        counts = [sum(shares[0].worker == worker for shares in held) for worker in workers]
        assert max(counts) - min(counts) <= 1


def test_a_spread_over_no_worker_is_refused() -> None:
    with pytest.raises(ConfigError, match="workers"):
        spread_evenly(num_layers=1, num_experts=1, workers=())
