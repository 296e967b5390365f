from __future__ import annotations

import pytest

from moeless.planning.profiles import DEVICES, builtin_profiles, published_exchange, roofline_profile


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


def test_the_bytes_of_published_latencies_are_not_counted_twice() -> None:
    # 128 tokens to 8 experts of hidden size 7168 in FP8 are 7.34 MB: 73.4 µs at 100 GB/s, and twice that in BF16 back.
    exchange = published_exchange(dispatch_us=100, combine_us=160, bytes_per_s=100e9, split_us=8)
    sent_us = 128 * 8 * 7168 / 100e9 * 1e6
    assert exchange.hub_s * 1e6 == pytest.approx(((100 - sent_us) + (160 - 2 * sent_us)) / 2)
    assert exchange.split_s * 1e6 == pytest.approx(20 + 8)


def test_an_exchange_never_takes_less_than_a_launch() -> None:
    exchange = published_exchange(dispatch_us=77, combine_us=114, bytes_per_s=20e9, split_us=8)
    assert exchange.hub_s == exchange.all_to_all_s == pytest.approx(10e-6)


def test_the_hub_is_never_cheaper_than_all_to_all() -> None:
    for profile in builtin_profiles().values():
        exchange = profile.exchange
        assert exchange.hub_s + exchange.message_s >= exchange.all_to_all_s > 0
        assert exchange.split_s > 0
    fixed_us = {name: profile.exchange.hub_s * 1e6 for name, profile in builtin_profiles().items()}
    assert fixed_us["a6000-gpt-oss-20b"] == pytest.approx(26.7, abs=0.1)  # of DeepEP's 77 and 114 on 8 devices
    assert fixed_us["h800-deepseek-v3"] == pytest.approx(23.3, abs=0.1)  # of its 173 and 314 on 64
