"""Every layout, dtype and path of the feed-forward against the plainest computation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.core.errors import UnsupportedFamilyError
from moeless.core.expert import ExpertLayout, FunctionId
from moeless.functions.feed_forward import FeedForward
from moeless.functions.pool import InstancePool
from moeless.packages.packed_model import PackedModel
from tests.support.dense import dense_layer
from tests.support.packed import layout, write_packed

NUM_EXPERTS, TOP_K = 6, 3
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest difference as a share of the largest output: a few units in the last place of the dtype."""

GPT_OSS = {
    "gate": "transformers.models.gpt_oss.modeling_gpt_oss:GptOssExperts",
    "gate_attributes": (("alpha", 1.702), ("limit", 0.7)),
    "activation": "",
    "is_concatenated": False,
    "is_transposed": True,
    "has_bias": True,
}
LAYOUTS: dict[str, ExpertLayout] = {
    "gated": layout(),
    "gated-gelu": layout(activation="gelu"),
    "gated-relu": layout(activation="relu"),
    "gated-tanh-gelu": layout(activation="gelu_pytorch_tanh"),
    "biased": layout(has_bias=True),
    "transposed": layout(is_transposed=True),
    "transposed-biased": layout(is_transposed=True, has_bias=True),
    "ungated": layout(has_gate=False, activation="relu2"),
    "ungated-biased": layout(has_gate=False, activation="gelu", has_bias=True),
    "ungated-transposed": layout(has_gate=False, activation="silu", is_transposed=True),
    "interleaved-clamped": layout(**GPT_OSS),
    "large": layout(hidden_size=256, intermediate_size=400),
    "large-biased-ungated": layout(
        hidden_size=256, intermediate_size=400, has_bias=True, has_gate=False, activation="relu"
    ),
    "large-transposed": layout(hidden_size=256, intermediate_size=400, is_transposed=True),
    "odd-sizes": layout(hidden_size=30, intermediate_size=7),
    "odd-sizes-transposed-biased": layout(hidden_size=30, intermediate_size=9, is_transposed=True, has_bias=True),
}
LAYER_OF = {name: layer for layer, name in enumerate(LAYOUTS)}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    folder = tmp_path_factory.mktemp("layouts") / "packed"
    return write_packed(folder, list(LAYOUTS.values()), num_experts=NUM_EXPERTS, top_k=TOP_K)


@pytest.fixture(scope="module", params=TOLERANCES, ids=str)
def feed_forward(request: pytest.FixtureRequest, packed: PackedModel) -> FeedForward:
    return FeedForward(InstancePool(packed, dtype=request.param))


def routing(num_tokens: int, *, hidden: int, dtype: torch.dtype, seed: int = 1, experts: int = NUM_EXPERTS):
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    scores_TE = torch.rand(num_tokens, experts, generator=generator)
    weights_Tk, experts_Tk = scores_TE.topk(min(TOP_K, experts), dim=-1)
    return hidden_TH, experts_Tk, weights_Tk


def pairs_sorted(experts_Tk: torch.Tensor, weights_Tk: torch.Tensor):
    experts_n = experts_Tk.reshape(-1).numpy()
    order = np.argsort(experts_n, kind="stable")
    return order // experts_Tk.shape[1], experts_n[order], weights_Tk.reshape(-1)[torch.from_numpy(order)]


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert float((found.double() - expected).abs().max()) <= TOLERANCES[dtype] * float(expected.abs().max())


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 150, 400])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_computes_what_its_formula_says(name: str, num_tokens: int, feed_forward: FeedForward) -> None:
    layer, dtype, packed = LAYER_OF[name], feed_forward.pool.dtype, feed_forward.pool.packed
    hidden_TH, experts_Tk, weights_Tk = routing(num_tokens, hidden=LAYOUTS[name].hidden_size, dtype=dtype)

    out_TH = feed_forward.partial_sums(layer, hidden_TH, *pairs_sorted(experts_Tk, weights_Tk))

    assert_close(out_TH, dense_layer(packed, layer, hidden_TH, experts_Tk, weights_Tk, dtype=dtype), dtype)


