"""Weights arrive whole through staging buffers, whatever their sizes; on the CPU, where only the bus is missing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeless.core.expert import FunctionId
from moeless.functions.arena import LayerArena
from moeless.functions.pool import InstancePool
from moeless.functions.staging import Copy, Staging
from tests.support.packed import layout, write_packed

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
CPU = torch.device("cpu")


@unhurried
@given(
    sizes=st.lists(st.integers(1, 700), min_size=1, max_size=5),
    num_threads=st.integers(1, 4),
    chunk_bytes=st.integers(1, 64).map(lambda n: 8 * n),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.float16])] * 2),
)
def test_every_byte_arrives(
    sizes: list[int], num_threads: int, chunk_bytes: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    staging = Staging(CPU, num_threads=num_threads, chunk_bytes=chunk_bytes)
    sources = [torch.randn(size).to(dtypes[0]) for size in sizes]
    targets = [torch.full((size,), 77.0, dtype=dtypes[1]) for size in sizes]
    staging.copy(Copy(target, source) for target, source in zip(targets, sources, strict=True))
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target, source.to(dtypes[1]))


def test_a_source_with_gaps_arrives_in_its_own_order() -> None:
    source = torch.arange(12.0).view(3, 4).t()
    target = torch.empty(4, 3)
    Staging(CPU, chunk_bytes=16).copy([Copy(target, source)])
    assert torch.equal(target, source)


def test_several_threads_may_load_at_once() -> None:
    staging = Staging(CPU, num_threads=2, chunk_bytes=64)
    targets = [torch.empty(100) for _ in range(8)]
    with ThreadPoolExecutor(4) as threads:
        for number, target in enumerate(targets):
            threads.submit(staging.copy, [Copy(target, torch.full((100,), float(number)))])
    assert [float(target.mean()) for target in targets] == list(range(8))


def test_a_slot_is_written_like_without_staging(tmp_path: Path) -> None:
    packed = write_packed(tmp_path / "packed", [layout(has_bias=True)], dtype=torch.bfloat16)
    weights = packed.read_function(FunctionId(0, 1))
    plain, staged = (
        LayerArena(packed.layout(0), num_rows=4, dtype=torch.float32, device=CPU, staging=staging)
        for staging in (None, Staging(CPU, num_threads=3, chunk_bytes=1000))
    )
    for arena in (plain, staged):
        arena.write(1, weights)
    assert torch.equal(staged.up_SHI[1], plain.up_SHI[1])
    assert torch.equal(staged.down_SIH[1], plain.down_SIH[1])
    assert staged.up_bias_SI is not None
    assert plain.up_bias_SI is not None
    assert torch.equal(staged.up_bias_SI[1], plain.up_bias_SI[1])


@pytest.mark.parametrize("first_in_inference_mode", [True, False])
def test_a_layer_may_be_loaded_by_the_compute_thread_and_by_others(
    tmp_path: Path, first_in_inference_mode: bool
) -> None:
    pool = InstancePool(write_packed(tmp_path / "packed", [layout()]), dtype=torch.float32)
    for expert, in_inference_mode in enumerate([first_in_inference_mode, not first_in_inference_mode]):
        with torch.inference_mode(in_inference_mode):
            assert pool.start(FunctionId(0, expert))
