from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from moeless.core.errors import RequestError
from moeless.core.generation import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("min_p", math.nan),
        ("presence_penalty", math.nan),
        ("frequency_penalty", math.inf),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("min_tokens", -1),
        ("min_tokens", 11),
        ("logprobs", -1),
        ("prompt_logprobs", -1),
        ("stop_token_ids", (3, -1)),
        ("logit_bias", {1: math.nan}),
    ],
)
def test_a_value_that_no_model_could_serve_is_refused_by_field(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^{field} must be ") as refused:
        SamplingParams(**({"max_tokens": 10} | {field: value}))
    assert refused.value.param == field


def test_the_values_at_the_edges_are_accepted() -> None:
    params = SamplingParams(
        max_tokens=0,
        temperature=1e-46,
        top_p=1.0,
        min_p=1.0,
        repetition_penalty=1e-3,
        min_tokens=0,
        prompt_logprobs=0,
        stop_token_ids=(0,),
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
