from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeless.engine.transformers.randomness import (
    MAX_GUMBEL,
    MIN_GUMBEL,
    keys_of,
    negative_gumbel,
    negative_gumbel_on_device,
    random_bits,
    random_bits_on_device,
    stream_of,
)

U64 = st.integers(0, 2**64 - 1)


def keys(seeds: list[int], positions: list[int]) -> np.ndarray:
    streams = np.array([stream_of(seed) for seed in seeds], dtype=np.uint64)
    return keys_of(streams, np.array(positions, dtype=np.uint64))


def noise(seed: int, position: int, num_tokens: int) -> np.ndarray:
    return -negative_gumbel(random_bits(np.arange(num_tokens, dtype=np.uint32), keys([seed], [position])))


@given(st.lists(st.tuples(U64, st.integers(0, 2**32)), min_size=1, max_size=9), st.lists(st.integers(0, 2**20)))
def test_noise_depends_on_its_own_seed_position_and_token_only(
    pairs: list[tuple[int, int]], token_ids: list[int]
) -> None:
    tokens = np.array(token_ids, dtype=np.uint32)
    together = negative_gumbel(random_bits(tokens, keys(*map(list, zip(*pairs, strict=True)))[:, :, None]))
    for row, (seed, position) in enumerate(pairs):
        key = keys([seed], [position])
        assert together[row].tolist() == [
            float(negative_gumbel(random_bits(tokens[i : i + 1], key))[0]) for i in range(len(tokens))
        ]


@given(st.lists(st.tuples(U64, st.integers(0, 2**32)), min_size=1, max_size=9))
def test_a_device_computes_the_same_noise(pairs: list[tuple[int, int]]) -> None:
    both = keys(*map(list, zip(*pairs, strict=True)))
    bits = random_bits(np.arange(500, dtype=np.uint32), both[:, :, None])
    on_device = random_bits_on_device(torch.arange(500, dtype=torch.int32), both)
    assert (on_device.numpy().view(np.uint32) == bits).all()
    assert np.allclose(negative_gumbel_on_device(on_device).numpy(), negative_gumbel(bits), rtol=1e-5, atol=1e-6)


def test_the_bounds_hold_for_every_number_of_bits() -> None:
    edges = -negative_gumbel(np.array([0, 1, 2**31, 2**32 - 2, 2**32 - 1], dtype=np.uint32))
    assert np.isfinite(edges).all()
    assert MIN_GUMBEL < edges.min() < -2.7
    assert 22 < edges.max() < MAX_GUMBEL


def test_bits_are_spread_evenly_over_tokens_positions_and_seeds() -> None:
    tokens = np.arange(20_000, dtype=np.uint32)
    samples = (
        random_bits(tokens, keys([7], [3])),
        random_bits(np.uint32(11), keys([7] * 20_000, list(range(20_000)))),
        random_bits(np.uint32(11), keys(list(range(20_000)), [3] * 20_000)),
    )
    for bits in samples:
        for shift in (0, 12, 22):  # the lowest, middle and highest ten bits
            counts = np.bincount((bits >> np.uint32(shift)) & 1023, minlength=1024)
            chi_square = ((counts - 20_000 / 1024) ** 2 / (20_000 / 1024)).sum()
            assert 1023 - 5 * 45 < chi_square < 1023 + 5 * 45


def test_noise_has_the_distributions_mean_and_deviation() -> None:
    values = noise(1, 2, 200_000)
    assert abs(values.mean() - np.euler_gamma) < 0.01
    assert abs(values.std() - np.pi / 6**0.5) < 0.01


def test_neighbouring_seeds_positions_and_tokens_are_unrelated() -> None:
    rows = np.stack([noise(seed, position, 5000) for seed in range(4) for position in range(4)])
    between = np.corrcoef(rows) - np.eye(16)
    assert np.abs(between).max() < 0.08
    assert max(abs(np.corrcoef(row[:-lag], row[lag:])[0, 1]) for row in rows for lag in (1, 2, 256)) < 0.08


def test_seeds_of_any_size_and_sign_give_streams_of_64_bits() -> None:
    streams = {stream_of(seed) for seed in (-1, 0, 1, 2**63, 2**64 - 2, -5)}
    assert len(streams) == 6
    assert all(0 <= stream < 2**64 for stream in streams)
