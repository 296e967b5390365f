from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless.core.cluster import Cluster, WorkerSpec, even_cluster
from moeless.core.errors import ConfigError
from moeless.planning.cost import (
    BackboneTime,
    CostProfile,
    ExchangeTime,
    ExpertTime,
    all_to_all_seconds,
    hub_seconds,
)
from moeless.planning.profiles import builtin_profiles

KNOTS = ExpertTime.from_knots([(256, 25e-6), (64, 20e-6), (1024, 81e-6)])
EXCHANGE = ExchangeTime(hub_s=10e-6, message_s=2e-6, all_to_all_s=15e-6)


@st.composite
def expert_times(draw: st.DrawFn) -> ExpertTime:
    tokens = sorted(draw(st.sets(st.integers(1, 5000), min_size=2, max_size=6)))
    rises = draw(st.lists(st.floats(0, 1e-3), min_size=len(tokens), max_size=len(tokens)))
    return ExpertTime.from_knots(list(zip(tokens, (1e-6 + np.cumsum(rises)).tolist(), strict=True)))


def test_no_tokens_cost_nothing() -> None:
    assert KNOTS([0.0, 0.0]).tolist() == [0.0, 0.0]


def test_few_tokens_cost_as_much_as_the_first_knot() -> None:
    assert KNOTS([1.0, 64.0]).tolist() == pytest.approx([20e-6, 20e-6])


def test_knots_are_met_and_between_them_the_time_is_linear() -> None:
    assert KNOTS([256.0, 640.0]).tolist() == pytest.approx([25e-6, (25e-6 + 81e-6) / 2])


def test_above_the_last_knot_its_slope_goes_on() -> None:
    assert float(KNOTS(1792.0)) == pytest.approx(81e-6 + (81e-6 - 25e-6))


@given(expert_times(), st.lists(st.floats(0, 20000), min_size=2, max_size=20))
def test_more_tokens_never_take_less_time(time: ExpertTime, tokens: list[float]) -> None:
    assert (np.diff(time(sorted(tokens))) >= -1e-15).all()


def test_a_roofline_is_flat_while_reading_weights_and_then_computes() -> None:
    time = ExpertTime.from_roofline(
        expert_bytes=1e6, flops_per_token=1e6, bytes_per_s=1e9, flops_per_s=1e10, call_s=1e-6
    )
    assert time([1.0, 5.0, 100.0]).tolist() == pytest.approx([1e-3 + 1e-6, 1e-3 + 1e-6, 1e-2 + 1e-6])


def test_a_table_of_matrix_products_is_summed_by_tokens(tmp_path: Path) -> None:
    table = tmp_path / "gemm.csv"
    table.write_text("tokens_per_expert,us_per_expert_gemm\n64,13\n64,6\n128,14\n128,7\n")
    assert ExpertTime.from_gemm_table(table)([64.0, 128.0]).tolist() == pytest.approx([19e-6, 21e-6])


def test_a_table_without_the_column_is_refused_by_name(tmp_path: Path) -> None:
    table = tmp_path / "gemm.csv"
    table.write_text("tokens_per_expert,us\n64,13\n")
    with pytest.raises(ConfigError, match="gemm.csv: each row must have the numbers .* us_per_expert_gemm"):
        ExpertTime.from_gemm_table(table)


def test_the_built_in_deepseek_expert_agrees_with_the_table_it_was_made_from() -> None:
    folder = os.environ.get("MOELESS_DATA")
    if folder is None:
        pytest.skip("MOELESS_DATA is not set")
    table = Path(folder) / "cost" / "deepgemm_h800_fp8_dsv3_expert_gemm.csv"
    if not table.exists():
        pytest.skip(f"{table} is not there")
    tokens = np.array([64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0, 8192.0])
    ratio = builtin_profiles()["h800-deepseek-v3"].expert_time(tokens) / ExpertTime.from_gemm_table(table)(tokens)
    assert np.abs(ratio - 1).max() < 0.05


