from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moeless.engine.transformers.randomness import stream_of, uniforms

U64 = st.integers(0, 2**64 - 1)


def draw(seed: int, positions: range) -> np.ndarray:
    stream = np.full(len(positions), stream_of(seed), dtype=np.uint64)
    return uniforms(stream, np.array(positions, dtype=np.uint64))


@given(st.lists(st.tuples(U64, st.integers(0, 2**32)), min_size=1, max_size=20))
def test_a_number_depends_on_its_own_seed_and_position_only(pairs: list[tuple[int, int]]) -> None:
    streams = np.array([stream_of(seed) for seed, _ in pairs], dtype=np.uint64)
    positions = np.array([position for _, position in pairs], dtype=np.uint64)
    together = uniforms(streams, positions)
    alone = [uniforms(streams[i : i + 1], positions[i : i + 1])[0] for i in range(len(pairs))]
    assert together.tolist() == alone
    assert ((together >= 0) & (together < 1)).all()


def test_numbers_of_a_stream_are_spread_evenly() -> None:
    counts, _ = np.histogram(draw(7, range(100_000)), bins=100, range=(0, 1))
    assert counts.min() > 850
    assert counts.max() < 1150


def test_neighbouring_seeds_and_positions_are_unrelated() -> None:
    first, second = draw(1, range(10_000)), draw(2, range(10_000))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.05


def test_seeds_of_any_size_and_sign_give_streams_of_64_bits() -> None:
    streams = {stream_of(seed) for seed in (-1, 0, 1, 2**63, 2**64 - 2, -5)}
    assert len(streams) == 6
    assert all(0 <= stream < 2**64 for stream in streams)
