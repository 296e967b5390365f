from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.core.generation import SamplingParams
from moeless.engine.transformers.randomness import uniforms
from moeless.engine.transformers.sampling import RowSampler, sample


def row_of(**params: Any) -> RowSampler:
    return RowSampler(SamplingParams(**({"max_tokens": 100} | params)))


def random_logits(batch: int, vocab_size: int, *, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(batch, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def naive_choices(logits: np.ndarray, params: SamplingParams, generated: list[int], row: RowSampler) -> set[int]:
    """The token by the book, in float64; several if the random number is within rounding of a boundary."""
    scores = logits.astype(np.float64)
    for token_id, bias in params.logit_bias.items():
        scores[token_id] += bias
    for token_id in range(len(scores)):
        count = generated.count(token_id)
        scores[token_id] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    if params.temperature == 0:
        return {int(t) for t in np.flatnonzero(scores >= scores.max() - 1e-5)}
    weights = np.exp((scores - scores.max()) / params.temperature)
    probs = weights / weights.sum()
    order = np.argsort(-probs, kind="stable")
    if 0 < params.top_k < len(probs):
        probs[order[params.top_k :]] = 0
        probs /= probs.sum()
    if params.top_p < 1:
        before = np.cumsum(probs[order]) - probs[order]
        probs[order[1:][before[1:] >= params.top_p]] = 0
        probs /= probs.sum()
    uniform = uniforms(np.array([row.stream], dtype=np.uint64), np.array([row.position], dtype=np.uint64))[0]
    ends = np.cumsum(probs)
    near = np.searchsorted(ends, [max(0.0, uniform - 1e-5), min(uniform + 1e-5, ends[-1] - 1e-12)], side="right")
    return {int(i) for i in range(near[0], near[1] + 1) if probs[i] > 0}


def params_strategy(vocab_size: int) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 0.05, 0.7, 1.0, 2.0]),
            "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.01]),
            "top_k": st.sampled_from([0, 1, 5, 70, vocab_size, 10 * vocab_size]),
            "seed": st.integers(-(2**40), 2**70),
            "presence_penalty": st.sampled_from([0.0, 1.5, -2.0]),
            "frequency_penalty": st.sampled_from([0.0, 0.5, -1.0]),
            "logprobs": st.sampled_from([None, 0, 3]),
            "logit_bias": st.dictionaries(st.integers(0, vocab_size - 1), st.floats(-100, 100, width=32), max_size=3),
        }
    )


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from([7, 256, 300, 1500]))
def test_every_row_gets_the_token_that_its_own_parameters_give(data: st.DataObject, vocab_size: int) -> None:
    many = data.draw(st.lists(params_strategy(vocab_size), min_size=1, max_size=5))
    params = [SamplingParams(max_tokens=100, **each) for each in many]
    histories = [data.draw(st.lists(st.integers(0, vocab_size - 1), max_size=20)) for _ in many]
    rows = [RowSampler(each) for each in params]
    for row, history in zip(rows, histories, strict=True):
        for token_id in history:
            row.commit(token_id)
    logits = random_logits(len(rows), vocab_size, seed=data.draw(st.integers(0, 1000)))
    tokens, _ = sample(logits, rows)
    for b, token_id in enumerate(tokens.tolist()):
        choices = naive_choices(logits[b].numpy(), params[b], histories[b], rows[b])
        assert token_id in choices, params[b]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_token_does_not_depend_on_the_rest_of_the_batch(data: st.DataObject) -> None:
    vocab_size = 300
    many = data.draw(st.lists(params_strategy(vocab_size), min_size=2, max_size=6))
    # Few distinct values: ties must fall the same way in every company.
    logits = random_logits(len(many), vocab_size).round()
    together, _ = sample(logits, [row_of(**each) for each in many])
    for b, each in enumerate(many):
        alone, _ = sample(logits[b : b + 1], [row_of(**each)])
        assert alone[0] == together[b]


def test_tokens_that_tie_with_the_last_one_kept_are_kept() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]]).expand(400, -1)
    for filters in ({"top_k": 2}, {"top_p": 0.6}):
        tokens, _ = sample(logits, [row_of(seed=seed, **filters) for seed in range(400)])
        assert set(tokens.tolist()) == {0, 1, 2, 3}


