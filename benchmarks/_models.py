"""Random models for benchmarks: shapes of real families, with a tokenizer of meaningless words, packed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from moeless.core.routing_table import LOCAL_WORKER, spread_evenly
from moeless.dispatch.dispatcher import Dispatcher
from moeless.engine.transformers.experts import attach_dispatcher, register_experts
from moeless.functions.feed_forward import FeedForward
from moeless.functions.pool import InstancePool
from moeless.packages.backbone import load_backbone
from moeless.packages.pack import pack_checkpoint
from moeless.packages.packed_model import PackedModel

_SMALL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "mixtral": MixtralConfig(**_SMALL | {"intermediate_size": 512, "num_local_experts": 16, "num_experts_per_tok": 2}),
    "olmoe": OlmoeConfig(
        **_SMALL | {"intermediate_size": 128, "num_experts": 64, "num_experts_per_tok": 8, "pad_token_id": 0}
    ),
    "367m": MixtralConfig(
        **_SMALL
        | {
            "hidden_size": 512,
            "intermediate_size": 1792,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
        }
    ),
}
"""Random models: Mixtral-shaped, OLMoE-shaped, and one of 367 million parameters."""

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
"""transformers' own ways to compute experts on a CPU."""


@dataclass(frozen=True)
class RandomModel:
    """A checkpoint of random weights and its pack."""

    checkpoint: Path
    packed: PackedModel

    def by_transformers(self, dtype: torch.dtype) -> PreTrainedModel:
        """transformers' model; `set_experts_implementation` chooses how its experts are computed."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=dtype)
        return model

    def by_moeless(self, dtype: torch.dtype) -> PreTrainedModel:
        """Our backbone with every expert in this process."""
        register_experts()
        manifest = self.packed.manifest
        model = load_backbone(self.packed, dtype=dtype)
        pool = InstancePool(self.packed, dtype=dtype)
        pool.start_many(self.packed.functions)
        table = spread_evenly(
            num_layers=manifest.num_moe_layers, num_experts=manifest.num_experts, workers=(LOCAL_WORKER,)
        )
        attach_dispatcher(model, Dispatcher(FeedForward(pool), table))
        return model


@contextlib.contextmanager
def random_model(shape: str, folder: Path | None = None) -> Iterator[RandomModel]:
    """The model of CONFIGS[shape]; written under `folder` if that is given and has none yet, else for this once."""
    transformers_logging.disable_progress_bar()
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moeless-benchmark-")))
        checkpoint, packed = folder / shape / "checkpoint", folder / shape / "packed"
        if not (packed / "manifest.json").is_file():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[shape], dtype=torch.float32)
            model.save_pretrained(checkpoint)
            del model
            pack_checkpoint(checkpoint, packed)
        yield RandomModel(checkpoint, PackedModel.open(packed))


def word_tokenizer(vocab_size: int) -> Tokenizer:
    """Token i is the word `wi`."""
    return Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))


def random_prompts(batch: int, length: int, vocab_size: int) -> list[list[int]]:
    """Prompts of equal length that share no prefix."""
    generator = torch.Generator().manual_seed(batch)
    prompts: list[list[int]] = torch.randint(3, vocab_size, (batch, length), generator=generator).tolist()
    return prompts
