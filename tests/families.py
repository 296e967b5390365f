"""Tiny random models of every family that the tests check, as checkpoints in hub format with a tokenizer.

Two or three layers, a few experts, float32. Weights are drawn so that routing is diverse and ties are unlikely:
transformers' own initialization leaves routers nearly flat and biases at zero.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.family_configs import (
    BASE,
    BOS_ID,
    EOS_ID,
    OTHER_FAMILIES,
    PAD_ID,
    PARITY_FAMILIES,
    REFUSED_FAMILIES,
    VOCAB_SIZE,
)

__all__ = [
    "BOS_ID",
    "EOS_ID",
    "FAMILIES",
    "OTHER_FAMILIES",
    "PAD_ID",
    "PARITY_FAMILIES",
    "REFUSED_FAMILIES",
    "VOCAB_SIZE",
    "make_checkpoint",
    "make_model",
    "make_tokenizer",
]

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")

_CORPUS = (
    "The gate of a layer reads a token and names the experts that shall work on it. Most tokens go where most tokens "
    "went before, so that some experts are always busy and others wait for the one word that is theirs. When the words "
    "change, the load changes with them, and whoever has planned for yesterday has planned for the wrong experts."
)
"""Text from which the tokenizer's merges are learned."""

CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

FAMILIES = PARITY_FAMILIES | OTHER_FAMILIES
_ALL = FAMILIES | REFUSED_FAMILIES


def make_model(family: str, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random model in float32 and eval mode; equal seeds give equal weights. `settings` go to its config."""
    config = CONFIG_MAPPING[family](**(BASE | _ALL[family] | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        _randomize(model)
    return model


def make_checkpoint(
    family: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any
) -> Path:
    """Write a random checkpoint of `family` in hub format, with a tokenizer, and return its folder."""
    model = make_model(family, seed=seed, **settings).to(dtype)
    model.config.dtype = dtype
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD_ID, EOS_ID
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template: any text round-trips."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_trained_tokenizer(),
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=BASE["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


@functools.cache
def _trained_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    return tokenizer


@torch.no_grad()
def _randomize(model: PreTrainedModel) -> None:
    """Matrices by fan-in, routers steeper, and noise on every vector (norms, biases, correction biases)."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape)
        if tensor.dim() < 2:
            tensor.add_(0.1 * noise)
            continue
        is_router = any(part in ("gate", "router") for part in name.split("."))
        tensor.copy_(noise * (3.0 if is_router else 1.0) / tensor.shape[-1] ** 0.5)