def test_a_nucleus_wider_than_the_tokens_looked_at_first_is_found() -> None:
    logits = torch.zeros(1, 5000)
    logits[0, 4000:] = -0.5
    rows = [row_of(seed=seed, top_p=0.5) for seed in range(500)]
    tokens, _ = sample(logits.expand(500, -1), rows)
    assert int(tokens.max()) < 4000
    assert len(set(tokens.tolist())) > 400


def test_sampled_tokens_follow_the_distribution() -> None:
    logits = random_logits(1, 40, scale=1.5)
    tokens, _ = sample(logits.expand(40_000, -1), [row_of(seed=seed) for seed in range(40_000)])
    seen = torch.bincount(tokens, minlength=40) / 40_000
    assert (seen - logits[0].softmax(dim=-1)).abs().max() < 0.01


def test_a_seed_gives_the_same_token_again_and_no_seed_does_not_repeat() -> None:
    logits = random_logits(1, 5000, scale=0.1).expand(20, -1)
    seeded, _ = sample(logits, [row_of(seed=3) for _ in range(20)])
    unseeded, _ = sample(logits, [row_of() for _ in range(20)])
    assert len(set(seeded.tolist())) == 1
    assert len(set(unseeded.tolist())) > 10


def test_greedy_takes_the_largest_logit_and_leaves_the_logits_alone() -> None:
    logits = random_logits(4, 50)
    before = logits.clone()
    tokens, logprobs = sample(logits, [row_of(temperature=0.0, presence_penalty=1.0 * (b % 2)) for b in range(4)])
    assert tokens.tolist() == before.argmax(dim=-1).tolist()
    assert logprobs is None
    assert torch.equal(logits, before)


def test_penalties_count_generated_tokens_as_openai_defines_them() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0]])
    row = row_of(temperature=0.0, frequency_penalty=0.4, presence_penalty=0.3)
    picked = []
    for _ in range(6):
        tokens, _ = sample(logits, [row])
        picked.append(int(tokens[0]))
        row.commit(picked[-1])
    # 0 falls to 4.3, then 3.9; 1 then leads with 4.0 and falls to 3.3; 0 leads with 3.9 ...
    assert picked == [0, 0, 1, 0, 0, 1]


def test_a_token_with_a_bias_of_minus_100_is_never_drawn() -> None:
    logits = torch.zeros(1, 4).expand(200, -1)
    tokens, _ = sample(logits, [row_of(logit_bias={1: -100.0}, seed=seed) for seed in range(200)])
    assert set(tokens.tolist()) == {0, 2, 3}


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    logits = random_logits(3, 30)
    rows = [
        row_of(temperature=0.3, logit_bias={4: 50.0}, logprobs=2, seed=1),
        row_of(temperature=0.0),
        row_of(temperature=0.0, logprobs=5),
    ]
    tokens, raw = sample(logits, rows)
    assert raw is not None
    assert raw[1] is None
    expected = logits.log_softmax(dim=-1)
    for b, count in ((0, 2), (2, 5)):
        entry = raw[b]
        assert entry is not None
        assert entry.token_id == int(tokens[b])
        assert entry.logprob == pytest.approx(float(expected[b, entry.token_id]), abs=1e-6)
        top = expected[b].topk(count)
        assert entry.top_ids == top.indices.tolist()
        assert entry.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-6)
    first = raw[0]
    assert first is not None
    assert first.token_id == 4


def test_more_logprobs_than_tokens_are_all_of_them() -> None:
    _, raw = sample(random_logits(1, 3), [row_of(temperature=0.0, logprobs=20)])
    assert raw is not None
    assert raw[0] is not None
    assert len(raw[0].top_ids) == 3


def test_a_tiny_temperature_is_greedy() -> None:
    logits = random_logits(8, 100)
    tokens, _ = sample(logits, [row_of(temperature=1e-6, seed=b) for b in range(8)])
    assert tokens.tolist() == logits.argmax(dim=-1).tolist()
