from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from moeless.core.generation import SamplingParams
from moeless.engine.transformers import sampling
from moeless.engine.transformers.randomness import keys_of, random_bits, stream_of
from moeless.engine.transformers.row_sampler import RowSampler
from moeless.engine.transformers.sampling import Vocabulary, sample

ENDING_ID = 2


def row_of(**params: Any) -> RowSampler:
    return RowSampler(SamplingParams(**({"max_tokens": 100} | params)))


def random_logits(batch: int, vocab_size: int, *, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(batch, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def naive_choices(logits: np.ndarray, params: SamplingParams, generated: list[int], prompt: list[int]) -> set[int]:
    """The token by the book, in float64; several where rounding decides."""
    scores = logits.astype(np.float64)
    for token_id, bias in params.logit_bias.items():
        scores[token_id] += bias
    if len(generated) < params.min_tokens:
        scores[ENDING_ID] = -np.inf
    for token_id in set(prompt) | set(generated):
        scores[token_id] *= params.repetition_penalty ** (-1 if scores[token_id] > 0 else 1)
    for token_id in range(len(scores)):
        count = generated.count(token_id)
        scores[token_id] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    if params.temperature == 0:
        return {int(t) for t in np.flatnonzero(scores >= scores.max() - 1e-5)}
    probs = np.exp((scores - scores.max()) / params.temperature)
    probs[probs < params.min_p * (1 - 1e-6)] = 0
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    if 0 < params.top_k < len(probs):
        probs[order[params.top_k :]] = 0
        probs /= probs.sum()
    is_likely = np.full(len(probs), params.top_p < 1)
    if params.top_p < 1:
        before = np.cumsum(probs[order]) - probs[order]
        is_likely[order] = before < params.top_p + 1e-5  # rounding may keep one more
        probs[order[1:][before[1:] >= params.top_p - 1e-5]] = 0
    assert params.seed is not None
    keys = keys_of(np.array([stream_of(params.seed)], np.uint64), np.array([len(generated)], np.uint64))
    uniform = (random_bits(np.arange(len(scores), dtype=np.uint32), keys).astype(np.float64) + 0.5) / 2**32
    noise = -np.log(-np.log1p(-uniform))
    perturbed = np.where(probs > 0, scores + params.temperature * noise, -np.inf)
    best = set(np.flatnonzero(perturbed >= perturbed.max() - 1e-4).tolist())
    with_edge = np.where((probs > 0) | is_likely, scores + params.temperature * noise, -np.inf)
    return best | {int(with_edge.argmax())}


def params_strategy(vocab_size: int) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 0.05, 0.7, 1.0, 2.0]),
            "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.01]),
            "top_k": st.sampled_from([0, 1, 5, 70, vocab_size, 10 * vocab_size]),
            "min_p": st.sampled_from([0.0, 0.0, 0.001, 0.3, 1.0]),
            "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3, 0.5]),
            "min_tokens": st.sampled_from([0, 0, 10]),
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
    token_ids = st.lists(st.integers(0, vocab_size - 1), max_size=20)
    prompts, histories = [data.draw(token_ids) for _ in many], [data.draw(token_ids) for _ in many]
    rows = [RowSampler(each, prompt=p, ending_ids={ENDING_ID}) for each, p in zip(params, prompts, strict=True)]
    for row, history in zip(rows, histories, strict=True):
        for token_id in history:
            row.commit(token_id)
    logits = random_logits(len(rows), vocab_size, seed=data.draw(st.integers(0, 1000)))
    tokens = sample(logits, rows).token_ids
    for b, token_id in enumerate(tokens):
        assert token_id in naive_choices(logits[b].numpy(), params[b], histories[b], prompts[b]), params[b]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_token_does_not_depend_on_the_rest_of_the_batch(data: st.DataObject) -> None:
    vocab_size = 300
    many = data.draw(st.lists(params_strategy(vocab_size), min_size=2, max_size=6))
    # Few distinct values: ties must fall the same way in every company.
    logits = random_logits(len(many), vocab_size).round()
    together = sample(logits, [row_of(**each) for each in many]).token_ids
    for b, each in enumerate(many):
        alone = sample(logits[b : b + 1], [row_of(**each)]).token_ids
        assert alone[0] == together[b]


def test_tokens_that_tie_with_the_last_one_kept_are_kept() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]]).expand(400, -1)
    for filters in ({"top_k": 2}, {"top_p": 0.6}):
        tokens = sample(logits, [row_of(seed=seed, **filters) for seed in range(400)]).token_ids
        assert set(tokens) == {0, 1, 2, 3}


def test_a_nucleus_wider_than_the_tokens_looked_at_first_is_found() -> None:
    logits = torch.zeros(1, 5000)
    logits[0, 4000:] = -0.5
    rows = [row_of(seed=seed, top_p=0.5) for seed in range(500)]
    tokens = sample(logits.expand(500, -1), rows).token_ids
    assert max(tokens) < 4000
    assert len(set(tokens)) > 400


