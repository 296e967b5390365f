"""Figures of the model card: held-out perplexity, routing by domain, answers to sums, samples of text.

Called by __main__. Measures the checkpoint as shipped, in bfloat16.
Shapes: L = layers, E = experts, K = experts per token, N = tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from moeless.core.arrays import Float64Array
from scripts.train_bundled_model.corpus import Document, Sum, draw_sum
from scripts.train_bundled_model.fast_moe import FAST_EXPERTS, chunked_cross_entropy, register_fast_experts
from scripts.train_bundled_model.tokens import END, encode_documents
from scripts.train_bundled_model.train import backbone_forward

_NUM_SUMS = 50
_SAMPLE_TOKENS = 110
PROMPTS: tuple[tuple[str, str, bool], ...] = (
    ("python", "class ConfigReader:\n    def read(self, path):", False),
    ("python", "Write Python: Return the sum of two numbers.", True),
    ("english", "The following methods are supported by", False),
    ("english", "What does `json.dumps` do?", True),
    ("drama", "KING RICHARD II:\n", False),
    ("drama", "Continue the scene:\n\nROMEO:\nWhat light is that?", True),
    ("arithmetic", "What is 12 + 7?", True),
    ("arithmetic", "Tom has 5 apples and buys 3 more. How many apples does he have?", True),
    ("italian", "Don Abbondio", False),
    ("italian", "Continua: Lucia guardò la madre.", True),
)
"""Domain, text, and whether it is asked through the chat template."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainScore:
    num_tokens: int
    num_bytes: int
    perplexity: float
    bits_per_byte: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    scores: Mapping[str, DomainScore]
    loads: Mapping[str, Float64Array]
    """Share of a domain's assignments by layer and expert, shape (L, E); rows sum to 1."""
    sum_accuracy: Mapping[str, float]
    """Share of sums never trained on that are answered rightly, by the size of their numbers."""
    samples: Sequence[tuple[str, str, str]]
    """Domain, prompt, answer."""


def evaluate_model(path: Path, held_out: Mapping[str, Sequence[Document]], *, seed: int) -> Evaluation:
    """Measure the checkpoint in `path` on documents that it was not trained on."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = Qwen3MoeForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    torch.manual_seed(seed)
    samples = [(domain, text, _generate(model, tokenizer, text, chat=chat)) for domain, text, chat in PROMPTS]
    accuracy = {
        f"below {limit}": _sum_accuracy(model, tokenizer, limit=limit, rng=random.Random(seed)) for limit in (100, 1000)
    }
    register_fast_experts()
    model.set_experts_implementation(FAST_EXPERTS)
    scores, loads = {}, {}
    for name, documents in held_out.items():
        plain = [document for document in documents if not document.is_chat]
        scores[name], loads[name] = _score(model, tokenizer, plain)
    return Evaluation(scores=scores, loads=loads, sum_accuracy=accuracy, samples=samples)


@torch.no_grad()
def _score(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]
) -> tuple[DomainScore, Float64Array]:
    """Perplexity over windows of the model's whole context, and the load of every expert."""
    stream = encode_documents(tokenizer, documents)
    config = model.config
    nats, num_tokens = 0.0, 0
    counts_LE = np.zeros((config.num_hidden_layers, config.num_experts))
    for start in range(0, len(stream.ids) - 1, config.max_position_embeddings):
        window = stream.ids[start : start + config.max_position_embeddings + 1]
        ids = torch.from_numpy(window).long()
        hidden, _, chosen_LNK = backbone_forward(model, ids[:-1].unsqueeze(0))
        loss = chunked_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, ids[1:])
        nats += loss.item() * (len(ids) - 1)
        num_tokens += len(ids) - 1
        for layer, chosen in enumerate(chosen_LNK):
            counts_LE[layer] += np.bincount(chosen.flatten().numpy(), minlength=config.num_experts)
    score = DomainScore(
        num_tokens=num_tokens,
        num_bytes=stream.num_bytes,
        perplexity=math.exp(nats / num_tokens),
        bits_per_byte=nats / math.log(2) / stream.num_bytes,
    )
    return score, counts_LE / counts_LE.sum(axis=-1, keepdims=True)


@torch.no_grad()
def _generate(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, *, chat: bool) -> str:
    ids = _prompt_ids(tokenizer, text, chat=chat)
    out = model.generate(ids, do_sample=True, temperature=0.7, top_p=0.95, top_k=0, max_new_tokens=_SAMPLE_TOKENS)
    answer: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return answer


def _prompt_ids(tokenizer: PreTrainedTokenizerFast, text: str, *, chat: bool) -> torch.Tensor:
    if chat:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        text = tokenizer.bos_token + text
    return torch.tensor([tokenizer.encode(text, add_special_tokens=False)])


@torch.no_grad()
def _sum_accuracy(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, *, limit: int, rng: random.Random
) -> float:
    """Greedy answers to sums kept out of the training, with numbers below `limit` and at least a tenth of it."""
    right = 0
    for _ in range(_NUM_SUMS):
        exercise = _held_out_sum(limit, rng)
        ids = _prompt_ids(tokenizer, exercise.asked, chat=True)
        out = model.generate(ids, do_sample=False, temperature=None, top_p=None, max_new_tokens=16)
        answer = tokenizer.decode(out[0, ids.shape[1] :]).split(END)[0]
        right += answer == f"{exercise.solved}."
    return right / _NUM_SUMS


def _held_out_sum(limit: int, rng: random.Random) -> Sum:
    while True:
        drawn = draw_sum(rng)
        largest = max(drawn.left, drawn.right)
        if drawn.sign in "+-" and drawn.held_out and limit // 10 <= largest < limit:
            return drawn


def entropy_bits(load_E: Float64Array) -> float:
    """Entropy of the choice of expert; log2(E) when every expert is chosen as often."""
    chosen = load_E[load_E > 0]
    return float(-(chosen * np.log2(chosen)).sum())


def mean_divergence_bits(loads: Mapping[str, Float64Array], layer: int) -> float:
    """Mean Jensen-Shannon divergence between the domains' loads of a layer; 1 when no two share an expert."""
    rows = [load_LE[layer] for load_LE in loads.values()]
    pairs = [entropy_bits((a + b) / 2) - (entropy_bits(a) + entropy_bits(b)) / 2 for a, b in combinations(rows, 2)]
    return float(np.mean(pairs))
