"""Every family against transformers' own model: logits, and the tokens that our engine generates.

Experts run in the engine's process, or on two workers in processes of their own, one reached through shared memory
and one over TCP.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moeless.core.generation import GenerationDelta, GenerationRequest, SamplingParams
from moeless.core.routing_table import LOCAL_WORKER, spread_evenly
from moeless.dispatch.config import DispatchConfig
from moeless.dispatch.dispatcher import Dispatcher
from moeless.engine.config import EngineConfig
from moeless.engine.transformers.build import build_engine
from moeless.engine.transformers.experts import attach_dispatcher, register_experts
from moeless.functions.feed_forward import FeedForward
from moeless.functions.pool import InstancePool
from moeless.packages.backbone import load_backbone
from moeless.packages.pack import pack_checkpoint
from moeless.packages.packed_model import PackedModel
from tests.families import FAMILIES, PAD_ID, PARITY_FAMILIES, VOCAB_SIZE, make_checkpoint, make_tokenizer
from tests.support.workers import WorkerProcess

IN_PROCESS, REMOTE = "in process", "on two workers"
TRANSPORTS = {"near": "shm", "far": "tcp"}
PROMPT_LENGTHS = (3, 14, 41)
NUM_NEW_TOKENS = 12
SAME_LOGITS = 1e-4
SAME_TOKEN = 1e-3
"""Tolerance of "the same greedy token": to be this close below the reference's largest logit."""


@dataclass(frozen=True)
class Family:
    packed: PackedModel
    reference: PreTrainedModel
    backbone: PreTrainedModel


@pytest.fixture(scope="session")
def load_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    folder: Path = tmp_path_factory.mktemp("parity")
    register_experts()

    @cache
    def load(family: str) -> Family:
        checkpoint = make_checkpoint(family, folder / family / "checkpoint")
        pack_checkpoint(checkpoint, folder / family / "packed")
        packed = PackedModel.open(folder / family / "packed")
        reference = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager")
        return Family(packed, reference, load_backbone(packed, dtype=torch.float32))

    return load


@pytest.fixture(scope="session")
def worker_processes() -> Iterator[dict[str, WorkerProcess]]:
    """Each hosts a worker for every family."""
    with WorkerProcess() as near, WorkerProcess() as far:
        yield {"near": near, "far": far}


@pytest.fixture
def place(worker_processes: dict[str, WorkerProcess]) -> Iterator[Callable[[Family, str], Dispatcher]]:
    """Lets a family's experts run in process or on the workers."""
    made: list[Dispatcher] = []

    def place_experts(family: Family, where: str) -> Dispatcher:
        packed = family.packed
        names = (LOCAL_WORKER,)
        if where == REMOTE:
            names = tuple(f"{name}-{packed.manifest.model_type}" for name in TRANSPORTS)
        table = spread_evenly(
            num_layers=packed.manifest.num_moe_layers, num_experts=packed.manifest.num_experts, workers=names
        )
        pool = InstancePool(packed, dtype=torch.float32)
        dispatcher = Dispatcher(FeedForward(pool), table, DispatchConfig(call_timeout_s=60.0))
        made.append(dispatcher)
        if where == REMOTE:
            channels = {}
            for worker, (name, transport) in zip(names, TRANSPORTS.items(), strict=True):
                theirs = [f for f in packed.functions if table.instances[f][0].worker == worker]
                worker_processes[name].host(worker, packed, theirs)
                channels[worker] = worker_processes[name].open(worker, transport=transport)
            dispatcher.set_channels(channels)
        attach_dispatcher(family.backbone, dispatcher)
        return dispatcher

    yield place_experts
    for dispatcher in made:
        dispatcher.close()


def assert_ran(where: str, dispatcher: Dispatcher) -> None:
    """Every expert ran where it was meant to, and the backbone's process held those alone that ran there."""
    assert (dispatcher.metrics.retries, dispatcher.metrics.fallbacks) == (0, 0)
    if where == REMOTE:
        assert len(dispatcher.metrics.tokens_per_worker) == len(TRANSPORTS)
        assert LOCAL_WORKER not in dispatcher.metrics.tokens_per_worker
        assert dispatcher.local.pool.stats().cold_starts == 0
    else:
        assert set(dispatcher.metrics.tokens_per_worker) == {LOCAL_WORKER}


CASES = [(family, IN_PROCESS) for family in FAMILIES] + [(family, REMOTE) for family in PARITY_FAMILIES]


@pytest.mark.parametrize(("name", "where"), CASES, ids=[f"{name}, {where}" for name, where in CASES])
def test_logits_are_those_of_transformers(
    name: str, where: str, load_family: Callable[[str], Family], place: Callable[[Family, str], Dispatcher]
) -> None:
    family = load_family(name)
    dispatcher = place(family, where)
    tokens = torch.randint(PAD_ID + 1, VOCAB_SIZE, (2, 28), generator=torch.Generator().manual_seed(1))

    found, expected = (prefill_and_decode(model, tokens) for model in (family.backbone, family.reference))

    assert torch.isfinite(expected).all()
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < SAME_LOGITS
    assert_ran(where, dispatcher)


@pytest.mark.parametrize("where", [IN_PROCESS, REMOTE])
@pytest.mark.parametrize("name", PARITY_FAMILIES)
def test_greedy_tokens_are_those_of_transformers(
    name: str, where: str, load_family: Callable[[str], Family], place: Callable[[Family, str], Dispatcher]
) -> None:
    family = load_family(name)
    dispatcher = place(family, where)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(PAD_ID + 1, VOCAB_SIZE, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]

    generated = generate(family.backbone, prompts)

    for prompt, tokens in zip(prompts, generated, strict=True):
        assert len(tokens) == NUM_NEW_TOKENS
        with torch.inference_mode():
            logits = family.reference(torch.tensor([prompt + tokens[:-1]]), use_cache=False).logits[0]
        logits = logits[len(prompt) - 1 :]
        behind = logits.max(dim=-1).values - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert float(behind.max()) < SAME_TOKEN
    assert_ran(where, dispatcher)


@torch.inference_mode()
def prefill_and_decode(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of `tokens`, the last four given one by one."""
    split = tokens.shape[1] - 4
    step = model(tokens[:, :split], use_cache=True)
    logits = [step.logits]
    for position in range(split, tokens.shape[1]):
        step = model(tokens[:, position : position + 1], past_key_values=step.past_key_values, use_cache=True)
        logits.append(step.logits)
    return torch.cat(logits, dim=1)


def generate(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """The greedy tokens of our engine, all prompts at once."""
    deltas: queue.SimpleQueue[GenerationDelta] = queue.SimpleQueue()
    config = EngineConfig(
        kv_cache_bytes=1 << 20, page_size=8, max_batch_tokens=32, max_running=4, max_model_len=96, num_threads=1
    )
    engine = build_engine(model, make_tokenizer(), config, lambda step: [deltas.put(delta) for delta in step])
    engine.start()
    try:
        sampling = SamplingParams(max_tokens=NUM_NEW_TOKENS, temperature=0.0, logprobs=0, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            engine.submit(GenerationRequest(request_id=str(index), prompt_token_ids=prompt, sampling=sampling))
        generated: list[list[int]] = [[] for _ in prompts]
        running = len(prompts)
        while running:
            delta = deltas.get(timeout=60)
            assert delta.error is None
            generated[int(delta.request_id)] += [token.token_id for token in delta.logprobs]
            running -= delta.finish_reason is not None
    finally:
        engine.stop()
    return generated
