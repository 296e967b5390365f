"""lm-eval's log-likelihood tasks against the gateway, and the model's own log-likelihoods by transformers."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from moeless.core.generation import ModelInfo
from moeless.engine.config import EngineConfig
from moeless.engine.local_client import LocalEngineClient
from moeless.engine.transformers.build import build_engine
from moeless.gateway import GatewayConfig, create_app
from tests.families import VOCAB_SIZE, make_model, make_tokenizer
from tests.unit.gateway.support import Gateway, gateway_for

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]

MODEL_ID = "tiny-mixtral"
QUESTIONS = [
    {"question": "hello there", "choices": [" the sea", " the quick brown fox", " lazy"], "answer": 1},
    {"question": "the quick brown", "choices": [" dog", " fox jumps over", " hello"], "answer": 0},
    {"question": "a b c", "choices": [" d", " e f", " g h i"], "answer": 2},
    {"question": "over the lazy dog", "choices": [" and", " so it was", " no"], "answer": 0},
]
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """The reference: a model of its own, since an engine changes how its model attends."""
    return eager_model()


def eager_model() -> PreTrainedModel:
    model = make_model("mixtral")
    model.set_experts_implementation("eager")
    return model


@pytest.fixture(scope="module")
async def gateway(anyio_backend: str, folder: Path) -> AsyncIterator[Gateway]:
    config = EngineConfig(kv_cache_bytes=1 << 22, max_running=8, max_batch_tokens=32, max_model_len=256, num_threads=1)
    engine = build_engine(eager_model(), AutoTokenizer.from_pretrained(folder), config)
    info = ModelInfo(
        model_id=MODEL_ID, created_unix_s=1_700_000_000, max_context_tokens=256, vocab_size=VOCAB_SIZE,
        tokenizer_path=str(folder), num_layers=2, num_experts=4, top_k=2, hidden_size=32, dtype="float32", device="cpu",
    )  # fmt: skip
    client = LocalEngineClient(engine, info)
    engine.start()
    try:
        async with gateway_for(create_app(client, GatewayConfig())) as gateway:
            yield gateway
    finally:
        engine.stop()


def log_likelihood(model: PreTrainedModel, context: list[int], continuation: list[int]) -> float:
    """Compute a continuation's log-likelihood by one pass of transformers."""
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(torch.tensor([context + continuation])).logits[0].float(), dim=-1)
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    return sum(float(logprobs[place, token]) for place, token in zip(places, continuation, strict=True))


async def test_lm_eval_finds_the_models_own_log_likelihoods(
    gateway: Gateway, model: PreTrainedModel, folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "tiny_choice.yaml").write_text(TASK.format(data=data))
    arguments = f"model={MODEL_ID},base_url={gateway.address}/v1/completions,tokenizer={folder},num_concurrent=1"
    run = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments,
        "--tasks", "tiny_choice", "--include_path", str(tmp_path), "--batch_size", "2",
        "--output_path", str(tmp_path / "results"), "--log_samples",
        cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env=os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    output = (await run.communicate())[0].decode()
    assert run.returncode == 0, output

    tokenizer = AutoTokenizer.from_pretrained(folder)
    [samples_file] = (tmp_path / "results").rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in samples_file.read_text().splitlines()]
    assert len(samples) == len(QUESTIONS)
    num_right = 0
    for sample in samples:
        document = sample["doc"]
        context = tokenizer(document["question"])["input_ids"]
        expected = []
        for choice in document["choices"]:
            whole = tokenizer(document["question"] + choice)["input_ids"]
            expected.append(log_likelihood(model, context, whole[len(context) :]))
        found = [float(response[0][0]) for response in sample["resps"]]
        assert found == pytest.approx(expected, abs=2e-3)
        num_right += expected.index(max(expected)) == document["answer"]
    [results_file] = (tmp_path / "results").rglob("results_*.json")
    accuracy = json.loads(results_file.read_text())["results"]["tiny_choice"]["acc,none"]
    assert accuracy == pytest.approx(num_right / len(QUESTIONS))


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_a_scored_prompt_has_the_models_log_probabilities(
    gateway: Gateway, model: PreTrainedModel, max_tokens: int
) -> None:
    token_ids = list(range(10, 60))
    body = {
        "model": MODEL_ID, "prompt": token_ids, "max_tokens": max_tokens, "temperature": 0,
        "echo": True, "logprobs": 2, "prompt_logprobs": 1,
    }  # fmt: skip
    [choice] = (await gateway.http.post("/v1/completions", json=body)).json()["choices"]
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(torch.tensor([token_ids])).logits[0].float(), dim=-1)
    expected = [float(logprobs[place - 1, token_ids[place]]) for place in range(1, len(token_ids))]
    scored = choice["logprobs"]["token_logprobs"]
    assert scored[0] is None
    assert scored[1 : len(token_ids)] == pytest.approx(expected, abs=2e-3)
    assert len(scored) == len(token_ids) + max_tokens
    rows = choice["prompt_logprobs"]
    assert rows[0] is None
    for place, row in enumerate(rows[1:], start=1):
        entry = row[str(token_ids[place])]
        assert entry["logprob"] == pytest.approx(expected[place - 1], abs=2e-3)
        assert entry["rank"] == 1 + int((logprobs[place - 1] > logprobs[place - 1, token_ids[place]]).sum())


async def test_a_scored_prompt_has_an_entry_for_the_token_that_ends_it(gateway: Gateway, folder: Path) -> None:
    eos_id = AutoTokenizer.from_pretrained(folder).eos_token_id
    body = {
        "model": MODEL_ID, "prompt": [10, 11, 12], "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1,
        "logit_bias": {str(eos_id): 100},
    }  # fmt: skip
    [choice] = (await gateway.http.post("/v1/completions", json=body)).json()["choices"]
    assert choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["token_logprobs"]) == 4
