from __future__ import annotations

import numpy as np
import pytest

from moeless.core.errors import ConfigError
from moeless.simulate.workload import cut, made_up_arrivals, sped_up, thinned

TRACE = made_up_arrivals(rate_per_s=10, num_requests=5000, prompt_tokens=100, output_tokens=20, length_cv=0.5, seed=1)


def test_gaps_have_the_rate_and_the_burstiness_asked_for() -> None:
    for cv in (1.0, 3.0):
        trace = made_up_arrivals(rate_per_s=10, num_requests=20000, prompt_tokens=1, output_tokens=1, gap_cv=cv)
        gaps = np.diff(trace.arrival_s)
        assert gaps.mean() == pytest.approx(0.1, rel=0.08)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_a_cv_of_zero_is_a_clock() -> None:
    trace = made_up_arrivals(rate_per_s=4, num_requests=5, prompt_tokens=1, output_tokens=1, gap_cv=0)
    assert np.diff(trace.arrival_s).tolist() == pytest.approx([0.25] * 4)


def test_lengths_have_the_mean_asked_for() -> None:
    assert TRACE.prompt_tokens.mean() == pytest.approx(100, rel=0.05)
    assert TRACE.prompt_tokens.std() == pytest.approx(50, rel=0.1)


def test_thinning_keeps_a_share_of_the_requests_and_their_clock() -> None:
    few = thinned(TRACE, 0.05)
    assert few.num_requests == pytest.approx(250, rel=0.2)
    assert few.duration_s == pytest.approx(TRACE.duration_s, rel=0.05)


def test_cutting_keeps_the_first() -> None:
    assert cut(TRACE, num_requests=3).prompt_tokens.tolist() == TRACE.prompt_tokens[:3].tolist()
    assert cut(TRACE, duration_s=20).duration_s <= 20
    assert cut(TRACE) is TRACE


def test_speeding_up_keeps_requests_and_shortens_gaps() -> None:
    fast = sped_up(TRACE, 4)
    assert fast.num_requests == TRACE.num_requests
    assert fast.duration_s == pytest.approx(TRACE.duration_s / 4)


def test_what_breaks_a_rule_is_named() -> None:
    with pytest.raises(ConfigError, match="arrivals.rate_per_s must be above 0, got 0"):
        made_up_arrivals(rate_per_s=0, num_requests=1, prompt_tokens=1, output_tokens=1)
    with pytest.raises(ConfigError, match="arrivals.share must be above 0 and at most 1, got 2"):
        thinned(TRACE, 2)
    with pytest.raises(ConfigError, match="arrivals.speed must be above 0, got -1"):
        sped_up(TRACE, -1)
    with pytest.raises(ConfigError, match="arrivals.duration_s must be above 0, got 0"):
        cut(TRACE, duration_s=0)
