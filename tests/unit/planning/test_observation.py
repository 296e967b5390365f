from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moeless.core.errors import ConfigError
from moeless.planning.observation import Observation


def observed(**changed: Any) -> Observation:
    arrays = {name: np.ones((2, 3)) for name in ("mean_LE", "upper_LE", "window_LE", "last_used_s_LE")}
    return Observation(**{"time_s": 1.0, "num_steps": 0, **arrays, **changed})


def with_one(value: float) -> np.ndarray:
    array = np.ones((2, 3))
    array[1, 2] = value
    return array


def test_what_can_be_is_accepted() -> None:
    # Loads of none, a clock that began after zero, functions that never got a token or got one this moment.
    observed(time_s=-5.0, mean_LE=np.zeros((2, 3)), last_used_s_LE=np.array([[-np.inf, -7.0, -5.0]] * 2))
    observed(**{name: np.ones((2, 0)) for name in ("mean_LE", "upper_LE", "window_LE", "last_used_s_LE")})


def test_nothing_is_being_loaded_unless_told() -> None:
    assert observed().pending_keys.tolist() == []


def test_observations_are_compared_by_identity() -> None:
    # A planner that is asked twice about the same moment takes it for one.
    one = observed()
    assert one == one
    assert one != observed()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"time_s": np.nan}, "observation.time_s must be finite, got nan"),
        ({"time_s": np.inf}, "observation.time_s must be finite, got inf"),
        ({"num_steps": -1}, "observation.num_steps must be at least 0, got -1"),
        ({"mean_LE": np.ones(3)}, "observation.mean_LE must be of layers × experts, got the shape (3,)"),
        ({"upper_LE": np.ones((3, 2))}, "observation.upper_LE must have the shape of mean_LE, (2, 3), got (3, 2)"),
        ({"window_LE": np.ones(6)}, "observation.window_LE must have the shape of mean_LE, (2, 3), got (6,)"),
        ({"last_used_s_LE": np.ones((2, 2))}, "observation.last_used_s_LE must have the shape of mean_LE"),
        ({"mean_LE": with_one(-0.5)}, "observation.mean_LE must be finite and >= 0, got -0.5 for expert 2 of layer 1"),
        (
            {"upper_LE": with_one(np.inf)},
            "observation.upper_LE must be finite and >= 0, got inf for expert 2 of layer 1",
        ),
        (
            {"window_LE": with_one(np.nan)},
            "observation.window_LE must be finite and >= 0, got nan for expert 2 of layer 1",
        ),
        ({"last_used_s_LE": with_one(1.5)}, "observation.last_used_s_LE must be at most time_s (1.0), got 1.5"),
        ({"last_used_s_LE": with_one(np.nan)}, "observation.last_used_s_LE must be at most time_s (1.0), got nan"),
    ],
)
def test_what_cannot_be_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        observed(**changed)
    assert str(caught.value).startswith(message)
