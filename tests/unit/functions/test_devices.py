"""The same layer on each device: what transformers' grouped product gives, from weights as they were packed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MixtralConfig
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moeless.core.expert import FunctionId
from moeless.functions.arena import row_bytes
from moeless.functions.feed_forward import FeedForward
from moeless.functions.pool import InstancePool
from moeless.packages.packed_model import PackedModel
from tests.support.dense import dense_layer
from tests.support.packed import layout, write_packed

HIDDEN, INNER, NUM_EXPERTS, TOP_K = 64, 96, 8, 2
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
EVERY_FUNCTION = [FunctionId(0, expert) for expert in range(NUM_EXPERTS)]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    folder: Path = tmp_path_factory.mktemp("devices") / "packed"
    layouts = [layout(hidden_size=HIDDEN, intermediate_size=INNER)]
    return write_packed(folder, layouts, num_experts=NUM_EXPERTS, top_k=TOP_K)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with torch.inference_mode():
        yield torch.device(request.param)


@pytest.fixture(params=TOLERANCES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def routing(num_tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_TH = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype)
    weights_Tk, experts_Tk = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).topk(TOP_K, dim=-1)
    return hidden_TH.to(device), experts_Tk.to(device), weights_Tk.to(device=device, dtype=dtype)


def transformers_experts(pool: InstancePool) -> MixtralExperts:
    """transformers' module with the pool's weights."""
    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K
    )
    with torch.device("meta"):
        experts = MixtralExperts(config)
    arena = pool.arena(0)
    experts.gate_up_proj = torch.nn.Parameter(arena.up_SHI.transpose(1, 2), requires_grad=False)
    experts.down_proj = torch.nn.Parameter(arena.down_SIH.transpose(1, 2), requires_grad=False)
    return experts


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    difference = (found.double().cpu() - expected.double().cpu()).abs().max()
    assert float(difference) <= TOLERANCES[dtype] * float(expected.abs().max())


@pytest.mark.parametrize("num_tokens", [1, 5, 200])
def test_a_resident_layer_is_what_transformers_grouped_product_gives(
    packed: PackedModel, device: torch.device, dtype: torch.dtype, num_tokens: int
) -> None:
    pool = InstancePool(packed, device=device, dtype=dtype)
    pool.start_many(EVERY_FUNCTION)
    routed = routing(num_tokens, device, dtype)

    out_TH = FeedForward(pool).forward_resident(0, *routed)

    assert out_TH.dtype == dtype
    assert_close(out_TH, grouped_mm_experts_forward(transformers_experts(pool), *routed), dtype)


@pytest.mark.parametrize("num_tokens", [1, 5, 200])
def test_partial_sums_are_the_resident_layer_and_the_dense_one(
    packed: PackedModel, device: torch.device, dtype: torch.dtype, num_tokens: int
) -> None:
    pool = InstancePool(packed, device=device, dtype=dtype)
    feed_forward = FeedForward(pool)
    hidden_TH, experts_Tk, weights_Tk = routing(num_tokens, device, dtype)
    experts_n = experts_Tk.cpu().numpy().reshape(-1)
    order_n = np.argsort(experts_n, kind="stable")
    weights_n = weights_Tk.reshape(-1)[torch.from_numpy(order_n).to(device)]

    sums_TH = feed_forward.partial_sums(0, hidden_TH, order_n // TOP_K, experts_n[order_n], weights_n)

    assert_close(sums_TH, feed_forward.forward_resident(0, hidden_TH, experts_Tk, weights_Tk), dtype)
    dense_TH = dense_layer(packed, 0, hidden_TH.cpu(), experts_Tk.cpu(), weights_Tk.cpu(), dtype=dtype)
    assert_close(sums_TH, dense_TH, dtype)


def test_instances_are_loaded_as_they_were_packed(
    packed: PackedModel, device: torch.device, dtype: torch.dtype
) -> None:
    pool = InstancePool(packed, device=device, dtype=dtype)
    pool.start_many(EVERY_FUNCTION)
    for function in EVERY_FUNCTION:
        slot = int(pool.arena_rows_LE[0][function.expert])
        weights = packed.read_function(function, dtype=dtype)
        assert torch.equal(pool.arena(0).up_SHI[slot].cpu(), weights.up.t())
        assert torch.equal(pool.arena(0).down_SIH[slot].cpu(), weights.down.t())


def test_a_device_with_room_for_half_of_a_layer_still_computes_it(
    packed: PackedModel, device: torch.device, dtype: torch.dtype
) -> None:
    """Slots are then reused for one expert after the other, while work that reads them may still be queued."""
    capacity = NUM_EXPERTS // 2 * row_bytes(packed.layout(0), dtype)
    feed_forward = FeedForward(InstancePool(packed, device=device, dtype=dtype, capacity_bytes=capacity))
    for seed in range(10):
        hidden_TH, experts_Tk, weights_Tk = routing(30 + seed, device, dtype)
        experts_n = experts_Tk.cpu().numpy().reshape(-1)
        order_n = np.argsort(experts_n, kind="stable")
        weights_n = weights_Tk.reshape(-1)[torch.from_numpy(order_n).to(device)]
        sums_TH = feed_forward.partial_sums(0, hidden_TH, order_n // TOP_K, experts_n[order_n], weights_n)
        dense_TH = dense_layer(packed, 0, hidden_TH.cpu(), experts_Tk.cpu(), weights_Tk.cpu(), dtype=dtype)
        assert_close(sums_TH, dense_TH, dtype)
    assert feed_forward.pool.stats().evictions > 0
