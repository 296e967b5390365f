from __future__ import annotations

import pytest

from moeless.planning.profiles import DEVICES, builtin_profiles, roofline_profile


def test_every_built_in_profile_says_where_its_figures_come_from() -> None:
    profiles = builtin_profiles()
    assert "h800-deepseek-v3" in profiles
    assert all(profile.name == name and len(profile.source) > 40 for name, profile in profiles.items())


def test_a_mixtral_expert_reads_its_weights_for_half_a_millisecond() -> None:
    assert float(builtin_profiles()["a6000-mixtral-8x7b"].expert_time(1.0)) == pytest.approx(0.58e-3, rel=0.02)


def test_a_load_takes_its_bytes_over_the_link_and_its_start() -> None:
    profile = builtin_profiles()["a6000-mixtral-8x7b"]
    assert profile.start_time(352e6, 24.8e9) == pytest.approx(14.2e-3 + profile.start_s, rel=0.01)


def test_a_model_of_other_sizes_gets_a_profile_by_the_same_rules() -> None:
    known = builtin_profiles()["a6000-mixtral-8x7b"]
    made = roofline_profile(
        "mixtral", DEVICES["a6000"], experts=(32, 8, 2), hidden_size=4096, expert_parameters=176.2e6
    )
    assert made.model == known.model
    assert made.expert_time == known.expert_time
    assert made.backbone.step_s == pytest.approx(known.backbone.step_s, rel=0.01)
    assert made.backbone.prefill_context_s == known.backbone.prefill_context_s


def test_a_faster_device_takes_less_time() -> None:
    slow, fast = (
        roofline_profile("x", DEVICES[name], experts=(4, 8, 2), hidden_size=1024, expert_parameters=1e7)
        for name in ("a6000", "h800")
    )
    assert float(fast.expert_time(1.0)) < float(slow.expert_time(1.0))
