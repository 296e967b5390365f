from __future__ import annotations

import numpy as np
import pytest

from moeless.core.errors import ConfigError
from moeless.planning.first_plan import make_first_plan, steady_observation
from moeless.planning.forecasts import PopularityForecaster, forecast_from_window, with_upper_bound
from moeless.planning.load_history import LoadHistory, WindowLoad
from moeless.planning.observation import Observation
from tests.support.planning import model_of, plan_of


def history_of(*steps: tuple[float, list[int]], window_s: float = 10.0) -> LoadHistory:
    history = LoadHistory(2, window_s=window_s)
    for now_s, counts in steps:
        history.add(np.array(counts), now_s)
    return history


def test_a_window_holds_the_mean_of_its_steps_and_forgets_older_ones() -> None:
    history = history_of((0.0, [100, 0]), (20.0, [4, 0]), (21.0, [8, 2]))
    window = history.window(21.0)
    assert (window.mean_C.tolist(), window.num_steps) == ([6.0, 1.0], 2)
    assert history.total_C.tolist() == [112.0, 2.0]
    assert history.last_used_s_C.tolist() == [21.0, 21.0]
    assert history.window(100.0).mean_C.tolist() == [0.0, 0.0]


def test_a_window_of_steps_keeps_so_many() -> None:
    history = LoadHistory(1, window_steps=10)
    for step in range(30):
        history.add(np.array([step]), float(step))
    assert history.window(30.0).mean_C.tolist() == [np.mean(range(20, 30))]


def test_rare_steps_with_most_tokens_are_the_burst() -> None:
    window = history_of((0.0, [1, 0]), (0.1, [1, 0]), (0.2, [10, 0])).window(0.2)
    assert window.burst == pytest.approx((1 + 1 + 100) / 12 / 4)
    assert forecast_from_window(window, quantile=0.5).mean_C[0] == pytest.approx(4 * window.burst)


def test_the_upper_bound_is_normal_around_the_mean() -> None:
    window = WindowLoad(np.array([4.0, 0.0]), np.array([2.0, 1.0]))
    mean_C, upper_C = with_upper_bound(window.mean_C, window, quantile=0.9)
    assert mean_C.tolist() == [4.0, 0.0]
    np.testing.assert_allclose(upper_C, [4 + 1.2815515655446004 * np.sqrt(8), 0.0])


def test_popularity_halves_what_is_a_half_life_old() -> None:
    history = history_of((0.0, [8, 0]))
    popularity = PopularityForecaster(2, half_life_s=10.0)
    popularity.mean_C(0.0, history, history.window(0.0))
    history.add(np.array([0, 4]), 10.0)
    window = WindowLoad(np.array([3.0, 3.0]), np.ones(2))
    # 8 tokens half as old count 4, as many as the new ones: six tokens a step are shared out equally.
    assert popularity.mean_C(10.0, history, window).tolist() == [3.0, 3.0]
    assert popularity.forecast(20.0, history, window, quantile=0.5).mean_C.tolist() == [3.0, 3.0]


def test_popularity_of_nothing_is_nothing() -> None:
    history = history_of()
    popularity = PopularityForecaster(2, half_life_s=1.0)
    assert popularity.mean_C(0.0, history, history.window(0.0)).tolist() == [0.0, 0.0]
    with pytest.raises(ConfigError, match="half_life_s must be above 0, got 0"):
        PopularityForecaster(2, half_life_s=0)


def test_the_first_plan_is_for_full_steps_by_what_was_recorded_or_equal_loads() -> None:
    seen: list[Observation] = []

    class Watched:
        name = "watched"

        def plan(self, observation: Observation, previous: object) -> object:
            seen.append(observation)
            assert previous is None
            return plan_of(1, [{0: 1.0}, {0: 1.0}])

    planner, model = Watched(), model_of(1, 2)
    make_first_plan(planner, model, step_tokens=8)  # type: ignore[arg-type]
    make_first_plan(planner, model, step_tokens=8, prior_LE=np.array([[0.75, 0.25]]))  # type: ignore[arg-type]
    assert [observation.mean_LE.tolist() for observation in seen] == [[[4.0, 4.0]], [[6.0, 2.0]]]
    assert all(observation.num_steps == 0 for observation in seen)


def test_a_steady_load_was_there_before() -> None:
    observation = steady_observation(np.array([[4.0, 0.0]]), quantile=0.5)
    assert observation.mean_LE.tolist() == observation.upper_LE.tolist() == [[4.0, 0.0]]
    assert observation.last_used_s_LE.tolist() == [[0.0, -np.inf]]