@pytest.mark.parametrize(
    ("knots", "rule"),
    [
        ([(1, 1e-6)], "at least two knots"),
        ([(0, 1e-6), (2, 2e-6)], "rise from at least 1"),
        ([(1, 2e-6), (2, 1e-6)], "never fall"),
        ([(1, 0.0), (2, 1e-6)], "> 0"),
        ([(1, float("nan")), (2, 1e-6)], "finite"),
    ],
)
def test_knots_that_break_a_rule_are_refused(knots: list[tuple[float, float]], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        ExpertTime.from_knots(knots)


def test_a_step_of_the_backbone_is_the_sum_of_its_parts() -> None:
    backbone = BackboneTime(step_s=1.0, token_s=0.1, decode_context_s=0.01, prefill_context_s=0.001)
    seconds = backbone.seconds(num_tokens=20, decode_context=100, prefill_context=1000, devices=2)
    assert seconds == pytest.approx(1 + (2 + 1 + 1) / 2)


def test_a_hub_waits_for_the_slowest_link_and_pays_for_each_message() -> None:
    cluster = even_cluster(4, memory_bytes=0)
    seconds_L = hub_seconds(
        np.array([[100.0, 50.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), cluster, EXCHANGE, token_bytes=1e4, engine_links=2
    )
    # The engine's two links carry 150 tokens, the first worker's 100 of them.
    assert seconds_L.tolist() == pytest.approx([10e-6 + 2 * 2e-6 + 100 * 1e4 / 56e9, 0.0])


def test_a_hub_reaches_other_nodes_more_slowly() -> None:
    cluster = even_cluster(2, memory_bytes=0, workers_per_node=1)
    near = hub_seconds(np.array([[100.0, 0.0]]), cluster, EXCHANGE, token_bytes=1e4)
    far = hub_seconds(np.array([[0.0, 100.0]]), cluster, EXCHANGE, token_bytes=1e4)
    assert float(far[0] - near[0]) == pytest.approx(100 * 1e4 * (1 / 25e9 - 1 / 56e9))


def test_balanced_all_to_all_keeps_each_workers_own_part() -> None:
    cluster = even_cluster(4, memory_bytes=0)
    seconds_L = all_to_all_seconds(np.full((1, 4), 80.0), cluster, EXCHANGE, token_bytes=1e4)
    assert float(seconds_L[0]) == pytest.approx(15e-6 + 80 * 3 / 4 * 1e4 / 56e9)


def test_one_worker_exchanges_no_bytes_with_itself() -> None:
    seconds_L = all_to_all_seconds(np.array([[80.0]]), even_cluster(1, memory_bytes=0), EXCHANGE, token_bytes=1e4)
    assert float(seconds_L[0]) == pytest.approx(15e-6)


@given(
    st.lists(st.floats(0, 1e4), min_size=4, max_size=4),
    st.lists(st.floats(0, 1e3), min_size=4, max_size=4),
    st.floats(0.1, 1),
)
def test_more_tokens_or_a_busier_link_never_speed_an_exchange(
    tokens: list[float], more: list[float], free: float
) -> None:
    cluster = Cluster(workers=tuple(WorkerSpec(name=f"w{i}", memory_bytes=0, node=f"n{i // 2}") for i in range(4)))
    fewer_LW, more_LW = np.array([tokens]), np.array([tokens]) + np.array([more])
    for seconds in (hub_seconds, all_to_all_seconds):
        least = seconds(fewer_LW, cluster, EXCHANGE, token_bytes=1e4)
        assert seconds(more_LW, cluster, EXCHANGE, token_bytes=1e4)[0] >= least[0]
        assert seconds(fewer_LW, cluster, EXCHANGE, token_bytes=1e4, free_link_W=np.full(4, free))[0] >= least[0]


def test_a_start_up_that_ends_before_it_begins_is_refused() -> None:
    any_profile = builtin_profiles()["a6000-mixtral-8x7b"]
    with pytest.raises(ConfigError, match=r"worker_start_s must be .* got \(5, 1\)"):
        CostProfile(
            name="x",
            source="",
            model=any_profile.model,
            expert_time=any_profile.expert_time,
            backbone=any_profile.backbone,
            exchange=EXCHANGE,
            worker_start_s=(5, 1),
        )


@pytest.mark.parametrize("mean_tokens", [0.05, 0.7, 3.1, 24, 100, 300, 600])
@pytest.mark.parametrize("expert_time", [KNOTS, ExpertTime.from_knots([(1, 1e-6), (40, 1e-6), (41, 3e-5)])])
def test_the_mean_time_of_random_tokens_is_that_of_many_draws(expert_time: ExpertTime, mean_tokens: float) -> None:
    times = expert_time(np.random.default_rng(0).poisson(mean_tokens, 100_000))
    error_s = 0.01 * times.mean() + 4 * times.std() / np.sqrt(len(times))
    assert float(expert_time.averaged()(mean_tokens)) == pytest.approx(times.mean(), abs=error_s)


def test_an_instance_without_tokens_takes_no_time_on_average_either() -> None:
    mean_time = KNOTS.averaged()
    assert mean_time([0.0, 1e5]).tolist() == pytest.approx([0.0, float(KNOTS(1e5))])
    assert float(mean_time(0.01)) == pytest.approx(0.01 * 20e-6, rel=0.02)


def test_what_is_not_a_number_of_tokens_takes_not_a_number_of_seconds() -> None:
    expert_time = ExpertTime.from_knots([(1, 1e-3), (100, 2e-3)])
    assert np.isnan(expert_time(np.nan))
    assert np.isnan(expert_time.averaged()(np.nan))