def test_sampled_tokens_follow_the_distribution() -> None:
    logits = random_logits(1, 40, scale=1.5)
    tokens = sample(logits.expand(40_000, -1), [row_of(seed=seed) for seed in range(40_000)]).token_ids
    seen = torch.bincount(torch.tensor(tokens), minlength=40) / 40_000
    assert (seen - logits[0].softmax(dim=-1)).abs().max() < 0.01


def test_a_seed_gives_the_same_token_again_and_no_seed_does_not_repeat() -> None:
    logits = random_logits(1, 5000, scale=0.1).expand(20, -1)
    seeded = sample(logits, [row_of(seed=3) for _ in range(20)]).token_ids
    unseeded = sample(logits, [row_of() for _ in range(20)]).token_ids
    assert len(set(seeded)) == 1
    assert len(set(unseeded)) > 10


def test_greedy_takes_the_largest_logit_and_leaves_the_logits_alone() -> None:
    logits = random_logits(4, 50)
    before = logits.clone()
    sampled = sample(logits, [row_of(temperature=0.0, presence_penalty=1.0 * (b % 2)) for b in range(4)])
    assert sampled.token_ids == before.argmax(dim=-1).tolist()
    assert sampled.logprobs is None
    assert torch.equal(logits, before)


def test_penalties_count_generated_tokens_as_openai_defines_them() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0]])
    row = row_of(temperature=0.0, frequency_penalty=0.4, presence_penalty=0.3)
    picked = []
    for _ in range(6):
        picked += sample(logits, [row]).token_ids
        row.commit(picked[-1])
    # 0 falls to 4.3, then 3.9; 1 then leads with 4.0 and falls to 3.3; 0 leads with 3.9 ...
    assert picked == [0, 0, 1, 0, 0, 1]


def test_a_token_with_a_bias_of_minus_100_is_never_drawn() -> None:
    logits = torch.zeros(1, 4).expand(200, -1)
    tokens = sample(logits, [row_of(logit_bias={1: -100.0}, seed=seed) for seed in range(200)]).token_ids
    assert set(tokens) == {0, 2, 3}


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    logits = random_logits(3, 30)
    rows = [
        row_of(temperature=0.3, logit_bias={4: 50.0}, logprobs=2, seed=1),
        row_of(temperature=0.0),
        row_of(temperature=0.0, logprobs=5),
    ]
    sampled = sample(logits, rows)
    tokens, raw = sampled.token_ids, sampled.logprobs
    assert raw is not None
    assert raw[1] is None
    expected = logits.log_softmax(dim=-1)
    for b, count in ((0, 2), (2, 5)):
        entry = raw[b]
        assert entry is not None
        assert entry.token_id == tokens[b]
        assert entry.rank == int((expected[b] > expected[b, tokens[b]]).sum()) + 1
        assert entry.logprob == pytest.approx(float(expected[b, entry.token_id]), abs=1e-6)
        top = expected[b].topk(count)
        assert entry.top_ids == top.indices.tolist()
        assert entry.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-6)
    first = raw[0]
    assert first is not None
    assert first.token_id == 4


def test_more_logprobs_than_tokens_are_all_of_them() -> None:
    raw = sample(random_logits(1, 3), [row_of(temperature=0.0, logprobs=20)]).logprobs
    assert raw is not None
    assert raw[0] is not None
    assert len(raw[0].top_ids) == 3


@pytest.mark.parametrize("temperature", [1e-6, 1e-20, 1e-46, 5e-324])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 5, "min_p": 0.1}])
def test_a_tiny_temperature_is_greedy(temperature: float, filters: dict[str, Any]) -> None:
    logits = random_logits(8, 100)
    rows = [row_of(temperature=temperature, seed=b, **filters) for b in range(8)]
    sampled = sample(logits, rows)
    assert sampled.token_ids == logits.argmax(dim=-1).tolist()
    assert not sampled.errors


@pytest.mark.parametrize("temperature", [1e20, 1.7e308])
def test_a_huge_temperature_draws_any_token_that_is_allowed(temperature: float) -> None:
    logits = random_logits(1, 20).expand(400, -1).clone()
    logits[:, 7] = -math.inf
    tokens = sample(logits, [row_of(temperature=temperature, seed=seed) for seed in range(400)]).token_ids
    assert set(tokens) == set(range(20)) - {7}


BROKEN = {
    "one NaN": lambda row: row.index_fill_(0, torch.tensor([3]), math.nan),
    "all NaN": lambda row: row.fill_(math.nan),
    "infinity": lambda row: row.index_fill_(0, torch.tensor([3]), math.inf),
    "nothing allowed": lambda row: row.fill_(-math.inf),
}


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"seed": 1}, {"seed": 1, "top_p": 0.9, "logprobs": 2}])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_row_that_is_not_finite_fails_alone(kind: str, params: dict[str, Any]) -> None:
    logits = random_logits(3, 50)
    expected = sample(logits, [row_of(**params) for _ in range(3)])
    BROKEN[kind](logits[1])
    sampled = sample(logits, [row_of(**params) for _ in range(3)])
    assert list(sampled.errors) == [1]
    assert "not finite" in sampled.errors[1]
    for b in (0, 2):
        assert sampled.token_ids[b] == expected.token_ids[b]
        if expected.logprobs is not None:
            assert sampled.logprobs is not None
            assert sampled.logprobs[b] == expected.logprobs[b]
    assert 0 <= sampled.token_ids[1] < 50