@pytest.mark.parametrize("num_tokens", [1, 5, 64])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_path_without_host_arrays_computes_the_same(name: str, num_tokens: int, feed_forward: FeedForward) -> None:
    layer, dtype, pool = LAYER_OF[name], feed_forward.pool.dtype, feed_forward.pool
    hidden_TH, experts_Tk, weights_Tk = routing(num_tokens, hidden=LAYOUTS[name].hidden_size, dtype=dtype)
    pool.start_many(FunctionId(layer, expert) for expert in range(NUM_EXPERTS))

    out_TH = feed_forward.forward_resident(layer, hidden_TH, experts_Tk, weights_Tk)

    assert_close(out_TH, dense_layer(pool.packed, layer, hidden_TH, experts_Tk, weights_Tk, dtype=dtype), dtype)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_set_of_pairs_gives_their_sum_and_rows_without_pairs_are_zero(
    data: st.DataObject, packed: PackedModel
) -> None:
    """Rows with none, one or all of the experts; the same expert twice in a row; any number of pairs."""
    name = data.draw(st.sampled_from(list(LAYOUTS)))
    layer, hidden = LAYER_OF[name], LAYOUTS[name].hidden_size
    feed_forward = FeedForward(InstancePool(packed, dtype=torch.float32))
    num_rows = data.draw(st.integers(1, 9))
    pair = st.tuples(st.integers(0, NUM_EXPERTS - 1), st.integers(0, num_rows - 1))
    pairs = sorted(data.draw(st.lists(pair, min_size=1, max_size=24)))
    x_RH = torch.randn(num_rows, hidden, generator=torch.Generator().manual_seed(3))
    weights_n = torch.linspace(0.1, 1.0, len(pairs))

    out_RH = feed_forward.partial_sums(
        layer, x_RH, np.array([row for _, row in pairs]), np.array([expert for expert, _ in pairs]), weights_n
    )

    expected_RH = torch.zeros(num_rows, hidden, dtype=torch.float64)
    for (expert, row), weight in zip(pairs, weights_n, strict=True):
        one = dense_layer(packed, layer, x_RH[row : row + 1], torch.tensor([[expert]]), weight.view(1, 1))
        expected_RH[row] += one[0]
    assert torch.allclose(out_RH.double(), expected_RH, rtol=1e-4, atol=1e-5)
    empty = sorted(set(range(num_rows)) - {row for _, row in pairs})
    assert not out_RH[empty].any()


def test_tokens_are_counted_for_each_function(packed: PackedModel) -> None:
    feed_forward = FeedForward(InstancePool(packed, dtype=torch.float32))
    hidden_TH, experts_Tk, weights_Tk = routing(20, hidden=32, dtype=torch.float32)
    expected = torch.bincount(experts_Tk.reshape(-1), minlength=NUM_EXPERTS)

    feed_forward.partial_sums(0, hidden_TH, *pairs_sorted(experts_Tk, weights_Tk))
    feed_forward.forward_resident(0, hidden_TH, experts_Tk, weights_Tk)

    assert feed_forward.pool.tokens_served(0).tolist() == (2 * expected).tolist()
    assert feed_forward.pool.tokens_served(1).tolist() == [0] * NUM_EXPERTS


def test_the_clamp_of_a_layer_is_its_own(tmp_path: Path) -> None:
    """Families may give each layer another limit."""
    loose = layout(**(GPT_OSS | {"gate_attributes": (("alpha", 1.702), ("limit", 7.0))}))
    packed = write_packed(tmp_path / "packed", [layout(**GPT_OSS), loose])
    feed_forward = FeedForward(InstancePool(packed, dtype=torch.float32))
    hidden_TH, experts_Tk, weights_Tk = routing(5, hidden=32, dtype=torch.float32, experts=4)

    for layer in (0, 1):
        out_TH = feed_forward.partial_sums(layer, hidden_TH, *pairs_sorted(experts_Tk, weights_Tk))
        assert_close(out_TH, dense_layer(packed, layer, hidden_TH, experts_Tk, weights_Tk), torch.float32)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("os:system", "must name a class of transformers, got 'os:system'"),
        ("transformers.models.gpt_oss.modeling_gpt_oss:Nobody", "names 'Nobody', which .* does not have"),
    ],
)
def test_a_gate_that_is_no_class_of_transformers_is_refused(gate: str, message: str, tmp_path: Path) -> None:
    packed = write_packed(tmp_path / "packed", [layout(gate=gate)], num_experts=1)

    with pytest.raises(UnsupportedFamilyError, match=message):
        FeedForward(InstancePool(packed, dtype=torch.float32))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("num_tokens", [2, 5, 40], ids=lambda n: f"{n}-tokens")
def test_a_row_that_is_nan_leaves_the_others_as_they_are(name: str, num_tokens: int, feed_forward: FeedForward) -> None:
    layer = LAYER_OF[name]
    hidden, dtype = LAYOUTS[name].hidden_size, feed_forward.pool.dtype
    hidden_TH, experts_Tk, weights_Tk = routing(num_tokens, hidden=hidden, dtype=dtype)
    pairs = pairs_sorted(experts_Tk, weights_Tk)
    expected_TH = feed_forward.partial_sums(layer, hidden_TH, *pairs)
    for broken in (0, num_tokens - 1):
        spoiled_TH = hidden_TH.clone()
        spoiled_TH[broken] = torch.nan
        out_TH = feed_forward.partial_sums(layer, spoiled_TH, *pairs)
        others = torch.arange(num_tokens) != broken
        assert torch.equal(out_TH[others], expected_TH[others])