def test_penalties_that_overflow_fail_their_row_alone() -> None:
    logits = torch.full((2, 10), 30.0)
    rows = [row_of(repetition_penalty=1e-40, seed=1), row_of(seed=1)]
    rows[0].commit(4)
    sampled = sample(logits, rows)
    assert list(sampled.errors) == [0]


def test_a_fault_in_one_rows_state_is_that_rows_alone(caplog: pytest.LogCaptureFixture) -> None:
    logits = random_logits(3, 50)
    params: dict[str, Any] = {"seed": 5, "logprobs": 1}
    expected = sample(logits, [row_of(**params) for _ in range(3)])
    rows = [row_of(**params), row_of(logit_bias={50: 1.0}), row_of(**params)]  # no such token
    sampled = sample(logits, rows)
    assert list(sampled.errors) == [1]
    assert "sampling failed: " in sampled.errors[1]
    assert sampled.logprobs is not None
    assert expected.logprobs is not None
    for b in (0, 2):
        assert (sampled.token_ids[b], sampled.logprobs[b]) == (expected.token_ids[b], expected.logprobs[b])
    assert "sampling failed" in caplog.text


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {}, {"top_k": 3}, {"temperature": 0.0, "logit_bias": {1: 1.0}}]
)
@pytest.mark.parametrize("known", [set(range(12)), {*range(5), *range(7, 12), 15}])
def test_ids_without_a_token_are_never_sampled(params: dict[str, Any], known: set[int]) -> None:
    logits = random_logits(1, 20).expand(300, -1).clone()
    logits[:, sorted(set(range(20)) - known)] += 50
    rows = [row_of(**params) for _ in range(300)]
    sampled = sample(logits, rows, Vocabulary(known | {99}, 20))
    assert set(sampled.token_ids) <= known
    assert not sampled.errors


def test_min_p_leaves_out_what_is_less_likely_than_its_share_of_the_likeliest() -> None:
    logits = torch.tensor([1.0, 0.5, 0.24, 0.1]).log().expand(400, -1)
    tokens = sample(logits, [row_of(min_p=0.25, seed=seed) for seed in range(400)]).token_ids
    assert set(tokens) == {0, 1}
    warm = sample(logits, [row_of(min_p=0.25, temperature=2.0, seed=seed) for seed in range(400)]).token_ids
    assert set(warm) == {0, 1, 2, 3}


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    logits = random_logits(1, 40)
    prompt, generated = [3, 3, 9, 17], [9, 25]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + generated]), logits)
    row = RowSampler(SamplingParams(max_tokens=9, repetition_penalty=1.7), prompt=prompt)
    for token_id in generated:
        row.commit(token_id)
    adjusted = logits[0].clone()
    row.adjust(adjusted)
    assert torch.equal(adjusted, expected[0])


def test_tokens_that_end_a_sequence_wait_for_min_tokens() -> None:
    logits = torch.zeros(1, 10)
    logits[0, ENDING_ID] = 9.0
    row = RowSampler(SamplingParams(max_tokens=9, temperature=0.0, min_tokens=2), ending_ids={ENDING_ID})
    tokens = []
    for _ in range(3):
        tokens += sample(logits, [row]).token_ids
        row.commit(tokens[-1])
    assert ENDING_ID not in tokens[:2]
    assert tokens[2] == ENDING_ID


@pytest.mark.parametrize("params", [{}, {"top_p": 0.8}, {"top_k": 9}, {"min_p": 0.05}])
def test_an_accelerator_draws_the_same_tokens(params: dict[str, Any]) -> None:
    logits = random_logits(200, 3000)
    rows = [row_of(seed=seed, **params) for seed in range(200)]
    keys = keys_of(np.array([row.stream for row in rows], np.uint64), np.zeros(200, np.uint64))
    temperature = np.ones(200, np.float32)
    floors = sampling._floors(logits, rows, logits.amax(dim=-1).numpy(), temperature)
    on_device = sampling._argmax_with_noise_on_device(logits, keys, temperature, floors)
    assert on_device.tolist() == sample(logits, rows).token_ids


def test_noise_in_the_last_bits_of_the_logits_seldom_changes_a_token() -> None:
    exact = random_logits(2000, 1000, scale=2.0)
    shaken = exact * (1 + (torch.rand(exact.shape, generator=torch.Generator().manual_seed(1)) - 0.5) * 2.0**-7)
    rows = [row_of(seed=seed) for seed in range(2000)]
    first, second = sample(exact, rows).token_ids, sample(shaken, rows).token_ids
    assert sum(a != b for a, b in zip(first, second, strict=True)) < 0.02 * 2000
